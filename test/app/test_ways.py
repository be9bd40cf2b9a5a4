"""The ways in beside a plain run: INSTANCE 2022's batch and the invoke server, by process.py."""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import make_bundle

from ichseg.app import arguments, server
from ichseg.app.main import main
from ichseg.scan import volume

PROCESS = Path(__file__).parents[2] / "process.py"


@pytest.fixture
def place(tmp_path, scan):
    make_bundle(tmp_path / "weights")
    for name in ("b.nii.gz", "a.nii.gz", "other.mha"):
        volume.write(scan, tmp_path / "input" / name)
    return tmp_path


def flags(place, *more):
    return ["--weights", str(place / "weights"), "--device", "cpu", "--preset", "fast", *more]


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_instance_batch_by_its_own_command(place, scan):
    predict, given = place / "predict", place / "input"
    assert main(flags(place, f"--input_dir={given}", f"--predict_dir={predict}")) == 0
    assert files(predict) == ["a.nii.gz", "b.nii.gz"]
    mask = volume.read(predict / "b.nii.gz")
    assert mask.voxels.dtype == np.uint8
    assert set(np.unique(mask.voxels)) <= {0, 1}
    assert mask.nifti_header[252:344] == volume.read(given / "b.nii.gz").nifti_header[252:344]


def test_instance_batch_by_its_mount(place, monkeypatch, capsys):
    (place / "predict").mkdir()
    monkeypatch.setattr(arguments, "MOUNTED_PREDICT", place / "predict")
    assert main(flags(place, "--input", str(place / "input"), "--report")) == 0
    assert files(place / "predict") == ["a.nii.gz", "b.nii.gz"]
    # an --output says that it is a run like any other
    output = place / "output"
    assert main(flags(place, "--input", str(place / "input"), "--output", str(output))) == 0
    assert files(output) == ["a.nii.gz", "b.nii.gz", "other.mha", "results.json"]
    monkeypatch.setattr(arguments, "MOUNTED_PREDICT", place / "nowhere")
    assert arguments.parse_arguments([]).output == Path("/output")
    with pytest.raises(SystemExit):
        arguments.parse_arguments(["--output", "a", "--predict_dir", "b"])
    assert "exclude each other" in capsys.readouterr().err


def test_instance_refuses_masks_with_several_labels(place, capsys):
    path = place / "weights" / "model.json"
    model = json.loads(path.read_text())
    model["plans"]["labels"] = ["background", "blood", "oedema"]
    path.write_text(json.dumps(model))
    more = ["--input", str(place / "input"), "--predict_dir", str(place / "predict")]
    assert main(flags(place, *more)) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "its masks tell blood, oedema apart, expected a bundle of one label" in last
    assert files(place / "predict") == []


def ask(port, method, path):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path)
        return connection.getresponse().status
    except ConnectionRefusedError:
        return None
    finally:
        connection.close()


@pytest.fixture
def served(place, monkeypatch):
    """A server told by its environment, as in the image, on a port that is free."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    code = (
        "import functools, sys, process; from ichseg.app import server; "
        f"server.serve = functools.partial(server.serve, port={port}); sys.exit(process.main())"
    )
    shutil.rmtree(place / "input")
    (place / "input").mkdir()
    begun = subprocess.Popen(
        [sys.executable, "-c", code, "--input", str(place / "input"), "--output",
         str(place / "output"), *flags(place)],
        cwd=PROCESS.parent, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "ICHSEG_API": "invoke"},
    )  # fmt: skip
    try:
        for _ in range(600):
            if ask(port, "GET", "/health") == 200:
                break
            time.sleep(0.05)
        yield begun, port
    finally:
        begun.kill()
        begun.communicate()


def test_invoke(place, scan, served):
    begun, port = served
    assert server.PORT == 4743
    folder = place / "input" / "images" / "ct"
    folder.mkdir(parents=True)
    assert ask(port, "POST", "/invoke") == 500  # no scan yet
    (folder / "broken.mha").write_text("ObjectType = Image\n")
    assert ask(port, "POST", "/invoke") == 500
    (folder / "broken.mha").unlink()
    assert [name for name in files(place / "output") if name.endswith(".mha")] == []

    volume.write(scan, folder / "1-2.mha")
    assert ask(port, "POST", "/invoke") == 201
    assert files(place / "output") == ["images/bleed/1-2.mha", "results.json"]
    # what an earlier job left would be taken for this one's
    (folder / "1-2.mha").rename(folder / "3-4.mha")
    assert ask(port, "POST", "/invoke") == 201
    assert files(place / "output") == ["images/bleed/3-4.mha", "results.json"]
    (folder / "3-4.mha").rename(place / "aside.mha")
    assert ask(port, "POST", "/invoke") == 500
    assert files(place / "output") == []
    (place / "aside.mha").rename(folder / "1-2.mha")

    shutil.rmtree(place / "output")
    assert ask(port, "POST", "/invoke") == 201
    assert files(place / "output") == ["images/bleed/1-2.mha", "results.json"]

    begun.send_signal(signal.SIGTERM)
    _, said = begun.communicate(timeout=20)
    assert begun.returncode == 0
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3
    assert "found no scan" in errors[0]
    assert "broken.mha" in errors[1]
    assert "found no scan" in errors[2]


def test_a_plain_run_does_without_the_server(place):
    code = (
        "import sys, process; status = process.main(); "
        "print(status, sorted({'fastapi', 'uvicorn', 'ichseg.app.server'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--input", str(place / "input"), "--output",
         str(place / "output"), *flags(place)],
        cwd=PROCESS.parent, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "0 []"
