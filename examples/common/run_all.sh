#!/usr/bin/env bash
# All steps in order, on one node. Run it again after an interruption: finished steps are skipped, training resumes.
set -euo pipefail
step=
trap '[[ -z $step ]] || kill -TERM "$step"; stopped=yes' TERM # the training saves
for name in 1_download 2_preprocess 3_convert 4_prune 5_train 7_trim 8_export 9_evaluate; do
  bash "$(dirname "${BASH_SOURCE[0]}")/$name.sh" "$1" &
  step=$!
  status=0
  wait "$step" || status=$?
  if [[ -n ${stopped:-} ]]; then # the trap cut the first wait short
    wait "$step" || status=$?
    exit "$status"
  fi
  ((status == 0)) || exit "$status"
done
