"""Kernels: each schedule rule is a kernel together with its weight layout."""
