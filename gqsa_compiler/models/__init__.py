"""Decoder definitions, one file per architecture; `registry` lists what is supported."""
