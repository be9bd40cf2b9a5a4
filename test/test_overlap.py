"""Three stages that overlap: the order of results, what is ahead, and what ends it."""

import threading
import time
from pathlib import Path

import pytest

from ichseg.files import replacing
from ichseg.overlap import overlapping


def run(items, *, events=None, may_open=lambda *_: True, meanwhile=lambda: None, **stages):
    """Numbers through three stages that note what they do."""
    noted = events if events is not None else []

    def stage(name):
        def work(item, *given):
            noted.append(f"{name} {item}")
            if name in stages:
                stages[name](item)
            return item

        return work

    return overlapping(
        items,
        open_one=stage("open"),
        run=stage("run"),
        finish=stage("finish"),
        weigh=lambda opened: 10 * opened,
        may_open=may_open,
        meanwhile=meanwhile,
    )


def test_results_come_in_order_and_nothing_begins_before_it_is_asked_for():
    events = []
    results = run(iter(range(5)), events=events)
    assert events == []
    assert list(results) == [0, 1, 2, 3, 4]
    assert list(run([])) == []
    assert list(run([7])) == [7]


def test_meanwhile_is_while_the_first_is_opened_and_once():
    called, go_on = [], threading.Event()

    def meanwhile():
        called.append(threading.current_thread())
        go_on.set()

    def opens(item):
        assert go_on.wait(20), "it waits for what is done meanwhile"

    assert list(run(range(3), meanwhile=meanwhile, open=opens)) == [0, 1, 2]
    assert called == [threading.main_thread()]
    assert list(run([], meanwhile=lambda: called.append("nothing is opened"))) == []
    assert len(called) == 1


def test_at_most_three_items_are_taken_that_have_no_result():
    seen, waiting = [], []

    def items():
        for number in range(6):
            waiting.append(number + 1 - len(seen))
            yield number

    for result in run(items()):
        seen.append(result)
    assert waiting == [1, 2, 3, 3, 3, 3]


def test_what_may_open_is_told():
    told = []

    def may_open(*given):
        told.append(given)
        return False

    list(run([1, 2, 3], may_open=may_open))
    assert told == [(2, 1, 10, None), (3, 2, 20, 10)]


def test_what_may_not_be_opened_ahead_waits_for_the_networks_and_for_the_last():
    events = []
    list(run([1, 2, 3], events=events, may_open=lambda *_: False))
    assert events.index("open 2") > events.index("run 1")
    assert events.index("finish 1") < events.index("run 2")


def test_stages_overlap():
    """Each wait has a limit, so that stages one after another fail, and do not hang."""
    opened, running, waited = threading.Event(), threading.Event(), []
    stages = {
        "open": lambda n: opened.set() if n == 3 else None,
        "run": lambda n: (running.set(), waited.append(opened.wait(5))) if n == 2 else None,
        "finish": lambda n: waited.append(running.wait(5)) if n == 1 else None,
    }
    assert list(run([1, 2, 3], **stages)) == [1, 2, 3]
    assert waited == [True, True]


@pytest.mark.parametrize("stage", ["open", "run", "finish"])
def test_what_a_stage_raises_ends_it(stage):
    def fail(number):
        if number == 3:
            raise ZeroDivisionError

    results = run(range(6), **{stage: fail})
    assert next(results) == 0
    with pytest.raises(ZeroDivisionError):
        list(results)


def test_leaving_the_loop_stops_it_and_what_is_being_finished_is(tmp_path):
    """Half a file would be left, or none: the thread is waited for."""
    slow = threading.Event()

    def finish(number):
        with replacing(tmp_path / f"{number}.txt") as temporary:
            slow.wait(0.2)
            temporary.write_text(str(number))

    events = []
    results = run(range(9), events=events, finish=finish)
    assert next(results) == 0
    results.close()
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == ["0.txt", "1.txt"]
    before = len(events)
    time.sleep(0.05)
    assert len(events) == before
    assert "run 2" not in events


def test_a_signal_leaves_nothing_half_written_and_does_not_wait_for_what_is_opened(tmp_path):
    release, half = threading.Event(), []

    def stop(number):
        if number == 1:
            half.append(replacing(tmp_path / "half.txt"))
            half[0].__enter__()  # as in a thread that will not come to its end
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(run(range(9), run=stop, open=lambda n: release.wait(5) if n == 2 else None))
    assert time.monotonic() - began < 4
    release.set()
    assert list(tmp_path.iterdir()) == []
