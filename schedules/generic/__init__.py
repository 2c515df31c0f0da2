"""Kernels for every LLVM target: linear layers, attention, RoPE, norms, the KV cache's copies."""
