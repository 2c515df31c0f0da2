"""The scaling benchmark: its command line, its sums, what it keeps, and a whole small run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_scaling
import numpy as np
import pytest
from bench_scaling import PARTS, main, read_command_line, run_part, summary
from scaling_models import fitting, shape_name, time_batch
from scaling_parts import batch_result, context_result, sparsity_result
from scaling_plan import Measurement, Part, Plan, Round, Spread, in_turn
from scaling_store import Store

from gqsa_compiler.errors import GqsaError, UsageError
from gqsa_compiler.runtime import Session


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Return a small plan."""
    words = "--quick --contexts 8,16 --steps 2 --threads 1"
    return read_command_line([*words.split(), "--directory", str(tmp_path / "out")])[1]


@pytest.fixture(autouse=True)
def _has_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_scaling, "find_spec", lambda name: name)


def _rounds(*seconds: dict[str, list[float]], bandwidth: float = 1000.0) -> list[Round]:
    return [{"read_bandwidth": bandwidth, "seconds": found} for found in seconds]


def test_command_line() -> None:
    parts, plan = read_command_line(["--quick", "--only", "batch,context", "--batches", "8,2,2"])
    assert [part.name for part in parts] == ["context", "batch"]
    assert (plan.batches, plan.contexts, plan.repeats) == ((2, 8), (128, 512, 2048), 2)
    parts, plan = read_command_line(["--sparsities", "0.5,0", "--peak", "100"])
    assert parts == list(PARTS.values())
    assert (plan.sparsities, plan.peak) == ((0.0, 0.5), 100e9)
    assert plan.context_length == plan.contexts[-1] == 8192


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--only batch,speed", "and not 'speed'"),
        ("--peak 0", "must be above 0"),
        ("--batches 1,,2", "--batches: invalid"),
        ("--sparsities 1", "--sparsities: invalid"),
    ],
)
def test_command_line_mistakes(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        read_command_line(words.split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_matplotlib_names_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_scaling, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        read_command_line([])
    assert "pip install matplotlib" in capsys.readouterr().err


def test_spread_and_order() -> None:
    assert Spread.of([3.0]) == Spread(3, 3, 3)
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3, 2, 4)
    assert [in_turn((1, 2, 3), index) for index in (0, 1, 2)] == [[1, 2, 3], [3, 2, 1], [1, 2, 3]]


def test_context_result_counts_the_cache() -> None:
    about = {
        "contexts": [10, 20],
        "bytes_per_token": 100,
        "kv_cache_bytes_per_token": 5,
        "sliding_window": None,
    }
    rounds = _rounds({"10": [1, 9, 2], "20": [3]}, {"10": [4], "20": [5]})
    first, second = context_result(about, rounds)["points"]
    assert first["seconds"] == {"median": 3.0, "low": 2.5, "high": 3.5}
    assert (first["bytes_read"], second["bytes_read"]) == (150, 200)
    assert first["ideal_seconds"] == 0.15
    windowed = context_result({**about, "sliding_window": 4}, rounds)
    assert windowed["points"][1]["bytes_read"] == 100


def test_sparsity_ratios_are_of_the_same_round() -> None:
    models = [
        {"sparsity": s, "bytes_per_token": size, "kv_cache_bytes_per_token": 0}
        for s, size in ((0.0, 200), (0.5, 120))
    ]
    rounds = _rounds({"0.0": [2], "0.5": [1]}, {"0.0": [10], "0.5": [6]}, {"0.0": [1], "0.5": [2]})
    dense, sparse = sparsity_result({"models": models, "prompt": 4, "steps": 2}, rounds)["points"]
    assert (dense["ratio"]["median"], sparse["ratio"]["median"]) == (1, 0.6)
    assert (dense["bytes_ratio"], sparse["bytes_ratio"]) == (1, 0.6)


def test_batch_result_shares_the_weights() -> None:
    about = {
        "batches": [1, 4],
        "tokens": 10,
        "bytes_per_token": 100,
        "kv_cache_bytes_per_token": 2,
    }
    one, four = batch_result(about, _rounds({"1": [1], "4": [2]}))["points"]
    assert (one["bytes_read"], four["bytes_read"]) == (120, 180)
    assert (one["tokens_per_second"]["median"], four["tokens_per_second"]["median"]) == (1, 2)


class FakeSession:
    """Counts what it is asked for."""

    vocab_size = 50

    def __init__(self, value: float = 0.0) -> None:
        self.value = value
        self.lengths: dict[int, int] = {}
        self.removed: list[int] = []

    def add(self) -> int:
        number = len(self.lengths)
        self.lengths[number] = 0
        return number

    def prefill(self, sequence: int, tokens: Sequence[int]) -> None:
        self.lengths[sequence] += len(tokens)

    def decode(self, sequences: Sequence[int], tokens: Sequence[int]) -> Any:
        assert len(sequences) == len(tokens)
        for sequence in sequences:
            self.lengths[sequence] += 1
        return np.full((len(tokens), self.vocab_size), self.value, np.float32)

    def remove(self, sequence: int) -> None:
        self.removed.append(sequence)


def _fake(session: FakeSession) -> Session:
    return session  # type: ignore[return-value]


def test_a_batch_decodes_all_sequences_together() -> None:
    session = FakeSession()
    assert len(time_batch(_fake(session), batch=3, prompt=4, steps=5)) == 5
    assert session.lengths == dict.fromkeys(range(3), 9)
    assert session.removed == [0, 1, 2]


def test_logits_that_are_not_finite_end_the_measurement() -> None:
    session = FakeSession(float("nan"))
    with pytest.raises(GqsaError, match="not finite"):
        time_batch(_fake(session), batch=2, prompt=1, steps=1)
    assert session.removed == [0, 1]


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert fitting((1, 4, 8), 4, "batches", "raise it") == (1, 4)
    assert "Left out: batches 8" in capsys.readouterr().err
    with pytest.raises(GqsaError, match=r"at most 4; raise it\."):
        fitting((8,), 4, "batches", "raise it")


def test_shapes_have_short_names(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    config = tmp_path / "mine" / "config.json"
    config.touch()
    assert [shape_name(str(path)) for path in (config, config.parent)] == ["mine", "mine"]
    assert shape_name("llama-3.2-1b") == "llama-3.2-1b"


def _part(measured: list[int]) -> Part:
    @contextmanager
    def prepare(plan: Plan) -> Iterator[Measurement]:
        def measure(index: int) -> Round:
            measured.append(index)
            if index == 2:
                raise KeyboardInterrupt
            return {"value": index}

        yield Measurement({"sizes": (1, 2)}, measure)

    def result(about: Mapping[str, Any], rounds: Sequence[Round]) -> dict[str, Any]:
        return {"sum": sum(found["value"] for found in rounds), "points": []}

    return Part("context", ("contexts", "steps"), prepare, result)


def test_an_interrupted_run_goes_on(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Path] = []
    monkeypatch.setattr(bench_scaling, "draw", lambda data, target: drawn.append(target))
    measured: list[int] = []
    part = _part(measured)
    with pytest.raises(KeyboardInterrupt):
        run_part(part, replace(plan, repeats=3))
    for _ in range(2):
        store = run_part(part, plan)
    assert measured == [0, 1, 2]
    assert store.result["sum"] == 1
    assert drawn == [plan.directory / "context.svg"] * 2
    assert json.loads(store.path.read_text())["machine"]["cpu"]
    assert [path.name for path in plan.directory.iterdir()] == ["context.json"]


def test_figures_of_other_runs_are_not_mixed(plan: Plan) -> None:
    part = _part([])
    store = Store(part, plan)
    store.add({"value": 1}, {"sizes": (1, 2)})
    with pytest.raises(UsageError, match="not the one that"):
        store.add({"value": 1}, {"sizes": (3,)})
    assert len(Store(part, replace(plan, prompt=9)).rounds) == 1
    with pytest.raises(UsageError, match="with steps 2 instead of 3"):
        Store(part, replace(plan, steps=3))
    data = json.loads(store.path.read_text())
    data["machine"]["cpu"] = "another"
    store.path.write_text(json.dumps(data))
    with pytest.raises(UsageError, match="with cpu another instead of"):
        Store(part, plan)
    store.path.write_text("{}")
    with pytest.raises(GqsaError, match="cannot be read"):
        Store(part, plan)


@pytest.mark.slow
def test_one_command_makes_everything(
    tmp_path: Path,
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    shape = tmp_path / "tiny" / "config.json"
    shape.parent.mkdir()
    shape.write_text(json.dumps(config))
    words = (
        f"--directory {tmp_path}/out --shape {shape} --threads 1 --repeats 2 --steps 2 "
        "--contexts 16,32,4096 --sparsities 0,0.5 --batches 1,4 --prompt 8 --batch-prompt 4"
    )
    monkeypatch.setattr(sys, "argv", ["bench_scaling.py", *words.split()])
    main()
    said = capsys.readouterr()
    assert "Left out: contexts 4096" in said.err
    for name in PARTS:
        data = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert len(data["rounds"]) == 2
        assert data["result"]["points"]
        assert (tmp_path / "out" / f"{name}.svg").stat().st_size > 1000
    artefacts = sorted(path.name for path in (tmp_path / "out" / "artefacts").iterdir())
    assert artefacts == ["tiny-s0-c256-b4", "tiny-s50-c256-b4"]
    main()  # everything is there
    assert "round" not in capsys.readouterr().err


def test_summary_names_the_points(plan: Plan) -> None:
    store = Store(_part([]), plan)
    seconds = {"median": 0.002, "low": 0.001, "high": 0.003}
    point = {"context": 128, "seconds": seconds, "bytes_read": 1, "ideal_seconds": 0.0005}
    store.data["result"] = {"points": [point]}
    assert summary(store) == (
        "context 128: 2.00 ms a pass (1.00 to 3.00), 0.50 ms at the memory's speed"
    )
