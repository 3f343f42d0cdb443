"""The shape of the result: which decoder of the target family has the size asked for.

Layers, head size and KV-group ratio follow from the experts; a parameter budget leaves the width of the
residual stream free, and with it how much is left for heads and neurons. `shapes` lists the candidates; which one keeps
most skill is measured on validation text (`methods/fold.py`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from polymerge import families
from polymerge.align import depth
from polymerge.errors import PreflightError
from polymerge.model.spec import Family, Spec, axis_lengths
from polymerge.recipe import Recipe, Size

TARGETS = tuple(name for name in families.names() if families.get(name).write is not None)
GRID = 8
"""Widths are multiples of this, as kernels like them."""


@dataclass(frozen=True)
class Plan:
    """Candidate shapes, narrow first; `budget` in parameters (None: the shape was given)."""

    family: Family
    shapes: tuple[Spec, ...]
    budget: int | None


def parameters(family: Family, spec: Spec) -> int:
    """Parameters of a model, from its family's table."""
    sizes = spec.sizes()
    return sum(
        math.prod(axis_lengths(row.axes, sizes)) * (spec.layers if "{layer}" in row.name else 1)
        for row in family.tensors
        if row.when is None or row.when in spec.features
    )


def family_of(recipe: Recipe, specs: Mapping[str, Spec]) -> Family:
    """The result's: as asked, or the anchor's, or llama where that can't be one. Raises PreflightError: no result's."""
    anchor = specs[recipe.anchor]
    name = recipe.family or (anchor.family if anchor.family in TARGETS else "llama")
    if name not in TARGETS:
        raise PreflightError(f"family: {name!r} cannot be a result; choose one of {', '.join(TARGETS)}")
    return families.get(name)


def make(
    recipe: Recipe,
    specs: dict[str, Spec],
    expert_parameters: dict[str, int],
    part: Sequence[str] | None = None,
    vocab: int | None = None,
) -> Plan:
    """The plan of a recipe; `part`: the experts that take part, all by default; `vocab`: tokens, default the anchor's.

    Raises PreflightError when no shape fits what was asked.
    """
    anchor, family = specs[recipe.anchor], family_of(recipe, specs)
    experts = [spec for name, spec in specs.items() if part is None or name in part]
    lead = anchor if part is None or recipe.anchor in part else experts[0]
    base = replace(_base(family, lead, experts), vocab=vocab or anchor.vocab)
    if recipe.method != "fold":
        return Plan(family, (_largest(family, base, experts),), None)
    if recipe.size == "union":
        return Plan(family, (_whole(family, base, experts),), None)
    size: Size = recipe.size
    layers = size.layers or base.layers
    base = replace(base, layers=layers)
    if size.params is None:
        return Plan(family, (_explicit(family, base, experts, size),), None)
    largest = max(expert_parameters.values())
    budget = size.params.resolve(largest)
    whole = _whole(family, base, experts)
    asked = part is None and "size" in recipe.model_fields_set
    if not asked and parameters(family, whole) <= budget:
        return Plan(family, (whole,), budget)
    found = [s for w in _widths(size, experts) if (s := _fitted(family, base, experts, w, budget, size))]
    if not found:
        least, most = _smallest(family, base, experts, size), parameters(family, _whole(family, base, experts))
        if budget > most:
            raise PreflightError(
                f"size: {budget:,} parameters are more than all experts side by side need ({most:,}, "
                f"{most / largest:.2f}x the largest expert); ask for less, or for `size: union`"
            )
        raise PreflightError(
            f"size: {budget:,} parameters hold no {family.model_type} of {layers} layers for these experts; "
            f"the least is about {least:,} ({least / largest:.2f}x the largest expert)"
        )
    return Plan(family, tuple(found), budget)


def _base(family: Family, lead: Spec, experts: Sequence[Spec]) -> Spec:
    """What follows from the experts alone; what all cannot have, and sizes that a budget decides, are the lead's."""
    head_size = math.lcm(*(s.head_size for s in experts))
    largest = max(s.head_size for s in experts)
    if head_size > max(128, largest):
        head_size = largest
    rotary = [s for s in (lead, *experts) if s.frequencies]
    theta = rotary[0].rope_theta if rotary else 10000.0
    frequencies, scale = tuple(theta ** (-2 * i / head_size) for i in range(head_size // 2)), 1.0
    if head_size == lead.head_size == 2 * len(lead.frequencies):
        frequencies, scale = lead.frequencies, lead.rope_scale
    features = {"head"} | ({"qkv_bias"} if family.bias else set()) | ({"qk_norm"} if family.qk_norm else set())
    return Spec(
        family=family.model_type,
        vocab=lead.vocab,
        width=lead.width,
        layers=max(s.layers for s in experts),
        heads=lead.heads,
        kv_heads=lead.heads // ratio(experts),
        head_size=head_size,
        mlp=lead.mlp,
        norm="rms",
        eps=lead.eps,
        activation="silu",
        gated=True,
        tied=False,
        max_positions=lead.max_positions,
        frequencies=frequencies,
        rope_scale=scale,
        rope_theta=theta,
        features=frozenset(features),
    )


def ratio(experts: Sequence[Spec]) -> int:
    """Query heads per KV head that every expert's groups can be expanded to: the greatest common divisor."""
    return math.gcd(*(s.heads // s.kv_heads for s in experts))


def _whole(family: Family, base: Spec, experts: Sequence[Spec]) -> Spec:
    """Everything of every expert side by side, and a constant dimension where biases need one."""
    stacked = [depth.most(s.layers, base.layers) for s in experts]
    heads = sum(n * s.heads for n, s in zip(stacked, experts, strict=True))
    mlp = sum(n * s.mlp for n, s in zip(stacked, experts, strict=True))
    spec = replace(base, heads=heads, kv_heads=heads // ratio(experts), mlp=mlp)
    width = sum(s.width for s in experts) + any(s.has_constants for s in experts)
    return replace(spec, width=allowed(family, width, heads))


def _largest(family: Family, base: Spec, experts: Sequence[Spec]) -> Spec:
    """The least shape that holds each expert alone: what methods that average weights merge into."""
    heads = max(s.heads for s in experts)
    width = allowed(family, max(s.width for s in experts), heads)
    mlp = max(s.mlp for s in experts)
    return replace(base, width=width, heads=heads, kv_heads=heads // ratio(experts), mlp=mlp)


def allowed(family: Family, width: int, heads: int) -> int:
    """The least width from `width` on that the family accepts with so many heads."""
    step = heads if family.divides_width else 1
    return math.ceil(width / step) * step


def _explicit(family: Family, base: Spec, experts: Sequence[Spec], size: Size) -> Spec:
    whole, group = _whole(family, base, experts), ratio(experts)
    heads = size.heads or whole.heads
    if heads % group:
        raise PreflightError(f"size.heads: {heads} is not a multiple of {group}, the experts' query heads per KV head")
    width = size.width or allowed(family, whole.width, heads)
    if family.divides_width and width % heads:
        raise PreflightError(
            f"size: a {family.model_type} needs a width that its heads divide; found width {width} and {heads} heads"
        )
    return replace(whole, width=width, heads=heads, kv_heads=heads // group, mlp=size.mlp or whole.mlp)


def _widths(size: Size, experts: Sequence[Spec]) -> list[int]:
    """Candidates from the narrower experts' width to all of them side by side, about evenly spaced in ratio."""
    if size.width:
        return [size.width]
    low, high = min(s.width for s in experts), sum(s.width for s in experts)
    steps = max(2, round(math.log(high / low) / math.log(1.2)))
    grid = [round(low * (high / low) ** (i / steps) / GRID) * GRID for i in range(steps + 1)]
    return sorted({max(GRID, w) for w in grid})


def _fitted(family: Family, base: Spec, experts: Sequence[Spec], width: int, budget: int, size: Size) -> Spec | None:
    """The shape of a width that spends the budget, attention and MLP in the experts' own proportion."""
    group = ratio(experts)
    whole = _whole(family, base, experts)
    share = _attention_share(base, experts)

    def sized(heads: int, mlp: int) -> Spec:
        return replace(base, width=width, heads=heads, kv_heads=heads // group, mlp=mlp)

    def neurons(heads: int) -> int:
        left = budget - parameters(family, sized(heads, 0))
        return left // (parameters(family, sized(heads, 1)) - parameters(family, sized(heads, 0)))

    options = [
        h
        for h in ([size.heads] if size.heads else range(group, whole.heads + 1, group))
        if h % group == 0 and (not family.divides_width or width % h == 0) and neurons(h) >= GRID
    ]
    if not options:
        return None

    def distance(heads: int) -> float:
        attention = parameters(family, sized(heads, 0)) - parameters(family, sized(0, 0))
        rest = budget - parameters(family, sized(0, 0))
        return abs(math.log(max(attention, 1) / max(rest, 1) / share))

    if size.mlp:
        options = [h for h in options if neurons(h) >= size.mlp]
        if not options:
            return None
    heads = min(options, key=lambda h: (distance(h), h))
    mlp = size.mlp or neurons(heads)
    if mlp > whole.mlp * 1.5:
        return None
    return sized(heads, mlp)


def _attention_share(base: Spec, experts: Sequence[Spec]) -> float:
    """Attention's part of the experts' layers once they are laid out as the target's."""
    group = ratio(experts)
    attention = sum(s.layers * 2 * s.width * base.head_size * s.heads * (1 + 1 / group) for s in experts)
    mlp = sum(s.layers * 3 * s.width * s.mlp for s in experts)
    return attention / (attention + mlp)


def _smallest(family: Family, base: Spec, experts: Sequence[Spec], size: Size) -> int:
    group = ratio(experts)
    width = _widths(size, experts)[0]
    heads = size.heads or group
    return parameters(family, replace(base, width=width, heads=heads, kv_heads=heads // group, mlp=size.mlp or GRID))
