"""Which part is where after which role calls, worked by hand; what running out of memory says; what a call took."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aligner.bounds import check_settings
from aligner.spmd import memory
from aligner.spmd.memory import GIB, Meter, OutOfMemory
from aligner.spmd.memory_account import MemoryAccount, MemoryFigures
from aligner.spmd.mesh import Mesh
from aligner.spmd.residency import Kind, Residency
from aligner.spmd.residency_config import ResidencyConfig
from aligner.spmd.role_table import USUAL
from tests import fork_server

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

    def learn(self, budget: float, **beyond: float) -> None:
        """Give it a budget, with what calls take beyond the parts: update of the policy, generate of the rollout, ..."""
        names = {"generate": "rollout", "logprobs": "reference", "update": "policy", "reshard_to": "policy"}
        parts = {(role, kind): float(self.parts[name].size) for name in self.parts for role, kind in [name.split(".")]}
        self.residency.account = MemoryAccount(budget)
        calls = {f"{names[method]}.{method}": value for method, value in beyond.items()}
        self.residency.account.learn(MemoryFigures(parts, calls))

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


MEASURED = {"reshard_to": 1.0, "generate": 1.0, "logprobs": 2.0, "update": 4.0}


def steps(scene: Scene, count: int = 3) -> list[list[str]]:
    """What each call of the last step moved."""
    for _ in range(count):
        moved = [scene.call(names, method) for names, method in STEP]
    return moved


def test_where_all_fits_nothing_moves() -> None:
    """Six parts of 1 byte, and an update that takes 4 beside them."""
    scene = Scene(ResidencyConfig("auto"))
    scene.learn(10.0, **MEASURED)
    assert steps(scene, 1) == [[], [], [], []]
    assert steps(scene) == [[], [], [], []]
    assert len(scene.here()) == 6 and scene.lost == []


def test_just_short_of_room_one_part_leaves_for_the_call_that_lacks_it() -> None:
    """Of the KV cache and the engine's weights the cache goes: the sync, which comes first, writes the weights."""
    scene = Scene(ResidencyConfig("auto"))
    scene.learn(9.5, **MEASURED)
    assert steps(scene) == [["in rollout.cache"], [], ["out rollout.cache"], []]
    assert scene.lost == []


def test_without_room_all_leaves_that_can_be_remade() -> None:
    scene = Scene(ResidencyConfig("auto"))
    scene.learn(0.0, **MEASURED)
    plain = Scene(ResidencyConfig("auto"))
    assert steps(scene) == steps(plain), "as without an account"
    assert steps(scene)[2] == ["in policy.gradients"]


def test_where_models_can_leave_the_one_that_is_needed_last_does() -> None:
    """On CUDA copies on the host make room. The update is followed by the sync, by generate, and then by the reference."""
    scene = Scene(ResidencyConfig("auto", prefetch=False))
    scene.residency.device = torch.device("cuda")  # of which only the rules are asked
    scene.learn(9.0, **MEASURED)
    assert steps(scene) == [[], ["in reference.weights"], ["out reference.weights"], []]
    scene.learn(8.0, **MEASURED)
    moved = steps(scene)
    assert moved[2] == ["out reference.weights", "out rollout.cache"]
    scene.learn(8.0, **{**MEASURED, "generate": 5.0})
    moved = steps(scene)
    assert moved[0] == ["out policy.optimizer", "out policy.gradients", "in rollout.cache"], "the update's"
    assert moved[1] == ["in reference.weights"]


def test_what_was_not_measured_has_all_the_room() -> None:
    scene = Scene(ResidencyConfig("auto"))
    scene.learn(1000.0, **{name: value for name, value in MEASURED.items() if name != "update"})
    assert steps(scene)[2] == ["out rollout.cache", "out rollout.weights"]
    scene.learn(1000.0, **MEASURED)
    steps(scene, 1)  # brings back what was out
    assert steps(scene) == [[], [], [], []]


def test_what_is_kept_stays_where_there_is_no_room() -> None:
    scene = Scene(ResidencyConfig("auto", keep=("rollout",)))
    scene.learn(0.0, **MEASURED)
    assert steps(scene) == [[], [], ["in policy.gradients"], ["out policy.gradients"]]


def test_ranks_of_different_sizes_and_places_know_the_same_to_be_out() -> None:
    """An engine on ranks 0 and 1; rank 0 holds the models too, rank 2 nothing. Rank 1's cache is larger than rank 0's."""
    scenes = [Scene(ResidencyConfig("auto"), (0, 1), rank) for rank in (0, 1, 2)]
    scenes[1].parts["rollout.cache"].size = 3
    figures = MemoryFigures(beyond={f"{names.partition('+')[0]}.{m}": MEASURED[m] for names, m in STEP})
    for scene in scenes:
        scene.residency.account = MemoryAccount(100.0)
        figures = figures.merged(scene.residency.take_figures())
    assert figures.parts[("rollout", "cache")] == 3
    for budget in (12.0, 11.0, 8.0, 0.0):
        for scene in scenes:
            scene.residency.account = MemoryAccount(budget)
            scene.residency.account.learn(figures)
        out = []
        for scene in scenes:
            steps(scene, 2)
            for names, method in STEP[:3]:
                scene.call(names, method)
            out.append([scene.residency.is_out(*name.split(".")) for name in sorted(scenes[0].parts)])
            assert scene.parts == {} or {f"rollout.{p}" for p in ENGINE if scene.residency.is_out("rollout", p)} == {
                name for name in scene.parts if name not in scene.here() and "rollout" in name
            }
        assert out[0] == out[1] == out[2]
        assert any(out[0]) is (budget < 12.0)


@pytest.mark.parametrize(("budget", "keeps"), [(12.0, True), (11.0, False)])
def test_freed_memory_is_kept_after_a_step_with_room_until_a_call_falls_short(
    budget: float, keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts and the largest call take 10: with a tenth to spare of 12, of 11 not."""
    kept: list[bool] = []
    trimmed: list[None] = []
    monkeypatch.setattr("aligner.spmd.residency.keep_freed", kept.append)
    monkeypatch.setattr("aligner.spmd.residency.trim", lambda: trimmed.append(None))
    scene = Scene(ResidencyConfig("auto"))
    scene.learn(budget)  # parts only: no call has been measured
    figures = MemoryFigures(beyond={f"{names.partition('+')[0]}.{m}": MEASURED[m] for names, m in STEP})

    def step(figures: MemoryFigures = figures) -> list[list[str]]:
        moved = steps(scene, 1)
        scene.residency.learn(figures)
        return moved

    step()
    step()  # brings back what left in the first
    assert kept == [True] * keeps and len(trimmed) == 8, "before each call"
    assert step(figures.merged(MemoryFigures(beyond={"policy.update": 7.0}))) == [[], [], [], []]
    assert len(trimmed) == (8 if keeps else 12)
    moved = steps(scene, 1)
    if not keeps:
        assert moved[2] == ["out rollout.cache", "out rollout.weights"] and kept == []
        return
    assert kept == [True, False]
    assert moved[2] == ["out rollout.cache", "out rollout.weights"], "all, until it is measured again"
    scene.residency.learn(figures)
    step()
    step()
    assert steps(scene, 1) == [[], [], [], []], "given back, it fits"
    assert kept == [True, False], "it never starts again"


def test_a_call_is_measured_beyond_the_parts_that_are_there() -> None:
    scene = Scene(ResidencyConfig("auto"))
    scene.residency.account = MemoryAccount(0.0)
    for part in scene.parts.values():
        part.size = 10 << 20
    Path("/proc/self/clear_refs").write_text("5")
    with scene.residency.call(scene.roles("policy"), "logprobs"):
        before = memory.resident()[1]
        raised = torch.ones(1 << 26)  # 256 MiB, gone at the call's end
        del raised
    figures = scene.residency.take_figures()
    there = 10 * len(scene.here())
    assert figures.beyond["policy.logprobs"] - before == pytest.approx((256 - there) << 20, abs=20 << 20)
    assert figures.parts[("policy", "weights")] == 10 << 20
    assert scene.residency.take_figures().beyond == {}, "what was taken is forgotten"
    scene.residency.account = None
    scene.call("policy", "logprobs")
    assert scene.residency.take_figures() == MemoryFigures()


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


def test_what_is_available_is_shared_by_the_ranks_of_a_host() -> None:
    own = memory.resident()[1]
    one, four = (memory.available(CPU, ranks) for ranks in (1, 4))
    assert (one - own) / (four - own) == pytest.approx(4, rel=0.2), "other processes come and go"
    assert one <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") + own
    assert ResidencyConfig().budget(10.0, cpu=True) == 8.0
    assert ResidencyConfig().budget(10.0, cpu=False) == 9.0
    assert ResidencyConfig(budget_gib=1.5).budget(10.0, cpu=True) == 1.5 * GIB


KEEPS = """
import torch
from aligner.spmd import memory

memory.keep_freed(True)
large = torch.ones(1 << 26)  # 256 MiB
last = torch.ones(16 << 10)
before = memory.resident()[1]
del large
assert memory.resident()[1] > before - (32 << 20)
memory.keep_freed(False)
memory.trim()
assert before - memory.resident()[1] > 200 << 20
large = torch.ones(1 << 26)
before = memory.resident()[1]
del large
assert before - memory.resident()[1] > 200 << 20, "at once"
assert last.sum() == 16 << 10
"""


def test_freed_memory_is_kept_where_it_is_asked_for(tmp_path: Path) -> None:
    """In a process of its own, as a rank: glibc keeps nothing of this size in threads beside the first."""
    (tmp_path / "keeps.py").write_text(KEEPS)
    fork_server.run([sys.executable, tmp_path / "keeps.py"], check=True, timeout=100)


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
        (ResidencyConfig(budget_gib=-1.0), "residency.budget_gib=-1.0 must be at least 0 (0: everything leaves"),
        (
            ResidencyConfig("offload", budget_gib=1.0),
            "the mode is offload; use residency.mode=auto, or budget_gib=null.",
        ),
    ],
)
def test_what_cannot_work_is_refused(config: ResidencyConfig, said: str) -> None:
    def check() -> None:
        check_settings(config, "residency")
        config.check_roles([USUAL[name] for name in ("policy", "rollout", "reward")])

    with pytest.raises(ValueError, match=re.escape(said)):
        check()
    ResidencyConfig("offload", keep=("rollout.cache", "policy")).check_roles([USUAL["policy"], USUAL["rollout"]])
