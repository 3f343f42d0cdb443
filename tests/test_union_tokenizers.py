"""Laws of the union of experts whose tokenizers differ."""

import itertools
import math

import pytest
import torch

from polymerge.align.byte_lm import END, ByteModel

# ------------------------------------------------------------ the exact reference

ALPHABET = [b"a", b"b", b"ab", b"ba", b"aab", b"b", None]  # two tokens are spelt alike, the last one ends a text


def toy(ids):
    """Log-probabilities (7,) that depend on all that was read."""
    seed = sum((i + 1) * 8**n for n, i in enumerate(ids)) % (2**31)
    return torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).mul(2).log_softmax(0)


def brute_force(data, ids=()):
    """P(text begins with `data`), by the definition."""
    if not data:
        return 1.0
    total = 0.0
    for i, piece in enumerate(ALPHABET[:-1]):
        if data.startswith(piece) or piece.startswith(data):
            total += float(toy(ids)[i].exp()) * brute_force(data[len(piece) :], (*ids, i))
    return total


def strings(length):
    return [bytes(s) for s in itertools.product(b"ab", repeat=length)]


@pytest.mark.parametrize("length", [1, 2, 5])
def test_bytes_against_brute_force(length):
    model = ByteModel(toy, ALPHABET, end=6)
    for data in strings(length):
        assert math.exp(model.log_probability(data)) == pytest.approx(brute_force(data), rel=1e-9)


def test_next_bytes_and_the_end_are_a_distribution():
    """P(s) = P(s ends) + Σ_b P(s b), for every string."""
    model = ByteModel(toy, ALPHABET, end=6)
    for data in strings(4):
        state = model.start()
        for byte in data:
            state = model.read(state, byte)
        following = model.next_byte(state)
        assert float(following.exp().sum()) == pytest.approx(1)
        for byte in b"ab":
            joint = model.log_mass(state) + float(following[byte])
            assert joint == pytest.approx(model.log_probability(data + bytes([byte])))
        assert math.exp(float(following[END])) > 0


def test_a_narrow_beam_gives_less_and_never_more():
    data = b"aababaab"
    exact = ByteModel(toy, ALPHABET, end=6).log_probability(data)
    narrow = [ByteModel(toy, ALPHABET, end=6, width=w).log_probability(data) for w in (1, 4, 64)]
    assert narrow[0] < exact
    assert narrow == sorted(narrow)
    assert narrow[-1] == pytest.approx(exact)
