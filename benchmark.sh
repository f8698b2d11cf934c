#!/usr/bin/env bash
# Reruns what the documentation reports. Stops at the first failure.
#   ./benchmark.sh speed             physics limits, and the share of them that the scripts reach -> results/speed.csv
#   ./benchmark.sh milet-point       point-goal-4c, 3 seeds, and the figures of the README
#   ./benchmark.sh milet-mujoco      ant-goal-4c (5 million frames), hopper-params-4c and walker-params-4c (1 million)
# SLURM=1 submits each run as a job instead of running them one after the other.
set -euo pipefail
cd "$(dirname "$0")"

run() { if [ "${SLURM:-}" ]; then sbatch --cpus-per-task=2 --wrap "$*"; else "$@"; fi; }

case "${1:-}" in
  speed) python results/speed.py ;;
  milet-point)
    for seed in 0 1 2; do run python algos/milet.py --env point-goal-4c --seed "$seed" --run-dir runs/point; done
    [ "${SLURM:-}" ] || python results/plot.py runs/point/* --out runs/point-figures
    ;;
  milet-mujoco)
    run python algos/milet.py --env ant-goal-4c --frames 5000000
    run python algos/milet.py --env hopper-params-4c --frames 1000000
    run python algos/milet.py --env walker-params-4c --frames 1000000
    ;;
  *) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
