"""One rank of the tests of shared memory: messages in order, rooms that grow, a host that is another's, a peer that ends."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

from aligner.health.fault_report import is_lost_connection
from aligner.reshard.transfer import shared_memory as neighbours
from aligner.reshard.transfer.shared_memory import ROOMS, SharedMemoryChannel, connect
from tests.reshard.ranks import report, start_rank

WORLD = 3


def met() -> SharedMemoryChannel:
    found = connect(dist.group.WORLD)
    assert found, "these ranks are on one host"
    return found


def room(lines: SharedMemoryChannel, words: int) -> Tensor:
    while (found := lines.room(words)) is None:
        lines.wait_for_room()
    return found


def around(rank: int) -> list[list[int]]:
    """60 messages of 1 to 5,000 words to the next rank, from the one before: [sum, words] of each, read late."""
    lines, found = met(), []
    to, by = (rank + 1) % WORLD, (rank - 1) % WORLD
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


def elsewhere(rank: int, folder: Path) -> bool:
    """The last rank is on another host, to all appearances."""
    (folder / f"boot{rank}").write_text("another" if rank == WORLD - 1 else "the same")
    with patch.object(neighbours, "_BOOT", folder / f"boot{rank}"):
        return connect(dist.group.WORLD) is None


def without(rank: int, lines: int) -> list[Any]:
    """The last rank can have only so many sockets; gives whether there are no lines here, and what was logged."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    neighbours.log.addHandler(handler)
    made, line = count(1), neighbours._line

    def limited() -> Any:
        if rank == WORLD - 1 and next(made) > lines:
            raise OSError("no more sockets in this container")
        return line()

    with patch.object(neighbours, "_line", limited):
        none = connect(dist.group.WORLD) is None
    neighbours.log.removeHandler(handler)
    return [none, said]


def silent(rank: int) -> str:
    """Nobody sends anything to rank 0."""
    lines = met()
    lines._timeout = 0.2
    said = failure(lambda: lines.take(1)) if rank == 0 else ""
    dist.barrier()  # a line ends with whoever has it
    return said


def strangers() -> list[int]:
    """Whose line is taken: rank 1's comes first, but from another user."""
    users, lines = iter([12345, os.getuid()]), dict[int, Any]()
    with patch.object(os, "getuid", lambda: next(users)):
        listener = neighbours._listener()
        for number in (1, 2):
            line = neighbours._line()
            line.connect(listener.getsockname())
            line.send(number.to_bytes(4, "little"))
        neighbours._answer(listener, lines, [0, 1, 2][::2])
    return list(lines)


def failure(run: Callable[[], Any]) -> str:
    """The error, and whether it counts as a lost connection."""
    try:
        run()
    except RuntimeError as error:
        return f"{is_lost_connection(error)}: {error}"
    return ""


def ended(rank: int) -> list[str]:
    """Rank 2 ends; rank 0 waits for a message of it, waits for room, and hands it something."""
    lines = met()
    message = room(lines, 10)
    if rank == 0:
        for _ in range(ROOMS - 1):
            lines.hand(2, room(lines, 10))
    dist.barrier()
    if rank == 2:
        return []
    time.sleep(1.0)
    waits = [lambda: lines.take(2), lines.wait_for_room, lambda: lines.hand(2, message)]
    return [failure(wait) for wait in waits] if rank == 0 else []


def main() -> None:
    folder = Path(sys.argv[1])
    rank, _ = start_rank(folder)
    if "ended" in sys.argv:
        (folder / f"{rank}.json").write_text(json.dumps(ended(rank)))
        os._exit(0)  # nobody waits for those that are gone
    alone = dist.new_group([0])
    report(
        folder,
        {
            "around": around(rank),
            "alone": rank > 0 or connect(alone) is None,
            "elsewhere": elsewhere(rank, folder),
            "no listener": without(rank, 0),
            "no connection": without(rank, 1),
            "silent": silent(rank),
            "strangers": strangers(),
        },
    )


if __name__ == "__main__":
    main()
