# shellcheck shell=bash
# Step 1: download the Hugging Face checkpoint, the C4 shards and WikiText-2 from the hub. If HF_MODEL is a directory, it is used as it is.
# With MODEL=tiny: make a tiny model and its texts.

if [[ ${MODEL:-} == tiny ]]; then
  make_tiny=$EXAMPLES/steps/make_tiny.py
  up_to_date "$HF_DIR/config.json" "$make_tiny" ||
    run "$PYTHON" "$make_tiny" --family "$TINY_FAMILY" --output "$HF_DIR" --data "$DATA_DIR"
  exit
fi

if [[ $HF_DIR != "$HF_MODEL" ]]; then
  run "$PYTHON" "$EXAMPLES/steps/download.py" "$HF_MODEL" "$HF_DIR"
fi
missing=()
for shard in $SHARDS; do
  file=$(shard_file "$shard")
  [[ -n $TRAIN_FILES || -e $file ]] || missing+=("${file#"$DATA_DIR/c4/"}")
done
if ((${#missing[@]})); then
  run hf download allenai/c4 "${missing[@]}" --repo-type dataset --local-dir "$DATA_DIR/c4"
fi
if [[ ! -e $EVAL_DATA ]]; then
  run hf download ggml-org/ci wikitext-2-raw-v1.zip --repo-type dataset --local-dir "$DATA_DIR"
  run "$PYTHON" -m zipfile -e "$DATA_DIR/wikitext-2-raw-v1.zip" "$DATA_DIR"
fi
