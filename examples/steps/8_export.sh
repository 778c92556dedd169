# shellcheck shell=bash
# Step 8: write the 2:4 Hugging Face checkpoint, and the masks alone to a small file.

if ! up_to_date "$OUTPUT/hf-2to4/config.json" "$OUTPUT/trimmed/latest_checkpointed_iteration.txt"; then
  [[ ! -e "$OUTPUT/hf-2to4" ]] || run rm -r "$OUTPUT/hf-2to4" # the result of an older training
  run_last maskllm export --load "$OUTPUT/trimmed" --output "$OUTPUT/hf-2to4" --mask-file "$OUTPUT/$RECIPE.mask.npz" \
    --json "$OUTPUT/export.json"
fi
