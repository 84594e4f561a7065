"""Every shipped configuration composes and is whole; help explains every field; mistakes name the setting."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hydra.utils import instantiate

from aligner.bounds import check_settings
from aligner.config.help import field_docs, help_text
from aligner.config.schema import CONF, Config, compose_config, to_config
from aligner.data.column_addition import ColumnAddition
from aligner.data.config import KINDS
from aligner.data.mixture_config import CurriculumConfig
from aligner.data.named_sources import named_sources
from aligner.data.sets import METHODS
from aligner.trainer.config import CriticConfig

NEEDED = ["model.path=folder"]
PIPELINE = "RLHF_RUN"
"""Environment variable: the folder of a pipeline's stages, which their configurations name."""
GROUPS = [
    (group.name, file.stem)
    for group in sorted(CONF.iterdir())
    if group.is_dir()
    for file in sorted(group.glob("*.yaml"))
]


@pytest.fixture(autouse=True)
def pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PIPELINE, "pipeline")


@pytest.mark.parametrize("name", sorted(file.stem for file in CONF.glob("*.yaml")))
def test_every_top_level_configuration_is_whole(name: str) -> None:
    assert to_config(compose_config(NEEDED, name)).model.path == "folder"


@pytest.mark.parametrize(("group", "option"), [(group, option) for group, option in GROUPS if group != "stage"])
def test_every_option_of_every_group_composes(group: str, option: str) -> None:
    assert isinstance(to_config(compose_config([*NEEDED, f"{group}={option}"])), Config)


@pytest.mark.parametrize("stage", [option for group, option in GROUPS if group == "stage"])
def test_every_stage_reads_and_writes_in_the_pipeline_s_folder(stage: str) -> None:
    config = to_config(compose_config([f"stage={stage}"], "rlhf"))
    assert config.run_dir == f"pipeline/{stage}"
    for path in (config.model.path, config.data.path):
        assert path is not None and path.startswith("pipeline/"), path


def test_a_stage_without_its_folder_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PIPELINE)
    with pytest.raises(ValueError, match=PIPELINE):
        to_config(compose_config([], "rlhf"))


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
    assert config.placement["rollout"].ranks == (1, 2)
    assert config.sampling.stop_token_ids == (3,)
    assert config.policy.optimizer.lr == 2e-5
    assert config.placement["reference"].ranks == "50%-100%"
    assert config.placement["critic"].ranks == "policy"
    assert config.algorithm["group_size"] == 8


def test_residency_composes() -> None:
    config = to_config(compose_config([*NEEDED, "residency.mode=offload", "residency.keep=[policy,rollout.weights]"]))
    assert (config.residency.mode, config.residency.keep) == ("offload", ("policy", "rollout.weights"))
    assert config.residency.prefetch and config.residency.budget_gib is None
    assert to_config(compose_config([*NEEDED, "residency.budget_gib=1.5"])).residency.budget_gib == 1.5


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_is_a_choice(kind: str) -> None:
    config = to_config(compose_config([*NEEDED, f"data={kind}", "data.path=rows.jsonl"]))
    check_settings(config.data, "data")
    assert (config.data.kind, config.data.task) == (kind, None)
    generated = to_config(compose_config([*NEEDED, "data=column_addition", f"data.kind={kind}"])).data
    task = instantiate(generated.task)
    assert callable(getattr(task, METHODS[kind]))
    assert task == ColumnAddition()


def test_variables_of_the_chat_template_compose() -> None:
    assert to_config(compose_config(NEEDED)).data.chat_template_kwargs == {}
    given = ["+data.chat_template_kwargs.enable_thinking=false", "+data.chat_template_kwargs.documents=[{title: a}]"]
    for form in (given, ["+data.chat_template_kwargs={enable_thinking: false, documents: [{title: a}]}"]):
        found = to_config(compose_config([*NEEDED, *form])).data.chat_template_kwargs
        assert found == {"enable_thinking": False, "documents": [{"title": "a"}]}


def test_sources_of_rows_compose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SETS", "/sets")
    whole = ["data.sources={math: {path: $SETS/math.jsonl, weight: 2}, chat: {path: chat.jsonl}}"]
    singly = ["data.sources.math={path: $SETS/math.jsonl, weight: 2}", "data.sources.chat.path=chat.jsonl"]
    for given in (whole, singly, [f"+{override}" for override in singly]):
        data = to_config(compose_config([*NEEDED, *given])).data
        assert data.sources == {"math": {"path": "/sets/math.jsonl", "weight": 2}, "chat": {"path": "chat.jsonl"}}
        math, chat = named_sources(data)
        assert (math.data.path, math.weight, chat.weight) == ("/sets/math.jsonl", 2.0, 1.0)
    data = to_config(compose_config([*NEEDED, "data=mixture", "data.sources.math.path=~/m.jsonl"])).data
    check_settings(data, "data")
    assert data.sources["math"] == {"path": str(Path("~/m.jsonl").expanduser()), "weight": 2}
    assert [source.weight for source in named_sources(data)] == [2.0, 1.0]
    data = to_config(compose_config([*NEEDED, "data=curriculum", "data.path=rows.jsonl"])).data
    check_settings(data, "data")
    assert data.curriculum == CurriculumConfig(by="success", order="uncertain", fraction=0.5, retire_at=1.0)


def test_a_system_prompt_and_a_template_file_compose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPLATES", "/templates")
    given = ["data.system_prompt='Be brief, {please}.'", "data.chat_template=$TEMPLATES/chatml.jinja"]
    data = to_config(compose_config([*NEEDED, *given])).data
    assert (data.system_prompt, data.chat_template) == ("Be brief, {please}.", "/templates/chatml.jinja")
    assert to_config(compose_config([*NEEDED, "data.system_prompt=''"])).data.system_prompt == ""


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("modle.path=x", "there is no setting modle.path; did you mean model.path"),
        ("placement.policy.tensro=2", "did you mean placement.policy.tensor"),
        (
            "algorithm=grop",
            "no such configuration; available: dapo, dapo_paper, dpo, dr_grpo, grpo, grpo_decoupled",
        ),
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
        "algorithm   dapo, dapo_paper, dpo, dr_grpo, grpo,",
        "stage       dpo, grpo, ppo, preferences, reward_model, sft",
        "critic.optimizer.lr=",
        "logging     console, wandb",
        "policy.micro_tokens=16384  [at least 1]",
        "policy.optimizer.schedule=constant  [one of constant, linear, cosine]",
        "rollout.kv_cache_mib=null  [at least 1, or null]",
    ):
        assert word in text, word
    assert set(field_docs(Config)) == set(Config.__dataclass_fields__)
    assert field_docs(CriticConfig).keys() >= {"path", "micro_tokens"}, "its own and what it inherits"


def test_help_is_fast_and_light() -> None:
    """Help and validation of values import neither torch nor an engine."""
    program = "import sys; from aligner.config.help import help_text; help_text(); print(sorted({'torch', 'vllm', 'megatron'} & set(sys.modules)))"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr[-1000:]


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--help"], "Fields (KEY=VALUE"), (["--cfg", "job", "model.path=x", "algorithm.group_size=3"], "group_size: 3")],
)
def test_flags_print_and_leave(flags: list[str], said: str) -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "aligner.main", *flags], capture_output=True, text=True, cwd=root, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
