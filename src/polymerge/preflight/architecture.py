"""What becomes of each part of an expert in a fold: exact, approximated (and at what known cost), or refused.

Nothing is averaged: every expert keeps its own heads, neurons and slice of the residual stream. What has no
exact counterpart in the target is fitted by regression on calibration text. The costs quoted were measured on
two small byte-level models (Shakespeare and Python code, about 0.5 M parameters each) before any healing.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from polymerge.align import depth
from polymerge.align.heads import placement
from polymerge.align.width import has_constant
from polymerge.errors import PreflightError
from polymerge.methods._layers import as_gated
from polymerge.model import decoder
from polymerge.model.spec import Spec
from polymerge.plan import Plan, ratio
from polymerge.preflight.report import Finding

EXACT_DRIFT = 1e-3
"""Radians over 64 tokens below which a rotary pair counts as the same."""
EXACT_ACTIVATION, WORST_ACTIVATION = 1e-6, 0.1
"""Error of an activation's gated stand-in: float64 rounding, and the most that a fold should absorb."""
BIASES = (("qkv_bias", "q, k, v"), ("o_bias", "o"), ("mlp_bias", "the MLP"))

Part = Iterator[Finding]


@dataclass(frozen=True)
class Case:
    """One expert and the target; `common`: query heads per KV head in the target."""

    name: str
    spec: Spec
    target: Spec
    common: int


def fold_findings(specs: Mapping[str, Spec], anchor: str, plan: Plan) -> list[Finding]:
    """Every expert's parts against the target. Raises PreflightError for what a fold cannot hold."""
    target, common = plan.shapes[0], ratio(list(specs.values()))
    out = list(_together(specs, anchor, plan))
    for name, spec in specs.items():
        case = Case(name, spec, target, common)
        out += [replace(f, subject=f"{name}: {f.subject}") for look in CHECKS for f in look(case)]
    return out


def _together(specs: Mapping[str, Spec], anchor: str, plan: Plan) -> Part:
    """What concerns all experts at once."""
    target, own = plan.shapes[0], specs[anchor].family
    if target.family != own:
        yield Finding("warning", "family", f"the result is a {target.family}; the anchor's family is {own}")
    total, low, high = sum(s.width for s in specs.values()), plan.shapes[0].width, plan.shapes[-1].width
    span = str(low) if low == high else f"{low} to {high}"
    constant = has_constant(list(specs.values()), low)
    if low < len(specs) + constant:
        raise PreflightError(
            f"size.width: {low} is less than a dimension for each of {len(specs)} experts"
            f"{' and one that is constant' if constant else ''}; ask for more"
        )
    text = f"the experts' {total} dimensions in {span}{', one of them constant' if constant else ''}"
    if low >= total + constant:
        yield _exact("width", text)
    else:
        yield _approximate(
            "width",
            f"{text}; the least important are dropped, at a cost that the size decides",
        )
    if len(specs) > 1:
        yield _approximate(
            "norm",
            "one norm for all slices: a scale error per token, fitted by the readers; not measured",
        )
    stacked = [(depth.most(s.layers, target.layers), s) for s in specs.values()]
    heads, mlp = sum(n * s.heads for n, s in stacked), sum(n * s.mlp for n, s in stacked)
    if any(s.heads < heads or s.mlp < mlp for s in plan.shapes):
        yield _approximate(
            "pruning",
            f"of {heads} heads and {mlp} neurons a layer those that cost least are dropped to fit the size, "
            "the rest solved again (at the sum of both sizes: 0.06 and 0.19 bits per byte)",
        )


def _depth(case: Case) -> Part:
    layers, hosts = case.spec.layers, case.target.layers
    if layers > hosts:
        yield _approximate(
            "depth",
            f"{layers} layers in {hosts}, up to {depth.most(layers, hosts)} in one: all heads there read what the first"
            " of them reads, and all neurons what follows",
        )
        return
    spare = f"; it is the identity in the other {hosts - layers}" if hosts > layers else ""
    yield _exact("depth", f"{layers} layers, in order, in {hosts}{spare}")


def _heads(case: Case) -> Part:
    spec, target = case.spec, case.target
    if spec.head_size % 2:
        raise PreflightError(
            f"{case.name}: head size is {spec.head_size}; rotary pairs of a {target.family} need it even: "
            "leave this expert out or use method: union"
        )
    group = spec.heads // spec.kv_heads
    shared = "" if group == case.common else f", KV heads repeated to serve {case.common} and not {group}"
    yield _exact(
        "heads",
        f"{spec.heads} heads of size {spec.head_size} ({spec.kv_heads} KV) beside the other experts', in "
        f"heads of size {target.head_size}{shared}; none are averaged",
    )


def _positions(case: Case) -> Part:
    spec, target = case.spec, case.target
    if not spec.frequencies:
        yield _approximate(
            "positions",
            "learned: their mean goes into the embedding, heads use the slowest rotary pairs; not measured",
        )
        return
    rotated = 2 * len(spec.frequencies)
    partial = f" on {rotated} of {spec.head_size} dimensions" if rotated < spec.head_size else ""
    apart = sum(frequencies != spec.frequencies for frequencies, _, _ in spec.each)
    others = f" (in {apart} of {spec.layers} layers other frequencies, or none)" if apart else ""
    text = f"RoPE θ={spec.rope_theta:g}{partial}{others} in pairs of θ={target.rope_theta:g}"
    drift = max(placement(spec.at(i), target).worst_angle for i in range(spec.layers))
    if drift <= EXACT_DRIFT:
        yield _exact("positions", f"{text}, each in one of its own frequency")
    else:
        yield _approximate(
            "positions",
            f"{text}: phases drift by up to {drift:.2g} radians in 64 tokens (with all frequencies those of "
            "another head size, 0.68 bits per byte were lost)",
        )


def _window(case: Case) -> Part:
    windows = [case.spec.at(i).window for i in range(case.spec.layers)]
    short = [w for w in windows if w is not None]
    if short:
        where = "" if len(short) == len(windows) else f" in {len(short)} of {len(windows)} layers"
        yield _approximate(
            "window",
            f"it sees the last {min(short)} tokens{where}, the result all: exact in texts up to that length, "
            "beyond not measured",
        )


def _norm(case: Case) -> Part:
    if case.spec.norm == "layer":
        yield _approximate(
            "norm",
            "LayerNorm as RMSNorm: exact for the mean, as the stream is centred; biases through the constant",
        )
    if "write_norms" in case.spec.features:
        yield _approximate(
            "norm",
            "what attention and MLP write is normalised once more: a factor per token, fitted; not measured",
        )
    if "read_raw" in case.spec.features:
        yield _approximate(
            "norm",
            "attention and MLP read the stream as it is, the result's its direction: fitted; not measured",
        )
    if case.spec.score_cap is not None or case.spec.logit_cap is not None:
        yield _approximate("caps", "scores or logits are bent below a cap, the result's are not: fitted; not measured")
    if case.spec.parallel:
        yield _approximate(
            "parallel residual",
            "attention and MLP one after the other: the MLP is fitted to what it then sees; not measured",
        )


def _activation(case: Case) -> Part:
    name, error = case.spec.activation, activation_error(case.spec.activation)
    if error > WORST_ACTIVATION:
        raise PreflightError(
            f"{case.name}: activation {name!r} has no stand-in among SiLU-gated units (off by {error:.2g}); "
            "expected silu, relu or a kind of gelu: leave this expert out or use method: union"
        )
    kind = f"{name} ({'gated' if case.spec.gated else 'plain'}) as SiLU-gated units"
    if error < EXACT_ACTIVATION:
        yield _exact("activation", kind)
    else:
        yield _approximate("activation", f"{kind}: off by at most {error:.2g} before the down projection")


def _biases(case: Case) -> Part:
    present = [role for feature, role in BIASES if feature in case.spec.features]
    kept = [role for role in present if role == "q, k, v" and "qkv_bias" in case.target.features]
    through = [role for role in present if role not in kept]
    if kept:
        yield _exact("biases", "q, k, v keep theirs")
    if through:
        yield _approximate(
            "biases",
            f"those of {', '.join(through)} go through a constant dimension of the stream, as a "
            f"{case.target.family} has none there (all biases left out: 0.03 and 0.07 bits per byte)",
        )


def _qk_norm(case: Case) -> Part:
    if "qk_norm" in case.target.features:
        yield _approximate(
            "q/k norms",
            f"a {case.target.family} normalises queries and keys: the expert's sizes per head and token "
            "become one per layer; not measured",
        )
    elif case.spec.features & {"qk_norm", "qk_norm_all"}:
        yield _approximate(
            "q/k norms",
            f"a {case.target.family} has none: maps are fitted to normalised queries and keys; not measured",
        )


def _head(case: Case) -> Part:
    if case.spec.tied:
        yield _exact("head", "tied to the embedding; the result has a matrix of its own")


def _context(case: Case) -> Part:
    own, anchors = case.spec.max_positions, case.target.max_positions
    if own != anchors:
        yield Finding("warning", "context", f"it knows {own:,} positions; the result states the anchor's {anchors:,}")


CHECKS: tuple[Callable[[Case], Part], ...] = (
    _depth,
    _heads,
    _positions,
    _window,
    _norm,
    _activation,
    _biases,
    _qk_norm,
    _head,
    _context,
)


def _exact(part: str, text: str) -> Finding:
    return Finding("exact", part, text)


def _approximate(part: str, text: str) -> Finding:
    return Finding("approximate", part, text)


def activation_error(name: str) -> float:
    """The largest |act(z) − the SiLU-gated unit that stands for it|, z in [−8, 8]."""
    z = torch.linspace(-8, 8, 16_001, dtype=torch.float64)
    gate, up = as_gated(name, None, z)
    return float((decoder.activation(name, z) - decoder.activation("silu", gate) * up).abs().max())
