"""HoM's mathematics: embeddings and assignments against explicit matrices; K = 1 is MAML; a herd that must be found."""

import csv
import dataclasses
from pathlib import Path

import gymnasium as gym
import hom
import maml
import numpy as np
import pytest
import torch
from conftest import train
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import adjusted_rand_score
from test_maml import double, make_batch  # noqa: F401  (float64 throughout)

import envs

KINDS = ["diagonal", "last-layer", "full", "state-next-state", "gradient"]
TINY = dict(tasks=8, rollouts=4, horizon=6, hidden=(4,))


def small_args(**kwargs) -> hom.Args:
    return hom.Args(**(dict(hidden=(5, 4), rollouts=4, embed_rollouts=2, horizon=4, num_threads=1) | kwargs))


def make_seen(args: hom.Args, tasks=6) -> tuple[hom.GaussianPolicy, torch.Tensor, hom.Batch]:
    """What a probe might have met: falls, rewards of any sign and size, actions of its own or drawn anew."""
    policy = hom.GaussianPolicy(3, 2, args)
    theta = policy.init(torch.Generator().manual_seed(1)).double()
    theta += 0.3 * torch.randn_like(theta)
    few = dataclasses.replace(args, rollouts=args.embed_rollouts)
    batch = hom.Batch(*make_batch(policy, theta.expand(tasks, -1), few))
    used, reward = batch.used.clone(), batch.reward * torch.rand(tasks, 1, 1) * 9
    used[-1, 0, 1] = 0  # a robot with one action
    reward[1] = -reward[1].abs()  # a task that only punishes
    return policy, theta, batch._replace(reward=reward, used=used)


def explicit(policy, theta, batch, args) -> torch.Tensor:
    """φ of every task as a whole, [task, ·]: step by step, from the gradient of each transition alone."""
    found = []
    for i, reward in enumerate(batch.reward):
        phi, largest = 0.0, reward.abs().max()
        for k in range(args.embed_rollouts):
            length = int(batch.taken[i, k].sum())
            if args.embedding == "state-next-state":
                length = min(length, args.horizon - 1)  # the last state after a fall is known, that at H is not
            for t in range(length):
                n = k * args.horizon + t
                leaf = theta.clone().requires_grad_()
                mean, log_std = policy(leaf[None], batch.obs[i, n][None, None])
                pi = torch.distributions.Normal(mean[0, 0], log_std[0, 0].exp())
                (v,) = torch.autograd.grad((pi.log_prob(batch.action[i, n]) * batch.used[i, 0]).sum(), leaf)
                if args.embedding == "state-next-state":
                    v = torch.cat([batch.obs[i, n], batch.obs[i, n + 1]])
                elif args.embedding == "last-layer":
                    v = v[-2 - 2 * 5 : -2]  # 4 weights and a bias for each of two actions, then log σ
                value = {"diagonal": v**2, "gradient": v}.get(args.embedding, torch.outer(v, v).flatten())
                phi = phi + reward[k, t] / largest * value / length / args.embed_rollouts
        found.append(phi)
    return torch.stack(found)


# -- embeddings and clusters -------------------------------------------------------------------------------------------


def test_layer_gradients_are_the_gradient_of_each_transition():
    args = small_args()
    policy, theta, batch = make_seen(args)
    pairs = hom.layer_gradients(policy, theta, batch)
    found = torch.cat([(x[..., None] * g[..., None, :]).flatten(2) for x, g in pairs], -1)  # [task, row, d]
    leaf = theta.expand(48, -1).clone().requires_grad_()  # parameters of its own for every row
    mean, log_std = policy(leaf, batch.obs.flatten(0, 1)[:, None])
    score = maml.log_prob(mean.view_as(batch.mean), log_std.view_as(batch.mean), batch)
    torch.testing.assert_close(found.flatten(0, 1), torch.autograd.grad(score.sum(), leaf)[0])
    assert (found[batch.taken.flatten(1)] != 0).any(-1).all() and not any(x.requires_grad for x, _ in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_inner_products_are_those_of_the_explicit_embeddings(kind):
    """The Gram form and the matrices themselves; trajectories of different lengths weigh the same."""
    args = small_args(embedding=kind)
    policy, theta, batch = make_seen(args)
    assert {2, 4} < {*batch.taken.sum(-1).flatten().tolist()}
    phi = explicit(policy, theta, batch, args)
    size = {"full": len(theta) ** 2, "last-layer": 10**2, "state-next-state": 6**2}.get(kind, len(theta))
    assert phi.shape == (6, size)
    parts = [batch.of(part) for part in (slice(0, 2), slice(2, 6))]
    one, two = (hom.transitions(policy, theta, part, args) for part in parts)
    torch.testing.assert_close(hom.inner_products(one, two, args), phi[:2] @ phi[2:].T)


@pytest.mark.parametrize("kind", KINDS)
def test_assignment_is_to_the_nearest_centroid(kind):
    args = small_args(embedding=kind, clusters=3)
    policy, theta, batch = make_seen(args, tasks=24)
    pool, new = batch.of(slice(0, 10)), batch.of(slice(10, 24))
    phi, others = explicit(policy, theta, pool, args), explicit(policy, theta, new, args)
    member = torch.tensor([1, 1, 1, 1, 1, 2, 2, 3, 3, 3])
    centroids = torch.stack([phi[member == k].mean(0) for k in (1, 2, 3)])
    thetas = torch.stack([theta, theta + 1])  # the probe's, and another one's
    agent = dict(zip(hom.Batch._fields, pool[:-1]), member=member, products=phi @ phi.T, theta=thetas)
    expected = 1 + torch.cdist(others, centroids).argmin(1)
    assert hom.assign(policy, agent, new, args).tolist() == expected.tolist() and len(expected.unique()) > 1


def test_a_centred_reward_has_the_mean_0_whatever_is_added_to_it():
    args = small_args(embedding="gradient", centre=True)
    policy, theta, batch = make_seen(args)
    assert not batch.taken.all()
    _, r = hom.transitions(policy, theta, batch, args)
    _, more = hom.transitions(policy, theta, batch._replace(reward=batch.reward + 5 * batch.taken), args)
    torch.testing.assert_close(r, more)
    torch.testing.assert_close(r.sum(1), torch.zeros(len(r)), atol=1e-6, rtol=0)  # their weights in E included
    assert (r - hom.transitions(policy, theta, batch, small_args(embedding="gradient"))[1]).abs().max() > 0.01


def test_clusters_are_wards_of_the_embeddings_themselves():
    phi = torch.randn(30, 50) * torch.logspace(0, 2, 50) ** 0.5 + 5
    for k in (1, 2, 3, 7):
        found = hom.ward(phi @ phi.T, k)
        assert set(found) == set(range(1, k + 1))
        assert adjusted_rand_score(AgglomerativeClustering(k).fit_predict(phi.numpy()), found) == 1


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def single():
    torch.set_default_dtype(torch.float32)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        table = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "charts/sps"))} for row in table]


@pytest.mark.parametrize("kind", KINDS)
def test_the_probe_is_embedded_by_actions_drawn_anew_where_the_matrix_is_fishers(single, kind):
    args = small_args(embedding=kind, embed_rollouts=3, rollouts=5, horizon=50)
    make_env = lambda n: gym.make_vec("point-goal-4c", num_envs=n, horizon=50)  # noqa: E731
    tasks = make_env(1).unwrapped.task_set("train")[:8]
    policy = hom.GaussianPolicy(2, 2, args)
    theta = policy.init(torch.Generator().manual_seed(0))
    theta[-2:] = torch.tensor([-1.0, 0.5])
    seen = hom.observe(make_env, tasks, policy, theta, torch.Generator().manual_seed(5), args)
    few = dataclasses.replace(args, rollouts=3)
    same = hom.sample(make_env(24), tasks, policy, theta.expand(8, -1), torch.Generator().manual_seed(5), few)
    for name, x, y in zip(hom.Batch._fields[:-1], seen, same):
        assert torch.equal(x, y) == (name != "action" or kind in KINDS[3:]), name
    noise = (seen.action - seen.mean) / seen.log_std.exp()
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05


def test_a_probe_that_meets_no_reward_ends_the_run(single, monkeypatch, tmp_path):
    monkeypatch.setattr(envs.ENVIRONMENTS["point-goal-sparse"], "reward", lambda self, *_: np.zeros(self.num_envs))
    flags = TINY | dict(env="point-goal-sparse", clusters=2, train_tasks=12, probe_iterations=1, embed_rollouts=1)
    args = hom.Args(preset="paper", num_threads=1, iterations=2, run_dir=str(tmp_path), **flags)
    with pytest.raises(SystemExit, match="error: the probe met no reward"):
        hom.train(args, hom.Run(args))


@pytest.mark.parametrize("warm_start", [False, True])
def test_with_one_cluster_it_is_maml_up_to_the_probes_offset(single, monkeypatch, tmp_path, warm_start):
    """Both on the same training tasks: before the herd as it is, then from the state in which the member begins."""
    flags = TINY | dict(env="point-goal-4c", eval_every=1)
    herd = dict(clusters=1, train_tasks=12, probe_iterations=2, embed_rollouts=1, warm_start=warm_start)
    begin, ward, random_seed = [], hom.ward, hom.random_seed

    def clustered(*x):
        begin.append(None)
        return ward(*x)

    def watch(rng):  # the first random number after the clusters and the member's θ draws its tasks
        if begin == [None]:
            begin[:] = [rng.get_state(), run.state["agent"]["theta"].clone()]
        return random_seed(rng)

    args = hom.Args(preset="paper", num_threads=1, iterations=5, run_dir=str(tmp_path / "hom"), **flags, **herd)
    run = hom.Run(args)
    monkeypatch.setattr(hom, "ward", clustered)
    monkeypatch.setattr(hom, "random_seed", watch)
    hom.train(args, run)
    state, theta = begin
    assert torch.equal(theta[0], theta[1]) == warm_start

    def sample_tasks(self, n, rng):
        rng.permutation(1)
        params = self.task_set("train").params[[rng.choice(np.arange(12)) for _ in range(n)]]
        return envs.Tasks(params, np.zeros(n, int))  # clusters are for returns by cluster, which vary

    monkeypatch.setattr(envs.TaskVectorEnv, "sample_tasks", sample_tasks)
    first = train(maml, iterations=2, run_dir=str(tmp_path / "first"), **flags)
    monkeypatch.setattr(maml.GaussianPolicy, "init", lambda *_: theta[1])
    args = maml.Args(preset="paper", num_threads=1, iterations=3, run_dir=str(tmp_path / "second"), **flags)
    second = maml.Run(args)
    second.rng.set_state(state)
    maml.train(args, second)

    ours, metrics = rows(run.path / "metrics.csv"), rows(first / "metrics.csv") + rows(second.path / "metrics.csv")
    offset = int(ours[1]["charts/frames"]) + 12 * 6
    for n, (a, b) in enumerate(zip(ours, metrics, strict=True)):
        frames = int(b["charts/frames"]) + (offset if n > 1 else 0)
        shared = (a.keys() & b.keys()) - {"iteration", "charts/frames"}
        assert len(shared) == 11 and {k: a[k] for k in shared} == {k: b[k] for k in shared}
        assert int(a["charts/frames"]) == frames
    for a, b in zip(rows(run.path / "eval.csv")[:3], rows(first / "eval.csv"), strict=True):
        assert b.items() <= a.items(), "until there is a herd, the evaluation of a single learner"


def test_members_learn_their_own_clusters_in_equal_parts_and_all_frames_count(single, monkeypatch, tmp_path):
    labels, steps, trpo_step, collect = np.array([1, 3, 2, 2, 1, 2, 2, 2, 2, 2, 2, 2]), [], hom.trpo_step, hom.collect
    drawn, sampled, accepted = [], [], []
    monkeypatch.setattr(hom, "ward", lambda *_: labels)

    def step(policy, theta, data, *rest):
        steps.append((theta.clone(), data))
        new, stats = trpo_step(policy, theta, data, *rest)
        accepted.append(stats["trpo/kl"])
        return new, stats

    monkeypatch.setattr(hom, "trpo_step", step)

    def watch(env, tasks, policy, theta, *rest):
        drawn.append((tasks.params, theta))
        sampled.append(collect(env, tasks, policy, theta, *rest))
        return sampled[-1]

    monkeypatch.setattr(hom, "collect", watch)
    flags = TINY | dict(clusters=3, probe_iterations=1, embed_rollouts=3, train_tasks=12, iterations=3)
    args = hom.Args(preset="paper", num_threads=1, env="point-goal-4c", run_dir=str(tmp_path), **flags)
    run = hom.Run(args)
    hom.train(args, run)
    pool = gym.make_vec("point-goal-4c").unwrapped.task_set("train").params[:12]
    assert [len(data[0].obs) for _, data in steps[:1]] == [8] and len(steps) == 7
    # calls of collect: an evaluation, the probe's iteration, two of the herd's, an evaluation
    for (params, theta), data, taken in zip(drawn[2:4], sampled[2:4], (steps[1:4], steps[4:7])):
        index = [int(np.flatnonzero((pool == p).all(1))[0]) for p in params]
        whose = labels[index]
        assert sorted(np.bincount(whose, minlength=4)[1:]) == [2, 3, 3] and len(set(index)) > 4
        for m, (before, mine) in zip((1, 2, 3), taken, strict=True):
            assert torch.equal(theta[torch.from_numpy(whose == m)], before.expand((whose == m).sum(), -1))
            assert all(torch.equal(x.obs, everyones.obs[whose == m]) for x, everyones in zip(mine, data))
    table = rows(run.path / "metrics.csv")
    spent = [[int(v) for k, v in row.items() if k.startswith("frames/")] for row in table]
    shares = [[2 * 4 * 6 * len(mine[0].obs) for _, mine in taken] for taken in (steps[1:4], steps[4:7])]
    assert [*table[0]][4:9] == ["frames/probe", "frames/embedding", *(f"frames/member_{m}" for m in (1, 2, 3))]
    assert spent == [[384, 0, 0, 0, 0], [0, 12 * 3 * 6, *shares[0]], [0, 0, *shares[1]]]
    kl = [np.mean(list(map(float, found))) for found in (accepted[:1], accepted[1:4], accepted[4:7])]
    assert [float(row["trpo/kl"]) for row in table] == pytest.approx(kl, rel=1e-4) and min(kl) > 0
    assert [int(row["charts/frames"]) for row in table] == np.cumsum(np.sum(spent, 1)).tolist()
    saved = torch.load(run.path / "agent.pt", weights_only=True)["agent"]
    assert saved["member"].tolist() == labels.tolist() and (saved["obs"].abs().sum((1, 2)) > 0).all()


def test_what_is_saved_gives_the_clusters_again(single, tmp_path):
    """From agent.pt alone: what the trained probe met, falls included, its inner products, their clusters."""
    flags = TINY | dict(env="ml2", horizon=100, train_tasks=10, probe_iterations=1, iterations=2, eval_every=2)
    flags |= dict(embedding="last-layer", action_scale=1.0)
    args = hom.Args(preset="paper", num_threads=1, run_dir=str(tmp_path), **flags)
    run = hom.Run(args)
    hom.train(args, run)
    saved = torch.load(run.path / "agent.pt", weights_only=True)["agent"]
    batch = hom.Batch(*(saved[name] for name in hom.Batch._fields[:-1]))
    policy = hom.GaussianPolicy(17, 6, args)
    found = hom.transitions(policy, saved["theta"][0], batch, args)
    products = hom.inner_products(found, found, args)
    torch.testing.assert_close(saved["products"], products)
    assert (products.diagonal() > 0).all() and saved["member"].tolist() == hom.ward(products, 2).tolist()
    assert (batch.weight == 0).any() and torch.allclose(batch.weight.sum((1, 2)), torch.ones(10))
    mean, log_std = policy(saved["theta"][:1].expand(10, -1), batch.obs)
    torch.testing.assert_close(mean, batch.mean)  # met by the probe as it is
    assert torch.equal(log_std, batch.log_std)


def test_who_gets_one_task_more_changes(single, monkeypatch, tmp_path):
    """Eight tasks, three members: one of them gets two only, and not always the same."""
    monkeypatch.setattr(hom, "ward", lambda *_: np.array([1, 2, 3] * 4))
    flags = TINY | dict(clusters=3, probe_iterations=0, embed_rollouts=1, train_tasks=12, iterations=8, eval_every=8)
    run = train(hom, env="point-goal-4c", run_dir=str(tmp_path), **flags)
    spent = [[int(row[f"frames/member_{m}"]) for m in (1, 2, 3)] for row in rows(run / "metrics.csv")]
    assert all(sorted(x) == [96, 144, 144] for x in spent) and len({x.index(96) for x in spent}) > 1


def test_evaluation_spends_rollouts_on_finding_the_member(single, monkeypatch):
    args = small_args(clusters=2, rollouts=5, embed_rollouts=2, horizon=6, train_tasks=8, eval_steps=2, hidden=(4,))
    make_env = lambda n: gym.make_vec("ml2", num_envs=n, horizon=6)  # noqa: E731
    env = make_env(1).unwrapped
    pool, tasks = env.task_set("train")[:8], env.task_set("test")[:6]  # clusters 0, 1, 0, 1, ...
    policy = hom.GaussianPolicy(17, 6, args)
    theta = torch.stack([policy.init(torch.Generator().manual_seed(i)) for i in range(3)])
    member = torch.tensor([2, 1, 2, 1, 2, 1, 2, 2])  # seven right, the last one not
    agent = dict(theta=theta, member=member, products=torch.eye(8))
    asked, seen = [], []
    monkeypatch.setattr(hom, "assign", lambda p, a, batch, args: seen.append(batch) or np.array([2, 1, 2, 1, 1, 1]))
    collect = hom.collect
    monkeypatch.setattr(hom, "collect", lambda env, *a: asked.append((env.num_envs, a)) or collect(env, *a))
    metrics, arrays = hom.evaluate(make_env, tasks, pool, policy, agent, args)
    assert seen[0].reward.shape == (6, 2, 6) and arrays["returns"].shape == (3, 6, 3)
    ((copies, (_, _, used, alphas, *_)),) = asked
    assert copies == 6 * 3 and alphas == [0.1, 0.05] and torch.equal(used, theta[[2, 1, 2, 1, 1, 1]])
    mean, _ = policy(theta[:1].expand(6, -1), seen[0].obs)
    torch.testing.assert_close(seen[0].mean, mean)
    assert metrics["eval/accuracy"] == pytest.approx(5 / 6) and metrics["herd/purity"] == 7 / 8
    assert metrics["herd/ari"] == pytest.approx(adjusted_rand_score([0, 1] * 4, member))
    assert 0 < metrics["eval/ari"] < 1 and 0 < metrics["eval/nmi"] < 1
    assert arrays["learner"].tolist() == [2, 1, 2, 1, 1, 1] and arrays["train_learner"].tolist() == member.tolist()
    assert hom.evaluate(make_env, tasks, pool, policy, agent, args)[0] == metrics


def test_two_signs_are_told_apart_and_their_members_need_no_adaptation(single, tmp_path):
    """Rewards -(a - g)², g near -1 or 1: one policy earns at best -10 before adaptation, a member of its own 0."""
    herd = dict(embedding="gradient", probe_iterations=2, train_tasks=20, embed_rollouts=4)
    small = dict(tasks=10, rollouts=20, horizon=10, hidden=(), alpha=0.01, action_scale=1.0, delta=0.05)
    flags = dict(env="probes:probe-guess-sign", iterations=22, eval_every=22, run_dir=str(tmp_path))
    before, after = rows(train(hom, **flags, **small, **herd) / "eval.csv")
    assert [float(after[k]) for k in ("herd/purity", "herd/ari", "eval/accuracy", "eval/nmi", "eval/ari")] == [1] * 5
    assert float(before["eval/return_step_0"]) < -10 and float(after["eval/return_step_0"]) > -5


# -- command line ------------------------------------------------------------------------------------------------------


def test_the_preset_of_ml2_is_the_papers_table_and_else_maml():
    a = hom.parse_args([])
    assert (a.env, a.horizon, a.alpha, a.inner_steps) == ("ml2", 100, 0.1, 1)
    assert (a.tasks, a.rollouts, a.iterations) == (20, 10, 40)
    assert (a.clusters, a.embed_rollouts, a.gamma, a.gae_lambda, a.delta, a.hidden) == (2, 2, 0.99, 1, 0.01, (64, 64))
    ours, theirs = dataclasses.asdict(hom.parse_args(["--env", "cheetah-dir"])), dataclasses.asdict(maml.parse_args([]))
    assert all(ours[k] == theirs[k] for k in ours.keys() & theirs.keys())


RULES = [
    ("--iterations 10 --probe-iterations 10", "--probe-iterations must be below --iterations"),
    ("--clusters 5 --tasks 4", "--tasks must be at least --clusters"),
    ("--train-tasks 2 --clusters 1", "--train-tasks must be from 3 to 500, and above --clusters"),
    ("--train-tasks 501", "--train-tasks must be from 3 to 500, and above --clusters"),
    ("--train-tasks 9 --clusters 9", "--train-tasks must be from 3 to 500, and above --clusters"),
    ("--rollouts 2", "--embed-rollouts must be below --rollouts"),
    ("--env cheetah-dir --mask-pad-actions", "--mask-pad-actions is for environments of several robots"),
    *((f"--{x} 0", "--alpha, --action-scale and --delta must be positive") for x in ("alpha", "action-scale", "delta")),
    ("--damping -1", "--damping and --kl-slack must be at least 0"),
    ("--kl-slack -0.1", "--damping and --kl-slack must be at least 0"),
    ("--gamma 2", "--gamma and --gae-lambda must be in [0, 1]"),
    ("--gae-lambda -0.5", "--gamma and --gae-lambda must be in [0, 1]"),
]


@pytest.mark.parametrize("flags, message", RULES)
def test_what_must_hold(flags, message):
    with pytest.raises(SystemExit) as caught:
        hom.parse_args(flags.split())
    assert str(caught.value) == f"hom.py: error: {message}"


def test_every_rule_has_a_case():
    assert len({message for _, message in RULES}) == len(hom.check(hom.Args(), envs.ENVIRONMENTS["cheetah-dir"]))
    hom.parse_args("--env ant-cheetah-dir --mask-pad-actions --probe-iterations 0 --clusters 1".split())
    hom.parse_args("--train-tasks 3 --clusters 2".split())
    for flag in ("--clusters", "--embed-rollouts", "--train-tasks"):
        with pytest.raises(SystemExit, match=f"{flag} must be from 1"):
            hom.parse_args([flag, "0"])


# -- every flag, every task, every step --------------------------------------------------------------------------------


def test_inner_steps_are_the_flags_in_training_and_at_evaluation(single, monkeypatch, tmp_path):
    asked, collect = [], hom.collect
    monkeypatch.setattr(hom, "collect", lambda *a: asked.append(a[4]) or collect(*a))
    flags = TINY | dict(clusters=2, train_tasks=12, probe_iterations=1, embed_rollouts=1, iterations=2, eval_every=2)
    train(hom, env="point-goal-4c", inner_steps=2, alpha=0.03, run_dir=str(tmp_path), **flags)
    assert asked == [[0.03, 0.03]] * 4
    asked.clear()
    args = hom.Args(preset="paper", num_threads=1, env="point-goal-4c", inner_steps=2, eval_steps=3, alpha=0.03,
                    run_dir=str(tmp_path), **(flags | dict(iterations=1, probe_iterations=0)))  # fmt: skip
    hom.train(args, hom.Run(args))
    assert asked == [[0.03, 0.03, 0.015], [0.03, 0.03], [0.03, 0.03, 0.015]]


def test_members_begin_apart_and_the_probes_new_actions_are_the_generators(single, monkeypatch, tmp_path):
    begun, step = [], hom.trpo_step
    monkeypatch.setattr(hom, "trpo_step", lambda p, theta, *a: begun.append(theta.clone()) or step(p, theta, *a))
    flags = TINY | dict(clusters=3, train_tasks=12, probe_iterations=0, embed_rollouts=1, iterations=1)
    train(hom, env="point-goal-4c", run_dir=str(tmp_path), **flags)
    assert len(torch.stack(begun).unique(dim=0)) == 3
    args = small_args(embedding="full")
    make_env = lambda n: gym.make_vec("point-goal-4c", num_envs=n, horizon=4)  # noqa: E731
    policy, tasks = hom.GaussianPolicy(2, 2, args), make_env(1).unwrapped.task_set("train")[:3]
    theta = policy.init(torch.Generator().manual_seed(0))
    one, two = (hom.observe(make_env, tasks, policy, theta, torch.Generator().manual_seed(5), args) for _ in range(2))
    assert torch.equal(one.action, two.action)
