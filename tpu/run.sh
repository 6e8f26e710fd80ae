#!/usr/bin/env bash
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<TEXT
Installs this checkout (its last commit) on every host of a slice, runs an lsg command on all of them at once, shows its
output and ends with its exit code. The command keeps running if this terminal is lost.

  $SCRIPT --zone ZONE [options] -- train configs/llava15_7b.toml --set output=/mnt/lsg/runs/7b ...

  -- COMMAND...             the command, without \`lsg\`; --multihost is added. Its folder is the checkout on the host.
  --mount SERVER:/EXPORT:DIR  first mount this NFS export (Filestore) on every host. All hosts must see the same models,
                            records and output there; not a bucket, since gcsfuse has no locks across hosts
  --unlock DIR=HOST         first remove the lock that a run on HOST, of a slice now deleted, left in the output DIR
  --id ID                   names the run; the ID of an earlier run shows that run and starts none
  --stop                    ask the run on the hosts to save and end (SIGTERM); it ends with 75

Exit codes are those of lsg: 0 done, 2 usage, 65 bad input, 70 non-finite, 75 stopped and saved, 1 or other: failed.

TEXT
}

MOUNT="" UNLOCK="" STOP=0 ID=$(date +%Y%m%d-%H%M%S)
own_option() {
  TAKEN=2
  case $1 in
    --mount) need_value "$@" && MOUNT=$2 ;;
    --unlock) need_value "$@" && UNLOCK=$2 ;;
    --id) need_value "$@" && ID=$2 ;;
    --stop) STOP=1 TAKEN=1 ;;
    *) TAKEN=0 ;;
  esac
}
read_options "$@"
if ((STOP)); then
  on_hosts all "bash lsg_jax/tpu/on_host.sh stop"
  exit
fi
((${#REST[@]})) || fail 2 "give the command after --, such as: -- train configs/llava15_7b.toml"
[[ $ID =~ ^[A-Za-z0-9._-]+$ ]] || fail 2 "--id may have letters, digits and ._- only, got $ID"
[[ -z $MOUNT || $MOUNT =~ ^[^:]+:/[^:]*:/.+$ ]] || fail 2 "--mount must be SERVER:/EXPORT:/DIR, got $MOUNT"
[[ -z $UNLOCK || $UNLOCK =~ ^/.*=.+$ ]] || fail 2 "--unlock must be /DIR=HOST, got $UNLOCK"
[[ " ${REST[*]} " == *" --multihost "* ]] || REST+=(--multihost)

install() {
  local cache=${XDG_CACHE_HOME:-$HOME/.cache}/lsg_jax revision archive
  revision=$(git -C "$HERE/.." rev-parse --short=12 HEAD) || fail 1 "$HERE is not in a git checkout: cannot pack it"
  archive=$cache/$revision.tar.gz
  [[ -z $(git -C "$HERE/.." status --porcelain) ]] || say "changes that are not committed are not installed; installing $revision"
  call mkdir -p "$cache"
  call git -C "$HERE/.." archive --format=tar.gz --prefix=lsg_jax/ --output="$archive" HEAD
  call gcloud compute tpus tpu-vm scp "$archive" "$LSG_TPU_NAME:lsg_jax.tar.gz" --worker=all "${WHERE[@]}"
  # shellcheck disable=SC2086  # an empty MOUNT is no argument
  on_hosts all "tar -xzf lsg_jax.tar.gz && bash lsg_jax/tpu/on_host.sh $(quoted install ${MOUNT:+"$MOUNT"})"
}

# Hosts may exit with different codes, and gcloud returns that of the first that failed. The most informative one is bad usage, bad
# input or non-finite values; then that the run was saved.
worst_code() { # CODE FILE
  local codes wanted
  codes=" $(grep -oE '^on_host: .* ended with [0-9]+ on' "$2" | grep -oE '[0-9]+ on$' | grep -oE '[0-9]+' | tr '\n' ' ')" || true
  for wanted in 2 65 70 75; do
    if [[ $codes == *" $wanted "* ]]; then echo "$wanted" && return; fi
  done
  echo "$1"
}

trap 'fail 130 "lsg goes on on the hosts of $LSG_TPU_NAME: show it again with --id $ID, stop it with $SCRIPT --stop"' INT TERM
install || fail 1 "installing on $LSG_TPU_NAME failed; see above, and tpu/doctor.sh"
if [[ -n $UNLOCK ]]; then
  on_hosts 0 "bash lsg_jax/tpu/on_host.sh $(quoted unlock "${UNLOCK%=*}" "${UNLOCK##*=}")"
fi
output=$(mktemp)
trap 'rm -f "$output"' EXIT
command="bash lsg_jax/tpu/on_host.sh $(quoted run "$ID" "${REST[@]}")"
if dry; then
  on_hosts all "$command"
  exit
fi
code=0
on_hosts all "$command" 2>&1 | tee "$output" || code=${PIPESTATUS[0]}
exit "$(worst_code "$code" "$output")"
