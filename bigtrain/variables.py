"""Every environment variable of bigtrain, by its name and meaning.

A command sets those of its own processes; CACHE, ADDRESS, SECRETS_FILE, TEMPLATE and the two of fault injection are for
users.
"""

from __future__ import annotations

from typing import Final

# Set for ranks.
RUN: Final = "BIGTRAIN_RUN"
"""The run directory."""
ATTEMPT: Final = "BIGTRAIN_ATTEMPT"
"""The number of this start of all ranks, from 0."""
LEASE: Final = "BIGTRAIN_LEASE"
"""The number of the launcher's lease; without it a rank publishes checkpoints unchecked."""
PLUGIN: Final = "BIGTRAIN_PLUGIN"
"""The place of the plugin that the launcher's command line named."""
SCRIPT: Final = "BIGTRAIN_SCRIPT"
"""How a user's own script is called, as JSON (`bigtrain.jobs.scripts.call`); the script itself does not see it."""
PAGE: Final = "BIGTRAIN_PAGE_FD"
"""The file descriptor of the rank's heartbeat page."""

# Set for agents.
CONTROLLER: Final = "BIGTRAIN_CONTROLLER"
"""HOST:PORT of the controller."""
JOB_TOKEN: Final = "BIGTRAIN_JOB_TOKEN"
"""Secret: proves agent and controller to each other."""
PLACEMENT: Final = "BIGTRAIN_PLACEMENT"
"""Marks an agent and its descendants: one that left the process group is found by its environment."""
NODE_NAME_IN: Final = "BIGTRAIN_NODE_NAME_IN"
"""Name of the variable that holds a node's name, for agents that are all started alike; the host's name without it."""
AGENT_PARENT: Final = "BIGTRAIN_AGENT_PARENT"
"""Process id of an agent's parent, if the agent must end with it."""
TEMPLATE: Final = "BIGTRAIN_TEMPLATE"
"""1: ranks are forked from a process that has imported torch. Otherwise each rank starts as a fresh process."""
TEMPLATE_ROOM: Final = "BIGTRAIN_TEMPLATE_ROOM"
"""Reserves room in the environment of a template, which a forked rank overwrites with its own variables."""

# Clusters.
ADDRESS: Final = "BIGTRAIN_ADDRESS"
"""URL of a Ray cluster's dashboard, for commands without --address."""
SUBMISSION: Final = "BIGTRAIN_SUBMISSION"
"""Id of the submission that a driver works for."""
CLUSTER: Final = "BIGTRAIN_CLUSTER"
"""Marks all processes of one `bigtrain cluster local`."""

# Of the machine.
CACHE: Final = "BIGTRAIN_CACHE"
"""Directory of fetched files; ~/.cache/bigtrain without it."""
SECRETS_FILE: Final = "BIGTRAIN_SECRETS_FILE"
"""A file or directory of keys for other services; see `bigtrain.keys`."""

# Fault injection.
FAULT: Final = "BIGTRAIN_FAULT"
"""A fault as JSON; see `bigtrain.testing.faults`."""
FAULT_FILE: Final = "BIGTRAIN_FAULT_FILE"
"""A file that takes the time at which the fault was injected."""
