"""`gqsa tune` and its verbs, on a fake machine."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import gqsa_compiler.tune as tune_module
from gqsa_compiler.errors import UsageError
from gqsa_compiler.tuning import prepare as prepare_module
from gqsa_compiler.tuning.bundle import Exported
from gqsa_compiler.tuning.database import Database
from gqsa_compiler.tuning.key import TargetKey
from gqsa_compiler.tuning.session import Session
from tests.cli.conftest import Gqsa
from tests.tuning.fakes import FakeMeasurer, patch, task
from tests.tuning.samples import TRIAL, V4


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune a task that is computed, for x86-64-v4, on any machine."""
    for name in ("Workspace", "make_case"):
        monkeypatch.setattr(prepare_module, name, getattr(prepare_module, name))
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--minutes", "nan"], "minutes is nan and must be 0 or more."),
        (["--minutes", "-1"], "minutes is -1.0 and must be 0 or more."),
        (["--trials", "0"], "trials is 0 and must be at least 1."),
        (["--trials", "9" * 400], "trials is more than 1000000000; leave it out for no limit."),
        (["--seed", "-1"], "seed is -1 and must be from 0 to 4294967295."),
        (["--seed", str(1 << 32)], "seed is 4294967296 and must be from 0 to 4294967295."),
        (["--prompt", "9" * 400], "A workload has at most 1000000000 tokens of each kind."),
        (["--gen", "1000000001"], "A workload has at most 1000000000 tokens of each kind."),
        (["--threads", "1025"], "threads is 1025 and must be from 1 to 1024."),
        (["--threads", "1000"], "threads is 1000 and this process may use"),
    ],
)
def test_an_option_that_is_none(gqsa: Gqsa, words: list[str], message: str, tmp_path: Path) -> None:
    """Nothing is begun: there is no directory of a database, and no trial."""
    done = gqsa("tune", "toy", "--db", tmp_path / "db", *words)
    assert done.code == 2
    # What is out of a range that typer knows it refuses in words of its own.
    assert done.error.startswith((message, f"Invalid value for '{words[0]}': "))
    assert done.out == ""
    assert not (tmp_path / "db").exists()
    # The same from Python, where there is no typer.
    name, value = words[0].removeprefix("--"), words[1]
    options: Any = {name: float(value) if name == "minutes" else int(value)}
    with pytest.raises(UsageError, match=re.escape(message)):
        tune_module.tune_model("toy", tmp_path / "db", tune_module.TuneOptions(**options))


def test_a_report_that_cannot_be_written(
    gqsa: Gqsa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said before the session, not after it."""
    (tmp_path / "file").write_text("")

    def said(report: Path) -> str:
        done = tune(gqsa, tmp_path / "db", "--report", str(report))
        assert (done.code, (tmp_path / "db").exists()) == (2, False)
        return str(done.error)

    assert f"{tmp_path} is a directory; give --report the name" in said(tmp_path)
    assert "r.html cannot be made, as " in said(tmp_path / "file" / "r.html")
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write anywhere
    assert "r.html cannot be written; give" in said(tmp_path / "r.html")


def test_an_hour_without_end(gqsa: Gqsa, tmp_path: Path) -> None:
    done = tune(gqsa, tmp_path / "db", "--minutes", "inf")
    assert done.code == 0, done.err
    assert "12 trials in" in done.out


def test_an_export_takes_the_processor_that_is_named(
    gqsa: Gqsa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for chip in ("one", "other"):
        trial = replace(TRIAL, target=TargetKey.of(V4, chip))
        Database(tmp_path / "db").append(trial)
    seen: list[str | None] = []

    def export(*_args: Any, known: Any, **_options: Any) -> Exported:
        seen.append(known.chip)
        return Exported({}, {})

    monkeypatch.setattr(tune_module, "export_bundle", export)
    words = ["tune", "export", "toy", "--target", "x86-64-v4", "--db", tmp_path / "db", "-o"]
    done = gqsa(*words, tmp_path / "bundle")
    assert done.code == 2
    assert "say which is meant with --chip: one, other" in done.err
    assert gqsa(*words, tmp_path / "bundle", "--chip", "One").code == 0
    assert seen == ["one"]


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
    assert "1 session, 13 trials" in shown.out
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


def test_a_text_of_a_record_is_no_markup(gqsa: Gqsa, tmp_path: Path) -> None:
    chip = "[/red] [bold]x :smile:"
    for session in ("s1", "s2"):
        Database(tmp_path).append(replace(TRIAL, target=TargetKey.of(V4, chip), session=session))
    shown = gqsa("tune", "show", tmp_path)
    assert (shown.code, shown.out.count(chip)) == (0, 1)
    assert "0 sessions, 2 trials" in shown.out
    assert chip in gqsa("tune", "best", tmp_path).out


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

    from gqsa_compiler.cli.tune_live import LiveView, PlainView
    from tests.tuning.fakes import session

    lines: list[str] = []
    with pytest.MonkeyPatch.context() as undo:
        undo.setattr("gqsa_compiler.tuning.session.Database.append", lambda *_args: None)
        made = session(Path("unused"), FakeMeasurer(), trials=8, search="random")
        plain, view = PlainView(lines.append), LiveView()
        view.stage("reading", 0, 1)

        def both(seen: Session) -> None:
            plain(seen)
            view(seen)

        made._observe = both
        made.run()
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(view)
    text = console.export_text()
    assert "layer 256x512" in text
    assert "8 trials" in text
    assert lines[0] == "preparing layer 256x512 ..."
