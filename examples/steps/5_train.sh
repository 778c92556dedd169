# shellcheck shell=bash
# Step 5: learn the masks with the hyper-parameters of MaskLLM (arXiv 2409.17481). The same command resumes an interrupted run.
# With several nodes, run it on every node with the same NNODES and RDZV_ENDPOINT. 5_train_weights.sh uses this file too.

data=()
for shard in $SHARDS; do
  data+=(1 "$(shard_prefix "$shard")_text_document") # equal weights: all C4 shards have the same size
done
layout=(--tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP")
if ((TP > 1)); then
  layout+=(--sequence-parallel)
fi
if ((DISTRIBUTED_OPTIMIZER)); then
  layout+=(--use-distributed-optimizer)
fi
start=prior iterations=$TRAIN_ITERS eps=1e-5 arguments=$TRAIN_ARGS trained=()
rates=(--lr "$LR" --min-lr "$MIN_LR" --weight-decay 0.1) # of the masks' logits
masks=(--pattern 2:4 --gumbel-temperature-range 4 0.05 --gumbel-scale-range 1e2 5e2 --prior-strength 3.0 --weight-reg 1e-5)
if [[ $TRAINING == weights ]]; then
  start=learned iterations=$WEIGHTS_ITERS arguments=$WEIGHTS_ARGS
  case $TRAIN_WEIGHTS in
    weights)
      trained=(--train weights) rates=() masks=()
      ;;
    both) # the masks go on where the first training ended
      trained=(--train both) rates=(--lr "$MIN_LR" --min-lr "$MIN_LR" --weight-decay 0.1)
      masks=(--pattern 2:4 --gumbel-temperature-range 0.05 0.05 --gumbel-scale-range 5e2 5e2 --weight-reg 0)
      ;;
    cast)
      start=dense eps=1e-8 rates=() masks=(--pattern 2:4)
      trained=(--train weights --weights-optimizer cast --l1-decay-coeff 4e-7 --lr-warmup-iters $((iterations / 75)))
      ;;
  esac
  trained+=(--weights-lr "$WEIGHTS_LR" --weights-min-lr "$WEIGHTS_MIN_LR"
    --ce-loss-coeff "$CE_LOSS_COEFF" --kl-loss-coeff "$KL_LOSS_COEFF")
  if [[ $KL_LOSS_COEFF == *[1-9]* ]]; then
    trained+=(--teacher "$OUTPUT/dense")
  fi
fi
read -r -d '' -a more <<<"$arguments" || true # read all lines; it fails at the end of the text

train_on_all_nodes -m maskllm.train "${trained[@]}" \
  --pretrained-checkpoint "$OUTPUT/$start" --load "$OUTPUT/$TRAINING" --save "$OUTPUT/$TRAINING" \
  --save-interval "$SAVE_INTERVAL" --keep-last "$KEEP_LAST" --async-save --auto-fallback \
  --data-path "${data[@]}" --split "$SPLIT" \
  "${layout[@]}" --recompute-granularity selective --recompute-modules mlp masked_weight --params-dtype "$PARAMS_DTYPE" \
  --train-iters "$iterations" --global-batch-size "$GLOBAL_BATCH_SIZE" --micro-batch-size "$MICRO_BATCH_SIZE" \
  --seq-length "$SEQ_LENGTH" "${rates[@]}" --lr-decay-style cosine \
  --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps $eps --clip-grad 1.0 \
  "${masks[@]}" --log-interval "$LOG_INTERVAL" --eval-interval "$EVAL_INTERVAL" --eval-iters "$EVAL_ITERS" \
  --tensorboard-dir "$OUTPUT/$TRAINING/tensorboard" "${more[@]}"
