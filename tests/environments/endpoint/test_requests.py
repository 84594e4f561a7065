"""Each field of a request is used, changes nothing, or is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from aligner.environments.endpoint.errors import ApiError
from aligner.environments.endpoint.request_fields import parse_object
from aligner.environments.endpoint.requests import chat_request, completion_request, generate_request, reward_report

HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def refused(read: Any, body: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(body, 100)
    assert caught.value.status == 400
    return caught.value


def test_a_chat_request_as_the_openai_sdk_sends_it() -> None:
    request = chat_request(
        {
            "model": "gpt-4o",
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]},
                {"role": "user", "content": "2 + 2?"},
                {
                    "role": "assistant",
                    "content": None,
                    "refusal": None,
                    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "4"},
            ],
            "tools": [TOOL],
            "tool_choice": "auto",
            "temperature": 0.5,
            "max_completion_tokens": 7,
            "stop": "END",
            "seed": 3,
            "n": 1,
            "presence_penalty": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
        100,
    )
    assert request.messages[0] == {"role": "system", "content": "Be\nbrief."}
    assert request.messages[2]["content"] == "" and "refusal" not in request.messages[2]
    assert request.sampling.settings == {"temperature": 0.5}
    assert request.sampling.max_tokens == 7 and request.sampling.stop == ("END",)
    assert request.stream and request.usage_in_stream and request.parse_tool_calls


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("temperature", 3),
        ("temperature", True),
        ("temperature", 0.001),
        ("top_p", 0),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("logit_bias", {"3": 1}),
        ("response_format", {"type": "json_object"}),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "add"}}),
        ("top_logprobs", 5),
        ("stop", [""]),
        ("stream", "yes"),
        ("stream_options", "usage"),
        ("stream_options", [1]),
        ("tools", [{"type": "retrieval"}]),
        ("messages", []),
        ("messages", [{"role": "robot", "content": ""}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ("messages", [{"role": "assistant", "tool_calls": [{"id": "1"}]}]),
        ("reasoning_effort", "high"),
        ("made_up", 1),
    ],
)
def test_a_chat_field_that_cannot_be_had_is_named(field: str, value: Any) -> None:
    error = refused(chat_request, {"messages": HELLO, field: value})
    assert (error.param or "").startswith(field) and field in error.message


def test_the_digest_is_of_what_decides_the_turn() -> None:
    plain = chat_request({"model": "a", "messages": HELLO}, 100)
    same = chat_request({"model": "b", "messages": HELLO, "stream": True, "user": "me"}, 100)
    assert plain.digest == same.digest
    for change in (
        {"temperature": 0.5},
        {"max_tokens": 3},
        {"tools": [TOOL]},
        {"messages": [*HELLO, *HELLO]},
        {"stop": "x"},
        {"seed": 1},
    ):
        assert chat_request({"messages": HELLO, **change}, 100).digest != plain.digest


def test_generate_takes_what_vllms_own_clients_send() -> None:
    body = {
        "model": "policy",
        "token_ids": [1, 2, 99],
        "sampling_params": {
            "temperature": 1.0,
            "top_k": -1,
            "max_tokens": 5,
            "stop_token_ids": [7],
            "logprobs": 1,
            "skip_special_tokens": False,
            "routed_experts_prompt_start": 3,
            "n": 1,
            "seed": None,
            "min_p": 0.0,
        },
    }
    request = generate_request(body, 100)
    assert request.token_ids == (1, 2, 99) and request.sampling.stop_token_ids == (7,) and request.logprobs
    assert request.sampling.settings == {"temperature": 1.0, "top_k": 0}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"token_ids": [1, 100]}, "token_ids"),
        ({"token_ids": [-1]}, "token_ids"),
        ({"token_ids": [True]}, "token_ids"),
        ({"token_ids": []}, "token_ids"),
        ({"token_ids": "1"}, "token_ids"),
        ({"sampling_params": None}, "sampling_params"),
        ({"sampling_params": {"n": 4}}, "sampling_params.n"),
        ({"sampling_params": {"structured_outputs": {"json": {}}}}, "sampling_params.structured_outputs"),
        ({"sampling_params": {"logprobs": 5}}, "sampling_params.logprobs"),
        ({"features": {}}, "features"),
        ({"priority": 3}, "priority"),
    ],
)
def test_a_generate_field_that_cannot_be_had_is_named(change: dict[str, Any], param: str) -> None:
    assert refused(generate_request, {"token_ids": [1], "sampling_params": {}, **change}).param == param


def test_completions() -> None:
    assert completion_request({"prompt": "Hello", "logprobs": 0}, 100).prompt == "Hello"
    assert completion_request({"prompt": [1, 2]}, 100).prompt == (1, 2)
    assert refused(completion_request, {"prompt": ["a", "b"]}).param == "prompt"
    assert refused(completion_request, {"prompt": "a", "suffix": "b"}).param == "suffix"


@pytest.mark.parametrize("body", [b"{", b"[1]", b"\xff{}", b'{"a": NaN}', b"[" * 100_000, b'{"a": "\\ud800"}'])
def test_a_body_that_is_no_json_object(body: bytes) -> None:
    with pytest.raises(ApiError, match="body"):
        parse_object(body)


def test_rewards() -> None:
    report = reward_report({"reward": 1, "turn_rewards": [0, 0.5], "metrics": {"moves": 3}})
    assert (report.reward, report.turn_rewards, report.metrics) == (1.0, (0.0, 0.5), {"moves": 3.0})
    for body in (
        {},
        {"reward": "1"},
        {"reward": True},
        {"reward": 1e40},
        {"reward": 1, "turn_rewards": ["x"]},
        {"reward": 1, "x": 1},
    ):
        with pytest.raises(ApiError):
            reward_report(json.loads(json.dumps(body)))
