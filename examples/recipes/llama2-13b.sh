# shellcheck shell=bash
# LLaMA-2 13B on one node with 8 GPUs, tensor parallel 8 (MaskLLM, arXiv 2409.17481).
# To download the weights, accept their license on the hub and log in with `hf auth login`.
: "${HF_MODEL:=meta-llama/Llama-2-13b-hf}"
: "${TINY_FAMILY:=llama2}"
