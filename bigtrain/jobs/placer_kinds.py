"""The kinds of placers by name, and which of them a job uses. bigtrain's own lie in placers/, a file or folder each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from bigtrain.config.registry import Registry
from bigtrain.jobs.placing import Placer

if TYPE_CHECKING:
    from bigtrain.jobs.config import JobConfig

AUTO: Final = "auto"
DEFAULT: Final = "local"

PLACERS: Registry[Placer] = Registry(
    "placer", Placer, package="bigtrain.jobs.placers", tag=None, where="job.placer", folders=None
)


def kind_of(job: JobConfig) -> type[Placer]:
    """The kind that `job.placer` names; for `auto` the one whose allocation this process is in, else this machine.

    Raises:
        UserError: There is none of that name.
    """
    if job.placer != AUTO:
        return PLACERS[job.placer]
    return next((kind for kind in map(PLACERS.__getitem__, PLACERS) if kind.is_here()), PLACERS[DEFAULT])
