"""A plugin: two schemes of URLs over fsspec's own filesystems, `shelf` on this machine's disk, `attic` in memory."""

from __future__ import annotations

import os
from typing import Any

import fsspec

from bigtrain.storage.scheme import SCHEMES, FsspecScheme


@SCHEMES.register
class Shelf(FsspecScheme):
    """shelf://BOX/PATH is $SHELF/BOX/PATH."""

    name = "shelf"

    def filesystem(self, url: str, timeout_s: float) -> tuple[Any, str]:
        """See `FsspecScheme`."""
        return fsspec.filesystem("local", auto_mkdir=True), f"{os.environ['SHELF']}/{url.removeprefix('shelf://')}"


@SCHEMES.register
class Attic(FsspecScheme):
    """attic://BOX/PATH, for as long as this process lasts."""

    name = "attic"

    def filesystem(self, url: str, timeout_s: float) -> tuple[Any, str]:
        """See `FsspecScheme`."""
        return fsspec.filesystem("memory"), f"/{url.removeprefix('attic://')}"
