"""Run logs: every line is whole, and work done again counts once."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gqsa_compiler.compress.work.runevents import (
    Block,
    Calibration,
    Event,
    Finish,
    Phase,
    Resume,
    Start,
    Step,
    from_line,
    to_line,
)
from gqsa_compiler.compress.work.runlog import LOG_FILE, RunLog, RunRecord, read_log
from gqsa_compiler.errors import GqsaError


def block(index: int, loss: float = 0.5) -> Block:
    return Block(index, 4, f"model.layers.{index}", loss, loss / 2, {"mlp.up_proj": 0.5}, 2.0)


def step(number: int, stage: str = "scales", seconds: float = 1.0) -> Step:
    return Step(stage, number, 100, 2.5, 0.5, None, {"scales": 1e-3}, 64 * number, seconds, 9.0)


EVENTS: list[Event] = [
    Start({"model": "größer", "recipe": {"bits": 4}}, "0.1.0"),
    Resume("block 3"),
    Calibration("sampled", 8, 1024, 3.5),
    block(0),
    Block(1, 4, "model.layers.1", 0.5, None, {}, 2.0),
    step(7),
    Finish(10.0, 160, {"codes": 60, "scales": 20}, 11, 400),
]


def log(path: Path, *events: Event) -> RunRecord:
    with RunLog(path) as writer:
        for event in events:
            writer.write(event)
    return read_log(path)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.kind)
def test_events_come_back(event: Event) -> None:
    line = to_line(event)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    time, found = from_line(line)
    assert found == event
    assert time.endswith("+00:00")


def test_lines_are_json_that_others_read() -> None:
    content = json.loads(to_line(step(3)))
    assert content["event"] == "step"
    assert content["rates"] == {"scales": 1e-3}
    assert content["ce"] is None


def test_numbers_that_are_not_finite_stay_json() -> None:
    event = block(0, math.inf)
    line = to_line(event)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    json.loads(line, parse_constant=refuse)
    assert from_line(line)[1] == event
    found = from_line(to_line(block(0, math.nan)))[1]
    assert isinstance(found, Block)
    assert math.isnan(found.loss_before)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[]",
        b"\0\0\0",
        b"\xff",
        b'{"event": "resume", "at": "x"}',
        b'{"time": "t", "event": "resume"}',
        b'{"time": "t", "event": "resume", "at": 3}',
        b'{"time": "t", "event": "calibration", "source": "", "samples": true, "tokens": 1, '
        b'"seconds": 1}',
        b'{"time": "t", "event": "start", "settings": []}',
        b'{"time": "t", "event": "calibration", "source": "", "samples": 1, "tokens": 1, '
        b'"seconds": 1' + b"0" * 400 + b"}",
        b"[" * 100_000,
    ],
)
def test_other_lines_are_refused_by_the_parser_and_passed_over_by_the_reader(
    tmp_path: Path, line: bytes
) -> None:
    with pytest.raises((ValueError, OverflowError, RecursionError)):
        from_line(line)
    path = tmp_path / "log"
    path.write_bytes(to_line(block(0)) + line + b"\n" + to_line(block(1)))
    record = read_log(path)
    assert [b.index for b in record.blocks] == [0, 1]
    assert record.unreadable == 1


def test_kinds_and_fields_of_later_versions_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(
        '{"time": "t", "event": "new kind"}\n'
        '{"time": "u", "event": "resume", "at": "x", "new": 1}\n'
    )
    record = read_log(path)
    assert record.resumed == (Resume("x"),)
    assert record.unreadable == 0
    assert (record.begun, record.ended) == ("t", "u")


def test_a_record_has_everything(tmp_path: Path) -> None:
    record = log(tmp_path / "log", *EVENTS)
    assert record.start == EVENTS[0]
    assert record.resumed == (EVENTS[1],)
    assert record.calibration == EVENTS[2]
    assert record.blocks == tuple(EVENTS[3:5])
    assert record.steps == {"scales": (EVENTS[5],)}
    assert record.finish == EVENTS[6]
    assert record.finish.bits_per_weight == 4.0
    assert record.begun <= record.ended


def test_an_empty_log_is_an_empty_record(tmp_path: Path) -> None:
    assert log(tmp_path / "log") == RunRecord()


def test_a_log_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GqsaError, match="Cannot read the run log"):
        read_log(tmp_path / "log")
    with pytest.raises(GqsaError, match="Cannot write the run log"):
        RunLog(tmp_path / "none" / "log")


def test_work_done_again_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log(path, EVENTS[0], block(0, 0.1), block(1, 0.2), block(2, 0.3))
    record = log(path, Resume("block 1"), block(1, 0.4))
    assert [(b.index, b.loss_before) for b in record.blocks] == [(0, 0.1), (1, 0.4)]
    assert record.start == EVENTS[0]


def test_steps_done_again_count_once_also_at_other_steps(tmp_path: Path) -> None:
    # Lines at other steps than before: what lies after the step gone back to is done again too.
    path = tmp_path / "log"
    log(path, step(50, "weights"), step(10), step(20), step(33), step(47))
    record = log(path, Resume("step 20"), step(31), step(41))
    assert [s.step for s in record.steps["scales"]] == [10, 20, 31, 41]
    assert [s.step for s in record.steps["weights"]] == [50]
    assert list(record.steps) == ["weights", "scales"]


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_a_last_line_that_was_cut_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "log"
    log(path, block(0), block(1))
    path.write_bytes(path.read_bytes()[:-cut])
    record = read_log(path)
    assert [b.index for b in record.blocks] == [0]
    assert record.unreadable == 0
    record = log(path, block(1, 0.7))
    assert [b.loss_before for b in record.blocks] == [0.5, 0.7]
    assert record.unreadable == 0


def test_lines_are_there_at_once_and_survive_kill_9(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from gqsa_compiler.compress.work.runevents import Resume\n"
        "from gqsa_compiler.compress.work.runlog import RunLog\n"
        "log = RunLog(Path(sys.argv[1]))\n"
        "log.write(Resume('here'))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    path = tmp_path / "log"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert read_log(path).resumed == (Resume("here"),)


def test_a_full_disk_leaves_whole_lines_and_it_can_go_on(tmp_path: Path) -> None:
    script = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from gqsa_compiler.compress.work.runevents import Resume\n"
        "from gqsa_compiler.compress.work.runlog import RunLog\n"
        "from gqsa_compiler.errors import GqsaError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "log = RunLog(Path(sys.argv[1]))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, -1))\n"
        "try:\n"
        "    for number in range(100):\n"
        "        log.write(Resume(str(number)))\n"
        "except GqsaError as error:\n"
        "    print(error)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))\n"
        "log.write(Resume('again'))\n"
    )
    path = tmp_path / "log"
    text = subprocess.check_output([sys.executable, "-c", script, str(path)], text=True)
    assert text == f"Cannot write the run log {path}: File too large.\n"
    record = read_log(path)
    assert record.unreadable == 0
    assert len(record.resumed) > 5
    assert record.resumed[-1] == Resume("again")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_handle: int, data: bytes) -> int:
        with Path("/dev/full").open("wb", buffering=0) as file:
            return file.write(data) or 0

    with RunLog(tmp_path / "log") as writer:
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(GqsaError, match=r"No space left on the disk.*same command again"):
            writer.write(block(0))


def test_names_that_are_no_text_are_written(tmp_path: Path) -> None:
    record = log(tmp_path / "log", Start({"model": "a\udcffb\nc"}))
    assert record.start == Start({"model": "a?b\nc"})


def test_the_last_line_of_a_phase_counts(tmp_path: Path) -> None:
    path = tmp_path / LOG_FILE
    with RunLog(path) as log:
        log.write(Phase("measuring", 3.0, {"loss": 1.0}))
        log.write(Phase("dense", 2.0, {}))
        log.write(Phase("measuring", 4.0, {"loss": 0.5}))
    assert read_log(path).phases == (
        Phase("measuring", 4.0, {"loss": 0.5}),
        Phase("dense", 2.0, {}),
    )
