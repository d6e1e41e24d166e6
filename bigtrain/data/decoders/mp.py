"""MessagePack."""

from __future__ import annotations

from typing import Any

from bigtrain.data.decoding import DECODERS, MemberDecoder


@DECODERS.register
class MessagePack(MemberDecoder):
    """`KEY.mp`: a mapping of numbers and lists of numbers, by its keys."""

    name = "mp"

    def decode(self, data: bytes) -> Any:
        """See `MemberDecoder`."""
        from webdataset.autodecode import msgpack_loads

        return msgpack_loads(data)
