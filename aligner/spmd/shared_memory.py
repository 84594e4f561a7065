"""Messages between ranks of one host in memory that both map, instead of through the network stack.

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

SLOTS = 3
"""Messages that a rank has sent, or is writing, and that their readers have not released: one that is read, the next one, and
one that is written, so that neither end waits where the other is a little late."""

_SENT, _RELEASED = 0, 1
_NOTE = struct.Struct("=iiq")
"""A note on a socket: kind, number of the slot (the sender's; of a release, the reader's), words in it."""

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_CONNECT_SECONDS = 60.0

log = logging.getLogger(__name__)


class SharedMemoryChannel:
    """Shared memory between this rank and others of its host: it writes its messages into slots of its own; readers map them.

    A note on the socket to a peer says which slot holds a message for it. The reader releases the slot when it has read
    it, and only then is it written again. Slots are anonymous memory whose descriptors are sent over the socket: nothing
    has a name, and nothing stays when a rank is killed. Notes on a socket come in the order in
    which they were sent, so the n-th message from a rank is the n-th that is received.
    """

    def __init__(self, rank: int, sockets: dict[int, socket.socket], timeout_seconds: float, purpose: str) -> None:
        """
        Args:
            sockets: peer rank -> a connected SOCK_SEQPACKET socket, whose other end it has.
            timeout_seconds: limit of one wait.
            purpose: what errors begin with.
        """
        self._rank, self._sockets, self._timeout, self._purpose = rank, sockets, timeout_seconds, purpose
        self._slots: list[_Slot] = []
        self._received: dict[int, deque[tuple[int, int]]] = {peer: deque() for peer in sockets}
        """Messages sent to this rank and not yet read: (slot, words)."""
        self._peer_memory: dict[tuple[int, int], _MappedMemory] = {}
        self._reading: dict[int, tuple[int, int]] = {}
        """Address of a peer's slot that is being read -> (peer, slot)."""

    @property
    def readers(self) -> list[int]:
        """Ranks that have messages of this rank and have not released them."""
        return sorted({slot.reader for slot in self._slots if slot.reader is not None})

    def slot(self, words: int) -> Tensor | None:
        """Memory for a message of so many 64-bit words; None while readers have all slots."""
        slot = self._free_slot()
        if slot is None:
            self._listen(self.readers, 0.0)
            slot = self._free_slot()
        if slot is None:
            if len(self._slots) == SLOTS:
                return None
            slot = _Slot(len(self._slots))
            self._slots.append(slot)
        slot.free = False
        return slot.fit(words)[:words]

    def _free_slot(self) -> _Slot | None:
        return next((slot for slot in self._slots if slot.free), None)

    def wait_for_slot(self) -> None:
        """Wait until a reader releases a slot."""
        self._wait_for(self.readers, "which has not read its message")

    def send(self, receiver: int, message: Tensor) -> None:
        """Tell a peer of a written message, in memory that `slot` gave."""
        slot = next(slot for slot in self._slots if slot.words.data_ptr() == message.data_ptr())
        slot.reader = receiver
        note, connection = _NOTE.pack(_SENT, slot.number, message.numel()), self._sockets[receiver]
        try:
            if receiver in slot.mapped_by:
                connection.send(note)
            else:
                socket.send_fds(connection, [note], [slot.file])
                slot.mapped_by.add(receiver)
        except ConnectionError as error:
            raise self._lost(receiver) from error

    def receive(self, sender: int) -> Tensor:
        """Wait for the next message of a peer: a view of the peer's memory, [words] int64."""
        while not self._received[sender]:
            self._wait_for([sender], "which sent nothing")
        number, words = self._received[sender].popleft()
        message = self._peer_memory[sender, number].fit(words)[:words]
        self._reading[message.data_ptr()] = sender, number
        return message

    def release(self, message: Tensor) -> bool:
        """Give back what `receive` returned, once it is read. False where it is not a peer's memory."""
        slot = self._reading.pop(message.data_ptr(), None)
        if slot is None:
            return False
        sender, number = slot
        with suppress(ConnectionError):  # a peer that is gone needs no slot
            self._sockets[sender].send(_NOTE.pack(_RELEASED, number, 0))
        return True

    def _wait_for(self, peers: Collection[int], missing: str) -> None:
        assert peers, "all slots are taken and none was sent"
        if not self._listen(peers, self._timeout):
            raise RuntimeError(
                f"{self._purpose}: rank {self._rank} waited {self._timeout:g} s (timeout_seconds) for rank {min(peers)}, {missing}"
            )

    def _listen(self, peers: Collection[int], seconds: float) -> bool:
        """Take one note from each of these peers that has sent one, waiting at most so long for the first."""
        poll = select.poll()
        peer_of = {self._sockets[peer].fileno(): peer for peer in peers}
        for file in peer_of:
            poll.register(file, select.POLLIN)
        ready = poll.poll(1000 * seconds) if peer_of else []
        for file, _ in ready:
            self._receive_note(peer_of[file])
        return bool(ready)

    def _receive_note(self, peer: int) -> None:
        try:
            note, files, _, _ = socket.recv_fds(self._sockets[peer], _NOTE.size, 1, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError as error:
            raise self._lost(peer) from error
        if not note:
            raise self._lost(peer)
        kind, number, words = _NOTE.unpack(note)
        if kind == _RELEASED:
            self._slots[number].reader, self._slots[number].free = None, True
            return
        if files:
            self._peer_memory[peer, number] = _MappedMemory(files[0])
        self._received[peer].append((number, words))

    def _lost(self, peer: int) -> RuntimeError:
        return RuntimeError(
            f"{self._purpose}: connection closed by peer: rank {peer} is gone, rank {self._rank} needs it"
        )


class _MappedMemory:
    """Anonymous shared memory, of a peer."""

    def __init__(self, file: int) -> None:
        self.file = file
        self.words = torch.empty(0, dtype=torch.int64)

    def fit(self, words: int) -> Tensor:
        """The memory, mapped as far as so many words."""
        if self.words.numel() < words:
            self.words = torch.frombuffer(mmap.mmap(self.file, 8 * words), dtype=torch.int64)
        return self.words


class _Slot(_MappedMemory):
    """Shared memory of this rank, which one peer at a time reads."""

    def __init__(self, number: int) -> None:
        super().__init__(os.memfd_create("aligner"))
        self.number = number
        self.free = True
        self.reader: int | None = None
        self.mapped_by: set[int] = set()
        """Peers that have its descriptor."""

    def fit(self, words: int) -> Tensor:
        if self.words.numel() < words:
            os.ftruncate(self.file, 8 * words)
        return super().fit(words)


def connect(group: dist.ProcessGroup, purpose: str) -> SharedMemoryChannel | None:
    """A channel between all ranks of `group`; collective over it. `purpose`: of its messages, for errors and the log.

    None on every rank where they are not all on one host, and where one cannot be connected with all others (not Linux,
    containers without a common network): then the first rank logs why.
    """
    ranks, rank = dist.get_process_group_ranks(group), dist.get_rank()
    listener, problem, sockets = None, "", dict[int, socket.socket]()
    try:
        listener = _listener()
    except OSError as error:
        problem = str(error)
    host = _BOOT.read_text() if _BOOT.exists() else ""
    peers = _all_gather((host, listener.getsockname() if listener else b""), ranks, group)
    if len(ranks) == 1 or len({host for host, _ in peers}) > 1:
        return None
    try:
        for peer, (_, address) in list(zip(ranks, peers, strict=True))[: ranks.index(rank)]:
            sockets[peer] = _socket()
            sockets[peer].connect(address)  # at once: all listen since before they gave their addresses
            sockets[peer].send(rank.to_bytes(4, "little"))
    except OSError as error:
        problem = problem or str(error)
    problems = [
        f"rank {peer}: {text}" for peer, text in zip(ranks, _all_gather(problem, ranks, group), strict=True) if text
    ]
    if problems or listener is None:
        if rank == ranks[0]:
            log.warning("%s: over gloo, not through memory that the ranks share: %s", purpose, problems[0])
        return None
    _accept(listener, sockets, ranks)
    listener.close()
    timeout = group._get_backend(torch.device("cpu")).options._timeout
    return SharedMemoryChannel(rank, sockets, timeout.total_seconds(), purpose)


def _all_gather(value: Any, ranks: Sequence[int], group: dist.ProcessGroup) -> list[Any]:
    """The values of all ranks of the group, on each of them."""
    values: list[Any] = [None] * len(ranks)
    dist.all_gather_object(values, value, group=group)
    return values


def _socket() -> socket.socket:
    if sys.platform != "linux":
        raise OSError(f"{sys.platform} has no descriptors of anonymous memory")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(_CONNECT_SECONDS)
    return connection


def _listener() -> socket.socket:
    """Listens at an abstract address, not a file: it ends with the process."""
    listener = _socket()
    listener.bind("\0aligner-" + secrets.token_hex(16))
    listener.listen(1024)
    return listener


def _accept(listener: socket.socket, sockets: dict[int, socket.socket], ranks: Sequence[int]) -> None:
    """Accept connections until all ranks have one; only from processes of this job's user."""
    while len(sockets) < len(ranks) - 1:
        connection, _ = listener.accept()
        _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        connection.settimeout(_CONNECT_SECONDS)
        peer = int.from_bytes(connection.recv(4), "little") if user == os.getuid() else -1
        if peer in ranks:
            sockets[peer] = connection
