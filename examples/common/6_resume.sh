#!/usr/bin/env bash
# Step 6: go on after an interruption, from the newest checkpoint. Layout and number of nodes may have changed.
# shellcheck source=examples/common/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh" "$1"

if [[ -z ${DRY_RUN:-} ]]; then
  if [[ -z $(first_of "$OUTPUT"/learned/iter_*/manifest.json) ]]; then
    echo "$OUTPUT/learned: no checkpoint there; there is no run to go on with, start one with 5_train.sh" >&2
    exit 1
  fi
  # Where the file says nothing the training finds the newest checkpoint by itself.
  latest=$(cat "$OUTPUT/learned/latest_checkpointed_iteration.txt" 2>/dev/null) || latest=
  if [[ $latest =~ ^[0-9]+$ ]]; then
    if ((10#$latest >= TRAIN_ITERS)); then
      echo "$RECIPE: iteration $latest of $TRAIN_ITERS, nothing is left to do" >&2
      exit
    fi
    echo "$RECIPE: going on after iteration $latest of $TRAIN_ITERS" >&2
  fi
fi
exec bash "$COMMON/5_train.sh" "$1"
