r"""Decode and prefill speed of artefacts against llama.cpp, on models of the same shapes.

Give each model by name, then its artefacts with labels, and its GGUF file if there is one (a Q4_0
file is written otherwise, see `llamacpp_models.py`):

    python tools/bench_llamacpp.py --threads 2 --json out/llamacpp.json \
        --model llama-3.2-1b --ours w4s50g16=out/1b-s50g16-cpu --ours w4s0g32=out/1b-s0g32-cpu \
        --model smollm2-135m --ours w4s50g16=out/smollm2-cpu --gguf smollm2-q4_0.gguf

Every measurement is a process of its own (load, warm up, time), so that no thread of the one side
spins while the other's are timed. They take turns: each artefact is followed by llama.cpp, and the
ratios are medians of the ratios of such neighbours. llama.cpp comes from the package
llama-cpp-python, built with CMAKE_ARGS="-DGGML_NATIVE=ON"; `--llama-python` names the Python that
has it. Both sides see the environment's OMP_* settings, so leave those unset.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llamacpp_models import THEIRS, ask, ask_llama, read_info, write_model
from llamacpp_report import Contender, machine, summary, table
from llamacpp_timing import Work, add_work, positive, read_work

from gqsa_compiler.bandwidth import measure_read_bandwidth
from gqsa_compiler.errors import GqsaError, UsageError
from gqsa_compiler.runtime.cpus import default_threads
from gqsa_compiler.runtime.manifest import Manifest

OURS = Path(__file__).with_name("llamacpp_ours.py")
LLAMA = "llama.cpp"


@dataclass(frozen=True)
class Match:
    """One model: our artefacts, and llama.cpp's file.

    Parameters
    ----------
    name : str
        A name that `llamacpp_models.write_model` knows, or any if there is a file.
    ours : mapping of str to Path
        Artefacts by label.
    gguf : Path or None
        None to write one.
    """

    name: str
    ours: Mapping[str, Path]
    gguf: Path | None = None


class _GroupedOption(argparse.Action):
    """``--model`` begins a match; ``--ours`` and ``--gguf`` add to the last one."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        matches: list[Match] = namespace.matches
        if option_string == "--model":
            matches.append(Match(values, {}))
        elif not matches:
            parser.error(f"{option_string} comes after the --model that it belongs to")
        elif option_string == "--gguf":
            matches[-1] = replace(matches[-1], gguf=Path(values))
        else:
            label, equals, place = values.partition("=")
            if not equals or not label or not place:
                parser.error(f"--ours takes LABEL=DIRECTORY, not {values!r}")
            if label in (*matches[-1].ours, LLAMA):
                parser.error(f"--ours cannot be called {label!r}: {matches[-1].name} has that")
            matches[-1] = replace(matches[-1], ours={**matches[-1].ours, label: Path(place)})


def contenders(match: Match, work: Work, directory: Path, llama_python: str) -> list[Contender]:
    """Check everything of a match before anything is timed; llama.cpp comes last.

    Raises
    ------
    GqsaError
        An artefact or the GGUF file cannot be read, they are of different shapes, a context is
        too short, or the GGUF file cannot be written.
    """
    path = match.gguf
    if path is None:
        path = directory / f"{short_name(match.name)}-q4_0.gguf"
        if not path.exists():
            print(f"Writing {path}", file=sys.stderr)
            write_model(match.name, path, llama_python=llama_python)
    theirs = read_info(path)
    found = []
    for label, place in match.ours.items():
        manifest = Manifest.read(place)
        for name in ("vocab_size", "hidden_size", "num_layers"):
            mine, other = getattr(manifest.model, name), getattr(theirs, name)
            if mine != other:
                raise UsageError(
                    f"{place} and {path} are of different shapes: {name} is {mine} and {other}."
                )
        if manifest.model.context_length < work.context:
            raise UsageError(
                f"{place} was compiled for a context of {manifest.model.context_length} and "
                f"{work.context} tokens are timed; ask for fewer, or compile with --context."
            )
        command = (sys.executable, str(OURS), str(place), *work.words())
        found.append(Contender(label, str(place), manifest.bytes_per_token, command))
    command = (llama_python, str(THEIRS), "measure", str(path), *work.words())
    return [*found, Contender(LLAMA, str(path), theirs.bytes_per_token, command)]


def short_name(name: str) -> str:
    """Return a word for a model: a config.json has its directory's name."""
    path = Path(name)
    return path.resolve().parent.name if path.is_file() else path.name


def turns(count: int, repeats: int) -> Iterator[tuple[int, int]]:
    """Yield (repeat, contender): each of ours followed by llama.cpp, which is number `count`."""
    for repeat in range(repeats):
        for ours in range(count):
            yield repeat, ours
            yield repeat, count


def run_match(name: str, sides: list[Contender], repeats: int, threads: int) -> dict[str, Any]:
    """Time a match and sum it up; the read bandwidth is measured in every repeat."""
    theirs = len(sides) - 1
    runs: list[list[dict[str, Any]]] = [[] for _ in sides]
    bandwidths: list[float] = []
    for repeat, side in turns(theirs, repeats):
        if side == 0:
            bandwidths.append(measure_read_bandwidth(threads))
        found = ask(sides[side].command)
        runs[side].append(found)
        print(
            f"{name}, repeat {repeat + 1} of {repeats}, {sides[side].label}: "
            f"decode {found['decode_tokens_per_second']:.1f}, "
            f"prefill {found['prefill_tokens_per_second']:.1f} tokens/s",
            file=sys.stderr,
        )
    return summary(name, sides, runs, bandwidths)


def read_command_line(words: Iterable[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line; ends the program where it makes no sense."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(matches=[])
    for option, metavar, text in (
        ("--model", "NAME", "begins a model: a shape's name, a config.json, or any word"),
        ("--ours", "LABEL=DIR", "an artefact of it (several are allowed)"),
        ("--gguf", "FILE", "llama.cpp's file of it"),
    ):
        parser.add_argument(option, action=_GroupedOption, metavar=metavar, help=text)
    add_work(parser, threads=default_threads())
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--directory", type=Path, default=Path("out/llamacpp"))
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args(None if words is None else list(words))
    if not options.matches:
        parser.error("name at least one --model")
    for match in options.matches:
        if not match.ours:
            parser.error(f"{match.name} has no artefact; add --ours LABEL=DIRECTORY after it")
    return options


def main() -> None:
    """Measure everything, then print the table; the JSON file grows model by model."""
    options = read_command_line()
    work = read_work(options)
    try:
        theirs = ask_llama(options.llama_python, ["information"])
        matches = [
            (match, contenders(match, work, options.directory, options.llama_python))
            for match in options.matches
        ]
        result: dict[str, Any] = {
            "machine": machine(theirs),
            "settings": {**asdict(work), "repeats": options.repeats},
            "models": [],
        }
        for match, sides in matches:
            found = run_match(short_name(match.name), sides, options.repeats, work.threads)
            result["models"].append(found)
            if options.json is not None:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except GqsaError as error:
        sys.exit(f"Error: {error}")
    print(table(result))


if __name__ == "__main__":
    main()
