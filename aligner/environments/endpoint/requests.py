"""What programs ask of the endpoint: the bodies of /v1/chat/completions, /v1/completions, /inference/v1/generate, /v1/reward."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aligner.environments.endpoint.errors import bad_request
from aligner.environments.endpoint.request_fields import Fields

NO_EFFECT = (
    "metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user",
)  # fmt: skip
"""Fields of OpenAI's API that say nothing about the tokens."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "include_reasoning": (True,),
}
"""Fields of which only the value that changes nothing can be had."""
GENERATE_NO_EFFECT = ("cache_salt", "reasoning_ended", "reasoning_parser_kwargs", "token_offsets")
PARAMS_NO_EFFECT = (
    "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output", "detokenize", "output_kind",
    "routed_experts_prompt_start", "skip_clone", "skip_reading_prefix_cache",
)  # fmt: skip
"""Fields of vLLM's SamplingParams that leave the sampled tokens as they are."""
PARAMS_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop": ([],),
    "bad_words": ([],),
    "logit_bias": ({},),
}
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class SamplingFields:
    """What both kinds of route say about sampling."""

    max_tokens: int | None
    settings: Mapping[str, Any]
    """Those of temperature, top_p, top_k that the request has."""
    stop_token_ids: tuple[int, ...] | None = None
    stop: tuple[str, ...] = ()
    """Texts before which the answer ends."""
    seed: int | None = None
    """Tells requests apart that are equal otherwise; the turn's seed is made of the run's and of the request's content."""


@dataclass(frozen=True)
class ModelRequest:
    """A request for one turn."""

    model: str
    sampling: SamplingFields
    logprobs: bool
    stream: bool
    usage_in_stream: bool
    digest: str
    """Of all that the turn depends on: equal requests have equal digests, whenever they come."""


@dataclass(frozen=True)
class ChatRequest(ModelRequest):
    """POST /v1/chat/completions."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...]
    parse_tool_calls: bool
    """There are tools, and tool_choice is not "none"."""
    several_calls: bool = True
    """parallel_tool_calls: false cuts the answer after its first call."""


@dataclass(frozen=True)
class CompletionRequest(ModelRequest):
    """POST /v1/completions."""

    prompt: str | tuple[int, ...]


@dataclass(frozen=True)
class GenerateRequest(ModelRequest):
    """POST /inference/v1/generate: token ids in, token ids out."""

    token_ids: tuple[int, ...]
    request_id: str
    return_prompt: bool
    text: bool
    """output_mode=text."""


@dataclass(frozen=True)
class RewardReport:
    """POST /v1/reward: what a program says of its own episode."""

    reward: float
    turn_rewards: tuple[float, ...] | None
    metrics: Mapping[str, float]


def chat_request(body: Mapping[str, Any], vocab_size: int) -> ChatRequest:
    """Raises ApiError 400 for a field that is wrong or not supported."""
    fields = Fields(body)
    messages = _messages(fields.take("messages"))
    tools = _tools(fields.take("tools"))
    choice = fields.take("tool_choice")
    if choice not in (None, "none", "auto"):
        raise fields.wrong(
            "tool_choice", choice, '"auto" or "none": others need constrained decoding, which changes the policy'
        )
    several = fields.flag("parallel_tool_calls", True)
    common = _common(fields, vocab_size, logprobs_is_flag=True)
    return ChatRequest(
        **common,
        digest=_digest("chat", messages, tools, common["sampling"]),
        messages=messages,
        tools=tools,
        parse_tool_calls=bool(tools) and choice != "none",
        several_calls=several,
    )


def completion_request(body: Mapping[str, Any], vocab_size: int) -> CompletionRequest:
    """Raises ApiError 400 for a field that is wrong or not supported."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]  # a batch of one
    if isinstance(prompt, list) and any(isinstance(one, str | list) for one in prompt):
        raise bad_request(
            "prompt must be one text or one list of token ids: send a request for each.", "prompt", "invalid_value"
        )
    fields = Fields({**body, "prompt": prompt})
    prompt = fields.text("prompt") if isinstance(prompt, str) else fields.token_ids("prompt", vocab_size)
    if not prompt:
        raise bad_request("prompt is missing: give one text or one list of token ids.", "prompt", "missing_field")
    common = _common(fields, vocab_size, logprobs_is_flag=False)
    return CompletionRequest(**common, digest=_digest("completion", prompt, (), common["sampling"]), prompt=prompt)


def generate_request(body: Mapping[str, Any], vocab_size: int) -> GenerateRequest:
    """Raises ApiError 400 for a field that is wrong or not supported."""
    fields = Fields(body)
    token_ids = fields.token_ids("token_ids", vocab_size)
    if not token_ids:
        raise bad_request("token_ids is missing: give the whole context as token ids.", "token_ids", "missing_field")
    given = fields.take("sampling_params")
    if not isinstance(given, dict):
        raise bad_request("sampling_params must be an object; {} for the run's settings.", "sampling_params")
    sampling, logprobs = _sampling_params(Fields(given, "sampling_params."), vocab_size)
    stream, usage = _stream(fields)
    request = GenerateRequest(
        model=fields.text("model", "") or "",
        sampling=sampling,
        logprobs=logprobs,
        stream=stream,
        usage_in_stream=usage,
        digest=_digest("generate", token_ids, (), sampling),
        token_ids=token_ids,
        request_id=fields.text("request_id", "") or "",
        return_prompt=fields.flag("return_token_ids"),
        text=fields.one_of("output_mode", ("tokens", "text")) == "text",
    )
    fields.ignore(GENERATE_NO_EFFECT)
    fields.only({"priority": (0,)})
    fields.end()
    return request


def reward_report(body: Mapping[str, Any]) -> RewardReport:
    """{"reward": number, "turn_rewards": [number for each turn], "metrics": {name: number}}; the last two may be left out."""
    fields = Fields(body)
    reward = fields.number("reward", -1e30, 1e30)
    if reward is None:
        raise bad_request("reward is missing: give the episode's reward, a finite number.", "reward", "missing_field")
    turns, metrics = fields.take("turn_rewards"), fields.take("metrics") or {}
    fields.end()
    if turns is not None and not (isinstance(turns, list) and all(map(_is_number, turns))):
        raise fields.wrong("turn_rewards", turns, "a list of numbers, one for each turn")
    if not isinstance(metrics, dict) or not all(map(_is_number, metrics.values())):
        raise fields.wrong("metrics", metrics, "an object of numbers")
    return RewardReport(
        reward,
        None if turns is None else tuple(map(float, turns)),
        {name: float(value) for name, value in metrics.items()},
    )


def _common(fields: Fields, vocab_size: int, logprobs_is_flag: bool) -> dict[str, Any]:
    """What the routes of OpenAI's API share; ends the reading of fields."""
    limits = [fields.integer(name, 1) for name in ("max_completion_tokens", "max_tokens")]
    sampling = SamplingFields(
        max_tokens=min((limit for limit in limits if limit is not None), default=None),
        settings=_settings(fields),
        stop_token_ids=fields.token_ids("stop_token_ids", vocab_size),
        stop=fields.strings("stop"),
        seed=fields.integer("seed", -(2**63)),
    )
    if logprobs_is_flag:
        logprobs = fields.flag("logprobs")
        fields.only({"top_logprobs": (0,)})
    else:
        logprobs = fields.integer("logprobs", 0) is not None
    stream, usage = _stream(fields)
    common = {
        "model": fields.text("model", "") or "",
        "sampling": sampling,
        "logprobs": logprobs,
        "stream": stream,
        "usage_in_stream": usage,
    }
    fields.ignore(NO_EFFECT)
    fields.only(NEUTRAL)
    fields.end()
    return common


def _settings(fields: Fields) -> dict[str, Any]:
    """temperature, top_p and top_k, where the request has them, in the terms of `Sampling`."""
    top_k = fields.integer("top_k", -1)
    settings = {
        "temperature": fields.number("temperature", 0, 2),
        "top_p": fields.number("top_p", 1e-6, 1),
        "top_k": None if top_k is None else max(top_k, 0),
    }
    if 0 < (settings["temperature"] or 0) < 0.01:
        raise fields.wrong("temperature", settings["temperature"], "0 (greedy) or 0.01 to 2")
    return {name: value for name, value in settings.items() if value is not None}


def _sampling_params(fields: Fields, vocab_size: int) -> tuple[SamplingFields, bool]:
    """(sampling, whether log-probabilities are wanted) of vLLM's SamplingParams."""
    sampling = SamplingFields(
        max_tokens=fields.integer("max_tokens", 1),
        settings=_settings(fields),
        stop_token_ids=fields.token_ids("stop_token_ids", vocab_size),
        seed=fields.integer("seed", -(2**63)),
    )
    logprobs = fields.integer("logprobs", 0)
    if logprobs is not None and logprobs > 1:
        raise fields.wrong("logprobs", logprobs, "0 or 1: the engine keeps the sampled token's alone")
    fields.ignore(PARAMS_NO_EFFECT)
    fields.only(PARAMS_NEUTRAL)
    fields.end()
    return sampling, logprobs is not None


def _stream(fields: Fields) -> tuple[bool, bool]:
    stream, options = fields.flag("stream"), fields.object("stream_options")
    usage = options.flag("include_usage")
    options.ignore(("include_obfuscation",))
    options.only({"continuous_usage_stats": (False,)})
    options.end()
    return stream, usage


def _messages(value: Any) -> tuple[dict[str, Any], ...]:
    """The messages without null keys; contents that are lists of text parts become one text, a line each."""
    if not isinstance(value, list) or not value:
        raise bad_request("messages must be a list of at least one message.", "messages", "invalid_value")
    return tuple(_message(message, f"messages[{number}]") for number, message in enumerate(value))


def _message(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict) or value.get("role") not in ROLES:
        raise bad_request(f"{place} must be an object with a role of {', '.join(ROLES)}.", place, "invalid_value")
    message = {key: item for key, item in value.items() if item is not None}
    message["content"] = _content(message.get("content", ""), f"{place}.content")
    calls = message.pop("tool_calls", None)
    if calls:
        message["tool_calls"] = [
            _tool_call(call, f"{place}.tool_calls[{n}]") for n, call in enumerate(_list(calls, place))
        ]
    for key in ("refusal", "annotations", "audio", "function_call"):
        if message.pop(key, None):
            raise bad_request(f"{place}.{key} is not supported.", f"{place}.{key}", "unsupported_field")
    return message


def _list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise bad_request(f"{place}.tool_calls must be a list.", place, "invalid_value")
    return value


def _content(value: Any, place: str) -> str:
    if isinstance(value, str):
        return value
    parts: list[Any] = value if isinstance(value, list) else [None]
    if not all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts
    ):
        raise bad_request(f"{place} must be a string or a list of text parts.", place, "invalid_value")
    return "\n".join(part["text"] for part in parts)  # as vLLM joins them


def _tool_call(value: Any, place: str) -> dict[str, Any]:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise bad_request(f'{place} must be {{"id", "type": "function", "function": {{"name", "arguments"}}}}.', place)
    arguments = function.get("arguments", "")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments)
    call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": str(value["id"]), **call} if value.get("id") is not None else call


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    tools = [] if value is None else value
    if not isinstance(tools, list):
        raise bad_request("tools must be a list.", "tools", "invalid_value")
    for number, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            place = f"tools[{number}]"
            raise bad_request(f'{place} must be {{"type": "function", "function": {{"name", "parameters"}}}}.', place)
    return tuple(tools)


def _digest(route: str, context: Any, tools: Any, sampling: SamplingFields) -> str:
    wanted = [sampling.max_tokens, dict(sampling.settings), sampling.stop_token_ids, sampling.stop, sampling.seed]
    text = json.dumps([route, context, tools, wanted], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e30
