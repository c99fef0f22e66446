#!/usr/bin/env bash
# A pre-training run on a Cloud TPU slice through queued resources. Edit the first block, then:
#   launch/tpu_pod.sh create    ask for the slice (waits in the queue)
#   launch/tpu_pod.sh status    is it there yet?
#   launch/tpu_pod.sh start     install on every host and start the run (again, after a preemption)
#   launch/tpu_pod.sh log       follow host 0
#   launch/tpu_pod.sh delete    give it back
set -euo pipefail

NAME=${NAME:-lumamba}                 # of the slice and of the run
ZONE=${ZONE:-us-west4-a}
TYPE=${TYPE:-v5litepod-256}           # 64 hosts of 4 chips
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
SOURCE=${SOURCE:-gs://BUCKET/lumamba_jax.tar.gz}   # of `git archive --format=tar.gz HEAD`
DATA=${DATA:-/mnt/data/tueg.h5}       # mounted on every host
RUNS=${RUNS:-/mnt/runs}               # shared by every host
ARGUMENTS=${ARGUMENTS:-"pretrain_lumamba_tiny --loader.batch-size 32768 --model.compute-dtype bfloat16"}

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker all --command "$1"
}

case "${1:-}" in
  create)
    gcloud compute tpus queued-resources create "$NAME" --node-id "$NAME" --zone "$ZONE" \
      --accelerator-type "$TYPE" --runtime-version "$RUNTIME" ;;
  status)
    gcloud compute tpus queued-resources describe "$NAME" --zone "$ZONE" --format 'value(state.state)' ;;
  start)
    on_all_hosts "set -e; rm -rf lumamba_jax && mkdir lumamba_jax && gcloud storage cat $SOURCE | tar xz -C lumamba_jax
      cd lumamba_jax && python3 -m venv .venv && .venv/bin/pip install -q -e . 'jax[tpu]'"
    # Detached, so that a lost connection does not end the run; 75 = stopped on request and saved.
    on_all_hosts "cd lumamba_jax && nohup sh -c '
      until .venv/bin/python train.py $ARGUMENTS --hosts.cluster tpu --data.train $DATA --trainer.run-dir $RUNS/$NAME \
        --trainer.resume true; do code=\$?; [ \$code -eq 1 ] || [ \$code -eq 2 ] && exit \$code; sleep 10; done
      ' > run.log 2>&1 &" ;;
  log)
    gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker 0 --command "tail -f lumamba_jax/run.log" ;;
  delete)
    gcloud compute tpus queued-resources delete "$NAME" --zone "$ZONE" --force --quiet ;;
  *)
    sed -n '2,7p' "$0"; exit 2 ;;
esac
