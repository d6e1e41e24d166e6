"""gs://BUCKET/PREFIX: Google Cloud Storage, through gcsfs."""

from __future__ import annotations

from bigtrain.storage.scheme import SCHEMES, FsspecScheme


@SCHEMES.register
class Gs(FsspecScheme):
    """Credentials come from the environment, as google-auth reads them."""

    name = "gs"
    library = "gcsfs"
    extra = "gs"
