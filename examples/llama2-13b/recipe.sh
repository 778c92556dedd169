# shellcheck shell=bash
# shellcheck disable=SC2034 # ../common/settings.sh, which sources this, uses it
# LLaMA-2 13B on one node of 8 GPUs, tensor parallel 8 (MaskLLM, arXiv 2409.17481).
# The weights want their license accepted on the hub first (`hf auth login`).
: "${HF_MODEL:=meta-llama/Llama-2-13b-hf}"
TINY_FAMILY=llama2
