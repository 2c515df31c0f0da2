"""The compression report: one safe file, whatever the run log has."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from gqsa_compiler.compress.report.charts import (
    Caption,
    Series,
    _log_ticks,
    _ticks,
    heat_map,
    line_chart,
)
from gqsa_compiler.compress.report.report_html import render, write_report
from gqsa_compiler.compress.work.runevents import (
    Block,
    Calibration,
    Finish,
    Phase,
    Resume,
    Start,
    Step,
)
from gqsa_compiler.compress.work.runlog import RunLog, RunRecord
from gqsa_compiler.errors import GqsaError

NASTY = "<script>alert('x')</script>\"&\x00\x1b"
CAPTION = Caption("c", "A title", "A text.")


class Checker(HTMLParser):
    """Checks that elements close in order and collects what they are and hold."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert len(set(checker.ids)) == len(checker.ids)
    for svg in svgs(page):
        assert svg.get("role") == "img"
        named = (svg.get("aria-labelledby") or "").split()
        found = {child.get("id"): child.text for child in svg if child.tag in ("title", "desc")}
        assert len(named) == 2
        assert all(found[name] for name in named)
    return checker


def svgs(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.S)]


def block(index: int, after: float | None = 0.01) -> Block:
    sparsity = {"self_attn.q_proj": 0.4 + index / 10, "mlp.up_proj": 0.5}
    return Block(index, 3, f"model.layers.{index}", 0.05 * (index + 1), after, sparsity, 20.0)


def step(number: int, stage: str = "scales", loss: float = 2.0) -> Step:
    return Step(stage, number, 300, loss, 0.5, 3.0, {"scales": 1e-3}, 64 * number, 0.5)


FULL = RunRecord(
    start=Start({"model": "tiny", "recipe": {"bits": 4, "weights": None}, "fast": True}, "gqsa 1"),
    begun="2026-01-02T03:04:05.000+00:00",
    ended="2026-01-02T04:04:05.000+00:00",
    resumed=(Resume("block 1"),),
    calibration=Calibration("sampled", 8, 1024, 3.5),
    phases=(Phase("measuring the layers", 30.0, {"predicted KL": 0.8125}),),
    blocks=tuple(block(index) for index in range(3)),
    steps={
        "weights": tuple(step(n, "weights") for n in range(1, 6)),
        "scales": tuple(step(n, loss=n) for n in range(1, 301)),
    },
    finish=Finish(10.0, 1_000_000, {"codes": 250_000, "scales": 62_500}, 100_000, 2_000_000),
)


def test_a_full_run_has_every_part() -> None:
    page = render(FULL, "tiny")
    checker = check(page)
    assert checker.tags.count("svg") == 6
    assert checker.tags.count("table") == 8
    for text in (
        "Compression of tiny",
        "Begun 2026-01-02 03:04 UTC, gqsa 1, resumed at block 1",
        "2.500",  # bits a weight
        "412.5 kB",
        "4.85×",
        "block 2, self_attn.q_proj: 60.0%",
        "A point is the mean of 3 lines",
        "recipe.bits",
        "Measuring the layers",
        "0.8125",
        "4 min 06 s",  # 3.5 + 30 + 60 + 2.5 + 150
        "1 min 00 s",
    ):
        assert text in checker.text, text
    assert "has not finished" not in page


def test_it_needs_nothing_else() -> None:
    page = render(FULL, "tiny")
    assert "prefers-color-scheme: dark" in page
    for needle in ("http:", "https:", "src=", "url(", "@import", "<script", "<link", "href="):
        assert needle not in page


@pytest.mark.parametrize(
    "record",
    [
        RunRecord(),
        RunRecord(start=FULL.start),
        RunRecord(blocks=(block(0, None),)),
        RunRecord(blocks=FULL.blocks[:1], steps={"scales": FULL.steps["scales"][:1]}),
        RunRecord(finish=FULL.finish),
        RunRecord(finish=Finish(0.0, 0, {}, 0, 0)),
        RunRecord(calibration=FULL.calibration, steps=FULL.steps),
        RunRecord(steps={"new": (Step("new", 1, 1, 1.0, None, None, {}, 1, 1.0),)}),
    ],
)
def test_missing_stages_are_left_out(record: RunRecord) -> None:
    page = render(record)
    check(page)
    assert ("has not finished" in page) == (record.finish is None)


def test_a_block_that_no_stage_trained_has_one_line() -> None:
    chart = svgs(render(RunRecord(blocks=(block(0, None), block(1, None)))))[0]
    assert len(chart.findall("polyline")) == 1
    assert len(chart.findall("circle")) == 2


def test_everything_from_the_log_is_escaped() -> None:
    record = RunRecord(
        start=Start({NASTY: NASTY, "a": {NASTY: [NASTY]}}, NASTY),
        begun=NASTY,
        resumed=(Resume(NASTY),),
        phases=(Phase(NASTY, 1.0, {NASTY: 1.0}),),
        blocks=(Block(0, 1, NASTY, 0.1, 0.05, {NASTY: 0.5}, 1.0),),
        steps={NASTY: (Step(NASTY, 1, 1, 1.0, 1.0, 1.0, {NASTY: 1.0}, 1, 1.0),)},
        finish=Finish(1.0, 1, {NASTY: 1}, 1, 1),
    )
    page = render(record, NASTY)
    checker = check(page)
    assert "<script" not in page
    assert "script" not in checker.tags
    assert checker.text.count("<script>alert") > 8


def test_losses_that_are_not_finite_are_named_and_left_out() -> None:
    blocks = (block(0), Block(1, 2, "b", math.nan, math.inf, {"q": math.nan}, math.nan))
    page = render(RunRecord(blocks=blocks, steps={"scales": (step(1, loss=math.nan), step(2))}))
    check(page)
    assert "not finite" in page
    assert len(svgs(page)[0].findall("circle")) == 2
    assert 'nan"' not in page


def test_lines_that_could_not_be_read_are_counted() -> None:
    assert "3 lines of the run log" in render(RunRecord(unreadable=3))


def test_the_file_is_drawn_from_a_log(tmp_path: Path) -> None:
    with RunLog(tmp_path / "log") as log:
        log.write(Start({"model": "m"}))
        log.write(block(0))
    write_report(tmp_path / "log", tmp_path / "page.html", "größer \udcff")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "größer ?" in text
    check(text)
    with pytest.raises(GqsaError, match="Cannot read the run log"):
        write_report(tmp_path / "none", tmp_path / "page.html")


def test_points_lie_where_their_values_are() -> None:
    lines = [Series("a", [(0, 1.0), (5, 10.0), (10, 100.0)])]
    svg = ElementTree.fromstring(line_chart(CAPTION, lines, "x", "y", logarithmic=True))
    dots = [(float(c.get("cx") or 0), float(c.get("cy") or 0)) for c in svg.findall("circle")]
    assert dots[1][0] - dots[0][0] == pytest.approx(dots[2][0] - dots[1][0], abs=0.2)
    assert dots[0][1] - dots[1][1] == pytest.approx(dots[1][1] - dots[2][1], abs=0.2)
    assert dots[0][1] > dots[1][1] > 0


def test_zeros_are_left_out_of_a_logarithmic_chart() -> None:
    lines = [Series("a", [(0, 0.0), (1, 1.0)]), Series("b", [(0, 0.0)])]
    svg = ElementTree.fromstring(line_chart(CAPTION, lines, "x", "y", logarithmic=True))
    assert len(svg.findall("circle")) == 1


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (3.0, 3.0, [3.0, 4.0]),
        (0.0, 0.0, [0.0, 0.2]),
        (-1.0, 1.0, [-1.0, -0.5, 0.0, 0.5, 1.0]),
    ],
)
def test_ticks_are_round_and_cover_the_range(
    low: float, high: float, expected: list[float]
) -> None:
    assert _ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(("low", "high"), [(0.01, 0.01), (0.013, 0.24), (1e-9, 3.0), (0.9, 1.1)])
def test_log_ticks_cover_the_range(low: float, high: float) -> None:
    ticks = _log_ticks(low, high)
    assert 2 <= len(ticks) <= 10
    assert ticks == sorted(set(ticks))
    assert ticks[0] <= low * 1.0001
    assert ticks[-1] >= high / 1.0001


def test_a_heat_map_is_darker_where_values_are_larger() -> None:
    values = {("r", "0"): 0.1, ("r", "1"): 0.9, ("s", "0"): 0.5}
    svg = ElementTree.fromstring(
        heat_map(CAPTION, ["r", "s"], ["0", "1"], values, "block", "{:.1f}".format)
    )
    cells = svg.findall("rect")
    assert [float(cell.get("fill-opacity") or 0) for cell in cells] == pytest.approx(
        [0.06, 1, 0.53]
    )
    assert cells[2].findtext("title") == "block 0, s: 0.5"


def test_rounding_makes_no_pattern_in_a_heat_map() -> None:
    values = {("r", "0"): 0.5, ("r", "1"): 0.500001}
    svg = ElementTree.fromstring(
        heat_map(CAPTION, ["r"], ["0", "1"], values, "block", "{:.1f}".format)
    )
    assert len({cell.get("fill-opacity") for cell in svg.findall("rect")}) == 1
