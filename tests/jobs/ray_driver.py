"""A run of tiny ranks on Ray, by the real placer and controller: `python ray_driver.py RUN ADDRESS JOB-AS-JSON`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import ray

from bigtrain.jobs.config import JobConfig
from bigtrain.jobs.launch import run_controlled
from bigtrain.jobs.placers.ray import RayPlacer
from bigtrain.storage import append_line


def main() -> int:
    """Run it; returns its exit code."""
    run, job = Path(sys.argv[1]), JobConfig.model_validate_json(sys.argv[3])
    ray.init(address=sys.argv[2], log_to_driver=False, logging_level="ERROR")

    def event(event: str, /, **fields: Any) -> None:
        append_line(run / "events.jsonl", {"event": event, "monotonic": time.monotonic(), **fields})

    def say(line: str) -> None:
        print(line, flush=True)

    paths = [Path(path) for path in json.loads(os.environ.get("DRIVER_PATHS", "[]"))]
    silence_s = float(os.environ.get("DRIVER_SILENCE_S", "10"))
    placer = RayPlacer(job, logs=run / "logs", say=say, silence_s=silence_s, paths=paths, on_event=event)
    environment = {"PYTHONPATH": os.environ["PYTHONPATH"]}
    return run_controlled(
        run,
        placer,
        nproc=placer.procs(job),
        job=job,
        event=event,
        rank_module="tiny_rank",
        environment=environment,
        say=say,
    )


if __name__ == "__main__":
    sys.exit(main())
