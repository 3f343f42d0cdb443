"""The model card (README.md) of a merged checkpoint, from plain data.

Front matter as the hub reads it for merges: `base_model` is a list, `base_model_relation: merge`. The
recipe is in it word for word, so that a reader can run it again.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import yaml


@dataclass(frozen=True)
class SkillRow:
    """One line of the table: bits per byte on test text (lower is better); None where not measured."""

    name: str
    owner: float | None
    union: float | None = None
    fold: float | None = None
    healed: float | None = None


@dataclass(frozen=True)
class Card:
    """What a model card says.

    base_models: hub name or folder name of each expert, in recipe order. licenses: one per expert, None where
    unknown. recipe: the recipe file's text, verbatim. description: paragraphs on how the model was made. length: tokens
    of the rows that the skills were measured in.
    """

    title: str
    base_models: Sequence[str]
    method: str
    recipe: str
    description: str
    parameters: int
    skills: Sequence[SkillRow] = ()
    length: int | None = None
    licenses: Sequence[str | None] = ()
    facts: Mapping[str, str] | None = None
    bibtex: Sequence[str] = ()
    pipeline_tag: str = "text-generation"
    tags: Sequence[str] = ()


def shared_license(licenses: Sequence[str | None]) -> str | None:
    """The licence all experts agree on, or None: the merger cannot choose one for them."""
    return licenses[0] if licenses and licenses[0] and len(set(licenses)) == 1 else None


def model_card(card: Card) -> str:
    """The card as Markdown with YAML front matter."""
    front: dict[str, object] = {
        "base_model": list(card.base_models),
        "base_model_relation": "merge",
        "library_name": "transformers",
        "pipeline_tag": card.pipeline_tag,
        "tags": list(dict.fromkeys(["merge", "polymerge", card.method, *card.tags])),
    }
    license_id = shared_license(card.licenses)
    if license_id:
        front["license"] = license_id
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=True, allow_unicode=True) + "---",
        f"# {card.title}",
        card.description.strip(),
        "## Experts\n\n" + "\n".join(f"- {name}" for name in card.base_models),
        _facts({"method": card.method, "parameters": f"{card.parameters:,}", **(card.facts or {})}),
    ]
    if card.skills:
        parts.append(_skills(card.skills, card.length))
    parts.append("## Recipe\n\n" + _fenced("yaml", card.recipe))
    if card.bibtex:
        parts.append("## Citation\n\n" + _fenced("bibtex", "\n\n".join(entry.strip() for entry in card.bibtex)))
    return "\n\n".join(parts) + "\n"


def _facts(facts: Mapping[str, str]) -> str:
    return "## Details\n\n| | |\n|---|---|\n" + "\n".join(f"| {k} | {_cell(v)} |" for k, v in facts.items())


def _skills(rows: Sequence[SkillRow], length: int | None) -> str:
    """Only the columns that were measured."""
    columns = [c for c in ("owner", "union", "fold", "healed") if any(getattr(r, c) is not None for r in rows)]
    lines = ["| skill | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for row in rows:
        values = [getattr(row, c) for c in columns]
        cells = " | ".join("–" if v is None else f"{v:.3f}" for v in values)
        lines.append(f"| {_cell(row.name)} | {cells} |")
    how = f" in rows of {length} tokens" if length else ""
    return f"## Skills\n\nBits per byte on held-out text{how}; lower is better.\n\n" + "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _fenced(language: str, text: str) -> str:
    """A code block whose fence is longer than any run of backticks inside, so that it cannot end early."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
