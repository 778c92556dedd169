# shellcheck shell=bash
# Step 5, second part: after the masks, train the weights against the dense model, with the settings of CAST (arXiv 2509.25996): cross-entropy
# 2/3, divergence 1/3, learning rate 2e-5 at 7B, 256 sequences of 4096 tokens a step.
# TRAIN_WEIGHTS=weights keeps the learned masks, TRAIN_WEIGHTS=both goes on with them, and TRAIN_WEIGHTS=cast is CAST itself, which starts from
# the dense model. The same command resumes an interrupted run.

if [[ -z ${DRY_RUN:-} && $TRAIN_WEIGHTS != cast && -z $(first_of "$OUTPUT"/learned/iter_*/manifest.json) ]]; then
  echo "$OUTPUT/learned: found no masks whose weights could be trained; learn them first, with: $0 $RECIPE 5_train" >&2
  exit 1
fi
# shellcheck source=examples/steps/5_train.sh
source "$EXAMPLES/steps/5_train.sh"
