"""The rows of a fold: whose come first, and which an expert with another tokenizer is asked by."""

import torch

from polymerge.align.translate import Reading, Translator
from polymerge.calibrate.calibration import Calibration, gather
from polymerge.calibrate.texts import Rows
from polymerge.model.source import Source

EXPERT = object.__new__(Source)  # of which nothing but the dtype is asked
EXPERT.dtype = torch.float64
EXPERTS = [EXPERT] * 2


def rows(first, count, length=4):
    return Rows(torch.arange(first, first + count)[:, None].repeat(1, length), count * length)


def test_the_first_rows_of_an_owner_are_of_all_its_skills():
    fitted, held_out = [rows(0, 6), rows(100, 4), rows(200, 2)], [rows(0, 2), rows(100, 2), rows(200, 2)]
    found = gather(fitted, held_out, EXPERTS, [1, 0, 1])
    assert found.of(1)[:, 0].tolist() == [0, 200, 1, 2, 3, 201, 4, 5]
    assert found.of(0)[:, 0].tolist() == [100, 101, 102, 103]
    assert found.subset(2, 2).of(1, fit=False)[:, 0].tolist() == [0, 200]
    assert found.owner[found.fit].tolist() == [1] * 8 + [0] * 4


def test_skills_with_owners_of_their_own_stay_in_order():
    fitted = [rows(0, 3), rows(100, 2)]
    found = gather(fitted, fitted, EXPERTS)
    assert found.tokens[:, 0].tolist() == [0, 1, 2, 100, 101] * 2
    assert found.fit.tolist() == [True] * 5 + [False] * 5


def test_one_row_of_few_tokens_does_not_cut_all_others():
    lengths = torch.tensor([20] * 18 + [2, 24])
    tokens = torch.arange(20)[:, None].repeat(1, 24)
    pairs = torch.zeros(20, 8, dtype=torch.long)
    reading = Reading(tokens, lengths, pairs, pairs.bool(), ((),) * 20)
    texts = Calibration(
        pairs, torch.zeros(20, dtype=torch.long), torch.ones(20, dtype=torch.bool),
        torch.ones(1, 20, 8), torch.ones(8, dtype=torch.bool), (1.0,), ((reading, object.__new__(Translator)),),
    )  # fmt: skip
    whole, scored = texts.own(0, 20)
    assert whole[:, 0].tolist() == [*range(18), 19]
    assert whole.shape[1] == len(scored) == 20
