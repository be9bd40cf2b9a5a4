"""Values of nnU-Net's JSON files, each of the type and within the range that a model can have.

The files come from elsewhere and may hold anything. A refusal names the value and what was
expected; whoever reads a file adds its path.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ichseg.errors import PlansError

_LONGEST_TEXT = 200
_LONGEST_VALUE, _LONGEST_LINE = 80, 250  # a file may hold anything, and is quoted


def whole(what: str, value: object, least: int, most: int) -> int:
    """A whole number; nnU-Net writes some with a decimal point, such as 30.0.

    Raises:
        PlansError: It is none, or not within these limits.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0:
        raise PlansError(f"{what} {_quoted(value)}, expected a whole number")
    if not least <= value <= most:
        raise PlansError(f"{what} {_quoted(value)}, expected {least} to {most}")
    return int(value)


def real(what: str, value: object, least: float, most: float) -> float:
    """A finite number.

    Raises:
        PlansError: It is none, or not within these limits.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PlansError(f"{what} {_quoted(value)}, expected a number")
    if not least <= value <= most:  # neither is NaN
        raise PlansError(f"{what} {_quoted(value)}, expected {least:g} to {most:g}")
    return float(value)


def wholes(what: str, values: object, least: int, most: int, *, longest: int) -> tuple[int, ...]:
    """Whole numbers, see ``whole``; at most so many.

    Raises:
        PlansError: They are no list of that length, or one of them is not such a number.
    """
    return tuple(whole(what, value, least, most) for value in listed(what, values, longest))


def listed(what: str, values: object, longest: int) -> list[object]:
    """A list of at most so many values.

    Raises:
        PlansError: It is none.
    """
    if not isinstance(values, list) or len(values) > longest:
        raise PlansError(f"{what} {_quoted(values)}, expected a list of at most {longest}")
    return values


def text(what: str, value: object) -> str:
    """A text of one line.

    Raises:
        PlansError: It is none, is too long, or holds what cannot be printed.
    """
    if not isinstance(value, str) or not 0 < len(value) <= _LONGEST_TEXT or not value.isprintable():
        raise PlansError(f"{what} {_quoted(value)}, expected a name in one line")
    return value


@contextlib.contextmanager
def refused_as(path: Path) -> Iterator[None]:
    """Let whatever is wrong with what a file holds become one line that names the file.

    Raises:
        PlansError: Something is missing or not as nnU-Net writes it.
    """
    try:
        yield
    except PlansError as error:
        raise PlansError(f"{path}: {_in_one_line(error)}") from error
    except KeyError as error:
        raise PlansError(f"{path}: {_quoted(error.args[0])} is missing") from error
    except (
        TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RecursionError,
    ) as error:  # fmt: skip
        raise PlansError(f"{path}: not as nnU-Net writes it ({_in_one_line(error)})") from error


def _in_one_line(error: Exception) -> str:
    """What an error says, cut short."""
    return " ".join(str(error).split())[:_LONGEST_LINE]


def _quoted(value: object) -> str:
    """A value as it is named in a refusal, cut short."""
    try:
        shown = repr(value)
    except ValueError:  # a whole number of thousands of digits
        shown = "with more digits than can be shown"
    return shown if len(shown) <= _LONGEST_VALUE else f"{shown[:_LONGEST_VALUE]}..."
