"""The time of a decoding pass against the context, the sparsity and the number of sequences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

from scaling_models import (
    artefact_of,
    fitting,
    open_session,
    random_artefact,
    random_tokens,
    time_batch,
    time_steps,
    warm_up,
)
from scaling_plan import (
    Measurement,
    Part,
    Plan,
    Round,
    Spread,
    bandwidth_of,
    in_turn,
    step_seconds,
)

from gqsa_compiler.bandwidth import measure_read_bandwidth
from gqsa_compiler.errors import UsageError
from gqsa_compiler.runtime import Manifest

_COMMON = ("shape", "artefact", "threads", "steps")


@contextmanager
def prepare_context(plan: Plan) -> Iterator[Measurement]:
    """One sequence grows; the last passes before each length are timed."""
    place = artefact_of(plan)
    most = Manifest.read(place).model.context_length
    lengths = fitting(plan.contexts, most, "contexts", "compile it with a larger --context")
    for before, length in zip((0, *lengths), lengths, strict=False):
        if length - before <= plan.steps:
            raise UsageError(
                f"{plan.steps} passes do not fit between the contexts {before} and {length}; "
                "lower --steps."
            )
    with open_session(place, plan, context_length=lengths[-1]) as (manifest, session):
        warm_up(session)

        def measure(index: int) -> Round:
            bandwidth = measure_read_bandwidth(plan.threads)
            seconds = {}
            sequence = session.add()
            try:
                for length in lengths:
                    count = length - plan.steps - session.length(sequence)
                    session.prefill(sequence, random_tokens(session, count, seed=index))
                    seconds[str(length)] = time_steps(session, [sequence], plan.steps)
            finally:
                session.remove(sequence)
            return {"read_bandwidth": bandwidth, "seconds": seconds}

        about = {**_about(manifest), "contexts": list(lengths)}
        yield Measurement(about, measure)


def context_result(about: Mapping[str, Any], rounds: Sequence[Round]) -> dict[str, Any]:
    """Sum up; all of a cache is read where no layer has a window."""
    bandwidth = bandwidth_of(rounds)
    points = []
    for length in about["contexts"]:
        cache = 0 if about["sliding_window"] else about["kv_cache_bytes_per_token"] * length
        points.append({"context": length, **_point(rounds, length, about, cache, bandwidth)})
    return {"read_bandwidth": bandwidth, "points": points}


@contextmanager
def prepare_sparsity(plan: Plan) -> Iterator[Measurement]:
    """Models of all sparsities are loaded at once and take turns."""
    context = plan.prompt + plan.steps
    places = [random_artefact(plan, sparsity) for sparsity in plan.sparsities]
    with ExitStack() as stack:
        opened = [
            stack.enter_context(open_session(place, plan, context_length=context))
            for place in places
        ]
        for _, session in opened:
            warm_up(session)
        sessions = dict(zip(plan.sparsities, (session for _, session in opened), strict=True))

        def measure(index: int) -> Round:
            bandwidth = measure_read_bandwidth(plan.threads)
            seconds = {
                str(sparsity): time_batch(sessions[sparsity], 1, plan.prompt, plan.steps)
                for sparsity in in_turn(plan.sparsities, index)
            }
            return {"read_bandwidth": bandwidth, "seconds": seconds}

        models = [
            {"sparsity": sparsity, **_about(manifest)}
            for sparsity, (manifest, _) in zip(plan.sparsities, opened, strict=True)
        ]
        yield Measurement({"models": models, "prompt": plan.prompt, "steps": plan.steps}, measure)


def sparsity_result(about: Mapping[str, Any], rounds: Sequence[Round]) -> dict[str, Any]:
    """Sum up, with ratios to the first sparsity: of its time, and of its bytes (the ideal)."""
    bandwidth = bandwidth_of(rounds)
    points: list[dict[str, Any]] = []
    first = step_seconds(rounds, str(about["models"][0]["sparsity"]))
    for model in about["models"]:
        key = str(model["sparsity"])
        cache = model["kv_cache_bytes_per_token"] * (about["prompt"] + about["steps"] // 2)
        point = {"sparsity": model["sparsity"], **_point(rounds, key, model, cache, bandwidth)}
        pairs = zip(step_seconds(rounds, key), first, strict=True)
        point["ratio"] = asdict(Spread.of([mine / other for mine, other in pairs]))
        points.append(point)
        point["bytes_ratio"] = point["bytes_read"] / points[0]["bytes_read"]
    return {"read_bandwidth": bandwidth, "points": points}


@contextmanager
def prepare_batch(plan: Plan) -> Iterator[Measurement]:
    """Batches of all sizes take turns, each of fresh sequences."""
    place = artefact_of(plan)
    most = Manifest.read(place).model.max_batch
    batches = fitting(plan.batches, most, "batches", "compile it with a larger --max-batch")
    context = plan.batch_prompt + plan.steps
    opened = open_session(place, plan, context_length=context, max_batch=batches[-1])
    with opened as (manifest, session):
        for batch in batches:
            warm_up(session, batch)

        def measure(index: int) -> Round:
            bandwidth = measure_read_bandwidth(plan.threads)
            seconds = {
                str(batch): time_batch(session, batch, plan.batch_prompt, plan.steps)
                for batch in in_turn(batches, index)
            }
            return {"read_bandwidth": bandwidth, "seconds": seconds}

        about = {**_about(manifest), "batches": list(batches)}
        yield Measurement({**about, "tokens": plan.batch_prompt + plan.steps // 2}, measure)


def batch_result(about: Mapping[str, Any], rounds: Sequence[Round]) -> dict[str, Any]:
    """Sum up; the weights are read once for all sequences, each has a cache of its own."""
    bandwidth = bandwidth_of(rounds)
    points = []
    for batch in about["batches"]:
        cache = batch * about["kv_cache_bytes_per_token"] * about["tokens"]
        point = _point(rounds, batch, about, cache, bandwidth)
        rates = [batch / seconds for seconds in step_seconds(rounds, str(batch))]
        point["tokens_per_second"] = asdict(Spread.of(rates))
        points.append({"batch": batch, **point})
    return {"read_bandwidth": bandwidth, "points": points}


def _about(manifest: Manifest) -> dict[str, Any]:
    return {
        "model": manifest.model.name,
        "activations": manifest.model.activations,
        "kv_cache_dtype": manifest.kv_cache.dtype,
        "bytes_per_token": manifest.bytes_per_token,
        "kv_cache_bytes_per_token": manifest.kv_cache.bytes_per_token,
        "sliding_window": manifest.model.sliding_window,
    }


def _point(
    rounds: Sequence[Round],
    key: object,
    model: Mapping[str, Any],
    cache_bytes: int,
    bandwidth: float,
) -> dict[str, Any]:
    """Return the seconds of a pass, and those that reading its bytes takes at the least."""
    read = model["bytes_per_token"] + cache_bytes
    return {
        "seconds": asdict(Spread.of(step_seconds(rounds, str(key)))),
        "bytes_read": read,
        "ideal_seconds": read / bandwidth,
    }


CONTEXT = Part("context", (*_COMMON, "sparsity", "contexts"), prepare_context, context_result)
SPARSITY = Part(
    "sparsity",
    ("shape", "threads", "steps", "prompt", "sparsities"),
    prepare_sparsity,
    sparsity_result,
)
BATCH = Part(
    "batch", (*_COMMON, "sparsity", "batches", "batch_prompt"), prepare_batch, batch_result
)
