"""What may follow on a command line, for the TAB key of a shell that has registered argcomplete.

Where that is not installed nothing here does anything: a shell asks through variables of the
environment that only argcomplete's own functions set.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence

ParserOf = Callable[[Sequence[str]], tuple[argparse.ArgumentParser, int]]


def answer(parser_of: ParserOf) -> None:
    """Answer a shell that asks for completions, which ends the process; else return at once.

    Args:
        parser_of: From the words behind the program's name, the last of which may be unfinished,
            the parser to complete by, and how many of the words stand before its arguments.
    """
    first = os.environ.get("_ARGCOMPLETE", "")
    line = os.environ.get("COMP_LINE")
    if not first.isdecimal() or line is None:
        return
    import argcomplete
    from argcomplete.lexers import split_line

    start = int(first)
    words = split_line(line, int(os.environ["COMP_POINT"]))[3]  # those before the cursor's
    parser, skipped = parser_of(words[start:])
    os.environ["_ARGCOMPLETE"] = str(start + skipped)
    argcomplete.autocomplete(parser, always_complete_options="long")  # ends the process
