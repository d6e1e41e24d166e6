"""URLs in configs: of schemes that are allowed by name, and free of secrets.

The schemes are registered in `bigtrain.storage.scheme`.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit


def is_url(place: str) -> bool:
    """Whether a place is named by a scheme and not by a path."""
    return "://" in place or place.startswith("pipe:")


def check_url(url: str, schemes: Sequence[str]) -> str:
    """A URL of one of some schemes, without the slash at its end.

    Raises:
        ValueError: Another scheme, no host or bucket, credentials, a query or a fragment.
    """
    scheme, _, rest = url.partition(":")
    if scheme not in schemes or not rest.startswith("//"):
        raise ValueError(
            f"the scheme {scheme[:20]!r} is not one of {', '.join(schemes)}; a local directory is a path, and a scheme "
            "of your own comes with --plugin"
        )
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            f"the {scheme} URL carries credentials, a query or a fragment: credentials come from the environment"
        )
    if not parts.netloc or any(ord(letter) <= 32 for letter in url):
        raise ValueError(f"the {scheme} URL names no host or bucket, or holds a space")
    return url.rstrip("/")
