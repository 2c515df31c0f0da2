"""GPUs by name as targets."""

from __future__ import annotations

import pytest
from tvm.target import Target, list_tags

from gqsa_compiler.artefact import library_name
from gqsa_compiler.errors import UsageError
from gqsa_compiler.gpu_names import GPU_ARCHES, near_names
from gqsa_compiler.targets import SHARED_BYTES, parse_target, parse_targets


def test_names_are_those_of_tvm() -> None:
    """Every tag of TVM's is known whose architecture there are kernels for."""
    for name in list_tags():
        target = Target(name)
        # TVM's sm_90a are instructions of that one architecture, which no kernel of ours has.
        arch = str(target.attrs.get("arch", "")).removesuffix("a")
        if target.kind.name == "cuda" and arch in SHARED_BYTES:
            assert GPU_ARCHES[name] == arch, name
    assert set(GPU_ARCHES.values()) == set(SHARED_BYTES)


def test_a_name_means_its_architecture() -> None:
    target = parse_target("nvidia/nvidia-h100")
    assert (target.kind, target.arch, target.features) == ("cuda", "sm_90", ())
    assert target.tvm_dict() == parse_target("cuda:sm_90").tvm_dict()
    assert parse_target("nvidia/geforce-rtx-4090").arch == "sm_89"
    with pytest.raises(UsageError, match=r"sm_90 and nvidia/nvidia-h100 mean the same code"):
        parse_targets("cuda:sm_90,nvidia/nvidia-h100")


def test_unknown_names_are_told_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"did you mean nvidia/nvidia-h100 or .*one of cuda:sm_80"):
        parse_target("nvidia/h100")
    with pytest.raises(UsageError, match=r"no GPU 'nvidia/GeForce-.* nvidia/geforce-rtx-4090 or"):
        parse_target("nvidia/GeForce-RTX-4099")
    with pytest.raises(UsageError, match=r"kernels are known for; name its architecture, one of"):
        parse_target("nvidia/zzz")
    assert near_names("nvidia/zzz") == ()
    with pytest.raises(UsageError, match=r"or a GPU by its name, such as nvidia/nvidia-h100"):
        parse_target("h100")


def test_files_are_named_without_a_slash() -> None:
    target = parse_target("nvidia/nvidia-a100")
    assert library_name(target, 2) == "model.nvidia-nvidia-a100.so"
    assert library_name(target, 1) == "model.so"
