# shellcheck shell=bash
# A mask for one domain over LLaMA-2 7B's dense weights: it starts from a general mask and is learned on the domain's text (MaskLLM,
# arXiv 2409.17481, section 4.3). docs/mask-transfer.md has a measured example. Set OUTPUT to a directory of its own for each domain, and
#
#   TRAIN_FILES   the domain's text, JSON lines with a `text` field
#   EVAL_DATA     held-out text of the domain
#   PRIOR_MASK    the general mask: the file that the recipe llama2-7b writes (the default), another one, or a hub id
: "${HF_MODEL:=meta-llama/Llama-2-7b-hf}"
: "${TINY_FAMILY:=llama2}"
: "${PRIOR_MASK:=outputs/llama2-7b/llama2-7b.mask.npz}"
if [[ -n ${DRY_RUN:-} ]]; then
  : "${TRAIN_FILES:=/path/to/domain.jsonl}" "${EVAL_DATA:=/path/to/held_out.txt}"
fi
for name in TRAIN_FILES EVAL_DATA; do
  if [[ -z ${!name:-} ]]; then
    echo "$RECIPE: $name is not set: wanted text of the domain; ${BASH_SOURCE[0]} says in which form" >&2
    exit 2
  fi
done
