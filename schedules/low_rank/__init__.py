"""What a LoRA adapter adds to a linear layer's output: the second half of its low-rank path."""
