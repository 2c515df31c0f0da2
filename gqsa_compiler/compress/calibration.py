"""Calibration tokens: from a text file, or text that the model samples itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gqsa_compiler.compress.gemm import half_linears, multiplies_bfloat16
from gqsa_compiler.errors import UsageError

Progress = Callable[[str, int, int], None]

RARE = 1e-4
"""Tokens so many times less likely than the likeliest are never picked."""

ATTENTION = "gqsa_one_query"
"""The name under which transformers knows `_attend`."""

CACHE_BYTES = 1 << 30
"""Most memory for the key-value cache of the sequences sampled at once."""


def read_calibration(path: Path, tokenizer: Any, samples: int, length: int) -> Tensor:
    """Cut a UTF-8 text into token sequences, evenly spread over it.

    Parameters
    ----------
    path : Path
    tokenizer : transformers.PreTrainedTokenizerBase
        If it begins texts with a special token, so does every sequence.
    samples : int
    length : int
        Tokens of a sequence.

    Returns
    -------
    int64 [samples, length]

    Raises
    ------
    UsageError
        The file cannot be read, is not UTF-8 or has too few tokens.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"The calibration file {path} is not UTF-8 text ({error}).") from error
    except OSError as error:
        raise UsageError(
            f"The calibration file {path} cannot be read: {error.strerror}."
        ) from error
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    start = [bos] if bos is not None and tokenizer("a")["input_ids"][0] == bos else []
    body = length - len(start)
    windows = len(tokens) // body
    if windows < samples:
        raise UsageError(
            f"The calibration file {path} has {len(tokens)} tokens; {samples} samples of {length} "
            f"need {samples * body}. Use a longer text or fewer samples (--samples {windows})."
            if windows
            else f"The calibration file {path} has {len(tokens)} tokens, fewer than one sequence "
            f"of {length}; use a longer text or a smaller --sequence-length."
        )
    chosen = [index * windows // samples for index in range(samples)]
    return torch.tensor([start + tokens[i * body : (i + 1) * body] for i in chosen])


def sampling_dtype(stored: torch.dtype) -> torch.dtype:
    """Choose what a model samples text in: never wider than it is stored, 16 bits for GGUF."""
    if stored == torch.float32 and not multiplies_bfloat16():
        return torch.float32
    # Not float16, in which activations may overflow.
    return torch.bfloat16


def sampling_batch(config: Any, length: int, dtype: torch.dtype) -> int:
    """Count the sequences whose key-value cache fits in `CACHE_BYTES`; 1 to 128."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * width * dtype.itemsize
    return max(1, min(128, CACHE_BYTES // (token * length)))


@torch.inference_mode()
def sample_text(
    model: Any,
    bos_token_id: int | None,
    samples: int,
    length: int,
    seed: int,
    progress: Progress | None = None,
) -> Tensor:
    """Let the model write text, at temperature 1.

    Every other sequence begins with the beginning-of-text token if there is one, the rest with a
    random token: the first give the model's own distribution, the others its breadth.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    bos_token_id : int or None
    samples : int
    length : int
        Tokens of a sequence, the first included.
    seed : int
    progress : callable, optional
        Called with (stage, tokens done, tokens in all).

    Returns
    -------
    int64 [samples, length]
    """
    with _quick_attention(model), half_linears(model):
        return _sample(model, bos_token_id, samples, length, seed, progress)


def _sample(
    model: Any,
    bos_token_id: int | None,
    samples: int,
    length: int,
    seed: int,
    progress: Progress | None,
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.vocab_size
    first = torch.randint(vocabulary, (samples, 1), generator=generator)
    if bos_token_id is not None:
        first[::2] = bos_token_id
    done = 0
    parts = []
    for start in first.split(sampling_batch(model.config, length, model.dtype)):
        token, cache, tokens = start, None, [start]
        while len(tokens) < length:
            result = model(input_ids=token, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            token = _pick(result.logits[:, -1].float(), generator)
            tokens.append(token)
            if progress is not None:
                progress(
                    "sampling calibration text", done + len(tokens) * len(start), samples * length
                )
        done += length * len(start)
        parts.append(torch.cat(tokens, dim=1))
    return torch.cat(parts)


def _pick(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a token a row, int64 [B, 1], from float32 logits [B, V]."""
    chances = logits.softmax(-1)
    chances.masked_fill_(chances < RARE * chances.amax(-1, keepdim=True), 0)
    ladder = chances.cumsum(-1)
    # Above 0 and at most the last step: a token of chance 0 is no step up and is never found.
    height = (1 - torch.rand(len(logits), 1, generator=generator)) * ladder[:, -1:]
    return torch.searchsorted(ladder, height)


@contextmanager
def _quick_attention(model: Any) -> Iterator[None]:
    """Let a model attend with one query a sequence, twenty times faster than PyTorch does."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend from one query; the queries of a key-value head go through one product."""
    batch, heads, queries, width = query.shape
    assert queries == 1, "sampling gives the model one token at a time"
    folded = query.reshape(batch, key.shape[1], -1, width)
    scores = (folded @ key.transpose(2, 3)).float() * (scaling or width**-0.5)
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    result = scores.softmax(-1).to(value.dtype) @ value
    return result.reshape(batch, 1, heads, width), None
