"""The `bigtrain` command without a process of its own."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

STARTS_NO_PROCESS = {"checkpoint", "config", "data", "report", "sample", "scaling", "status"}
"""Commands that tests run in their own process: another of their own would spend most of its time importing."""


def run_here(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs the `bigtrain` command in this process, for what starts none: that spares the imports of each."""
    from bigtrain.cli import main

    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["bigtrain", *map(str, arguments)]), pytest.raises(SystemExit) as ended,
    ):  # fmt: skip
        main()
    return subprocess.CompletedProcess(sys.argv, int(ended.value.code or 0), out.getvalue(), err.getvalue())
