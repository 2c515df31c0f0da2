"""Each linear kernel's operations a byte and a second, decoding and reading a prompt."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from scaling_models import artefact_of
from scaling_peak import measure_peaks
from scaling_plan import Measurement, Part, Plan, Round, Spread, bandwidth_of

from gqsa_compiler.bandwidth import measure_read_bandwidth
from gqsa_compiler.profile import PhaseProfile, Profile, ProfileLine, profile_model
from gqsa_compiler.runtime import load

_RUNS = 2  # of each kind in a round, so that the rounds spread over more time


@contextmanager
def prepare_roofline(plan: Plan) -> Iterator[Measurement]:
    """Every round measures the machine's limits, then profiles the kernels."""
    place = artefact_of(plan)
    prompt = plan.prompt
    with load(
        place,
        threads=plan.threads,
        verify=False,
        context_length=prompt + plan.steps,
        max_batch=1,
    ) as model:
        tokens = [index % model.manifest.model.vocab_size for index in range(prompt)]
        chunk = model.manifest.model.prefill_chunk

        def measure(_index: int) -> Round:
            given = None if plan.peak is None else {"given": plan.peak}
            return {
                "read_bandwidth": measure_read_bandwidth(plan.threads),
                "peaks": given or measure_peaks(plan.threads),
                "kernels": kernel_points(
                    profile_model(model, tokens, max(2, plan.steps), repeats=_RUNS), chunk
                ),
            }

        info = model.manifest.model
        about = {"model": info.name, "activations": info.activations, "prompt": prompt}
        yield Measurement(about, measure)


def kernel_points(profile: Profile, chunk: int) -> list[dict[str, Any]]:
    """Return the linear kernels of a profile with their work and the weights that they read.

    Parameters
    ----------
    profile : Profile
    chunk : int
        Most tokens of a pass: a longer prompt reads the weights again.
    """
    read = {_identity(line): line.bytes for line in profile.decode.lines}
    found = []
    for name, phase in (("decode", profile.decode), ("prefill", profile.prefill)):
        for line in phase.lines:
            weight_bytes = read.get(_identity(line))
            if line.kind == "linear" and weight_bytes and line.microseconds > 0:
                found.append({"phase": name, **_point(line, phase, weight_bytes, chunk)})
    return found


def _point(line: ProfileLine, phase: PhaseProfile, weight_bytes: int, chunk: int) -> dict[str, Any]:
    assert None not in (line.n, line.k, line.layers, line.sparsity)
    kept = round((line.n or 0) * (line.k or 0) * (line.layers or 0) * (1 - (line.sparsity or 0)))
    # Only the last token's logits are computed.
    tokens = 1 if line.name == "lm_head" else phase.tokens
    return {
        "name": line.name,
        "kernel": line.kernel,
        "n": line.n,
        "k": line.k,
        "tokens": tokens,
        "kept_weights": kept,
        "bytes_read": weight_bytes * -(-tokens // chunk),
        "seconds": line.microseconds / 1e6,
        "share": line.share,
    }


def _identity(line: ProfileLine) -> tuple[object, ...]:
    return line.name, line.kernel, line.weight, line.n, line.k


def roofline_result(_about: Mapping[str, Any], rounds: Sequence[Round]) -> dict[str, Any]:
    """Sum up: a product and its addition are two operations, dropped weights are none."""
    groups: dict[tuple[object, ...], list[dict[str, Any]]] = {}
    for found in rounds:
        for kernel in found["kernels"]:
            key = tuple(kernel[name] for name in ("phase", "name", "kernel", "n", "k"))
            groups.setdefault(key, []).append(kernel)
    points = []
    for kernels in groups.values():
        first = {k: v for k, v in kernels[0].items() if k not in ("seconds", "share")}
        work = 2 * first["kept_weights"] * first["tokens"]
        points.append(
            {
                **first,
                "share": statistics.median(kernel["share"] for kernel in kernels),
                "operations_per_byte": work / first["bytes_read"],
                "operations_per_second": asdict(
                    Spread.of([work / kernel["seconds"] for kernel in kernels])
                ),
            }
        )
    peaks = {kind: max(found["peaks"][kind] for found in rounds) for kind in rounds[0]["peaks"]}
    return {"read_bandwidth": bandwidth_of(rounds), "peaks": peaks, "points": points}


ROOFLINE = Part(
    "roofline",
    ("shape", "artefact", "sparsity", "threads", "steps", "prompt", "peak"),
    prepare_roofline,
    roofline_result,
)
