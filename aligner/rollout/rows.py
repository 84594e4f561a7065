"""Generated responses as rows of `Samples`, and the seed of each request."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from aligner.data.prompts import Prompt
from aligner.data.samples import Samples, pad_rows
from aligner.rollout.requests import Sample


def request_seed(*parts: int) -> int:
    """Seed of one prompt's samples: a function of its arguments only, so samples do not depend on the layout.

    vLLM gives sample i of a request seed + i, so seeds are spread over 2^48 and never neighbours.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 16


def completed_samples(prompts: Sequence[Prompt], samples: Sequence[Sample]) -> Samples:
    """One row for each sample; sample i answers prompt i."""
    tokens = [[*prompt.tokens, *sample.tokens] for prompt, sample in zip(prompts, samples, strict=True)]
    prompt_len_B = torch.tensor([len(prompt.tokens) for prompt in prompts], dtype=torch.long)
    length_B = torch.tensor([len(row) for row in tokens], dtype=torch.long)
    tokens_BT = pad_rows(tokens, torch.long)
    position_T = torch.arange(tokens_BT.shape[1])
    prompt_zeros = [[0] * len(prompt.tokens) for prompt in prompts]
    return Samples(
        tokens_BT=tokens_BT,
        prompt_len_B=prompt_len_B,
        length_B=length_B,
        mask_BT=(position_T >= prompt_len_B[:, None]) & (position_T < length_B[:, None]),
        prompt_index_B=torch.tensor([prompt.index for prompt in prompts], dtype=torch.long),
        fields=[{"prompt": prompt.text, **prompt.fields} for prompt in prompts],
        rollout_logp_BT=pad_rows(
            [[*zeros, *one.logp] for zeros, one in zip(prompt_zeros, samples, strict=True)], torch.float32
        ),
        truncated_B=torch.tensor([one.truncated for one in samples], dtype=torch.bool),
        version_BT=pad_rows(
            [[*zeros, *one.versions] for zeros, one in zip(prompt_zeros, samples, strict=True)], torch.int32
        ),
    )


def prompt_to(prompt: Prompt) -> dict[str, Any]:
    """A prompt as JSON."""
    return {"tokens": list(prompt.tokens), "text": prompt.text, "fields": prompt.fields, "index": prompt.index}


def prompt_from(saved: Mapping[str, Any]) -> Prompt:
    """Inverse of `prompt_to`."""
    return Prompt(tuple(saved["tokens"]), saved["text"], saved["fields"], saved["index"])


def sample_to(sample: Sample) -> dict[str, Any]:
    """A sample as JSON, with the state of its random stream."""
    draws = None if sample.draws is None else sample.draws.numpy().tobytes().hex()
    return {**{name: value for name, value in vars(sample).items() if name != "draws"}, "draws": draws}


def sample_from(saved: Mapping[str, Any]) -> Sample:
    """Inverse of `sample_to`."""
    draws = saved["draws"]
    state = None if draws is None else torch.frombuffer(bytearray.fromhex(draws), dtype=torch.uint8)
    return Sample(**{**saved, "draws": state})
