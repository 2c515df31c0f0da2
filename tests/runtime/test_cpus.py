from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from gqsa_compiler.runtime.cpus import allowed_cpus, default_threads, host_arch, host_flags


@pytest.fixture
def four_twins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of four cores with two threads each: CPU i + 4 is the twin of CPU i."""
    for cpu in range(8):
        folder = tmp_path / f"devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    (tmp_path / "fs/cgroup").mkdir(parents=True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    return tmp_path


@pytest.mark.parametrize(
    ("machine", "name"),
    [("AMD64", "x86_64"), ("x86_64", "x86_64"), ("arm64", "aarch64"), ("sparc64", "sparc64")],
)
def test_architectures_have_linux_names(
    machine: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert host_arch() == name


def test_flags_are_the_first_processor_s(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    assert host_flags(path) == frozenset()
    path.write_text("processor\t: 0\nflags\t\t: avx2 fma\n\nprocessor\t: 1\nflags\t\t: sse\n")
    assert host_flags(path) == {"avx2", "fma"}
    path.write_text("Features\t: asimd asimddp\n")
    assert host_flags(path) == {"asimd", "asimddp"}
    path.write_text("model name : x\n")
    assert host_flags(path) == frozenset()


def test_one_thread_a_core(four_twins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert allowed_cpus(four_twins) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert default_threads(four_twins) == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 3, 5, 7})
    assert allowed_cpus(four_twins) == [1, 3, 5, 7]
    assert default_threads(four_twins) == 2


def test_neighbours_are_twins(four_twins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu in range(8):
        path = four_twins / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        path.write_text(f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}\n")
    assert allowed_cpus(four_twins) == [0, 2, 4, 6, 1, 3, 5, 7]
    assert default_threads(four_twins) == 4


@pytest.mark.parametrize(
    ("text", "threads"), [("200000 100000", 2), ("150000 100000", 2), ("max 100000", 4), ("", 4)]
)
def test_a_container_s_quota(four_twins: Path, text: str, threads: int) -> None:
    (four_twins / "fs/cgroup/cpu.max").write_text(text)
    assert default_threads(four_twins) == threads


@pytest.mark.parametrize(
    ("files", "group", "threads"),
    [
        ({"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b", 3),
        ({"a/cpu.max": "300000 100000", "a/b/cpu.max": "90000 100000"}, "0::/a/b", 1),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, "1:cpu:/x", 2),
        ({"cpu/x/cpu.cfs_quota_us": "250000", "cpu/x/cpu.cfs_period_us": "100000"},
         "3:cpuset:/y\n1:cpu,cpuacct:/x", 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "1:cpu:/", 4),
        ({"cpu/y/cpu.cfs_quota_us": "100000", "cpu/y/cpu.cfs_period_us": "100000"}, "1:cpu:/x", 4),
    ],
)  # fmt: skip
def test_quotas_of_control_groups(
    four_twins: Path, files: dict[str, str], group: str, threads: int
) -> None:
    """Both versions, and limits of the groups around ours; those of other groups are not ours."""
    for name, text in files.items():
        path = four_twins / "fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    (four_twins / "cgroup").write_text(f"{group}\n")
    assert default_threads(four_twins, four_twins / "cgroup") == threads


def test_a_system_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5})
    assert allowed_cpus(tmp_path) == [0, 5]
    assert default_threads(tmp_path) == 2


def test_only_twins_are_allowed(four_twins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {6, 7})
    assert allowed_cpus(four_twins) == [6, 7]
    assert default_threads(four_twins) == 2
