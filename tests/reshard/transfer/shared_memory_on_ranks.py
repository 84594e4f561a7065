"""What ranks do in the tests of shared memory: messages in order, rooms that grow, a host that is another's, nobody who sends."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

from aligner.health.fault_report import is_lost_connection
from aligner.reshard.transfer import shared_memory
from aligner.reshard.transfer.shared_memory import ROOMS, SharedMemoryChannel, connect
from aligner.spmd.world import World


def connected() -> SharedMemoryChannel:
    channel = connect(dist.group.WORLD)
    assert channel, "these ranks are on one host"
    return channel


def room(lines: SharedMemoryChannel, words: int) -> Tensor:
    while (found := lines.room(words)) is None:
        lines.wait_for_room()
    return found


def around(world: World) -> list[list[int]]:
    """60 messages of 1 to 5,000 words to the next rank, from the one before: [sum, words] of each, read late."""
    lines, found = connected(), []
    to, by = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    held: list[Tensor] = []
    for number in range(60):
        message = room(lines, 1 + (number * 997) % 5000)
        message[:] = number + 1
        lines.hand(to, message)
        held.append(lines.take(by))
        if len(held) == ROOMS:  # the sender has no room left now
            oldest = held.pop(0)
            found.append([int(oldest.sum()), oldest.numel()])
            assert lines.back(oldest)
            assert not lines.back(oldest), "it is given back once"
    for left in held:
        lines.back(left)
    assert len(lines._rooms) == ROOMS
    return found


def alone(world: World) -> bool:
    """A group of one rank has no lines."""
    group = world.group((0,))
    return group is None or connect(group) is None


def elsewhere(world: World, folder: Path) -> bool:
    """The last rank is on another host, to all appearances."""
    (folder / f"boot{world.rank}").write_text("another" if world.rank == world.size - 1 else "the same")
    with patch.object(shared_memory, "_BOOT", folder / f"boot{world.rank}"):
        return connect(dist.group.WORLD) is None


def without(world: World, lines: int) -> tuple[bool, list[str]]:
    """The last rank can have only so many sockets; gives whether there are no lines here, and what was logged."""
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    shared_memory.log.addHandler(handler)
    made, line = count(1), shared_memory._line

    def limited() -> Any:
        if world.rank == world.size - 1 and next(made) > lines:
            raise OSError("no more sockets in this container")
        return line()

    with patch.object(shared_memory, "_line", limited):
        none = connect(dist.group.WORLD) is None
    shared_memory.log.removeHandler(handler)
    return none, logged


def silent(world: World) -> str:
    """Nobody sends anything to rank 0."""
    lines = connected()
    lines._timeout = 0.2
    why = failure(lambda: lines.take(1)) if world.rank == 0 else ""
    dist.barrier()  # a line ends with whoever has it
    return why


def strangers(world: World) -> list[int]:
    """Whose line is taken: rank 1's comes first, but from another user."""
    users, lines = iter([12345, os.getuid()]), dict[int, Any]()
    with patch.object(os, "getuid", lambda: next(users)):
        listener = shared_memory._listener()
        for number in (1, 2):
            line = shared_memory._line()
            line.connect(listener.getsockname())
            line.send(number.to_bytes(4, "little"))
        shared_memory._answer(listener, lines, [0, 1, 2][::2])
    return list(lines)


def failure(run: Callable[[], Any]) -> str:
    """The error, and whether it counts as a lost connection."""
    try:
        run()
    except RuntimeError as error:
        return f"{is_lost_connection(error)}: {error}"
    return ""
