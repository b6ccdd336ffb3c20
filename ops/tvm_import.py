"""TVM, imported without torch: tvm_ffi would import that where it is installed, for longer than all else together.

It does so for a conflict of symbols that it saw on Windows alone. Tensors still come and go through DLPack.
"""

import sys
from types import ModuleType
from typing import cast

if "torch" in sys.modules:
    import tvm
else:
    sys.modules["torch"] = cast(ModuleType, None)  # what Python takes for "cannot be imported"
    try:
        import tvm
    finally:
        del sys.modules["torch"]

__all__ = ["tvm"]
