# shellcheck shell=bash
# The settings of a recipe, and what its steps share. A step sources this file with the recipe's directory as the argument.
#
# Every setting is an environment variable; what is set already is kept. A recipe's own are in its recipe.sh.
#
#   DRY_RUN=1             print the commands instead of running them (0: run them)
#   MODEL=tiny            run on the CPU with gloo: a tiny random model of the recipe's family on text of the standard library (tiny.sh)
#
#   HF_MODEL              Hugging Face checkpoint: a hub id or a directory
#   DATA_DIR              C4 shards, downloaded checkpoints and WikiText-2                       data
#   OUTPUT                everything that is made: checkpoints, tokens, numbers                  outputs/RECIPE
#   EVAL_DATA             held-out text                                                          WikiText-2's raw test split
#   SHARDS                C4 shards to learn from, of 1024                                       0 to 19
#   JOBS, WORKERS         shards tokenized at a time, and threads for each                       8, 4
#
#   GPUS                  processes a node, one a GPU                                            8
#   TP, PP                tensor- and pipeline-parallel sizes; the other ranks are data-parallel 8, 1
#   DISTRIBUTED_OPTIMIZER 1: split the optimizer's states over data-parallel ranks               a run that goes on: what it has;
#                                                        else 1 if there are any, but 0 where TRAIN_ARGS asks for few bits
#   NNODES                nodes                                                                  1
#   RDZV_ENDPOINT         several nodes: HOST:PORT of one of them, the same on all
#   RDZV_ID               several nodes: a name of the job, the same on all                      RECIPE
#   MAX_RESTARTS          times that torchrun starts the processes again after a failure         3
#
#   TRAIN_ITERS, GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE, SEQ_LENGTH, LR, MIN_LR                     the paper's: 2000, 256, 1, 4096, 5e-5, 5e-6
#   SAVE_INTERVAL, KEEP_LAST, LOG_INTERVAL, EVAL_INTERVAL, EVAL_ITERS, SPLIT                     100, 3, 1, 500, 4, 98,2,0
#   CALIBRATION_SAMPLES, CALIBRATION_SEQ_LENGTH                                                  of the SparseGPT prior: 128, 2048
#   PARAMS_DTYPE          bf16 or fp32                                                           bf16
#   EVAL_SEQ_LENGTH, EVAL_WINDOWS                                                                SEQ_LENGTH, all
#   PYTHON                runs the helpers                                                       python3
#   TRAIN_ARGS            more options for maskllm.train, for example "--hard"
set -euo pipefail

RECIPE_DIR=${1:?the directory of the recipe}
RECIPE=$(basename "$(cd "$RECIPE_DIR" && pwd)")
COMMON=$(dirname "${BASH_SOURCE[0]}")
PYTHON=${PYTHON:-python3}

# shellcheck source=examples/common/run.sh
source "$COMMON/run.sh"
if [[ ${MODEL:-} == tiny ]]; then
  # shellcheck source=examples/common/tiny.sh
  source "$COMMON/tiny.sh"
elif [[ -n ${MODEL:-} ]]; then
  echo "MODEL=$MODEL: wanted tiny or nothing (HF_MODEL names another checkpoint)" >&2
  exit 2
fi
# shellcheck source=/dev/null
source "$RECIPE_DIR/recipe.sh"

: "${DATA_DIR:=data}" "${OUTPUT:=outputs/$RECIPE}" "${EVAL_DATA:=$DATA_DIR/wikitext-2-raw/wiki.test.raw}"
: "${SHARDS:=$(seq -s ' ' 0 19)}" "${JOBS:=8}" "${WORKERS:=4}"
: "${GPUS:=8}" "${TP:=8}" "${PP:=1}" "${NNODES:=1}" "${RDZV_ID:=$RECIPE}" "${MAX_RESTARTS:=3}"
: "${TRAIN_ITERS:=2000}" "${GLOBAL_BATCH_SIZE:=256}" "${MICRO_BATCH_SIZE:=1}" "${SEQ_LENGTH:=4096}" "${LR:=5e-5}" "${MIN_LR:=5e-6}"
: "${SAVE_INTERVAL:=100}" "${KEEP_LAST:=3}" "${LOG_INTERVAL:=1}" "${EVAL_INTERVAL:=500}" "${EVAL_ITERS:=4}" "${SPLIT:=98,2,0}"
: "${CALIBRATION_SAMPLES:=128}" "${CALIBRATION_SEQ_LENGTH:=2048}" "${PARAMS_DTYPE:=bf16}"
: "${EVAL_SEQ_LENGTH:=$SEQ_LENGTH}" "${EVAL_WINDOWS:=}" "${TRAIN_ARGS:=}"

# The first of its arguments, unless it is a pattern that nothing matches.
first_of() { [[ ! -e $1 ]] || printf '%s' "$1"; }

for name in GPUS TP PP NNODES TRAIN_ITERS; do
  if [[ ! ${!name} =~ ^[1-9][0-9]*$ ]]; then
    echo "$name=${!name}: wanted a number, 1 or more" >&2
    exit 2
  fi
done
learned=$(first_of "$OUTPUT"/learned/iter_*/maskllm.json)
if [[ -n $learned ]]; then # the run goes on, with its own kind of optimizer under any layout
  : "${DISTRIBUTED_OPTIMIZER:=$(grep -c '"use_distributed_optimizer": true' "$learned" || true)}"
elif [[ $TRAIN_ARGS =~ --(mask-logits|optimizer-state)-dtype[=\ ]+(bf16|8bit) ]]; then
  : "${DISTRIBUTED_OPTIMIZER:=0}" # Megatron's keeps fp32
fi
: "${DISTRIBUTED_OPTIMIZER:=$((GPUS * NNODES > TP * PP))}"

if [[ -n ${DRY_RUN:-} ]]; then
  : "${HF_MODEL:=/path/to/$RECIPE}"
fi
if [[ -z ${HF_MODEL:-} ]]; then
  echo "$RECIPE: its weights are not on the hub; set HF_MODEL to a Hugging Face checkpoint of it" >&2
  exit 2
fi
# shellcheck disable=SC2034 # the steps use it
HF_DIR=$HF_MODEL
if [[ -z ${MODEL:-} && ! -d $HF_MODEL ]]; then
  if [[ $HF_MODEL =~ ^[A-Za-z0-9_.-]*[A-Za-z0-9_]/[A-Za-z0-9_.-]+$ ]]; then
    # shellcheck disable=SC2034
    HF_DIR=$DATA_DIR/models/$(basename "$HF_MODEL")
  elif [[ -z ${DRY_RUN:-} ]]; then # which may show what another machine has
    echo "HF_MODEL=$HF_MODEL: no such directory, and not a hub id like meta-llama/Llama-2-7b-hf" >&2
    exit 2
  fi
fi

if [[ -z ${DRY_RUN:-} && -e "$OUTPUT/dense/release/maskllm.json" ]]; then
  source=$(sed -n 's/^  "source": "\(.*\)",$/\1/p' "$OUTPUT/dense/release/maskllm.json")
  # One with a backslash has letters that JSON writes otherwise.
  if [[ -n $source && $source != *\\* && $source != "$HF_DIR" && ! $source -ef $HF_DIR ]]; then
    echo "OUTPUT=$OUTPUT: what is there was made from $source, not from $HF_DIR; name another OUTPUT" >&2
    exit 2
  fi
fi

# What torchrun grants the processes to save after SIGTERM, where its version can be told; else it is 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}

# Whether a file is newer than the one it was made from, so that a step has nothing to do; a dry run shows the step anyway.
up_to_date() {
  [[ -z ${DRY_RUN:-} && $1 -nt $2 ]] || return 1
  echo "$RECIPE: $1 is up to date" >&2
}

# One process a GPU on this node alone.
on_this_node() { run_last torchrun --standalone --nproc-per-node "$GPUS" "$@"; }

# One process a GPU on every node: each node runs the same script.
on_all_nodes() {
  local -a nodes=(--standalone)
  if ((NNODES > 1)); then
    [[ -z ${DRY_RUN:-} ]] || : "${RDZV_ENDPOINT:=HOST:PORT}"
    : "${RDZV_ENDPOINT:?with NNODES over 1, HOST:PORT of one of the nodes, the same on all}"
    nodes=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "$RDZV_ID")
  fi
  run_training "$OUTPUT/learned/latest_checkpointed_iteration.txt" \
    torchrun "${nodes[@]}" --nproc-per-node "$GPUS" --max-restarts "$MAX_RESTARTS" "$@"
}

shard_file() { printf '%s/en/c4-train.%05d-of-01024.json.gz' "$DATA_DIR/c4" "$1"; }
shard_prefix() { printf '%s/tokens/c4_%05d' "$OUTPUT" "$1"; }
