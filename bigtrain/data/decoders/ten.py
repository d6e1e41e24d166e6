"""Decodes tenbin, the tensor format of WebDataset."""

from __future__ import annotations

from typing import Any

from bigtrain.data.decoding import DECODERS, MemberDecoder


@DECODERS.register
class Ten(MemberDecoder):
    """Decodes `KEY.ten`: a list of arrays, which become `ten_0`, `ten_1`, ..."""

    name = "ten"

    def decode(self, data: bytes) -> Any:
        """See `MemberDecoder`."""
        from webdataset.autodecode import tenbin_loads

        return tenbin_loads(data)
