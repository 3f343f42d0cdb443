"""The page: self-contained, about the worst skill, and leaving out what was not measured."""

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from polymerge import report
from polymerge.errors import OutputError
from polymerge.report import figures, html, terminal

FULL: dict[str, Any] = {
    "method": "fold",
    "skills": {
        "prose": {
            "owner": 1.75, "union": 1.76, "fold": 2.0, "healed": 1.8, "experts": {"prose": 1.75, "code": 2.1},
        },
        "code": {
            "owner": 1.25, "union": 1.26, "fold": 1.7, "healed": 1.5, "experts": {"prose": 2.3, "code": 1.25},
        },
    },
    "parameters": 1_500_000,
    "expert_parameters": {"prose": 1_000_000, "code": 800_000},
    "shape": {
        "family": "llama", "layers": 6, "width": 128, "heads": 4, "kv_heads": 4, "head_size": 32, "mlp": 300,
    },
    "seconds": 61.0,
    "stage_seconds": {"basis": 1.0, "heal": 60.0, "total": 61.0},
    "stage_cpu_seconds": {"basis": 1.0, "heal": 110.0},
    "peak_bytes": 900_000_000,
    "heal_reference": {"prose": 1.7, "code": 1.2},
    "heal_curve": [
        {"step": 0, "tokens": 0, "validation": {"prose": 2.0, "code": 1.7}, "best": True},
        {"step": 10, "tokens": 20480, "validation": {"prose": 1.8, "code": 1.5}, "best": True},
    ],
    "knobs": {"mute": 2.0},
    "knob_trials": [
        {"mute": 0.0, "excess": [0.3, 0.5], "worst": 0.5},
        {"mute": 2.0, "width": 64, "excess": [0.3, 0.6], "worst": 0.6},
        {"mute": 2.0, "width": 128, "excess": [0.3, 0.4], "worst": 0.4},
    ],
    "preflight": {
        "findings": [{"level": "approximate", "subject": "code: activation", "text": "GELU & gated MLP"}],
    },
    "recipe": "method: fold\nanchor: prose  # <the prose>\n",
}  # fmt: skip


class Balanced(HTMLParser):
    """Fails on tags that are not closed in order."""

    VOID = ("meta", "path", "use", "line", "br")

    def __init__(self):
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):  # noqa: ARG002
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page() -> str:
    return html.page(FULL)


def test_the_page_needs_nothing_else(page):
    outside = re.findall(r'(?:src|href)="(?!#)([^"]*)"|url\((?!#)([^)]*)\)|@import', page)
    assert not outside
    assert page.count("<svg") == 2


def test_the_page_is_well_formed(page):
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []


def test_the_headline_is_the_worst_skill(page):
    assert "<h1>prose + code in one llama: the worst skill, code, is 0.250 bits per byte from its owner" in page


def test_every_section_is_there(page):
    for shown in (
        "1.500",
        "+0.250",
        "1,800,000",
        "1 min 50 s CPU",
        "900 MB",
        "GELU &amp; gated MLP",
        "&lt;the prose&gt;",
    ):
        assert shown in page
    assert "<tr class=worst><td>code" in page
    assert page.count("<tr class=worst>") == 2  # the worst skill, and of the trials the one that was chosen


def test_colours_follow_the_page(page):
    assert "currentColor" in page
    for placeholder in (figures.INK, figures.FAINT, figures.PAPER):
        assert not re.search(rf"(fill|stroke): {placeholder}", page)


def test_the_page_is_the_same_each_time(page):
    assert html.page(FULL) == page


def test_what_was_not_measured_is_left_out():
    bare = {
        "method": "union",
        "skills": {"a": {"owner": 1.0, "union": 1.1, "fold": None, "healed": None, "experts": {}}},
        "parameters": 10_000,
    }
    text = html.page(bare)
    assert "0.100 bits per byte" in text
    for title in ("Healing", "Shapes and knobs", "Recipe", "Size"):
        assert f"<h2>{title}" not in text


def test_a_skill_may_end_better_than_its_expert():
    skills = {"a": {"owner": 1.0, "fold": 0.9, "experts": {"a": 1.0}}}
    assert "0.100 bits per byte better than its owner" in html.page({**FULL, "skills": skills, "knob_trials": []})


def test_worst_is_by_distance_not_by_value():
    skills = {"a": {"owner": 3.0, "fold": 3.1}, "b": {"owner": 1.0, "fold": 1.2}, "c": {"owner": 1.0}}
    assert report.worst(skills) == "b"
    assert report.worst({"c": {"owner": 1.0}}) is None
    assert report.final({"fold": 3.1, "healed": None}) == 3.1


def test_healing_curve_without_reference():
    assert "bits per byte" in figures.svg(figures.healing(FULL["heal_curve"]), "x")


def test_story_is_a_picture():
    assert figures.png(figures.story(FULL), 50).startswith(b"\x89PNG")


def test_many_experts():
    experts = dict.fromkeys("abcdefgh", 1000000)
    skills = {n: {"owner": 1.0, "fold": 1.1, "experts": dict.fromkeys("abcdefgh", 2.0) | {n: 1.0}} for n in experts}
    assert "</html>" in html.page({**FULL, "skills": skills, "expert_parameters": experts, "knob_trials": []})


def test_unwritable_place(tmp_path):
    with pytest.raises(OutputError, match="cannot be written"):
        html.write(tmp_path / "absent" / "page.html", FULL)


def test_words():
    assert [terminal.duration(s) for s in (0.42, 9.96, 41.0, 125.0, 11_400.0)] == [
        "0.4 s", "10.0 s", "41 s", "2 min 5 s", "3 h 10 min",
    ]  # fmt: skip
    assert [terminal.size(b) for b in (12, 2_130_000, 15_000_000_000)] == ["12 bytes", "2.13 MB", "15 GB"]
