"""The HTTP server: loopback only, a key for each episode; it hands requests to an `Exchange` and waits for the answers."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import socketserver
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from aligner.environments.endpoint.errors import ApiError
from aligner.environments.endpoint.exchange import Exchange, Pending, Session
from aligner.environments.endpoint.request_fields import parse_object
from aligner.environments.endpoint.requests import (
    ModelRequest,
    chat_request,
    completion_request,
    generate_request,
    reward_report,
)
from aligner.environments.endpoint.responses import as_events, as_json

HOST = "127.0.0.1"
READ_TIMEOUT_S = 60.0
"""Longest wait for the bytes of a request, and for the next request of an idle connection."""
UNREAD_BYTES = 2**28
"""Most bytes of a refused body that are read, so that the client, which sends all of it first, gets to the answer."""
MODEL_ROUTES: Mapping[str, Callable[[Mapping[str, Any], int], ModelRequest]] = {
    "/v1/chat/completions": chat_request,
    "/v1/completions": completion_request,
    "/inference/v1/generate": generate_request,
}
REWARD_ROUTE, MODELS_ROUTE = "/v1/reward", "/v1/models"


@dataclass(frozen=True)
class ServedModel:
    """What the server says and checks about the model."""

    name: str
    max_model_len: int
    vocab_size: int


class EndpointServer:
    """Serves an exchange on a free port of 127.0.0.1, in threads of its own, until `close`."""

    def __init__(self, exchange: Exchange, model: ServedModel, max_body_bytes: int, max_connections: int) -> None:
        self._server = _Server((HOST, 0), _Handler)
        self._server.exchange, self._server.model = exchange, model
        self._server.max_body_bytes = max_body_bytes
        self._server.free = threading.BoundedSemaphore(max_connections)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.2,), name="endpoint", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Without a path."""
        return f"http://{HOST}:{self.port}"

    def close(self) -> None:
        """Stop listening and cut what is connected. Idempotent."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256
    exchange: Exchange
    model: ServedModel
    max_body_bytes: int
    free: threading.BoundedSemaphore

    def __init__(self, *args: Any) -> None:
        self._open: set[socket.socket] = set()
        super().__init__(*args)

    def server_bind(self) -> None:
        """Without the base class's look-up of a host name, which may wait for a name server."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self.free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        self._open.add(request)
        try:
            super().process_request(request, client_address)
        except BaseException:  # there is no thread more
            self._left(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._left(request)

    def _left(self, request: Any) -> None:
        self._open.discard(request)
        self.free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is the client's business; all other errors are answered where they arise."""

    def server_close(self) -> None:
        super().server_close()
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = READ_TIMEOUT_S
    server: _Server
    disable_nagle_algorithm = True

    def version_string(self) -> str:
        return "aligner"

    def log_message(self, *args: Any) -> None:
        """Nothing: the episodes' records say what was asked."""

    def do_GET(self) -> None:
        self._answered(self._get)

    def do_POST(self) -> None:
        self._answered(self._post)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses by itself (malformed request lines, other methods), in the API's shape too."""
        self.close_connection = True
        self._send(ApiError(code, message or self.responses.get(code, ("error", ""))[0]))

    def _answered(self, handle: Callable[[], None]) -> None:
        self._headers_sent = False
        try:
            handle()
        except ApiError as error:
            if not self._headers_sent:
                self._send(error)
        except (OSError, TimeoutError):  # the client has gone
            self.close_connection = True
        except Exception as error:
            self.close_connection = True
            if not self._headers_sent:
                self._send(ApiError(500, f"The endpoint failed: {type(error).__name__}: {error}"))

    def _get(self) -> None:
        self._session()
        path = self._path()
        if path != MODELS_ROUTE and not path.startswith(MODELS_ROUTE + "/"):
            raise self._unknown_route()
        name = unquote(path[len(MODELS_ROUTE) + 1 :])
        model = self.server.model
        card = {
            "id": name or model.name,  # requests may name any model
            "object": "model",
            "created": 0,
            "owned_by": "aligner",
            "max_model_len": model.max_model_len,
        }
        self._send(card if name else {"object": "list", "data": [card]})

    def _post(self) -> None:
        try:
            session = self._session()
            route = MODEL_ROUTES.get(self._path())
            if route is None and self._path() != REWARD_ROUTE:
                raise self._unknown_route()
            length = self._length()
        except ApiError as error:
            self.close_connection = True  # where the body ends may be unknown
            self._send(error)
            self._skip_body()
            return
        received = self.rfile.read(length)
        if len(received) < length:
            raise ConnectionError("the client has gone in the midst of its request")
        body = parse_object(received)
        if route is None:
            session.report = reward_report(body)
            self._send({"object": "reward", "reward": session.report.reward})
            return
        request = route(body, self.server.model.vocab_size)
        retry = self.headers.get("x-stainless-retry-count", "0") not in ("0", "")
        pending = Pending(session, request, retry, self._connected)
        self.server.exchange.put(pending)
        reply = pending.wait()
        if not request.stream:
            self._send(as_json(request, reply))
            return
        self.close_connection = True  # the end of the connection is the end of the stream
        self._head(200, "text/event-stream", None)
        for event in as_events(request, reply):
            self.wfile.write(event)

    def _path(self) -> str:
        return self.path.partition("?")[0].rstrip("/")

    def _session(self) -> Session:
        scheme, _, key = self.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            message = "There is no key; send Authorization: Bearer OPENAI_API_KEY."
            raise ApiError(401, message, code="invalid_api_key")
        return self.server.exchange.session(key.strip())

    def _length(self) -> int:
        text, limit = self._content_length(), self.server.max_body_bytes
        if not text.isdecimal() or len(text) > 20 or "Transfer-Encoding" in self.headers:
            raise ApiError(411, "Content-Length is missing or wrong; bodies in chunks are not taken.")
        if int(text) > limit:
            raise ApiError(413, f"The body has {text} bytes, more than {limit}; see environment.agent.max_request_mib.")
        return int(text)

    def _content_length(self) -> str:
        """As it was sent; of two that differ none counts."""
        lengths = set(self.headers.get_all("Content-Length", ()))
        return lengths.pop() if len(lengths) == 1 else ""

    def _skip_body(self) -> None:
        """Read on after a refusal: a connection that is closed with bytes unread is reset, and the answer lost."""
        left = min(int(text), UNREAD_BYTES) if (text := self._content_length()[:20]).isdecimal() else 0
        while left > 0 and (piece := self.rfile.read(min(left, 1 << 16))):
            left -= len(piece)

    def _unknown_route(self) -> ApiError:
        routes = ", ".join(["GET " + MODELS_ROUTE, *(f"POST {route}" for route in (*MODEL_ROUTES, REWARD_ROUTE))])
        return ApiError(404, f"There is no {self.command} {self._path()}; there are {routes}.", code="unknown_route")

    def _connected(self) -> bool:
        """Whether the client is still there: it has not closed the connection."""
        try:
            poller = select.poll()  # takes descriptors of any number
            poller.register(self.connection, select.POLLIN)
            return not (poller.poll(0) and self.connection.recv(1, socket.MSG_PEEK) == b"")
        except (OSError, ValueError):
            return False

    def _send(self, answer: Mapping[str, Any] | ApiError) -> None:
        status, value = (answer.status, answer.body()) if isinstance(answer, ApiError) else (200, answer)
        body = json.dumps(value).encode()
        self._head(status, "application/json", len(body))
        self.wfile.write(body)

    def _head(self, status: int, kind: str, length: int | None) -> None:
        self._headers_sent = True
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
