"""Frozen dataclasses <-> strict JSON, for every JSON file that this project reads back.

A file must hold exactly the fields of its dataclass: an unknown, missing or mistyped key is an
error that names it, so a typo or a file of another version never passes in silence. Numbers must be
finite and of a size that arrays hold. A field made
by ``optional`` may be absent, and is left out where it has its default: files written before the
field existed stay readable, and equal to what is written now.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ichseg.errors import PlansError

T = TypeVar("T")
_TOO_LARGE = 1 << 63
_MOST_DIGITS = 40  # of a number that is worth to be looked at, and of what is quoted


def optional(default: Any, *, key: str = "") -> Any:
    """A dataclass field that came to a schema later and may be absent from its files.

    Args:
        default: Its value where it is absent.
        key: What files call it, where that is not the field's name.
    """
    return dataclasses.field(default=default, metadata={"optional": True, "key": key})


def to_json(value: object) -> Any:
    """The value as JSON types: dataclasses become objects, tuples become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            _key(field): to_json(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if not (_is_optional(field) and getattr(value, field.name) == field.default)
        }
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value


def from_json(cls: type[T], raw: Any, *, where: str) -> T:
    """Build the frozen dataclass ``cls`` from parsed JSON.

    Args:
        cls: A dataclass whose fields are numbers, strings, booleans, None, JSON mappings, other
            such dataclasses, or tuples of these.
        raw: What ``json.loads`` returned.
        where: File (and key) for the error message.

    Raises:
        PlansError: A key is unknown, missing or of another type, or the dataclass refuses a value.
    """
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    names = {_key(field): field.name for field in fields}
    needed = {_key(field) for field in fields if not _is_optional(field)}
    if not isinstance(raw, Mapping):
        keys = ", ".join(sorted(needed))
        raise PlansError(f"{where}: found {type(raw).__name__}, expected an object with {keys}")
    unknown, missing = sorted(raw.keys() - names.keys()), sorted(needed - raw.keys())
    if unknown or missing:
        raise PlansError(
            f"{where}: {cls.__name__} has unknown keys {unknown}, missing keys {missing}"
        )
    values = {names[key]: _decode(hints[names[key]], raw[key], f"{where}: {key}") for key in raw}
    try:
        return cls(**values)
    except ValueError as error:
        raise PlansError(f"{where}: {error}") from error


def load(cls: type[T], path: Path) -> T:
    """Read a JSON file as the dataclass ``cls``.

    Raises:
        PlansError: The file is missing, is not JSON or does not fit the dataclass; it is nested too
            deeply, or holds NaN, a number beyond a float's or a 64-bit integer's range, a NUL or
            half a character.
    """
    return from_json(cls, load_object(path, strict=True), where=str(path))


def load_object(path: Path, *, strict: bool) -> Any:
    """Parse a JSON file.

    Args:
        path: The file.
        strict: Whether it is one of ours: its numbers must be finite and fit 64 bits, and its texts
            must be text. The values of another software's are yet to be looked at.

    Raises:
        PlansError: The file is missing, cannot be read, is not JSON, is nested too deeply, or holds
            what it must not.
    """
    try:
        if path.exists() and not path.is_file():
            raise PlansError(f"{path}: not a plain file")  # reading a pipe or a device may not end
        text = path.read_text(encoding="utf-8")
        return _strict(text) if strict else json.loads(text)
    except OSError as error:
        raise PlansError(f"{path}: cannot read ({error.strerror})") from error
    except RecursionError:
        raise PlansError(f"{path}: not JSON that can be read (it is nested too deeply)") from None
    except ValueError as error:
        raise PlansError(f"{path}: not JSON ({error})") from error


def check_schema(kind: str, found: object, expected: int) -> None:
    """Refuse a file of another version; for the ``__post_init__`` of what has a ``schema_version``.

    Args:
        kind: What the file holds, such as ``plans``.
        found: The version that it says.
        expected: The version that this code reads.

    Raises:
        ValueError: The two differ; in ``from_json`` it becomes a ``PlansError`` with the file.
    """
    if found != expected:
        raise ValueError(f"{kind} schema {found!r}, this code reads {expected}")


def dumps(value: object) -> str:
    """Strict JSON text (no NaN), indented, with a final newline."""
    return json.dumps(to_json(value), indent=1, allow_nan=False) + "\n"


def _strict(text: str) -> Any:
    """JSON whose numbers are finite and fit 64 bits, and whose text is text."""
    raw = json.loads(text, parse_int=_integer, parse_float=_finite, parse_constant=_refuse_constant)
    _refuse_odd_text(raw)
    return raw


def _integer(text: str) -> int:
    """A whole number of at most 64 bits; Python's own have no limit, numpy's and torch's do."""
    value = int(text) if len(text) <= _MOST_DIGITS else _TOO_LARGE
    if abs(value) >= _TOO_LARGE:
        raise ValueError(f"the number {text[:_MOST_DIGITS]}... is too large")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:_MOST_DIGITS]} is too large")
    return value


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number")


def _refuse_odd_text(raw: Any) -> None:
    """Refuse texts, through objects and lists, that no file can be named or written as."""
    if isinstance(raw, str):
        try:
            raw.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{raw[:_MOST_DIGITS]!r} has half a character") from error
        if "\0" in raw:
            raise ValueError(f"{raw[:_MOST_DIGITS]!r} has a NUL")
    elif isinstance(raw, dict):
        for key, value in raw.items():
            _refuse_odd_text(key)
            _refuse_odd_text(value)
    elif isinstance(raw, list):
        for value in raw:
            _refuse_odd_text(value)


def _key(field: dataclasses.Field[Any]) -> str:
    """What files call a field."""
    return field.metadata.get("key") or field.name


def _is_optional(field: dataclasses.Field[Any]) -> bool:
    return bool(field.metadata.get("optional"))


def _decode(hint: Any, raw: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if raw is None and type(None) in arguments:
            return None
        return _decode(next(a for a in arguments if a is not type(None)), raw, where)
    if dataclasses.is_dataclass(hint):
        return from_json(typing.cast("type[Any]", hint), raw, where=where)
    if origin is tuple:
        if not isinstance(raw, list):
            raise PlansError(f"{where}: found {raw!r}, expected a list")
        of = [arguments[0]] * len(raw) if arguments[-1] is Ellipsis else list(arguments)
        if len(of) != len(raw):
            raise PlansError(f"{where}: found {len(raw)} values, expected {len(of)}")
        return tuple(
            _decode(kind, item, f"{where}[{i}]")
            for i, (kind, item) in enumerate(zip(of, raw, strict=True))
        )
    if origin is Mapping and not isinstance(raw, Mapping):
        raise PlansError(f"{where}: found {raw!r}, expected an object")
    if origin is not None or hint is Any:  # free-form JSON, such as provenance
        return raw
    if hint is float and isinstance(raw, int) and not isinstance(raw, bool):
        return float(raw)
    if not isinstance(raw, hint) or (isinstance(raw, bool) and hint is not bool):
        raise PlansError(f"{where}: found {raw!r}, expected {hint.__name__}")
    return raw
