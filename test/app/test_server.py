"""The invoke API over real HTTP, in a process of its own: jobs run in its main thread."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Each line of `jobs` is what one job does; loading waits until the file `loaded` is there.
SERVED = """
import signal, sys, time
from pathlib import Path
from ichseg.files import replacing
from ichseg.app import server
from ichseg.errors import DeviceError

place = Path(sys.argv[1])
steps = iter((place / "jobs").read_text().split())

def load():
    print("loading", flush=True)
    while not (place / "loaded").exists():
        time.sleep(0.01)
    return "networks"

def run_job(loaded):
    assert loaded == "networks"
    step = next(steps)
    print("begin", step, flush=True)
    if step == "lost":
        raise DeviceError("the GPU was lost")
    if step == "slow":
        time.sleep(1)
    if step == "bug":
        raise ZeroDivisionError("a fault of ours")
    if step == "memory":
        raise MemoryError
    if step == "stuck":
        with replacing(place / "mask.mha") as temporary:
            temporary.write_text("half")
            print("half", flush=True)
            time.sleep(60)
    if step == "last":  # a signal comes between its end and the wait for the next
        serving = sys._getframe()
        while serving.f_code.co_name != "serve":
            serving = serving.f_back
        serving.f_trace = lambda frame, event, _: sys.settrace(None) or stop(signal.SIGTERM, frame)
        sys.settrace(lambda *_: None)
    print("end", step, flush=True)
    return int(step == "failing")

def stop(number, frame):
    raise SystemExit(128 + number)

signal.signal(signal.SIGTERM, stop)
server.serve(load, run_job, int(sys.argv[2]))
"""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Served:
    def __init__(self, place, jobs):
        self.port, self.place = free_port(), place
        (place / "jobs").write_text(" ".join(jobs))
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVED, str(place), str(self.port)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.line() == "loading"

    def line(self):
        return self.process.stdout.readline().strip()

    def ask(self, method, path):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def status(self, method, path):
        return self.ask(method, path)[0]

    def load(self):
        (self.place / "loaded").touch()
        for _ in range(500):
            if self.status("GET", "/health") == 200:
                return
            time.sleep(0.02)
        raise AssertionError("never healthy")

    def terminate(self):
        """Exit status, seconds it took, what was said on stderr."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        _, said = self.process.communicate(timeout=20)
        return self.process.returncode, time.monotonic() - began, said


@pytest.fixture
def serve(tmp_path):
    started = []

    def begin(*jobs):
        started.append(Served(tmp_path, jobs))
        return started[-1]

    yield begin
    for served in started:
        served.process.kill()
        served.process.communicate()


def test_healthy_once_loaded_and_201_for_each_job(serve):
    served = serve("fine", "fine")
    assert served.status("GET", "/health") == 503
    assert served.status("POST", "/invoke") == 503
    served.load()
    assert served.status("POST", "/invoke") == 201
    assert served.status("POST", "/invoke") == 201
    assert served.status("GET", "/invoke") == 405
    for page in ("/", "/docs", "/openapi.json", "/health/"):  # no redirect: the platform fails it
        assert served.status("GET", page) == 404
    code, seconds, said = served.terminate()
    assert (code, said) == (0, f"listening on port {served.port}\n")
    assert seconds < 4


def test_a_failed_job_answers_500_and_the_next_is_served(serve):
    served = serve("failing", "bug", "memory", "fine")
    served.load()
    status, body = served.ask("POST", "/invoke")
    assert (status, list(body)) == (500, ["error"])
    assert served.status("POST", "/invoke") == 500
    assert served.status("POST", "/invoke") == 500
    assert served.status("GET", "/health") == 200
    assert served.status("POST", "/invoke") == 201
    said = served.terminate()[2]
    assert "ZeroDivisionError: a fault of ours\n" in said
    assert said.splitlines()[-1].endswith("MemoryError")


def test_one_job_at_a_time_while_health_answers(serve):
    served = serve("slow", "slow", "slow")
    served.load()
    statuses = []
    posts = [
        threading.Thread(target=lambda: statuses.append(served.status("POST", "/invoke")))
        for _ in range(3)
    ]
    for post in posts:
        post.start()
    assert served.line() == "begin slow"
    began = time.monotonic()
    assert served.status("GET", "/health") == 200
    assert time.monotonic() - began < 0.25
    for post in posts:
        post.join()
    assert statuses == [201, 201, 201]
    # begin and end alternate: none began before the one before it had ended
    assert [served.line() for _ in range(5)] == ["end slow", *["begin slow", "end slow"] * 2]


def test_sigterm_in_mid_job_ends_it_and_leaves_nothing(serve):
    served = serve("stuck")
    served.load()
    answers = []
    post = threading.Thread(target=lambda: answers.append(served.status("POST", "/invoke")))
    post.start()
    assert served.line() == "begin stuck"
    assert served.line() == "half"
    assert any(path.name.startswith(".writing-") for path in served.place.iterdir())
    code, seconds, _ = served.terminate()
    post.join()
    assert (code, answers) == (143, [500])
    assert seconds < 4
    assert sorted(path.name for path in served.place.iterdir()) == ["jobs", "loaded"]


def test_a_signal_after_a_job_ends_in_peace_what_it_would_cut_off_in_mid_job(serve):
    served = serve("last")
    served.load()
    assert served.status("POST", "/invoke") == 201
    assert (served.line(), served.line()) == ("begin last", "end last")
    assert served.process.wait(10) == 0


def post_in_a_thread(served, answers):
    thread = threading.Thread(target=lambda: answers.append(served.status("POST", "/invoke")))
    thread.start()
    return thread


def test_a_lost_device_ends_the_server(serve):
    """It would answer that it is healthy, and fail every job, for ever."""
    served = serve("lost", "fine")
    served.load()
    answers = []
    posts = [post_in_a_thread(served, answers) for _ in range(2)]
    for post in posts:
        post.join()
    assert set(answers) <= {500, 503}
    _, said = served.process.communicate(timeout=10)
    assert served.process.returncode == 1
    assert "DeviceError: the GPU was lost" in said
    with pytest.raises(ConnectionRefusedError):
        served.status("GET", "/health")


def test_a_queue_is_answered_at_sigterm(serve):
    served = serve("stuck", "fine", "fine")
    served.load()
    answers = []
    posts = [post_in_a_thread(served, answers)]
    assert served.line() == "begin stuck"
    posts += [post_in_a_thread(served, answers) for _ in range(2)]
    time.sleep(0.5)  # until they wait
    code, seconds, said = served.terminate()
    for post in posts:
        post.join()
    assert (code, answers) == (143, [500] * 3)
    assert seconds < 4
    assert "Error" not in said


def test_a_job_whose_client_has_gone_is_not_done(serve):
    served = serve("slow", "fine")
    served.load()
    first = []
    post = post_in_a_thread(served, first)
    assert served.line() == "begin slow"
    gone = socket.create_connection(("127.0.0.1", served.port))
    gone.sendall(b"POST /invoke HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
    time.sleep(0.1)
    gone.close()
    post.join()
    assert served.line() == "end slow"
    assert served.status("POST", "/invoke") == 201
    assert [served.line(), served.line()] == ["begin fine", "end fine"]
    assert served.terminate()[0] == 0


def test_a_port_in_use_is_refused(serve):
    first = serve()
    second = subprocess.run(
        [sys.executable, "-c", SERVED, str(first.place), str(first.port)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert second.returncode == 1
    assert f"port {first.port}: cannot listen there (Address already in use" in second.stderr
