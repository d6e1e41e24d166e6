"""A Llama that waits BIGTRAIN_PACE_S seconds in each training pass, for `--plugin`: time passes, and cores stay free.

What it computes does not depend on the pace: the same run without the variable is the same run at full speed.
"""

from __future__ import annotations

import os
import time
from typing import Any, Literal

from torch import nn

from bigtrain.models.families.llama import Config as Llama

PACE_VARIABLE = "BIGTRAIN_PACE_S"


class Config(Llama):
    arch: Literal["paced-llama"] = "paced-llama"

    def build(self, *arguments: Any, **options: Any) -> nn.Module:
        model = super().build(*arguments, **options)
        pace_s = float(os.environ.get(PACE_VARIABLE, "0"))

        def wait(module: nn.Module, inputs: object) -> None:
            if module.training:
                time.sleep(pace_s)

        if pace_s:
            model.register_forward_pre_hook(wait)
        return model
