"""Secrets are found by name and form, and taken out; what is none stays as it is."""

from __future__ import annotations

from typing import Any

import pytest

from aligner.config.schema import CONF, compose_config, known_keys
from aligner.config.secrets import HIDDEN, Mask, is_secret, masked, without_patterns


@pytest.mark.parametrize(
    "name",
    [
        "token", "api_key", "apiKey", "API-KEY", "password", "db.password", "Authorization", "WANDB_API_KEY", "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY", "client_secret", "private_key", "credentials", "X-Auth-Token", "authToken",
    ],
)  # fmt: skip
def test_secrets_by_name(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        "max_tokens", "stop_token_ids", "token_env", "TOKENIZERS_PARALLELISM", "tokens_per_second", "key", "keys", "monkey",
        "tokenizer", "SSH_AUTH_SOCK", "secretary", "", "_", "step_tokens", "kv_cache_mib", "prompt", "answer_key",
    ],
)  # fmt: skip
def test_no_secrets_by_name(name: str) -> None:
    assert not is_secret(name)


@pytest.mark.parametrize("name", sorted(file.stem for file in CONF.glob("*.yaml")))
def test_no_setting_of_ours_is_taken_for_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_RUN", "pipeline")
    compose_config(["model.path=x"], name)  # makes the schema known
    assert [key for key in known_keys(name, CONF) if is_secret(key.rpartition(".")[2])] == []


def test_what_is_masked() -> None:
    given: dict[str, Any] = {
        "reward": {
            "kwargs": {"api_key": "sk-123", "scale": 2.0, "token": None, "password": ""},
            "components": {"judge": {"url": "https://me:pw@host:1/a?key=k1&page=2", "headers": {"X-Team": "red"}}},
            "list": [{"secret": 5}, "Bearer abcdefgh123"],
            "own_token": "${oc.env:TOKEN}",
        },
        "max_tokens": 20,
    }
    assert masked(given) == {
        "reward": {
            "kwargs": {"api_key": HIDDEN, "scale": 2.0, "token": None, "password": ""},
            "components": {"judge": {"url": "https://***@host:1/a?key=***&page=2", "headers": {"X-Team": HIDDEN}}},
            "list": [{"secret": HIDDEN}, "Bearer ***"],
            "own_token": "${oc.env:TOKEN}",
        },
        "max_tokens": 20,
    }
    assert given["reward"]["kwargs"]["api_key"] == "sk-123", "the job itself keeps them"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgres://u:p@db/x and http://h/", "postgres://***@db/x and http://h/"),
        ("https://h/?q=1&access_token=abc&n=2", "https://h/?q=1&access_token=***&n=2"),
        ("https://h/score?tokens=5", "https://h/score?tokens=5"),
        ("'Authorization': 'Bearer abc.def-ghi'", "'Authorization': 'Bearer ***'"),
        ("the bearer of news", "the bearer of news"),
        ("mail a@b.org, path /a/b@c", "mail a@b.org, path /a/b@c"),
    ],
)
def test_by_form(text: str, expected: str) -> None:
    assert without_patterns(text) == expected


def test_a_mask_knows_values_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "environment-value")
    monkeypatch.setenv("JUDGE", "named-by-token-env")
    monkeypatch.setenv("SHORT_TOKEN", "false")
    config = {
        "reward": {"kwargs": {"password": "config-value", "note": "it is config-value"}, "c": {"token_env": "JUDGE"}}
    }
    mask = Mask.of(["reward.kwargs.client_secret='argument-value'", "train.steps=5"], config)
    for value in ("environment-value", "named-by-token-env", "config-value", "argument-value"):
        assert mask.text(f"<{value}>") == "<***>"
    assert mask.text("false is false") == "false is false", "a short value is a word of other things too"
    assert mask.plain(config)["reward"]["kwargs"] == {"password": HIDDEN, "note": "it is ***"}
    longer = Mask(["abcdefgh", "abcdefgh-and-more"])
    assert longer.text("abcdefgh-and-more") == HIDDEN
