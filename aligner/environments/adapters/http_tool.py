"""A tool that is an HTTP endpoint: the call's arguments go to one URL, and the answer's text is the result."""

from __future__ import annotations

import json
import os
import urllib.parse
import urllib.request
from typing import Any

READ_BYTES = 2**22


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it would take the token to another host."""

    def redirect_request(self, *_: Any) -> None:
        """No request follows."""


OPENER = urllib.request.build_opener(NoRedirects())


class HttpTool:
    """One tool, declared by its options; the policy chooses the arguments, never the URL."""

    def __init__(
        self,
        url: str,
        name: str,
        description: str,
        parameters: dict[str, Any],
        method: str = "POST",
        timeout_s: float = 20.0,
        token_env: str | None = None,
    ) -> None:
        """
        Args:
            url: the endpoint.
            name: of the tool.
            description: of the tool, for the policy.
            parameters: JSON schema of the arguments: {type: object, properties: ..., required: [...]}.
            method: POST sends the arguments as JSON, GET in the query.
            timeout_s: limit of one request, in seconds.
            token_env: environment variable that holds a bearer token.
        """
        self._tool_names = (name,)
        self._url, self._method, self._timeout_s, self._token_env = url, method, timeout_s, token_env
        setattr(self, name, self._call)

    @staticmethod
    def _problem(url: str, name: str, method: str = "POST", token_env: str | None = None, **_: Any) -> str | None:
        """Why it cannot work, or None."""
        if not url.startswith(("http://", "https://")):
            return f"url={url} is no URL; give http://... or https://..."
        if not name.isidentifier() or name.startswith("_"):
            return f"name={name} is no name of a tool; use letters, digits and _"
        if method not in ("GET", "POST"):
            return f"method={method} is unknown; use POST or GET"
        if token_env is not None and not os.environ.get(token_env):
            return f"token_env={token_env} is not set in the environment; export it, or leave token_env out"
        return None

    @staticmethod
    def _tools_of(name: str, description: str, parameters: dict[str, Any], **_: Any) -> dict[str, Any]:
        """The declared tool by its name, with its schema."""

        def declared() -> None:
            pass

        function = {"name": name, "description": description, "parameters": parameters}
        declared.json_schema = {"type": "function", "function": function}  # type: ignore[attr-defined]
        return {name: declared}

    def _call(self, **arguments: Any) -> str:
        url, body = self._url, None
        headers = {"Accept": "application/json, text/plain"}
        if self._method == "POST":
            body = json.dumps(arguments).encode("utf-8")
            headers["Content-Type"] = "application/json"
        else:
            url += ("&" if "?" in url else "?") + urllib.parse.urlencode(arguments)
        if self._token_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[self._token_env]}"
        request = urllib.request.Request(url, body, headers, method=self._method)
        with OPENER.open(request, timeout=self._timeout_s) as answer:
            text: str = answer.read(READ_BYTES).decode("utf-8")
        return text
