"""Checkpoints: where they lie, and the named tensors in them."""

from llm.weights.hub import resolve
from llm.weights.llama2c import read_llama2c
from llm.weights.packed import pack_all
from llm.weights.quantized import unquantized
from llm.weights.safetensors import checkpoint_files, read_directory, read_file, write_directory, write_file

__all__ = [
    "checkpoint_files",
    "pack_all",
    "read_directory",
    "read_file",
    "read_llama2c",
    "resolve",
    "unquantized",
    "write_directory",
    "write_file",
]
