"""Schemes of URLs: where shards are read from and checkpoints are kept. An extension point.

A scheme over any filesystem of fsspec is one class, in a file that `--plugin` names:

    from bigtrain.storage.scheme import SCHEMES, FsspecScheme

    @SCHEMES.register
    class Shelf(FsspecScheme):
        name = "shelf"                                     # shelf://books/run

        def filesystem(self, url, timeout_s):
            import fsspec

            return fsspec.filesystem("local"), "/mnt/" + url.removeprefix("shelf://")

`data.train: shelf://books/shards/train` and `checkpoint.storage: shelf://books/runs` then work as s3:// does.
"""

from __future__ import annotations

import importlib.util
from typing import Any, ClassVar, Final

from bigtrain.config import UserError, urls
from bigtrain.config.registry import Registry
from bigtrain.storage.objects import ObjectPlace, Patience, Place


class Scheme:
    """One scheme of URLs. An instance is made for each directory that is opened."""

    name: ClassVar[str]
    """What stands before "://"."""

    stores: ClassVar[bool] = False
    """Whether it lists and writes: then it keeps checkpoints too, and a directory of tars is indexed by its URL."""

    def open(self, url: str, patience: Patience) -> Place:
        """The directory of a checked URL; `ObjectPlace` if the scheme `stores`.

        Raises:
            UserError: A library that it needs is not installed.
        """
        raise NotImplementedError


class FsspecScheme(Scheme):
    """A scheme over a filesystem of fsspec."""

    stores: ClassVar[bool] = True

    library: ClassVar[str | None] = None
    """The module that fsspec needs for it."""

    extra: ClassVar[str | None] = None
    """The extra of this package that installs `library`."""

    def filesystem(self, url: str, timeout_s: float) -> tuple[Any, str]:
        """The filesystem, and the path of the URL in it. By default fsspec's own for the scheme, without caches.

        Args:
            timeout_s: After this long without an answer a call should raise. The caller tries again.
        """
        import fsspec

        return fsspec.core.url_to_fs(url, use_listings_cache=False, **self.options(timeout_s))

    def options(self, timeout_s: float) -> dict[str, Any]:
        """Arguments of fsspec's filesystem; see `filesystem`."""
        return {}

    def open(self, url: str, patience: Patience) -> ObjectPlace:
        """See `Scheme`."""
        if self.library is not None and importlib.util.find_spec(self.library) is None:
            fix = f"pip install -e '.[{self.extra}]', in the checkout" if self.extra else f"Install {self.library}."
            raise UserError(f"{self.name}:// needs {self.library}", url, fix)
        return ObjectPlace(url, *self.filesystem(url, patience.timeout_s))


SCHEMES: Final = Registry[Scheme](
    "storage scheme", Scheme, package="bigtrain.storage.schemes", tag=None, where="the scheme of a URL"
)


def check_url(url: str, *, stores: bool = False) -> str:
    """A URL of a registered scheme, without the slash at its end. All others are refused: `pipe:` is a shell.

    Args:
        stores: Only schemes that keep checkpoints.

    Raises:
        ValueError: Another scheme, no host or bucket, credentials, a query or a fragment.
    """
    return urls.check_url(url, [name for name in SCHEMES if not stores or SCHEMES[name].stores])


def open_url(url: str, patience: Patience) -> Place:
    """The directory that a URL names.

    Raises:
        UserError: A scheme that is not registered, or one whose library is not installed.
    """
    try:
        url = check_url(url)
    except ValueError as error:
        raise UserError(str(error)) from None
    return SCHEMES[url.partition(":")[0]]().open(url, patience)


def open_store(url: str, patience: Patience) -> ObjectPlace:
    """The directory that a URL names, of a scheme that lists and writes.

    Raises:
        UserError: As `open_url`; a scheme that only reads.
    """
    try:
        url = check_url(url, stores=True)
    except ValueError as error:
        raise UserError(str(error)) from None
    place = open_url(url, patience)
    assert isinstance(place, ObjectPlace), "a scheme that stores opens an ObjectPlace"
    return place
