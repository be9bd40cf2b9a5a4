"""Compressed DICOM pixels, decompressed by ITK in a process of its own.

The decoders that ITK brings die of damaged pixels, by a signal that nothing can catch: of 1,500
altered JPEG Lossless slices fifteen. In another process that is an error like any other. It is
begun at the first compressed slice, and ends with the series.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ichseg.errors import InputError

Pixels = npt.NDArray[np.uint16]
Decoder = Callable[[bytes], Pixels | None]
_READY = b"!"  # the other process's first word
_SLOWEST_S = 60.0  # for one slice
_MEMORY = 4 << 30  # of address space; libraries map one
_ROOT = Path(__file__).resolve().parents[3]  # where this package can be imported from


@contextlib.contextmanager
def decoder() -> Iterator[Decoder]:
    """Give a function from the bytes of a DICOM file to its pixels, ``(y, x)`` as stored.

    The function returns None where the pixels are damaged.

    Raises:
        InputError: By the function: no decoder can be started, whatever the pixels are.
    """
    running: list[subprocess.Popen[bytes]] = []

    def decode(file: bytes) -> Pixels | None:
        if not running:
            running.append(_begin())
        try:
            pixels = _ask(running[0], file)
        except (OSError, EOFError):
            _end(running.pop())
            return None
        return pixels if pixels.size else None

    try:
        yield decode
    finally:
        for process in running:
            _end(process)


def _begin() -> subprocess.Popen[bytes]:
    """Start the other process, and wait until it can decode.

    Raises:
        InputError: It cannot, such as where there is no folder for temporary files.
    """
    try:
        process = _start()
    except OSError as error:
        raise InputError(f"no decoder can be started ({error.strerror or error})") from error
    assert process.stdout is not None
    if process.stdout.read(len(_READY)) != _READY:
        _end(process)
        raise InputError(
            "no decoder can be started; it needs memory, and a folder for temporary files, which "
            "TMPDIR names"
        )
    return process


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "ichseg.scan.dicom.decompress"],
        cwd=_ROOT,
        env={**os.environ, "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # decoders complain there, line after line
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with process:
        pass


def _ask(process: subprocess.Popen[bytes], file: bytes) -> Pixels:
    """The pixels of one file; an array of no size where they are damaged.

    Raises:
        OSError: The process is dead, or takes too long.
        EOFError: It died over this file.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(struct.pack("<Q", len(file)) + file)
    process.stdin.flush()
    with selectors.DefaultSelector() as ready:
        ready.register(process.stdout, selectors.EVENT_READ)
        if not ready.select(_SLOWEST_S):
            raise TimeoutError
    size = process.stdout.read(8)
    if len(size) != 8:
        raise EOFError
    rows, columns = struct.unpack("<II", size)
    raw = process.stdout.read(2 * rows * columns)
    if len(raw) != 2 * rows * columns:
        raise EOFError
    return np.frombuffer(raw, np.uint16).reshape(rows, columns)


def _serve() -> None:
    """The other process: files in, pixels out; 0 rows where there are none."""
    import resource

    import SimpleITK as sitk

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or hard > _MEMORY:
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # decoders write there, too
    with tempfile.TemporaryDirectory() as folder:
        out.write(_READY)
        out.flush()
        shown = Path(folder) / "slice.dcm"
        while size := sys.stdin.buffer.read(8):
            shown.write_bytes(sys.stdin.buffer.read(struct.unpack("<Q", size)[0]))
            reader = sitk.ImageFileReader()
            reader.SetImageIO("GDCMImageIO")
            reader.SetFileName(str(shown))
            found = np.zeros((0, 0), np.uint16)
            with contextlib.suppress(RuntimeError, MemoryError):
                read = sitk.GetArrayFromImage(reader.Execute())
                if read.ndim == 3 and len(read) == 1 and read.dtype.kind in "iu":
                    found = read[0].astype(np.uint16)
            out.write(struct.pack("<II", *found.shape) + found.tobytes())
            out.flush()


if __name__ == "__main__":
    _serve()
