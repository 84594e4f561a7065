"""The samples of a step that the run's folder keeps, on rank 0: as text to read, and exactly, to be replayed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from aligner.algorithms.step import Step
from aligner.data.decoding import decode
from aligner.data.samples import Samples
from aligner.report.sample_records import RecordedTurn, SampleRecord
from aligner.reward.pool import Status
from aligner.reward.role import Rewards
from aligner.spmd.transfer import read_on_rank0
from aligner.spmd.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def collect_samples(
    world: World, result: Step, count: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[dict[str, Any]], list[SampleRecord]] | None:
    """The first `count` samples of the batch as `write_samples` and `write_records` take them, on rank 0; None elsewhere, and
    where the step has no scored samples. A collective of the world."""
    if result.scores is None or result.samples is None:
        return None
    refs = {"samples": result.samples, "scores": result.scores}
    collected = read_on_rank0(world, refs, None, lambda one, other: None, limit=count)
    if collected is None:
        return None
    samples, scores = collected[0]["samples"], collected[0]["scores"]
    records = list(records_of(samples, scores))
    return [_item(record, scores, tokenizer) for record in records], records


def records_of(samples: Samples, scores: Rewards) -> Iterator[SampleRecord]:
    """A record of each row."""
    for row in range(samples.rows):
        segments = [0]
        if samples.segment_BT is not None:
            steps_T = samples.segment_BT[row, : samples.length_B[row]].diff()
            segments += (steps_T.nonzero().flatten() + 1).tolist()
        of_environment = None if samples.episode_reward_B is None else samples.episode_reward_B[row].item()
        yield SampleRecord(
            row=row,
            prompt_index=int(samples.prompt_index_B[row]),
            fields=samples.fields[row],
            tokens=samples.tokens_BT[row, : samples.length_B[row]].tolist(),
            prompt_tokens=int(samples.prompt_len_B[row]),
            turns=list(_turns(samples, row)),
            segments=segments,
            truncated=None if samples.truncated_B is None else bool(samples.truncated_B[row]),
            reward=scores.reward_B[row].item(),
            status=Status(int(scores.status_B[row])).name.lower(),
            components={name: value_B[row].item() for name, value_B in scores.components.items()},
            episode_reward=of_environment,
            episode=None if samples.episodes is None else samples.episodes[row],
        )


def _turns(samples: Samples, row: int) -> Iterator[RecordedTurn]:
    """The turns of a row that sampled a token; a response is one."""
    spans = [(1, int(samples.prompt_len_B[row]), int(samples.length_B[row]))]
    if samples.turn_BT is not None:
        turn_T = samples.turn_BT[row]
        places = {int(number): (turn_T == number).nonzero().flatten() for number in turn_T.unique() if number}
        spans = [(number, int(at[0]), int(at[-1]) + 1) for number, at in sorted(places.items())]
    for number, start, stop in spans:
        logp_BT, version_BT, reward_BT = samples.rollout_logp_BT, samples.version_BT, samples.turn_reward_BT
        yield RecordedTurn(
            number=number,
            start=start,
            stop=stop,
            logp=[] if logp_BT is None else logp_BT[row, start:stop].tolist(),
            versions=[] if version_BT is None else version_BT[row, start:stop].tolist(),
            reward=None if reward_BT is None or stop == start else reward_BT[row, stop - 1].item(),
        )


def _item(record: SampleRecord, scores: Rewards, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A record as it is read: an episode's response is all of it after the first context, sampled or not."""
    fields = {name: value for name, value in record.fields.items() if name != "prompt"}
    item = {
        "prompt": record.fields.get("prompt", ""),
        "response": scores.response[record.row],
        "reward": scores.reward_B[record.row].item(),
        "status": Status(int(scores.status_B[record.row])),
        "fields": fields,
    }
    if record.episode is None:
        return item
    response = decode(tokenizer, record.tokens[record.prompt_tokens :], keep_special_tokens=True)
    shown = {name: record.episode[name] for name in ("ended", "detail", "metrics") if record.episode.get(name)}
    return {**item, "response": response, "turns": len(record.turns), **shown}
