"""The figures of a part: a JSON file that grows round by round and is found again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from machine import describe
from scaling_plan import Part, Plan, Round

from gqsa_compiler.errors import GqsaError, UsageError


class Store:
    """One part's file.

    Parameters
    ----------
    part : Part
    plan : Plan

    Raises
    ------
    GqsaError
        The file is there and belongs to other settings or another machine, or cannot be read.
    """

    def __init__(self, part: Part, plan: Plan) -> None:
        self.path = plan.directory / f"{part.name}.json"
        self._part = part
        everything = json.loads(json.dumps(asdict(plan), default=str))
        settings = {name: everything[name] for name in part.fields}
        about_machine = describe()
        self.data: dict[str, Any] = {
            "part": part.name,
            "machine": about_machine,
            "settings": settings,
            "rounds": [],
        }
        if not self.path.exists():
            return
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            stored = {**found["settings"], "cpu": found["machine"]["cpu"]}
            rounds: list[Round] = found["rounds"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise GqsaError(f"{self.path} cannot be read as figures of an earlier run.") from error
        self._check(stored, {**settings, "cpu": about_machine["cpu"]})
        self.data = {**found, "rounds": rounds}

    @property
    def rounds(self) -> list[Round]:
        """The rounds measured so far."""
        rounds: list[Round] = self.data["rounds"]
        return rounds

    @property
    def result(self) -> dict[str, Any]:
        """What the rounds say together; there must be one at least."""
        result: dict[str, Any] = self.data["result"]
        return result

    def add(self, found: Round, about: Mapping[str, Any]) -> None:
        """Add a round, sum up anew, and write the file aside and rename it.

        Raises
        ------
        GqsaError
            An earlier run measured another artefact under the same name.
        """
        about = json.loads(json.dumps(about))
        if self.rounds and self.data["about"] != about:
            raise UsageError(
                f"The artefact is not the one that {self.path} began with; "
                "delete that file, or name another --directory."
            )
        rounds = [*self.rounds, json.loads(json.dumps(found))]
        result = self._part.result(about, rounds)
        self.data = {**self.data, "about": about, "rounds": rounds, "result": result}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_name(f"{self.path.name}.part")
        aside.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        aside.replace(self.path)

    def _check(self, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        for name, value in wanted.items():
            if stored.get(name) != value:
                raise UsageError(
                    f"{self.path} was measured with {name} {stored.get(name)} instead of {value}; "
                    "delete it, or name another --directory."
                )
