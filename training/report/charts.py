"""Charts of an evaluation, as SVG in the page: crisp at every size, and styled by its sheet.

Points carry their case's name, which the page shows under the pointer and opens on a click.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ichseg.report.html import Html, tag
from training.fit.history import EpochRow
from training.scoring.lesions import ALL_SIZES, LesionCounts
from training.scoring.statistics import VolumeAgreement
from training.scoring.summary import MeasureSummary

_NORMAL_95 = 1.959964  # deviations of a normal distribution within which 95 % lie
_MOST_POINTS = 400  # of a curve
_WIDTH = 420


@dataclass(frozen=True, slots=True)
class Point:
    """A case in a chart.

    Attributes:
        slug: Of the case's files, or None if it has none.
        text: What the pointer shows.
        x, y: Where; ``y`` means nothing on a strip.
        bad: Whether it stands out, as a miss does.
    """

    slug: str | None
    text: str
    x: float
    y: float = 0.0
    bad: bool = False


def curves(rows: Sequence[EpochRow], title: str) -> Html:
    """Losses and Dice of a fold over its epochs, as in the paper's Fig. 2."""
    height, left, right = 236, 44, 40
    losses = [v for row in rows for v in (row.train_loss, row.validation_loss) if math.isfinite(v)]
    low, high = _padded(losses or [0.0])
    x = _linear(rows[0].epoch, max(rows[-1].epoch, rows[0].epoch + 1), left, _WIDTH - right)
    loss, dice = _linear(low, high, 196, 26), _linear(0, 1, 196, 26)
    parts = [_line(left, loss(v), _WIDTH - right, loss(v), "grid") for v in _ticks(low, high, 5)]
    parts += [_text(left - 6, loss(v) + 4, _short(v), "end") for v in _ticks(low, high, 5)]
    parts += [_text(_WIDTH - right + 6, dice(v / 5) + 4, f"{v / 5:.1f}") for v in range(6)]
    parts += [
        _text(x(v), 212, f"{v:.0f}", "middle")
        for v in _ticks(rows[0].epoch, rows[-1].epoch, 6)
        if v == int(v)
    ]
    parts += [_text((left + _WIDTH - right) / 2, 229, "epoch", "middle")]
    parts += [_text(4, 12, "loss"), _text(_WIDTH - 4, 12, "Dice", "end")]
    series: list[tuple[Callable[[float], float], list[float | None], str]] = [
        (loss, [row.train_loss for row in rows], "blue"),
        (loss, [row.validation_loss for row in rows], "red"),
        (dice, [row.pseudo_dice for row in rows], "green"),
    ]
    epochs = [row.epoch for row in rows]
    parts += [
        tag("path", d=_path(epochs, values, x, y), class_=f"line {colour}")
        for y, values, colour in series
    ]
    best = max((row.pseudo_dice for row in rows if row.pseudo_dice is not None), default=None)
    note = f"{len(rows)} epochs" + ("" if best is None else f", best Dice {best:.3f}")
    return _figure(title, note, parts, height)


def curve_legend() -> Html:
    """What the lines of ``curves`` are."""
    keys = (
        ("blue", "training loss"),
        ("red", "validation loss"),
        ("green", "Dice of validation patches"),
    )
    return tag(
        "p",
        *(
            tag(
                "span",
                tag("svg", _line(0, 6, 26, 6, f"line {colour}"), width=30, height=12),
                f" {text}",
            )
            for colour, text in keys
        ),
        class_="legend",
    )


def strip(found: MeasureSummary, points: Sequence[Point], title: str, *, places: int) -> Html:
    """Box, whiskers and every case of one measure; the mean with its interval."""
    if found.minimum is None or found.maximum is None:
        return _figure(title, "no finite value", [], 20)
    low, high = (0.0, 1.0) if _is_share(found) else _padded([0.0, found.maximum])
    x = _linear(low, high, 14, _WIDTH - 14)
    parts: list[Html] = []
    for value in _ticks(low, high, 6):
        parts += [_line(x(value), 8, x(value), 104, "grid")]
        parts += [_text(x(value), 120, _short(value), "middle")]
    quartiles = (found.lower_quartile, found.median, found.upper_quartile)
    first, middle, third = (x(value or 0.0) for value in quartiles)
    parts += [
        _line(x(found.minimum), 26, x(found.maximum), 26, "whisker"),
        tag("rect", x=_n(first), y=14, width=_n(max(1.0, third - first)), height=24, class_="box"),
        _line(middle, 14, middle, 38, "median"),
    ]
    for index, point in enumerate(points):
        parts.append(_dot(point, x(point.x), 54 + 44 * _scatter(index)))
    if found.mean is not None:
        if found.low is not None and found.high is not None:
            parts.append(_line(x(found.low), 45, x(found.high), 45, "interval"))
        parts.append(tag("circle", cx=_n(x(found.mean)), cy=45, r=4, class_="mean"))
    mean, least, most, median = (
        _cell(v, places) for v in (found.mean, found.low, found.high, found.median)
    )
    note = f"mean {mean} ({least} to {most}), median {median}"
    if found.infinite:
        note += f"; infinite in {found.infinite} and not drawn"
    return _figure(title, note, parts, 126)


def bland_altman(points: Sequence[Point], found: VolumeAgreement) -> Html:
    """Difference of volumes against their mean, with bias and limits of agreement.

    Args:
        points: ``x`` the mean of both volumes in mL, ``y`` found less reference.
        found: Bias and limits.
    """
    limits = [v for v in (found.low_ml, found.high_ml) if v is not None]
    low, high = _padded([0.0, *(p.y for p in points), *limits])
    right = max([1.0, *(p.x for p in points)]) * 1.04
    x, y = _linear(0, right, 48, _WIDTH - 10), _linear(low, high, 250, 12)
    parts = _grid(x, y, _ticks(0, right, 6), _ticks(low, high, 6))
    if found.low_ml is not None and found.high_ml is not None:
        top, bottom = y(found.high_ml), y(found.low_ml)
        parts.append(
            tag("rect", x=48, y=_n(top), width=_WIDTH - 58, height=_n(bottom - top), class_="band")
        )
        parts += [_line(48, at, _WIDTH - 10, at, "limit") for at in (top, bottom)]
    if found.bias_ml is not None:
        parts.append(_line(48, y(found.bias_ml), _WIDTH - 10, y(found.bias_ml), "bias"))
    parts += [_dot(point, x(point.x), y(point.y)) for point in points]
    parts += [
        _text(234, 284, "mean of both volumes, mL", "middle"),
        _up(12, 131, "found less reference, mL"),
    ]
    note = (
        f"bias {_cell(found.bias_ml, 2)} mL, 95 % limits {_cell(found.low_ml, 2)} to "
        f"{_cell(found.high_ml, 2)} mL, ICC {_cell(found.correlation, 3)}"
    )
    return _figure("Agreement of volumes (Bland-Altman)", note, parts, 292)


def dice_by_volume(points: Sequence[Point]) -> Html:
    """Dice against the reference's volume, the latter in powers of ten.

    Args:
        points: ``x`` the volume in mL, more than 0; ``y`` the Dice.
    """
    volumes = [point.x for point in points] or [1.0]
    low, high = math.floor(math.log10(min(volumes))), math.ceil(math.log10(max(volumes)))
    high = max(high, low + 1)
    scale = _linear(low, high, 48, _WIDTH - 12)
    y = _linear(0, 1, 250, 12)
    parts = _grid(scale, y, [], [v / 5 for v in range(6)])
    for power in range(low, high + 1):
        parts += [_line(scale(power), 12, scale(power), 250, "grid")]
        parts += [_text(scale(power), 266, f"{10.0**power:g}", "middle")]
    parts += [_dot(point, scale(math.log10(point.x)), y(point.y)) for point in points]
    parts += [_text(234, 284, "volume of the reference, mL", "middle"), _up(12, 131, "Dice")]
    return _figure("Dice against volume", "each dot a case that has a reference", parts, 292)


def sensitivity(lesions: Sequence[LesionCounts]) -> Html:
    """Share of the reference's lesions that were found, by their size, with Wilson's interval."""
    classes = [found for found in lesions if found.size != ALL_SIZES]
    y, wide = _linear(0, 1, 200, 12), (_WIDTH - 60) / max(1, len(classes))
    parts = _grid(lambda v: v, y, [], [v / 5 for v in range(6)])
    for index, found in enumerate(classes):
        centre = 48 + wide * (index + 0.5)
        parts += [_text(centre, 217, found.size, "middle")]
        if found.sensitivity is None:
            parts.append(_text(centre, 233, "none", "middle"))
            continue
        low, high = wilson(found.found, found.reference)
        top = y(found.sensitivity)
        parts += [
            tag(
                "rect",
                x=_n(centre - wide * 0.3),
                y=_n(top),
                width=_n(wide * 0.6),
                height=_n(200 - top),
                class_="bar",
            ),
            _line(centre, y(low), centre, y(high), "interval"),
            _text(centre, 233, f"{found.found} of {found.reference}", "middle"),
            _text(centre, 249, f"{found.false_positives} false", "middle"),
        ]
    parts.append(_up(12, 106, "found"))
    overall = next((found for found in lesions if found.size == ALL_SIZES), None)
    note = (
        ""
        if overall is None
        else (
            f"all: {overall.found} of {overall.reference} found, {overall.false_positives} false, "
            f"F1 {_cell(overall.f1, 3)}"
        )
    )
    return _figure("Lesions found, by their volume", note, parts, 256)


def interval_bar(value: float | None, low: float | None, high: float | None) -> Html | None:
    """A share from 0 to 1 with its interval, as a bar for a tile."""
    if value is None:
        return None
    low, high = (value if low is None else low), (value if high is None else high)
    return tag(
        "svg",
        tag("rect", x=0, y=4, width=100, height=4, class_="track"),
        tag(
            "rect",
            x=_n(100 * low),
            y=2,
            width=_n(max(0.6, 100 * (high - low))),
            height=8,
            class_="range",
        ),
        tag("rect", x=_n(100 * value - 0.4), y=0, width=0.8, height=12, class_="mean"),
        viewBox="0 0 100 12",
        preserveAspectRatio="none",
        aria_hidden="true",
    )


def wilson(hits: int, of: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927); of nothing, 0 to 1."""
    if of == 0:
        return 0.0, 1.0
    z, share = _NORMAL_95, hits / of
    centre = (share + z * z / (2 * of)) / (1 + z * z / of)
    reach = z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of)) / (1 + z * z / of)
    return max(0.0, centre - reach), min(1.0, centre + reach)


def _figure(title: str, note: str, parts: Sequence[Html], height: int) -> Html:
    return tag(
        "figure",
        tag("figcaption", title, tag("small", note) if note else None),
        tag(
            "svg",
            *parts,
            viewBox=f"0 0 {_WIDTH} {height}",
            role="img",
            aria_label=f"{title}: {note}",
        ),
        class_="chart",
    )


def _grid(
    x: Callable[[float], float],
    y: Callable[[float], float],
    across: Sequence[float],
    up: Sequence[float],
) -> list[Html]:
    """Lines and numbers of a chart whose frame is 48..410 by 12 to the lowest of ``y``."""
    bottom = 250 if across or y(0) > 210 or not up else y(up[0])
    parts = [_line(48, y(value), _WIDTH - 10, y(value), "grid") for value in up]
    parts += [_text(44, y(value) + 4, _short(value), "end") for value in up]
    parts += [_line(x(value), 12, x(value), bottom, "grid") for value in across]
    return parts + [_text(x(value), bottom + 16, _short(value), "middle") for value in across]


def _dot(point: Point, x: float, y: float) -> Html:
    return tag(
        "circle",
        tag("title", point.text),
        cx=_n(x),
        cy=_n(y),
        r=4.2,
        class_="dot bad" if point.bad else "dot",
        data_slug=point.slug,
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Html:
    return tag("line", x1=_n(x1), y1=_n(y1), x2=_n(x2), y2=_n(y2), class_=kind)


def _text(x: float, y: float, text: str, anchor: str = "start") -> Html:
    return tag("text", text, x=_n(x), y=_n(y), text_anchor=anchor)


def _up(x: float, y: float, text: str) -> Html:
    return tag("text", text, text_anchor="middle", transform=f"translate({x} {y}) rotate(-90)")


def _path(
    xs: Sequence[float],
    values: Sequence[float | None],
    x: Callable[[float], float],
    y: Callable[[float], float],
) -> str:
    """Of a line through the finite values, interrupted by the others."""
    every = math.ceil(len(xs) / _MOST_POINTS)
    words, pen = [], "M"
    for at, value in list(zip(xs, values, strict=True))[::every]:
        if value is None or not math.isfinite(value):
            pen = "M"
            continue
        words.append(f"{pen}{_n(x(at))} {_n(y(value))}")
        pen = "L"
    return "".join(words)


def _linear(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest, and a little room."""
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 1.0
    return low - (room if low < 0 else 0), high + room


def _ticks(low: float, high: float, most: int) -> list[float]:
    """At most so many round numbers between two."""
    if high <= low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * f for f in (1, 2, 5, 10, 20) if (high - low) / (power * f) <= most)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _scatter(index: int) -> float:
    """From 0 to 1, spread evenly whatever their number: multiples of the golden section."""
    return index * 0.6180339887 % 1


def _is_share(found: MeasureSummary) -> bool:
    return found.measure in ("dice", "surface_dice")


def _short(value: float) -> str:
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")


def _cell(value: float | None, places: int) -> str:
    return "–" if value is None else f"{value:.{places}f}".replace("-", "\N{MINUS SIGN}")  # noqa: RUF001


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
