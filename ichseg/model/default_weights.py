"""Where the weights lie that come with this software."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def default_weights() -> Path:
    """The folder of the default weights bundle.

    It lies inside the installed package, and beside the package in a clone and in the image.
    """
    installed = _PACKAGE / "weights"
    return installed if installed.is_dir() else _PACKAGE.parent / "weights"
