# shellcheck shell=bash
# Step 2: tokenize the C4 shards, JOBS at the same time. Each shard becomes an indexed dataset. Finished shards are skipped.

tokenize() { # SHARD
  local prefix
  prefix=$(shard_prefix "$1")
  run maskllm preprocess --input "$(shard_file "$1")" --output-prefix "$prefix" --tokenizer "$HF_DIR" --append-eod \
    --workers "$WORKERS" --json "$prefix.json"
}

todo=()
for shard in $SHARDS; do
  up_to_date "$(shard_prefix "$shard")_text_document.idx" "$(shard_file "$shard")" || todo+=("$shard")
done
if [[ -n ${DRY_RUN:-} ]] || ((${#todo[@]} == 1)); then
  for shard in "${todo[@]}"; do
    tokenize "$shard"
  done
elif ((${#todo[@]})); then
  # A job that fails removes the directories that it made. The other jobs need this one.
  mkdir -p "$OUTPUT/tokens"
  printf '%s\n' "${todo[@]}" | xargs -I {} -P "$JOBS" env SHARDS={} bash "$EXAMPLES/run.sh" "$RECIPE" "$STEP"
fi
