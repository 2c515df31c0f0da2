"""`make demo`: compress SmolLM2-135M, compile it for this CPU, let it speak, and measure it.

Every step is a `gqsa` command, printed before it runs, so that the demo is also a manual.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from commands import gqsa, measure

ROOT = Path(__file__).resolve().parent.parent

MODEL = "smollm2-135m"
RECIPE = "w4s10g16"
PROMPT = "What is the capital of France? Tell me one thing about it."
CONTEXT = 512


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path("out/demo"))
    parser.add_argument("--recipe", default=RECIPE)
    arguments = parser.parse_args()
    checkpoint = str(arguments.directory / f"{MODEL}-{arguments.recipe}")
    artefact = f"{checkpoint}-cpu"
    text = os.path.relpath(ROOT / "tests" / "data" / "alice.txt")
    start = time.monotonic()

    # One shot: training would make a better model, and take an hour.
    how = ("--recipe", arguments.recipe, "--stages", "none")
    gqsa("compress", MODEL, "-o", checkpoint, *how, "--overwrite")
    gqsa("compile", checkpoint, "--target", "cpu", "-o", artefact, "--overwrite")
    answer = gqsa(
        *("run", artefact, "--chat", "-p", PROMPT, "--max-tokens", "80", "--temperature", "0"),
        capture=True,
    )
    print(answer)
    scores = measure(
        *("eval", artefact, "--text", text, "--context", str(CONTEXT), "--reference", MODEL)
    )
    speed = measure("bench", artefact)
    layers = measure("inspect", checkpoint)

    print(f"\n{'=' * 78}\n{MODEL}, {arguments.recipe}, on this CPU\n{'=' * 78}")
    print(f"prompt       {PROMPT}")
    print(f"answer       {answer.strip()}")
    print(
        f"perplexity   {scores['perplexity']:.2f} ± {scores['perplexity_stderr']:.2f} compressed, "
        f"{scores['reference_perplexity']:.2f} dense "
        f"({scores['tokens']} tokens of Alice in Wonderland)"
    )
    print(f"weights      {layers['bits_per_weight']:.2f} bits each in the compressed layers")
    print(
        f"speed        {speed['decode_tokens_per_second']:.1f} tokens/s decode, "
        f"{speed['prefill_tokens_per_second']:.1f} tokens/s prefill, "
        f"{speed['threads']} threads"
    )
    print(f"took         {time.monotonic() - start:.0f} s; artefact in {artefact}")


if __name__ == "__main__":
    main()
