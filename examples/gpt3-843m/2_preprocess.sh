#!/usr/bin/env bash
# GPT-3 style 843M, step 2: tokenize C4's shards in parallel. Settings: recipe.sh and ../common/settings.sh.
exec bash "$(dirname "$0")/../common/2_preprocess.sh" "$(dirname "$0")"
