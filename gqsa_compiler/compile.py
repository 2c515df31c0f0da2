"""The driver: frontend -> passes -> code -> artefact."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqsa_compiler import artefact, report
from gqsa_compiler._callable import make_callable
from gqsa_compiler._tvm import tvm, tvm_ffi
from gqsa_compiler.bundle import add_bundle, check_tools
from gqsa_compiler.compile_options import CompileOptions, activations_of, check_options
from gqsa_compiler.errors import CompileError, UsageError
from gqsa_compiler.frontends.hf import ImportedModel, import_model
from gqsa_compiler.frontends.resolve import resolve
from gqsa_compiler.frontends.source import ModelSource
from gqsa_compiler.head import BITS, group_size
from gqsa_compiler.lora.adapters import Adapters, open_adapters
from gqsa_compiler.model_weights import ModelWeights, kv_spec
from gqsa_compiler.modules.files import is_module
from gqsa_compiler.outdir import check_output, staged_directory
from gqsa_compiler.passes.memory import workspace_bytes
from gqsa_compiler.passes.pipeline import PipelineOptions, run
from gqsa_compiler.passes.plan import PackPlan
from gqsa_compiler.passes.records import ParamRecord
from gqsa_compiler.progress import Progress, Stages
from gqsa_compiler.report import CompileReport
from gqsa_compiler.runtime import manifest as manifests
from gqsa_compiler.runtime import schema
from gqsa_compiler.runtime.params import write_params
from gqsa_compiler.targets import TargetSpec, parse_targets
from gqsa_compiler.tuning.lookup import open_tuned

if TYPE_CHECKING:
    from gqsa_compiler.schedules.spec import ActivationDtype

DENSE_RECIPE = "dense"


def compile_model(
    model: str,
    output: str | Path,
    options: CompileOptions | None = None,
    *,
    recipe: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> CompileReport:
    """Compile a model into an artefact directory.

    Parameters
    ----------
    model : str
        A GQSA checkpoint; or any other MODEL, with `recipe`.
    output : str or Path
        The artefact's directory; written aside and renamed when whole.
    options : CompileOptions or None
        None takes every default.
    recipe : str or None
        For a model that is not compressed yet: a recipe to compress it with on the way, in one
        shot (its training stages are left out), or ``dense`` to compile it as it is.
    overwrite : bool
        Replace an existing artefact.
    progress : callable or None
        Called as ``progress(stage, done, total)``.

    Returns
    -------
    CompileReport

    Raises
    ------
    UsageError
        A bad option, a missing model, an output that exists or that the model lies in, or a
        dense model without `recipe`.
    ModelError, CheckpointError, CompileError
        The model cannot be read, is damaged, or cannot be compiled as asked.
    """
    options = options or CompileOptions()
    targets = parse_targets(options.target)
    check_options(options, targets)
    for target in targets:
        check_tools(target, bundle=options.bundle)
    source = resolve(model)
    compressed = source.checkpoint is not None
    if compressed and recipe is not None:
        raise UsageError(
            f"{model} is compressed already, so --recipe {recipe} cannot be applied; "
            "leave --recipe out, or name the model that it was made from."
        )
    if not compressed and recipe is None:
        raise UsageError(
            f"{model} is not compressed. Compress it first (gqsa compress {model} -o CHECKPOINT "
            "--recipe w4s30g16), or compile it with --recipe w4s30g16 (compress on the way, in one "
            f"shot) or --recipe {DENSE_RECIPE} (as it is)."
        )
    if recipe == DENSE_RECIPE and options.no_fallback:
        raise UsageError(
            f"--recipe {DENSE_RECIPE} leaves every layer dense, which --no-fallback forbids; "
            "choose one of the two."
        )
    check_output(output, overwrite, protect=(source.path,))
    report_progress = progress or (lambda _stage, _done, _total: None)
    with staged_directory(output, overwrite=overwrite) as staging:
        if recipe is None or recipe == DENSE_RECIPE:
            return _Compilation(source, targets, options, Stages(report_progress)).write(
                staging, Path(output)
            )
        from gqsa_compiler.compress import compress_model

        # Beside the output: it has the room, and a temporary file system may not.
        with tempfile.TemporaryDirectory(dir=staging) as scratch:
            checkpoint = Path(scratch) / source.name
            # One shot: training takes its hours, and what it makes is worth a checkpoint to keep.
            compress_model(source, checkpoint, recipe, stages="none", progress=report_progress)
            source = resolve(str(checkpoint))
            result = _Compilation(source, targets, options, Stages(report_progress)).write(
                staging, Path(output)
            )
        return result


def plan_kernels(
    model: str, options: CompileOptions | None = None, *, progress: Progress | None = None
) -> tuple[PackPlan, artefact.WeightLoader]:
    """Run the passes over a model, a dense one as it is, and return its kernels and its weights.

    Raises
    ------
    UsageError, ModelError, CheckpointError, CompileError
        As `compile_model`.
    """
    options = options or CompileOptions()
    targets = parse_targets(options.target)
    check_options(options, targets)
    work = _Compilation(resolve(model), targets, options, Stages(progress or (lambda *_: None)))
    return work.plan()


@dataclass(frozen=True)
class _Variant:
    """One target's module after the passes, and what they found out."""

    target: TargetSpec
    mod: tvm.IRModule
    plan: PackPlan
    workspace: int


@dataclass
class _Compilation:
    """One run: what it reads, and how long each stage took."""

    source: ModelSource
    targets: tuple[TargetSpec, ...]
    options: CompileOptions
    stages: Stages
    adapters: Adapters | None = None

    @property
    def activations(self) -> ActivationDtype:
        """What compressed layers round their inputs to."""
        return activations_of(self.options, self.targets)

    def write(self, directory: Path, output: Path) -> CompileReport:
        """Compile into `directory`, which will become `output`."""
        with self.stages.stage("importing the model"):
            imported = import_model(self.source, context_length=self.options.context_length)
            weights = ModelWeights(self.source, imported)
            records = self._with_head(weights.records(), imported.head)
            self.adapters = open_adapters(self.options, records)
        variants = [self._variant(imported, records, target) for target in self.targets]
        plan = variants[0].plan
        whole, plan = plan, plan.without_adapters()
        if any(variant.plan.layout != whole.layout for variant in variants):
            raise CompileError(
                f"{' and '.join(target.name for target in self.targets)} cannot share one set of "
                "packed weights; compile an artefact for each."
            )
        if self.options.no_fallback:
            report.refuse_fallbacks(plan, self.source.checkpoint is not None, self._ignored())
        libraries = [self._library(variant, directory) for variant in variants]
        begin = time.perf_counter()
        parameters = write_params(
            directory / artefact.PARAMETERS,
            artefact.packed_tensors(plan, weights, self.stages.progress)
            if self.adapters is None
            else self.adapters.packed(whole, weights, self.stages.progress),
        )
        self.stages.seconds["packing weights"] = time.perf_counter() - begin
        self.source.save_tokenizer(directory)
        if self.options.bundle or self.targets[0].linked:
            add_bundle(directory, self.targets[0])
        plan = plan.packed({parameter.name: parameter.shape for parameter in parameters})
        uses, fallbacks = report.kernel_uses(
            plan, self.source.checkpoint is not None, self._ignored()
        )
        kinds = report.bytes_by_kind(plan)
        always = 0
        if self.adapters is not None:
            kinds["adapters"] = report.adapter_bytes(parameters, plan)
            always = kinds["adapters"] if self.adapters.merged else 0
        result = CompileReport(
            output=str(output),
            target=",".join(target.name for target in self.targets),
            bytes_by_kind=kinds,
            bits_per_weight=report.bits_per_weight(plan),
            bytes_per_token=report.bytes_per_token(plan) + always,
            workspace_bytes=max(variant.workspace for variant in variants),
            kv_cache_dtype=self.options.kv_cache,
            kv_cache_bytes_per_token=kv_spec(imported, self.options.kv_cache).bytes_per_token,
            kernels=uses,
            kernel_counts=dict(Counter(use.kernel for use in uses)),
            fallbacks=fallbacks,
            seconds=self.stages.rounded(),
            configurations=(configurations := report.configuration_uses(plan)),
            configuration_sources=dict(Counter(use.source for use in configurations)),
        )
        manifest = self._manifest(imported, result, libraries, parameters)
        if self.adapters is not None:
            manifest = replace(manifest, adapters=self.adapters.describe(whole))
        manifest.write(directory)
        result.write(directory)
        return result

    def plan(self) -> tuple[PackPlan, ModelWeights]:
        """Run the passes for the first target."""
        with self.stages.stage("importing the model"):
            imported = import_model(self.source, context_length=self.options.context_length)
            weights = ModelWeights(self.source, imported)
            records = self._with_head(weights.records(), imported.head)
        return self._variant(imported, records, self.targets[0]).plan, weights

    def _with_head(self, records: tuple[ParamRecord, ...], head: str) -> tuple[ParamRecord, ...]:
        """Mark the head to be rounded, if that is asked for and its layer is not compressed."""
        if self.options.head == "stored" or self.source.checkpoint is None:
            return records
        return tuple(
            replace(record, linear_bits=BITS, linear_group=size)
            if record.name == head
            and record.storage == "dense"
            and (size := group_size(record.shape[1])) is not None
            else record
            for record in records
        )

    def _ignored(self) -> tuple[str, ...]:
        checkpoint = self.source.checkpoint
        return () if checkpoint is None else tuple(checkpoint.quantization.ignore)

    def _prefill_chunk(self, imported: ImportedModel) -> int:
        """Return the most tokens of one call: no more than the context, no fewer than a batch."""
        chunk = min(self.options.prefill_chunk, imported.model.context_length)
        return max(chunk, self.options.max_batch)

    def _stage_of(self, name: str, target: TargetSpec) -> AbstractContextManager[None]:
        """Begin a stage that every variant has; its target is named where there are several."""
        return self.stages.stage(name if len(self.targets) == 1 else f"{name} for {target.name}")

    def _variant(
        self, imported: ImportedModel, records: tuple[ParamRecord, ...], target: TargetSpec
    ) -> _Variant:
        with self._stage_of("running passes", target):
            return self._run_passes(imported, records, target)

    def _library(self, variant: _Variant, directory: Path) -> schema.Library:
        name = artefact.library_name(variant.target, len(self.targets))
        with self._stage_of("generating code", variant.target):
            digest = artefact.export_library(variant.mod, variant.target, directory / name)
        return schema.Library(name, digest)

    def _run_passes(
        self, imported: ImportedModel, records: tuple[ParamRecord, ...], target: TargetSpec
    ) -> _Variant:
        options = PipelineOptions(
            target,
            kv_spec(imported, self.options.kv_cache),
            {
                "n": self._prefill_chunk(imported),
                "m": max(self.options.max_batch, manifests.SCORE_ROWS),
            },
            self.activations,
            open_tuned(
                self.options.database,
                target,
                self.options.chip,
                portable=len(self.targets) > 1,
            ),
            low_rank=None if self.adapters is None else self.adapters.low_rank,
            captured_batch=self.options.max_batch,
        )
        workspace = phases = 0
        dump = self.options.debug_dump
        if dump is not None:
            dump = dump if len(self.targets) == 1 else dump / target.name
            dump.mkdir(parents=True, exist_ok=True)

        def observe(phase: str, mod: tvm.IRModule) -> None:
            nonlocal workspace, phases
            if phase == "memory":
                workspace = workspace_bytes(mod)
            if dump is not None:
                (dump / f"{phases}-{phase}.py").write_text(mod.script(), encoding="utf-8")
            phases += 1

        mod, plan = run(imported.mod, records, options, observe)
        return _Variant(target, mod, plan, workspace)

    def _manifest(
        self,
        imported: ImportedModel,
        result: CompileReport,
        libraries: Sequence[schema.Library],
        parameters: tuple[schema.Parameter, ...],
    ) -> manifests.Manifest:
        model = imported.model
        targets = [artefact.manifest_target(target) for target in self.targets]
        return manifests.Manifest(
            producer=f"gqsa-compiler {metadata.version('gqsa-compiler')}",
            versions=schema.Versions(str(tvm.__version__), str(tvm_ffi.__version__)),
            variants=tuple(map(schema.Variant, targets, libraries)),
            model=schema.ModelInfo(
                name=self.source.name,
                architecture=model.architecture,
                vocab_size=model.vocab_size,
                hidden_size=model.hidden_size,
                num_layers=model.num_layers,
                num_key_value_heads=model.num_key_value_heads,
                head_dim=model.head_dim,
                context_length=model.context_length,
                prefill_chunk=self._prefill_chunk(imported),
                max_batch=self.options.max_batch,
                sliding_window=model.sliding_window,
                bos_token_id=model.bos_token_id,
                eos_token_ids=tuple(model.eos_token_ids),
                activations=self.activations,
            ),
            kv_cache=schema.KVCacheInfo(
                kv_spec(imported, self.options.kv_cache).dtype,
                kv_spec(imported, self.options.kv_cache).page_size,
                result.kv_cache_bytes_per_token,
            ),
            memory=schema.Memory(
                sum(result.bytes_by_kind.values()),
                result.kv_cache_bytes_per_token,
                result.workspace_bytes,
            ),
            parameters_file=artefact.PARAMETERS,
            parameters=parameters,
            kernels=result.kernels,
            bytes_per_token=result.bytes_per_token,
        )


def _compile(
    model: str,
    output: str | Path,
    *,
    recipe: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> CompileReport:
    """Compile a model: `compile_model` with the fields of `CompileOptions` as keywords.

    An ONNX file or a module checkpoint goes to `gqsa_compiler.modules.compile_module`, with the
    fields of its `ModuleOptions`.
    """
    if is_module(model):
        if recipe not in (None, DENSE_RECIPE):
            raise UsageError(
                f"{model} is compressed with gqsa_compiler.modules.compress_onnx, which needs "
                "inputs to learn from; --recipe compresses language models only."
            )
        from gqsa_compiler.modules.compile import ModuleOptions, compile_module

        return compile_module(
            model, output, ModuleOptions(**options), overwrite=overwrite, progress=progress
        )
    return compile_model(
        model,
        output,
        CompileOptions(**options),
        recipe=recipe,
        overwrite=overwrite,
        progress=progress,
    )


make_callable(__name__, _compile)
