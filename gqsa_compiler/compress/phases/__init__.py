"""What a compression does, in order: plan, blocks, whole model, write."""
