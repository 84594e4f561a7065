"""Rewards from a real HTTP server on this machine: right, slow, broken, lying and refusing ones."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from aligner.reward.config import JudgeConfig, RewardComponent
from aligner.reward.remote import HttpScorer
from aligner.reward.worker import Score, Status

TOKEN = "sk-hush"


class Handler(BaseHTTPRequestHandler):
    """What the path says; every request is kept."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server: Any = self.server
        server.requests.append((self.path, dict(self.headers), body))
        seen = sum(path == self.path for path, _, _ in server.requests)
        numbers = [float(len(text)) for text in body.get("response", [])]
        what = self.path.strip("/")
        if what == "length":
            self.answer({"scores": numbers})
        elif what == "slow":
            time.sleep(1.2)
            self.answer({"scores": numbers})
        elif what == "drip":
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            for _ in range(100):
                time.sleep(0.1)
                self.wfile.write(b" ")
        elif what.startswith("twice"):  # 503, 429, then right
            self.answer({"scores": numbers}, {1: 503, 2: 429}.get(seen, 200), {"Retry-After": "0.1"})
        elif what == "500":
            self.answer({"error": f"broken for {self.headers.get('Authorization')}"}, 500)
        elif what == "404":
            self.answer({}, 404)
        elif what == "redirect":
            self.answer({}, 307, {"Location": "http://127.0.0.1:1/elsewhere"})
        elif what == "text":
            self.send(b"<html>not JSON</html>")
        elif what == "list":
            self.answer([1.0])
        elif what == "short":
            self.answer({"scores": numbers[:-1]})
        elif what == "mixed":
            self.send(b'{"scores": [1, null, "2", NaN, true, -0.5]}')
        elif what == "hangup":
            self.close_connection = True
        elif what == "judge":
            self.answer({"choices": [{"message": {"content": self.judgement(body)}}]})

    def judgement(self, body: Any) -> str:
        question = body["messages"][0]["content"]
        return "I cannot say." if "vague" in question else f"Score: 1? No. Thinking of {body['model']}, score: 7.5"

    def answer(self, value: Any, code: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(json.dumps(value).encode(), code, headers)

    def send(self, body: bytes, code: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Not on the console."""


class Server(ThreadingHTTPServer):
    """A client that no longer listens is part of the game."""

    daemon_threads = True
    requests: list[Any]

    def handle_error(self, *args: Any) -> None:
        """Not on the console."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.requests = []
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def scorer(server: Server, path: str, timeout_s: float = 5.0, workers: int = 2, **settings: Any) -> HttpScorer:
    url = f"http://127.0.0.1:{server.server_address[1]}/{path}"
    settings = {"retries": 0, "backoff_s": 0.01, **settings}
    return HttpScorer(RewardComponent(url=url, **settings), "reward.components.remote", workers, timeout_s)


def items(*responses: str) -> list[dict[str, Any]]:
    return [{"prompt": f"p{i}", "response": text, "fields": {"answer": i}} for i, text in enumerate(responses)]


def all_lost(scores: list[Score], status: Status, detail: str) -> None:
    for score in scores:
        assert (score.status, math.isnan(score.value)) == (status, True)
        assert detail in score.detail


def test_scores_in_the_rows_order_over_several_requests(server: Server) -> None:
    before = len(server.requests)
    scores = scorer(server, "length", rows_per_request=3).score(items(*("x" * i for i in range(10))))
    assert [(score.value, score.status) for score in scores] == [(float(i), Status.OK) for i in range(10)]
    bodies = sorted((body for _, _, body in server.requests[before:]), key=lambda body: body["prompt"][0])
    assert [len(body["prompt"]) for body in bodies] == [3, 3, 3, 1]
    assert bodies[1] == {
        "prompt": ["p3", "p4", "p5"],
        "response": ["xxx", "xxxx", "xxxxx"],
        "fields": [{"answer": 3}, {"answer": 4}, {"answer": 5}],
    }
    assert scorer(server, "length").score([]) == []


@pytest.mark.parametrize(
    ("path", "status", "detail"),
    [
        ("500", Status.FAILED, "HTTP 500"),
        ("404", Status.FAILED, "HTTP 404"),
        ("redirect", Status.FAILED, "HTTP 307"),
        ("text", Status.FAILED, "the answer is not JSON: <html>"),
        ("list", Status.FAILED, 'the answer is not {"scores": [...]}: [1.0]'),
        ("short", Status.FAILED, "1 scores for 2 rows"),
        ("hangup", Status.FAILED, "RemoteDisconnected"),
        ("slow", Status.TIMEOUT, "no answer within reward.components.remote.timeout_s=0.4"),
        ("drip", Status.TIMEOUT, "no answer within reward.components.remote.timeout_s=0.4"),
    ],
)
def test_a_request_that_fails_loses_its_rows_by_kind(server: Server, path: str, status: Status, detail: str) -> None:
    start = time.monotonic()
    all_lost(scorer(server, path, timeout_s=0.4).score(items("a", "b")), status, detail)
    assert time.monotonic() - start < 9


def test_single_values_that_are_no_scores(server: Server) -> None:
    scores = scorer(server, "mixed").score(items(*"abcdef"))
    kinds = [Status.OK, Status.UNPARSABLE, Status.FAILED, Status.FAILED, Status.FAILED, Status.OK]
    assert [score.status for score in scores] == kinds
    assert (scores[0].value, scores[5].value) == (1.0, -0.5)
    all_lost([scores[2]], Status.FAILED, "the endpoint gave '2', not a number")


def test_what_may_pass_is_tried_again(server: Server) -> None:
    scores = scorer(server, "twice", retries=2).score(items("abc"))
    assert [score.value for score in scores] == [3.0]
    all_lost(scorer(server, "twice_only", retries=1).score(items("abc")), Status.FAILED, "HTTP 429")
    before = len(server.requests)
    all_lost(scorer(server, "500", retries=2).score(items("abc")), Status.FAILED, "(3 attempts)")
    assert len(server.requests) - before == 3
    all_lost(scorer(server, "404", retries=2).score(items("abc")), Status.FAILED, "HTTP 404")
    assert len(server.requests) - before == 4


def test_one_lost_request_leaves_the_others(server: Server) -> None:
    rows = items("a", "bb", "ccc")
    rows[1]["fields"] = {"never JSON": {1, 2}}
    scores = scorer(server, "length", rows_per_request=1).score(rows)
    assert [score.status for score in scores] == [Status.OK, Status.FAILED, Status.OK]
    assert "set is not JSON serializable" in scores[1].detail


def test_a_server_that_has_gone(server: Server) -> None:
    gone = scorer(server, "length")
    gone.url = "http://127.0.0.1:1/length"
    all_lost(gone.score(items("a")), Status.FAILED, "ConnectionRefusedError")


def test_the_token_is_sent_and_never_said(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TOKEN", TOKEN)
    scores = scorer(server, "500", token_env="REWARD_TOKEN").score(items("a"))
    assert server.requests[-1][1]["Authorization"] == f"Bearer {TOKEN}"
    all_lost(scores, Status.FAILED, "broken for Bearer ***")
    assert TOKEN not in scores[0].detail


def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path: Any) -> None:
    """A self-signed one, made by the cryptography at hand; the token must not be sent there."""
    import ssl
    import subprocess

    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    server = Server(("127.0.0.1", 0), Handler)
    server.requests = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        component = RewardComponent(
            url=f"https://localhost:{server.server_address[1]}/length", retries=5, backoff_s=5.0
        )
        all_lost(HttpScorer(component, "r", 1, 5.0).score(items("a")), Status.FAILED, "SSLCertVerificationError")
        assert server.requests == []
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_judge(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = JudgeConfig(
        model="big", prompt="Is {response} right for {prompt}? The answer is {{{answer}}}.", max_tokens=9
    )
    scores = scorer(server, "judge", judge=judge, rows_per_request=16, workers=1).score(items("a {b}", "vague"))
    assert (scores[0].value, scores[0].status) == (7.5, Status.OK)
    all_lost(scores[1:], Status.UNPARSABLE, "no score in the judge's answer: I cannot say.")
    first = server.requests[-2][2]
    assert first == {
        "model": "big",
        "messages": [{"role": "user", "content": "Is a {b} right for p0? The answer is {0}."}],
        "max_tokens": 9,
        "temperature": 0.0,
    }
    all_lost(
        scorer(server, "length", judge=judge).score(items("a")), Status.FAILED, "the answer is not a chat completion"
    )
    lacking = JudgeConfig(model="big", prompt="{response} {question}")
    all_lost(scorer(server, "judge", judge=lacking).score(items("a")), Status.FAILED, "KeyError: 'question'")


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"url": "ftp://host"}, r"remote\.url=ftp://host must be a URL such as https://host:8000/score"),
    ({"url": "http://me:word@host/"}, r"remote\.url contains a user name or password"),
    ({"url": "http://127.0.0.1:1/"}, r"remote\.url=http://127\.0\.0\.1:1/ cannot be reached .*start the endpoint"),
    ({"retries": -1}, r"remote\.retries=-1 must be at least 0"),
    ({"rows_per_request": 0}, r"remote\.rows_per_request=0 must be at least 1"),
    ({"token_env": "NO_SUCH_TOKEN"}, r"remote\.token_env=NO_SUCH_TOKEN: this environment variable is not set"),
    ({"judge": JudgeConfig(prompt="{response}")}, r"remote\.judge\.model is not set"),
    ({"judge": JudgeConfig("m", "{prompt}")}, r"remote\.judge\.prompt does not contain the response"),
    ({"judge": JudgeConfig("m", "{response} {")}, r"remote\.judge\.prompt: .*for braces"),
    ({"judge": JudgeConfig("m", "{response[0]}")}, r"does not contain the response"),
    ({"judge": JudgeConfig("m", "{response}", "(a)(b)")}, r"remote\.judge\.pattern=\(a\)\(b\) must have one group"),
    ({"judge": JudgeConfig("m", "{response}", "(")}, r"remote\.judge\.pattern=\( is not a regular expression"),
]


@pytest.mark.parametrize(("settings", "said"), SETTINGS)
def test_what_cannot_work_is_refused_before_a_job(server: Server, settings: dict[str, Any], said: str) -> None:
    component = RewardComponent(**{"url": f"http://127.0.0.1:{server.server_address[1]}/length", **settings})
    with pytest.raises(ValueError, match=said) as error:
        HttpScorer(component, "reward.components.remote", 1, 1.0)
    assert "word@" not in str(error.value)
