# shellcheck shell=bash
# shellcheck disable=SC2034 # ../common/settings.sh, which sources this, uses it
# A model of GPT-3's architecture with 2B parameters on one node of 8 GPUs, tensor parallel 8, with GPT-3's context of 2048 tokens.
# The one of the paper is not public: HF_MODEL must name a checkpoint of yours in the format of transformers' `gpt2` model. Tensor parallel 8
# wants a vocabulary and a number of heads that 8 divides (50304 and 16, say); TP=1 has no such wish.
: "${SEQ_LENGTH:=2048}"
TINY_FAMILY=gpt3
