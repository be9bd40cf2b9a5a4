"""Rules about connected components: what a bundle says is dropped of the labels found."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ichseg.model import strict_json


@dataclass(frozen=True, slots=True)
class ComponentRule:
    """Which components of a label become background: those that any condition is about.

    Attributes:
        label: The foreground label whose components the rule is about.
        keep_largest: Whether all components but the largest become background. Of several equally
            large ones the first in ``(z, y, x)`` order stays.
        drop_below_ml: Components smaller than this volume become background.
        drop_below_probability: Components become background whose voxels' mean probability of
            anything but background is smaller.
    """

    label: int
    keep_largest: bool = False
    drop_below_ml: float = 0.0
    drop_below_probability: float = strict_json.optional(0.0)

    def __post_init__(self) -> None:
        if self.label < 1:
            raise ValueError(f"rule for label {self.label}, expected a foreground label")
        if not 0 <= self.drop_below_ml < math.inf:
            raise ValueError(f"drop_below_ml {self.drop_below_ml}, expected 0 or more")
        if not 0 <= self.drop_below_probability <= 1:
            raise ValueError(
                f"drop_below_probability {self.drop_below_probability}, expected 0 to 1"
            )
