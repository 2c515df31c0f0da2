"""Measuring candidates: in a process here, over RPC, or in a bundle on another machine."""
