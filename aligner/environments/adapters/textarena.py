"""Environments of kind `textarena`: the games of the package textarena by their id, such as GuessTheNumber-v0 or TicTacToe-v0.

Each turn the policy sees what the game has said since its last turn (not the package's default, which repeats the whole game each
time). environment.options are the game's, and: `num_players` (1), `player` (0: the policy's number), and for games of several
`opponent`: `file.py:NAME`, a function or a class made with the seed, called with the observation's text, that returns its move.
The reward is the game's for the policy, at the end. A row's `options` come before environment.options.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aligner.environments.worker import Host

GLOBAL_RANDOM = True


def make(host: Host) -> Callable[[], TextArena]:
    """See the package."""
    arena = host.load("textarena", "environment.kind=textarena; environment.target")
    games = host.load("textarena.envs.registration").ENV_REGISTRY
    if host.target not in games:
        near = (
            sorted(name for name in games if name.lower().startswith(host.target[:3].lower()))[:8] or sorted(games)[:8]
        )
        raise host.Unusable(
            f"environment.target={host.target} is no game of textarena; use {', '.join(near)}, ... ({len(games)})"
        )
    options = dict(host.options)
    players, player, opponent = options.pop("num_players", 1), options.pop("player", 0), options.pop("opponent", None)
    if players > 1 and opponent is None:
        raise host.Unusable(
            f"environment.options.num_players={players} needs environment.options.opponent=file.py:NAME, which plays the others"
        )
    if not 0 <= player < players:
        raise host.Unusable(f"environment.options.player={player} is no player of {players}; use 0 to {players - 1}")
    rival = None if opponent is None else host.load(opponent, "environment.options.opponent")
    raw = host.target + "-raw" if host.target + "-raw" in games else host.target
    wrappers = [one for one in games[host.target].default_wrappers or [] if issubclass(one, arena.ActionWrapper)]

    def create(more: dict[str, Any]) -> Any:
        game = arena.make(raw, **{**options, **more})
        for wrapper in wrappers:
            game = wrapper(game)
        return game

    try:  # so that wrong options are told now
        create({}).reset(num_players=players, seed=0)
    except (TypeError, AssertionError) as error:
        raise host.Unusable(
            f"environment.options do not fit the game {host.target} with num_players={players}: {error}"
        ) from None
    return lambda: TextArena(host, arena, create, rival, players, player)


class TextArena:
    """One episode: one game."""

    def __init__(
        self, host: Host, arena: Any, create: Callable[..., Any], rival: Any, players: int, player: int
    ) -> None:
        self._host, self._arena, self._create = host, arena, create
        self._rival: Any = rival
        self._players, self._player = players, player

    def open(self, row: dict[str, Any], seed: int) -> dict[str, Any]:
        self._game = self._create(row.get("options") or {})
        self._game.reset(num_players=self._players, seed=seed)
        rival = self._rival
        self._opponent: Any = rival(seed) if isinstance(rival, type) else rival
        return self._until_policy(False)

    def step(self, text: str, tool_calls: list[dict[str, Any]]) -> dict[str, Any]:
        return self._until_policy(self._game.step(action=text)[0])

    def finish(self) -> dict[str, Any]:
        return {"reward": None}

    def close(self) -> None:
        pass

    def _until_policy(self, done: bool) -> dict[str, Any]:
        """Let the opponents play until it is the policy's turn or the game has ended."""
        while not done:
            player, observation = self._game.get_observation()
            text = self._text(observation, player)
            if player == self._player:
                return {"messages": self._host.messages(text)}
            done, _ = self._game.step(action=str(self._host.resolve(self._opponent(text))))
        rewards, info = self._game.close()
        mine = (info or {}).get(self._player, {})
        numbers = {name: float(value) for name, value in mine.items() if isinstance(value, (bool, int, float))}
        if not rewards or self._player not in rewards:
            raise self._host.WrongAnswer(f"the game ended without a reward for player {self._player}: {rewards}")
        return {"messages": [], "done": True, "reward": rewards[self._player], "metrics": numbers}

    def _text(self, observation: Any, player: int) -> str:
        """What a player has not seen yet, without its own moves."""
        if isinstance(observation, str):
            return observation
        move = self._arena.ObservationType.PLAYER_ACTION
        roles = self._game.state.role_mapping
        parts = []
        for sender, message, kind in observation:
            if kind != move:
                parts.append(str(message))
            elif sender != player:
                parts.append(f"[{roles.get(sender, f'Player {sender}')}] {message}")
        return "\n".join(parts)
