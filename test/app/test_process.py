"""The entry point, run as a user runs it: another process, files in, files out."""

import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_bundle

import ichseg
from ichseg.scan import volume
from ichseg.scan.volume import Volume

PROCESS = Path(__file__).parents[2] / "process.py"


@pytest.fixture
def place(tmp_path, scan):
    make_bundle(tmp_path / "weights")
    volume.write(scan, tmp_path / "input" / "scan.mha")
    return tmp_path


def command(place, *flags):
    return [
        sys.executable, str(PROCESS), "--input", str(place / "input"), "--output",
        str(place / "output"), "--weights", str(place / "weights"), "--device", "cpu",
        "--preset", "fast", *flags,
    ]  # fmt: skip


def run(place, *flags, expect=0, **options):
    done = subprocess.run(
        command(place, *flags), capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == expect, done.stderr
    return done.stderr.strip().splitlines()


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_flat_folder(place, scan):
    (place / "input" / "again.nii.gz").write_bytes(b"")
    volume.write(scan, place / "input" / "again.nii.gz")
    run(place, "--report")
    assert [name for name in files(place / "output") if "/" not in name] == [
        "again.nii.gz", "again.png", "results.json", "scan.mha", "scan.png",
    ]  # fmt: skip
    page = (place / "output" / "report" / "index.html").read_text()
    assert 'data-name="again.nii.gz"' in page
    assert 'src="cases/scan.mha.jpg"' in page
    mask = volume.read(place / "output" / "scan.mha")
    assert mask.voxels.dtype == np.uint8
    assert (mask.spacing_mm, mask.origin_mm, mask.direction) == (
        scan.spacing_mm, scan.origin_mm, scan.direction,
    )  # fmt: skip
    results = json.loads((place / "output" / "results.json").read_text())
    assert [r["outputs"] for r in results] == [
        [{"type": "metaio_image", "filename": "again.nii.gz"}],
        [{"type": "metaio_image", "filename": "scan.mha"}],
    ]
    report = results[1]["report"]
    expected_ml = np.count_nonzero(mask.voxels) * 5 * 0.8 * 0.9 / 1000
    assert report["volume_ml"] == pytest.approx(expected_ml, abs=1e-3)
    assert report["ran"]["networks"] == ["3d_fullres fold 0"]
    assert results[1]["error_messages"] == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.skipif(not importlib.util.find_spec("SimpleITK"), reason="reads and writes files")
def test_two_scans_on_a_gpu(place, scan):
    volume.write(scan, place / "input" / "again.nii.gz")
    lines = run(place, "--device", "cuda", "--preset", "full")
    masks = [volume.read(place / "output" / n).voxels for n in ("scan.mha", "again.nii.gz")]
    np.testing.assert_array_equal(*masks)
    run(place, "--device", "cpu", "--preset", "full")
    assert np.mean(masks[0] != volume.read(place / "output" / "scan.mha").voxels) < 0.01
    assert not any("stay on the host" in line for line in lines)
    assert any(" of the GPU's" in line for line in lines)


def test_platform_layout_gets_one_mha_and_no_pictures(place):
    folder = place / "input" / "images" / "head-ct"
    folder.mkdir(parents=True)
    (place / "input" / "scan.mha").rename(folder / "1-2.mha")
    entry = {"image": {"name": "x"}, "interface": {"slug": "s", "relative_path": "images/head-ct"}}
    (place / "input" / "inputs.json").write_text(json.dumps([entry]))
    run(place, "--report")
    assert files(place / "output") == ["images/bleed/1-2.mha", "results.json"]


def test_one_bad_scan_does_not_stop_the_others(place, scan):
    import SimpleITK as sitk

    whole = (place / "input" / "scan.mha").read_bytes()
    (place / "input" / "a_truncated.mha").write_bytes(whole[: len(whole) // 2])
    nan = scan.voxels.astype(np.float32)
    nan[0, 0, 0] = np.nan
    volume.write(scan.with_voxels(nan), place / "input" / "b_nan.mha")
    sitk.WriteImage(sitk.Image(8, 8, sitk.sitkInt16), str(place / "input" / "c_flat.mha"))
    lines = run(place, expect=1)
    assert lines[-1].startswith("error: 3 of 4 cases failed: ")
    for reason in (
        "a_truncated.mha: damaged",
        "b_nan.mha: NaN or infinite in 1 voxel,",
        "c_flat.mha: 2D",
    ):
        assert reason in lines[-1]
    assert files(place / "output") == ["results.json", "scan.mha"]
    results = json.loads((place / "output" / "results.json").read_text())
    assert [bool(r["error_messages"]) for r in results] == [True, True, True, False]
    assert results[0]["outputs"] == []


def test_missing_and_altered_weights(place):
    path = place / "weights" / "3d_fullres_fold_1.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert "fold_1.safetensors: altered" in run(place, expect=1)[-1]
    path.unlink()
    assert "fold_1.safetensors: no such file, which model.json names" in run(place, expect=1)[-1]
    (place / "weights" / "model.json").unlink()
    assert "model.json: no such file, expected a weights bundle in" in run(place, expect=1)[-1]
    assert files(place / "output") == []


def test_unwritable_output(place):
    (place / "output").write_text("a file where the folder should be")
    assert run(place, expect=1)[-1] == (
        f"error: {place / 'output'}: cannot write results there "
        f"({place / 'output'} is a file, expected a folder)"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_output(place):
    (place / "output").mkdir(mode=0o500)
    assert "cannot write results there (Permission denied)" in run(place, expect=1)[-1]


def test_rotated_geometry_comes_back_bit_for_bit(place, scan):
    angle = 0.3
    tilted = Volume(
        scan.voxels,
        (5.000001, 0.1 + 0.2, 1 / 3),
        (-1 / 3, 1e-7, 123456.789),
        (
            np.cos(angle), -np.sin(angle), 0.0, np.sin(angle), np.cos(angle), 0.0, 0.0, 0.0, 1.0,
        ),
    )  # fmt: skip
    volume.write(tilted, place / "input" / "scan.mha")
    run(place)
    mask, image = (volume.read(place / f / "scan.mha") for f in ("output", "input"))
    assert (mask.spacing_mm, mask.origin_mm, mask.direction) == (
        image.spacing_mm, image.origin_mm, image.direction,
    )  # fmt: skip
    assert image.origin_mm == tilted.origin_mm


def test_resume_leaves_what_is_finished(place, scan):
    volume.write(scan, place / "input" / "again.mha")
    run(place)
    masks = [place / "output" / name for name in ("again.mha", "scan.mha")]
    before = [mask.stat().st_mtime_ns for mask in masks]
    lines = run(place, "--resume")
    assert "2 of 2 cases are finished already" in lines
    assert [mask.stat().st_mtime_ns for mask in masks] == before
    masks[0].write_bytes(b"")
    assert "1 of 2 cases are finished already" in run(place, "--resume")
    assert [mask.stat().st_mtime_ns > time for mask, time in zip(masks, before, strict=True)] == [
        True, False,
    ]  # fmt: skip
    assert "0 of 2 cases are finished already" in run(place, "--resume", "--preset", "balanced")


def test_results_that_are_none_are_not_gone_on_from(place):
    (place / "output").mkdir()
    (place / "output" / "results.json").write_text("[{}]")
    assert "results.json: not the results of an earlier run" in run(place, "--resume", expect=1)[-1]
    assert (place / "output" / "results.json").read_text() == "[{}]"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_run_at_once_and_leaves_nothing_half_done(place, scan, number):
    """While hours of work are before it."""
    large = np.tile(scan.voxels.repeat(8, 0), (1, 20, 20))
    volume.write(Volume(large, scan.spacing_mm), place / "input" / "zz.mha")
    with subprocess.Popen(
        command(place, "--preset", "full"), stderr=subprocess.PIPE, text=True
    ) as process:
        said = []
        for line in process.stderr:
            said.append(line)
            if "zz.mha" in line:
                break
        sent = time.monotonic()
        process.send_signal(number)
        rest = process.stderr.read()
        assert process.wait() == 128 + number
        assert time.monotonic() - sent < 4.5  # the platform kills after 5 s
    assert rest.strip().splitlines()[-1].startswith(f"error: stopped by {number.name}")
    left = files(place / "output") if (place / "output").exists() else []
    # A mask is there a moment before its result; without that, --resume does the case again.
    assert left in ([], ["scan.mha"], ["results.json", "scan.mha"])
    if left:
        volume.read(place / "output" / "scan.mha")


def test_what_does_not_fit_the_memory_is_refused_in_words(place):
    """The program takes some 200 MB before any scan; the large one has 360 MB of voxels."""
    large = np.zeros((500, 600, 600), np.int16)
    volume.write(Volume(large, (1.0, 1.0, 1.0)), place / "input" / "large.mha")

    def limited():
        resource.setrlimit(resource.RLIMIT_DATA, (384 << 20, 384 << 20))

    lines = run(place, expect=1, preexec_fn=limited)
    assert "1 of 2 cases failed" in lines[-1]
    assert "large.mha: its" in lines[-1]
    assert "GB of memory, RLIMIT_DATA allows 0." in lines[-1]
    assert files(place / "output") == ["results.json", "scan.mha"]


def test_masks_never_replace_scans(place):
    before = (place / "input" / "scan.mha").read_bytes()
    lines = run(place, "--output", str(place / "input"), expect=1)
    assert lines[-1].endswith("scan.mha: its mask would replace it; name another --output")
    assert (place / "input" / "scan.mha").read_bytes() == before


def test_a_run_says_little(place):
    lines = run(place)
    assert len(lines) < 10
    assert max(map(len, lines)) < 300


def test_a_time_budget_too_short_is_said_and_one_long_enough_changes_nothing(place):
    lines = run(place, "--time-budget", "0.2", expect=1)
    assert "scan.mha: " in lines[-1]
    assert "of the time budget" in lines[-1]
    assert files(place / "output") == ["results.json"]
    run(place, "--time-budget", "600")
    budgeted = (place / "output" / "scan.mha").read_bytes()
    report = json.loads((place / "output" / "results.json").read_text())[0]["report"]
    assert 0 < report["ran"]["time_budget_s"] < 600
    run(place)
    assert (place / "output" / "scan.mha").read_bytes() == budgeted


def test_the_same_input_gives_the_same_bytes(place, scan):
    volume.write(scan, place / "input" / "again.nii.gz")
    run(place, "--preset", "full")
    masks = [place / "output" / name for name in ("again.nii.gz", "scan.mha")]
    first = [mask.read_bytes() for mask in masks]
    run(place, "--preset", "full")
    assert [mask.read_bytes() for mask in masks] == first


def entries(place):
    return json.loads((place / "output" / "results.json").read_text())


def test_nohup_is_honoured(place, scan):
    """A signal that the process was started to ignore does not end it."""
    large = np.tile(scan.voxels.repeat(4, 0), (1, 8, 8))
    volume.write(Volume(large, scan.spacing_mm), place / "input" / "zz.mha")
    with subprocess.Popen(
        command(place), stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    ) as process:  # fmt: skip
        for line in process.stderr:
            if "zz.mha" in line:
                break
        process.send_signal(signal.SIGHUP)
        process.communicate()
        assert process.returncode == 0


def test_without_stderr_the_masks_are_the_same(place):
    run(place)
    mask = (place / "output" / "scan.mha").read_bytes()
    shell = 'exec "$@" 0<&- 1>&- 2>&-'
    shutil.rmtree(place / "output")
    subprocess.run(["sh", "-c", shell, "sh", *command(place)], check=True)
    assert (place / "output" / "scan.mha").read_bytes() == mask
    assert files(place / "output") == ["results.json", "scan.mha"]


def test_names_that_are_not_text_or_would_forge_a_line(place, scan):
    names = [b"caf\xe9.mha", b"x\nerror: forged.mha", b"\x1b[2J.nii.gz"]
    for name in names:
        target = os.fsdecode(os.path.join(os.fsencode(place / "input"), name))  # noqa: PTH118
        volume.write(scan, Path(target))
    (place / "input" / os.fsdecode(b"bad\xff\n.mha")).write_bytes(b"damaged")
    lines = run(place, "--report", expect=1)
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert lines[-1].startswith("error: 1 of 5 cases failed: ")
    assert r"bad\udcff\n.mha" in lines[-1]
    written = {os.fsencode(entry["inputs"][0]["filename"]) for entry in entries(place)}
    assert written == {b"scan.mha", b"bad\xff\n.mha", *names}
    masks = {os.fsencode(path.name) for path in (place / "output").glob("*.[mn]*")}
    assert {name for name in masks if not name.endswith(b".png")} == {b"scan.mha", *names}
    again = run(place, "--report", "--resume", expect=1)
    assert "4 of 5 cases are finished already" in again


def test_an_api_that_is_misspelt_in_the_environment(place):
    lines = run(place, expect=2, env={**os.environ, "ICHSEG_API": "invok"})
    assert lines[-1].endswith("error: ICHSEG_API is 'invok', expected exec or invoke")
    run(place, env={**os.environ, "ICHSEG_API": ""})


@pytest.mark.parametrize("text", ["[" * 100_000, "{}" * 2, '[{"inputs": 7}]', "7", "[null]"])
def test_an_earlier_results_json_of_any_other_shape(place, text):
    (place / "output").mkdir()
    (place / "output" / "results.json").write_text(text)
    lines = run(place, "--resume", expect=1)
    assert "results.json: not the results of an earlier run" in lines[-1]
    assert len(lines[-1]) < 500
    assert not any("Traceback" in line for line in lines)


@pytest.mark.parametrize("megabytes", [60, 150, 570, 620, 640, 700, 1500])
def test_an_address_space_that_does_not_suffice_is_one_line(place, megabytes):
    def limited():
        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))

    done = subprocess.run(
        command(place), capture_output=True, text=True, check=False, preexec_fn=limited, timeout=60
    )
    assert done.returncode in (0, 1), done.stderr
    if done.returncode:
        assert done.stderr.splitlines()[-1].startswith("error: "), done.stderr
    else:
        assert (place / "output" / "scan.mha").exists()


def test_warnings_of_libraries_stay_out_of_the_log(place, scan):
    """Of numpy, about numbers that a case's result does not need."""
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); from ichseg.app import main, one_case; "
        "import numpy as np; of_scan = one_case.memory.of_scan\n"
        "def warned(*a, **k):\n    np.float32(1e30) * np.float32(1e30); return of_scan(*a, **k)\n"
        "one_case.memory.of_scan = warned; sys.exit(main.main())"
    )
    given = command(place)
    done = subprocess.run(
        [given[0], "-c", code, str(PROCESS.parent), *given[2:]],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "Warning" not in done.stderr


def test_what_a_result_was_made_from(place):
    run(place, "--precision", "float32")
    made = entries(place)[0]["report"]["made_from"]
    assert made["version"] == ichseg.__version__
    assert (made["engine"], made["precision"], made["pictures"]) == ("openvino", "float32", False)
    run(place, "--resume", "--device", "torch-cpu")
    assert entries(place)[0]["report"]["made_from"]["engine"] == "torch-cpu"
