"""``scipy.ndimage``, imported when one of its functions is first asked for.

It takes as long to import as half of all other libraries, so a run does that while its networks
are compiled. A fourth of that time goes into numpy's test tools and Fortran compiler, which are
imported for nothing but to stand in a copy of numpy's list of names; that copy gets empty modules.
"""

from __future__ import annotations

import functools
import sys
import types
from typing import Any

import numpy as np

_NOT_NEEDED = ("f2py", "testing")
_BYTES = 15 * 2**20  # measured


def __getattr__(name: str) -> Any:
    return getattr(load(), name)


def bytes_to_come() -> int:
    """What it will take of memory, if it is not imported yet."""
    return 0 if "scipy.ndimage" in sys.modules else _BYTES


@functools.cache
def load() -> types.ModuleType:
    """The module, imported now if it is not yet."""
    wanted = () if "scipy.ndimage" in sys.modules else _NOT_NEEDED
    empty = {part: types.ModuleType(part) for part in wanted if part not in vars(np)}
    vars(np).update(empty)
    try:
        from scipy import ndimage
    finally:
        for part, stub in empty.items():
            if vars(np).get(part) is stub:  # and not what somebody else has imported meanwhile
                delattr(np, part)
    module: types.ModuleType = ndimage
    return module
