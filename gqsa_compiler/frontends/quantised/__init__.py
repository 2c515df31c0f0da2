"""Checkpoints of other quantisers, taken over code by code: GPTQ, AWQ, compressed-tensors, GGUF."""
