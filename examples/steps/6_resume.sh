# shellcheck shell=bash
# Step 6: resume an interrupted training from its newest checkpoint. The layout and the number of nodes may differ from before.

if [[ -z ${DRY_RUN:-} ]]; then
  if [[ -z $(first_of "$OUTPUT"/learned/iter_*/manifest.json) ]]; then
    echo "$OUTPUT/learned: found no checkpoint to resume from; start a training with: $0 $RECIPE 5_train" >&2
    exit 1
  fi
  # If this file has no number, the training itself finds the newest checkpoint.
  latest=$(cat "$OUTPUT/learned/latest_checkpointed_iteration.txt" 2>/dev/null) || latest=
  if [[ $latest =~ ^[0-9]+$ ]]; then
    if ((10#$latest >= TRAIN_ITERS)); then
      echo "$RECIPE: iteration $latest of $TRAIN_ITERS: nothing is left to do" >&2
      exit
    fi
    echo "$RECIPE: resuming after iteration $latest of $TRAIN_ITERS" >&2
  fi
fi
# shellcheck source=examples/steps/5_train.sh
source "$EXAMPLES/steps/5_train.sh"
