"""Secrets out of what is shown, written or sent: pure functions over plain values and texts."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit, urlunsplit

REDACTED = "[redacted]"

_SECRET_WORDS = ("key", "token", "secret", "password", "passwd", "credential")
_HARMLESS_KEYS = frozenset({"tokens", "tokenizer", "keys", "monkey", "keyboard"})
_SIGNED_PARAMETERS = re.compile(
    r"(?i)(?:^|[&;])(?:x-amz-|x-goog-|x-oss-)?[\w-]*(?:signature|sig|token|key|secret|password|credential)[\w-]*="
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>\\^`{|}]+")
_ASSIGNMENT = re.compile(r"(?<![\w&?;#])(?P<key>[A-Za-z_-][\w-]*)=(?P<value>[^\s\"',;]+)")
_BEARER = re.compile(r"(?i)\b(bearer|authorization:\s*\w+)\s+[^\s\"',;]+")
_YAML_ENTRY = re.compile(r"^(?P<indent>\s*(?:- )*)(?P<key>[\"']?[\w.-]+[\"']?)\s*:(?P<value>\s.*|)$")
_FLOW_ENTRY = re.compile(
    r"(?P<head>(?:^|[{,\s])[\"']?(?P<key>[\w.-]+)[\"']?\s*[:=]\s*)(?P<value>\"[^\"]*\"|'[^']*'|[^\s,}\[{]+)"
)


def is_secret_key(key: str) -> bool:
    """Whether a key's value must not be shown: *KEY*, *TOKEN*, *SECRET*, *PASSWORD*, in any case.

    Training is full of harmless tokens, so a key counts by its words: `api_key`, `hfToken`,
    `AWS_SECRET_ACCESS_KEY` are secret; `tokens`, `tokenizer`, `tokens_per_s` and `tokens_seen` are not.
    """
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+", key)
    for word in (word.lower() for word in words):
        if word not in _HARMLESS_KEYS and any(secret in word for secret in _SECRET_WORDS):
            return True
    return False


def redact_url(url: str) -> str:
    """A URL without its user info, and without its query where that carries a signature or a key."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return REDACTED
    place = parts.netloc
    if "@" in place:
        place = f"{REDACTED}@{place.rpartition('@')[2]}"
    query = REDACTED if _SIGNED_PARAMETERS.search(parts.query) else parts.query
    fragment = REDACTED if _SIGNED_PARAMETERS.search(parts.fragment) else parts.fragment
    return urlunsplit((parts.scheme, place, parts.path, query, fragment))


def redact_text(text: str) -> str:
    """A text without the secrets of its URLs, its assignments (`WANDB_API_KEY=...`) and its bearer tokens."""
    text = _URL.sub(lambda match: redact_url(match.group()), text)
    text = _ASSIGNMENT.sub(_redact_assignment, text)
    return _BEARER.sub(lambda match: f"{match[1]} {REDACTED}", text)


def _redact_assignment(match: re.Match[str]) -> str:
    return f"{match['key']}={REDACTED}" if is_secret_key(match["key"]) else match.group()


def redact(value: Any) -> Any:
    """A copy of plain values (dicts, lists, scalars) without secrets; what is not plain becomes its text."""
    if isinstance(value, dict):
        return {
            str(key): REDACTED if is_secret_key(str(key)) and _may_be_secret(item) else redact(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple, set, frozenset)):
        return [redact(item) for item in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return redact_text(str(value))


def _may_be_secret(value: Any) -> bool:
    return value is not None and not isinstance(value, bool)


def redact_yaml(text: str) -> str:
    """A YAML text without secrets, else unchanged: comments, order and quoting stay as they were.

    Works by lines, since parsing and writing it again would change how values are written. What lies under a
    secret key in block style (deeper lines) is dropped with it.
    """
    lines: list[str] = []
    hidden_below: int | None = None
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if hidden_below is not None and (not line.strip() or indent > hidden_below):
            continue
        hidden_below = None
        entry = _YAML_ENTRY.match(line)
        key = entry["key"].strip("\"'") if entry else ""
        if entry and is_secret_key(key) and entry["value"].strip() not in ("null", "~", "true", "false"):
            lines.append(f"{entry['indent']}{entry['key']}: '{REDACTED}'")
            hidden_below = len(entry["indent"])
            continue
        lines.append(redact_text(_FLOW_ENTRY.sub(_redact_flow_entry, line)))
    return "\n".join(lines) + ("\n" if text.endswith("\n") else "")


def _redact_flow_entry(match: re.Match[str]) -> str:
    if is_secret_key(match["key"]) and match["value"] not in ("null", "~", "true", "false"):
        return f"{match['head']}'{REDACTED}'"
    return match.group()
