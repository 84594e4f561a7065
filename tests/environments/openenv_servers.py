"""OpenEnv servers, as its users write them: `openenv_servers.py echo|tools PORT`."""

import sys
from typing import Any, Optional

import uvicorn
from fastmcp import FastMCP
from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.mcp_environment import MCPEnvironment
from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation
from openenv.core.env_server.types import Action, Observation, State


class Say(Action):
    message: str


class Heard(Observation):
    echoed_message: str = ""
    length: int = 0


class Echo(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        self._state = State(step_count=0)

    def reset(self, seed: Optional[int] = None, episode_id: Optional[str] = None, **_: Any) -> Heard:  # noqa: UP045
        self._state = State(episode_id=episode_id, step_count=0)
        return Heard(echoed_message=f"ready {seed}", done=False, reward=0.0)

    def step(self, action: Say, timeout_s: Optional[float] = None, **_: Any) -> Heard:  # noqa: UP045
        self._state.step_count += 1
        done, length = self._state.step_count >= 2, len(action.message)
        return Heard(echoed_message=action.message, length=length, done=done, reward=float(length))

    @property
    def state(self) -> State:
        return self._state


class Calculator(MCPEnvironment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        tools = FastMCP("calculator")

        @tools.tool
        def add(a: int, b: int) -> int:
            """Add two numbers."""
            return a + b

        super().__init__(tools)
        self._state = State(step_count=0)

    def reset(self, seed: Optional[int] = None, episode_id: Optional[str] = None, **_: Any) -> Observation:  # noqa: UP045
        return Observation(done=False, reward=0.0)

    def _step_impl(self, action: Action, timeout_s: Optional[float] = None, **_: Any) -> Observation:  # noqa: UP045
        return Observation(done=False, reward=0.0)

    @property
    def state(self) -> State:
        return self._state


if __name__ == "__main__":
    if sys.argv[1] == "echo":
        app = create_app(Echo, Say, Heard, env_name="echo", max_concurrent_envs=8)
    else:
        app = create_app(Calculator, CallToolAction, CallToolObservation, env_name="tools", max_concurrent_envs=8)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
