"""What ranks do in test_weight_sync.py: two policies and two rollouts on two ranks, one cut over both, one engine on each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist

from aligner.data.prompts import Prompt
from aligner.models.read_spec import read_spec
from aligner.reshard.plan.region import whole_tensor
from aligner.reshard.sync import WeightSync
from aligner.roles.weight_sync import WeightSyncs
from aligner.rollout.config import Sampling
from aligner.rollout.role import Rollout
from aligner.rollout.vllm.weights import EngineWeights
from aligner.spmd.mesh import Mesh
from aligner.spmd.world import World
from aligner.trainer.config import PolicyConfig
from aligner.trainer.policy import Policy
from tests.rollout import tiny

GREEDY = Sampling(temperature=0.0, max_tokens=12, stop_token_ids=())
PROMPTS = [Prompt(tuple(tokens), "", {}, index) for index, tokens in enumerate(tiny.prompts(3))]


def check(world: World, folder: Path) -> None:
    """`folder`: where the model is saved."""
    Scene(world, folder).check()


class Scene:
    """`one` on rank 0, `two` cut over both ranks; engine `near` on rank 0, `far` on rank 1."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world = world
        self.models = {name: tiny.make_model("qwen2", seed) for name, seed in (("one", 1), ("two", 2))}
        if world.rank == 0:
            tiny.save(self.models["one"], folder)
        dist.barrier()
        spec = read_spec(folder)
        self.policies = {}
        for name, mesh in (("one", Mesh((0,), name="one")), ("two", Mesh((0, 1), tensor=2, name="two"))):
            config = PolicyConfig(dtype="float32")
            self.policies[name] = policy = Policy(name, world, mesh, spec, config, total_steps=1, syncs=WeightSyncs())
            tensors = tiny.tensors(self.models[name])
            for piece in policy.weights.pieces():
                policy.weights.view(piece).copy_(tiny.cut(tensors, piece))
        config = replace(tiny.CONFIG, dtype="float32")
        self.rollouts = {
            name: Rollout(name, world, Mesh((rank,), name=name), spec, config, GREEDY, seed=0)
            for name, rank in (("near", 0), ("far", 1))
        }

    def answers(self, rollout: str, model: str) -> bool:
        """The engines of `rollout` answer as transformers does with the weights of `model`; the same on every rank."""
        samples = self.rollouts[rollout].generate(PROMPTS).gather()
        tokens = [samples.response_tokens(row) for row in range(samples.rows)]
        return tokens == [tiny.greedy(self.models[model], list(prompt.tokens), 12) for prompt in PROMPTS]

    def check(self) -> None:
        one, two, near, far = (*self.policies.values(), *self.rollouts.values())
        # Each to an engine of its own.
        one.reshard_to(far)
        two.reshard_to(near)
        assert self.answers("far", "one") and self.answers("near", "two")
        assert far.loaded.current(one) and near.loaded.current(two)
        # In turn to one engine: `sync` knows that what it sent has been overwritten.
        two.sync(far)
        assert self.answers("far", "two") and not far.loaded.current(one)
        one.sync(far)
        assert self.answers("far", "one")
        counts = self.runs()
        one.sync(far)
        two.sync(near)
        assert self.runs() == counts, "the engines have these weights"
        one.version += 1  # as an update would
        one.sync(far)
        assert self.runs()["one", "far"] == counts["one", "far"] + 1 and far.loaded.version == 1
        self.check_failure(one, far)
        self.check_other_model(one, far)

    def runs(self) -> dict[tuple[str, str], int]:
        pairs = [(p.name, name, sync) for p in self.policies.values() for name, sync in p.syncs.by_rollout.items()]  # type: ignore[union-attr]
        return {(policy, rollout): sync._runs for policy, rollout, sync in pairs}

    def check_failure(self, policy: Policy, rollout: Rollout) -> None:
        """A sync that fails is seen by `sync` and by `generate`, and made good by the next one."""
        with patch.object(EngineWeights, "written", side_effect=RuntimeError("a disk ate it")):
            try:
                policy.reshard_to(rollout)
                failed = False
            except RuntimeError as error:
                failed = str(error) == "a disk ate it"
        everywhere = [False, False]
        dist.all_gather_object(everywhere, failed)
        assert everywhere == [False, True], everywhere
        if rollout.member:
            assert not rollout.loaded.complete
            with pytest.raises(RuntimeError, match="the last sync did not finish"):
                rollout.engine.generate([[5]], [0], GREEDY)
            rollout.weights.discard()
        else:  # in a job this rank would end with its peer
            rollout.loaded.begin()
        policy.sync(rollout)
        assert self.answers(rollout.name, policy.name)

    def check_other_model(self, policy: Policy, rollout: Rollout) -> None:
        """A tensor that only one end has is named, on every rank of both."""

        class Extra:
            """The policy's weights and one tensor more."""

            layout = policy.weights.layout

            def pieces(self) -> list[object]:
                more = [whole_tensor("model.extra.weight", (4,), "float32")] if policy.member else []
                return [*policy.weights.pieces(), *more]

            view = staticmethod(policy.weights.view)

        assert policy.syncs is not None
        with pytest.raises(ValueError, match=r"model\.extra\.weight, held by the source, is wanted by no destination"):
            WeightSync(self.world, Extra(), rollout.weights, policy.syncs.config)  # type: ignore[arg-type]
