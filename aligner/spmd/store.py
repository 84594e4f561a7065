"""The job's key-value store, which torchrun's rendezvous keeps; and this attempt's own keys in it.

torchrun keeps one store for all attempts of a job (`--max-restarts`), and its count of restarts differs between nodes.
Keys of a former attempt, gloo's addresses among them, must not be taken for this one's: so its ranks first agree on a name.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

ATTEMPT = "ALIGNER_ATTEMPT"
"""Environment variable of the ranks' processes: what they have agreed on."""
POLL = 0.02


def own_store(name: str) -> dist.Store:
    """A connection of the caller's own to the store; keys are seen under this name and in this attempt only."""
    return dist.PrefixStore(f"aligner-{os.environ.get(ATTEMPT, '')}-{name}", _connect())


def meet(rank: int, size: int, timeout_seconds: float) -> dist.Store | None:
    """The first thing that ranks do: agree on a name of this attempt.

    Every rank writes down a word of its own; the first rank answers each word that it finds with the name that it has
    chosen, until all have thanked it. A word that a former attempt has left is answered too, and nobody listens.

    Returns:
        What to make process groups with; None without torchrun, where the first rank is yet to open a store.

    Raises:
        TimeoutError: ranks that have not come, by number.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "False") != "True":
        return None
    store = dist.PrefixStore(f"aligner-meet-{os.environ.get('TORCHELASTIC_RUN_ID', '')}", _connect())
    others = range(1, size)
    if rank == 0:
        name = uuid.uuid4().hex
        _answer(store, name, others, timeout_seconds)
    else:
        word = uuid.uuid4().hex
        store.set(f"word/{rank}", word)
        store.set_timeout(timedelta(seconds=timeout_seconds))
        name = store.get(f"answer/{word}").decode()
        store.set(f"thanks/{name}/{rank}", "1")
    os.environ[ATTEMPT] = name
    return own_store("groups")


def _answer(store: dist.Store, name: str, others: range, timeout_seconds: float) -> None:
    end = time.monotonic() + timeout_seconds
    waiting, answered = set(others), dict.fromkeys(others, b"")
    while waiting:
        for rank in sorted(waiting):
            if not store.check([f"word/{rank}"]):
                continue
            word = store.get(f"word/{rank}")
            if word != answered[rank]:
                store.set(f"answer/{word.decode()}", name)
                answered[rank] = word
        waiting = {rank for rank in waiting if not store.check([f"thanks/{name}/{rank}"])}
        if waiting and time.monotonic() > end:
            raise TimeoutError(
                f"rank(s) {', '.join(map(str, sorted(waiting)))} have not come within timeout_seconds={timeout_seconds:g}."
            )
        time.sleep(POLL if waiting else 0)


def _connect() -> dist.TCPStore:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=60), wait_for_workers=False)
