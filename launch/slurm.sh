#!/usr/bin/env bash
# A pre-training run on GPU nodes: one process per GPU, found through SLURM. sbatch launch/slurm.sh
#SBATCH --job-name=lumamba
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120          # two minutes before the end: saved at the next step, exit status 75
#SBATCH --requeue
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
set -uo pipefail

DATA=${DATA:?the window store(s) to train on}
RUN=${RUN:-runs/$SLURM_JOB_NAME}    # on a file system that all nodes share

srun --kill-on-bad-exit=1 python train.py "${PRESET:-pretrain_lumamba_tiny}" --data.train $DATA --trainer.run-dir "$RUN" \
  --trainer.resume true ${ARGUMENTS:-}
code=$?
# Wrong input (2) and divergence (1) would only repeat themselves; everything else goes on where it stopped.
if [ $code -ne 0 ] && [ $code -ne 1 ] && [ $code -ne 2 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
