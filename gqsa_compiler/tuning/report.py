"""The report of a session: one HTML file that needs nothing else, drawn from its records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gqsa_compiler.compress.report.charts import Caption, Series, bar_chart, line_chart
from gqsa_compiler.compress.report.report_html import Section, page
from gqsa_compiler.errors import UsageError
from gqsa_compiler.tuning.database import Database
from gqsa_compiler.tuning.records import SessionStart, Trial
from gqsa_compiler.units import bytes_text

_MOST_LINES = 4  # of a chart: it has as many styles of lines


@dataclass(frozen=True)
class _Task:
    """A task's trials, in the order they were made."""

    facts: Mapping[str, Any]
    trials: Sequence[Trial]

    @property
    def name(self) -> str:
        return str(self.facts.get("name", ""))

    @property
    def layers(self) -> int:
        return int(self.facts.get("layers", 1))

    @property
    def default(self) -> Trial | None:
        """The first trial: the default configuration."""
        return next((t for t in self.trials if t.best), None)

    @property
    def tried(self) -> int:
        """How many configurations were tried besides the default."""
        return len(self.trials) - (self.default is not None)

    @property
    def best(self) -> Trial | None:
        """The last new best."""
        return next((t for t in reversed(self.trials) if t.best), None)

    def decode(self, trial: Trial | None) -> float:
        """Return the seconds of all layers for one token; 0 where that was not measured."""
        return self.layers * trial.seconds.get(1, 0.0) if trial else 0.0


def write_report(database: Database, session: str, path: Path) -> None:
    """Draw a session and write the page; one that is under way will do.

    Raises
    ------
    UsageError
        The database has no such session.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(database, session), encoding="utf-8", errors="replace")


def render(database: Database, session: str) -> str:
    """Return the page of a session. Every text of the records is escaped.

    Raises
    ------
    UsageError
        The database has no such session.
    """
    entries = [e for e in database.read().entries if e.session == session]
    start = next((e for e in entries if isinstance(e, SessionStart)), None)
    if start is None:
        raise UsageError(f"{database.directory} has no session {session}.")
    trials = [e for e in entries if isinstance(e, Trial)]
    tasks = [_Task(facts, _of(facts, trials)) for facts in start.tasks]
    sections = [
        _tokens(tasks),
        _gains(tasks),
        _convergence(tasks),
        _roofline(tasks, start.read_bandwidth),
        _failures(trials),
        _machine(start, trials),
    ]
    return page(
        f"Tuning of {start.model}",
        f"Session {session}, for {start.target.cpu or start.target.arch} on {start.target.chip}",
        [] if trials else ["No trial was made."],
        _tiles(tasks, trials),
        [section for section in sections if section is not None],
    )


def _of(facts: Mapping[str, Any], trials: Sequence[Trial]) -> list[Trial]:
    own = facts.get("spec"), facts.get("rule")
    return [trial for trial in trials if (trial.spec.to_json(), trial.rule) == own]


def _gain(tasks: Sequence[_Task]) -> float:
    before = after = 0.0
    for task in tasks:
        if task.default and task.best:
            calls = task.default.calls
            cost = task.layers * sum(calls[m] * s for m, s in task.default.seconds.items())
            before, after = before + cost, after + cost * (task.best.ratio or 1.0)
    return before / after if after else 1.0


def _tiles(tasks: Sequence[_Task], trials: Sequence[Trial]) -> list[tuple[str, str]]:
    failed = sum(trial.status != "ok" for trial in trials)
    return [
        ("workload's linear layers, times faster", f"{_gain(tasks):.3f}×"),
        ("trials", str(sum(task.tried for task in tasks))),
        ("failed", str(failed)),
    ]


def _tokens(tasks: Sequence[_Task]) -> Section | None:
    before = sum(task.decode(task.default) for task in tasks)
    after = sum(task.decode(task.best) for task in tasks)
    if not before or not after:
        return None
    title = "Tokens a second, before and after"
    bars = [("by default", 1 / before), ("tuned", 1 / after)]
    chart = bar_chart(Caption("tokens", title, "Linear layers alone."), bars, lambda x: f"{x:.1f}")
    rows = [
        (name, f"{1e3 * seconds:.3f} ms", f"{1 / seconds:.1f}")
        for name, seconds in (("by default", before), ("tuned", after))
    ]
    return Section(
        title,
        "If a decoded token cost nothing but its linear layers. Attention, norms and sampling are "
        "the same before and after; gqsa bench measures the whole model.",
        chart,
        ("configurations", "linear layers of a token", "tokens a second"),
        rows,
    )


def _gains(tasks: Sequence[_Task]) -> Section:
    rows = []
    for task in tasks:
        best, default = task.best, task.default
        config = best.config if best else {}
        rows.append(
            (
                task.name,
                str(task.facts.get("rule", "")),
                str(task.layers),
                f"{float(task.facts.get('share', 0.0)):.1%}",
                str(task.tried),
                "" if default is None else _times(default),
                "" if best is None else _times(best),
                "" if best is None else f"{1 / (best.ratio or 1.0):.3f}× ± {best.noise:.3f}",
                " ".join(f"{key}={value}" for key, value in config.items()),
            )
        )
    head = ("task", "kernel", "layers", "share", "trials", "default", "best", "gain", "with")
    return Section("Tasks", "Times are of one call, by its tokens.", "", head, rows)


def _times(trial: Trial) -> str:
    return ", ".join(f"{m}: {1e6 * s:.1f} us" for m, s in sorted(trial.seconds.items()))


def _convergence(tasks: Sequence[_Task]) -> Section | None:
    lines: dict[str, list[tuple[float, float]]] = {}
    rows = []
    for task in tasks:
        ratio = 1.0
        for number, trial in enumerate(task.trials):
            if trial.best and trial.ratio is not None:
                ratio = trial.ratio
                rows.append((task.name, str(number), f"{ratio:.4f}", trial.time))
            lines.setdefault(task.name, []).append((float(number), ratio))
    longest = sorted(tasks, key=lambda task: -float(task.facts.get("share", 0.0)))
    names = [task.name for task in longest if task.name in lines][:_MOST_LINES]
    if not names:
        return None
    title = "Convergence"
    chart = line_chart(
        Caption("convergence", title, "Best time so far, relative to the default's."),
        [Series(name, lines[name]) for name in names],
        "trial",
        "time to the default's",
    )
    return Section(
        title,
        "Best time of each task so far, relative to the default configuration's; the tasks with "
        "the greatest shares.",
        chart,
        ("task", "trial", "ratio of the new best", "when"),
        rows,
    )


def _roofline(tasks: Sequence[_Task], bandwidth: float) -> Section | None:
    bars, rows = [], []
    for task in tasks:
        size, best = int(task.facts.get("bytes", 0)), task.best
        if not size or best is None or 1 not in best.seconds:
            continue
        rate = size / best.seconds[1]
        bars.append((task.name, rate))
        share = f"{rate / bandwidth:.0%}" if bandwidth else ""
        flops = ""
        most = max(best.seconds)
        if most > 1:
            work = 2.0 * float(task.facts.get("n", 0)) * float(task.facts.get("k", 0)) * most
            flops = f"{work * best.density / best.seconds[most] / 1e9:.1f}"
        rows.append((task.name, bytes_text(size), f"{bytes_text(rate)}/s", share, flops))
    if not bars:
        return None
    if bandwidth:
        bars.append(("memory", bandwidth))
    title = "Position under the roofline"
    chart = bar_chart(
        Caption("roofline", title, "Weight bytes a second."), bars, lambda x: f"{bytes_text(x)}/s"
    )
    return Section(
        title,
        "What a decoded token reads of the weights in a second, against what this machine's "
        "memory gives; and the products of kept weights with a prompt.",
        chart,
        ("task", "weights", "read", "of the memory's", "GFLOP/s of a prompt"),
        rows,
    )


def _failures(trials: Sequence[Trial]) -> Section | None:
    counts = Counter(trial.status for trial in trials if trial.status != "ok")
    if not counts:
        return None
    rows = [
        (trial.status, trial.rule, f"{trial.spec.n} x {trial.spec.k}", trial.message)
        for trial in trials
        if trial.status != "ok"
    ]
    title = "Failures by cause"
    bars = [(str(status), float(count)) for status, count in counts.most_common()]
    chart = bar_chart(Caption("failures", title, "Trials."), bars, lambda x: f"{x:.0f}")
    return Section(
        title, "A candidate that fails is never used.", chart,
        ("cause", "kernel", "shape", "message"), rows,
    )  # fmt: skip


def _machine(start: SessionStart, trials: Sequence[Trial]) -> Section:
    target = start.target
    rows = [
        ("processor", target.chip),
        ("target", f"{target.kind} {target.arch} {target.cpu}".strip()),
        ("features", " ".join(target.features)),
        ("TVM", target.tvm),
        ("workload", f"prompts of {start.prompt} tokens, {start.gen} generated after each"),
        ("begun", start.time),
    ]
    if trials:
        rows += list(trials[-1].machine.items())
    return Section("Settings", "What was measured, and where.", "", ("what", "value"), rows)
