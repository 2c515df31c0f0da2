"""`gqsa tune` and its verbs, on a fake machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import gqsa_compiler.tune as tune_module
from gqsa_compiler.tuning import session as session_module
from gqsa_compiler.tuning.database import Database
from tests.cli.conftest import Gqsa
from tests.tuning.fakes import FakeMeasurer, patch, task
from tests.tuning.samples import V4


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune a task that is computed, for x86-64-v4, on any machine."""
    for name in ("Workspace", "make_case"):
        monkeypatch.setattr(session_module, name, getattr(session_module, name))
    patch()
    monkeypatch.setattr(tune_module, "model_tasks", lambda *_args: (V4, (task(),)))
    monkeypatch.setattr(tune_module, "check_runs_here", lambda _target: None)
    monkeypatch.setattr(tune_module, "LocalMeasurer", lambda *_args: FakeMeasurer())
    monkeypatch.setattr(tune_module, "measure_read_bandwidth", lambda *_a, **_k: 1e10)


def tune(gqsa: Gqsa, db: Path, *words: str) -> Any:
    """Tune with a few trials."""
    return gqsa("tune", "toy", "--db", db, "--search", "random", "--trials", "12", *words)


def test_a_session(gqsa: Gqsa, tmp_path: Path) -> None:
    done = tune(gqsa, tmp_path / "db")
    assert done.code == 0, done.err
    assert "layer 256x512" in done.out
    assert "12 trials in" in done.out
    assert "Next: gqsa compile toy --target cpu --db" in done.err
    (page,) = (tmp_path / "db").glob("*.html")
    assert "Convergence" in page.read_text()


def test_a_session_as_json_and_resumed(gqsa: Gqsa, tmp_path: Path) -> None:
    first = tune(gqsa, tmp_path, "--json").json
    assert first["trials"] == 12
    assert first["tasks"][0]["layers"] == 4
    assert first["gain"] >= 1.0
    again = gqsa(
        "tune", "toy", "--db", tmp_path, "--search", "random", "--trials", "20", "--resume",
        "--json", "--report", tmp_path / "page.html",
    )  # fmt: skip
    assert again.json["session"] == first["session"]
    assert again.json["trials"] == 20
    assert (tmp_path / "page.html").is_file()
    assert len(Database(tmp_path).read().trials) == 21


def test_ctrl_c_ends_cleanly(gqsa: Gqsa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(number: int) -> None:
        if number > 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(tune_module, "LocalMeasurer", lambda *_a: FakeMeasurer(before=interrupt))
    done = tune(gqsa, tmp_path)
    assert done.code == 130
    assert "Interrupted; all trials are kept. Go on with --resume." in done.err
    assert "trials in" in done.out
    assert len(list(tmp_path.glob("*.html"))) == 1


def test_show_best_merge_and_prune(gqsa: Gqsa, tmp_path: Path) -> None:
    tune(gqsa, tmp_path / "db")
    shown = gqsa("tune", "show", tmp_path / "db")
    assert "x86.bsr_int4" in shown.out
    assert "1 sessions, 13 trials" in shown.out
    overview = gqsa("tune", "show", tmp_path / "db", "--json").json
    assert overview["kernels"][0]["trials"] == 13
    best = gqsa("tune", "best", tmp_path / "db", "-o", tmp_path / "best", "--json").json
    assert len(best) == 1
    assert len(Database(tmp_path / "best").read().trials) == 1
    assert "256 x 512" in gqsa("tune", "best", tmp_path / "db").out
    merged = gqsa("tune", "merge", tmp_path / "all", tmp_path / "db", tmp_path / "best", "--json")
    assert list(merged.json["added"].values()) == [14, 0]
    pruned = gqsa("tune", "prune", tmp_path / "all", "--losers", "--failed", "--old", "--json")
    assert pruned.json["removed_lines"] == pruned.json["records"]["ok"]
    left = Database(tmp_path / "all").read().trials
    assert left
    assert all(trial.best for trial in left)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("tune",), "Missing argument 'MODEL'"),
        (("tune", "show"), "Missing argument 'DB'"),
        (("tune", "show", "nowhere"), "There is no tuning database nowhere"),
        (("tune", "merge", "a"), "Missing argument"),
        (("tune", "import", "nowhere", "--db", "db"), "nowhere is no tuning bundle"),
        (("tune", "toy", "--trials", "0"), "--trials"),
        (("tune", "toy", "--search", "best"), "--search"),
        (("tune", "toy", "--resume", "--search", "random", "--db", "none"), "has no session of"),
    ],
)
def test_bad_usage(
    gqsa: Gqsa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = gqsa(*words)
    assert done.code == 2
    assert message in done.error


def test_help_names_the_verbs(gqsa: Gqsa) -> None:
    done = gqsa("tune", "--help")
    assert done.code == 0
    for verb in ("model", "show", "best", "merge", "prune", "export", "import"):
        assert verb in done.out
    assert "--trials" in gqsa("tune", "model", "--help").out
    assert "tune" in gqsa("--help").out


def test_a_terminal_sees_a_table() -> None:
    from rich.console import Console

    from gqsa_compiler.cli.tune_live import PlainView, table_of
    from tests.tuning.fakes import session

    lines: list[str] = []
    with pytest.MonkeyPatch.context() as undo:
        undo.setattr("gqsa_compiler.tuning.session.Database.append", lambda *_args: None)
        made = session(Path("unused"), FakeMeasurer(), trials=8, search="random")
        made._observe = PlainView(lines.append)
        made.run()
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(table_of(made))
    text = console.export_text()
    assert "layer 256x512" in text
    assert "8 trials" in text
    assert lines[0] == "preparing layer 256x512 ..."
