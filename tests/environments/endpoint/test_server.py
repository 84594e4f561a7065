"""The wire, against the openai package's own client and plain sockets; the turns are scripted."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import openai
import pytest

from aligner.environments.endpoint.errors import ApiError
from aligner.environments.endpoint.exchange import Exchange, Pending, Session
from aligner.environments.endpoint.requests import ChatRequest
from aligner.environments.endpoint.responses import Reply
from aligner.environments.endpoint.server import EndpointServer, ServedModel

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOL: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
REPLY = Reply(
    id="turn-1",
    model="policy",
    prompt_tokens=2,
    tokens=(3, 4, 5),
    logp=(-0.5, -1.0, -0.25),
    versions=(7, 7, 8),
    token_texts=("Hi", "!", "<end>"),
    text="Hi!",
    reasoning=None,
    tool_calls=(),
    truncated=False,
    stop_token=5,
)


class Endpoint:
    """A server whose requests a function answers."""

    def __init__(self, answer: Callable[[Pending], Reply | ApiError]) -> None:
        self.exchange = Exchange()
        self.server = EndpointServer(self.exchange, ServedModel("policy", 64, 100), 4096, 8)
        self.session: Session = self.exchange.open(1)
        self.requests: list[Pending] = []
        self._answer, self._stop = answer, False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop:
            for event in self.exchange.drain(0.05):
                assert isinstance(event, Pending)
                self.requests.append(event)
                event.finish(self._answer(event))

    def close(self) -> None:
        self._stop = True
        self._thread.join()
        self.server.close()

    def post(self, path: str, body: Any, key: str | None = None, **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=30)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        authorization = {"Authorization": f"Bearer {self.session.key if key is None else key}"}
        connection.request("POST", path, data, {**authorization, **headers})
        response = connection.getresponse()
        answer = response.status, json.loads(response.read())
        connection.close()
        return answer

    @contextmanager
    def client(self) -> Iterator[openai.OpenAI]:
        with openai.OpenAI(base_url=f"{self.server.url}/v1", api_key=self.session.key, max_retries=0) as client:
            yield client


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    one = Endpoint(lambda pending: REPLY)
    yield one
    one.close()


@pytest.fixture
def calling() -> Iterator[Endpoint]:
    one = Endpoint(lambda pending: replace(REPLY, text="", reasoning="Hm.", tool_calls=[CALL]))
    yield one
    one.close()


def test_chat_completions(endpoint: Endpoint) -> None:
    with endpoint.client() as client:
        answer = client.chat.completions.create(model="any", messages=HELLO, logprobs=True)
        models = client.models.list().data
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason, choice.message.tool_calls) == ("Hi!", "stop", None)
    assert choice.logprobs and [one.logprob for one in choice.logprobs.content or []] == list(REPLY.logp)
    assert answer.usage and (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 3)
    assert [model.id for model in models] == ["policy"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2), ("top_logprobs", 3), ("logit_bias", {"5": 1}), ("presence_penalty", 0.5), ("frequency_penalty", 1.0),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}),
        ("tool_choice", "required"), ("tool_choice", {"type": "function", "function": {"name": "add"}}),
        ("modalities", ["text", "audio"]), ("reasoning_effort", "high"), ("verbosity", "low"),
        ("prediction", {"type": "content", "content": "a"}), ("web_search_options", {}), ("functions", [{"name": "add"}]),
        ("function_call", "auto"), ("max_tokens", 0), ("max_completion_tokens", -1), ("temperature", 3), ("stop", [""]),
        ("extra_body", {"guided_json": {}}), ("extra_body", {"min_tokens": 3}), ("extra_body", {"ignore_eos": True}),
        ("extra_body", {"include_reasoning": False}), ("stream_options", {"continuous_usage_stats": True}),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(endpoint: Endpoint, field: str, value: Any) -> None:
    given = {"model": "gpt-4o", "messages": HELLO, "tools": [TOOL], field: value}
    with endpoint.client() as client, pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**given)
    name = next(iter(value)) if field in ("extra_body", "stream_options") else field
    error = caught.value
    assert name in error.message and name in str(error.param) and error.code in ("invalid_value", "unsupported_field")
    assert error.type == "invalid_request_error" and not endpoint.requests


def test_what_changes_nothing_or_is_supported_is_taken(endpoint: Endpoint) -> None:
    with endpoint.client() as client:
        answer = client.chat.completions.create(
            model="gpt-4o", messages=[{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}],
            tools=[TOOL], tool_choice="none", parallel_tool_calls=False, n=1, top_logprobs=0, max_completion_tokens=7,
            max_tokens=9, temperature=0.5, top_p=0.9, seed=3, user="me", metadata={"a": "b"}, store=False, stop=["END"],
            response_format={"type": "text"}, presence_penalty=0, frequency_penalty=0.0, logit_bias={}, service_tier="auto",
            extra_body={"top_k": 5, "stop_token_ids": [4]},
        )  # fmt: skip
        batch = client.completions.create(model="any", prompt=["Hello"])
        with pytest.raises(openai.BadRequestError, match="a request for each"):
            client.completions.create(model="any", prompt=["Hello", "you"])
        assert client.models.retrieve("org/gpt-4o").id == "org/gpt-4o"
        with pytest.raises(openai.NotFoundError, match="POST /v1/chat/completions"):
            client.responses.create(model="any", input="Hello")
    request = endpoint.requests[0].request
    assert isinstance(request, ChatRequest) and request.messages == ({"role": "user", "content": "Hel\nlo"},)
    assert (request.sampling.max_tokens, request.sampling.seed, request.sampling.stop) == (7, 3, ("END",))
    assert not request.parse_tool_calls and not request.several_calls
    assert answer.choices[0].finish_reason == batch.choices[0].finish_reason == "stop"


def test_errors_are_the_sdks_own(endpoint: Endpoint) -> None:
    with (
        openai.OpenAI(base_url=f"{endpoint.server.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.chat.completions.create(model="any", messages=HELLO)
    assert caught.value.code == "invalid_api_key" and "OPENAI_API_KEY" in caught.value.message


def test_chat_completions_as_a_stream(endpoint: Endpoint) -> None:
    with endpoint.client() as client:
        chunks = list(
            client.chat.completions.create(
                model="any", messages=HELLO, stream=True, stream_options={"include_usage": True}
            )
        )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "Hi!" and chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage and chunks[-1].usage.total_tokens == 5


def test_tool_calls_and_reasoning(calling: Endpoint) -> None:
    with calling.client() as client:
        answer = client.chat.completions.create(model="any", messages=HELLO, tools=[TOOL])
        with client.chat.completions.stream(model="any", messages=HELLO, tools=[TOOL]) as stream:
            streamed = stream.get_final_completion()
    for choice in (answer.choices[0], streamed.choices[0]):
        assert choice.finish_reason == "tool_calls" and not choice.message.content
        assert [call.to_dict() for call in choice.message.tool_calls or []] == [CALL] or choice is streamed.choices[0]
    message = answer.choices[0].message.model_dump()
    assert message["reasoning_content"] == "Hm."
    (call,) = streamed.choices[0].message.tool_calls or []
    assert (call.id, call.function.name, call.function.arguments) == ("call_1", "add", '{"a": 1}')


def test_completions(endpoint: Endpoint) -> None:
    with endpoint.client() as client:
        answer = client.completions.create(model="any", prompt="Hello", logprobs=0)
        streamed = "".join(
            chunk.choices[0].text for chunk in client.completions.create(model="a", prompt="b", stream=True)
        )
    assert answer.choices[0].text == "Hi!" == streamed
    assert answer.choices[0].logprobs and answer.choices[0].logprobs.token_logprobs == list(REPLY.logp)


def test_generate_has_the_form_of_vllms_own_route(endpoint: Endpoint) -> None:
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateTextResponse, GenerateTokensResponse

    body = {"token_ids": [1, 2], "sampling_params": {"logprobs": 1}, "return_token_ids": True, "request_id": "r"}
    status, answer = endpoint.post("/inference/v1/generate", body)
    assert status == 200
    read = GenerateTokensResponse.model_validate(answer)
    (choice,) = read.choices
    assert (read.request_id, read.prompt_token_ids, choice.token_ids) == ("r", [1, 2], [3, 4, 5])
    assert choice.logprobs and [(one.token_id, one.logprob) for one in choice.logprobs.content or []] == [
        (3, -0.5),
        (4, -1.0),
        (5, -0.25),
    ]
    assert choice.stop_reason == 5 and choice.weight_versions
    assert [(span.version, span.start, span.end) for span in choice.weight_versions] == [("7", 0, 2), ("8", 2, 3)]
    _, text = endpoint.post("/inference/v1/generate", {**body, "output_mode": "text"})
    assert GenerateTextResponse.model_validate(text).choices[0].text == "Hi!"


def test_generate_as_a_stream_and_as_vllms_own_clients_ask(endpoint: Endpoint) -> None:
    from vllm import SamplingParams
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest, GenerateTokensStreamResponse

    request = GenerateRequest(token_ids=[1, 2], sampling_params=SamplingParams(max_tokens=5, logprobs=1))
    body = json.loads(request.model_dump_json())
    assert endpoint.post("/inference/v1/generate", body)[1]["choices"][0]["token_ids"] == [3, 4, 5]
    connection = http.client.HTTPConnection("127.0.0.1", endpoint.server.port, timeout=30)
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    key = {"Authorization": f"Bearer {endpoint.session.key}"}
    connection.request("POST", "/inference/v1/generate", json.dumps(body), key)
    *events, done, rest = connection.getresponse().read().split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    chunk, usage = [GenerateTokensStreamResponse.model_validate_json(event.removeprefix(b"data: ")) for event in events]
    assert chunk.choices[0].token_ids == [3, 4, 5] and chunk.choices[0].finish_reason == "stop"
    assert not usage.choices and usage.usage and usage.usage.completion_tokens == 3


def test_no_name_server_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        raise AssertionError("a name was looked up")

    monkeypatch.setattr(socket, "getfqdn", refuse)
    EndpointServer(Exchange(), ServedModel("policy", 64, 100), 4096, 8).close()


def test_rewards_go_to_the_session(endpoint: Endpoint) -> None:
    assert endpoint.post("/v1/reward", {"reward": 0.5})[0] == 200
    assert endpoint.session.report is not None and endpoint.session.report.reward == 0.5


def test_a_refused_turn_is_the_clients_exception() -> None:
    one = Endpoint(lambda pending: ApiError(400, "too long", param="messages", code="context_length_exceeded"))
    try:
        with one.client() as client, pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="any", messages=HELLO)
        assert caught.value.code == "context_length_exceeded" and caught.value.param == "messages"
    finally:
        one.close()


def test_keys(endpoint: Endpoint) -> None:
    chat = {"messages": HELLO}
    assert endpoint.post("/v1/chat/completions", chat, key="wrong")[0] == 401
    assert endpoint.post("/v1/chat/completions", chat, key="")[0] == 401
    assert endpoint.post("/v1/chat/completions", chat, Authorization="Basic x")[0] == 401
    other = endpoint.exchange.open(2)
    assert other.key != endpoint.session.key
    endpoint.exchange.forget(endpoint.session)
    assert endpoint.post("/v1/chat/completions", chat)[0] == 401
    assert not endpoint.requests


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/embeddings", {}, 404),
        ("/v1/chat/completions", b"{", 400),
        ("/v1/chat/completions", b"\xff", 400),
        ("/v1/chat/completions", {"messages": HELLO, "made_up": 1}, 400),
        ("/v1/chat/completions", b" " * 5000, 413),
        ("/v1/reward", {"reward": None}, 400),
    ],
)
def test_errors_have_openais_form(endpoint: Endpoint, path: str, body: Any, status: int) -> None:
    given, answer = endpoint.post(path, body)
    assert given == status and set(answer["error"]) == {"message", "type", "param", "code"}
    assert not endpoint.requests


def test_raw_connections(endpoint: Endpoint) -> None:
    """No length, a body in chunks, garbage, other methods, a client that goes: each is refused, and the server goes on."""
    key = f"Authorization: Bearer {endpoint.session.key}\r\n".encode()
    sent = {
        b"POST /v1/reward HTTP/1.1\r\n" + key + b"\r\n": b"411",
        b"POST /v1/reward HTTP/1.1\r\n" + key + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n": b"411",
        b"POST /v1/reward HTTP/1.1\r\n" + key + b"Content-Length: -1\r\n\r\n": b"411",
        b"POST /v1/reward HTTP/1.1\r\n" + key + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n": b"411",
        b"POST /v1/reward HTTP/1.1\r\n" + key + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n": b"411",
        b"POST /v1/reward HTTP/1.1\r\n" + key + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}": b"411",
        b"DELETE /v1/models HTTP/1.1\r\n\r\n": b"501",
        b"GET /v1/models HTTP/1.1\r\n\r\n": b"401",
        b"\x16\x03\x01 nonsense\r\n\r\n": b"Bad",
    }
    for request, status in sent.items():
        with socket.create_connection(("127.0.0.1", endpoint.server.port), timeout=30) as connection:
            connection.sendall(request)
            assert status in connection.recv(65536).split(b"\r\n")[0]
    with socket.create_connection(("127.0.0.1", endpoint.server.port), timeout=30) as connection:
        connection.sendall(b"POST /v1/reward HTTP/1.1\r\n" + key + b'Content-Length: 100\r\n\r\n{"reward": 7}')
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(100) == b""
    assert endpoint.session.report is None
    assert endpoint.post("/v1/reward", {"reward": 1})[0] == 200


def test_the_answer_to_a_body_that_is_too_long_arrives(endpoint: Endpoint) -> None:
    """The client sends all of it before it reads: a connection that is closed meanwhile would be reset."""
    status, answer = endpoint.post("/v1/chat/completions", b" " * 2**23)
    assert status == 413 and "environment.agent.max_request_mib" in answer["error"]["message"]


def test_more_connections_than_allowed_are_cut(endpoint: Endpoint) -> None:
    held = [socket.create_connection(("127.0.0.1", endpoint.server.port), timeout=30) for _ in range(8)]
    with socket.create_connection(("127.0.0.1", endpoint.server.port), timeout=30) as extra:
        extra.sendall(b"GET /v1/models HTTP/1.1\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert extra.recv(100) == b""
    for connection in held:
        connection.close()


def renumbered(connection: socket.socket, address: Any, number: int) -> tuple[socket.socket, Any]:
    """The connection with a descriptor of at least this number."""
    with connection:
        return socket.socket(fileno=fcntl.fcntl(connection.fileno(), fcntl.F_DUPFD_CLOEXEC, number)), address


@pytest.mark.parametrize("number", [None, 1500])
def test_a_client_that_has_gone_is_noticed(number: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the rank has more descriptors than select() takes."""
    seen: list[bool] = []
    gone = threading.Event()

    def answer(pending: Pending) -> Reply:
        seen.append(pending.connected())
        release.set()
        gone.wait(30)
        seen.append(pending.connected())
        return REPLY

    release = threading.Event()
    if number is not None:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        if limit[1] <= number:
            pytest.skip(f"this machine allows {limit[1]} descriptors")
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(limit[0], number + 100), limit[1]))
        accept = socket.socket.accept
        monkeypatch.setattr(socket.socket, "accept", lambda listening: renumbered(*accept(listening), number))
    one = Endpoint(answer)
    try:
        body = json.dumps({"messages": HELLO}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nAuthorization: Bearer {one.session.key}\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", one.server.port), timeout=30) as connection:
            connection.sendall(head.encode() + body)
            assert release.wait(30)
        gone.set()
    finally:
        one.close()
    assert seen == [True, False]
