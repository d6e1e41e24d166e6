"""What an index takes in a fresh process, for `bench data`: python -m tests.bench.bench_data_index DIR CONTEXT."""

from __future__ import annotations

import json
import sys
import time

from bigtrain.data.index import load_index
from bigtrain.data.order.sample_order import SampleOrder
from tests.bench.bench_data_http import anonymous_bytes


def main() -> None:
    """Print {"memory_bytes", "seconds"} of an index and the order of its sequences."""
    before, began = anonymous_bytes(), time.perf_counter()
    index = load_index(sys.argv[1])
    order = SampleOrder(0, index.fingerprint, index.sequence_counts(int(sys.argv[2])), 8)
    order.upcoming(0, 1)
    print(json.dumps({"memory_bytes": anonymous_bytes() - before, "seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    main()
