"""Charts of an evaluation, as SVG in the page: crisp at every size, and styled by its sheet.

Points carry their case's name, which the page shows under the pointer and opens on a click.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ichseg.report.page import number
from ichseg.wording import counted
from training.fit.history import EpochRow
from training.scoring.lesions import LesionCounts
from training.scoring.statistics import VolumeAgreement, wilson
from training.scoring.summary import MeasureSummary

SHARES = ("dice", "surface_dice")  # measures that lie between 0 and 1
_MOST_POINTS = 400  # of a curve
_WIDTH = 420
_LEFT = 48  # where the frame of most charts begins
_LETTER_PX = 7.5  # no letter of a number is wider


@dataclass(frozen=True, slots=True)
class Point:
    """A case in a chart.

    Attributes:
        slug: What the names of the case's files begin with, or None if it has none.
        text: What the pointer shows.
        x: Its place across the chart, in the unit of that axis.
        y: Its place up the chart, likewise; it means nothing on a strip.
        bad: Whether it stands out, as a miss does.
    """

    slug: str | None
    text: str
    x: float
    y: float = 0.0
    bad: bool = False


def curves(rows: Sequence[EpochRow], title: str) -> Markup:
    """Losses and Dice of a fold over its epochs, as in the paper's Fig. 2.

    Args:
        rows: The epochs; at least one.
        title: What the fold is called.
    """
    losses = [v for row in rows for v in (row.train_loss, row.validation_loss) if math.isfinite(v)]
    low, high = _padded(losses or [0.0])
    left, right = _left(_ticks(low, high, 5), beside=14), 40
    first, last = rows[0].epoch, rows[-1].epoch
    beside = 1 if first == last else 0  # a single one stands in the middle
    x = _linear(first - beside, last + beside, left, _WIDTH - right)
    loss, dice = _linear(low, high, 196, 26), _linear(0, 1, 196, 26)
    parts = [_line(left, loss(v), _WIDTH - right, loss(v), "grid") for v in _ticks(low, high, 5)]
    parts += [_text(left - 6, loss(v) + 4, _short(v), "end") for v in _ticks(low, high, 5)]
    parts += [_text(_WIDTH - right + 6, dice(v / 5) + 4, f"{v / 5:.1f}") for v in range(6)]
    parts += [
        _below(x(v), 212, f"{v:.0f}")
        for v in _ticks(first - beside, last + beside, 6)
        if v == int(v) and first <= v <= last
    ]
    parts += [_below((left + _WIDTH - right) / 2, 229, "epoch")]
    parts += [_text(4, 12, "loss"), _text(_WIDTH - 4, 12, "Dice", "end")]
    series: list[tuple[Callable[[float], float], list[float | None], str]] = [
        (loss, [row.train_loss for row in rows], "blue"),
        (loss, [row.validation_loss for row in rows], "red"),
        (dice, [row.pseudo_dice for row in rows], "green"),
    ]
    epochs = [row.epoch for row in rows]
    parts += [
        Markup('<path d="{}" class="line {}"/>').format(_path(epochs, values, x, y), colour)
        for y, values, colour in series
    ]
    best = max((row.pseudo_dice for row in rows if row.pseudo_dice is not None), default=None)
    note = counted(len(rows), "epoch") + ("" if best is None else f", best Dice {best:.3f}")
    return _figure(title, note, parts, 236)


def strip(found: MeasureSummary, points: Sequence[Point], title: str, *, places: int) -> Markup:
    """Box, whiskers and every case of one measure, and the mean with its 95 % interval.

    Args:
        found: The measure over all cases.
        points: The cases in which it is finite, the measure as their ``x``.
        title: What the measure is called.
        places: How many decimals its numbers have.
    """
    if found.minimum is None or found.maximum is None:
        return _figure(title, "no finite value", [], 20)
    low, high = (0.0, 1.0) if found.measure in SHARES else _padded([0.0, found.maximum])
    x = _linear(low, high, 14, _WIDTH - 14)
    parts: list[Markup] = []
    for value in _ticks(low, high, 6):
        parts += [_line(x(value), 8, x(value), 104, "grid")]
        parts += [_below(x(value), 120, _short(value))]
    quartiles = (found.lower_quartile, found.median, found.upper_quartile)
    first, middle, third = (x(value or 0.0) for value in quartiles)
    parts += [
        _line(x(found.minimum), 26, x(found.maximum), 26, "whisker"),
        _rect(first, 14, max(1.0, third - first), 24, "box"),
        _line(middle, 14, middle, 38, "median"),
    ]
    for index, point in enumerate(points):
        parts.append(_dot(point, x(point.x), 54 + 44 * _scatter(index)))
    if found.mean is not None:
        if found.low is not None and found.high is not None:
            parts.append(_line(x(found.low), 45, x(found.high), 45, "interval"))
        parts.append(
            Markup('<circle cx="{}" cy="45" r="4" class="mean"/>').format(_n(x(found.mean)))
        )
    mean, least, most, median = (
        number(v, places) for v in (found.mean, found.low, found.high, found.median)
    )
    note = f"mean {mean} ({least} to {most}), median {median}"
    if found.infinite:
        note += f"; infinite in {found.infinite} and not drawn"
    return _figure(title, note, parts, 126)


def bland_altman(points: Sequence[Point], found: VolumeAgreement) -> Markup:
    """Differences of volumes against their means, with bias and limits of agreement.

    Args:
        points: The cases, ``x`` the mean of both volumes in mL, ``y`` found less reference.
        found: Bias and limits.
    """
    limits = [v for v in (found.low_ml, found.high_ml) if v is not None]
    low, high = _padded([0.0, *(p.y for p in points), *limits])
    right = max([1.0, *(p.x for p in points)]) * 1.04
    left = _left(_ticks(low, high, 6))
    x, y = _linear(0, right, left, _WIDTH - 10), _linear(low, high, 250, 12)
    parts = _grid(x, y, _ticks(0, right, 6), _ticks(low, high, 6), left=left)
    if found.low_ml is not None and found.high_ml is not None:
        top, bottom = y(found.high_ml), y(found.low_ml)
        parts.append(_rect(left, top, _WIDTH - 10 - left, bottom - top, "band"))
        parts += [_line(left, at, _WIDTH - 10, at, "limit") for at in (top, bottom)]
    if found.bias_ml is not None:
        parts.append(_line(left, y(found.bias_ml), _WIDTH - 10, y(found.bias_ml), "bias"))
    parts += [_dot(point, x(point.x), y(point.y)) for point in points]
    parts += [
        _below(234, 284, "mean of both volumes, mL"),
        _up(12, 131, "found less reference, mL"),
    ]
    note = (
        f"bias {number(found.bias_ml, 2)} mL, 95 % limits {number(found.low_ml, 2)} to "
        f"{number(found.high_ml, 2)} mL, ICC {number(found.correlation, 3)}"
    )
    return _figure("Agreement of volumes (Bland-Altman)", note, parts, 292)


def dice_by_volume(points: Sequence[Point]) -> Markup:
    """Dice against the reference's volume, the latter in powers of ten.

    Args:
        points: The cases, ``x`` the volume in mL, more than 0, and ``y`` the Dice.
    """
    volumes = [point.x for point in points] or [1.0]
    low, high = math.floor(math.log10(min(volumes))), math.ceil(math.log10(max(volumes)))
    high = max(high, low + 1)
    scale = _linear(low, high, 48, _WIDTH - 12)
    y = _linear(0, 1, 250, 12)
    parts = _grid(scale, y, [], [v / 5 for v in range(6)])
    for power in range(low, high + 1):
        parts += [_line(scale(power), 12, scale(power), 250, "grid")]
        parts += [_below(scale(power), 266, f"{10.0**power:g}")]
    parts += [_dot(point, scale(math.log10(point.x)), y(point.y)) for point in points]
    parts += [_below(234, 284, "volume of the reference, mL"), _up(12, 131, "Dice")]
    return _figure("Dice against volume", "each dot a case that has a reference", parts, 292)


def sensitivity(lesions: Sequence[LesionCounts]) -> Markup:
    """Share of the reference's lesions that were found, by their size, with Wilson's interval.

    Args:
        lesions: The counts of each size, and last of all sizes.
    """
    *classes, overall = lesions
    y, width = _linear(0, 1, 200, 12), (_WIDTH - 60) / max(1, len(classes))
    parts = _grid(lambda v: v, y, [], [v / 5 for v in range(6)])
    for index, found in enumerate(classes):
        parts += _bar(found, y, 48 + width * (index + 0.5), width)
    parts.append(_up(12, 106, "found"))
    note = (
        f"all: {overall.found} of {overall.reference} found, {overall.false_positives} false, "
        f"F1 {number(overall.f1, 3)}"
    )
    return _figure("Lesions found, by their volume", note, parts, 256)


def _bar(
    found: LesionCounts, y: Callable[[float], float], centre: float, width: float
) -> list[Markup]:
    """One size of lesions, with its counts below the bar."""
    parts = [_below(centre, 217, found.size.replace("..", " to "))]
    if found.sensitivity is None:
        return [*parts, _below(centre, 233, "none")]
    low, high = wilson(found.found, found.reference)
    top = y(found.sensitivity)
    return [
        *parts,
        _rect(centre - width * 0.3, top, width * 0.6, 200 - top, "bar"),
        _line(centre, y(low), centre, y(high), "interval"),
        _below(centre, 233, f"{found.found} of {found.reference}"),
        _below(centre, 249, f"{found.false_positives} false"),
    ]


def _figure(title: str, note: str, parts: Sequence[Markup], height: int) -> Markup:
    small = Markup("<small>{}</small>").format(note) if note else ""
    return Markup(
        '<figure class="chart"><figcaption>{title}{small}</figcaption>\n'
        '<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}: {note}">\n'
        "{parts}\n</svg></figure>"
    ).format(
        title=title,
        small=small,
        note=note,
        width=_WIDTH,
        height=height,
        parts=Markup("\n").join(parts),
    )


def _grid(
    x: Callable[[float], float],
    y: Callable[[float], float],
    across: Sequence[float],
    up: Sequence[float],
    *,
    left: float = _LEFT,
) -> list[Markup]:
    """Lines and numbers of a chart; its frame begins 12 px below the top, ends 10 px from right.

    Args:
        x: Where a value lies across the picture.
        y: Where a value lies down the picture.
        across: The values that have a line and a number across.
        up: The values that have a line and a number up.
        left: Where the frame begins.
    """
    bottom = 250 if across or y(0) > 210 or not up else y(up[0])
    parts = [_line(left, y(value), _WIDTH - 10, y(value), "grid") for value in up]
    parts += [_text(left - 8, y(value) + 4, _short(value), "end") for value in up]
    parts += [_line(x(value), 12, x(value), bottom, "grid") for value in across]
    return parts + [_below(x(value), bottom + 16, _short(value)) for value in across]


def _left(up: Sequence[float], *, beside: float = 24) -> float:
    """Where the frame begins, so that the numbers beside it are whole, and what stands beside them.

    Args:
        up: The values whose numbers stand there.
        beside: Pixels that are taken by other things.
    """
    return max(_LEFT, beside + _LETTER_PX * max((len(_short(value)) for value in up), default=0))


def _dot(point: Point, x: float, y: float) -> Markup:
    slug = Markup(' data-slug="{}"').format(point.slug) if point.slug else ""
    return Markup('<circle cx="{}" cy="{}" r="4.2" class="{}"{}><title>{}</title></circle>').format(
        _n(x), _n(y), "dot bad" if point.bad else "dot", slug, point.text
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line x1="{}" y1="{}" x2="{}" y2="{}" class="{}"/>').format(
        _n(x1), _n(y1), _n(x2), _n(y2), kind
    )


def _rect(x: float, y: float, width: float, height: float, kind: str) -> Markup:
    return Markup('<rect x="{}" y="{}" width="{}" height="{}" class="{}"/>').format(
        _n(x), _n(y), _n(width), _n(height), kind
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(
        _n(x), _n(y), anchor, text
    )


def _below(x: float, y: float, text: str) -> Markup:
    """Text around ``x``, shifted where the picture's edge would cut it off."""
    half = _LETTER_PX / 2 * len(text)
    return _text(min(max(x, half), _WIDTH - half), y, text, "middle")


def _up(x: float, y: float, text: str) -> Markup:
    return Markup(
        '<text text-anchor="middle" transform="translate({} {}) rotate(-90)">{}</text>'
    ).format(x, y, text)


def _path(
    xs: Sequence[float],
    values: Sequence[float | None],
    x: Callable[[float], float],
    y: Callable[[float], float],
) -> str:
    """The path of a line through the finite values, interrupted by the others.

    A value between two others, or alone, is a dash.
    """
    every = math.ceil(len(xs) / _MOST_POINTS)
    pieces: list[list[tuple[float, float]]] = [[]]
    for at, value in list(zip(xs, values, strict=True))[::every]:
        if value is None or not math.isfinite(value):
            pieces.append([])
        else:
            pieces[-1].append((x(at), y(value)))
    return "".join(
        f"M{_n(piece[0][0] - 4)} {_n(piece[0][1])}h8"
        if len(piece) == 1
        else "M" + "L".join(f"{_n(across)} {_n(up)}" for across, up in piece)
        for piece in pieces
        if piece
    )


def _linear(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest value, with a little room around them."""
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 1.0
    return low - (room if low < 0 else 0), high + room


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between two, at most ``most`` of them."""
    if high <= low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * f for f in (1, 2, 5, 10, 20) if (high - low) / (power * f) <= most)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _scatter(index: int) -> float:
    """A place from 0 to 1; those of all indices are spread evenly, however many there are.

    They are multiples of the golden section.
    """
    return index * 0.6180339887 % 1


def _short(value: float) -> str:
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
