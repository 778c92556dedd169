# shellcheck shell=bash
# Step 3: convert the Hugging Face checkpoint to a Megatron checkpoint.

up_to_date "$OUTPUT/dense/latest_checkpointed_iteration.txt" "$HF_DIR/config.json" ||
  run_last maskllm convert --hf "$HF_DIR" --output "$OUTPUT/dense" --json "$OUTPUT/convert.json"
