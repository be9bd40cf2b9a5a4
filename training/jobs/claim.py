"""A folder that one process at a time may work in."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from ichseg.errors import TrainingError
from ichseg.files import lock
from training.data.workspace import LOCK_FILE

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def claimed(folder: Path, doing: str) -> Iterator[None]:
    """Keep other processes from working in the same folder meanwhile.

    Args:
        folder: The folder; it is made.
        doing: What is done there, such as ``training this fold``.

    Raises:
        TrainingError: Another process does it already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("w") as stream:
        try:
            if not lock(stream.fileno()):
                raise TrainingError(f"{folder}: another process is {doing}")
        except OSError as error:  # a file system without locks
            _log.warning(
                "warning: %s cannot be locked (%s); see to it that no other process is %s "
                "meanwhile",
                folder,
                error.strerror,
                doing,
            )
        yield  # closing the file gives it back, however this process ends
