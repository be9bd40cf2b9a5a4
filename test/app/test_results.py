"""What a run leaves in its output folder, for people and for later runs."""

import json
import os

import numpy as np
import pytest
import SimpleITK as sitk
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

from ichseg.app import case_report, contents, main, pipeline, results
from ichseg.app.arguments import parse_arguments
from ichseg.app.cases import find_cases
from ichseg.app.one_case import Options
from ichseg.app.results import Record
from ichseg.engine import machine
from ichseg.errors import OutputError
from ichseg.report import pictures


@pytest.fixture(autouse=True)
def allowed(monkeypatch):
    return limit_memory(monkeypatch)


@pytest.fixture
def place(tmp_path):
    return make_place(tmp_path)


def test_what_results_json_says(place):
    (place / "input" / "102.mha").unlink()
    ensemble = Pretended()
    first = run(place, ensemble)[0]
    report = entries(place)[0]["report"]
    assert report == json.loads(json.dumps(first.report))
    assert list(report) == [
        "volume_ml", "case_score", "lesion_count", "lesions", "disagreement", "warnings", "ran",
        "seconds", "made_from", "mask_sha256",
    ]  # fmt: skip
    assert report["volume_ml"] == 0.01
    assert report["lesions"] == [
        {
            "label": 1,
            "volume_ml": 0.005,
            "centroid_mm": [at, at, z],
            "box_mm": [[at - 0.5, at - 0.5, z - 2.5], [at + 0.5, at + 0.5, z + 2.5]],
            "mean_hu": 101.0,
            "mean_probability": None,
            "max_probability": None,
        }
        for at, z in ((1.0, 0.0), (4.0, 10.0))
    ]
    assert (report["disagreement"], report["warnings"]) == (0.25, ["odd"])
    assert set(report["seconds"]) == {"read", "write", "compile", "total"}


def test_a_long_table_of_lesions_is_cut_and_says_so(place, monkeypatch):
    monkeypatch.setattr(case_report, "MOST_LESIONS", 1)
    report = run(place, Pretended())[0].report
    assert (len(report["lesions"]), report["lesion_count"]) == (1, 2)
    assert report["warnings"] == ["odd", "2 lesions, the 1 largest are listed"]


def test_each_scan_is_looked_up_once(place, monkeypatch, allowed):
    """A folder of DICOM slices may have thousands of files."""
    allowed[0] = machine.MemoryLimit(10_000, "someone")
    looked_up, stamp_of = [], contents.stamp_of

    def noted(image, **given):
        looked_up.append(image.name)
        return stamp_of(image, **given)

    monkeypatch.setattr(contents, "stamp_of", noted)
    run(place, Pretended(), resume=True)
    assert sorted(looked_up) == [f"{name}.mha" for name in range(101, 106)]


def test_resume_does_again_what_has_changed(place):
    run(place, Pretended())
    assert predicted_by_resume(place) == []
    mask = place / "output" / "101.mha"
    mask.write_bytes(mask.read_bytes()[:-1])
    (place / "output" / "102.mha").unlink()
    add(place, 103, lesions=((1, 1, 1),))
    ended = entries(place)
    ended[3]["report"]["made_from"]["preset"] = "full"
    del ended[4]["report"]["made_from"]  # as an older version wrote it
    (place / "output" / "results.json").write_text(json.dumps(ended))
    assert predicted_by_resume(place) == [f"predict {name}" for name in range(101, 106)]
    assert predicted_by_resume(place) == []


def test_another_scan_of_the_same_size_and_date_is_done(place):
    """As of an archive that gives all of its files one date."""
    scan = place / "input" / "103.mha"
    sitk.WriteImage(sitk.ReadImage(scan), scan, useCompression=False)
    run(place, Pretended())
    found = scan.stat()
    content = bytearray(scan.read_bytes())
    content[-2] ^= 1  # of the last voxel
    scan.write_bytes(content)
    os.utime(scan, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert predicted_by_resume(place) == ["predict 103"]


@pytest.mark.parametrize("count", [15, 16, 29, 30, 32, 45])
def test_pieces_of_a_scan_are_not_all_of_air(tmp_path, count):
    """However many slices it has, of which each begins and ends with air."""
    scan, date = tmp_path / "scan.nii", (0, 1_700_000_000_000_000_000)
    content = np.zeros((count, 64, 1024), np.uint8)
    found = []
    for value in (30, 31):
        content[:, 16:48] = value
        scan.write_bytes(content)
        os.utime(scan, ns=date)
        found.append(contents.stamp_of(scan))
    assert found[0]["bytes"] == found[1]["bytes"]
    assert found[0]["modified_ns"] == found[1]["modified_ns"]
    assert found[0]["pieces"] != found[1]["pieces"]


def test_without_resume_everything_is_done_again(place):
    run(place, Pretended())
    ensemble = Pretended()
    run(place, ensemble)
    assert len(ensemble.budgets) == 5


def test_results_json_is_not_written_for_each_case(place, monkeypatch):
    """4,000 damaged scans would write 8 million entries."""
    for name in range(200, 260):
        (place / "input" / f"{name}.mha").write_bytes(b"damaged")
    written, write_results = [], results.write_results

    def counted(ended, path):
        ended = list(ended)
        written.append(len(ended))
        write_results(ended, path)

    monkeypatch.setattr(results, "write_results", counted)
    run(place, Pretended())
    assert written == [65]
    assert len(entries(place)) == 65
    assert not (place / "output" / "results.jsonl").exists()


def test_what_a_killed_run_left_in_the_journal_is_gone_on_from(place, monkeypatch):
    """The journal's last line is cut off, as by SIGKILL; results.json was never written."""
    with monkeypatch.context() as killed:
        killed.setattr(Record, "save", lambda self: None)
        run(place, Pretended())
    journal = place / "output" / "results.jsonl"
    assert not (place / "output" / "results.json").exists()
    journal.write_bytes(journal.read_bytes()[:-20])
    assert predicted_by_resume(place) == ["predict 105"]
    assert not journal.exists()
    assert len(entries(place)) == 5


@pytest.mark.parametrize(("every_s", "expected"), [(30.0, [0] * 5), (-1.0, [0, 1, 2, 3, 4])])
def test_a_long_run_writes_results_json_meanwhile(place, monkeypatch, every_s, expected):
    monkeypatch.setattr(results, "_EVERY_S", every_s)
    monkeypatch.setattr(results, "_SHARE", float("inf"))  # it may take as long as it likes
    ensemble, seen = Pretended(), []
    path = place / "output" / "results.json"
    ensemble.during_finish = lambda _: seen.append(len(entries(place)) if path.exists() else 0)
    run(place, ensemble)
    assert seen == expected


@pytest.mark.parametrize(
    ("before", "now", "again"),
    [
        ({"pictures": True}, {"pictures": False}, False),
        ({"pictures": False}, {"pictures": True}, True),
    ],
)
def test_a_picture_that_is_asked_for_now_is_made(place, before, now, again):
    run_as = {True: with_pictures, False: lambda place, **more: run(place, Pretended(), **more)}
    run_as[before["pictures"]](place)
    (place / "output" / "101.mha").touch()
    inode = (place / "output" / "101.mha").stat().st_ino
    run_as[now["pictures"]](place, resume=True)
    assert ((place / "output" / "101.mha").stat().st_ino != inode) == again


@pytest.mark.parametrize(
    "gone", ["101.png", "report/cases/101.mha.json", "report/cases/101.mha_prediction.nii.gz"]
)
def test_a_case_whose_pictures_are_gone_is_not_finished(place, gone):
    with_pictures(place)
    (place / "output" / gone).unlink()
    ensemble = Pretended()
    run(place, ensemble, resume=True)  # nobody asks for pictures
    assert ensemble.calls == []
    with_pictures(place, resume=True)
    assert (place / "output" / gone).is_file()


def test_a_case_whose_pictures_failed_is_not_finished(place, monkeypatch):
    """As on a full disk: with room again, another run makes them."""

    def failing(*_, **__):
        raise OutputError("disk full")

    with monkeypatch.context() as full:
        full.setattr(pictures, "write_overlay", failing)
        with_pictures(place)
    assert not list((place / "output").glob("*.png"))
    assert entries(place)[0]["report"]["made_from"]["pictures"] is False
    with_pictures(place, resume=True)
    assert len(list((place / "output").glob("*.png"))) == 5


def test_what_an_earlier_run_made_of_a_scan_does_not_stay_beside_a_new_mask(place):
    """It may be of another patient; what nobody says is ours stays."""
    with_pictures(place)
    output = place / "output"
    (output / "mine.png").write_bytes(b"kept")
    add(place, 103, lesions=((0, 2, 2),))
    (place / "input" / "105.mha").write_bytes(b"damaged")
    ended = run(place, Pretended())
    assert [bool(result.error) for result in ended] == [False] * 4 + [True]
    assert [path.name for path in output.glob("*.png")] == ["mine.png"]
    assert not list((output / "report" / "cases").iterdir())
    assert not (output / "report" / "index.html").exists()
    assert sorted(path.name for path in output.glob("*.mha")) == [f"10{i}.mha" for i in range(1, 5)]


def test_what_was_found_in_other_scans_stays_while_their_masks_are_unaltered(place, capsys):
    """As where scans are given one by one, or in parts, with one output folder."""
    run(place, Pretended())
    before = {entry["inputs"][0]["filename"]: entry for entry in entries(place)}
    for path in (place / "input").iterdir():
        path.unlink()
    (place / "output" / "101.mha").unlink()
    (place / "output" / "102.mha").write_bytes(b"altered")
    add(place, 200)
    ended = run(place, Pretended(), resume=True)
    assert [result.image for result in ended] == ["200.mha"]
    named = [entry["inputs"][0]["filename"] for entry in entries(place)]
    assert named == ["200.mha", "103.mha", "104.mha", "105.mha"]
    assert entries(place)[1:] == [before[name] for name in named[1:]]
    said = f"{place / 'output'}/results.json keeps what earlier runs found in 3 other scans"
    assert said in capsys.readouterr().err
    (place / "input" / "200.mha").unlink()
    add(place, 103)
    os.utime(place / "input" / "103.mha", (1, 1))  # it is done again, and listed once
    run(place, Pretended())
    named = [entry["inputs"][0]["filename"] for entry in entries(place)]
    assert named == ["103.mha", "200.mha", "104.mha", "105.mha"]


def test_a_scan_that_failed_stays_in_the_results_until_it_is_done_again(place, capsys):
    """As in a loop over scans, whose last run alone would be looked at."""
    add(place, 666)
    run(place, Pretended())
    failed = entries(place)[-1]
    for path in (place / "input").iterdir():
        path.unlink()
    add(place, 101)
    run(place, Pretended())
    assert entries(place)[-1] == failed
    assert failed["error_messages"] == [f"{place / 'input'}/666.mha: an ugly one"]
    said = "results.json keeps what earlier runs found in 5 other scans, 1 of which failed"
    assert said in capsys.readouterr().err
    (place / "input" / "101.mha").rename(place / "input" / "666.mha")
    run(place, Pretended())
    assert not any(entry["error_messages"] for entry in entries(place))


@pytest.mark.parametrize("text", ['{"Dice": 0.9}', '[{"outputs": "none"}]', "[1, 2", "[NaN]"])
def test_the_results_of_something_else_are_not_replaced(place, text):
    """``results.json`` is a name that many programs use; the earlier masks stay, too."""
    run(place, Pretended())
    output = place / "output"
    (output / "results.json").write_text(text)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    ensemble = Pretended()
    with pytest.raises(OutputError, match=r"json: not the results of an earlier run .*; move it"):
        run(place, ensemble)
    assert ensemble.calls == []
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_a_mask_of_another_scan_of_the_same_name_is_replaced_in_words(place, capsys):
    """As of ``patient1/ct.nii.gz`` and ``patient2/ct.nii.gz``, one by one into one folder."""
    run(place, Pretended())
    os.utime(place / "input" / "101.mha", (1, 1))  # the same scan, copied
    add(place, 102, lesions=((0, 2, 2),))
    capsys.readouterr()
    run(place, Pretended())
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "replaced" in line]
    assert said == (
        "[2/5] 102.mha: warning: another scan of this name was segmented before; its mask "
        f"{place / 'output'}/102.mha and its results are replaced"
    )


def test_an_mhd_whose_voxels_changed_under_another_name_is_not_finished(tmp_path):
    (tmp_path / "a.mhd").write_text(
        "NDims = 3\nDimSize = 2 2 2\nElementSpacing = 1 1 1\nElementType = MET_SHORT\n"
        "ElementDataFile = voxels.raw\n"
    )
    (tmp_path / "voxels.raw").write_bytes(bytes(16))
    before = contents.stamp_of(tmp_path / "a.mhd")
    (tmp_path / "voxels.raw").write_bytes(b"1" * 16)
    assert contents.stamp_of(tmp_path / "a.mhd")["pieces"] != before["pieces"]


def test_a_refused_case_is_in_the_results_and_takes_nothing(place):
    (place / "input" / "100.mha").symlink_to("nowhere")
    (place / "output").mkdir()
    (place / "output" / "100.mha").write_bytes(b"of an earlier run")
    ended = run(place, Pretended())
    assert not (place / "output" / "100.mha").exists()
    assert [bool(result.error) for result in ended] == [True] + [False] * 5
    assert entries(place)[0]["error_messages"] == [
        f"{place / 'input'}/100.mha: a link to nothing, expected a scan"
    ]


def test_where_every_case_is_refused_nothing_of_an_earlier_run_stays(place):
    """Neither its masks nor its pictures and its page, which show scans that now fail."""
    with_pictures(place)
    for scan in list((place / "input").iterdir()):
        scan.unlink()
        scan.symlink_to("nowhere")
    output = place / "output"
    job = find_cases(place / "input", output, input_slug="a", output_slug="b")
    ended = pipeline.refuse_all(job, Options(output, "fast", made_from={"preset": "fast"}))
    assert [bool(result.error) for result in ended] == [True] * 5
    left = [path for path in output.rglob("*") if path.is_file() and "assets" not in path.parts]
    assert left == [output / "results.json"]
    assert len(entries(place)) == 5


def test_a_refused_case_in_the_output_folder_itself_stays(place):
    """Its mask would have its name."""
    (place / "input" / "100.mha").symlink_to("nowhere")
    job = find_cases(place / "input", place / "input", input_slug="a", output_slug="b")
    results.refuse_cases(job, Record(place / "input", job.cases))
    assert (place / "input" / "100.mha").is_symlink()


def test_a_server_knows_every_file_that_a_job_writes(place):
    """It removes them before the next one, all but what is the same for every page."""
    with_pictures(place)
    output = place / "output"
    job = find_cases(place / "input", output, input_slug="a", output_slug="b")
    arguments = parse_arguments(["--output", str(output), "--report"])
    there = {path for path in output.rglob("*") if path.is_file() and "assets" not in path.parts}
    assert there <= set(main._will_write(arguments, job))
    assert any(path.suffix == ".png" for path in there)
