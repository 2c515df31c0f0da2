"""A dense float16 Llama under torch.compile and CUDA graphs, which ours is to be faster than.

Random weights of a model's shapes, one sequence, a cache of fixed size: what a token takes at some
context lengths. Reads one JSON object from standard input and writes lines of JSON, as
`cuda_rivals.py` does; without PyTorch, or without memory for it, ``skipped`` with the reason.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Result = dict[str, Any]
_WARM = 8
_STEPS = 32


def build(torch: Any, shape: Mapping[str, int], context: int, device: str) -> tuple[Any, Any]:
    """Make a model and its cache.

    Parameters
    ----------
    shape : mapping of str to int
        ``hidden``, ``inner``, ``layers``, ``heads``, ``kv_heads``, ``head_dim``, ``vocab``.
    context : int
        Tokens that the cache has room for.

    Returns
    -------
    callable, Tensor
        ``step(token int64 [1], position int64 [1])`` to logits [1, vocab], and its weights' bytes.
    """
    nn, functional = torch.nn, torch.nn.functional
    heads, kv_heads, dim = shape["heads"], shape["kv_heads"], shape["head_dim"]
    hidden, inner = shape["hidden"], shape["inner"]
    half = torch.float16 if device == "cuda" else torch.float32

    def linear(rows: int, columns: int) -> Any:
        layer = nn.Linear(columns, rows, bias=False, device=device, dtype=half)
        nn.init.normal_(layer.weight, std=columns**-0.5)
        return layer

    def normal(x: Any, weight: Any) -> Any:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(
            x.dtype
        ) * weight

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = linear((heads + 2 * kv_heads) * dim, hidden)
            self.o, self.down = linear(hidden, heads * dim), linear(hidden, inner)
            self.gate_up = linear(2 * inner, hidden)
            self.norms = nn.Parameter(torch.ones(2, hidden, device=device, dtype=half))
            cache = torch.zeros(2, 1, kv_heads, context, dim, device=device, dtype=half)
            self.register_buffer("cache", cache)

        def forward(self, x: Any, position: Any, turn: Any, seen: Any) -> Any:
            qkv = self.qkv(normal(x, self.norms[0])).view(1, heads + 2 * kv_heads, 1, dim)
            q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=1)
            cos, sin = turn

            def rotate(t: Any) -> Any:
                low, high = t.chunk(2, dim=-1)
                return torch.cat([low * cos - high * sin, low * sin + high * cos], dim=-1)

            self.cache[0].index_copy_(2, position, rotate(k))
            self.cache[1].index_copy_(2, position, v)
            keys, values = self.cache[0], self.cache[1]
            if kv_heads != heads:
                keys = keys.repeat_interleave(heads // kv_heads, dim=1)
                values = values.repeat_interleave(heads // kv_heads, dim=1)
            out = functional.scaled_dot_product_attention(rotate(q), keys, values, attn_mask=seen)
            x = x + self.o(out.reshape(1, heads * dim))
            gate, up = self.gate_up(normal(x, self.norms[1])).chunk(2, dim=-1)
            return x + self.down(functional.silu(gate) * up)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block() for _ in range(shape["layers"])])
            table = torch.randn(shape["vocab"], hidden, device=device, dtype=half)
            self.embedding = nn.Parameter(table)
            self.norm = nn.Parameter(torch.ones(hidden, device=device, dtype=half))
            self.head = linear(shape["vocab"], hidden)

        def forward(self, token: Any, position: Any) -> Any:
            x = self.embedding[token]
            rates = torch.arange(0, dim, 2, device=device) / dim
            angle = position[:, None] * torch.exp(-rates * 9.210340371976184)  # ln 10000
            turn = (angle.cos().to(half), angle.sin().to(half))
            seen = (torch.arange(context, device=device) <= position)[None, None, None]
            for block in self.blocks:
                x = block(x, position, turn, seen)
            return self.head(normal(x, self.norm))

    model = Model().eval()
    read = sum(p.numel() * p.element_size() for p in model.parameters())
    return model, read - model.embedding.numel() * model.embedding.element_size()


def measure(
    torch: Any,
    shape: Mapping[str, int],
    contexts: Sequence[int],
    device: str = "cuda",
    *,
    compiled: bool = True,
) -> Iterator[tuple[int, Result]]:
    """Time a token at each context length."""
    for context in contexts:
        with torch.no_grad():
            step, size = build(torch, shape, context, device)
            if compiled:
                step = torch.compile(step, mode="reduce-overhead", fullgraph=True)
            token = torch.zeros(1, dtype=torch.int64, device=device)
            position = torch.full((1,), context - 1, dtype=torch.int64, device=device)

            def run(count: int, step: Any = step, token: Any = token, at: Any = position) -> float:
                begin = time.perf_counter()
                for _ in range(count):
                    logits = step(token, at)
                finite = bool(torch.isfinite(logits).all())  # waits for the device
                assert finite, "logits are no finite numbers"
                return (time.perf_counter() - begin) / count

            run(_WARM)
            times = sorted(run(_STEPS) for _ in range(5))
        median = times[len(times) // 2]
        timing = {"median": median, "low": times[0], "high": times[-1], "repeats": len(times)}
        yield (
            context,
            {"status": "ok", "weight_bytes": size, "timing": timing, "bandwidth": size / median},
        )
        del step


def main() -> int:
    """Run the cases ``(model, rival, context)`` that standard input names."""
    order = json.load(sys.stdin)
    cases = {case[2]: "|".join(str(part) for part in case) for case in order["cases"]}
    left = list(cases)
    reason = ""
    try:
        import torch

        if not torch.cuda.is_available():
            reason = "PyTorch sees no GPU"
        else:
            print(json.dumps({"begin": cases[left[0]]}), flush=True)
            for context, result in measure(torch, order["shape"], list(left)):
                left.remove(context)
                print(json.dumps({"case": cases[context], **result}), flush=True)
                if left:
                    print(json.dumps({"begin": cases[left[0]]}), flush=True)
    except ImportError as error:
        reason = f"no PyTorch: {error}"
    except Exception as error:  # whatever PyTorch raises is its reason
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    for context in left:
        skipped = {"case": cases[context], "status": "skipped", "fault": reason[:300]}
        print(json.dumps(skipped), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
