#!/usr/bin/env bash
# LLaMA-2 7B, step 4: the SparseGPT prior. Settings: recipe.sh and ../common/settings.sh.
exec bash "$(dirname "$0")/../common/4_prune.sh" "$(dirname "$0")"
