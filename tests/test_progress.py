"""Progress: nothing where nobody looks, a line for each stage where somebody does."""

import io

import pytest
from rich.console import Console

from polymerge.progress import Bars, Progress, Quiet, choose


def work(listener: Progress) -> None:
    listener.stage("basis", 2)
    listener.advance("layer 0")
    listener.advance()
    listener.stage("fold")
    listener.advance("layer 1", 3)


def test_quiet_says_nothing(capsys):
    work(Quiet())
    assert capsys.readouterr() == ("", "")


def test_bars_show_every_stage():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with Bars(console) as bars:
        work(bars)
    text = out.getvalue()
    assert "basis" in text
    assert "2/2" in text
    assert "3/3" in text  # a stage of unknown length ends full
    assert text.count("✓") >= 2


def test_more_steps_than_announced():
    out = io.StringIO()
    with Bars(Console(file=out, force_terminal=True, width=120)) as bars:
        bars.stage("heal", 2)
        bars.advance(n=3)
    assert "3/2" not in out.getvalue()
    assert "3/3" in out.getvalue()


def break_down(bars):
    with bars:
        bars.stage("fold", 5)
        bars.advance()
        raise ValueError("broken")


def test_a_failed_stage_is_not_shown_as_done():
    out = io.StringIO()
    with pytest.raises(ValueError, match="broken"):
        break_down(Bars(Console(file=out, force_terminal=True, width=120)))
    assert "1/5" in out.getvalue()


def test_steps_of_minutes_give_an_estimate_of_the_time_left():
    now = [0.0]
    with Bars(Console(file=io.StringIO(), force_terminal=True, width=120)) as bars:
        bars._bars.get_time = lambda: now[0]
        bars.stage("modular", 5)
        for _ in range(3):
            now[0] += 100.0
            bars.advance("cell", 0)
            bars.advance("cell")
        [task] = bars._bars.tasks
        assert task.time_remaining == 200


def test_steps_before_any_stage_are_ignored():
    Bars(Console(file=io.StringIO())).advance("nothing yet")


def test_no_bars_without_a_terminal(monkeypatch, capsys):
    with choose() as listener:
        work(listener)
    assert isinstance(listener, Quiet)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with choose(quiet=True) as listener:
        assert isinstance(listener, Quiet)


def test_both_are_progress():
    assert isinstance(Quiet(), Progress)
    assert isinstance(Bars(Console(file=io.StringIO())), Progress)
