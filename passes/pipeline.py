"""The compiler's passes: one list, in phases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gqsa_compiler._tvm import Target, relax, tvm
from gqsa_compiler.passes.add_choice import AddChoice
from gqsa_compiler.passes.add_decode import AddDecode
from gqsa_compiler.passes.attach_kv_cache import AttachKVCache
from gqsa_compiler.passes.bind import BindRecords
from gqsa_compiler.passes.capture_decode import CaptureDecode
from gqsa_compiler.passes.device_kernels import DeviceKernels
from gqsa_compiler.passes.fold_parallel_linears import FoldParallelLinears
from gqsa_compiler.passes.fuse_epilogue import FuseActivation, FuseBias, FuseResidual
from gqsa_compiler.passes.fuse_norm import FuseNorm
from gqsa_compiler.passes.low_rank import AddLowRank, LowRankOptions
from gqsa_compiler.passes.memory import BoundTokens
from gqsa_compiler.passes.plan import PackPlan
from gqsa_compiler.passes.records import ParamRecord
from gqsa_compiler.passes.rewrite_linear import RewriteLinear
from gqsa_compiler.passes.running_sums import running_sum
from gqsa_compiler.passes.schedule_reductions import ScheduleReductions
from gqsa_compiler.passes.schedule_rest import CheckScheduled, ScheduleRest
from gqsa_compiler.passes.select_kernels import SelectKernels
from gqsa_compiler.passes.select_norms import SelectNorms
from gqsa_compiler.passes.share_views import ShareViews
from gqsa_compiler.schedules.choice import Configurations
from gqsa_compiler.schedules.kv_cache import KVCacheSpec
from gqsa_compiler.schedules.spec import ActivationDtype
from gqsa_compiler.targets import TargetSpec

Phase = tuple[str, Sequence[tvm.transform.Pass]]


@dataclass(frozen=True)
class PipelineOptions:
    """What the passes need to know besides the module.

    Parameters
    ----------
    target : TargetSpec
    kv_cache : KVCacheSpec or None
        None for a module without attention.
    token_bounds : mapping
        Largest value of each symbolic token count by its name.
    activation_dtype : str
        For compressed layers.
    configurations : Configurations or None
        Chooses the kernels' configurations; None: each rule's default.
    general : bool
        The module is nobody's decoder: reductions that have no kernel get a plain schedule.
    low_rank : LowRankOptions or None
        The layers that adapters change; None: there are no adapters.
    captured_batch : int
        On a GPU: sequences at once that a captured function for decoding is made for; 0: none is.
    """

    target: TargetSpec
    kv_cache: KVCacheSpec | None
    token_bounds: Mapping[str, int]
    activation_dtype: ActivationDtype = "float32"
    configurations: Configurations | None = None
    general: bool = False
    low_rank: LowRankOptions | None = None
    captured_batch: int = 0


def phases(
    records: Sequence[ParamRecord], options: PipelineOptions, plan: PackPlan
) -> tuple[Phase, ...]:
    """List every pass, by phase. `plan` is filled by phase ``dispatch``."""
    transform = relax.transform
    captured = options.captured_batch if options.target.kind == "cuda" else 0
    return (
        (
            "bind",
            [
                *([AddDecode(captured)] if captured else []),  # one token a sequence
                BindRecords(records),  # storage dtypes and compression records, for all below
                BoundTokens(options.token_bounds),  # lets memory be planned for dynamic shapes
            ],
        ),
        (
            "graph",
            [
                RewriteLinear(options.activation_dtype),  # matmul(x, W^T) -> one op with a spec
                FuseBias(),  # before folding, so that q, k and v carry theirs along
                FoldParallelLinears(),  # q, k, v and gate, up: one launch, one read of x
                FuseActivation(),  # act(linear): saves a pass over the output
                FuseResidual(),  # linear + r: likewise
                FuseNorm(),  # linear(rms_norm): likewise, over the input
                transform.CanonicalizeBindings(),  # drops the aliases that fusing left
            ],
        ),
        (
            "dispatch",
            [
                # adapters' paths beside the layers, once these are folded
                *_low_rank(options, plan),
                # rule, configuration, packed parameters
                SelectKernels(options.target, plan, options.configurations),
                SelectNorms(options.target),  # norms that nothing absorbed
                DeviceKernels(options.target),  # RoPE, which the definition brought along
                AttachKVCache(options.kv_cache, options.target),  # with this target's attention
                *([AddChoice()] if captured else []),  # so that a token leaves the GPU, not logits
            ],
        ),
        (
            "lower",
            [
                # what is left of Relax operators -> TIR
                transform.LegalizeOps({"relax.cumsum": running_sum} if options.general else None),
                transform.AnnotateTIROpPattern(),  # says which of them may fuse
                transform.FoldConstant(),  # computes what does not depend on the inputs
                transform.FuseOps(),  # chains of element-wise operators
                transform.FuseTIR(),  # each chain -> one PrimFunc
                transform.DeadCodeElimination(),  # drops the functions that fused away
                # what a general module computes besides linear layers
                *([ScheduleReductions()] if options.general else []),
                ScheduleRest(options.target),  # lanes, or threads of a GPU, for those
                CheckScheduled(),  # nothing unscheduled may reach code generation
            ],
        ),
        (
            "memory",
            [
                transform.RewriteDataflowReshape(),  # a reshape is a view, not a copy
                transform.ToNonDataflow(),  # dataflow blocks end: allocation has effects
                transform.RemovePurityChecking(),  # for the same reason
                transform.CallTIRRewrite(),  # outputs are allocated and passed in
                transform.StaticPlanBlockMemory(),  # buffers share storage, sized by the bounds
                *([CaptureDecode()] if captured else []),  # a CUDA graph a token
            ],
        ),
        (
            "finalize",
            [
                transform.LowerAllocTensor(),  # to storage and tensors
                transform.LowerRuntimeBuiltin(),  # to calls of the VM
                transform.ComputePrimValue(),  # scalar arithmetic -> host functions
                transform.VMShapeLower(),  # symbolic shapes -> the shape heap
                ShareViews(),  # what describes memory is made once, not in every block
                transform.AttachGlobalSymbol(),  # names for the linker
            ],
        ),
    )


def _low_rank(options: PipelineOptions, plan: PackPlan) -> list[tvm.transform.Pass]:
    if options.low_rank is None:
        return []
    return [AddLowRank(options.target, options.low_rank, plan)]


def run(
    mod: tvm.IRModule,
    records: Sequence[ParamRecord],
    options: PipelineOptions,
    observe: Callable[[str, tvm.IRModule], None] | None = None,
) -> tuple[tvm.IRModule, PackPlan]:
    """Run all phases.

    Parameters
    ----------
    mod : IRModule
        A frontend's dense module.
    records : sequence of ParamRecord
        In the order of the functions' parameters.
    options : PipelineOptions
    observe : callable or None
        Called with each phase's name and the module after it (``--debug-dump``).

    Returns
    -------
    IRModule, PackPlan
        The lowered module, and the tensors its functions take.
    """
    plan = PackPlan()
    with Target(options.target.tvm_dict()):
        for name, passes in phases(records, options, plan):
            mod = tvm.transform.Sequential(list(passes), name=name)(mod)
            if observe is not None:
                observe(name, mod)
    return mod, plan
