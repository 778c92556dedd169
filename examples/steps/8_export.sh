# shellcheck shell=bash
# Step 8: write the 2:4 Hugging Face checkpoint, and the masks alone to a small file. Masks alone do not make trained weights, so with
# TRAIN_WEIGHTS there is no such file.

masks=()
if [[ $TRAINING == learned ]]; then
  masks=(--mask-file "$OUTPUT/$RECIPE.mask.npz")
  [[ -z $PRIOR_MASK ]] || masks+=(--mask-base "$PRIOR_MASK")
fi
if ! up_to_date "$OUTPUT/hf-2to4$SUFFIX/config.json" "$OUTPUT/trimmed$SUFFIX/latest_checkpointed_iteration.txt"; then
  [[ ! -e "$OUTPUT/hf-2to4$SUFFIX" ]] || run rm -r "$OUTPUT/hf-2to4$SUFFIX" # the result of an older training
  run_last maskllm export --load "$OUTPUT/trimmed$SUFFIX" --output "$OUTPUT/hf-2to4$SUFFIX" "${masks[@]}" \
    --json "$OUTPUT/export$SUFFIX.json"
fi
