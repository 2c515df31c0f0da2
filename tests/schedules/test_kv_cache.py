"""The paged KV cache with our kernels, through TVM's real runtime object, against numpy."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gqsa_compiler._tvm import Target, relax, tirx, tvm
from gqsa_compiler.errors import CompileError
from gqsa_compiler.schedules.kv_cache import KVCacheSpec, attach_kv_cache
from gqsa_compiler.targets import parse_target
from tests.schedules.kv_cache_model import Pair, attention, attention_module, machine

MIXED = KVCacheSpec(2, 9, 3, 64, ("mha", "mha_sliding"), 7)
HALF = replace(MIXED, dtype="float16")
CASES = [
    pytest.param(MIXED, 16, id="gqa3-d64"),
    pytest.param(KVCacheSpec(2, 4, 4, 16, ("mha_sliding",) * 2, 20), 8, id="mha-d16-all-sliding"),
    pytest.param(KVCacheSpec(1, 8, 1, 256, ("mha",), page_size=32), 16, id="mqa-d256"),
    # As floats what is below as halves, which takes more code.
    pytest.param(
        KVCacheSpec(2, 6, 2, 80, ("mha_sliding", "mha"), 3, page_size=8),
        4,
        id="gqa3-d80-sse",
        marks=pytest.mark.slow,
    ),
    pytest.param(KVCacheSpec(1, 14, 2, 24, ("mha",)), 8, id="gqa7-d24", marks=pytest.mark.slow),
    pytest.param(HALF, 16, id="half-gqa3-d64"),
    pytest.param(replace(HALF, head_dim=80, page_size=8), 4, id="half-d80-sse"),
    pytest.param(KVCacheSpec(1, 14, 2, 24, ("mha",), dtype="float16"), 8, id="half-gqa7-d24"),
]
BOUND = 5e-6  # float32 sums of a few hundred terms of size 1

FORWARD = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from([1, 1, 1, 2, 5, 8, 17, 31, 40])),
    min_size=1,
    max_size=4,
    unique_by=lambda pair: pair[0],
)
STEP = st.one_of(
    st.tuples(st.just("forward"), FORWARD),
    st.tuples(st.just("forward"), FORWARD),
    st.tuples(st.just("decode"), st.integers(1, 5)),
    st.tuples(st.just("fork"), st.tuples(st.integers(0, 3), st.floats(0, 1))),
    st.tuples(st.just("pop"), st.tuples(st.integers(0, 3), st.floats(0, 1))),
    st.tuples(st.just("remove"), st.integers(0, 3)),
)


def _step(pair: Pair, name: str, what: Any) -> float:
    """Do one random step as far as it makes sense; return the error."""
    known = pair.sequences
    if name == "forward":
        for number, _ in what:
            if number not in known:
                pair.add(number)
        lengths = [length for _, length in what]
        while sum(lengths) > pair.chunk:
            lengths[int(np.argmax(lengths))] //= 2
        return pair.forward([number for number, _ in what], lengths)
    if name == "decode":
        numbers = sorted(number for number, tokens in known.items() if len(tokens))
        errors = [pair.forward(numbers, [1] * len(numbers)) for _ in range(what) if numbers]
        return float(np.max([0.0, *errors]))
    if name == "remove":
        if what in known:
            pair.remove(what)
        return 0.0
    number, share = what
    length = len(known.get(number, ()))
    if length and name == "pop":
        pair.pop(number, round(share * (length - 1)))
    free = next((n for n in range(pair.max_batch) if n not in known), None)
    if length and name == "fork" and free is not None:
        pair.fork(number, free, max(1, round(share * length)))
    return 0.0


@pytest.mark.parametrize(("spec", "lanes"), CASES)
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(STEP, min_size=1, max_size=8))
def test_any_history_agrees_with_numpy(spec: KVCacheSpec, lanes: int, steps: list[Any]) -> None:
    pair = Pair(spec, machine(spec, lanes))
    for name, what in steps:
        assert _step(pair, name, what) < BOUND, (name, what)


@pytest.mark.parametrize(("spec", "lanes"), [CASES[i].values for i in (0, 1, 5)])
def test_sliding_window_over_chunk_boundaries(spec: KVCacheSpec, lanes: int) -> None:
    # Every chunk length around the window, then every position around a page's end.
    pair = Pair(spec, machine(spec, lanes))
    pair.add(0)
    window = spec.sliding_window or 0
    for length in (1, window - 1, window, window + 1, 2 * window, 1, 1, 3, 40):
        assert pair.forward([0], [length]) < BOUND
    for _ in range(20):
        assert pair.forward([0], [1]) < BOUND


@pytest.mark.parametrize("spec", [MIXED, HALF], ids=["float32", "float16"])
def test_forked_sequences_share_their_window(spec: KVCacheSpec) -> None:
    # The window of a young fork reaches back into the block that it shares with its parent.
    pair = Pair(spec, machine(spec, 16))
    pair.add(0)
    assert pair.forward([0], [32]) < BOUND
    pair.fork(0, 1, 32)
    pair.fork(0, 2, 17)
    for lengths in ([1, 1, 1], [1, 1, 1], [5, 1, 20], [1, 1, 1]):
        assert pair.forward([0, 1, 2], lengths) < BOUND
    pair.fork(1, 3, 34)  # three blocks deep: more than the runtime keeps apart
    assert pair.forward([3, 0, 1, 2], [1, 1, 1, 1]) < BOUND
    assert pair.forward([3, 1], [9, 2]) < BOUND
    pair.remove(0)
    assert pair.forward([1, 2, 3], [1, 1, 1]) < BOUND


def test_large_scores_do_not_overflow() -> None:
    pair = Pair(MIXED, machine(MIXED, 16), scale=30.0)
    pair.add(0)
    for length in (64, 1, 33):
        # Scores of size 10000 are rounded to 1e-3, weights hence by 1e-3, outputs are of size 30.
        assert pair.forward([0], [length]) < 5e-2


def test_a_half_cache_errs_by_its_rounding_only() -> None:
    # Of keys and values as they came: the weights are off by twice a score's rounding, the values
    # by their own.
    half, epsilon = Pair(HALF, machine(HALF, 16)), 2.0**-11
    half.add(0)
    for length in (40, 1, 30, 1):
        assert half.forward([0], [length]) < BOUND
    rng = np.random.default_rng(0)  # as the pair draws
    tokens = [rng.standard_normal((n, 15, 64)).astype(np.float32) for n in (40, 1, 30, 1)]
    exact, kept = np.concatenate(tokens), half.sequences[0]
    queries, keys = np.abs(exact[:, :9]), np.abs(exact[:, 9:12]).repeat(3, axis=1)
    score = np.einsum("ihd,jhd->hij", queries, keys).max() * 64**-0.5
    bound = np.abs(exact[:, 12:]).max() * (np.expm1(2 * epsilon * score) + epsilon)
    error = np.abs(attention(HALF, exact, 72, None) - attention(HALF, kept, 72, None)).max()
    assert 1e-5 < error < bound


def test_a_half_cache_saturates() -> None:
    pair = Pair(HALF, machine(HALF, 16), scale=1e5)
    pair.add(0)
    for length in (20, 1):
        # One key takes all the weight and values are up to 65504, to which errors are relative.
        assert pair.forward([0], [length]) < 1e-2
    assert np.abs(pair.sequences[0][:, 9:]).max() == np.finfo(np.float16).max


def test_pages_are_given_back() -> None:
    pair = Pair(MIXED, machine(MIXED, 16), max_tokens=64)
    free = pair.call("attention_kv_cache_get_num_available_pages")
    for _ in range(3):
        pair.add(0)
        assert pair.forward([0], [60]) < BOUND
        pair.remove(0)
    assert pair.call("attention_kv_cache_get_num_available_pages") == free


@pytest.mark.parametrize("spec", [MIXED, HALF], ids=["float32", "float16"])
def test_debug_get_kv_reads_what_was_written(spec: KVCacheSpec) -> None:
    pair = Pair(spec, machine(spec, 16))
    pair.add(5)
    pair.forward([5], [30])
    pair.forward([5], [1])
    k = tvm.runtime.empty((2, 31, 3, 64), "float32")
    v = tvm.runtime.empty((2, 31, 3, 64), "float32")
    pair.call("attention_kv_cache_debug_get_kv", 5, 0, 31, k, v)
    for layer in range(2):
        np.testing.assert_array_equal(k.numpy()[layer], pair.sequences[5][:, 9:12])
        np.testing.assert_array_equal(v.numpy()[layer], pair.sequences[5][:, 12:])


@cache
def _attached() -> Any:
    return attach_kv_cache(attention_module(MIXED), MIXED, parse_target("x86-64-v3"))


def test_sliding_layers_are_marked_by_the_sign_of_the_scale() -> None:
    scales: list[float] = []

    def visit(node: Any) -> None:
        if isinstance(node, relax.Call) and node.op == tvm.ir.Op.get("relax.call_dps_packed"):
            scales.append(float(node.args[1].fields[2].value))

    mod = _attached()
    relax.analysis.well_formed(mod)  # raises
    relax.analysis.post_order_visit(mod["run"], visit)
    assert scales == [0.125, -0.125]


def test_no_kernel_is_left_to_be_scheduled() -> None:
    mod = _attached()
    functions = [f for f in mod.functions.values() if isinstance(f, tirx.PrimFunc)]
    assert len(functions) == 9
    assert all(f.attrs["tirx.is_scheduled"] for f in functions)


@pytest.mark.parametrize("spec", [MIXED, HALF], ids=["float32", "float16"])
def test_compiles_for_arm(spec: KVCacheSpec) -> None:
    target = parse_target("aarch64")
    mod = attach_kv_cache(attention_module(spec), spec, target)
    built = tvm.compile(mod, Target(target.tvm_dict()))
    assembly = built.mod.imports[0].inspect_source("asm")
    assert assembly.count("fmla") > 50
    # No exponential goes to the C library, one lane at a time.
    assert "exp2f" not in assembly
    # Float16 is converted a vector at a time, as it is loaded and stored.
    assert ("fcvtl" in assembly and "fcvtn" in assembly) == (spec.dtype == "float16")
    assert "bl\t__extendhfsf2" not in assembly
    assert "bl\t__truncsfhf2" not in assembly


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attn_kinds": ("mha",)}, "1 attention kinds are given for 2 layers"),
        ({"attn_kinds": ("mha", "mla")}, "Unknown attention kind 'mla'"),
        ({"attn_kinds": ("mha", "mha_sliding")}, "size is not given"),
        ({"dtype": "int8"}, "KV cache of int8 is not supported; use float16 or float32"),
    ],
)
def test_a_wrong_spec_is_refused(fields: dict[str, Any], message: str) -> None:
    given_fields: dict[str, Any] = {"attn_kinds": ("mha", "mha"), **fields}
    with pytest.raises(CompileError, match=message):
        KVCacheSpec(2, 9, 3, 64, **given_fields)


def test_a_module_that_disagrees_is_refused() -> None:
    target = parse_target("x86-64-v3")
    one = KVCacheSpec(1, 9, 3, 64, ("mha",))
    with pytest.raises(CompileError, match="layer 1, but the cache has 1 layers"):
        attach_kv_cache(attention_module(MIXED), one, target)
    with pytest.raises(CompileError, match="already has a function create_kv_cache"):
        attach_kv_cache(_attached(), MIXED, target)
    with pytest.raises(CompileError, match="Layer 1: sm_scale of attention must be positive"):
        attach_kv_cache(tvm.IRModule({"run": _attached()["run"]}), MIXED, target)


def test_bytes_per_token() -> None:
    # SmolLM2-135M: 30 layers, keys and values, 3 heads of 64 float32.
    spec = KVCacheSpec(30, 9, 3, 64, ("mha",) * 30)
    assert spec.bytes_per_token == 30 * 2 * 3 * 64 * 4
    assert replace(spec, dtype="float16").bytes_per_token == 30 * 2 * 3 * 64 * 2
