"""What ranks do in the tests of shared memory: messages in order, slots that grow, a host that is another's, nobody who sends."""

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
from aligner.spmd import shared_memory
from aligner.spmd.shared_memory import SLOTS, SharedMemoryChannel, connect
from aligner.spmd.world import World


def connected() -> SharedMemoryChannel:
    channel = connect(dist.group.WORLD, "reshard")
    assert channel, "these ranks are on one host"
    return channel


def free_slot(channel: SharedMemoryChannel, words: int) -> Tensor:
    while (slot := channel.slot(words)) is None:
        channel.wait_for_slot()
    return slot


def around(world: World) -> list[list[int]]:
    """60 messages of 1 to 5,000 words to the next rank, from the one before: [sum, words] of each, read late."""
    channel, sums = connected(), []
    to, by = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    held: list[Tensor] = []
    for number in range(60):
        message = free_slot(channel, 1 + (number * 997) % 5000)
        message[:] = number + 1
        channel.send(to, message)
        held.append(channel.receive(by))
        if len(held) == SLOTS:  # the sender has no slot left now
            oldest = held.pop(0)
            sums.append([int(oldest.sum()), oldest.numel()])
            assert channel.release(oldest)
            assert not channel.release(oldest), "it is released once"
    for left in held:
        channel.release(left)
    assert len(channel._slots) == SLOTS
    return sums


def alone(world: World) -> bool:
    """A group of one rank has no channel."""
    group = world.group((0,))
    return group is None or connect(group, "reshard") is None


def elsewhere(world: World, folder: Path) -> bool:
    """The last rank is on another host, to all appearances."""
    (folder / f"boot{world.rank}").write_text("another" if world.rank == world.size - 1 else "the same")
    with patch.object(shared_memory, "_BOOT", folder / f"boot{world.rank}"):
        return connect(dist.group.WORLD, "reshard") is None


def without(world: World, sockets: int) -> tuple[bool, list[str]]:
    """The last rank can have only so many sockets; gives whether there is no channel here, and what was logged."""
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    shared_memory.log.addHandler(handler)
    made, make_socket = count(1), shared_memory._socket

    def limited() -> Any:
        if world.rank == world.size - 1 and next(made) > sockets:
            raise OSError("no more sockets in this container")
        return make_socket()

    with patch.object(shared_memory, "_socket", limited):
        none = connect(dist.group.WORLD, "reshard") is None
    shared_memory.log.removeHandler(handler)
    return none, logged


def silent(world: World) -> str:
    """Nobody sends anything to rank 0."""
    channel = connected()
    channel._timeout = 0.2
    why = failure(lambda: channel.receive(1)) if world.rank == 0 else ""
    dist.barrier()  # a connection ends with its ranks
    return why


def strangers(world: World) -> list[int]:
    """Whose connection is accepted: rank 1's comes first, but from another user."""
    users, sockets = iter([12345, os.getuid()]), dict[int, Any]()
    with patch.object(os, "getuid", lambda: next(users)):
        listener = shared_memory._listener()
        for number in (1, 2):
            connection = shared_memory._socket()
            connection.connect(listener.getsockname())
            connection.send(number.to_bytes(4, "little"))
        shared_memory._accept(listener, sockets, [0, 1, 2][::2])
    return list(sockets)


def failure(run: Callable[[], Any]) -> str:
    """The error, and whether it counts as a lost connection."""
    try:
        run()
    except RuntimeError as error:
        return f"{is_lost_connection(error)}: {error}"
    return ""
