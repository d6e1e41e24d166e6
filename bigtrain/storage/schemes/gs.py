"""The scheme gs://BUCKET/PREFIX: Google Cloud Storage, through gcsfs."""

from __future__ import annotations

from bigtrain.storage.scheme import SCHEMES, FsspecScheme


@SCHEMES.register
class Gs(FsspecScheme):
    """Google Cloud Storage; google-auth reads the credentials from the environment."""

    name = "gs"
    library = "gcsfs"
    extra = "gs"
