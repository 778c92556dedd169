#!/usr/bin/env bash
# LLaMA-3 8B, step 9: perplexity. Settings: recipe.sh and ../common/settings.sh.
exec bash "$(dirname "$0")/../common/9_evaluate.sh" "$(dirname "$0")"
