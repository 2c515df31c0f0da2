"""Phase 3: kernels that the model's definition brings along get this target's code."""

from __future__ import annotations

from gqsa_compiler._tvm import tirx, tvm
from gqsa_compiler.schedules.cuda.rope import rope_qkv
from gqsa_compiler.schedules.generic.rope import ROPE, RopeShape
from gqsa_compiler.targets import TargetSpec


@tvm.transform.module_pass(opt_level=0, name="DeviceKernels")
class DeviceKernels:
    """Replace the RoPE kernel, which a model is defined with before its target is known.

    The definition's own one runs on any CPU.
    """

    def __init__(self, target: TargetSpec) -> None:
        self.target = target

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Replace every PrimFunc that says what it computes."""
        if self.target.kind != "cuda":
            return mod
        out = mod.clone()
        for gvar, func in mod.functions_items():
            if isinstance(func, tirx.PrimFunc) and func.attrs and ROPE in func.attrs:
                out.update_func(gvar, rope_qkv(RopeShape.from_json(str(func.attrs[ROPE]))))
        return out
