"""s3://BUCKET/PREFIX: Amazon's S3 and servers with its protocol, through s3fs."""

from __future__ import annotations

from typing import Any

from bigtrain.storage.scheme import SCHEMES, FsspecScheme


@SCHEMES.register
class S3(FsspecScheme):
    """Credentials and endpoint come from the environment, as botocore reads them."""

    name = "s3"
    library = "s3fs"
    extra = "s3"

    def options(self, timeout_s: float) -> dict[str, Any]:
        """See `FsspecScheme`."""
        # Retries are made once for all schemes, by the caller.
        limits = {"connect_timeout": timeout_s, "read_timeout": timeout_s, "retries": {"total_max_attempts": 1}}
        return {"config_kwargs": limits}
