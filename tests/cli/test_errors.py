"""Bad input: one clear sentence, the right exit code, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gqsa_compiler.cli import console
from tests.cli.conftest import Gqsa
from tests.tiny_checkpoints import make_checkpoint
from tests.tiny_models import make_tiny

FEW = ("--samples", "2", "--sequence-length", "16")


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("errors") / "dense", num_hidden_layers=2)


@pytest.fixture(scope="session")
def checkpoint(dense: Path) -> Path:
    return make_checkpoint(dense, dense.parent / "checkpoint")


@pytest.fixture
def model(dense: Path, tmp_path: Path) -> Path:
    """A dense model to damage."""
    return shutil.copytree(dense, tmp_path / "models" / "model")


@pytest.fixture
def compressed(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return shutil.copytree(checkpoint, tmp_path / "models" / "compressed")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Where to write: in a folder of its own, so that leftovers show."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    return folder / "out"


def _left(output: Path) -> list[str]:
    return sorted(path.name for path in output.parent.iterdir())


def _edit(path: Path, **fields: Any) -> None:
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **fields}))


def _refuses(
    gqsa: Gqsa, output: Path, code: int, message: str, verb: str, *words: str | Path
) -> None:
    done = gqsa(verb, *words, "-o", output)
    assert message in done.error
    assert done.code == code
    assert _left(output) == []


VERBS = pytest.mark.parametrize(
    "words", [("compress",), ("compile", "--recipe", "w4s30g16")], ids=("compress", "compile")
)


@VERBS
def test_missing_path(gqsa: Gqsa, output: Path, words: tuple[str, ...], tmp_path: Path) -> None:
    missing = tmp_path / "none"
    _refuses(gqsa, output, 2, f"{missing}: no such file or directory", *words, missing)


@VERBS
def test_empty_directory(gqsa: Gqsa, output: Path, words: tuple[str, ...], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    _refuses(gqsa, output, 1, "empty directory", *words, empty)


@VERBS
def test_unknown_architecture(
    gqsa: Gqsa, output: Path, words: tuple[str, ...], model: Path
) -> None:
    _edit(model / "config.json", model_type="mamba", architectures=["MambaForCausalLM"])
    _refuses(gqsa, output, 1, "mamba", *words, model)


@VERBS
@pytest.mark.parametrize(
    ("quantization", "kind"),
    [
        ({"quant_method": "gptq", "bits": 4}, "marked as quantised by GPTQ"),
        ({"quant_method": "awq", "bits": 4}, "marked as quantised by AWQ"),
        ({"quant_method": "compressed-tensors"}, "quantised by compressed-tensors, but"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "a bitsandbytes checkpoint"),
        ({"quant_method": ["gptq"]}, "quantised checkpoint"),
    ],
)
def test_other_quantisers(
    gqsa: Gqsa,
    output: Path,
    words: tuple[str, ...],
    model: Path,
    quantization: dict[str, Any],
    kind: str,
) -> None:
    _edit(model / "config.json", quantization_config=quantization)
    _refuses(gqsa, output, 1, kind, *words, model)


@VERBS
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_position_embeddings": 0}, "'max_position_embeddings' must be at least 1"),
        ({"hidden_act": "mish"}, "'hidden_act' is 'mish'; supported are"),
        ({"rope_parameters": {"rope_type": "ntk"}}, "has rope_type 'ntk'; supported are"),
        ({"tie_word_embeddings": "no"}, "'tie_word_embeddings' must be true or false"),
        ({"rms_norm_eps": float("nan")}, "'rms_norm_eps' must be a finite number"),
        ({"num_hidden_layers": 1_000_000}, "'num_hidden_layers' must be at most 1000"),
        ({"num_hidden_layers": 999}, "lacks the tensor 'model.layers.2."),
        ({"hidden_size": 10**30}, "'hidden_size' must be at most"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configuration_fields(
    gqsa: Gqsa,
    output: Path,
    words: tuple[str, ...],
    model: Path,
    fields: dict[str, Any],
    message: str,
) -> None:
    _edit(model / "config.json", **fields)
    _refuses(gqsa, output, 1, message, *words, model)


@VERBS
def test_truncated_safetensors(
    gqsa: Gqsa, output: Path, words: tuple[str, ...], model: Path
) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    _refuses(gqsa, output, 1, "model.safetensors", *words, model)


def test_truncated_checkpoint(gqsa: Gqsa, output: Path, compressed: Path) -> None:
    file = compressed / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    _refuses(gqsa, output, 1, "model.safetensors", "compile", compressed)
    done = gqsa("inspect", compressed)
    assert (done.code, "model.safetensors" in done.error) == (1, True)


def test_index_out_of_range(gqsa: Gqsa, output: Path, compressed: Path) -> None:
    name = "model.layers.1.mlp.up_proj"
    file = compressed / "model.safetensors"
    data = bytearray(file.read_bytes())
    (size,) = struct.unpack("<Q", data[:8])
    end = json.loads(data[8 : 8 + size])[f"{name}.indices"]["data_offsets"][1]
    data[8 + size + end - 2 : 8 + size + end] = b"\xff\xff"
    file.write_bytes(data)
    _refuses(gqsa, output, 1, name, "compile", compressed)
    done = gqsa("inspect", compressed)
    assert (done.code, name in done.error) == (1, True)


@pytest.mark.parametrize("verb", ["compress", "compile"])
@pytest.mark.parametrize(
    ("recipe", "message", "code"),
    [
        ("w4s30g64", "Groups of 64 do not divide the 96 inputs", 1),
        ("w4s96g16", "it must be 0 to 95", 2),
        ("w4s-5g16", "'w4s-5g16' is not a recipe", 2),
        ("w5s30g16", "bits is 5; it must be one of 2, 3, 4, 8", 2),
        ("w4s30g24", "group_size is 24; it must be one of 8, 16", 2),
        ("int4", "'int4' is not a recipe", 2),
    ],
)
def test_recipes(
    gqsa: Gqsa, output: Path, dense: Path, verb: str, recipe: str, message: str, code: int
) -> None:
    _refuses(gqsa, output, code, message, verb, dense, "--recipe", recipe)


def test_a_dense_model_needs_a_recipe(gqsa: Gqsa, output: Path, dense: Path) -> None:
    _refuses(gqsa, output, 2, "gqsa compress", "compile", dense)
    _refuses(gqsa, output, 2, "--recipe dense", "compile", dense)


def test_a_checkpoint_is_compressed_already(gqsa: Gqsa, output: Path, checkpoint: Path) -> None:
    message = "compressed already"
    _refuses(gqsa, output, 1, message, "compress", checkpoint)
    _refuses(gqsa, output, 2, message, "compile", checkpoint, "--recipe", "w4s30g16")


def test_unknown_target(gqsa: Gqsa, output: Path, checkpoint: Path) -> None:
    message = "Unknown target 'z80'; choose one of cpu"
    _refuses(gqsa, output, 2, message, "compile", checkpoint, "--target", "z80")


def test_calibration_file(gqsa: Gqsa, output: Path, dense: Path, tmp_path: Path) -> None:
    words = ("compress", dense, "--calibration")
    _refuses(gqsa, output, 2, "does not exist", *words, tmp_path / "none.txt")
    short = tmp_path / "short.txt"
    short.write_text("too short")
    _refuses(gqsa, output, 2, "short.txt", *words, short)
    # A number that is asked for has to fit, and the error says which would.
    short.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    lengths = ("--samples", "500", "--sequence-length", "16")
    _refuses(gqsa, output, 2, "fewer samples (--samples ", *words, short, *lengths)


@pytest.mark.parametrize("verb", ["compress", "compile"])
def test_the_output_exists(
    gqsa: Gqsa, output: Path, verb: str, dense: Path, checkpoint: Path
) -> None:
    output.mkdir()
    (output / "diary.txt").write_text("mine")
    model = dense if verb == "compress" else checkpoint
    for words in ((), ("--overwrite",)):
        done = gqsa(verb, model, "-o", output, *words)
        assert done.code == 2
        assert str(output) in done.error
        assert (output / "diary.txt").read_text() == "mine"
        assert _left(output) == ["out"]


@pytest.mark.parametrize("verb", ["compress", "compile"])
def test_the_model_survives_overwrite(
    gqsa: Gqsa, verb: str, model: Path, compressed: Path, tmp_path: Path
) -> None:
    given = model if verb == "compress" else compressed
    files = sorted(given.iterdir())
    mark = {"quantization_config": {"quant_method": "gqsa"}}
    (given.parent / "config.json").write_text(json.dumps(mark))
    (tmp_path / "link").symlink_to(given)
    for output in (given, given.parent, tmp_path / "link", given / "out"):
        done = gqsa(verb, given, "-o", output, "--overwrite")
        assert done.code == 2
        assert f"the input {given}" in done.error
        assert sorted(given.iterdir()) == files


def test_another_model_survives_overwrite(gqsa: Gqsa, checkpoint: Path, model: Path) -> None:
    files = sorted(model.iterdir())
    done = gqsa("compile", checkpoint, "-o", model, "--overwrite")
    assert (done.code, "is not overwritten" in done.error) == (2, True)
    assert sorted(model.iterdir()) == files


def test_the_calibration_text_survives_overwrite(gqsa: Gqsa, dense: Path, compressed: Path) -> None:
    text = compressed / "text.txt"
    text.write_text("many words")
    done = gqsa("compress", dense, "-o", compressed, "--calibration", text, "--overwrite")
    assert (done.code, f"contains the input {text}" in done.error) == (2, True)
    assert text.exists()


def test_the_interface_protects_the_model(compressed: Path, model: Path) -> None:
    from gqsa_compiler.compile import compile_model
    from gqsa_compiler.compress import compress_model
    from gqsa_compiler.errors import UsageError

    with pytest.raises(UsageError, match="is the input"):
        compile_model(str(compressed), compressed, overwrite=True)
    with pytest.raises(UsageError, match="is the input"):
        compress_model(str(model), model, "w4s30g16", overwrite=True)
    for given in (compressed, model):
        assert (given / "model.safetensors").exists()


def test_eval_refuses_what_compile_refuses(
    gqsa: Gqsa, output: Path, compressed: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    file = compressed / "model.safetensors"
    bias = {"model.layers.1.mlp.up_proj.bias": np.ones(96, np.float32)}
    save_file({**load_file(file), **bias}, file)
    message = "has the tensor 'model.layers.1.mlp.up_proj.bias'"
    _refuses(gqsa, output, 1, message, "compile", compressed)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    done = gqsa("eval", compressed, "--text", text)
    assert (done.code, message in done.error) == (1, True)


def _at(monkeypatch: pytest.MonkeyPatch, stage: str, act: Callable[[], None]) -> list[str]:
    """Do something in the middle of the stage of this name; return the stages that were seen."""
    seen: list[str] = []

    def progress(self: object, name: str, done: int, total: int) -> None:
        seen.append(name)
        if name == stage and (done > 0 or total <= 1):
            act()

    monkeypatch.setattr(console.PlainProgress, "__call__", progress)
    return seen


STAGES = pytest.mark.parametrize(
    ("verb", "stage"),
    [
        ("compress", "sampling calibration text"),
        ("compile", "importing the model"),
        ("compile", "generating code"),
    ],
)


def _words(verb: str, dense: Path, checkpoint: Path, output: Path) -> tuple[str | Path, ...]:
    if verb == "compress":
        return (verb, dense, "-o", output, *FEW)
    return (verb, checkpoint, "-o", output)


@STAGES
def test_ctrl_c_leaves_nothing(
    gqsa: Gqsa,
    monkeypatch: pytest.MonkeyPatch,
    output: Path,
    verb: str,
    stage: str,
    dense: Path,
    checkpoint: Path,
) -> None:
    seen = _at(monkeypatch, stage, lambda: signal.raise_signal(signal.SIGINT))
    done = gqsa(*_words(verb, dense, checkpoint, output))
    assert stage in seen
    assert done.code == 130
    assert done.error == "Interrupted."
    assert _left(output) == []


@pytest.mark.parametrize(
    ("verb", "stage", "left"),
    [
        ("compress", "sampling calibration text", []),
        ("compress", "compressing blocks", ["out.work"]),
        ("compile", "packing weights", []),
    ],
)
def test_no_space_leaves_nothing_but_work_to_go_on_with(
    gqsa: Gqsa,
    monkeypatch: pytest.MonkeyPatch,
    output: Path,
    verb: str,
    stage: str,
    left: list[str],
    dense: Path,
    checkpoint: Path,
) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _at(monkeypatch, stage, fail)
    done = gqsa(*_words(verb, dense, checkpoint, output))
    assert done.code == 1
    assert "No space left on the disk" in done.error
    assert ("run the same command again" in done.error) == (verb == "compress")
    assert _left(output) == left


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["compress", "compile"])
def test_a_full_disk(verb: str, dense: Path, checkpoint: Path, output: Path) -> None:
    """The real thing: a file system of 64 kB, in a mount namespace of the command's own."""
    isolate = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*isolate, "true"]).returncode != 0:
        pytest.skip("this system lets nobody mount a small file system (unshare --user --mount)")
    code = "from gqsa_compiler.cli.main import main; raise SystemExit(main())"
    words = map(str, _words(verb, dense, checkpoint, output))
    script = 'mount -t tmpfs -o size=64k tmpfs "$1"; shift; "$@"; s=$?; ls -A "$0"; exit $s'
    place = str(output.parent)
    command = [*isolate, "sh", "-c", script, place, place, sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: No space left on the disk")
    assert done.stdout == ("out.work\n" if verb == "compress" else "")


@pytest.mark.parametrize("verb", ["inspect", "--version"])
def test_a_full_standard_output(verb: str, checkpoint: Path) -> None:
    code = "from gqsa_compiler.cli.main import main; raise SystemExit(main())"
    words = [verb, *([str(checkpoint)] if verb == "inspect" else [])]
    with Path("/dev/full").open("w") as full:
        # Buffered, as usual: what could not be written is tried again at the exit.
        buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=buffered,
        )
    assert done.returncode == 1
    assert done.stderr == "error: No space left on the disk; free some, or write elsewhere.\n"


def test_parameters_with_a_wrong_hash(gqsa: Gqsa, toy_artefact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(toy_artefact, tmp_path / "copy")
    file = copy / "params.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    done = gqsa("run", copy, "-p", "a")
    assert done.code == 1
    assert "params.safetensors" in done.error
    assert gqsa("run", copy, "-p", "a", "--max-tokens", "1", "--no-verify").code == 0


def test_an_artefact_for_another_cpu(gqsa: Gqsa, toy_artefact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(toy_artefact, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    for field, value in (("flags", ["amx_int4"]), ("arch", "riscv64")):
        changed = {**manifest, "variants": [dict(manifest["variants"][0])]}
        changed["variants"][0]["target"] = {**changed["variants"][0]["target"], field: value}
        (copy / "manifest.json").write_text(json.dumps(changed))
        done = gqsa("run", copy, "-p", "a")
        assert done.code == 1
        assert (value if isinstance(value, str) else value[0]) in done.error
