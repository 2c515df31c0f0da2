"""llama.cpp's side of `bench_llamacpp.py`: runs in the Python that has llama-cpp-python.

Nothing of this project is imported, and the low-level interface is used: what is timed is
llama_decode, not Python's sampling loop.

    python tools/llamacpp_theirs.py measure MODEL.gguf --threads 2
    python tools/llamacpp_theirs.py quantize MODEL.gguf MODEL-q4_0.gguf
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamacpp_timing import Work, add_work, measure, read_work

try:
    import llama_cpp as lib
except ImportError as error:
    sys.exit(
        f"llama.cpp cannot be loaded ({error}); install it with: "
        'CMAKE_ARGS="-DGGML_NATIVE=ON" pip install llama-cpp-python'
    )

_log: list[str] = []


@lib.llama_log_callback
def _listen(level: int, text: bytes, data: Any) -> None:
    _log.append(text.decode("utf-8", "replace"))


class LlamaEngine:
    """A GGUF model on the CPU; see `llamacpp_timing.Engine`."""

    def __init__(self, path: Path, work: Work) -> None:
        lib.llama_backend_init()
        settings = lib.llama_model_default_params()
        settings.n_gpu_layers = 0
        self._model = lib.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            sys.exit(f"llama.cpp cannot load {path}: {_last_words()}")
        options = lib.llama_context_default_params()
        options.n_ctx = work.context
        options.n_batch = max(work.prompt, work.prefill)
        options.n_threads = options.n_threads_batch = work.threads
        self._context = lib.llama_init_from_model(self._model, options)
        if not self._context:
            sys.exit(f"llama.cpp cannot make a context for {path}: {_last_words()}")
        vocabulary = lib.llama_model_get_vocab(self._model)
        self.vocab_size = int(lib.llama_vocab_n_tokens(vocabulary))

    def reset(self) -> None:
        """Forget all tokens."""
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)

    def prefill(self, tokens: Sequence[int]) -> None:
        """Append tokens and compute the last one's logits."""
        # A batch without positions and flags goes on at the end and has the last one's logits.
        ids = (lib.llama_token * len(tokens))(*tokens)
        status = lib.llama_decode(self._context, lib.llama_batch_get_one(ids, len(tokens)))
        if status != 0:
            sys.exit(f"llama_decode failed with status {status}: {_last_words()}")
        lib.llama_synchronize(self._context)

    def decode(self, token: int) -> None:
        """Append one token and compute its logits."""
        self.prefill((token,))

    def logits(self) -> Sequence[float]:
        """Return the logits of the last call."""
        values: list[float] = lib.llama_get_logits_ith(self._context, -1)[: self.vocab_size]
        return values


def information() -> dict[str, str]:
    """Return the version, and what the library was built with."""
    return {
        "llama_cpp_python": lib.__version__,
        "system": lib.llama_print_system_info().decode().strip(),
    }


def quantize(source: Path, target: Path, threads: int) -> None:
    """Write a GGUF file again as Q4_0, one that is quantised already too."""
    settings = lib.llama_model_quantize_default_params()
    settings.nthread = threads
    settings.ftype = lib.LLAMA_FTYPE_MOSTLY_Q4_0
    settings.allow_requantize = True
    # Aside first: an interrupted run leaves no half a file under the name.
    part = target.with_name(f"{target.name}.part")
    if lib.llama_model_quantize(str(source).encode(), str(part).encode(), settings) != 0:
        part.unlink(missing_ok=True)
        sys.exit(f"llama.cpp cannot quantise {source}: {_last_words()}")
    part.replace(target)


def _last_words() -> str:
    lines = "".join(_log).strip().splitlines()
    return lines[-1].strip() if lines else "it does not say why"


def main() -> None:
    """Do one thing and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("information")
    timed = verbs.add_parser("measure")
    timed.add_argument("model", type=Path)
    add_work(timed)
    written = verbs.add_parser("quantize")
    written.add_argument("source", type=Path)
    written.add_argument("target", type=Path)
    written.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    lib.llama_log_set(_listen, None)
    found: dict[str, Any] = information()
    if options.verb == "measure":
        work = read_work(options)
        found = measure(LlamaEngine(options.model, work), work)
        # Which share of the weights was repacked for this CPU, among others.
        lines = "".join(_log).splitlines()
        found["buffers"] = [line.strip() for line in lines if "buffer size" in line]
    elif options.verb == "quantize":
        quantize(options.source, options.target, options.threads)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
