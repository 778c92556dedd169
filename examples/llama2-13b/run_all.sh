#!/usr/bin/env bash
# LLaMA-2 13B, all steps in order. Settings: recipe.sh and ../common/settings.sh.
exec bash "$(dirname "$0")/../common/run_all.sh" "$(dirname "$0")"
