"""Which part is where after which role calls, worked by hand; what running out of memory says; what a call took."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aligner.bounds import check_settings
from aligner.spmd import memory
from aligner.spmd.memory import GIB, Meter, OutOfMemory
from aligner.spmd.mesh import Mesh
from aligner.spmd.residency import Kind, Residency
from aligner.spmd.residency_config import ResidencyConfig
from aligner.spmd.role_table import USUAL

CPU = torch.device("cpu")
MODEL = {"weights": Kind(copied=True), "gradients": Kind(), "optimizer": Kind(copied=True)}
ENGINE = {"weights": Kind(lost=True), "cache": Kind()}
NEEDS = {
    "policy": {"logprobs": ("weights",), "update": tuple(MODEL), "reshard_to": ("weights",)},
    "reference": {"logprobs": ("weights",)},
    "rollout": {"generate": tuple(ENGINE), "reshard_to": ("weights",)},
    "reward": {},
}


class Memory:
    """A part that writes down what happens to it."""

    def __init__(self, name: str, log: list[str], size: int = 1) -> None:
        self.resident, self.name, self.log, self.size = True, name, log, size

    def bytes(self) -> int:
        return self.size

    def changed(self) -> None:
        self.log.append(f"changed {self.name}")

    def evict(self) -> None:
        assert self.resident
        self.resident = False
        self.log.append(f"out {self.name}")

    def bring(self) -> None:
        assert not self.resident
        self.resident = True
        self.log.append(f"in {self.name}")


class Scene:
    """A policy with a reference on rank 0 and an engine; this rank is rank 0, or another."""

    def __init__(self, config: ResidencyConfig, rollout: tuple[int, ...] = (0,), rank: int = 0) -> None:
        self.log: list[str] = []
        self.lost: list[str] = []
        self.residency = Residency(CPU)
        self.residency.config = config
        self.parts: dict[str, Memory] = {}
        for role, kinds, ranks in (
            ("policy", MODEL, (0,)),
            ("reference", {"weights": MODEL["weights"]}, (0,)),
            ("rollout", ENGINE, rollout),
        ):
            made = {kind: Memory(f"{role}.{kind}", self.log) for kind in kinds} if rank in ranks else {}
            self.parts |= {part.name: part for part in made.values()}
            lost = (lambda: self.lost.append("rollout.weights")) if role == "rollout" else None
            self.residency.register(role, Mesh(ranks, name=role), kinds, made, on_lost=lost)
        self.ranks = {"policy": (0,), "reference": (0,), "rollout": rollout, "reward": (0,)}

    def roles(self, names: str) -> list[Any]:
        return [
            SimpleNamespace(name=n, mesh=Mesh(self.ranks[n], name=n), member=True, needs=NEEDS[n], reads={"logprobs"})
            for n in names.split("+")
        ]

    def call(self, names: str, method: str) -> list[str]:
        """What a role call moved."""
        self.log.clear()
        with self.residency.call(self.roles(names), method):
            moved = [line for line in self.log if not line.startswith("changed")]
        return moved

    def here(self) -> set[str]:
        return {name for name, part in self.parts.items() if part.resident}


def test_a_step_of_grpo_under_offload() -> None:
    scene = Scene(ResidencyConfig("offload", prefetch=False))
    moved = scene.call("policy+rollout", "reshard_to")
    assert set(moved) == {"out policy.gradients", "out policy.optimizer", "out reference.weights", "out rollout.cache"}
    assert scene.call("rollout", "generate") == ["out policy.weights", "in rollout.cache"]
    assert scene.call("reward", "score") == [], "it needs no device memory"
    # weights that a transfer wrote leave after what depends on them
    assert scene.call("reference", "logprobs") == ["out rollout.cache", "out rollout.weights", "in reference.weights"]
    assert scene.residency.is_out("rollout", "weights")
    assert scene.call("policy", "update") == [
        "out reference.weights", "in policy.weights", "in policy.gradients", "in policy.optimizer",
    ]  # fmt: skip
    assert scene.here() == {"policy.weights", "policy.gradients", "policy.optimizer"}
    assert scene.call("policy+rollout", "reshard_to") == [
        "out policy.optimizer", "out policy.gradients", "in rollout.weights",
    ]  # fmt: skip
    assert not scene.residency.is_out("rollout", "weights")


def test_a_call_that_no_table_names_needs_all_that_its_role_holds() -> None:
    scene = Scene(ResidencyConfig("offload", prefetch=False))
    scene.call("rollout", "generate")
    assert set(scene.call("policy", "of_my_own")) == {
        "out rollout.cache", "out rollout.weights", *(f"in policy.{part}" for part in MODEL),
    }  # fmt: skip
    assert "changed policy.weights" in scene.log
    with scene.residency.call(scene.roles("rollout"), "map(shaped)", on_host=True):
        assert scene.here() == {f"policy.{part}" for part in MODEL}, "functions of host values move nothing"


def test_on_a_cpu_auto_frees_only_what_can_be_remade() -> None:
    scene = Scene(ResidencyConfig("auto"))
    assert scene.call("rollout", "generate") == ["out policy.gradients"]
    assert scene.call("reference", "logprobs") == ["out rollout.cache", "out rollout.weights"]
    assert scene.call("policy", "update") == ["in policy.gradients"]
    assert {"policy.weights", "policy.optimizer", "reference.weights"} <= scene.here()


def test_off_moves_nothing() -> None:
    scene = Scene(ResidencyConfig("off"))
    for names, method in (("policy+rollout", "reshard_to"), ("rollout", "generate"), ("policy", "update")):
        assert scene.call(names, method) == []


def test_what_is_kept_stays() -> None:
    scene = Scene(ResidencyConfig("offload", keep=("reference", "rollout.weights"), prefetch=False))
    assert scene.call("policy", "update") == ["out rollout.cache"]
    assert set(scene.call("rollout", "generate")) == {
        "out policy.optimizer", "out policy.gradients", "out policy.weights", "in rollout.cache",
    }  # fmt: skip
    assert not scene.residency.is_out("rollout", "weights")


def test_roles_on_ranks_of_their_own_stay_and_every_rank_knows_what_is_out() -> None:
    scene = Scene(ResidencyConfig("offload", prefetch=False), rollout=(1,))
    assert scene.call("rollout", "generate") == []
    assert scene.call("policy+rollout", "reshard_to") == [
        "out policy.optimizer", "out policy.gradients", "out reference.weights",
    ], "the engine shares its rank with nobody"  # fmt: skip
    # an engine on ranks 0 and 1, seen from rank 2, which holds nothing
    scenes = [Scene(ResidencyConfig("offload", prefetch=False), (0, 1), rank) for rank in (0, 1, 2)]
    for seen in scenes:
        seen.call("policy", "update")
    assert [seen.residency.is_out("rollout", "weights") for seen in scenes] == [True] * 3
    assert [seen.lost for seen in scenes] == [["rollout.weights"]] * 3, "told once, member or not"
    assert scenes[1].here() == set(), "out on all ranks of its role"
    for seen in scenes:
        seen.call("policy+rollout", "reshard_to")
    assert [seen.residency.is_out("rollout", "weights") for seen in scenes] == [False] * 3


def test_a_call_inside_a_call_takes_nothing_from_it() -> None:
    scene = Scene(ResidencyConfig("offload", prefetch=False))
    with scene.residency.call(scene.roles("policy"), "update"):
        scene.call("reference", "logprobs")
        assert {"policy.weights", "policy.gradients", "policy.optimizer", "reference.weights"} == scene.here()
    scene.call("reference", "logprobs")
    assert scene.here() == {"reference.weights"}


def test_only_calls_that_change_something_spoil_copies() -> None:
    scene = Scene(ResidencyConfig("offload", prefetch=False))
    scene.call("policy", "logprobs")
    assert "changed policy.weights" not in scene.log
    scene.call("policy", "update")
    assert {"changed policy.weights", "changed policy.optimizer"} <= set(scene.log)


def test_the_hook_comes_once_before_anything_of_its_role_leaves() -> None:
    scene = Scene(ResidencyConfig("offload", prefetch=False))
    scene.residency.before_evict("rollout", lambda: scene.log.append("hook"))
    moved = scene.call("policy", "update")
    assert [line for line in moved if "rollout" in line or line == "hook"] == [
        "hook", "out rollout.cache", "out rollout.weights",
    ]  # fmt: skip
    assert "hook" not in scene.call("reference", "logprobs"), "nothing of it is there any more"


STEP = (("rollout", "generate"), ("reference", "logprobs"), ("policy", "update"), ("policy+rollout", "reshard_to"))


def test_the_next_call_is_prepared_as_the_step_before_went() -> None:
    scene = Scene(ResidencyConfig("offload"))
    for _ in range(2):
        for names, method in STEP:
            scene.call(names, method)
    assert scene.call("rollout", "generate") == [], "it was brought when reshard_to ended"
    # then it frees all but the engine's weights, which only a role call could write again
    assert scene.here() == {"rollout.weights", "reference.weights"}
    assert scene.call("reference", "logprobs") == ["out rollout.weights"]


def test_a_wrong_guess_changes_nothing_but_the_time() -> None:
    order = [*STEP, *STEP, STEP[0], STEP[2], STEP[3], STEP[0], STEP[0], STEP[1], STEP[2], STEP[3]]
    ahead, plain = Scene(ResidencyConfig("offload")), Scene(ResidencyConfig("offload", prefetch=False))
    most = 0
    for names, method in order:
        for scene in (ahead, plain):
            scene.log.clear()
            with scene.residency.call(scene.roles(names), method):
                here = scene.here()
                assert {f"{n}.{part}" for n in names.split("+") for part in NEEDS[n].get(method, ())} <= here
            most = max(most, len(plain.here()))
        assert ahead.residency.is_out("rollout", "weights") == plain.residency.is_out("rollout", "weights")
        assert len(ahead.here()) <= max(most, 4), "more was held than any call has held"


def test_a_role_that_is_built_finds_room() -> None:
    scene = Scene(ResidencyConfig("offload"))
    scene.residency.make_room("critic", Mesh((0,), name="critic"))
    assert scene.here() == set()
    alone = Scene(ResidencyConfig("auto"))
    for role in ("reference", "rollout"):
        del alone.residency._roles[role]
    assert alone.call("policy", "logprobs") == []
    alone.residency.make_room("rollout", Mesh((0,), name="rollout"))
    assert alone.log[-1:] == ["out policy.gradients"]
    apart = Scene(ResidencyConfig("offload"), rollout=(1,))
    apart.residency.make_room("critic", Mesh((1,), name="critic"))
    assert apart.here() == {"policy.weights", "policy.gradients", "policy.optimizer", "reference.weights"}


def test_running_out_of_memory_says_who_holds_what() -> None:
    scene = Scene(ResidencyConfig("offload", prefetch=False))
    for part in scene.parts.values():
        part.size = 0
    scene.parts["policy.optimizer"].size = 3 * GIB
    with pytest.raises(OutOfMemory) as caught, scene.residency.call(scene.roles("policy"), "logprobs"):
        torch.empty(1 << 60)  # more than any machine has
    text = str(caught.value)
    assert text.startswith("out of memory in policy.logprobs on cpu: ")
    assert "moved out: policy.optimizer 3.00 GiB" in text
    for setting in ("residency.mode", "policy.micro_tokens", "rollout.kv_cache_mib", "placement.policy.tensor"):
        assert setting in text
    assert isinstance(caught.value.__cause__, RuntimeError)
    with (
        pytest.raises(OutOfMemory, match=r"held here: policy.optimizer 3\.00 GiB"),
        scene.residency.call(scene.roles("policy"), "update"),
    ):
        bytearray(1 << 60)  # Python's own
    with pytest.raises(ValueError, match="as it was"), scene.residency.call(scene.roles("policy"), "update"):
        raise ValueError("as it was")


@pytest.mark.parametrize("resettable", [True, False])
def test_the_largest_size_of_each_call(resettable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("/proc/self/clear_refs").write_text("5")
    if not resettable:
        write = Path.write_text
        refuse = lambda self, text: refused() if self.name == "clear_refs" else write(self, text)  # noqa: E731
        monkeypatch.setattr(Path, "write_text", refuse)
    meter: Any = Meter(CPU)
    meter.take()
    with meter.measured("around", member=True):
        with meter.measured("high", member=True):
            raised = torch.ones(1 << 26)  # 256 MiB, gone at the call's end
            del raised
        with meter.measured("low", member=True):
            pass
        with meter.measured("elsewhere", member=False):
            pass
    found = meter.take()
    assert found["high"] - found["low"] == pytest.approx(0.25, abs=0.02)
    assert found["around"] == found["peak"] == found["high"]
    assert "elsewhere" not in found
    assert meter.take()["peak"] == pytest.approx(found["low"], abs=0.02), "what was taken is forgotten"


def refused() -> None:
    raise PermissionError


def test_trimming_gives_pages_back() -> None:
    small = [torch.ones(16 << 10) for _ in range(1 << 11)]  # 64 KiB each: below the allocator's threshold
    last = torch.ones(16 << 10)  # keeps the top of the heap where it is
    before = memory.resident()[1]
    small.clear()
    memory.trim()
    assert before - memory.resident()[1] > 100 << 20
    assert last.sum() == 16 << 10


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (ResidencyConfig("always"), "residency.mode=always is unknown; use off, auto, offload."),
        (ResidencyConfig(keep=("engine",)), "use policy, policy.weights, policy.gradients, policy.optimizer, rollout,"),
        (ResidencyConfig(keep=("rollout.gradients",)), "rollout.weights, rollout.cache."),
        (ResidencyConfig(keep=("critic",)), "residency.keep has 'critic', which this job does not hold"),
        (ResidencyConfig("off", keep=("policy",)), "with residency.mode=off everything does"),
    ],
)
def test_what_cannot_work_is_refused(config: ResidencyConfig, said: str) -> None:
    def check() -> None:
        check_settings(config, "residency")
        config.check_roles([USUAL[name] for name in ("policy", "rollout", "reward")])

    with pytest.raises(ValueError, match=re.escape(said)):
        check()
    ResidencyConfig("offload", keep=("rollout.cache", "policy")).check_roles([USUAL["policy"], USUAL["rollout"]])
