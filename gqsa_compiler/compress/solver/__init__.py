"""One-shot compression: which groups to drop, and how the rest makes up for it."""
