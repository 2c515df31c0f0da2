"""Output directories appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from gqsa_compiler import outdir
from gqsa_compiler.errors import CompileError, GqsaError, UsageError
from gqsa_compiler.outdir import check_output, disk_full, staged_directory


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


OLD = json.dumps({"model_type": "llama", "quantization_config": {"quant_method": "gqsa"}})


def old_output(path: Path, name: str = "config.json", mark: str = OLD) -> Path:
    path.mkdir()
    (path / name).write_text(mark)
    (path / "stale").write_text("old")
    return path


def test_the_directory_appears_when_the_block_ends(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staged_directory(out) as staging:
        (staging / "a").write_text("1")
        assert not out.exists()
        assert staging.parent == tmp_path
        assert staging.name.startswith("out.tmp-")
    assert (out / "a").read_text() == "1"
    assert names(tmp_path) == ["out"]


def test_it_has_the_permissions_of_any_new_directory(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with staged_directory(tmp_path / "out"):
        pass
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "out")}
    assert len(modes) == 1


@pytest.mark.parametrize(
    "error", [RuntimeError("x"), KeyboardInterrupt(), SystemExit(3), CompileError("y")]
)
def test_nothing_is_left_on_an_exception(tmp_path: Path, error: BaseException) -> None:
    def run() -> None:
        with staged_directory(tmp_path / "new" / "deep" / "out") as staging:
            (staging / "sub").mkdir()
            (staging / "sub" / "a").write_text("1")
            raise error

    with pytest.raises(type(error)) as caught:
        run()
    assert caught.value is error
    assert names(tmp_path) == []


def test_missing_parents_are_made(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "new" / "deep" / "out"):
        pass
    assert (tmp_path / "new" / "deep" / "out").is_dir()


def test_parents_that_somebody_else_uses_meanwhile_stay(tmp_path: Path) -> None:
    def run() -> None:
        with staged_directory(tmp_path / "new" / "out"):
            (tmp_path / "new" / "other").write_text("1")
            raise CompileError("x")

    with pytest.raises(CompileError):
        run()
    assert names(tmp_path / "new") == ["other"]


def test_an_interrupted_process_leaves_nothing(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from gqsa_compiler.outdir import staged_directory\n"
        "with staged_directory(sys.argv[1]) as staging:\n"
        "    (staging / 'a').write_text('1')\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert names(tmp_path) == []


def test_an_existing_directory_is_refused_even_when_empty(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (
        pytest.raises(UsageError, match=r"out exists; .*--overwrite"),
        staged_directory(tmp_path / "out"),
    ):
        pass
    assert names(tmp_path) == ["out"]


def test_a_directory_made_meanwhile_is_kept(tmp_path: Path) -> None:
    def run() -> None:
        with staged_directory(tmp_path / "out"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").write_text("1")

    with pytest.raises(UsageError, match="exists"):
        run()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["theirs"]


@pytest.mark.parametrize("exchange", [True, False])
def test_overwrite_replaces_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:  # as on a system without renameat2
        monkeypatch.setattr(outdir, "_exchange", lambda *_: False)
    out = old_output(tmp_path / "out")
    with staged_directory(out, overwrite=True) as staging:
        (staging / "config.json").write_text("new")
        assert (out / "config.json").read_text() == OLD
    assert names(out) == ["config.json"]
    assert (out / "config.json").read_text() == "new"
    assert names(tmp_path) == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_linux_exchanges_in_one_step(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "was_a").touch()
    assert outdir._exchange(tmp_path / "a", tmp_path / "b")
    assert names(tmp_path / "b") == ["was_a"]
    with pytest.raises(FileNotFoundError):
        outdir._exchange(tmp_path / "a", tmp_path / "c")


def test_overwrite_keeps_the_old_on_an_exception(tmp_path: Path) -> None:
    out = old_output(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt), staged_directory(out, overwrite=True):
        raise KeyboardInterrupt
    assert names(out) == ["config.json", "stale"]
    assert names(tmp_path) == ["out"]


def test_a_failed_replacement_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = old_output(tmp_path / "out")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.startswith("out.tmp-"):
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(outdir, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", fail)
    with (
        pytest.raises(UsageError, match=r"Cannot replace .*out: Device or resource busy"),
        staged_directory(out, overwrite=True),
    ):
        pass
    assert names(out) == ["config.json", "stale"]
    assert names(tmp_path) == ["out"]


def test_overwrite_spares_directories_that_are_no_outputs(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with (
        pytest.raises(UsageError, match="home is not overwritten"),
        staged_directory(tmp_path / "home", overwrite=True),
    ):
        pass
    assert names(tmp_path / "home") == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    with staged_directory(tmp_path / "empty", overwrite=True) as staging:
        (staging / "a").touch()
    assert names(tmp_path / "empty") == ["a"]


@pytest.mark.parametrize(
    ("name", "mark"),
    [
        ("config.json", json.dumps({"model_type": "llama"})),  # somebody's dense model
        ("config.json", json.dumps({"quantization_config": {"quant_method": "gptq"}})),
        ("config.json", json.dumps({"quantization_config": "gqsa"})),
        ("config.json", json.dumps(["gqsa"])),
        ("config.json", "gqsa"),
        ("config.json", "[" * 100_000),
        ("config.json", '{"a": "\udce9"}'),
        ("manifest.json", json.dumps({"name": "a web application"})),
        ("manifest.json", "{"),
    ],
)
def test_overwrite_spares_what_only_looks_like_an_output(
    tmp_path: Path, name: str, mark: str
) -> None:
    out = tmp_path / "theirs"
    out.mkdir()
    (out / name).write_bytes(mark.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match="neither a GQSA checkpoint nor a compiled artefact"):
        check_output(out, overwrite=True)
    assert names(out) == [name]


def test_overwrite_spares_a_mark_that_is_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outdir, "_MAX_MARK_BYTES", 10)
    with pytest.raises(UsageError, match="not overwritten"):
        check_output(old_output(tmp_path / "out"), overwrite=True)


def test_overwrite_replaces_an_artefact(tmp_path: Path) -> None:
    out = old_output(tmp_path / "out", "manifest.json", json.dumps({"format": "gqsa-artefact"}))
    with staged_directory(out, overwrite=True):
        pass
    assert names(out) == []


def test_what_the_output_is_made_from_is_protected(tmp_path: Path) -> None:
    model = old_output(tmp_path / "model")
    parent = old_output(tmp_path / "parent")
    inner = old_output(parent / "deep")
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "weights").symlink_to(inner / "stale")
    for output, given, verb in (
        (model, model, "is"),
        (tmp_path / "link", model, "is"),
        (model, tmp_path / "link", "is"),
        (parent, inner, "contains"),
        (parent, inner / "stale", "contains"),
        (parent, tmp_path / "weights", "contains"),
        (tmp_path, model, "contains"),
        (model / "new" / "out", model, "lies inside"),
        (tmp_path / "link" / "out", model, "lies inside"),
        (inner, parent, "lies inside"),
    ):
        for overwrite in (True, False):
            with pytest.raises(UsageError, match=rf"output .* {verb} the input .*; choose a"):
                check_output(output, overwrite, protect=("smollm2-135m", given))
    check_output(model, True, protect=("smollm2-135m", inner))
    check_output(parent / "out", protect=(inner / "stale", parent / "out"))  # beside a file


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_file_in_the_way_is_refused(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out").write_text("x")
    for path in (tmp_path / "out", tmp_path / "out" / "sub" / "dir"):
        with pytest.raises(UsageError, match="out"), staged_directory(path, overwrite=overwrite):
            pass
    assert (tmp_path / "out").read_text() == "x"
    assert names(tmp_path) == ["out"]


def test_a_root_is_no_output() -> None:
    with pytest.raises(UsageError, match="cannot be an output"), staged_directory("/"):
        pass


def test_a_link_keeps_pointing_at_the_new_output(tmp_path: Path) -> None:
    old_output(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    with staged_directory(tmp_path / "link", overwrite=True) as staging:
        (staging / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == ["new"]


def test_a_long_name_still_fits(tmp_path: Path) -> None:
    with staged_directory(tmp_path / ("x" * 250)):
        pass
    assert names(tmp_path) == ["x" * 250]


@pytest.mark.parametrize("name", ["x" * 300, "é" * 150, "sub/" + "x" * 300 + "/out"])
def test_a_name_that_is_too_long_is_refused_at_once(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"has 300 bytes, and .* takes names of at most 255"):
        check_output(tmp_path / name)
    with pytest.raises(UsageError, match=r"Cannot create .*File name too long"):
        check_output(tmp_path / "/".join(["y" * 200] * 25))
    assert names(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_without_permission_is_named(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with (
        pytest.raises(UsageError, match=r"Cannot create .*locked"),
        staged_directory(tmp_path / "locked" / "out"),
    ):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_becomes_one_sentence(tmp_path: Path) -> None:
    def run() -> None:
        with staged_directory(tmp_path / "out") as staging:
            (staging / "a").symlink_to("/dev/full")
            (staging / "a").write_text("x")

    with pytest.raises(GqsaError, match=f"No space left on the disk of {tmp_path} ") as caught:
        run()
    assert caught.value.exit_code == 1
    assert names(tmp_path) == []


def test_a_full_disk_elsewhere_is_named_there(tmp_path: Path) -> None:
    with (
        pytest.raises(GqsaError, match=r"the disk of /elsewhere/tmp while writing .*out;"),
        staged_directory(tmp_path / "out"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device", "/elsewhere/tmp/x.o")


def test_a_full_disk_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(GqsaError, match="No space left"), staged_directory(tmp_path / "out"):
        pass


def test_disk_full_is_recognised_behind_other_errors() -> None:
    assert disk_full(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert disk_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    wrapped = RuntimeError("cannot save")
    wrapped.__cause__ = OSError(errno.ENOSPC, "x")
    assert disk_full(wrapped)
    assert not disk_full(OSError(errno.EACCES, "Permission denied"))
    assert not disk_full(KeyboardInterrupt())


def test_leftovers_of_the_replaced_output_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = old_output(tmp_path / "out")
    monkeypatch.setattr(outdir.shutil, "rmtree", lambda *_args, **_kwargs: None)
    with (
        pytest.raises(GqsaError, match=r"out is written, .* delete .*out\.tmp-"),
        staged_directory(out, overwrite=True) as staging,
    ):
        (staging / "new").touch()
    assert names(out) == ["new"]
