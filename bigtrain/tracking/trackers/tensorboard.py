"""The TensorBoard tracker: event files in RUN/tensorboard, which `tensorboard --logdir RUNS` shows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, ClassVar, Literal

from bigtrain.config import UserError
from bigtrain.tracking.config import PICTURE_KEY, TRACKERS, TrackedRun, Tracker, TrackerConfig

FLUSH_S = 5
"""Seconds between two writes of the event file; a kill may lose the data of this time."""


@TRACKERS.register
class TensorBoardConfig(TrackerConfig):
    """Writes numbers as scalars, and images, to TensorBoard's event files; needs the extra `tensorboard`."""

    label: ClassVar[str] = "TensorBoard"

    name: Literal["tensorboard"] = "tensorboard"

    def open(self, run: TrackedRun, start: dict[str, Any]) -> Tracker:
        """Open a new event file; steps that are logged again after a resume replace those of earlier files."""
        return _TensorBoard(run)


class _TensorBoard(Tracker):
    def __init__(self, run: TrackedRun) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise UserError(
                f"TensorBoard cannot be imported: {error}", "tracking.trackers", "pip install 'bigtrain[tensorboard]'"
            ) from None
        self._events, self._summaries = event_pb2, summary_pb2
        self._writer: Any = EventFileWriter(str(run.directory / "tensorboard"), flush_secs=FLUSH_S)
        self._has_begun = False

    def log(self, row: dict[str, Any]) -> None:
        step = row["step"]
        if not self._has_begun:
            # TensorBoard then hides the data from this step on in earlier files.
            begin = self._events.SessionLog(status=self._events.SessionLog.START)
            self._writer.add_event(self._events.Event(wall_time=time.time(), step=step, session_log=begin))
            self._has_begun = True
        values = [
            self._summaries.Summary.Value(tag=name, simple_value=float(value))
            for name, value in row.items()
            if name != "step" and isinstance(value, (int, float))
        ] + [self._image(name, Path(value[PICTURE_KEY])) for name, value in row.items() if _is_picture(value)]
        summary = self._summaries.Summary(value=values)
        self._writer.add_event(self._events.Event(wall_time=time.time(), step=step, summary=summary))

    def close(self, failed: bool) -> None:
        self._writer.close()

    def _image(self, name: str, file: Path) -> Any:
        image = self._summaries.Summary.Image(encoded_image_string=file.read_bytes())
        return self._summaries.Summary.Value(tag=name, image=image)


def _is_picture(value: Any) -> bool:
    return isinstance(value, dict) and PICTURE_KEY in value and Path(value[PICTURE_KEY]).exists()
