"""A few faults of each kind; `python test/robustness/faults.py` provokes more."""

from __future__ import annotations

import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from robustness import fault_runs, faults
from robustness.faults import Ended, Trial

from ichseg.app import console
from ichseg.app.cases import InputCase, Job, check_output
from ichseg.app.results import CaseResult, Record
from ichseg.app.start import Stopped
from ichseg.engine import torch_device, torch_engine
from ichseg.errors import DeviceError, OutputError
from ichseg.files import WRITTEN_SUFFIXES, replacing
from ichseg.predict.ensemble import Ensemble
from ichseg.report import case_files, inference_page, pictures
from ichseg.scan import volume
from ichseg.scan.volume import Volume

SEED = 7
# Of these, how many: those whose moment is after a line in the middle of the run.
IN_THE_MIDDLE = {
    faults.sigkill: 2, faults.sigterm: 1, faults.output_removed: 1, faults.output_is_a_file: 1,
}  # fmt: skip
# Of these, which: room for 554 bytes of a mask of 800, or for six pages; a scan that is cut; a
# time budget.
CHOSEN = {
    faults.file_limit: 51, faults.disk_full: 2, faults.log_full: 0, faults.input_changes: 1,
    faults.clock_jumps: 5, faults.sigkill_over_earlier: 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return fault_runs.make_scene(tmp_path_factory.mktemp("faults") / "scene")


def test_no_fault_of_the_machine_costs_more_than_the_cases_under_way(scene, tmp_path):
    wanted = list(CHOSEN.items())
    for fault, count in IN_THE_MIDDLE.items():
        moments = (
            (n, fault_runs.any_moment(scene, faults.dice(SEED, fault, n))) for n in range(99)
        )
        middle = [n for n, (line, _) in moments if 7 < line < scene.lines - 7]
        wanted += [(fault, n) for n in middle[:count]]
    with ThreadPoolExecutor(3) as at_once:
        trials = list(
            at_once.map(lambda one: faults.provoke(scene, tmp_path, *one, seed=SEED), wanted)
        )
    assert [t for t in trials if t.bad] == []
    assert len(trials) == 11
    hows = [t.how for t in trials]
    assert hows.count("killed") >= 2
    assert hows.count("stopped") >= 1
    assert hows.count("error line") >= 3


@pytest.mark.parametrize("number", range(2))
def test_a_gpu_that_is_lost_ends_the_run_in_words_and_resume_goes_on(scene, tmp_path, number):
    trial = faults.provoke(scene, tmp_path, faults.gpu_lost, number, SEED)
    assert trial.bad == ()
    assert trial.how == "error line"
    assert trial.why.startswith("error: the GPU was lost")
    assert trial.why.count("error") <= 3  # one reason, and not that of each case


def test_every_fault_is_provoked_here():
    assert set(faults.FAULTS) == {*IN_THE_MIDDLE, *CHOSEN, faults.gpu_lost}


@pytest.mark.parametrize("words", faults.GPU_ERRORS)
@pytest.mark.parametrize("kind", [RuntimeError, torch.AcceleratorError])
def test_what_cuda_says_of_a_lost_gpu_becomes_one_line(words, kind):
    with pytest.raises(DeviceError) as caught, torch_device.guard():
        raise kind(words)
    said = str(caught.value)
    assert said.startswith(f"the GPU was lost or failed ({words.splitlines()[0]}); ")
    assert "--resume" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),  # a fault of ours
        ValueError("CUDA error"),
        DeviceError("the GPU's memory does not hold one tile"),
    ],
)
def test_other_errors_pass_by_as_they_are(error):
    with pytest.raises(type(error)) as caught, torch_device.guard():
        raise error
    assert caught.value is error


def test_a_gpu_lost_while_its_free_memory_is_asked_for(monkeypatch):
    def lost(_):
        raise torch.AcceleratorError("CUDA error: unknown error")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lost)
    with pytest.raises(DeviceError, match="the GPU was lost"):
        torch_device.free_bytes(torch.device("cuda"))
    assert torch_engine.engine_on(torch.device("cpu")).device_bytes() is None


def test_a_lost_gpu_is_not_tried_again_on_the_host(scene, monkeypatch):
    """As one whose memory is full is."""
    ensemble = Ensemble.load(scene.folder / "weights", "torch-cpu")
    scan = volume.read(scene.folder / "input" / "scan5.mha")
    calls = []

    def lost(*_):
        calls.append(1)
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch_engine, "forward", lost)
    with pytest.raises(DeviceError, match="the GPU was lost"):
        ensemble.segment(scan, "fast")
    assert len(calls) == 1


def test_a_gpu_lost_while_scores_are_restored(scene, monkeypatch):
    """CUDA tells at whichever call comes next."""
    ensemble = Ensemble.load(scene.folder / "weights", "torch-cpu")
    scan = volume.read(scene.folder / "input" / "scan5.mha")
    predicted = ensemble.predict(ensemble.prepare(ensemble.plan(scan, "fast")))

    def lost(*_, **__):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("ichseg.predict.ensemble.restore", lost)
    with pytest.raises(DeviceError, match="the GPU was lost"):
        ensemble.finish(predicted)


@pytest.mark.parametrize("suffix", WRITTEN_SUFFIXES)
def test_a_file_that_itk_left_cut_gets_no_name(tmp_path, monkeypatch, suffix):
    """It says nothing where the end was in its buffer: a small mask lost all but its header."""
    write = sitk.WriteImage
    image = Volume(np.arange(60, dtype=np.int16).reshape(3, 4, 5), (5.0, 1.0, 1.0))
    lost = [0]

    def cut(image, name, **options):
        write(image, name, **options)
        content = Path(name).read_bytes()
        Path(name).write_bytes(content[: len(content) - lost[0]])

    monkeypatch.setattr(sitk, "WriteImage", cut)
    for lost[0] in (1, 8, 20):
        with pytest.raises(OutputError, match=r"mask\.\S+: cannot write \(only a part"):
            volume.write(image, tmp_path / f"mask{suffix}")
        assert list(tmp_path.iterdir()) == []
    lost[0] = 0
    volume.write(image, tmp_path / f"mask{suffix}")
    np.testing.assert_array_equal(volume.read(tmp_path / f"mask{suffix}").voxels, image.voxels)


def test_why_a_library_could_not_write_is_asked_of_the_system(tmp_path):
    assert volume._why_not_written(Path("/dev/full"), "so").strerror == faults.FULL
    assert str(volume._why_not_written(tmp_path / "room", "so")) == "so"


def test_without_a_temporary_folder_a_nifti_scan_is_refused_in_words(scene, monkeypatch):
    def full(*_, **__):
        raise OSError(28, faults.FULL)

    monkeypatch.setattr("tempfile.mkdtemp", full)
    path = scene.folder / "input" / "scan2.nii"
    with pytest.raises(volume.InputError, match=r"scan2\.nii: cannot read .*No space.*TMPDIR"):
        volume.read(path)
    volume.read(scene.folder / "input" / "scan0.mha")


def test_a_log_that_cannot_be_written_is_given_up(monkeypatch, tmp_path):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr("sys.stderr", full)
        console.say("nobody hears this")
        console.say("nor this")
        assert Path(f"/proc/self/fd/{full.fileno()}").readlink() == Path("/dev/null")


def test_a_picture_on_a_full_disk_is_refused_before_libjpeg_ends_the_process(
    scene, tmp_path, monkeypatch
):
    def full(*_):
        raise OSError(28, faults.FULL)

    scan = volume.read(scene.folder / "input" / "scan5.mha")
    mask = volume.read(scene.folder / "output" / "scan5.mha")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match=r"scan5\.mha\.jpg: cannot write \(No space"):
        case_files.write_case(tmp_path, "scan5.mha", scan, {"prediction": mask})
    with pytest.raises(OutputError, match=r"overlay\.png: cannot write \(No space"):
        pictures.write_overlay(scan, mask, tmp_path / "overlay.png")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_page_on_a_full_disk_is_refused_in_words(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, faults.FULL)

    for name, named in (("copyfileobj", "niivue.umd.js"), ("copyfile", "report.css")):
        monkeypatch.setattr(f"shutil.{name}", full)
        with pytest.raises(OutputError, match=rf"assets/{named}: cannot write \(No space"):
            inference_page.write(tmp_path, [], title="t", subtitle="s")
    assert not list(tmp_path.rglob(".writing-*"))


def test_a_signal_while_the_output_folder_is_tried_leaves_nothing(tmp_path, monkeypatch):
    touch = Path.touch

    def stopped(path):
        touch(path)
        raise Stopped(15)

    monkeypatch.setattr(Path, "touch", stopped)
    with pytest.raises(Stopped):
        check_output(Job((), platform=False), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_scan_that_goes_before_the_output_folder_is_tried_is_no_crash(tmp_path):
    (tmp_path / "scan.mha").touch()  # a mask of an earlier run
    case = InputCase("scan.mha", tmp_path / "input" / "scan.mha", tmp_path / "scan.mha")
    check_output(Job((case,), platform=False), tmp_path)


def test_masks_that_are_gone_are_errors(tmp_path):
    (tmp_path / "there.mha").write_bytes(b"")
    there = CaseResult("there.mha", "there.mha", "", {"volume_ml": 1})
    failed = CaseResult("failed.mha", None, "damaged", {})
    gone = CaseResult("gone.mha", "gone.mha", "", {"volume_ml": 1})
    cases = [
        InputCase(each.image, tmp_path / "in" / each.image, tmp_path / each.image)
        for each in (there, failed, gone)
    ]
    record = Record(tmp_path, cases, ended=dict(zip(cases, (there, failed, gone), strict=True)))
    record.keep_what_is_there()
    found = record.in_order()
    assert found[:2] == [there, failed]
    assert found[2].mask is None
    assert found[2].error.startswith(f"{tmp_path}/gone.mha: was removed during the run")


def test_a_moment_is_of_all_the_run(scene):
    moments = [fault_runs.any_moment(scene, random.Random(n)) for n in range(200)]
    assert {lines for lines, _ in moments} > {0, 1, scene.lines // 2, scene.lines - 1}
    assert max(then_s for lines, then_s in moments if lines == 0) > scene.seconds * 0.9


@pytest.fixture
def sound(scene, tmp_path):
    """An output folder as an undisturbed run leaves it."""
    return shutil.copytree(scene.folder / "output", tmp_path / "output")


def found_bad(scene, output, status=0, *lines, **options):
    ended = Ended(status, lines or ("said",))
    return fault_runs.faults_of(output, ended, fault_runs.of(scene.masks), **options)


def test_what_must_not_be_is_seen(scene, sound):
    """One thing after the other is spoiled, and each is named."""
    assert found_bad(scene, sound) == []
    assert found_bad(scene, sound, 1, "error: of some kind") == []
    assert found_bad(scene, sound, 1, "no reason") == ["the last line is 'no reason'"]
    traced = found_bad(scene, sound, 1, "Traceback (most recent call last):", "error: Oh")
    assert traced == ["a traceback: error: Oh"]
    assert found_bad(scene, sound, 3, "error: Oh") == ["exit status 3, expected one of (0, 1)"]
    hung = fault_runs.faults_of(sound, Ended(-9, (), hung=True), fault_runs.of(scene.masks))
    assert hung == ["took more than 60 s"]
    (sound / ".writing-x.mha").touch()
    assert found_bad(scene, sound) == [".writing-x.mha is left"]
    assert found_bad(scene, sound, cut_off=True) == []
    (sound / ".writing-x.mha").unlink()

    mask = sound / "scan1.nii.gz"
    mask.write_bytes(mask.read_bytes()[:-1])
    assert found_bad(scene, sound) == [
        "scan1.nii.gz is not the mask of an undisturbed run",
        "results.json has another sha256 for scan1.nii.gz",
    ]
    mask.unlink()
    assert found_bad(scene, sound) == [
        "results.json names scan1.nii.gz, which is not there",
        "exit status 0, but scan1.nii.gz missing",
    ]
    mask.write_bytes(scene.masks[mask.name])

    results = sound / "results.json"
    whole = results.read_text()
    entries = json.loads(whole)
    entries[0]["report"]["seconds"]["read"] = -1.0
    results.write_text(json.dumps(entries))
    assert "negative seconds" in found_bad(scene, sound)[0]
    for spoiled in (whole[:-20], whole.replace('"volume_ml": ', '"volume_ml": NaN, "x": '), "{}"):
        results.write_text(spoiled)
        assert (spoiled == "{}") != any("is not what" in w for w in found_bad(scene, sound))


def test_a_mask_that_is_done_twice_is_seen(scene, sound, monkeypatch):
    def pretend(*_):
        for path in again:
            with replacing(path) as temporary:
                temporary.write_bytes(path.read_bytes())
        return Ended(0, ("said",))

    monkeypatch.setattr(fault_runs, "run", pretend)
    again = []
    assert fault_runs.resumed(scene, scene.folder / "input", sound) == []
    again = [sound / "scan0.mha"]
    bad = fault_runs.resumed(scene, scene.folder / "input", sound)
    assert bad == ["after --resume: scan0.mha was done again"]


def test_the_table_counts():
    trials = [
        Trial("a", "finished", (), 6),
        Trial("a", "error line", ("oh", "my"), 2),
        Trial("b", "skipped", (), 0),
    ]
    assert faults.table(trials).splitlines()[2:] == [
        "| a | 2 | 1 | 1 | 0 | 0 | 0 | 2 to 6 | 1 |",
        "| b | 0 | 0 | 0 | 0 | 0 | 1 | 0 to 0 | 0 |",
    ]
