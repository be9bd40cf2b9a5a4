"""Finds the cases in an input folder, in every layout, and names their outputs.

Imports nothing heavy: a wrong input folder is refused before torch is loaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ichseg.errors import InputError

SUFFIXES = (".mha", ".nii.gz", ".nii")


@dataclass(frozen=True, slots=True)
class InputCase:
    """One scan to segment.

    Attributes:
        name: For the log, the file name.
        image: The scan's file.
        output: Where its mask goes.
    """

    name: str
    image: Path
    output: Path


@dataclass(frozen=True, slots=True)
class Job:
    """All cases of a run; ``platform`` says that the folder has Grand Challenge's layout."""

    cases: tuple[InputCase, ...]
    platform: bool


def find_cases(folder: Path, output: Path, *, input_slug: str, output_slug: str) -> Job:
    """Recognise the layout of an input folder.

    In this order: ``inputs.json`` (one image socket, or the one named ``input_slug``),
    ``images/<slug>/*.mha`` (likewise), else volumes lying directly in the folder. On the platform
    layouts masks go to ``images/<output_slug>/``; in a flat folder they keep the input's file name.

    Raises:
        InputError: There is no case, or more than one socket could be meant.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, expected the scans to segment")
    masks = output / "images" / output_slug
    if (folder / "inputs.json").is_file():
        socket = _choose(_sockets(folder / "inputs.json"), input_slug, folder / "inputs.json")
        return Job(_platform_cases(folder / socket, masks), platform=True)
    if (folder / "images").is_dir():
        slugs = {
            path.name: f"images/{path.name}"
            for path in sorted((folder / "images").iterdir())
            if path.is_dir()
        }
        socket = _choose(slugs, input_slug, folder / "images")
        return Job(_platform_cases(folder / socket, masks), platform=True)
    images = _volumes(folder)
    if not images:
        raise InputError(
            f"{folder}: found no scan, expected {', '.join(SUFFIXES)} files "
            "or a Grand Challenge layout"
        )
    return Job(
        tuple(InputCase(path.name, path, output / path.name) for path in images), platform=False
    )


def _sockets(path: Path) -> dict[str, str]:
    """Image sockets of ``inputs.json``: slug to relative path."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {
            entry["interface"]["slug"]: entry["interface"]["relative_path"]
            for entry in entries
            if entry.get("image") or entry["interface"].get("super_kind", "").lower() == "image"
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not the platform's list of inputs ({error!r})") from error


def _choose(sockets: dict[str, str], wanted: str, where: Path) -> str:
    if wanted in sockets:
        return sockets[wanted]
    if len(sockets) == 1:
        return next(iter(sockets.values()))
    found = ", ".join(sorted(sockets)) or "none"
    raise InputError(
        f"{where}: image sockets are {found}; expected exactly one, or one named {wanted} "
        "(see --input-slug)"
    )


def _platform_cases(folder: Path, masks: Path) -> tuple[InputCase, ...]:
    images = _volumes(folder) if folder.is_dir() else []
    if not images:
        raise InputError(f"{folder}: found no scan, expected one of {', '.join(SUFFIXES)}")
    return tuple(InputCase(path.name, path, masks / f"{_stem(path)}.mha") for path in images)


def _volumes(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")
    )


def _stem(path: Path) -> str:
    suffix = next(s for s in SUFFIXES if path.name.lower().endswith(s))
    return path.name[: -len(suffix)]
