"""The scheme s3://BUCKET/PREFIX: Amazon S3, and servers with its protocol, through s3fs."""

from __future__ import annotations

from typing import Any

from bigtrain.storage.scheme import SCHEMES, FsspecScheme


@SCHEMES.register
class S3(FsspecScheme):
    """Amazon S3; botocore reads credentials and endpoint from the environment."""

    name = "s3"
    library = "s3fs"
    extra = "s3"

    def options(self, timeout_s: float) -> dict[str, Any]:
        """Keyword arguments of the fsspec filesystem; see `FsspecScheme.options`."""
        # The caller retries requests, for all schemes in the same way.
        limits = {"connect_timeout": timeout_s, "read_timeout": timeout_s, "retries": {"total_max_attempts": 1}}
        return {"config_kwargs": limits}
