"""What a rank of a user's script is given."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_a_lock_of_a_killed_compilation_is_gone_at_the_next_attempt_alone(tmp_path: Path) -> None:
    script = tmp_path / "show.py"
    script.write_text("import os, pathlib\nplace = pathlib.Path(os.environ['TORCH_EXTENSIONS_DIR'])\n"
                      "print(place)\nprint(sorted(p.name for p in place.rglob('*') if p.is_file()))\n")  # fmt: skip

    def rank(attempt: int) -> list[str]:
        known = {
            "BIGTRAIN_RUN": str(tmp_path / "run"),
            "BIGTRAIN_ATTEMPT": str(attempt),
            "XDG_CACHE_HOME": str(tmp_path),
        }
        environment = {key: value for key, value in os.environ.items() if key != "TORCH_EXTENSIONS_DIR"} | known
        done = subprocess.run(
            [sys.executable, "-m", "bigtrain.jobs.scripts.rank", str(script)],
            env=environment, capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        return done.stdout.splitlines()

    place = Path(rank(0)[0])
    assert place.is_relative_to(tmp_path)
    (place / "op").mkdir()
    (place / "op" / "lock").touch()
    (place / "op" / "op.so").touch()
    assert rank(0)[1] == "['attempt', 'lock', 'op.so']"  # Another rank of this attempt may hold it.
    assert rank(1)[1] == "['attempt', 'op.so']"
    # Exit codes and signals are the script's own.
    script.write_text("import sys; sys.exit(3)")
    done = subprocess.run([sys.executable, "-m", "bigtrain.jobs.scripts.rank", str(script)],
                          env=os.environ | {"TORCH_EXTENSIONS_DIR": "/nowhere"}, check=False)  # fmt: skip
    assert done.returncode == 3
