"""Adapters that PEFT itself has written, and what it computes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gqsa_compiler import compile as gqsa_compile
from gqsa_compiler import runtime
from gqsa_compiler.frontends.resolve import resolve
from gqsa_compiler.frontends.torch_model import load_checkpoint_dense
from tests.lora.test_compiled import OPTIONS, TOKENS, error
from tests.tiny_checkpoints import make_checkpoint
from tests.tiny_models import make_tiny

pytestmark = pytest.mark.slow
peft: Any = pytest.importorskip("peft", reason="PEFT is not installed (pip install peft)")

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "all": {
        "r": 4,
        "lora_alpha": 12,
        "target_modules": "all-linear",
        "use_rslora": True,
        "rank_pattern": {"v_proj": 6, "model.layers.1.mlp.down_proj": 2},
        "alpha_pattern": {"gate_proj": 5, r"^model\.layers\.0\.self_attn\.k_proj": 2},
    },
}


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_logits_are_pefts(family: str, tmp_path: Path) -> None:
    """OPT has layers with biases, and an activation that is fused into one."""
    dense = make_tiny(family, tmp_path / "dense", gain=1.0, num_hidden_layers=2)
    checkpoint = make_checkpoint(dense, tmp_path / "checkpoint")
    expected = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **config)
        model = peft.get_peft_model(load_checkpoint_dense(resolve(str(checkpoint))), config)
        model.save_pretrained(tmp_path / name)
        with torch.inference_mode():
            expected[name] = model.eval()(torch.tensor(TOKENS)[None]).logits[0].numpy()
    adapters = {name: tmp_path / name for name in CONFIGS}
    output = tmp_path / "artefact"
    gqsa_compile(str(checkpoint), output, adapters=adapters, **OPTIONS)
    for name in CONFIGS:
        with runtime.load(output, adapter=name) as adapted:
            scored = np.concatenate([block.copy() for block in adapted.score(TOKENS)])
        assert error(scored, expected[name]) < 2e-3  # its matrices are rounded to halves
