"""LoRA adapters, as PEFT saves them, for the low-rank paths of a compiled model."""
