"""What plays a job's episodes, made from its configuration on the first rank of each rollout replica."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from aligner.config.schema import Config
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
        ValueError: the environment cannot be started, or the tokenizer has no chat template.
    """
    from aligner.data.chat import ChatOptions
    from aligner.environments.conversation import ConversationFormat
    from aligner.environments.endpoint.agents import AgentEpisodes
    from aligner.environments.episodes import EnvironmentEpisodes
    from aligner.environments.pool import EnvironmentPool
    from aligner.environments.tool_calls import named_parser

    settings, length = config.environment, config.rollout.length(spec)
    form = ConversationFormat(
        tokenizer,
        stop=(*spec.eos_token_ids, *(config.sampling.stop_token_ids or ())),
        chat=ChatOptions(config.data.chat_template_kwargs, config.data.system_prompt),
        rewritten=settings.rewritten,
    )
    parser, most = lambda: named_parser(settings.tool_parser, tokenizer), min(settings.max_tokens or length, length)
    if settings.agent.command:
        return AgentEpisodes(settings, form, parser, most, spec.vocab)
    return EnvironmentEpisodes(settings, EnvironmentPool(settings), form, parser, most)
