"""A folder of cases, with networks that only pretend: what overlaps, what is kept, what is said."""

import dataclasses
import threading
from types import SimpleNamespace

import pytest
from helpers.pretended import (
    Pretended,
    add,
    entries,
    limit_memory,
    make_place,
    predicted_by_resume,
    run,
    with_pictures,
)

from ichseg.app import one_case, pipeline
from ichseg.app.cases import find_cases
from ichseg.app.one_case import Options
from ichseg.engine import machine
from ichseg.errors import OutputError, WeightsError
from ichseg.files import replacing
from ichseg.report import case_files, inference_page, pictures
from ichseg.scan import plausibility, reader


@pytest.fixture(autouse=True)
def allowed(monkeypatch):
    return limit_memory(monkeypatch)


@pytest.fixture
def place(tmp_path):
    return make_place(tmp_path)


def test_what_reading_noticed_is_in_the_result(place, monkeypatch):
    """Also what the voxels' values gave away, for a model that expects HU."""
    read_scan = reader.read_scan
    monkeypatch.setattr(
        reader,
        "read_scan",
        lambda path, *_, **__: dataclasses.replace(read_scan(path), warnings=("of reading",)),
    )
    monkeypatch.setattr(plausibility, "check", lambda found, _: (found, ("of its values",)))
    ensemble = Pretended()
    ensemble.model = SimpleNamespace(expects_hu=True)
    run(place, ensemble)
    said = [entry["report"]["warnings"] for entry in entries(place)]
    assert said == [["of reading", "of its values", "odd"]] * 5


def test_the_next_is_prepared_and_the_last_written_while_the_networks_run(place):
    """The networks run on 102 until 103 is prepared and 101 is being written; and no longer ahead.

    Each wait has a limit, so that stages one after another fail, and do not hang.
    """
    ensemble, waited = Pretended(), []
    events = {name: threading.Event() for name in ("prepared 103", "finishing 101", "predicting")}
    prepare = ensemble.prepare

    def prepare_and_say(plan):
        found = prepare(plan)
        if found.name == 103:
            events["prepared 103"].set()
        return found

    def during_predict(name):
        if name == 102:
            events["predicting"].set()
            waited.append(events["prepared 103"].wait(5))
            waited.append(events["finishing 101"].wait(5))

    def during_finish(name):
        if name == 101:
            events["finishing 101"].set()
            waited.append(events["predicting"].wait(5))

    ensemble.prepare = prepare_and_say
    ensemble.during_predict, ensemble.during_finish = during_predict, during_finish
    run(place, ensemble)
    assert waited == [True, True, True]


def test_at_most_one_case_is_ahead_and_one_behind(place):
    for name in range(106, 116):
        add(place, name)
    ensemble = Pretended()
    idle = threading.Event()
    ensemble.during_predict = lambda name: idle.wait(0.03)
    ensemble.during_finish = lambda name: idle.wait(0.06)
    run(place, ensemble)
    assert ensemble.most_alive == 3
    for name in range(103, 116):  # none is prepared before the last but one has left the networks
        before = ensemble.calls[: ensemble.calls.index(f"prepare {name}")]
        assert f"predicted {name - 2}" in before


def test_where_memory_is_short_nothing_is_read_ahead(place, allowed):
    """The program's 1000, 5 for the network; 20 for one, 30 for the one before, 10 for the next."""
    allowed[0] = machine.MemoryLimit(1064, "someone")
    ensemble = Pretended()
    idle = threading.Event()
    ensemble.during_finish = lambda name: idle.wait(0.02)
    run(place, ensemble)
    assert ensemble.most_alive <= 2
    for name in range(103, 106):
        before = ensemble.calls[: ensemble.calls.index(f"predict {name}")]
        assert f"finished {name - 1}" in before

    allowed[0] = machine.MemoryLimit(1065, "someone")
    ensemble = Pretended()
    ensemble.during_predict = lambda name: idle.wait(0.05)
    run(place, ensemble)
    assert "prepare 104" in ensemble.calls[: ensemble.calls.index("predicted 103")]


def test_a_case_that_needs_more_than_is_allowed_is_refused_before_it_is_prepared(place, allowed):
    allowed[0] = machine.MemoryLimit(1034, "someone")
    ensemble = Pretended()
    ended = run(place, ensemble)
    assert ensemble.calls == []
    assert ended[0].error.endswith(
        "101.mha: its 3x6x6 voxels of 5x1x1 mm need at least 1.0 kB of memory, someone allows "
        "1.0 kB"
    )
    allowed[0] = machine.MemoryLimit(1035, "someone")
    assert not run(place, ensemble)[0].error


def test_pictures_are_counted_in_the_memory_of_a_case(place, allowed):
    allowed[0] = machine.MemoryLimit(15 * 2**20, "someone")
    assert not run(place, Pretended())[0].error
    assert "need at least 21.0 MB of memory" in with_pictures(place)[0].error
    allowed[0] = machine.MemoryLimit(25 * 2**20, "someone")
    assert not with_pictures(place)[0].error


def test_faults_of_one_case_do_not_stop_the_others(place, allowed, capsys):
    allowed[0] = machine.MemoryLimit(2000, "someone")
    for name in (666, 667, 668):
        add(place, name)
    (place / "output").mkdir()
    (place / "output" / "666.mha").write_bytes(b"of an earlier run")
    ended = run(place, Pretended())
    assert [result.error for result in ended[:5]] == [""] * 5
    assert [result.error for result in ended[5:]] == [
        f"{place / 'input'}/666.mha: an ugly one",
        f"{place / 'input'}/667.mha: out of memory; someone allows 2.0 kB",
        f"{place / 'input'}/668.mha: ZeroDivisionError: our fault",
    ]
    assert [bool(entry["outputs"]) for entry in entries(place)] == [True] * 5 + [False] * 3
    assert not (place / "output" / "666.mha").exists()
    assert "Traceback" in capsys.readouterr().err  # of the one that is our fault


def test_what_concerns_every_case_ends_the_run(place):
    ensemble = Pretended()

    def refuse(name):
        if name == 103:
            raise WeightsError("do not fit")

    ensemble.during_predict = refuse
    with pytest.raises(WeightsError, match="do not fit"):
        run(place, ensemble)
    assert [entry["inputs"][0]["filename"] for entry in entries(place)][:1] == ["101.mha"]


def test_an_interruption_loses_the_cases_under_way_and_leaves_nothing_half_written(place):
    ensemble = Pretended()

    def stop(name):
        if name == 104:
            (place / "output" / ".writing-others.mha").write_bytes(b"of a run that was killed")
            half.append(replacing(place / "output" / "half.mha"))
            half[0].__enter__()  # as in a thread that will not come to its end
            raise KeyboardInterrupt

    half = []
    ensemble.during_predict = stop
    with pytest.raises(KeyboardInterrupt):
        run(place, ensemble)
    done = ["101.mha", "102.mha", "103.mha"]
    left = sorted(p.name for p in (place / "output").iterdir())
    assert left == [".writing-others.mha", *done, "results.json"]
    assert [entry["inputs"][0]["filename"] for entry in entries(place)] == done

    again = Pretended()
    run(place, again, resume=True)
    assert [call for call in again.calls if call.startswith("predict ")] == [
        "predict 104", "predict 105",
    ]  # fmt: skip
    assert not list((place / "output").glob(".writing-*"))
    assert len(entries(place)) == 5
    assert predicted_by_resume(place) == []


def test_the_time_left_is_shared_by_the_cases_left(place, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(one_case.time, "monotonic", lambda: now[0])
    ensemble = Pretended()
    takes = {101: 30.0, 102: 10.0, 103: 5.0, 104: 50.0, 105: 0.0}
    ensemble.during_predict = lambda name: now.__setitem__(0, now[0] + takes[name])
    ended = run(place, ensemble, deadline=1100.0)
    # 100 / 5, 70 / 4, 60 / 3, 55 / 2, 5 / 1, each less what writing takes
    assert ensemble.budgets == pytest.approx([19.5, 17.0, 19.5, 27.0, 4.5], abs=1e-3)
    assert not any(result.error for result in ended)
    now[0] = 1000.0
    takes[102] = 75.0
    ended = run(place, Pretended(), deadline=1000.0)
    assert "time budget" in ended[0].error


@pytest.mark.parametrize("is_ct", [True, False])
def test_pictures_are_of_what_the_model_expects(place, monkeypatch, is_ct):
    """Not at a window in HU where the model is of MR."""
    seen = []
    monkeypatch.setattr(pictures, "write_overlay", lambda *_, is_ct: seen.append(is_ct))
    monkeypatch.setattr(case_files, "write_case", lambda *_, is_ct: seen.append(is_ct))
    monkeypatch.setattr(inference_page, "write", lambda *_, **__: "")
    monkeypatch.setattr(plausibility, "check", lambda scan, _: (scan, ()))
    ensemble = Pretended()
    ensemble.model = SimpleNamespace(expects_hu=is_ct, name="m", version="1")
    ensemble.engine = SimpleNamespace(name="none", kind="none", precision="float32")
    job = find_cases(place / "input", place / "out", input_slug="ct", output_slug="mask")
    pipeline.run(job, pipeline.alone(ensemble), Options(place / "out", "fast", pictures=True))
    assert seen == [is_ct] * 10


@pytest.mark.parametrize(
    ("home", "part"), [(pictures, "write_overlay"), (case_files, "write_case")]
)
@pytest.mark.parametrize("error", [OutputError("disk full"), MemoryError(), ValueError("a\nb")])
def test_a_failing_picture_is_a_warning_and_the_mask_stays(
    place, monkeypatch, capsys, home, part, error
):
    def failing(*_, **__):
        raise error

    (place / "output").mkdir()
    (place / "output" / "101.png").write_bytes(b"of an earlier run's mask")
    monkeypatch.setattr(home, part, failing)
    ended = with_pictures(place)
    assert [result.error for result in ended] == [""] * 5
    assert (place / "output" / "101.mha").exists()
    assert part == "write_case" or not (place / "output" / "101.png").exists()
    reason = str(error).split("\n")[0] or "MemoryError"
    assert entries(place)[0]["report"]["warnings"] == ["odd", f"no pictures ({reason})"]
    assert f"[1/5] 101.mha: warning: no pictures ({reason})" in capsys.readouterr().err


def test_a_failing_page_is_a_warning_and_the_masks_stay(place, monkeypatch, capsys):
    def failing(*_, **__):
        raise OutputError("disk full")

    monkeypatch.setattr(inference_page, "write", failing)
    assert [result.error for result in with_pictures(place)] == [""] * 5
    assert all((place / "output" / f"{name}.mha").exists() for name in range(101, 106))
    said = [entry["report"]["warnings"] for entry in entries(place)]
    assert said == [["odd", "no page of all scans (disk full)"]] * 5
    assert "warning: no page of all scans (disk full)" in capsys.readouterr().err


def test_a_case_that_cannot_be_cleaned_up_stops_no_other(place):
    """A folder stands where its mask would be."""
    (place / "output" / "103.mha").mkdir(parents=True)
    ended = run(place, Pretended())
    assert [bool(result.error) for result in ended] == [False, False, True, False, False]
    assert len(entries(place)) == 5
