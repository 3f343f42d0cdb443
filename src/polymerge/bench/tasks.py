"""Modular arithmetic: four binary operations over one vocabulary, split into training, validation and test pairs.

    x_plus_y  x_minus_y  x_div_y     numbers modulo a prime p (97)
    permutation                      composition in the symmetric group S_n (n = 5)

A row is (x, operation, y, answer); a model reads three tokens and predicts the fourth (Power et al. 2022). Tokens: the
numbers, five signs (one for each operation and one spare), the permutations: 97 + 5 + 120 = 222. A share of the pairs
(half) is for training. The rest is dealt in two: validation, which decides when an expert is good, what state is
kept and what knobs are chosen, and test, which is only ever measured.
"""

import itertools
from dataclasses import dataclass
from math import factorial

import torch
from jaxtyping import Int
from torch import Tensor

TASKS = ("x_div_y", "x_minus_y", "x_plus_y", "permutation")
_SIGN = {"x_plus_y": 0, "x_minus_y": 1, "x_div_y": 2, "permutation": 3}
_SIGNS = 5


@dataclass(frozen=True)
class Split:
    """Rows (x, operation, y, answer) by use."""

    train: Int[Tensor, "train 4"]
    validation: Int[Tensor, "validation 4"]
    test: Int[Tensor, "test 4"]


@dataclass(frozen=True)
class Arithmetic:
    """The vocabulary of numbers modulo the prime `modulus` and permutations of `degree` things."""

    modulus: int = 97
    degree: int = 5

    @property
    def vocab(self) -> int:
        """Number of tokens."""
        return self.modulus + _SIGNS + factorial(self.degree)

    def rows(self, task: str) -> Int[Tensor, "row 4"]:
        """Every pair of operands of a task, with its answer. Raises ValueError for an unknown task."""
        p, first = self.modulus, self.modulus + _SIGNS
        if task not in _SIGN:
            raise ValueError(f"no task {task!r}; known: {', '.join(TASKS)}")
        sign = p + _SIGN[task]
        if task == "permutation":
            orders = list(itertools.permutations(range(self.degree)))
            token = {order: first + i for i, order in enumerate(orders)}
            found = [
                (token[a], sign, token[b], token[tuple(a[i] for i in b)]) for a, b in itertools.product(orders, orders)
            ]
            return torch.tensor(found)
        x, y = torch.meshgrid(torch.arange(p), torch.arange(task == "x_div_y", p), indexing="ij")
        x, y = x.flatten(), y.flatten()
        inverse = torch.tensor([0, *(pow(b, -1, p) for b in range(1, p))])
        answer = {"x_plus_y": x + y, "x_minus_y": x - y, "x_div_y": x * inverse[y]}[task] % p
        return torch.stack([x, torch.full_like(x, sign), y, answer], dim=1)

    def split(self, task: str, seed: int, share: float = 0.5) -> Split:
        """A random share of the pairs for training, the rest in two halves."""
        rows = self.rows(task)
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
        trained = round(share * len(rows))
        half = (len(rows) - trained) // 2
        return Split(rows[:trained], rows[trained : trained + half], rows[trained + half :])
