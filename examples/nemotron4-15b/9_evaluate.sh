#!/usr/bin/env bash
# Nemotron-4 15B, step 9: perplexity. Settings: recipe.sh and ../common/settings.sh.
exec bash "$(dirname "$0")/../common/9_evaluate.sh" "$(dirname "$0")"
