"""Work directories: nothing is lost, mixed up, half written or wrongly deleted."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from gqsa_compiler.compress.work import statefile
from gqsa_compiler.compress.work.atomic import replacing
from gqsa_compiler.compress.work.workdir import WorkDirectory, work_path
from gqsa_compiler.compress.work.worksettings import difference
from gqsa_compiler.errors import GqsaError, UsageError

SETTINGS: dict[str, Any] = {"recipe": {"bits": 4, "block": {"epochs": 2.0}}, "seed": 0}


def states() -> dict[str, Tensor]:
    return {
        "tokens": torch.arange(12).view(3, 4),
        "keep": torch.tensor([True, False, True]),
        "codes": torch.arange(16, dtype=torch.uint8),
        "hidden": torch.tensor([[1.5, float("nan")], [-0.0, float("inf")]]),
        "half": torch.tensor([1.5, 65504.0], dtype=torch.float16),
        "brain": torch.tensor([1.0, 3e38], dtype=torch.bfloat16),
        "scalar": torch.tensor(7, dtype=torch.int32),
        "empty": torch.empty(0, 4),
        "turned": torch.arange(6.0).view(2, 3).t(),
    }


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def begun(path: Path, *saved: str) -> Path:
    """Make a work directory with states and leave it."""
    with WorkDirectory.open(path, SETTINGS) as work:
        for name in saved:
            work.save(name, {"x": torch.ones(2)}, {"step": 1})
    return path


def test_states_come_back_bit_for_bit(tmp_path: Path) -> None:
    metadata: dict[str, str | int | float] = {
        "step": 3,
        "loss": 0.1 + 0.2,
        "stage": "scales – größer",
    }
    saved = states()
    with WorkDirectory.open(tmp_path / "w", SETTINGS) as work:
        work.save("block-003", saved, metadata)
        assert work.has("block-003")
        assert not work.has("block-004")
        assert work.load("block-004") is None
        loaded = work.load("block-003")
    assert loaded is not None
    tensors, found = loaded
    assert found == metadata
    assert list(tensors) == sorted(saved)
    for name, tensor in saved.items():
        assert tensors[name].dtype == tensor.dtype
        assert tensors[name].shape == tensor.shape
        same = tensors[name].contiguous().view(-1).view(torch.uint8)
        assert torch.equal(same, tensor.contiguous().view(-1).view(torch.uint8))


def test_a_loaded_state_is_memory_of_its_own(tmp_path: Path) -> None:
    with WorkDirectory.open(tmp_path / "w", SETTINGS) as work:
        work.save("a", {"x": torch.zeros(3)}, {})
        first, _ = work.load("a") or ({}, {})
        work.save("a", {"x": torch.ones(3)}, {})
        first["x"] += 5
        second, _ = work.load("a") or ({}, {})
    assert first["x"].tolist() == [5, 5, 5]
    assert second["x"].tolist() == [1, 1, 1]


def test_loading_holds_every_tensor_once(tmp_path: Path) -> None:
    script = (
        "import re, sys, torch\n"
        "from gqsa_compiler.compress.work.workdir import WorkDirectory\n"
        "torch.set_num_threads(1)\n"
        "work = WorkDirectory.open(sys.argv[1], {})\n"
        "work.load('small')\n"
        "def peak():\n"  # ru_maxrss would have the parent's
        "    return int(re.search('VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
        "before = peak()\n"
        "kept = work.load('large')\n"
        "print(peak() - before)\n"
    )
    with WorkDirectory.open(tmp_path / "w", {}) as work:
        work.save("small", {"x": torch.ones(10)}, {})
        work.save("large", {str(i): torch.ones(8 << 20) for i in range(3)}, {})
    grown = int(subprocess.check_output([sys.executable, "-c", script, str(tmp_path / "w")]))
    assert 90 < grown / 1024 < 115  # MiB; the state has 96


def test_it_goes_on_with_equal_settings(tmp_path: Path) -> None:
    path = begun(tmp_path / "w", "block-000", "block-001")
    with WorkDirectory.open(path, {"seed": 0, "recipe": SETTINGS["recipe"]}) as work:
        assert work.resumed
        assert work.names() == ["block-000", "block-001"]
        work.remove("block-001")
        work.remove("block-001")
        assert work.names() == ["block-000"]


def test_a_new_directory_is_not_resumed_and_its_parents_are_made(tmp_path: Path) -> None:
    with WorkDirectory.open(tmp_path / "a" / "w", SETTINGS) as work:
        assert not work.resumed
        assert work.names() == []
        assert work.log_path == work.path / "compression.jsonl"


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    path = begun(tmp_path / "w", "a")
    other = {"recipe": {"bits": 4, "block": {"epochs": 3.0}}, "seed": 0}
    with pytest.raises(UsageError) as caught:
        WorkDirectory.open(path, other)
    message = str(caught.value)
    assert "recipe.block.epochs was 2.0 and is now 3.0" in message
    assert "settings that it was begun with" in message
    assert "--restart" in message
    begun(path)
    assert names(path) == ["a.state.safetensors", "lock", "settings.json"]


def test_other_settings_lose_nothing_where_no_state_is(tmp_path: Path) -> None:
    path = tmp_path / "w"
    work = WorkDirectory.open(path, SETTINGS)
    work.log_path.write_text("{}\n")
    os.close(work._lock or -1)  # as if it were killed
    with WorkDirectory.open(path, {"seed": 1}) as work:
        assert not work.resumed
        assert not work.log_path.exists()


def test_restart_discards_states_and_log(tmp_path: Path) -> None:
    path = begun(tmp_path / "w", "a", "b")
    (path / "compression.jsonl").write_text("{}\n")
    with WorkDirectory.open(path, {"seed": 1}, restart=True) as work:
        assert not work.resumed
        assert names(path) == ["lock", "settings.json"]
        work.save("a", {}, {})
    with WorkDirectory.open(path, {"seed": 1}) as work:
        assert work.resumed


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ({"a": 1}, {"a": 1.0}, None),
        ({"a": (1, 2)}, {"a": (1, 2)}, None),
        ({"a": 1}, {"a": True}, ("a", "1", "true")),
        ({"a": 1}, {}, ("a", "1", "not set")),
        ({}, {"b": None}, ("b", "not set", "null")),
        ({"a": {"b": [1]}}, {"a": {"b": [2]}}, ("a.b", "[1]", "[2]")),
        ({"a": 1, "b": 2}, {"b": 3, "a": 4}, ("b", "2", "3")),
    ],
)
def test_the_first_difference_is_found(before: Any, now: Any, expected: Any) -> None:
    assert difference(before, now) == expected


def test_long_values_are_cut_in_the_message() -> None:
    found = difference({"text": "x" * 500}, {"text": "y"})
    assert found is not None
    assert len(found[1]) == 60


@pytest.mark.parametrize("name", ["", "../a", "a/b", ".hidden", "a b", "x" * 101])
def test_state_names_stay_in_the_directory(tmp_path: Path, name: str) -> None:
    with (
        WorkDirectory.open(tmp_path / "w", SETTINGS) as work,
        pytest.raises(ValueError, match="name a state"),
    ):
        work.save(name, {}, {})


def test_the_work_lies_beside_the_output(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert work_path(tmp_path / "link" / "out") == tmp_path / "real" / "out.work"


# Whose directory it is.


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize(
    "content", [{"notes.txt": "mine"}, {"settings.json": "{}"}, {"lock": "", "a": ""}]
)
def test_somebody_elses_directory_is_left_alone(
    tmp_path: Path, content: dict[str, str], restart: bool
) -> None:
    path = tmp_path / "w"
    path.mkdir()
    for name, text in content.items():
        (path / name).write_text(text)
    with pytest.raises(UsageError, match="not a work directory"):
        WorkDirectory.open(path, SETTINGS, restart=restart)
    assert {name: (path / name).read_text() for name in names(path)} == content


def test_a_file_in_its_place_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "w").write_text("mine")
    with pytest.raises(UsageError, match="is a file"):
        WorkDirectory.open(tmp_path / "w", SETTINGS, restart=True)
    with pytest.raises(UsageError, match="is a file"):
        WorkDirectory.open(tmp_path / "w" / "below", SETTINGS)
    assert (tmp_path / "w").read_text() == "mine"


def test_damaged_settings_delete_nothing(tmp_path: Path) -> None:
    path = begun(tmp_path / "w", "a")
    (path / "settings.json").write_text('{"format": "gqsa-comp')
    with pytest.raises(UsageError, match="delete it yourself"):
        WorkDirectory.open(path, SETTINGS, restart=True)
    assert (path / "a.state.safetensors").exists()


def test_another_version_is_named_and_kept(tmp_path: Path) -> None:
    path = begun(tmp_path / "w", "a")
    text = (path / "settings.json").read_text().replace('"version": 1', '"version": 9')
    (path / "settings.json").write_text(text)
    (path / "a.state.safetensors").rename(path / "a.later")
    with pytest.raises(UsageError, match="its format is 9, this program's is 1"):
        WorkDirectory.open(path, SETTINGS)
    assert names(path) == ["a.later", "lock", "settings.json"]
    with WorkDirectory.open(path, SETTINGS, restart=True) as work:
        assert not work.resumed


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_without_permission_is_named(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UsageError, match=r"Cannot use .*locked"):
        WorkDirectory.open(tmp_path / "locked" / "w", SETTINGS)


# The end.


def test_finish_removes_everything(tmp_path: Path) -> None:
    path = begun(tmp_path / "w", "a", "b")
    with WorkDirectory.open(path, SETTINGS) as work:
        work.log_path.write_text("{}\n")
        (path / "c.state.safetensors.tmp").write_text("")
        assert work.finish() == ()
        assert not path.exists()
        assert work.finish() == ()
    assert names(tmp_path) == []


def test_finish_leaves_the_files_of_others(tmp_path: Path) -> None:
    path = begun(tmp_path / "w", "a")
    (path / "model.safetensors").write_text("mine")
    with WorkDirectory.open(path, SETTINGS) as work:
        assert work.finish() == (path / "model.safetensors",)
    assert names(path) == ["model.safetensors"]


def test_a_run_without_a_state_leaves_nothing(tmp_path: Path) -> None:
    def run() -> None:
        with WorkDirectory.open(tmp_path / "w", SETTINGS) as work:
            work.log_path.write_text("{}\n")
            raise UsageError("the text is too short")

    with pytest.raises(UsageError, match="too short"):
        run()
    assert names(tmp_path) == []


def test_a_directory_that_was_deleted_meanwhile_is_an_error(tmp_path: Path) -> None:
    with WorkDirectory.open(tmp_path / "w", SETTINGS) as work:
        (tmp_path / "w").rename(tmp_path / "elsewhere")
        with pytest.raises(GqsaError, match="Cannot write"):
            work.save("a", {"x": torch.ones(2)}, {})
    assert names(tmp_path) == ["elsewhere"]


# Kills, at every point that is a state of its own.


def test_a_kill_while_the_directory_is_made(tmp_path: Path) -> None:
    path = tmp_path / "w"
    path.mkdir()
    for file in ("lock", "settings.json.tmp"):
        (path / file).write_text("")
        with WorkDirectory.open(path, SETTINGS) as work:
            assert not work.resumed
        path.mkdir()


@pytest.mark.parametrize("calls", range(5))
def test_a_kill_while_it_is_discarded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    path = begun(tmp_path / "w", "a", "b")
    (path / "compression.jsonl").write_text("{}\n")
    unlink, left = Path.unlink, [calls]

    def failing(self: Path, missing_ok: bool = False) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        unlink(self, missing_ok=missing_ok)

    work = WorkDirectory.open(path, SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", failing)
        with pytest.raises(KeyboardInterrupt):
            work.finish()
    # Also with the old settings: no state of a half removed run is used.
    with WorkDirectory.open(path, SETTINGS) as work:
        assert not work.resumed
        assert names(path) == ["lock", "settings.json"]


def run_script(script: str, path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_second_run_is_refused_and_kill_9_while_saving_keeps_the_older_state(
    tmp_path: Path,
) -> None:
    script = (
        "import os, sys, time, torch\n"
        "from gqsa_compiler.compress.work import atomic\n"
        "from gqsa_compiler.compress.work.workdir import WorkDirectory\n"
        "work = WorkDirectory.open(sys.argv[1], {})\n"
        "work.save('a', {'x': torch.zeros(1000)}, {'step': 1})\n"
        "def wait(path):\n"
        "    os.truncate(path, 2000)\n"  # half of it has reached the disk
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "atomic._sync = wait\n"
        "work.save('a', {'x': torch.ones(1000)}, {'step': 2})\n"
    )
    process = run_script(script, tmp_path / "w")
    for restart in (False, True):
        with pytest.raises(UsageError, match=r"Another run is using .*w; wait"):
            WorkDirectory.open(tmp_path / "w", {}, restart=restart)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert (tmp_path / "w" / "a.state.safetensors.tmp").exists()
    # The lock went with the process.
    with WorkDirectory.open(tmp_path / "w", {}) as work:
        tensors, metadata = work.load("a") or ({}, {})
        assert metadata == {"step": 1}
        assert tensors["x"].sum() == 0
        assert names(work.path) == ["a.state.safetensors", "lock", "settings.json"]


def test_kill_9_at_any_moment_leaves_whole_states(tmp_path: Path) -> None:
    script = (
        "import sys, torch\n"
        "from gqsa_compiler.compress.work.workdir import WorkDirectory\n"
        "work = WorkDirectory.open(sys.argv[1], {})\n"
        "step = 0\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    step += 1\n"
        "    work.save('a', {'x': torch.full((300_000,), float(step))}, {'step': step})\n"
    )
    process = run_script(script, tmp_path / "w")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.1)
    process.kill()
    process.communicate(timeout=30)
    with WorkDirectory.open(tmp_path / "w", {}) as work:
        tensors, metadata = work.load("a") or ({"x": torch.zeros(1)}, {"step": 0})
        assert set(tensors["x"].tolist()) == {metadata["step"]}
        assert not [name for name in names(work.path) if name.endswith(".tmp")]


def test_a_lock_file_that_was_removed_meanwhile_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = begun(tmp_path / "w", "a")
    flock = fcntl.flock
    calls: list[int] = []

    def late(handle: int, mode: int) -> None:
        if not calls:
            (path / "lock").unlink()  # the run before ends now
        calls.append(handle)
        flock(handle, mode)

    monkeypatch.setattr(fcntl, "flock", late)
    with WorkDirectory.open(path, SETTINGS) as work:
        assert len(calls) == 2
        assert work.resumed
        with pytest.raises(UsageError, match="Another run"):
            WorkDirectory.open(path, SETTINGS)


# Disks.


def test_a_full_disk_is_one_sentence_and_it_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_tensors: object, path: Path, _metadata: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with WorkDirectory.open(tmp_path / "w", SETTINGS) as work:
        work.save("a", {"x": torch.zeros(2)}, {})
        monkeypatch.setattr(statefile, "save_file", full)
        with pytest.raises(GqsaError, match=f"No space left on the disk of {work.path} ") as caught:
            work.save("a", {"x": torch.ones(100_000)}, {})
        monkeypatch.undo()
        assert caught.value.exit_code == 1
        assert "same command again" in str(caught.value)
        assert names(work.path) == ["a.state.safetensors", "lock", "settings.json"]
        tensors, _ = work.load("a") or ({}, {})
        assert tensors["x"].tolist() == [0, 0]
        work.save("a", {"x": torch.ones(2)}, {})


def test_a_full_disk_at_the_start_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(GqsaError, match="No space left"):
            WorkDirectory.open(tmp_path / "w", SETTINGS)
    assert names(tmp_path) == []
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", full)
        with pytest.raises(GqsaError, match="No space left"):
            WorkDirectory.open(tmp_path / "w", SETTINGS)


def test_a_file_size_limit_is_an_error_too(tmp_path: Path) -> None:
    script = (
        "import resource, signal, sys, torch\n"
        "from gqsa_compiler.compress.work.workdir import WorkDirectory\n"
        "from gqsa_compiler.errors import GqsaError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "work = WorkDirectory.open(sys.argv[1], {})\n"
        "work.save('small', {}, {})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    work.save('large', {'x': torch.ones(10_000)}, {})\n"
        "except GqsaError as error:\n"
        "    print(error, work.names())\n"
    )
    text = subprocess.check_output([sys.executable, "-c", script, str(tmp_path / "w")], text=True)
    assert text.startswith("Cannot write ")
    assert "File too large" in text
    assert text.endswith("['small']\n")
    assert names(tmp_path / "w") == ["lock", "settings.json", "small.state.safetensors"]


@pytest.mark.parametrize("damage", ["cut", "flip", "metadata", "empty", "foreign"])
def test_a_damaged_state_is_an_error(tmp_path: Path, damage: str) -> None:
    with WorkDirectory.open(tmp_path / "w", SETTINGS) as work:
        work.save("a", {"x": torch.ones(100), "y": torch.zeros(3)}, {"step": 100})
        file = work.path / "a.state.safetensors"
        data = file.read_bytes()
        changed = {
            "cut": data[:-5],
            "flip": data[:-5] + b"\1" + data[-4:],
            "metadata": data.replace(b"100}", b"108}"),
            "empty": b"",
            "foreign": (2).to_bytes(8, "little") + b"{}",
        }[damage]
        assert changed != data
        file.write_bytes(changed)
        with pytest.raises(GqsaError, match=rf"{file} is damaged.*--restart"):
            work.load("a")


def test_an_interrupt_while_saving_leaves_no_temporary_file(tmp_path: Path) -> None:
    def run() -> None:
        with replacing(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert names(tmp_path) == []


def test_a_tensor_that_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    with (
        WorkDirectory.open(tmp_path / "w", SETTINGS) as work,
        pytest.raises(TypeError, match="'x'"),
    ):
        work.save("a", {"x": torch.zeros(2, dtype=torch.complex64)}, {})
