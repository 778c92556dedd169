# shellcheck shell=bash
# The settings of MODEL=tiny: two processes on a laptop's CPU finish all steps in a minute. settings.sh sources this file.
: "${OUTPUT:=outputs/tiny/$RECIPE}"
: "${DATA_DIR:=$OUTPUT/data}" "${HF_MODEL:=$OUTPUT/hf-original}" "${EVAL_DATA:=$DATA_DIR/held_out.txt}"
: "${SHARDS:=0 1}" "${JOBS:=2}" "${WORKERS:=1}"
: "${GPUS:=2}" "${TP:=2}" "${MAX_RESTARTS:=0}"
: "${TRAIN_ITERS:=6}" "${GLOBAL_BATCH_SIZE:=2}" "${SEQ_LENGTH:=64}" "${LR:=1e-2}" "${MIN_LR:=1e-3}"
: "${WEIGHTS_ITERS:=6}" "${WEIGHTS_LR:=1e-3}" "${WEIGHTS_MIN_LR:=1e-4}"
: "${SAVE_INTERVAL:=6}" "${EVAL_INTERVAL:=6}" "${EVAL_ITERS:=1}" "${SPLIT:=9,1,0}"
: "${CALIBRATION_SAMPLES:=4}" "${CALIBRATION_SEQ_LENGTH:=64}" "${PARAMS_DTYPE:=fp32}" "${EVAL_WINDOWS:=4}"
export OMP_NUM_THREADS=1
export CUDA_VISIBLE_DEVICES= # use the CPU on machines with GPUs too
