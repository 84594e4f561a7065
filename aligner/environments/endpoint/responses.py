"""Answers as JSON and as server-sent events: OpenAI's chat completions and completions, and vLLM's token ids."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from aligner.environments.endpoint.requests import ChatRequest, GenerateRequest, ModelRequest

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Reply:
    """One sampled turn, as the routes need it."""

    id: str
    """Unique in the episode, and the same whenever the episode is played again."""
    model: str
    prompt_tokens: int
    """Of the whole context."""
    tokens: Sequence[int]
    """Sampled token ids, the stop token included."""
    logp: Sequence[float]
    """log p of each token under the distribution it was sampled from: after temperature, top-p and top-k."""
    versions: Sequence[int]
    """Version of the weights that sampled each token."""
    token_texts: Sequence[str]
    """Each token decoded by itself."""
    text: str
    """The answer's text up to the first stop text, without special tokens; with tool calls: what stands beside them."""
    reasoning: str | None
    tool_calls: Sequence[Mapping[str, Any]]
    """{"id", "type": "function", "function": {"name", "arguments": JSON text}}."""
    truncated: bool
    """max_tokens ended it."""
    stop_token: int | None = None
    """The token that ended it, if the request had named it."""

    @property
    def finish_reason(self) -> str:
        """OpenAI's: tool_calls, length or stop."""
        return "tool_calls" if self.tool_calls else "length" if self.truncated else "stop"

    @property
    def message(self) -> dict[str, Any]:
        """The assistant's message, as it comes back in the next request."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [dict(call) for call in self.tool_calls]
        return message

    @property
    def usage(self) -> dict[str, int]:
        """Token counts."""
        prompt, completion = self.prompt_tokens, len(self.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def as_json(request: ModelRequest, reply: Reply) -> dict[str, Any]:
    """The answer to a request without stream=true."""
    if isinstance(request, GenerateRequest):
        return _generate(request, reply)
    head = {"id": reply.id, "created": int(time.time()), "model": reply.model, "usage": reply.usage}
    choice: dict[str, Any] = {"index": 0, "finish_reason": reply.finish_reason}
    if isinstance(request, ChatRequest):
        message = {"refusal": None, **reply.message}
        if reply.tool_calls and not reply.text:
            message["content"] = None
        logprobs = {"content": _logprobs(reply), "refusal": None} if request.logprobs else None
        return {**head, "object": "chat.completion", "choices": [{**choice, "message": message, "logprobs": logprobs}]}
    logprobs = _completion_logprobs(reply) if request.logprobs else None
    return {**head, "object": "text_completion", "choices": [{**choice, "text": reply.text, "logprobs": logprobs}]}


def as_events(request: ModelRequest, reply: Reply) -> Iterator[bytes]:
    """The answer to a request with stream=true. A turn is sampled before its first event: the events come all at once."""
    if isinstance(request, GenerateRequest):
        yield _event(_generate(request, reply))
        if request.usage_in_stream:
            yield _event({"request_id": request.request_id or reply.id, "choices": [], "usage": reply.usage})
        yield DONE
        return
    chat = isinstance(request, ChatRequest)
    kind = "chat.completion.chunk" if chat else "text_completion"
    head = {"id": reply.id, "object": kind, "created": int(time.time()), "model": reply.model}
    usage = {"usage": None} if request.usage_in_stream else {}
    for choice in _chat_choices(request, reply) if chat else _completion_choices(request, reply):
        yield _event({**head, "choices": [{"index": 0, "finish_reason": None, "logprobs": None, **choice}], **usage})
    if request.usage_in_stream:
        yield _event({**head, "choices": [], "usage": reply.usage})
    yield DONE


def _chat_choices(request: ModelRequest, reply: Reply) -> Iterator[dict[str, Any]]:
    yield {"delta": {"role": "assistant", "content": ""}}
    if reply.reasoning:
        yield {"delta": {"reasoning_content": reply.reasoning}}
    logprobs = {"logprobs": {"content": _logprobs(reply), "refusal": None}} if request.logprobs else {}
    if reply.text or logprobs:
        yield {"delta": {"content": reply.text}, **logprobs}
    for number, call in enumerate(reply.tool_calls):
        yield {"delta": {"tool_calls": [{"index": number, **call}]}}
    yield {"delta": {}, "finish_reason": reply.finish_reason}


def _completion_choices(request: ModelRequest, reply: Reply) -> Iterator[dict[str, Any]]:
    logprobs = _completion_logprobs(reply) if request.logprobs else None
    yield {"text": reply.text, "finish_reason": reply.finish_reason, "logprobs": logprobs}


def _event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def _generate(request: GenerateRequest, reply: Reply) -> dict[str, Any]:
    """vLLM's GenerateTokensResponse or GenerateTextResponse."""
    choice: dict[str, Any] = {
        "index": 0,
        "finish_reason": "length" if reply.truncated else "stop",
        "stop_reason": reply.stop_token,
        "token_ids": list(reply.tokens),
        "routed_experts": None,
        "sampling_mask": None,
        "weight_versions": _version_spans(reply.versions),
        "logprobs": None,
    }
    if request.text:
        choice["text"] = reply.text
    if request.logprobs:
        choice["logprobs"] = {"content": _logprobs(reply) if request.text else _id_logprobs(reply)}
    return {
        "request_id": request.request_id or reply.id,
        "model": reply.model,
        "created": int(time.time()),
        "output_mode": "text" if request.text else "tokens",
        "choices": [choice],
        "usage": reply.usage,
        "prompt_logprobs": None,
        "prompt_token_ids": list(request.token_ids) if request.return_prompt else None,
        "kv_transfer_params": None,
    }


def _version_spans(versions: Sequence[int]) -> list[dict[str, Any]]:
    spans: list[dict[str, Any]] = []
    for version, group in groupby(versions):
        start = spans[-1]["end"] if spans else 0
        spans.append({"version": str(version), "start": start, "end": start + len(list(group))})
    return spans


def _id_logprobs(reply: Reply) -> list[dict[str, Any]]:
    """By ids as vLLM 0.32 has them, and with the "token_id:N" that earlier versions and the renderers package have."""
    return [
        {
            "token_id": token,
            "token": f"token_id:{token}",
            "logprob": logp,
            "rank": None,
            "bytes": None,
            "top_logprobs": [],
        }
        for token, logp in zip(reply.tokens, reply.logp, strict=True)
    ]


def _logprobs(reply: Reply) -> list[dict[str, Any]]:
    return [
        {"token": text, "logprob": logp, "bytes": list(text.encode("utf-8", "replace")), "top_logprobs": []}
        for text, logp in zip(reply.token_texts, reply.logp, strict=True)
    ]


def _completion_logprobs(reply: Reply) -> dict[str, Any]:
    offsets = [0]
    for text in reply.token_texts:
        offsets.append(offsets[-1] + len(text))
    return {
        "tokens": list(reply.token_texts),
        "token_logprobs": list(reply.logp),
        "top_logprobs": None,
        "text_offset": offsets[:-1],
    }
