#!/usr/bin/env bash
# pretrain-llama31-8b: start it on every node, with its number
: "${1:?give the number of this node, 0 to 1}"
cd /shared/project || exit
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export PYTHONPATH=/shared/project/runs/llama31-8b/submitted/0001/code
export HF_HUB_OFFLINE=1
exec python -m torch.distributed.run --nproc-per-node 2 --nnodes 2 --master-addr 10.0.0.1 --master-port 29500 --node-rank "$1" -m sm_train.pretrain /shared/project/runs/llama31-8b/submitted/0001/config.yaml
