"""The documentation holds: links lead somewhere, files exist, commands have their flags."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import re
import shlex
from pathlib import Path

import pytest

import ichseg
from ichseg.app.arguments import parse_arguments
from ichseg.app.follow_up import arguments as follow_up_arguments
from training.__main__ import COMMANDS
from training.__main__ import main as training_command

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [path for path in ROOT.glob("*.md") if path.name != "CHANGELOG.md"]
    + list((ROOT / "docs").rglob("*.md"))
    + [ROOT / path for path in ("phantom/atlas/README.md", "test/sample/README.md")]
    + [ROOT / "weights" / "MODEL_CARD.md"]
)
TASK_PAGES = (
    "segment", "follow_up", "library", "datasets", "plans", "train", "cluster", "evaluate",
    "nnunet",
)  # fmt: skip
MADE = {"benchmarks/.rival-env"}  # by commands that are described there
# The first parts of paths that are meant to be in the clone.
OURS = ("ichseg/", "training/", "phantom/", "test/", "benchmarks/", "docs/", "weights/")
BY_NAME = lambda path: str(path.relative_to(ROOT))  # noqa: E731 - of a parametrised test


def text_of(page):
    return page.read_text(encoding="utf-8")


def links(text):
    """Where relative links and pictures lead."""
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [link.partition("#")[0] for link in found if not re.match(r"[a-z]+:|#", link)]


def anchors(text):
    """What a link names to lead to each heading: its words in small letters, joined by hyphens."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def named_paths(text):
    """What looks like a path of the clone in backticks, ``test/x.py::test`` without its test."""
    found = []
    for quoted in re.findall(r"`([^`\n]+)`", text):
        path = quoted.partition("::")[0].partition(" ")[0]
        if path.startswith(OURS) and not re.search(r"[*<>{}$]", path):
            found.append(path)
    return found


def command_lines(text):
    """Command lines of code blocks and of what is quoted, without prompts and comments."""
    joined = text.replace("\\\n", " ")
    lines = re.findall(r"^ {4}(.+)$|^(?!```)(.+)$|`([^`\n]+)`", joined, re.MULTILINE)
    for line in {part for groups in lines for part in groups if part}:
        yield from (line, *re.findall(r"`([^`]+)`", line))


def words_after(line, start):
    """The words of a command line after its beginning, as a shell reads them, without comments."""
    rest = line.partition(start)[2].partition(" # ")[0].partition("`")[0]
    try:
        return shlex.split(rest, comments=True)
    except ValueError:
        return rest.split()


def flags_of(command):
    """The flags of a command of ``python -m training``."""
    parser = argparse.ArgumentParser()
    importlib.import_module(COMMANDS[command][0]).add_arguments(parser)
    return {flag for action in parser._actions for flag in action.option_strings}


def flags_of_the_program():
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        parse_arguments(["--help"])
    return set(re.findall(r"--[a-z][\w-]*", shown.getvalue()))


def flags_of_compare_scans():
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        follow_up_arguments.parse(["--help"])
    return set(re.findall(r"--[a-z][\w-]*", shown.getvalue()))


def flags_in(words):
    return {word.partition("=")[0] for word in words if word.startswith("--")}


@pytest.mark.parametrize("page", PAGES, ids=BY_NAME)
def test_links_lead_somewhere(page):
    missing = [link for link in links(text_of(page)) if not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=BY_NAME)
def test_headings_that_are_linked_exist(page):
    missing = []
    for link, anchor in re.findall(r"\]\(([^)\s#:]*)#([^)\s]+)\)", text_of(page)):
        if anchor not in anchors(text_of(page.parent / link if link else page)):
            missing.append(f"{link}#{anchor}")
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=BY_NAME)
def test_files_that_are_named_exist(page):
    named = set(named_paths(text_of(page))) - MADE
    missing = [path for path in named if not (ROOT / path).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=BY_NAME)
def test_commands_of_training_exist_with_their_flags(page):
    for line in command_lines(text_of(page)):
        if "-m training " not in line:
            continue
        command, *words = words_after(line, "-m training ")
        if not re.fullmatch(r"[a-z][a-z-]*", command):
            continue  # COMMAND, or a sentence
        assert command in COMMANDS, line
        assert flags_in(words) - flags_of(command) == set(), line


@pytest.mark.parametrize("page", PAGES, ids=BY_NAME)
def test_flags_of_the_program_exist(page):
    known = flags_of_the_program()
    for line in command_lines(text_of(page)):
        for start in ("process.py ", "ichseg --"):
            if start in line:
                words = words_after(line.replace("ichseg --", "ichseg -- --"), start.strip())
                assert flags_in(words) - known - {"--"} == set(), line


@pytest.mark.parametrize("page", PAGES, ids=BY_NAME)
def test_flags_of_compare_scans_exist(page):
    for line in command_lines(text_of(page)):
        if "compare-scans " in line:
            words = words_after(line, "compare-scans ")
            assert flags_in(words) - flags_of_compare_scans() == set(), line


def test_each_task_has_a_page_and_the_readme_leads_to_it():
    leads_to = {link.rstrip("/") for link in links(text_of(ROOT / "README.md"))}
    for name in (*TASK_PAGES, "platform", "benchmarks", "reliability"):
        assert f"docs/{name}.md" in leads_to
    assert "docs/decisions" in leads_to
    assert len(text_of(ROOT / "README.md").splitlines()) <= 125


def test_the_citation_is_of_this_version():
    citation = text_of(ROOT / "CITATION.cff")
    assert f"\nversion: {ichseg.__version__}\n" in citation


@pytest.mark.parametrize("program", [parse_arguments, training_command])
def test_both_programs_say_their_version(program, capsys):
    with pytest.raises(SystemExit) as end:
        program(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"ichseg {ichseg.__version__}\n"


def test_what_is_wrong_would_be_seen():
    text = "[a](docs/none.md) `ichseg/none.py` `training/none.py::test_x` `weights/*.json`"
    assert links(text) == ["docs/none.md"]
    assert anchors("# A\n\n## `ws`, by hand\n") == {"a", "ws-by-hand"}
    assert named_paths(text) == ["ichseg/none.py", "training/none.py"]
    block = "Run\n\n    python -m training plan --workspace ws \\\n        --nonsense 1  # so\n"
    (line,) = [line for line in command_lines(block) if "-m training" in line]
    assert words_after(line, "-m training ") == ["plan", "--workspace", "ws", "--nonsense", "1"]
