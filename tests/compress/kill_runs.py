"""Compress a model over and over, killed at many moments, and compare what comes of it.

A program of its own, since it forks: `python -m tests.compress.kill_runs MODEL FOLDER STAGES few`
(or ``all``). It prints a line for every case, and ends with 1 if a checkpoint differs from that of
an undisturbed run.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from gqsa_compiler.compress import Recipe, compress_model, parse_recipe
from gqsa_compiler.compress.phases import model as model_phase
from gqsa_compiler.frontends.resolve import resolve
from gqsa_compiler.frontends.torch_model import load_dense

RANDOM_RUNS = 8
KILLS_PER_RUN = 4
FEW = 3
NOT_COMPARED = ("compression.jsonl", "compression.html")
"""Times are in them."""

Events = list[tuple[str, int]]


def quick_recipe() -> Recipe:
    """Return w4s50g16 with small steps, so that each stage has several."""
    recipe = parse_recipe("w4s50g16")
    assert recipe.block is not None
    assert recipe.weights is not None
    assert recipe.scales is not None
    return replace(
        recipe,
        block=replace(recipe.block, batch_tokens=64),
        weights=replace(recipe.weights, batch_tokens=64),
        scales=replace(recipe.scales, batch_tokens=64),
    )


def child(work: Callable[[], object]) -> int:
    """Start `work` in a process; it ends with 0 unless it raises or is killed."""
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(number: int) -> int:
    """Wait for a process; returns its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def compress(model: Path, output: Path, stages: str, kill_at: int | None = None) -> Events:
    """Compress; with `kill_at`, be killed when so many steps have been reported."""
    events: Events = []

    def progress(stage: str, done: int, total: int) -> None:
        if len(events) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        events.append((stage, done))

    compress_model(
        model,
        output,
        quick_recipe(),
        stages=stages,
        samples=8,
        sequence_length=32,
        progress=progress,
    )
    return events


def content(output: Path) -> dict[str, bytes]:
    """Read a checkpoint's files."""
    return {
        path.name: path.read_bytes()
        for path in sorted(output.iterdir())
        if path.name not in NOT_COMPARED
    }


def moments(events: Events) -> dict[str, int]:
    """Choose the first, a middle and the last step of every stage, by a name for each."""
    chosen = {}
    for stage in dict.fromkeys(name for name, _ in events):
        places = [index for index, (name, _) in enumerate(events) if name == stage]
        for word, place in (("first", 0), ("middle", len(places) // 2), ("last", -1)):
            chosen[f"{stage}, {word}"] = places[place]
    return chosen


def main(model: Path, folder: Path, stages: str, which: str) -> int:
    """Run the cases."""
    torch.set_num_threads(1)  # before any thread is there: processes with threads cannot fork
    model_phase.SAVE_SECONDS = 0.0
    load_dense(resolve(str(model)))  # what it imports need not be imported in every process
    log = folder / "events"

    def whole() -> None:
        events = compress(model, folder / "whole", stages)
        log.write_text("\n".join(f"{stage}\t{done}" for stage, done in events))

    began = time.monotonic()
    assert wait(child(whole)) == 0
    seconds = time.monotonic() - began
    expected = content(folder / "whole")
    lines = [line.split("\t") for line in log.read_text().splitlines()]
    failures = 0

    def check(case: str, output: Path) -> None:
        nonlocal failures
        code = wait(child(lambda: compress(model, output, stages)))
        left = [path.name for path in folder.iterdir() if path.name.startswith(f"{output.name}.")]
        same = code == 0 and content(output) == expected and not left
        failures += not same
        print("ok" if same else f"DIFFERENT (code {code}, left {left})", case, flush=True)
        shutil.rmtree(output, ignore_errors=True)

    cases = list(moments([(stage, int(done)) for stage, done in lines]).items())
    if which == "few":
        cases = random.Random(time.time_ns()).sample(cases, FEW)
    for case, place in cases:
        output = folder / f"at-{place}"
        if wait(child(lambda: compress(model, output, stages, place))) != -signal.SIGKILL:  # noqa: B023
            failures += 1
            print("NOT KILLED", case)
        check(case, output)
    generator = random.Random(0)
    for run in range(RANDOM_RUNS if which == "all" else 1):
        output = folder / f"random-{run}"
        for _ in range(KILLS_PER_RUN):
            number = child(lambda: compress(model, output, stages))  # noqa: B023
            time.sleep(generator.uniform(0, 0.8 * seconds))
            os.kill(number, signal.SIGKILL)
            wait(number)
            if output.exists():
                shutil.rmtree(output)
        check(f"random {run}", output)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]))
