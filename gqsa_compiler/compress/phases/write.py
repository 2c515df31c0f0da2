"""The last phase: the checkpoint, from the states of a work directory."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gqsa_compiler.checkpoint import CheckpointWriter
from gqsa_compiler.compress.blocks import HEAD
from gqsa_compiler.compress.phases.block import load_block, load_input_rms
from gqsa_compiler.compress.phases.head import load_head
from gqsa_compiler.compress.phases.model import ModelPhase
from gqsa_compiler.compress.recipes.recipe import Recipe
from gqsa_compiler.compress.recipes.target import LayerTarget
from gqsa_compiler.compress.report import REPORT_FILE
from gqsa_compiler.compress.report.report_html import write_report
from gqsa_compiler.compress.store import ModelStore, Written, model_config, quantization
from gqsa_compiler.compress.work.results import BLOCK_STATE
from gqsa_compiler.compress.work.runevents import Finish
from gqsa_compiler.compress.work.runlog import LOG_FILE, RunLog
from gqsa_compiler.compress.work.workdir import WorkDirectory
from gqsa_compiler.frontends.source import ModelSource
from gqsa_compiler.progress import Progress

STAGE = "writing"

STATE = "writing"
"""Names the directory that the checkpoint is being written to, so that a kill leaves none."""


@dataclass(frozen=True, eq=False)
class WritePhase:
    """What is written, and where.

    Parameters
    ----------
    source : ModelSource
        The dense model.
    prefix : str
        Module path of the list of blocks.
    paths : list of list of str
        The linear layers of each block, by their path inside it.
    recipe : Recipe
    tied : bool
        The dense model's head is its embedding.
    output : Path
    overwrite : bool
    """

    source: ModelSource
    prefix: str
    paths: list[list[str]]
    recipe: Recipe
    tied: bool
    output: Path
    overwrite: bool

    def run(
        self,
        targets: Mapping[str, LayerTarget],
        whole: ModelPhase,
        work: WorkDirectory,
        log: RunLog,
        progress: Progress,
        started: float,
    ) -> Written:
        """Write the checkpoint, with the run log and the report.

        Parameters
        ----------
        targets : mapping of str to LayerTarget
            Layers that became something else than the recipe's target.
        whole : ModelPhase
        work : WorkDirectory
            Has all states.
        log : RunLog
        progress : callable
        started : float
            When this process began, by `time.monotonic`.
        """
        _remove_left(work)
        stage = whole.last_stage or BLOCK_STATE
        names = [
            f"{self.prefix}.{i}.{path}" for i, paths in enumerate(self.paths) for path in paths
        ]
        quant = quantization(
            self.recipe, {name: targets[name] for name in names if name in targets}
        )
        heads = self.recipe.head is not None
        config = model_config(self.source, tied=self.tied and not heads)
        with CheckpointWriter(self.output, config, quant, overwrite=self.overwrite) as writer:
            work.save(STATE, {}, {"directory": str(writer.directory)})
            self.source.save_tokenizer(writer.directory)
            store = ModelStore(writer, self.source)
            skip = {f"{HEAD}.weight"} if self.tied or heads else set()
            for index, paths in enumerate(self.paths):
                progress(STAGE, index, len(self.paths))
                name = f"{self.prefix}.{index}"
                sizes = load_input_rms(work, index, paths)
                store.add_layers(name, load_block(work, stage, index, paths), sizes)
                skip |= {f"{name}.{path}.weight" for path in paths}
            if heads:
                store.add_head(load_head(work, stage), tied=self.tied)
            store.add_rest(frozenset(skip), whole.norms(work))
            written = store.written()
            log.write(
                Finish(
                    time.monotonic() - started,
                    written.weights,
                    written.bytes,
                    written.other_bytes,
                    written.dense_bytes,
                    0 if written.head is None else written.head.bytes,
                )
            )
            shutil.copyfile(log.path, writer.directory / LOG_FILE)
            write_report(log.path, writer.directory / REPORT_FILE, self.source.name)
            progress(STAGE, len(self.paths), len(self.paths))
        return written


def _remove_left(work: WorkDirectory) -> None:
    """Remove what a run that was killed while it wrote has left; its name is ours alone."""
    found = work.load(STATE)
    if found is not None:
        shutil.rmtree(str(found[1]["directory"]), ignore_errors=True)
