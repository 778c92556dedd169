#!/usr/bin/env bash
# Runs one step of a recipe, or all steps in order:
#
#   examples/run.sh llama2-7b 5_train
#   examples/run.sh llama2-7b all
#
# recipes/RECIPE.sh has the settings of a recipe, steps/STEP.sh the commands of a step, lib/ what the steps share.
set -euo pipefail

EXAMPLES=$(dirname "${BASH_SOURCE[0]}")
RECIPES=("$EXAMPLES"/recipes/*.sh)
RECIPES=("${RECIPES[@]##*/}")
RECIPES=("${RECIPES[@]%.sh}")
ALL=(1_download 2_preprocess 3_convert 4_prune 5_train 7_trim 8_export 9_evaluate)
case "${TRAIN_WEIGHTS:-}" in
  "") ;;
  cast) ALL=("${ALL[@]:0:3}" 5_train_weights "${ALL[@]:5}") ;; # it starts from the dense model
  *) ALL=("${ALL[@]:0:5}" 5_train_weights "${ALL[@]:5}") ;;
esac
STEPS=(1_download 2_preprocess 3_convert 4_prune 5_train 5_train_multinode 5_train_weights 6_resume 7_trim 8_export 9_evaluate all)

usage() {
  cat <<END
usage: $0 RECIPE STEP

RECIPE  one of ${RECIPES[*]}
STEP    one of ${STEPS[*]}

\`all\` runs the steps in order on one node. Finished steps are skipped, and an interrupted training resumes.
DRY_RUN=1 prints the commands instead of running them. MODEL=tiny trains a tiny random model on the CPU.
TRAIN_WEIGHTS=weights or both trains the weights too, after the masks, and cast instead of them (5_train_weights).
Every setting is an environment variable: $EXAMPLES/lib/settings.sh lists them.
END
}

fail() { # MESSAGE
  printf '%s: %s\n\n' "$0" "$1" >&2
  usage >&2
  exit 2
}

is_one_of() { # WORD WORDS...
  local word
  for word in "${@:2}"; do
    [[ $word != "$1" ]] || return 0
  done
  return 1
}

case "${1:-}" in
  -h | --help)
    usage
    exit
    ;;
esac
(($# == 2)) || fail "found $# arguments, wanted a recipe and a step"
RECIPE=$1 STEP=$2
is_one_of "$RECIPE" "${RECIPES[@]}" || fail "$RECIPE: no such recipe"
is_one_of "$STEP" "${STEPS[@]}" || fail "$STEP: no such step"

# shellcheck source=examples/lib/commands.sh
source "$EXAMPLES/lib/commands.sh"
# shellcheck source=examples/lib/signals.sh
source "$EXAMPLES/lib/signals.sh"

if [[ $STEP == all ]]; then
  for step in "${ALL[@]}"; do
    run_in_own_group bash "${BASH_SOURCE[0]}" "$RECIPE" "$step"
    ((status == 0)) || exit "$status"
    [[ -z $stopped_by || $step == "${ALL[-1]}" ]] || exit 75 # steps are left to do
  done
  exit
fi

if [[ $STEP == 5_train_multinode ]]; then # the same step, with two nodes as the default
  : "${NNODES:=2}"
  STEP=5_train
fi
# shellcheck source=examples/lib/settings.sh
source "$EXAMPLES/lib/settings.sh"
# shellcheck source=examples/lib/torchrun.sh
source "$EXAMPLES/lib/torchrun.sh"
# shellcheck source=/dev/null
source "$EXAMPLES/steps/$STEP.sh"
