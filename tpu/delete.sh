#!/usr/bin/env bash
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<TEXT
Deletes a slice and its queued resource, with all data on the disks of its hosts. That ends its billing.

  $SCRIPT --zone ZONE [options]

  --yes                     do not ask

TEXT
}

YES=0
own_option() {
  if [[ $1 == --yes ]]; then YES=1 TAKEN=1; fi
}
read_options "$@"

state=$(slice_state)
while [[ $state == SUSPENDING || $state == DELETING ]]; do # it cannot be deleted in these states
  sleep "$LSG_TPU_POLL_SECONDS"
  state=$(slice_state)
done
if [[ $state == NONE ]]; then
  say "there is no $LSG_TPU_NAME in $LSG_TPU_ZONE"
  exit 0
fi
if ! ((YES)) && ! dry; then
  [[ -t 0 ]] || fail 2 "give --yes to delete without being asked"
  read -rp "Delete $LSG_TPU_NAME in $LSG_TPU_ZONE ($state), with all that is on its hosts' disks? [y/N] " answer
  [[ $answer == [yY]* ]] || fail 1 "nothing was deleted; $LSG_TPU_NAME is still there and billed"
fi
call gcloud compute tpus queued-resources delete "$LSG_TPU_NAME" "${WHERE[@]}" --force --quiet ||
  fail 1 "$LSG_TPU_NAME was not deleted and may still be billed; see above"
