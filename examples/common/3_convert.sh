#!/usr/bin/env bash
# Step 3: the Hugging Face checkpoint as a Megatron checkpoint.
# shellcheck source=examples/common/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh" "$1"

up_to_date "$OUTPUT/dense/latest_checkpointed_iteration.txt" "$HF_DIR/config.json" ||
  run_last maskllm convert --hf "$HF_DIR" --output "$OUTPUT/dense" --json "$OUTPUT/convert.json"
