#!/usr/bin/env bash
# Fit a generator as a job of a running Ray cluster.
#
#     ./submit.sh http://HEAD:8265 /shared/runs/a /shared/fits/a --num-workers 4
#
# The store and the run folder are on storage that every node mounts at the same path, or in a bucket (s3://...). The
# same command again goes on after a failure, and returns at once when the fit is finished. The job fails, and so does
# this script, when the fit fails. Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN if the cluster asks for a token.
set -euo pipefail

if [ $# -lt 3 ]; then
    sed -n '2,9p' "$0" >&2
    exit 2
fi
dashboard=$1 store=$2 out=$3
shift 3

here=$(cd "$(dirname "$0")" && pwd)
# Only this folder's small files are sent: snapshots stay where they are.
exec ray job submit --address "$dashboard" --working-dir "$here" --runtime-env "$here/runtime_env.yaml" \
    -- pdiff fit "$store" --out "$out" "$@"
