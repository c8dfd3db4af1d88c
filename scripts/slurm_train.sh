#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Train or distil on a Slurm cluster: one torchrun per node, one process per GPU.
#
#   sbatch --nodes 2 --gpus-per-node 8 scripts/slurm_train.sh train --recipe sparse_bev_r50 \
#       --init /shared/nuimages_r50.safetensors --out /shared/runs/sparse_bev --set data.root=/data/nuscenes
#   sbatch scripts/slurm_train.sh distill --recipe ftkd_stream_petr_r50 --teacher FILE --out /shared/runs/student
#
# Two minutes before the time limit, or when the node is taken, Slurm sends SIGTERM: the run saves a checkpoint
# and exits with code 143, and this script puts the job back into the queue, where it resumes.
#SBATCH --job-name=ftkd
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=ftkd-%j.log

set -uo pipefail

case "${1:-}" in
    train | distill) module="training.$1"; shift ;;
    *) echo "slurm_train.sh: expected train or distill first, then its options" >&2; exit 2 ;;
esac

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # loader processes use the cores

stopped=false
step=
trap 'stopped=true; [ -z "$step" ] || kill -TERM "$step"' TERM # the batch shell gets the signal; pass it on
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head_node:${MASTER_PORT:-29500}" \
    -m "$module" "$@" &
step=$!
if "$stopped"; then kill -TERM "$step"; fi # the signal came while srun was started
wait "$step"
code=$?
if "$stopped"; then
    wait "$step" # until the checkpoint is written
    code=$?
    echo "slurm_train.sh: stopped by SIGTERM; job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
