"""A worker: an ensemble that is loaded once, and cases from a desk through it.

They overlap as in a run of one process: while the networks run on one, the next is read, and the
one before is written.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

from ichseg.app import pipeline
from ichseg.app.console import divert
from ichseg.app.crew.desk import Desk
from ichseg.app.one_case import Options, Task
from ichseg.app.results import CaseResult
from ichseg.errors import DeviceError, WeightsError
from ichseg.predict.ensemble import Ensemble

MOST_STARTS = 10  # in one place, of workers that finish no case
_PAUSE_S = 0.3  # before a worker asks again that got no case


@dataclass(frozen=True, slots=True)
class Setting:
    """What a worker is made with.

    Attributes:
        weights: The folder of the bundle.
        device: See ``choose_engine``.
        precision: See ``choose_engine``.
        options: What the user chose; what runs the networks is not yet in its ``made_from``.
    """

    weights: Path
    device: str
    precision: str
    options: Options


def work(setting: Setting, desk: Desk, number: int) -> None:
    """Load the networks and segment cases until all have ended.

    Args:
        setting: What the worker is made with.
        desk: Where the cases are, perhaps in another process or on another machine.
        number: The worker's own.
    """
    said: list[str] = []
    divert(said.append)
    try:
        ensemble = Ensemble.load(setting.weights, setting.device, setting.precision)
        facts = pipeline.facts_of(ensemble.engine)
        desk.begin(number, facts)
        made_from = setting.options.made_from | facts.made_from
        options = dataclasses.replace(setting.options, made_from=made_from)

        def give(task: Task, result: CaseResult) -> None:
            lines = said[:]  # those of the case that is read meanwhile among them
            del said[: len(lines)]
            desk.end(number, task.name, result, lines)

        while not desk.is_over(number):
            tasks = iter(lambda: desk.take(number), None)
            pipeline.segment_cases(tasks, ensemble, options, give)
            time.sleep(_PAUSE_S)
    except (WeightsError, DeviceError) as error:
        desk.fail(number, error)
    finally:
        divert(None)
