"""How a user's script is called: what travels from the launcher to each rank's process.

Standard library only: each rank imports it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Final

from bigtrain import variables

ROLE: Final = "default"
"""torchrun's name for a group of ranks that has no other."""


@dataclass(frozen=True)
class ScriptCall:
    """What each rank runs, and what it finds in its environment."""

    file: str
    """The script, as Python is to find it from `directory`; with `module`, a module's name."""
    arguments: list[str] = field(default_factory=list)
    directory: str | None = None
    """The working directory; None: that of the agent."""
    module: bool = False
    """Whether it is run as `python -m`."""
    local_rank_argument: bool = False
    """Whether the first argument is `--local_rank=N`, as deepspeed's launcher passes it."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables that the user or the launcher sets for the script."""
    run_name: str = "none"
    first_attempt: int = 0
    """The attempt that counts as restart 0."""
    max_restarts: int = 0

    def dump(self) -> str:
        """As `bigtrain.variables.SCRIPT` holds it."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> ScriptCall:
        """Read it back."""
        return cls(**json.loads(text))

    def command(self, python: str, local_rank: str) -> list[str]:
        """The command of one rank; torchrun's placeholder ${local_rank} in an argument is filled in."""
        words = [python, "-u", *(["-m"] if self.module else []), self.file]
        if self.local_rank_argument:
            words.append(f"--local_rank={local_rank}")
        return words + [argument.replace("${local_rank}", local_rank) for argument in self.arguments]

    def torchrun_environment(self, rank: Mapping[str, str]) -> dict[str, str]:
        """The variables that torchrun sets beside those that every rank of bigtrain has.

        Args:
            rank: The environment of the rank's process. Variables that it lacks are skipped.
        """
        found = {
            "ROLE_NAME": ROLE,
            "TORCHELASTIC_RUN_ID": self.run_name,
            "TORCHELASTIC_MAX_RESTARTS": str(self.max_restarts),
            # True would have rank 0 look for a store that torchrun's agent serves; here rank 0 serves it itself.
            "TORCHELASTIC_USE_AGENT_STORE": "False",
            "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": rank.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        }
        if "RANK" in rank:
            found |= {"ROLE_RANK": rank["RANK"], "ROLE_WORLD_SIZE": rank["WORLD_SIZE"]}
            found["GROUP_WORLD_SIZE"] = str(int(rank["WORLD_SIZE"]) // int(rank["LOCAL_WORLD_SIZE"]))
        if variables.ATTEMPT in rank:
            attempt = int(rank[variables.ATTEMPT])
            found["TORCHELASTIC_RESTART_COUNT"] = str(attempt - self.first_attempt)
            if "RANK" in rank:
                log = f"{rank[variables.RUN]}/logs/attempt_{attempt}/rank_{rank['RANK']}_error.json"
                found["TORCHELASTIC_ERROR_FILE"] = log
        return found
