"""Settings of what is trained and evaluated on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from aligner.bounds import AtLeast, OneOf

KINDS = ("prompts", "demonstrations", "preferences", "feedback")


@dataclass(frozen=True)
class DataConfig:
    """What is trained and evaluated on: JSONL files, or a generated task."""

    path: str | None = None
    """JSONL file of rows of this kind, which may hold further fields. Prompts: {"prompt"} or {"messages"}.
    Demonstrations: {"prompt", "completion"}, {"query", "response"} or {"messages"}. Preferences: {"prompt", "chosen",
    "rejected"} or {"query", "response": [...], "score": [...]}. Feedback: {"prompt", "completion", "label"} or
    preferences."""
    eval_path: str | None = None
    """JSONL file of held-out prompts (kind=prompts), demonstrations (their loss) or preferences (kind=preferences or
    feedback), whose prompts are answered too where the roles can; none: no evaluation."""
    task: Any = None
    """A generated task in place of files, as a `_target_` (see data=column_addition)."""
    kind: Annotated[str, OneOf(*KINDS)] = "prompts"
    """What the loop trains on: prompts (to sample from), demonstrations (to imitate), preferences (a better and a worse
    answer) or feedback (good or bad answers)."""
    prompts_per_step: Annotated[int, AtLeast(1)] = 32
    """Prompts (demonstrations, pairs of preferences, answers with feedback) in one step."""
    train_on: Annotated[str, OneOf("responses", "all")] = "responses"
    """Demonstrations: loss on the responses, or on all tokens but the first. An assistant's message with "train": false
    (or "weight": 0) is left out of either."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further variables of the chat template for every conversation, such as enable_thinking; a row's own
    'chat_template_kwargs' come first."""
    max_prompt_tokens: Annotated[int, AtLeast(1)] = 512
    """Longest prompt to sample from allowed, in tokens."""
    max_tokens: Annotated[int, AtLeast(2)] = 1024
    """Longest prompt with its answer allowed, in tokens."""
    too_long: Annotated[str, OneOf("error", "drop", "stop")] = "error"
    """Prompts longer than max_prompt_tokens; demonstrations, pairs and answers longer than max_tokens; held-out ones
    too: error (also called stop), or drop, which counts them."""
    shuffle: bool = True
    """A new order in each epoch."""
    eval_prompts: Annotated[int, AtLeast(1)] = 256
    """Held-out prompts (or demonstrations, or pairs) used in an evaluation, at most."""

    def check(self) -> None:
        """Raises ValueError naming the setting and the values that would work."""
        if self.train_on == "all" and self.kind != "demonstrations":
            raise ValueError(f"data.train_on=all is for data.kind=demonstrations, not {self.kind}; use responses.")
