"""Ranks of one host hand messages over in memory that both see, instead of through the network stack.

Over loopback a byte is copied four times, twice by the kernel, a packet at a time; here twice: into the message and out.
"""

from __future__ import annotations

import logging
import mmap
import os
import secrets
import select
import socket
import struct
import sys
from collections import deque
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ROOMS = 2
"""Messages that a rank has handed over, or is writing, at once."""

_HANDED, _BACK = 0, 1
_NOTE = struct.Struct("=iiq")
"""What travels on a line: kind, number of the sender's room (of the reader's, when given back), words in it."""

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_MEETING_SECONDS = 60.0

log = logging.getLogger(__name__)


class SharedMemoryChannel:
    """Shared memory between this rank and others of its host: it writes its messages into rooms of its own, and readers map them.

    A line (a socket) to each peer says which room holds a message for it. A reader gives a room back when it has read it, and only then is it written again. Rooms are anonymous memory whose
    descriptor goes over the line: nothing has a name, and nothing stays when a rank is killed. Notes on a line come in
    the order in which they were sent, so the n-th message from a rank is the n-th that is taken from it.
    """

    def __init__(self, rank: int, lines: dict[int, socket.socket], timeout_seconds: float) -> None:
        """
        Args:
            lines: peer rank -> a connected SOCK_SEQPACKET socket, whose other end it has.
            timeout_seconds: limit of one wait.
        """
        self._rank, self._lines, self._timeout = rank, lines, timeout_seconds
        self._rooms: list[_Room] = []
        self._waiting: dict[int, deque[tuple[int, int]]] = {peer: deque() for peer in lines}
        """Messages that have been handed to this rank: (room, words)."""
        self._theirs: dict[tuple[int, int], _Theirs] = {}
        self._reading: dict[int, tuple[int, int]] = {}
        """Address of a peer's room that is being read -> (peer, room)."""

    @property
    def readers(self) -> list[int]:
        """Who has messages of this rank that are not given back."""
        return sorted({room.reader for room in self._rooms if room.reader is not None})

    def room(self, words: int) -> Tensor | None:
        """Memory for a message of so many 64-bit words; None while readers have all rooms."""
        self._listen(self.readers, 0.0)
        spare = next((room for room in self._rooms if room.spare), None)
        if spare is None:
            if len(self._rooms) == ROOMS:
                return None
            spare = _Room(len(self._rooms))
            self._rooms.append(spare)
        spare.spare = False
        return spare.fit(words)[:words]

    def wait_for_room(self) -> None:
        """Until a reader gives a room back."""
        self._await(self.readers, "which has not read its message")

    def hand(self, to: int, message: Tensor) -> None:
        """Hand a written message, in memory that `room` gave, to a peer."""
        room = next(room for room in self._rooms if room.words.data_ptr() == message.data_ptr())
        room.reader = to
        note, line = _NOTE.pack(_HANDED, room.number, message.numel()), self._lines[to]
        try:
            if to in room.known:
                line.send(note)
            else:
                socket.send_fds(line, [note], [room.file])
                room.known.add(to)
        except ConnectionError as error:
            raise self._gone(to) from error

    def take(self, by: int) -> Tensor:
        """Wait for the next message of a peer: a view of the peer's memory, [words] int64."""
        while not self._waiting[by]:
            self._await([by], "which sent nothing")
        number, words = self._waiting[by].popleft()
        found = self._theirs[by, number].fit(words)[:words]
        self._reading[found.data_ptr()] = by, number
        return found

    def back(self, message: Tensor) -> bool:
        """Give back what `take` returned, once it is read. False where it is not a peer's memory."""
        found = self._reading.pop(message.data_ptr(), None)
        if found is None:
            return False
        by, number = found
        with suppress(ConnectionError):  # who is gone needs no room
            self._lines[by].send(_NOTE.pack(_BACK, number, 0))
        return True

    def _await(self, peers: Collection[int], missing: str) -> None:
        assert peers, "all rooms are taken and none is handed over"
        if not self._listen(peers, self._timeout):
            raise RuntimeError(
                f"reshard: rank {self._rank} waited {self._timeout:g} s (timeout_seconds) for rank {min(peers)}, {missing}"
            )

    def _listen(self, peers: Collection[int], seconds: float) -> bool:
        """Take one note from each of these lines that has one, waiting at most so long for the first."""
        poll = select.poll()
        of = {self._lines[peer].fileno(): peer for peer in peers}
        for file in of:
            poll.register(file, select.POLLIN)
        ready = poll.poll(1000 * seconds) if of else []
        for file, _ in ready:
            self._heard(of[file])
        return bool(ready)

    def _heard(self, peer: int) -> None:
        try:
            note, files, _, _ = socket.recv_fds(self._lines[peer], _NOTE.size, 1, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError as error:
            raise self._gone(peer) from error
        if not note:
            raise self._gone(peer)
        kind, number, words = _NOTE.unpack(note)
        if kind == _BACK:
            self._rooms[number].reader, self._rooms[number].spare = None, True
            return
        if files:
            self._theirs[peer, number] = _Theirs(files[0])
        self._waiting[peer].append((number, words))

    def _gone(self, peer: int) -> RuntimeError:
        return RuntimeError(f"reshard: connection closed by peer: rank {peer} is gone, rank {self._rank} needs it")


class _Theirs:
    """Memory that a peer writes."""

    def __init__(self, file: int) -> None:
        self.file = file
        self.words = torch.empty(0, dtype=torch.int64)

    def fit(self, words: int) -> Tensor:
        """The memory, mapped as far as so many words."""
        if self.words.numel() < words:
            self.words = torch.frombuffer(mmap.mmap(self.file, 8 * words), dtype=torch.int64)
        return self.words


class _Room(_Theirs):
    """Memory of this rank that one peer at a time reads."""

    def __init__(self, number: int) -> None:
        super().__init__(os.memfd_create("aligner-reshard"))
        self.number = number
        self.spare = True
        self.reader: int | None = None
        self.known: set[int] = set()
        """Who has its descriptor."""

    def fit(self, words: int) -> Tensor:
        if self.words.numel() < words:
            os.ftruncate(self.file, 8 * words)
        return super().fit(words)


def connect(group: dist.ProcessGroup) -> SharedMemoryChannel | None:
    """A channel between all ranks of `group`; collective over it.

    None on every rank where they are not all on one host, and where one cannot be connected with all others (not Linux,
    containers without a common network): then the first rank logs why.
    """
    ranks, rank = dist.get_process_group_ranks(group), dist.get_rank()
    listener, problem, lines = None, "", dict[int, socket.socket]()
    try:
        listener = _listener()
    except OSError as error:
        problem = str(error)
    host = _BOOT.read_text() if _BOOT.exists() else ""
    told = _told((host, listener.getsockname() if listener else b""), ranks, group)
    if len(ranks) == 1 or len({host for host, _ in told}) > 1:
        return None
    try:
        for peer, (_, address) in list(zip(ranks, told, strict=True))[: ranks.index(rank)]:
            lines[peer] = _line()
            lines[peer].connect(address)  # waits for nobody: all listen since before they told their addresses
            lines[peer].send(rank.to_bytes(4, "little"))
    except OSError as error:
        problem = problem or str(error)
    problems = [f"rank {peer}: {text}" for peer, text in zip(ranks, _told(problem, ranks, group), strict=True) if text]
    if problems or listener is None:
        if rank == ranks[0]:
            log.warning("weights go over gloo, not through memory that the ranks share: %s", problems[0])
        return None
    _answer(listener, lines, ranks)
    listener.close()
    timeout = group._get_backend(torch.device("cpu")).options._timeout
    return SharedMemoryChannel(rank, lines, timeout.total_seconds())


def _told(mine: Any, ranks: Sequence[int], group: dist.ProcessGroup) -> list[Any]:
    """What each rank tells all others."""
    told: list[Any] = [None] * len(ranks)
    dist.all_gather_object(told, mine, group=group)
    return told


def _line() -> socket.socket:
    if sys.platform != "linux":
        raise OSError(f"{sys.platform} has no descriptors of anonymous memory")
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made.settimeout(_MEETING_SECONDS)
    return made


def _listener() -> socket.socket:
    """An address of no file: it ends with the process."""
    made = _line()
    made.bind("\0aligner-" + secrets.token_hex(16))
    made.listen(1024)
    return made


def _answer(listener: socket.socket, lines: dict[int, socket.socket], ranks: Sequence[int]) -> None:
    """Take the lines of all ranks that have not got one; only this job's user may have one."""
    while len(lines) < len(ranks) - 1:
        line, _ = listener.accept()
        _, user, _ = struct.unpack("3i", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        line.settimeout(_MEETING_SECONDS)
        peer = int.from_bytes(line.recv(4), "little") if user == os.getuid() else -1
        if peer in ranks:
            lines[peer] = line
