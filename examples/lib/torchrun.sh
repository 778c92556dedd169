# shellcheck shell=bash
# Functions that start one process for each GPU with torchrun. run.sh sources this file after settings.sh.

# After SIGTERM torchrun kills the processes if they have not ended within this many seconds. PyTorch before 2.12 always waits 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}

# Run a program on this node only.
run_on_this_node() { # -m MODULE ARGUMENTS...
  run_last torchrun --standalone --nproc-per-node "$GPUS" "$@"
}

# Run a training on NNODES nodes. Each node runs the same step.
train_on_all_nodes() { # -m MODULE ARGUMENTS...
  local -a nodes=(--standalone)
  if ((NNODES > 1)); then
    [[ -z ${DRY_RUN:-} ]] || : "${RDZV_ENDPOINT:=HOST:PORT}"
    if [[ -z ${RDZV_ENDPOINT:-} ]]; then
      echo "RDZV_ENDPOINT is not set: with NNODES=$NNODES, wanted HOST:PORT of one of the nodes, the same on all nodes" >&2
      exit 1
    fi
    nodes=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "$RDZV_ID")
  fi
  run_training "$OUTPUT/$TRAINING/latest_checkpointed_iteration.txt" \
    torchrun "${nodes[@]}" --nproc-per-node "$GPUS" --max-restarts "$MAX_RESTARTS" "$@"
}
