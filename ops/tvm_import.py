"""TVM, imported without torch: tvm_ffi would import that where it is installed, for longer than all else together.

It does so for a conflict of symbols that it saw on Windows alone. Tensors still come and go through DLPack.
"""

import sys
from types import ModuleType
from typing import cast

_hidden = "torch" not in sys.modules
if _hidden:
    sys.modules["torch"] = cast(ModuleType, None)  # what Python takes for "cannot be imported"
try:
    import tvm
finally:
    if _hidden:
        del sys.modules["torch"]

__all__ = ["tvm"]
