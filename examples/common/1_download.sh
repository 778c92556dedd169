#!/usr/bin/env bash
# Step 1: the Hugging Face checkpoint, the C4 shards and WikiText-2, from the hub. A directory in HF_MODEL is used as it is.
# shellcheck source=examples/common/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh" "$1"

if [[ ${MODEL:-} == tiny ]]; then
  up_to_date "$HF_DIR/config.json" "$COMMON/make_tiny.py" ||
    run "$PYTHON" "$COMMON/make_tiny.py" --family "$TINY_FAMILY" --output "$HF_DIR" --data "$DATA_DIR"
  exit
fi

if [[ $HF_DIR != "$HF_MODEL" ]]; then
  run "$PYTHON" "$COMMON/download.py" "$HF_MODEL" "$HF_DIR"
fi
missing=()
for shard in $SHARDS; do
  file=$(shard_file "$shard")
  [[ -e $file ]] || missing+=("${file#"$DATA_DIR/c4/"}")
done
if ((${#missing[@]})); then
  run hf download allenai/c4 "${missing[@]}" --repo-type dataset --local-dir "$DATA_DIR/c4"
fi
if [[ ! -e $EVAL_DATA ]]; then
  run hf download ggml-org/ci wikitext-2-raw-v1.zip --repo-type dataset --local-dir "$DATA_DIR"
  run "$PYTHON" -m zipfile -e "$DATA_DIR/wikitext-2-raw-v1.zip" "$DATA_DIR"
fi
