"""What a user asked to calibrate on, checked but not read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from gqsa_compiler.errors import UsageError

Source = Literal["sampled", "text", "dataset"]

DATASET_PREFIX = "hf:"
DATASET_FORM = "hf:NAME[,config=CONFIG][,split=SPLIT][,field=COLUMN]"
DATASET_FILES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
"""The kinds of file that are a data set by themselves, by the loader that `datasets` has."""

EXTRA = "pip install gqsa-compiler[data]"


@dataclass(frozen=True)
class CalibrationSpec:
    """Where calibration tokens come from, and how many.

    Parameters
    ----------
    source : str
        ``sampled`` (the model writes them), ``text`` (files) or ``dataset``.
    paths : tuple of Path
        UTF-8 text files, for ``text``.
    dataset : str
        A Hugging Face hub name, or a directory or file on this machine, for ``dataset``.
    config : str or None
        Which of a data set's configurations, for a data set that has several.
    split : str
        The part of a data set to read.
    field : str or None
        The column with the text; None finds it.
    samples : int or None
        Sequences; None takes every one that text files give.
    sequence_length : int
        Tokens of a sequence.
    seed : int
        Of the sampled text, or of the choice from a data set.
    exact : bool
        Fewer tokens than `samples` takes are an error; otherwise all that a text or data set has
        are taken, at least one sequence.

    Raises
    ------
    UsageError
        A number is out of range, or there is no number where one is needed.
    """

    source: Source = "sampled"
    paths: tuple[Path, ...] = ()
    dataset: str = ""
    config: str | None = None
    split: str = "train"
    field: str | None = None
    samples: int | None = 128
    sequence_length: int = 128
    seed: int = 0
    exact: bool = True

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.samples is None and self.source != "text":
            what = "A data set" if self.source == "dataset" else "Sampled text"
            raise UsageError(
                f"{what} has no whole to take; give the number of sequences (--samples 512)."
            )
        if self.samples is not None and self.samples < 1:
            raise UsageError(f"Calibration needs at least 1 sample, not {self.samples}.")
        if self.sequence_length < 2:
            raise UsageError(
                f"A calibration sequence has at least 2 tokens, not {self.sequence_length}."
            )

    @property
    def local_paths(self) -> tuple[Path, ...]:
        """The files and directories on this machine that are read."""
        if self.source == "dataset" and Path(self.dataset).expanduser().exists():
            return (Path(self.dataset).expanduser(),)
        return self.paths

    def to_dict(self) -> dict[str, Any]:
        """Return what determines the tokens, as JSON types; fields of other sources are left out.

        Paths are absolute, so that the same request from another directory is the same.
        """
        fields: dict[str, Any] = {"source": self.source}
        if self.source == "text":
            fields["paths"] = [str(path.expanduser().resolve()) for path in self.paths]
        elif self.source == "dataset":
            local = [str(path.resolve()) for path in self.local_paths]
            fields["dataset"] = local[0] if local else self.dataset
            fields |= {"config": self.config, "split": self.split, "field": self.field}
        samples = self.samples if self._is_exact else self.describe_samples()
        fields |= {"samples": samples, "sequence_length": self.sequence_length}
        if self.source != "text":
            fields["seed"] = self.seed
        return fields

    @property
    def _is_exact(self) -> bool:
        return self.exact or self.samples is None or self.source == "sampled"

    def describe_samples(self) -> str:
        """Say how many sequences there are to be: a number, ``up to`` a number, or ``all``."""
        if self.samples is None:
            return "all"
        return str(self.samples) if self._is_exact else f"up to {self.samples}"

    def describe(self) -> str:
        """Say in a line where the tokens come from, e.g. for a table of settings."""
        if self.source == "sampled":
            return "text that the model writes"
        if self.source == "text":
            return ", ".join(map(str, self.paths))
        parts = [f"data set {self.dataset}", self.config, f"split {self.split}"]
        if self.field is not None:
            parts.append(f"field {self.field}")
        return ", ".join(part for part in parts if part)


def parse_samples(text: str) -> int | None:
    """Read a number of sequences; ``all`` is None.

    Raises
    ------
    UsageError
        It is neither a whole number of at least 1 nor ``all``.
    """
    if text.strip().lower() == "all":
        return None
    try:
        samples = int(text)
    except ValueError:
        samples = 0
    if samples < 1:
        raise UsageError(f"{text!r} samples: give a whole number of at least 1, or all.")
    return samples


def parse_calibration(
    values: Sequence[str], *, samples: int | None, sequence_length: int, seed: int
) -> CalibrationSpec:
    """Read what the command line gives: files, a data set or ``sampled``.

    Parameters
    ----------
    values : sequence of str
        None or ``sampled``: the model writes. Text files. Or one data set,
        ``hf:NAME[,config=CONFIG][,split=SPLIT][,field=COLUMN]``, where NAME is a hub name, or a
        directory or a jsonl, csv or parquet file.
    samples, sequence_length, seed
        As in `CalibrationSpec`.

    Raises
    ------
    UsageError
        A file is not there, a data set is misspelt, or two kinds are mixed.
    """
    datasets = [value for value in values if value.startswith(DATASET_PREFIX)]
    numbers: dict[str, Any] = {
        "samples": samples,
        "sequence_length": sequence_length,
        "seed": seed,
    }
    if not values or list(values) == ["sampled"]:
        return CalibrationSpec(**numbers)
    if len(values) > 1 and (datasets or "sampled" in values):
        raise UsageError(
            f"Calibration on {' and '.join(values)}: give text files, one data set or sampled, "
            "not several of them."
        )
    if datasets:
        return CalibrationSpec(source="dataset", **_parse_dataset(datasets[0]), **numbers)
    paths = tuple(Path(value).expanduser() for value in values)
    for path in paths:
        _check_file(path)
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise UsageError(f"The calibration file {twice} is named twice.")
    return CalibrationSpec(source="text", paths=paths, **numbers)


def _check_file(path: Path) -> None:
    """Raise `UsageError` unless a path is a file (or a pipe) that may hold text."""
    if path.is_dir():
        raise UsageError(
            f"The calibration text {path} is a directory; name its files, or read it as a data "
            f"set: {DATASET_PREFIX}{path}"
        )
    if not path.exists():
        raise UsageError(
            f"The calibration file {path} does not exist; a Hugging Face data set is written "
            f"{DATASET_PREFIX}NAME."
        )
    if path.suffix.lower() in DATASET_FILES:
        raise UsageError(
            f"The calibration file {path} is a table, not plain text; read its text column with: "
            f"{DATASET_PREFIX}{path}"
        )


def _parse_dataset(value: str) -> dict[str, Any]:
    """Split ``hf:NAME,key=value,...`` into fields of `CalibrationSpec`."""
    name, *options = value.removeprefix(DATASET_PREFIX).split(",")
    fields = {"dataset": name.strip()}
    for option in options:
        key, _, content = (part.strip() for part in option.partition("="))
        if key not in ("config", "split", "field") or not content or key in fields:
            raise UsageError(f"{option!r} in {value!r} is not understood; write {DATASET_FORM}.")
        fields[key] = content
    if not fields["dataset"]:
        raise UsageError(f"{value!r} names no data set; write {DATASET_FORM}.")
    path = Path(fields["dataset"]).expanduser()
    if not path.exists() and fields["dataset"].startswith((".", "/", "~")):
        raise UsageError(f"The data set {path} does not exist.")
    if path.is_file() and path.suffix.lower() not in DATASET_FILES:
        raise UsageError(
            f"The data set {path} is a file of another kind than {', '.join(DATASET_FILES)}; a "
            "text file is named without hf:."
        )
    if find_spec("datasets") is None:
        raise UsageError(f"Reading the data set {name} needs the package datasets: {EXTRA}")
    return fields
