"""Calibration text that a model writes itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gqsa_compiler.compress.calibration import CalibrationSpec, calibration_tokens, sample_text
from gqsa_compiler.compress.calibration import sampling as sampling_module
from gqsa_compiler.compress.calibration.attention import STEP
from gqsa_compiler.compress.calibration.sampling import (
    RARE,
    chat_start,
    pick,
    sampling_batch,
)
from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.resolve import resolve
from gqsa_compiler.frontends.torch_model import load_dense, load_tokenizer
from tests.tiny_models import FAMILIES, VOCAB_SIZE, make_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_dense(resolve(str(make_tiny("llama", tmp_path_factory.mktemp("tiny") / "m"))))[0]


def _slow_pick(logits: Tensor, luck: Tensor) -> Tensor:
    """Draw from the whole softmax without the rare tokens; float [B, V], float64 [B]."""
    chances = logits.double().softmax(-1)
    chances[chances < RARE * chances.amax(-1, keepdim=True)] = 0
    ladder = chances.cumsum(-1)
    return (ladder <= (luck[:, None] * ladder[:, -1:])).sum(-1)


def test_sampling_is_seeded_and_reports_progress(model: Any) -> None:
    seen: list[tuple[str, int, int]] = []
    first = sample_text(model, 1, 6, 12, 7, lambda *step: seen.append(step))
    assert first.shape == (6, 12)
    assert first.dtype == torch.int64
    assert int(first.min()) >= 0
    assert int(first.max()) < VOCAB_SIZE
    assert first[::2, 0].tolist() == [1] * 3
    assert seen[-1] == ("sampling calibration text", 72, 72)
    assert torch.equal(first, sample_text(model, 1, 6, 12, 7))
    assert not torch.equal(first, sample_text(model, 1, 6, 12, 8))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_is_the_one_that_the_whole_model_gives(family: str, tmp_path: Path) -> None:
    """Beyond a step of the cache, and with sliding windows: no position is lost or mixed up."""
    model = load_dense(resolve(str(make_tiny(family, tmp_path / "m"))))[0]
    samples, length, seed = 3, STEP + 8, 5
    tokens = sample_text(model, 1, samples, length, seed)
    generator = torch.Generator().manual_seed(seed)
    torch.randint(VOCAB_SIZE, (samples, 1), generator=generator)
    luck = torch.rand(samples, length, generator=generator, dtype=torch.float64)
    with torch.inference_mode():
        logits = model(tokens).logits
    expected = [_slow_pick(logits[:, at - 1], luck[:, at]) for at in range(1, length)]
    assert torch.equal(tokens[:, 1:], torch.stack(expected, dim=1))


def test_picks_by_the_softmax_without_rare_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(50, 1000, generator=generator)
    luck = torch.rand(50, generator=generator, dtype=torch.float64)
    luck[0] = 0
    assert torch.equal(pick(logits, luck)[:, 0], _slow_pick(logits, luck))


def test_rounding_never_leads_to_a_rare_token() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 6 * torch.randn(50, 1000, generator=generator)
    luck = torch.full((50,), 1 - 2**-53, dtype=torch.float64)
    picked = logits.gather(1, pick(logits, luck))
    assert bool((picked > logits.amax(1, keepdim=True) - 9.3).all())


def test_picks_every_token_as_often_as_it_is_likely() -> None:
    logits = torch.tensor([1.0, 0.0, -20.0, 2.0])
    luck = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    counts = pick(logits.expand(4000, -1), luck).flatten().bincount(minlength=4)
    chances = logits.softmax(-1)
    assert torch.allclose(counts / 4000, chances, atol=1e-3)
    assert counts[2] == 0


def test_batches_do_not_change_the_text(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    whole = sample_text(model, 1, 7, 12, 3)
    monkeypatch.setattr(sampling_module, "MOST_SEQUENCES", 3)
    split = sample_text(model, 1, 7, 12, 3, lambda _stage, done, _total: seen.append(done))
    assert torch.equal(whole, split)
    assert seen == sorted(seen)
    assert seen[-1] == 84


def test_batches_fit_in_memory_and_are_even(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    token = 2 * 3 * 2 * 16 * 4  # keys and values, layers, heads, width, float32
    monkeypatch.setattr(sampling_module, "CACHE_BYTES", 0)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    most = weights // 2 // (token * 64)
    assert sampling_batch(model, 4, 64) == 4
    assert sampling_batch(model, most + 1, 64) == (most + 2) // 2
    assert sampling_batch(model, 100, 10**9) == 1


def test_attention_is_put_back(model: Any) -> None:
    before = model.config._attn_implementation
    sample_text(model, None, 1, 4, 0)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_model_is_refused(value: float, tmp_path: Path) -> None:
    model = load_dense(resolve(str(make_tiny("llama", tmp_path / "m"))))[0]
    model.model.norm.weight.data[3] = value
    with pytest.raises(ModelError, match=r"logits are not finite.*damaged"):
        sample_text(model, 1, 2, 8, 0)


def test_a_model_samples_what_a_spec_asks_for(tmp_path: Path) -> None:
    source = resolve(str(make_tiny("qwen2", tmp_path / "m")))
    seen: list[tuple[str, int, int]] = []
    spec = CalibrationSpec(samples=4, sequence_length=10, seed=2)
    tokens = calibration_tokens(spec, source, 1, lambda *step: seen.append(step))
    assert tokens.shape == (4, 10)
    assert tokens.dtype == torch.int64
    assert seen[0] == ("sampling calibration text", 0, 40)
    assert seen[-1] == ("sampling calibration text", 40, 40)
    assert torch.equal(tokens, calibration_tokens(spec, source, 1))
    assert tokens[0, 0] == 1
    chat = chat_start(load_tokenizer(source))
    assert tokens[2, : len(chat)].tolist() == chat[: spec.sequence_length - 1]


def test_some_sequences_begin_as_conversations(model: Any) -> None:
    tokens = sample_text(model, 1, 8, 10, 0, chat=[5, 6, 7])
    plain = sample_text(model, 1, 8, 10, 0)
    assert tokens[2::4, :3].tolist() == [[5, 6, 7]] * 2
    others = [0, 1, 3, 4, 5, 7]
    assert torch.equal(tokens[others], plain[others])
    # The rest of a conversation follows from its beginning.
    logits = model(tokens[2:3]).logits[:, 2]
    generator = torch.Generator().manual_seed(0)
    torch.randint(VOCAB_SIZE, (8,), generator=generator)
    luck = torch.rand(8, 10, generator=generator, dtype=torch.float64)
    assert int(tokens[2, 3]) == int(_slow_pick(logits, luck[2:3, 3]))
    # A beginning longer than the sequence is cut; a token is left to the model.
    long = sample_text(model, 1, 4, 3, 0, chat=[5, 6, 7, 8])
    assert long[2, :2].tolist() == [5, 6]


def test_a_chat_template_says_how_conversations_begin(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(resolve(str(make_tiny("llama", tmp_path / "m"))))
    assert tokenizer.decode(chat_start(tokenizer)) == "<|im_start|>user\n"
    tokenizer.chat_template = "{{ strftime_now('%Y') }} {{ messages[0]['content'] }}"
    assert tokenizer.decode(chat_start(tokenizer)) == "01 Jan 2025 "
    tokenizer.chat_template = "{{ raise_exception('system first') }}"
    assert chat_start(tokenizer) == []
    tokenizer.chat_template = "no place for what the user says"
    assert chat_start(tokenizer) == []
    tokenizer.chat_template = None
    assert chat_start(tokenizer) == []


@pytest.mark.gpu
def test_a_gpu_writes_text_too(tmp_path: Path) -> None:
    source = resolve(str(make_tiny("llama", tmp_path / "m")))
    spec = CalibrationSpec(samples=4, sequence_length=STEP + 8, seed=2)
    tokens = calibration_tokens(spec, source, 1, device="cuda")
    assert tokens.device.type == "cpu"
    assert tokens.shape == (4, STEP + 8)
    assert torch.equal(tokens[:, 0], calibration_tokens(spec, source, 1)[:, 0])
