"""``train.log``: all that is said while a fold is trained and validated, with the time of day."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from ichseg.errors import IchsegError, OutputError

_log = logging.getLogger(__name__)


class _JobLog(logging.FileHandler):
    """A log file that says once that it cannot be written, and stays away from then on."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Do not print a traceback for each line, as on a full disk."""
        error = sys.exc_info()[1]
        self.setLevel(logging.CRITICAL + 1)
        _log.warning("warning: %s: cannot write (%s)", self.baseFilename, error)


@contextlib.contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Append everything that is logged meanwhile to a file, each line with its time.

    What ends the block is noted too: an error of ours as its line, any other with its traceback.

    Raises:
        OutputError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = _JobLog(path, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot write ({error.strerror})") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    except BaseException as error:
        ours = isinstance(error, IchsegError)
        text = f"error: {error}" if ours else f"ended by {type(error).__name__}"
        record = root.makeRecord(
            __name__, logging.ERROR, "", 0, text, (), None if ours else sys.exc_info()
        )
        handler.handle(record)  # to the file alone: who catches it tells the rest of the world
        raise
    finally:
        root.removeHandler(handler)
        handler.close()
