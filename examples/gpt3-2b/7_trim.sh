#!/usr/bin/env bash
# GPT-3 style 2B, step 7: keep the winners. Settings: recipe.sh and ../common/settings.sh.
exec bash "$(dirname "$0")/../common/7_trim.sh" "$(dirname "$0")"
