"""Decode and prefill speed of an artefact beside PyTorch fp32 on the same weights, paired.

    python tools/bench_torch.py ARTEFACT CHECKPOINT --gen 64 --prompt 128 --repeats 5

Both run in one process, one after the other in every repeat, so that a change of the machine's
speed hits both; the figures are medians, the ratio is the median of the repeats' ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from gqsa_compiler import runtime
from gqsa_compiler.frontends.resolve import resolve
from gqsa_compiler.frontends.torch_model import load_checkpoint_dense, load_dense


def seconds(work: Callable[[], object]) -> float:
    """Time one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artefact")
    parser.add_argument("model", help="the checkpoint (or dense model) that it was compiled from")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--gen", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    source = resolve(options.model)
    if source.checkpoint is not None:
        reference = load_checkpoint_dense(source)
    else:
        reference = load_dense(source, torch.float32)[0]
    tokens = torch.randint(
        100, 10_000, (1, options.prompt), generator=torch.Generator().manual_seed(0)
    )
    prompt = tokens[0].tolist()
    short = tokens[:, :4]
    with runtime.load(options.artefact, threads=options.threads) as model, torch.inference_mode():
        runs: dict[str, list[float]] = {
            "decode": [],
            "decode_torch": [],
            "prefill": [],
            "prefill_torch": [],
        }
        for _ in range(options.repeats + 1):  # the first is a warm-up
            runs["prefill"].append(
                options.prompt
                / seconds(lambda: model.generate(prompt, max_tokens=1, temperature=0.0))
            )
            runs["prefill_torch"].append(options.prompt / seconds(lambda: reference(tokens)))
            runs["decode"].append(
                options.gen
                / seconds(
                    lambda: model.generate(
                        short[0].tolist(), max_tokens=options.gen, temperature=0.0, ignore_eos=True
                    )
                )
            )
            runs["decode_torch"].append(
                options.gen
                / seconds(
                    lambda: reference.generate(
                        short,
                        max_new_tokens=options.gen,
                        min_new_tokens=options.gen,
                        do_sample=False,
                        pad_token_id=0,
                    )
                )
            )
    kept = {name: values[1:] for name, values in runs.items()}
    result = {f"{name}_tokens_per_second": statistics.median(v) for name, v in kept.items()}
    for name in ("prefill", "decode"):
        pairs = zip(kept[name], kept[f"{name}_torch"], strict=True)
        result[f"{name}_ratio"] = statistics.median(ours / theirs for ours, theirs in pairs)
    print(json.dumps({k: round(v, 2) for k, v in result.items()}, indent=1))


if __name__ == "__main__":
    main()
