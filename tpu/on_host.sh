#!/usr/bin/env bash
# The part of the other scripts that runs on each host of a slice, called over ssh. Files are in the home folder: lsg_jax.tar.gz
# and lsg_jax (the checkout), lsg_venv (its environment), lsg_runs/ID (log, pids of supervisor and command, exit code).
set -euo pipefail

CHECKOUT=$HOME/lsg_jax VENV=$HOME/lsg_venv RUNS=$HOME/lsg_runs
UV_INSTALLER=https://astral.sh/uv/install.sh

fail() {
  echo "on_host: $* ($(hostname))" >&2
  exit 1
}

install() { # [SERVER:/EXPORT:DIR]
  if [[ -n ${1:-} ]]; then mount_nfs "${1%:*}" "${1##*:}"; fi
  local digest
  digest=$(sha256sum <"$HOME/lsg_jax.tar.gz")
  if [[ -f $VENV/installed && $(<"$VENV/installed") == "$digest" ]]; then return; fi
  if [[ -n $(running) ]]; then fail "$(running) is still running with another version: stop it with tpu/run.sh --stop"; fi
  export PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null || curl -LsSf "$UV_INSTALLER" | sh # the images' own Python may be older than 3.11
  uv venv --quiet --clear --python 3.12 "$VENV"
  uv pip install --quiet --python "$VENV/bin/python" "lsg_jax[tpu] @ file://$HOME/lsg_jax.tar.gz"
  echo "$digest" >"$VENV/installed"
}

mount_nfs() { # SERVER:/EXPORT DIR
  if ! mountpoint -q "$2"; then
    command -v mount.nfs >/dev/null || sudo apt-get install -y -q nfs-common
    sudo mkdir -p "$2"
    sudo mount -t nfs "$1" "$2"
  fi
  [[ -w $2 ]] || fail "$2 is mounted but cannot be written: run \`sudo chmod a+rwx $2\` on one host"
}

running() { # prints the ID of the run whose supervisor is alive
  local folder
  for folder in "$RUNS"/*/; do
    folder=${folder%/}
    [[ -f $folder/pid && ! -f $folder/exit ]] || continue
    if tr '\0' ' ' <"/proc/$(<"$folder/pid")/cmdline" 2>/dev/null | grep -qF " $folder "; then basename "$folder"; fi
  done
}

run() { # ID ARGUMENT...: starts lsg unless it runs already, shows its output, exits with its code
  local id=$1 current folder
  shift
  mkdir -p "$RUNS"
  current=$(running)
  if [[ -n $current && $current != "$id" ]]; then # the same command again, after a lost terminal?
    printf '%s\0' "$@" | cmp -s - "$RUNS/$current/arguments" ||
      fail "$current is still running another command: show it with --id $current, stop it with tpu/run.sh --stop"
    id=$current
  fi
  folder=$RUNS/$id
  if mkdir "$folder" 2>/dev/null; then # gcloud repeats a command after a lost connection: only the first call starts it
    printf '%s\0' "$@" >"$folder/arguments"
    : >"$folder/log"
    setsid bash "${BASH_SOURCE[0]}" supervise "$folder" "$@" </dev/null >>"$folder/log" 2>&1 &
    echo $! >"$folder/pid"
  fi
  tail -n +1 -s 0.2 --pid="$(<"$folder/pid")" -f "$folder/log"
  [[ -f $folder/exit ]] || fail "$id ended without an exit code: was the host restarted?"
  echo "on_host: $id ended with $(<"$folder/exit") on $(hostname)" >&2
  exit "$(<"$folder/exit")"
}

supervise() { # FOLDER ARGUMENT...: runs lsg without a terminal and records its exit code
  local folder=$1 child code=0
  shift
  cd "$CHECKOUT"
  trap : TERM HUP INT # at shutdown every process gets SIGTERM: lsg saves, and the supervisor waits for its code
  PYTHONUNBUFFERED=1 "$VENV/bin/lsg" "$@" &
  child=$!
  echo "$child" >"$folder/child"
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do # only the wait was interrupted
    code=0
    wait "$child" || code=$?
  done
  echo "$code" >"$folder/exit.new"
  mv "$folder/exit.new" "$folder/exit"
}

stop() {
  local current
  current=$(running)
  if [[ -z $current ]]; then fail "nothing is running"; fi
  kill -TERM "$(<"$RUNS/$current/child")"
}

unlock() { # DIR HOST: removes DIR/lock if it names HOST, whose slice is gone
  if grep -qsF "\"host\": \"$2\"" "$1/lock"; then rm -f "$1/lock"; fi
}

report() { # NAME TEXT COMMAND...: one line
  local name=$1 text=$2
  shift 2
  if "$@" >/dev/null 2>&1; then
    echo "ok    $(hostname): $name"
  else
    echo "FAIL  $(hostname): $name: $text"
    BAD=1
  fi
}

check() { # DEVICES [DIR]
  local devices=$1 shared=${2:-} python=$VENV/bin/python
  BAD=0
  report "Python 3.11 or later" "install again: delete ~/lsg_venv on the host and use tpu/run.sh" \
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'
  report "lsg --help" "install again: delete ~/lsg_venv on the host and use tpu/run.sh" "$VENV/bin/lsg" --help
  report "clock" "not in step; look at \`timedatectl\` on the host" grep -qx yes <(timedatectl show -p NTPSynchronized --value)
  report "10 GB free on /" "less is free; delete old ~/lsg_runs" \
    test "$(df --output=avail -k / | tail -n 1)" -gt 10000000
  if [[ -n $shared ]]; then report "$shared is shared and writable" "use --mount of tpu/run.sh" is_shared "$shared"; fi
  if [[ -n $(running) ]]; then
    echo "ok    $(hostname): $(running) is running, so devices were not counted"
  else
    report "JAX sees $devices devices" "see tpu/TROUBLESHOOTING.md for what \`import jax; jax.devices()\` says" \
      timeout 180 "$python" -c "import jax; jax.distributed.initialize(); assert jax.device_count() == $devices"
  fi
  return "$BAD"
}

is_shared() { mountpoint -q "$1" && [[ -w $1 ]]; }

"$@"
