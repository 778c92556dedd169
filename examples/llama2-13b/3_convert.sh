#!/usr/bin/env bash
# LLaMA-2 13B, step 3: to a Megatron checkpoint. Settings: recipe.sh and ../common/settings.sh.
exec bash "$(dirname "$0")/../common/3_convert.sh" "$(dirname "$0")"
