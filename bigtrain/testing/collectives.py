"""Every collective of this rank, as it is issued; see `bigtrain.planning.rehearsal.recorded`."""

from bigtrain.planning.rehearsal.recorded import KINDS, RecordedCollectives

__all__ = ["KINDS", "RecordedCollectives"]
