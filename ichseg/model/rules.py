"""Rules about connected components: what a bundle says is dropped of the labels found."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ComponentRule:
    """Which components of a label become background; both conditions hold if both are given.

    Attributes:
        label: The foreground label whose components the rule is about.
        keep_largest: Whether all components but the largest become background. Of several equally
            large ones the first in ``(z, y, x)`` order stays.
        drop_below_ml: Components smaller than this volume become background.
    """

    label: int
    keep_largest: bool = False
    drop_below_ml: float = 0.0

    def __post_init__(self) -> None:
        if self.label < 1:
            raise ValueError(f"rule for label {self.label}, expected a foreground label")
        if not 0 <= self.drop_below_ml < math.inf:
            raise ValueError(f"drop_below_ml {self.drop_below_ml}, expected 0 or more")
