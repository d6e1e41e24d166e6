"""Removal of secrets from values and texts that are shown, written or sent; pure functions."""

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
    """Whether the value of a key must not be shown, judged by words such as key, token, secret and password.

    The key is split into its words, since many names in training contain "token": `api_key`, `hfToken` and
    `AWS_SECRET_ACCESS_KEY` are secret; `tokens`, `tokenizer`, `tokens_per_s` and `tokens_seen` are not.
    """
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+", key)
    for word in (word.lower() for word in words):
        if word not in _HARMLESS_KEYS and any(secret in word for secret in _SECRET_WORDS):
            return True
    return False


def redact_url(url: str) -> str:
    """Replace the user info of a URL, and a query or fragment that contains a signature or key, by REDACTED."""
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
    """Remove the secrets in a text's URLs, assignments (`WANDB_API_KEY=...`) and bearer tokens."""
    text = _URL.sub(lambda match: redact_url(match.group()), text)
    text = _ASSIGNMENT.sub(_redact_assignment, text)
    return _BEARER.sub(lambda match: f"{match[1]} {REDACTED}", text)


def _redact_assignment(match: re.Match[str]) -> str:
    return f"{match['key']}={REDACTED}" if is_secret_key(match["key"]) else match.group()


def redact(value: Any) -> Any:
    """A copy of a value (dicts, lists, scalars) without secrets; objects of other types are converted to texts."""
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
    """Remove the secrets in a YAML text; comments, order and quoting are kept.

    The function processes lines, since parsing and dumping would change the format of values. In block style, the
    indented lines below a secret key are removed too.
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
