#!/usr/bin/env bash
# GPT-3 style 843M, step 9: perplexity. Settings: recipe.sh and ../common/settings.sh.
exec bash "$(dirname "$0")/../common/9_evaluate.sh" "$(dirname "$0")"
