"""Rewards from an HTTP endpoint or an LLM judge: batched requests, timeouts, retries; failed rows have no reward."""

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

RETRIED_CODES = {408, 425, 429, 500, 502, 503, 504}
LONGEST_WAIT_S = 30.0
MAX_ANSWER = 64 * 2**20
CHECK_S = 5.0
Item = Mapping[str, Any]


class RequestFailed(Exception):
    """One attempt had no usable answer.

    `status` and `detail` are those of the rows, `retry` whether to retry, `wait_s` the least wait before that in seconds.
    """

    def __init__(self, status: Status, detail: str, retry: bool = False, wait_s: float = 0.0) -> None:
        super().__init__(detail)
        self.status, self.detail, self.retry, self.wait_s = status, detail, retry, wait_s


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which would send the token to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class HttpScorer:
    """POSTs rows as JSON and reads scores.

    Request: {"prompt": [text, ...], "response": [text, ...], "fields": [{...}, ...]}, with the prompts' JSON fields. Answer:
    {"scores": [number or null, ...]}, one per row in the same order; null means unparsable. With `judge`, one
    OpenAI-compatible chat completion per row instead; see `Judge`.

    Refused connections, timeouts, 408, 425, 429 and 5xx are retried; everything else fails immediately. TLS certificates
    are verified, redirects are not followed, and the token never appears in messages.
    """

    def __init__(self, component: RewardComponent, where: str, workers: int, timeout_s: float) -> None:
        """
        Args:
            component: the settings; `url` is set.
            where: prefix of the component's settings in messages.
            workers: maximum number of concurrent requests.
            timeout_s: limit per request, in seconds.

        Raises:
            ValueError: an invalid setting, an environment variable that is not set, or the endpoint cannot be reached.
        """
        assert component.url is not None
        self.url, self.where, self.workers, self.timeout_s = component.url, where, workers, timeout_s
        self.retries, self.backoff_s = component.retries, component.backoff_s
        self.progress: Callable[[], None] = lambda: None
        """Called after each request."""
        self._open: dict[int, int] = {}
        self._jitter = random.Random()  # not the global generator, whose state must stay the same on all ranks
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
        # A server that sends its headers byte by byte defeats the socket's own timeout.
        limit_s = (self.timeout_s + LONGEST_WAIT_S) * (self.retries + 1)
        done, _ = wait(futures, limit_s * math.ceil(len(batches) / self.workers))
        threads.shutdown(wait=False, cancel_futures=True)
        scores: list[Score] = []
        for future, batch in zip(futures, batches, strict=True):
            scores += (
                future.result() if future in done else self._lost(batch, Status.TIMEOUT, "no end of the answer", 0)
            )
        return scores

    def needs(self) -> frozenset[str]:
        """Fields that every row needs: those that the judge's prompt uses."""
        return self.judge.fields if self.judge else frozenset()

    def under_way(self) -> list[int]:
        """Indices of the items in unanswered requests. Thread-safe."""
        return [item for first, count in list(self._open.items()) for item in range(first, first + count)]

    def close(self) -> None:
        """Nothing to close."""

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
                if not error.retry or attempt == self.retries:
                    after = f" ({attempt + 1} attempts)" if attempt else ""
                    return self._lost(batch, error.status, error.detail + after, time.perf_counter() - start)
                pause = min(
                    max(self.backoff_s * 2**attempt * self._jitter.uniform(0.8, 1.2), error.wait_s), LONGEST_WAIT_S
                )
                self.progress()
                time.sleep(pause)
            except (
                Exception
            ) as error:  # a row that cannot be encoded as JSON, a field of the judge's prompt that the row lacks
                detail = f"{type(error).__name__}: {error}"
                return self._lost(batch, Status.FAILED, detail, time.perf_counter() - start)
        raise AssertionError("the last attempt returns")

    def _attempt(self, batch: Sequence[Item]) -> list[Any]:
        """One request: the rows' values, each a number, None or the judge's `Score`."""
        if self.judge:
            answer = self._post(self.judge.request(batch[0]))
            return [self.judge.read(answer)]
        answer = self._post({key: [item[key] for item in batch] for key in ("prompt", "response", "fields")})
        values = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(values, list):
            raise RequestFailed(Status.FAILED, f'the answer is not {{"scores": [...]}}: {json.dumps(answer)[:120]}')
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
                body_text = error.read(DETAIL_CHARACTERS).decode("utf-8", "replace")
                raise RequestFailed(
                    Status.FAILED,
                    f"HTTP {error.code}: {body_text}",
                    error.code in RETRIED_CODES,
                    _retry_after(error.headers),
                ) from None
        except TimeoutError:
            raise self._too_late() from None
        except (OSError, EOFError) as error:  # URLError is one
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise self._too_late() from None
            retry = not isinstance(reason, ssl.SSLCertVerificationError)
            raise RequestFailed(Status.FAILED, f"{type(reason).__name__}: {reason}", retry) from None
        try:
            return json.loads(text)
        except ValueError:
            raise RequestFailed(
                Status.FAILED, f"the answer is not JSON: {text[:80].decode('utf-8', 'replace')}"
            ) from None

    def _read(self, response: Any, end: float) -> bytes:
        """Read the body in pieces, checking the deadline, because the socket's timeout applies to each read."""
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
            detail = detail.replace(self._token, "***")  # an endpoint may echo what it was sent
        return [Score(math.nan, status, seconds, detail[:DETAIL_CHARACTERS])] * len(batch)

    def _check_url(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{self.where}.url={self.url} must be a URL such as https://host:8000/score.")
        if parts.username or parts.password:
            raise ValueError(
                f"{self.where}.url contains a user name or password; remove them and name an environment variable that "
                f"holds a token: {self.where}.token_env=NAME."
            )

    def _read_token(self, variable: str | None) -> str | None:
        if variable is None:
            return None
        token = os.environ.get(variable, "").strip()
        if not token:
            raise ValueError(f"{self.where}.token_env={variable}: this environment variable is not set; export it.")
        return token

    def _check_reachable(self) -> None:
        """Raises ValueError if nothing listens at the URL now, before models are built."""
        parts = urllib.parse.urlsplit(self.url)
        host = parts.hostname or ""
        if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
            return
        try:
            socket.create_connection((host, parts.port or {"http": 80, "https": 443}[parts.scheme]), CHECK_S).close()
        except OSError as error:
            raise ValueError(
                f"{self.where}.url={self.url} cannot be reached ({error}); start the endpoint before the job, or correct the url."
            ) from None


def _retry_after(headers: Any) -> float:
    try:
        return max(0.0, float(headers.get("Retry-After", "0")))
    except ValueError:  # a date
        return 0.0
