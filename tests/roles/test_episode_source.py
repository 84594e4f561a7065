"""A job with an environment is refused before its start where the tokenizer cannot render its conversations."""

import pytest

from aligner.config.schema import Config, compose_config, to_config
from aligner.roles.episode_source import check_conversations, conversation_format, max_contexts
from tests.environments.families import FAMILIES, tokenizer_of


def configured(*overrides: str) -> Config:
    return to_config(compose_config(["model.path=folder", *overrides]))


def test_a_tokenizer_needs_a_chat_template() -> None:
    tokenizer = tokenizer_of(FAMILIES["qwen3"])
    check_conversations(configured("environment.target=g.py:Game"), tokenizer)
    tokenizer.chat_template = None
    check_conversations(configured(), tokenizer)
    with pytest.raises(ValueError, match=r"data\.chat_template=FILE"):
        check_conversations(configured("environment.target=g.py:Game"), tokenizer)


def test_a_parser_of_vllm_is_tried_before_the_start() -> None:
    tokenizer = tokenizer_of(FAMILIES["phi3"])
    with pytest.raises(ValueError, match=r"vllm:llama3_json does not fit"):
        check_conversations(configured("environment=search", "environment.tool_parser=vllm:llama3_json"), tokenizer)


def test_conversations_are_rendered_as_prompts_are() -> None:
    tokenizer = tokenizer_of(FAMILIES["qwen3"])
    config = configured(
        "environment=search", "environment.rewritten=keep", "+data.chat_template_kwargs.enable_thinking=false",
        "data.system_prompt=Search.", "sampling.stop_token_ids=[3]",
    )  # fmt: skip
    form = conversation_format(config, tokenizer, [tokenizer.convert_tokens_to_ids("<|endoftext|>")])
    assert (form.rewritten, form.chat.template_kwargs, form.chat.system_prompt) == (
        "keep",
        {"enable_thinking": False},
        "Search.",
    )
    assert form.ends == set(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))


@pytest.mark.parametrize(
    ("family", "overrides", "contexts"),
    [
        ("qwen3", ["environment.target=g.py:Game"], 5),  # drops the reasoning of turns before the last user's
        ("qwen3", ["environment.target=g.py:Game", "environment.rewritten=keep"], 1),
        ("phi3", ["environment.target=g.py:Game"], 1),
        ("phi3", ["environment.agent.command=play"], 5),
        ("phi3", [], 1),
    ],
)
def test_how_many_contexts_an_episode_may_have(family: str, overrides: list[str], contexts: int) -> None:
    config = configured(*overrides, "environment.max_turns=5")
    assert max_contexts(config, tokenizer_of(FAMILIES[family])) == contexts
