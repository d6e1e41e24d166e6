"""Loading of typed sections from YAML files and overrides, with errors that name the line and the most similar key."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.json_schema import GenerateJsonSchema

from bigtrain.config import yaml_file
from bigtrain.config.errors import UserError, nearest
from bigtrain.config.plugin import load_installed
from bigtrain.config.registry import Registry
from bigtrain.config.section import Section

SectionT = TypeVar("SectionT", bound=Section)


def read_document(path: Path, overrides: Iterable[str] = ()) -> yaml_file.YamlDocument:
    """Parse a YAML file and apply `key.sub=value` overrides.

    Raises:
        UserError: The file cannot be read or parsed, or an override is not valid.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"There is no file {path}", fix="Give the path of a YAML file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read {path}: {error}") from None
    return override(yaml_file.parse(text, str(path)), overrides)


def override(document: yaml_file.YamlDocument, overrides: Iterable[str]) -> yaml_file.YamlDocument:
    """Apply `key.sub=value` overrides to a document in place, and return the document."""
    for word in overrides:
        _apply_override(document, word)
    return document


def from_overrides(overrides: Iterable[str]) -> yaml_file.YamlDocument:
    """A document that consists only of `key.sub=value` overrides of the command line."""
    return override(yaml_file.YamlDocument({}, "command line"), overrides)


def _apply_override(document: yaml_file.YamlDocument, override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise UserError(
            f"'{override}' is not an override",
            "command line",
            "Write key=value, for example optimizer.lr=1e-3.",
        )
    document.override(tuple(key.split(".")), yaml_file.parse_value(text))


def build(kind: type[SectionT], document: yaml_file.YamlDocument) -> SectionT:
    """Validate a parsed document as a section.

    The validation is strict, as for JSON: a text is not converted to a number, `off` is not false, and true is not 1.

    Raises:
        UserError: The document has unknown or missing keys, wrong types or invalid values. The message lists all
            problems with their lines, and for an unknown key the most similar known one.
    """
    load_installed()
    try:
        return kind.model_validate_json(json.dumps(document.value), strict=True)
    except ValidationError as error:
        problems = _problems(kind, document, error)
    if len(problems) == 1:
        what, where, fix = problems[0]
        raise UserError(what, where, fix) from None
    lines = [f"{what} ({where})" + (f" {fix}" if fix else "") for what, where, fix in problems]
    raise UserError(f"The config has {len(lines)} problems:\n  - " + "\n  - ".join(lines), document.source) from None


Problem = tuple[str, str, str | None]
"""The arguments `what`, `where` and `fix` of a UserError."""


def _problems(kind: type[Section], document: yaml_file.YamlDocument, error: ValidationError) -> list[Problem]:
    """One problem for each wrong value: failures of several choices of a union are combined into one problem."""
    problems: dict[tuple[str | int, ...], Problem] = {}
    for item in error.errors(include_url=False):
        path, owner = _resolve(kind, document.value, item["loc"])
        what, where, fix = _describe(document, path, owner, dict(item))
        if path in problems and item["loc"] != path:
            what = f"{problems[path][0]}; or {what.removeprefix(_key(path) + ': ')}"
        problems[path] = (what, where, fix)
    return list(problems.values())


def _key(path: tuple[str | int, ...]) -> str:
    return ".".join(map(str, path))


def _describe(
    document: yaml_file.YamlDocument, path: tuple[str | int, ...], owner: type[BaseModel] | None, error: dict[str, Any]
) -> Problem:
    key, where = _key(path), document.where(path)
    if error["type"] == "extra_forbidden":
        known = list(owner.model_fields) if owner else []
        close = nearest(str(path[-1]), known)
        fix = f"Did you mean '{close}'?" if close else f"Known keys: {', '.join(known)}."
        return f"Unknown key '{key}'", where, fix
    if error["type"] == "missing":
        field = owner.model_fields.get(str(path[-1])) if owner else None
        return (
            f"The key '{key}' is missing",
            where,
            f"Add it: {field.description.splitlines()[0]}" if field and field.description else None,
        )
    if error["type"] in ("unknown_name", "missing_name"):
        context = error["ctx"]
        place, names = (*path, context["tag"]), f"Known: {context['names']}."
        if error["type"] == "missing_name":
            return f"The key '{_key(place)}' is missing", where, names
        close = f"Did you mean '{context['nearest']}'? " if context["nearest"] else ""
        fix = f"{close}{names} Add one of your own with --plugin FILE."
        return f"Unknown {context['point']} '{context['name']}'", document.where(place), fix
    message = _MESSAGES.get(error["type"]) or error["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:] if message[:1].isupper() and not message[1:2].isupper() else message
    value = error.get("input")
    # A URL may contain credentials, which no message may show.
    hidden = isinstance(value, (dict, list)) or value is None or "://" in str(value)
    shown = "" if hidden or repr(value) in message else f" (got {value!r})"
    return (f"{key}: {message}{shown}" if key else message), where, None


_MESSAGES = {
    "model_type": "input should be a mapping of keys",
    "tuple_type": "input should be a list",
    "list_type": "input should be a list",
    "bool_type": "input should be true or false",
}
"""Replacements for messages of pydantic that use terms of Python and JSON, by the type of the error."""


def _resolve(
    kind: type[BaseModel], value: Any, location: tuple[str | int, ...]
) -> tuple[tuple[str | int, ...], type[BaseModel] | None]:
    """The YAML path of a pydantic location, without the tags of unions, and the section that has its last key."""
    path: list[str | int] = []
    owner: type[BaseModel] | None = kind
    choices: list[type[BaseModel]] = [kind]
    for part in location:
        is_key = (isinstance(value, dict) and part in value) or (isinstance(value, list) and isinstance(part, int))
        known = any(part in choice.model_fields for choice in choices)
        if not is_key and not known:
            choices = [choice for choice in choices if _has_tag(choice, part)] or choices
            continue
        owner = choices[0] if choices else None
        path.append(part)
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        field = owner.model_fields.get(str(part)) if owner else None
        if field is not None:
            choices = list(_sections(field.annotation, value, field.metadata))
        elif isinstance(part, int):
            choices = [choice for choice in choices if not isinstance(value, dict) or _may_be(choice, value)] or choices
    return tuple(path), owner


def _has_tag(section: type[BaseModel], tag: str | int) -> bool:
    return any(
        typing.get_origin(field.annotation) is typing.Literal and tag in typing.get_args(field.annotation)
        for field in section.model_fields.values()
    )


def _may_be(section: type[BaseModel], value: dict[str, Any]) -> bool:
    """Whether a mapping in a list may be an instance of the section, judged by the section's Literal fields."""
    return all(
        value.get(name, field.default) in typing.get_args(field.annotation)
        for name, field in section.model_fields.items()
        if typing.get_origin(field.annotation) is typing.Literal
    )


def _sections(annotation: Any, value: Any, metadata: Iterable[Any] = ()) -> Iterable[type[BaseModel]]:
    """The sections that a type annotation allows for a YAML value, in order."""
    registries = [one for one in metadata if isinstance(one, Registry)]
    if registries:
        for one in value if isinstance(value, list) else [value]:
            chosen = registries[0].choose(one)
            yield chosen or registries[0].base
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) is typing.Annotated:
        yield from _sections(typing.get_args(annotation)[0], value, typing.get_args(annotation)[1:])
    elif isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        for argument in typing.get_args(annotation):
            yield from _sections(argument, value)


def json_schema(kind: type[Section]) -> dict[str, Any]:
    """JSON Schema of a section, by which editors complete and check the YAML."""
    load_installed()
    return {"$schema": GenerateJsonSchema.schema_dialect, **kind.model_json_schema()}
