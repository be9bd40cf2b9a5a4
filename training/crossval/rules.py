"""Which components to drop of what was found: rules to try, and whether they have earned it.

Bleeds often have several parts, so most rules are refused; why, is written down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ichseg.predict.components import ComponentRule

DROP_BELOW_ML = (0.05, 0.1, 0.2, 0.5, 1.0)
# A smaller gain is not a reason: the simpler ensemble is taken, or no rule.
LEAST_GAIN = 1e-4


@dataclass(frozen=True, slots=True)
class Trial:
    """A rule on what the chosen candidate found.

    Attributes:
        rule: What it drops.
        dice: Of its label with the rule, over all cases; other labels stay as they are.
        better, worse: In how many cases the label's Dice rises, and falls.
        adopted: Whether the rule is used.
        reason: Why, or why not.
    """

    rule: ComponentRule
    dice: float
    better: int
    worse: int
    adopted: bool
    reason: str


def to_try(labels: int) -> tuple[ComponentRule, ...]:
    """For each of so many foreground labels: keep the largest part, drop small ones."""
    return tuple(
        rule
        for label in range(1, labels + 1)
        for rule in (
            ComponentRule(label, keep_largest=True),
            *(ComponentRule(label, drop_below_ml=volume_ml) for volume_ml in DROP_BELOW_ML),
        )
    )


def judge(
    rules: Sequence[ComponentRule],
    before: npt.NDArray[np.float64],
    ruled: npt.NDArray[np.float64],
    labels: Sequence[str],
) -> tuple[Trial, ...]:
    """Of each label the best rule is adopted, if it gains.

    Args:
        rules: Those tried.
        before: Dice without rules, ``(case, label)``.
        ruled: With each, ``(case, rule, label)``.
        labels: Names of the foreground labels.
    """
    means = [float(ruled[:, i, rule.label - 1].mean()) for i, rule in enumerate(rules)]
    trials = []
    for index, (rule, mean) in enumerate(zip(rules, means, strict=True)):
        own, plain = ruled[:, index, rule.label - 1], before[:, rule.label - 1]
        better, worse = int((own > plain + 1e-9).sum()), int((own < plain - 1e-9).sum())
        gain = mean - float(plain.mean())
        rivals = [m for r, m in zip(rules, means, strict=True) if r.label == rule.label]
        best = index == next(
            i for i, r in enumerate(rules) if r.label == rule.label and means[i] == max(rivals)
        )
        adopted = best and gain >= LEAST_GAIN
        changes = f"mean Dice of {labels[rule.label - 1]} {gain:+.4f}, better in {better} cases, "
        changes += f"worse in {worse}"
        if adopted:
            reason = f"adopted: {changes}"
        elif gain >= LEAST_GAIN:
            reason = f"not adopted, another gains more: {changes}"
        elif better == worse == 0:
            reason = "not adopted: it changes nothing"
        else:
            several = " (bleeds may have several parts)" if rule.keep_largest and worse else ""
            reason = f"not adopted, no gain: {changes}{several}"
        trials.append(Trial(rule, mean, better, worse, adopted, reason))
    return tuple(trials)


def words(rule: ComponentRule) -> str:
    """A rule for people."""
    if rule.keep_largest:
        return "keep the largest part"
    return f"drop parts under {rule.drop_below_ml:g} mL"
