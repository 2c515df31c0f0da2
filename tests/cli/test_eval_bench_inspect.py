"""`gqsa eval`, `gqsa bench` and `gqsa inspect` on a toy artefact and a small checkpoint."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from gqsa_compiler import bandwidth, runtime
from gqsa_compiler.bandwidth import (
    available_bytes,
    last_level_cache_bytes,
    measure_read_bandwidth,
)
from tests.cli.conftest import Gqsa
from tests.tiny_checkpoints import make_checkpoint
from tests.tiny_models import make_tiny

TEXT = "the cat and the other cat " * 12


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_eval_of_an_artefact(gqsa: Gqsa, toy_artefact: Path, text: Path) -> None:
    done = gqsa("eval", toy_artefact, "--text", text, "--context", "32", "--json")
    assert done.code == 0
    with runtime.load(toy_artefact) as model:
        tokens = model.tokenize(TEXT)
        nll = []
        for start in range(0, len(tokens) - 31, 32):
            window = tokens[start : start + 32]
            logits = np.concatenate([np.array(rows) for rows in model.score(window)])
            for row, token in zip(logits[:-1].astype(np.float64), window[1:], strict=True):
                nll.append(math.log(np.exp(row).sum()) - row[token])
    assert done.json["tokens"] == len(nll)
    assert done.json["perplexity"] == pytest.approx(math.exp(np.mean(nll)), rel=1e-4)
    assert "kl_divergence" not in done.json


def test_eval_against_itself(gqsa: Gqsa, toy_artefact: Path, text: Path) -> None:
    words = ("eval", toy_artefact, "--text", text, "--reference", toy_artefact, "--limit", "2")
    done = gqsa(*words, "--json")
    assert done.json["windows"] == 2
    assert done.json["context"] == 96
    assert done.json["kl_divergence"] == pytest.approx(0, abs=1e-6)
    table = gqsa(*words)
    assert "perplexity" in table.out
    assert "KL divergence" in table.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--text", "none.txt"), "none.txt does not exist"),
        (("--text", "."), "is a directory"),
        (("--text", "{text}", "--context", "4096"), "compiled for"),
        (("--text", "{text}", "--reference", "no/such/model"), "no/such/model"),
    ],
)
def test_eval_bad_requests(
    gqsa: Gqsa, toy_artefact: Path, text: Path, words: tuple[str, ...], message: str
) -> None:
    done = gqsa("eval", toy_artefact, *(word.format(text=text) for word in words))
    assert done.code == 2
    assert message in done.error


def test_bench(gqsa: Gqsa, toy_artefact: Path) -> None:
    words = ("bench", toy_artefact, "--prompt", "20", "--gen", "6", "--repeats", "3")
    done = gqsa(*words, "--threads", "1", "--json")
    assert done.code == 0
    found = done.json
    assert len(found["runs"]) == 3
    for name in ("prefill_tokens_per_second", "decode_tokens_per_second", "first_token_seconds"):
        values = sorted(run[name] for run in found["runs"])
        assert found[name] == values[1] > 0
    assert (found["prompt"], found["gen"], found["threads"]) == (20, 6, 1)
    manifest = json.loads((toy_artefact / "manifest.json").read_text())
    assert found["bytes_per_token"] == manifest["bytes_per_token"]
    share = found["bytes_per_token"] * found["decode_tokens_per_second"] / found["read_bandwidth"]
    assert found["read_bandwidth_share"] == pytest.approx(share)
    assert found["peak_memory_bytes"] > 10e6


def test_bench_table(gqsa: Gqsa, toy_artefact: Path) -> None:
    done = gqsa("bench", toy_artefact, "--prompt", "8", "--gen", "2", "--repeats", "1")
    assert done.code == 0
    assert "decode       " in done.out
    assert "peak memory" in done.out


def test_bench_profile(gqsa: Gqsa, toy_artefact: Path) -> None:
    words = ("bench", toy_artefact, "--prompt", "8", "--gen", "4", "--repeats", "2")
    assert "profile" not in gqsa(*words, "--json").json
    done = gqsa(*words, "--profile", "--json")
    assert done.code == 0
    assert set(done.json["profile"]) == {"decode", "prefill"}
    for phase, tokens in (("decode", 1), ("prefill", 8)):
        found = done.json["profile"][phase]
        assert found["tokens"] == tokens
        assert found["profiled_microseconds"] > 0
        assert found["lines"][-1]["kind"] == "rest"
        assert sum(x["microseconds"] for x in found["lines"]) == pytest.approx(
            found["microseconds"]
        )
        assert sum(x["share"] for x in found["lines"]) == pytest.approx(1)
    table = gqsa(*words, "--profile")
    for text in ("a decoded token", "a prompt of 8 tokens", "attention with KV cache", "sampling"):
        assert text in table.out
    assert table.out.count("all, not profiled") == 2


def test_bench_profile_of_code_that_reports_no_calls(
    gqsa: Gqsa, toy_artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gqsa_compiler.runtime.engine.Session.set_instrument", lambda *_: None)
    done = gqsa("bench", toy_artefact, "--prompt", "8", "--gen", "2", "--profile")
    assert done.code == 1
    assert "does not report its calls, so it cannot be profiled" in done.error


def test_bench_beyond_the_context(gqsa: Gqsa, toy_artefact: Path) -> None:
    done = gqsa("bench", toy_artefact, "--prompt", "90", "--gen", "20")
    assert done.code == 2
    assert "need a context of 110" in done.error
    # Room for exactly this many.
    words = ("--prompt", "90", "--gen", "6", "--repeats", "1", "--json")
    assert gqsa("bench", toy_artefact, *words).json["gen"] == 6
    assert gqsa("bench", toy_artefact, "--prompt", "90", "--gen", "7").code == 2


def test_read_bandwidth_is_that_of_memory() -> None:
    found = measure_read_bandwidth(1, repeats=3)
    assert 0.5e9 < found < 1000e9


def test_file_caches_count_as_available(tmp_path: Path) -> None:
    """A model's mapped weights fill the page cache: what is merely free would be too little."""
    path = tmp_path / "meminfo"
    path.write_text("MemTotal: 900 kB\nMemFree:  100 kB\nMemAvailable:  800 kB\n")
    assert available_bytes(path) == 800 << 10
    assert available_bytes(tmp_path / "none") > 0


def test_the_buffer_is_at_most_a_quarter_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr(bandwidth, "available_bytes", lambda: 4 << 20)
    monkeypatch.setattr(
        np, "ones", lambda count, dtype: sizes.append(count) or np.zeros(count, dtype)
    )
    measure_read_bandwidth(1, repeats=1)
    assert sizes == [(1 << 20) // 4]


def test_last_level_cache(tmp_path: Path) -> None:
    for index, size in enumerate(("48K", "2048K", "32M", "odd")):
        folder = tmp_path / "cpu0" / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        (folder / "size").write_text(f"{size}\n")
    assert last_level_cache_bytes(tmp_path) == 32 << 20
    assert last_level_cache_bytes(tmp_path / "none") == 0


def test_inspect_an_artefact(gqsa: Gqsa, toy_artefact: Path) -> None:
    done = gqsa("inspect", toy_artefact, "--json")
    assert done.code == 0
    assert done.json == json.loads((toy_artefact / "manifest.json").read_text())
    table = gqsa("inspect", toy_artefact)
    assert "toy (toy) for cpu" in table.out
    assert "(fallback)" in table.out
    assert "tokens  " not in table.out.splitlines()[-2]
    assert done.err == ""


def test_an_artefact_with_code_for_several_targets(
    gqsa: Gqsa, toy_artefact: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(toy_artefact, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    (first,) = manifest["variants"]
    other = {
        "target": {**first["target"], "name": "future", "flags": ["vectors_of_the_future"]},
        "library": {**first["library"], "file": "model.future.so"},
    }
    manifest["variants"] = [other, first]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    table = gqsa("inspect", copy).out
    assert "toy (toy) for future, cpu:" in table
    assert "future          vectors_of_the_future\n" in table
    assert "runs here       cpu\n" in table
    done = gqsa("run", copy, "-p", "a", "--max-tokens", "1")
    assert (done.code, "Running the code for cpu." in done.err) == (0, True)
    words = ("--prompt", "4", "--gen", "2", "--repeats", "1", "--json")
    assert gqsa("bench", copy, *words).json["variant"] == "cpu"
    manifest["variants"] = [other]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert gqsa("inspect", copy).code == 0
    assert "lacks vectors_of_the_future" in gqsa("run", copy, "-p", "a").error


def test_inspect_a_manifest_of_another_version(
    gqsa: Gqsa, toy_artefact: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(toy_artefact, tmp_path / "copy")
    path = copy / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 2', '"format_version": 9'))
    for words in (("inspect",), ("run", "-p", "a"), ("bench",)):
        done = gqsa(words[0], copy, *words[1:])
        assert done.code == 1
        assert "version 9" in done.error


def test_inspect_what_is_neither(gqsa: Gqsa, tmp_path: Path) -> None:
    missing = gqsa("inspect", tmp_path / "none")
    assert (missing.code, "does not exist" in missing.error) == (2, True)
    other = gqsa("inspect", tmp_path)
    assert (other.code, "neither a GQSA checkpoint" in other.error) == (1, True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"quantization_config": {"quant_method": "gqsa"}, "a": 1, "a": 2}', "'a' twice"),
        (b'{"quantization_config": {"quant_method": "gqsa\xff"}}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_inspect_names_the_damage_in_config_json(
    gqsa: Gqsa, tmp_path: Path, text: bytes, words: str
) -> None:
    (tmp_path / "config.json").write_bytes(text)
    done = gqsa("inspect", tmp_path)
    assert done.code == 1
    assert words in done.error
    assert str(tmp_path / "config.json") in done.error


def test_inspect_an_incomplete_checkpoint(gqsa: Gqsa, tmp_path: Path) -> None:
    dense = make_tiny("llama", tmp_path / "dense", num_hidden_layers=1)
    checkpoint = make_checkpoint(dense, tmp_path / "checkpoint")
    assert gqsa("inspect", checkpoint).code == 0
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    done = gqsa("inspect", checkpoint)
    assert done.code == 1
    assert "lacks the tensor" in done.error


def test_seeds_are_not_negative(gqsa: Gqsa, tmp_path: Path) -> None:
    done = gqsa("compress", tmp_path, "-o", tmp_path / "out", "--seed", "-1")
    assert done.code == 2
    assert "--seed" in done.error
