#!/usr/bin/env bash
# retarget-shards
cd /shared/project || exit
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export PYTHONPATH=/shared/project/data/shards/submitted/0001/code
export HF_HUB_OFFLINE=1
exec python -m cluster.retarget data/shards --llm some/llm --name 'a name'
