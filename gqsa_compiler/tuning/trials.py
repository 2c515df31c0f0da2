"""What is written down of a trial, whoever makes it."""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import replace
from datetime import datetime, timezone
from importlib import metadata

from gqsa_compiler.schedules.rule import KernelConfig
from gqsa_compiler.tuning.key import TargetKey, source_hash
from gqsa_compiler.tuning.lookup import config_fields
from gqsa_compiler.tuning.measure.outcome import Outcome
from gqsa_compiler.tuning.records import Trial
from gqsa_compiler.tuning.tasks import Task

_MOST_MESSAGE = 1000


def planned(task: Task, key: TargetKey, config: KernelConfig, session: str) -> Trial:
    """Describe a trial that has not been made."""
    return Trial(
        target=key,
        kernels=source_hash(task.rule),
        producer=metadata.version("gqsa-compiler"),
        rule=task.rule.name,
        layout_version=task.rule.layout_version,
        spec=task.code,
        density=task.density,
        rows=task.rows,
        config=config_fields(config),
        status="build",
        calls=dict(task.calls),
        session=session,
    )


def made(
    trial: Trial,
    outcome: Outcome,
    ratio: float | None,
    noise: float,
    machine: dict[str, str],
    *,
    best: bool = False,
    seconds: float | None = None,
) -> Trial:
    """Add to a trial how it ended.

    Parameters
    ----------
    trial : Trial
        As `planned` describes it.
    outcome : Outcome
    ratio : float or None
        Time of the workload to the default's; None if it failed.
    noise : float
    machine : dict of str to str
    best : bool
    seconds : float or None
        When it was made, since 1970; None: now.
    """
    return replace(
        trial,
        status=outcome.status,
        message=outcome.message[:_MOST_MESSAGE],
        seconds=outcome.medians() if outcome.status == "ok" else {},
        ratio=ratio,
        noise=noise,
        best=best,
        machine=machine,
        time=now(seconds),
    )


def new_name() -> str:
    """Make a session's name: the time, the process and a few random digits."""
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    return f"{stamp}-{os.getpid()}-{secrets.token_hex(3)}"


def now(seconds: float | None = None) -> str:
    """Write a time in seconds since 1970, or this moment: UTC, ISO 8601."""
    moment = time.time() if seconds is None else seconds
    return datetime.fromtimestamp(moment, timezone.utc).isoformat(timespec="milliseconds")
