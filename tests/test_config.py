"""Every shipped configuration composes and is whole; help explains every field; mistakes name the setting."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aligner.config import CONF, Config, compose_config, to_config
from aligner.help import field_docs, help_text

NEEDED = ["model.path=folder"]
GROUPS = [
    (group.name, file.stem)
    for group in sorted(CONF.iterdir())
    if group.is_dir()
    for file in sorted(group.glob("*.yaml"))
]


@pytest.mark.parametrize("name", sorted(file.stem for file in CONF.glob("*.yaml")))
def test_every_top_level_configuration_is_whole(name: str) -> None:
    assert to_config(compose_config(NEEDED, name)).model.path == "folder"


@pytest.mark.parametrize(("group", "option"), GROUPS)
def test_every_option_of_every_group_composes(group: str, option: str) -> None:
    assert isinstance(to_config(compose_config([*NEEDED, f"{group}={option}"])), Config)


def test_values_arrive_with_their_types() -> None:
    config = to_config(
        compose_config(
            [
                *NEEDED,
                "placement=split",
                "placement.rollout.ranks=[1,2]",
                "sampling.stop_token_ids=[3]",
                "policy.optimizer.lr=2e-5",
            ]
        )
    )
    assert config.placement.rollout.ranks == (1, 2)
    assert config.sampling.stop_token_ids == (3,)
    assert config.policy.optimizer.lr == 2e-5
    assert config.placement.reference.ranks == "policy"
    assert config.algorithm["group_size"] == 8


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("modle.path=x", "there is no setting modle.path; did you mean model.path"),
        ("placement.policy.tensro=2", "did you mean placement.policy.tensor"),
        ("algorithm=grop", "no such configuration; available: grpo, sft"),
        ("algorithm.group_sise=2", "did you mean algorithm.group_size"),
        (
            "policy.optimizer.lr=abc",
            "policy.optimizer.lr=abc: Value 'abc' of type 'str' could not be converted to Float",
        ),
        ("+polcy.lr=1", "there is no setting polcy"),
    ],
)
def test_mistakes_name_the_setting(override: str, said: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        to_config(compose_config([*NEEDED, override]))
    assert said in str(error.value)


def test_help_explains_every_field() -> None:
    text = help_text()
    for word in (
        "placement.policy.tensor=1",
        "policy.optimizer.lr=",
        "algorithm   grpo, sft",
        "logging     console, wandb",
    ):
        assert word in text, word
    assert set(field_docs(Config)) == set(Config.__dataclass_fields__)


def test_help_is_fast_and_light() -> None:
    """Help and validation of values import neither torch nor an engine."""
    program = "import sys; from aligner.help import help_text; help_text(); print(sorted({'torch', 'vllm', 'megatron'} & set(sys.modules)))"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr[-1000:]


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--help"], "Fields (KEY=VALUE"), (["--cfg", "job", "model.path=x", "algorithm.group_size=3"], "group_size: 3")],
)
def test_flags_print_and_leave(flags: list[str], said: str) -> None:
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "aligner.main", *flags], capture_output=True, text=True, cwd=root, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
