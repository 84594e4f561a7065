"""Rewards from an HTTP endpoint: batched requests, deadlines, retries; what fails is missing, with its reason."""

from __future__ import annotations

import json
import math
import os
import random
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from aligner.bounds import check_settings
from aligner.reward.config import RewardComponent
from aligner.reward.judge import Judge
from aligner.reward.worker import DETAIL_CHARACTERS, Score, Status

AGAIN = {408, 425, 429, 500, 502, 503, 504}
LONGEST_WAIT_S = 30.0
MAX_ANSWER = 64 * 2**20
CHECK_S = 5.0
Item = Mapping[str, Any]


class RequestFailed(Exception):
    """One attempt had no usable answer."""

    def __init__(self, status: Status, detail: str, again: bool = False, wait_s: float = 0.0) -> None:
        super().__init__(detail)
        self.status, self.detail, self.again, self.wait_s = status, detail, again, wait_s


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the token to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class HttpScorer:
    """POSTs rows as JSON and reads scores.

    Request: {"prompt": [text, ...], "response": [text, ...], "fields": [{...}, ...]}, the prompts' JSON fields; answer:
    {"scores": [number or null, ...]}, one for each row in the same order; null says that the row cannot be scored
    (unparsable). With `judge`, one OpenAI-compatible chat completion for each row instead; see `Judge`.

    A refused connection, a timeout, 408, 425, 429 and 5xx are tried again; everything else fails at once. TLS
    certificates are verified, redirects are not followed, and the token is in no message.
    """

    def __init__(self, component: RewardComponent, where: str, workers: int, timeout_s: float) -> None:
        """
        Args:
            where: the prefix of the component's settings in messages.
            workers: requests in flight.
            timeout_s: limit for one request, in seconds.

        Raises:
            ValueError: a setting that cannot work; an environment variable that is not set; nothing listens there.
        """
        assert component.url is not None
        self.url, self.where, self.workers, self.timeout_s = component.url, where, workers, timeout_s
        self.retries, self.backoff_s = component.retries, component.backoff_s
        self.progress: Callable[[], None] = lambda: None
        """Called after each request."""
        self._open: dict[int, int] = {}
        self._jitter = random.Random()  # of its own: the global one is the same on every rank, and stays so
        self.judge = Judge(component.judge, where) if component.judge else None
        self.rows_per_request = 1 if self.judge else component.rows_per_request
        check_settings(component, where)
        self._check_url()
        self._token = self._read_token(component.token_env)
        self._opener = urllib.request.build_opener(
            urllib.request.HTTPSHandler(context=ssl.create_default_context()), _NoRedirect()
        )
        self._check_reachable()

    def score(self, items: Sequence[Item]) -> list[Score]:
        """One score for each {'prompt': str, 'response': str, 'fields': dict}, in the same order."""
        size = self.rows_per_request
        batches = [items[start : start + size] for start in range(0, len(items), size)]
        threads = ThreadPoolExecutor(self.workers)
        futures = [threads.submit(self._followed, size * number, batch) for number, batch in enumerate(batches)]
        # A server that drips its headers byte by byte outwits a socket's own timeout.
        one = (self.timeout_s + LONGEST_WAIT_S) * (self.retries + 1)
        done, _ = wait(futures, one * math.ceil(len(batches) / self.workers))
        threads.shutdown(wait=False, cancel_futures=True)
        scores: list[Score] = []
        for future, batch in zip(futures, batches, strict=True):
            scores += (
                future.result() if future in done else self._lost(batch, Status.TIMEOUT, "no end of the answer", 0)
            )
        return scores

    def needs(self) -> frozenset[str]:
        """Fields without which a row has no score: those that the judge's prompt shows."""
        return self.judge.fields if self.judge else frozenset()

    def under_way(self) -> list[int]:
        """Items of requests that have no answer yet."""
        return [item for first, count in list(self._open.items()) for item in range(first, first + count)]

    def close(self) -> None:
        """Nothing is held between two batches."""

    def _followed(self, first: int, batch: Sequence[Item]) -> list[Score]:
        self._open[first] = len(batch)
        try:
            return self._scores_of(batch)
        finally:
            del self._open[first]
            self.progress()

    def _scores_of(self, batch: Sequence[Item]) -> list[Score]:
        start = time.perf_counter()
        for attempt in range(self.retries + 1):
            try:
                return [self._score(value, time.perf_counter() - start) for value in self._attempt(batch)]
            except RequestFailed as error:
                if not error.again or attempt == self.retries:
                    after = f" ({attempt + 1} attempts)" if attempt else ""
                    return self._lost(batch, error.status, error.detail + after, time.perf_counter() - start)
                pause = min(
                    max(self.backoff_s * 2**attempt * self._jitter.uniform(0.8, 1.2), error.wait_s), LONGEST_WAIT_S
                )
                self.progress()
                time.sleep(pause)
            except Exception as error:  # a row that cannot be written as JSON, a field that the judge's prompt lacks
                detail = f"{type(error).__name__}: {error}"
                return self._lost(batch, Status.FAILED, detail, time.perf_counter() - start)
        raise AssertionError("the last attempt returns")

    def _attempt(self, batch: Sequence[Item]) -> list[Any]:
        """One request: the values of the batch's rows, each a number, None or a `Score` of the judge."""
        if self.judge:
            answer = self._post(self.judge.request(batch[0]))
            return [self.judge.read(answer)]
        answer = self._post({key: [item[key] for item in batch] for key in ("prompt", "response", "fields")})
        values = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(values, list):
            raise RequestFailed(Status.FAILED, f'the answer is no {{"scores": [...]}}: {json.dumps(answer)[:120]}')
        if len(values) != len(batch):
            raise RequestFailed(Status.FAILED, f"{len(values)} scores for {len(batch)} rows")
        return values

    def _post(self, body: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "aligner"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        request = urllib.request.Request(self.url, json.dumps(body, allow_nan=False).encode(), headers, method="POST")
        end = time.monotonic() + self.timeout_s
        try:
            with self._opener.open(request, timeout=self.timeout_s) as response:
                text = self._read(response, end)
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(DETAIL_CHARACTERS).decode("utf-8", "replace")
                raise RequestFailed(
                    Status.FAILED, f"HTTP {error.code}: {said}", error.code in AGAIN, _retry_after(error.headers)
                ) from None
        except TimeoutError:
            raise self._too_late() from None
        except (OSError, EOFError) as error:  # URLError is one
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise self._too_late() from None
            again = not isinstance(reason, ssl.SSLCertVerificationError)
            raise RequestFailed(Status.FAILED, f"{type(reason).__name__}: {reason}", again) from None
        try:
            return json.loads(text)
        except ValueError:
            raise RequestFailed(
                Status.FAILED, f"the answer is no JSON: {text[:80].decode('utf-8', 'replace')}"
            ) from None

    def _read(self, response: Any, end: float) -> bytes:
        """The body, piece by piece, since each piece has a timeout of its own."""
        text = b""
        while piece := response.read1(2**20):
            text += piece
            if time.monotonic() > end:
                raise self._too_late()
            if len(text) > MAX_ANSWER:
                raise RequestFailed(Status.FAILED, f"an answer of more than {MAX_ANSWER} bytes")
        return text

    def _too_late(self) -> RequestFailed:
        return RequestFailed(Status.TIMEOUT, f"no answer within {self.where}.timeout_s={self.timeout_s}", True)

    def _score(self, value: Any, seconds: float) -> Score:
        if isinstance(value, Score):
            return value
        if value is None:
            return Score(math.nan, Status.UNPARSABLE, seconds, "the endpoint gave null")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return Score(math.nan, Status.FAILED, seconds, f"the endpoint gave {str(value)[:80]!r}, not a number")
        return Score(float(value), Status.OK, seconds)

    def _lost(self, batch: Sequence[Item], status: Status, detail: str, seconds: float) -> list[Score]:
        if self._token:
            detail = detail.replace(self._token, "***")  # an endpoint may repeat what it was sent
        return [Score(math.nan, status, seconds, detail[:DETAIL_CHARACTERS])] * len(batch)

    def _check_url(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{self.where}.url={self.url} must be such as https://host:8000/score.")
        if parts.username or parts.password:
            raise ValueError(
                f"{self.where}.url holds a user name or password; leave them out and name an environment variable that "
                f"holds a token: {self.where}.token_env=NAME."
            )

    def _read_token(self, variable: str | None) -> str | None:
        if variable is None:
            return None
        token = os.environ.get(variable, "").strip()
        if not token:
            raise ValueError(f"{self.where}.token_env={variable}: there is no such environment variable; export it.")
        return token

    def _check_reachable(self) -> None:
        """Something must listen now: a mistyped host is told before models are built."""
        parts = urllib.parse.urlsplit(self.url)
        host = parts.hostname or ""
        if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
            return
        try:
            socket.create_connection((host, parts.port or {"http": 80, "https": 443}[parts.scheme]), CHECK_S).close()
        except OSError as error:
            raise ValueError(
                f"{self.where}.url={self.url} cannot be reached ({error}); start the endpoint before the job, or mend the url."
            ) from None


def _retry_after(headers: Any) -> float:
    try:
        return max(0.0, float(headers.get("Retry-After", "0")))
    except ValueError:  # a date
        return 0.0
