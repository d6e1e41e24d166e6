#!/usr/bin/env bash
# A run under plain torchrun, for where torchrun is what starts jobs. `bigtrain train` needs none of this: its own agents
# also notice ranks that hang, keep each rank's log, and restart in place.
#
#     launch/torchrun.sh my.yaml [key=value ...]                                        # this machine
#     NODES=2 NODE_RANK=0 HEAD=node-a:29500 launch/torchrun.sh my.yaml [key=value ...]  # on node-a; on the other, NODE_RANK=1
#
# Change: PROCS (default: one a GPU, else 1), NODES, NODE_RANK, HEAD. Several nodes must share the run directory.
# The run resumes by the same command, and by `bigtrain train`. SIGTERM lets it save itself.
set -euo pipefail

gpus=$(find /dev -maxdepth 1 -regex '/dev/nvidia[0-9]+' | wc -l)
procs=${PROCS:-$((gpus > 0 ? gpus : 1))}
nodes=${NODES:-1}
where=(--standalone)
if [ "$nodes" -gt 1 ]; then
    where=(--nnodes "$nodes" --node-rank "${NODE_RANK:?which of the nodes is this, from 0}"
        --master-addr "${HEAD%:*}" --master-port "${HEAD##*:}")
fi
: "${1:?name a config}"
exec torchrun "${where[@]}" --nproc-per-node "$procs" --max-restarts "${RESTARTS:-3}" -m bigtrain.jobs.torchrun "$@"
