"""Decodes MessagePack."""

from __future__ import annotations

from typing import Any

from bigtrain.data.decoding import DECODERS, MemberDecoder


@DECODERS.register
class MessagePack(MemberDecoder):
    """Decodes `KEY.mp`: a mapping from names to numbers and lists of numbers."""

    name = "mp"

    def decode(self, data: bytes) -> Any:
        """See `MemberDecoder`."""
        from webdataset.autodecode import msgpack_loads

        return msgpack_loads(data)
