#!/usr/bin/env bash
# Start a command again and again until it is finished (exit status 0), has diverged (1) or was refused (2); 75 (stopped
# and saved, or others were not ready) and crashes go on from the last checkpoint.
#   launch/keep_running.sh LOCK COMMAND...
# One at a time: LOCK stays locked while this script or the command runs. SIGTERM goes to the command, and is the end.
# RESTARTS (1000) and PAUSE (10 seconds) bound what a crash that repeats itself costs.
set -uo pipefail

exec 9>>"$1"
shift
flock --nonblock 9 || { echo "keep_running.sh: a run is on already" >&2; exit 2; }

child=
asked=
trap 'asked=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM INT

for ((start = 0; start <= ${RESTARTS:-1000}; start++)); do
  [ -z "$asked" ] || exit 75
  "$@" &
  child=$!
  [ -z "$asked" ] || kill -TERM "$child" 2>/dev/null   # asked before there was a child to tell
  wait "$child"
  code=$?
  while kill -0 "$child" 2>/dev/null; do   # a signal ends `wait` before the command
    wait "$child"
    code=$?
  done
  child=
  case $code in 0 | 1 | 2) exit "$code" ;; esac
  [ -z "$asked" ] || exit "$code"
  [ "$start" -lt "${RESTARTS:-1000}" ] || break
  echo "keep_running.sh: ended with status $code, starting again in ${PAUSE:-10} s" >&2
  sleep "${PAUSE:-10}" 9>&- &   # in the background, so that a signal is not late
  wait $!
done
echo "keep_running.sh: given up after ${RESTARTS:-1000} restarts" >&2
exit "$code"
