"""Records of packed groups, which the kernels for x86-64 and 64-bit Arm read."""
