"""Calibration tokens: from a text file, or text that the model samples itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gqsa_compiler.errors import UsageError

Progress = Callable[[str, int, int], None]

SAMPLED_TOKENS = 1024
"""Sampling is among so many most likely tokens."""

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


def fast_dtype(parameters: int) -> torch.dtype:
    """Choose the dtype that samples text quickest: bfloat16 where the CPU multiplies it."""
    quick = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    # Above a billion parameters memory decides.
    return torch.bfloat16 if quick or parameters > 1_000_000_000 else torch.float32


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
            likely, ids = result.logits[:, -1].float().topk(min(SAMPLED_TOKENS, vocabulary))
            pick = torch.multinomial(likely.softmax(-1), 1, generator=generator)
            token = ids.gather(1, pick)
            tokens.append(token)
            if progress is not None:
                progress(
                    "sampling calibration text", done + len(tokens) * len(start), samples * length
                )
        done += length * len(start)
        parts.append(torch.cat(tokens, dim=1))
    return torch.cat(parts)
