"""Kernels from hand-written source: a language a file, all of one shape (`base.py`)."""
