"""The roles of a job, built from its configuration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from aligner.data.end_tokens import find_ends
from aligner.data.tokenizer import load_tokenizer
from aligner.health.startup import Startup
from aligner.models.read_spec import read_spec
from aligner.models.spec import with_scalar_head
from aligner.spmd.placement import role_layout
from aligner.spmd.role_table import USUAL, RoleSpec

if TYPE_CHECKING:  # the engines take seconds to import; loops name `Roles`, and checking a job must not wait for them
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from aligner.config.schema import Config
    from aligner.models.spec import ModelSpec
    from aligner.reshard.weights import StoredWeights
    from aligner.reward.role import Reward
    from aligner.rollout.generation import SharedWeights
    from aligner.rollout.role import Rollout
    from aligner.spmd.mesh import Mesh
    from aligner.spmd.role import Role
    from aligner.spmd.world import World
    from aligner.trainer.critic import Critic
    from aligner.trainer.model_role import ModelRole
    from aligner.trainer.policy import Policy, Reference
    from aligner.trainer.reward_model import RewardModel
    from aligner.trainer.trainable_role import TrainableRole


class Roles:
    """What a loop calls: `roles.policy` and so on, and `roles["NAME"]` of any role; those that algorithm.roles leaves out
    raise ValueError, but for `roles.reference`, which is None then."""

    def __init__(self, built: Mapping[str, Role]) -> None:
        self._built = dict(built)
        self._kept: list[SimpleNamespace] = []
        self._restored: list[dict[str, Any]] = []

    def keep(self, **values: Any) -> Any:
        """What a loop carries from step to step in names of its own: numbers, texts, lists, dicts, NamedTuples of these.

        Args:
            values: as at the start of a run.

        Returns:
            An object with these attributes, to be read and set. A checkpoint holds them, and a loop that goes on from
            one gets what they were; anything else that a loop remembers starts anew. A loop calls it before its first
            step, always in the same order.
        """
        if self._restored:
            saved = self._restored.pop(0)
            if saved.keys() != values.keys():
                raise ValueError(
                    f"the checkpoint's loop kept {', '.join(saved)}, and this one keeps {', '.join(values)}; go on with the "
                    "loop that began, or start a new run."
                )
            values = {name: _like(values[name], value) for name, value in saved.items()}
        self._kept.append(SimpleNamespace(**values))
        return self._kept[-1]

    def kept_values(self) -> list[dict[str, Any]]:
        """What `keep` holds now, as JSON."""
        return [dict(vars(one)) for one in self._kept]

    def restore_kept(self, saved: list[dict[str, Any]]) -> None:
        """The next calls of `keep` return these."""
        self._restored = list(saved)

    def __getitem__(self, name: str) -> Any:
        """The role of this name: a usual one, or that of `models.NAME`.

        Raises:
            ValueError: the job has none.
        """
        return self._present(name)

    def __contains__(self, name: object) -> bool:
        """Whether the job has a role of this name."""
        return name in self._built

    @property
    def policy(self) -> Policy:
        """The trained language model."""
        return cast("Policy", self._present("policy"))

    @property
    def rollout(self) -> Rollout:
        """The rollout engine's replicas."""
        return cast("Rollout", self._present("rollout"))

    @property
    def reward(self) -> Reward:
        """The scorer."""
        return cast("Reward", self._present("reward"))

    @property
    def critic(self) -> Critic:
        """The value model."""
        return cast("Critic", self._present("critic"))

    @property
    def reward_model(self) -> RewardModel:
        """The model that scores responses."""
        return cast("RewardModel", self._present("reward_model"))

    @property
    def reference(self) -> Reference | None:
        """The frozen copy of the starting model."""
        return cast("Reference | None", self._built.get("reference"))

    @property
    def built(self) -> list[Role]:
        """Every role that there is."""
        return list(self._built.values())

    @property
    def trained(self) -> list[TrainableRole]:
        """What a run leaves behind: the policy, then what else a loop has updated; the same on every rank."""
        return [role for role in self.trainable if role.version or role.name == "policy"]

    @property
    def engines(self) -> list[Rollout]:
        """Every rollout engine; the same on every rank."""
        from aligner.rollout.role import Rollout

        return [role for role in self._built.values() if isinstance(role, Rollout)]

    @property
    def trainable(self) -> list[TrainableRole]:
        """Every role that could learn; the same on every rank."""
        from aligner.trainer.trainable_role import TrainableRole

        return [role for role in self._built.values() if isinstance(role, TrainableRole)]

    @property
    def main(self) -> TrainableRole:
        """What the run is about: the policy, or the reward model that is trained alone."""
        return self.trainable[0]

    def _present(self, name: str) -> Role:
        if name not in self._built:
            raise ValueError(
                f"the loop uses roles.{name}, which algorithm.roles leaves out; add {name} to algorithm.roles."
                if name in USUAL
                else f'the loop uses roles["{name}"], and this job has {", ".join(self._built)}; add {name} to '
                f"algorithm.roles, and define models.{name}={{kind: ..., path: ...}}."
            )
        return self._built[name]


def _like(value: Any, saved: Any) -> Any:
    """A NamedTuple is a list in JSON."""
    return type(value)(*saved) if isinstance(value, tuple) else saved


ORDER = ("trainer", "engine", "host")
"""Roles are built in this order, each group in that of the configuration: an engine measures what models have left of the
memory, and the reward is given its reward models."""


def build_roles(
    config: Config,
    wanted: Sequence[str],
    world: World,
    meshes: Mapping[str, Mesh],
    spec: ModelSpec,
    tokenizer: PreTrainedTokenizerBase,
    startup: Startup | None = None,
) -> Roles:
    """Every rank calls this; each role builds its engine on its own ranks only.

    Args:
        wanted: names of roles.
        spec: the model of model.path, with the tokens that end a turn in this job.
        startup: told of the time of each role.
    """
    startup = startup or Startup()
    world.residency.config = config.residency
    described = [role for role in config.roles.values() if role.name in wanted]
    built: dict[str, Role] = {}
    for role in sorted(described, key=lambda role: ORDER.index(role.kind.runs_on)):
        with startup.phase(role.name):
            if role.kind.on_trainer:
                built[role.name] = _trainer_role(config, role, described, world, meshes[role.name], spec)
            elif role.kind.runs_on == "engine":
                built[role.name] = _engine_role(config, role, world, meshes[role.name], spec, tokenizer, built)
            else:
                built[role.name] = _reward_role(config, role, world, meshes[role.name], tokenizer, built)
    return Roles(built)


def _trainer_role(
    config: Config, role: RoleSpec, roles: Sequence[RoleSpec], world: World, mesh: Mesh, spec: ModelSpec
) -> ModelRole:
    from aligner.roles.weight_sync import WeightSyncs
    from aligner.trainer.critic import Critic
    from aligner.trainer.policy import Policy, Reference
    from aligner.trainer.reward_model import RewardModel
    from aligner.trainer.trainable_role import TrainableRole

    kinds: dict[str, type[ModelRole]] = {
        "policy": Policy,
        "frozen": Reference,
        "critic": Critic,
        "reward_model": RewardModel,
    }
    kind, settings = kinds[role.kind.name], config.settings(role.name)
    more: dict[str, Any] = {"sequence_parallel": role_layout(config.placement, role).sequence_parallel}
    if issubclass(kind, TrainableRole):
        more["total_steps"] = config.train.steps * settings.minibatches * settings.epochs
        turns = config.environment.max_turns if config.environment.enabled else 1
        more["max_response"] = turns * config.sampling.max_tokens
        more["not_finite"] = config.guards.not_finite
        more["skip_empty"] = config.guards.empty_batch.action == "skip"
        more["offending"] = Path(config.run_dir) / "offending"
    if issubclass(kind, Reference):
        # Only what was sampled is judged under the sampling temperature: in other data nothing says what it would be.
        sampled = config.data.kind == "prompts" and any(other.kind.runs_on == "engine" for other in roles)
        more["temperature"] = config.sampling.temperature if sampled else 1.0
    if issubclass(kind, Policy):
        more["syncs"] = WeightSyncs(config.reshard)
    built = kind(role.name, world, mesh, _spec_of(config, role, spec), settings, **more)
    if isinstance(built, TrainableRole):
        built.section = role.section
    return built


def _engine_role(
    config: Config,
    role: RoleSpec,
    world: World,
    mesh: Mesh,
    spec: ModelSpec,
    tokenizer: PreTrainedTokenizerBase,
    built: Mapping[str, Role],
) -> Rollout:
    from aligner.roles import episode_source
    from aligner.rollout.folder_weights import FolderWeights
    from aligner.rollout.role import Rollout
    from aligner.rollout.rows import request_seed

    further = role.name in config.models
    seed = request_seed(config.seed, *role.name.encode()) if further else config.seed  # two engines draw differently
    own = _spec_of(config, role, spec)
    settings, source = config.settings(role.name), None
    if not further:  # a further engine answers what a loop asks of it
        source = episode_source.source_factory(config, tokenizer, own)
    shared = _shared_weights(cast("Policy", built["policy"])) if settings.share_policy_weights else None
    rollout = Rollout(role.name, world, mesh, own, settings, config.sampling, seed, config.stream, source, shared)
    if further:
        rollout.loaded.source = FolderWeights(own)  # until a policy sends its own
    return rollout


def _shared_weights(policy: Policy) -> SharedWeights:
    """The policy's own tensors, which its ranks hold whole (`aligner.check.shared_weights`)."""
    from aligner.rollout.generation import SharedWeights

    return SharedWeights(policy, lambda name: cast("StoredWeights", policy.weights).local(name))


def _reward_role(
    config: Config,
    role: RoleSpec,
    world: World,
    mesh: Mesh,
    tokenizer: PreTrainedTokenizerBase,
    built: Mapping[str, Role],
) -> Reward:
    from aligner.reward.role import Reward
    from aligner.trainer.reward_model import RewardModel

    scorers = {name: other for name, other in built.items() if isinstance(other, RewardModel)}
    return Reward(role.name, world, mesh, config.reward, tokenizer, scorers)


def _spec_of(config: Config, role: RoleSpec, spec: ModelSpec) -> ModelSpec:
    """The model of a role, with its head, and the tokens that end a turn in this job where it reads the same ones."""
    setting, path = config.model_path(role.name)
    if role.kind.head == "scalar":
        return replace(
            with_scalar_head(read_spec(path, config.model.trust_remote_code)), chat_template=spec.chat_template
        )
    if setting == "model.path":
        return spec
    own = read_spec(path, config.model.trust_remote_code)
    if getattr(config.settings(role.name), "own_tokenizer", False):
        ends = find_ends(path, load_tokenizer(path, setting), [], False).ids
    else:
        ends, own = spec.eos_token_ids, replace(own, chat_template=spec.chat_template)
    return replace(own, eos_token_ids=tuple(dict.fromkeys([*own.eos_token_ids, *ends])))
