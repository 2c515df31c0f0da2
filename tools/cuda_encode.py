"""Writes the host function of a lowered kernel as the JSON that `cuda_host.py` evaluates."""

from __future__ import annotations

from typing import Any

from cuda_host import BINARY


def encode_host(function: Any) -> dict[str, Any]:
    """Encode the entry function of a module that `schedules.cuda.lowering.lower` returned.

    Raises
    ------
    NotImplementedError
        The function has a statement or an expression that the format does not.
    """
    return _Encoder().function(function)


class _Encoder:
    """Gives every variable and buffer a name of its own."""

    def __init__(self) -> None:
        self.names: dict[Any, str] = {}

    def name(self, node: Any) -> str:
        return self.names.setdefault(node, f"v{len(self.names)}")

    def function(self, function: Any) -> dict[str, Any]:
        params = []
        for param in function.params:
            extents = [self.value(extent) for extent in param.ty.shape]
            params.append([self.name(param), str(param.ty.dtype.dtype), extents])
        return {"params": params, "body": self.statement(function.body)}

    def statement(self, node: Any) -> list[Any]:
        kind = type(node).__name__
        if kind == "SeqStmt":
            return ["seq", *(self.statement(statement) for statement in node.seq)]
        if kind == "IfThenElse":
            otherwise = None if node.else_case is None else self.statement(node.else_case)
            return ["if", self.value(node.condition), self.statement(node.then_case), otherwise]
        if kind == "For":
            bounds = [self.value(node.min), self.value(node.extent)]
            return ["for", self.name(node.loop_var), *bounds, self.statement(node.body)]
        if kind == "DeclBuffer":
            return ["let", self.name(node.buffer), self.value(node.data)]
        if kind == "AllocBuffer":
            extents = [self.value(extent) for extent in node.buffer.ty.shape]
            return ["alloc", self.name(node.buffer), str(node.buffer.ty.dtype.dtype), extents]
        if kind == "Bind":
            return ["let", self.name(node.var), self.value(node.value)]
        if kind == "AttrStmt":
            return self.statement(node.body)
        if kind == "Evaluate":
            return self._launch(node.value)
        raise NotImplementedError(f"statement {kind}: {node}")

    def _launch(self, call: Any) -> list[Any]:
        if type(call).__name__ == "IntImm":
            return ["seq"]
        if call.op.name != "tirx.call_ffi_kernel":
            raise NotImplementedError(f"call {call}")
        tags = [str(tag) for tag in call.attrs.launch_params]
        values = [self.value(arg) for arg in call.args[1:]]
        cut = len(values) - len(tags)
        sizes = dict(zip(tags, values[cut:], strict=True))
        return ["launch", str(call.args[0].value), values[:cut], sizes]

    def value(self, node: Any) -> Any:
        kind = type(node).__name__
        if kind in ("int", "IntImm"):
            return int(node)
        if kind == "Var":
            return ["var", self.name(node)]
        if kind == "Cast":
            return ["cast", self.value(node.value)]
        if kind == "Not":
            return ["not", self.value(node.a)]
        if kind == "Select":
            parts = (node.condition, node.true_value, node.false_value)
            return ["select", *(self.value(part) for part in parts)]
        if kind in BINARY:
            return [kind, self.value(node.a), self.value(node.b)]
        if kind == "Call":
            name = node.op.name.removeprefix("tirx.")
            if name == "buffer_data":
                return self.value(node.args[0])
            if name in BINARY:
                return [name, *(self.value(arg) for arg in node.args)]
        # A buffer given as an argument.
        if node in self.names:
            return ["var", self.names[node]]
        raise NotImplementedError(f"expression {kind}: {node}")
