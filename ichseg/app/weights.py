"""Which weights bundle a run takes, and what has to be known of it before its networks load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ichseg.files import sha256
from ichseg.model.default_weights import default_weights
from ichseg.model.folder import MODEL_FILE, check_slug, read_description, refused

MOUNTED_WEIGHTS = Path("/opt/ml/model")  # where the platform unpacks a model tarball


@dataclass(frozen=True, slots=True)
class Described:
    """What a bundle's ``model.json`` says that concerns the search for cases.

    Attributes:
        input_slug: The platform's input socket that the bundle is made for.
        output_slug: The platform's output socket for its masks.
        sha256: The checksum of ``model.json``, which holds the checksums of all networks and so
            stands for the whole bundle.
    """

    input_slug: str
    output_slug: str
    sha256: str


def choose(given: Path | None) -> Path:
    """The folder of the bundle to use: the user's, else the platform's, else the default one."""
    if given is not None:
        return given
    return MOUNTED_WEIGHTS if (MOUNTED_WEIGHTS / MODEL_FILE).is_file() else default_weights()


def describe(weights: Path) -> Described:
    """Read a bundle's description, in no time and without torch; its tensors are not looked at.

    Raises:
        WeightsError: The folder holds no description of a bundle.
    """
    raw, path = read_description(weights), weights / MODEL_FILE
    described = raw if isinstance(raw, dict) else {}
    try:
        return Described(
            input_slug=check_slug(described.get("input_slug")),
            output_slug=check_slug(described.get("output_slug")),
            sha256=sha256(path),
        )
    except ValueError as error:
        raise refused(path, error) from error
