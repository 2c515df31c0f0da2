"""Hashes, draws, sampling, UTF-8 and stop strings against Python's and numpy's."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gqsa_compiler.runtime import cpus
from gqsa_compiler.runtime.sampling import Sampler, SamplingOptions
from gqsa_compiler.runtime.tokens import StopStrings
from tests.runtime.native.programs import Probe

shared = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("size", [0, 1, 3, 55, 56, 63, 64, 65, 119, 120, 128, 1000, 4097])
def test_sha256(probe: Probe, size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size).tolist()
    digest = hashlib.sha256(bytes(data)).hexdigest()
    assert probe.ask("sha256", bytes=data) == [digest, digest]  # instructions, and plain code


@pytest.mark.parametrize("seed", [0, 1, 42, 2**32 - 1, 2**32, 2**63 - 1])
def test_draws_are_numpys(probe: Probe, seed: int) -> None:
    assert probe.ask("random", seed=seed, count=20) == list(np.random.default_rng(seed).random(20))


def _logits(seed: int, size: int = 400) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * 3).astype(np.float32)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.8},
        {"temperature": 1.3, "top_k": 40},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 0.9, "min_p": 0.05},
        {"temperature": 1.1, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3},
        {"repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_samples_are_pythons(probe: Probe, options: dict[str, Any]) -> None:
    for seed in range(6):
        logits = _logits(seed)
        sampler = Sampler(SamplingOptions(seed=seed, **options), logits.size, [3, 5, 7])
        wanted = [sampler(logits) for _ in range(40)]
        got = probe.ask(
            "sample", logits=logits.tolist(), count=40, seed=seed, prompt=[3, 5, 7], **options
        )
        assert got == wanted


def test_ties_go_to_the_first(probe: Probe) -> None:
    assert probe.ask("sample", logits=[1.0, 2.0, 2.0, 0.0], count=1) == [1]
    for size in (1, 15, 16, 33):
        for at in range(size):  # in a whole vector of them, or behind the last
            logits: list[float | None] = [-1e30] * size
            logits[at] = logits[-1] = -3.5
            assert probe.ask("sample", logits=logits, count=1) == [at]
            logits[at] = None
            assert "not finite" in probe.error("sample", logits=logits, count=1)


@pytest.mark.parametrize("logits", [[1.0, None], [None, 1.0], [None, None]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers(
    probe: Probe, logits: list[float | None], temperature: float
) -> None:
    said = probe.error("sample", logits=logits, count=1, temperature=temperature)
    assert "not finite numbers" in said


@pytest.mark.parametrize(
    ("option", "value"),
    [("temperature", -1), ("top_k", -1), ("top_p", 0), ("top_p", 1.5), ("min_p", 2),
     ("repetition_penalty", 0), ("repetition_penalty", 1e-38), ("repetition_penalty", 1e38)],
)  # fmt: skip
def test_options_out_of_range(probe: Probe, option: str, value: float) -> None:
    assert option in probe.error("sample", logits=[1.0], count=1, **{option: value})


@shared
@given(st.lists(st.one_of(st.integers(0, 255), st.sampled_from([0xE2, 0x82, 0xAC, 0xF0, 0xED])),
                max_size=24))  # fmt: skip
def test_lossy_utf8_is_pythons(probe: Probe, data: list[int]) -> None:
    assert probe.ask("lossy", bytes=data) == bytes(data).decode("utf-8", errors="replace")


def test_the_host(probe: Probe) -> None:
    host = probe.ask("host")
    assert host["arch"] == cpus.host_arch()
    assert set(host["flags"]) == cpus.host_flags()
    assert host["cpus"] == cpus.allowed_cpus()
    assert host["threads"] == cpus.default_threads()


_text = st.text(alphabet="abé", max_size=5)


@shared
@given(st.lists(_text, max_size=8), st.lists(_text.filter(bool), max_size=4))
def test_stop_strings(probe: Probe, stop_file: str, pieces: list[str], stops: list[str]) -> None:
    """The text of single-character tokens, a piece at a time, is cut as in Python."""
    cutter = StopStrings(stops)
    text = "".join(pieces)
    wanted = [cutter.push(character) for character in text]
    wanted.append(cutter.push("") + cutter.flush())
    ids = [ord(character) for character in text]
    got = probe.ask("stream", file=stop_file, context=[], ids=ids, stops=stops)
    assert got == {"pieces": wanted, "stopped": cutter.stopped}


@pytest.fixture(scope="session")
def stop_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write a tokenizer whose token ids are code points."""
    import tokenizers

    vocab = {chr(c): c for c in range(1, 256)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    path = tmp_path_factory.mktemp("stops") / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)
