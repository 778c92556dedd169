#!/usr/bin/env bash
# Step 7: keep each block's winner, write its zeros into the weights, drop logits and optimizer state.
# shellcheck source=examples/common/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh" "$1"

up_to_date "$OUTPUT/trimmed/latest_checkpointed_iteration.txt" "$OUTPUT/learned/latest_checkpointed_iteration.txt" ||
  run_last maskllm trim --load "$OUTPUT/learned" --output "$OUTPUT/trimmed" --json "$OUTPUT/trim.json"
