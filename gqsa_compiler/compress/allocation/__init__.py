"""What each layer costs the model, and what it becomes for a budget."""
