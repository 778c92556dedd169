# shellcheck shell=bash
# A GPT-3 style model with 843M parameters on one node with 8 GPUs, tensor parallel 8, with GPT-3's context of 2048 tokens.
# The paper's model is not public: set HF_MODEL to your own checkpoint in the format of transformers' `gpt2` model. Tensor parallel 8 needs a
# vocabulary and a number of heads that 8 divides, for example 50304 and 16. TP=1 does not.
: "${SEQ_LENGTH:=2048}"
: "${TINY_FAMILY:=gpt3}"
