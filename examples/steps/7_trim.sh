# shellcheck shell=bash
# Step 7: keep the most probable mask of each block, write its zeros into the weights, and drop logits and optimizer state.
# With TRAIN_WEIGHTS it takes the trained weights.

up_to_date "$OUTPUT/trimmed$SUFFIX/latest_checkpointed_iteration.txt" "$OUTPUT/$TRAINING/latest_checkpointed_iteration.txt" ||
  run_last maskllm trim --load "$OUTPUT/$TRAINING" --output "$OUTPUT/trimmed$SUFFIX" --json "$OUTPUT/trim$SUFFIX.json"
