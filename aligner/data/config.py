"""Settings of what is trained and evaluated on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from aligner.data.answers import check_choices

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
    kind: str = "prompts"
    """What the loop trains on: prompts (to sample from), demonstrations (to imitate), preferences (a better and a worse
    answer) or feedback (good or bad answers)."""
    prompts_per_step: int = 32
    """Prompts (demonstrations, pairs of preferences, answers with feedback) in one step."""
    train_on: str = "responses"
    """Demonstrations: loss on the responses, or on all tokens but the first. An assistant's message with "train": false
    (or "weight": 0) is left out of either."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further variables of the chat template for every conversation, such as enable_thinking; a row's own
    'chat_template_kwargs' come first."""
    max_prompt_tokens: int = 512
    """Longest prompt to sample from allowed, in tokens."""
    max_tokens: int = 1024
    """Longest prompt with its answer allowed, in tokens."""
    too_long: str = "error"
    """Prompts longer than max_prompt_tokens; demonstrations, pairs and answers longer than max_tokens; held-out ones
    too: error (also called stop), or drop, which counts them."""
    shuffle: bool = True
    """A new order in each epoch."""
    eval_prompts: int = 256
    """Held-out prompts (or demonstrations, or pairs) used in an evaluation, at most."""

    def check(self) -> None:
        """Raises ValueError naming the setting and the values that would work."""
        if self.kind not in KINDS:
            raise ValueError(f"data.kind={self.kind} is unknown; use {', '.join(KINDS)}.")
        check_choices(self.too_long, self.train_on)
        for name, least in {"prompts_per_step": 1, "max_prompt_tokens": 1, "max_tokens": 2, "eval_prompts": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"data.{name}={getattr(self, name)} must be at least {least}.")
        if self.train_on == "all" and self.kind != "demonstrations":
            raise ValueError(f"data.train_on=all is for data.kind=demonstrations, not {self.kind}; use responses.")
