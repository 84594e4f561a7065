"""What ranks do in the tests of loops on episodes: `methods_on_ranks.run_case`, with episodes from a scripted source in the process."""

from __future__ import annotations

from aligner.roles import episode_source
from aligner.spmd.world import World
from tests.algorithms import methods_on_ranks
from tests.algorithms.methods_on_ranks import Row
from tests.rollout.episodes.scripted import Scripted


def run_case(
    world: World, base: list[str], case: list[str], layouts: dict[str, list[str]], steps: int
) -> dict[str, list[Row]]:
    """Episodes of three or four turns, some of two segments, with a reward for each turn; some crash."""
    made = episode_source.make_source
    episode_source.make_source = lambda config, tokenizer, spec: Scripted(turns=4, segments=True, vocab=spec.vocab)
    try:
        return methods_on_ranks.run_case(world, base, case, layouts, steps)
    finally:
        episode_source.make_source = made
