"""Names and meanings of all environment variables of bigtrain.

Users may set CACHE, ADDRESS, SECRETS_FILE, TEMPLATE, FAULT and FAULT_FILE. bigtrain's commands set the others for the
processes that they start.
"""

from __future__ import annotations

from typing import Final

# bigtrain sets these for ranks.
RUN: Final = "BIGTRAIN_RUN"
"""Path of the run directory."""
ATTEMPT: Final = "BIGTRAIN_ATTEMPT"
"""Number of the attempt, from 0: each start of all ranks is an attempt."""
LEASE: Final = "BIGTRAIN_LEASE"
"""Number of the launcher's lease; without it, a rank publishes checkpoints without a check of the lease."""
PLUGIN: Final = "BIGTRAIN_PLUGIN"
"""The plugin on the launcher's command line: path of a file, or name of a module."""
SCRIPT: Final = "BIGTRAIN_SCRIPT"
"""How a rank calls a user's own script, as JSON (`bigtrain.jobs.scripts.call`); hidden from the script itself."""
PAGE: Final = "BIGTRAIN_PAGE_FD"
"""File descriptor of the rank's heartbeat page."""

# bigtrain sets these for agents, but for TEMPLATE.
CONTROLLER: Final = "BIGTRAIN_CONTROLLER"
"""HOST:PORT of the controller."""
JOB_TOKEN: Final = "BIGTRAIN_JOB_TOKEN"
"""Shared secret by which agent and controller authenticate each other."""
PLACEMENT: Final = "BIGTRAIN_PLACEMENT"
"""Marks an agent and its descendants, so that a process that left the process group is found by its environment."""
NODE_NAME_IN: Final = "BIGTRAIN_NODE_NAME_IN"
"""Name of the variable that holds the node's name, for agents that share one environment; unset: the host's name."""
AGENT_PARENT: Final = "BIGTRAIN_AGENT_PARENT"
"""Process id of an agent's parent, if the agent must end when the parent ends."""
TEMPLATE: Final = "BIGTRAIN_TEMPLATE"
"""1: ranks are forked from a template process that has imported torch. Otherwise each rank is a fresh process."""
TEMPLATE_ROOM: Final = "BIGTRAIN_TEMPLATE_ROOM"
"""Reserves bytes in the environment block of a template, which a forked rank overwrites with its own variables."""

# For clusters.
ADDRESS: Final = "BIGTRAIN_ADDRESS"
"""URL of a Ray cluster's dashboard, for commands without --address."""
SUBMISSION: Final = "BIGTRAIN_SUBMISSION"
"""Id of the submission that a driver executes."""
CLUSTER: Final = "BIGTRAIN_CLUSTER"
"""Marks all processes of one `bigtrain cluster local`."""

# For the machine.
CACHE: Final = "BIGTRAIN_CACHE"
"""Directory for fetched files; unset: ~/.cache/bigtrain."""
SECRETS_FILE: Final = "BIGTRAIN_SECRETS_FILE"
"""Path of a file or directory of API keys for other services; see `bigtrain.keys`."""

# For fault injection.
FAULT: Final = "BIGTRAIN_FAULT"
"""The fault to inject, as JSON; see `bigtrain.testing.faults`."""
FAULT_FILE: Final = "BIGTRAIN_FAULT_FILE"
"""Path of the file into which the time of the injection is written, in seconds of time.monotonic."""
