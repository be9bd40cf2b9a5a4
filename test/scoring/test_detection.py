"""Detection by case: worked by hand from small scans, and the command from folders to files."""

import json

import numpy as np
import pytest

from ichseg.errors import DatasetError
from ichseg.scan import volume
from ichseg.scan.volume import Volume
from training.__main__ import main
from training.scoring import detection

SPACING_MM = (5.0, 10.0, 10.0)  # 0.5 mL a voxel
BLEED, OTHER, UNKNOWN = (1, 2, 2), (1, 6, 6), 2


def put(folder, name, *places, value=1):
    voxels = np.zeros((3, 8, 8), np.uint8)
    for place in places:
        voxels[place] = value
    volume.write(Volume(voxels, SPACING_MM), folder / f"{name}.nii.gz")


def put_results(folder, scores):
    entries = [
        {"outputs": [{"type": "metaio_image", "filename": f"{name}.nii.gz"}],
         "inputs": [{"type": "metaio_image", "filename": f"{name}.nii.gz"}],
         "error_messages": [], "report": {"case_score": score}}
        for name, score in scores.items()
    ]  # fmt: skip
    (folder / "results.json").write_text(json.dumps(entries))


@pytest.fixture
def folders(tmp_path):
    """Two scans with a bleed, one missed; three without, one of them with two false lesions."""
    found, references = tmp_path / "found", tmp_path / "references"
    put(found, "hit", BLEED)
    put(references, "hit", BLEED)
    put(found, "missed", OTHER)
    put(references, "missed", BLEED)
    for name in ("quiet", "silent"):
        put(found, name)
        put(references, name)
    put(found, "false", BLEED, OTHER)
    put(references, "false")
    return found, references


def run(folders, out, *more):
    found, references = folders
    arguments = ["evaluate", "--predictions", str(found), "--out", str(out), *map(str, more)]
    if references is not None:
        arguments += ["--references", str(references)]
    assert main([*arguments, "--workers", "1"] if references else arguments) == 0
    path = out / "detection.json"
    return json.loads(path.read_text()) if path.exists() else None


def test_sensitivity_specificity_and_false_lesions_by_hand(folders, tmp_path, capsys):
    put_results(folders[0], {"hit": 0.9, "missed": 0.2, "quiet": 0.1, "silent": 0, "false": 0.8})
    said = run(folders, tmp_path / "out")
    assert said["scored_by"] == "case_score"
    assert said["area"]["value"] == pytest.approx(5 / 6)  # 0.2 < 0.8 is the one wrong pair
    assert (said["sensitivity"]["hits"], said["sensitivity"]["of"]) == (2, 2)
    assert (said["specificity"]["hits"], said["specificity"]["of"]) == (2, 3)
    assert (said["false_lesions"], said["false_lesions_in"]) == (3, 5)
    assert {scan["name"]: scan["positive"] for scan in said["scans"]} == {
        "hit": True, "missed": True, "quiet": False, "silent": False, "false": False,
    }  # fmt: skip
    assert (tmp_path / "out" / "roc.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "false lesions: 0.60 a scan (3 in 5)" in printed
    assert "area under the ROC curve (case_score): 0.833" in printed


def test_without_case_scores_volumes_rank(folders, tmp_path, caplog):
    said = run(folders, tmp_path / "out")
    assert said["scored_by"] == "volume_ml"
    assert said["area"]["value"] == pytest.approx(4 / 6)  # 0.5, 0.5 mL against 0, 0, 1 mL
    put_results(folders[0], {"hit": 0.9})
    assert run(folders, tmp_path / "again")["scored_by"] == "volume_ml"
    assert "no case score of false (4 of 5 scans)" in caplog.text


def test_where_every_scan_bleeds_there_is_nothing_to_tell(tmp_path):
    put(tmp_path / "found", "a", BLEED)
    put(tmp_path / "references", "a", BLEED)
    assert run((tmp_path / "found", tmp_path / "references"), tmp_path / "out") is None


def test_nothing_of_an_earlier_evaluation_stays(folders, tmp_path):
    run(folders, tmp_path / "out")
    table = tmp_path / "table.csv"
    table.write_text("case,positive\nhit,1\nmissed,1\nquiet,1\nsilent,1\nfalse,1\n")
    assert run(folders, tmp_path / "out", "--positives", table)["roc"] == []
    assert not (tmp_path / "out" / "roc.png").exists()
    for folder in folders:
        for name in ("quiet", "silent", "false"):
            (folder / f"{name}.nii.gz").unlink()
    assert run(folders, tmp_path / "out") is None
    assert (tmp_path / "out" / "evaluation.json").exists()


def test_results_that_are_asked_for_are_there(folders, tmp_path, capsys):
    found, references = map(str, folders)
    arguments = ["evaluate", "--predictions", found, "--references", references, "--workers", "1",
                 "--out", str(tmp_path / "out"), "--results", references]  # fmt: skip
    assert main(arguments) == 1
    assert f"{references}/results.json: no such file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    put_results(folders[1], {"hit": 0.9, "missed": 0.2, "quiet": 0.1, "silent": 0, "false": 0.8})
    assert run(folders, tmp_path / "out", "--results", references)["scored_by"] == "case_score"


def test_a_file_in_place_of_a_folder_of_masks(folders, tmp_path, capsys):
    mask = folders[0] / "hit.nii.gz"
    arguments = ["evaluate", "--predictions", str(mask), "--references", str(folders[1])]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
    assert f"{mask}: no such folder" in capsys.readouterr().err


def test_a_reference_that_only_ignores_tells_nothing(folders, tmp_path, capsys):
    put(folders[0], "unknown", BLEED)
    put(folders[1], "unknown", BLEED, value=UNKNOWN)
    said = run(folders, tmp_path / "out", "--ignore-label", UNKNOWN)
    assert said["left_out"] == ["unknown"]
    assert len(said["scans"]) == 5
    assert "nobody could tell, left out: unknown" in capsys.readouterr().out


def test_a_table_takes_the_place_of_references(folders, tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("case,positive\nhit,1\nmissed,1\nquiet,0\nsilent,0\nfalse,0\n")
    said = run((folders[0], None), tmp_path / "out", "--positives", table)
    assert (said["sensitivity"]["hits"], said["specificity"]["hits"]) == (2, 2)
    assert (said["false_lesions"], said["false_lesions_in"]) == (2, 3)  # of scans without alone
    # and it wins over references
    table.write_text("case,positive\nhit,1\nmissed,1\nquiet,0\nsilent,0\nfalse,1\n")
    said = run(folders, tmp_path / "both", "--positives", table)
    assert (said["sensitivity"]["of"], said["specificity"]["of"]) == (3, 2)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name,bleed\na,1\n", "begins with 'name,bleed'"),
        ("", "begins with 'nothing'"),
        ("case,positive\na,yes\n", "row 2 is 'a,yes', expected case,0 or 1"),
        ("case,positive\na,1\na,0\n", "row 3 has case a again"),
    ],
)
def test_tables_that_are_refused(tmp_path, text, reason):
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(DatasetError, match=reason):
        detection.read_positives(path)


def test_a_table_that_lacks_a_case_and_no_table_at_all(folders, tmp_path, capsys):
    table = tmp_path / "table.csv"
    table.write_text("case,positive\nhit,1\n")
    arguments = ["evaluate", "--predictions", str(folders[0]), "--out", str(tmp_path / "out")]
    for references in ([], ["--references", str(folders[1])]):
        assert main([*arguments, *references, "--positives", str(table)]) != 0
        said = capsys.readouterr().err
        assert f"{table}: no row for case false and 3 more, expected one for each mask" in said
    assert main([*arguments, "--positives", str(tmp_path / "none.csv")]) != 0
    assert "none.csv: cannot read as a table (No such file or directory)" in capsys.readouterr().err
    assert main(arguments) != 0
    assert "--references DIR, or --positives CSV" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_regions_that_share_voxels_are_counted_once(folders, tmp_path):
    """All that was found is of both regions: as without regions, not twice as much."""
    plain = run(folders, tmp_path / "plain")
    regions = run(folders, tmp_path / "regions", "--labels", "bleed=1+2,again=1")
    assert regions == plain
    assert plain["false_lesions"] == 3
