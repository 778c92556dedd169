# shellcheck shell=bash
# Functions that run commands, or only print them if DRY_RUN is set. A script sources this file.

# DRY_RUN=0 means the same as an empty DRY_RUN.
[[ ${DRY_RUN:-} != 0 ]] || DRY_RUN=

# Print a command. Fails in a dry run: then the caller must not run the command.
show() { # COMMAND...
  local line
  printf -v line '%q ' "$@"
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%s\n' "${line% }"
    return 1
  fi
  printf '+ %s\n' "${line% }" >&2 || true # the console may be closed
}

# Print a command and run it.
run() { # COMMAND...
  if show "$@"; then
    "$@"
  fi
}

# Print a command and replace the script's shell by it, so that the command receives the signals sent to the script.
run_last() { # COMMAND...
  if show "$@"; then
    exec "$@"
  fi
}

# Succeeds if RESULT is newer than SOURCE, so that a step has nothing to do. Always fails in a dry run, which prints every command.
up_to_date() { # RESULT SOURCE
  [[ -z ${DRY_RUN:-} && $1 -nt $2 ]] || return 1
  echo "$RECIPE: $1 is up to date" >&2
}
