# shellcheck shell=bash
# Shared by the scripts of this folder: settings, options, and the state of a queued resource. Sourced, not run.
set -euo pipefail

SCRIPT=tpu/${0##*/}
# shellcheck disable=SC2034  # for those that source this
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
DEAD_STATES=" FAILED SUSPENDING SUSPENDED DELETING "
export CLOUDSDK_CORE_DISABLE_PROMPTS=1 # there may be no user to answer
exec 3>&1 # where --dry-run prints, also from within $(...)

shared_options() {
  cat <<'TEXT'
Shared options, each also as an environment variable:
  --name NAME               of the queued resource and its slice (LSG_TPU_NAME; default: lsg)
  --zone ZONE               (LSG_TPU_ZONE)
  --project PROJECT         default: gcloud's (LSG_TPU_PROJECT)
  --accelerator-type TYPE   v4-*, v5litepod-*, v5p-* or v6e-* (LSG_TPU_ACCELERATOR_TYPE; default: v5litepod-16)
  --runtime-version VERSION default: the one that goes with the type (LSG_TPU_RUNTIME_VERSION)
  --spot                    cheaper, but may be preempted at any time (LSG_TPU_SPOT=1)
  --poll-seconds N          between checks of a state (LSG_TPU_POLL_SECONDS; default: 30)
  --dry-run                 print the commands instead of running them (LSG_TPU_DRY_RUN=1)
  --help
TEXT
}

fail() { # CODE TEXT...
  local code=$1
  shift
  printf '%s: %s\n' "$SCRIPT" "$*" >&2
  exit "$code"
}

say() { printf '%s: %s\n' "$SCRIPT" "$*" >&2; }

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || fail 1 "needs bash 4.4 or later, this is $BASH_VERSION"

# Reads the options in "$@". `own_option` of the script, if it has one, gets each option first and returns in TAKEN how many
# words it used. REST gets the words after `--`. The settings are exported for scripts that this one calls.
read_options() {
  REST=()
  while (($#)); do
    if [[ $1 == --?*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
    TAKEN=0
    if declare -F own_option >/dev/null; then own_option "$@"; fi
    if ((TAKEN == 0)); then
      TAKEN=2
      case $1 in
        --name) need_value "$@" && LSG_TPU_NAME=$2 ;;
        --zone) need_value "$@" && LSG_TPU_ZONE=$2 ;;
        --project) need_value "$@" && LSG_TPU_PROJECT=$2 ;;
        --accelerator-type) need_value "$@" && LSG_TPU_ACCELERATOR_TYPE=$2 ;;
        --runtime-version) need_value "$@" && LSG_TPU_RUNTIME_VERSION=$2 ;;
        --poll-seconds) need_value "$@" && LSG_TPU_POLL_SECONDS=$2 ;;
        --spot) LSG_TPU_SPOT=1 TAKEN=1 ;;
        --dry-run) LSG_TPU_DRY_RUN=1 TAKEN=1 ;;
        --help) usage && shared_options && exit 0 ;;
        --) REST=("${@:2}") && break ;;
        *) fail 2 "unknown option $1; see $SCRIPT --help" ;;
      esac
    fi
    shift "$TAKEN"
  done
  check_settings
}

need_value() { # OPTION [VALUE]
  (($# > 1)) || fail 2 "$1 needs a value"
}

check_settings() {
  export LSG_TPU_NAME=${LSG_TPU_NAME:-lsg} LSG_TPU_ZONE=${LSG_TPU_ZONE:-} LSG_TPU_PROJECT=${LSG_TPU_PROJECT:-}
  export LSG_TPU_ACCELERATOR_TYPE=${LSG_TPU_ACCELERATOR_TYPE:-v5litepod-16} LSG_TPU_SPOT=${LSG_TPU_SPOT:-0}
  export LSG_TPU_POLL_SECONDS=${LSG_TPU_POLL_SECONDS:-30} LSG_TPU_DRY_RUN=${LSG_TPU_DRY_RUN:-0}
  [[ -n $LSG_TPU_ZONE ]] || fail 2 "give --zone, such as us-west4-a (or LSG_TPU_ZONE)"
  [[ $LSG_TPU_POLL_SECONDS =~ ^[0-9]+$ ]] || fail 2 "--poll-seconds must be a whole number, got $LSG_TPU_POLL_SECONDS"
  [[ $LSG_TPU_ACCELERATOR_TYPE =~ ^(v4|v5litepod|v5p|v6e)-[0-9]+$ ]] ||
    fail 2 "--accelerator-type must be v4-N, v5litepod-N, v5p-N or v6e-N, got $LSG_TPU_ACCELERATOR_TYPE"
  local version size=${LSG_TPU_ACCELERATOR_TYPE#*-}
  DEVICES=$size
  # shellcheck disable=SC2034  # DEVICES is for doctor.sh
  case $LSG_TPU_ACCELERATOR_TYPE in
    v4-*) version=tpu-ubuntu2204-base DEVICES=$((size / 2)) ;; # v4 and v5p are named by TensorCores: two a chip,
    v5p-*) version=v2-alpha-tpuv5 DEVICES=$((size / 2)) ;;     # which JAX sees as one device
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
  esac
  export LSG_TPU_RUNTIME_VERSION=${LSG_TPU_RUNTIME_VERSION:-$version}
  WHERE=(--zone="$LSG_TPU_ZONE")
  if [[ -n $LSG_TPU_PROJECT ]]; then WHERE+=(--project="$LSG_TPU_PROJECT"); fi
  dry || command -v gcloud >/dev/null || fail 1 "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
}

dry() { ((LSG_TPU_DRY_RUN)); }

quoted() { # WORD... as one line for a shell
  local word line=()
  for word; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then line+=("$word"); else line+=("${word@Q}"); fi
  done
  printf '%s' "${line[*]}"
}

call() { # COMMAND...: runs it, or prints it with --dry-run
  if dry; then printf '%s\n' "$(quoted "$@")" >&3; else "$@"; fi
}

on_hosts() { # WORKER COMMAND: over ssh, on worker 0, 1, ... or all
  call gcloud compute tpus tpu-vm ssh "$LSG_TPU_NAME" --worker="$1" "${WHERE[@]}" --command="$2"
}

slice_state() { # [STATE]: prints the state of the queued resource; NONE if there is none, STATE with --dry-run
  local text
  if dry; then
    call gcloud compute tpus queued-resources describe "$LSG_TPU_NAME" "${WHERE[@]}" '--format=value(state.state)'
    echo "${1:-ACTIVE}"
  elif text=$(gcloud compute tpus queued-resources describe "$LSG_TPU_NAME" "${WHERE[@]}" '--format=value(state.state)' 2>&1); then
    grep -oE '^[A-Z_]+$' <<<"$text" || echo UNKNOWN
  elif [[ $text == *NOT_FOUND* ]]; then
    echo NONE
  else
    say "gcloud cannot tell the state: ${text//$'\n'/ }"
    echo UNKNOWN
  fi
}

why_failed() { # prints the reason of a FAILED queued resource, such as a quota
  gcloud compute tpus queued-resources describe "$LSG_TPU_NAME" "${WHERE[@]}" \
    '--format=value(state.failedData.error.message)' 2>/dev/null || true
}

is_dead() { [[ $DEAD_STATES == *" $1 "* ]]; }
