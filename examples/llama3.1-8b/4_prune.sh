#!/usr/bin/env bash
# LLaMA-3.1 8B, step 4: the SparseGPT prior. Settings: recipe.sh and ../common/settings.sh.
exec bash "$(dirname "$0")/../common/4_prune.sh" "$(dirname "$0")"
