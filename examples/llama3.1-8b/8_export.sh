#!/usr/bin/env bash
# LLaMA-3.1 8B, step 8: the 2:4 Hugging Face checkpoint. Settings: recipe.sh and ../common/settings.sh.
exec bash "$(dirname "$0")/../common/8_export.sh" "$(dirname "$0")"
