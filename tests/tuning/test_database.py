"""Records in files: whole lines, several writers, kills, merging and pruning."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqsa_compiler.errors import GqsaError, UsageError
from gqsa_compiler.tuning.database import Database
from gqsa_compiler.tuning.key import TargetKey
from gqsa_compiler.tuning.records import SessionStart, Trial, from_line, to_line
from tests.tuning.samples import CHIP, TRIAL, V4, sparse

SPEC = sparse()


def numbered(count: int, session: str = "s") -> list[Trial]:
    """Make records that differ."""
    return [replace(TRIAL, session=session, message=str(i)) for i in range(count)]


def test_entries_survive_their_lines() -> None:
    failed = replace(TRIAL, status="crash", message="signal 11", ratio=None, seconds={}, best=False)
    start = SessionStart(TRIAL.target, "s1", "model", 128, 64, ({"name": "a"},), "now")
    for entry in (TRIAL, failed, start):
        line = to_line(entry)
        assert line.endswith(b"\n")
        assert line.count(b"\n") == 1
        assert from_line(line) == entry


def test_an_entry_of_a_later_release_is_passed_over() -> None:
    assert from_line(b'{"type": "something new"}') is None


@pytest.mark.parametrize(
    "change",
    [
        {"spec": None},
        {"spec": {"n": 1}},
        {"status": "fine"},
        {"ratio": 0},
        {"ratio": "1"},
        {"ratio": True},
        {"seconds": {"1": -1.0}},
        {"seconds": {"x": 1.0}},
        {"config": []},
        {"best": 1},
        {"density": 1.5},
        {"rule": 3},
        {"session": "x" * 3000},
        {"session": "../elsewhere"},
        {"session": ".hidden"},
        {"rows": [0] * 2000},
        {"target": {"kind": "llvm"}},
        {"config": {"ahead": math.nan}},
        {"config": {"ahead": [-math.inf]}},
        {"config": {"ahead": {"a": 1}}},
        {"config": {"ahead": "\x1b[31m"}},
        {"config": {"\ud800": 1}},
        {"rule": "\x1b[2J"},
        {"kernels": "a\nb"},
        {"target": {**asdict(TRIAL.target), "chip": "\ud800"}},
        {"target": {**asdict(TRIAL.target), "features": ["\x07"]}},
        {"ratio": 5e-324},
        {"ratio": 1e300},
        {"calls": {}},
        {"seconds": {"1": 1e-6, "7": 1e-6}},
    ],
)
def test_what_does_not_fit_is_not_believed(change: dict[str, object]) -> None:
    fields = {**json.loads(to_line(TRIAL)), **change}
    with pytest.raises(ValueError, match=r"."):
        from_line(json.dumps(fields).encode())


def test_a_number_beyond_all_is_none() -> None:
    line = to_line(TRIAL).replace(b'"noise":0.01', b'"noise":1e400')
    with pytest.raises(ValueError, match="1e400 is no number"):
        from_line(line)


@settings(max_examples=200, deadline=None)
@given(cut=st.integers(0, len(to_line(TRIAL)) - 2), junk=st.binary(max_size=20))
def test_any_damaged_line_is_refused_or_whole(cut: int, junk: bytes) -> None:
    try:
        entry = from_line(to_line(TRIAL)[:cut] + junk)
    except ValueError:
        return
    assert entry is None or isinstance(entry, Trial | SessionStart)


@pytest.mark.parametrize(
    "change",
    [
        {"session": ""},
        {"session": "a/b"},
        {"tasks": [{"name": 3}]},
        {"tasks": [{"name": "a", "rule": "b", "spec": "c", "bytes": "many"}]},
        {"tasks": [{"name": "a", "anything": [{"else": math.nan}]}]},
    ],
)
def test_a_session_that_no_report_can_be_drawn_of(change: dict[str, object]) -> None:
    task = {"name": "a", "rule": "b", "spec": "c", "bytes": 4}
    start = SessionStart(TRIAL.target, "s", "toy", 1, 1, (task,))
    assert from_line(to_line(start)) == start
    with pytest.raises(ValueError, match=r"."):
        from_line(json.dumps({**json.loads(to_line(start)), **change}).encode())


def test_nesting_without_end_is_refused() -> None:
    with pytest.raises(ValueError, match="nested"):
        from_line(b"[" * 200_000)


def test_records_come_back_in_order(tmp_path: Path) -> None:
    database = Database(tmp_path / "db")
    assert database.read().entries == ()
    for trial in numbered(5):
        database.append(trial)
    assert list(database.read().entries) == numbered(5)


def test_where_nothing_can_be_written_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    Database(tmp_path / "new" / "db").check()
    assert not (tmp_path / "new").exists()
    with pytest.raises(UsageError, match="is a file; name a directory"):
        Database(tmp_path / "file").check()
    with pytest.raises(UsageError, match=r"db cannot be made: .*/file is a file\."):
        Database(tmp_path / "file" / "db").check()
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(UsageError, match=r"db cannot be written: nothing can be put into "):
        Database(tmp_path / "db").check()


def test_a_file_for_each_target_key(tmp_path: Path) -> None:
    other = replace(TRIAL, target=TargetKey.of(V4, "another chip"))
    newer = replace(TRIAL, target=replace(TRIAL.target, tvm="0.28.0"))
    database = Database(tmp_path)
    database.append(TRIAL, other, newer)
    files = [path.name for path in database.files()]
    assert sorted(files) == sorted({t.target.file for t in (TRIAL, other, newer)})
    assert len(files) == 3
    assert any("another-chip" in name for name in files)


def test_a_torn_line_costs_only_itself(tmp_path: Path) -> None:
    database = Database(tmp_path)
    database.append(*numbered(2))
    (path,) = database.files()
    with path.open("ab") as file:
        file.write(to_line(TRIAL)[:50])
    assert len(database.read().entries) == 2
    database.append(replace(TRIAL, message="after"))
    contents = database.read()
    assert [t.message for t in contents.trials] == ["0", "1", "after"]
    assert contents.unreadable == 1


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database(tmp_path)
    database.append(*numbered(2))
    (path,) = database.files()
    before = path.read_bytes()
    write = os.write

    def short(handle: int, data: bytes) -> int:
        if len(data) > 30:
            return write(handle, data[:30])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", lambda handle, data: short(handle, data[:60]))
    with pytest.raises(GqsaError, match="No space left"):
        database.append(TRIAL)
    monkeypatch.undo()
    assert path.read_bytes() == before


_WRITER = """
import sys
from dataclasses import asdict, replace
from pathlib import Path
from gqsa_compiler.tuning.database import Database
from tests.tuning.test_database import numbered
database = Database(Path(sys.argv[1]))
for trial in numbered(int(sys.argv[3]), sys.argv[2]):
    database.append(trial)
    print(trial.message, flush=True)
"""


WRITTEN = 25
"""Trials of a process that writes to its end."""


def _writer(folder: Path, name: str, count: int) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", _WRITER, str(folder), name, str(count)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=Path.cwd())


def test_two_writers_lose_nothing_and_neither_does_a_kill(tmp_path: Path) -> None:
    """Two processes write to the end; a third is killed on the way."""
    whole = [_writer(tmp_path, name, WRITTEN) for name in "ab"]
    killed = _writer(tmp_path, "c", 10_000)
    assert killed.stdout is not None
    said = [killed.stdout.readline().strip() for _ in range(20)]
    killed.send_signal(signal.SIGKILL)
    for process in whole:
        process.communicate(timeout=60)
        assert process.returncode == 0
    said += killed.stdout.read().split()  # `communicate` leaves out what readline has buffered
    killed.wait(timeout=60)
    killed.stdout.close()
    found: dict[str, list[str]] = {name: [] for name in "abc"}
    contents = Database(tmp_path).read()
    for trial in contents.trials:
        found[trial.session].append(trial.message)
    for name in "ab":
        assert found[name] == [str(i) for i in range(WRITTEN)]
    # What it said was written is there; at most the line in flight is not.
    assert found["c"][: len(said)] == said
    assert len(found["c"]) <= len(said) + 1
    assert contents.unreadable <= 1


@pytest.mark.slow
def test_pruning_beside_a_writer_loses_nothing(tmp_path: Path) -> None:
    database = Database(tmp_path)
    database.append(*numbered(50, "old"))
    process = _writer(tmp_path, "new", WRITTEN)
    until = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < until:
        database.prune(trial for trial in database.read().trials if trial.session == "old")
    assert process.wait(timeout=60) == 0
    process.communicate()
    messages = [t.message for t in database.read().trials if t.session == "new"]
    assert messages == [str(i) for i in range(WRITTEN)]


def test_prune_removes_lines_that_nobody_can_read(tmp_path: Path) -> None:
    database = Database(tmp_path)
    database.append(*numbered(3))
    (path,) = database.files()
    with path.open("ab") as file:
        file.write(b'{"type": "something new"}\nnonsense\n')
    assert database.prune(numbered(3)[1:]) == 3
    assert list(database.read().entries) == numbered(1)
    assert b"something new" in path.read_bytes()


def test_merge_adds_what_is_missing_once(tmp_path: Path) -> None:
    mine, other = Database(tmp_path / "mine"), Database(tmp_path / "other")
    mine.append(*numbered(2, "a"))
    other.append(*numbered(2, "a"), *numbered(2, "b"))
    assert mine.merge(other) == 2
    assert mine.merge(other) == 0
    assert len(mine.read().entries) == 4


def test_merge_puts_records_into_their_own_files(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "renamed.jsonl").write_bytes(to_line(TRIAL))
    mine = Database(tmp_path / "mine")
    mine.merge(Database(tmp_path / "other"))
    assert [path.name for path in mine.files()] == [TRIAL.target.file]


def test_a_file_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(UsageError, match="is a file"):
        Database(path).read()
    with pytest.raises(UsageError, match="Cannot write the database file"):
        Database(path).append(TRIAL)


def test_a_key_says_what_it_is() -> None:
    assert CHIP in TRIAL.target.file
    assert TRIAL.target.file.startswith("llvm-x86-64-v4-some-chip-tvm0.")
