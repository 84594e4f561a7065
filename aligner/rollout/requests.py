"""Samples under way inside vLLM: started, advanced a token at a time, interrupted, collected with who drew each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from aligner.rollout.config import Sampling
from aligner.rollout.draws import draws_of
from aligner.rollout.loaded import LoadedWeights


@dataclass(frozen=True)
class Sample:
    """One response as far as it has been drawn."""

    prompt: list[int]
    seed: int
    tokens: list[int] = field(default_factory=list)
    """Drawn token ids, with the stop token where one was drawn."""
    logp: list[float] = field(default_factory=list)
    """log p of each token under the distribution it was drawn from: after temperature, top-k and top-p."""
    versions: list[int] = field(default_factory=list)
    """Version of the weights that drew each token."""
    ended: bool = False
    """A stop token was drawn, or max_tokens reached."""
    truncated: bool = False
    """max_tokens was reached without a stop token."""
    draws: Tensor | None = field(default=None, repr=False, compare=False)
    """State of the sample's random stream where it was interrupted, if it has one."""


class Requests:
    """The requests of one engine. All ranks of a replica make the same calls in the same order.

    A sample that is interrupted is no longer in the engine; it goes on as a request of prompt and tokens, with its
    random stream where it was left, and so draws what it would have drawn without the interruption.
    """

    def __init__(self, llm: Any, runner: Any, stop: Sequence[int], loaded: LoadedWeights) -> None:
        self._llm, self._stop, self._loaded = llm, stop, loaded
        self._draws = draws_of(runner)
        self._live: dict[str, _Live] = {}
        self._tickets: dict[int, list[_Live]] = {}
        self._started = 0
        self.progress: Callable[[], None] = lambda: None
        """Called after each engine step."""

    @property
    def under_way(self) -> int:
        """Samples inside the engine."""
        return len(self._live)

    def start(self, samples: Sequence[Sample], sampling: Sampling, step_tokens: int | None = None) -> int:
        """Hand samples that have not ended to the engine, the longest first; nothing is drawn yet.

        Args:
            step_tokens: interrupt a sample when this many tokens have been added to it; None: never.

        Returns:
            What `finish` takes.
        """
        from vllm.inputs import tokens_input

        self._started += 1
        made = [_Live(sample, f"{self._started}.{number}") for number, sample in enumerate(samples)]
        self._tickets[self._started] = made
        for one in sorted(made, key=lambda one: -len(one.sample.prompt) - len(one.sample.tokens)):
            so_far = one.sample
            assert not so_far.ended, "a sample that has ended cannot go on"
            left = sampling.max_tokens - len(so_far.tokens)
            most = left if step_tokens is None else min(left, step_tokens)
            one.may_go_on = most < left
            params = request_params(sampling, most, self._stop, **self._draws.params(so_far.seed))
            one.inside = self._llm.add_request(one.name, tokens_input([*so_far.prompt, *so_far.tokens]), params)
            one.marks = [(0, self._loaded.version)]
            self._live[one.name] = one
            self._draws.begin(one.inside, so_far.seed, so_far.draws)
        return self._started

    def advance(self) -> None:
        """One engine step: about one token for each sample that has room."""
        try:
            outputs = self._llm.step()
            self.progress()
            for output in outputs:
                if output.finished:
                    one = self._live.pop(output.request_id)
                    one.sample = self._grown(one, output.outputs[0])
        except BaseException:
            self.abort()
            raise

    def ended(self, ticket: int) -> bool:
        """Whether all samples of one `start` have left the engine."""
        return all(one.name not in self._live for one in self._tickets[ticket])

    def hold(self, samples: Sequence[Sample]) -> int:
        """Samples that have left the engine, or another one, as if it had been started here: what `finish` takes."""
        self._started += 1
        self._tickets[self._started] = [_Live(sample, f"{self._started}.{n}") for n, sample in enumerate(samples)]
        return self._started

    def held(self, ticket: int) -> list[Sample]:
        """The samples of one `start` or `hold`, as far as they have left the engine."""
        return [one.sample for one in self._tickets[ticket]]

    def finish(self, ticket: int) -> list[Sample]:
        """The samples of one `start`, in its order, after all have left the engine."""
        while not self.ended(ticket):
            self.advance()
        return [one.sample for one in self._tickets.pop(ticket)]

    def abort(self) -> None:
        """Give up everything that is under way."""
        inside = [one.inside for one in self._live.values()]
        self._llm.abort_request(inside, internal=True)
        self._draws.forget(inside)
        self._live.clear()
        self._tickets.clear()

    def new_weights(self) -> None:
        """What is drawn from here on is drawn by the weights that the engine holds now."""
        version = self._loaded.version
        scheduled = self._llm.engine_core.engine_core.scheduler.requests
        for one in self._live.values():
            drawn = scheduled[one.inside].num_output_tokens
            if one.marks[-1][0] == drawn:
                one.marks.pop()
            one.marks.append((drawn, version))

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


@dataclass
class _Live:
    """A request."""

    sample: Sample
    name: str
    inside: str = ""
    """vLLM's own name for it."""
    may_go_on: bool = False
    """Its token limit is an interruption, not the response's end."""
    marks: list[tuple[int, int]] = field(default_factory=list)
    """(tokens of this request drawn before, version of the weights from there on)."""
