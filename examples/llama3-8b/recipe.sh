# shellcheck shell=bash
# shellcheck disable=SC2034 # ../common/settings.sh, which sources this, uses it
# LLaMA-3 8B on one node of 8 GPUs, tensor parallel 8. Published by MaskLLM's authors: WikiText-2 perplexity 5.75 dense, 8.49 with learned
# 2:4 masks. The weights want their license accepted on the hub first (`hf auth login`).
: "${HF_MODEL:=meta-llama/Meta-Llama-3-8B}"
TINY_FAMILY=llama3
