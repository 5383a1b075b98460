"""See what a long context does inside a transformer: exact attention statistics at full length.

Written by hand, as is `__init__.pyi` beside it, which says where each public name lives: editors and type checkers read
it, and a module is loaded when one of its names is first used, so that `import longlens` costs next to nothing.
Everything else in the package is exported from the notebooks in `nbs/`.
"""
from __future__ import annotations

__version__ = "0.1.0"

from typing import Any

from lazy_loader import attach_stub

_load, __dir__, __all__ = attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    "Load a public name at its first use (PEP 562)"
    if name not in __all__: raise AttributeError(f"module 'longlens' has no attribute {name!r}; it has: {', '.join(__all__)}")
    return _load(name)
