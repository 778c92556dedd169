# shellcheck shell=bash
# How the scripts run commands: DRY_RUN=1 prints them instead. A script sources this file.

# Show a command; fails in a dry run, so that it is not run.
show() {
  local line
  printf -v line '%q ' "$@"
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%s\n' "${line% }"
    return 1
  fi
  printf '+ %s\n' "${line% }" >&2
}

# Show a command and, unless DRY_RUN is set, run it.
run() {
  if show "$@"; then
    "$@"
  fi
}

# The same as a script's last command, in place of its shell: a signal to the script is one to the command.
run_last() {
  if show "$@"; then
    exec "$@"
  fi
}
