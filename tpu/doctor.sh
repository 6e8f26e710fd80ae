#!/usr/bin/env bash
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<TEXT
Checks what a slice needs, from the account to the devices that JAX sees, one line each: ok, or FAIL and what to do.

  $SCRIPT --zone ZONE [options]

  --mount SERVER:/EXPORT:DIR  also check that DIR is mounted and writable on every host

TEXT
}

MOUNT=""
own_option() {
  if [[ $1 == --mount ]]; then need_value "$@" && MOUNT=$2 TAKEN=2; fi
}
read_options "$@"

BAD=0
report() { # TEXT REMEDY COMMAND...: ok if the command succeeds and prints something
  local text=$1 remedy=$2 said
  shift 2
  if said=$(call "$@" 2>/dev/null) && [[ -n $said && $said != "(unset)" ]]; then
    echo "ok    $text: ${said//$'\n'/, }"
  elif ! dry; then
    echo "FAIL  $text: $remedy"
    BAD=1
  fi
}

project=$LSG_TPU_PROJECT
if [[ -z $project ]]; then project=$(call gcloud config get-value project 2>/dev/null) || true; fi

report "account" "run \`gcloud auth login\`" gcloud auth list --filter=status:ACTIVE '--format=value(account)'
report "project" "give --project, or run \`gcloud config set project PROJECT\`" \
  gcloud projects describe "${project:-PROJECT}" '--format=value(projectId)'
report "Cloud TPU API" "run \`gcloud services enable tpu.googleapis.com\`" \
  gcloud services list --enabled --filter=config.name=tpu.googleapis.com '--format=value(config.name)' "${WHERE[@]:1}"
report "accelerator type in $LSG_TPU_ZONE" "not offered there: see \`gcloud compute tpus accelerator-types list --zone=...\`" \
  gcloud compute tpus accelerator-types describe "$LSG_TPU_ACCELERATOR_TYPE" "${WHERE[@]}" '--format=value(type)'
report "runtime version" "see \`gcloud compute tpus tpu-vm versions list --zone=$LSG_TPU_ZONE\`" \
  gcloud compute tpus tpu-vm versions describe "$LSG_TPU_RUNTIME_VERSION" "${WHERE[@]}" '--format=value(version)'
report "ssh key" "several hosts need it in the agent: run \`ssh-add ~/.ssh/google_compute_engine\`" ssh-add -l

state=$(slice_state)
case $state in
  ACTIVE) dry || echo "ok    slice: $LSG_TPU_NAME is ACTIVE, and billed" ;;
  NONE) echo "FAIL  slice: there is no $LSG_TPU_NAME: run tpu/create.sh" ;;
  FAILED) echo "FAIL  slice: $LSG_TPU_NAME is FAILED: $(why_failed); run tpu/delete.sh, then tpu/create.sh" ;;
  SUSPEND*) echo "FAIL  slice: $LSG_TPU_NAME is $state: run tpu/delete.sh, then tpu/create.sh (or tpu/resume.sh)" ;;
  *) echo "FAIL  slice: $LSG_TPU_NAME is $state: wait (tpu/create.sh does)" ;;
esac
[[ $state == ACTIVE ]] || exit 1

# shellcheck disable=SC2086  # an empty MOUNT is no argument
check=$(quoted check "$DEVICES" ${MOUNT:+"${MOUNT##*:}"})
on_hosts all "if [ -f lsg_jax/tpu/on_host.sh ]; then bash lsg_jax/tpu/on_host.sh $check;\
 else echo \"FAIL  \$(hostname): lsg_jax is not installed: run tpu/run.sh\"; exit 1; fi" || BAD=1
exit "$BAD"
