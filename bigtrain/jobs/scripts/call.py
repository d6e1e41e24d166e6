"""How a user's script is called: the data that the launcher sends to each rank's process.

Standard library only, because each rank imports this module.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Final

from bigtrain import variables

ROLE: Final = "default"
"""torchrun's default name of a group of ranks."""


@dataclass(frozen=True)
class ScriptCall:
    """The script that each rank runs, its arguments and its environment variables."""

    file: str
    """Path of the script, absolute or relative to `directory`; if `module` is true, the name of a module."""
    arguments: list[str] = field(default_factory=list)
    directory: str | None = None
    """The working directory; None: the working directory of the agent."""
    module: bool = False
    """Whether the script is run as `python -m`."""
    local_rank_argument: bool = False
    """Whether the first argument is `--local_rank=N`, as deepspeed's launcher passes it."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables that the user or the launcher sets for the script."""
    run_name: str = "none"
    first_attempt: int = 0
    """Number of the attempt that counts as restart 0."""
    max_restarts: int = 0

    def dump(self) -> str:
        """Serialise the call to JSON, as the variable `bigtrain.variables.SCRIPT` holds it."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> ScriptCall:
        """Parse the text that `dump` returned."""
        return cls(**json.loads(text))

    def command(self, python: str, local_rank: str) -> list[str]:
        """The command of one rank, with torchrun's placeholder ${local_rank} in arguments replaced."""
        words = [python, "-u", *(["-m"] if self.module else []), self.file]
        if self.local_rank_argument:
            words.append(f"--local_rank={local_rank}")
        return words + [argument.replace("${local_rank}", local_rank) for argument in self.arguments]

    def torchrun_environment(self, rank: Mapping[str, str]) -> dict[str, str]:
        """The variables that torchrun and deepspeed set in addition to those that every rank of bigtrain has.

        Args:
            rank: The environment of the rank's process. Variables that depend on a missing one are skipped.
        """
        found = {
            "ROLE_NAME": ROLE,
            "TORCHELASTIC_RUN_ID": self.run_name,
            "TORCHELASTIC_MAX_RESTARTS": str(self.max_restarts),
            # With True, rank 0 would expect a store that torchrun's agent serves; here rank 0 serves the store.
            "TORCHELASTIC_USE_AGENT_STORE": "False",
            "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": rank.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        }
        if "RANK" in rank:
            found |= {"ROLE_RANK": rank["RANK"], "ROLE_WORLD_SIZE": rank["WORLD_SIZE"]}
            found["GROUP_WORLD_SIZE"] = str(int(rank["WORLD_SIZE"]) // int(rank["LOCAL_WORLD_SIZE"]))
            # deepspeed's names, from the ranks as they are placed now: nodes may have been lost since the submission.
            found |= {"LOCAL_SIZE": rank["LOCAL_WORLD_SIZE"], "CROSS_SIZE": found["GROUP_WORLD_SIZE"]}
            found["CROSS_RANK"] = str(int(rank["RANK"]) // int(rank["LOCAL_WORLD_SIZE"]))
        if variables.ATTEMPT in rank:
            attempt = int(rank[variables.ATTEMPT])
            found["TORCHELASTIC_RESTART_COUNT"] = str(attempt - self.first_attempt)
            if "RANK" in rank:
                log = f"{rank[variables.RUN]}/logs/attempt_{attempt}/rank_{rank['RANK']}_error.json"
                found["TORCHELASTIC_ERROR_FILE"] = log
        return found
