"""Labels that are regions, as nnU-Net v2's ``dataset.json`` declares them.

::

    "labels": {"background": 0, "bleed": [1, 2], "core": [2], "ignore": 3},
    "regions_class_order": [1, 2]

The references have the values 0 to 2, and 3 where nobody could tell. What is trained for are two
regions that overlap: all of the bleed, and its core. A mask is written region by region, a later
one over an earlier: 1 where the bleed is found, then 2 where the core is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

BACKGROUND, IGNORE = "background", "ignore"  # labels that nnU-Net knows by their names


@dataclass(frozen=True, slots=True)
class Declared:
    """What a ``dataset.json`` says of the labels.

    Attributes:
        labels: The labels' names by value; one that a region writes is called as the region is.
        regions: The label that each region writes; empty where the labels are none.
        region_labels: The labels that each region holds.
        ignore_label: The value of voxels that nobody could tell; None if there are no such voxels.
    """

    labels: tuple[str, ...]
    regions: tuple[int, ...] = ()
    region_labels: tuple[tuple[int, ...], ...] = ()
    ignore_label: int | None = None


def declare(
    values: Mapping[str, Sequence[int]], order: Sequence[int], ignore_label: int | None = None
) -> Declared:
    """Names by value, and the regions, of what each name holds.

    Args:
        values: The values that each name holds, of the foreground alone, in the file's order.
        order: ``regions_class_order``: the label that each of them writes.
        ignore_label: The value of voxels that nobody could tell, or None.

    Raises:
        ValueError: The order has another length than the regions.
    """
    if len(order) != len(values):
        raise ValueError(
            f"regions_class_order {list(order)}, expected one label for each of the regions "
            f"{', '.join(values)}"
        )
    last = max(value for held in values.values() for value in held)
    names = {0: BACKGROUND} | {value: f"label {value}" for value in range(1, last + 1)}
    names |= dict(zip(order, values, strict=True))
    return Declared(
        tuple(names[value] for value in range(last + 1)),
        tuple(order),
        tuple(tuple(held) for held in values.values()),
        ignore_label,
    )


def rewritten(regions: Sequence[int], region_labels: Sequence[Sequence[int]]) -> Iterator[str]:
    """What even a perfect network would write otherwise than the reference has it.

    A voxel of a label is in every region that holds the label, and the last of them decides.

    Yields:
        A sentence for each such label.
    """
    for label in sorted({label for held in region_labels for label in held}):
        holding = [
            written for written, held in zip(regions, region_labels, strict=True) if label in held
        ]
        if holding[-1] != label:
            yield f"a voxel of label {label} is written as {holding[-1]}"
