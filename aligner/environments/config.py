"""Settings of the environment that episodes are played in: which, in how many processes, with which limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from aligner.bounds import AtLeast, Finite, MoreThan, OneOf
from aligner.environments.agent_config import AgentConfig
from aligner.environments.tool_calls import check_name

KINDS = ("steps", "tools", "skyrl_gym", "reasoning_gym", "textarena", "openenv", "mcp")
"""The kinds of environment: each is a file of aligner/environments/adapters/."""


@dataclass(frozen=True)
class EnvironmentConfig:
    """An environment or tools with which the policy talks for several turns; with an empty target a response is one turn."""

    target: str = ""
    """What to play with: `package.module:NAME` or `path/to/file.py:NAME` (a class or a function; `path/to/file.py`: every
    public function in it; kinds steps and tools), `interpreter` or `http` (tools that come with aligner), an id such as
    `TicTacToe-v0` (textarena), `aime` (skyrl_gym), `gsm_symbolic` (reasoning_gym), the URL of a server (openenv, mcp),
    or the command that starts one (mcp). Empty: no environment."""
    kind: Annotated[str, OneOf("auto", *KINDS)] = "auto"
    """Interface of the target: steps (a class with reset(row, seed) and step(text)), tools (functions, or a class as TRL's
    environment_factory takes it: its public methods are the tools), skyrl_gym, reasoning_gym, textarena, openenv or mcp.
    auto: steps for a class with `step`, tools for any other class and for functions, openenv for a URL."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments by name: of the class (steps, tools), of the package's own constructor (skyrl_gym, reasoning_gym,
    textarena), of reset (openenv), of the server's process or connection (mcp)."""
    tools: tuple[str, ...] = ()
    """kind=tools: further tools beside the target's, each named as a target is."""
    tool_options: dict[str, Any] = field(default_factory=dict)
    """kind=tools: options of further tools by the name in `tools`, such as {interpreter: {seconds: 5}}."""
    python: str | None = None
    """Interpreter (Python 3.8 or newer) that runs the environment, such as that of a virtual environment with its packages;
    nothing of aligner needs to be installed there. null: the job's own."""
    processes: Annotated[int, AtLeast(1)] = 2
    """Environment processes of each rollout replica."""
    episodes_per_process: Annotated[int, AtLeast(1)] = 16
    """Episodes at once in one process, each in a thread of its own; more wait, but for those that go on in a later step
    (stream.step_tokens). 1: no two episodes share a process, for environments with global state and those that crash often."""
    start_timeout_s: Annotated[float, Finite(), MoreThan(0)] = 120.0
    """Limit for the start of a process (imports of the environment), in seconds."""
    step_timeout_s: Annotated[float, Finite(), MoreThan(0)] = 30.0
    """Limit for one reset, one turn with all its tool calls, or one final reward, in seconds; beyond it the process is
    killed and the episode fails as `timeout`."""
    episode_timeout_s: Annotated[float | None, Finite(), MoreThan(0)] = None
    """Limit for the time of an episode in its environment, all resets and steps together without the policy's own time, in
    seconds; beyond it the episode fails as `episode_timeout`. null: none."""
    memory_mib: Annotated[int | None, AtLeast(64)] = 4096
    """Limit of the private memory of a process, and of each process that it starts, in MiB; beyond it the episode fails as
    `memory`. null: no limit."""
    max_output_chars: Annotated[int, AtLeast(1)] = 20000
    """Longest message of the environment, in characters."""
    long_output: Annotated[str, OneOf("cut", "fail")] = "cut"
    """A longer message is cut (its middle left out, with a note that says so; counted), or fails the episode as `protocol`."""
    replay: bool = True
    """An episode whose process is lost to another one's failure goes on in a new process: its actions are replayed, and what
    the environment says must be the same. false: it fails as `collateral` (for environments with outside effects)."""
    max_turns: Annotated[int, AtLeast(1)] = 16
    """Most turns of an episode; it then ends as `max_turns`, with the reward that it has by then."""
    max_tokens: Annotated[int | None, AtLeast(2)] = None
    """Most tokens of an episode's context; it then ends as `max_tokens`. null: what rollout.max_model_len allows, and
    with neither data.max_prompt_tokens + max_turns x sampling.max_tokens, as far as the model has positions."""
    rewritten: Annotated[str, OneOf("segment", "keep", "error")] = "segment"
    """Where the chat template renders earlier turns differently once later ones follow (drops reasoning): segment: begin a new
    segment with the new rendering; keep: earlier turns stay as they were sampled; error: stop the job."""
    tool_parser: str = "auto"
    """Format in which the model writes tool calls: hermes (Qwen2.5, Qwen3), qwen3_xml (Qwen3-Coder, Qwen3.5), glm, llama3_json,
    mistral, pythonic, harmony (gpt-oss), or vllm:NAME for one of vLLM's own parsers; auto: by the chat template."""
    hide_reasoning: bool = False
    """Give the environment a response without its reasoning: what follows its last </think>, nothing where it was cut off
    before. false: the whole response."""
    agent: AgentConfig = field(default_factory=AgentConfig)
    """A program with a loop of its own in place of `target`. Of the settings above it has start_timeout_s (until its first
    request), step_timeout_s (from an answer to its next request or its end), episode_timeout_s (both together), memory_mib (of
    each of its processes, and of all together), max_turns, max_tokens, rewritten and tool_parser."""

    @property
    def enabled(self) -> bool:
        """Whether there is an environment or an agent program."""
        return bool(self.target or self.agent.command)

    def check(self) -> None:
        """Raises ValueError naming the setting and the values that would work."""
        if self.agent.command and (self.target or self.python):
            given = f"environment.target={self.target}" if self.target else f"environment.python={self.python}"
            raise ValueError(
                f"environment.agent.command runs a program by itself, and {given} is set too; remove one of them."
            )
        if not self.target:
            if self.kind != "auto" or self.tools:
                given = f"environment.kind={self.kind}" if self.kind != "auto" else "environment.tools"
                raise ValueError(f"environment.target has no value, but {given} is set; name the environment there.")
            return
        if self.tools and self.kind not in ("auto", "tools"):
            raise ValueError(
                f"environment.tools go with environment.kind=tools, not {self.kind}; remove them, or use kind=tools."
            )
        check_name(self.tool_parser)
        unknown = sorted(set(self.tool_options) - set(self.tools))
        if unknown:
            raise ValueError(
                f"environment.tool_options.{unknown[0]}: there is no such tool in environment.tools={list(self.tools)}; "
                "options of the target itself are environment.options."
            )
