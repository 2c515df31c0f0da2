"""The comparison with llama.cpp: its command line, its stopwatch, its figures and its files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from bench_llamacpp import read_command_line, short_name, turns
from llamacpp_models import GGUFInfo, ask, ask_llama, read_info, write_random
from llamacpp_report import Contender, machine, summary, table
from llamacpp_timing import Work, measure

from gqsa_compiler.errors import GqsaError, UsageError
from gqsa_compiler.frontends.resolve import resolve


@dataclass
class FakeEngine:
    """Notes its calls; the last logits are `value`."""

    value: float = 0.5
    vocab_size: int = 50
    calls: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)

    def reset(self) -> None:
        self.calls.append(("reset", ()))

    def prefill(self, tokens: Sequence[int]) -> None:
        self.calls.append(("prefill", tuple(tokens)))

    def decode(self, token: int) -> None:
        self.calls.append(("decode", (token,)))

    def logits(self) -> Sequence[float]:
        return [self.value] * self.vocab_size


def test_both_sides_get_the_same_calls() -> None:
    work = Work(prompt=3, gen=5, prefill=8, threads=1)
    ours, theirs = FakeEngine(), FakeEngine()
    found = measure(ours, work)
    measure(theirs, work)
    assert ours.calls == theirs.calls
    names = [name for name, _ in ours.calls]
    assert names[-8:] == ["prefill", "reset", "prefill", *["decode"] * 5]
    assert [len(tokens) for name, tokens in ours.calls if name == "prefill"] == [8, 3, 8, 3]
    assert found["decode_tokens_per_second"] > 0
    assert work.context == 8


def test_logits_that_are_not_finite_end_the_measurement() -> None:
    with pytest.raises(SystemExit, match="not finite"):
        measure(FakeEngine(float("nan")), Work(1, 1, 1, 1))


def test_options_belong_to_the_model_before_them() -> None:
    words = "--model a --ours x=1 --ours y=2 --model b --gguf f.gguf --ours x=3 --threads 1"
    first, second = read_command_line(words.split()).matches
    assert (first.name, first.gguf, first.ours) == ("a", None, {"x": Path("1"), "y": Path("2")})
    assert (second.name, second.gguf, second.ours) == ("b", Path("f.gguf"), {"x": Path("3")})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "at least one --model"),
        ("--ours x=1", "comes after the --model"),
        ("--model a", "has no artefact"),
        ("--model a --ours x", "LABEL=DIRECTORY"),
        ("--model a --ours x=1 --ours x=2", "cannot be called 'x'"),
        ("--model a --ours llama.cpp=1", "cannot be called 'llama.cpp'"),
        ("--model a --ours x=1 --gen 0", "--gen: invalid"),
    ],
)
def test_command_line_mistakes(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        read_command_line(words.split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_every_run_of_ours_is_followed_by_one_of_theirs() -> None:
    assert [side for _, side in turns(2, 2)] == [0, 2, 1, 2, 0, 2, 1, 2]


def _run(decode: float) -> dict[str, Any]:
    return {"decode_tokens_per_second": decode, "prefill_tokens_per_second": 10 * decode}


def test_ratios_are_of_neighbours() -> None:
    sides = [Contender(name, name, size, ()) for name, size in (("x", 100), ("y", 50), ("t", 80))]
    ours, other = [_run(v) for v in (10, 20, 60)], [_run(v) for v in (1, 1, 1)]
    theirs = [_run(v) for v in (5, 1, 5, 2, 20, 4)]  # after x, after y, after x ...
    found = summary("m", sides, [ours, other, theirs], [4000.0, 2000.0, 9000.0])["results"]
    assert found["x"]["decode_ratio"] == 3
    assert found["y"]["prefill_ratio"] == 0.5
    assert found["x"]["read_bandwidth_share"] == 100 * 20 / 4000
    assert found["t"]["decode_tokens_per_second"] == 4.5
    assert "decode_ratio" not in found["t"]


def test_table_has_a_line_for_each_side() -> None:
    sides = [Contender("w4s50g16", "a", 100, ()), Contender("llama.cpp", "b", 80, ())]
    result = {
        "machine": machine({"llama_cpp_python": "1.2", "system": ""}),
        "settings": {"prompt": 1, "gen": 2, "prefill": 3, "threads": 1, "repeats": 1},
        "models": [summary("m", sides, [[_run(30.0)], [_run(20.0)]], [1e4])],
    }
    lines = table(result).splitlines()
    assert lines[-2] == ("| m | w4s50g16 | 30.0 | 1.50 | 100 B | 30% of 10.0 kB/s | 300.0 | 1.50 |")
    assert lines[-1].startswith("| m | llama.cpp | 20.0 |  | 80 B | 16% of")


@pytest.mark.parametrize("tied", [True, False])
def test_random_gguf_is_a_model_of_gain_one(
    tmp_path: Path, config: dict[str, Any], tied: bool
) -> None:
    path = tmp_path / "random.gguf"
    write_random({**config, "tie_word_embeddings": tied}, path)
    source = resolve(str(path))
    for name in ("vocab_size", "hidden_size", "num_key_value_heads", "tie_word_embeddings"):
        assert source.config[name] == (tied if name.startswith("tie") else config[name])
    for name in source.tensor_names():
        values = source.tensor(name)
        assert np.isfinite(values).all()
        if values.ndim == 2:
            assert values.std() * values.shape[1] ** 0.5 == pytest.approx(1, abs=0.1), name
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    head = tensors["token_embd.weight" if tied else "output.weight"]
    assert head.tensor_type.name == "Q6_K"
    total = sum(int(tensor.n_bytes) for tensor in tensors.values())
    unread = 0 if tied else int(tensors["token_embd.weight"].n_bytes)
    assert read_info(path) == GGUFInfo(320, 256, 3, total - unread)
    assert [file.name for file in tmp_path.iterdir()] == ["random.gguf"]


def test_random_gguf_with_a_head_that_q6_k_does_not_fit(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    path = tmp_path / "random.gguf"
    write_random({**config, "hidden_size": 192}, path)
    embedding = resolve(str(path)).tensor("model.embed_tokens.weight")
    assert embedding.std() * 192**0.5 == pytest.approx(1, abs=0.1)
    with pytest.raises(UsageError, match="has 48"):
        write_random({**config, "hidden_size": 48}, tmp_path / "b.gguf")


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "not.gguf"
    with pytest.raises(UsageError, match="cannot be read as a GGUF model"):
        read_info(path)
    path.write_bytes(b"no" * 50)
    with pytest.raises(UsageError, match="cannot be read as a GGUF model"):
        read_info(path)


def test_models_have_short_names(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    config = tmp_path / "mine" / "config.json"
    config.touch()
    for name in ("mine", str(config), str(config.parent)):
        assert short_name(name) == "mine"


def test_failures_of_a_side_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be run"):
        ask([str(tmp_path / "nothing")])
    with pytest.raises(GqsaError, match=r"^too bad$"):
        ask([sys.executable, "-c", "import sys; print('{}'); sys.exit('noise\\ntoo bad')"])


def test_missing_llama_cpp_names_the_command(tmp_path: Path) -> None:
    # An interpreter that sees no installed package.
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    with pytest.raises(GqsaError, match="pip install llama-cpp-python"):
        ask_llama(str(python), ["information"])
