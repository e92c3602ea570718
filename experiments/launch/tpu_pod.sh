#!/usr/bin/env bash
# Trains on a Cloud TPU slice: the same command on every host of it; `--distributed` finds the others.
#
#   TPU=my-slice ZONE=europe-west4-b CHECKOUT=/mnt/shared/moejax \
#     experiments/launch/tpu_pod.sh --config=configs/small_moe.py --workdir=/mnt/shared/runs/small \
#     --config.mesh.fsdp=8 --config.train.batch_size=32
#
# CHECKOUT is a checkout with its environment (make setup EXTRAS=dev,tpu) on a file system that is mounted at the same
# place on every host, as is the run directory. Each host writes CHECKOUT/logs/HOST.log. A lost connection does not end
# the run. With STOP=1 and no flags it tells all hosts to save and end; the first command continues.
set -euo pipefail
: "${TPU:?the name of the TPU}" "${ZONE:?its zone}" "${CHECKOUT:?the checkout, at the same place on every host}"

on_every_host() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

enter="set -e; cd $(printf '%q' "$CHECKOUT"); mkdir -p logs; log=logs/\$(hostname)"
if [[ -n "${STOP:-}" ]]; then
  on_every_host "$enter; kill -TERM \"\$(cat \$log.pid)\""
elif (($# == 0)); then
  echo 'nothing to train; give the flags of moejax train' >&2
  exit 2
else
  # Quoted once more, for the shell of the hosts.
  train=$(printf '%q ' .venv/bin/python -m moejax train --distributed "$@")
  on_every_host "$enter; nohup $train >>\$log.log 2>&1 </dev/null & echo \$! >\$log.pid; wait \$!"
fi
