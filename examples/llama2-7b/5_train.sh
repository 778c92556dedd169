#!/usr/bin/env bash
# LLaMA-2 7B, step 5: learn the masks. Settings: recipe.sh and ../common/settings.sh.
exec bash "$(dirname "$0")/../common/5_train.sh" "$(dirname "$0")"
