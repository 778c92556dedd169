#!/usr/bin/env bash
# The pruning and the two trainings of `maskllm quickstart` as single commands, for any small model and corpus. To change them, copy this
# file inside examples/ (it reads lib/commands.sh there).
#
#   MODEL=path/to/hf TRAIN=c4.json EVAL=wiki.test.raw OUT=outputs/by_hand examples/quickstart.sh
#
# Run it again after an interruption: finished steps are skipped and the training resumes. DRY_RUN=1 prints the commands of all steps instead.
set -euo pipefail
# shellcheck source=examples/lib/commands.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib/commands.sh"
if [[ -n ${DRY_RUN:-} ]]; then
  : "${MODEL:=/path/to/hf}" "${TRAIN:=/path/to/c4.json}" "${EVAL:=/path/to/wiki.test.raw}"
fi
MODEL=${MODEL:?the Hugging Face directory or hub id to sparsify}
TRAIN=${TRAIN:?JSON lines to learn from, in the format of C4, plain or .gz}
EVAL=${EVAL:?held-out text}
OUT=${OUT:-outputs/by_hand}
RANKS=${RANKS:-1}
ITERS=${ITERS:-20}
WEIGHTS_ITERS=${WEIGHTS_ITERS:-68}
SEQ=${SEQ:-256}
DTYPE=${DTYPE:-fp32}

# Succeeds if a step already has its result. Always fails in a dry run, which prints every command.
is_there() { [[ -z ${DRY_RUN:-} && -e $1 ]]; }

is_there "$OUT/dense/latest_checkpointed_iteration.txt" ||
  run maskllm convert --hf "$MODEL" --output "$OUT/dense"
is_there "$OUT/data_text_document.idx" || # with the copy of the tokenizer that the conversion made
  run maskllm preprocess --input "$TRAIN" --output-prefix "$OUT/data" --tokenizer "$OUT/dense/release/hf" --append-eod
is_there "$OUT/prior/latest_checkpointed_iteration.txt" ||
  run maskllm prune --load "$OUT/dense" --method sparsegpt --pattern 2:4 --output "$OUT/prior" \
    --calibration-data "$OUT/data_text_document" --calibration-samples 16 --seq-length "$SEQ" --pack --params-dtype "$DTYPE"
run torchrun --standalone --nproc-per-node "$RANKS" -m maskllm.train \
  --pretrained-checkpoint "$OUT/prior" --load "$OUT/learned" --save "$OUT/learned" --save-interval 25 \
  --data-path "$OUT/data_text_document" --split 98,2,0 --seq-length "$SEQ" --global-batch-size 2 --train-iters "$ITERS" \
  --lr 2e-3 --min-lr 2e-4 --prior-strength 5 --gumbel-scale-range 500 1000 \
  --params-dtype "$DTYPE" --pipeline-model-parallel-size "$RANKS" \
  --log-interval 5 --eval-interval "$ITERS" --eval-iters 4
is_there "$OUT/trimmed/latest_checkpointed_iteration.txt" ||
  run maskllm trim --load "$OUT/learned" --output "$OUT/trimmed"
is_there "$OUT/hf" ||
  run maskllm export --load "$OUT/trimmed" --output "$OUT/hf" --mask-file "$OUT/mask.npz"
run maskllm evaluate --model "$OUT/hf" --data "$EVAL" --seq-length "$SEQ" --max-windows 16 --json "$OUT/perplexity.json"

# Weights and masks together, from the learned masks, against the dense weights. The temperature stays where the first training ended. The
# scale is five times higher, so that noise decides only between candidates that are nearly equal.
run torchrun --standalone --nproc-per-node "$RANKS" -m maskllm.train --train both \
  --pretrained-checkpoint "$OUT/learned" --load "$OUT/final" --save "$OUT/final" --save-interval 25 --keep-last 1 \
  --data-path "$OUT/data_text_document" --split 98,2,0 --seq-length "$SEQ" --global-batch-size 2 --micro-batch-size 2 \
  --train-iters "$WEIGHTS_ITERS" --lr-warmup-iters "$((WEIGHTS_ITERS / 8))" --weights-lr 6e-4 --weights-min-lr 6e-5 \
  --ce-loss-coeff 0 --kl-loss-coeff 1 \
  --lr 2e-4 --min-lr 2e-5 --weight-reg 0 --gumbel-temperature-range 0.05 0.05 --gumbel-scale-range 5000 5000 \
  --params-dtype "$DTYPE" --pipeline-model-parallel-size "$RANKS" --log-interval 5 --eval-interval "$(((WEIGHTS_ITERS + 1) / 2))" \
  --eval-iters 4
is_there "$OUT/final-trimmed/latest_checkpointed_iteration.txt" ||
  run maskllm trim --load "$OUT/final" --output "$OUT/final-trimmed"
is_there "$OUT/hf-final" ||
  run maskllm export --load "$OUT/final-trimmed" --output "$OUT/hf-final"
run maskllm evaluate --model "$OUT/hf-final" --data "$EVAL" --seq-length "$SEQ" --max-windows 16 --json "$OUT/perplexity-final.json"
run maskllm generate --model "$OUT/hf-final" --prompt "The capital of France is"
