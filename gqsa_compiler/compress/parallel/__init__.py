"""Several processes that train together: who does what, and how they find each other."""
