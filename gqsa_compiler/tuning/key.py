"""What a measurement holds for: a target on a chip, a release of TVM, a kernel's sources."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqsa_compiler.runtime.cpus import host_arch
from gqsa_compiler.runtime.gpus import Driver, open_driver
from gqsa_compiler.targets import TargetSpec

if TYPE_CHECKING:
    from gqsa_compiler.schedules.rule import ScheduleRule

_PACKAGE = "gqsa_compiler"
_KERNELS = ("gqsa_compiler.schedules", "gqsa_compiler.passes.cpu_code")
"""What a kernel's code comes from, of all that its rule's module imports."""
_GPU = "gqsa_compiler.schedules.cuda."
_LOWERING = "gqsa_compiler.passes.cpu_code"
_GPU_LOWERING = (f"{_GPU}lowering", f"{_GPU}nvcc")


@dataclass(frozen=True)
class TargetKey:
    """A target on a chip: what a record must agree with to be used.

    Parameters
    ----------
    kind, arch, cpu : str
        As `TargetSpec` has them.
    features : tuple of str
    chip : str
        The machine's processor, see `host_chip`; of a GPU `gpu_chip`.
    tvm : str
        Release of TVM that generated the code.
    """

    kind: str
    arch: str
    cpu: str
    features: tuple[str, ...]
    chip: str
    tvm: str

    @classmethod
    def of(cls, target: TargetSpec, chip: str) -> TargetKey:
        """Describe a target on a chip, with the TVM that is installed."""
        return cls(
            target.kind, target.arch, target.cpu, tuple(target.features), chip, tvm_release()
        )

    @property
    def file(self) -> str:
        """Name of the database file of its records."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        words = f"{self.kind}-{self.cpu or self.arch}-{self.chip}-tvm{self.tvm}"
        return f"{slug(words)}-{digest[:8]}.jsonl"


def tvm_release() -> str:
    """Return the release of the TVM that is installed, without what is after it: ``0.27.0``."""
    version = metadata.version("apache-tvm")
    found = re.match(r"\d+\.\d+(\.\d+)?", version)
    return found[0] if found else version


def slug(text: str) -> str:
    """Turn a text into a word for file names: lower case, no other signs than ``._-``."""
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-.")[:120] or "unknown"


def host_chip(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Name this machine's processor: ``amd-epyc-9r14-f25-m17``, ``arm-41-d0c``.

    x86 gives its model's name, family and model; Arm its implementer and part. A system that
    tells neither is named after its architecture.
    """
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:
        return slug(host_arch())

    def find(name: str) -> str:
        found = re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
        return found[1].strip() if found else ""

    name = re.sub(r"\((?:R|TM|r|tm)\)|\bCPU\b|\bProcessor\b|@.*|\d+-Core", " ", find("model name"))
    if name.strip():
        numbers = [f"{sign}{find(word)}" for sign, word in (("f", "cpu family"), ("m", "model"))]
        return slug("-".join([name, *(number for number in numbers if len(number) > 1)]))
    parts = [find("CPU implementer"), find("CPU part")]
    if all(parts):
        return slug("-".join(["arm", *(part.removeprefix("0x") for part in parts)]))
    return slug(host_arch())


def gpu_chip(driver: Driver | None = None) -> str:
    """Name this machine's first GPU: ``nvidia-h100-80gb-hbm3``.

    Parameters
    ----------
    driver : Driver or None
        NVIDIA's; None: it is loaded.

    Raises
    ------
    ArtefactError
        There is no driver, or no GPU.
    """
    return slug((driver or open_driver()).name(0))


def source_hash(rule: ScheduleRule[Any]) -> str:
    """Hash the sources that a rule's kernels are made of.

    These are the rule's module and all modules of the kernels that it imports, and the lowering.
    Comments, docstrings and blank lines do not count.

    Returns
    -------
    str
        16 hexadecimal digits.
    """
    return _module_hash(type(rule).__module__)


@functools.lru_cache(maxsize=64)
def _module_hash(module: str) -> str:
    found: dict[str, str] = {}
    waiting = [module, *(_GPU_LOWERING if module.startswith(_GPU) else (_LOWERING,))]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found[name] = _source(name)
        waiting += [other for other in _imported(found[name]) if other not in found]
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update("\n".join([name, *_code(found[name]), ""]).encode())
    return digest.hexdigest()[:16]


def _code(source: str) -> list[str]:
    """Return the lines that do something."""
    said: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
            continue
        if isinstance(node.value.value, str):
            said |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = [line.rstrip() for n, line in enumerate(source.splitlines(), 1) if n not in said]
    return [line for line in lines if line and not line.lstrip().startswith("#")]


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return ""  # a rule that was not made in a file
    return Path(spec.origin).read_text(encoding="utf-8")


def _imported(source: str) -> Iterator[str]:
    """List the kernels' modules that a source imports."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.startswith(_KERNELS) and _is_module(name):
                yield name


@functools.lru_cache(maxsize=1024)
def _is_module(name: str) -> bool:
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # a name inside a module
        return False
    return spec is not None and spec.origin is not None
