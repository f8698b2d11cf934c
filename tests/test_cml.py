"""CML: one learner is MAML; who samples and learns what; the clustering score; evaluation without selection bias."""

import csv
from itertools import permutations, product
from pathlib import Path

import cml
import gymnasium as gym
import maml
import numpy as np
import probes  # noqa: F401  (registers them)
import pytest
import torch
from conftest import train

import envs

QUICK = dict(env="point-goal-4c", tasks=8, rollouts=2, horizon=5, iterations=3, hidden=(4,), eval_every=1)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def make(learners: int, tasks=3, env_id="cheetah-vel", **kwargs):
    """A policy, θ of every learner, tasks, and an environment with a copy for every rollout of each in each."""
    args = cml.Args(**(dict(rollouts=2, horizon=4, num_threads=1, hidden=(4,), learners=learners) | kwargs))
    env = gym.make_vec(env_id, num_envs=learners * tasks * args.rollouts, horizon=args.horizon)
    policy = cml.GaussianPolicy(env.single_observation_space.shape[0], env.single_action_space.shape[0], args)
    theta = torch.stack([policy.init(torch.Generator().manual_seed(j)) for j in range(learners)])
    return args, env, env.unwrapped.sample_tasks(tasks, np.random.default_rng(0)), policy, theta


# -- what it has in common with MAML -----------------------------------------------------------------------------------


SHORT_ML2 = dict(env="ml2", inner_steps=2, eval_steps=3, iterations=1, horizon=10)


@pytest.mark.parametrize("more", [dict(), SHORT_ML2, dict(inner_steps=0)])
def test_one_learner_is_maml_to_the_last_digit(tmp_path, more):
    flags = QUICK | more
    runs = [train(maml, **flags, run_dir=str(tmp_path / "maml"))]
    runs += [train(cml, **flags, run_dir=str(tmp_path / "cml"), learners=1)]
    for name in ("eval.csv", "metrics.csv"):
        mamls, ours = rows(runs[0] / name), rows(runs[1] / name)
        shared = [key for key in mamls[0] if not key.startswith(("time/", "charts/sps"))]
        assert [[row[key] for key in shared] for row in mamls] == [[row[key] for key in shared] for row in ours]
    states = [torch.load(run / "checkpoint.pt", weights_only=True) for run in runs]
    assert torch.equal(states[0]["agent"]["theta"], states[1]["agent"]["theta"])
    assert torch.equal(states[0]["run"][2], states[1]["run"][2]), "the random stream"
    assert not torch.equal(states[0]["agent"]["theta"], initial_theta(1, more)), "it has learned something"


def initial_theta(learners: int, more: dict | None = None) -> torch.Tensor:
    args, rng = cml.Args(**(QUICK | (more or {}))), torch.Generator().manual_seed(0)
    env = gym.make_vec(args.env, num_envs=1)
    policy = cml.GaussianPolicy(env.single_observation_space.shape[0], env.single_action_space.shape[0], args)
    return torch.stack([policy.init(rng) for _ in range(learners)])


def test_true_clusters_in_all_iterations_are_multi_maml_on_shared_rollouts(tmp_path, monkeypatch):
    """Every learner steps as MAML's would, from its own rows of what all sampled."""
    steps, samples, scores, trpo_step, collect, assign = [], [], [], cml.trpo_step, cml.collect, cml.assign
    monkeypatch.setattr(cml, "assign", lambda score, *a: scores.append(score) or assign(score, *a))
    monkeypatch.setattr(cml, "trpo_step", lambda p, t, *a: steps.append((p, t.clone(), *a)) or trpo_step(p, t, *a))
    monkeypatch.setattr(
        cml, "collect", lambda env, tasks, *a: samples.append((tasks, collect(env, tasks, *a))) or samples[-1][1]
    )
    run = train(cml, **(QUICK | dict(iterations=1, seed=1)), learners=4, oracle_warmup=1, run_dir=str(tmp_path))
    tasks, data = samples[2]  # after the two of the first evaluation
    (row,) = rows(run / "metrics.csv")
    assert int(row["charts/frames"]) == sum(int(b.taken.sum()) for b in data) == 4 * 8 * 2 * 5 * 2, "all learners count"
    np.testing.assert_allclose(scores[0], data[-1].reward.sum(-1).mean(1).view(4, 8).numpy(), rtol=1e-5)
    wins = np.bincount(scores[0].argmax(0), minlength=4)
    assert [int(row[f"cml/tasks_{j}"]) for j in range(4)] == wins.tolist() != wins[::-1].tolist(), "not the oracle's"
    saved, kls = torch.load(run / "agent.pt", weights_only=True)["agent"]["theta"], []
    args = cml.Args(**QUICK)
    for j, (policy, theta, mine, alpha, _) in enumerate(steps):
        own = [n for n in range(32) if n // 8 == j and tasks.cluster[n] == j]  # learner by learner, eight tasks each
        assert len(own) == 2
        for batch, everything in zip(mine, data):
            assert torch.equal(batch.obs, everything.obs[own]) and torch.equal(batch.reward, everything.reward[own])
        mamls = [maml.Batch(*batch) for batch in mine]
        new, stats = maml.trpo_step(policy, theta, mamls, alpha, maml.Args(hidden=args.hidden))
        assert torch.equal(saved[j], new)
        kls.append(stats["trpo/kl"])
    assert len(kls) == 4 and float(row["trpo/kl"]) == pytest.approx(np.mean(kls), rel=1e-4)
    of_learners = scores[0][tasks.cluster[:8], np.arange(8)]  # of 8 of the 32 pairs
    assert float(row["train/return_step_1"]) == pytest.approx(of_learners.mean(), rel=1e-5)
    std = policy.log_std(saved).exp()
    assert float(row["policy/std"]) == pytest.approx(std.mean().item(), rel=1e-5) != std[0].mean().item()
    assert float(row["policy/std_min"]) == pytest.approx(std.min().item(), rel=1e-5)


def test_a_learner_without_tasks_is_skipped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(cml, "assign", lambda *_: np.array([2, 0, 2, 0, 0, 0, 0, 2]))
    run = train(cml, **QUICK, learners=3, run_dir=str(tmp_path))
    after = torch.load(run / "agent.pt", weights_only=True)["agent"]["theta"]
    assert (after != initial_theta(3)).any(1).tolist() == [True, False, True]
    assert [row["cml/skipped"] for row in rows(run / "metrics.csv")] == ["1"] * 3


# -- who samples what --------------------------------------------------------------------------------------------------


def test_every_learner_samples_and_adapts_in_every_task_in_one_call(monkeypatch):
    args, env, tasks, policy, theta = make(2)
    calls, collect = [], cml.collect
    monkeypatch.setattr(cml, "collect", lambda *a: calls.append(a) or collect(*a))
    data = cml.collect_all(env, tasks, policy, theta, [0.1, 0.2], torch.Generator().manual_seed(0), args)
    assert len(calls) == 1 and len(data) == 3 and data[0].reward.shape == (6, 2, 4)
    np.testing.assert_array_equal(env.unwrapped.tasks.params[:: args.rollouts], np.tile(tasks.params, (2, 1)))
    for n, (j, i) in enumerate(product(range(2), range(3))):
        theta_k, alone = theta[j : j + 1], [batch.of(slice(n, n + 1)) for batch in data]
        for batch, alpha in zip(alone, (0.1, 0.2, None)):
            torch.testing.assert_close(batch.mean, policy(theta_k, batch.obs)[0])
            theta_k = cml.adapt(policy, theta_k, batch, alpha, args) if alpha else None
        velocity, control = tasks.params[i, 0], (alone[0].action[0, 0] / args.action_scale).clamp(-1, 1)
        twin = gym.make_vec("cheetah-vel", num_envs=1).unwrapped
        twin.reset(seed=0, options={"tasks": tasks[[i]]})
        twin.qpos[0, 1:], twin.qvel[0] = alone[0].obs[0, 0, :8].numpy(), alone[0].obs[0, 0, 8:17].numpy()
        reward = twin.step(control[None].numpy())[1][0]
        assert alone[0].reward[0, 0, 0] == pytest.approx(reward, abs=1e-3), f"the velocity asked for is {velocity}"


def test_scores_and_what_was_sampled_under_the_learner_of_each_task():
    args, env, tasks, policy, theta = make(3, tasks=4, env_id="walker-dir", horizon=30)
    data = cml.collect_all(env, tasks, policy, theta, [0.1], torch.Generator().manual_seed(0), args)
    score = cml.mean_returns(data[-1], 3)
    learner = np.array([2, 0, 0, 1])
    chosen = cml.rollouts_of_learner(learner, data)
    for j, i in product(range(3), range(4)):
        episodes = [sum(data[-1].reward[4 * j + i, k].tolist()) for k in range(2)]
        assert score[j, i] == pytest.approx(np.mean(episodes))
    for batch, everything in zip(chosen, data):
        for i, j in enumerate(learner):
            for x, y in zip(batch, everything):
                assert torch.equal(x[i], y[4 * j + i])
    assert len(np.unique(score)) == 12 and (~data[0].taken).any()


# -- who learns what ---------------------------------------------------------------------------------------------------


def test_a_task_belongs_to_the_learner_with_the_largest_return_after_the_warm_up():
    score = np.array([[1.0, -5, 3, 0], [2, -7, 2, -1], [0, -6, 9, -2]])
    tasks = envs.Tasks(np.zeros((4, 1)), np.array([2, 0, 1, 1]))
    rng = torch.Generator().manual_seed(0)
    before = rng.get_state()
    for iteration, expected in ((1, [2, 0, 1, 1]), (2, [2, 0, 1, 1]), (3, [1, 0, 2, 0])):
        found = cml.assign(score, tasks, iteration, rng, cml.Args(learners=3, oracle_warmup=2))
        assert found.tolist() == expected
    for iteration, expected in ((1, [0, 1, 2, 0]), (5, [0, 1, 2, 0]), (6, [1, 0, 2, 0])):
        found = cml.assign(score, tasks, iteration, rng, cml.Args(learners=3, init="task-specific", pretrain=5))
        assert found.tolist() == expected
    assert cml.assign(score, tasks, 1, rng, cml.Args(learners=3)).tolist() == [1, 0, 2, 0]
    assert torch.equal(rng.get_state(), before), "no random number is drawn"


def test_epsilon_greedy_assignment():
    score, tasks = (
        np.array([[1.0], [0], [0], [0]]).repeat(4000, 1),
        envs.Tasks(np.zeros((4000, 1)), np.zeros(4000, int)),
    )
    args = cml.Args(learners=4, explore=0.4, explore_iterations=2, oracle_warmup=1)
    rng = torch.Generator().manual_seed(0)
    for iteration, expected in ((2, [0.7, 0.1, 0.1, 0.1]), (3, [0.7, 0.1, 0.1, 0.1]), (4, [1, 0, 0, 0])):
        found = np.bincount(cml.assign(score, tasks, iteration, rng, args), minlength=4) / 4000
        np.testing.assert_allclose(found, expected, atol=0.03 if iteration < 4 else 0)


def test_tasks_are_mamls_or_those_of_the_learners_or_of_one_cluster():
    env = gym.make_vec("point-goal-4c", num_envs=1).unwrapped
    draw = lambda iteration, **kwargs: cml.draw_tasks(  # noqa: E731
        env, iteration, torch.Generator().manual_seed(3), cml.Args(tasks=9, **kwargs)
    )
    plain = env.sample_tasks(9, np.random.default_rng(cml.random_seed(torch.Generator().manual_seed(3))))
    np.testing.assert_array_equal(draw(1).params, plain.params)

    first, second, after = (draw(i, init="task-specific", learners=4, pretrain=2) for i in (1, 2, 3))
    np.testing.assert_array_equal(first.params, second.params)
    np.testing.assert_array_equal(first.params[4:8], first.params[:4])
    assert sorted(first.cluster[:4]) == [0, 1, 2, 3] and len(np.unique(first.params[:, 0])) == 4
    np.testing.assert_array_equal(after.params, plain.params)
    other = draw(1, init="task-specific", learners=4, seed=1)
    assert not np.isin(other.params, first.params).any()

    for first_cluster, iteration, expected in ((1, 7, 1), (1, 8, 2), (3, 8, 0)):
        tasks = draw(iteration, switch_at=7, first_cluster=first_cluster)
        assert tasks.cluster.tolist() == [expected] * 9 and len(np.unique(tasks.params[:, 0])) == 9


@pytest.mark.parametrize(
    "flags",
    [
        dict(init="task-specific", learners=4, pretrain=1),
        dict(oracle_warmup=1, learners=4),
        dict(switch_at=1, first_cluster=2, learners=2),
        dict(explore_iterations=2, explore=1.0, learners=3),
    ],
)
def test_whole_runs_with_every_beginning(tmp_path, monkeypatch, flags):
    """Their tables keep their columns, and the first learners are those of the beginning."""
    seen, assign = [], cml.assign
    monkeypatch.setattr(
        cml, "assign", lambda score, tasks, *a: seen.append((score, tasks, assign(score, tasks, *a))) or seen[-1][2]
    )
    run = train(cml, **QUICK, run_dir=str(tmp_path), **flags)
    assert len(rows(run / "metrics.csv")) == 3 and len(rows(run / "eval.csv")) == 4
    (score, tasks, first), (_, second_tasks, _), (last_score, _, last) = seen
    best = score.argmax(0)
    assert (last == last_score.argmax(0)).all() and score.shape == (flags["learners"], 8)
    if "init" in flags:
        assert first.tolist() == [0, 1, 2, 3] * 2 != best.tolist()
    if "oracle_warmup" in flags:
        assert first.tolist() == tasks.cluster.tolist() != best.tolist()
    if "switch_at" in flags:
        assert first.tolist() == best.tolist() and len(set(best)) == 2
        assert set(tasks.cluster) == {2} and set(second_tasks.cluster) == {3}
    if "explore" in flags:
        assert (first != best).any()


# -- scores ------------------------------------------------------------------------------------------------------------


def test_clustering_score_by_hand():
    """Tasks 0-2 of cluster 0, 3-4 of cluster 1; learner 1 wins the first three and the last."""
    score = np.array([[1.0, 2, 3, 9, 5], [4, 4, 4, 4, 6]])
    true = np.array([0, 0, 0, 1, 1])
    found = cml.clustering("x", score, true, 2)
    assert [found[f"x/tasks_{j}"] for j in (0, 1)] == [1, 4]
    assert [found[f"x/tasks_{j}_cluster_{c}"] for j, c in product((0, 1), (0, 1))] == [0, 1, 3, 1]
    assert found["x/margin"] == pytest.approx((3 + 2 + 1 + 5 + 1) / 5)
    assert found["x/margin_cluster_0"] == pytest.approx(2) and found["x/margin_cluster_1"] == pytest.approx(3)
    assert found["x/accuracy"] == pytest.approx(0.8) and found["x/C"] == pytest.approx(2 * abs(4 / 5 - 1 / 2))
    entropy = lambda p: -sum(q * np.log(q) for q in p)  # noqa: E731
    joint = entropy([1 / 5, 3 / 5, 1 / 5])
    separate = entropy([3 / 5, 2 / 5]), entropy([1 / 5, 4 / 5])
    assert found["x/nmi"] == pytest.approx((sum(separate) - joint) / (sum(separate) / 2))


def test_clustering_scores_do_not_depend_on_labels_nor_on_the_number_of_learners():
    rng = np.random.default_rng(0)
    true = np.resize(range(3), 20)
    score = rng.normal(size=(4, 20))
    names = [f"x/{name}" for name in ("nmi", "ari", "accuracy", "margin")]
    found = cml.clustering("x", score, true, 4)
    guess = score.argmax(0)
    margin = [sorted(column)[-1] - sorted(column)[-2] for column in score.T.tolist()]
    assert found["x/margin"] == pytest.approx(np.mean(margin))
    best = max(np.mean([order[g] == c for g, c in zip(guess, true)]) for order in permutations(range(4)))
    assert found["x/accuracy"] == pytest.approx(best) and "x/C" not in found
    pairs = [(i, j) for i in range(20) for j in range(i)]
    same = [(guess[i] == guess[j], true[i] == true[j]) for i, j in pairs]  # the adjusted Rand index counts pairs
    ours, theirs = np.mean(same, axis=0)
    both = np.mean([a and b for a, b in same])
    assert found["x/ari"] == pytest.approx((both - ours * theirs) / ((ours + theirs) / 2 - ours * theirs))
    again = cml.clustering("x", score[[2, 0, 3, 1]], (true + 1) % 3, 6)
    assert all(found[name] == pytest.approx(again[name]) for name in names) and again["x/tasks_5"] == 0
    perfect = cml.clustering("x", np.eye(3)[[2, 0, 1]][:, true], true, 3)
    assert [perfect[name] for name in names] == [1, 1, 1, 1]
    pure = cml.clustering("x", np.eye(2)[::-1][:, true % 2], true % 2, 2)
    assert pure["x/C"] == pure["x/accuracy"] == 1, "labels exchanged"
    assert cml.clustering("x", np.eye(2)[:, true % 2], true % 2, 2)["x/C"] == 1, "and not"
    assert "x/C" not in cml.clustering("x", np.eye(3)[:, true % 2], true % 2, 3)


def test_one_cluster_or_one_learner_has_fewer_scores():
    found = cml.clustering("x", np.arange(6.0).reshape(2, 3), np.zeros(3, int), 2)
    assert found == {"x/tasks_0": 0, "x/tasks_1": 3, "x/margin": 3.0}
    alone = cml.clustering("x", np.arange(4.0)[None], np.array([0, 1, 0, 1]), 1)
    assert alone["x/margin"] == 0 and alone["x/nmi"] == 0 and alone["x/accuracy"] == 0.5 and alone["x/tasks_0"] == 4


# -- evaluation --------------------------------------------------------------------------------------------------------


def test_evaluation_reports_other_rollouts_than_those_that_chose(monkeypatch):
    args, env, tasks, policy, theta = make(2, tasks=4, env_id="cheetah-dir")
    collected, collect_all = [], cml.collect_all
    monkeypatch.setattr(cml, "collect_all", lambda *a: collected.append(collect_all(*a)) or collected[-1])
    metrics, arrays = cml.evaluate(env, tasks, policy, theta, args)
    choosing, fresh = collected
    assert not torch.equal(choosing[0].obs, fresh[0].obs) and not torch.equal(choosing[1].mean, fresh[1].mean)
    score, other = (data[-1].reward.sum(-1).mean(1).view(2, 4).numpy() for data in (choosing, fresh))
    learner = score.argmax(0)
    assert (learner != other.argmax(0)).any(), "a case in which the fresh rollouts would choose otherwise"
    assert arrays["learner"].tolist() == learner.tolist()
    np.testing.assert_allclose(arrays["learner_returns"], other, rtol=1e-5)
    reported = np.array([other[j, i] for i, j in enumerate(learner)])
    assert metrics["eval/return_step_1"] == pytest.approx(reported.mean(), rel=1e-5)
    assert metrics["eval/choosing_return"] == pytest.approx(score.max(0).mean(), rel=1e-5)
    np.testing.assert_allclose(arrays["returns"][1].mean(1), reported, rtol=1e-5)
    assert arrays["returns"].shape == (2, 4, 2) and arrays["trace"].shape == (2, 4, 4, 2)
    assert [metrics[f"eval/tasks_{j}"] for j in (0, 1)] == np.bincount(learner, minlength=2).tolist()
    assert cml.evaluate(env, tasks, policy, theta, args)[0] == metrics


def test_the_return_of_the_rollouts_that_chose_is_too_large_and_the_reported_one_is_not():
    """Eight learners that are the same: who is best is chance."""
    args, env, tasks, policy, theta = make(8, tasks=40, env_id="point-goal-4c", rollouts=2)
    theta = theta[:1].expand(8, -1)
    metrics, arrays = cml.evaluate(env, tasks, policy, theta, args)
    mean, noise = arrays["learner_returns"].mean(), arrays["learner_returns"].std(0).mean()
    assert abs(metrics["eval/return_step_1"] - mean) < 3.5 * noise / 40**0.5
    assert metrics["eval/choosing_return"] > mean + 1.1 * noise  # the largest of eight: 1.42 standard deviations


# -- a known answer ----------------------------------------------------------------------------------------------------


def test_two_goals_get_a_learner_each(tmp_path):
    """Without adaptation to speak of, one θ earns -1 at best, and two earn 0 if each has the tasks of one goal."""
    run = train(
        cml, env="probe-guess-sign", run_dir=str(tmp_path), horizon=1, action_scale=1.0, tasks=20, iterations=25,
        eval_every=25, hidden=(4,), alpha=1e-3, delta=0.1,
    )  # fmt: skip
    first, last = ({k: float(v) for k, v in row.items()} for row in rows(run / "eval.csv"))
    assert first["eval/nmi"] < 0.5 and last["eval/nmi"] == last["eval/C"] == last["eval/accuracy"] == 1
    assert first["eval/return_step_1"] < -1 and last["eval/return_step_1"] > -0.1


# -- command line ------------------------------------------------------------------------------------------------------

EXCLUDE = "--oracle-warmup, --init task-specific and --switch-at exclude one another"
LONG = "--oracle-warmup or --pretrain, and --explore-iterations, exceed --iterations"
FIRST = "--first-cluster needs --switch-at, and must be less than 2"
EXPLORE = "--explore must be in [0, 1], and needs --explore-iterations"
NO_CLUSTERS = "--oracle-warmup and --switch-at need clusters, and cheetah-vel has none"
RULES = [
    ("--env point-goal-4c --tasks 3", "--tasks must be at least --learners and 4"),
    ("--env point-goal-4c --learners 6 --tasks 5", "--tasks must be at least --learners and 4"),
    ("--env cheetah-vel --oracle-warmup 2 --learners 1", NO_CLUSTERS),
    ("--env cheetah-vel --switch-at 2", NO_CLUSTERS),
    ("--oracle-warmup 2 --learners 3", "--oracle-warmup needs --learners 2, one a true cluster"),
    ("--pretrain 10", "--pretrain needs --init task-specific"),
    ("--init task-specific --learners 1", "--init task-specific needs --learners of at least 2"),
    ("--oracle-warmup 2 --init task-specific", EXCLUDE),
    ("--switch-at 2 --init task-specific", EXCLUDE),
    ("--switch-at 2 --oracle-warmup 2", EXCLUDE),
    ("--oracle-warmup 11 --iterations 10", LONG),
    ("--init task-specific --iterations 49", LONG),
    ("--explore-iterations 11 --iterations 10", LONG),
    ("--oracle-warmup 5 --explore-iterations 6 --iterations 10", LONG),
    ("--learners 1 --explore-iterations 1", "--explore-iterations needs --learners of at least 2"),
    ("--switch-at 10 --iterations 10", "--switch-at must be less than --iterations"),
    ("--switch-at 2 --first-cluster 2", FIRST),
    ("--first-cluster 1", FIRST),
    ("--explore 1.5 --explore-iterations 1", EXPLORE),
    ("--explore 0.5", EXPLORE),
    ("--env cheetah-dir --mask-pad-actions", "--mask-pad-actions is for environments of several robots"),
    ("--alpha 0", "--alpha, --action-scale and --delta must be positive"),
    ("--damping -1", "--damping and --kl-slack must be at least 0"),
    ("--gamma 2", "--gamma and --gae-lambda must be in [0, 1]"),
    ("--learners 0", "--learners must be from 1 to 2^31"),
    ("--init task-specific --pretrain 0", "--pretrain must be from 1 to 2^31"),
]


@pytest.mark.parametrize("flags, message", RULES)
def test_what_must_hold(flags, message):
    with pytest.raises(SystemExit) as caught:
        cml.parse_args(flags.split())
    assert str(caught.value) == f"cml.py: error: {message}"


def test_every_rule_has_a_case_and_what_it_allows_passes():
    of_check = {message for _, message in RULES if not message.endswith("2^31")}
    assert len(of_check) == len(cml.check(cml.Args(), envs.ENVIRONMENTS["cheetah-dir"]))
    cml.parse_args("--oracle-warmup 10 --iterations 10 --mask-pad-actions --damping 0 --tasks 2".split())
    cml.parse_args("--explore 0 --explore-iterations 1".split())
    cml.parse_args("--init task-specific --iterations 50 --learners 3".split())
    cml.parse_args("--switch-at 9 --iterations 10 --first-cluster 1 --learners 1".split())
    cml.parse_args("--oracle-warmup 4 --explore-iterations 6 --iterations 10".split())
    cml.parse_args("--env cheetah-vel --learners 1 --inner-steps 0 --switch-at 0".split())


def test_the_defaults_are_those_of_the_code():
    assert cml.parse_args([]) == cml.Args(preset="paper")
    a = cml.Args()
    assert (a.env, a.learners, a.init, a.pretrain, a.oracle_warmup) == ("ant-cheetah-dir", 2, "random", 50, 0)
    assert (a.tasks, a.rollouts, a.horizon, a.inner_steps, a.alpha, a.delta) == (40, 20, 100, 1, 0.1, 0.01)
    assert (a.explore_iterations, a.switch_at, a.hidden) == (0, 0, (64, 64))


# -- every flag, every task, every step --------------------------------------------------------------------------------


def test_exploration_follows_pretraining():
    tasks = envs.Tasks(np.zeros((400, 1)), np.zeros(400, int))
    score = np.eye(4)[:1].repeat(400, 0).T  # learner 0 is the best
    args = cml.Args(learners=4, init="task-specific", pretrain=3, explore=0.4, explore_iterations=2)
    state, others = torch.get_rng_state(), []
    for iteration in range(4, 7):
        rng = torch.Generator().manual_seed(0)
        found = cml.assign(score, tasks, iteration, rng, args)
        others.append((found != 0).mean())
        assert (found == cml.assign(score, tasks, iteration, torch.Generator().manual_seed(0), args)).all()
    assert others[:2] == pytest.approx([0.3, 0.3], abs=0.08) and others[2] == 0
    assert torch.equal(torch.get_rng_state(), state), "it draws from the run's generator"


def test_tasks_of_the_switch_test_are_fresh():
    env, args = gym.make_vec("point-goal-4c", num_envs=1).unwrapped, cml.Args(tasks=9, switch_at=7)
    one, two = (cml.draw_tasks(env, 1, torch.Generator().manual_seed(seed), args) for seed in (0, 1))
    assert not np.isin(one.params, two.params).any() and not np.isin(one.params, env.task_set("train").params).any()


def test_evaluation_takes_as_many_steps_as_training_and_at_least_one(monkeypatch):
    asked, collect_all = [], cml.collect_all
    monkeypatch.setattr(cml, "collect_all", lambda *a: asked.append(a[4]) or collect_all(*a))
    for steps in (dict(inner_steps=0), dict(inner_steps=2), dict(inner_steps=2, eval_steps=3)):
        args, env, tasks, policy, theta = make(2, **steps)
        cml.evaluate(env, tasks, policy, theta, args)
    assert asked[::2] == asked[1::2] == [[0.1], [0.1, 0.1], [0.1, 0.1, 0.05]]
