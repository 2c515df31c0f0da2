"""End-to-end training of a compressed model: stage two (E2E-OQP), and the weights' stage."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gqsa_compiler.compress.recipes.recipe import ModelStage
from gqsa_compiler.compress.training.grouped_linear import GroupedLinear
from gqsa_compiler.compress.training.losses import LossParts, distill
from gqsa_compiler.compress.training.optimizer import (
    clamp_zeros,
    damp,
    epoch_order,
    grouped_layers,
    make_optimizer,
    normalise,
    parameter_groups,
    set_rates,
)
from gqsa_compiler.compress.training.ranks import Ranks
from gqsa_compiler.errors import ModelError

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """One optimiser step, for logs.

    Parameters
    ----------
    step, steps : int
        Steps done, and in all.
    losses : LossParts
    rate : float
        Share of the peak learning rates.
    tokens : int
        Tokens of the stage so far.
    seconds : float
        Wall time of the step.
    """

    step: int
    steps: int
    losses: LossParts
    rate: float
    tokens: int
    seconds: float


class ModelTrainer:
    """Trains a model whose linear layers are grouped, against the dense model's hidden states.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With `GroupedLinear` layers; whether their codes are frozen is theirs to say. Its head is
        trained if it is one of them.
    stage : ModelStage
    tokens : int64 [S, T]
        Calibration sequences.
    teacher : float [S, T, H]
        The dense model's hidden states after its last norm.
    seed : int
        Of the order of the sequences.
    dtype : torch.dtype
        What products are computed in; the residual stream is float32.
    ranks : Ranks, optional
        Processes that take their shares of each step.
    dense_head : float [V, H], optional
        The dense model's head, where the model's own is compressed.

    Raises
    ------
    UsageError
        There are more processes than sequences in a step, or nothing is trained.
    """

    def __init__(
        self,
        model: Any,
        stage: ModelStage,
        tokens: Tensor,
        teacher: Tensor,
        *,
        seed: int,
        dtype: torch.dtype,
        ranks: Ranks | None = None,
        dense_head: Tensor | None = None,
    ) -> None:
        self._ranks = ranks or Ranks()
        self._model = model
        self._stage = stage
        self._tokens = tokens
        self._teacher = teacher
        self._dtype = dtype
        head = model.get_output_embeddings()
        self._head = head if isinstance(head, GroupedLinear) else None
        if self._head is None:
            dense_head = head.weight
        assert dense_head is not None, "a compressed head is compared with the dense one"
        self._dense_head = dense_head.detach().to(dtype)
        self._cap = getattr(model.config, "final_logit_softcapping", None)
        self._device = next(model.parameters()).device
        self._layers = grouped_layers(model)
        model.requires_grad_(False)
        norms = dict(norm_parameters(model))
        groups = parameter_groups(self._layers.values(), stage, norms.values(), stage.norm_rate)
        damp(groups, self._head_parameters())
        self._optimizer = make_optimizer(groups)
        self._trained = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        samples, length = tokens.shape
        self._batch = batch_size(stage, samples, length)
        self._ranks.check_batch(self._batch)
        passed = samples * stage.epochs
        if stage.most_tokens is not None:
            passed = min(passed, stage.most_tokens / length)
        self.steps = max(1, math.ceil(passed / self._batch))
        self.step = 0
        self._order = epoch_order(samples, self.steps * self._batch, seed)

    def train_step(self) -> Step:
        """Take one optimiser step.

        Raises
        ------
        ModelError
            The loss is infinite or NaN.
        """
        began = time.monotonic()
        chosen = self._order[self.step * self._batch : (self.step + 1) * self._batch]
        mine = self._ranks.take(chosen)
        share = len(mine) / len(chosen)
        ids = self._tokens[mine].to(self._device)
        wanted = self._teacher[mine][:, :-1].flatten(0, 1).to(self._device)
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            hidden = self._model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        seen = hidden.detach()[:, :-1].flatten(0, 1)
        losses, slope = self._distill(seen, wanted, ids[:, 1:].flatten())
        losses = self._ranks.mean_losses(losses, share)
        if not math.isfinite(losses.total):
            raise ModelError(
                f"The loss is not a finite number at step {self.step + 1}; lower the recipe's "
                "rates."
            )
        if hidden.requires_grad:  # not where the head alone is trained
            gradient = torch.zeros_like(hidden)
            gradient[:, :-1] = slope.view(len(ids), -1, hidden.shape[-1])
            hidden.backward(gradient)
        self._ranks.add_gradients(self._trained.values(), share)
        normalise(self._head_parameters())
        rate = set_rates(self._optimizer, self.step, self.steps, self._stage.warmup)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        clamp_zeros(self._layers.values())
        self.step += 1
        tokens = self.step * self._batch * ids.shape[1]
        seconds = time.monotonic() - began
        return Step(self.step, self.steps, losses, rate, tokens, seconds)

    def _head_parameters(self) -> list[nn.Parameter]:
        """List what a compressed head has to train."""
        return [] if self._head is None else list(self._head.parameters())

    def _distill(
        self, hidden: Tensor, teacher: Tensor, next_tokens: Tensor
    ) -> tuple[LossParts, Tensor]:
        """Return the losses and their gradient by `hidden`; sets those of a compressed head."""
        share, cap, dense = self._stage.distillation, self._cap, self._dense_head
        if self._head is None:
            return distill(hidden, teacher, next_tokens, dense, share, cap)
        head, slope = self._head.decoded(), None
        if any(parameter.requires_grad for parameter in self._head_parameters()):
            slope = torch.zeros(head.shape, dtype=torch.float32, device=head.device)
        found = distill(
            hidden, teacher, next_tokens, head, share, cap, dense_head=dense, head_gradient=slope
        )
        if slope is not None:
            self._head.pass_back(slope)
        return found

    def state(self) -> Tensors:
        """Return what has been trained and the optimiser's moments, by name, to go on later.

        They are not copied: the next step changes them.
        """
        tensors: Tensors = {}
        for name, parameter in self._trained.items():
            tensors[name] = parameter.detach()
            for key in ("exp_avg", "exp_avg_sq"):
                if parameter in self._optimizer.state:
                    tensors[f"{key}/{name}"] = self._optimizer.state[parameter][key]
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: Tensors, step: int) -> None:
        """Go on where `state` was taken after so many steps.

        The moments are taken over, not copied, if they are on the model's device.
        """
        self.step = step
        for name, parameter in self._trained.items():
            parameter.copy_(tensors[name])
            if f"exp_avg/{name}" not in tensors:  # no step was taken yet
                continue
            device = parameter.device
            self._optimizer.state[parameter] = {
                # As the fused optimiser makes it.
                "step": torch.tensor(float(step), dtype=torch.float32, device=device),
                "exp_avg": tensors[f"exp_avg/{name}"].to(device),
                "exp_avg_sq": tensors[f"exp_avg_sq/{name}"].to(device),
            }


def batch_size(stage: ModelStage, samples: int, length: int) -> int:
    """Return how many of `samples` sequences, of so many tokens each, a step takes."""
    return max(1, min(samples, stage.batch_tokens // length))


def norm_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """List the weights of the norms: every vector that is no bias and no group parameter."""
    return [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.ndim == 1 and name.endswith("weight")
    ]
