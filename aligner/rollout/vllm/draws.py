"""How tokens are drawn, so that a sample depends on its seed and the weights alone; and what log p each token had.

On a CPU the draw of a token is keyed by the request's seed and the token's place in the sample, for all rows of a batch at
once: no request has a random state, so nothing needs to be carried where a sample is interrupted, nor turned back where a
draw does not count. vLLM's second model runner, on CUDA, does the same in a kernel of its own; its first one draws each request
from a generator, one kernel for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

GREEDY_BELOW = 1e-5
"""vLLM's own bound: a temperature below it is greedy."""


class Draws(Protocol):
    """The draws of one engine's requests, which are called as the engine calls them."""

    def params(self, seed: int) -> dict[str, Any]:
        """What a request that is drawn with `seed` adds to vLLM's SamplingParams."""

    def begin(self, request: str, seed: int, state: Tensor | None) -> None:
        """A request was added; `state`: where its random stream was left, if it was interrupted before."""

    def end(self, request: str, output: Any) -> list[float]:
        """A request has left the engine: log p of each of its tokens."""

    def state(self, request: str) -> Tensor | None:
        """Where the stream of a request that has just ended is; None where it has none."""

    def forget(self, requests: Iterable[str]) -> None:
        """Requests were given up."""


def draws_of(runner: Any) -> Draws:
    """What fits the runner; it changes how the runner samples, except vLLM's second one."""
    if runner.device.type == "cpu":
        return DrawsByPlace(runner)
    # the first runner keeps a state of each request by its name, the second in rows of one table
    return DrawsByGenerator(runner) if hasattr(runner, "requests") else DrawsByPosition()


def seed_params(seed: int) -> dict[str, Any]:
    """For vLLM's own sampler: a generator of the request's own, and the log-probability of the sampled token."""
    return {"seed": seed, "logprobs": 0, "flat_logprobs": True}


def place_seeds(seed_B: np.ndarray, place_B: np.ndarray) -> np.ndarray:
    """Seeds of the noise of single draws: a 63-bit hash of (seed of the request, place of the token).

    SplitMix64's finalizer (Steele, Lea and Flood 2014) twice, so that neither neighbouring seeds nor neighbouring places
    give related noise.
    """
    return _place_seeds(_mix(seed_B.astype(np.uint64)), place_B)


def _place_seeds(mixed_B: np.ndarray, place_B: np.ndarray) -> np.ndarray:
    """As `place_seeds`, of seeds that have been mixed."""
    mixed_B = _mix(mixed_B + place_B.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return (mixed_B >> np.uint64(1)).view(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class DrawsByPlace:
    """CPU. vLLM's kernel takes the noise of a row from one seed (Gumbel-max); vLLM itself draws that seed from a generator
    of each request, one call for each row and token, and passes log-probabilities through as many Python objects."""

    def __init__(self, runner: Any) -> None:
        self._runner, self._sampler = runner, runner.sampler
        self._seeds: dict[str, int] = {}
        self._logp: dict[str, list[float]] = {}
        self._batch: tuple[list[str], np.ndarray] = [], np.empty(0, np.uint64)
        """Names of the requests drawn last, and their mixed seeds: mostly those of the next draw, too."""
        runner.sampler.sample = self._sample

    def params(self, seed: int) -> dict[str, Any]:
        """Nothing: vLLM knows of no seed and is asked for no log-probabilities."""
        return {}

    def begin(self, request: str, seed: int, state: Tensor | None) -> None:
        """The place of a token is its index in prompt and response, wherever the sample was interrupted."""
        self._seeds[request], self._logp[request] = seed, []
        self._batch = [], self._batch[1]

    def end(self, request: str, output: Any) -> list[float]:
        """What was noted at each draw."""
        del self._seeds[request]
        return self._logp.pop(request)

    def state(self, request: str) -> Tensor | None:
        """There is none."""
        return None

    def forget(self, requests: Iterable[str]) -> None:
        """Their draws."""
        for request in requests:
            self._seeds.pop(request, None)
            self._logp.pop(request, None)

    def _sample(self, logits_BV: Tensor, metadata: Any) -> tuple[Tensor, None]:
        """In place of `vllm.v1.sample.sampler.Sampler.sample`: a token for each row, its log-probability noted here."""
        batch, rows = self._runner.input_batch, len(logits_BV)
        names = batch.req_ids[:rows]
        if metadata.all_greedy:
            token_B = self._sampler.greedy_sample(logits_BV)
        else:
            seed_B = _place_seeds(self._mixed_seeds(names), batch.num_tokens_no_spec[:rows])
            token_B, logits_BV = self._drawn(logits_BV, metadata, seed_B)
        # One pass over the logits; `logsumexp` takes three times as long for small vocabularies.
        logp_B = -cross_entropy(logits_BV, token_B.long(), reduction="none")
        # A prompt that is read in several engine steps draws at each; only the last draw counts.
        reading_B = self._runner.discard_request_mask.np[:rows].tolist()
        for name, logp, reading in zip(names, logp_B.tolist(), reading_B, strict=True):
            if not reading and name in self._logp:
                self._logp[name].append(logp)
        return token_B, None

    def _mixed_seeds(self, names: list[str]) -> np.ndarray:
        if self._batch[0] != names:
            seeds = np.array([self._seeds.get(name, 0) for name in names], np.uint64)
            self._batch = names, _mix(seeds)
        return self._batch[1]

    def _drawn(self, logits_BV: Tensor, metadata: Any, seed_B: np.ndarray) -> tuple[Tensor, Tensor]:
        """(a token for each row, the logits after temperature, top-k and top-p); greedy rows have temperature 1."""
        from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

        temperature_B: Tensor = metadata.temperature
        if metadata.all_random:
            logits_BV = apply_top_k_top_p(logits_BV.div_(temperature_B[:, None]), metadata.top_k, metadata.top_p)
            return gumbel_draw(logits_BV, seed_B), logits_BV
        greedy_B = temperature_B < GREEDY_BELOW
        most_likely_B = self._sampler.greedy_sample(logits_BV)
        temperature_B = temperature_B.masked_fill(greedy_B, 1.0)
        logits_BV = apply_top_k_top_p(logits_BV.div_(temperature_B[:, None]), metadata.top_k, metadata.top_p)
        return torch.where(greedy_B, most_likely_B, gumbel_draw(logits_BV, seed_B)), logits_BV


def gumbel_draw(logits_BV: Tensor, seed_B: np.ndarray) -> Tensor:
    """A token of each row, drawn with its softmax; the noise of (row, token) is determined by the row's seed alone."""
    drawn_B: Tensor = torch.ops._C.fused_gumbel_argmax.default(logits_BV.float(), torch.from_numpy(seed_B))
    return drawn_B


class DrawsByPosition:
    """CUDA, vLLM's second model runner: Gumbel-max in one kernel for all rows, whose noise is a hash of the request's seed, the
    token's position in prompt and response, and the vocabulary entry (`vllm/v1/worker/gpu/sample/gumbel.py`)."""

    def params(self, seed: int) -> dict[str, Any]:
        """See `seed_params`."""
        return seed_params(seed)

    def begin(self, request: str, seed: int, state: Tensor | None) -> None:
        """A sample that goes on has its tokens so far as prompt, so its positions go on too."""

    def end(self, request: str, output: Any) -> list[float]:
        """As vLLM has kept them."""
        return list(output.logprobs.logprobs)

    def state(self, request: str) -> Tensor | None:
        """There is none."""
        return None

    def forget(self, requests: Iterable[str]) -> None:
        """Nothing is kept."""


class DrawsByGenerator:
    """CUDA, vLLM's first model runner: its generators, a stream for each request, which it turns back after a draw that does not count."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._resumed: dict[str, Tensor] = {}
        self._inner: Callable[[Any], Any] = runner.sample_tokens
        runner.sample_tokens = self._sample_tokens

    def params(self, seed: int) -> dict[str, Any]:
        """See `seed_params`."""
        return seed_params(seed)

    def begin(self, request: str, seed: int, state: Tensor | None) -> None:
        """Let a request that was just added go on from `state`."""
        if state is not None:
            self._resumed[request] = state

    def end(self, request: str, output: Any) -> list[float]:
        """As vLLM has kept them."""
        return list(output.logprobs.logprobs)

    def state(self, request: str) -> Tensor | None:
        """Its generator's; None where it has none (greedy)."""
        generator = self._runner.requests[request].generator
        return None if generator is None else generator.get_state()

    def forget(self, requests: Iterable[str]) -> None:
        """States that were not taken up."""
        for request in requests:
            self._resumed.pop(request, None)

    def _sample_tokens(self, grammar: Any) -> Any:
        runner = self._runner
        for request in [name for name in self._resumed if name in runner.requests]:
            state, generator = self._resumed.pop(request), runner.requests[request].generator
            if generator is not None:
                generator.set_state(state)
        return self._inner(grammar)
