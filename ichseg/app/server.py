"""The platform's ``invoke`` API: one server, the networks loaded once, one job a POST.

``GET /health`` answers 200 once the networks are loaded and 503 before; ``POST /invoke`` runs one
job and answers 201, or 500 if it failed, after which the server goes on. HTTP has a
thread of its own and jobs run in the main thread, one after another, because there a signal can end
them: SIGTERM raises in the middle of a job as it does in a run without a server.

Not imported unless it is used: FastAPI alone takes as long as all the rest of a refusal.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

import fastapi
import uvicorn
from fastapi.responses import JSONResponse

from ichseg.errors import OutputError

PORT = 4743
Loaded = TypeVar("Loaded")
_Jobs = queue.SimpleQueue["Future[int]"]


def serve(load: Callable[[], Loaded], run_job: Callable[[Loaded], int], port: int = PORT) -> None:
    """Load, then run a job for each POST, until a signal's handler raises.

    What it raises while there is no job ends the server in peace; in the middle of a job it passes
    through, after the job has cleaned up and its POST was answered.

    Args:
        load: Called once; the server answers ``/health`` with 503 meanwhile. What it raises ends
            the server.
        run_job: Called with what ``load`` returned, in this thread and never twice at a time.
            Returns the exit status of the same run without a server, and has said why it failed.
        port: On all interfaces, as the platform asks for.

    Raises:
        OutputError: The port cannot be had.
    """
    jobs: _Jobs = queue.SimpleQueue()
    ready = threading.Event()
    with _listening(_application(jobs, ready), port):
        loaded = load()
        ready.set()
        _say(f"listening on port {port}")
        while True:
            try:
                job = jobs.get()
            except BaseException:
                return
            status = 1
            try:
                status = run_job(loaded)
            except Exception:  # a fault of ours: the next job may well succeed
                traceback.print_exc()
            finally:
                job.set_result(status)


def _application(jobs: _Jobs, ready: threading.Event) -> fastapi.FastAPI:
    """The two routes and no others: no pages about them, no redirects."""
    application = fastapi.FastAPI(
        openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False
    )

    @application.get("/health")
    async def health() -> JSONResponse:
        if not ready.is_set():
            return JSONResponse({"status": "loading"}, status_code=503)
        return JSONResponse({"status": "ok"})

    @application.post("/invoke")
    async def invoke() -> JSONResponse:
        if not ready.is_set():
            return JSONResponse({"error": "still loading"}, status_code=503)
        job: Future[int] = Future()
        jobs.put(job)
        if await asyncio.wrap_future(job) != 0:
            error = "the job failed or was stopped; the last line of the log says why"
            return JSONResponse({"error": error}, status_code=500)
        return JSONResponse({"status": "done"}, status_code=201)

    return application


@contextlib.contextmanager
def _listening(application: fastapi.FastAPI, port: int) -> Iterator[None]:
    """The application served in a thread; answers under way go out before the block is left."""
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


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
