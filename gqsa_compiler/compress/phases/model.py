"""The end-to-end stages: the whole compressed model, saved now and then on the way."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gqsa_compiler.compress.blocks import linear_layers
from gqsa_compiler.compress.phases.block import load_block
from gqsa_compiler.compress.phases.head import attach_head, save_head
from gqsa_compiler.compress.recipes.recipe import ModelStage, Recipe
from gqsa_compiler.compress.store import round_as_stored
from gqsa_compiler.compress.training.attach import attach, results
from gqsa_compiler.compress.training.checkpointing import needs_checkpoints, use_checkpoints
from gqsa_compiler.compress.training.course import Course
from gqsa_compiler.compress.training.model_stage import ModelTrainer, Step, norm_parameters
from gqsa_compiler.compress.training.optimizer import grouped_layers
from gqsa_compiler.compress.training.ranks import Ranks
from gqsa_compiler.compress.training.teacher import teacher_states
from gqsa_compiler.compress.work.reader import WorkReader
from gqsa_compiler.compress.work.results import BLOCK_STATE, block_state, to_tensors
from gqsa_compiler.compress.work.runevents import Phase
from gqsa_compiler.compress.work.runevents import Step as LogStep
from gqsa_compiler.compress.work.runlog import RunLog
from gqsa_compiler.compress.work.statefile import Metadata
from gqsa_compiler.compress.work.workdir import WorkDirectory
from gqsa_compiler.errors import GqsaError
from gqsa_compiler.frontends.source import ModelSource
from gqsa_compiler.frontends.torch_model import build_model, load_parameters
from gqsa_compiler.progress import Progress, Remaining, Status

SAVE_SECONDS = 300.0
"""Training is saved this often."""

TEACHER = "teacher"

State = tuple[dict[str, Tensor], dict[str, Metadata]]


@dataclass(frozen=True, eq=False)
class ModelPhase:
    """What the end-to-end stages share.

    Parameters
    ----------
    source : ModelSource
        The dense model.
    prefix : str
        Module path of the list of blocks.
    recipe : Recipe
    seed : int
    device : torch.device
    dtype : torch.dtype
        What products are computed in.
    ranks : Ranks
        Processes that train together. The others `join` what process 0 does in `run`.
    """

    source: ModelSource
    prefix: str
    recipe: Recipe
    seed: int
    device: torch.device
    dtype: torch.dtype
    ranks: Ranks = field(default_factory=Ranks)

    def run(
        self,
        tokens: Tensor,
        work: WorkDirectory,
        log: RunLog,
        progress: Progress,
        status: Status,
    ) -> float | None:
        """Run the recipe's end-to-end stages that the work directory does not have.

        Parameters
        ----------
        tokens : int64 [S, T]
            Calibration sequences.
        work : WorkDirectory
            Has every block's state; gets those of each stage's results.
        log : RunLog
        progress, status : callable

        Returns
        -------
        float or None
            Mean KL(dense || compressed) over the last stage's last tenth of steps, nats a token;
            None if the recipe has no such stage.
        """
        divergence = None
        previous = BLOCK_STATE
        for stage in self._stages():
            done = work.load(done_name(stage))
            if done is None:
                divergence = self._run(stage, previous, tokens, work, log, progress, status)
            else:
                divergence = float(done[1]["divergence"])
            previous = stage
        return divergence

    @property
    def last_stage(self) -> str | None:
        """Name of the last end-to-end stage; None if there is none."""
        return self._stages()[-1] if self._stages() else None

    def norms(self, work: WorkDirectory) -> dict[str, Tensor]:
        """Return the norms that the last stage has trained, by tensor name."""
        found = work.load(done_name(self.last_stage)) if self.last_stage else None
        return {} if found is None else found[0]

    def _stages(self) -> list[str]:
        return [stage for stage in self.recipe.stages if stage != BLOCK_STATE]

    def _run(
        self,
        stage: str,
        previous: str,
        tokens: Tensor,
        work: WorkDirectory,
        log: RunLog,
        progress: Progress,
        status: Status,
    ) -> float:
        teacher = self._teacher(tokens, work, log, progress)
        resumed = work.has(stage)
        self.ranks.announce({"stage": stage, "previous": previous, "resumed": resumed})
        model, trainer = self._trainer(stage, previous, tokens, teacher, work)
        course = _go_on(trainer, work.load(stage))
        divergence = self._train(stage, trainer, course, work, log, progress, status)
        for index, block in enumerate(model.get_submodule(self.prefix)):
            done = results(grouped_layers(block), f"{self.prefix}.{index}")
            work.save(block_state(stage, index), to_tensors(done), {})
        if self.recipe.head is not None:
            save_head(model, work, stage)
        norms = {name: weight.detach() for name, weight in norm_parameters(model)}
        work.save(done_name(stage), norms, {"divergence": divergence})
        work.remove(stage)
        return divergence

    def join(
        self, stage: str, previous: str, resumed: bool, tokens: Tensor, work: WorkReader
    ) -> None:
        """Take this process's share of a stage's steps; process 0 saves what comes of it.

        Parameters
        ----------
        stage, previous, resumed
            As process 0 has announced them.
        tokens : int64 [S, T]
        work : WorkReader
            Of process 0.
        """
        teacher = required(work, TEACHER)[0]["states"]
        _, trainer = self._trainer(stage, previous, tokens, teacher, work)
        # Process 0 saves the next state after the first step, in which all take part.
        _go_on(trainer, required(work, stage) if resumed else None)
        while trainer.step < trainer.steps:
            trainer.train_step()

    def _trainer(
        self, stage: str, previous: str, tokens: Tensor, teacher: Tensor, work: WorkReader
    ) -> tuple[Any, ModelTrainer]:
        """Build the model as the previous stage has left it, and what trains it."""
        settings: ModelStage = getattr(self.recipe, stage)
        model = build_model(self.source)
        blocks = model.get_submodule(self.prefix)
        load_parameters(model, "", self.source, skip=f"{self.prefix}.")
        round_as_stored(model, self.source, skip=f"{self.prefix}.")
        for index, block in enumerate(blocks):
            load_vectors(block, f"{self.prefix}.{index}", self.source)
            weights = load_block(work, previous, index, list(linear_layers(block)))
            latents = None
            if settings.weight_rate > 0:
                latents = {path: weight.decode() for path, weight in weights.items()}
            attach(block, weights, self.dtype, latents=latents)
        dense_head = None
        if self.recipe.head is not None:
            dense_head = attach_head(model, work, previous, self.dtype).to(self.device)
        load_norms(model, work, previous)
        model.to(self.device)
        # Processes have a GPU each, but all of them one CPU's memory.
        sharing = 1 if self.device.type == "cpu" else self.ranks.count
        # A step has a whole sequence at least.
        step_tokens = max(-(-settings.batch_tokens // sharing), tokens.shape[1])
        if needs_checkpoints(model.config, step_tokens, self.device):
            use_checkpoints(blocks)
        trainer = ModelTrainer(
            model,
            settings,
            tokens,
            teacher,
            seed=self.seed,
            dtype=self.dtype,
            ranks=self.ranks,
            dense_head=dense_head,
        )
        return model, trainer

    def _train(
        self,
        stage: str,
        trainer: ModelTrainer,
        course: Course,
        work: WorkDirectory,
        log: RunLog,
        progress: Progress,
        status: Status,
    ) -> float:
        remaining = Remaining(trainer.step)
        saved = time.monotonic()
        while trainer.step < trainer.steps:
            progress(f"training {stage}", trainer.step, trainer.steps)
            step = trainer.train_step()
            log.write(_event(stage, step, remaining.seconds(step.step, step.steps)))
            status(f"loss {step.losses.total:.3f}, KL {step.losses.divergence:.3f}")
            course.add(step.losses)
            if time.monotonic() - saved > SAVE_SECONDS and step.step < step.steps:
                state = {**trainer.state(), **course.tensors()}
                work.save(stage, state, {"step": step.step})
                saved = time.monotonic()
        progress(f"training {stage}", trainer.steps, trainer.steps)
        return course.divergence(stage)

    def _teacher(
        self, tokens: Tensor, work: WorkDirectory, log: RunLog, progress: Progress
    ) -> Tensor:
        found = work.load(TEACHER)
        if found is not None:
            return found[0]["states"]
        began = time.monotonic()
        # On a GPU in 16 bits: the model is there whole.
        on_cpu = self.device.type == "cpu"
        model = build_model(self.source, torch.float32 if on_cpu else self.dtype)
        load_parameters(model, "", self.source)
        states = teacher_states(model.to(self.device), tokens, self.dtype, progress)
        work.save(TEACHER, {"states": states}, {})
        log.write(Phase("running the dense model", time.monotonic() - began, {}))
        return states


def done_name(stage: str) -> str:
    """Return the name of the state that says a stage is done, and holds the trained norms."""
    return f"{stage}-done"


def load_vectors(block: nn.Module, prefix: str, source: ModelSource) -> None:
    """Load a block's parameters that are no matrices of linear layers: norms and biases."""
    skipped = frozenset(f"{path}.weight" for path in linear_layers(block))
    load_parameters(block, prefix, source, skip=skipped)


def required(work: WorkReader, name: str) -> State:
    """Return a state that process 0 has saved.

    Raises
    ------
    GqsaError
        This process does not see it, or it is damaged.
    """
    found = work.load(name)
    if found is None:
        raise GqsaError(
            f"The state {name} that process 0 has saved is not in {work.path}: the file system "
            "that the processes share shows them different files."
        )
    return found


def load_norms(model: nn.Module, work: WorkReader, stage: str) -> None:
    """Put the norms that a stage has trained in place."""
    found = work.load(done_name(stage))
    if found is None:
        return
    with torch.no_grad():
        for name, weight in norm_parameters(model):
            weight.copy_(found[0][name])


def _go_on(trainer: ModelTrainer, found: State | None) -> Course:
    """Go on from a saved state, if there is one; returns what its steps have come to."""
    if found is None:
        return Course(trainer.steps)
    tensors, metadata = found
    course = Course.resume(trainer.steps, tensors)
    trainer.load_state(tensors, int(metadata["step"]))
    return course


def _event(stage: str, step: Step, left: float | None) -> LogStep:
    return LogStep(
        stage,
        step.step,
        step.steps,
        step.losses.total,
        step.losses.divergence,
        step.losses.cross_entropy,
        {"share of peak": step.rate},
        step.tokens,
        step.seconds,
        left,
    )
