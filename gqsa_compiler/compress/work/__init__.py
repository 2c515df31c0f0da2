"""What makes a compression resumable and observable: states on disk, and the run log."""
