"""What the READMEs show is there: links, paths, commands, YAML; and they use plain words, as the docstrings do."""

from __future__ import annotations

import io
import itertools
import re
import shlex
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.core import TyperGroup

from bigtrain.cli import app
from bigtrain.run import load_config
from bigtrain.sweeps.load import load_sweep
from tests.bench.networks import known_rows

ROOT = Path(__file__).parent.parent
FOLDERS = ("bigtrain", "cluster", "configs", "launch", "tests")
READMES = [ROOT / "README.md", *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("README.md"))]
LINES = 280
"""A newcomer reads the first one; what is longer belongs to a folder."""


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(path: Path) -> str:
    """What a reader sees: the text without comments."""
    return re.sub(r"<!--.*?-->", "", path.read_text(), flags=re.DOTALL)


def anchors(path: Path) -> set[str]:
    """The headings of a file as the addresses that GitHub gives them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text_of(path), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(path: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", text_of(path))


def commands(path: Path) -> Iterator[list[str]]:
    """The words of each command that stands in a line of its own or in backticks, after `bigtrain`."""
    text = re.sub(r"```.*?```", "", text_of(path), flags=re.DOTALL)
    for shown in re.findall(r"^ {4}bigtrain ([a-z][^#|\n]*)", text, re.MULTILINE) + re.findall(
        r"`bigtrain ([a-z][^`]*)`", text
    ):
        yield shlex.split(shown.partition(" -- ")[0].replace("[", " ").replace("]", " "))


def blocks(path: Path) -> list[str]:
    """Each YAML that could be typed as it stands."""
    found = re.findall(r"```yaml\n(.*?)```", text_of(path), re.DOTALL)
    return [block for block in found if ", ...}" not in block and "my-model" not in block]


@pytest.fixture(scope="module")
def root() -> TyperGroup:
    command = typer.main.get_command(app)
    assert isinstance(command, TyperGroup)
    return command


def test_the_first_readme_is_short_and_leads_to_all_others() -> None:
    first = ROOT / "README.md"
    assert len(first.read_text().splitlines()) <= LINES
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links(first)}
    assert {name(path) for path in READMES[1:] if path not in linked} == set()


@pytest.mark.parametrize("path", READMES, ids=name)
def test_every_link_leads_to_a_file_and_its_heading(path: Path) -> None:
    for link in links(path):
        place, _, heading = link.partition("#")
        target = (path.parent / place).resolve() if place else path
        assert target.exists(), link
        assert not heading or heading in anchors(target), link


@pytest.mark.parametrize("path", READMES, ids=name)
def test_every_path_that_is_named_exists(path: Path) -> None:
    named = re.findall(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[a-z\d_/.-]*[a-z\d_]\b", text_of(path))
    assert [place for place in named if not (ROOT / place).exists()] == []


@pytest.mark.parametrize("path", READMES, ids=name)
def test_every_command_that_is_shown_is_one(path: Path, root: TyperGroup) -> None:
    for words in commands(path):
        command: Any = root
        while isinstance(command, TyperGroup):
            command = command.commands[words.pop(0)]
        if not command.context_settings.get("ignore_unknown_options"):
            if not command.context_settings.get("allow_interspersed_args", True):
                # What follows the script is the script's.
                words = list(itertools.takewhile(lambda word: not word.endswith(".py"), words))
            known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
            assert {word for word in words if word.startswith("--")} <= known, (command.name, words)


@pytest.mark.parametrize("path", READMES, ids=name)
def test_every_yaml_that_is_shown_is_taken(path: Path, write_config: Callable[..., Path]) -> None:
    for block in blocks(path):
        sections = yaml.safe_load(block)
        if "base" in sections:
            place = write_config()
            place.write_text(block)
            load_sweep(place)
        else:
            load_config(write_config(**sections))


PRIVATE_WORDS = re.compile(
    r"\b(?:heed(?:s|ed|ing)?|mend(?:s|ed|ing)?|dear(?:er|est)|borne|legs?|told|ours|theirs|left out|stretches of"
    r"|was asked for|who asks|is said|of the whole|(?:is|are) no numbers|did not come to|(?:keeps?|kept) company"
    r"|(?:comes|came) to (?:itself|themselves))\b",
    re.IGNORECASE,
)
"""Private words, for which the field has its own: respect, repair, segment, skipped, printed, native."""


def prose(path: Path) -> str:
    """A README, or the strings and comments of a module; a module without such words is not tokenized."""
    text = path.read_text()
    if path.suffix != ".py" or not PRIVATE_WORDS.search(text):
        return text
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return "\n".join(token.string for token in tokens if token.type in (tokenize.STRING, tokenize.COMMENT))


def test_documentation_uses_the_words_of_the_field() -> None:
    paths = [*READMES, *sorted((ROOT / "bigtrain").rglob("*.py"))]
    assert {name(path): words for path in paths if (words := PRIVATE_WORDS.findall(prose(path)))} == {}


def test_the_networks_reach_what_their_readme_says() -> None:
    rows = known_rows()
    shown = [line.strip("| ").split(" | ") for line in (ROOT / "configs" / "README.md").read_text().splitlines()]
    table = {cells[0]: cells[-1].removesuffix(" (not yet)") for cells in shown if cells[0] in rows}
    assert table == {network: row[3] for network, row in rows.items()}
