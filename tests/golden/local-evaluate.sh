#!/usr/bin/env bash
# evaluate-llama31-8b
cd /shared/project || exit
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export PYTHONPATH=/shared/project/runs/llama31-8b/submitted/0001/code
export HF_HUB_OFFLINE=1
exec python -m sm_train.evaluate /shared/project/runs/llama31-8b/submitted/0001/config.yaml
