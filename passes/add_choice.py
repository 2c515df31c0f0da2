"""Phase 3: a function that chooses tokens from logits on a GPU."""

from __future__ import annotations

from gqsa_compiler._tvm import relax, tirx, tvm
from gqsa_compiler.passes.add_decode import DECODE
from gqsa_compiler.schedules.cuda.sampling import FIELDS, choose_tokens

CHOOSE = "choose_tokens"


@tvm.transform.module_pass(opt_level=0, name="AddChoice")
class AddChoice:
    """Add ``choose_tokens(logits, draws)`` beside `decode`: a token's number for each row."""

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Add one function and its kernel."""
        rows, vocab = tirx.Var("m", "int64"), mod[DECODE].ret_ty.shape[1]
        logits = relax.Var("logits", relax.TensorType([rows, vocab], "float32"))
        draws = relax.Var("draws", relax.TensorType([rows, FIELDS], "float32"))
        builder = relax.BlockBuilder(mod)
        kernel = builder.add_func(choose_tokens(int(vocab)), f"{CHOOSE}_kernel")
        with builder.function(CHOOSE, [logits, draws]):
            made = relax.TensorType([rows], "int32")
            with builder.dataflow():
                found = builder.emit_output(relax.call_tir(kernel, [logits, draws], out_ty=made))
            builder.emit_func_output(found)
        out = builder.get()
        return out if mod.attrs is None else out.with_attrs(mod.attrs)


__all__ = ["CHOOSE", "AddChoice"]
