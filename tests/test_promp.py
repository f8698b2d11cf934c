"""ProMP's mathematics: the objective against a plain version, its identities, and what Adam trains."""

import csv
import dataclasses

import gymnasium as gym
import maml
import mmaml
import numpy as np
import promp
import pytest
import torch
from test_maml import double, make_batch  # noqa: F401  (float64 throughout)
from torch import nn
from torch.distributions import Normal, kl_divergence

import envs


def small_args(**kwargs) -> promp.Args:
    return promp.Args(**(dict(hidden=(5,), rollouts=3, horizon=4, num_threads=1) | kwargs))


def make_agent(args: promp.Args, learners=1) -> tuple[promp.GaussianPolicy, nn.ParameterDict, torch.optim.Optimizer]:
    """With a weight η of its own for every step and learner."""
    policy = promp.GaussianPolicy(3, 2, args)
    agent = promp.make_agent(policy, learners, torch.Generator().manual_seed(1), args)
    agent["theta"].data += 0.1 * torch.randn_like(agent["theta"])
    agent["eta"].data *= 1 + torch.arange(agent["eta"].numel()).view_as(agent["eta"])
    return policy, agent, torch.optim.Adam([p for p in agent.values() if p.requires_grad], args.lr)


def make_data(policy, agent, learner, args) -> list[promp.Batch]:
    """D_0 .. D_n of tasks of some learners."""
    theta, alpha, data = agent["theta"].detach()[learner], agent["alpha"].detach()[learner], []
    for k in range(args.inner_steps + 1):
        theta = promp.adapt(policy, theta, data[-1], alpha, args) if k > 0 else theta
        data.append(promp.Batch(*make_batch(policy, theta, args)))
    return data


def plain_objective(policy, theta, alpha, eta, data, args) -> torch.Tensor:
    """The mean over tasks, one after the other, from one vector of parameters."""
    total = 0.0
    for i in range(len(data[0].obs)):
        theta_k, penalty = theta[None], 0.0
        for k, batch in enumerate(b.of(slice(i, i + 1)) for b in data):
            mean, log_std = policy(theta_k, batch.obs)
            old, new = Normal(batch.mean, batch.log_std.exp()), Normal(mean, log_std.exp())
            weight, adv = batch.weight.flatten(), batch.advantage.flatten()
            ratio = (new.log_prob(batch.action) - old.log_prob(batch.action)).sum(-1).exp().flatten()
            if k == args.inner_steps:
                gain = torch.minimum(ratio * adv, ratio.clamp(1 - args.clip, 1 + args.clip) * adv)
                total = total - (weight * gain).sum() + penalty
            else:
                kl = (weight * kl_divergence(old, new).sum(-1)[0]).sum()
                penalty = penalty + eta[k] * kl / args.inner_steps
                loss = -(weight * ratio * adv).sum()
                theta_k = theta_k - alpha * torch.autograd.grad(loss, theta_k, create_graph=True)[0]
    return total / len(data[0].obs)


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("train_alpha", [False, True])
def test_updates_against_adam_on_the_plain_objective(steps, train_alpha):
    """Two in a row: the state of Adam is kept."""
    args = small_args(inner_steps=steps, eta=3.0, lr=0.02, clip=0.1, train_alpha=train_alpha and steps > 0)
    policy, agent, optimizer = make_agent(args)
    learner = np.zeros(6, int)
    theta, alpha = (agent[k].detach()[0].clone().requires_grad_() for k in ("theta", "alpha"))
    adam = torch.optim.Adam([theta, alpha] if args.train_alpha else [theta], args.lr)
    for _ in range(2):
        data = make_data(policy, agent, learner, args)
        for _ in range(args.updates):
            adam.zero_grad()
            plain_objective(policy, theta, alpha, agent["eta"][0], data, args).backward()
            adam.step()
        stats = promp.promp_update(policy, agent, optimizer, learner, data, args)
        torch.testing.assert_close(agent["theta"].detach()[0], theta.detach())
        torch.testing.assert_close(agent["alpha"].detach()[0], alpha.detach())
    assert (agent["alpha"] == args.alpha).all() == (not args.train_alpha)
    assert (
        stats["promp/surrogate_after"] < stats["promp/surrogate_before"] and abs(stats["promp/surrogate_before"]) < 1e-9
    )
    for k, batch in enumerate(data):  # the KLs, at the new parameters
        theta_k = theta.detach().expand(6, -1)
        for before in data[:k]:
            theta_k = promp.adapt(policy, theta_k, before, alpha.detach(), args)
        name = "kl_outer" if k == steps else f"kl_inner_{k}"
        kl = promp.mean_kl(*policy(theta_k, batch.obs), batch).mean()
        assert stats[f"promp/{name}"] == pytest.approx(kl.item()) and kl > 1e-6


def test_gradient_against_finite_differences():
    args = small_args(inner_steps=2, eta=2.0)
    policy, agent, _ = make_agent(args)
    data = make_data(policy, agent, np.zeros(4, int), args)
    point = (agent["theta"].detach() + 0.05 * torch.randn_like(agent["theta"]))[0]
    alpha = agent["alpha"].detach()[0]

    def objective(theta):
        rates = alpha.expand(4, -1), agent["eta"].expand(4, -1)
        return promp.meta_objective(policy, theta.expand(4, -1), data, *rates, args)[0].mean()

    leaf = point.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(leaf), leaf)
    for i in torch.randperm(len(point))[:12].tolist():
        e = torch.zeros_like(point)
        e[i] = 1e-5
        slope = (objective((point + e).requires_grad_()) - objective((point - e).requires_grad_())) / 2e-5
        assert gradient[i].item() == pytest.approx(slope.item(), abs=1e-7, rel=1e-5)


def test_the_kl_is_zero_in_the_first_of_the_steps_with_its_gradient():
    args = small_args(inner_steps=2)
    policy, agent, _ = make_agent(args)
    data = make_data(policy, agent, np.zeros(4, int), args)
    theta, alpha, eta = (agent[k][np.zeros(4, int)] for k in ("theta", "alpha", "eta"))
    _, _, kl = promp.meta_objective(policy, theta, data, alpha, eta, args)
    torch.testing.assert_close(kl, torch.zeros_like(kl), atol=1e-14, rtol=0)
    (gradient,) = torch.autograd.grad(kl.sum(), agent["theta"])
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


def test_without_adaptation_it_is_ppo_without_minibatches():
    """One pooled batch, all transitions weighing the same where no task has falls."""
    args = small_args(inner_steps=0, lr=0.03, clip=0.1)
    policy, agent, optimizer = make_agent(args)
    (batch,) = make_data(policy, agent, np.zeros(5, int), args)
    alive = torch.full_like(batch.weight, 1 / 12)
    batch = promp.Batch(*maml.process(maml.Batch(*batch)._replace(weight=alive), args))
    theta = agent["theta"].detach().clone().requires_grad_()
    adam = torch.optim.Adam([theta], args.lr)
    obs, action, adv = batch.obs.flatten(0, 1)[None], batch.action.flatten(0, 1), batch.advantage.flatten()
    old = Normal(batch.mean.flatten(0, 1), batch.log_std[0].exp()).log_prob(action).sum(-1)
    for _ in range(args.updates):
        mean, log_std = policy(theta, obs)
        ratio = (Normal(mean[0], log_std[0].exp()).log_prob(action).sum(-1) - old).exp()
        adam.zero_grad()
        (-torch.minimum(ratio * adv, ratio.clamp(0.9, 1.1) * adv).mean()).backward()
        adam.step()
    promp.promp_update(policy, agent, optimizer, np.zeros(5, int), [batch], args)
    torch.testing.assert_close(agent["theta"].detach(), theta.detach())


@pytest.mark.parametrize("steps", [1, 2])
def test_inner_steps_and_first_gradient_are_those_of_maml_with_the_likelihood_ratio(steps):
    """Where the data was sampled no ratio is clipped, and the KLs have no gradient; a rate of each parameter."""
    args = small_args(inner_steps=steps, eta=2.0)
    mamls = maml.Args(inner_loss="likelihood-ratio", inner_steps=steps)
    policy, agent, _ = make_agent(args)
    agent["alpha"].data *= 5 * torch.rand_like(agent["alpha"])
    data = make_data(policy, agent, np.zeros(6, int), args)
    theta, alpha, eta = (agent[k].detach()[np.zeros(6, int)] for k in ("theta", "alpha", "eta"))
    for batch in data[:-1]:
        step = promp.adapt(policy, theta, batch, alpha, args)
        torch.testing.assert_close(step, theta - alpha * maml.inner_gradient(policy, theta, batch, mamls)[0])
        torch.testing.assert_close(step, maml.adapt(policy, theta, batch, alpha, mamls))
    leaf = theta[0].clone().requires_grad_()
    loss, s, _ = promp.meta_objective(policy, leaf.expand(6, -1), data, alpha, eta, args)
    surrogate, gradient, _ = maml.linearise(policy, theta[0], data, alpha[0], mamls)
    torch.testing.assert_close(torch.autograd.grad(loss.mean(), leaf)[0], gradient)
    torch.testing.assert_close(s.mean(), surrogate)


def test_learners_are_trained_on_their_own_tasks_alone():
    args = small_args(inner_steps=1, eta=2.0, adapt_eta=True, train_alpha=True)
    policy, agent, optimizer = make_agent(args, learners=2)
    learner = np.array([1, 0, 1, 1, 0, 1])
    data = make_data(policy, agent, learner, args)
    alone = []
    for m in range(2):
        parts = {k: nn.Parameter(v.detach()[m : m + 1].clone(), v.requires_grad) for k, v in agent.items()}
        one = nn.ParameterDict(parts)
        adam = torch.optim.Adam([one["theta"], one["alpha"]], args.lr)
        mine = [batch.of(learner == m) for batch in data]
        promp.promp_update(policy, one, adam, np.zeros((learner == m).sum(), int), mine, args)
        alone.append(one)
    promp.promp_update(policy, agent, optimizer, learner, data, args)
    for name in ("theta", "alpha", "eta"):
        torch.testing.assert_close(agent[name].detach(), torch.cat([one[name].detach() for one in alone]))


def test_eta_is_doubled_and_halved():
    eta, kl = torch.ones(2, 3), torch.tensor([[0.005, 0.01, 0.02], [0.00666, 0.00667, 0.0151]])
    assert promp.adapted_eta(eta, kl, 0.01).tolist() == [[0.5, 1, 2], [0.5, 1, 2]]


def test_eta_follows_the_kl_of_its_learner_and_step_after_the_update():
    args = small_args(inner_steps=2, eta=1e-3, lr=0.02, adapt_eta=True, kl_target=1e9)
    policy, agent, optimizer = make_agent(args, learners=2)
    _, again, other = make_agent(args, learners=2)
    again.load_state_dict(agent.state_dict())
    learner, before = np.array([0, 1, 1, 0, 1]), agent["eta"].detach().clone()
    data = make_data(policy, agent, learner, args)
    promp.promp_update(policy, again, other, learner, data, args)
    torch.testing.assert_close(again["eta"].detach(), before / 2)
    kl = torch.zeros(2, 2)  # [learner, n], at the new θ
    for m in range(2):
        mine, rows = [batch.of(learner == m) for batch in data], np.full((learner == m).sum(), m)
        theta, alpha, eta = (again[name].detach()[rows].requires_grad_() for name in ("theta", "alpha", "eta"))
        kl[m] = promp.meta_objective(policy, theta, mine, alpha, eta, args)[2][:-1].mean(1).detach()
    args = dataclasses.replace(args, kl_target=kl.mean().item())
    promp.promp_update(policy, agent, optimizer, learner, data, args)
    torch.testing.assert_close(agent["theta"].detach(), again["theta"].detach())
    torch.testing.assert_close(agent["eta"].detach(), promp.adapted_eta(before, kl, args.kl_target))
    assert len((agent["eta"] / before).unique()) > 1, "a case in which they differ"


def test_evaluation_uses_the_parameters_of_each_learner(monkeypatch):
    torch.set_default_dtype(torch.float32)
    args = small_args(oracle=True, inner_steps=1, eval_steps=2, train_alpha=True)
    env = gym.make_vec("point-goal-4c", num_envs=8 * args.rollouts, horizon=args.horizon)
    tasks = env.unwrapped.sample_tasks(8, np.random.default_rng(0))
    policy = promp.GaussianPolicy(2, 2, args)
    agent = promp.make_agent(policy, 4, torch.Generator().manual_seed(0), args)
    agent["alpha"].data *= torch.arange(1, 5)[:, None]
    calls, adapt = [], promp.adapt
    monkeypatch.setattr(promp, "adapt", lambda *a: calls.append((a[1], a[3])) or adapt(*a))
    metrics, arrays = promp.evaluate(env, tasks, policy, agent, args)
    assert len(calls) == 2 and torch.equal(calls[0][0], agent["theta"][tasks.cluster])
    assert all(torch.equal(alpha, agent["alpha"][tasks.cluster]) for _, alpha in calls)
    assert arrays["returns"].shape == (3, 8, args.rollouts) and arrays["trace"].shape == (3, args.horizon, 8, 2)
    for k in range(3):
        assert metrics[f"eval/return_step_{k}"] == pytest.approx(arrays["returns"][k].mean())
    assert promp.evaluate(env, tasks, policy, agent, args)[0] == metrics


@pytest.mark.parametrize("script, more", [(promp, {}), (mmaml, dict(modulation="none"))])
def test_evaluation_with_another_step_size(monkeypatch, script, more):
    torch.set_default_dtype(torch.float32)
    args = script.Args(rollouts=2, horizon=4, hidden=(4,), inner_steps=1, **more)
    env = gym.make_vec("point-goal-4c", num_envs=4 * args.rollouts, horizon=args.horizon)
    policy = script.GaussianPolicy(2, 2, args)
    agent = script.make_agent(policy, 1, torch.Generator().manual_seed(0), args)
    alphas, adapt = [], script.adapt
    monkeypatch.setattr(script, "adapt", lambda *a: alphas.append(a[3]) or adapt(*a))
    tasks = env.unwrapped.sample_tasks(4, np.random.default_rng(0))
    script.evaluate(env, tasks, policy, agent, dataclasses.replace(args, alpha=0.03))
    assert len(alphas) == 1 and (alphas[0] == 0.03).all(), "what --evaluate RUN --alpha 0.03 asks for"


def test_training_samples_with_the_parameters_of_each_learner(monkeypatch, tmp_path):
    torch.set_default_dtype(torch.float32)
    flags = dict(env="point-goal-4c", tasks=4, oracle=True, train_alpha=True, lr=0.05, iterations=2)
    args = small_args(**flags, run_dir=str(tmp_path))
    run, updates, update = promp.Run(args), [], promp.promp_update

    def record(policy, agent, optimizer, learner, data, args):
        before = {name: value.detach().clone() for name, value in agent.items()}
        updates.append((policy, before, learner, data))
        return update(policy, agent, optimizer, learner, data, args)

    monkeypatch.setattr(promp, "promp_update", record)
    promp.train(args, run)
    assert len(updates) == 2
    for policy, before, learner, (first, second) in updates:
        assert sorted(learner) == [0, 1, 2, 3]
        theta = before["theta"][learner]
        torch.testing.assert_close(first.mean, policy(theta, first.obs)[0])
        theta = promp.adapt(policy, theta, first, before["alpha"][learner], args)
        torch.testing.assert_close(second.mean, policy(theta, second.obs)[0])
    assert len(updates[1][1]["theta"][:, 0].unique()) == 4 and updates[1][1]["alpha"].std() > 0.01
    saved = torch.load(run.path / "checkpoint.pt", weights_only=True)
    assert saved["adam"]["state"][0]["step"] == 2 * args.updates
    assert saved["agent"].keys() == {"theta", "alpha", "eta"}


@pytest.mark.parametrize(
    "env_id, horizon, random",
    [("cheetah-dir", 100, False), ("ant-dir", 200, False), ("walker-dir", 200, False), ("walker-params-4c", 200, True)],
)
def test_presets_are_the_official_runs(env_id, horizon, random):
    a = promp.parse_args(["--env", env_id])
    assert (a.tasks, a.rollouts, a.inner_steps, a.hidden, a.gamma, a.gae_lambda) == (40, 20, 1, (64, 64), 0.99, 1.0)
    assert (a.lr, a.clip, a.kl_target, a.adapt_eta) == (1e-3, 0.3, 0.01, random)
    assert (a.alpha, a.updates, a.eta, a.horizon) == ((0.05, 3, 1e-3) if random else (0.1, 5, 5e-4)) + (horizon,)


POSITIVE = "--alpha, --action-scale, --lr, --clip and --kl-target must be positive"
RULES = [
    ("--env cheetah-vel --oracle", "--oracle needs clusters, and cheetah-vel has none"),
    ("--tasks 1", "--tasks must be at least 2, which hold every cluster"),
    ("--oracle --tasks 3", "--oracle needs --tasks to be a multiple of 2"),
    ("--mask-pad-actions", "--mask-pad-actions is for environments of several robots"),
    ("--inner-steps 0 --train-alpha", "--train-alpha and --adapt-eta need --inner-steps of at least 1"),
    ("--inner-steps 0 --adapt-eta", "--train-alpha and --adapt-eta need --inner-steps of at least 1"),
    *((f"--{name} 0", POSITIVE) for name in ("alpha", "action-scale", "lr", "clip", "kl-target")),
    ("--eta -1", "--eta must be at least 0"),
    ("--gamma 2", "--gamma and --gae-lambda must be in [0, 1]"),
    ("--gae-lambda -0.5", "--gamma and --gae-lambda must be in [0, 1]"),
]


@pytest.mark.parametrize("flags, message", RULES)
def test_what_must_hold(flags, message):
    with pytest.raises(SystemExit) as caught:
        promp.parse_args(flags.split())
    assert str(caught.value) == f"promp.py: error: {message}"


def test_every_rule_has_a_case():
    assert len({message for _, message in RULES}) == len(promp.check(promp.Args(), envs.ENVIRONMENTS["cheetah-dir"]))
    promp.parse_args("--env ant-cheetah-dir --oracle --tasks 4 --mask-pad-actions --eta 0".split())
    promp.parse_args("--inner-steps 0 --eval-steps 0".split())


# -- every flag, every task, every step --------------------------------------------------------------------------------


def test_training_is_the_loop_of_algorithm_1(monkeypatch, tmp_path):
    """Fresh tasks, n inner steps, η of the flag, all frames; held-out tasks at evaluation; what is logged."""
    torch.set_default_dtype(torch.float32)
    flags = dict(env="walker-dir", tasks=12, rollouts=2, horizon=50, inner_steps=2, eta=0.7, iterations=2)
    flags |= dict(train_alpha=True, lr=0.01)
    args = small_args(**flags, action_scale=1.0, hidden=(4,), eval_every=2, seed=3, run_dir=str(tmp_path))
    run, seen, collect = promp.Run(args), [], promp.collect
    drawn, sample_tasks = [], envs.TaskVectorEnv.sample_tasks

    def record(env, tasks, policy, theta, alphas, rng, args):
        seen.append((tasks, alphas, rng, collect(env, tasks, policy, theta, alphas, rng, args)))
        return seen[-1][-1]

    def draw(env, n, rng):
        drawn.append(str(rng.bit_generator.state))
        return sample_tasks(env, n, rng)

    monkeypatch.setattr(envs.TaskVectorEnv, "sample_tasks", draw)
    monkeypatch.setattr(promp, "collect", record)
    promp.train(args, run)
    first, *training, last = seen
    assert len(training) == 2 and len(set(drawn)) == 2, "fresh tasks"
    held_out = gym.make_vec(args.env, num_envs=1).unwrapped.task_set("test")
    for tasks, alphas, rng, _ in (first, last):
        np.testing.assert_array_equal(tasks.params, held_out.params)
        assert len(alphas) == 2 and rng.initial_seed() == 10**6 + 3
    with (run.path / "metrics.csv").open() as file:
        table = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    frames = 0
    for (_, alphas, rng, data), row in zip(training, table):
        assert len(alphas) == 2 and len(data) == 3 and rng is run.rng
        taken = sum(int(batch.taken.sum()) for batch in data)
        frames += taken
        assert row["charts/frames"] == frames and taken < 3 * 12 * 2 * 50, "falls"
        for k, batch in enumerate(data):
            assert row[f"train/return_step_{k}"] == pytest.approx(batch.reward.sum(-1).mean().item(), rel=1e-4)
    saved = torch.load(run.path / "agent.pt", weights_only=True)["agent"]
    assert saved["eta"].tolist() == [pytest.approx([0.7, 0.7])], "which only --adapt-eta changes"
    assert table[-1]["policy/alpha"] == pytest.approx(saved["alpha"].mean().item(), rel=1e-5) != args.alpha


def test_evaluation_takes_as_many_steps_as_training_and_at_least_one(monkeypatch):
    torch.set_default_dtype(torch.float32)
    taken, collect = [], promp.collect
    monkeypatch.setattr(promp, "collect", lambda *a: taken.append(len(a[4])) or collect(*a))
    for steps in (dict(inner_steps=0), dict(inner_steps=3), dict(inner_steps=3, eval_steps=2)):
        args = small_args(**steps)
        env = gym.make_vec("point-goal-4c", num_envs=4 * args.rollouts, horizon=args.horizon)
        policy = promp.GaussianPolicy(2, 2, args)
        agent = promp.make_agent(policy, 1, torch.Generator().manual_seed(0), args)
        promp.evaluate(env, env.unwrapped.sample_tasks(4, np.random.default_rng(0)), policy, agent, args)
    assert taken == [1, 3, 2]
