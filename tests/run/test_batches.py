"""The batches of each kind, row by row, and that their order is the stream's."""

from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest

from aligner.data.config import DataConfig
from aligner.data.preferences import Pair
from aligner.data.prompts import Prompt
from aligner.data.samples import Samples
from aligner.data.sets import DataSets
from aligner.data.tokenized_answer import TokenizedAnswer
from aligner.run.batches import answers_as_samples, as_pairs, batches, training_rows


def answered(index: int, prompt: list[int], answer: list[int], **fields: Any) -> TokenizedAnswer:
    mask = [False] * len(prompt) + [True] * len(answer)
    return TokenizedAnswer((*prompt, *answer), tuple(mask), len(prompt), fields, index)


PAIRS = [
    Pair(answered(0, [5, 6], [7], score=2.0), answered(0, [5, 6], [8, 9], score=1.0)),
    Pair(answered(1, [3], [4, 4, 4]), answered(1, [3], [2])),
]


def test_a_pair_is_two_rows_the_chosen_one_first() -> None:
    rows = as_pairs(PAIRS)
    assert rows.tokens_BT.tolist() == [[5, 6, 7, 0], [5, 6, 8, 9], [3, 4, 4, 4], [3, 2, 0, 0]]
    assert rows.mask_BT.int().tolist() == [[0, 0, 1, 0], [0, 0, 1, 1], [0, 1, 1, 1], [0, 1, 0, 0]]
    assert rows.prompt_len_B.tolist() == [2, 2, 1, 1]
    assert rows.length_B.tolist() == [3, 4, 4, 2]
    assert rows.prompt_index_B.tolist() == [0, 0, 1, 1]
    assert rows.fields == [{"score": 2.0}, {"score": 1.0}, {}, {}]
    assert rows.rollout_logp_BT is None and rows.truncated_B is None


def dealt(kind: str, training: list[Any], steps: int, per_step: int, shuffle: bool = True) -> list[Any]:
    config: Any = SimpleNamespace(seed=3, data=DataConfig(kind=kind, shuffle=shuffle, prompts_per_step=per_step))
    checked: Any = SimpleNamespace(data=DataSets(training))
    return list(islice(batches(config, training_rows(config, checked)), steps))


@pytest.mark.parametrize(("kind", "rows"), [("demonstrations", 3), ("feedback", 3), ("preferences", 6)])
def test_steps_deal_every_row_once_an_epoch(kind: str, rows: int) -> None:
    answers = [answered(i, [1], [i + 2]) for i in range(5)]
    training: list[Any] = [Pair(a, a) for a in answers] if kind == "preferences" else answers
    steps = dealt(kind, training, steps=5, per_step=3)
    assert all(isinstance(step, Samples) and step.rows == rows for step in steps)
    indices = [index for step in steps for index in step.prompt_index_B.tolist()][:: rows // 3]
    assert [sorted(indices[start : start + 5]) for start in (0, 5, 10)] == [list(range(5))] * 3
    assert [token for step in steps for token in step.tokens_BT[:, 1].tolist()][:: rows // 3] == [
        i + 2 for i in indices
    ]
    again = [step.prompt_index_B.tolist() for step in dealt(kind, training, steps=2, per_step=3)]
    assert again == [step.prompt_index_B.tolist() for step in steps[:2]]
    (first,) = dealt(kind, training, steps=1, per_step=3, shuffle=False)
    assert first.prompt_index_B.tolist()[:: rows // 3] == [0, 1, 2]


def test_prompts_stay_a_list() -> None:
    prompts = [Prompt((i,), str(i), {}, i) for i in range(4)]
    assert dealt("prompts", prompts, steps=1, per_step=2, shuffle=False) == [prompts[:2]]


def test_rows_of_demonstrations_keep_their_masks() -> None:
    turns = TokenizedAnswer((1, 2, 3, 4), (False, True, False, True), 1, {"id": 7}, 0)
    assert answers_as_samples([turns]).mask_BT.int().tolist() == [[0, 1, 0, 1]]
