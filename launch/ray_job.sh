#!/usr/bin/env bash
# A run on a Ray cluster that is up (cluster/README.md says how to raise one), followed until it ends.
#
#     export BIGTRAIN_ADDRESS=http://127.0.0.1:8265 RAY_AUTH_TOKEN_PATH=~/.ray/auth_token
#     launch/ray_job.sh my.yaml my-run [key=value ...]
#
# Change: RUNS, a directory that all nodes of the cluster share; SECRETS, a file on the nodes with lines NAME=VALUE
# (WANDB_API_KEY, HF_TOKEN), mode 0600. Ctrl-C only detaches; the same command resumes a run that has ended early.
set -euo pipefail

config=${1:?name a config} name=${2:?name the run}
shift 2
: "${BIGTRAIN_ADDRESS:?the dashboard of the cluster, for example http://127.0.0.1:8265}"
options=(--name "$name" --runs-dir "${RUNS:-/shared/runs}")
if [ -n "${SECRETS:-}" ]; then options+=(--secrets-file "$SECRETS"); fi
exec bigtrain submit "$config" "$@" "${options[@]}" --follow
