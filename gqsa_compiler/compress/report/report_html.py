"""The report of a compression: one HTML file that needs nothing else, drawn from the run log."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment

from gqsa_compiler.compress.report.charts import Caption, Series, bar_chart, heat_map, line_chart
from gqsa_compiler.compress.report.report_text import number, percent, setting_text
from gqsa_compiler.compress.work.runevents import Block, Finish, Phase, Step
from gqsa_compiler.compress.work.runlog import RunRecord, read_log
from gqsa_compiler.units import bytes_text, seconds_text

_TEMPLATE = "report.html.j2"
_MOST_POINTS = 120
_STAGES = {
    "block": "Stage one: block by block",
    "weights": "End-to-end training of the weights",
    "scales": "Stage two: scales and zero points, end to end",
}


@dataclass(frozen=True)
class Section:
    """A part of the page: a chart (SVG markup, may be empty) and the table behind it."""

    title: str
    note: str
    chart: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_report(log: Path, target: Path, name: str = "") -> None:
    """Draw a run log and write the page.

    Parameters
    ----------
    log : Path
        The run log; one of a run that is under way, or that had no training stages, will do.
    target : Path
        The HTML file.
    name : str
        What was compressed, for the heading.

    Raises
    ------
    GqsaError
        The log cannot be read.
    """
    target.write_text(render(read_log(log), name), encoding="utf-8", errors="replace")


def render(record: RunRecord, name: str = "") -> str:
    """Return the page of a run. Every text of the log is escaped."""
    sections = [
        *map(_phase, record.phases),
        _blocks(record.blocks),
        _sparsity(record.blocks),
        *(_stage(index, *each) for index, each in enumerate(record.steps.items())),
        _bytes(record.finish),
        _durations(record),
        _settings(record.start.settings if record.start else {}),
    ]
    return page(
        f"Compression of {name}" if name else "Compression",
        _subtitle(record),
        _warnings(record),
        _tiles(record),
        [section for section in sections if section is not None],
    )


def page(
    title: str,
    subtitle: str,
    warnings: Sequence[str],
    tiles: Sequence[tuple[str, str]],
    sections: Sequence[Section],
) -> str:
    """Return a page that needs nothing else. Every text is escaped; charts are markup."""
    environment = Environment(autoescape=True, trim_blocks=True)
    template = environment.from_string(
        files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8")
    )
    return template.render(
        title=title, subtitle=subtitle, warnings=warnings, tiles=tiles, sections=sections
    )


def _subtitle(record: RunRecord) -> str:
    parts = [f"Begun {record.begun[:16].replace('T', ' ')} UTC"] if record.begun else []
    if record.start and record.start.version:
        parts.append(record.start.version)
    parts += [f"resumed at {resume.at}" for resume in record.resumed]
    return ", ".join(parts)


def _warnings(record: RunRecord) -> list[str]:
    warnings = []
    if record.finish is None:
        warnings.append("This run has not finished: the page shows what there was so far.")
    if record.unreadable:
        warnings.append(f"{record.unreadable} lines of the run log could not be read.")
    values = [b.loss_after if b.loss_after is not None else b.loss_before for b in record.blocks]
    values += [step.loss for steps in record.steps.values() for step in steps]
    if not all(map(math.isfinite, values)):
        warnings.append("Some losses are not finite numbers; the charts leave them out.")
    return warnings


def _tiles(record: RunRecord) -> list[tuple[str, str]]:
    tiles = []
    if record.finish is not None:
        stored = record.finish.stored_bytes
        tiles.append(("bits a weight, compressed layers", f"{record.finish.bits_per_weight:.3f}"))
        tiles.append(("checkpoint", bytes_text(stored)))
        if record.finish.dense_bytes and stored:
            tiles.append(("smaller than dense", f"{record.finish.dense_bytes / stored:.2f}×"))
    total = sum(seconds for _, seconds in _stage_seconds(record))
    if total:
        tiles.append(("time", seconds_text(total)))
    return tiles


def _blocks(blocks: Sequence[Block]) -> Section | None:
    if not blocks:
        return None
    trained = [block for block in blocks if block.loss_after is not None]
    series = [Series("one-shot", [(block.index, block.loss_before) for block in blocks])]
    if trained:
        series.append(Series("after stage one", [(b.index, b.loss_after or 0.0) for b in trained]))
    title = "Error of each block"
    text = f"Relative squared error of the outputs of {len(blocks)} decoder blocks."
    chart = line_chart(
        Caption("blocks", title, text), series, "block", "relative error", logarithmic=True
    )
    rows = [
        (
            str(b.index),
            b.name,
            number(b.loss_before),
            number(b.loss_after),
            seconds_text(b.seconds),
        )
        for b in blocks
    ]
    return Section(
        title,
        "Squared error of a block's outputs against the dense model's, relative to their size. "
        "Each block is fed by the compressed ones before it.",
        chart,
        ("block", "name", "one-shot", "after stage one", "time"),
        rows,
    )


def _sparsity(blocks: Sequence[Block]) -> Section | None:
    layers = list(dict.fromkeys(layer for block in blocks for layer in block.sparsity))
    values = {
        (layer, str(block.index)): share
        for block in blocks
        for layer, share in block.sparsity.items()
        if math.isfinite(share)
    }
    if not values:
        return None
    title = "Sparsity of each layer"
    chart = heat_map(
        Caption("sparsity", title, f"{len(layers)} layers of {len(blocks)} blocks."),
        layers,
        [str(block.index) for block in blocks],
        values,
        "block",
        percent,
    )
    rows = [
        (str(b.index), *(percent(b.sparsity[n]) if n in b.sparsity else "" for n in layers))
        for b in blocks
    ]
    return Section(
        title, "Share of a layer's groups that were dropped.", chart, ("block", *layers), rows
    )


def _stage(index: int, stage: str, steps: Sequence[Step]) -> Section:
    size = math.ceil(len(steps) / _MOST_POINTS)
    bins = [steps[start : start + size] for start in range(0, len(steps), size)]
    columns = {
        "total": [_mean([step.loss for step in each]) for each in bins],
        "KL": [_mean([step.kl for step in each]) for each in bins],
        "next token": [_mean([step.ce for step in each]) for each in bins],
    }
    last = [each[-1] for each in bins]
    series = [
        Series(name, [(s.step, y) for s, y in zip(last, values, strict=True) if y is not None])
        for name, values in columns.items()
    ]
    series = [each for each in series if each.points]
    title = _STAGES.get(stage, f"Stage {stage}")
    text = f"Training losses of {steps[-1].step} of {steps[-1].steps} steps, nats a token."
    note = "The total is what is minimised, KL is against the dense model's prediction."
    if size > 1:
        note += f" A point is the mean of {size} lines of the log."
    rates = list(dict.fromkeys(name for step in last for name in step.rates))
    rows = [
        (
            str(step.step),
            *(number(values[place]) for values in columns.values()),
            *(number(step.rates.get(name)) for name in rates),
            f"{step.tokens:,}",
        )
        for place, step in enumerate(last)
    ]
    return Section(
        title,
        note,
        line_chart(Caption(f"stage-{index}", title, text), series, "step", "nats a token"),
        ("step", *columns, *(f"rate of {name}" for name in rates), "tokens"),
        rows,
    )


def _bytes(finish: Finish | None) -> Section | None:
    if finish is None:
        return None
    parts = list(finish.bytes.items())
    if finish.head_bytes:
        parts.append(("the head, compressed", finish.head_bytes))
    parts.append(("other tensors, as they were", finish.other_bytes))
    total = finish.stored_bytes or 1
    title = "Bytes of the checkpoint"
    text = f"{bytes_text(total)} by kind."
    chart = bar_chart(Caption("bytes", title, text), [(k, float(n)) for k, n in parts], bytes_text)
    rows = [
        (
            kind,
            f"{count:,}",
            percent(count / total),
            _bits(count, finish.weights, kind in finish.bytes),
        )
        for kind, count in parts
    ]
    rows.append(("all", f"{total:,}", "", ""))
    if finish.dense_bytes:
        rows.append(("the dense model", f"{finish.dense_bytes:,}", "", ""))
    return Section(
        title,
        f"The blocks' compressed layers take {finish.bits_per_weight:.3f} bits for each of their "
        f"{finish.weights:,} weights, dropped ones too, with all scales, zero points and indices.",
        chart,
        ("kind", "bytes", "share", "bits a weight"),
        rows,
    )


def _durations(record: RunRecord) -> Section | None:
    parts = _stage_seconds(record)
    if not parts:
        return None
    title = "Time of each stage"
    text = f"{seconds_text(sum(seconds for _, seconds in parts))} in all."
    note = "What led to the result; work that was done again after a stop is counted once."
    rows = [(name, seconds_text(seconds)) for name, seconds in parts]
    chart = bar_chart(Caption("time", title, text), parts, seconds_text)
    return Section(title, note, chart, ("stage", "time"), rows)


def _phase(phase: Phase) -> Section | None:
    rows = [(name, f"{value:.4g}") for name, value in phase.facts.items()]
    if not rows:
        return None
    note = f"{seconds_text(phase.seconds)}."
    return Section(phase.name.capitalize(), note, "", ("what", "value"), rows)


def _stage_seconds(record: RunRecord) -> list[tuple[str, float]]:
    parts = []
    if record.calibration is not None:
        parts.append(("Calibration text", record.calibration.seconds))
    parts += [(phase.name.capitalize(), phase.seconds) for phase in record.phases]
    if record.blocks:
        parts.append(("Blocks", sum(block.seconds for block in record.blocks)))
    for stage, steps in record.steps.items():
        parts.append((f"Training: {stage}", sum(step.seconds for step in steps)))
    return [(name, seconds) for name, seconds in parts if math.isfinite(seconds)]


def _settings(settings: Mapping[str, Any]) -> Section | None:
    rows = [(key, setting_text(value)) for key, value in _flat(settings)]
    return (
        Section("Settings", "What determines the result.", "", ("setting", "value"), rows)
        if rows
        else None
    )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in settings.items():
        nested = isinstance(value, dict) and value
        found += _flat(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", value)]
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _bits(count: int, weights: int, compressed: bool) -> str:
    return f"{8 * count / weights:.3f}" if compressed and weights else ""
