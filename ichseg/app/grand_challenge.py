"""Grand Challenge's input layout: which folder holds the scans, by ``inputs.json`` or without."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from ichseg.errors import InputError

INPUTS_FILE = "inputs.json"
IMAGES = "images"
_INPUTS_LIMIT = 16 << 20  # bytes; the platform's are a few thousand


def is_platform_layout(folder: Path) -> bool:
    """Whether an input folder is laid out as the platform does."""
    return (folder / INPUTS_FILE).is_file() or (folder / IMAGES).is_dir()


def socket_folder(folder: Path, wanted: str) -> Path:
    """The folder of the one image socket, or of the one that is wanted, among several.

    ``inputs.json`` names it since 2025; before, it was one of those in ``images/``.

    Args:
        folder: The input folder, in the platform's layout; nothing in it leads out of it.
        wanted: The slug of the socket, such as ``head-ct``.

    Raises:
        InputError: There is no image socket, more than one could be meant, or ``inputs.json`` is
            not what the platform writes.
    """
    listed = folder / INPUTS_FILE
    if listed.is_file():
        return _relative(_choose(_sockets(listed), wanted, listed), folder, listed)
    slugs = {path.name: path.name for path in sorted((folder / IMAGES).iterdir()) if path.is_dir()}
    return folder / IMAGES / str(_choose(slugs, wanted, folder / IMAGES))


def _sockets(path: Path) -> dict[str, Any]:
    """Image sockets of ``inputs.json``: slug to relative path, which is not checked yet.

    An entry describes its socket under ``socket`` since December 2025, and under ``interface``
    before; for a while under both, with the same content.
    """
    try:
        size = path.stat().st_size
        if size > _INPUTS_LIMIT:
            raise InputError(f"{path}: {size} bytes, expected at most {_INPUTS_LIMIT}")
        found = {}
        for entry in json.loads(path.read_text(encoding="utf-8")):
            socket = entry["socket"] if entry.get("socket") is not None else entry["interface"]
            if entry.get("image") or str(socket.get("super_kind", "")).lower() == "image":
                found[socket["slug"]] = socket["relative_path"]
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: not the platform's list of inputs ({_quoted(error)})") from error


def _choose(sockets: dict[str, Any], wanted: str, where: Path) -> Any:
    if wanted in sockets:
        return sockets[wanted]
    if len(sockets) == 1:
        return next(iter(sockets.values()))
    found = ", ".join(sorted(map(str, sockets)))[:200] or "none"
    raise InputError(
        f"{where}: image sockets are {found}; expected exactly one, or one named {wanted} "
        "(see --input-slug)"
    )


def _relative(named: Any, folder: Path, where: Path) -> Path:
    """The folder that ``inputs.json`` names, which must be one below the input folder."""
    plain = isinstance(named, str) and named and "\0" not in named
    if not plain or PurePosixPath(named).is_absolute() or ".." in PurePosixPath(named).parts:
        raise InputError(
            f"{where}: relative_path is {_quoted(named)}, expected a path inside {folder}"
        )
    return folder / str(named)


def _quoted(value: object) -> str:
    """As Python writes it, which keeps to one line; not more of it than a line holds."""
    text = repr(value)
    return text if len(text) <= 160 else text[:157] + "..."
