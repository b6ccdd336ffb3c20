"""Limpid's models: load one, call it, change it, generate with it. `llm.load("tiny")` is the embedded one."""

from .adapters import Adapter, load_adapter
from .cache import Cache
from .errors import UserError
from .load import load
from .model import Model
from .models import register
from .nn import Embedding, Linear, Module, RMSNorm
from .sampling import Sampling
from .tokenizer import Tokenizer

__all__ = [
    "Adapter",
    "Cache",
    "Embedding",
    "Linear",
    "Model",
    "Module",
    "RMSNorm",
    "Sampling",
    "Tokenizer",
    "UserError",
    "load",
    "load_adapter",
    "register",
]
