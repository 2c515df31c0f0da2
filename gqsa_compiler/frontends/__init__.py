"""Frontends: find a model wherever it is, and import it into one Relax module."""
