# shellcheck shell=bash
# Functions that wait for a child process and pass signals on to it. A script sources this file.

# Wait until a child ends and set `status` to its exit status. A signal with a trap interrupts bash's `wait`: the trap must set
# `interrupted`, and then the wait starts again.
wait_for() { # PROCESS
  interrupted=yes
  while [[ -n $interrupted ]]; do
    interrupted=
    status=0
    wait "$1" || status=$?
  done
}

group=         # the process group of the running command
stopped_by=    # the first signal, if one has arrived
signalled=     # the process group that the signal was sent to
warned=        # whether the message about a later signal was printed
save_marker=   # the file that a training writes last when it saves
marker_before= # its version when the signal arrived

# Run a command in a process group of its own, wait until it ends and set `status` to its exit status.
# Only the first signal is passed on to the command: torchrun quits at the third one and leaves its processes running.
run_in_own_group() { # COMMAND...
  # A closed terminal (SIGHUP) counts as SIGTERM: a training then saves.
  trap 'handle_signal TERM' TERM HUP
  trap 'handle_signal INT' INT
  set -m
  "$@" </dev/null &
  group=$!
  set +m
  pass_signal_on # a signal may have arrived before the group existed
  wait_for "$group"
}

# shellcheck disable=SC2329 # the traps call it
handle_signal() { # SIGNAL
  interrupted=yes
  if [[ -z $stopped_by ]]; then
    stopped_by=$1
    marker_before=$(version_of "$save_marker") || true
    pass_signal_on
  elif [[ -z $warned ]]; then
    warned=yes
    trap '' PIPE # the reader of the console may have ended
    echo "already stopping: waiting for the processes to end; a training saves first" >&2 || true
  fi
}

pass_signal_on() {
  if [[ -n $stopped_by && -n $group && $signalled != "$group" ]]; then
    signalled=$group
    kill -"$stopped_by" -- -"$group" 2>/dev/null || true # it may have ended already
  fi
}

# Print the inode and the contents of a file: they differ after the file has been replaced.
version_of() { # FILE
  ls -i "$1" 2>/dev/null && cat "$1"
}

# Print a training's torchrun command, run it and exit with its status. MARKER is the file that a save writes last.
# torchrun exits with 1 whatever its processes exit with. So if the training was stopped by a signal and MARKER was written since then, the
# script exits with 75, as the processes do.
run_training() { # MARKER COMMAND...
  save_marker=$1
  shift
  show "$@" || return 0
  run_in_own_group "$@"
  if [[ -n $stopped_by && $status != 0 && $(version_of "$save_marker") != "$marker_before" ]]; then
    status=75
  fi
  exit "$status"
}
