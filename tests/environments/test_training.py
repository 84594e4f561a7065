"""Jobs that train on environments of packages, unmodified (-m environments), and on the examples of docs/agents.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.environments.packages import interpreter, served
from tests.environments.short_job import ShortJob, learned, trained

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "docs" / "examples"


def call_text(name: str, **arguments: Any) -> str:
    """A tool call as Qwen2.5 writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def says(folder: Path) -> str:
    """A reward rule of one's own."""
    file = folder / "rules.py"
    file.write_text("def says(prompt, response, *, answer):\n    return float(answer in response)\n")
    return f"{file}:says"


@pytest.mark.environments
def test_skyrl_gym(short_job: ShortJob) -> None:
    rows = [
        {"prompt": f"What is 2 + {n}?", "reward_spec": {"ground_truth": str(n + 2)}, "max_turns": 3} for n in (1, 2)
    ]
    metrics = short_job(
        ["#### 3", "#### 4", "hm"], rows, "environment.kind=skyrl_gym", "environment.target=gsm8k_multi_turn",
        f"environment.python={interpreter('games')}",
    )  # fmt: skip
    trained(metrics, turns=1.5)
    learned(metrics)


@pytest.mark.environments
def test_textarena_by_the_configuration_of_the_text_game(short_job: ShortJob) -> None:
    words = [f"[{number}]" for number in range(1, 21)]
    rows = [{"prompt": "Play."}, {"prompt": "Guess."}]
    metrics = short_job(words, rows, "environment=textarena", f"environment.python={interpreter('games')}")
    trained(metrics, turns=2)
    learned(metrics)


@pytest.mark.environments
def test_reasoning_gym(short_job: ShortJob) -> None:
    """The rows' seeds draw two questions whose answer is 6."""
    metrics = short_job(
        [f"<answer>{number}</answer>" for number in (3, 4, 6, 8)], [{"prompt": "Sum up.", "seed": seed} for seed in (2, 7)],
        "environment.kind=reasoning_gym", "environment.target=chain_sum", f"environment.python={interpreter('games')}",
        "+environment.options={min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}",
    )  # fmt: skip
    trained(metrics, turns=1)
    learned(metrics)


@pytest.mark.environments
@pytest.mark.parametrize("transport", ["stdio", "http"])
def test_an_mcp_server(short_job: ShortJob, transport: str, tmp_path: Path) -> None:
    """It has tools and no reward: a rule scores the last turn."""
    python, server = interpreter("games"), str(HERE / "mcp_server.py")
    rows = [{"prompt": "2 + 3?", "answer": "5"}, {"prompt": "2 + 4?", "answer": "6"}]
    words = [call_text("add", a=2, b=3), call_text("fail", why="so"), "5", "6"]

    def train(target: str) -> None:
        metrics = short_job(
            words, rows, f"reward.rule='{says(tmp_path)}'", "environment.kind=mcp", f"environment.target='{target}'",
            f"environment.python={python}", "rollout.max_model_len=4000", "environment.max_turns=4",
        )  # fmt: skip
        trained(metrics, turns=1.2)
        learned(metrics)
        assert all(0 < row["environment/tool_errors"] < row["environment/tool_calls"] for row in metrics)

    if transport == "stdio":
        train(f"{python} {server}")
    else:
        with served(python, server) as port:
            train(f"http://127.0.0.1:{port}/mcp")


@pytest.mark.environments
def test_an_openenv_server(short_job: ShortJob) -> None:
    python = interpreter("openenv")
    with served(python, str(HERE / "openenv_servers.py"), "echo") as port:
        target = f"environment.target='http://127.0.0.1:{port}'"
        metrics = short_job(
            ["hello", "hi"], [{"prompt": "Speak."}, {"prompt": "Talk."}], target, f"environment.python={python}",
            "environment.episodes_per_process=4",  # the server has 8 sessions
        )  # fmt: skip
    trained(metrics, turns=2)
    learned(metrics)


@pytest.mark.slow
def test_the_search_example(short_job: ShortJob, tmp_path: Path) -> None:
    texts = {"Oslo": "Oslo is the capital of Norway.", "Paris": "Paris is the capital of France."}
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"title": title, "text": text}) + "\n" for title, text in texts.items()))
    rows = [
        {"prompt": f"The capital of {land}?", "answer": city}
        for land, city in (("Norway", "Oslo"), ("France", "Paris"))
    ]
    words = [call_text("search", query="capital Norway"), call_text("search", query="capital France"), "Oslo", "Paris"]
    metrics = short_job(
        words, rows, f"reward.rule='{says(tmp_path)}'", "environment=search", f"environment.target='{EXAMPLES / 'search.py'}:Search'",
        f"environment.options.documents='{documents}'",
    )  # fmt: skip
    trained(metrics, turns=1.2)
    learned(metrics)
    assert all(row["environment/tool_calls"] > 0 and row["environment/tool_errors"] == 0 for row in metrics)
