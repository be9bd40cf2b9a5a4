"""A job: one command of ``python -m training``, what it waits for, and what it takes."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Need:
    """What each process of a job takes while it runs.

    Attributes:
        gpus: GPUs that it has for itself.
        cores: CPU cores.
        memory_bytes: Memory of the machine, as estimated; 0 where that is not known.
        processes: How many do the job together, perhaps on several machines.
    """

    gpus: int = 0
    cores: int = 1
    memory_bytes: int = 0
    processes: int = 1


ANY = Need()


@dataclass(frozen=True, slots=True)
class Job:
    """One command of a run, which can be repeated and resumed like any command.

    Attributes:
        command: The command, such as ``train``.
        words: The words that follow it.
        target: The configuration or the bundle that it is for; empty where it is for all.
        part: The fold, or ``1 of 3`` where cases are shared out; empty where there is one part.
        after: The names of the jobs that have to be done before it begins.
        need: What it takes.
    """

    command: str
    words: tuple[str, ...]
    target: str = ""
    part: str = ""
    after: tuple[str, ...] = ()
    need: Need = ANY

    @property
    def name(self) -> str:
        """The job's name, another one for each job of a run."""
        return " ".join(word for word in (self.command, self.target, self.part) if word)

    @property
    def line(self) -> str:
        """The command line, as a person would type it here."""
        return f"{_python()} -m training {shlex.join((self.command, *self.words))}"


def _python() -> str:
    """The interpreter, as a person here would name it."""
    path, here = Path(sys.executable), Path.cwd()
    return shlex.quote(os.path.relpath(path) if path.is_relative_to(here) else str(path))
