"""What each layer becomes, from what losing it costs the model: measured before the first block."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from gqsa_compiler.compress.allocation.allocate import Allocation, allocate, balance_model
from gqsa_compiler.compress.allocation.sensitivity import measure
from gqsa_compiler.compress.recipes.budget import MOST_SPARSITY
from gqsa_compiler.compress.recipes.recipe import Recipe
from gqsa_compiler.compress.recipes.target import LayerTarget
from gqsa_compiler.compress.work.runevents import Phase
from gqsa_compiler.compress.work.runlog import RunLog
from gqsa_compiler.compress.work.workdir import WorkDirectory
from gqsa_compiler.frontends.source import ModelSource
from gqsa_compiler.progress import Progress

STATE = "plan"


@dataclass(frozen=True, eq=False)
class Plan:
    """What each layer becomes.

    Parameters
    ----------
    targets : mapping of str to LayerTarget
        By module path; layers that are not named become the recipe's target.
    row_weights : mapping of str to float32 [N]
        By module path: what an error in each output costs the model. Empty if the recipe's score
        does not ask for them.
    """

    targets: Mapping[str, LayerTarget]
    row_weights: Mapping[str, Tensor]

    def block_targets(
        self, name: str, paths: list[str], default: LayerTarget
    ) -> Mapping[str, LayerTarget]:
        """Return a block's targets by path inside it."""
        return {path: self.targets.get(f"{name}.{path}", default) for path in paths}

    def block_rows(
        self, name: str, paths: list[str], device: torch.device
    ) -> Mapping[str, Tensor] | None:
        """Return a block's row weights by path inside it, if there are any, on a device."""
        if not self.row_weights:
            return None
        return {path: self.row_weights[f"{name}.{path}"].to(device) for path in paths}


def make_plan(
    source: ModelSource,
    recipe: Recipe,
    tokens: Tensor,
    seed: int,
    device: torch.device,
    work: WorkDirectory,
    log: RunLog,
    progress: Progress,
) -> Plan:
    """Measure the layers and choose, unless the work directory has the plan or none is needed.

    Parameters
    ----------
    source : ModelSource
        The dense model.
    recipe : Recipe
    tokens : int64 [S, T]
        Calibration sequences.
    seed : int
    device : torch.device
    work : WorkDirectory
        Gets the plan.
    log : RunLog
    progress : callable

    Raises
    ------
    UsageError
        The budget or the sparsity cannot be reached.
    ModelError
        A layer's cost is infinite or NaN.
    """
    if not recipe.measures:
        return Plan({}, {})
    found = work.load(STATE)
    if found is None:
        began = time.monotonic()
        chosen, rows = _measure(source, recipe, tokens, seed, device, progress)
        targets = {} if chosen is None else chosen.targets
        text = json.dumps({name: asdict(target) for name, target in targets.items()})
        work.save(STATE, rows, {"targets": text})
        log.write(Phase("measuring the layers", time.monotonic() - began, _facts(chosen)))
        return Plan(targets, rows)
    stored = json.loads(str(found[1]["targets"]))
    return Plan({name: LayerTarget(**target) for name, target in stored.items()}, found[0])


def _measure(
    source: ModelSource,
    recipe: Recipe,
    tokens: Tensor,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> tuple[Allocation | None, dict[str, Tensor]]:
    bits, group_sizes = {recipe.bits}, {recipe.group_size}
    most = max(MOST_SPARSITY, recipe.sparsity)
    if recipe.budget is not None:
        some_bits, some_sizes = recipe.budget.choices(recipe.target)
        bits, group_sizes = bits | set(some_bits), group_sizes | set(some_sizes)
        most = recipe.budget.most_sparsity
    found = measure(
        source,
        tokens,
        bits=sorted(bits),
        group_sizes=sorted(group_sizes),
        most_sparsity=most,
        balance="row" if recipe.balance == "row" else "matrix",
        weigh_rows=recipe.score == "fisher",
        seed=seed,
        device=device,
        progress=progress,
    )
    chosen: Allocation | None = None
    if recipe.budget is not None:
        chosen = allocate(found.costs, recipe.budget, recipe.target, balance=recipe.balance)
    elif recipe.balance == "model":
        chosen = balance_model(found.costs, recipe.target, most_sparsity=most)
    rows = dict(found.rows) if recipe.score == "fisher" else {}
    return chosen, rows


def _facts(chosen: Allocation | None) -> dict[str, float]:
    """Say what the choice is predicted to buy."""
    if chosen is None:
        return {}
    facts = {
        "bits a weight of the plan": chosen.bits_per_weight,
        "predicted KL before training, nats a token": chosen.predicted_loss,
    }
    if chosen.uniform_loss is not None:
        facts["the same if every layer got one sparsity"] = chosen.uniform_loss
    return facts
