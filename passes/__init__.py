"""Relax and TIR passes, one a file; `pipeline` lists them in order."""
