"""Checks and times the kernels of a bundle on this machine's GPU, beside their rivals.

    python cuda_run.py --minutes 25 --out results.json

Needs Python 3.10, numpy and NVIDIA's driver; rivals need PyTorch (and gemlite), and are skipped
with a reason where it is not. Every layer is measured in a process of its own, so a kernel that
crashes costs its own result only. Results are written after every layer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cuda_processes import NO_TIME, Child, Clock, case_name, run_group

HERE = Path(__file__).resolve().parent
GIGABYTE = 1e9
DENSE_MODEL = "torch-compile-fp16"
_AHEAD = 4  # layers that are packed while others are measured


@dataclass(frozen=True)
class Group:
    """The cases of one layer: a shape and a sparsity, or a shape's rivals; or a dense model.

    Parameters
    ----------
    name : str
    shape : str
    sparsity : float
    cases : tuple of (kernel, sparsity, tokens)
    rivals : bool
    """

    name: str
    shape: str
    sparsity: float
    cases: tuple[tuple[str, float, int], ...] = ()
    rivals: bool = False
    model: bool = False


def groups_of(
    manifest: Mapping[str, Any], only: Sequence[str], rivals: bool, arch: str
) -> list[Group]:
    """List what is measured, in the order of importance: goals, their rivals, the rest.

    Parameters
    ----------
    only : sequence of str
        Shapes; none: all.
    arch : str
        The device's; kernels for others are left out.
    """
    shapes = [shape["name"] for shape in manifest["shapes"]]
    if only:
        shapes = [name for name in shapes if name in only]
    found = []
    for sparsity in manifest["sparsities"]:
        for shape in shapes:
            cases = tuple(
                (kernel["id"], sparsity, tokens)
                for kernel in manifest["kernels"]
                if kernel["shape"] == shape and kernel["arch"] == arch
                if sparsity in kernel["sparsities"]
                for tokens in kernel["tokens"]
            )
            if cases:
                found.append(Group(f"{shape}-{sparsity}", shape, sparsity, cases))
    if not rivals:
        return found
    others = [Group(f"{shape}-rivals", shape, 0.0, rivals=True) for shape in shapes]
    goals = [shape for shape in shapes if shape in manifest["goals"]]
    first = [
        group for group in found if group.shape in goals and group.sparsity == found[0].sparsity
    ]
    first += [group for group in others if group.shape in goals]
    if not only:
        first += [Group(name, name, 0.0, rivals=True, model=True) for name in manifest["models"]]
    return first + [group for group in [*found, *others] if group not in first]


class Results:
    """What is known so far, written to a file after every group.

    Parameters
    ----------
    path : Path
    head : mapping
        What was measured on what.
    earlier : mapping, optional
        The data of a run that came to its end too early: its finished groups are kept.
    """

    def __init__(
        self, path: Path, head: Mapping[str, Any], earlier: Mapping[str, Any] | None = None
    ) -> None:
        self.path = path
        self.data: dict[str, Any] = {**head, "done": [], "results": [], "rivals": []}
        self.data |= {"models": [], "skipped": []}
        if earlier is not None:
            for key in ("done", "results", "rivals", "models"):
                self.data[key] = list(earlier[key])

    def add(self, group: Group, found: Sequence[dict[str, Any]]) -> None:
        """Keep a group's results, if all of it was measured."""
        if any(result.get("fault") == NO_TIME for result in found):
            self.leave_out(group)
            return
        kind = "models" if group.model else "rivals" if group.rivals else "results"
        self.data[kind] += found
        self.data["done"].append(group.name)

    def leave_out(self, group: Group) -> None:
        """Note that there was no time for a group."""
        self.data["skipped"].append({"group": group.name, "reason": NO_TIME})

    def save(self) -> None:
        """Write the file; it is whole at any time."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1), encoding="utf-8")
        part.replace(self.path)


class Kitchen:
    """Packs the weights of the next layers while one is measured.

    Parameters
    ----------
    manifest : mapping
    bundle, folder : Path
        Where the bundle is and where packed weights go.
    """

    def __init__(self, manifest: Mapping[str, Any], bundle: Path, folder: Path, seed: int) -> None:
        self.kernels = {kernel["id"]: kernel for kernel in manifest["kernels"]}
        self.tokens = max(manifest["tokens"])
        self.bundle, self.folder, self.seed = bundle, folder, seed
        self.pool = ThreadPoolExecutor(_AHEAD)
        self.children: list[Child] = []

    def start(self, group: Group) -> Future[str]:
        """Begin with a group; the result is empty, or says what went wrong."""
        return self.pool.submit(self._prepare, group)

    def _prepare(self, group: Group) -> str:
        place = self.place(group)
        place.mkdir(parents=True, exist_ok=True)
        names = list(dict.fromkeys(case[0] for case in group.cases))
        order = {
            "folder": str(place),
            "kernels": [self.kernels[name] for name in names],
            "sparsity": group.sparsity,
            "tokens": self.tokens,
            "seed": self.seed,
        }
        threads = str(max(1, (os.cpu_count() or 1) // _AHEAD))
        log = self.folder / f"{group.name}.prepare.log"
        child = Child(self.bundle / "cuda_layers.py", order, log, {"OMP_NUM_THREADS": threads})
        self.children.append(child)
        list(child.lines())
        return "" if child.process.returncode == 0 else f"packing failed: {child.last_words()}"

    def close(self) -> None:
        """End what is still being packed."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        for child in self.children:
            child.process.kill()

    def place(self, group: Group) -> Path:
        """Return where a group's weights are."""
        return self.folder / group.name


def probe(folder: Path) -> dict[str, Any]:
    """Describe the GPU and measure a copy, in a process of its own.

    Raises
    ------
    SystemExit
        There is none.
    """
    child = Child(HERE / "cuda_probe.py", None, folder / "probe.log")
    found = list(child.lines())
    if not found:
        sys.exit(f"No GPU can be used: {child.last_words()}")
    return {**found[0], **_driver_version()}


def _driver_version() -> dict[str, str]:
    fields = "driver_version,clocks.sm,clocks.mem,power.limit"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return {"driver": "unknown (no nvidia-smi)"}
    values = done.stdout.strip().splitlines()[:1] or ["unknown"]
    names = ("driver", "sm_clock", "memory_clock", "power_limit")
    return dict(zip(names, (value.strip() for value in values[0].split(",")), strict=False))


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    result.add_argument("--bundle", type=Path, default=HERE, help="the bundle's directory")
    result.add_argument("--out", type=Path, default=Path("cuda-results.json"), help="JSON to write")
    result.add_argument("--minutes", type=float, default=25.0, help="begin nothing new after these")
    result.add_argument("--only", nargs="*", default=[], metavar="NxK", help="these shapes only")
    result.add_argument("--no-timing", action="store_true", help="only check the results")
    result.add_argument("--no-rivals", action="store_true", help="only this project's kernels")
    resume = "results of a run of this bundle that ran out of time: measure the rest"
    result.add_argument("--resume", type=Path, metavar="JSON", help=resume)
    result.add_argument("--work", type=Path, help="for packed weights (default: a temporary one)")
    result.add_argument("--seed", type=int, default=0, help="of weights and inputs")
    return result


def main() -> int:
    """Measure everything that time allows; 1 if a kernel is wrong or has failed."""
    options = parser().parse_args()
    clock = Clock(60 * options.minutes)
    manifest = json.loads((options.bundle / "manifest.json").read_text(encoding="utf-8"))
    folder = Path(tempfile.mkdtemp(prefix="gqsa-cuda-", dir=options.work))
    try:
        return _measure(options, manifest, folder, clock)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _measure(
    options: argparse.Namespace, manifest: Mapping[str, Any], folder: Path, clock: Clock
) -> int:
    device = probe(folder)
    print(f"{device['name']}, {device['arch']}, driver {device.get('driver')}", flush=True)
    print(f"copies move {device['copy_bandwidth'] / GIGABYTE:.0f} GB/s", flush=True)
    head = {
        "format": 1,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "python": platform.python_version(),
        "bundle": {key: manifest[key] for key in ("built", "versions", "group_size")},
        "shapes": manifest["shapes"],
        "goals": manifest["goals"],
        "dense_models": manifest["models"],
        "kernels": [
            {key: kernel[key] for key in ("id", "shape", "variant", "config", "spec", "functions")}
            for kernel in manifest["kernels"]
        ],
        "seed": options.seed,
    }
    results = Results(options.out, head, _earlier(options.resume, manifest))
    rivals = not (options.no_rivals or options.no_timing)
    groups = groups_of(manifest, options.only, rivals, device["arch"])
    if not groups:
        sys.exit(f"The bundle has no kernels for {device['arch']} and these shapes.")
    groups = [group for group in groups if group.name not in results.data["done"]]
    kitchen = Kitchen(manifest, options.bundle, folder, options.seed)
    waiting = [group for group in groups if not group.rivals]
    ready = {group.name: kitchen.start(group) for group in waiting[:_AHEAD]}
    for group in groups:
        if clock.left <= 0:
            results.leave_out(group)
            continue
        begin = time.monotonic()
        if group.rivals:
            found = _rivals(group, manifest, folder, clock)
        else:
            found = _own(group, options, kitchen, ready.pop(group.name), clock)
            later = waiting[waiting.index(group) + _AHEAD :][:1]
            ready |= {next_one.name: kitchen.start(next_one) for next_one in later}
        results.add(group, found)
        results.save()
        print(_line(group, found, time.monotonic() - begin), flush=True)
    kitchen.close()
    results.save()
    bad = [r for r in results.data["results"] if r["status"] not in ("ok", "skipped")]
    print(f"{len(results.data['results'])} cases, {len(bad)} not right; written to {options.out}")
    if results.data["skipped"]:
        print(f"no time for {len(results.data['skipped'])} groups: go on with --resume")
    return 1 if bad else 0


def _earlier(path: Path | None, manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the results of an earlier run of the same bundle."""
    if path is None:
        return None
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if data["bundle"]["built"] != manifest["built"]:
        sys.exit(
            f"{path} is of a bundle that was built {data['bundle']['built']}, not of this one."
        )
    return data


def _own(
    group: Group, options: argparse.Namespace, kitchen: Kitchen, packed: Future[str], clock: Clock
) -> list[dict[str, Any]]:
    try:
        trouble = packed.result(timeout=max(1.0, clock.left))
    except FutureTimeout:
        trouble = NO_TIME
    if trouble:
        return [{"case": case_name(c), "status": "failed", "fault": trouble} for c in group.cases]
    order = {
        "bundle": str(options.bundle.resolve()),
        "folder": str(kitchen.place(group)),
        "timed": not options.no_timing,
    }
    log = kitchen.folder / f"{group.name}.log"
    found = run_group(order, options.bundle / "cuda_measure.py", group.cases, log, clock)
    shutil.rmtree(kitchen.place(group), ignore_errors=True)
    return found


def _rivals(
    group: Group, manifest: Mapping[str, Any], folder: Path, clock: Clock
) -> list[dict[str, Any]]:
    log = folder / f"{group.name}.log"
    if group.model:
        model = manifest["models"][group.shape]
        cases = [(group.shape, DENSE_MODEL, context) for context in model["contexts"]]
        script = HERE / "cuda_torch_model.py"
        return run_group({"shape": model["shape"]}, script, cases, log, clock)
    n, k = (int(number) for number in group.shape.split("x"))
    cases = [
        (group.shape, rival, tokens)
        for rival, counts in manifest["rivals"].items()
        for tokens in counts
    ]
    order = {"n": n, "k": k}
    return run_group(order, HERE / "cuda_rivals.py", cases, log, clock)


def _line(group: Group, found: Sequence[Mapping[str, Any]], seconds: float) -> str:
    counts: dict[str, int] = {}
    for result in found:
        counts[result["status"]] = counts.get(result["status"], 0) + 1
    said = ", ".join(f"{count} {status}" for status, count in counts.items())
    best = max((r["bandwidth"] for r in found if "bandwidth" in r), default=0.0)
    speed = f", up to {best / GIGABYTE:.0f} GB/s" if best else ""
    return f"{group.name}: {said}{speed} ({seconds:.0f} s)"


if __name__ == "__main__":
    sys.exit(main())
