# shellcheck shell=bash
# LLaMA-3.1 8B on one node with 8 GPUs, tensor parallel 8. WikiText-2 perplexity published by MaskLLM's authors: 5.89 dense, 8.58 with
# learned 2:4 masks. To download the weights, accept their license on the hub and log in with `hf auth login`.
: "${HF_MODEL:=meta-llama/Llama-3.1-8B}"
: "${TINY_FAMILY:=llama3.1}"
