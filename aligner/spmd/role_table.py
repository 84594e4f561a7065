"""The kinds of role that a job can have, and the roles that every configuration has a section for (no torch).

All that the rest of the program asks about a role (where it runs, which head it needs, whether it learns, what it holds in
memory, whose ranks it shares by default) is a field here. A further model is a `RoleSpec` with a name of the user's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
WEIGHTS, TRAINING_STATE = ("weights",), ("weights", "gradients", "optimizer")


@dataclass(frozen=True)
class RoleKind:
    """What all roles of one kind have in common."""

    name: str
    description: str
    """In words, for messages and --help."""
    runs_on: Literal["trainer", "engine", "host"]
    """A model of a training backend, a rollout engine, or worker processes on host CPUs."""
    head: Literal["vocabulary", "scalar"] | None = None
    """The output layer that its checkpoint must have, or gets."""
    learns: Literal["always", "without a policy", "never"] = "never"
    """Whether a job trains it: optimizer state is counted, and a folder for its model kept free. A reward model beside a
    policy is frozen unless the loop updates it."""
    parts: tuple[str, ...] = ()
    """What it holds on a device, as residency names it."""
    layout_of: str | None = None
    """The role whose ranks and parallel sizes it has unless its placement says otherwise: `placement.NAME.ranks` takes
    this name."""

    @property
    def on_trainer(self) -> bool:
        """Its model runs on the training backend: it has context, expert_tensor, stage_layers and virtual_pipeline."""
        return self.runs_on == "trainer"


@dataclass(frozen=True)
class RoleSpec:
    """One role of a job."""

    name: str
    kind: RoleKind
    section: str
    """Where its settings stand in the configuration: `policy`, or `models.judge`."""
    doc: str = ""


POLICY = RoleKind("policy", "a trained language model", "trainer", "vocabulary", "always", TRAINING_STATE, "policy")
FROZEN = RoleKind(
    "frozen", "a frozen language model, which gives log-probabilities", "trainer", "vocabulary", parts=WEIGHTS,
    layout_of="policy",
)  # fmt: skip
CRITIC = RoleKind(
    "critic",
    "a trained model with a scalar head at every token",
    "trainer",
    "scalar",
    "always",
    TRAINING_STATE,
    "policy",
)
REWARD_MODEL = RoleKind(
    "reward_model", "a model with a scalar head at the last token", "trainer", "scalar", "without a policy",
    TRAINING_STATE, "policy",
)  # fmt: skip
ENGINE = RoleKind("engine", "a rollout engine", "engine", "vocabulary", parts=("weights", "cache"), layout_of="rollout")
SCORER = RoleKind("scorer", "what scores responses: rules, endpoints, reward models", "host")

MODEL_KINDS = {kind.name: kind for kind in (POLICY, FROZEN, CRITIC, REWARD_MODEL, ENGINE)}
"""What `models.NAME.kind` may be."""

USUAL = {
    role.name: role
    for role in (
        RoleSpec("policy", POLICY, "policy", "The trained model."),
        RoleSpec("rollout", ENGINE, "rollout", "Engine replicas: ranks / tensor of them."),
        RoleSpec(
            "reference", FROZEN, "reference",
            "The frozen copy of the starting model; ranks=policy: on the policy's ranks and with its sizes.",
        ),
        RoleSpec("reward", SCORER, "reward", "Ranks whose host CPUs score samples."),
        RoleSpec(
            "critic", CRITIC, "critic", "The value model; ranks=policy: on the policy's ranks and with its sizes."
        ),
        RoleSpec(
            "reward_model", REWARD_MODEL, "reward_model",
            "The model that scores responses; ranks=policy: on the policy's ranks and with its sizes.",
        ),
    )
}  # fmt: skip
"""The roles with a section of their own, by name."""

OF_A_RUN = frozenset({"model", "exports", "best", "checkpoints", "samples", "timeline", "offending", "faults", "wandb"})
"""Names under run_dir that are a run's own: a model of this name would be exported there."""


def further_role(name: str, kind: str) -> RoleSpec:
    """The role of `models.NAME`.

    Raises:
        ValueError: a name that is taken or is no word, or an unknown kind; what would work is named.
    """
    setting = f"models.{name}"
    if not NAME.fullmatch(name):
        raise ValueError(f"{setting}: a model's name is a word of letters, digits and _, such as models.judge.")
    if name in USUAL:
        raise ValueError(
            f"{setting}: {name} is a role with a section of its own; set {name}.* for that one, or choose another name."
        )
    if name in OF_A_RUN or name == "all":
        raise ValueError(f"{setting}: run_dir/{name} is a run's own; choose another name than {name}.")
    if kind not in MODEL_KINDS:
        works = "; ".join(f"{kind.name} ({kind.description})" for kind in MODEL_KINDS.values())
        given = f"{setting} has no kind" if kind in ("", "???") else f"{setting}.kind={kind} is unknown"
        raise ValueError(f"{given}; use {works}.")
    return RoleSpec(name, MODEL_KINDS[kind], setting)


def learns(role: RoleSpec, roles: Mapping[str, RoleSpec]) -> bool:
    """Whether a job with these roles trains this one (see `RoleKind.learns`)."""
    if role.kind.learns == "without a policy":
        return not any(other.kind is POLICY for other in roles.values())
    return role.kind.learns == "always"
