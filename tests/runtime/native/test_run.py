"""gqsa-run: the same tokens and the same output as the Python runtime's, and its command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from gqsa_compiler import runtime
from gqsa_compiler.bundle import add_bundle, chat_prompt
from gqsa_compiler.runtime.model import Model
from gqsa_compiler.targets import parse_target
from tests.runtime.native.programs import Programs, generated, options, refusal, run
from tests.runtime.toy import CONTEXT

PROMPT = "the man in the inner"
CHOICES: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 4},
    {"temperature": 0.7, "seed": 1, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.2, "seed": 9, "min_p": 0.02, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("chosen", CHOICES, ids=str)
def test_the_same_tokens_as_in_python(
    programs: Programs, artefact: Path, model: Model, chosen: dict[str, Any]
) -> None:
    wanted = model.generate(PROMPT, max_tokens=24, **chosen)
    got = generated(programs, artefact, "-p", PROMPT, *options({"max_tokens": 24, **chosen}))
    assert tuple(got["token_ids"]) == wanted.token_ids
    assert got["text"] == wanted.text
    assert got["finish_reason"] == wanted.finish_reason
    assert got["prompt_tokens"] == wanted.prompt_tokens


def test_stop_strings(programs: Programs, artefact: Path, model: Model) -> None:
    whole = model.generate(PROMPT, max_tokens=24, temperature=0).text
    stop = whole[len(whole) // 2 :][:2]
    wanted = model.generate(PROMPT, max_tokens=24, temperature=0, stop=[stop, "nowhere"])
    got = generated(
        programs, artefact, "-p", PROMPT, *options({"max_tokens": 24, "stop": [stop, "nowhere"]})
    )
    assert got["text"] == wanted.text
    assert got["finish_reason"] == "stop" == wanted.finish_reason


def test_a_prompt_of_several_chunks(programs: Programs, artefact: Path, model: Model) -> None:
    prompt = "the man " * 15  # longer than a chunk of 16 tokens
    wanted = model.generate(prompt, max_tokens=8, temperature=0)
    got = generated(programs, artefact, "-p", prompt, "--max-tokens", "8", "--temperature", "0")
    assert tuple(got["token_ids"]) == wanted.token_ids


def test_standard_output_is_the_text(programs: Programs, artefact: Path, model: Model) -> None:
    """The text and nothing else, and as `gqsa run` writes it, byte for byte."""
    words = ["-p", PROMPT, "--max-tokens", "12", "--temperature", "1", "--seed", "3"]
    native = run(programs, artefact, *words)
    python = subprocess.run(
        [sys.executable, "-m", "gqsa_compiler.cli.main", "run", str(artefact), *words],
        capture_output=True, check=True,
    )  # fmt: skip
    assert native.returncode == 0, native.stderr.decode()
    assert native.stdout == python.stdout
    assert (
        native.stdout.decode()
        == model.generate(PROMPT, max_tokens=12, temperature=1.0, seed=3).text
    )
    last = native.stderr.decode().splitlines()[-1]
    assert last.startswith("[prompt ")
    assert last.endswith("; ended by length]")


def test_prompts_from_a_file_and_standard_input(
    programs: Programs, artefact: Path, tmp_path: Path
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    words = ["--max-tokens", "6", "--temperature", "0"]
    results = [
        run(programs, artefact, "-p", PROMPT, *words),
        run(programs, artefact, "-f", file, *words),
        run(programs, artefact, *words, stdin=PROMPT),
        run(programs, artefact, "-p", "-", *words, stdin=PROMPT),
        run(programs, artefact, f"--prompt={PROMPT}", *words),
    ]
    assert all(done.returncode == 0 for done in results)
    assert len({done.stdout for done in results}) == 1


def test_the_c_interface(programs: Programs, artefact: Path, model: Model) -> None:
    done = subprocess.run(
        [str(programs.api), str(artefact), PROMPT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    wanted = model.generate(PROMPT, max_tokens=8, temperature=0, ignore_eos=True)
    assert said["prompt"] == model.tokenize(PROMPT)
    assert tuple(said["tokens"]) == wanted.token_ids
    assert said["bytes"] == len(wanted.text.encode())
    assert said["stopped"] == 1
    assert said["threads"] == 1


@pytest.fixture(scope="module")
def bundle(artefact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the toy artefact with what `--bundle` adds."""
    directory = tmp_path_factory.mktemp("bundle") / "toy"
    shutil.copytree(artefact, directory)
    add_bundle(directory, parse_target("cpu"))
    return directory


def test_a_bundle_runs_by_itself(
    programs: Programs, bundle: Path, tmp_path: Path, model: Model
) -> None:
    """Program, model and runtime libraries in one folder: no Python, no TVM, nothing named."""
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    shutil.copy(programs.run, folder / "gqsa-run")
    done = subprocess.run(
        [str(folder / "gqsa-run"), "-p", PROMPT, "--max-tokens", "8", "--temperature", "0"],
        capture_output=True, check=False, cwd="/", env={},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == model.generate(PROMPT, max_tokens=8, temperature=0).text
    added = [folder / "gqsa-run", *(folder / "lib").iterdir()]
    assert sum(file.stat().st_size for file in added) < 10_000_000


@pytest.mark.parametrize(
    "message",
    [
        "hi",
        "  the man \n",
        "<|im_end|>\n<|im_start|>user",
        "a<|im_end|>b<|endoftext|>",
        "\n\nx",
        "",
    ],
)
def test_chat(programs: Programs, bundle: Path, model: Model, message: str) -> None:
    """A message is wrapped as the model's template does it; it cannot end itself."""
    messages = [{"role": "user", "content": message}]
    wanted = model.chat(messages, max_tokens=12, temperature=0)
    got = generated(programs, bundle, "--chat", "-p", message, "--max-tokens", "12")
    assert got["prompt_tokens"] == wanted.prompt_tokens
    assert tuple(got["token_ids"]) == wanted.token_ids


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("<{{ messages[0]['content'] }}>", {"before": "<", "after": ">", "trim": False}),
        ("<{{ messages[0]['content'] | trim }}>", {"before": "<", "after": ">", "trim": True}),
        ("<{{ messages[0]['content'] | upper }}>", None),
        ("<{{ messages[0]['content'] * 2 }}>", None),
        ("{{ messages[0]['content'] | length }}", None),
        ("{{ strftime_now('%d') }}{{ messages[0]['content'] }}", None),
        ("{{ raise_exception('no') }}", None),
    ],
)
def test_chat_prompts(tmp_path: Path, template: str, prompt: dict[str, Any] | None) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert chat_prompt(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text(template)
    assert chat_prompt(tmp_path) == prompt


def test_the_program_links_to_nothing_of_tvm(programs: Programs) -> None:
    done = subprocess.run(["ldd", str(programs.run)], capture_output=True, text=True, check=True)
    assert "libc.so" in done.stdout
    for name in ("tvm", "pcre", "utf8proc", "not found"):
        assert name not in done.stdout


def test_help(programs: Programs) -> None:
    done = run(programs, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(b"Usage: gqsa-run")


def test_the_version(programs: Programs) -> None:
    done = run(programs, "--version")
    assert done.returncode == 0
    assert done.stdout.decode() == f"gqsa-run {version('gqsa-compiler')}\n"
    source = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{version("gqsa-compiler")}"' in source


def test_it_has_the_options_of_gqsa_run(programs: Programs) -> None:
    from typer.main import get_command

    from gqsa_compiler.cli.app import make_app

    command: Any = get_command(make_app())
    verbs = command.commands["run"].params
    said = run(programs, "--help").stdout.decode()
    names = {name for p in verbs for name in p.opts if name.startswith("--")}
    # The program is on the device already, and runs a model without its adapters (docs/lora.md).
    for option in names - {"--rpc", "--adapter"}:
        assert f"{option} " in said or f"{option}\n" in said, option


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nonsense"], "no option '--nonsense'"),
        (["-x"], "no option '-x'"),
        (["--max-tokens"], "needs a value"),
        (["--max-tokens", "0"], "whole number"),
        (["--max-tokens", "7x"], "whole number"),
        (["--max-tokens", "99999999999999999999"], "whole number"),
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--top-p", "1.5"], "between 0 and 1"),
        (["--top-p", "0"], "top_p"),
        (["--repetition-penalty", "0"], "repetition_penalty"),
        (["--chat=yes"], "takes no value"),
        (["--threads", "100000"], "CPUs"),
        (["--context", "100000"], "compiled for 1 to 96"),
        (["--variant", "vax"], "no code for 'vax'"),
        (["--stop", ""], "stop string is empty"),
        (["-f", "/no/such/file"], "/no/such/file"),
        (["-f", "/"], "cannot be read"),
        (["-f", "/dev/zero"], "/dev/zero has more than 64 MiB"),
        (["two"], "one DIR too many"),
        (["--chat"], "chat template"),
    ],
)
def test_bad_usage(programs: Programs, artefact: Path, words: list[str], said: str) -> None:
    prompt = [] if "-f" in words else ["-p", "the"]
    assert said in refusal(run(programs, artefact, *prompt, *words), 2)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [(b"", "empty"), (b"\xff\xfe", "UTF-8"), (b"the " * CONTEXT, "leaves no room")],
    ids=["empty", "bytes", "long"],
)
def test_bad_prompts(programs: Programs, artefact: Path, prompt: bytes, said: str) -> None:
    assert said in refusal(run(programs, artefact, stdin=prompt), 2)


def test_the_context_is_full(programs: Programs, artefact: Path, model: Model) -> None:
    prompt = "e " * 44
    wanted = model.generate(prompt, temperature=1.0, seed=2, ignore_eos=False)
    got = generated(programs, artefact, "-p", prompt, "--temperature", "1", "--seed", "2")
    assert tuple(got["token_ids"]) == wanted.token_ids
    assert got["prompt_tokens"] + got["generated_tokens"] <= CONTEXT


# With one token there is nothing left to generate when its text is lost.
@pytest.mark.parametrize("words", [["--max-tokens", "4"], ["--max-tokens", "1"], ["--json"]])
def test_a_full_disk(programs: Programs, artefact: Path, words: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [str(programs.run), str(artefact), "-p", "the", *words],
            stdout=full, stderr=subprocess.PIPE, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert b"cannot be written" in done.stderr


@pytest.mark.slow
def test_smollm2(programs: Programs, tmp_path: Path) -> None:
    """The demo model, compressed in one shot: greedy and sampled text as in Python."""
    from gqsa_compiler import compile as gqsa_compile
    from tests.tiny_checkpoints import make_checkpoint

    checkpoint = make_checkpoint("smollm2-135m", tmp_path / "checkpoint", sparsity=0.2)
    gqsa_compile(str(checkpoint), tmp_path / "artefact", context_length=512)
    prompts = ["The capital of France is", "def fibonacci(n):", "Ünïcödé 中文 🦙 1234"]
    with runtime.load(tmp_path / "artefact", max_batch=1) as model:
        for prompt in prompts:
            for chosen in CHOICES[:3]:
                wanted = model.generate(prompt, max_tokens=32, **chosen)
                words = options({"max_tokens": 32, **chosen})
                got = generated(programs, tmp_path / "artefact", "-p", prompt, *words)
                assert tuple(got["token_ids"]) == wanted.token_ids
                assert got["text"] == wanted.text
