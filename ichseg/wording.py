"""How durations, sizes and counts are worded, in logs, errors and pages alike."""

from __future__ import annotations

import math
import numbers
from collections import Counter
from collections.abc import Iterable


def duration(seconds: float) -> str:
    """A time for people, as exact as it is of use: ``4.2 s``, ``42 s``, ``3 min``, ``2 h 05 min``.

    Args:
        seconds: Not negative.
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def clock(seconds: float) -> str:
    """A time left as ``h:mm:ss``, rounded up, for lines that are written again and again."""
    whole = math.ceil(max(0.0, seconds))
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def byte_size(count: int) -> str:
    """A number of bytes in decimal units: ``1.2 kB``, ``12.3 MB``, ``0.61 GB``."""
    if count >= 1e8:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun: ``1 lesion``, ``3 lesions``.

    Args:
        number: How many.
        noun: Its singular.
        plural: Its plural where that is not the singular with an ``s``.
    """
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def times(sizes: Iterable[float], digits: int = 6) -> str:
    """Sizes along the axes, such as ``64x512x512`` or ``5x0.9x0.9``.

    Args:
        sizes: In this project's order, ``(z, y, x)``, unless the text says otherwise.
        digits: Significant digits of each; whole numbers keep all of theirs.
    """
    return "x".join(str(s) if isinstance(s, numbers.Integral) else f"{s:.{digits}g}" for s in sizes)


def repeated(names: Iterable[str]) -> list[str]:
    """The names that occur more than once, sorted, for a line that refuses them."""
    return sorted(name for name, count in Counter(names).items() if count > 1)
