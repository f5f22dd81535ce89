#!/usr/bin/env bash
# The daemons of tests/slurm/scheduler.py, in its folder. This shell is the first process of a PID namespace: what the
# daemons have started ends with it.
set -e
munged --foreground --force --key-file=munge.key --socket=munge.socket --pid-file=munged.pid --log-file=munged.log \
    --seed-file=munged.seed &
for _ in {1..200}; do
    [ -S munge.socket ] && break
    sleep 0.05
done
slurmctld -D &
slurmd -D -N n1 &
slurmd -D -N n2 &
wait -n
echo "a daemon of SLURM has ended" >&2
