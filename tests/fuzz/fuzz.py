"""Fuzz one parser, led by coverage: python tests/fuzz/fuzz.py TARGET [--seconds N]

It needs atheris (pip install atheris), which no test does. Inputs that reach new code are kept in a scratch directory,
whose path is printed: what is worth keeping is copied to tests/fuzz/corpus/TARGET by hand. A finding ends it, and is
written beside them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["bigtrain", "tarfile", "yaml", "json"]):
    sys.path.insert(0, str(Path(__file__).parent))
    import targets


def main() -> None:
    """Fuzz until the time is over or something is found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=sorted(targets.TARGETS))
    parser.add_argument("--seconds", type=int, default=600)
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix=f"fuzz-{options.target}-"))
    print(f"new inputs: {scratch}", flush=True)
    arguments = [
        f"-max_total_time={options.seconds}", f"-max_len={targets.MAX_BYTES}", "-rss_limit_mb=4096", "-timeout=20",
        f"-artifact_prefix={scratch}/finding-", "-print_final_stats=1",
    ]  # fmt: skip
    atheris.Setup(
        [sys.argv[0], *arguments, str(scratch), str(targets.CORPUS / options.target)],
        lambda data: targets.run(options.target, data),
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
