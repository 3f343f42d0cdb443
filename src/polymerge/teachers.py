"""What healing learns from: who teaches each skill, which rows a step reads, and the loss.

    loss = mean over scored positions of KL(teacher ‖ student)

in float32 from the logits, in nats per token (Hinton et al. 2015, at temperature 1). The teacher of a skill's
rows is their owner, or the union of all experts.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from polymerge.calibrate.texts import Rows
from polymerge.divergence import kl
from polymerge.errors import RecipeError

EVEN = 1e-3
"""Share of a student's guess that is spread evenly, so that it excludes nothing."""
TAU = 100.0
"""Temperature of chunk likelihoods: unlikely tokens count nearly as much as likely ones."""
Precision = Literal["auto", "float32", "bfloat16"]


def resolve(
    teachers: Any, kind: Literal["owner", "union"], skills: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(model that teaches, model that the result is compared with) of each skill.

    teachers: name -> expert, or a `UnionForCausalLM`, which then is its own reference. For "union" a mapping
    is mixed here, in its order and without a copy. Raises ValueError for skills without a teacher, and where
    a union is given for "owner".
    """
    from polymerge.methods.union import UnionForCausalLM

    if isinstance(teachers, UnionForCausalLM):
        if kind == "owner":
            raise ValueError("heal.teacher is 'owner', but the teacher is a union; expected experts by name")
        return dict.fromkeys(skills, teachers), dict.fromkeys(skills, teachers)
    missing = [name for name in skills if name not in teachers]
    if missing:
        raise ValueError(f"no teacher for skill {missing[0]!r}; teachers: {', '.join(teachers)}")
    owners = {name: teachers[name] for name in skills}
    if kind == "owner":
        return owners, owners
    experts = list({id(model): model for model in teachers.values()}.values())  # one that owns two skills once
    return dict.fromkeys(skills, UnionForCausalLM.from_experts(experts)), owners


def likelihood(
    student: Float[Tensor, "row time vocab"],
    teacher: Float[Tensor, "row time vocab"],
    tokens: Int64[Tensor, "row time"],
) -> Float[Tensor, ""]:
    """τ Σ KL between "the text goes on with this token" and "it does not", from logits; differentiable in the student.

    Approximate likelihood matching (Minixhofer et al. 2025), a chunk for every token: all that a teacher with another
    tokenizer knows exactly is the probability of the bytes that follow, so only that is matched, as p^(1/τ).
    """
    following = tokens[:, 1:, None]
    log_q, log_p = (
        x[:, :-1].float().log_softmax(-1).gather(-1, following)[..., 0].clamp(-40.0, -1e-6) / TAU
        for x in (student, teacher)
    )
    p = log_p.exp()
    rest_p, rest_q = (torch.log(-torch.expm1(x)) for x in (log_p, log_q))
    apart: Tensor = p * (log_p - log_q) + (1 - p) * (rest_p - rest_q)
    return TAU * apart.sum()


def next_token(student: Float[Tensor, "row time vocab"], tokens: Int64[Tensor, "row time"]) -> Float[Tensor, ""]:
    """−log q of the text's own next token, in nats summed over positions; differentiable in the student's logits."""
    return F.cross_entropy(student[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def across(
    student: Float[Tensor, "row time vocab"],
    teacher: Any,
    tokens: Int64[Tensor, "row time"],
    *,
    kind: Literal["distribution", "likelihood"],
    states: bool = False,
) -> tuple[Float[Tensor, ""], Any]:
    """Loss on rows whose teacher has another tokenizer, summed over positions; and what that said (with its `states`).

    Differentiable in the student. teacher: a `TranslatedTeacher`. `distribution` is KL to its distribution, where the
    student's own shares fill in what the teacher's tokens leave open: it learns nothing there from the teacher but the
    probability of the bytes that follow. The text's tokens are drawn from what both should predict, so `next_token`
    tells the rest.
    """
    guess = None
    if kind == "distribution":
        guess = student.detach().float().softmax(-1)
        guess = (1 - EVEN) * guess + EVEN / guess.shape[-1]
    with torch.no_grad():
        said = teacher(input_ids=tokens, use_cache=False, guess=guess, output_hidden_states=states)
    loss = kl(student, said.logits).sum() if kind == "distribution" else likelihood(student, said.logits, tokens)
    return loss, said


class Batches:
    """Rows of each step: a share for every skill, each in shuffled passes over its rows.

    Shares are equal until `aim` moves them towards the skill that lags. What rounding to whole rows leaves over is due
    in later steps. `state()` is what `load` needs to go on.
    """

    def __init__(self, sizes: Mapping[str, int], rows: int, generator: torch.Generator) -> None:
        self.sizes, self.rows, self.generator = dict(sizes), rows, generator
        self.left = {name: torch.empty(0, dtype=torch.int64) for name in sizes}
        self.shares = dict.fromkeys(sizes, 1 / len(sizes))
        self.due = dict.fromkeys(sizes, 0.0)

    def aim(self, excess: Mapping[str, float]) -> None:
        """Give rows in proportion to how far each skill is behind its owner, at least half of an equal share each.

        A step towards the worst group instead of the mean, as in group DRO (Sagawa et al. 2020).
        """
        behind = {name: max(excess[name], 0.0) for name in self.sizes}
        total, least = sum(behind.values()), 0.5 / len(self.sizes)
        if total > 0 and math.isfinite(total):
            self.shares = {name: least + 0.5 * amount / total for name, amount in behind.items()}

    def draw(self) -> dict[str, Int64[Tensor, " row"]]:
        """Indices of the next batch's rows by skill; skills with none are left out."""
        due = {name: self.due[name] + self.rows * share for name, share in self.shares.items()}
        counts = {name: max(0, math.floor(amount)) for name, amount in due.items()}
        order = sorted(due, key=lambda name: counts[name] - due[name])  # the largest remainder first
        for name in order[: self.rows - sum(counts.values())]:
            counts[name] += 1
        self.due = {name: due[name] - counts[name] for name in due}
        return {name: self._take(name, n) for name, n in counts.items() if n}

    def _take(self, name: str, count: int) -> Tensor:
        while len(self.left[name]) < count:
            again = torch.randperm(self.sizes[name], generator=self.generator)
            self.left[name] = torch.cat([self.left[name], again])
        taken, self.left[name] = self.left[name][:count], self.left[name][count:].clone()
        return taken

    def state(self) -> dict[str, Any]:
        """Where the passes stand."""
        return {
            "generator": self.generator.get_state(),
            "left": dict(self.left),
            "shares": dict(self.shares),
            "due": dict(self.due),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state()`."""
        self.generator.set_state(state["generator"])
        self.left, self.shares, self.due = dict(state["left"]), dict(state["shares"]), dict(state["due"])


def uses_bfloat16(precision: Precision, device: torch.device) -> bool:
    """Whether forward passes run under bfloat16 autocast; "auto": where the hardware multiplies it faster."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(has.get("amx_bf16"))


def digest_rows(*rows: Rows) -> str:
    """Hash of token rows."""
    total = hashlib.sha256()
    for r in rows:
        total.update(f"{tuple(r.tokens.shape)} {r.bytes}".encode())
        total.update(r.tokens.contiguous().numpy().tobytes())
    return total.hexdigest()


def digest_model(model: Any, sample: int = 4096) -> str:
    """Hash of a model's parameters by name and shape, and of up to `sample` entries of each.

    A sample tells two models apart and does not take the minutes that reading billions of weights would.
    """
    total = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // sample)].contiguous().cpu()
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(some.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def check_rows(rows: Mapping[str, Rows], validation: Mapping[str, Rows], length: int) -> tuple[str, ...]:
    """The skills, after checking that both texts have the same ones, with rows of `length` tokens.

    Raises ValueError for a skill on one side only, RecipeError for rows of another length.
    """
    skills = tuple(rows)
    if not skills or sorted(skills) != sorted(validation):
        raise ValueError(
            f"calibration rows are of {sorted(skills)}, validation rows of {sorted(validation)}; expected the"
            " same skills, one or more"
        )
    for name in skills:
        found = rows[name].tokens.shape
        if found[1] != length or not found[0]:
            raise RecipeError(f"skill {name!r}: rows are {tuple(found)}, heal.length is {length}; pack the text to it")
    return skills
