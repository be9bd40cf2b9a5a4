"""Worker processes, which end with the process that began them."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading


def end_with_parent() -> None:
    """Have this worker process end as soon as its parent is gone, even by SIGKILL.

    Otherwise it would wait for ever for work: each worker keeps the queue open for the others.
    """
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
