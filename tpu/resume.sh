#!/usr/bin/env bash
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<TEXT
Runs an lsg command on a slice until it is done: creates the slice and runs; if the slice is preempted, or lsg ends with 75
(stopped and saved), deletes the slice, creates it again and reruns. It may be restarted at any time and continues.

  $SCRIPT --zone ZONE --spot [options] -- train configs/llava15_7b.toml --set output=/mnt/lsg/runs/7b ...

  -- COMMAND...             as for tpu/run.sh
  --mount SERVER:/EXPORT:DIR  as for tpu/run.sh
  --output DIR              the run's output on the hosts; the lock of a deleted slice is removed there
  --create-flag FLAG        a further flag of \`gcloud compute tpus queued-resources create\`; may be repeated
  --id ID                   names the runs ID-1, ID-2, ...
  --max-failures N          give up after N failures in a row, each soon after its start (default: 3)
  --soon SECONDS            how soon (default: 600)
  --delete-at-end           delete the slice when the command is done or has failed for good

Ends with 0 when done; with 2, 65 or 70 at once, since another attempt would not help.

TEXT
}

MOUNT="" OUTPUT="" ID=$(date +%Y%m%d-%H%M%S) MAX_FAILURES=3 SOON=600 DELETE_AT_END=0 CREATE_FLAGS=()
own_option() {
  TAKEN=2
  case $1 in
    --mount) need_value "$@" && MOUNT=$2 ;;
    --output) need_value "$@" && OUTPUT=$2 ;;
    --create-flag) need_value "$@" && CREATE_FLAGS+=("$2") ;;
    --id) need_value "$@" && ID=$2 ;;
    --max-failures) need_value "$@" && MAX_FAILURES=$2 ;;
    --soon) need_value "$@" && SOON=$2 ;;
    --delete-at-end) DELETE_AT_END=1 TAKEN=1 ;;
    *) TAKEN=0 ;;
  esac
}
read_options "$@"
((${#REST[@]})) || fail 2 "give the command after --, such as: -- train configs/llava15_7b.toml"
[[ $MAX_FAILURES =~ ^[1-9][0-9]*$ && $SOON =~ ^[0-9]+$ ]] || fail 2 "--max-failures and --soon must be whole numbers"

STAYS="$LSG_TPU_NAME in $LSG_TPU_ZONE is not deleted: it may still run, and is billed until tpu/delete.sh"
trap 'fail 130 "stopped; $STAYS"' INT TERM

end() { # CODE TEXT
  if ((DELETE_AT_END)); then "$HERE/delete.sh" --yes; else say "$STAYS"; fi
  fail "$1" "$2"
}

LOST_HOST="" ATTEMPT=0 FAILURES=0

attempt() { # one run on an active slice; returns its code
  local options=(--id "$ID-$((++ATTEMPT))")
  if [[ -n $MOUNT ]]; then options+=(--mount "$MOUNT"); fi
  if [[ -n $OUTPUT && -n $LOST_HOST ]]; then options+=(--unlock "$OUTPUT=$LOST_HOST"); fi
  if [[ -n $OUTPUT ]]; then # worker 0 is the process that takes the lock
    HOST=$(on_hosts 0 hostname) || return 1
    if dry; then HOST=HOST; fi
  fi
  "$HERE/run.sh" "${options[@]}" -- "${REST[@]}"
}

replace() { # deletes the rest of the slice
  "$HERE/delete.sh" --yes || fail 1 "$STAYS"
  LOST_HOST=${HOST:-}
}

count_failure() { # CODE TEXT
  if ((SECONDS - STARTED >= SOON)); then FAILURES=0; fi
  ((++FAILURES < MAX_FAILURES)) || end "$1" "$2, $FAILURES times in a row"
  say "$2; trying again"
  sleep "$LSG_TPU_POLL_SECONDS"
}

is_lost() { # the slice was preempted; the state of its queued resource may lag
  is_dead "$STATE" || [[ $STATE == NONE ]] ||
    [[ $(gcloud compute tpus tpu-vm describe "$LSG_TPU_NAME" "${WHERE[@]}" '--format=value(state)') == @(PREEMPTED|TERMINATED) ]]
}

if dry; then
  "$HERE/create.sh" -- "${CREATE_FLAGS[@]}"
  attempt
  echo "# and each time that the slice is lost:"
  replace
  "$HERE/create.sh" -- "${CREATE_FLAGS[@]}"
  attempt
  exit
fi

while true; do
  STARTED=$SECONDS code=0
  if is_dead "$(slice_state)"; then replace; fi
  if ! "$HERE/create.sh" -- "${CREATE_FLAGS[@]}"; then
    STATE=$(slice_state)
    is_dead "$STATE" || fail 1 "no slice; see above"
    if [[ $STATE == FAILED ]]; then count_failure 1 "the request for $LSG_TPU_NAME failed"; fi
    continue
  fi
  attempt || code=$?
  case $code in
    0) end 0 "done" ;;
    2 | 65 | 70) end "$code" "lsg ended with $code: trying again would not help" ;;
  esac
  STATE=$(slice_state)
  if ((code == 75)) || is_lost; then
    say "ended with $code, the slice is $STATE: creating it anew"
    FAILURES=0
    replace
  else
    count_failure "$code" "ended with $code"
  fi
done
