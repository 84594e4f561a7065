"""Ranks that leave lockstep, or fail, end the job soon, with one report that names rank, call and step."""

from __future__ import annotations

import time

import pytest

from aligner.health.journal import (
    Journal,
    RoleCall,
    first_difference,
    histories_agree,
    history_as_bytes,
    history_from_bytes,
)

START = """
import time, torch, os
from aligner.data.samples import Samples
from aligner.spmd.mesh import Mesh
from aligner.spmd.role import Role
from aligner.spmd.transfer import read_on_rank0
from aligner.spmd.world import World
world = World(600)
everyone = tuple(range(world.size))
a, b = Role("policy", world, Mesh(everyone)), Role("reward", world, Mesh(everyone))
def samples():
    one = torch.ones(4, dtype=torch.long)
    return Samples(torch.ones(4, 3, dtype=torch.long), one, one * 3, torch.ones(4, 3, dtype=torch.bool), one, [{}] * 4)
def score(x): return x.length_B
def update(x): return x.length_B
try:
    for step in range(3):
        world.journal.step = step
        ref = a.scatter(samples())
        a.map(update, ref)
        BODY
        b.map(score, ref).gather()
except BaseException as error:
    world.fail(error)
world.leave()
"""


def _program(body: str) -> str:
    return START.replace("BODY", body)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        # rank 1 issues a call that the others do not
        ("if world.rank == 1 and step == 2: a.map(update, ref).gather()", ["call", "step 2", "rank"]),
        # rank 0 sits still inside a role call while rank 1 goes another way
        (
            "if step == 1 and world.rank == 0: b.map(lambda x: time.sleep(500) or x.length_B, ref)\n"
            "        if step == 1 and world.rank == 1: a.map(update, ref)",
            ["rank(s) 0: call 5: reward.map(<lambda>) (step 1)", "rank(s) 1: call 5: policy.map(update) (step 1)"],
        ),
        # rank 1 has made one call more when the first rank reads what is logged; nothing but that reading has a message
        (
            "if step == 1 and world.rank == 1: a.map(update, ref)\n"
            "        read_on_rank0(world, {'lengths': ref['length_B']}, 0, max)",
            ["call", "step 1"],
        ),
        # one rank ends its loop early
        ("if world.rank == 0 and step == 1: break", ["call"]),
    ],
)
def test_disagreement_is_named(torchrun, body: str, said: list[str]) -> None:  # type: ignore[no-untyped-def]
    start = time.monotonic()
    done = torchrun(2, _program(body), seconds=60)
    assert done.returncode != 0
    assert "lockstep" in done.stderr
    for text in said:
        assert text in done.stderr, done.stderr[-3000:]
    assert time.monotonic() - start < 60


def test_failure_of_one_rank_ends_all(torchrun) -> None:  # type: ignore[no-untyped-def]
    body = "if world.rank == 1 and step == 1: raise ValueError('reward.rule=x cannot be read; use y.')"
    done = torchrun(2, _program(body), seconds=60)
    assert done.returncode != 0
    assert done.stderr.count("aligner: error on rank 1: reward.rule=x cannot be read; use y.") == 1
    assert "rank 0 exits because rank 1 failed" in done.stderr


def test_clean_end(torchrun) -> None:  # type: ignore[no-untyped-def]
    done = torchrun(2, _program("pass"), seconds=60)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "terminate called" not in done.stderr


def test_first_difference_by_hand() -> None:
    assert first_difference([{1: 5, 2: 6}, {2: 6, 3: 7}]) is None
    assert first_difference([{1: 5, 2: 6, 3: 9}, {2: 6, 3: 7}, {}]) == 3


def test_digests_tell_histories_apart() -> None:
    one, two, three = (Journal(rank) for rank in range(3))
    for journal, calls in ((one, "ab"), (two, "ab"), (three, "ba")):
        for call in calls:
            journal.enter(call)
    assert one.stamp() == two.stamp() != three.stamp()


def test_published_histories_by_hand() -> None:
    """Digests of 4 bytes each; the ranks are at calls 3, 2 and 4, so call 2 is the last that all have made."""
    history = [
        RoleCall(0, 0, 0, "start"),
        RoleCall(1, 11, 0, "a"),
        RoleCall(2, 2**32 - 1, 0, "b"),
        RoleCall(3, 13, 0, "c"),
    ]
    assert history_from_bytes(history_as_bytes(history)) == {0: 0, 1: 11, 2: 2**32 - 1, 3: 13}
    ahead = [*history[1:], RoleCall(4, 14, 0, "d")]
    published = [history_as_bytes(history), history_as_bytes(history[:3]), history_as_bytes(ahead)]
    assert histories_agree(published)
    other = [history[0], RoleCall(1, 11, 0, "a"), RoleCall(2, 99, 0, "x")]
    assert not histories_agree([*published, history_as_bytes(other)])
    assert first_difference([history_from_bytes(raw) for raw in [*published, history_as_bytes(other)]]) == 2
    # a rank so far ahead that it no longer keeps the call cannot be asked about it
    assert histories_agree([history_as_bytes(history[:2]), history_as_bytes(ahead[-1:])])
