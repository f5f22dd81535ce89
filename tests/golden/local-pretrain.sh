#!/usr/bin/env bash
# pretrain-llama31-8b
cd /shared/project || exit
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export PYTHONPATH=/shared/project/runs/llama31-8b/submitted/0001/code
export HF_HUB_OFFLINE=1
exec python -m torch.distributed.run --nproc-per-node 4 --standalone -m sm_train.pretrain /shared/project/runs/llama31-8b/submitted/0001/config.yaml
