"""The roles of a job, built from its configuration."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from aligner.models.spec import read_spec, with_scalar_head
from aligner.spmd.placement import role_layout

if TYPE_CHECKING:  # the engines take seconds to import; loops name `Roles`, and checking a job must not wait for them
    from collections.abc import Mapping

    from transformers import PreTrainedTokenizerBase

    from aligner.config.schema import Config
    from aligner.models.spec import ModelSpec
    from aligner.reward.role import Reward
    from aligner.rollout.role import Rollout
    from aligner.spmd.mesh import Mesh
    from aligner.spmd.role import Role
    from aligner.spmd.world import World
    from aligner.trainer.config import TrainingConfig
    from aligner.trainer.critic import Critic
    from aligner.trainer.model_role import ModelRole
    from aligner.trainer.policy import Policy, Reference
    from aligner.trainer.reward_model import RewardModel
    from aligner.trainer.trainable_role import TrainableRole

M = TypeVar("M", bound="ModelRole")


class Roles:
    """What a loop calls: `roles.policy` and so on; those that algorithm.roles leaves out raise ValueError, but for
    `reference`, which is None then."""

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

    @property
    def policy(self) -> Policy:
        """The trained language model."""
        return cast("Policy", self._present("policy"))

    @property
    def rollout(self) -> Rollout:
        """The vLLM replicas."""
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
            )
        return self._built[name]


def _like(value: Any, saved: Any) -> Any:
    """A NamedTuple is a list in JSON."""
    return type(value)(*saved) if isinstance(value, tuple) else saved


def build_roles(
    config: Config,
    wanted: list[str],
    world: World,
    meshes: Mapping[str, Mesh],
    spec: ModelSpec,
    tokenizer: PreTrainedTokenizerBase,
) -> Roles:
    """Every rank calls this; each role builds its engine on its own ranks only."""
    from aligner.reward.role import Reward
    from aligner.roles.weight_sync import WeightSyncs
    from aligner.rollout.role import Rollout
    from aligner.trainer.critic import Critic
    from aligner.trainer.policy import Policy, Reference
    from aligner.trainer.reward_model import RewardModel
    from aligner.trainer.trainable_role import TrainableRole

    # Only what was sampled is judged under the sampling temperature: in other data nothing says what it would be.
    temperature = config.sampling.temperature if "rollout" in wanted and config.data.kind == "prompts" else 1.0
    built: dict[str, Role] = {}
    world.residency.config = config.residency

    def model(kind: type[M], name: str, settings: TrainingConfig, spec: ModelSpec, **more: Any) -> M:
        parallel = role_layout(config.placement, name).sequence_parallel
        if issubclass(kind, TrainableRole):
            more["total_steps"] = config.train.steps * settings.minibatches * settings.epochs
            more["max_response"] = config.sampling.max_tokens
            more["not_finite"] = config.guards.not_finite
            more["skip_empty"] = config.guards.empty_batch.action == "skip"
            more["offending"] = Path(config.run_dir) / "offending"
        return kind(name, world, meshes[name], spec, settings, sequence_parallel=parallel, **more)

    def scalar(name: str) -> ModelSpec:
        return with_scalar_head(read_spec(config.model_path(name)[1]))

    if "policy" in wanted:
        built["policy"] = model(
            Policy, "policy", config.policy, spec, temperature=temperature, syncs=WeightSyncs(config.reshard)
        )
    if "reference" in wanted:
        built["reference"] = model(
            Reference, "reference", config.reference.over(config.policy), spec, temperature=temperature
        )
    if "critic" in wanted:
        built["critic"] = model(Critic, "critic", config.critic, scalar("critic"))
    if "reward_model" in wanted:
        built["reward_model"] = model(RewardModel, "reward_model", config.reward_model, scalar("reward_model"))
    if "rollout" in wanted:
        built["rollout"] = Rollout(
            "rollout", world, meshes["rollout"], spec, config.rollout, config.sampling, config.seed, config.stream
        )
    if "reward" in wanted:
        scorer = cast("RewardModel | None", built.get("reward_model"))
        built["reward"] = Reward("reward", world, meshes["reward"], config.reward, tokenizer, scorer)
    return Roles(built)
