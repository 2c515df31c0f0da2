"""Compiled models with adapters against PyTorch with the adapters' products in the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from gqsa_compiler import compile as gqsa_compile
from gqsa_compiler import runtime
from gqsa_compiler.errors import ArtefactError, CompileError, ModelError, UsageError
from gqsa_compiler.runtime.manifest import Manifest
from gqsa_compiler.runtime.model import Model
from tests.cli.conftest import Gqsa, gqsa  # noqa: F401 -- a fixture
from tests.lora.adapters import make_adapter, reference
from tests.runtime.toy import edit_manifest
from tests.tiny_checkpoints import make_checkpoint
from tests.tiny_models import VOCAB_SIZE, make_tiny

CHUNK = 8
TOKENS = np.random.default_rng(0).integers(3, VOCAB_SIZE, 2 * CHUNK + 5)
OPTIONS: dict[str, Any] = {
    "activations": "float32",
    "kv_cache": "float32",
    "head": "stored",
    "prefill_chunk": CHUNK,
    "context_length": 64,
}
NAMES = (None, "all", "some")
Array = npt.NDArray[Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny compressed Llama and two adapters of it."""
    folder = tmp_path_factory.mktemp("lora")
    dense = make_tiny("llama", folder / "dense", gain=1.0, num_hidden_layers=2)
    checkpoint = make_checkpoint(dense, folder / "checkpoint")
    make_adapter(folder / "all", checkpoint, seed=1, ranks={"v_proj": 6}, use_rslora=True)
    some = ("q_proj", "v_proj", "up_proj")
    make_adapter(folder / "some", checkpoint, some, rank=3, seed=2, alpha_pattern={"up_proj": 2})
    return folder


@pytest.fixture(scope="module")
def artefact(folder: Path) -> Path:
    """Return the model compiled with both adapters to choose from."""
    adapters = {name: folder / name for name in NAMES if name}
    gqsa_compile(
        str(folder / "checkpoint"),
        folder / "artefact",
        adapters=adapters,
        adapter_dtype="float32",
        **OPTIONS,
    )
    return folder / "artefact"


@pytest.fixture(scope="module")
def model(artefact: Path) -> Iterator[Model]:
    """Load it."""
    with runtime.load(artefact) as model:
        yield model


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str | None, Array]:
    """Return the logits that follow each of `TOKENS`, by adapter."""
    found: dict[str | None, Array] = {}
    for name in NAMES:
        adapted = reference(folder / "checkpoint", folder / name if name else None)
        with torch.inference_mode():
            found[name] = adapted(torch.tensor(TOKENS)[None]).logits[0].numpy()
    return found


def error(ours: Array, theirs: Array) -> float:
    """Norm of the difference over the norm of the reference."""
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def test_the_adapters_differ(expected: dict[str | None, Array]) -> None:
    for a, b in ((None, "all"), (None, "some"), ("all", "some")):
        assert error(expected[a], expected[b]) > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_prompts_and_single_tokens(
    model: Model, expected: dict[str | None, Array], name: str | None
) -> None:
    with closing(model.session()) as session:
        scored = np.concatenate([block.copy() for block in session.score(TOKENS, name)])
        assert error(scored, expected[name]) < 1e-4
        sequence = session.add(name)
        start = CHUNK + 3  # a chunk without logits comes first
        found = [session.prefill(sequence, TOKENS[:start]).copy()]
        found += [session.decode([sequence], [int(t)])[0].copy() for t in TOKENS[start:]]
        assert error(np.stack(found), expected[name][start - 1 :]) < 1e-4


def test_a_batch_may_mix_them(model: Model, expected: dict[str | None, Array]) -> None:
    with closing(model.session()) as session:
        names = ("some", None, "all", "some")
        sequences = [session.add(name) for name in names]
        for i, sequence in enumerate(sequences):
            session.prefill(sequence, TOKENS[: 5 + i])
        for step in range(3):
            at = [5 + i + step for i in range(4)]
            logits = session.decode(sequences, TOKENS[at])
            for row, place, name in zip(logits, at, names, strict=True):
                assert error(row, expected[name][place]) < 1e-4
        session.remove(sequences[0])
        alone = session.add()  # the place of an adapter's sequence: no trace of it is left
        assert error(session.prefill(alone, TOKENS[:9]), expected[None][8]) < 1e-4


def test_generation_switches(model: Model, expected: dict[str | None, Array]) -> None:
    assert model.adapters == ("all", "some")
    for name in ("all", None, "some", "all"):
        answer = model.generate(TOKENS.tolist(), max_tokens=1, temperature=0.0, adapter=name)
        assert answer.token_ids == (int(expected[name][-1].argmax()),)
    with pytest.raises(UsageError, match=r"no adapter 'other'; the artefact has all, some"):
        model.generate("the", adapter="other")
    with pytest.raises(UsageError, match="no adapter 'other'"), closing(model.session()) as session:
        session.add("other")


def test_a_conversation_starts_anew_with_another_adapter(model: Model) -> None:
    messages = [{"role": "user", "content": "the quick"}]
    with model.conversation() as talk:
        texts = []
        for name in ("all", "all", None):
            stream = talk.stream(messages, adapter=name, max_tokens=4, temperature=0.0)
            texts.append("".join(stream))
            assert bool(stream.result.cached_tokens) is (len(texts) == 2)
            assert stream.result == stream.result
            whole = model.chat(messages, adapter=name, max_tokens=4, temperature=0.0)
            assert whole.token_ids == stream.result.token_ids


def test_an_adapter_for_all_requests(artefact: Path, expected: dict[str | None, Array]) -> None:
    with runtime.load(artefact, adapter="some", verify=False) as model:
        scored = np.concatenate([block.copy() for block in model.score(TOKENS)])
        assert error(scored, expected["some"]) < 1e-4
        answer = model.generate(TOKENS.tolist(), max_tokens=1, temperature=0.0, adapter=None)
        assert answer.token_ids == (int(expected[None][-1].argmax()),)
    with pytest.raises(UsageError, match="no adapter 'other'"):
        runtime.load(artefact, adapter="other", verify=False)


def test_the_command_line(gqsa: Gqsa, artefact: Path) -> None:  # noqa: F811
    words = ("run", artefact, "-p", "the quick", "--max-tokens", "6", "--temperature", "0")
    texts = {name: gqsa(*words, *(["--adapter", name] if name else [])) for name in NAMES}
    assert {done.code for done in texts.values()} == {0}
    assert len({done.out for done in texts.values()}) == 3
    assert "adapter" in texts["all"].err
    done = gqsa(*words, "--adapter", "other")
    assert (done.code, "no adapter 'other'" in done.error) == (2, True)
    done = gqsa(*words, "--adapter", "all", "--rpc", "localhost:1")
    assert (done.code, "--merge-adapter" in done.error) == (2, True)
    text = artefact.parent / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    scores = [
        gqsa("eval", artefact, "--text", text, "--context", "32", "--limit", "2", "--json", *more)
        for more in ((), ("--adapter", "all"))
    ]
    assert scores[0].json["perplexity"] != scores[1].json["perplexity"]
    assert "adapters        all (rank 6), some (rank 3)" in gqsa("inspect", artefact).out
    small = ("--prompt", "4", "--gen", "2", "--repeats", "1")
    done = gqsa("bench", artefact, "--adapter", "all", *small, "--json")
    plain = gqsa("bench", artefact, *small, "--json")
    more = done.json["bytes_per_token"] - plain.json["bytes_per_token"]
    both = json.loads((artefact / "report.json").read_text())["bytes_by_kind"]["adapters"]
    assert 2 * more == both > 0
    done = gqsa("bench", artefact, "--adapter", "all", "--profile", *small)
    assert (done.code, "leave --adapter out" in done.error) == (2, True)


@pytest.mark.slow
def test_one_that_is_merged(folder: Path, expected: dict[str | None, Array]) -> None:
    """It is part of the model, in float16 here, and no function is there twice."""
    output = folder / "merged"
    report = gqsa_compile(
        str(folder / "checkpoint"), output, merge_adapter=folder / "all", **OPTIONS
    )
    assert [layer.layer for layer in report.fallbacks] == ["model.embed_tokens"]  # the head
    manifest = Manifest.read(output)
    assert not manifest.adapters
    assert manifest.bytes_per_token > report.bytes_by_kind["adapters"] > 0
    with runtime.load(output) as model:
        scored = np.concatenate([block.copy() for block in model.score(TOKENS)])
        assert error(scored, expected["all"]) < 2e-3  # its matrices are rounded to halves
        with pytest.raises(UsageError, match="compiled without adapters"):
            model.generate("the", adapter="all")


def _swap(manifest: dict[str, Any]) -> None:
    manifest["adapters"][0]["parameters"].reverse()


def _leave_out(manifest: dict[str, Any]) -> None:
    manifest["adapters"].pop()


def _reshape(manifest: dict[str, Any]) -> None:
    manifest["parameters"][-1]["shape"].reverse()


def _empty(manifest: dict[str, Any]) -> None:
    manifest["adapters"] = [{"name": "a", "rank": 1, "parameters": []}]


def _double(manifest: dict[str, Any]) -> None:
    manifest["adapters"][1]["name"] = "all"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_swap, "are not the last ones"),
        (_leave_out, "are not the last ones"),
        (_double, "are not the last ones"),
        (_empty, "tensors of other shapes"),
        (_reshape, "'some' has tensors of other shapes than 'all'"),
    ],
)
def test_manifests_that_lie(artefact: Path, tmp_path: Path, edit: Any, message: str) -> None:
    shutil.copy(artefact / "manifest.json", tmp_path)
    edit_manifest(tmp_path, edit)
    with pytest.raises(ArtefactError, match=message):
        Manifest.read(tmp_path)


def test_what_cannot_be_compiled(folder: Path, tmp_path: Path) -> None:
    def attempt(**options: Any) -> None:
        gqsa_compile(str(folder / "checkpoint"), tmp_path / "out", **OPTIONS, **options)

    with pytest.raises(UsageError, match="cannot be merged into a model that has others"):
        attempt(adapters={"a": folder / "all"}, merge_adapter=folder / "all")
    with pytest.raises(UsageError, match="Unknown adapter dtype 'int8'"):
        attempt(adapters={"a": folder / "all"}, adapter_dtype="int8")
    with pytest.raises(UsageError, match="cannot be called 'a b'"):
        attempt(adapters={"a b": folder / "all"})
    with pytest.raises(ModelError, match="no such directory"):
        attempt(merge_adapter=tmp_path / "none")
    tied = make_adapter(tmp_path / "tied", folder / "checkpoint", ("embed_tokens",))
    with pytest.raises(ModelError, match="no linear layer of that name"):
        attempt(adapters={"a": tied})
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_values_beyond_float16(folder: Path, tmp_path: Path) -> None:
    large = make_adapter(tmp_path / "large", folder / "checkpoint", ("o_proj",), gain=1e12)
    with pytest.raises(CompileError, match="compile with --adapter-dtype float32"):
        gqsa_compile(str(folder / "checkpoint"), tmp_path / "out", adapters={"a": large}, **OPTIONS)
