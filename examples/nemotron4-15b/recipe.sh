# shellcheck shell=bash
# shellcheck disable=SC2034 # ../common/settings.sh, which sources this, uses it
# Nemotron-4 15B (arXiv 2402.16819) on one node of 8 GPUs, tensor parallel 8. Its weights are not on the hub: HF_MODEL must name a
# checkpoint of yours in the format of transformers' `nemotron` model.
TINY_FAMILY=nemotron
