"""Run mypy over the whole project.

`passes/`, `schedules/` and `runtime/` stand at the top of the repository and are mapped into the
package by setuptools, which mypy does not know. So the package is put together from links in
build/typecheck/, mypy runs there, and paths are printed as they are in the repository.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAPPED = ("passes", "schedules", "runtime")


def link_package(tree: Path) -> None:
    """Build the package `gqsa_compiler` of links in an empty directory."""
    package = tree / "gqsa_compiler"
    package.mkdir(parents=True)
    for entry in sorted((ROOT / "gqsa_compiler").iterdir()):
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    for name in MAPPED:
        (package / name).symlink_to(ROOT / name)


def main(arguments: list[str]) -> int:
    """Check everything, or only the repository paths given."""
    tree = ROOT / "build" / "typecheck"
    shutil.rmtree(tree, ignore_errors=True)
    link_package(tree)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        str(ROOT / "pyproject.toml"),
        "--cache-dir",
        str(ROOT / ".mypy_cache"),
        "gqsa_compiler",
    ]
    done = subprocess.run(command, cwd=tree, text=True, stdout=subprocess.PIPE, check=False)
    failed = False
    for line in done.stdout.splitlines():
        for name in MAPPED:
            line = line.replace(f"gqsa_compiler/{name}/", f"{name}/")
        if not arguments or any(line.startswith(path) for path in arguments):
            print(line)
            failed = failed or ": error:" in line
    return int(failed) if arguments else done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
