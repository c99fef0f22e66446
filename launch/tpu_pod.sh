#!/usr/bin/env bash
# A pre-training run on a Cloud TPU slice through queued resources. Edit the first block, then:
#   launch/tpu_pod.sh create    ask for the slice (waits in the queue)
#   launch/tpu_pod.sh status    is it there yet? (ACTIVE)
#   launch/tpu_pod.sh start     install on every host and start the run; refused while one is on
#   launch/tpu_pod.sh log       follow host 0
#   launch/tpu_pod.sh stop      save and end; `start` goes on
#   launch/tpu_pod.sh delete    give it back
# After a preemption (status SUSPENDED) the hosts are gone, and nothing brings them back by itself: delete, create, and,
# once it is ACTIVE, start; the run goes on from its newest checkpoint, which lies on RUNS.
set -euo pipefail

NAME=${NAME:-lumamba}                 # of the slice and of the run
ZONE=${ZONE:-us-west4-a}
TYPE=${TYPE:-v5litepod-256}           # 64 hosts of 4 chips
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
PYTHON=${PYTHON:-3.12}                # that of the runtime image may be too old (3.10): 3.11 or later is needed
SOURCE=${SOURCE:-gs://BUCKET/lumamba_jax.tar.gz}   # of `git archive --format=tar.gz HEAD`
DATA=${DATA:-/mnt/data/tueg.h5}       # mounted on every host
RUNS=${RUNS:-/mnt/runs}               # shared by every host
ARGUMENTS=${ARGUMENTS:-"pretrain_lumamba_tiny --loader.batch-size 32768 --model.compute-dtype bfloat16"}

# In the home directory of each host: locked as long as a run or its loop lives (keep_running.sh).
LOCK=lumamba_jax.lock

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker all --command "$1"
}

refuse_while_running() {
  on_all_hosts "flock --nonblock $LOCK true || { echo \"\$(hostname): a run is on, stop it first\" >&2; exit 1; }"
}

install() {
  on_all_hosts "set -e
    rm -rf lumamba_jax && mkdir lumamba_jax
    gcloud storage cat '$SOURCE' | tar xz -C lumamba_jax
    cd lumamba_jax
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --python '$PYTHON' .venv
    python3 -m uv pip install --quiet --python .venv/bin/python -e '.[tpu]'"
}

case "${1:-}" in
  create)
    gcloud compute tpus queued-resources create "$NAME" --node-id "$NAME" --zone "$ZONE" \
      --accelerator-type "$TYPE" --runtime-version "$RUNTIME" ;;
  status)
    gcloud compute tpus queued-resources describe "$NAME" --zone "$ZONE" --format 'value(state.state)' ;;
  start)
    refuse_while_running
    install
    # Detached, so that a lost connection does not end the run. Cloud TPU VMs do not show their other workers: by name.
    on_all_hosts "cd lumamba_jax || exit; JAX_COMPILATION_CACHE_DIR='$RUNS/compiled' nohup bash launch/keep_running.sh \
      ../$LOCK .venv/bin/python train.py $ARGUMENTS --hosts.cluster tpu --data.train '$DATA' \
      --trainer.run-dir '$RUNS/$NAME' --trainer.resume true > run.log 2>&1 < /dev/null & echo \$! > ../lumamba_jax.pid" ;;
  log)
    gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker 0 --command "tail -f lumamba_jax/run.log" ;;
  stop)
    on_all_hosts "flock --nonblock $LOCK true || kill -TERM \$(cat lumamba_jax.pid)" ;;
  delete)
    gcloud compute tpus queued-resources delete "$NAME" --zone "$ZONE" --force --quiet ;;
  *)
    sed -n '2,10p' "$0"; exit 2 ;;
esac
