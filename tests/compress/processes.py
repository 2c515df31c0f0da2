"""Several processes on this machine, as a launcher would start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def launch_environment(index: int, count: int, port: int) -> dict[str, str]:
    """Return what a launcher adds to the environment of a process."""
    return {
        "RANK": str(index),
        "LOCAL_RANK": str(index),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def start(words: Sequence[str], logs: Path, count: int = 2) -> list[subprocess.Popen[bytes]]:
    """Start processes that run Python with these words; process i writes to ``logs/i.{out,err}``.

    Nothing watches over them: that one ends when another does is their own doing.
    """
    logs.mkdir(parents=True, exist_ok=True)
    port = free_port()
    running = []
    for index in range(count):
        with (logs / f"{index}.out").open("wb") as out, (logs / f"{index}.err").open("wb") as err:
            environment = {**os.environ, **launch_environment(index, count, port)}
            command = [sys.executable, *words]
            running.append(subprocess.Popen(command, stdout=out, stderr=err, env=environment))
    return running
