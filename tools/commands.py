"""Run `gqsa` commands as a user would, each printed before it runs."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

GQSA = Path(sys.executable).with_name("gqsa")


def gqsa(*words: str, capture: bool = False) -> str:
    """Run one command; its standard output is returned if asked for, and shown otherwise.

    The program ends where the command fails.
    """
    print(f"\n$ {shlex.join(('gqsa', *words))}", flush=True)
    done = subprocess.run(
        [GQSA, *words], check=False, text=True, stdout=subprocess.PIPE if capture else None
    )
    if done.returncode != 0:
        sys.exit(done.returncode)
    return done.stdout or ""


def measure(*words: str) -> dict[str, Any]:
    """Run one command with --json and return its figures."""
    found: dict[str, Any] = json.loads(gqsa(*words, "--json", capture=True))
    return found
