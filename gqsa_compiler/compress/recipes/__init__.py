"""What can be asked for: recipes, presets, recipe files and budgets. Nothing here needs PyTorch."""
