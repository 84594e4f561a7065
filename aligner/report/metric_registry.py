"""Every metric of a run, declared once: name, unit, how it is reduced, where it is shown, what it means (no torch).

The console, the figures, the report, the guards, the choice of the best export, update and step statistics, and
docs/metrics.md read this table. A metric of a user's own loop needs no declaration: it is written to metrics.jsonl and
gets a column of its own on the console.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from functools import cache, cached_property
from typing import Literal

OWN = "own"
"""The placeholder of families that take any name of a user's loop; no loop of aligner writes one of these."""


class Reduce(Enum):
    """How one number is made of many; the value is the text of docs/metrics.md."""

    TOKENS = "mean over the trained tokens of all optimizer steps"
    ROWS = "mean over the rows with a trained token, of all optimizer steps"
    LARGEST = "largest token (or row)"
    FIRST_MINIBATCH = "mean over the trained tokens of the first optimizer step"
    STEPS = "mean over optimizer steps"
    TOTAL = "sum over optimizer steps"
    BATCH = "mean over the batch"
    COUNT = "count in the batch"
    HELD_OUT = "mean over the held-out rows"
    RANKS_LARGEST = "largest of all ranks"
    RANKS_TOTAL = "sum over all ranks"
    REPLICAS = "mean over the time of all replicas"
    TURNS = "mean over the turns of all replicas"
    ONCE = "one number of the step"


Format = Literal["number", "count", "rate", "seconds", "gigabytes", "scientific", "tenths"]
"""How the console and the report write a value; see `aligner.report.console.cell`."""


@dataclass(frozen=True)
class Column:
    """A column of the console's table."""

    place: int
    """Columns stand in ascending order of it."""
    width: int
    """Characters."""
    drop: int = 0
    """On a narrow terminal the highest is dropped first; 0 never is."""
    title: str = ""
    """Default: the metric's name."""


@dataclass(frozen=True)
class Panel:
    """A small figure of the report, which draws the first six that a run has."""

    place: int
    """Panels stand in ascending order of it."""
    title: str
    log: bool = False
    """Logarithmic y axis."""


@dataclass(frozen=True)
class Metric:
    """One metric, or a family of them: `{placeholder}` in the name stands for any text."""

    name: str
    unit: str
    reduce: Reduce
    meaning: str
    format: Format = "number"
    rollout: Column | None = None
    """Its column in the table of loops that sample."""
    supervised: Column | None = None
    """Its column in the table of loops that sample nothing."""
    own_column: bool = False
    """Shown on the console as a user's metric is: in a column of its own, after the others. Metrics with no column at all
    are in metrics.jsonl and the report only."""
    panel: Panel | None = None
    title: str = ""
    """Its name in the report's summary and tables."""
    higher_is_better: bool | None = None
    """Of metrics that choose the best export (train.best_metric); None: it chooses none."""
    also_max: bool = False
    """An update reports the largest token or row beside the mean, as `<name>_max`."""

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """What matches the names of this family."""
        return re.compile(re.sub(r"\\\{\w+\\\}", ".+", re.escape(self.name)))


@dataclass(frozen=True)
class Phase:
    """A part of a step, by the role calls that make it up: `seconds_NAME`, `memory_NAME`."""

    name: str
    call: str | None
    """Method of a role that is timed; None: the evaluation, which times itself."""
    color: str
    """In the report."""
    meaning: str
    column: Column | None = None
    """Of its seconds, in the table of loops that sample."""


PHASES = (
    Phase("generate", "generate", "#3b7dc4", "The engine generates responses.", Column(8, 8, 6, "generate")),
    Phase("score", "score", "#8b6fc0", "The reward role scores them.", Column(9, 6, 10, "score")),
    Phase("scores", "scores", "#b57edc", "A reward model scores them."),
    Phase(
        "logprobs", "logprobs", "#37a3a3", "Log-probabilities of policy and reference.", Column(10, 8, 9, "logprobs")
    ),
    Phase("values", "values", "#7fc4bd", "The critic's values."),
    Phase("update", "update", "#e07b39", "Updates: forward, backward, optimizer.", Column(11, 7, 7, "update")),
    Phase("reshard", "reshard_to", "#3f9e6e", "New weights reach the rollout engines.", Column(12, 7, 8, "reshard")),
    Phase("evaluate", None, "#c8504b", "An evaluation; not part of `seconds`."),
)
"""In the order in which they are stacked in the report."""
TIMED_CALLS = {phase.call: phase.name for phase in PHASES if phase.call is not None}
"""Method of a role -> the phase that its time and memory count for."""

BASIC = (
    Metric("step", "steps", Reduce.ONCE, "Iterations of the loop; 0: before the first.", "count",
           rollout=Column(0, 5), supervised=Column(0, 5)),
    Metric("time", "s", Reduce.ONCE, "When the row was written: seconds since 1970 (UTC)."),
)  # fmt: skip

SAMPLES = (
    Metric("reward", "", Reduce.BATCH, "Reward of the rows that have one. KTO: beta (log p - log q) of the answers.",
           rollout=Column(1, 7)),
    Metric("reward_ok", "rows", Reduce.COUNT, "Rows with a reward."),
    Metric("reward_failed", "rows", Reduce.COUNT, "Rows whose rule or endpoint failed: left out of advantages and loss."),
    Metric("reward_timeout", "rows", Reduce.COUNT, "Rows that took too long to score: left out likewise."),
    Metric("reward_unparsable", "rows", Reduce.COUNT, "Rows whose response could not be read: left out likewise."),
    *(
        Metric(f"reward/{{component}}_{status}", "rows", Reduce.COUNT, "The same of one component of the reward.")
        for status in ("failed", "timeout", "unparsable")
    ),
    Metric("reward/{component}", "", Reduce.BATCH, "Raw value of one component, where the reward has several."),
    Metric("greedy_reward", "", Reduce.BATCH, "ReMax: reward of the greedy responses.", own_column=True),
    Metric("length", "tokens", Reduce.BATCH, "Length of the responses; of episodes, sampled tokens of all turns.", "tenths",
           rollout=Column(5, 6, 5), panel=Panel(3, "response length (tokens)")),
    Metric("truncated", "fraction", Reduce.BATCH, "Responses that reached their limit without a stop token.",
           panel=Panel(12, "truncated share")),
    Metric("sampled_groups", "groups", Reduce.COUNT, "Dynamic sampling: groups sampled for this step.", own_column=True),
    Metric("signal_fraction", "fraction", Reduce.BATCH, "Dynamic sampling: groups whose rewards (or advantages of turns) differ.",
           own_column=True),
    Metric("batch_filled", "fraction", Reduce.ONCE, "Dynamic sampling: rows found, of those wanted.", own_column=True),
    Metric("pairs", "pairs", Reduce.COUNT, "rank_samples: pairs written.", own_column=True),
)  # fmt: skip
EPISODES = (
    Metric("episodes/turns", "turns", Reduce.BATCH, "Turns that the policy has sampled in an episode.", "tenths",
           own_column=True, panel=Panel(13, "turns of an episode")),
    Metric("episodes/ended_{kind}", "episodes", Reduce.COUNT,
           "Episodes that ended so: done, max_turns, max_tokens, or the kind of a failure (timeout, crashed, replay, ...)."),
    Metric("episodes/sampled_tokens", "tokens", Reduce.BATCH, "Sampled tokens of an episode.", "tenths"),
    Metric("episodes/context_tokens", "tokens", Reduce.BATCH,
           "Tokens of an episode that were not sampled: its first context, tool results, user turns.", "tenths"),
    Metric("episodes/environment_seconds", "s", Reduce.TURNS,
           "Time from a turn's end (or an episode's start) to what its environment asked for next.", "seconds"),
    Metric("episodes/engine_idle", "fraction", Reduce.REPLICAS,
           "Share of the time of playing in which a replica had nothing to sample: every episode was with its environment."),
    Metric("episodes/{name}", "", Reduce.RANKS_TOTAL, "What the environments or agent programs of a job count."),
    Metric("environment/{name}", "", Reduce.BATCH, "A metric of the environment itself, over the episodes that have it."),
)  # fmt: skip

EVALUATION = (
    Metric("accuracy", "", Reduce.HELD_OUT,
           "Reward of train.eval_samples answers (or episodes) to each held-out prompt; without prompts, as heldout_pair_accuracy.",
           rollout=Column(2, 8), supervised=Column(2, 8), title="held-out accuracy", higher_is_better=True),
    Metric("pass@{k}", "fraction", Reduce.HELD_OUT,
           "Probability that one of k answers (or episodes) to a held-out prompt has a reward of train.eval_success or more."),
    Metric("heldout_loss", "nats/token", Reduce.HELD_OUT, "-log p of held-out demonstrations, over their trained tokens.",
           supervised=Column(5, 13, 1, "held-out loss"), title="held-out loss", higher_is_better=False),
    Metric("heldout_pair_accuracy", "fraction", Reduce.HELD_OUT,
           "Held-out pairs whose chosen answer scores higher (a tie is 0.5).", higher_is_better=True),
    Metric("heldout_margin", "nats", Reduce.HELD_OUT,
           "Chosen minus rejected score of held-out pairs: log p (minus the reference's), or the reward model's score.",
           supervised=Column(6, 15, 7, "held-out margin"), higher_is_better=True),
)  # fmt: skip
"""What evaluations give; of those with `higher_is_better` the first that a run has chooses the best export."""

UPDATE = (
    Metric("loss", "", Reduce.STEPS, "The loss, as policy.reduction takes its mean over a minibatch.",
           supervised=Column(1, 9), panel=Panel(8, "loss")),
    Metric("grad_norm", "", Reduce.STEPS, "Norm of all gradients, before clipping.",
           supervised=Column(9, 9, 2, "grad norm"), panel=Panel(9, "gradient norm")),
    Metric("lr", "", Reduce.STEPS, "Learning rate.", "scientific",
           supervised=Column(10, 8, 3), panel=Panel(10, "learning rate")),
    Metric("tokens", "tokens", Reduce.TOTAL, "Trained tokens (prompts not counted).", "count", supervised=Column(11, 8, 6)),
    Metric("kl", "nats/token", Reduce.TOKENS, "KL(policy || reference), by the loss's estimator. KTO: z_0, nats a response.",
           rollout=Column(3, 7, 1), supervised=Column(7, 8, 1), panel=Panel(2, "KL to the reference"), also_max=True),
    Metric("kl_max", "nats", Reduce.LARGEST, "Largest kl of a token."),
    Metric("entropy", "nats/token", Reduce.TOKENS, "Entropy of the policy's next-token distribution.",
           rollout=Column(4, 7, 4), supervised=Column(8, 7, 5), panel=Panel(1, "entropy (nats)")),
    Metric("ratio", "", Reduce.TOKENS, "Probability under the policy / when sampled (GSPO: of the response).", also_max=True),
    Metric("ratio_max", "", Reduce.LARGEST, "Largest ratio."),
    Metric("clip_fraction", "fraction", Reduce.TOKENS, "Tokens whose surrogate has no gradient because a clip binds."),
    Metric("gap", "nats/token", Reduce.FIRST_MINIBATCH,
           "|policy - rollout| log-probability of sampled tokens, while the policy still has the weights that sampled.",
           "scientific", also_max=True),
    Metric("gap_max", "nats", Reduce.LARGEST, "Largest gap of a token, in the first optimizer step.", "scientific",
           rollout=Column(6, 7, 2, "gap"), panel=Panel(4, "largest log-probability gap", log=True)),
    Metric("weight", "", Reduce.TOKENS, "Decoupled losses: importance weight of the sampler.", own_column=True,
           also_max=True),
    Metric("weight_max", "", Reduce.LARGEST, "Largest weight.", own_column=True),
    Metric("bounded_fraction", "fraction", Reduce.TOKENS, "Decoupled losses: weights that met their bound.",
           own_column=True),
    Metric("staleness", "updates", Reduce.TOKENS, "Updates between the weights that sampled a token and the present ones.",
           own_column=True, also_max=True),
    Metric("staleness_max", "updates", Reduce.LARGEST, "Largest staleness of a token.", own_column=True),
    Metric("advantage_abs_max", "", Reduce.LARGEST, "Largest magnitude of an advantage; 0: nothing is learned."),
    Metric("chosen_reward", "", Reduce.ROWS, "Pairs: reward (implicit, or the model's score) of the chosen answer."),
    Metric("rejected_reward", "", Reduce.ROWS, "Pairs: reward of the rejected answer."),
    Metric("margin", "", Reduce.ROWS, "Pairs: chosen minus rejected reward. KTO: the reward, signed by the label.",
           supervised=Column(4, 8, 1), panel=Panel(5, "margin of the chosen answer")),
    Metric("pair_accuracy", "fraction", Reduce.ROWS, "Pairs whose chosen answer has the higher reward.",
           supervised=Column(3, 7, 0, "pairs"), panel=Panel(6, "pairs told apart")),
    Metric("chosen_logp", "nats", Reduce.ROWS, "Pairs: log p of the chosen answer (by length where the loss does so)."),
    Metric("rejected_logp", "nats", Reduce.ROWS, "Pairs: log p of the rejected answer."),
    Metric("label_accuracy", "fraction", Reduce.ROWS, "KTO: answers on the side of z_0 that their label says.",
           own_column=True),
    Metric("desirable", "fraction", Reduce.ROWS, "KTO: answers called good.", own_column=True),
    Metric("logp", "nats", Reduce.ROWS, "KTO: log p of the answers.", own_column=True),
    Metric("score", "", Reduce.ROWS, "Reward model: its score of both answers.", own_column=True),
    Metric("value", "", Reduce.TOKENS, "Critic: the value.", own_column=True),
    Metric("return", "", Reduce.TOKENS, "Critic: the return that the value is to predict.", own_column=True),
    Metric("error", "", Reduce.TOKENS, "Critic: |value - return|.", own_column=True),
    Metric("value_clip_fraction", "fraction", Reduce.TOKENS, "Critic: tokens whose value has no gradient because its clip binds.",
           own_column=True),
    Metric("padding", "fraction", Reduce.ONCE, "Computed tokens that are padding."),
    Metric("shared_prefix", "fraction", Reduce.ONCE, "Tokens of common prefixes, computed for another row of the microbatch."),
    Metric("imbalance", "fraction", Reduce.ONCE, "Estimated time that data-parallel ranks wait for the one with the most expensive rows."),
    Metric("skipped_steps", "optimizer steps", Reduce.TOTAL, "Left out: loss or gradients not finite; absent where none.",
           own_column=True),
    Metric("empty_steps", "optimizer steps", Reduce.TOTAL, "Left out: no trained token; absent where none.",
           own_column=True),
    Metric("critic_loss", "", Reduce.STEPS, "The critic's loss.", panel=Panel(7, "the critic's loss")),
    Metric("critic_{metric}", "", Reduce.STEPS, "Any metric of this section, of the critic's update (PPO); reduced as it is."),
    Metric("kl_coef", "", Reduce.ONCE, "PPO: what a nat of KL costs in the reward.", own_column=True),
    Metric("response_kl", "nats", Reduce.BATCH, "PPO: log p - log q of a response, as the KL controller sees it.",
           own_column=True),
)  # fmt: skip

SPEED = (
    Metric("seconds", "s", Reduce.ONCE, "The iteration, without evaluation, export and checkpoint.", "seconds",
           supervised=Column(13, 7, 4)),
    Metric("tokens_per_second", "tokens/s", Reduce.ONCE, "tokens / seconds.", "rate",
           rollout=Column(7, 7, 3, "tok/s"), supervised=Column(12, 7, 1, "tok/s"), panel=Panel(11, "tokens/s")),
    *(
        Metric(f"seconds_{phase.name}", "s", Reduce.RANKS_LARGEST if phase.call else Reduce.ONCE, phase.meaning, "seconds",
               rollout=phase.column)
        for phase in PHASES
    ),
    Metric("seconds_checkpoint", "s", Reduce.ONCE, "What the checkpoint after the step before held up the loop.", "seconds"),
    Metric("memory_peak", "GiB", Reduce.RANKS_LARGEST, "Memory at its highest, between role calls too."),
    *(
        Metric(f"memory_{phase.name}", "GiB", Reduce.RANKS_LARGEST, f"Memory at its highest in {phase.call} calls.")
        for phase in PHASES if phase.call
    ),
)  # fmt: skip

RESHARD = (
    Metric("reshard_gigabytes_per_second", "GB/s", Reduce.ONCE, "Bytes moved by the seconds of the whole sync.", "gigabytes",
           rollout=Column(13, 4, 11, "GB/s")),
    Metric("reshard_moved_bytes", "bytes", Reduce.RANKS_TOTAL, "Sent between ranks."),
    Metric("reshard_minimum_bytes", "bytes", Reduce.RANKS_TOTAL, "Needed and not held where they were needed: the least possible."),
    Metric("reshard_relayed_bytes", "bytes", Reduce.RANKS_TOTAL, "Of those moved: received and relayed to other ranks."),
    Metric("reshard_received_bytes", "bytes", Reduce.RANKS_TOTAL, "Received from other ranks."),
    Metric("reshard_local_bytes", "bytes", Reduce.RANKS_TOTAL, "Copied within a rank."),
    Metric("reshard_changed_bytes", "bytes", Reduce.RANKS_TOTAL, "Changed since the last sync, where that is compared (reshard.deltas)."),
    Metric("reshard_checksummed", "regions", Reduce.RANKS_TOTAL, "Regions whose checksum was verified after writing."),
    Metric("seconds_reshard_plan", "s", Reduce.RANKS_LARGEST, "Planning the transfer.", "seconds", title="plan (once)"),
    Metric("seconds_reshard_pack", "s", Reduce.RANKS_LARGEST, "Reading, casting and checksumming what is sent.", "seconds",
           title="pack: read, cast, checksum"),
    Metric("seconds_reshard_wire", "s", Reduce.RANKS_LARGEST, "Waiting for messages.", "seconds",
           title="wire: wait for messages"),
    Metric("seconds_reshard_apply", "s", Reduce.RANKS_LARGEST,
           "Writing received regions, local copies, the proof and the engine's re-layout.", "seconds",
           title="apply: check, write, compare, the engine's re-layout"),
)  # fmt: skip

_OWN_MEANING = "A user's loop's own; in metrics.jsonl, not on the console."
OTHER = (
    Metric("guard/{guard}", "", Reduce.ONCE, "1 in a step in which this guard found something (docs/guards.md)."),
    Metric("source/{source}_share", "fraction", Reduce.ONCE, "Rows drawn from this source of data.sources, of all drawn in the step."),
    Metric("source/{source}_reward", "", Reduce.BATCH, "Reward of the samples of this source's prompts."),
    Metric("source/{source}_success", "fraction", Reduce.BATCH,
           "Samples of this source's prompts with a reward of data.curriculum.success_reward or more."),
    Metric("curriculum/measured", "prompts", Reduce.ONCE, "Curriculum by success: prompts that were sampled so far."),
    Metric("curriculum/retired", "prompts", Reduce.ONCE,
           "Curriculum by success: prompts that are solved and left out (data.curriculum.retire_at)."),
    Metric("data/left_out", "rows", Reduce.ONCE, "Training rows left out when they were read: in the first step's row; of a streamed set in every row, so far."),
    Metric("data/wait_seconds", "s", Reduce.ONCE, "What a step waited for rows of a streamed set to be read and tokenized (first rank).",
           "seconds"),
    Metric("data/heldout_left_out", "rows", Reduce.ONCE, "The same of held-out rows."),
    Metric(f"reshard_{{{OWN}}}", "", Reduce.ONCE, _OWN_MEANING),
    Metric(f"seconds_{{{OWN}}}", "s", Reduce.ONCE, _OWN_MEANING, "seconds"),
    Metric(f"memory_{{{OWN}}}", "", Reduce.ONCE, _OWN_MEANING),
    Metric(f"data/{{{OWN}}}", "", Reduce.ONCE, _OWN_MEANING),
)  # fmt: skip

SECTIONS: dict[str, tuple[Metric, ...]] = {
    "Every row": BASIC,
    "Samples and rewards": SAMPLES,
    "Episodes": EPISODES,
    "Evaluation": EVALUATION,
    "Updates": UPDATE,
    "Time and memory": SPEED,
    "Weight sync": RESHARD,
    "Other": OTHER,
}
METRICS = tuple(metric for section in SECTIONS.values() for metric in section)
LEFT_OUT = ("reward_failed", "reward_timeout", "reward_unparsable")
"""Counts of rows without a reward."""
HEADLINES = ("accuracy", "heldout_loss", "reward", "loss")
"""What a run has reached is the first of these that it has."""
_BY_NAME = {metric.name: metric for metric in METRICS}


@cache
def metric_of(name: str) -> Metric | None:
    """The declaration of a metric, or of the family that it belongs to; None for a user's own."""
    if name in _BY_NAME:
        return _BY_NAME[name]
    return next((one for one in METRICS if "{" in one.name and one.pattern.fullmatch(name)), None)


def title_of(name: str) -> str:
    """How the report calls a metric."""
    metric = metric_of(name)
    return (metric.title if metric is not None else "") or name


def has_max(name: str) -> bool:
    """Whether an update reports the largest token (or row) of this metric of a loss beside its mean, as `<name>_max`."""
    metric = metric_of(name)
    return metric is not None and metric.also_max


def of_first_minibatch(name: str) -> bool:
    """Whether an update reports this metric of a loss for its first optimizer step alone."""
    metric = metric_of(name)
    return metric is not None and metric.reduce is Reduce.FIRST_MINIBATCH


def best_metrics() -> dict[str, bool]:
    """Metrics that may choose the best export, the first choice first -> whether higher is better."""
    return {metric.name: metric.higher_is_better for metric in METRICS if metric.higher_is_better is not None}


def as_markdown() -> str:
    """docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "Each step is one line of `metrics.jsonl` in the run's folder (and a row in wandb): a JSON object of these numbers, as far",
        "as the loop has them. NaN and infinities are written as null. The declarations are in `aligner/report/metric_registry.py`,",
        "which the console, the figures and the report read too, and this page is made from them:",
        "`python -m aligner.report.metric_registry > docs/metrics.md`. A loop's own metrics (`Step.extra_metrics`, and what its loss returns)",
        "need no declaration; on the console each gets a column of its name.",
    ]
    for title, metrics in SECTIONS.items():
        lines += ["", f"## {title}", "", "| metric | unit | meaning | how it is reduced |", "| --- | --- | --- | --- |"]
        for metric in metrics:
            meaning = metric.meaning.replace("|", "\\|")
            lines.append(f"| `{metric.name}` | {metric.unit} | {meaning} | {metric.reduce.value} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(as_markdown(), end="")
