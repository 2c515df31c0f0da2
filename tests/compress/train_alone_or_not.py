"""A program of `test_distributed`: a few end-to-end steps, alone or as one process of several."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from gqsa_compiler.compress.blocks import find_blocks
from gqsa_compiler.compress.parallel.distributed import LaunchedRanks, own_device
from gqsa_compiler.compress.parallel.launch import find_launch
from gqsa_compiler.compress.recipes.recipe import ModelStage
from gqsa_compiler.compress.training.checkpointing import use_checkpoints
from gqsa_compiler.compress.training.model_stage import ModelTrainer
from gqsa_compiler.compress.training.ranks import Ranks
from gqsa_compiler.compress.training.teacher import teacher_states
from gqsa_compiler.frontends.resolve import resolve
from gqsa_compiler.frontends.torch_model import build_model, load_parameters
from tests.compress.training.helpers import random_tokens, student

SAMPLES, LENGTH, BATCH = 9, 16, 3


def main(model: str, folder: str) -> None:
    """Write ``folder/<process>.safetensors``: what was trained, and every step's losses."""
    source = resolve(model)
    dense = build_model(source)
    load_parameters(dense, "", source)
    tokens = random_tokens(SAMPLES, LENGTH)
    teacher = teacher_states(dense, tokens, torch.float32)
    compressed, _ = student(dense, train_weights=True)
    use_checkpoints(compressed.get_submodule(find_blocks(dense)[0]))
    # Rates so small that rounding in the last bit does not become another code.
    stage = ModelStage(epochs=2, batch_tokens=BATCH * LENGTH, weight_rate=1e-3, zero_rate=1e-3)
    launch = find_launch()
    ranks = Ranks() if launch is None else LaunchedRanks(launch, own_device("cpu", launch))
    trainer = ModelTrainer(
        compressed, stage, tokens, teacher, seed=0, dtype=torch.float32, ranks=ranks
    )
    losses = []
    while trainer.step < trainer.steps:
        step = trainer.train_step()
        losses.append([step.losses.total, step.losses.divergence, step.losses.cross_entropy])
    tensors = {**trainer.state(), "losses": torch.tensor(losses, dtype=torch.float64)}
    save_file(tensors, Path(folder) / f"{ranks.index}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
