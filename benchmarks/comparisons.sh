#!/usr/bin/env bash
# Every comparison system and every estimator from one base, with the same number of steps, on CIFAR-10:
#
#   benchmarks/comparisons.sh CIFAR_FOLDER PUBLIC_RESNET32 RUNS_FOLDER [EPOCHS [PUBLIC_RESNET56]]
#
# The base is benchmarks/checkpoints/resnet32-adapted.safetensors (its policy's backbone is primed, its head is not
# trained). All finetune for EPOCHS (3) epochs, without a teacher; what has a policy learns it in 2 x 0.2 epochs before
# that and is shifted to 6.8 of 15 blocks at the end. An interrupted call goes on where it was. One thread;
# about four hours on one core, by the sum of its parts. With a ResNet-56, one run more has it as its teacher. The test
# set is read by `bdexport evaluate` alone, after every choice.
set -euo pipefail
cifar=$1 public=$2 runs=$3 epochs=${4:-3} teacher=${5:-}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
base=$(dirname "$0")/checkpoints/resnet32-adapted.safetensors
data=(--dataset cifar10 --data "$cifar")
mkdir -p "$runs/results"
compare() { # NAME [ARGUMENT ...]
  bdexport train "${data[@]}" --preset marginal --seed 0 --adapt-epochs 0 --finetune-epochs "$epochs" --distillation 0 \
    --out "$runs/$1" --base "$base" "${@:2}"
  bdexport evaluate "$runs/$1" "${data[@]}" --json "$runs/results/$1.json"
}
budget=(--target-blocks 6.8)
all=("${budget[@]}" --set policy.learns=all)
compare marginal --estimator marginal "${budget[@]}"
compare self-critical --estimator self_critical "${all[@]}"
compare distribute-7 --method fixed --mask distribute-k --kept 7
compare searched-7 --method fixed --mask search --kept 7
compare gumbel --estimator gumbel --reward probability "${all[@]}"
compare leave-one-out --estimator leave_one_out --samples 3 "${all[@]}"
compare nested --estimator nested "${all[@]}"
compare first-7 --method fixed --mask first-k --kept 7
compare random-7 --method fixed --mask random-k --kept 7
compare sequential --method sequential --estimator self_critical "${all[@]}" --set finetune.level_share=0 \
  --set curriculum.learning_rate=0.01 --set finetune.policy_learning_rate=0.005
compare act --method act --set halting.ponder_weight=0.05
compare sact --method sact --set halting.ponder_weight=0.05
for weight in 15 30 50; do # they have no budget: dearer blocks, fewer of them
  compare act-$weight --method act --set halting.ponder_weight=0.$weight
done
compare sact-30 --method sact --set halting.ponder_weight=0.30
for seed in 1 2; do # how much of a lead is chance
  compare marginal-seed-$seed --seed $seed --estimator marginal "${budget[@]}"
  compare searched-7-seed-$seed --seed $seed --method fixed --mask search --kept 7
done
for pruned in "0.4 pfec" "0.55 pfec-55"; do
  read -r ratio name <<<"$pruned"
  [ -e "$runs/$name-base.safetensors" ] || bdexport prune "$public" --ratio "$ratio" --out "$runs/$name-base.safetensors"
  compare "$name" --base "$runs/$name-base.safetensors" --method fixed --mask 111111111111111
done
[ -e "$runs/pfec-policy.safetensors" ] ||
  bdexport prune "$runs/marginal" --ratio 0.25 --out "$runs/pfec-policy.safetensors"
compare pfec-on-policy --base "$runs/pfec-policy.safetensors" --estimator marginal "${budget[@]}"
[ -z "$teacher" ] || compare marginal-taught --estimator marginal "${budget[@]}" --distillation 1 --teacher "$teacher"
