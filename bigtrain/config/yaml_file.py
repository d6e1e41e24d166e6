"""Parsing of YAML by the 1.2 core schema, with the line of every key.

`1e-3` is a number, `off` and `no` are texts, and a duplicate key is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from bigtrain.config.errors import UserError

MAX_NODES = 20_000
MAX_DEPTH = 40

COMMAND_LINE = -1
"""The line number of values from the command line."""

Path = tuple[str | int, ...]


class _CoreLoader(yaml.SafeLoader):
    """A loader that resolves plain scalars by the core schema of YAML 1.2; PyYAML follows YAML 1.1."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


class _CoreDumper(yaml.SafeDumper):
    """A dumper that quotes exactly the texts that the core schema would read as another type."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        """Write repeated values in full, without YAML aliases."""
        return True


def _represent_text(dumper: _CoreDumper, text: str) -> yaml.Node:
    # Other styles fold line breaks, to which YAML also counts U+0085 and U+2028.
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_CoreDumper.add_representer(str, _represent_text)

for _core in (_CoreLoader, _CoreDumper):
    for _tag, _pattern, _first in (
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
        ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
        (
            "float",
            r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
            list("-+.0123456789"),
        ),
    ):
        _core.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)


@dataclass(frozen=True)
class YamlDocument:
    """A parsed YAML mapping and the line of each of its values."""

    value: dict[str, Any]
    source: str
    """Name of the file, for messages."""
    lines: dict[Path, int] = field(default_factory=dict)
    """Line number (from 1) of each value's key, by the path of keys and list indices; or COMMAND_LINE."""

    def where(self, path: Path) -> str:
        """The file and line of a path, or of its nearest parent in the file."""
        lines = (self.lines.get(path[:length]) for length in range(len(path), -1, -1))
        line = next((line for line in lines if line is not None), 0)
        if line == COMMAND_LINE:
            return "command line"
        return f"{self.source}, line {line}" if line else self.source

    def override(self, path: tuple[str, ...], value: Any) -> None:
        """Set a value from the command line; missing parent mappings are created.

        Raises:
            UserError: A parent of the key is not a mapping.
        """
        target = self.value
        for depth, part in enumerate(path[:-1]):
            if target.get(part) is None:
                target[part] = {}
                self.lines.setdefault(path[: depth + 1], COMMAND_LINE)
            target = target[part]
            if not isinstance(target, dict):
                above = ".".join(path[: depth + 1])
                raise UserError(f"'{above}' has no keys, so '{'.'.join(path)}' cannot be set", "command line")
        target[path[-1]] = value
        for old in [old for old in self.lines if old[: len(path)] == path]:
            del self.lines[old]
        self.lines[path] = COMMAND_LINE


def parse(text: str, source: str) -> YamlDocument:
    """Parse a YAML document that is a mapping at its top level.

    Args:
        text: The YAML.
        source: Name of the file, for messages.

    Raises:
        UserError: The text is not valid YAML or not a mapping, has a duplicate key or a tag, or exceeds MAX_NODES or
            MAX_DEPTH.
    """
    try:
        node = yaml.compose(text, Loader=_CoreLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise UserError(f"This is not YAML: {said}", f"{source}{line}") from None
    except yaml.YAMLError as error:
        raise UserError(f"This is not YAML: {str(error).splitlines()[0]}", source) from None
    except RecursionError:
        raise UserError("The YAML is nested too deeply", source) from None
    if node is None:
        raise UserError("The file is empty", source, "See configs/quickstart.yaml for a complete example.")
    if not isinstance(node, yaml.MappingNode):
        raise UserError("The top of the file must be a mapping of keys", f"{source}, line 1")
    reader = _Reader(source)
    value = reader.read(node, ())
    return YamlDocument(value, source, {(): 0, **reader.lines})


_KINDS: dict[type[yaml.Node], set[str]] = {
    yaml.MappingNode: {"map"},
    yaml.SequenceNode: {"seq"},
    yaml.ScalarNode: {"str", "null", "bool", "int", "float"},
}


class _Reader:
    def __init__(self, source: str) -> None:
        self.source = source
        self.lines: dict[Path, int] = {}
        self.nodes = 0

    def read(self, node: yaml.Node, path: Path) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES or len(path) > MAX_DEPTH:
            raise UserError("The YAML is too large or nested too deeply", self.source)
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind not in _KINDS[type(node)]:
            where = f"{self.source}, line {node.start_mark.line + 1}"
            raise UserError(f"The tag {node.tag!r} is not allowed", where, "Write a plain value.")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            items = []
            for index, item in enumerate(node.value):
                self.lines[(*path, index)] = item.start_mark.line + 1
                items.append(self.read(item, (*path, index)))
            return items
        return _scalar(kind, node.value)

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError("A key must be a plain text", f"{self.source}, line {line}")
            key = key_node.value
            if key in result:
                raise UserError(
                    f"The key '{key}' appears twice", f"{self.source}, line {line}", "Remove one of the two."
                )
            self.lines[(*path, key)] = line
            result[key] = self.read(value_node, (*path, key))
        return result


def _scalar(kind: str, text: str) -> Any:
    try:
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "int":
            base = {"0o": 8, "0x": 16}.get(text[:2], 10)
            return int(text[2:] if base != 10 else text, base)
        if kind == "float":
            return float(re.sub(r"\.(inf|nan)$", r"\1", text.lower()))
    except ValueError:
        # A text that is tagged as a number, or a number with more digits than Python parses: the section refuses it.
        return text
    return text


def parse_value(text: str) -> Any:
    """Parse one YAML value: the right side of a `key=value` override.

    Raises:
        UserError: The text is not valid YAML, or is more than one value.
    """
    value = parse(f"value: {text}", f"'{text}'").value
    if len(value) > 1:
        raise UserError(f"{text!r} is not a single value", "command line")
    return value["value"]


def dump(value: dict[str, Any]) -> str:
    """Format a mapping as YAML that `parse` reads back as the same value; the order of keys is kept."""
    return yaml.dump(value, Dumper=_CoreDumper, sort_keys=False, width=110, allow_unicode=True)
