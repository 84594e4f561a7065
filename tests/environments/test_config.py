from __future__ import annotations

import pytest

from aligner.bounds import check_settings
from aligner.config.schema import compose_config, to_config
from aligner.environments.config import EnvironmentConfig

USUAL = ["model.path=m", "data.path=d"]


def composed(*overrides: str) -> EnvironmentConfig:
    return to_config(compose_config([*USUAL, *overrides])).environment


def test_no_environment_by_default() -> None:
    settings = composed()
    assert not settings.enabled and settings.python is None
    check_settings(settings, "environment")


def test_settings_as_the_docs_write_them() -> None:
    options = (
        '+environment.tool_options={http: {url: "http://127.0.0.1:8000/search", name: search, description: "Search the '
        'documents.", parameters: {type: object, properties: {query: {type: string}}, required: [query]}}}'
    )
    settings = composed("environment.target=my_tools.py:Tools", "environment.tools=[interpreter,http]", options)
    check_settings(settings, "environment")
    assert settings.enabled and list(settings.tools) == ["interpreter", "http"]
    assert settings.tool_options["http"]["parameters"]["required"] == ["query"]


def test_paths_have_home_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    settings = composed("environment.target=~/my.py:Tools", "environment.python=~/venv/bin/python")
    assert (settings.target, settings.python) == ("/home/me/my.py:Tools", "/home/me/venv/bin/python")
    assert composed("environment.target=TicTacToe-v0", "environment.python=python3.12").target == "TicTacToe-v0"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "tools"}, "environment.target has no value, but environment.kind=tools"),
        ({"tools": ("interpreter",)}, "environment.target has no value, but environment.tools"),
        ({"target": "x:Y", "kind": "steps", "tools": ("http",)}, "environment.tools go with environment.kind=tools"),
        ({"target": "x:Y", "tool_options": {"http": {}}}, "environment.tool_options.http: there is no such tool"),
        ({"target": "x:Y", "kind": "gym"}, "environment.kind=gym is unknown; use auto, steps"),
        ({"target": "x:Y", "step_timeout_s": 0.0}, "environment.step_timeout_s=0.0 must be finite and more than 0"),
        ({"target": "x:Y", "memory_mib": 1}, "environment.memory_mib=1 must be at least 64, or null"),
    ],
)
def test_mistakes_are_told(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match="environment") as error:
        check_settings(EnvironmentConfig(**settings), "environment")
    assert message in str(error.value)
