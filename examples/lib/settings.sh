# shellcheck shell=bash
# The settings of a run. run.sh sources this file; RECIPE is the recipe's name.
#
# Every setting is an environment variable. If it is not set, its value comes from tiny.sh (only with MODEL=tiny), else from
# recipes/RECIPE.sh, else it is the default in this list.
#
#   DRY_RUN=1             print the commands instead of running them (0: run them)
#   MODEL=tiny            run on the CPU with gloo: a tiny random model of the recipe's family, on text from Python's standard library
#
#   HF_MODEL              Hugging Face checkpoint: a hub ID or a directory
#   DATA_DIR              directory of C4 shards, downloaded checkpoints and WikiText-2          data
#   OUTPUT                directory of all results: checkpoints, tokens, numbers                 outputs/RECIPE
#   EVAL_DATA             held-out text                                                          WikiText-2's raw test split
#   SHARDS                numbers of the C4 shards to learn from, out of 1024                    0 to 19
#   TRAIN_FILES           JSON-lines files to learn from instead of C4, separated by spaces
#   PRIOR_MASK            mask file to start from instead of SparseGPT's mask; 8_export then writes the mask file as a difference to it
#   JOBS, WORKERS         shards tokenized at the same time, and threads for each                8, 4
#
#   GPUS                  processes on each node, one for each GPU                               8
#   TP, PP                tensor- and pipeline-parallel sizes; the rest is data parallelism      8, 1
#   DISTRIBUTED_OPTIMIZER 1: split the optimizer state over data-parallel ranks. Default: a resumed run keeps what it has. A new run uses 1
#                         if there are several data-parallel ranks, but 0 if TRAIN_ARGS asks for bf16 or 8-bit logits or optimizer state,
#                         and for TRAIN_WEIGHTS=cast.
#   NNODES                number of nodes                                                        1 (5_train_multinode: 2)
#   RDZV_ENDPOINT         with several nodes: HOST:PORT of one of them, the same on all nodes
#   RDZV_ID               with several nodes: a name of the job, the same on all nodes           RECIPE
#   MAX_RESTARTS          how often torchrun restarts the processes after a failure              3
#
#   TRAIN_ITERS, GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE, SEQ_LENGTH, LR, MIN_LR                     the paper's: 2000, 256, 1, 4096, 5e-5, 5e-6
#   TRAIN_WEIGHTS         weights: train the weights that the learned masks keep, after the masks; both: go on with the masks too;
#                         cast: instead of learning masks, train the dense weights toward their masks by magnitude.
#                         Set it for all steps from 5_train_weights on: their results have names of their own, with "weights" in them.
#   WEIGHTS_ITERS         steps of that training                                                 2000 (cast: 7500)
#   WEIGHTS_LR, WEIGHTS_MIN_LR, CE_LOSS_COEFF, KL_LOSS_COEFF                                     2e-5, 2e-6, 0.67, 0.33
#   SAVE_INTERVAL, KEEP_LAST, LOG_INTERVAL, EVAL_INTERVAL, EVAL_ITERS, SPLIT                     100, 3, 1, 500, 4, 98,2,0
#   CALIBRATION_SAMPLES, CALIBRATION_SEQ_LENGTH for the SparseGPT prior                          128, 2048
#   PARAMS_DTYPE          bf16 or fp32                                                           bf16
#   EVAL_SEQ_LENGTH, EVAL_WINDOWS                                                                SEQ_LENGTH, all
#   PYTHON                the interpreter for the Python files in steps/                         python3
#   TRAIN_ARGS            more options for maskllm.train when it learns masks, for example "--hard"
#   WEIGHTS_ARGS          more options for maskllm.train when it trains weights, for example "--kl-temperature 2"

given_shards=${SHARDS:-}
case "${MODEL:-}" in
  "") ;;
  tiny)
    # shellcheck source=examples/lib/tiny.sh
    source "$EXAMPLES/lib/tiny.sh"
    ;;
  *)
    echo "MODEL=$MODEL: wanted tiny or nothing (HF_MODEL names another checkpoint)" >&2
    exit 2
    ;;
esac
# shellcheck source=/dev/null
source "$EXAMPLES/recipes/$RECIPE.sh"

: "${DATA_DIR:=data}" "${OUTPUT:=outputs/$RECIPE}" "${EVAL_DATA:=$DATA_DIR/wikitext-2-raw/wiki.test.raw}"
: "${SHARDS:=$(seq -s ' ' 0 19)}" "${JOBS:=8}" "${WORKERS:=4}"
: "${GPUS:=8}" "${TP:=8}" "${PP:=1}" "${NNODES:=1}" "${RDZV_ID:=$RECIPE}" "${MAX_RESTARTS:=3}"
: "${TRAIN_ITERS:=2000}" "${GLOBAL_BATCH_SIZE:=256}" "${MICRO_BATCH_SIZE:=1}" "${SEQ_LENGTH:=4096}" "${LR:=5e-5}" "${MIN_LR:=5e-6}"
: "${TRAIN_WEIGHTS:=}"
[[ $TRAIN_WEIGHTS != cast ]] || : "${WEIGHTS_ITERS:=7500}"
: "${WEIGHTS_ITERS:=2000}" "${WEIGHTS_LR:=2e-5}" "${WEIGHTS_MIN_LR:=2e-6}" "${CE_LOSS_COEFF:=0.67}" "${KL_LOSS_COEFF:=0.33}"
: "${SAVE_INTERVAL:=100}" "${KEEP_LAST:=3}" "${LOG_INTERVAL:=1}" "${EVAL_INTERVAL:=500}" "${EVAL_ITERS:=4}" "${SPLIT:=98,2,0}"
: "${CALIBRATION_SAMPLES:=128}" "${CALIBRATION_SEQ_LENGTH:=2048}" "${PARAMS_DTYPE:=bf16}"
: "${EVAL_SEQ_LENGTH:=$SEQ_LENGTH}" "${EVAL_WINDOWS:=}" "${PYTHON:=python3}" "${TRAIN_ARGS:=}" "${WEIGHTS_ARGS:=}"
: "${TRAIN_FILES:=}" "${PRIOR_MASK:=}"

# The files of a C4 shard, or of TRAIN_FILES by number: the text and the indexed dataset's prefix.
shard_file() { printf '%s/en/c4-train.%05d-of-01024.json.gz' "$DATA_DIR/c4" "$1"; }
shard_prefix() { printf '%s/tokens/c4_%05d' "$OUTPUT" "$1"; }
if [[ -n $TRAIN_FILES ]]; then
  read -r -d '' -a files <<<"$TRAIN_FILES" || true # read all lines; it fails at the end of the text
  SHARDS=${given_shards:-${!files[*]}}
  shard_file() { printf '%s' "${files[$1]}"; }
  shard_prefix() { printf '%s/tokens/text_%05d' "$OUTPUT" "$1"; }
fi

# Print the first of the files that a pattern matches, or nothing if it matches none (bash then passes the pattern itself).
first_of() { [[ ! -e $1 ]] || printf '%s' "$1"; }

case "$TRAIN_WEIGHTS" in
  "" | weights | both | cast) ;;
  *)
    echo "TRAIN_WEIGHTS=$TRAIN_WEIGHTS: wanted weights, both, cast or nothing" >&2
    exit 2
    ;;
esac
if [[ $STEP == 5_train_weights && -z $TRAIN_WEIGHTS ]]; then
  echo "TRAIN_WEIGHTS is not set: wanted weights, both or cast, also for the steps after 5_train_weights" >&2
  exit 2
fi
# The training that this step starts, or whose results it uses, and the end of those results' names.
# shellcheck disable=SC2034 # the steps use them
TRAINING=learned SUFFIX=
if [[ -n $TRAIN_WEIGHTS && $STEP != 5_train ]]; then
  # shellcheck disable=SC2034
  TRAINING=weights SUFFIX=-weights
fi

for name in GPUS TP PP NNODES TRAIN_ITERS WEIGHTS_ITERS; do
  if [[ ! ${!name} =~ ^[1-9][0-9]*$ ]]; then
    echo "$name=${!name}: wanted a number, 1 or more" >&2
    exit 2
  fi
done

checkpoint=$(first_of "$OUTPUT/$TRAINING"/iter_*/maskllm.json)
if [[ -n $checkpoint ]]; then
  : "${DISTRIBUTED_OPTIMIZER:=$(grep -c '"use_distributed_optimizer": true' "$checkpoint" || true)}"
elif [[ $TRAINING == learned && $TRAIN_ARGS =~ --(mask-logits|optimizer-state)-dtype[=\ ]+(bf16|8bit) ]]; then
  : "${DISTRIBUTED_OPTIMIZER:=0}" # Megatron's distributed optimizer keeps fp32
elif [[ $TRAINING == weights && $TRAIN_WEIGHTS == cast ]]; then
  : "${DISTRIBUTED_OPTIMIZER:=0}" # with Transformer Engine's or Apex's Adam it cannot take CAST's optimizer
fi
: "${DISTRIBUTED_OPTIMIZER:=$((GPUS * NNODES > TP * PP))}"

if [[ -n ${DRY_RUN:-} ]]; then
  : "${HF_MODEL:=/path/to/$RECIPE}"
fi
if [[ -z ${HF_MODEL:-} ]]; then
  echo "$RECIPE: the hub has no weights for this recipe; set HF_MODEL to a Hugging Face checkpoint" >&2
  exit 2
fi
# HF_DIR is the local directory of HF_MODEL: the same directory, or the one that 1_download writes a hub ID to.
# shellcheck disable=SC2034 # the steps use it
HF_DIR=$HF_MODEL
if [[ -z ${MODEL:-} && ! -d $HF_MODEL ]]; then
  if [[ $HF_MODEL =~ ^([A-Za-z0-9_.-]*[A-Za-z0-9_]/)?[A-Za-z0-9_][A-Za-z0-9_.-]*$ ]]; then
    HF_DIR=$DATA_DIR/models/$(basename "$HF_MODEL")
  elif [[ -z ${DRY_RUN:-} ]]; then # a dry run may print commands for another machine
    echo "HF_MODEL=$HF_MODEL: no such directory, and not a hub id like gpt2 or OWNER/NAME" >&2
    exit 2
  fi
fi

# An OUTPUT directory belongs to one checkpoint: `maskllm convert` notes it in the Megatron checkpoint.
if [[ -z ${DRY_RUN:-} && -e "$OUTPUT/dense/release/maskllm.json" ]]; then
  source=$(sed -n 's/^  "source": "\(.*\)",$/\1/p' "$OUTPUT/dense/release/maskllm.json")
  # Skip the check if the name has a backslash: JSON writes some characters as escape sequences.
  if [[ -n $source && $source != *\\* && $source != "$HF_DIR" && ! $source -ef $HF_DIR ]]; then
    echo "OUTPUT=$OUTPUT: its contents were made from $source, not from $HF_DIR; set OUTPUT to another directory" >&2
    exit 2
  fi
fi
