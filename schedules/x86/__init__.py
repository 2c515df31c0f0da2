"""Kernels for x86-64 with AVX2 or AVX-512: 16-bit integer dot products."""
