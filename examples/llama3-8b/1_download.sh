#!/usr/bin/env bash
# LLaMA-3 8B, step 1: the checkpoint and the data. Settings: recipe.sh and ../common/settings.sh.
exec bash "$(dirname "$0")/../common/1_download.sh" "$(dirname "$0")"
