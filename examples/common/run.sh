# shellcheck shell=bash
# How the scripts run commands: DRY_RUN=1 prints them instead. A script sources this file.

# 0 means what nothing means.
[[ ${DRY_RUN:-} != 0 ]] || DRY_RUN=

# Show a command; fails in a dry run, so that it is not run.
show() {
  local line
  printf -v line '%q ' "$@"
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%s\n' "${line% }"
    return 1
  fi
  printf '+ %s\n' "${line% }" >&2 || true # its console may have gone
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

# Wait for the end of a child, with its exit status in `status`. A trap cuts the wait short: it sets `cut`, and the wait goes on.
wait_for() { # PROCESS
  cut=yes
  while [[ -n $cut ]]; do
    cut=
    status=0
    wait "$1" || status=$?
  done
}

# Which writing of a file is there: each gives it another inode than the one before it has.
version_of() { # FILE
  ls -i "$1" 2>/dev/null && cat "$1"
}

saved=   # the file that a save of the command writes last, if it saves
group=   # the process group of the command
stopped= # the signal that came first
told=    # the group that has it
noted=   # whether another has been answered

# Wait for the end of a command that is a process group of its own, with its exit status in `status`; of the signals that come to this script
# the command gets the first alone, once: torchrun ends at its third and leaves its processes behind.
run_apart() {
  # With the terminal (SIGHUP) what could be written to goes too, and a training saves as at SIGTERM.
  trap 'stop TERM' TERM HUP
  trap 'stop INT' INT
  set -m
  "$@" </dev/null &
  group=$!
  set +m
  pass_on # what came before there was a group
  wait_for "$group"
}

# shellcheck disable=SC2329 # by the traps
stop() { # SIGNAL
  cut=yes
  if [[ -z $stopped ]]; then
    stopped=$1
    before=$(version_of "$saved") || true
    pass_on
  elif [[ -z $noted ]]; then
    noted=yes
    trap '' PIPE # who reads may have been stopped too
    echo "already stopping: waiting for the processes to end; a training saves first" >&2 || true
  fi
}

pass_on() {
  if [[ -n $stopped && -n $group && $told != "$group" ]]; then
    told=$group
    kill -"$stopped" -- -"$group" 2>/dev/null || true # it may have just ended
  fi
}

# Show a training under torchrun and run it as the script's last command. torchrun ends with 1 whatever its processes end with: where the
# script is told to stop and FILE, which a save writes last, has been written since, the script ends with 75, as they do.
run_training() { # FILE COMMAND...
  saved=$1
  shift
  show "$@" || return 0
  run_apart "$@"
  if [[ -n $stopped && $status != 0 && $(version_of "$saved") != "$before" ]]; then
    status=75
  fi
  exit "$status"
}
