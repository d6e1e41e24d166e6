"""Entry point of `python -m bigtrain`."""

import sys
from pathlib import Path

# `python -m` puts the working directory first on sys.path: a module there would shadow a standard or installed one.
if not sys.flags.safe_path and sys.path and Path(sys.path[0]).resolve() == Path.cwd():
    del sys.path[0]

from bigtrain.cli import main as main

if __name__ == "__main__":
    main()
