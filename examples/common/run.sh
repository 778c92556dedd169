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

# Which writing of a file is there: each gives it another inode than the one before it has.
version_of() { # FILE
  ls -i "$1" 2>/dev/null && cat "$1"
}

# The same for a training under torchrun, which ends with 1 whatever its processes end with: where the script is told to stop and FILE, which
# a save writes last, has been written since, the script ends with 75, as they do.
run_training() { # FILE COMMAND...
  local saved=$1 training status=0
  shift
  show "$@" || return 0
  set -m # a process group of its own: a signal to this script's group reaches torchrun once
  "$@" </dev/null &
  training=$!
  set +m
  signal=
  # shellcheck disable=SC2329 # by the traps
  stop() {
    [[ -n ${before+set} ]] || before=$(version_of "$saved") || true
    signal=$1
    kill -"$1" "$training" 2>/dev/null || true
  }
  trap 'stop TERM' TERM
  trap 'stop INT' INT
  wait "$training" || status=$?
  stopped=$signal
  while [[ -n $signal ]]; do # a trap cut the wait short
    signal=
    status=0
    wait "$training" || status=$?
  done
  if [[ -n $stopped && $status != 0 && $(version_of "$saved") != "$before" ]]; then
    status=75
  fi
  exit "$status"
}
