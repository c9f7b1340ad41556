#!/usr/bin/env bash
# Trains and measures what the README's results on CIFAR-10 consist of, and makes the report of it:
#
#   benchmarks/cifar10.sh CIFAR_FOLDER RESNET32_CHECKPOINT RESNET56_CHECKPOINT RUNS_FOLDER
#
# One thread for each run (OMP_NUM_THREADS=1). An interrupted call goes on where it was. The test set is read by
# `bdexport evaluate` and `bdexport report` alone, after every choice. About ten hours on one core, by the sum of its parts;
# it was not run in one go.
set -euo pipefail
cifar=$1 resnet32=$2 resnet56=$3 runs=$4
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
data=(--dataset cifar10 --data "$cifar")
train() { bdexport train "${data[@]}" --preset marginal --seed 0 --teacher "$resnet56" "$@"; }
measure() { # NAME [ARGUMENT ...]
  bdexport evaluate "$runs/$1" "${data[@]}" --json "$runs/results/$1.json" "${@:2}"
}
mkdir -p "$runs/results"

# The network, adapted to nested levels, with a primed policy: what both the policy and the fixed masks start from.
train --base "$resnet32" --curriculum-epochs 0 --finetune-epochs 0 --set recalibrate_images=0 --target-blocks 6.9 \
  --out "$runs/resnet32-adapted"
train --base "$resnet56" --curriculum-epochs 0 --finetune-epochs 0 --set recalibrate_images=0 --target-blocks 9 \
  --prime-epochs 8 --set adapt.levels=27,16,10,7,5 --set adapt.full_share=0.25 --out "$runs/resnet56-adapted"

# The policy, and for comparison one mask for all images, found on the validation split: the same base, the same steps.
# The policy is a fresh one: a strided stem and one block more cost a third of the time of the paper's.
rate=(--set finetune.network_learning_rate=0.05)
train --base "$runs/resnet32-adapted" --adapt-epochs 0 --finetune-epochs 40 --target-blocks 6.8 "${rate[@]}" \
  --fresh-policy --prime-epochs 20 --set policy.stem_stride=2 --set policy.stages=1,1,2 --out "$runs/resnet32"
train --base "$runs/resnet32-adapted" --adapt-epochs 0 --finetune-epochs 40 "${rate[@]}" \
  --method fixed --mask search --kept 7 --out "$runs/resnet32-search7"
# The policy for longer; and fixed masks again from its network, of 5 blocks, and of 7 for as long.
train --base zoo:resnet32-cifar10 --adapt-epochs 0 --finetune-epochs 32 --target-blocks 6.8 "${rate[@]}" \
  --out "$runs/resnet32-long"
for mask in "5 18 resnet32-search5" "7 32 resnet32-search7-long"; do
  read -r kept epochs name <<<"$mask"
  train --base zoo:resnet32-cifar10 --adapt-epochs 0 --finetune-epochs "$epochs" "${rate[@]}" \
    --method fixed --mask search --kept "$kept" --out "$runs/$name"
done
train --base "$runs/resnet56-adapted" --adapt-epochs 0 --finetune-epochs 28 --target-blocks 8.9 "${rate[@]}" \
  --fresh-policy --prime-epochs 12 --set policy.stem_stride=2 --set policy.stages=1,1,2 \
  --set adapt.levels=27,16,10,7,5 --out "$runs/resnet56"
train --base "$runs/resnet56-adapted" --adapt-epochs 0 --finetune-epochs 28 "${rate[@]}" \
  --method fixed --mask search --kept 9 --out "$runs/resnet56-search9"

for run in resnet32 resnet56; do
  measure $run --fixed first-k --fixed random-k --fixed distribute-k
done
for run in resnet32-long resnet32-search5 resnet32-search7 resnet32-search7-long; do
  measure $run
done
measure resnet56-search9
for run in resnet32 resnet32-long; do # the frontier of a trained policy
  for blocks in 5 8 10; do
    bdexport retarget "$runs/$run" --target-blocks $blocks "${data[@]}" --out "$runs/$run-at-$blocks.safetensors"
    measure $run-at-$blocks.safetensors
  done
done
bdexport report "$runs/resnet32" "$runs/resnet56" "$runs"/results/*.json "${data[@]}" --overwrite --out "$runs/report"
