"""The artefacts that `bench_scaling.py` measures: random ones made on the way, or the user's."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from commands import gqsa
from model_shapes import SHAPES, shape_config
from random_checkpoint import Scheme, write_checkpoint
from scaling_plan import Plan

from gqsa_compiler.errors import GqsaError
from gqsa_compiler.runtime import Manifest, Session
from gqsa_compiler.runtime.manifest import is_artefact
from gqsa_compiler.runtime.program import Program

_WARM_UP_STEPS = 4


def artefact_of(plan: Plan) -> Path:
    """Return the artefact that context, batch and roofline share."""
    return plan.artefact or random_artefact(plan, plan.sparsity)


def random_artefact(plan: Plan, sparsity: float) -> Path:
    """Compile random weights of the plan's shape, or find them compiled by an earlier run.

    Raises
    ------
    GqsaError
        The shape leads nowhere, or the checkpoint cannot be written. Where the compilation
        fails, the program ends.
    """
    config = shape_config(plan.shape)
    context = min(plan.context_length, int(config["max_position_embeddings"]))
    batch = max(plan.batches)
    name = f"{shape_name(plan.shape)}-s{100 * sparsity:g}-c{context}-b{batch}"
    place = plan.directory / "artefacts" / name
    if not is_artefact(place):
        plan.directory.mkdir(parents=True, exist_ok=True)
        # Nobody needs the checkpoint afterwards, and those of large shapes fill disks.
        with tempfile.TemporaryDirectory(dir=plan.directory) as scratch:
            checkpoint = Path(scratch) / name
            write_checkpoint(config, checkpoint, Scheme(sparsity))
            gqsa(
                *("compile", str(checkpoint), "--target", "cpu", "-o", str(place)),
                *("--context", str(context), "--max-batch", str(batch), "--json"),
                capture=True,
            )
    return place


def shape_name(shape: str) -> str:
    """Return a word for a shape: a config.json has its directory's name."""
    path = Path(shape)
    if shape in SHAPES:
        return shape
    return (path if path.is_dir() else path.parent).resolve().name


def fitting(values: Sequence[int], most: int, what: str, remedy: str) -> tuple[int, ...]:
    """Leave out what an artefact has no room for, and say so.

    Raises
    ------
    GqsaError
        Nothing is left.
    """
    kept = tuple(value for value in values if value <= most)
    left_out = [str(value) for value in values if value > most]
    if not kept:
        raise GqsaError(f"The artefact takes {what} of at most {most}; {remedy}.")
    if left_out:
        print(
            f"Left out: {what} {', '.join(left_out)}; the artefact takes at most {most}.",
            file=sys.stderr,
        )
    return kept


@contextmanager
def open_session(
    directory: Path, plan: Plan, *, context_length: int, max_batch: int = 1
) -> Iterator[tuple[Manifest, Session]]:
    """Load an artefact for passes without text and sampling.

    Raises
    ------
    GqsaError
        It cannot be loaded, or not with these limits.
    """
    manifest = Manifest.read(directory)
    # The workers are shared by sessions of as many threads: none spins beside the one timed.
    session = Session(
        Program(directory, manifest, verify=False),
        threads=plan.threads,
        context_length=context_length,
        max_batch=max_batch,
    )
    try:
        yield manifest, session
    finally:
        session.close()


def random_tokens(session: Session, count: int, seed: int = 0) -> list[int]:
    """Return token ids: any will do, their number decides the time."""
    found: list[int] = np.random.default_rng(seed).integers(session.vocab_size, size=count).tolist()
    return found


def time_steps(session: Session, sequences: Sequence[int], steps: int) -> list[float]:
    """Decode tokens of sequences together and return the seconds of every pass.

    Raises
    ------
    GqsaError
        The logits are not finite: such numbers may be computed at another speed.
    """
    tokens = random_tokens(session, len(sequences) * steps, seed=1)
    seconds = []
    for start in range(0, len(tokens), len(sequences)):
        these = tokens[start : start + len(sequences)]
        begin = time.perf_counter()
        logits = session.decode(sequences, these)
        seconds.append(time.perf_counter() - begin)
    if not np.isfinite(logits).all():
        raise GqsaError("The logits are not finite, so the speed means nothing; check the weights.")
    return seconds


def time_batch(session: Session, batch: int, prompt: int, steps: int) -> list[float]:
    """Time decoding after fresh prompts, one for each sequence of a batch."""
    sequences: list[int] = []
    try:
        for index in range(batch):
            sequences.append(session.add())
            session.prefill(sequences[-1], random_tokens(session, prompt, seed=index))
        return time_steps(session, sequences, steps)
    finally:
        for sequence in sequences:
            session.remove(sequence)


def warm_up(session: Session, batch: int = 1) -> None:
    """Read the weights once and let the code allocate what it needs."""
    time_batch(session, batch, 1, min(_WARM_UP_STEPS, session.context_length - 1))
