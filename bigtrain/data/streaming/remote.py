"""Finds the tars that URLs name; see `bigtrain.storage.scheme` for the schemes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from bigtrain.config import UserError
from bigtrain.storage.objects import ObjectPlace, Patience, Place, RemoteError, patiently
from bigtrain.storage.scheme import open_url

MAX_TARS = 10_000_000

_RANGE = re.compile(r"\{(\d{1,12})\.\.(\d{1,12})\}")


def tars_at(urls: Sequence[str], patience: Patience) -> tuple[Place, list[str]]:
    """The directory and the file names of the tars that some URLs name.

    Raises:
        UserError: A URL names no tar, the tars lie in several directories, a name occurs twice, or a range is too long.
        RemoteError: A directory of an object store cannot be listed.
    """
    found = [url for pattern in urls for url in _expanded(pattern)]
    if len(found) == 1 and not found[0].endswith(".tar"):
        place = open_url(found[0], patience)
        if not isinstance(place, ObjectPlace):
            raise UserError(
                "a web server does not list a directory", found[0], "Name its tars: .../shard-{000000..000099}.tar"
            )
        names = [name for name in place.names() if name.endswith(".tar")]
        if not names:
            raise UserError("there is no .tar file", found[0])
        return place, names
    parents = {url.rpartition("/")[0] for url in found}
    names = [url.rpartition("/")[2] for url in found]
    wrong = next((name for name in names if not name.endswith(".tar") or name[0] == "." or "%" in name), None)
    if wrong is not None:
        raise UserError(f"{wrong!r} is not the name of a .tar file", found[0])
    if len(parents) != 1 or len(set(names)) != len(names):
        raise UserError(
            "the tars are not all in one directory, or one is named twice", found[0], "Index each directory separately."
        )
    return open_url(parents.pop(), patience), names


def _expanded(pattern: str) -> Iterator[str]:
    match = _RANGE.search(pattern)
    if match is None:
        yield pattern
        return
    first, last = int(match[1]), int(match[2])
    if not 0 <= last - first < MAX_TARS or len(match[1]) > len(match[2]):
        raise UserError(f"the range {match[0]} is not one of 1 to {MAX_TARS} numbers", pattern)
    for number in range(first, last + 1):
        text = str(number).zfill(len(match[1]))
        yield from _expanded(pattern[: match.start()] + text + pattern[match.end() :])


def exists(place: Place, name: str, size: int, patience: Patience) -> None:
    """Check that a file exists with the right size, without reading it.

    Raises:
        RemoteError: The file does not exist, or has another size.
    """

    def look() -> None:
        with place.open(name, 0) as body:
            if body.total not in (None, size):
                raise RemoteError(
                    f"the file has {body.total} bytes, but the index says {size}",
                    f"{place.url}/{name}",
                    "Upload the shard and its index again.",
                )

    patiently(look, patience, f"{place.url}/{name}")
