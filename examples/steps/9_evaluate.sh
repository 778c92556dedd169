# shellcheck shell=bash
# Step 9: measure the perplexity of the dense and of the 2:4 model on held-out text.

windows=()
if [[ -n $EVAL_WINDOWS ]]; then
  windows=(--max-windows "$EVAL_WINDOWS")
fi
evaluate() { # NAME DIRECTORY
  run maskllm evaluate --model "$2" --data "$EVAL_DATA" --seq-length "$EVAL_SEQ_LENGTH" "${windows[@]}" \
    --json "$OUTPUT/evaluate-$1.json"
}
evaluate dense "$HF_DIR"
evaluate "$TRAINING" "$OUTPUT/hf-2to4$SUFFIX"
