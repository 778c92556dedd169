# shellcheck shell=bash
# Nemotron-4 15B (arXiv 2402.16819) on one node with 8 GPUs, tensor parallel 8. The hub does not have the weights: set HF_MODEL to your own
# checkpoint in the format of transformers' `nemotron` model.
: "${TINY_FAMILY:=nemotron}"
