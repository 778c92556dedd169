#!/usr/bin/env bash
# All steps in order, on one node. Run it again after an interruption: finished steps are skipped, training resumes.
set -euo pipefail
set -m # a step is a process group of its own, so that all of its processes can be told to stop
step=
stopped=
forward() {
  stopped=yes
  [[ -z $step ]] || kill -"$1" -- -"$step" 2>/dev/null || true # the step may have just ended
}
trap 'forward TERM' TERM # the training saves
trap 'forward INT' INT
for name in 1_download 2_preprocess 3_convert 4_prune 5_train 7_trim 8_export 9_evaluate; do
  bash "$(dirname "${BASH_SOURCE[0]}")/$name.sh" "$1" </dev/null &
  step=$!
  [[ -z $stopped ]] || forward TERM # it came between two steps
  status=0
  wait "$step" || status=$?
  if [[ -n $stopped ]]; then
    while [[ -n $stopped ]]; do # a trap cut the wait short
      stopped=
      status=0
      wait "$step" || status=$?
    done
    exit "$status"
  fi
  ((status == 0)) || exit "$status"
done
