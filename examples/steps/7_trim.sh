# shellcheck shell=bash
# Step 7: keep the most probable mask of each block, write its zeros into the weights, and drop logits and optimizer state.

up_to_date "$OUTPUT/trimmed/latest_checkpointed_iteration.txt" "$OUTPUT/learned/latest_checkpointed_iteration.txt" ||
  run_last maskllm trim --load "$OUTPUT/learned" --output "$OUTPUT/trimmed" --json "$OUTPUT/trim.json"
