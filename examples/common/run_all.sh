#!/usr/bin/env bash
# All steps in order, on one node. Run it again after an interruption: finished steps are skipped, training resumes.
set -euo pipefail
for step in 1_download 2_preprocess 3_convert 4_prune 5_train 7_trim 8_export 9_evaluate; do
  bash "$(dirname "${BASH_SOURCE[0]}")/$step.sh" "$1"
done
