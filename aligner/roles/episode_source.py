"""What plays a job's episodes, made from its configuration on the first rank of each rollout replica."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

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


def max_contexts(config: Config, tokenizer: PreTrainedTokenizerBase) -> int:
    """Most contexts (segments) of an episode: one for each turn where a program makes them, or where the chat template writes the
    turns so far otherwise once others follow, and environment.rewritten=segment; else 1."""
    settings = config.environment
    several = bool(settings.agent.command)
    if settings.target and settings.rewritten == "segment":
        several = rewrites_history(conversation_format(config, tokenizer))
    return settings.max_turns if several else 1


def rewrites_history(form: ConversationFormat) -> bool:
    """Whether the chat template was seen to rewrite a conversation of three turns that reason, which users or tools answer."""
    from aligner.data.tokenizer import encode_plain
    from aligner.environments.conversation import TOOL_PROBE, Conversation

    name = TOOL_PROBE["function"]["name"]
    for tools in (False, True):
        conversation = Conversation(form)
        try:
            conversation.open([{"role": "user", "content": "Try it."}], [TOOL_PROBE] if tools else None)
            for turn in range(3):
                text, call_id = f"<think>\nFirst.\n</think>\n\nSo {turn}.", f"call{turn:05d}"
                said: dict[str, Any] = {"role": "assistant", "content": text}
                answer = {"role": "user", "content": f"And {turn}?"}
                if tools:
                    function = {"name": name, "arguments": {"value": str(turn)}}
                    said["tool_calls"] = [{"type": "function", "id": call_id, "function": function}]
                    answer = {"role": "tool", "content": str(turn), "tool_call_id": call_id, "name": name}
                sampled = [*encode_plain(form.tokenizer, text), *sorted(form.ends)[:1]]
                if conversation.extend(sampled, said, [answer]).new_segment:
                    return True
        except ValueError:
            continue  # a template that takes no such turns: the environment's will show what it does
    return False
