"""One measurement of an artefact for `bench_llamacpp.py`, which starts this in its own process.

python tools/llamacpp_ours.py ARTEFACT --threads 2
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from llamacpp_timing import Work, add_work, measure, read_work

from gqsa_compiler.runtime import GqsaError, Manifest, Session
from gqsa_compiler.runtime.program import Program


class ArtefactEngine:
    """An artefact's passes, without text and sampling; see `llamacpp_timing.Engine`."""

    def __init__(self, directory: Path, work: Work) -> None:
        manifest = Manifest.read(directory)
        # A session of its own instead of runtime.load(): no second pool of threads beside it.
        self.session = Session(
            Program(directory, manifest, verify=False),
            threads=work.threads,
            context_length=work.context,
            max_batch=1,
        )
        self.vocab_size = manifest.model.vocab_size
        self._sequence = self.session.add()
        self._logits = np.zeros(0, np.float32)

    def reset(self) -> None:
        """Forget all tokens."""
        self.session.remove(self._sequence)
        self._sequence = self.session.add()

    def prefill(self, tokens: Sequence[int]) -> None:
        """Append tokens and compute the last one's logits."""
        self._logits = self.session.prefill(self._sequence, tokens)

    def decode(self, token: int) -> None:
        """Append one token and compute its logits."""
        self._logits = self.session.decode([self._sequence], [token])[0]

    def logits(self) -> Sequence[float]:
        """Return the logits of the last call."""
        values: list[float] = self._logits.tolist()
        return values


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artefact", type=Path)
    add_work(parser)
    options = parser.parse_args()
    work = read_work(options)
    try:
        engine = ArtefactEngine(options.artefact, work)
        # On the session's thread, as text is generated.
        print(json.dumps(engine.session.run(measure, engine, work)))
    except GqsaError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
