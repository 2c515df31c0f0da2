"""What to do where memory or the disk is not enough: the work so far is kept, and it is said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gqsa_compiler.compress.work.workdir import WorkDirectory
from gqsa_compiler.errors import GqsaError, out_of_memory
from gqsa_compiler.outdir import disk_full

_HUNGRY = "training weights"
"""The stage whose memory is mostly that of the weights, however short the sequences are."""


@contextmanager
def explained(work: WorkDirectory, stage: Callable[[], str], writing: str) -> Iterator[None]:
    """Turn failures that the machine causes into an error that says how to go on.

    Parameters
    ----------
    work : WorkDirectory
    stage : callable
        Names the stage in hand.
    writing : str
        The stage whose own errors of a full disk do not know that the work is kept.

    Raises
    ------
    GqsaError
        Memory was not enough, or the disk is full.
    """
    try:
        yield
    except Exception as error:
        own = isinstance(error, GqsaError) and stage() != writing
        if out_of_memory(error):
            raise GqsaError(_memory(work, stage())) from error
        if disk_full(error) and not own:
            raise GqsaError(
                f"No space left on the disk while {stage()}. {_kept(work)}free some space and run "
                "the same command again."
            ) from error
        raise


def _kept(work: WorkDirectory) -> str:
    return f"What is done is kept in {work.path}: " if work.names() else "Nothing was done yet: "


def _memory(work: WorkDirectory, stage: str) -> str:
    less = "with fewer or shorter sequences (--samples, --sequence-length)"
    if stage == _HUNGRY:
        less = f"without this stage (--stages block,scales) or {less}"
    if not work.names():
        return f"Not enough memory while {stage}. Use a machine with more, or try it {less}."
    return (
        f"Not enough memory while {stage}. {_kept(work)}free some memory and run the same command "
        f"again to go on, or begin anew (--restart) {less}."
    )
