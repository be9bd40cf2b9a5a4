"""What a bundle is called, the Grand Challenge sockets that it is bound to, and who takes it."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass

INPUT_SLUG, OUTPUT_SLUG = "head-ct", "intracranial-hemorrhage-segmentation"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Identity:
    """What people and the platform know a bundle by.

    Attributes:
        name: The bundle's name; None to take one from what it is made of.
        version: The bundle's version, any text.
        description: What the bundle is for and what not; None to take one from its plans.
        input_slug: Grand Challenge socket of the scan.
        output_slug: Grand Challenge socket of the mask.
        licence: Under which the weights are given, as an SPDX expression; empty to say nothing.
    """

    name: str | None = None
    version: str = "1"
    description: str | None = None
    input_slug: str = INPUT_SLUG
    output_slug: str = OUTPUT_SLUG
    licence: str = ""


BY_DEFAULT = Identity()


def add_identity_arguments(parser: argparse.ArgumentParser, *, name: str, description: str) -> None:
    """Add one flag for each field of ``Identity``.

    Args:
        parser: The parser of a command that writes a bundle.
        name: What the bundle is called without ``--name``, for the help text.
        description: What describes the bundle without ``--description``, for the help text.
    """
    parser.add_argument("--name", help=f"what the bundle is called [{name}]")
    parser.add_argument(
        "--model-version", default="1", metavar="TEXT", help="its version, any text [%(default)s]"
    )
    parser.add_argument(
        "--description", metavar="TEXT", help=f"what it is and is not for [{description}]"
    )
    parser.add_argument(
        "--input-slug",
        default=INPUT_SLUG,
        metavar="SLUG",
        help="Grand Challenge socket of the scan [%(default)s]",
    )
    parser.add_argument(
        "--output-slug",
        default=OUTPUT_SLUG,
        metavar="SLUG",
        help="Grand Challenge socket of the mask [%(default)s]",
    )
    parser.add_argument(
        "--licence",
        default="",
        metavar="SPDX",
        help="of the weights, such as CC-BY-NC-SA-4.0 [nothing is said of it]",
    )


def identity_from(args: argparse.Namespace) -> Identity:
    """The identity that the flags of ``add_identity_arguments`` gave."""
    return Identity(
        args.name,
        args.model_version,
        args.description,
        args.input_slug,
        args.output_slug,
        args.licence,
    )


def warn_of_channels(channels: Sequence[str]) -> None:
    """Say of a bundle of several channels who takes it."""
    if len(channels) > 1:
        _log.warning(
            "networks of %d channels, %s: this bundle is for `export-nnunet` and --pretrained; "
            "process.py refuses it, as it is given one scan a case",
            len(channels),
            ", ".join(channels),
        )
