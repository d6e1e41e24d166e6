"""Checks of URLs in configs: only registered schemes are allowed, and no credentials.

The schemes are registered in `bigtrain.storage.scheme`.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit


def is_url(place: str) -> bool:
    """Whether a text is a URL and not a path."""
    return "://" in place or place.startswith("pipe:")


def check_url(url: str, schemes: Sequence[str]) -> str:
    """Check a URL, and return it without a slash at its end.

    Args:
        url: The URL.
        schemes: The allowed schemes.

    Raises:
        ValueError: The URL has another scheme, no host or bucket, or contains credentials, a query, a fragment or
            a space.
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
