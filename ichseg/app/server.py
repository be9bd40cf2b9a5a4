"""The platform's ``invoke`` API: one server, the networks loaded once, one job a POST.

``GET /health`` answers 200 once the networks are loaded, and 503 before that and as soon as the
server cannot do another job; ``POST /invoke`` runs one job and answers 201, or 500 if it failed,
after which the server goes on. HTTP has a thread of its own and jobs run in the main thread, one
after another, because there a signal can end them: SIGTERM raises in the middle of a job as it does
in a run without a server.

Not imported unless it is used: FastAPI alone takes as long as all the rest of a refusal.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import fastapi
import uvicorn
from fastapi.responses import JSONResponse

from ichseg.app.console import say, say_traceback
from ichseg.errors import DeviceError, OutputError

PORT = 4743
Loaded = TypeVar("Loaded")
_LOOK_EVERY_S = 0.05  # whether a job has ended, and whether its client is still there


@dataclass(slots=True)
class _Job:
    """A POST, which both threads look at: each field is written by one of them, in one step.

    Attributes:
        abandoned: Whether its client has gone.
        begun: Whether it is run, or has been.
        status: The exit status of its run; None until that has ended.
    """

    abandoned: bool = False
    begun: bool = False
    status: int | None = None


_Jobs = queue.SimpleQueue[_Job]


def serve(load: Callable[[], Loaded], run_job: Callable[[Loaded], int], port: int = PORT) -> None:
    """Load, then run a job for each POST, until a signal's handler raises.

    What it raises while there is no job, or the last one has ended, ends the server in peace; in
    the middle of a job it passes through, after the job has cleaned up. Either way every POST is
    answered. A job whose client has gone before it began is not done.

    Args:
        load: Called once; the server answers ``/health`` with 503 meanwhile. What it raises ends
            the server.
        run_job: Called with what ``load`` returned, in this thread and never twice at a time.
            Returns the exit status of the same run without a server, and has said why it failed.
        port: The port, on all interfaces, as the platform asks for.

    Raises:
        OutputError: The port cannot be had.
        DeviceError: A job found the device lost, so that no other one can succeed.
    """
    jobs: _Jobs = queue.SimpleQueue()
    ready = threading.Event()
    job = _Job()
    with _listening(_application(jobs, ready), port):
        try:
            loaded = load()
            ready.set()
            say(f"listening on port {port}")
            while True:
                job = jobs.get()
                job.begun = not job.abandoned
                job.status = _run(loaded, run_job) if job.begun else 1
        except BaseException as error:
            in_mid_job = job.begun and job.status is None
            if isinstance(error, Exception) or in_mid_job or not ready.is_set():
                raise
        finally:
            ready.clear()  # with which whoever waits is answered


def _run(loaded: Loaded, run_job: Callable[[Loaded], int]) -> int:
    """The exit status of a job, of which only a signal and a lost device end the server."""
    try:
        return run_job(loaded)
    except DeviceError:
        raise
    except Exception:  # a fault of ours: the next job may well succeed
        say_traceback()
        return 1


def _application(jobs: _Jobs, ready: threading.Event) -> fastapi.FastAPI:
    """The two routes and no others: no pages about them, no redirects."""
    application = fastapi.FastAPI(
        openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False
    )

    @application.get("/health")
    async def health() -> JSONResponse:
        if not ready.is_set():
            return JSONResponse({"status": "not ready"}, status_code=503)
        return JSONResponse({"status": "ok"})

    @application.post("/invoke")
    async def invoke(request: fastapi.Request) -> JSONResponse:
        if not ready.is_set():
            return JSONResponse({"error": "loading, or ending"}, status_code=503)
        job = _Job()
        jobs.put(job)
        while job.status is None and ready.is_set():
            await asyncio.sleep(_LOOK_EVERY_S)
            job.abandoned = job.abandoned or await request.is_disconnected()
        if job.status != 0:
            error = "the job failed or was stopped; the last line of the log says why"
            return JSONResponse({"error": error}, status_code=500)
        return JSONResponse({"status": "done"}, status_code=201)

    return application


@contextlib.contextmanager
def _listening(application: fastapi.FastAPI, port: int) -> Iterator[None]:
    """Serve the application in a thread; answers under way go out before the block is left.

    Raises:
        OutputError: The port cannot be had.
    """
    try:
        listener = socket.create_server(("0.0.0.0", port), backlog=16)
    except OSError as error:
        raise OutputError(f"port {port}: cannot listen there ({error.strerror})") from error
    server = uvicorn.Server(
        uvicorn.Config(
            application, log_level="warning", access_log=False, timeout_graceful_shutdown=2
        )
    )
    thread = threading.Thread(target=server.run, args=([listener],), name="http", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(3)  # within the 5 s that the platform grants after SIGTERM
        listener.close()
