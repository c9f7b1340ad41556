#!/usr/bin/env bash
# ResNet-110 on CIFAR-10 on a GPU, from nothing: how fast the phases of preset cpu train there; the base; the policy; and
# the fixed mask to compare with, from the same base for as many epochs of finetuning (a policy learns 2 x 0.2 epochs on the
# frozen network before):
#
#   benchmarks/cifar10_gpu.sh CIFAR_FOLDER RUNS_FOLDER
#
# Not run on a GPU yet. An interrupted call goes on where it was. The test set is read by `bdexport evaluate` and
# `bdexport report` alone, after every choice. From a checkout that is not installed:
# BDEXPORT="python3 -m bdexport" PYTHONPATH=. benchmarks/cifar10_gpu.sh ..
# The numbers below can be given in the environment, e.g. BASE_EPOCHS=60 FINETUNE_EPOCHS=20 where time is short, or
# ARCH=resnet20 DATASET=digits DEVICE=cpu TARGET=4 KEPT=4 LEVELS=9,6,4,3 SPEED="--batch 32 --rounds 1 --steps 1" to see
# that the script itself runs. Speed is measured with batches of 1,024; what is trained has the settings' own of 128, whose
# learning rates were found with them, and so does not reach that speed.
set -euo pipefail
usage="usage: $0 CIFAR_FOLDER RUNS_FOLDER"
cifar=${1:?$usage} runs=${2:?$usage}
bdexport=${BDEXPORT:-bdexport} python=${PYTHON:-python3} device=${DEVICE:-cuda}
arch=${ARCH:-resnet110} dataset=${DATASET:-cifar10}
base_epochs=${BASE_EPOCHS:-160} adapt_epochs=${ADAPT_EPOCHS:-20} finetune_epochs=${FINETUNE_EPOCHS:-60}
speed=${SPEED:---batch 1024 --steps 50 --rounds 5 --warmup 100}
target=${TARGET:-16.5} kept=${KEPT:-17} levels=${LEVELS:-54,32,20,14,9}
$python -c 'import matplotlib' || { echo "the report needs bdexport[report]" >&2; exit 1; }
data=(--dataset "$dataset")
[ "$dataset" = digits ] || data+=(--data "$cifar")
train() { # NAME [ARGUMENT ...]
  $bdexport train "${data[@]}" --preset marginal --seed 0 --device "$device" --out "$runs/$1" "${@:2}"
}
mkdir -p "$runs/results"
for network in resnet32 "$arch"; do
  result="$runs/results/training-$network.json"
  [ -e "$result" ] || $python "$(dirname "$0")/training.py" --arch "$network" --device "$device" $speed --json "$result"
done
train base --arch "$arch" --base-only --pretrain-epochs "$base_epochs"
train adapted --base "$runs/base" --adapt-epochs "$adapt_epochs" --curriculum-epochs 0 --finetune-epochs 0 \
  --target-blocks "$target" --set adapt.levels="$levels" --set recalibrate_images=0
finetuning=(--base "$runs/adapted" --adapt-epochs 0 --finetune-epochs "$finetune_epochs" --teacher "$runs/base"
  --set finetune.network_learning_rate=0.05)
train policy "${finetuning[@]}" --target-blocks "$target" --set adapt.levels="$levels"
train search "${finetuning[@]}" --method fixed --mask search --kept "$kept"
for run in base policy search; do
  $bdexport evaluate "$runs/$run" "${data[@]}" --json "$runs/results/$run.json"
done
$bdexport report "$runs/policy" "$runs"/results/{base,policy,search}.json "${data[@]}" --overwrite --out "$runs/report"
