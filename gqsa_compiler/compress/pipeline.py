"""Compress a model into a GQSA checkpoint: calibrate, plan, blocks, whole model, write."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from gqsa_compiler.compress.allocation.allocate import check_budget
from gqsa_compiler.compress.blocks import find_blocks, linear_layers
from gqsa_compiler.compress.calibration import CalibrationSpec, calibration_tokens
from gqsa_compiler.compress.devices import choose_device, training_dtype
from gqsa_compiler.compress.failures import explained
from gqsa_compiler.compress.fingerprint import run_settings
from gqsa_compiler.compress.parallel.launch import find_launch
from gqsa_compiler.compress.parallel.together import compress_together
from gqsa_compiler.compress.phases.block import BlockPhase, evenly
from gqsa_compiler.compress.phases.head import STATE as HEAD_STATE
from gqsa_compiler.compress.phases.model import ModelPhase, done_name, required
from gqsa_compiler.compress.phases.plan import make_plan
from gqsa_compiler.compress.phases.write import STAGE as WRITING
from gqsa_compiler.compress.phases.write import STATE as WRITTEN
from gqsa_compiler.compress.phases.write import WritePhase
from gqsa_compiler.compress.recipes.budget import Budget
from gqsa_compiler.compress.recipes.nominal import nominal_bits_per_weight
from gqsa_compiler.compress.recipes.recipe import STAGES, Head, Recipe
from gqsa_compiler.compress.recipes.recipe_file import recipe_to_dict
from gqsa_compiler.compress.request import (
    CompressOptions,
    PathText,
    choose_calibration,
    choose_recipe,
)
from gqsa_compiler.compress.result import CompressReport
from gqsa_compiler.compress.store import producer
from gqsa_compiler.compress.training.model_stage import batch_size
from gqsa_compiler.compress.training.ranks import Ranks
from gqsa_compiler.compress.work.reader import WorkReader
from gqsa_compiler.compress.work.results import BLOCK_STATE
from gqsa_compiler.compress.work.runevents import Calibration, Resume, Start
from gqsa_compiler.compress.work.runlog import RunLog
from gqsa_compiler.compress.work.workdir import WorkDirectory, work_path
from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.resolve import resolve
from gqsa_compiler.frontends.source import ModelSource
from gqsa_compiler.frontends.torch_model import build_model
from gqsa_compiler.models.registry import parse_config
from gqsa_compiler.outdir import check_output
from gqsa_compiler.progress import Progress, Status

TOKENS = "tokens"


def compress_model(
    model: str | os.PathLike[str] | ModelSource,
    output: str | os.PathLike[str],
    recipe: PathText | Recipe,
    *,
    stages: str | Sequence[str] | None = None,
    budget: str | Budget | None = None,
    balance: str | None = None,
    calibration: CalibrationSpec | PathText | Sequence[PathText] | None = None,
    samples: int | Literal["all"] | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
    status: Status | None = None,
) -> CompressReport:
    """Prune and quantise every linear layer of a model's decoder blocks, and train what is left.

    A run that is interrupted leaves ``<output>.work``; the same call goes on from there. Several
    processes that `accelerate launch` has started share the end-to-end stages: each makes this
    call and gets the report, and the first one shows progress.

    Parameters
    ----------
    model : str, path or ModelSource
        What `resolve` takes: a directory, a GGUF file, a hub name or ``smollm2-135m``.
    output : path
        The checkpoint to make; it appears when it is whole.
    recipe, stages, budget, balance
        See `choose_recipe`. Presets train; ``stages="none"`` is one shot.
    calibration, samples, sequence_length
        See `choose_calibration`.
    seed, device, overwrite, restart
        See `CompressOptions`.
    progress : callable, optional
        Called with (stage, done, total).
    status : callable, optional
        Called before that with a few words about the step.

    Returns
    -------
    CompressReport

    Raises
    ------
    UsageError
        An argument is out of range, the output exists or the model lies in it, the calibration
        text cannot be used, or the work directory was begun with other settings.
    ModelError
        The model cannot be read or is compressed already, a layer does not fit the recipe, or
        numbers are not finite.
    GqsaError
        The disk is full or memory is not enough. What is done is kept.
    """
    chosen = choose_recipe(recipe, stages=stages, budget=budget, balance=balance)
    source = model if isinstance(model, ModelSource) else resolve(os.fspath(model))
    if source.kind == "gqsa":
        raise ModelError(
            f"{source.path} is compressed already; compress the model that it was made from."
        )
    spec = choose_calibration(
        source, chosen, calibration, samples=samples, sequence_length=sequence_length, seed=seed
    )

    def begin(ranks: Ranks, own_device: str) -> _Compression:
        options = CompressOptions(chosen, spec, seed, own_device, overwrite, restart)
        shown = (None, None) if ranks.index else (progress, status)
        return _Compression(source, Path(output), options, ranks, *shown)

    launch = find_launch()
    if launch is None:
        return begin(Ranks(), device).run()
    return compress_together(launch, device, chosen, begin)


class _Compression:
    """One run."""

    def __init__(
        self,
        source: ModelSource,
        output: Path,
        options: CompressOptions,
        ranks: Ranks,
        progress: Progress | None,
        status: Status | None,
    ) -> None:
        self._source = source
        self._output = output
        self._options = options
        self._recipe = options.recipe
        self._ranks = ranks
        self._report_progress = progress or (lambda _stage, _done, _total: None)
        self._status = status or (lambda _text: None)
        self._stage = "reading the model"
        self._work: WorkReader | None = None
        self._started = time.monotonic()
        self._device = choose_device(options.device)
        self._dtype = training_dtype(self._device)
        self._parsed = parse_config(source.config, str(source.path))
        self._prefix, self._paths = self._check()
        self._whole = ModelPhase(
            source, self._prefix, self._recipe, options.seed, self._device, self._dtype, ranks
        )

    def _check(self) -> tuple[str, list[list[str]]]:
        """Refuse what cannot work, before any work; returns the layers' paths block by block."""
        source, spec = self._source, self._options.calibration
        for stage in (self._recipe.weights, self._recipe.scales):
            if stage is not None:
                samples = spec.samples or stage.batch_tokens
                self._ranks.check_batch(batch_size(stage, samples, spec.sequence_length))
        protect = (source.path, *spec.local_paths)
        check_output(self._output, self._options.overwrite, protect=protect)
        model = build_model(source)
        prefix, blocks = find_blocks(model)
        layers = [linear_layers(block) for block in blocks]
        shapes = []
        for index, inside in enumerate(layers):
            for path, layer in inside.items():
                self._check_groups(f"{prefix}.{index}.{path}", layer.in_features)
                shapes.append((layer.out_features, layer.in_features))
        recipe = self._recipe
        if recipe.head is not None:
            _check_head(recipe.head, model.get_output_embeddings().in_features)
        if recipe.budget is not None:
            check_budget(shapes, recipe.budget, recipe.target, recipe.balance)
        return prefix, [list(inside) for inside in layers]

    def _check_groups(self, name: str, features: int) -> None:
        size, budget = self._recipe.group_size, self._recipe.budget
        if features % size and (budget is None or not budget.group_sizes):
            raise ModelError(
                f"Groups of {size} do not divide the {features} inputs of layer {name}; use a "
                "smaller group size."
            )

    def _progress(self, stage: str, done: int, total: int) -> None:
        self._stage = stage
        self._report_progress(stage, done, total)

    def _settings(self) -> dict[str, Any]:
        return run_settings(
            self._source,
            recipe_to_dict(self._recipe),
            self._options.calibration,
            self._progress,
            seed=self._options.seed,
            device=self._device.type,
            products=str(self._dtype).removeprefix("torch."),
            producer=producer(),
        )

    def join(self, message: Mapping[str, Any]) -> None:
        """Take this process's share of a stage that process 0 has announced."""
        if self._work is None:
            self._work = WorkReader.of_other(work_path(self._output), self._settings())
        tokens = required(self._work, TOKENS)[0][TOKENS]
        stage, previous, resumed = (message[key] for key in ("stage", "previous", "resumed"))
        self._whole.join(stage, previous, resumed, tokens, self._work)

    def run(self) -> CompressReport:
        settings = self._settings()
        place, restart = work_path(self._output), self._options.restart
        with WorkDirectory.open(place, settings, restart=restart) as work:
            with RunLog(work.log_path) as log, explained(work, lambda: self._stage, WRITING):
                if work.resumed:
                    log.write(Resume(latest(work.names())))
                else:
                    path = str(self._source.path.resolve())
                    log.write(Start({"path": path, **settings}, producer()))
                report = self._run(work, log)
            work.finish()
        return report

    def _run(self, work: WorkDirectory, log: RunLog) -> CompressReport:
        tokens = self._tokens(work, log)
        recipe, seed = self._recipe, self._options.seed
        plan = make_plan(
            self._source, recipe, tokens, seed, self._device, work, log, self._progress
        )
        few = tokens if recipe.block is None else evenly(tokens, recipe.block.samples)
        blocks = BlockPhase(
            self._source, self._prefix, recipe, plan, seed, self._device, self._dtype
        )
        losses = blocks.run(few, work, log, self._progress)
        divergence = self._whole.run(tokens, work, log, self._progress, self._status)
        written = WritePhase(
            self._source,
            self._prefix,
            self._paths,
            recipe,
            self._parsed.tie_word_embeddings,
            self._output,
            self._options.overwrite,
        ).run(plan.targets, self._whole, work, log, self._progress, self._started)
        nominal = nominal_bits_per_weight(recipe) if recipe.structure == "2:4" else None
        return CompressReport(
            model=self._source.name,
            recipe=recipe.name,
            output=str(self._output),
            calibration=self._options.calibration.describe(),
            calibration_samples=len(tokens),
            calibration_tokens=tokens.numel(),
            layers=written.layers,
            block_losses=tuple(losses),
            bits_per_weight=written.bits_per_weight,
            nominal_bits_per_weight=nominal,
            divergence=divergence,
            seconds=time.monotonic() - self._started,
            head=written.head,
        )

    def _tokens(self, work: WorkDirectory, log: RunLog) -> Tensor:
        found = work.load(TOKENS)
        if found is not None:
            return found[0][TOKENS]
        began = time.monotonic()
        spec = self._options.calibration
        tokens = calibration_tokens(
            spec, self._source, self._parsed.bos_token_id, self._progress, self._device
        )
        work.save(TOKENS, {TOKENS: tokens}, {})
        seconds = time.monotonic() - began
        log.write(Calibration(spec.describe(), len(tokens), tokens.numel(), seconds))
        return tokens


def _check_head(head: Head, features: int) -> None:
    if features % head.group_size:
        raise ModelError(
            f"Groups of {head.group_size} do not divide the {features} inputs of the head; give "
            "the recipe's head another group_size, or null to leave it as it is, in a recipe file "
            "(docs/recipes.md)."
        )


def latest(names: list[str]) -> str:
    """Say where a run goes on whose work directory has states of these names."""
    if WRITTEN in names:
        return "writing the checkpoint"
    for stage in reversed(STAGES[1:]):
        if stage in names or done_name(stage) in names:
            return f"stage {stage}"
    if HEAD_STATE in names:
        return "what follows the head"
    blocks = sum(name.startswith(f"{BLOCK_STATE}-") for name in names)
    return f"block {blocks}" if blocks else "the beginning"
