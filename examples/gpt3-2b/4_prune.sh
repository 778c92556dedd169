#!/usr/bin/env bash
# GPT-3 style 2B, step 4: the SparseGPT prior. Settings: recipe.sh and ../common/settings.sh.
exec bash "$(dirname "$0")/../common/4_prune.sh" "$(dirname "$0")"
