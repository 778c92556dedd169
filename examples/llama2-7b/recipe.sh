# shellcheck shell=bash
# shellcheck disable=SC2034 # ../common/settings.sh, which sources this, uses it
# LLaMA-2 7B on one node of 8 GPUs, tensor parallel 8. Published: WikiText-2 perplexity 5.12 dense, 6.72 with learned 2:4 masks
# (MaskLLM, arXiv 2409.17481). The weights want their license accepted on the hub first (`hf auth login`).
: "${HF_MODEL:=meta-llama/Llama-2-7b-hf}"
TINY_FAMILY=llama2
