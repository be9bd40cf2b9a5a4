"""Streams and events of the pretended card, which know what has waited for what.

Everything that is computed is there at once; what is kept is whether a real card would have it by
then. Each stream counts its operations, and knows how far each other one was when it last waited
for it (a vector clock). Copies to the host that go on in the background are carried out when
somebody has waited for them.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import ichseg
import training

DEVICE = torch.device("cuda", 0)
_PRODUCT = tuple(str(Path(package.__file__).parent) + "/" for package in (ichseg, training))


class CardError(AssertionError):
    """Something that a real card would answer with an error, or with wrong numbers."""


class Block:
    """Memory of the card, which views share: who made it, who wrote it last, who uses it."""

    def __init__(self, card: Streams, stream: Stream) -> None:
        self.card, self.home = card, stream
        self.written = stream.now
        self.uses: dict[Stream, int] = {}

    def __del__(self) -> None:
        for stream, when in self.uses.items():
            if max(self.home.seen[stream], self.card.seen[stream]) < when:
                self.card.faults.append(f"{self.home} frees memory that {stream} may still use")


class Stream:
    """A queue of the card, with what it knows to be done on every other one."""

    def __init__(self, device: Any = None, priority: int = 0, card: Streams | None = None) -> None:
        self.card = card or there()
        self.number = len(self.card.streams)
        self.card.streams.append(self)
        self.seen: dict[Stream, int] = defaultdict(int)
        self.device = DEVICE

    def __repr__(self) -> str:
        return f"stream {self.number}"

    @property
    def now(self) -> tuple[Stream, int]:
        return self, self.seen[self]

    def work(self) -> None:
        """Take one more operation, which comes after all that the host has waited for."""
        join(self.seen, self.card.seen)
        self.seen[self] += 1

    def wait_stream(self, other: Stream) -> None:
        join(self.seen, other.seen)

    def wait_event(self, event: Event) -> None:
        join(self.seen, event.seen)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.card.wait(f"{self}.synchronize", self.seen)


class Event:
    """A mark in a stream."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.seen: dict[Stream, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        self.seen = dict((stream or there().current).seen)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or there().current).wait_event(self)

    def synchronize(self) -> None:
        there().wait("event.synchronize", self.seen)

    def query(self) -> bool:
        return True


class Recorded(dict[Stream, int]):
    """Uses of a block, of which those by some streams are known to who frees it."""

    def __init__(self, uses: dict[Stream, int], stream: Stream) -> None:
        super().__init__(uses)
        self.known = {*getattr(uses, "known", ()), stream}

    def __setitem__(self, stream: Stream, when: int) -> None:
        if stream not in self.known:
            super().__setitem__(stream, when)


class Streams:
    """What is known of the card's streams, and of the host.

    Attributes:
        waits: What has let the host wait for the card, in order.
        faults: What would have gone wrong where nothing can be raised.
        seen: How far the host knows each stream to be.
    """

    def __init__(self) -> None:
        self.waits: list[str] = []
        self.faults: list[str] = []
        self.seen: dict[Stream, int] = defaultdict(int)
        self.streams: list[Stream] = []
        self._coming: list[tuple[tuple[Stream, int], Callable[[], object]]] = []
        self._local = threading.local()
        self.default = Stream(card=self)

    @property
    def current(self) -> Stream:
        found: Stream = getattr(self._local, "stream", self.default)
        return found

    def number(self) -> int:
        """The current device's number, which each thread has for itself, at first the first."""
        return getattr(self._local, "number", 0)

    def choose(self, device: Any) -> None:
        """Make another device the current one."""
        self._local.number = device if isinstance(device, int) else torch.device(device).index or 0

    @contextlib.contextmanager
    def on(self, stream: Stream | None) -> Iterator[None]:
        """Give a stream what comes in the block; a context like ``torch.cuda.stream``."""
        before = self.current
        self._local.stream = stream or before
        yield
        self._local.stream = before

    @contextlib.contextmanager
    def unwaited(self) -> Iterator[None]:
        """Nobody waits for the card in the block."""
        before = len(self.waits)
        yield
        if waits := self.waits[before:]:
            raise CardError(f"the host waits: {'; '.join(waits)}")

    def wait(self, reason: str, seen: dict[Stream, int] | None = None) -> None:
        """The host waits, by default for all of the current stream."""
        if seen is None:
            self.current.work()
            seen = self.current.seen
        self.waits.append(f"{reason} ({_caller()})")
        join(self.seen, seen)
        arrived = [c for c in self._coming if self.seen[c[0][0]] >= c[0][1]]
        self._coming = [c for c in self._coming if self.seen[c[0][0]] < c[0][1]]
        for _, deliver in arrived:
            deliver()

    def wait_for_all(self, _: Any = None) -> None:
        for stream in self.streams:
            self.wait("torch.cuda.synchronize", stream.seen)

    def use(self, blocks: list[Block], written: list[Block]) -> None:
        """The current stream uses this memory, and overwrites some.

        Raises:
            CardError: It has not waited for who wrote it.
        """
        stream = self.current
        stream.work()
        for block in blocks:
            maker, when = block.written
            if stream.seen[maker] < when:
                raise CardError(f"{stream} uses what {maker} makes, and has not waited for it")
            if stream is not block.home:
                block.uses[stream] = stream.seen[stream]
        for block in written:
            block.written = stream.now

    def copy_in_background(self, values: torch.Tensor) -> torch.Tensor:
        """A tensor of the host that has these values once somebody has waited for it."""
        there = torch.full_like(values, torch.nan if values.is_floating_point() else 77)
        there.pinned = True
        self._coming.append((self.current.now, lambda: there.copy_(values)))
        return there


_present: list[Streams] = []  # the card there is, at most one


def there() -> Streams:
    """The card that there is."""
    return _present[-1]


@contextlib.contextmanager
def present(card: Streams) -> Iterator[None]:
    """Let there be this card in the block.

    Raises:
        CardError: Something has gone wrong where it could not be raised.
    """
    _present.append(card)
    try:
        yield
    finally:
        _present.remove(card)
    if card.faults:
        raise CardError("; ".join(card.faults))


def join(seen: dict[Stream, int], other: dict[Stream, int]) -> None:
    """Know all that the other knows as well."""
    for stream, when in other.items():
        seen[stream] = max(seen.get(stream, 0), when)


def _caller() -> str:
    """The line of the product that is being run."""
    frame = sys._getframe(1)
    while frame.f_back is not None and not frame.f_code.co_filename.startswith(_PRODUCT):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
