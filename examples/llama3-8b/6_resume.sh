#!/usr/bin/env bash
# LLaMA-3 8B, step 6: go on after an interruption. Settings: recipe.sh and ../common/settings.sh.
exec bash "$(dirname "$0")/../common/6_resume.sh" "$(dirname "$0")"
