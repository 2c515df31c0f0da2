"""Progress and figures as people and logs get them."""

from __future__ import annotations

import json

import pytest
from rich.console import Console
from rich.progress import Progress

from gqsa_compiler.cli import console


class _Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(console.time, "monotonic", lambda: self.now)


def test_a_log_gets_few_lines_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock(monkeypatch)
    lines: list[str] = []
    progress = console.PlainProgress(lines.append)
    for done in range(31):
        progress("Compressing layers", done, 30)
        clock.now += 4
    progress("Writing", 0, 0)
    clock.now += 100
    progress("Writing", 0, 0)
    assert lines[0] == "Compressing layers ..."
    assert lines[1] == "Compressing layers: 4/30, 1 min 44 s left"
    assert lines[-1] == "Writing ..."
    assert len(lines) == 9


def test_a_log_tells_losses_and_counts_only_steps_made_since_it_resumed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = _Clock(monkeypatch)
    lines: list[str] = []
    progress = console.PlainProgress(lines.append)
    progress("Training scales", 300, 400)
    clock.now += 20
    progress.status("loss 0.412, KL 0.350")
    progress("Training scales", 310, 400)
    progress("Writing", 0, 9)
    clock.now += 20
    progress("Writing", 1, 9)
    assert lines == [
        "Training scales ...",
        "Training scales: 310/400, loss 0.412, KL 0.350, 3 min 00 s left",
        "Writing ...",
        "Writing: 1/9, 2 min 40 s left",
    ]


def test_a_bar_tells_losses() -> None:
    bars = Progress(console=Console(file=None, quiet=True))
    progress = console.BarProgress(bars)
    progress.status("too early")
    progress("a", 0, 4)
    progress("b", 1, 4)
    progress.status("loss [0.4]")
    assert [task.fields["status"] for task in bars.tasks] == ["", "loss [0.4]"]


def test_bars_of_finished_stages_are_full() -> None:
    bars = Progress(console=Console(file=None, quiet=True))
    progress = console.BarProgress(bars)
    progress("a", 0, 4)
    progress("a", 1, 4)
    progress("b", 0, 0)
    progress.finish()
    assert [(task.completed, task.total) for task in bars.tasks] == [(4, 4), (1, 1)]


def test_progress_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress() as report:
        report("Loading", 0, 0)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "Loading ...\n"


def test_settings_leave_out_what_is_not_set(capsys: pytest.CaptureFixture[str]) -> None:
    console.show_settings("run", {"artefact": "a", "seed": None, "bundle": True})
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "gqsa run\n  artefact  a\n  bundle    true\n"


def test_json_keeps_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    console.emit_json({"text": "é\n"})
    out = capsys.readouterr().out
    assert "é" in out
    assert json.loads(out) == {"text": "é\n"}
