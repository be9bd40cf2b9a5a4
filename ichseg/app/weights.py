"""Which weights bundle a run takes, and what has to be known of it before its networks load."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from ichseg.errors import WeightsError
from ichseg.model.default_weights import default_weights

MOUNTED_WEIGHTS = Path("/opt/ml/model")  # where the platform unpacks a model tarball


@dataclass(frozen=True, slots=True)
class Described:
    """What a bundle's ``model.json`` says that concerns the search for cases.

    Attributes:
        input_slug: The platform's input socket that the bundle is made for.
        output_slug: The platform's output socket for its masks.
        sha256: Of ``model.json``, which holds the checksums of all networks and so stands for the
            whole bundle.
    """

    input_slug: str
    output_slug: str
    sha256: str


def choose(given: Path | None) -> Path:
    """The folder of the bundle to use: the user's, else the platform's, else the default one."""
    if given is not None:
        return given
    return MOUNTED_WEIGHTS if (MOUNTED_WEIGHTS / "model.json").is_file() else default_weights()


def describe(weights: Path) -> Described:
    """Read a bundle's description, in no time and without torch; loading it checks the rest.

    Raises:
        WeightsError: The folder holds no description of a bundle.
    """
    path = weights / "model.json"
    try:
        content = path.read_bytes()
        model = json.loads(content)
        return Described(
            input_slug=model["input_slug"],
            output_slug=model["output_slug"],
            sha256=hashlib.sha256(content).hexdigest(),
        )
    except OSError as error:
        raise WeightsError(
            f"{path}: cannot read ({error.strerror}), expected a weights bundle in {weights}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{path}: not the description of a weights bundle ({error!r})"
        ) from error
