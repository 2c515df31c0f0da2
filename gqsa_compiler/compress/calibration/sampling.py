"""Calibration text that the model writes itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from gqsa_compiler.compress.gemm import half_linears, multiplies_bfloat16
from gqsa_compiler.errors import ModelError
from gqsa_compiler.progress import Progress

RARE = 1e-4
"""Tokens so many times less likely than the likeliest are never picked."""

CACHE_BYTES = 2 << 30
"""Memory that the key-value cache of the sequences written at once may always take."""

MOST_SEQUENCES = 256
"""Sequences written at once; more are no faster."""

FIXED_DATE = "{%- macro strftime_now(format) -%} 01 Jan 2025 {%- endmacro -%}"
"""What a chat template is told the date to be: the same seed gives the same text tomorrow."""


def sampling_dtype(
    stored: torch.dtype,
    device: torch.device = torch.device("cpu"),  # noqa: B008 (a constant)
) -> torch.dtype:
    """Choose what a model samples text in: never wider than it is stored, 16 bits for GGUF."""
    if stored == torch.float32 and device.type == "cpu" and not multiplies_bfloat16():
        return torch.float32
    # Not float16, in which activations may overflow.
    return torch.bfloat16


def sampling_batch(model: Any, samples: int, length: int) -> int:
    """Count the sequences to write at once; at most `MOST_SEQUENCES`.

    Their key-value cache fits in `CACHE_BYTES`, or in half of what the weights take: a large
    model's weights are read once for all of them. Batches are of about one size.
    """
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    weights = sum(parameter.nbytes for parameter in model.parameters())
    most = max(1, min(MOST_SEQUENCES, max(CACHE_BYTES, weights // 2) // (token * length)))
    return math.ceil(samples / math.ceil(samples / most))


@torch.inference_mode()
def sample_text(
    model: Any,
    bos_token_id: int | None,
    samples: int,
    length: int,
    seed: int,
    progress: Progress | None = None,
    chat: Sequence[int] = (),
) -> Tensor:
    """Let the model write text, at temperature 1.

    Every other sequence begins with a random token, for breadth. The rest begin as the model's
    texts do: with the beginning-of-text token, or, each second of them, as a conversation does if
    the model is made for that.

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
    chat : sequence of int
        The tokens before a user's first words, if the model has a chat template (`chat_start`).

    Returns
    -------
    int64 [samples, length]
        On the CPU.

    Raises
    ------
    ModelError
        The model's logits are not finite.
    """
    from gqsa_compiler.compress.calibration.attention import quick_attention

    generator = torch.Generator().manual_seed(seed)
    # What is given of every sequence; the model writes where it is -1.
    given = torch.full((samples, length), -1)
    given[:, 0] = torch.randint(model.config.vocab_size, (samples,), generator=generator)
    if bos_token_id is not None:
        given[::2, 0] = bos_token_id
    if chat:
        head = torch.tensor(chat)[: length - 1]
        given[2::4, : len(head)] = head
    # Every pick's number is drawn here, so that a sequence does not depend on those beside it.
    luck = torch.rand(samples, length, generator=generator, dtype=torch.float64)
    size = sampling_batch(model, samples, length)
    parts: list[Tensor] = []
    on_cpu = model.device.type == "cpu"
    with quick_attention(model), half_linears(model) if on_cpu else nullcontext():
        for batch in zip(given.split(size), luck.split(size), strict=True):
            parts.append(_write(model, *batch, size * len(parts), samples, progress))
    return torch.cat(parts)


def _write(
    model: Any, given: Tensor, luck: Tensor, before: int, samples: int, progress: Progress | None
) -> Tensor:
    """Write a batch, int64 [B, length], where `given` of that shape is -1."""
    from gqsa_compiler.compress.calibration.attention import growing_cache

    length = luck.shape[1]
    given, luck = given.to(model.device), luck.to(model.device)
    cache = growing_cache(model.config.num_hidden_layers)
    token = given[:, :1]
    tokens = [token]
    while len(tokens) < length:
        at = len(tokens)
        logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]
        fixed = given[:, at : at + 1]
        token = torch.where(fixed < 0, pick(logits, luck[:, at]), fixed)
        tokens.append(token)
        if progress is not None:
            done = before * length + len(tokens) * len(given)
            progress("sampling calibration text", done, samples * length)
    return torch.cat(tokens, dim=1).cpu()


def chat_start(tokenizer: Any) -> list[int]:
    """Return what a model's chat template puts before a user's first words; [] without one."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    marker = "calibration"
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": marker}],
            tokenize=False,
            chat_template=FIXED_DATE + tokenizer.get_chat_template(),
        )
    except Exception:
        # A template is a program of the model's author; one that wants more than a user's turn
        # fails in its own way, and there is no way to say how its conversations begin.
        return []
    head = text.rpartition(marker)[0]
    tokens: list[int] = tokenizer(head, add_special_tokens=False)["input_ids"] if head else []
    return tokens


def pick(logits: Tensor, luck: Tensor) -> Tensor:
    """Draw a token a row.

    Parameters
    ----------
    logits : float [B, V]
    luck : float64 [B]
        Uniform in [0, 1).

    Returns
    -------
    int64 [B, 1]

    Raises
    ------
    ModelError
        A row's largest logit is not finite.
    """
    top = logits.amax(-1, keepdim=True)
    if not bool(top.isfinite().all()):
        raise ModelError(
            "The model's logits are not finite, so it cannot write its calibration text; its "
            "weights are damaged, or too large for 16-bit arithmetic."
        )
    # Few tokens are not rare, so only those are looked at: all rows' in one long list.
    likely = logits >= top + math.log(RARE)
    row, column = likely.nonzero(as_tuple=True)
    ladder = (logits[row, column].double() - top[row, 0].double()).exp().cumsum(0)
    counts = likely.sum(-1)
    last = counts.cumsum(0) - 1
    ends = ladder[last]
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])
    found = torch.searchsorted(ladder, begins + luck * (ends - begins), right=True)
    # Rounding may lead out of the row.
    return column[found.clamp(last - counts + 1, last)].unsqueeze(1)
