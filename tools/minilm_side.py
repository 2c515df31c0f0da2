"""One side of `bench_minilm.py`, in a process of its own: load, warm up, time each set of inputs.

Two runtimes in one process would fight: each keeps threads spinning after a call.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

_WARM_UP_CALLS = 5

Call = Callable[[np.ndarray, np.ndarray], object]


def gqsa(path: Path, threads: int) -> Call:
    """Load an artefact."""
    from gqsa_compiler.runtime import load_module

    return load_module(path, threads=threads)


def onnxruntime(path: Path, threads: int) -> Call:
    """Load an ONNX file, with every optimisation that the session makes by itself."""
    import onnxruntime as runtime

    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]
    return lambda ids, mask: session.run(None, dict(zip(names, (ids, mask), strict=True)))


def main() -> None:
    """Print the median milliseconds of each set of inputs as a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=("gqsa", "onnxruntime"))
    parser.add_argument("path", type=Path, help="artefact or ONNX file")
    parser.add_argument("inputs", type=Path, help=".npz with NAME.ids and NAME.mask")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--calls", type=int, default=30)
    arguments = parser.parse_args()
    load = gqsa if arguments.side == "gqsa" else onnxruntime
    call = load(arguments.path, arguments.threads)
    found = {}
    with np.load(arguments.inputs, allow_pickle=False) as inputs:
        names = [name.removesuffix(".ids") for name in inputs.files if name.endswith(".ids")]
        for name in names:
            ids, mask = inputs[f"{name}.ids"], inputs[f"{name}.mask"]
            times = []
            for number in range(_WARM_UP_CALLS + arguments.calls):
                begin = time.perf_counter()
                call(ids, mask)
                if number >= _WARM_UP_CALLS:
                    times.append(1e3 * (time.perf_counter() - begin))
            found[name] = statistics.median(times)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
