"""The scheme https://HOST/PATH."""

from __future__ import annotations

from bigtrain.storage.scheme import SCHEMES
from bigtrain.storage.schemes.http import Http


@SCHEMES.register
class Https(Http):
    """The encrypted form of the scheme http; redirects to http are refused."""

    name = "https"
