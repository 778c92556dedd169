#!/usr/bin/env bash
# LLaMA-3.1 8B, step 7: keep the winners. Settings: recipe.sh and ../common/settings.sh.
exec bash "$(dirname "$0")/../common/7_trim.sh" "$(dirname "$0")"
