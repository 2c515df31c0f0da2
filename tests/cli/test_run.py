"""`gqsa run` and `gqsa chat` on a toy artefact."""

from __future__ import annotations

import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gqsa_compiler import runtime
from gqsa_compiler.errors import UsageError
from tests.cli.conftest import Gqsa
from tests.runtime.toy import edit_manifest

_GQSA = [
    sys.executable,
    "-c",
    "import sys; from gqsa_compiler.cli.main import main; sys.exit(main())",
]


def test_only_the_text_is_on_standard_output(gqsa: Gqsa, toy_artefact: Path) -> None:
    done = gqsa("run", toy_artefact, "-p", "the end", "--max-tokens", "12", "--temperature", "0")
    assert done.code == 0
    with runtime.load(toy_artefact) as model:
        expected = model.generate("the end", max_tokens=12, temperature=0).text
    assert done.out == expected
    assert "tokens/s" in done.err
    assert "max tokens" in done.err


def test_json(gqsa: Gqsa, toy_artefact: Path) -> None:
    done = gqsa("run", toy_artefact, "-p", "the end", "--max-tokens", "5", "--json")
    assert done.code == 0
    assert done.json["finish_reason"] in ("length", "eos")
    assert len(done.json["token_ids"]) == done.json["generated_tokens"] <= 5
    assert done.json["prompt_tokens"] > 0


def test_one_of_several_variants(gqsa: Gqsa, toy_artefact: Path, tmp_path: Path) -> None:
    two = Path(shutil.copytree(toy_artefact, tmp_path / "two"))
    shutil.copy(two / "model.so", two / "model.other.so")

    def double(manifest: dict[str, Any]) -> None:
        (variant,) = manifest["variants"]
        manifest["variants"] += [
            {
                "target": {**variant["target"], "name": "other"},
                "library": {**variant["library"], "file": "model.other.so"},
            }
        ]

    edit_manifest(two, double)
    words = ("run", two, "-p", "the", "--max-tokens", "2")
    assert "Running the code for cpu." in gqsa(*words).err
    assert "Running the code for other." in gqsa(*words, "--variant", "other").err
    measured = gqsa("bench", two, "--variant", "other", "--prompt", "4", "--gen", "2", "--json")
    assert measured.json["variant"] == "other"
    done = gqsa(*words, "--variant", "avr")
    assert (done.code, "avr" in done.error, "cpu, other" in done.error) == (2, True, True)
    done = gqsa(*words, "--variant", "other", "--rpc", "phone:9090")
    assert (done.code, "leave --variant out" in done.error) == (2, True)


def test_run_and_chat_share_their_options(
    gqsa: Gqsa, toy_artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {
        **{"temperature": "0.5", "top-k": "3", "top-p": "0.9", "min-p": "0.1", "seed": "4"},
        **{"repetition-penalty": "1.1", "stop": "zz", "context": "64", "threads": "1"},
    }
    words = [word for name, value in asked.items() for word in (f"--{name}", value)]
    ran = gqsa("run", toy_artefact, "-p", "hi", "--max-tokens", "2", "--no-verify", *words)
    _say(monkeypatch, "hi")
    said = gqsa("chat", toy_artefact, "--max-tokens", "2", "--no-verify", *words)
    for done in (ran, said):
        assert done.code == 0
        settings = [line.split() for line in done.err.splitlines() if line.startswith("  ")]
        shown = {words[0]: words[-1] for words in settings}
        for name, value in asked.items():
            assert value in shown[name.replace("-", "_")]
    for verb in ("run", "chat"):
        wrong = gqsa(verb, toy_artefact, "--top-p", "2")
        assert (wrong.code, "--top-p" in wrong.err) == (2, True)


def test_a_seed_repeats_the_draw(gqsa: Gqsa, toy_artefact: Path) -> None:
    words = ("run", toy_artefact, "-p", "a", "--max-tokens", "16", "--temperature", "2")
    first, second, other = (gqsa(*words, "--seed", seed).out for seed in ("1", "1", "2"))
    assert first == second != other


def test_chat_template_is_used_when_asked(gqsa: Gqsa, toy_artefact: Path) -> None:
    words = ("run", toy_artefact, "-p", "hi", "--max-tokens", "4", "--json")
    plain, chat = gqsa(*words), gqsa(*words, "--chat")
    assert chat.json["prompt_tokens"] > plain.json["prompt_tokens"]
    assert "--chat applies it" in gqsa("run", toy_artefact, "-p", "hi", "--max-tokens", "1").err


def test_the_prompt_comes_from_a_file_or_standard_input(
    gqsa: Gqsa, toy_artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("run", toy_artefact, "--max-tokens", "8")
    expected = gqsa(*words, "-p", "the end").out
    file = tmp_path / "prompt.txt"
    file.write_text("the end")
    assert gqsa(*words, "-f", file).out == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO("the end"))
    assert gqsa(*words).out == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO("the end"))
    assert gqsa(*words, "-p", "-").out == expected


def test_bad_prompts(gqsa: Gqsa, toy_artefact: Path, tmp_path: Path) -> None:
    both = gqsa("run", toy_artefact, "-p", "a", "-f", "b")
    assert (both.code, "not with both" in both.error) == (2, True)
    missing = gqsa("run", toy_artefact, "-f", tmp_path / "none.txt")
    assert (missing.code, "does not exist" in missing.error) == (2, True)
    binary = tmp_path / "binary"
    binary.write_bytes(b"ab\xff")
    wrong = gqsa("run", toy_artefact, "-f", binary)
    assert (wrong.code, "not UTF-8 text (byte 2)" in wrong.error) == (2, True)
    long = gqsa("run", toy_artefact, "-p", "x" * 500)
    assert (long.code, "context" in long.error) == (2, True)
    assert long.out == ""


def test_an_artefact_is_needed(gqsa: Gqsa, tmp_path: Path) -> None:
    for verb in ("run", "chat", "bench"):
        missing = gqsa(verb, tmp_path / "none")
        assert missing.code == 2
        assert "does not exist" in missing.error
        other = gqsa(verb, tmp_path)
        assert other.code == 2
        assert "compile it first" in other.error


def test_context_beyond_the_artefacts(gqsa: Gqsa, toy_artefact: Path) -> None:
    done = gqsa("run", toy_artefact, "-p", "a", "--context", "4096")
    assert done.code == 2
    assert "compiled for" in done.error


def _say(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_chat_keeps_the_conversation(
    gqsa: Gqsa, toy_artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _say(monkeypatch, "hi", "", "again", "/stats", "/reset", "hi", "/exit", "not said")
    done = gqsa("chat", toy_artefact, "--max-tokens", "3", "--json")
    assert done.code == 0
    first, second, third = (json.loads(line) for line in done.out.splitlines())
    assert second["prompt_tokens"] > first["prompt_tokens"]
    assert third["text"] == first["text"]
    # What was said stays in the cache; after /reset a prompt is that of the first turn again.
    assert first["cached_tokens"] == 0
    assert second["cached_tokens"] > first["prompt_tokens"]
    assert third["cached_tokens"] == third["prompt_tokens"] - 1
    assert f"({second['cached_tokens']} in the cache)" in done.err


def test_chat_commands(gqsa: Gqsa, toy_artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _say(monkeypatch, "/stats", "hi", "/stats", "/frob")
    done = gqsa("chat", toy_artefact, "--max-tokens", "3", "--system", "be kind")
    assert done.code == 0
    assert "There is no answer yet." in done.err
    assert "tokens/s" in done.err
    assert "There is no command /frob" in done.err


def test_a_message_too_long_does_not_end_the_chat(
    gqsa: Gqsa, toy_artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _say(monkeypatch, "x" * 300, "hi")
    done = gqsa("chat", toy_artefact, "--max-tokens", "2", "--json")
    assert done.code == 0
    assert "/reset" in done.err
    assert len(done.out.splitlines()) == 1


def test_chat_needs_a_template(
    gqsa: Gqsa, toy_artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in toy_artefact.iterdir():
        if file.name != "chat_template.jinja":
            (copy / file.name).symlink_to(file)
    _say(monkeypatch, "hi")
    done = gqsa("chat", copy)
    assert done.code == 2
    assert "no chat template" in done.error


def test_ctrl_c_while_generating(toy_artefact: Path) -> None:
    """The endless answer is stopped: exit code 130, one line, the text so far was written."""
    words = ["run", str(toy_artefact), "-p", "the", "--max-tokens", "90", "--temperature", "3"]
    code = (
        "import sys, time\n"
        "from gqsa_compiler.runtime.stream import TextStream\n"
        "real = TextStream.__next__\n"
        "def slow(self):\n    time.sleep(0.2)\n    return real(self)\n"
        "TextStream.__next__ = slow\n"
        "from gqsa_compiler.cli.main import main\n"
        "sys.exit(main())\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.decode().rstrip().endswith("error: Interrupted.")
    assert b"Traceback" not in err


def test_on_a_terminal_the_answer_ends_with_a_line_break(toy_artefact: Path) -> None:
    main_end, terminal = pty.openpty()
    words = ["run", str(toy_artefact), "-p", "the", "--max-tokens", "3"]
    process = subprocess.Popen([*_GQSA, *words], stdout=terminal, stderr=subprocess.DEVNULL)
    assert process.wait(timeout=60) == 0
    os.close(terminal)
    time.sleep(0.1)
    assert os.read(main_end, 4096).endswith(b"\n")
    os.close(main_end)


def _shell(line: str, artefact: Path, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run `gqsa` ("$@") and the artefact ("$0") in a line of shell."""
    return subprocess.run(
        ["bash", "-c", line, str(artefact), *_GQSA], input=data, capture_output=True, timeout=60
    )


@pytest.mark.parametrize(
    ("line", "code", "out", "words"),
    [
        ('"$@" run "$0" <&-', 2, b"", b"prompt is empty"),
        ('"$@" chat "$0" <&-', 0, b"", b""),
        ('"$@" run "$0" -p hi --max-tokens 2 >&-', 0, b"", b"tokens/s"),
        ('"$@" run "$0" -p hi --max-tokens 2 --temperature 0 2>&-', 0, None, b""),
        ('"$@" run "$0" 0<&- 1>&- 2>&-', 2, b"", b""),
    ],
)
def test_closed_streams(
    toy_artefact: Path, line: str, code: int, out: bytes | None, words: bytes
) -> None:
    done = _shell(line, toy_artefact)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert b"Unexpected" not in done.stderr
    if out is None:
        with runtime.load(toy_artefact) as model:
            out = model.generate("hi", max_tokens=2, temperature=0).text.encode()
    assert done.stdout == out


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
@pytest.mark.parametrize(
    "line",
    [
        '"$@" run "$0"',
        '"$@" run "$0" --chat',
        '"$@" run "$0" -p $\'a\\xff\\xfeb\'',
        '"$@" chat "$0"',
        '"$@" chat "$0" --system $\'a\\xffb\'',
    ],
)
def test_prompts_that_are_not_utf8(toy_artefact: Path, line: str, locale: str) -> None:
    done = _shell(f"export LC_ALL={locale}; {line}", toy_artefact, b"\xff\xfe\x80abc\n")
    assert b"is not UTF-8" in done.stderr
    assert b"Unexpected" not in done.stderr
    assert done.returncode == 2


@pytest.mark.parametrize("file", ["<(printf 'the end')", "/dev/stdin"])
def test_the_prompt_comes_from_a_pipe(gqsa: Gqsa, toy_artefact: Path, file: str) -> None:
    words = ("--max-tokens", "8", "--temperature", "0")
    expected = gqsa("run", toy_artefact, "-p", "the end", *words).out
    done = _shell(f'"$@" run "$0" {" ".join(words)} -f {file}', toy_artefact, b"the end")
    assert (done.returncode, done.stdout.decode()) == (0, expected)


def test_a_prompt_without_end_is_refused(
    gqsa: Gqsa, toy_artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gqsa_compiler.cli.run._MOST_BYTES", 1 << 20)
    done = gqsa("run", toy_artefact, "-f", "/dev/zero")
    assert done.code == 2
    assert done.error == "/dev/zero has more than 1 MiB; give -f a shorter text."
    monkeypatch.setattr(sys, "stdin", io.StringIO("a" * (1 << 21)))
    done = gqsa("run", toy_artefact)
    assert (done.code, "Standard input has more than 1 MiB" in done.error) == (2, True)


def test_the_prompt_comes_from_the_null_device(gqsa: Gqsa, toy_artefact: Path) -> None:
    done = gqsa("run", toy_artefact, "-f", "/dev/null")
    assert (done.code, "prompt is empty" in done.error) == (2, True)


def test_an_interrupted_answer_is_no_stop(
    gqsa: Gqsa, toy_artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chat that went on after Ctrl-C and fails later has its own exit code."""

    def lines() -> Iterator[str]:
        yield "hi"
        raise UsageError("The second line is bad.")

    def interrupted(self: object) -> str:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError

    monkeypatch.setattr("gqsa_compiler.cli.chat._lines", lines)
    monkeypatch.setattr("gqsa_compiler.runtime.stream.TextStream.__next__", interrupted)
    done = gqsa("chat", toy_artefact)
    assert (done.code, done.error) == (2, "The second line is bad.")
