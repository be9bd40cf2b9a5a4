"""Who does which case, whatever becomes of the workers."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from ichseg.app.cases import InputCase
from ichseg.app.crew.desk import Desk
from ichseg.app.one_case import Task
from ichseg.app.pipeline import Facts
from ichseg.app.results import CaseResult
from ichseg.errors import DeviceError, WeightsError

FACTS = Facts("openvino", "float32", "OpenVINO")


def task(name, size):
    case = InputCase(name, Path(f"{name}.mha"), Path("out") / name)
    made = Task(case, name)
    made.__dict__["stamp"] = {"bytes": size, "modified_ns": 0}
    return made


@pytest.fixture
def desk():
    """With four cases, of which b is the largest, and two workers."""
    desk = Desk()
    desk.begin(1, FACTS)
    desk.begin(2, FACTS)
    desk.open([task("a", 20), task("b", 40), task("c", 10), task("d", 30)])
    return desk


def take(desk, worker):
    found = desk.take(worker)
    return found and found.name


def end(desk, worker, name, said=()):
    desk.end(worker, name, CaseResult(name, f"{name}.mha", "", {}), said)


def ended(desk):
    return [(each.name, result.error) for each, result in desk.collect().ended]


def test_the_largest_case_goes_first_and_each_goes_once(desk):
    assert [take(desk, number) for number in (1, 2, 1, 1, 2)] == ["b", "d", "a", "c", None]
    end(desk, 1, "a", ["a is done"])
    end(desk, 1, "a")
    news = desk.collect()
    assert (news.said[2:], len(news.ended), news.over) == (["a is done"], 1, False)
    assert desk.collect().ended == []
    for worker, name in ((1, "b"), (2, "d"), (1, "c")):
        assert not desk.is_over(worker)
        end(desk, worker, name)
    assert ended(desk) == [("b", ""), ("d", ""), ("c", "")]
    assert desk.is_done()
    assert desk.is_over(1)


def test_what_a_dead_worker_had_is_done_by_another_and_by_it_no_more(desk):
    assert [take(desk, 1), take(desk, 1)] == ["b", "d"]
    end(desk, 1, "b")
    assert desk.lose(1, "killed")  # it had finished one
    assert not desk.lose(2, "never began one")
    end(desk, 1, "d")  # it lives after all, but is not wanted any more
    assert desk.is_over(1)
    assert take(desk, 1) is None
    news = desk.collect()
    assert [each.name for each, _ in news.ended] == ["b"]
    assert news.said[2] == "worker 1 died (killed); others do the 1 case that it had"
    assert news.workers == 0
    desk.begin(3, FACTS)
    assert take(desk, 3) == "d"


def test_a_case_that_takes_its_workers_with_it_fails_alone(desk):
    """After two deaths it is done alone, so that what was beside it is not blamed for the third."""
    for worker in (1, 2):
        assert {take(desk, worker), take(desk, worker)} == {"b", "d"}
        desk.lose(worker, "killed")
    desk.begin(3, FACTS)
    desk.begin(4, FACTS)
    first = take(desk, 3)
    assert take(desk, 3) is None  # nothing beside a suspect
    second = take(desk, 4)
    assert {first, second} == {"b", "d"}
    desk.lose(3, "out of memory")
    end(desk, 4, second)
    why = f"{first}.mha: 3 workers died with it, the last: out of memory"
    assert ended(desk) == [(first, why), (second, "")]
    assert [take(desk, 4), take(desk, 4), take(desk, 4)] == ["a", "c", None]


def test_a_suspect_waits_until_a_worker_has_finished_what_it_has(desk):
    for worker in (1, 2):
        assert take(desk, worker) == "b"
        desk.lose(worker, "killed")
    desk.begin(3, FACTS)
    desk._waiting.rotate(-1)
    assert take(desk, 3) == "d"
    desk._waiting.rotate(1)
    assert take(desk, 3) is None
    end(desk, 3, "d")
    assert take(desk, 3) == "b"


def test_workers_that_would_make_other_masks_end_the_run(desk):
    desk.begin(3, Facts("cuda", "float16", "CUDA"))
    failure = desk.collect().failure
    assert isinstance(failure, DeviceError)
    assert "one has OpenVINO, another CUDA" in str(failure)
    assert desk.is_over(1)


def test_what_no_worker_could_do_ends_the_run_and_what_one_cannot_does_not(desk):
    desk.fail(1, DeviceError("the GPU is lost"))
    assert desk.collect().failure is None
    desk.fail(2, WeightsError("damaged"))
    assert str(desk.collect().failure) == "damaged"
    fresh = Desk()
    fresh.fail(1, DeviceError("no GPU"))
    assert str(fresh.collect().failure) == "no GPU"


def test_where_no_worker_is_left_the_run_ends(desk):
    desk.lose(1, "killed")
    desk.lose(2, "gone, too")
    desk.give_up()
    assert str(desk.collect().failure) == "no worker is left, the last: gone, too"
    done = Desk()
    done.open([])
    done.give_up()
    assert done.collect().failure is None


def test_a_scan_that_cannot_be_looked_at_goes_last(tmp_path):
    desk = Desk()
    desk.begin(1, FACTS)
    gone = Task(SimpleNamespace(image=tmp_path / "gone.mha", follow_links=False), "gone")
    desk.open([gone, task("a", 1)])
    assert [take(desk, 1), take(desk, 1)] == ["a", "gone"]
