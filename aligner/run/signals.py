"""Signals that ask the job to save and leave: SIGTERM, SIGINT (Ctrl-C), SIGHUP (the terminal is closed), and SIGUSR1, which
Slurm sends before the time is up.

A second SIGINT is the watch's (`spmd.watch`): it leaves at once, whatever the main thread waits for.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class Signals:
    """Notes them; the loop looks at the end of each step."""

    def __init__(self) -> None:
        self.asked = ""
        """The name of the first one that came."""
        if threading.current_thread() is threading.main_thread():
            for number in ASKING:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # nohup
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = self.asked or signal.Signals(number).name
