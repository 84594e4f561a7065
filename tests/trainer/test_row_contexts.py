"""Episodes of several segments: which contexts they are, packed by hand; a step beside transformers on each segment by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aligner.trainer.packing import microbatches, pack, row_units
from aligner.trainer.prefix_tree import find_prefixes
from aligner.trainer.row_contexts import ContextTree, contexts_of, separate, whole_rows
from tests.conftest import Ranks
from tests.trainer.episodes import Episode, as_samples, drawn
from tests.trainer.test_heads import classifiers  # noqa: F401
from tests.trainer.test_parity import checkpoints, each  # noqa: F401

CPU = torch.device("cpu")
BY_HAND = as_samples(
    [
        Episode([([1, 2, 3], 0), ([10], 1), ([4], 0), ([11, 12], 2), ([1, 2, 5], 0), ([13], 3)], frozenset({4})),
        Episode([([1, 2, 3], 0), ([20, 21], 1), ([6], 0)]),
    ]
)


def test_contexts_by_hand() -> None:
    contexts = contexts_of(BY_HAND)
    assert contexts.row_C.tolist() == [0, 0, 1] and contexts.start_C.tolist() == [0, 7, 0]
    assert contexts.length_C.tolist() == [7, 4, 6] and contexts.ends_row_C.tolist() == [False, True, True]
    assert contexts.of_row == [[0, 1], [2]] and contexts.of_rows([1, 0]) == [2, 0, 1]
    assert contexts.tokens(BY_HAND.tokens_BT).tolist() == [
        [1, 2, 3, 10, 4, 11, 12], [1, 2, 5, 13, 0, 0, 0], [1, 2, 3, 20, 21, 6, 0],
    ]  # fmt: skip
    swapped = contexts.take([1, 0])
    assert swapped.row_C.tolist() == [0, 1, 1] and swapped.start_C.tolist() == [0, 0, 7]
    assert swapped.ends_row_C.tolist() == [True, False, True]
    ends = contexts_of(BY_HAND, ends_only=True)
    assert ends.start_C.tolist() == [7, 0] and ends.length_C.tolist() == [4, 6]
    assert contexts_of(replace(BY_HAND, segment_BT=None)).length_C.tolist() == [11, 6]


def test_a_pack_of_episodes_by_hand() -> None:
    """Positions begin again; only sampled tokens are predicted, in their own segment; a score is read at a row's last token."""
    packed = pack(BY_HAND.tokens_BT, contexts_of(BY_HAND), 1, CPU, wanted_BT=BY_HAND.mask_BT)
    assert packed.tokens_T.tolist() == [1, 2, 3, 10, 4, 11, 12, 1, 2, 5, 13, 1, 2, 3, 20, 21, 6]
    assert packed.positions_T.tolist() == [*range(7), *range(4), *range(6)]
    assert packed.segments_S2.tolist() == [[7, -1], [4, -1], [6, -1]]
    # 10 after 3; 11 after 4; 12 after 11; 13 after 5; 20 after 3; 21 after 20
    assert packed.source_N.tolist() == [2, 4, 5, 9, 13, 14]
    assert packed.predicted_N.tolist() == [10, 11, 12, 13, 20, 21]
    assert packed.to_rows(packed.predicted_N.double()).tolist() == [
        [0, 0, 0, 10, 0, 11, 12, 0, 0, 0, 13], [0, 0, 0, 20, 21, 0, 0, 0, 0, 0, 0],
    ]  # fmt: skip
    assert packed.at_ends(packed.tokens_T).tolist() == [13, 6]


def test_segments_share_prefixes_within_and_between_rows() -> None:
    """1 2 begins all three contexts, of which the last shared token is computed by each; 1 2 3 is shared by two."""
    contexts = contexts_of(BY_HAND)
    tree = ContextTree(contexts, find_prefixes(contexts.tokens(BY_HAND.tokens_BT), contexts.length_C))
    segments = tree.segments([0, 1])
    assert [(one.parent, one.start, one.stop, one.rows) for one in segments] == [
        (-1, 0, 1, (0, 1, 2)), (0, 1, 2, (0, 2)), (0, 1, 4, (1,)), (1, 2, 7, (0,)), (1, 2, 6, (2,)),
    ]  # fmt: skip
    assert tree.tokens([0, 1]) == 1 + 1 + 3 + 5 + 4
    shared = pack(BY_HAND.tokens_BT, contexts, 1, CPU, wanted_BT=BY_HAND.mask_BT, segments=segments)
    alone = pack(BY_HAND.tokens_BT, contexts, 1, CPU, wanted_BT=BY_HAND.mask_BT)
    for name in ("tokens_T", "positions_T"):
        one, other = (packed.to_rows(getattr(packed, name)[packed.source_N]) for packed in (shared, alone))
        assert torch.equal(one, other), name
    assert shared.at_ends(shared.tokens_T).tolist() == [13, 6]


@pytest.mark.parametrize("ranks", [2, 3])
def test_context_parallel_ranks_together_have_all(ranks: int) -> None:
    samples = as_samples(drawn(1, 60))
    contexts = contexts_of(samples)
    one = pack(samples.tokens_BT, contexts, 1, CPU, wanted_BT=samples.mask_BT)
    parts = [pack(samples.tokens_BT, contexts, 2, CPU, ranks, rank, samples.mask_BT) for rank in range(ranks)]
    assert torch.equal(sum(part.to_rows(part.predicted_N) for part in parts), one.to_rows(one.predicted_N))
    assert torch.equal(one.to_rows(one.predicted_N), torch.where(samples.mask_BT, samples.tokens_BT, 0))
    assert torch.equal(sum(part.at_ends(part.tokens_T) for part in parts), one.at_ends(one.tokens_T))


def test_an_episode_is_never_split_over_microbatches() -> None:
    """Contexts of 7 + 4 and of 6 tokens."""
    batch = separate(contexts_of(BY_HAND))
    assert [(unit.rows, unit.tokens) for unit in row_units(batch, 8)] == [((0,), 11), ((1,), 6)]
    assert microbatches(row_units(batch, 17), 17) == [[0, 1]]


def test_rows_of_one_segment_are_packed_as_ever() -> None:
    samples = replace(BY_HAND, segment_BT=torch.zeros_like(BY_HAND.tokens_BT))
    given, whole = contexts_of(samples), whole_rows(samples.length_B)
    for name in ("row_C", "start_C", "length_C", "ends_row_C"):
        assert torch.equal(getattr(given, name), getattr(whole, name)), name


POLICIES = {
    1: ["llama:share=off,micro=60", "llama:share=on,micro=400", "gemma3:share=on,micro=60", "llama:share=on,micro=60,fsdp"],
    2: [
        "llama:share=on,tensor=2,sp,micro=80",
        "llama:share=on,context=2,micro=400",
        "qwen3:share=on,pipeline=2,micro=80",
        "llama:share=on,micro=60,fsdp",
    ],
}  # fmt: skip
MORE = {
    1: ["mistral:share=on,recompute=full,micro=60", "qwen3_moe:share=on,micro=100", "gemma3:share=off,micro=60,fsdp"],
    2: [
        "llama:share=off,tensor=2,micro=60",
        "llama:share=off,context=2,micro=60",
        "gemma3:share=on,context=2,micro=80",
        "gemma3:share=on,tensor=2,recompute=selective,micro=400",
        "qwen3_moe:share=on,expert=2,micro=100",
        "qwen2:share=on,micro=200",
    ],
}


@pytest.mark.parametrize(("size", "case"), each(POLICIES))
def test_an_update_equals_that_of_separate_segments(ranks: Ranks, checkpoints: Path, size: int, case: str) -> None:  # noqa: F811
    ranks(size).run("tests.trainer.segments_on_ranks:check_policy", checkpoints, case)


@pytest.mark.matrix
@pytest.mark.parametrize(("size", "case"), each(MORE))
def test_more_layouts_and_families(ranks: Ranks, checkpoints: Path, size: int, case: str) -> None:  # noqa: F811
    ranks(size).run("tests.trainer.segments_on_ranks:check_policy", checkpoints, case)


@pytest.mark.parametrize(
    ("size", "case"),
    each({1: ["llama:share=on,micro=60", "llama:share=on,micro=60,fsdp"], 2: ["qwen3:share=on,context=2"]}),
)
def test_values_and_scores_equal_those_of_separate_segments(
    ranks: Ranks,
    classifiers: Path,  # noqa: F811
    size: int,
    case: str,
) -> None:
    ranks(size).run("tests.trainer.segments_on_ranks:check_heads", classifiers, case)
