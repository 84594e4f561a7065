"""Samples under way inside vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from aligner.rollout.config import Sampling
from aligner.rollout.loaded import LoadedWeights
from aligner.rollout.requests import Request, Requests, Sample, tokens_left
from aligner.rollout.vllm.draws import draws_of


@dataclass
class _Live(Request):
    """A request."""

    name: str = ""
    inside: str = ""
    """vLLM's own name for it."""
    may_go_on: bool = False
    """Its token limit is an interruption, not the response's end."""
    marks: list[tuple[int, int]] = field(default_factory=list)
    """(tokens of this request drawn before, version of the weights from there on)."""


class VllmRequests(Requests[_Live]):
    """The requests of one vLLM engine; one that goes on has its random stream where it was left."""

    def __init__(self, llm: Any, runner: Any, stop: Sequence[int], loaded: LoadedWeights) -> None:
        super().__init__(stop, loaded)
        self._llm = llm
        self._draws = draws_of(runner)
        self._live: dict[str, _Live] = {}

    @property
    def under_way(self) -> int:
        """Samples inside the engine."""
        return len(self._live)

    def start(self, samples: Sequence[Sample], sampling: Sampling, step_tokens: int | None = None) -> int:
        """The longest go first."""
        from vllm.inputs import tokens_input

        made, going_on = self._to_start(samples, sampling)
        ticket = self._ticket(made)
        for one in going_on:
            so_far = one.sample
            most, one.may_go_on = tokens_left(so_far, sampling, step_tokens)
            params = request_params(sampling, most, self.stop, **self._draws.params(so_far.seed))
            one.inside = self._llm.add_request(one.name, tokens_input([*so_far.prompt, *so_far.tokens]), params)
            one.marks = [(0, self._loaded.version)]
            one.under_way = True
            self._live[one.name] = one
            self._draws.begin(one.inside, so_far.seed, so_far.draws)
        return ticket

    def advance(self) -> None:
        """One step of vLLM."""
        try:
            outputs = self._llm.step()
            self.progress()
            for output in outputs:
                if output.finished:
                    one = self._live.pop(output.request_id)
                    one.sample, one.under_way = self._grown(one, output.outputs[0]), False
        except BaseException:
            self.abort()
            raise

    def cancel(self, ticket: int) -> None:
        """Give up the samples of one `start`."""
        given_up = [one for one in self._tickets.pop(ticket) if one.under_way]
        inside = [one.inside for one in given_up]
        self._llm.abort_request(inside, internal=True)
        self._draws.forget(inside)
        for one in given_up:
            del self._live[one.name]

    def abort(self) -> None:
        """Give up everything that is under way."""
        inside = [one.inside for one in self._live.values()]
        self._llm.abort_request(inside, internal=True)
        self._draws.forget(inside)
        self._live.clear()
        self._tickets.clear()

    def new_weights(self) -> None:
        """vLLM's scheduler knows how many tokens each request has by now."""
        version = self._loaded.version
        scheduled = self._llm.engine_core.engine_core.scheduler.requests
        for one in self._live.values():
            drawn = scheduled[one.inside].num_output_tokens
            if one.marks[-1][0] == drawn:
                one.marks.pop()
            one.marks.append((drawn, version))

    def _request(self, sample: Sample, number: int) -> _Live:
        return _Live(sample, name=f"{self._started + 1}.{number}")

    def _grown(self, one: _Live, output: Any) -> Sample:
        tokens, logp = list(output.token_ids), self._draws.end(one.inside, output)
        assert len(tokens) == len(logp), f"{len(tokens)} tokens but {len(logp)} log-probabilities"
        if output.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"the rollout engine ended a response with {output.finish_reason!r}.")
        cut = output.finish_reason == "length"
        ends = [*(start for start, _ in one.marks[1:]), len(tokens)]
        versions = [version for (start, version), end in zip(one.marks, ends, strict=True) for _ in range(end - start)]
        before = one.sample
        goes_on = cut and one.may_go_on
        return replace(
            before,
            tokens=[*before.tokens, *tokens],
            logp=[*before.logp, *logp],
            versions=[*before.versions, *versions],
            ended=not goes_on,
            truncated=cut and not goes_on,
            draws=self._draws.state(one.inside) if goes_on else None,
        )


def request_params(sampling: Sampling, max_tokens: int, stop: Sequence[int], **more: Any) -> Any:
    """vLLM's parameters of one sample.

    Args:
        stop: tokens that end it where `sampling` names none.
        more: further ones, such as its seed.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=max_tokens,
        stop_token_ids=list(stop if sampling.stop_token_ids is None else sampling.stop_token_ids),
        ignore_eos=True,  # the list above is the whole truth
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        **more,
    )
