"""The parser of tool calls that environment.tool_parser names: of a format of ours, or one of vLLM's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aligner.environments.tool_calls import PARSERS, VLLM, ParsedTurn, ToolParser, Tools, check_name, format_of, turn_of
from aligner.rollout.engines import vllm_tool_parser

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def named_parser(name: str, tokenizer: PreTrainedTokenizerBase) -> ToolParser:
    """The parser of environment.tool_parser.

    Args:
        name: a key of PARSERS, "auto", or "vllm:" and the name of one of vLLM's.

    Raises:
        ValueError: there is none of that name, or auto cannot tell.
    """
    if name == "auto":
        template = tokenizer.chat_template
        name = format_of("".join(template.values()) if isinstance(template, dict) else str(template))
    check_name(name)
    if name in PARSERS:
        return PARSERS[name]
    extract = vllm_tool_parser(name.removeprefix(VLLM), tokenizer)

    def read(text: str, tools: Tools) -> ParsedTurn:
        return turn_of(text, *extract(text, tools))

    return read
