"""Work on one thing after another in three stages that overlap, in threads of this process.

While the second stage runs on a thing, in the caller's thread, another thread opens the next one
and a third finishes the one before. Never is more than one thing opened ahead or one waiting to be
finished.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from ichseg.files import abandon_unfinished

Item = TypeVar("Item")
Opened = TypeVar("Opened")
Done = TypeVar("Done")
Result = TypeVar("Result")
Weight = TypeVar("Weight")
_LAST_S = 3.0  # for what is being finished to end; the platform kills 5 s after SIGTERM


def overlapping(
    items: Iterable[Item],
    *,
    open_one: Callable[[Item], Opened],
    run: Callable[[Item, Opened], Done],
    finish: Callable[[Item, Done], Result],
    weigh: Callable[[Opened], Weight],
    may_open: Callable[[Item, Item, Weight, Weight | None], bool],
    beside: Callable[[Weight], bool] = lambda _: True,
    meanwhile: Callable[[], object] = lambda: None,
) -> Iterator[Result]:
    """Results in the order of the items, each as soon as the stages allow.

    What a stage raises ends the iteration, after what is being finished has been. So does whoever
    stops iterating. On a signal's exception, which is no ``Exception``, what is being finished has
    three seconds, and half-written files are removed.

    Args:
        items: What is worked on; at most three are taken that have no result yet, one a stage.
        open_one: The first stage, in a thread of its own.
        run: The second, in the caller's thread.
        finish: The third, in a thread of its own.
        weigh: What has to be known of an opened item for ``may_open``.
        may_open: Whether an item may be opened while ``run`` works on the one before: given the
            item, the one before, that one's weight, and the weight of what is being finished, None
            if nothing is. Else it is opened after ``run`` has ended.
        beside: Whether ``run`` may work on an item of this weight while the one before is being
            finished. It never does where nothing was opened ahead.
        meanwhile: Called once, in the caller's thread, while the first item is opened.
    """
    waiting = iter(items)
    with _two_threads() as (opener, finisher):
        ahead: list[Future[Opened]] = []
        behind: list[Future[Result]] = []
        weight_behind: Weight | None = None
        now = list(itertools.islice(waiting, 1))
        if now:
            ahead.append(opener.submit(open_one, now[0]))
            meanwhile()
        while now:
            (item,) = now
            if not ahead:
                ahead.append(opener.submit(open_one, item))
            opened = ahead.pop().result()
            weight = weigh(opened)
            now = list(itertools.islice(waiting, 1))
            for following in now:
                if may_open(following, item, weight, weight_behind):
                    ahead.append(opener.submit(open_one, following))
            ended = []
            if behind and not (ahead and beside(weight)):  # lest it take what this one needs
                ended.append(behind.pop().result())
            done = run(item, opened)
            del opened  # its memory goes before the next one is waited for
            if behind:
                ended.append(behind.pop().result())
            behind.append(finisher.submit(finish, item, done))
            weight_behind = weight
            del done, item
            while ended:
                yield ended.pop()
        for last in behind:
            yield last.result()


@contextlib.contextmanager
def _two_threads() -> Iterator[tuple[ThreadPoolExecutor, ThreadPoolExecutor]]:
    """For opening and for finishing; if the block is left early, with nothing half-written."""
    opener, finisher = ThreadPoolExecutor(1, "opener"), ThreadPoolExecutor(1, "finisher")
    try:
        yield opener, finisher
    except (Exception, GeneratorExit):  # no signal: time enough
        opener.shutdown(cancel_futures=True)
        finisher.shutdown()
        raise
    except BaseException:
        wait([finisher.submit(lambda: None)], _LAST_S)  # so long for what it is at
        abandon_unfinished()
        raise
    finally:
        opener.shutdown(wait=False, cancel_futures=True)
        finisher.shutdown(wait=False, cancel_futures=True)
