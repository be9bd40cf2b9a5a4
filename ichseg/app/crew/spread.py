"""What segments the cases of a run where several workers do."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ichseg.app.console import say
from ichseg.app.crew import actors, processes
from ichseg.app.crew.desk import Desk, News
from ichseg.app.crew.worker import Setting
from ichseg.app.one_case import Options, Task
from ichseg.app.pipeline import Finish, Means
from ichseg.model import bundle

_SAY_S = 60.0


@contextlib.contextmanager
def over_gpus(setting: Setting, gpus: Sequence[str]) -> Iterator[Means]:
    """A process for each of several GPUs of this machine, until the block ends.

    Args:
        setting: What the workers are made with.
        gpus: As ``CUDA_VISIBLE_DEVICES`` takes them.

    Raises:
        WeightsError: The bundle cannot be run.
        DeviceError: A GPU cannot be used.
    """
    with processes.begun(setting, [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus]) as begun:
        yield means(setting, *begun)


@contextlib.contextmanager
def over_ray(
    setting: Setting, address: str, cores: int | None, files: Sequence[Path]
) -> Iterator[Means]:
    """An actor for each GPU, or for a share of the cores, of a Ray cluster, until the block ends.

    Args:
        setting: What the workers are made with.
        address: ``HOST:PORT`` of the head node, or ``auto``.
        cores: Cores of an actor; None for what suits the nodes.
        files: What all nodes have to see, beside the output folder.

    Raises:
        WeightsError: The bundle cannot be run.
        DeviceError: There is no cluster, or its nodes cannot be used.
    """
    with actors.begun(setting, address, cores, files) as begun:
        yield means(setting, *begun)


def means(setting: Setting, desk: Desk, look_after: Callable[[], None]) -> Means:
    """Workers as what segments cases, once the first of them has loaded its networks.

    Args:
        setting: What the workers are made with.
        desk: Their desk.
        look_after: Waits a moment, and begins anew those that have died.
    """
    news = _listen(desk)
    while news.facts is None:
        look_after()
        news = _listen(desk)

    def segment(tasks: Sequence[Task], _: Options, finish: Finish) -> None:
        desk.open(tasks)
        alone_since = time.monotonic()
        while True:
            news = _listen(desk)
            for task, result in news.ended:
                finish(task, result)
            if news.over:
                return
            if news.workers:
                alone_since = time.monotonic()
            elif time.monotonic() - alone_since > _SAY_S:
                say("no worker is at work; waiting for room for one")
                alone_since = time.monotonic()
            look_after()

    return Means(bundle.load_model(setting.weights), news.facts, segment)


def _listen(desk: Desk) -> News:
    """What has happened at the desk, said.

    Raises:
        WeightsError, DeviceError: Why the run cannot go on.
    """
    news = desk.collect()
    for line in news.said:
        say(line)
    if news.failure is not None:
        raise news.failure
    return news
