"""What plays a job's episodes, made from its configuration on the first rank of each rollout replica."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from aligner.config.schema import Config
    from aligner.environments.conversation import ConversationFormat
    from aligner.environments.tool_calls import ToolParser
    from aligner.models.spec import ModelSpec
    from aligner.rollout.episodes.source import EpisodeSource


def source_factory(
    config: Config, tokenizer: PreTrainedTokenizerBase, spec: ModelSpec
) -> Callable[[], EpisodeSource] | None:
    """Makes the source of this rank's replica; None: the job has no environment, and responses are one turn.

    Args:
        tokenizer: of the policy, with the chat template of data.chat_template.
        spec: the policy's model, with the tokens that end a turn.
    """
    if not config.environment.enabled:
        return None
    return lambda: make_source(config, tokenizer, spec)


def make_source(config: Config, tokenizer: PreTrainedTokenizerBase, spec: ModelSpec) -> EpisodeSource:
    """The source of environment.target or environment.agent.command.

    Raises:
        ValueError: it cannot be started, or the tokenizer has no chat template.
    """
    from aligner.environments.endpoint.agents import AgentEpisodes
    from aligner.environments.episodes import EnvironmentEpisodes
    from aligner.environments.parsers import named_parser
    from aligner.environments.pool import EnvironmentPool

    settings, length = config.environment, config.rollout.length(spec)
    form = conversation_format(config, tokenizer, spec.eos_token_ids)
    max_tokens = min(settings.max_tokens or length, length)

    def parser() -> ToolParser:
        return named_parser(settings.tool_parser, tokenizer)

    if settings.agent.command:
        return AgentEpisodes(settings, form, parser, max_tokens, spec.vocab)
    return EnvironmentEpisodes(settings, EnvironmentPool(settings), form, parser=parser, max_tokens=max_tokens)


def conversation_format(
    config: Config, tokenizer: PreTrainedTokenizerBase, ends: Iterable[int] = ()
) -> ConversationFormat:
    """How the conversations of environment.target are rendered.

    Args:
        ends: tokens that end a turn by the model's own files.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    from aligner.data.chat import ChatOptions
    from aligner.environments.conversation import ConversationFormat

    return ConversationFormat(
        tokenizer,
        stop=(*ends, *(config.sampling.stop_token_ids or ())),
        chat=ChatOptions(config.data.chat_template_kwargs, config.data.system_prompt),
        rewritten=config.environment.rewritten,
    )


def check_conversations(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError for an environment whose conversations this tokenizer cannot render, or whose calls cannot be read."""
    from aligner.environments.parsers import named_parser

    if not config.environment.enabled:
        return
    conversation_format(config, tokenizer)
    if config.environment.tool_parser != "auto":  # auto asks the template once an environment has tools
        named_parser(config.environment.tool_parser, tokenizer)
