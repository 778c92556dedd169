#!/usr/bin/env bash
# GPT-3 style 843M, all steps in order. Settings: recipe.sh and ../common/settings.sh.
exec bash "$(dirname "$0")/../common/run_all.sh" "$(dirname "$0")"
