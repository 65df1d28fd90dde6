"""Retired words: code, messages, help texts and documents use the terms of the glossary."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from producer.cli.jobs import jobs_command
from producer.cli.submit import submit
from workers.supervisor import worker

ROOT = Path(__file__).parents[1]

_BEFORE_A_NOUN = (
    "(?:an?|the|each|every|this|per|one|two|three|first|second|further|next|last|more|several)"
)
# The retired word, as a regular expression, and what to write instead.
RETIRED = {
    r"pictures?": "image",
    rf"{_BEFORE_A_NOUN} rounds?(?! of)": "pass",  # not the verb
    r"mend(?:s|ed|ing)?": "fix",
    r"lest": "so that ... not",
    r"whoever": "the reader, the user, the worker ...",
    r"(?:in|into) (?:its |their |our )?hands?": "running, leased, in memory",
    r"aside": "in memory, in the background",
    r"plight": "state",
    r"(?:are|is|that are) no (?:numbers?|finite numbers?)": "NaN or infinite",
    r"numbers? that (?:are|is) none": "NaN or infinite",
    r"what more": "further results, jobs ...",
    r"in any company": "whatever else is in the batch",
    r"without a word": "silently, without an error message",
    r"stands? there twice": "duplicate",
    r"runs? out of its lease": "the lease expires",
    r"given back|gives? back|giving back": "released",
    r"upkeep": "maintenance",
    r"launchers?": "supervisor",
    r"ill": "faulty",
}
PATTERN = re.compile(rf"\b(?:{'|'.join(RETIRED)})\b", re.IGNORECASE)
# Names of things that contain a retired word, and where a word is not our noun.
ALLOWED = re.compile(r"round[- ](?:robin|trips?)|picture desks", re.IGNORECASE)


def retired_words(text: str) -> list[str]:
    return PATTERN.findall(ALLOWED.sub("", text))


def tracked(*patterns: str) -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / line for line in done.stdout.splitlines()]


MODULES = tracked("producer/*.py", "workers/*.py", "shared/*.py", "migrations/*.py")
TEXTS = tracked(
    *("*.md", "*.toml", ".ci/run", "Makefile"),
    *("docker/*", "producer/*.css", "producer/*.js", "producer/*.html", "producer/*.j2"),
)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def commands() -> Iterator[click.Command]:
    yield from (submit, worker, jobs_command, *jobs_command.commands.values())


def test_no_module_uses_a_retired_word() -> None:
    """Messages, docstrings, comments and names alike."""
    problems = [
        f"{relative(path)}:{number}: {word}"
        for path in MODULES
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
        for word in retired_words(line)
    ]
    assert problems == []


def test_no_help_text_uses_a_retired_word() -> None:
    problems = [
        f"{command.name}: {word}"
        for command in commands()
        for word in retired_words(command.get_help(click.Context(command)))
    ]
    assert problems == []


@pytest.mark.parametrize("path", TEXTS, ids=relative)
def test_no_document_uses_a_retired_word(path: Path) -> None:
    problems = [
        f"line {number}: {word}"
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
        for word in retired_words(line)
    ]
    assert problems == []


def test_the_pattern_recognizes_retired_words_and_nothing_else() -> None:
    assert retired_words("two Pictures in hand, lest") == ["Pictures", "in hand", "lest"]
    assert retired_words("a further round is mended") == ["further round", "mended"]
    assert retired_words("round(2.5); ties round up by hand; recommend a round-robin") == []
