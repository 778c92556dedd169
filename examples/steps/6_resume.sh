# shellcheck shell=bash
# Step 6: resume an interrupted training from its newest checkpoint. The layout and the number of nodes may differ from before.
# With TRAIN_WEIGHTS it is the training of the weights.

iterations=$TRAIN_ITERS
[[ $TRAINING == learned ]] || iterations=$WEIGHTS_ITERS
if [[ -z ${DRY_RUN:-} ]]; then
  if [[ -z $(first_of "$OUTPUT/$TRAINING"/iter_*/manifest.json) ]]; then
    echo "$OUTPUT/$TRAINING: found no checkpoint to resume from; start a training with: $0 $RECIPE 5_train${SUFFIX/-/_}" >&2
    exit 1
  fi
  # If this file has no number, the training itself finds the newest checkpoint.
  latest=$(cat "$OUTPUT/$TRAINING/latest_checkpointed_iteration.txt" 2>/dev/null) || latest=
  if [[ $latest =~ ^[0-9]+$ ]]; then
    if ((10#$latest >= iterations)); then
      echo "$RECIPE: iteration $latest of $iterations: nothing is left to do" >&2
      exit
    fi
    echo "$RECIPE: resuming after iteration $latest of $iterations" >&2
  fi
fi
# shellcheck source=examples/steps/5_train.sh
source "$EXAMPLES/steps/5_train.sh"
