"""Running on a device over TVM's RPC: a server on this machine stands for it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gqsa_compiler import remote
from gqsa_compiler.cli.app import make_app
from gqsa_compiler.errors import ArtefactError, GqsaError, UsageError
from gqsa_compiler.remote import load_remote, parse_address
from gqsa_compiler.runtime.model import Model
from tests.runtime.toy import CONTEXT, edit_manifest

# What `python -m tvm.exec.rpc_server` starts, without the process pool that it takes for it, which
# needs one more package.
SERVER = """
import time
import tvm
from tvm.rpc.server import PopenRPCServerState
state = PopenRPCServerState("127.0.0.1", 20190, 21190)
print(state.port, flush=True)
time.sleep(3600)  # not a read of standard input: its lock would stay shut in the forked servers
"""
PROMPT = "the man in the inner"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the address of a server."""
    folder = tmp_path_factory.mktemp("server")
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, cwd=folder,
            env={**os.environ, "TVM_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip
    assert server.stdout is not None
    line = server.stdout.readline().decode()
    assert line.strip().isdigit(), (folder / "log").read_text()
    yield f"127.0.0.1:{line.strip()}"
    os.killpg(server.pid, signal.SIGKILL)  # with the processes that serve
    server.wait()


@pytest.mark.parametrize("text", ["", "phone", "phone:", ":9090", "phone:0", "phone:70000", "a:b"])
def test_addresses(text: str) -> None:
    with pytest.raises(UsageError, match="HOST:PORT"):
        parse_address(text)
    assert parse_address("phone:9090") == ("phone", 9090)
    assert parse_address("[::1]:9090") == ("::1", 9090)


def test_the_same_tokens(address: str, artefact: Path, model: Model) -> None:
    """Prompts of several chunks, two sequences at once, sampled ones; and the logits of a text."""
    stages: list[tuple[str, int, int]] = []
    with load_remote(
        artefact, address, max_batch=2, progress=lambda *stage: stages.append(stage)
    ) as device:
        prompts = [PROMPT, "the man " * 15]
        wanted = model.generate_batch(prompts, max_tokens=6, temperature=0)
        got = device.generate_batch(prompts, max_tokens=6, temperature=0)
        assert [g.token_ids for g in got] == [w.token_ids for w in wanted]
        options = {"max_tokens": 6, "temperature": 1.0, "seed": 4}
        assert device.generate(PROMPT, **options).text == model.generate(PROMPT, **options).text
        ids = model.tokenize(PROMPT)
        for ours, theirs in zip(device.score(ids), model.score(ids), strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)
        with pytest.raises(UsageError, match="leaves no room"):
            device.generate("the " * CONTEXT)
    assert stages[0] == ("sending the weights", 0, stages[-1][2])
    assert stages[-1][1] == stages[-1][2] > 0


def test_gqsa_run(address: str, artefact: Path, model: Model) -> None:
    words = ["run", str(artefact), "--rpc", address, "-p", PROMPT, "--max-tokens", "6",
             "--temperature", "0"]  # fmt: skip
    done = CliRunner().invoke(make_app(), words)
    assert done.exit_code == 0, done.output
    assert model.generate(PROMPT, max_tokens=6, temperature=0).text in done.output
    refused = CliRunner().invoke(make_app(), [*words, "--threads", "1"])
    assert refused.exit_code == 2
    assert "TVM_NUM_THREADS" in refused.output


def test_no_server(artefact: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(GqsaError, match=f"no server at 127.0.0.1:{port} .*rpc_server"):
        load_remote(artefact, f"127.0.0.1:{port}")


def test_what_is_no_rpc_server(artefact: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def answer() -> None:
            for _ in range(2):  # the first only looks whether anybody is there
                peer, _address = listener.accept()
                with peer:
                    peer.sendall(b"SSH-2.0-OpenSSH_9.2p1\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(GqsaError, match="is no RPC server of TVM"):
            load_remote(artefact, f"127.0.0.1:{port}")
        thread.join()


def test_code_for_another_architecture(address: str, copy: Path) -> None:
    def change(data: dict[str, object]) -> None:
        data["variants"][0]["target"].update(arch="riscv64", name="board")  # type: ignore[index]

    edit_manifest(copy, change)
    with pytest.raises(ArtefactError, match=r"compiled for board \(riscv64\) and the device at"):
        load_remote(copy, address)


def test_a_server_that_does_not_tell_its_architecture(
    address: str, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then what the device's loader says is passed on."""
    import hashlib

    monkeypatch.setattr(remote, "_TRIPLE", "no such function")
    code = bytearray((copy / "model.so").read_bytes())
    code[18:20] = (8).to_bytes(2, "little")  # MIPS
    (copy / "model.so").write_bytes(code)
    digest = hashlib.sha256(code).hexdigest()
    edit_manifest(copy, lambda d: d["variants"][0]["library"].update(sha256=digest))
    with pytest.raises(ArtefactError, match="cannot load the code for cpu"):
        load_remote(copy, address)


def test_another_release(address: str, artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        remote._Connection, "find", lambda _self, name: None if "kv_state" in name else 1
    )
    with pytest.raises(GqsaError, match=r"is of another release than 0\.27"):
        remote._Connection(address).function("vm.builtin.kv_state_add_sequence")


def test_damage_is_found_before_anything_is_sent(address: str, copy: Path) -> None:
    (copy / "model.so").write_bytes(b"nothing")
    with pytest.raises(ArtefactError, match=r"model\.so is damaged"):
        load_remote(copy, address)


def test_other_devices_and_linked_programs_are_refused(address: str, copy: Path) -> None:
    edit_manifest(copy, lambda d: d["variants"][0]["library"].update(file="gqsa-run"))
    with pytest.raises(ArtefactError, match=r"is linked into .*gqsa-run; copy"):
        load_remote(copy, address)
    shutil.rmtree(copy / "lib", ignore_errors=True)
    edit_manifest(copy, lambda d: d["variants"][0]["library"].update(file="model.so"))
    edit_manifest(copy, lambda d: d["variants"][0]["target"].update(kind="cuda", device_type=2))
    with pytest.raises(ArtefactError, match="only CPUs are driven"):
        load_remote(copy, address)
