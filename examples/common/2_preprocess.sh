#!/usr/bin/env bash
# Step 2: tokenize the C4 shards, JOBS at a time, each to an indexed dataset of its own. Finished ones are skipped.
# shellcheck source=examples/common/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh" "$1"

if (($# == 2)); then # one shard: how xargs below calls this script
  prefix=$(shard_prefix "$2")
  run maskllm preprocess --input "$(shard_file "$2")" --output-prefix "$prefix" --tokenizer "$HF_DIR" --append-eod \
    --workers "$WORKERS" --json "$prefix.json"
  exit
fi

todo=()
for shard in $SHARDS; do
  up_to_date "$(shard_prefix "$shard")_text_document.idx" "$(shard_file "$shard")" || todo+=("$shard")
done
if ((${#todo[@]})); then
  if [[ -n ${DRY_RUN:-} ]]; then
    JOBS=1 # in order
  else
    mkdir -p "$OUTPUT/tokens" # or the first job to fail would remove what it had made
  fi
  printf '%s\n' "${todo[@]}" | xargs -n 1 -P "$JOBS" bash "${BASH_SOURCE[0]}" "$1"
fi
