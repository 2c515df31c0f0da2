"""Training through the quantiser: one block at a time, then the whole model."""
