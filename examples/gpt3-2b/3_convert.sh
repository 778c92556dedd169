#!/usr/bin/env bash
# GPT-3 style 2B, step 3: to a Megatron checkpoint. Settings: recipe.sh and ../common/settings.sh.
exec bash "$(dirname "$0")/../common/3_convert.sh" "$(dirname "$0")"
