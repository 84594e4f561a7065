"""Settings of agent programs, which bring their own loop and reach the policy through the endpoint (no torch)."""

from __future__ import annotations

import os
import shlex
import shutil
from dataclasses import dataclass
from typing import Annotated

from aligner.bounds import AtLeast


@dataclass(frozen=True)
class AgentConfig:
    """A program that plays an episode by itself, with the policy as its model."""

    command: str = ""
    """Command of the program, such as `python my_agent.py` or `/path/to/venv/bin/python agent.py`; run once for each episode,
    without a shell, in a new folder; arguments that name files in the job's working folder are passed as absolute paths.
    Empty: no agent program."""
    processes: Annotated[int, AtLeast(1)] = 16
    """Programs at once, of each rollout replica, without those that wait for a later step (stream.step_tokens); more episodes wait."""
    reports_reward: bool = True
    """The program reports its reward (POST /v1/reward, or {"reward": x} as the last line of its standard output), and an episode
    without one fails as `no_reward`. false: it may report one, and reward rules score the text."""
    pass_env: tuple[str, ...] = ()
    """Names of further environment variables that the program gets. It has PATH, HOME, LANG, LC_*, TMPDIR, TZ, SSL_CERT_FILE
    and SSL_CERT_DIR of the job, and those of the endpoint (OPENAI_BASE_URL, OPENAI_API_KEY, ALIGNER_*)."""
    log_kib: Annotated[int, AtLeast(1)] = 16
    """The end of its standard output and of its standard error that is kept, in KiB each."""
    max_request_mib: Annotated[int, AtLeast(1)] = 16
    """Largest request body."""

    def check(self) -> None:
        """Raises ValueError naming the setting and the values that would work."""
        if self.command:
            resolve_command(self.command)
        for name in self.pass_env:
            if not os.environ.get(name):
                raise ValueError(f"environment.agent.pass_env: {name} is not set; export it, or remove its name.")


def resolve_command(command: str) -> list[str]:
    """The words of a command, with absolute paths for the program and for files of the working folder.

    Raises:
        ValueError: quotes that do not close, or a program that is not there.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"environment.agent.command={command!r} cannot be split into words: {error}.") from None
    if not words:
        raise ValueError("environment.agent.command is blank; give a command such as 'python my_agent.py'.")
    program = shutil.which(words[0])
    if program is None:
        raise ValueError(
            f"environment.agent.command: there is no program {words[0]!r} that can be run; give its path, or install it."
        )
    arguments = [os.path.abspath(word) if os.path.exists(word) else word for word in words[1:]]
    return [os.path.abspath(program), *arguments]
