#!/usr/bin/env bash
# Step 4: the prior, SparseGPT's one-shot mask, calibrated on the first shard. An interrupted run goes on after its last layer.
# shellcheck source=examples/common/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh" "$1"

read -r first _ <<<"$SHARDS"
up_to_date "$OUTPUT/prior/latest_checkpointed_iteration.txt" "$OUTPUT/dense/latest_checkpointed_iteration.txt" ||
  on_this_node -m maskllm prune --load "$OUTPUT/dense" --output "$OUTPUT/prior" --method sparsegpt --pattern 2:4 \
    --calibration-data "$(shard_prefix "$first")_text_document" --calibration-samples "$CALIBRATION_SAMPLES" \
    --seq-length "$CALIBRATION_SEQ_LENGTH" --pack --params-dtype "$PARAMS_DTYPE" --json "$OUTPUT/prior.json"
