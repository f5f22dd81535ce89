#!/usr/bin/env bash
# precompute-shards
cd /shared/project || exit
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export PYTHONPATH=/shared/project/data/librispeech/shards/submitted/0001/code
export HF_HUB_OFFLINE=1
exec python -m cluster.precompute /shared/project/data/librispeech/shards/submitted/0001/config.yaml
