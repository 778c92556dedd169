#!/usr/bin/env bash
# LLaMA-3.1 8B, step 5 on several nodes: run it on each, with NNODES (here 2 by default) and RDZV_ENDPOINT=HOST:PORT of one of them.
NNODES=${NNODES:-2} exec bash "$(dirname "$0")/../common/5_train.sh" "$(dirname "$0")"
