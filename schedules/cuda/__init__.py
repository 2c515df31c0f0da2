"""Kernels for NVIDIA GPUs of compute capability 8.0 to 9.0: sparse INT4 linear layers."""
