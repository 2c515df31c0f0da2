"""tvm_ffi, without torch.

tvm_ffi imports torch wherever it is installed, for conversions that the runtime does not use: two
seconds of start-up and 180 MB of memory. So torch is out of sight while tvm_ffi loads, unless the
program has imported one of them already.
"""

from __future__ import annotations

import sys
from typing import Any

_modules: dict[str, Any] = sys.modules
_hide = "torch" not in _modules and "tvm_ffi" not in _modules
if _hide:
    _modules["torch"] = None  # Python's own sign for "not importable"
try:
    import tvm_ffi
finally:
    if _hide:
        del _modules["torch"]

__all__ = ["tvm_ffi"]
