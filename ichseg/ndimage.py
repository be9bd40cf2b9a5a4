"""``scipy.ndimage``, imported when one of its functions is first asked for.

It takes as long to import as half of all other libraries, so a run does that while its networks
are compiled.
"""

from __future__ import annotations

import functools
import sys
import types
from typing import Any

_BYTES = 30 * 2**20  # measured


def __getattr__(name: str) -> Any:
    return getattr(load(), name)


def bytes_to_come() -> int:
    """What it will take of memory, if it is not imported yet."""
    return 0 if "scipy.ndimage" in sys.modules else _BYTES


@functools.cache
def load() -> types.ModuleType:
    """The module, imported now if it is not yet."""
    from scipy import ndimage

    module: types.ModuleType = ndimage
    return module
