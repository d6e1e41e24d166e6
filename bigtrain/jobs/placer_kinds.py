"""The registry of placers, and which placer a job uses. Each of bigtrain's own is a file or folder in placers/."""

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
    """The placer class that `job.placer` names.

    For `auto` this is the placer in whose allocation this process runs (`Placer.is_here`), or `local` if there is none.

    Raises:
        UserError: No placer has that name.
    """
    if job.placer != AUTO:
        return PLACERS[job.placer]
    return next((kind for kind in map(PLACERS.__getitem__, PLACERS) if kind.is_here()), PLACERS[DEFAULT])
