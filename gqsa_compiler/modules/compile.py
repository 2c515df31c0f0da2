"""Compile a module: ONNX graph -> passes -> code -> artefact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqsa_compiler import artefact, report
from gqsa_compiler._tvm import tvm, tvm_ffi
from gqsa_compiler.bundle import add_bundle, check_tools
from gqsa_compiler.checkpoint import BSRLayer
from gqsa_compiler.errors import CompileError, GqsaError, ModelError, UsageError
from gqsa_compiler.frontends.onnx.graph import ImportedGraph, import_onnx
from gqsa_compiler.modules.files import GRAPH_FILE, is_module, read_config
from gqsa_compiler.outdir import check_output, staged_directory
from gqsa_compiler.passes.memory import workspace_bytes
from gqsa_compiler.passes.pipeline import PipelineOptions, run
from gqsa_compiler.passes.plan import PackPlan
from gqsa_compiler.passes.records import ParamRecord
from gqsa_compiler.progress import Progress, Stages
from gqsa_compiler.report import CompileReport
from gqsa_compiler.runtime import schema
from gqsa_compiler.runtime.errors import last_line
from gqsa_compiler.runtime.module_manifest import (
    ModuleManifest,
    ModuleMemory,
    ModuleTensor,
    Size,
)
from gqsa_compiler.runtime.params import write_params
from gqsa_compiler.schedules.activations import check_activations, default_activations
from gqsa_compiler.targets import TargetSpec, parse_targets

if TYPE_CHECKING:
    import numpy.typing as npt

    from gqsa_compiler.schedules.spec import ActivationDtype

Shapes = Mapping[str, "int | tuple[int, int]"]


@dataclass(frozen=True)
class ModuleOptions:
    """How to compile a module.

    Parameters
    ----------
    target : str
        The name of a CPU target, see docs/targets.md.
    shapes : mapping
        For sizes that vary, by name: a value to fix it at, or the smallest and largest one; others
        are what the checkpoint says, and 1 to 4096 for an ONNX file.
    activations : str
        What compressed layers round their inputs to: ``float32``, ``int16`` or ``int8``; ``auto``
        as in `gqsa_compiler.compile.CompileOptions`.
    bundle : bool
        Add TVM's runtime libraries.
    no_fallback : bool
        Fail when a linear layer that the checkpoint does not list under `ignore` stays dense.
    debug_dump : path or None
        Directory for the module after each phase.
    """

    target: str = "cpu"
    shapes: Shapes = field(default_factory=dict)
    activations: ActivationDtype | str = "auto"
    bundle: bool = False
    no_fallback: bool = False
    debug_dump: Path | None = None


def compile_module(
    module: str | Path,
    output: str | Path,
    options: ModuleOptions | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> CompileReport:
    """Compile a module checkpoint or an ONNX file into an artefact directory.

    Linear layers that are not compressed run dense.

    Parameters
    ----------
    module : str or Path
        What `compress_module` or `compress_onnx` made, or any ONNX file.
    output : str or Path
        The artefact's directory; written aside and renamed when whole.
    options : ModuleOptions or None
        None takes every default.
    overwrite : bool
        Replace an existing artefact.
    progress : callable or None
        Called as ``progress(stage, done, total)``.

    Returns
    -------
    CompileReport
        Its figures of a key/value cache are 0, and `bytes_per_token` is what one call reads.

    Raises
    ------
    UsageError
        A bad option, no such module, or an output that exists.
    ModelError, CheckpointError, CompileError
        The graph cannot be read, or compiled as asked.
    """
    options = options or ModuleOptions()
    targets = parse_targets(options.target)
    if len(targets) != 1 or targets[0].kind != "llvm" or targets[0].linked:
        raise UsageError(
            f"A module is compiled for one CPU target at a time, not for {options.target}."
        )
    target = targets[0]
    check_tools(target, bundle=options.bundle)
    activations: Any = options.activations
    if activations == "auto":
        activations = default_activations(target)
    elif activations not in ("float32", "int16", "int8"):
        raise UsageError(
            f"Unknown activations {activations!r}; choose one of auto, float32, int16, int8."
        )
    check_activations(activations, target)
    source = Path(module)
    if not is_module(source):
        raise UsageError(f"{source} is neither an ONNX file nor a module checkpoint.")
    check_output(output, overwrite, protect=(source,))
    say = progress or (lambda _stage, _done, _total: None)
    with staged_directory(output, overwrite=overwrite) as staging:
        work = _Compilation(source, target, options, activations, Stages(say))
        return work.write(staging, Path(output))


@dataclass
class _Compilation:
    source: Path
    target: TargetSpec
    options: ModuleOptions
    activations: ActivationDtype
    stages: Stages

    def write(self, directory: Path, output: Path) -> CompileReport:
        """Compile into `directory`, which will become `output`."""
        with self.stages.stage("importing the model"):
            graph, ignored = self._import()
        weights = _Weights(graph)
        with self.stages.stage("running passes"):
            mod, plan, workspace = self._passes(graph, weights.records())
        decoded = dict(graph.dense)
        compressed = bool(decoded) or any(item.layer is not None for item in graph.parameters)
        if self.options.no_fallback:
            report.refuse_fallbacks(plan, True, ignored)
        name = artefact.library_name(self.target, 1)
        with self.stages.stage("generating code"):
            digest = artefact.export_library(mod, self.target, directory / name)
        with self.stages.stage("packing weights"):
            parameters = write_params(
                directory / artefact.PARAMETERS,
                artefact.packed_tensors(plan, weights, self.stages.progress),
            )
        if self.options.bundle:
            add_bundle(directory, self.target)
        plan = plan.packed({parameter.name: parameter.shape for parameter in parameters})
        uses, fallbacks = report.kernel_uses(plan, compressed, ignored)
        fallbacks = tuple(
            replace(item, reason=f"decoded: {decoded[item.layer]}")
            if item.layer in decoded
            else item
            for item in fallbacks
        )
        kinds = report.bytes_by_kind(plan)
        result = CompileReport(
            output=str(output),
            target=self.target.name,
            bytes_by_kind=kinds,
            bits_per_weight=report.bits_per_weight(plan),
            bytes_per_token=report.bytes_per_token(plan),
            workspace_bytes=workspace,
            kv_cache_dtype="none",
            kv_cache_bytes_per_token=0,
            kernels=uses,
            kernel_counts=dict(Counter(use.kernel for use in uses)),
            fallbacks=fallbacks,
            seconds=self.stages.rounded(),
        )
        variant = schema.Variant(
            artefact.manifest_target(self.target),
            schema.Library(name, digest),
        )
        self._manifest(graph, result, variant, parameters).write(directory)
        result.write(directory)
        return result

    def _import(self) -> tuple[ImportedGraph, tuple[str, ...]]:
        if self.source.is_file():
            return import_onnx(self.source, shapes=self.options.shapes), ()
        config = read_config(self.source)
        sizes = config.get("sizes", {})
        quantization = config.get("quantization_config", {})
        try:
            shapes = {str(key): (int(low), int(high)) for key, (low, high) in sizes.items()}
            ignored = tuple(str(layer) for layer in quantization.get("ignore", ()))
        except (TypeError, ValueError, AttributeError):
            raise ModelError(
                f"config.json in {self.source}: `sizes` should map names to pairs of integers, and "
                "`ignore` list layers."
            ) from None
        merged = {**shapes, **self.options.shapes}
        return import_onnx(self.source / GRAPH_FILE, shapes=merged), ignored

    def _passes(
        self, graph: ImportedGraph, records: tuple[ParamRecord, ...]
    ) -> tuple[tvm.IRModule, PackPlan, int]:
        bounds = {name: high for name, (_, high) in graph.bounds.items()}
        options = PipelineOptions(self.target, None, bounds, self.activations, general=True)
        workspace = number = 0
        dump = self.options.debug_dump
        if dump is not None:
            dump.mkdir(parents=True, exist_ok=True)

        def observe(phase: str, mod: tvm.IRModule) -> None:
            nonlocal workspace, number
            if phase == "memory":
                workspace = workspace_bytes(mod)
            if dump is not None:
                (dump / f"{number}-{phase}.py").write_text(mod.script(), encoding="utf-8")
            number += 1

        try:
            mod, plan = run(graph.mod, records, options, observe)
        except (GqsaError, OSError):
            raise
        except Exception as error:  # what a stranger's graph makes of TVM's passes
            raise CompileError(
                f"TVM cannot compile the graph of {self.source}: {last_line(error)}."
            ) from error
        return mod, plan, workspace

    def _manifest(
        self,
        graph: ImportedGraph,
        result: CompileReport,
        variant: schema.Variant,
        parameters: tuple[schema.Parameter, ...],
    ) -> ModuleManifest:
        def described(tensors: Any) -> tuple[ModuleTensor, ...]:
            return tuple(
                ModuleTensor(tensor.name, tensor.dtype, tuple(map(str, tensor.shape)))
                for tensor in tensors
            )

        return ModuleManifest(
            producer=f"gqsa-compiler {metadata.version('gqsa-compiler')}",
            versions=schema.Versions(str(tvm.__version__), str(tvm_ffi.__version__)),
            variants=(variant,),
            name=self.source.stem,
            inputs=described(graph.inputs),
            outputs=described(graph.outputs),
            sizes=tuple(Size(name, low, high) for name, (low, high) in graph.bounds.items()),
            activations=self.activations,
            memory=ModuleMemory(sum(result.bytes_by_kind.values()), result.workspace_bytes),
            parameters_file=artefact.PARAMETERS,
            parameters=parameters,
            kernels=result.kernels,
        )


class _Weights:
    """The weights of a graph, as records and as arrays."""

    def __init__(self, graph: ImportedGraph) -> None:
        self._parameters = {item.name: item for item in graph.parameters}

    def load(self, name: str) -> npt.NDArray[Any]:
        """Return a dense parameter."""
        array = self._parameters[name].array
        assert array is not None
        return array

    def layer(self, name: str) -> BSRLayer:
        """Return a compressed layer by its parameter's name."""
        layer = self._parameters[name].layer
        assert layer is not None
        return layer

    def records(self) -> tuple[ParamRecord, ...]:
        """Describe every parameter, in order."""
        found = []
        for item in self._parameters.values():
            if item.layer is None:
                assert item.array is not None
                shape = tuple(int(size) for size in item.array.shape)
                found.append(ParamRecord(item.name, "dense", str(item.array.dtype), shape))
            else:
                found.append(
                    ParamRecord(
                        item.name,
                        "bsr",
                        f"int{item.layer.bits}",
                        item.layer.shape,
                        group_size=item.layer.group_size,
                        nnz=item.layer.nnz,
                        symmetric=item.layer.symmetric,
                    )
                )
        return tuple(found)
