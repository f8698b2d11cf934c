#!/usr/bin/env bash
# Reruns what the documentation reports. Stops at the first failure.
#   ./benchmark.sh speed             physics limits, and the share of them that the scripts reach -> results/speed.csv
#   ./benchmark.sh milet-point       point-goal-4c, 3 seeds, and their curves
#   ./benchmark.sh milet-mujoco      ant-goal-4c (5 million frames), hopper-params-4c and walker-params-4c (1 million, at
#                                    the paper's and at the official code's rates)
#   ./benchmark.sh maml              cheetah-dir (2 seeds) and cheetah-vel, 32 million frames each, and ant-dir, 16 million
#   ./benchmark.sh maml-mixed        MAML and Multi-MAML on ant-cheetah-dir, 16 million frames each, and their curves
#   ./benchmark.sh belief-point      RL2 and VariBAD on point-goal-4c, 3 seeds each, and their curves beside MILET's and PEARL's
#   ./benchmark.sh belief-mujoco     the same on hopper-params-4c, walker-params-4c (1 million frames) and cheetah-dir (5 million)
#   ./benchmark.sh promp             ProMP on cheetah-dir, 2 seeds, 16 million frames each, and their curves beside MAML's
#   ./benchmark.sh pearl-point       PEARL on point-goal-4c, 3 seeds, and their curves
#   ./benchmark.sh pearl-mujoco      PEARL on cheetah-dir, 60 iterations
# SLURM=1 submits each run as a job instead of running them one after the other.
set -euo pipefail
shopt -s nullglob # a method that has no run on an environment is not in its figure
cd "$(dirname "$0")"

run() { if [ "${SLURM:-}" ]; then sbatch --cpus-per-task=2 --wrap "$*"; else "$@"; fi; }

case "${1:-}" in
  speed) python results/speed.py ;;
  milet-point)
    for seed in 0 1 2; do run python algos/milet.py --env point-goal-4c --seed "$seed" --run-dir runs/point; done
    [ "${SLURM:-}" ] || python results/plot.py runs/point/* --out runs/point-figures
    ;;
  milet-mujoco)
    run python algos/milet.py --env ant-goal-4c --preset paper --frames 5000000
    run python algos/milet.py --env hopper-params-4c --frames 1000000
    run python algos/milet.py --env walker-params-4c --frames 1000000
    run python algos/milet.py --env hopper-params-4c --frames 1000000 --lr-phi 5e-4
    run python algos/milet.py --env walker-params-4c --frames 1000000 --lr-phi 3e-4 --lr-psi 3e-4
    ;;
  maml)
    for seed in 0 1; do run python algos/maml.py --env cheetah-dir --seed "$seed" --run-dir runs/maml-cheetah; done
    [ "${SLURM:-}" ] || python results/plot.py runs/maml-cheetah/* --out runs/maml-cheetah-figures
    run python algos/maml.py --env cheetah-dir --kl-slack 0.1 --iterations 50
    run python algos/maml.py --env cheetah-vel
    run python algos/maml.py --env ant-dir --iterations 100
    ;;
  maml-mixed)
    run python algos/maml.py --env ant-cheetah-dir --iterations 100 --run-dir runs/maml-mixed
    run python algos/maml.py --env ant-cheetah-dir --iterations 100 --oracle --run-dir runs/maml-mixed
    [ "${SLURM:-}" ] || python results/plot.py runs/maml-mixed/* --out runs/maml-mixed-figures
    ;;
  belief-point)
    for script in rl2 varibad; do
      for seed in 0 1 2; do run python "algos/$script.py" --env point-goal-4c --seed "$seed" --run-dir runs/belief-point; done
    done
    [ "${SLURM:-}" ] || python results/plot.py results/milet/point-* runs/belief-point/* results/pearl/point-* --out runs/belief-point-figures
    ;;
  belief-mujoco)
    for task in "hopper-params-4c 1000000" "walker-params-4c 1000000" "cheetah-dir 5000000"; do
      read -r env frames <<< "$task"
      for script in rl2 varibad; do
        run python "algos/$script.py" --env "$env" --frames "$frames" --run-dir "runs/belief-$env"
      done
      [ "${SLURM:-}" ] || python results/plot.py results/milet/"$env"__*__0 "runs/belief-$env"/* \
        results/pearl/"$env"__*__0 --out "runs/belief-$env-figures"
    done
    ;;
  promp)
    for seed in 0 1; do run python algos/promp.py --env cheetah-dir --iterations 100 --seed "$seed" --run-dir runs/promp; done
    [ "${SLURM:-}" ] || python results/plot.py runs/promp/* results/maml/cheetah-dir__* --out runs/promp-figures
    ;;
  pearl-point)
    for seed in 0 1 2; do run python algos/pearl.py --env point-goal-4c --seed "$seed" --run-dir runs/pearl-point; done
    [ "${SLURM:-}" ] || python results/plot.py runs/pearl-point/* --out runs/pearl-point-figures
    ;;
  pearl-mujoco) run python algos/pearl.py --env cheetah-dir --iterations 60 --eval-every 2 ;;
  *) sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
