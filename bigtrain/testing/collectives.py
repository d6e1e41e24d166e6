"""Records every collective that this rank issues; see `bigtrain.planning.rehearsal.recorded`."""

from bigtrain.planning.rehearsal.recorded import KINDS, RecordedCollectives

__all__ = ["KINDS", "RecordedCollectives"]
