"""Autotuning: tasks of a model, measurements, search, and the database of what was measured."""
