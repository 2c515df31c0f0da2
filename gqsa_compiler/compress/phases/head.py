"""The language-model head: one shot after the last block, then trained with the whole model."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from gqsa_compiler.compress.blocks import HEAD, final_states
from gqsa_compiler.compress.recipes.recipe import Recipe
from gqsa_compiler.compress.solver.grouped import GroupedWeight
from gqsa_compiler.compress.solver.head import compress_head, uncertainty
from gqsa_compiler.compress.solver.hessian import MomentAccumulator
from gqsa_compiler.compress.training.attach import attach, results
from gqsa_compiler.compress.training.grouped_linear import GroupedLinear
from gqsa_compiler.compress.work.reader import WorkReader
from gqsa_compiler.compress.work.results import BLOCK_STATE, from_tensors, to_tensors
from gqsa_compiler.compress.work.runevents import Phase
from gqsa_compiler.compress.work.runlog import RunLog
from gqsa_compiler.compress.work.workdir import WorkDirectory
from gqsa_compiler.progress import Progress

STATE = "head"
"""Names the state of the one-shot head; those of the stages' heads begin with the stage."""

STAGE = "compressing the head"


@torch.no_grad()
def one_shot_head(
    model: Any,
    blocks: nn.ModuleList,
    batches: list[Tensor],
    hidden: list[Tensor],
    recipe: Recipe,
    work: WorkDirectory,
    log: RunLog,
    progress: Progress,
) -> None:
    """Quantise the head on what it gets in the compressed model, and save it.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        All but its blocks is there.
    blocks : nn.ModuleList
    batches : list of int64 [B, T]
        Calibration sequences.
    hidden : list of float32 [B, T, H]
        The last compressed block's outputs on them.
    recipe : Recipe
        With a head.
    work : WorkDirectory
    log : RunLog
    progress : callable

    Raises
    ------
    ModelError
        The head or its inputs are not finite numbers.
    """
    assert recipe.head is not None
    progress(STAGE, 0, 1)
    began = time.monotonic()
    moments = MomentAccumulator()
    dense = model.get_output_embeddings().weight.detach()
    cap = getattr(model.config, "final_logit_softcapping", None)
    for batch, last in zip(batches, hidden, strict=True):
        states = final_states(model, blocks, batch, last).flatten(0, 1)
        moments.add(states * uncertainty(states, dense, cap).sqrt()[:, None])
    finished = moments.finish(HEAD)
    weight = compress_head(HEAD, dense, finished, recipe.head, recipe.solver)
    hessian = finished.hessian.float()
    facts = {
        "bits": float(recipe.head.bits),
        "group size": float(recipe.head.group_size),
        "weighted error of the logits, relative": _size(weight.decode() - dense, hessian)
        / _size(dense, hessian),
    }
    work.save(STATE, to_tensors({HEAD: weight}), {})
    log.write(Phase(STAGE, time.monotonic() - began, facts))
    progress(STAGE, 1, 1)


def load_head(work: WorkReader, stage: str) -> GroupedWeight:
    """Read the head as a stage has left it; ``block`` stands for the one shot.

    Raises
    ------
    GqsaError
        The state is damaged.
    """
    found = work.load(head_state(stage))
    assert found is not None, "the stage is done"
    return from_tensors(found[0], [HEAD])[HEAD]


def attach_head(model: Any, work: WorkReader, stage: str, dtype: torch.dtype) -> Tensor:
    """Give a model the head that a stage has left, to be trained; returns the dense one.

    Its codes are frozen in every stage: latent weights would take 16 bytes each, and were found to
    gain nothing. An embedding that is tied to the head stays as it is.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With its dense head. Changed in place.
    work : WorkReader
    stage : str
        The stage before.
    dtype : torch.dtype
        What products are computed in.

    Returns
    -------
    float32 [V, H]
    """
    dense: Tensor = model.get_output_embeddings().weight.detach()
    attach(model, {HEAD: load_head(work, stage)}, dtype)
    return dense


def save_head(model: Any, work: WorkDirectory, stage: str) -> None:
    """Save the head of a model that a stage has trained.

    Raises
    ------
    ModelError
        Training led to numbers that are not finite.
    """
    layer = model.get_output_embeddings()
    assert isinstance(layer, GroupedLinear)
    work.save(head_state(stage), to_tensors(results({HEAD: layer})), {})


def head_state(stage: str) -> str:
    """Return the name of the state that holds what a stage made of the head."""
    return STATE if stage == BLOCK_STATE else f"{stage}-{STATE}"


def _size(weight: Tensor, hessian: Tensor) -> float:
    """Return the mean square of the outputs that a weight gives, times its rows."""
    return float(((weight @ hessian) * weight).sum())
