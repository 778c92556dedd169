#!/usr/bin/env bash
# Step 6: go on after an interruption, from the newest checkpoint. Layout and number of nodes may have changed,
# but DISTRIBUTED_OPTIMIZER must stay: set it where there were data-parallel ranks before and are none now, or the other way round.
# shellcheck source=examples/common/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh" "$1"

if [[ -z ${DRY_RUN:-} ]]; then
  latest=$OUTPUT/learned/latest_checkpointed_iteration.txt
  if [[ ! -e $latest ]]; then
    echo "$latest: no such file; there is no run to go on with, start one with 5_train.sh" >&2
    exit 1
  fi
  iteration=$(<"$latest")
  if ((iteration >= TRAIN_ITERS)); then
    echo "$RECIPE: iteration $iteration of $TRAIN_ITERS, nothing is left to do" >&2
    exit
  fi
  echo "$RECIPE: going on after iteration $iteration of $TRAIN_ITERS" >&2
fi
exec bash "$COMMON/5_train.sh" "$1"
