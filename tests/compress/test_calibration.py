"""Calibration tokens from files and from the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gqsa_compiler.compress.calibration import read_calibration, sample_text
from gqsa_compiler.errors import UsageError
from gqsa_compiler.frontends.source import resolve
from gqsa_compiler.frontends.torch_model import load_dense
from tests.tiny_models import VOCAB_SIZE, make_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return load_dense(resolve(str(make_tiny("llama", tmp_path_factory.mktemp("tiny") / "m"))))


def test_windows_are_spread_over_the_text(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    tokenizer = tiny[1]
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(n) for n in range(1000)), encoding="utf-8")
    tokens = read_calibration(text, tokenizer, 4, 16)
    assert tokens.shape == (4, 16)
    whole = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    assert tokens[0].tolist() == whole[:16]
    last = 3 * (len(whole) // 16) // 4 * 16
    assert tokens[3].tolist() == whole[last : last + 16]


class StartingTokenizer:
    """Begins texts with token 1, as Llama's and Gemma's tokenizers do."""

    bos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        ids = [10 + ord(letter) % 50 for letter in text]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}


def test_every_window_begins_as_the_tokenizer_begins_texts(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcdefghij" * 10, encoding="utf-8")
    tokens = read_calibration(text, StartingTokenizer(), 5, 11)
    assert tokens[:, 0].tolist() == [1] * 5
    assert (tokens[:, 1:] >= 10).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"The quick brown fox.", "fewer than one sequence of 64"),
        (b"The quick brown fox jumps. " * 30, "Use a longer text or fewer samples"),
        (b"\xff\xfe\x00bad", "is not UTF-8 text"),
        (b"", "has 0 tokens"),
        (None, "cannot be read"),
    ],
)
def test_refuses_unusable_files(
    tiny: tuple[Any, Any], tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_calibration(path, tiny[1], 100, 64)
    assert str(path) in str(caught.value)


def test_sampling_is_seeded_and_reports_progress(tiny: tuple[Any, Any]) -> None:
    seen: list[tuple[str, int, int]] = []
    model = tiny[0]
    first = sample_text(model, 1, 6, 12, 7, lambda *step: seen.append(step))
    assert first.shape == (6, 12)
    assert first.dtype == torch.int64
    assert int(first.min()) >= 0
    assert int(first.max()) < VOCAB_SIZE
    assert first[::2, 0].tolist() == [1] * 3
    assert seen[-1] == ("sampling calibration text", 72, 72)
    assert torch.equal(first, sample_text(model, 1, 6, 12, 7))
    assert not torch.equal(first, sample_text(model, 1, 6, 12, 8))


def test_sampling_follows_the_model(tiny: tuple[Any, Any]) -> None:
    model = tiny[0]
    tokens = sample_text(model, None, 32, 24, 0)
    with torch.inference_mode():
        likelihood = model(tokens).logits[:, :-1].log_softmax(-1)
    scores = likelihood.gather(2, tokens[:, 1:, None])
    noise = torch.randint(VOCAB_SIZE, tokens.shape, generator=torch.Generator().manual_seed(0))
    assert float(scores.mean()) > float(likelihood.gather(2, noise[:, 1:, None]).mean()) + 0.5
