"""Environments of kind `skyrl_gym`: those of the package skyrl-gym by their id, or one's own BaseTextEnv as `file.py:Class`.

As in SkyRL the row holds what the environment calls extras, and its prompt is given to `init`. `postprocessed_action` is ignored:
the policy keeps the tokens that it has sampled. environment.options are the environment's `env_config`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aligner.environments.worker import Host


class Options(dict):
    """Options that are read as items and as attributes, as OmegaConf's are."""

    def __getattr__(self, name: str) -> Any:
        try:
            value = self[name]
        except KeyError:
            raise AttributeError(name) from None
        return Options(value) if isinstance(value, dict) else value


def make(host: Host) -> Callable[[], SkyRLGym]:
    """See the package."""
    gym = host.load("skyrl_gym", "environment.kind=skyrl_gym; environment.target")
    registry = host.load("skyrl_gym.envs.registration").registry
    if ":" in host.target:
        return lambda: SkyRLGym(host, host.load(host.target))
    if host.target not in registry:
        known = ", ".join(sorted(registry))
        raise host.Unusable(
            f"environment.target={host.target} is no environment of skyrl-gym; use {known}, or file.py:Class"
        )
    return lambda: SkyRLGym(host, lambda **given: gym.make(host.target, **given))


class SkyRLGym:
    """One episode."""

    def __init__(self, host: Host, create: Callable[..., Any]) -> None:
        self._host, self._create = host, create
        self._environment: Any = None

    def open(self, row: dict[str, Any], seed: int) -> dict[str, Any]:
        prompt = row.get("messages") or row.get("prompt") or []
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        self._environment = self._create(env_config=Options(self._host.options), extras=dict(row))
        first = list(self._environment.init([dict(message) for message in prompt])[0])
        if first[: len(prompt)] == prompt:
            return {"messages": first[len(prompt) :]}
        return {"messages": first, "replaces": True}

    def step(self, text: str, tool_calls: list[dict[str, Any]]) -> dict[str, Any]:
        output = self._environment.step(text)
        try:
            return {
                "messages": self._host.messages(output["observations"]),
                "reward": output["reward"],
                "done": bool(output["done"]),
                "metrics": _numbers(output.get("metadata")),
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise self._host.WrongAnswer(
                f"step returned {type(output).__name__} without observations, reward, done: {error}"
            ) from None

    def finish(self) -> dict[str, Any]:
        get_metrics = getattr(self._environment, "get_metrics", dict)
        return {"reward": None, "metrics": _numbers(get_metrics())}

    def close(self) -> None:
        if self._environment is not None:
            self._environment.close()


def _numbers(values: Any) -> dict[str, float]:
    """Those of a dict's values that are numbers."""
    return {str(name): value for name, value in (values or {}).items() if isinstance(value, (int, float))}
