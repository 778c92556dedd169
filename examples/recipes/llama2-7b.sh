# shellcheck shell=bash
# LLaMA-2 7B on one node with 8 GPUs, tensor parallel 8. Published WikiText-2 perplexity: 5.12 dense, 6.72 with learned 2:4 masks (MaskLLM,
# arXiv 2409.17481). To download the weights, accept their license on the hub and log in with `hf auth login`.
: "${HF_MODEL:=meta-llama/Llama-2-7b-hf}"
: "${TINY_FAMILY:=llama2}"
