"""Samples under way inside vLLM: started, advanced a token at a time, interrupted, collected with who drew each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from aligner.rollout.config import Sampling
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
    """State of the sample's random stream where it was interrupted."""


class Requests:
    """The requests of one engine. All ranks of a replica make the same calls in the same order.

    A sample that is interrupted is no longer in the engine; it goes on as a request of prompt and tokens, with its
    random stream where it was left, and so draws what it would have drawn without the interruption.
    """

    def __init__(self, llm: Any, runner: Any, stop: Sequence[int], loaded: LoadedWeights) -> None:
        self._llm, self._stop, self._loaded = llm, stop, loaded
        self._draws = _Draws(runner)
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
            params = request_params(sampling, so_far.seed, most, self._stop)
            one.inside = self._llm.add_request(one.name, tokens_input([*so_far.prompt, *so_far.tokens]), params)
            one.marks = [(0, self._loaded.version)]
            self._live[one.name] = one
            if so_far.draws is not None:
                self._draws.resume(one.inside, so_far.draws)
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
        self._llm.abort_request([one.inside for one in self._live.values()], internal=True)
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
        tokens, logp = list(output.token_ids), list(output.logprobs.logprobs)
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


def request_params(sampling: Sampling, seed: int, max_tokens: int, stop: Sequence[int]) -> Any:
    """vLLM's parameters of one sample.

    Args:
        stop: tokens that end it where `sampling` names none.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        seed=seed,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=max_tokens,
        stop_token_ids=list(stop if sampling.stop_token_ids is None else sampling.stop_token_ids),
        ignore_eos=True,  # the list above is the whole truth
        logprobs=0,  # of the sampled token only
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
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


class _Draws:
    """The random stream of each request.

    A prompt that is read in several engine steps draws a token at each, which is thrown away. vLLM turns the stream
    back after it, which only CUDA's can; so here such a request has no stream of its own until its prompt has been read.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._resumed: dict[str, Tensor] = {}
        self._sample: Callable[[Any], Any] = runner.sample_tokens
        runner.sample_tokens = self._sample_tokens

    def resume(self, request: str, state: Tensor) -> None:
        """Let a request that was just added go on from `state`."""
        self._resumed[request] = state

    def state(self, request: str) -> Tensor | None:
        """Where the stream of a request that has just ended is; None where it has none (greedy)."""
        generator = self._runner.requests[request].generator
        return None if generator is None else generator.get_state()

    def _sample_tokens(self, grammar: Any) -> Any:
        runner = self._runner
        for request in [name for name in self._resumed if name in runner.requests]:
            state, generator = self._resumed.pop(request), runner.requests[request].generator
            if generator is not None:
                generator.set_state(state)
        if runner.device.type != "cpu":
            return self._sample(grammar)
        generators = runner.input_batch.generators
        reading = torch.from_numpy(runner.discard_request_mask.np[: runner.input_batch.num_reqs]).nonzero().flatten()
        kept = {row: generators.pop(row) for row in reading.tolist() if row in generators}
        try:
            return self._sample(grammar)
        finally:
            generators.update(kept)
