# shellcheck shell=bash
# Step 4: compute the prior mask with SparseGPT, calibrated on the first shard. An interrupted run resumes after its last finished layer.
# With PRIOR_MASK the prior is the mask in that file.

if [[ -n $PRIOR_MASK ]]; then
  up_to_date "$OUTPUT/prior/latest_checkpointed_iteration.txt" "$OUTPUT/dense/latest_checkpointed_iteration.txt" ||
    run_last maskllm prune --load "$OUTPUT/dense" --output "$OUTPUT/prior" --method mask-file --mask "$PRIOR_MASK" --pattern 2:4 \
      --json "$OUTPUT/prior.json"
  exit
fi
read -r first _ <<<"$SHARDS"
up_to_date "$OUTPUT/prior/latest_checkpointed_iteration.txt" "$OUTPUT/dense/latest_checkpointed_iteration.txt" ||
  run_on_this_node -m maskllm prune --load "$OUTPUT/dense" --output "$OUTPUT/prior" --method sparsegpt --pattern 2:4 \
    --calibration-data "$(shard_prefix "$first")_text_document" --calibration-samples "$CALIBRATION_SAMPLES" \
    --seq-length "$CALIBRATION_SEQ_LENGTH" --pack --params-dtype "$PARAMS_DTYPE" --json "$OUTPUT/prior.json"
