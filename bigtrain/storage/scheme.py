"""URL schemes of the places from which shards are read and to which checkpoints are uploaded; an extension point.

A scheme for any fsspec filesystem is one class, in a file that `--plugin` names:

    from bigtrain.storage.scheme import SCHEMES, FsspecScheme

    @SCHEMES.register
    class Shelf(FsspecScheme):
        name = "shelf"                                     # shelf://books/run

        def filesystem(self, url, timeout_s):
            import fsspec

            return fsspec.filesystem("local"), "/mnt/" + url.removeprefix("shelf://")

Then `data.train: shelf://books/shards/train` and `checkpoint.storage: shelf://books/runs` work in the same way as s3://
URLs.
"""

from __future__ import annotations

import importlib.util
from typing import Any, ClassVar, Final

from bigtrain.config import UserError, urls
from bigtrain.config.registry import Registry
from bigtrain.storage.objects import ObjectPlace, Patience, Place


class Scheme:
    """A URL scheme; one instance is created for each directory that is opened."""

    name: ClassVar[str]
    """The part of the URL before "://"."""

    stores: ClassVar[bool] = False
    """Whether the scheme can list and write files. Then it can hold checkpoints, and a directory of tars can be indexed
    by its URL."""

    def open(self, url: str, patience: Patience) -> Place:
        """Open the directory of a checked URL; returns an `ObjectPlace` if the scheme `stores`.

        Raises:
            UserError: A library that the scheme needs is not installed.
        """
        raise NotImplementedError


class FsspecScheme(Scheme):
    """Base class of schemes that use an fsspec filesystem."""

    stores: ClassVar[bool] = True

    library: ClassVar[str | None] = None
    """Name of the module that fsspec needs for the scheme; None: no extra module."""

    extra: ClassVar[str | None] = None
    """The extra of the bigtrain package that installs `library`."""

    def filesystem(self, url: str, timeout_s: float) -> tuple[Any, str]:
        """The filesystem, and the path of the URL in it. The default is fsspec's filesystem of the scheme, uncached.

        Args:
            url: The checked URL.
            timeout_s: Seconds without a response after which a call should raise; the caller retries it.
        """
        import fsspec

        return fsspec.core.url_to_fs(url, use_listings_cache=False, **self.options(timeout_s))

    def options(self, timeout_s: float) -> dict[str, Any]:
        """Keyword arguments of the fsspec filesystem; see `filesystem`."""
        return {}

    def open(self, url: str, patience: Patience) -> ObjectPlace:
        """Open the directory of a checked URL; see `Scheme.open`."""
        if self.library is not None and importlib.util.find_spec(self.library) is None:
            fix = (
                f"In the checkout, run pip install -e '.[{self.extra}]'." if self.extra else f"Install {self.library}."
            )
            raise UserError(f"{self.name}:// needs {self.library}", url, fix)
        return ObjectPlace(url, *self.filesystem(url, patience.timeout_s))


SCHEMES: Final = Registry[Scheme](
    "storage scheme", Scheme, package="bigtrain.storage.schemes", tag=None, where="the scheme of a URL"
)


def check_url(url: str, *, stores: bool = False) -> str:
    """Check that a URL has a registered scheme, and return it without a slash at its end.

    Other schemes are refused: `pipe:`, for example, would execute a shell command.

    Args:
        url: The URL.
        stores: Whether to accept only schemes that can hold checkpoints.

    Raises:
        ValueError: The URL has another scheme, no host or bucket, or contains credentials, a query or a fragment.
    """
    return urls.check_url(url, [name for name in SCHEMES if not stores or SCHEMES[name].stores])


def open_url(url: str, patience: Patience) -> Place:
    """Open the directory that a URL names.

    Raises:
        UserError: The URL is not valid, its scheme is not registered, or the library of the scheme is not installed.
    """
    try:
        url = check_url(url)
    except ValueError as error:
        raise UserError(str(error)) from None
    return SCHEMES[url.partition(":")[0]]().open(url, patience)


def open_store(url: str, patience: Patience) -> ObjectPlace:
    """Open the directory that a URL names, of a scheme that can list and write.

    Raises:
        UserError: The scheme can only read, or for the reasons of `open_url`.
    """
    try:
        url = check_url(url, stores=True)
    except ValueError as error:
        raise UserError(str(error)) from None
    place = open_url(url, patience)
    assert isinstance(place, ObjectPlace), "a scheme that stores opens an ObjectPlace"
    return place
