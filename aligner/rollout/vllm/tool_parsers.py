"""vLLM's own parsers of tool calls, called on whole responses without its server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.tool_parsers import ToolParser, ToolParserManager

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tool_parser(
    name: str, tokenizer: PreTrainedTokenizerBase
) -> Callable[[str, Sequence[Mapping[str, Any]]], tuple[str, list[tuple[str, str]]]]:
    """See `aligner.rollout.engines.vllm_tool_parser`. What vLLM cannot read it returns as content, without saying why."""
    names = ToolParserManager.list_registered()
    if name not in names:
        raise ValueError(f"environment.tool_parser=vllm:{name}: vLLM has {', '.join(names)}.")
    kind = ToolParserManager.get_tool_parser(name)
    try:
        _extract(kind, tokenizer, "", ())
    except Exception as error:  # parsers look for their special tokens, and raise what they like
        raise ValueError(f"environment.tool_parser=vllm:{name} does not fit this tokenizer: {error}") from error

    def extract(text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[str, str]]]:
        try:
            return _extract(kind, tokenizer, text, tools)
        except Exception:  # most return what they cannot read, some raise
            return text, []

    return extract


def _extract(
    kind: type[ToolParser], tokenizer: PreTrainedTokenizerBase, text: str, tools: Sequence[Mapping[str, Any]]
) -> tuple[str, list[tuple[str, str]]]:
    fields = {"messages": [], "model": "", "tools": [dict(tool) for tool in tools] or None}
    request: Any = ChatCompletionRequest.model_validate(fields)
    parser = kind(tokenizer, request.tools)  # it holds the state of one response
    parsed = parser.extract_tool_calls(text, request)
    return parsed.content or "", [(call.function.name, call.function.arguments) for call in parsed.tool_calls]
