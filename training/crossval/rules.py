"""Component rules to try on what was found, and whether they have earned their place.

Bleeds often have several parts, so most rules are refused; the reason is written down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ichseg.model.rules import ComponentRule
from ichseg.wording import counted

DROP_BELOW_ML = (0.05, 0.1, 0.2, 0.5, 1.0)
DROP_BELOW_PROBABILITY = (0.6, 0.65, 0.7, 0.75, 0.8)
# A smaller gain is not a reason: the simpler ensemble is taken, or no rule.
LEAST_GAIN = 1e-4


@dataclass(frozen=True, slots=True)
class Trial:
    """One component rule, tried on what the chosen candidate found.

    Attributes:
        rule: Which components of which label it drops.
        dice: The mean Dice of that label with the rule; other labels stay as they are.
        better: In how many cases the label's Dice rises.
        worse: In how many cases it falls.
        adopted: Whether the bundle gets the rule.
        reason: Why it was adopted or not, for people.
    """

    rule: ComponentRule
    dice: float
    better: int
    worse: int
    adopted: bool
    reason: str


def to_try(
    labels: int, *, probabilities: bool, most_ml: float | None = None
) -> tuple[ComponentRule, ...]:
    """The rules to try: for each label keep the largest part, or drop small or unlikely ones.

    Args:
        labels: The number of foreground labels.
        probabilities: Whether the probabilities of all cases are known.
        most_ml: The volume of the largest part that a rule may drop; None for any.
    """
    of_any_size = most_ml is None
    volumes = [ml for ml in DROP_BELOW_ML if most_ml is None or ml <= most_ml]
    thresholds = DROP_BELOW_PROBABILITY if probabilities and of_any_size else ()
    return tuple(
        rule
        for label in range(1, labels + 1)
        for rule in (
            *([ComponentRule(label, keep_largest=True)] if of_any_size else ()),
            *(ComponentRule(label, drop_below_ml=ml) for ml in volumes),
            *(ComponentRule(label, drop_below_probability=each) for each in thresholds),
        )
    )


def judge(
    rules: Sequence[ComponentRule],
    before: npt.NDArray[np.float64],
    ruled: npt.NDArray[np.float64],
    labels: Sequence[str],
) -> tuple[Trial, ...]:
    """Adopt the best rule of each label, if it gains at least ``LEAST_GAIN``.

    Args:
        rules: The rules that were tried.
        before: The Dice without any rule, shape ``(case, label)``.
        ruled: The Dice with each rule by itself, shape ``(case, rule, label)``.
        labels: The names of the foreground labels.

    Returns:
        One trial for each rule, in their order.
    """
    means = [float(ruled[:, i, rule.label - 1].mean()) for i, rule in enumerate(rules)]
    best: dict[int, int] = {}  # of each label, the first of equals
    for index, rule in enumerate(rules):
        best[rule.label] = max(best.get(rule.label, index), index, key=means.__getitem__)
    trials = []
    for index, (rule, mean) in enumerate(zip(rules, means, strict=True)):
        own, plain = ruled[:, index, rule.label - 1], before[:, rule.label - 1]
        better, worse = int((own > plain + 1e-9).sum()), int((own < plain - 1e-9).sum())
        gain = mean - float(plain.mean())
        adopted = index == best[rule.label] and gain >= LEAST_GAIN
        changes = f"mean Dice of {labels[rule.label - 1]} {gain:+.4f}, better in "
        changes += f"{counted(better, 'case')}, worse in {worse}"
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
    """A rule in words, for people."""
    if rule.keep_largest:
        return "keep the largest part"
    if rule.drop_below_probability:
        return f"drop parts of a mean probability under {rule.drop_below_probability:g}"
    return f"drop parts under {rule.drop_below_ml:g} mL"
