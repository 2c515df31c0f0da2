"""The dense model's final hidden states: what end-to-end training distils from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gqsa_compiler.errors import ModelError
from gqsa_compiler.progress import Progress

BATCH_TOKENS = 4096
STAGE = "running the dense model"


@torch.no_grad()
def teacher_states(
    model: Any, tokens: Tensor, dtype: torch.dtype, progress: Progress | None = None
) -> Tensor:
    """Run a dense model over calibration sequences.

    Logits would take a hundred times the memory; the output head, which is frozen, makes them
    from these states again.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Dense, in float32 or 16 bits.
    tokens : int64 [S, T]
    dtype : torch.dtype
        What products are computed in, and what the states are kept in.
    progress : callable, optional
        Called with (stage, sequences done, sequences in all).

    Returns
    -------
    `dtype` [S, T, H]
        After the last norm; on the CPU.

    Raises
    ------
    ModelError
        A state is infinite or NaN.
    """
    device = next(model.parameters()).device
    states: Tensor | None = None
    done = 0
    for batch in tokens.split(max(1, BATCH_TOKENS // tokens.shape[1])):
        if progress is not None:
            progress(STAGE, done, len(tokens))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            hidden = model.base_model(input_ids=batch.to(device), use_cache=False)
        part = hidden.last_hidden_state.to("cpu", dtype)
        if states is None:
            states = torch.empty(*tokens.shape, part.shape[-1], dtype=dtype)
        if not torch.isfinite(part).all():
            raise ModelError(
                "The dense model's hidden states are not finite numbers on the calibration text: "
                "its weights are damaged or it overflows."
            )
        states[done : done + len(batch)] = part
        done += len(batch)
    if progress is not None:
        progress(STAGE, done, len(tokens))
    assert states is not None, "no tokens"
    return states
