"""https://HOST/PATH."""

from __future__ import annotations

from bigtrain.storage.scheme import SCHEMES
from bigtrain.storage.schemes.http import Http


@SCHEMES.register
class Https(Http):
    """As http, encrypted; a redirect to http is refused."""

    name = "https"
