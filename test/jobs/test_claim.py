"""One process at a time in a folder; other machines are told by what they write into its claim."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ichseg.errors import OutputError, TrainingError
from training.data.workspace import CLAIM_FILE
from training.jobs import claim
from training.jobs.claim import claimed

HOLD = (
    "import sys\n"
    "from pathlib import Path\n"
    "from training.jobs import claim\n"
    "claim.BEAT_S = 0.05\n"
    "with claim.claimed(Path(sys.argv[1]), 'training this fold'):\n"
    "    print('claimed', flush=True)\n"
    "    sys.stdin.read()\n"
)


def holder(folder):
    """Another process that has claimed a folder until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert process.stdout.readline() == b"claimed\n"
    return process


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(claim, "BEAT_S", 0.05)
    monkeypatch.setattr(claim, "SILENT_S", 0.5)


def refused(folder):
    with (
        pytest.raises(TrainingError) as caught,
        claimed(folder, "training this fold"),
    ):
        pass
    return str(caught.value)


def test_a_second_process_is_refused_and_told_who_the_first_is(tmp_path):
    other = holder(tmp_path)
    said = refused(tmp_path)
    assert said.startswith(f"{tmp_path}: another process is training this fold: process ")
    assert f"process {other.pid} on " in said
    other.communicate()
    with claimed(tmp_path, "training this fold"):
        assert "another process" in refused(tmp_path)  # nor the same one twice
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_is_known_to_be_gone_at_once(tmp_path):
    other = holder(tmp_path)
    other.kill()
    other.communicate()
    assert (tmp_path / CLAIM_FILE).exists()
    began = time.monotonic()
    with claimed(tmp_path, "training this fold"):
        assert time.monotonic() - began < 5  # no watching of the file


def test_a_number_that_another_process_has_by_now_is_not_taken_for_the_first(tmp_path):
    with claimed(tmp_path, "x"):
        found = json.loads((tmp_path / CLAIM_FILE).read_text())
    (tmp_path / CLAIM_FILE).write_text(json.dumps({**found, "began": "1"}))
    with claimed(tmp_path, "x"):
        taken = json.loads((tmp_path / CLAIM_FILE).read_text())
        assert (taken["pid"], taken["began"]) == (os.getpid(), found["began"])


@pytest.mark.parametrize("changes", [{"boot": "another machine"}, {"space": "pid:[7]"}])
def test_of_another_machine_or_container_it_counts_whether_the_file_changes(
    tmp_path, quick, changes
):
    with claimed(tmp_path, "x"):
        found = json.loads((tmp_path / CLAIM_FILE).read_text()) | changes | {"pid": 1}
    path, ended = tmp_path / CLAIM_FILE, threading.Event()
    path.write_text(json.dumps(found))

    def beat():
        count = 0
        while not ended.wait(0.05):
            count += 1
            temporary = tmp_path / "temporary"
            temporary.write_text(json.dumps({**found, "beat": count}))
            temporary.replace(path)

    thread = threading.Thread(target=beat)
    thread.start()
    time.sleep(0.1)
    assert "process 1 on" in refused(tmp_path)
    ended.set()
    thread.join()
    with claimed(tmp_path, "x"):  # silent for long enough
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_claim_that_is_cut_off_is_watched_and_taken(tmp_path, quick):
    (tmp_path / CLAIM_FILE).write_text('{"pid": 1')
    with claimed(tmp_path, "x"):
        assert json.loads((tmp_path / CLAIM_FILE).read_text())["pid"] == os.getpid()


def test_who_has_lost_its_claim_ends(tmp_path):
    """As one that was stopped until another was at work in its place."""
    other = holder(tmp_path)
    found = json.loads((tmp_path / CLAIM_FILE).read_text())
    (tmp_path / "new").write_text(json.dumps({**found, "token": "of another"}))
    (tmp_path / "new").replace(tmp_path / CLAIM_FILE)
    assert other.wait(30) == -signal.SIGTERM
    assert json.loads((tmp_path / CLAIM_FILE).read_text())["token"] == "of another"


def test_a_file_system_without_links_does_as_well(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    with claimed(tmp_path, "x"):
        assert "another process" in refused(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"), claimed(tmp_path / "file" / "x", "x"):
        pass


@pytest.mark.parametrize("attempt", range(20))  # one attempt shows a race now and then
def test_of_many_that_see_a_dead_claim_one_succeeds(tmp_path, attempt):
    with claimed(tmp_path, "x"):
        found = json.loads((tmp_path / CLAIM_FILE).read_text())
    (tmp_path / CLAIM_FILE).write_text(json.dumps({**found, "began": "1"}))
    together, inside, most = threading.Barrier(8), [], []

    def take():
        together.wait()
        try:
            with claimed(tmp_path, "x"):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.2)
                inside.pop()
        except TrainingError:
            pass

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
    assert list(tmp_path.iterdir()) == []


def test_a_mark_of_one_who_died_while_taking_a_claim_away_is_forgotten(tmp_path):
    with claimed(tmp_path, "x"):
        found = json.loads((tmp_path / CLAIM_FILE).read_text())
    dead = {**found, "began": "1"}
    (tmp_path / CLAIM_FILE).write_text(json.dumps(dead))
    digest = hashlib.sha256(json.dumps(dead, sort_keys=True).encode()).hexdigest()
    mark = tmp_path / f"{CLAIM_FILE}-after-{digest[:16]}"
    mark.touch()
    long_ago = time.time() - claim.SILENT_S - 1
    os.utime(mark, (long_ago, long_ago))
    with claimed(tmp_path, "x"):
        assert not mark.exists()
