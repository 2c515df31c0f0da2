"""Which configuration a database has for a kernel: of its shape, or of the nearest one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from gqsa_compiler.errors import ArtefactError, UsageError
from gqsa_compiler.schedules.choice import Choice
from gqsa_compiler.schedules.rule import KernelConfig, ScheduleRule
from gqsa_compiler.schedules.spec import LinearSpec
from gqsa_compiler.targets import TargetSpec
from gqsa_compiler.tuning.database import Database
from gqsa_compiler.tuning.key import TargetKey, gpu_chip, host_chip, slug, source_hash
from gqsa_compiler.tuning.records import Trial, config_key

FARTHEST = 2.0
"""Distance (`distance`) beyond which a shape tells nothing about another one."""
_SHIPPED = "tuned"


def density_of(spec: LinearSpec) -> float:
    """Return the share of a layer's groups that are kept; 1 for a dense one."""
    groups = spec.n * (spec.k // spec.group_size) if spec.group_size else 0
    return spec.nnz / groups if groups else 1.0


def distance(a: LinearSpec, a_density: float, b: LinearSpec, b_density: float) -> float:
    """Measure how far two shapes of one kernel are apart.

    Doubling the rows, doubling the columns or keeping twice the groups each count 1.

    Returns
    -------
    float
        Infinite if the kernels differ in more than that.
    """
    same = replace(a, n=b.n, k=b.k, nnz=b.nnz, norm_eps=b.norm_eps, epilogue=b.epilogue)
    if same != b or a.epilogue.gated != b.epilogue.gated or (a.nnz == 0) != (b.nnz == 0):
        return math.inf
    sizes = ((a.n, b.n), (a.k, b.k), (max(a_density, 0.01), max(b_density, 0.01)))
    return sum(abs(math.log2(x / y)) for x, y in sizes)


def usable(trial: Trial, rule: ScheduleRule[Any], key: TargetKey) -> bool:
    """Say whether a trial is of this rule's code as it is now, on this target, and a best one."""
    return (
        trial.status == "ok"
        and trial.best
        and trial.target == key
        and trial.rule == rule.name
        and trial.layout_version == rule.layout_version
        and trial.kernels == source_hash(rule)
    )


def space_by_key(
    rule: ScheduleRule[Any], spec: LinearSpec, target: TargetSpec
) -> dict[str, KernelConfig]:
    """Return a rule's space by the texts that records have configurations in."""
    return {config_key(config_fields(config)): config for config in rule.space(spec, target)}


def config_fields(config: KernelConfig) -> dict[str, Any]:
    """Return a configuration's fields as a record has them: lists for tuples."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}


@dataclass(frozen=True)
class Known:
    """A trial and where it was found: 0 is the user's database, 1 what is shipped."""

    trial: Trial
    origin: int


class Tuned:
    """Chooses configurations by what was measured, else the rule's default.

    Parameters
    ----------
    known : sequence of Known
    chip : str or None
        The processor that is compiled for; None: nothing measured is used.
    portable : bool
        The packed weights are shared with code for other targets, so only configurations that
        pack as the default does are taken.
    """

    def __init__(self, known: Sequence[Known], chip: str | None, portable: bool = False) -> None:
        self.chip = chip
        # Of a long session few trials are ever used.
        self._known = [k for k in known if k.trial.status == "ok" and k.trial.best]
        self._portable = portable
        self._spaces: dict[tuple[str, LinearSpec, TargetSpec], dict[str, KernelConfig]] = {}

    def choose(self, rule: ScheduleRule[Any], spec: LinearSpec, target: TargetSpec) -> Choice:
        """Choose a configuration out of the rule's space.

        Of the kernel's own shape (its `code_key`) that with the nearest density, then the user's
        before what is shipped, then the greatest gain; else the nearest shape's.
        """
        default = rule.space(spec, target)[0]
        if self.chip is None:
            return Choice(default)
        key = TargetKey.of(target, self.chip)
        code, density = rule.code_key(spec), density_of(spec)
        space = self._space(rule, spec, target)
        found = []
        for known in self._known:
            trial = known.trial
            if not usable(trial, rule, key):
                continue
            config = space.get(config_key(trial.config))
            if config is None:
                continue
            if self._portable and rule.packed_by(config) != rule.packed_by(default):
                continue
            exact = trial.spec == code
            far = distance(code, density, trial.spec, trial.density)
            if exact or far <= FARTHEST:
                order = (not exact, round(far, 1), known.origin, trial.ratio or 1.0)
                found.append(
                    (*order, trial.spec.to_json(), config_key(trial.config), config, known)
                )
        if not found:
            return Choice(default)
        *_, config, known = min(found, key=lambda item: item[:-2])
        trial = known.trial
        where = "the database" if known.origin == 0 else "the shipped records"
        detail = f"{trial.spec.n} x {trial.spec.k}, {trial.density:.0%} kept, from {where}"
        return Choice(config, "exact" if trial.spec == code else "nearest", detail)

    def _space(
        self, rule: ScheduleRule[Any], spec: LinearSpec, target: TargetSpec
    ) -> dict[str, KernelConfig]:
        place = (rule.name, rule.code_key(spec), target)
        if place not in self._spaces:
            self._spaces[place] = space_by_key(rule, spec, target)
        return self._spaces[place]


def shipped() -> tuple[Trial, ...]:
    """Read the records that came with the program."""
    folder = Path(str(files("gqsa_compiler.schedules").joinpath(_SHIPPED)))
    if not folder.is_dir():
        return ()
    return Database(folder).read().trials


def open_tuned(
    directory: str | Path | None,
    target: TargetSpec,
    chip: str | None = None,
    *,
    portable: bool = False,
) -> Tuned:
    """Read what was measured for a target: the user's database and what is shipped.

    Parameters
    ----------
    directory : str or Path or None
        The user's.
    target : TargetSpec
    chip : str or None
        The processor; None: this machine's for the target ``cpu``, its GPU for ``cuda``, for others
        the one that the user's database has measurements of.
    portable : bool
        See `Tuned`.

    Raises
    ------
    UsageError
        There is no such directory, or it has measurements of several processors for the target
        and `chip` does not say which is meant; or nothing was measured on `chip`.
    """
    mine: Iterable[Trial] = ()
    if directory is not None:
        directory = Path(directory)
        if not directory.is_dir():
            raise UsageError(
                f"There is no tuning database {directory}; make one with gqsa tune MODEL --db "
                f"{directory}."
            )
        mine = Database(directory).read().trials
    known = [Known(trial, 0) for trial in mine] + [Known(trial, 1) for trial in shipped()]
    if chip:
        chips = sorted({entry.trial.target.chip for entry in known})
        if slug(chip) not in chips:
            remedy = f"choose one of {', '.join(chips)}" if chips else "gqsa tune measures"
            raise UsageError(f"Nothing was measured on a processor called {chip}; {remedy}.")
    chip = slug(chip) if chip else _chip(mine, target, directory)
    return Tuned(known, chip, portable)


def _chip(mine: Iterable[Trial], target: TargetSpec, directory: str | Path | None) -> str | None:
    if target.name == "cpu":
        return host_chip()
    if target.name == "cuda":
        with suppress(ArtefactError):  # without a GPU, the one of the database
            return gpu_chip()
    chips = sorted({t.target.chip for t in mine if t.target == TargetKey.of(target, t.target.chip)})
    if len(chips) > 1:
        raise UsageError(
            f"{directory} has measurements of {len(chips)} processors for {target.name}; say which "
            f"is meant with --chip: {', '.join(chips)}."
        )
    return chips[0] if chips else None
