"""GPTQ, AWQ and compressed-tensors: every layout against packers written one number at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gqsa_compiler.checkpoint import to_dense
from gqsa_compiler.errors import ModelError
from gqsa_compiler.frontends.quantised.awq import AWQFormat
from gqsa_compiler.frontends.quantised.bitmask import BitmaskTensors
from gqsa_compiler.frontends.quantised.codes import Misfit
from gqsa_compiler.frontends.quantised.compressed_tensors import (
    IntegerFormat,
    PackedFormat,
    weight_bits,
)
from gqsa_compiler.frontends.quantised.gptq import GPTQFormat, GPTQSettings
from gqsa_compiler.frontends.quantised.layer_format import LayerFormat
from gqsa_compiler.frontends.quantised.marlin24 import Marlin24Format
from gqsa_compiler.frontends.quantised.promised import Grouping, Promised, promised
from tests.frontends.quantised.packers import (
    Arrays,
    Matrix,
    MemoryTensors,
    make_two_four,
    pack_awq,
    pack_bitmask,
    pack_compressed,
    pack_gptq,
    pack_marlin24,
    random_matrix,
    separate_words,
    stream_words,
)

SAID = {"bits": 4, "group_size": 32, "desc_act": False}


def stored(parts: Arrays) -> MemoryTensors:
    return MemoryTensors({f"p.{part}": array for part, array in parts.items()})


def gptq(parts: Arrays, **fields: Any) -> GPTQFormat:
    return GPTQFormat(stored(parts), "model", GPTQSettings.read({**SAID, **fields}, "model"))


def packed(parts: Arrays, *bits: int) -> PackedFormat:
    return PackedFormat(stored(parts), "model", frozenset(bits))


def check(found: LayerFormat, m: Matrix) -> None:
    """The one layer of a format is the matrix, and its scheme is known without its codes."""
    assert found.layers == ("p",)
    assert found.shape("p") == m.codes.shape
    layer = found.matrix("p").layer("p", "model")
    np.testing.assert_array_equal(to_dense(layer), m.dense)
    scheme = found.scheme("p")
    assert (scheme.bits, scheme.group_size) == (layer.bits, layer.group_size)
    assert scheme.symmetric == layer.symmetric


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("g_idx", [True, False])
def test_gptq(bits: int, version: int, g_idx: bool) -> None:
    m = random_matrix(32, 96, bits=bits, low=2 - version)
    layout = {1: "gptq", 2: "gptq_v2"}[version]
    check(gptq(pack_gptq(m, version=version, g_idx=g_idx), bits=bits, checkpoint_format=layout), m)


def test_gptq_with_one_group_a_row() -> None:
    m = random_matrix(32, 96, group=96, low=1)
    check(gptq(pack_gptq(m), group_size=-1), m)
    with pytest.raises(ModelError, match="has 1 groups in 96 columns, but the settings say 32"):
        gptq(pack_gptq(m)).shape("p")


def test_gptq_with_a_last_group_that_is_shorter() -> None:
    m = random_matrix(32, 160, group=64, low=1)
    for g_idx in (True, False):
        check(gptq(pack_gptq(m, g_idx=g_idx), group_size=64), m)
    found = gptq(pack_gptq(m), group_size=64, dynamic={"+:p": {"group_size": 64}})
    with pytest.raises(ModelError, match="has 3 groups in 160 columns of no known size"):
        found.scheme("p")
    # 40 columns would divide, too, but they are not what the settings say.
    m = random_matrix(32, 96, group=40, low=1)
    check(gptq(pack_gptq(m), group_size=40), m)


def test_gptq_static_groups_in_any_order() -> None:
    m = random_matrix(32, 96, low=1)
    order = np.array([1, 2, 0]).repeat(32)
    moved = Matrix(m.codes, m.scales, m.zeros, m.bits, order)
    check(gptq(pack_gptq(moved), desc_act=True), moved)
    check(gptq(pack_gptq(m), desc_act=True), m)


def test_gptq_activation_order() -> None:
    m = random_matrix(32, 96, low=1)
    order = np.random.default_rng(0).permutation(m.columns)
    moved = Matrix(m.codes, m.scales, m.zeros, m.bits, order)
    found = gptq(pack_gptq(moved), desc_act=True)
    with pytest.raises(Misfit, match=r"scattered \(activation order, desc_act\)"):
        found.scheme("p")
    np.testing.assert_array_equal(found.matrix("p").dense(), moved.dense)
    with pytest.raises(ModelError, match="the settings do not say desc_act"):
        gptq(pack_gptq(moved)).scheme("p")
    parts = pack_gptq(m)
    parts["g_idx"] = parts["g_idx"] + 1
    with pytest.raises(ModelError, match="has a g_idx outside its 3 groups"):
        gptq(parts, desc_act=True).scheme("p")


def test_gptq_zero_points_that_wrap() -> None:
    """Zero minus one of zero: 15 in a nibble of its own, or a borrow from the next one."""
    m = random_matrix(32, 96)
    m.zeros[3, 1] = 0
    with pytest.raises(ModelError, match="stores the zero point 15 in the form 'zero minus one'"):
        gptq(pack_gptq(m)).scheme("p")
    borrowed = pack_gptq(m, version=2)
    words = borrowed["qzeros"].astype(np.int64) - 0x11111111
    borrowed["qzeros"] = (words & 0xFFFFFFFF).astype(np.uint32).view(np.int32)
    check(gptq(borrowed, meta={"quantizer": ["gptqmodel:2.0.0"]}), m)
    three = random_matrix(32, 96, bits=3)
    three.zeros[0, 0] = 0
    check(gptq(pack_gptq(three), bits=3, meta={"quantizer": "gptqmodel:7.0"}), three)


def test_gptq_layers_of_several_widths() -> None:
    m = random_matrix(32, 96, bits=8, group=16, low=1)
    with pytest.raises(ModelError, match="has codes of 8 bits, but the settings say 4"):
        gptq(pack_gptq(m)).shape("p")
    check(gptq(pack_gptq(m), dynamic={"+:p": {"bits": 8}}), m)
    with pytest.raises(ModelError, match="has no g_idx, and the settings do not tell its bits"):
        gptq(pack_gptq(m, g_idx=False), dynamic={"+:p": {"bits": 8}}).shape("p")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"checkpoint_format": "marlin"}, "packed for 'marlin' kernels"),
        ({"is_marlin_format": True}, "packed for 'marlin' kernels"),
        ({"format": "bitblas"}, "packed for 'bitblas' kernels"),
        ({"rotation": "hadamard"}, r"rotated weights \('hadamard'\)"),
        ({"bits": "4"}, "the GPTQ setting bits is '4', not a number"),
        ({"group_size": True}, "the GPTQ setting group_size is True"),
    ],
)
def test_gptq_settings(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        GPTQSettings.read({**SAID, **fields}, "model")


@pytest.mark.parametrize(
    ("part", "array", "message"),
    [
        ("qweight", np.zeros((12, 32), np.float32), r"qweight is F32 \[12, 32\]"),
        ("qweight", np.zeros(12, np.int32), r"qweight is I32 \[12\]"),
        ("qweight", np.zeros((11, 32), np.int32), "sizes that do not go together"),
        ("qzeros", np.zeros((3, 3), np.int32), "sizes that do not go together"),
        ("scales", np.zeros((3, 31), np.float16), "sizes that do not go together"),
        ("scales", np.zeros((0, 32), np.float16), r"scales is F16 \[0, 32\]"),
        ("qzeros", None, "lacks the tensor 'p.qzeros' of a GPTQ layer"),
    ],
)
def test_gptq_tensors_that_are_wrong(
    part: str, array: npt.NDArray[Any] | None, message: str
) -> None:
    parts = pack_gptq(random_matrix(32, 96, low=1))
    if array is None:
        del parts[part]
    else:
        parts[part] = array
    with pytest.raises(ModelError, match=message):
        gptq(parts).shape("p")


@pytest.mark.parametrize("group", [32, 96])
def test_awq(group: int) -> None:
    m = random_matrix(24, 96, group=group)
    check(AWQFormat(stored(pack_awq(m)), "model", group), m)
    wrong = pack_awq(m)
    wrong["qzeros"] = wrong["qzeros"][:, :-1]
    with pytest.raises(ModelError, match="sizes that do not go together"):
        AWQFormat(stored(wrong), "model", None).shape("p")
    with pytest.raises(ModelError, match="groups in 96 columns, but the settings say 48"):
        AWQFormat(stored(pack_awq(m)), "model", 48).shape("p")
    if group == 96:
        check(AWQFormat(stored(pack_awq(m)), "model", -1), m)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("words", [stream_words, separate_words])
def test_packed(
    bits: int, symmetric: bool, words: Callable[[npt.NDArray[Any], int], npt.NDArray[np.int32]]
) -> None:
    m = random_matrix(20, 96, bits=bits, symmetric=symmetric)
    parts = pack_compressed(m, symmetric=symmetric, words=words)
    check(packed(parts, bits), m)
    check(packed(parts), m)  # the widths tell, too


def test_packed_with_one_scale() -> None:
    m = random_matrix(20, 96, group=96, symmetric=True)
    m.scales[:] = m.scales[0]
    for scale in (m.scales[:1, 0], m.scales[0, 0].reshape(()), m.scales[:1]):
        parts = pack_compressed(m, symmetric=True)
        parts["weight_scale"] = scale
        check(packed(parts, 4), m)


def test_packed_activation_order() -> None:
    m = random_matrix(20, 96, symmetric=True)
    parts = pack_compressed(m, symmetric=True)
    parts["weight_g_idx"] = np.full(96, -1, np.int32)
    check(packed(parts, 4), m)
    order = np.random.default_rng(0).permutation(m.columns)
    parts["weight_g_idx"] = order.astype(np.int32)
    with pytest.raises(Misfit, match="scattered"):
        packed(parts, 4).scheme("p")
    parts["weight_g_idx"] = order.astype(np.int32) + 1
    with pytest.raises(ModelError, match="weight_g_idx that does not fit"):
        packed(parts, 4).scheme("p")


@pytest.mark.parametrize(
    ("part", "array", "message"),
    [
        ("weight_shape", np.array([20, 96, 1]), "weight_shape that is not two numbers"),
        ("weight_shape", np.array([21, 96]), "sizes that do not go together"),
        ("weight_shape", np.array([20, 0]), "sizes that do not go together"),
        ("weight_shape", np.array([20, 2**40]), "sizes that do not go together"),
        ("weight_shape", np.array([20, 192]), r"into 12 words, which does not tell its bits \(4\)"),
        ("weight_scale", np.ones((19, 3), np.float16), "sizes that do not go together"),
        ("weight_scale", np.ones(3, np.float16), r"weight_scale of shape \[3\]"),
        ("weight_zero_point", np.ones((3, 2), np.int32), "weight_zero_point of another size"),
    ],
)
def test_packed_tensors_that_are_wrong(part: str, array: npt.NDArray[Any], message: str) -> None:
    parts = pack_compressed(random_matrix(20, 96))
    parts[part] = array
    with pytest.raises(ModelError, match=message):
        packed(parts, 4).scheme("p")


def test_packed_bits_that_do_not_fit() -> None:
    three = random_matrix(20, 40, bits=3, group=40)
    with pytest.raises(ModelError, match="packs 40 codes into 4 words, which does not tell"):
        packed(pack_compressed(three), 3).scheme("p")  # 10 to a word, or across words
    m = random_matrix(20, 96, bits=5)
    with pytest.raises(ModelError, match="has codes of 5 bits; a GQSA checkpoint has 2, 3, 4, 8"):
        packed(pack_compressed(m), 5).scheme("p")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers(bits: int, symmetric: bool) -> None:
    m = random_matrix(20, 96, bits=bits, group=96, symmetric=symmetric)
    half = 1 << (bits - 1)
    parts: Arrays = {"weight": (m.codes - half).astype(np.int8), "weight_scale": m.scales}
    if not symmetric:
        parts["weight_zero_point"] = (m.zeros - half).astype(np.int8)
    check(IntegerFormat(stored(parts), "model", frozenset({bits})), m)
    if bits == 8:
        check(IntegerFormat(stored(parts), "model", frozenset()), m)
        with pytest.raises(ModelError, match="has numbers outside 4 bits in its weight"):
            IntegerFormat(stored(parts), "model", frozenset({4})).matrix("p")
    parts["weight_zero_point"] = np.zeros((20, 2), np.int8)
    with pytest.raises(ModelError, match="weight_zero_point of another size"):
        IntegerFormat(stored(parts), "model", frozenset({bits})).scheme("p")


def test_bitmask_of_codes_and_of_floats() -> None:
    m = make_two_four(random_matrix(20, 96, bits=8, group=96, symmetric=True))
    signed = (m.codes - 128).astype(np.int8)
    mask = np.zeros(signed.shape, bool)
    for row, quad in np.ndindex(20, 24):
        part = signed[row, 4 * quad : 4 * quad + 4]
        mask[row, 4 * quad + np.argsort(-np.abs(part.astype(int)), kind="stable")[:2]] = True
    parts = {**pack_bitmask(signed, mask), "weight_scale": m.scales}
    shown = BitmaskTensors(stored(parts), "model")
    assert set(shown.names) == {"p.weight", "p.weight_scale"}
    check(IntegerFormat(shown, "model", frozenset({8})), m)

    rng = np.random.default_rng(0)
    dense = rng.standard_normal((3, 12)).astype(np.float32) * (rng.random((3, 12)) < 0.4)
    shown = BitmaskTensors(stored(pack_bitmask(dense, dense != 0)), "model")
    assert shown.shape_dtype("p.weight") == ((3, 12), "F32")
    np.testing.assert_array_equal(shown.read("p.weight"), dense)


def test_bitmasks_that_are_wrong() -> None:
    dense = np.eye(4, 16, dtype=np.float32)
    good = pack_bitmask(dense, dense != 0)
    for part, array, message in (
        ("compressed", None, "lacks the tensor 'p.compressed'"),
        ("shape", np.array([4, 16, 1]), "p.shape is not two numbers"),
        ("shape", np.array([4.0, 16.0], np.float32), "p.shape is not two numbers"),
        ("shape", np.array([4, 24]), "does not fit a matrix of 4 x 24"),
        ("bitmask", np.zeros((4, 2), np.int8), "p.bitmask is I8"),
    ):
        parts = {**good}
        if array is None:
            del parts[part]
        else:
            parts[part] = array
        with pytest.raises(ModelError, match=message):
            BitmaskTensors(stored(parts), "model")
    shown = BitmaskTensors(stored({**good, "compressed": np.ones(5, np.float32)}), "model")
    with pytest.raises(ModelError, match=r"bitmask marks 4 weights, but p\.compressed has 5"):
        shown.read("p.weight")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("k", "group"), [(128, 128), (256, 128), (512, 128), (512, 512)])
def test_marlin24(bits: int, k: int, group: int) -> None:
    m = make_two_four(random_matrix(64, k, bits=bits, group=group, symmetric=True))
    grouped = k > group and k // 2 > 128
    found = Marlin24Format(stored(pack_marlin24(m, grouped=grouped)), "model")
    check(found, m)


def test_marlin24_tensors_that_are_wrong() -> None:
    m = make_two_four(random_matrix(64, 128, group=128, symmetric=True))
    parts = pack_marlin24(m, grouped=False)
    for part, array in (
        ("meta", parts["meta"][:, :-1]),
        ("scale_packed", parts["scale_packed"][:, :32]),
        ("weight_packed", parts["weight_packed"][:, :100]),
        ("scale_packed", parts["scale_packed"].repeat(3, axis=0)),
    ):
        with pytest.raises(ModelError, match="sizes that do not go together"):
            Marlin24Format(stored({**parts, part: array}), "model").shape("p")
    parts["meta"] = np.zeros_like(parts["meta"])
    with pytest.raises(ModelError, match="names one position twice"):
        Marlin24Format(stored(parts), "model").codes("p")


def test_zero_points_that_belie_the_settings() -> None:
    """The usual mistake: version 1 marked as version 2, or the other way round."""
    m = random_matrix(16, 64, symmetric=True)
    for version, said in ((1, "gptq"), (2, "gptq_v2")):
        parts = pack_gptq(m, version=version)
        check(gptq(parts, sym=True, checkpoint_format=said), m)
        other = {"gptq": "gptq_v2", "gptq_v2": "gptq"}[said]
        with pytest.raises(ModelError, match="zero points other than 8, although the settings say"):
            gptq(parts, sym=True, checkpoint_format=other).matrix("p")


@pytest.mark.parametrize("layout", [{}, [1], 5])
def test_a_format_that_is_no_name(layout: Any) -> None:
    with pytest.raises(ModelError, match="in the format"):
        weight_bits({"format": layout}, "model")
    with pytest.raises(ModelError, match="with layers in the format"):
        weight_bits({"config_groups": {"g": {"format": layout}}}, "model")


def test_an_order_that_the_settings_promise_is_not_made_up() -> None:
    m = random_matrix(16, 64)
    parts = pack_gptq(m, version=2, g_idx=False)
    with pytest.raises(ModelError, match="lacks its g_idx, although the settings say desc_act"):
        gptq(parts, desc_act=True, checkpoint_format="gptq_v2").matrix("p")
    ordered = PackedFormat(
        stored(pack_compressed(m)), "model", frozenset({4}), Promised(order=True)
    )
    with pytest.raises(ModelError, match="lacks its weight_g_idx, although the settings say"):
        ordered.matrix("p")


def test_zero_points_that_the_settings_promise_are_not_made_up() -> None:
    m = random_matrix(16, 64)
    parts = pack_compressed(m, symmetric=True)
    found = PackedFormat(stored(parts), "model", frozenset({4}), Promised(zero_points=True))
    with pytest.raises(ModelError, match="lacks its weight_zero_point, although the settings say"):
        found.matrix("p")


def groups_of(*weights: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with a group of layers for each."""
    return {"config_groups": {f"group_{i}": {"weights": w} for i, w in enumerate(weights)}}


def test_what_the_settings_promise() -> None:
    def found(*weights: dict[str, Any]) -> Promised:
        return promised(groups_of(*weights), "model")

    assert promised({}, "model") == Promised()
    assert found({"symmetric": True, "actorder": None}) == Promised()
    assert found({"symmetric": False, "actorder": "weight"}) == Promised(zero_points=True)
    assert found({"actorder": "group"}) == Promised(order=True)
    wide, row, one = Grouping("group", 64), Grouping("channel"), Grouping("tensor")
    assert found({"group_size": 64}).groupings == (wide,)
    assert found({"group_size": -1}, {"strategy": "tensor"}).groupings == (row, one)
    assert found({"strategy": "group", "group_size": 64}, {"strategy": "channel"}) == Promised(
        groupings=(wide, row)
    )
    assert found({"group_size": 64}, {}).groupings == ()  # nothing is known of the others


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"group_size": 0}, "model: group_0 of its quantization_config has group_size 0"),
        ({"group_size": True}, "group_size True"),
        ({"group_size": "32"}, "group_size '32'"),
        ({"strategy": "block"}, "weights of the strategy 'block'; gqsa reads group, channel"),
        ({"strategy": ["group"]}, r"weights of the strategy \['group'\]"),
    ],
)
def test_groups_that_are_refused(weights: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        promised(groups_of(weights), "model")


def test_scales_are_those_that_the_settings_promise() -> None:
    groups, whole = random_matrix(20, 96), random_matrix(20, 96, group=96, symmetric=True)
    parts, channel = pack_compressed(groups), pack_compressed(whole, symmetric=True)
    single = {**channel, "weight_scale": whole.scales[:1]}
    whole.scales[:] = whole.scales[0]

    def found(parts: Arrays, *said: Grouping) -> PackedFormat:
        return PackedFormat(stored(parts), "model", frozenset({4}), Promised(groupings=said))

    right, wrong = Grouping("group", 32), Grouping("group", 40)
    row, one = Grouping("channel"), Grouping("tensor")
    check(found(parts, right), groups)
    check(found(parts, row, right), groups)  # whichever group of layers it belongs to
    check(found(single, one), whole)
    assert found(parts, wrong).shape("p") == (20, 96)  # the last one shorter
    for given, said, message in (
        (parts, Grouping("group", 64), r"'p' has scales of shape \[20, 3\], but its 20 x 96 weigh"),
        (parts, Grouping("group", 64), r"weights have \[20, 2\] \(group_size 64\) by the settings"),
        (parts, row, r"\[20, 1\] \(strategy channel\)"),
        (channel, one, r"scales of shape \[20, 1\], but .* \[1, 1\] \(strategy tensor\)"),
        (channel, right, r"\[20, 3\] \(group_size 32\)"),
    ):
        with pytest.raises(ModelError, match=message):
            found(given, said).scheme("p")
    m = make_two_four(random_matrix(64, 256, group=128, symmetric=True))
    tiled = stored(pack_marlin24(m, grouped=False))
    check(Marlin24Format(tiled, "model", Promised(groupings=(Grouping("group", 128),))), m)
    with pytest.raises(ModelError, match=r"scales of shape \[64, 2\], but .* \[64, 1\]"):
        Marlin24Format(tiled, "model", Promised(groupings=(row,))).shape("p")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scales_that_are_no_numbers_are_damage(value: float) -> None:
    m = random_matrix(16, 64)
    parts = pack_gptq(m, version=2)
    parts["scales"][:] = value
    with pytest.raises(ModelError, match="scales that are not finite") as caught:
        gptq(parts, checkpoint_format="gptq_v2").matrix("p").layer("p", "model")
    assert not isinstance(caught.value, Misfit)
