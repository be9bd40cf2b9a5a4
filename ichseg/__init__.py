"""Segmentation of intracranial haemorrhage on head CT: a volume goes in, a mask comes out.

All that inference needs, and nothing of training. As a library::

    from ichseg import Ensemble, read, write

    ensemble = Ensemble.load()
    found = ensemble.segment(read("scan.nii.gz"))
    write(found.mask, "mask.nii.gz")

What is named here loads when it is first used, so that importing the package takes no time. Open
``app.main`` for the program, ``predict.ensemble`` for what happens to a volume.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ichseg.predict.components import Lesion, Segmentation
    from ichseg.predict.ensemble import Ensemble
    from ichseg.predict.many import Outcome, segment_many
    from ichseg.report.pictures import draw_overlay
    from ichseg.scan.reader import Scan, read
    from ichseg.scan.volume import Volume, write

__version__ = "0.1.0"
__all__ = [
    "Ensemble",
    "Lesion",
    "Outcome",
    "Scan",
    "Segmentation",
    "Volume",
    "__version__",
    "draw_overlay",
    "read",
    "segment_many",
    "write",
]
_HOMES = {
    "Ensemble": "ichseg.predict.ensemble",
    "Lesion": "ichseg.predict.components",
    "Outcome": "ichseg.predict.many",
    "Scan": "ichseg.scan.reader",
    "Segmentation": "ichseg.predict.components",
    "Volume": "ichseg.scan.volume",
    "draw_overlay": "ichseg.report.pictures",
    "read": "ichseg.scan.reader",
    "segment_many": "ichseg.predict.many",
    "write": "ichseg.scan.volume",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
