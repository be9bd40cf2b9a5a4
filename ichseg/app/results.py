"""``results.json``: one entry per case, in evalutils' list layout, with our ``report`` added.

While a run is under way, the results since ``results.json`` was last written are lines of
``results.jsonl``, each an entry: adding one takes the same time for the first case and the 4,000th.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from ichseg.app.cases import InputCase, Job
from ichseg.app.console import say
from ichseg.errors import OutputError
from ichseg.files import lock, remove_if_there, replacing, sha256
from ichseg.wording import counted

FILE = "results.json"
JOURNAL = "results.jsonl"
FILES = (FILE, JOURNAL)
_EVERY_S = 30.0  # the file is written anew, for those who look at it while the run goes on
_SHARE = 0.05  # of the time of a run that this may take: a file of many cases takes longer
_IN_MEMORY = 8 << 20  # bytes of results that are kept in memory


@dataclass(frozen=True, slots=True)
class CaseResult:
    """How one case ended.

    Attributes:
        image: The scan as it is named in the file.
        mask: The path of its mask relative to the output folder, or None if the case failed.
        error: The reason of a failure, or an empty string.
        report: What was found (see ``case_report``), and for ``--resume`` made_from and
            mask_sha256; empty if the case failed.
    """

    image: str
    mask: str | None
    error: str
    report: dict[str, Any]


class Spool(MutableMapping[InputCase, CaseResult]):
    """Results by case, in a temporary file beyond a few megabytes.

    So the memory of a run does not grow with what is found in its cases.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # a thread adds while another reads
        self._stream = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115 - it is kept
        self._places: dict[InputCase, tuple[int, int]] = {}

    def __setitem__(self, case: InputCase, result: CaseResult) -> None:
        """Keep a result, in place of an earlier one."""
        text = json.dumps(_entry(result)).encode()
        with self._lock:
            self._places[case] = (self._stream.seek(0, os.SEEK_END), len(text))
            self._stream.write(text)

    def __getitem__(self, case: InputCase) -> CaseResult:
        """The result of a case."""
        with self._lock:
            start, length = self._places[case]
            self._stream.seek(start)
            text = self._stream.read(length)
        return _result(json.loads(text))

    def __delitem__(self, case: InputCase) -> None:
        """Forget a result."""
        del self._places[case]

    def __contains__(self, case: object) -> bool:
        """Whether a case has a result, which is not read for that."""
        return case in self._places

    def __iter__(self) -> Iterator[InputCase]:
        """The cases that have results so far, whatever is added meanwhile."""
        return iter(list(self._places))

    def __len__(self) -> int:
        """How many cases have results."""
        return len(self._places)


class InOrder(Sequence[CaseResult]):
    """Results in the order of the cases, each read when it is asked for."""

    def __init__(
        self, cases: Sequence[InputCase], ended: MutableMapping[InputCase, CaseResult]
    ) -> None:
        self._cases, self._ended = [case for case in cases if case in ended], ended

    def __len__(self) -> int:
        """How many there are."""
        return len(self._cases)

    @overload
    def __getitem__(self, index: int) -> CaseResult: ...
    @overload
    def __getitem__(self, index: slice) -> list[CaseResult]: ...
    def __getitem__(self, index: int | slice) -> CaseResult | list[CaseResult]:
        """One result, or some."""
        if isinstance(index, slice):
            return [self._ended[case] for case in self._cases[index]]
        return self._ended[self._cases[index]]


@dataclass(slots=True)
class Record:
    """The results of a run.

    Attributes:
        output: The folder of the masks and of the files.
        cases: The cases of the run, in the order that the results get.
        on_disk: Whether there are files; INSTANCE 2022's batch has none.
        ended: The results so far.
        saved_s: When ``results.json`` was last written, by ``time.monotonic()``.
        took_s: The seconds that this took.
        others: What earlier runs found in other scans, which stays in the file.
    """

    output: Path
    cases: Sequence[InputCase]
    on_disk: bool = True
    ended: MutableMapping[InputCase, CaseResult] = field(default_factory=Spool)
    saved_s: float = field(default_factory=time.monotonic)
    took_s: float = 0.0
    others: Sequence[CaseResult] = ()

    def begin(self, *, keep_others: bool = True) -> None:
        """Take back earlier results of these cases: this run will replace their masks.

        Args:
            keep_others: Whether those of other scans stay: of these that failed, and of those
                whose masks are there, unaltered.

        Raises:
            OutputError: The folder cannot be written, or ``results.json`` is something else's.
        """
        if not any((self.output / name).exists() for name in FILES):
            return
        if self.on_disk and keep_others:
            self.others = self._earlier_of_others()
        if self.others:
            others = counted(len(self.others), "other scan")
            failed = sum(result.mask is None for result in self.others)
            of_these = f", {failed} of which failed" if failed else ""
            say(f"{self.output / FILE} keeps what earlier runs found in {others}{of_these}")
        self.save()

    def _earlier_of_others(self) -> list[CaseResult]:
        """Earlier results of scans that are no case of this run; their masks are unaltered."""
        names = {case.name for case in self.cases}
        masks = {str(case.output.relative_to(self.output)) for case in self.cases}
        return [
            result
            for result in read_results(self.output).values()
            if result.image not in names
            and result.mask not in masks
            and (result.mask is None or self._is_unaltered(result.mask, result.report))
        ]

    def _is_unaltered(self, mask: str, report: dict[str, Any]) -> bool:
        """Whether a mask is the one that an earlier result was written for."""
        written = report.get("mask_sha256")
        return written is not None and digest_of(self.output / mask) == written

    def add(self, case: InputCase, result: CaseResult) -> None:
        """Keep a case's result, from which an interrupted run can go on.

        Raises:
            OutputError: The folder cannot be written.
        """
        self.ended[case] = result
        if not self.on_disk:
            return
        append_result(result, self.output / JOURNAL)
        if time.monotonic() - self.saved_s > max(_EVERY_S, self.took_s / _SHARE):
            self.save()

    def save(self) -> None:
        """Write ``results.json``, after which there is nothing that only the journal knows.

        Raises:
            OutputError: The folder cannot be written.
        """
        if self.on_disk:
            began = time.monotonic()
            write_results(itertools.chain(self.in_order(), self.others), self.output / FILE)
            (self.output / JOURNAL).unlink(missing_ok=True)
            self.saved_s = time.monotonic()
            self.took_s = self.saved_s - began

    def in_order(self) -> Sequence[CaseResult]:
        """The results so far, in the order of the cases."""
        return InOrder(self.cases, self.ended)

    def warn(self, warning: str) -> None:
        """Add a warning to every case that has a mask."""
        for case, result in self.ended.items():
            if result.mask is not None:
                warnings = [*result.report.get("warnings", ()), warning]
                report = result.report | {"warnings": warnings}
                self.ended[case] = dataclasses.replace(result, report=report)

    def keep_what_is_there(self) -> None:
        """Make a mask that is no longer there an error.

        Somebody may have removed the output folder in the meantime; the later masks made it again.
        """
        for case, result in self.ended.items():
            if result.mask is not None and not (self.output / result.mask).is_file():
                error = f"{self.output / result.mask}: was removed during the run; "
                self.ended[case] = CaseResult(
                    image=result.image,
                    mask=None,
                    error=error + "--resume does it again",
                    report={},
                )


@contextlib.contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Keep other runs from writing results to a folder meanwhile, which is made if need be.

    Raises:
        OutputError: Another run does so already.
    """
    with contextlib.ExitStack() as held:
        try:
            output.mkdir(parents=True, exist_ok=True)
            handle = os.open(output, os.O_RDONLY)
            held.callback(os.close, handle)
            if not lock(handle):
                raise OutputError(
                    f"{output}: another run is writing its results there; wait for its end, or "
                    "name another --output"
                )
        except OSError as error:  # a folder that cannot be listed, a file system without locks
            say(f"warning: {output} cannot be locked ({error.strerror}): let no other run use it")
        yield


def refuse_cases(job: Job, record: Record) -> None:
    """Record the cases that were refused as they were found; a mask of an earlier run goes.

    Raises:
        OutputError: The folder cannot be written.
    """
    for case in job.cases:
        if case.refusal:
            reason = case.refusal
            if str(case.image) not in reason:
                reason = f"{case.image}: {reason}"
            say(f"{case.name}: failed: {reason}")
            if case.output.parent.resolve() != case.image.parent.resolve():  # else it is the scan
                remove_if_there(case.output)
            record.add(case, CaseResult(case.name, None, reason, {}))


def write_results(results: Iterable[CaseResult], path: Path) -> None:
    """Write strict JSON, whole or not at all.

    Raises:
        OutputError: The folder cannot be written.
    """
    with (
        replacing(path, suffix=".json") as temporary,
        temporary.open("w", encoding="utf-8") as stream,
    ):
        first = between = "[\n "
        for result in results:  # one by one: there may be a million
            text = json.dumps(_entry(result), indent=1, allow_nan=False)
            stream.write(between + text.replace("\n", "\n "))  # what is text has no line breaks
            between = ",\n "
        stream.write("[]\n" if between == first else "\n]\n")


def append_result(result: CaseResult, journal: Path) -> None:
    """Add a line to the journal.

    Raises:
        OutputError: The folder cannot be written.
    """
    line = json.dumps(_entry(result), allow_nan=False) + "\n"
    try:
        journal.parent.mkdir(parents=True, exist_ok=True)
        with journal.open("a", encoding="utf-8") as stream:
            stream.write(line)
    except OSError as error:
        raise OutputError(f"{journal}: cannot write ({error.strerror or error})") from error


def read_results(output: Path) -> dict[tuple[str, str | None], CaseResult]:
    """What a run has left in its output folder, by the names of scan and mask.

    Of a journal the lines that are whole; a killed run may have cut off the last one.

    Raises:
        OutputError: ``results.json`` is there, and is something else.
    """
    path = output / FILE
    found = []
    try:
        text = path.read_text(encoding="utf-8")
        found = [_result(entry) for entry in json.loads(text, parse_constant=_refuse_constant)]
    except FileNotFoundError:
        pass
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise OutputError(
            f"{path}: not the results of an earlier run ({repr(error)[:160]}); move it away"
        ) from error
    try:
        lines = (output / JOURNAL).read_bytes().splitlines()
    except OSError:
        lines = []
    for line in lines:
        try:
            found.append(_result(json.loads(line, parse_constant=_refuse_constant)))
        except (ValueError, LookupError, TypeError, RecursionError):
            continue  # its case is done again
    return {(result.image, result.mask): result for result in found}


def _refuse_constant(name: str) -> None:
    """Refuse NaN and infinity, which Python reads and strict JSON does not have."""
    raise ValueError(f"{name} is no number of JSON")


def is_finished(result: CaseResult, mask: Path, made_from: dict[str, Any]) -> bool:
    """Whether an earlier result is what would be made now, and its mask is unaltered.

    Args:
        result: The earlier result of the case.
        mask: The file of its mask.
        made_from: What the result would be made from now. A picture, DICOM-SEG or probabilities
            that are not asked for now may have been made then.
    """
    before = result.report.get("made_from")
    if not isinstance(before, dict):
        return False
    extras = {
        key: before[key]
        for key in ("pictures", "dicom_seg", "probabilities")
        if key in before and made_from.get(key) is False
    }
    if before != made_from | extras:
        return False
    digest = digest_of(mask)
    return digest is not None and digest == result.report.get("mask_sha256")


def digest_of(mask: Path) -> str | None:
    """The mask file's SHA-256; None if it cannot be read, since somebody may have removed it."""
    try:
        return sha256(mask)
    except (OSError, ValueError):  # a name that cannot be one
        return None


def _entry(result: CaseResult) -> dict[str, Any]:
    return {
        "outputs": [] if result.mask is None else [_image(result.mask)],
        "inputs": [_image(result.image)],
        "error_messages": [result.error] if result.error else [],
        "report": result.report,
    }


def _result(entry: Any) -> CaseResult:
    """What ``_entry`` was made of."""
    return CaseResult(
        image=str(entry["inputs"][0]["filename"]),
        mask=next((str(output["filename"]) for output in entry["outputs"]), None),
        error=str(next(iter(entry["error_messages"]), "")),
        report=dict(entry["report"]),
    )


def _image(name: str) -> dict[str, str]:
    return {"type": "metaio_image", "filename": name}
