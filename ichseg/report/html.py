"""HTML in which text cannot become markup: only ``Html`` is taken as it is."""

from __future__ import annotations

import html
from collections.abc import Iterable


class Html(str):
    """Markup; every other text is escaped where it meets one."""

    __slots__ = ()


def tag(
    name: str,
    /,
    *children: Html | str | int | None,
    **attributes: str | float | bool | None,
) -> Html:
    """An element.

    Args:
        name: Of the tag.
        children: Markup, or text, which is escaped; None is nothing.
        attributes: Without a trailing underscore, inner ones as hyphens: ``class_``, ``data_slug``.
            None and False leave an attribute out, True gives it no value.
    """
    words = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(key)
        elif value is not None and value is not False:
            words.append(f'{key}="{html.escape(str(value), quote=True)}"')
    opening = f"<{' '.join(words)}>"
    if name in _VOID:
        return Html(opening)
    return Html(f"{opening}{join(children)}</{name}>")


def join(children: Iterable[Html | str | int | None], between: str = "") -> Html:
    """Markup and text one after another; text is escaped."""
    return Html(
        html.escape(between).join(
            child if isinstance(child, Html) else html.escape(str(child))
            for child in children
            if child is not None
        )
    )


_VOID = {"meta", "link", "img", "input", "br"}
