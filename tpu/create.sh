#!/usr/bin/env bash
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<TEXT
Requests a TPU slice and waits until it is active. Run it again to continue waiting. An active slice is billed until
tpu/delete.sh.

  $SCRIPT --zone ZONE [options] [-- FLAG...]

  -- FLAG...                further flags of \`gcloud compute tpus queued-resources create\`, such as --network=NETWORK
  --no-wait                 return once it is queued

TEXT
}

WAIT=1
own_option() {
  if [[ $1 == --no-wait ]]; then WAIT=0 TAKEN=1; fi
}
read_options "$@"

wait_until_active() {
  local state last="" unknown=0
  while state=$(slice_state ACTIVE); [[ $state != ACTIVE ]]; do
    if [[ $state == FAILED ]]; then fail 1 "$LSG_TPU_NAME is FAILED: $(why_failed); delete it with tpu/delete.sh"; fi
    if is_dead "$state"; then fail 1 "$LSG_TPU_NAME is $state; delete it with tpu/delete.sh and create it again"; fi
    if [[ $state == NONE ]]; then fail 1 "$LSG_TPU_NAME was deleted while waiting for it"; fi
    unknown=$([[ $state == UNKNOWN ]] && echo $((unknown + 1)) || echo 0)
    ((unknown < 10)) || fail 1 "gave up after asking 10 times; the request for $LSG_TPU_NAME may still be granted and billed"
    [[ $state == "$last" ]] || say "$LSG_TPU_NAME is $state"
    last=$state
    sleep "$LSG_TPU_POLL_SECONDS"
  done
  dry || say "$LSG_TPU_NAME is ACTIVE, and billed until tpu/delete.sh"
}

state=$(slice_state NONE)
if [[ $state == NONE ]]; then
  spot=()
  if ((LSG_TPU_SPOT)); then spot=(--spot); fi
  call gcloud compute tpus queued-resources create "$LSG_TPU_NAME" --node-id="$LSG_TPU_NAME" "${WHERE[@]}" \
    --accelerator-type="$LSG_TPU_ACCELERATOR_TYPE" --runtime-version="$LSG_TPU_RUNTIME_VERSION" "${spot[@]}" "${REST[@]}" ||
    fail 1 "gcloud refused to create $LSG_TPU_NAME; see above, and tpu/doctor.sh"
fi
trap 'fail 130 "stopped waiting; the request for $LSG_TPU_NAME stays, and is billed once granted: tpu/delete.sh ends it"' INT TERM
if ((WAIT)); then wait_until_active; fi
