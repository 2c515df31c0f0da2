"""Other people's kernels on the same layer and the same stopwatch; one process of `cuda_run.py`.

Reads one JSON object from standard input and writes lines of JSON, as `cuda_measure.py` does. A
rival whose package is missing, or that refuses a layer, is ``skipped`` with the reason; one whose
results are wrong is ``wrong`` and not timed.
"""

from __future__ import annotations

import itertools
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from cuda_timing import Timing, copies_needed, time_calls

Result = dict[str, Any]
Tensor = Any

TOGETHER = 2e-2
"""How far results may be off: bfloat16 results of 4-bit weights come within 5e-3."""


class Rival(ABC):
    """One kernel.

    Parameters
    ----------
    torch : module
    n, k : int
        Output and input features.
    device : str
    """

    name: ClassVar[str]
    dtype: ClassVar[str] = "float16"

    def __init__(self, torch: Any, n: int, k: int, device: str = "cuda") -> None:
        self.torch, self.n, self.k, self.device = torch, n, k, device
        generator = torch.Generator(device=device).manual_seed(0)
        self.codes, self.scales, self.offsets = self._quantised(generator)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 4

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return 128

    def _quantised(self, generator: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Make random codes [n, k], scales and offsets [n, k / group]."""
        torch, groups = self.torch, self.k // self.group
        codes = torch.randint(
            0, 1 << self.bits, (self.n, self.k), dtype=torch.uint8, device=self.device,
            generator=generator,
        )  # fmt: skip
        dtype = getattr(torch, self.dtype)
        size = (self.n, groups)
        scales = torch.rand(size, device=self.device, generator=generator) * 0.009 + 0.001
        offsets = torch.rand(size, device=self.device, generator=generator) * 0.01 - 0.005
        return codes, scales.to(dtype), offsets.to(dtype)

    def dense(self) -> Tensor:
        """Return the weight [n, k] in float32."""
        codes = self.codes.float().view(self.n, -1, self.group)
        weight = (codes - (1 << self.bits - 1)) * self.scales.float()[..., None]
        return (weight + self.offsets.float()[..., None]).view(self.n, self.k)

    @abstractmethod
    def weights(self) -> Any:
        """Make one more copy of the weights as the kernel reads them."""

    @abstractmethod
    def call(self, weights: Any, x: Tensor) -> Tensor:
        """Multiply."""

    @abstractmethod
    def weight_bytes(self, weights: Any) -> int:
        """Count the bytes of a copy."""


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Cublas(Rival):
    """Dense halves through `torch.nn.functional.linear`."""

    name = "cublas-fp16"

    def weights(self) -> Any:
        """Copy the dense weight."""
        return self.dense().half()

    def dense(self) -> Tensor:
        """Return the weight as halves have it."""
        return super().dense().half().float()

    def call(self, weights: Any, x: Tensor) -> Tensor:
        """Multiply."""
        return self.torch.nn.functional.linear(x, weights)

    def weight_bytes(self, weights: Any) -> int:
        """Count the bytes of a copy."""
        return _bytes(weights)


class Sparse24(Rival):
    """2:4 halves through cuSPARSELt, as PyTorch has it."""

    name = "cusparselt-2:4-fp16"

    def dense(self) -> Tensor:
        """Return the weight with the first two of four inputs."""
        weight = super().dense().half().float().view(self.n, -1, 4)
        weight[..., 2:] = 0
        return weight.view(self.n, self.k)

    def weights(self) -> Any:
        """Compress the weight."""
        from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

        SparseSemiStructuredTensor._FORCE_CUTLASS = False
        return to_sparse_semi_structured(self.dense().half())

    def call(self, weights: Any, x: Tensor) -> Tensor:
        """Multiply; PyTorch pads the tokens to what the library takes."""
        return self.torch.nn.functional.linear(x, weights)

    def weight_bytes(self, weights: Any) -> int:
        """Count half of the weights and two bits for each of these."""
        return self.n * self.k // 2 * 2 + self.n * self.k // 8


class TorchInt4(Rival):
    """`torch._weight_int4pack_mm`, bfloat16 activations."""

    dtype = "bfloat16"
    size: ClassVar[int]

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.size

    def weights(self) -> Any:
        """Pack: the even column is in the high nibble."""
        torch = self.torch
        packed = self.codes[:, ::2] << 4 | self.codes[:, 1::2]
        both = torch.stack([self.scales.t(), self.offsets.t()], dim=-1).contiguous()
        return torch._convert_weight_to_int4pack(packed.contiguous(), 8), both

    def call(self, weights: Any, x: Tensor) -> Tensor:
        """Multiply."""
        return self.torch._weight_int4pack_mm(x, weights[0], self.size, weights[1])

    def weight_bytes(self, weights: Any) -> int:
        """Count the bytes of a copy."""
        return _bytes(*weights)


class TorchInt4G32(TorchInt4):
    """Groups of 32, its smallest."""

    name, size = "torch-int4-g32", 32


class TorchInt4G128(TorchInt4):
    """Groups of 128."""

    name, size = "torch-int4-g128", 128


class Gemlite(Rival):
    """gemlite's Triton kernels."""

    size: ClassVar[int]
    width: ClassVar[int] = 4

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.width

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.size

    def dense(self) -> Tensor:
        """Return the weight: zero points are all half of the codes."""
        codes = self.codes.float().view(self.n, -1, self.group)
        weight = (codes - (1 << self.bits - 1)) * self.scales.float()[..., None]
        return weight.view(self.n, self.k)

    def weights(self) -> Any:
        """Pack."""
        from gemlite import DType, GemLiteLinear

        layer = GemLiteLinear(
            self.width, self.size, self.k, self.n, input_dtype=DType.FP16, output_dtype=DType.FP16
        )
        zeros = self.torch.full_like(self.scales, float(1 << self.bits - 1))
        layer.pack(self.codes.clone(), self.scales.clone(), zeros, bias=None)
        return layer

    def call(self, weights: Any, x: Tensor) -> Tensor:
        """Multiply; the first call of a shape tunes."""
        return weights(x)

    def weight_bytes(self, weights: Any) -> int:
        """Count codes, scales and zero points."""
        return _bytes(weights.W_q, weights.scales, weights.zeros)


class GemliteW4G16(Gemlite):
    """4 bits, groups of 16: this project's format with all groups kept."""

    name, size = "gemlite-w4-g16", 16


class GemliteW4G128(Gemlite):
    """4 bits, groups of 128."""

    name, size = "gemlite-w4-g128", 128


class GemliteW2G64(Gemlite):
    """2 bits, groups of 64: the paper's other rival."""

    name, size, width = "gemlite-w2-g64", 64, 2


RIVALS: dict[str, type[Rival]] = {
    rival.name: rival
    for rival in (
        Cublas,
        TorchInt4G32,
        TorchInt4G128,
        Sparse24,
        GemliteW4G16,
        GemliteW4G128,
        GemliteW2G64,
    )
}


class TorchClock:
    """The part of `cuda_driver.Device` that `time_calls` uses, for PyTorch's launches."""

    def __init__(self, torch: Any) -> None:
        self.torch = torch

    def time(self, work: Callable[[], None], repeats: int) -> list[float]:
        """Capture `work` in a graph and time its replays, in seconds each."""
        cuda = self.torch.cuda
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):  # what a first call allocates or tunes stays out of the graph
            work()
        cuda.current_stream().wait_stream(side)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            work()
        events = [cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        for _ in range(3):
            graph.replay()
        cuda.synchronize()
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in itertools.pairwise(events)]


def measure(
    rival: Rival, tokens: Sequence[int], clock: Any, l2_bytes: int
) -> Iterator[tuple[int, Result]]:
    """Check and time a rival for numbers of tokens."""
    torch = rival.torch
    copies = [rival.weights()]
    size = rival.weight_bytes(copies[0])
    dense = rival.dense()
    generator = torch.Generator(device=rival.device).manual_seed(1)
    for count in tokens:
        x = torch.randn(count, rival.k, device=rival.device, generator=generator)
        x = x.to(getattr(torch, rival.dtype))
        got = rival.call(copies[0], x).double()
        wanted = x.double() @ dense.double().t()
        together = float((got - wanted).norm() / wanted.norm())
        if not together < TOGETHER:
            fault = f"results are off by {together:.2g} of their norm together"
            yield count, {"status": "wrong", "fault": fault}
            continue
        while len(copies) < copies_needed(size, l2_bytes):
            copies.append(rival.weights())
        timing = _time(rival, clock, copies, x)
        yield (
            count,
            {
                "status": "ok",
                "together": together,
                "weight_bytes": size,
                "timing": timing.to_json(),
                "bandwidth": size / timing.median,
            },
        )


def _time(rival: Rival, clock: Any, copies: Sequence[Any], x: Tensor) -> Timing:
    def call(copy: int) -> None:
        rival.call(copies[copy], x)

    return time_calls(clock, call, len(copies))


def run_cases(
    torch: Any,
    n: int,
    k: int,
    cases: Sequence[Sequence[Any]],
    clock: Any,
    l2_bytes: int,
    device: str = "cuda",
) -> Iterator[Result]:
    """Run cases ``(shape, rival, tokens)``, in their order.

    Parameters
    ----------
    clock : TorchClock
        Or what has its `time`.
    """
    names = list(dict.fromkeys(case[1] for case in cases))
    for name in names:
        own = [case for case in cases if case[1] == name]
        labels = {case[2]: "|".join(str(part) for part in case) for case in own}
        left = list(labels)
        yield {"begin": labels[left[0]]}
        try:
            rival = RIVALS[name](torch, n, k, device)
            for tokens, result in measure(rival, list(left), clock, l2_bytes):
                left.remove(tokens)
                yield {"case": labels[tokens], **result}
                if left:
                    yield {"begin": labels[left[0]]}
        except Exception as error:  # whatever a rival raises is its reason
            first = (str(error).strip().splitlines() or [""])[0]
            reason = f"{type(error).__name__}: {first}"
            for tokens in left:
                yield {"case": labels[tokens], "status": "skipped", "fault": reason[:300]}
            if "CUDA error" in str(error):
                return  # the device is lost to this process; another one goes on
        if device == "cuda":
            torch.cuda.empty_cache()


def main() -> int:
    """Run the cases that standard input names."""
    order = json.load(sys.stdin)
    try:
        import torch
    except ImportError as error:
        found: Iterator[Result] = iter(_all_skipped(order["cases"], f"no PyTorch: {error}"))
    else:
        if torch.cuda.is_available():
            l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
            clock = TorchClock(torch)
            found = run_cases(torch, order["n"], order["k"], order["cases"], clock, l2_bytes)
        else:
            found = iter(_all_skipped(order["cases"], "PyTorch sees no GPU"))
    for line in found:
        print(json.dumps(line), flush=True)
    return 0


def _all_skipped(cases: Sequence[Sequence[Any]], reason: str) -> list[Result]:
    names = ["|".join(str(part) for part in case) for case in cases]
    return [{"case": name, "status": "skipped", "fault": reason} for name in names]


if __name__ == "__main__":
    sys.exit(main())
