#!/usr/bin/env bash
# All steps in order, on one node. Run it again after an interruption: finished steps are skipped, training resumes.
set -euo pipefail
# shellcheck source=examples/common/run.sh
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
for name in 1_download 2_preprocess 3_convert 4_prune 5_train 7_trim 8_export 9_evaluate; do
  run_apart bash "$(dirname "${BASH_SOURCE[0]}")/$name.sh" "$1"
  ((status == 0)) || exit "$status"
  [[ -z $stopped || $name == 9_evaluate ]] || exit 75 # there are steps left
done
