"""The files of a weights bundle's folder, looked at before anything is loaded.

No numpy and no torch: a run finds out first what it has to do.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ichseg.errors import PlansError, WeightsError
from ichseg.model import strict_json

MODEL_FILE = "model.json"
_LONGEST_REASON = 400  # a file may hold anything, and is quoted
_SLUG = re.compile(r"[A-Za-z0-9_-]+")


def read_description(folder: Path) -> Any:
    """The content of a bundle's ``model.json``.

    Raises:
        WeightsError: There is no such file, it is not a plain one, or not strict JSON.
    """
    path = plain_file(folder, MODEL_FILE, f"expected a weights bundle in {folder}")
    try:
        return strict_json.load_object(path, strict=True)
    except PlansError as error:
        raise refused(path, error) from error


def plain_file(folder: Path, name: str, expected: str) -> Path:
    """The path of a file of the bundle, which must be a plain one that lies there.

    A link may lead elsewhere, and reading a pipe or a device may never end.

    Args:
        folder: The bundle's folder.
        name: The file's name.
        expected: What the error says of a file that is not there.

    Raises:
        WeightsError: It is not there, no plain file, or a link that leads out of the folder.
    """
    path = folder / name
    try:
        if not path.exists():
            raise WeightsError(f"{path}: no such file, {expected}")
        if not path.is_file():
            raise WeightsError(f"{path}: not a plain file")
        if path.resolve().parent != folder.resolve():
            raise WeightsError(f"{path}: a link that leads out of {folder}, expected the file")
    except (OSError, RuntimeError) as error:  # links in a circle
        raise WeightsError(f"{path}: cannot read ({error})") from error
    return path


def refused(path: Path, error: Exception) -> WeightsError:
    """The error of a file whose content is refused, cut where it quotes too much of that."""
    reason = str(error).removeprefix(f"{path}: ")
    return WeightsError(f"{path}: {reason[:_LONGEST_REASON]}")


def check_slug(slug: object) -> str:
    """The slug of a Grand Challenge socket, which names a folder.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(slug, str) or not _SLUG.fullmatch(slug):
        raise ValueError(f"socket {repr(slug)[:100]}, expected letters, digits, - and _ only")
    return slug
