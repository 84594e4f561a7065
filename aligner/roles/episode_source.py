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
    """The source of environment.target.

    Raises:
        ValueError: nothing can play it.
    """
    raise ValueError(f"environment.target={config.environment.target}: this version has nothing that plays it.")
