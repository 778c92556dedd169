#!/usr/bin/env bash
# Nemotron-4 15B, step 7: keep the winners. Settings: recipe.sh and ../common/settings.sh.
exec bash "$(dirname "$0")/../common/7_trim.sh" "$(dirname "$0")"
