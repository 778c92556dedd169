#!/usr/bin/env bash
# Nemotron-4 15B, step 4: the SparseGPT prior. Settings: recipe.sh and ../common/settings.sh.
exec bash "$(dirname "$0")/../common/4_prune.sh" "$(dirname "$0")"
