"""Reading what nvdisasm prints, and what a processor holds."""

from __future__ import annotations

import cuda_static
import pytest
from cuda_bundle import RULE, target_of
from cuda_static import (
    Line,
    describe,
    disassemble,
    find_nvdisasm,
    kind_of,
    line,
    resident_blocks,
    table,
    walk,
)

from gqsa_compiler.schedules.cuda.arch import ARCHES
from gqsa_compiler.schedules.cuda.config import CudaConfig
from gqsa_compiler.schedules.cuda.nvcc import KernelUse
from gqsa_compiler.schedules.spec import LinearSpec
from tests.schedules.cuda.test_nvcc import needs_nvcc

# Activations are fetched, then weights are walked over, with a loop for the ends of rows in it.
LISTING = """
.text.main_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR6][R2.64] ;
        /*0020*/                   STS.128 [R5], R4 ;
        /*0030*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0040*/                   LDS.128 R8, [R5] ;
        /*0050*/                   IMAD.MOV.U32 R9, RZ, RZ, 0x64006400 ;
        /*0060*/                   LOP3.LUT R10, R4, 0xf000f, R9, 0xea, !PT ;
        /*0070*/                   HFMA2.MMA R11, R10, 1, 1, -R12 ;
        /*0080*/              @!P1 BRA `(.L_x_4) ;
.L_x_3:
        /*0090*/                   SHFL.BFLY PT, R7, R13, 0x10, 0x1f ;
        /*00a0*/               @P0 BRA `(.L_x_3) ;
.L_x_4:
        /*00b0*/                   IMAD.WIDE.U32 R14, R15, 0x10, R16 ;
        /*00c0*/                   LDG.E.128.CONSTANT R4, desc[UR6][R14.64] ;
        /*00d0*/                   FFMA R29, R5, R6, R4 ;
        /*00e0*/               @P2 BRA `(.L_x_2) ;
        /*00f0*/                   EXIT ;
"""


def test_the_walk_is_found_and_counted() -> None:
    assert walk(LISTING) == {
        "shared loads": 1,
        "constants": 1,
        "bits": 1,
        "half": 1,
        "branches": 2,
        "integer": 1,
        "global loads": 1,
        "float": 1,
    }
    with pytest.raises(ValueError, match="no loop reads weights"):
        walk(LISTING.replace("LDS.128", "LDS"))


def test_kinds() -> None:
    assert kind_of("HADD2.F32") == "half"
    assert kind_of("IMAD.MOV.U32") == "constants"
    assert kind_of("IMAD.WIDE") == "integer"
    assert kind_of("SHFL.BFLY") == "other"


def test_what_a_processor_holds() -> None:
    assert resident_blocks("sm_90", 512, 64, 20_000) == 2, "registers: 32 warps of 64"
    assert resident_blocks("sm_90", 512, 65, 20_000) == 1, "they are given out by 8 a thread"
    assert resident_blocks("sm_86", 512, 40, 20_000) == 3, "threads"
    assert resident_blocks("sm_86", 256, 40, 49_000) == 2, "shared memory, and 1 kB a block"
    assert set(cuda_static.GPUS) == set(ARCHES)


def test_a_line_of_the_table() -> None:
    spec = LinearSpec(4096, 4096, "bsr", "int4", 16, 1000, activation_dtype="float16")
    use = KernelUse("main_kernel", 64, 0, 0)
    config = CudaConfig(blocks=264, resident=2, depth=2)
    line = describe(spec, config, ARCHES["sm_90"], 12_000, 100, use, LISTING)
    assert isinstance(line, Line)
    assert line.bits_a_group == 96
    assert line.instructions == 9 / 2, "a round of the loop is two tiles"
    assert line.issue_us == pytest.approx(100 * 4.5 / (132 * 4 * 1750))
    assert line.traffic_us == pytest.approx(12_000 / 3e6)
    rows = table([line]).splitlines()
    assert len(rows) == 3
    assert rows[0].count("|") == rows[1].count("|") == rows[2].count("|")
    assert "| 4096x4096 | sm_90 | float16 | w16r2d2s16 | 96.0 | 64 |" in rows[2]


def test_without_nvdisasm_it_says_what_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_static, "find_nvdisasm", lambda: None)
    with pytest.raises(SystemExit, match="nvidia-cuda-nvdisasm"):
        disassemble(b"")


@needs_nvcc
@pytest.mark.slow
@pytest.mark.skipif(find_nvdisasm() is None, reason="nvdisasm is not installed")
@pytest.mark.parametrize(("activations", "most"), [("float16", 112), ("int16", 90)])
def test_the_walk_stays_short(activations: str, most: int) -> None:
    """What docs/cuda.md says of a tile's instructions, with some room for other versions."""
    spec = LinearSpec(512, 4096, "bsr", "int4", 16, activation_dtype=activations, norm_eps=1e-5)  # type: ignore[arg-type]
    config = RULE.space(spec, target_of("sm_90"))[0]
    made = line(spec, config, ARCHES["sm_90"], 0.5)
    assert made.instructions <= most
    assert (made.spilled_bytes, made.resident) == (0, config.resident)
    assert made.kinds["global loads"] == 4, "codes, columns and zero points, scales, marks"
    assert made.kinds["shared loads"] <= 6
