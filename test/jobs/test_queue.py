"""Jobs are handed out when what they wait for is done."""

import pytest

from ichseg.errors import DatasetError, TrainingError
from training.jobs import queue
from training.jobs.command import Ending
from training.jobs.job import Job


def graph(**after):
    """Jobs by name, each with the names of those that it waits for, in one word."""
    return [Job(name, (), after=tuple(names)) for name, names in after.items()]


class Place:
    """Has room for so many jobs; the one handed in last ends first."""

    def __init__(self, fails=(), room=99):
        self.fails, self.room = fails, room
        self.given, self.ended, self.stops = [], [], 0
        self.begun = []

    def submit(self, job):
        self.given.append(job)
        self.begun.append(job.name)

    def wait(self):
        job = self.given.pop()
        self.ended.append(job.name)
        return [(job, Ending(1, "bad luck") if job.name in self.fails else Ending(0))]

    def stop(self):
        self.stops += 1


class Watcher:
    def __init__(self):
        self.told = []

    def waits(self, jobs):
        self.told.append(("waits", [job.name for job in jobs]))

    def is_done(self, job, words):
        self.told.append((job.name, words))

    def is_ready(self, job):
        self.told.append((job.name, "ready"))

    def ended(self, job, ending):
        self.told.append((job.name, ending.status))


def nothing_done(_):
    return ""


def test_what_waits_for_nothing_begins_at_once_and_the_rest_as_soon_as_it_can():
    place = Place()
    jobs = graph(a="", b="a", c="", d="bc", e="b")
    assert queue.work(jobs, nothing_done, place, Watcher())
    # a, c; c ends first, then a: b; b ends: d and e, in the order of the graph
    assert place.begun == ["a", "c", "b", "d", "e"]
    assert place.ended == ["c", "a", "b", "e", "d"]


def test_names_of_another_graph_count_as_done():
    place = Place()
    assert queue.work([Job("b", (), after=("a",))], nothing_done, place, Watcher())
    assert place.begun == ["b"]


def test_what_is_done_is_passed_over_and_looked_at_in_its_turn():
    place, watcher, asked = Place(), Watcher(), []

    def done(job):
        asked.append((job.name, list(place.ended)))
        return "there" if job.name in "ac" else ""

    assert queue.work(graph(a="", b="a", c="b"), done, place, watcher)
    assert asked == [("a", []), ("b", []), ("c", ["b"])]
    assert place.begun == ["b"]
    assert watcher.told == [
        ("waits", ["a", "b", "c"]), ("a", "there"), ("b", "ready"), ("b", 0), ("c", "there"),
    ]  # fmt: skip


def test_a_failure_stops_those_that_wait_for_it_and_no_other():
    place = Place(fails=("b",))
    jobs = graph(a="", b="", c="b", d="c", e="a")
    with pytest.raises(TrainingError) as caught:
        queue.work(jobs, nothing_done, place, Watcher())
    assert sorted(place.ended) == ["a", "b", "e"]
    assert str(caught.value) == ("1 of 5 jobs failed: b: bad luck; 2 jobs not begun")
    with pytest.raises(TrainingError, match=r"^2 of 2 jobs failed: a: bad luck; b: bad luck$"):
        queue.work(graph(a="", b=""), nothing_done, Place(fails="ab"), Watcher())


def test_after_a_signal_nothing_begins_and_what_runs_is_waited_for():
    place = Place(fails=("a",))  # interrupted, which is no failure then
    assert not queue.work(
        graph(a="", b="", c="a"), nothing_done, place, Watcher(), stopped=lambda: bool(place.ended)
    )
    assert place.ended == ["b", "a"]


def test_a_refusal_ends_what_runs_and_is_what_is_said():
    place = Place()

    def done(job):
        if job.name == "c":
            raise DatasetError("of another dataset")
        return ""

    with pytest.raises(DatasetError, match="of another dataset"):
        queue.work(graph(a="", b="", c="b"), done, place, Watcher())
    assert place.stops == 1
    assert sorted(place.ended) == ["a", "b"]  # none is left behind
