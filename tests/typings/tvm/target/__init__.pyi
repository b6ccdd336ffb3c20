# TVM's own annotations do not describe how its objects are used: to the type checker they are Any.
from typing import Any

def __getattr__(name: str) -> Any: ...
