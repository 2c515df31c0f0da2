"""Which configuration is found: the shape's, the nearest shape's, never another target's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from gqsa_compiler.errors import ArtefactError, UsageError
from gqsa_compiler.schedules.choice import Choice
from gqsa_compiler.schedules.spec import Epilogue, LinearSpec
from gqsa_compiler.targets import TargetSpec, parse_target
from gqsa_compiler.tuning import key, lookup
from gqsa_compiler.tuning.database import Database
from gqsa_compiler.tuning.key import host_chip, source_hash
from gqsa_compiler.tuning.lookup import Known, Tuned, distance, open_tuned
from gqsa_compiler.tuning.records import Trial
from tests.tuning.samples import CHIP, V4, rule_of, sparse, trial_of

SPEC = sparse()
RULE = rule_of(SPEC, V4)
SPACE = RULE.space(SPEC, V4)
DEFAULT, BETTER, BEST = SPACE[0], SPACE[3], SPACE[-1]


def choose(
    trials: Sequence[Trial],
    spec: LinearSpec = SPEC,
    target: TargetSpec = V4,
    chip: str | None = CHIP,
    portable: bool = False,
) -> Choice:
    """Look a kernel up in some records."""
    tuned = Tuned([Known(trial, 0) for trial in trials], chip, portable)
    return tuned.choose(rule_of(spec, target), spec, target)


def test_nothing_known_is_the_default() -> None:
    assert choose([]) == Choice(DEFAULT)
    assert choose([trial_of(SPEC, BEST)], chip=None) == Choice(DEFAULT)


def test_the_shapes_own_record() -> None:
    found = choose([trial_of(SPEC, BEST)])
    assert (found.config, found.source) == (BEST, "exact")
    assert found.detail == "64 x 128, 50% kept, from the database"


def test_the_greatest_gain_wins_in_any_order() -> None:
    trials = [trial_of(SPEC, BETTER, ratio=0.9), trial_of(SPEC, BEST, ratio=0.7)]
    assert choose(trials).config == choose(trials[::-1]).config == BEST


def test_the_users_records_come_before_the_shipped_ones() -> None:
    known = [Known(trial_of(SPEC, BEST, ratio=0.5), 1), Known(trial_of(SPEC, BETTER), 0)]
    assert Tuned(known, CHIP).choose(RULE, SPEC, V4).config == BETTER
    found = Tuned(known[:1], CHIP).choose(RULE, SPEC, V4)
    assert found.config == BEST
    assert found.detail.endswith("from the shipped records")


def test_the_nearest_shape_where_the_own_is_unknown() -> None:
    near, far = sparse(n=96), sparse(n=256, k=256)
    found = choose([trial_of(far, BEST), trial_of(near, BETTER)])
    assert (found.config, found.source) == (BETTER, "nearest")
    assert choose([trial_of(sparse(n=64 * 64), BEST)]).source == "default"


def test_a_shape_of_another_density_is_exact_and_the_nearest_density_wins() -> None:
    dense, thin = sparse(nnz=400), sparse(nnz=100)
    trials = [trial_of(thin, BEST, ratio=0.5), trial_of(dense, BETTER, ratio=0.9)]
    assert choose(trials, sparse(nnz=380)).config == BETTER
    assert choose(trials, sparse(nnz=110)).config == BEST
    assert choose(trials, sparse(nnz=110)).source == "exact"


@pytest.mark.parametrize(
    "other",
    [
        replace(SPEC, group_size=32, nnz=128),
        replace(SPEC, symmetric=True),
        replace(SPEC, nnz=64 * 8),
        replace(SPEC, epilogue=Epilogue(activation="silu", gated=True)),
    ],
)
def test_other_kernels_tell_nothing(other: LinearSpec) -> None:
    config = rule_of(other, V4).space(other, V4)[1]
    assert choose([trial_of(other, config)]).source == "default"


def test_a_norm_or_a_residual_does_not_make_another_shape() -> None:
    other = replace(SPEC, norm_eps=1e-5, epilogue=Epilogue(residual=True))
    assert choose([trial_of(other, BEST)]).source == "nearest"


@pytest.mark.parametrize(
    "change",
    [
        {"status": "wrong"},
        {"best": False},
        {"kernels": "0" * 16},
        {"layout_version": 99},
        {"rule": "generic.bsr_int4"},
        {"config": {"tasks": 3}},
        {"config": {}},
    ],
)
def test_records_that_are_kept_and_not_used(change: dict[str, object]) -> None:
    trial = replace(trial_of(SPEC, BEST), **change)  # type: ignore[arg-type]
    assert choose([trial]).source == "default"


def test_a_record_of_another_tvm_is_not_used() -> None:
    trial = trial_of(SPEC, BEST)
    assert choose([replace(trial, target=replace(trial.target, tvm="0.26.0"))]).source == "default"


TARGETS = ("x86-64-v3", "x86-64-v4", "x86-64-v4-bf16", "aarch64", "aarch64-i8mm")


@pytest.mark.parametrize("made", TARGETS)
@pytest.mark.parametrize("asked", TARGETS)
def test_a_record_of_one_target_is_never_used_for_another(made: str, asked: str) -> None:
    """The generic kernels have the same configurations everywhere: only the key differs."""
    here, there = parse_target(made), parse_target(asked)
    spec = sparse(here, activation_dtype="float32")
    space = rule_of(spec, here).space(spec, here)
    common = [c for c in space if c in rule_of(spec, there).space(spec, there)]
    config = common[-1] if common else space[-1]
    found = choose([trial_of(spec, config, here)], spec, there)
    assert found.source == ("exact" if made == asked else "default")


@pytest.mark.parametrize("made", TARGETS)
def test_nor_for_a_gpu(made: str) -> None:
    here = parse_target(made)
    spec = sparse(here, activation_dtype="float32")
    rule = rule_of(spec, here)
    gpu = replace(here, name="cuda", kind="cuda", arch="sm_90", cpu="", features=())
    trial = trial_of(spec, rule.space(spec, here)[-1], here)
    tuned = Tuned([Known(trial, 0)], CHIP)
    assert tuned.choose(rule, spec, gpu).source == "default"
    of_gpu = replace(trial, target=replace(trial.target, kind="cuda", arch="sm_90", cpu=""))
    assert Tuned([Known(of_gpu, 0)], CHIP).choose(rule, spec, here).source == "default"


GPUS = ("cuda:sm_80", "cuda:sm_86", "cuda:sm_89", "cuda:sm_90")


@pytest.mark.parametrize("made", GPUS)
@pytest.mark.parametrize("asked", [*GPUS, "x86-64-v4", "aarch64"])
def test_a_record_of_one_gpu_is_never_used_for_another(made: str, asked: str) -> None:
    """Dense kernels have the same configurations on all GPUs: only the key differs."""
    here, there = parse_target(made), parse_target(asked)
    spec = LinearSpec(64, 128, "dense", "float16")
    trial = trial_of(spec, rule_of(spec, here).space(spec, here)[-1], here, chip="nvidia-h100")
    found = choose([trial], spec, there, chip="nvidia-h100")
    assert found.source == ("exact" if made == asked else "default")
    assert choose([trial], spec, there, chip="nvidia-h200").source == "default"
    # The code that a driver may translate for later GPUs is another target's.
    portable = replace(here, features=(made[5:].replace("sm_", "compute_"),))
    assert choose([trial], spec, portable, chip="nvidia-h100").source == "default"


def test_the_gpu_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = replace(parse_target("cuda:sm_90"), name="cuda")
    spec = LinearSpec(64, 128, "dense", "float16")
    config = rule_of(spec, target).space(spec, target)[-1]
    Database(tmp_path).append(trial_of(spec, config, target, chip="nvidia-h100"))
    monkeypatch.setattr(lookup, "gpu_chip", lambda: "nvidia-h200")
    assert open_tuned(tmp_path, target).chip == "nvidia-h200"
    assert open_tuned(tmp_path, target, "NVIDIA H100").chip == "nvidia-h100"  # as records have it

    def none() -> str:
        raise ArtefactError("no driver")

    monkeypatch.setattr(lookup, "gpu_chip", none)
    assert open_tuned(tmp_path, target).chip == "nvidia-h100"


def test_a_record_of_another_chip_is_not_used() -> None:
    assert choose([trial_of(SPEC, BEST, chip="another")]).source == "default"


def test_weights_shared_between_targets_are_packed_alike() -> None:
    packs_alike = next(c for c in SPACE[1:] if c.tasks == DEFAULT.tasks)
    other = next(c for c in SPACE if c.tasks != DEFAULT.tasks)
    trials = [trial_of(SPEC, other, ratio=0.5), trial_of(SPEC, packs_alike, ratio=0.9)]
    assert choose(trials).config == other
    assert choose(trials, portable=True).config == packs_alike


def test_distance_counts_doublings() -> None:
    code = RULE.code_key(SPEC)
    assert distance(code, 0.5, code, 0.5) == 0
    assert distance(code, 0.5, replace(code, n=128), 0.25) == 2


def test_the_processor_of_a_database(tmp_path: Path) -> None:
    database = Database(tmp_path)
    assert open_tuned(None, parse_target("cpu")).chip == host_chip()
    assert open_tuned(tmp_path, V4).chip is None
    database.append(trial_of(SPEC, BEST))
    assert open_tuned(tmp_path, V4).chip == CHIP
    assert open_tuned(tmp_path, parse_target("aarch64")).chip is None
    assert open_tuned(tmp_path, V4).choose(RULE, SPEC, V4).config == BEST
    database.append(trial_of(SPEC, BEST, chip="zen9"))
    with pytest.raises(UsageError, match=r"2 processors for x86-64-v4; .* some-chip, zen9"):
        open_tuned(tmp_path, V4)
    assert open_tuned(tmp_path, V4, "zen9").chip == "zen9"
    with pytest.raises(UsageError, match=r"on a processor called zen8; choose one of .*zen9"):
        open_tuned(tmp_path, V4, "zen8")


def test_a_database_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no tuning database"):
        open_tuned(tmp_path / "none", V4)


CPUINFO = {
    "model name\t: AMD EPYC 9R14 96-Core Processor\ncpu family\t: 25\nmodel\t\t: 17\n": (
        "amd-epyc-9r14-f25-m17"
    ),
    "model name : Intel(R) Xeon(R) CPU E5-2690 v4 @ 2.60GHz\ncpu family : 6\nmodel : 79\n": (
        "intel-xeon-e5-2690-v4-f6-m79"
    ),
    "CPU implementer\t: 0x41\nCPU part\t: 0xd0c\n": "arm-41-d0c",
}


@pytest.mark.parametrize("text", CPUINFO)
def test_processors_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert host_chip(tmp_path / "cpuinfo") == CPUINFO[text]


def test_a_system_that_does_not_tell_its_processor(tmp_path: Path) -> None:
    assert host_chip(tmp_path / "none") in ("x86-64", "x86_64", "aarch64")


def test_the_hash_of_a_kernels_sources() -> None:
    generic = rule_of(replace(SPEC, activation_dtype="float32"), V4)
    assert source_hash(RULE) == source_hash(RULE)
    assert source_hash(RULE) != source_hash(generic)
    assert len(source_hash(RULE)) == 16


@pytest.mark.parametrize(
    ("added", "counts"),
    [
        ("\n# said\n", False),
        ('\n"""Said\nof x.\n"""\n', False),
        ("x = 1\n", True),
        ('x = """a\nb"""\n', True),
    ],
)
def test_what_is_said_does_not_count_for_the_hash(
    added: str, counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, read = source_hash(RULE), key._source
    monkeypatch.setattr(
        key, "_source", lambda m: read(m) + (added if m.endswith("schedules.spec") else "")
    )
    key._module_hash.cache_clear()
    try:
        assert (source_hash(RULE) != before) == counts
    finally:
        key._module_hash.cache_clear()


def test_the_lowering_counts_for_the_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = {name: rule_of(sparse(t), t) for name in ("x86-64-v4", "cuda:sm_90")
             for t in [parse_target(name)]}  # fmt: skip
    before = {name: source_hash(rule) for name, rule in rules.items()}
    read = key._source

    def changed(module: str) -> str:
        return read(module) + ("x = 1\n" if module.endswith("schedules.cuda.lowering") else "")

    monkeypatch.setattr(key, "_source", changed)
    key._module_hash.cache_clear()
    try:
        after = {name: source_hash(rule) for name, rule in rules.items()}
    finally:
        key._module_hash.cache_clear()
    assert [before[name] != after[name] for name in rules] == [False, True]
