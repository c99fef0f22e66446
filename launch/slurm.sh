#!/usr/bin/env bash
# A pre-training run on GPU nodes: one process per GPU, found through SLURM. sbatch launch/slurm.sh
#SBATCH --job-name=lumamba
# Process i of a node drives GPU i of those that it sees, so as many processes as GPUs, whole nodes, and every process
# must see all of them: no --gpus-per-task, no binding.
#SBATCH --nodes=4
#SBATCH --exclusive
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# To the processes (no "B:"), two minutes before the end: saved at the next line of metrics, exit status 75.
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
set -uo pipefail

DATA=${DATA:?the window stores to train on, separated by spaces}
RUN=${RUN:-runs/$SLURM_JOB_NAME}    # on a file system that all nodes share
RESTARTS=${RESTARTS:-100}           # what a crash that repeats itself may cost
read -ra data <<<"$DATA"
read -ra arguments <<<"${ARGUMENTS:-}"

# The end of the job signals this shell too, which must live until srun tells how the processes ended.
trap : TERM
# No --kill-on-bad-exit: it would turn the status of the others into 137. A process that is lost is given up by the
# others themselves (hosts.heartbeat_seconds); --wait is for what hangs even then.
srun --gpu-bind=none --kill-on-bad-exit=0 --wait=300 python train.py "${PRESET:-pretrain_lumamba_tiny}" \
  --data.train "${data[@]}" --trainer.run-dir "$RUN" --trainer.resume true ${arguments[@]+"${arguments[@]}"}
code=$?   # the highest of all processes
case $code in
  0) ;;
  1 | 2) echo "slurm.sh: status $code (1 diverged, 2 wrong input) would only repeat itself: not started again" >&2 ;;
  *)
    if [ "${SLURM_RESTART_COUNT:-0}" -lt "$RESTARTS" ]; then
      echo "slurm.sh: status $code, back into the queue" >&2
      scontrol requeue "$SLURM_JOB_ID"
    else
      echo "slurm.sh: status $code, given up after $RESTARTS restarts" >&2
    fi ;;
esac
exit $code
