"""Kernels for 64-bit Arm: 16-bit activations, multiplied as bytes or as halves."""
