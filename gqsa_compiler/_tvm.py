"""The only place that knows which TVM this is: names that change between releases.

Written for apache-tvm 0.27. Everything else imports TVM's moving parts from here.
"""

from __future__ import annotations

import tvm
import tvm_ffi

from gqsa_compiler.errors import CompileError

REQUIRED = "0.27"

# Before the names below are imported: another release lacks some of them.
if not str(tvm.__version__).startswith(f"{REQUIRED}."):
    raise CompileError(
        f"gqsa needs apache-tvm {REQUIRED}, and {tvm.__version__} is installed; "
        f"pip install 'apache-tvm=={REQUIRED}.*'."
    )

# ruff: noqa: E402
from tvm import relax, rpc, runtime, s_tir, te, tirx
from tvm.ir import GenericConst, StringImm
from tvm.relax.analysis import post_order_visit
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn.core import wrap_nested
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache
from tvm.relax.frontend.torch import from_exported_program
from tvm.relax.utils import copy_with_new_vars
from tvm.s_tir import Schedule, ScheduleError
from tvm.script import relax as R
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.sym import Analyzer
from tvm.target import Target
from tvm.tirx.build import split_host_device_mods
from tvm.tirx.compilation_pipeline import finalize_host_passes, register_tir_pipeline
from tvm.tirx.script import builder as B
from tvm_ffi import structural_equal, structural_hash


def end_block(builder: relax.BlockBuilder) -> None:
    """End the block that an exception has left open: TVM warns of a builder that goes with one."""
    builder._end_block()


# A pass runs behind TVM's C interface, which brings an exception back by its class's name.
tvm_ffi.register_error("CompileError", CompileError)

__all__ = [
    "REQUIRED",
    "Analyzer",
    "B",
    "GenericConst",
    "IRBuilder",
    "PagedKVCache",
    "PyExprMutator",
    "R",
    "Schedule",
    "ScheduleError",
    "StringImm",
    "T",
    "Target",
    "copy_with_new_vars",
    "end_block",
    "finalize_host_passes",
    "from_exported_program",
    "mutator",
    "nn",
    "post_order_visit",
    "register_tir_pipeline",
    "relax",
    "rpc",
    "runtime",
    "s_tir",
    "split_host_device_mods",
    "structural_equal",
    "structural_hash",
    "te",
    "tirx",
    "tvm",
    "tvm_ffi",
    "wrap_nested",
]
