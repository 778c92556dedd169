#!/usr/bin/env bash
# LLaMA-3.1 8B, step 2: tokenize C4's shards in parallel. Settings: recipe.sh and ../common/settings.sh.
exec bash "$(dirname "$0")/../common/2_preprocess.sh" "$(dirname "$0")"
