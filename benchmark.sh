#!/usr/bin/env bash
# Reruns what the documentation reports. For Linux: setsid, flock, Bash 4.
#   ./benchmark.sh                        the list of campaigns
#   ./benchmark.sh CAMPAIGN [-j N]        its runs, N at a time (default 1), then its figures, all in runs/CAMPAIGN/
#   ./benchmark.sh CAMPAIGN -n            only the commands
#   ./benchmark.sh CAMPAIGN -- FLAGS      a trial: FLAGS go to every run, in runs/CAMPAIGN--FLAGS/
#   SLURM=1 ./benchmark.sh CAMPAIGN       every run is a Slurm job; the figures are jobs that wait for them
# The same command again continues what is unfinished and leaves what is finished. Ctrl-C, SIGTERM or a closed terminal
# lets the runs save. If a run fails, the others save and stop, and no figure is drawn.
# CPUS=1: cores of a run (more may change the last digits). TIME=4:00:00, MEM=8G: limits of a job, whose
# run finishes its iteration and saves when it is preempted, or LEAD=600 seconds before its time is over (TIME must be
# much longer); then the job queues again. sbatch also reads its own variables: SBATCH_PARTITION and others. (Tried:
# `scontrol requeue` on a Slurm of one node, with the same results; the end of a job's time only with stand-ins for
# Slurm's commands.)
set -euo pipefail
shopt -s nullglob # a method that has no stored run on an environment is not in its figure

# campaign NAME TIME WHAT         what follows is its; TIME is that of all its runs, one after the other, on one core
# run NAME... FLAGS...            NAME, of the run and its folder, is ENV__SCRIPT__SEED or ENV__SCRIPT__SEED__VARIANT
# figure NAME RUN... STORED...    into figures/NAME/; no RUN: all on the environment NAME; STORED: folders with a slash
campaigns() {
  campaign milet-point '30 minutes' 'MILET on point-goal-4c, 3 seeds'
  run point-goal-4c__milet__{0,1,2}
  figure point-goal-4c

  campaign belief-point '1.5 hours' 'MILET, VariBAD, RL2, an oracle and the stored PEARL on point-goal-4c, 3 seeds each'
  run point-goal-4c__{milet,varibad,rl2}__{0,1,2}
  run point-goal-4c__varibad__{0,1,2}__oracle --oracle
  figure point-goal-4c results/pearl/point-goal-4c__pearl__{0,1,2}

  campaign ant '18 hours' 'MILET, VariBAD, RL2 and an oracle on ant-goal-4c, 3 seeds and 10 million frames each'
  run ant-goal-4c__{milet,varibad,rl2}__{0,1,2}
  run ant-goal-4c__varibad__{0,1,2}__oracle --oracle
  figure ant-goal-4c

  campaign milet-studies '5 hours' "MILET's ablations and 2 to 10 clusters on point-goal-4c, 3 seeds each"
  for part in exploration stacked-gru consistency r-h r-c; do
    run point-goal-4c__milet__{0,1,2}__no-"$part" --no-"$part"
  done
  for n in 2 4 6 8 10; do run point-goal-4c__milet__{0,1,2}__clusters-"$n" --clusters "$n"; done
  figure ablations point-goal-4c__milet__{0,1,2}__{clusters-4,no-exploration,no-stacked-gru,no-consistency}
  figure bonuses point-goal-4c__milet__{0,1,2}__{clusters-4,no-exploration,no-r-h,no-r-c}
  figure clusters point-goal-4c__milet__{0,1,2}__clusters-{2,4,6,8,10}

  campaign milet-ant-studies '28 hours' "MILET's ablations on ant-goal-4c, and 2 to 10 clusters there and on ant-goal-u, 1 seed"
  for part in exploration stacked-gru consistency r-h r-c; do run ant-goal-4c__milet__0__no-"$part" --no-"$part"; done
  for n in 2 4 6 8 10; do run ant-goal-{4c,u}__milet__0__clusters-"$n" --clusters "$n"; done
  figure ablations ant-goal-4c__milet__0__{clusters-4,no-exploration,no-stacked-gru,no-consistency,no-r-h,no-r-c}
  for env in ant-goal-{4c,u}; do figure "clusters-$env" "$env"__milet__0__clusters-{2,4,6,8,10}; done

  campaign milet-ant-paper '5.5 hours' 'MILET on ant-goal-4c at the published setting, 50 million frames'
  run ant-goal-4c__milet__0 --preset paper
  figure ant-goal-4c

  campaign milet-mujoco '25 hours' 'MILET on the humanoid (2 million frames, beside VariBAD, RL2 and an oracle, and the official 30), and on the ant with sparse rewards (beside VariBAD) or uniform goals'
  run {humanoid-dir-4c,ant-goal-partial-4c,ant-goal-u}__milet__0 ant-goal-partial-4c__varibad__0
  run humanoid-dir-4c__milet__0__paper --preset paper
  run humanoid-dir-4c__{varibad,rl2}__0
  run humanoid-dir-4c__varibad__0__oracle --oracle
  for env in humanoid-dir-4c ant-goal-{partial-4c,u}; do figure "$env"; done

  campaign milet-tenth '45 minutes' 'published settings, a tenth of the frames: MILET on ant, hopper, walker, others on hopper'
  run ant-goal-4c__milet__0 --preset paper --frames 5000000
  run {hopper,walker}-params-4c__milet__0 hopper-params-4c__{varibad,rl2}__0 --preset paper --frames 1000000
  for env in {ant-goal,hopper-params,walker-params}-4c; do figure "$env"; done

  campaign belief-params '4 hours' 'MILET, VariBAD, RL2 and an oracle on hopper and walker, 2.5 million frames each'
  run {hopper,walker}-params-4c__{milet,varibad}__0
  run {hopper,walker}-params-4c__varibad__0__oracle --oracle
  run {hopper,walker}-params-4c__rl2__0 --frames 2500000
  for env in {hopper,walker}-params-4c; do figure "$env"; done

  campaign belief-cheetah '40 minutes' 'RL2 and VariBAD on cheetah-dir, beside the stored PEARL'
  run cheetah-dir__{rl2,varibad}__0 --frames 5000000
  figure cheetah-dir results/pearl/cheetah-dir__*__0

  campaign maml '5 hours' 'MAML on cheetah-dir (two inner losses, 3 seeds each, and a looser KL), cheetah-vel and ant-dir'
  run cheetah-dir__maml__{0,1,2} cheetah-vel__maml__0
  run cheetah-dir__maml__{0,1,2}__ratio --inner-loss likelihood-ratio
  run cheetah-dir__maml__0__kl-slack --kl-slack 0.1 --iterations 50
  run ant-dir__maml__0 --iterations 100
  figure cheetah-dir cheetah-dir__maml__{0,1,2}{,__ratio}
  for env in cheetah-vel ant-dir; do figure "$env"; done

  campaign maml-mixed '80 minutes' 'MAML and Multi-MAML on ant-cheetah-dir, 16 million frames each'
  run ant-cheetah-dir__maml__0 --iterations 100
  run ant-cheetah-dir__maml__0__oracle --iterations 100 --oracle
  figure ant-cheetah-dir

  campaign rmaml '7 hours' 'RMAML on cheetah-vel-noise (its parts too, and MAML, 2 seeds each), cheetah-vel, and its toy'
  run cheetah-vel-noise__{maml,rmaml}__{0,1}
  run cheetah-vel-noise__rmaml__{0,1}__alpha --strategy uniform
  run cheetah-vel-noise__rmaml__{0,1}__buffer --alpha-init 0.1 --alpha-0 0
  run cheetah-vel__rmaml__0
  for rates in layer parameter; do run cheetah-vel__rmaml__0__"$rates" --rates "$rates"; done
  figure cheetah-vel-noise
  figure cheetah-vel results/maml/cheetah-vel__*
  run reaching-2d__rmaml_reaching__{0,1,2}
  run reaching-2d__rmaml_reaching__0__half --max-share 0.5
  run reaching-2d__rmaml_reaching__0__quarter --max-share 0.25
  figure reaching reaching-2d__rmaml_reaching__0

  campaign rmaml-quarter '3 hours' 'RMAML, its parts, MAML and two by the ratio on cheetah-vel-noise, a quarter of the default frames'
  small='--tasks 20 --rollouts 10 --iterations 200'
  run cheetah-vel-noise__{maml,rmaml}__{0,1}__quarter $small
  run cheetah-vel-noise__rmaml__{0,1}__quarter-alpha $small --strategy uniform
  run cheetah-vel-noise__rmaml__{0,1}__quarter-buffer $small --alpha-init 0.1 --alpha-0 0
  run cheetah-vel-noise__{maml,rmaml}__0__quarter-ratio $small --inner-loss likelihood-ratio
  figure cheetah-vel-noise

  campaign hom '4 hours' 'HoM (and its other embeddings), MAML and Multi-MAML on ml2, 3 seeds each; five times as long'
  run ml2__maml__{0,1,2} --tasks 20 --rollouts 10 --iterations 41
  run ml2__maml__{0,1,2}__oracle --tasks 20 --rollouts 10 --iterations 41 --oracle
  run ml2__maml__0__ratio --tasks 20 --rollouts 10 --iterations 41 --inner-loss likelihood-ratio
  run ml2__maml__0__oracle-ratio --tasks 20 --rollouts 10 --iterations 41 --oracle --inner-loss likelihood-ratio
  run ml2__hom__{0,1,2}
  for kind in last-layer full state-next-state gradient; do
    run ml2__hom__{0,1,2}__"$kind" --embedding "$kind" --iterations 12
  done
  for kind in last-layer full state-next-state gradient; do figure "$kind" ml2__hom__0__"$kind"; done
  figure ml2 ml2__maml__{0,1,2} ml2__maml__{0,1,2}__oracle ml2__hom__{0,1,2}
  run ml2__hom__0__long --iterations 200
  run ml2__maml__0__long --tasks 20 --rollouts 10 --iterations 201
  run ml2__maml__0__oracle-long --tasks 20 --rollouts 10 --iterations 201 --oracle
  figure ml2-long ml2__{hom__0__long,maml__0__long,maml__0__oracle-long}

  campaign mmaml-point '2 hours' 'MMAML, ProMP and Multi-ProMP on the point with 2, 4, 6 modes, 3 seeds each; ProMP with ten times α'
  run point-{2m,4m,6m}__mmaml__{0,1,2}
  run point-{2m,4m,6m}__mmaml__{0,1,2}__promp --modulation none
  run point-{2m,4m,6m}__mmaml__{0,1,2}__multi --modulation none --oracle
  run point-{2m,4m,6m}__mmaml__0__promp-0.1 --modulation none --alpha 0.1
  for env in point-{2m,4m,6m}; do figure "$env"; done

  campaign mmaml-variants '35 minutes' "MMAML on point-4m with the other operators, τ in the first step too, the official code's encoder; six modes at radius 7"
  for operator in film softmax sigmoid; do run point-4m__mmaml__0__"$operator" --modulation "$operator"; done
  run point-4m__mmaml__0__first-step --modulate-first-step
  run point-4m__mmaml__0__bug --encoder-official-bug
  figure point-4m
  small='--tasks 12 --rollouts 10 --iterations 300 --alpha 0.01 --lr 5e-4' # as the fast preset of point-6m
  run point-6m-far__mmaml__0 $small
  run point-6m-far__mmaml__0__promp $small --modulation none
  run point-6m-far__mmaml__0__multi $small --modulation none --oracle
  figure point-6m-far

  campaign mmaml-table-3 '18 hours' 'MMAML, ProMP and Multi-ProMP on the point, published setting, Table 3; ProMP with one mode too'
  run point-1m__mmaml__{0,1,2}__paper-promp --preset paper --modulation none
  run point-{2m,4m,6m}__mmaml__{0,1,2}__paper --preset paper
  run point-{2m,4m,6m}__mmaml__{0,1,2}__paper-promp --preset paper --modulation none
  run point-{2m,4m}__mmaml__{0,1,2}__paper-multi --preset paper --modulation none --oracle
  run point-6m__mmaml__{0,1,2}__paper-multi --preset paper --modulation none --oracle --tasks 42
  for env in point-{2m,4m,6m}; do figure "$env"; done
  figure point-2m-mmaml point-2m__mmaml__0__paper

  campaign mmaml-quarter '4 hours' 'MMAML (two α, two rates of Adam), ProMP (four, two) and Multi-ProMP on the point, a quarter of the published frames'
  small='--preset paper --tasks 20 --rollouts 10'
  run point-2m__mmaml__{0,1}__quarter $small
  run point-2m__mmaml__{0,1}__quarter-promp $small --modulation none
  run point-2m__mmaml__{0,1}__quarter-0.1 $small --alpha 0.1
  run point-2m__mmaml__{0,1}__quarter-promp-0.1 $small --modulation none --alpha 0.1
  for alpha in 0.3 1; do run point-2m__mmaml__0__quarter-promp-$alpha $small --modulation none --alpha $alpha; done
  run point-2m__mmaml__{0,1}__quarter-lr $small --lr 5e-4
  run point-2m__mmaml__0__quarter-promp-lr $small --modulation none --lr 5e-4
  run point-2m__mmaml__0__quarter-promp-lr-0.1 $small --modulation none --lr 5e-4 --alpha 0.1
  run point-{4m,6m}__mmaml__0__quarter $small
  run point-{4m,6m}__mmaml__0__quarter-promp $small --modulation none
  run point-{2m,4m}__mmaml__0__quarter-multi $small --modulation none --oracle
  for env in point-{2m,4m,6m}; do figure "$env"; done

  campaign mmaml-robots '4 hours' 'MMAML, ProMP and Multi-ProMP on the reacher with 4 modes, 3 seeds, and on the ant, 1 seed, a share of the frames'
  small='--tasks 12 --rollouts 10 --iterations 300'
  run reacher-4m__mmaml__{0,1,2}__share $small
  run reacher-4m__mmaml__{0,1,2}__share-promp $small --modulation none
  run reacher-4m__mmaml__{0,1,2}__share-multi $small --modulation none --oracle
  small='--tasks 12 --rollouts 8 --iterations 100'
  run ant-4m__mmaml__0__share $small
  run ant-4m__mmaml__0__share-promp $small --modulation none
  run ant-4m__mmaml__0__share-multi $small --modulation none --oracle
  small='--tasks 12 --rollouts 8 --iterations 500 --eval-every 50'
  run ant-4m__mmaml__0__long $small
  run ant-4m__mmaml__0__long-promp $small --modulation none
  for env in reacher-4m ant-4m; do figure "$env"; done

  campaign mmaml-regression '33 hours' "MMAML's Table 1: functions of 2, 3 and 5 families, six methods, 70,000 iterations each"
  run functions-{2m,3m,5m}__mmaml_regression__0
  for operator in softmax sigmoid; do
    run functions-{2m,3m,5m}__mmaml_regression__0__"$operator" --modulation "$operator"
  done
  run functions-{2m,3m,5m}__mmaml_regression__0__lstm --inner-steps 0
  run functions-{2m,3m,5m}__mmaml_regression__0__maml --modulation none
  run functions-{2m,3m,5m}__mmaml_regression__0__maml-clamped --modulation none --inner-clip 10
  run functions-{2m,3m,5m}__mmaml_regression__0__multi --modulation none --oracle --inner-clip 10 # without, it overflows
  for env in functions-{2m,3m,5m}; do
    figure "$env"
    figure "$env"-film "$env"__mmaml_regression__0
  done

  campaign mmaml-drawn '2 hours' 'MMAML, MAML, Multi-MAML on images that need no data, 3 seeds each, with and without a clip; softmax'
  run drawn-3m__mmaml_classification__{0,1,2}
  run drawn-3m__mmaml_classification__0__softmax --modulation softmax
  run drawn-3m__mmaml_classification__{0,1,2}__maml --modulation none
  run drawn-3m__mmaml_classification__{0,1,2}__multi --modulation none --oracle
  run drawn-3m__mmaml_classification__{0,1,2}__no-clip --outer-clip 0
  run drawn-3m__mmaml_classification__{0,1,2}__maml-no-clip --modulation none --outer-clip 0
  run drawn-3m__mmaml_classification__0__multi-no-clip --modulation none --oracle --outer-clip 0
  figure drawn-3m
  figure drawn-3m-film drawn-3m__mmaml_classification__0

  campaign cml '19 hours' 'CML on ant-cheetah-dir: two beginnings, 2 seeds, beside MAML; Sec. 5.2.1, 5.2.2; FCML'
  run ant-cheetah-dir__cml__{0,1}
  run ant-cheetah-dir__cml__0__task-specific --init task-specific
  run ant-cheetah-dir__maml__0 --iterations 200
  run ant-cheetah-dir__maml__0__oracle --iterations 200 --oracle
  run ant-cheetah-dir__fcml__0 --warmup 60
  figure ant-cheetah-dir
  run ant-cheetah-dir__cml__0__warmup --oracle-warmup 100 --iterations 110
  for first in 0 1; do
    run ant-cheetah-dir__cml__0__switch-"$first" --learners 1 --switch-at 200 --first-cluster "$first" --iterations 400
  done
  figure warmup ant-cheetah-dir__cml__0__warmup
  figure switch ant-cheetah-dir__cml__0__switch-{0,1}

  campaign cml-half '8 hours' 'CML (two beginnings) and FCML on ant-cheetah-dir, 20 tasks an iteration, beside the stored MAML and Multi-MAML'
  run ant-cheetah-dir__cml__{0,1}__half --tasks 20 --iterations 100
  run ant-cheetah-dir__cml__0__half-task-specific --tasks 20 --iterations 100 --init task-specific
  run ant-cheetah-dir__fcml__0__half --tasks 20 --iterations 100 --warmup 30
  figure ant-cheetah-dir results/maml/ant-cheetah-dir__maml__0{,__oracle}
  run ant-cheetah-dir__cml__0__warmup-half --tasks 20 --iterations 55 --oracle-warmup 50
  figure warmup ant-cheetah-dir__cml__0__warmup-half

  campaign gradient-point '1 hour' 'MAML, Multi-MAML, ProMP, HoM, CML and FCML (four ε) on point-goal-4c, small batches'
  small='--tasks 20 --rollouts 10 --iterations 100'
  run point-goal-4c__maml__{0,1,2}__small $small
  run point-goal-4c__maml__{0,1,2}__small-oracle $small --oracle
  run point-goal-4c__promp__0__small $small
  run point-goal-4c__hom__0__small $small --clusters 4 --embedding gradient
  run point-goal-4c__hom__{0,1,2}__small-centred $small --clusters 4 --embedding gradient --centre
  run point-goal-4c__cml__0__small $small --learners 4
  for e in 0.05 0.1 0.2 0.5; do run point-goal-4c__fcml__0__small-"$e" $small --epsilon "$e"; done
  figure point-goal-4c

  campaign promp '30 minutes' 'ProMP on cheetah-dir, 2 seeds, 16 million frames each, beside the stored MAML'
  run cheetah-dir__promp__{0,1} --iterations 100
  figure cheetah-dir results/maml/cheetah-dir__maml__{0,1}

  campaign pearl-point '2 hours' 'PEARL on point-goal-4c, 3 seeds, and with 100 training tasks, 20 or 100 visits an iteration, 1 seed'
  run point-goal-4c__pearl__{0,1,2}
  run point-goal-4c__pearl__0__100-tasks --train-tasks 100 --visits 20
  run point-goal-4c__pearl__0__visits --train-tasks 100 --visits 100 --iterations 40
  figure point-goal-4c

  campaign pearl-mujoco '3.5 hours' 'PEARL on cheetah-dir, 60 iterations, and on hopper-params-4c, 24 shorter ones'
  run cheetah-dir__pearl__0 --iterations 60 --eval-every 2
  run hopper-params-4c__pearl__0 --iterations 24 --gradient-steps 500 --eval-every 4
  for env in cheetah-dir hopper-params-4c; do figure "$env"; done

  campaign sop '13 hours' 'SoP, an oracle and PEARL on ml2, a third of the default budget; its embeddings by an early probe'
  run ml2__sop__0 --iterations 50 --probe-iterations 17
  run ml2__sop__0__early --iterations 2 --probe-iterations 1
  run ml2__sop__0__oracle --iterations 33 --oracle --eval-episodes 2 --eval-prior-episodes 1
  run ml2__pearl__0 --iterations 53
  figure ml2 ml2__{sop__0,sop__0__oracle,pearl__0}
  figure embeddings ml2__sop__0
  figure embeddings-early ml2__sop__0__early

  campaign sparse-point '7 hours' 'MetaCURE, MILET, VariBAD, RL2 and PEARL on point-goal-sparse, 3 seeds each, and variants of three of them'
  run point-goal-sparse__{metacure,milet,varibad,rl2,pearl}__{0,1,2}
  run point-goal-sparse__metacure__{0,1}__40-tasks --train-tasks 40 --initial-trials 20
  run point-goal-sparse__metacure__{0,1}__no-bonus --intrinsic-weight 0
  run point-goal-sparse__pearl__{0,1,2}__eight --prior-steps 256 --extra-steps 96
  run point-goal-sparse__pearl__{0,1}__40-tasks --train-tasks 40 --initial-steps 704 --prior-steps 256 --extra-steps 96
  run point-goal-sparse__rl2__0__cut --cut-episodes
  figure point-goal-sparse point-goal-sparse__{rl2,varibad,milet,metacure,pearl}__{0,1,2}

  campaign metacure-point '35 minutes' 'MetaCURE on point-goal-4c, small networks, 20,000 gradient steps'
  run point-goal-4c__metacure__0__20k --iterations 100 --eval-every 5 --visits 20 --trials 2 --prior-steps 100 \
    --posterior-steps 200 --gradient-steps 200 --refresh 1 --encoder-hidden 32 --hidden 64 64 --id-hidden 64 64 \
    --meta-batch 8 --gamma 0.9 --reward-scale 20 --tau 0.01 --lr 2e-3 --initial-trials 1 --initial-steps 100
  figure point-goal-4c results/pearl/point-goal-4c__pearl__{0,1,2}

  campaign metacure '2.5 hours' 'MetaCURE on the sparse half-cheetah, 30 iterations'
  run cheetah-vel-sparse__metacure__0 --iterations 30
  figure cheetah-vel-sparse

  campaign short '85 minutes' 'the short runs that the pages report, 1 or 2 seeds'
  run ml2__hom__0
  run ml2__maml__0 --tasks 20 --rollouts 10 --iterations 41
  run ml2__cml__0 --tasks 20 --rollouts 10 --iterations 40
  run cheetah-vel-noise__{maml,rmaml}__0__small --tasks 20 --rollouts 10 --iterations 40
  run cheetah-vel-noise__rmaml__0__small-alpha --tasks 20 --rollouts 10 --iterations 40 --strategy uniform
  run cheetah-vel-noise__rmaml__0__small-buffer --tasks 20 --rollouts 10 --iterations 40 --alpha-init 0.1 --alpha-0 0
  run cheetah-vel-noise__rmaml__0__small-fixed --tasks 20 --rollouts 10 --iterations 40 --alpha-init 0.33 --alpha-0 0 --strategy uniform
  run functions-5m__mmaml_regression__0__small --iterations 400 --eval-every 200
  run functions-5m__mmaml_regression__0__small-maml --iterations 400 --eval-every 200 --modulation none
  run ml2__sop__{0,1}__short --iterations 12 --probe-iterations 4 --gradient-steps 500 --initial-steps 1000 --eval-every 1
  run ml2__sop__0__short-early --iterations 2 --probe-iterations 1 --gradient-steps 500 --initial-steps 1000 --eval-every 1
  figure ml2 ml2__{hom,maml,cml}__0
  figure embeddings ml2__sop__0__short
  figure embeddings-early ml2__sop__0__short-early

  campaign point-variants '80 minutes' 'MILET and VariBAD on point-goal-4c with other settings, 3 seeds each'
  run point-goal-4c__{milet,varibad}__{0,1,2}__anneal-vae --anneal-vae
  run point-goal-4c__milet__{0,1,2}__std --init-std 0.5
  figure point-goal-4c

  campaign figures '2 minutes' 'the learning curves of the pages, from the stored CSVs, into results/figures/ too'
  figure point_all results/{milet,rl2,varibad,pearl}/point-goal-4c__*__{0,1,2} results/varibad/point-goal-4c__varibad__{0,1,2}__oracle \
    results/metacure/point-goal-4c__metacure__0__20k
  figure partial_all results/{milet,varibad}/ant-goal-partial-4c__*__0
  figure ant_all results/milet/ant-goal-4c__milet__{0,1,2}__fast results/varibad/ant-goal-4c__* results/rl2/ant-goal-4c__rl2__0__stopped
  figure walker_all results/{milet,varibad}/walker-params-4c__*__0__fast results/varibad/walker-params-4c__varibad__0__oracle \
    results/rl2/walker-params-4c__rl2__0
  figure hopper_all results/{milet,varibad,rl2}/hopper-params-4c__*__0
  figure cheetah_all results/{varibad,rl2,pearl}/cheetah-dir__*__0
  figure sparse_all results/{rl2,varibad,milet,metacure,pearl}/point-goal-sparse__*__{0,1,2}
  figure milet_point_curve results/milet/point-goal-4c__milet__{0,1,2}
  figure milet_ant_curve results/milet/ant-goal-4c__milet__{0,1,2}__fast results/varibad/ant-goal-4c__varibad__{0,1,2}__oracle
  figure milet_clusters_curve results/milet/point-goal-4c__milet__{0,1,2,*__clusters-2,*__clusters-6,*__clusters-8,*__clusters-10}
  figure milet_humanoid_curve results/{milet,varibad,rl2}/humanoid-dir-4c__*__0 results/varibad/humanoid-dir-4c__varibad__0__oracle
  figure cml_mixed_curve results/cml/ant-cheetah-dir__cml__{0__half,1__half,0__half-task-specific} \
    results/fcml/ant-cheetah-dir__fcml__0__half results/maml/ant-cheetah-dir__maml__0{,__oracle}
  figure cml_point_curve results/maml/point-goal-4c__maml__{0,1,2}__small{,-oracle} results/{cml,hom,promp}/point-goal-4c__*
  figure cml_ml2_curve results/cml/ml2__cml__0 results/hom/ml2__hom__{0,1,2} results/maml/ml2__maml__{0,1,2}{,__oracle}
  figure fcml_point_curve results/fcml/point-goal-4c__fcml__0__small-{0.05,0.1,0.2,0.5} results/cml/point-goal-4c__cml__0__small
  figure maml_mixed_curve results/maml/ant-cheetah-dir__maml__0{,__oracle}
  figure maml_cheetah_curve results/maml/cheetah-dir__maml__{0,1,1__ratio}
  figure maml_ant_curve results/maml/ant-dir__maml__0
  figure maml_vel_curve results/maml/cheetah-vel__maml__0
  figure maml_inner_loss results/maml/cheetah-dir__maml__0__from-70-{control,damping,ratio}
  figure promp_cheetah_curve results/promp/cheetah-dir__promp__{0,1} results/maml/cheetah-dir__maml__{0,1}
  figure rmaml_curve results/rmaml/cheetah-vel-noise__rmaml__{0,1}__quarter{,-alpha,-buffer} \
    results/maml/cheetah-vel-noise__maml__{0,1}__quarter
  for modes in 2 4 6; do figure "mmaml_point${modes}_curve" results/mmaml/point-"$modes"m__mmaml__{0,1,2}{,__promp,__multi}; done
  figure mmaml_quarter_curve results/mmaml/point-2m__mmaml__{0,1}__quarter{,-0.1,-lr} \
    results/mmaml/point-2m__mmaml__{0,1}__quarter-promp{,-0.1} results/mmaml/point-2m__mmaml__0__quarter-{promp-1,promp-lr-0.1,multi}
  figure mmaml_paper_curve results/mmaml/point-2m__mmaml__{0__paper,1__paper,0__paper-promp}
  figure mmaml_ant_curve results/mmaml/ant-4m__mmaml__0__{long,long-promp,share-multi}
  figure mmaml_two_families_errors results/mmaml_regression/functions-2m__mmaml_regression__0{,__lstm,__maml-clamped}
  figure mmaml_regression_errors \
    results/mmaml_regression/functions-5m__mmaml_regression__0__5k{,-maml,-multi-stopped,-multi-clamped,-lstm}
  figure mmaml_drawn_accuracy results/mmaml_classification/drawn-3m__mmaml_classification__{0,1,2}{,__maml,__multi}
  figure metacure_point_curve results/metacure/point-goal-sparse__metacure__{0,1,2}
  figure pearl_point_curve results/pearl/point-goal-4c__pearl__{0,1,2,0__100-tasks}
  figure pearl_cheetah_curve results/pearl/cheetah-dir__pearl__0

  campaign speed '50 minutes' 'physics limits, and the share that the scripts reach, into runs/speed.csv (all cores)'
  after speed python results/speed.py
}

# == How they are run ==
jobs=1 chosen='' current='' only='' dry='' needs=''
declare -a campaigns=() extra=() drawn=() names=() ids=() running=() # from drawn on of the chosen one; running: name by process
declare -A count=() about=()
export CPUS=${CPUS:-1}

campaign() { current=$1 campaigns+=("$1") count[$1]=0 about[$1]=$(printf '%-12s %s' "$2" "$3"); }

run() {
  local each=() name env script seed
  while [[ ${1:---} != --* ]]; do each+=("$1"); shift; done
  count[$current]=$((count[$current] + ${#each[@]}))
  [ "$current" = "$chosen" ] || return 0
  for name in "${each[@]}"; do
    names+=("$name")
    read -r env script seed _ <<< "${name//__/ }"
    start "$name" python "algos/$script.py" --env "$env" --seed "$seed" "$@" "${extra[@]}" \
      --num-threads "$CPUS" --run-dir "$folder" --name "$name"
  done
}

figure() {
  local name runs=() stored=()
  for name in "${@:2}"; do if [[ $name = */* ]]; then stored+=("$name"); else runs+=("$name"); fi; done
  if [ ${#runs[@]} = 0 ]; then for name in "${names[@]}"; do [[ $name != "$1"__* ]] || runs+=("$name"); done; fi
  [ ${#extra[@]} = 0 ] || stored=() # a trial has nothing to be compared with
  [ "$current" != "$chosen" ] || drawn+=("$1")
  after "figure-$1" python results/plot.py "${runs[@]/#/$folder/}" "${stored[@]}" --out "$folder/figures/$1"
}

after() { # NAME COMMAND...: when all that was started has ended well
  [ "$current" = "$chosen" ] || return 0
  finish
  [ ${#ids[@]} = 0 ] || needs=,afterok:$(IFS=: && echo "${ids[*]}")
  start "$@"
  needs=''
}

start() { # NAME COMMAND...: in the background, as soon as fewer than N run; or as a job; its output goes to NAME.log
  local log=$folder/$1.log
  if [ "${only:-$1}" != "$1" ]; then return; fi
  if [ "$dry" ]; then echo "${@:2}"; return; fi
  mkdir -p "$folder"
  if [ "${SLURM:-}" ] && [ ! "$only" ]; then submit "$1" "$log"; return; fi
  while [ ${#running[@]} -ge "$jobs" ]; do pause; reap; done
  [ "$only" ] || echo "$1 -> $log"
  # One at a time on a log, should an older one still run; off the terminal, so that Ctrl-C comes once, from stop
  (flock 1 && exec setsid "${@:2}") >> "$log" 2>&1 < /dev/null &
  running[$!]=$1
}

pause() { sleep 0.2 || true; } # a signal may end it

finish() { while [ ${#running[@]} -gt 0 ]; do pause; reap; done; }

reap() { # forget what has ended; stop at a failure
  local pid name code
  for pid in "${!running[@]}"; do
    if kill -0 "$pid" 2> /dev/null; then continue; fi
    name=${running[$pid]} code=0
    unset "running[$pid]"
    wait "$pid" || code=$?
    if [ $code = 0 ]; then continue; fi
    [ "$only" ] || printf '%s failed, status %s. The last lines of %s:\n%s\n' "$name" "$code" "$folder/$name.log" \
      "$(tail -n 12 "$folder/$name.log")" >&2
    stop $code
  done
}

stop() { # STATUS: what runs finishes its iteration and saves (at a second signal: ends at once)
  local pid
  for pid in "${!running[@]}"; do kill -TERM "$pid" 2> /dev/null || true; done
  for pid in "${!running[@]}"; do while kill -0 "$pid" 2> /dev/null; do pause; done; done
  if [ "$only" ] && [ "$1" = 143 ] && [ "$(squeue -h -j "${SLURM_JOB_ID:-0}" -o %T)" = RUNNING ]; then
    scontrol requeue "$SLURM_JOB_ID" # its time is over, but it was not cancelled
  fi
  exit "$1"
}

submit() { # NAME LOG: this script with --only NAME, as a job; never two of one name at a time
  local id
  id=$(sbatch --parsable --job-name="${folder#runs/}/$1" --output="$2" --open-mode=append --requeue \
    --signal=B:TERM@"${LEAD:-600}" --time="${TIME:-4:00:00}" --cpus-per-task="$CPUS" --mem="${MEM:-8G}" \
    --dependency="singleton$needs" --kill-on-invalid-dep=yes \
    --wrap="$(printf '%q ' exec ./benchmark.sh "$chosen" --only "$1" -- "${extra[@]}")")
  ids+=("${id%;*}")
  echo "job ${ids[-1]}: $1 -> $2"
}

publish() { # what the campaign figures drew goes where the pages show it: pooled curves; of some, those of clusters
  local name
  for name in "${drawn[@]}"; do cp "$folder/figures/$name/learning_curve.png" "results/figures/$name.png"; done
  for name in maml_inner_loss:maml_inner_loss maml_mixed_curve:maml_mixed_robots \
    maml_cheetah_curve:maml_cheetah_directions promp_cheetah_curve:promp_cheetah_directions \
    pearl_cheetah_curve:pearl_cheetah_directions; do
    cp "$folder/figures/${name%:*}/learning_curve_clusters.png" "results/figures/${name#*:}.png"
  done
}

fail() { echo "benchmark.sh: $*" >&2 && exit 2; }

main() {
  cd "$(dirname "$0")"
  while [ $# -gt 0 ]; do
    case $1 in
      -j) jobs=${2:-} && set -- "${@:2}" ;;
      -n) dry=yes ;;
      -h | --help) chosen='' && break ;; # the list
      --only) only=$2 && set -- "${@:2}" ;; # in a job: this run, or this figure, and nothing else
      --) extra=("${@:2}") && break ;;
      -*) fail "no option $1; flags of the runs stand after --" ;;
      *) [ ! "$chosen" ] || fail "one campaign at a time"; chosen=$1 ;;
    esac
    set -- "${@:2}"
  done
  [[ $jobs =~ ^[1-9][0-9]*$ ]] || fail "-j takes a number"
  folder=$(IFS=- && echo "runs/$chosen${extra[*]//[^A-Za-z0-9.-]/-}" | sed 's/---/--/g')
  trap 'stop 129' HUP
  trap 'stop 130' INT
  trap 'stop 143' TERM
  campaigns
  finish
  [ ! "$chosen" ] || [ "${count[$chosen]:-}" ] || fail "no campaign $chosen; ./benchmark.sh lists them"
  if [ "$chosen" = figures ] && [ ! "$dry$only${SLURM:-}" ]; then publish; fi
  [ ! "$chosen" ] || exit 0
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
  printf '\n%-17s %4s  %s\n' CAMPAIGN RUNS 'ONE CORE'
  for name in "${campaigns[@]}"; do printf '%-17s %4s  %s\n' "$name" "${count[$name]}" "${about[$name]}"; done
}

main "$@"; exit
