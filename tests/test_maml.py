"""MAML-TRPO's mathematics: closed forms, finite differences, slow second implementations, identities."""

import csv
import dataclasses
import math
from itertools import product

import gymnasium as gym
import maml
import numpy as np
import probes
import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

import envs

FORMS = ["log-likelihood", "likelihood-ratio", "dice"]


@pytest.fixture(autouse=True)
def double():
    """Everything here in float64, where finite differences are sharp."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small_args(**kwargs) -> maml.Args:
    return maml.Args(**(dict(hidden=(5,), rollouts=3, horizon=4, damping=0.0, num_threads=1) | kwargs))


def make_policy(args: maml.Args, obs_dim=3, action_dim=2) -> tuple[maml.GaussianPolicy, torch.Tensor]:
    policy = maml.GaussianPolicy(obs_dim, action_dim, args)
    theta = policy.init(torch.Generator().manual_seed(1)).double()
    return policy, theta + 0.1 * torch.randn_like(theta)


def make_batch(policy: maml.GaussianPolicy, theta: torch.Tensor, args: maml.Args, used=None) -> maml.Batch:
    """What theta [task, d] might have sampled, with falls."""
    m, k, h = len(theta), args.rollouts, args.horizon
    obs = torch.randn(m, k * h, policy.shapes[0][0])
    with torch.no_grad():
        mean, log_std = policy(theta, obs)
    action = mean + log_std.exp() * torch.randn_like(mean)
    alive = (torch.rand(m, k, h) > 0.2).double().cumprod(-1)
    alive[:, 0, 0] = 1
    reward = torch.randn(m, k, h) * alive
    used = torch.ones_like(log_std) if used is None else used
    weight = alive / alive.sum((1, 2), keepdim=True)
    return maml.process(maml.Batch(obs, action, mean, log_std, used, reward, weight), args)


def make_data(policy, theta, args, tasks=6, alpha=None) -> list[maml.Batch]:
    """D_0 .. D_n of some tasks, the last of which does not use the second action."""
    alpha = args.alpha if alpha is None else alpha
    theta_k, data, used = theta.expand(tasks, -1), [], torch.ones(tasks, 1, 2)
    used[-1, 0, 1] = 0
    for k in range(args.inner_steps + 1):
        if k > 0:
            theta_k = maml.adapt(policy, theta_k, data[-1], alpha, args)
        data.append(make_batch(policy, theta_k, args, used))
    return data


def plain_adapt(policy, theta, data, alpha, args) -> torch.Tensor:
    """θ'_i of all tasks by differentiating through every step, [task, d]."""
    theta_k = theta.expand(len(data[0].obs), -1)
    for batch in data[:-1]:
        loss = maml.inner_loss(policy, theta_k, batch, args).sum()
        theta_k = theta_k - alpha * torch.autograd.grad(loss, theta_k, create_graph=True)[0]
    return theta_k


def dense(policy, theta, data, alpha, args) -> tuple[torch.Tensor, torch.Tensor]:
    """J_i of every task [task, d, d], and the mean of J_iᵀ F_i J_i [d, d], entry by entry."""
    jacobian = torch.autograd.functional.jacobian(lambda p: plain_adapt(policy, p, data, alpha, args), theta)
    adapted = plain_adapt(policy, theta.clone().requires_grad_(), data, alpha, args).detach()
    total = 0
    for i, J in enumerate(jacobian):
        alone = data[-1].of(slice(i, i + 1))
        mean_of = lambda p: policy(p[None], alone.obs)[0][0]  # noqa: E731, B023
        G, weight = torch.autograd.functional.jacobian(mean_of, adapted[i]), alone.weight.flatten()
        used = alone.used[0, 0]
        F = torch.einsum("nad,nae,n,a->de", G, G, weight, used * (-2 * alone.log_std[0, 0]).exp())
        F[-2:, -2:] += 2 * torch.diag(used)
        total = total + J.T @ F @ J
    return jacobian, total / len(jacobian)


# -- policy ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_policy_against_modules_with_parameters_of_its_own_in_every_task(activation):
    args = small_args(hidden=(5, 4), activation=activation)
    policy, _ = make_policy(args)
    theta, obs = torch.randn(3, sum(policy.sizes)), torch.randn(3, 7, 3)
    mean, log_std = policy(theta, obs)
    assert mean.shape == (3, 7, 2) and log_std.shape == (3, 1, 2)
    for i in range(3):
        act = {"tanh": nn.Tanh, "relu": nn.ReLU}[activation]
        net = nn.Sequential(nn.Linear(3, 5), act(), nn.Linear(5, 4), act(), nn.Linear(4, 2))
        parts = [p.unflatten(0, s) for p, s in zip(theta[i].split(policy.sizes), policy.shapes)]
        for layer, w, b in zip(net[::2], parts[:-1:2], parts[1:-1:2]):
            layer.weight.data, layer.bias.data = w.T, b[0]
        torch.testing.assert_close(mean[i], net(obs[i]))
        torch.testing.assert_close(log_std[i], parts[-1])


@pytest.mark.parametrize("obs_dim", [1, 17])
def test_initial_parameters(obs_dim):
    policy = maml.GaussianPolicy(obs_dim, 6, maml.Args())
    parts = policy.init(torch.Generator().manual_seed(0)).split(policy.sizes)
    if obs_dim == 17:
        assert sum(policy.sizes) == 5708
    for weight, shape in zip(parts[:-1:2], policy.shapes[::2]):
        bound = math.sqrt(6 / sum(shape))
        assert 0.8 * bound < weight.abs().max() <= bound
    assert all((bias == 0).all() for bias in parts[1::2]) and (parts[-1] == 0).all()


def test_std_has_a_floor():
    policy, theta = make_policy(small_args())
    theta = theta.repeat(3, 1)
    theta[1, -2:] = torch.tensor([-50.0, 1.0])
    floor = math.log(1e-6)
    assert policy.log_std(theta[1]).tolist() == pytest.approx([floor, 1])
    assert torch.equal(policy.log_std(theta)[[0, 2]], theta[[0, 2], -2:])
    assert torch.equal(policy(theta, torch.randn(3, 4, 3))[1], policy.log_std(theta)[:, None])


def test_log_prob_and_kl_are_those_of_the_gaussian():
    args = small_args()
    policy, theta = make_policy(args)
    batch = make_batch(policy, theta.expand(2, -1), args)
    mean, log_std = policy(theta.expand(2, -1) + 0.1, batch.obs)
    old, new = Normal(batch.mean, batch.log_std.exp()), Normal(mean, log_std.exp())
    constant = math.log(2 * math.pi)  # of two actions
    expected = new.log_prob(batch.action).sum(-1) + constant
    weight = batch.weight.flatten(1)
    torch.testing.assert_close(maml.log_prob(mean, log_std, batch).flatten(1), torch.where(weight > 0, expected, 0))
    surrogate, kl = maml.surrogate(mean, log_std, batch), maml.mean_kl(mean, log_std, batch)
    torch.testing.assert_close(kl, (weight * kl_divergence(old, new).sum(-1)).sum(1))
    ratio = (new.log_prob(batch.action) - old.log_prob(batch.action)).sum(-1).exp()
    torch.testing.assert_close(surrogate, -(weight * ratio * batch.advantage.flatten(1)).sum(1))


# -- sample processing -------------------------------------------------------------------------------------------------


def test_returns_and_gae_against_the_definition():
    reward, value, gamma, lam = torch.randn(2, 3, 6), torch.randn(2, 3, 6), 0.9, 0.7
    returns, advantage = maml.discounted_returns(reward, gamma), maml.gae(reward, value, gamma, lam)
    for i, k in product(range(2), range(3)):
        for t in range(6):
            future = range(t, 6)
            assert returns[i, k, t] == pytest.approx(sum(gamma ** (s - t) * reward[i, k, s].item() for s in future))
            v = [*value[i, k].tolist(), 0.0]
            delta = [reward[i, k, s].item() + gamma * v[s + 1] - v[s] for s in range(6)]
            expected = sum((gamma * lam) ** (s - t) * delta[s] for s in future)
            assert advantage[i, k, t] == pytest.approx(expected)
    torch.testing.assert_close(maml.gae(reward, value, gamma, 1.0), returns - value)


def test_baseline_against_least_squares_on_the_steps_taken():
    m, k, h = 2, 4, 6
    obs, returns = 8 * torch.randn(m, k * h, 3), torch.randn(m, k, h)
    alive = (torch.rand(m, k, h) > 0.15).cumprod(-1).bool()
    fit = maml.linear_baseline(obs, returns, alive)
    for i in range(m):
        rows, goals = [], []
        for j, t in product(range(k), range(h)):
            s = np.clip(obs[i, j * h + t].numpy(), -10, 10)
            rows.append([*s, *s**2, t / 100, (t / 100) ** 2, (t / 100) ** 3, 1])
            goals.append(returns[i, j, t].item())
        rows, goals, taken = np.array(rows), np.array(goals), alive[i].flatten().numpy()
        x, y = rows[taken], goals[taken]
        w = np.linalg.solve(x.T @ x + 1e-5 * np.eye(10), x.T @ y)
        np.testing.assert_allclose(fit[i].flatten().numpy(), np.where(taken, rows @ w, 0), atol=1e-5)


def test_the_baselines_ridge_grows_until_the_factorisation_succeeds(monkeypatch):
    obs, returns, alive, ridges = torch.randn(2, 12, 3), torch.randn(2, 3, 4), torch.ones(2, 3, 4).bool(), []
    factorise = torch.linalg.cholesky_ex

    def fail_twice(a):
        ridges.append(a)
        factor, _ = factorise(a)
        return factor, torch.tensor([0, int(len(ridges) < 3)])  # in one task of two

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fail_twice)
    fit = maml.linear_baseline(obs, returns, alive)
    more = [(a - ridges[0]).diagonal(dim1=-2, dim2=-1) for a in ridges]
    for grown, expected in zip(more, (0, 1e-4 - 1e-5, 1e-3 - 1e-5), strict=True):
        torch.testing.assert_close(grown, torch.full_like(grown, expected), rtol=0, atol=1e-9)
    monkeypatch.undo()
    assert not torch.equal(fit, maml.linear_baseline(obs, returns, alive))


def test_advantages_are_normalised_in_every_task_over_the_steps_taken():
    args = small_args(rollouts=6, horizon=9)
    policy, theta = make_policy(args)
    batch = make_batch(policy, theta.expand(4, -1), args)
    taken = batch.taken
    assert not taken.all()
    for i in range(4):
        a = batch.advantage[i][taken[i]]
        assert abs(a.mean()) < 1e-6 and a.std(correction=0) == pytest.approx(1, abs=1e-5)
        assert (batch.advantage[i][~taken[i]] == 0).all()
        assert batch.weight[i].sum() == pytest.approx(1)


# -- inner loss and adaptation -----------------------------------------------------------------------------------------


def test_inner_losses_have_one_gradient_where_the_data_was_sampled_and_different_hessians():
    args = small_args()
    policy, theta = make_policy(args)
    batch = make_batch(policy, theta.expand(2, -1), args)
    found = [maml.inner_gradient(policy, theta.expand(2, -1), batch, small_args(inner_loss=kind)) for kind in FORMS]
    v = torch.randn_like(theta)
    for gradient, _ in found[1:]:
        torch.testing.assert_close(gradient, found[0][0])
    products = [hessian(v) for _, hessian in found]
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert (products[a] - products[b]).norm() > 1e-3 * products[a].norm()


def test_log_likelihood_loss_is_the_policy_gradient():
    args = small_args()
    policy, theta = make_policy(args)
    batch = make_batch(policy, theta[None], args)
    pi = Normal(*(x if i == 0 else x.exp() for i, x in enumerate(policy(theta[None], batch.obs))))
    taken = batch.taken.flatten()
    expected = -(pi.log_prob(batch.action).sum(-1)[0] * batch.advantage.flatten())[taken].mean()
    constant = math.log(2 * math.pi) * batch.advantage.flatten()[taken].mean()
    torch.testing.assert_close(maml.inner_loss(policy, theta[None], batch, args)[0], expected - constant)


def test_dice_by_the_magic_box():
    """Foerster et al. (2018): the box of all actions so far times the cost; here telescoped advantages."""
    args = small_args(inner_loss="dice")
    policy, theta = make_policy(args)
    batch = make_batch(policy, theta[None], args)

    def magic(parameters):
        log_pi = maml.log_prob(*policy(parameters[None], batch.obs), batch)[0]
        taken = batch.weight[0] > 0
        total = 0.0
        for k in range(args.rollouts):
            for t in range(args.horizon):
                if taken[k, t]:
                    end = t + 1 == args.horizon or not taken[k, t + 1]
                    cost = batch.advantage[0, k, t] - (0.0 if end else batch.advantage[0, k, t + 1])
                    upto = log_pi[k, : t + 1].sum()
                    total = total - (upto - upto.detach()).exp() * cost
        return total / taken.sum()

    ours = lambda parameters: maml.inner_loss(policy, parameters[None], batch, args)[0]  # noqa: E731
    for derivative in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian):
        torch.testing.assert_close(derivative(ours, theta), derivative(magic, theta))


def test_adaptation_is_a_gradient_step_of_all_parameters_on_the_tasks_own_data():
    args = small_args()
    policy, theta = make_policy(args)
    batch = make_batch(policy, theta.expand(3, -1), args)
    adapted = maml.adapt(policy, theta.expand(3, -1), batch, 0.1, args)
    for i in range(3):
        alone = batch.of(slice(i, i + 1))
        loss = lambda p: maml.inner_loss(policy, p[None], alone, args)[0]  # noqa: E731, B023
        torch.testing.assert_close(adapted[i], theta - 0.1 * torch.func.grad(loss)(theta))
    assert (adapted[:, -2:] != theta[-2:]).all(), "log σ adapts too"


# -- outer step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, steps", list(product(FORMS, (0, 1, 2))))
def test_meta_gradient_and_hessian_against_finite_differences(kind, steps):
    args = small_args(inner_loss=kind, inner_steps=steps)
    policy, theta = make_policy(args)
    data = make_data(policy, theta, args)
    surrogate, gradient, hvp = maml.linearise(policy, theta, data, args.alpha, args)
    objective = lambda p: torch.stack(maml.meta_objective(policy, p, data, args.alpha, args))  # noqa: E731
    for _ in range(3):
        v = torch.randn_like(theta)
        plus, minus = objective(theta + 1e-5 * v), objective(theta - 1e-5 * v)
        assert gradient @ v == pytest.approx(((plus - minus)[0] / 2e-5).item(), rel=1e-5, abs=1e-7)
        plus, middle, minus = (objective(theta + e * v)[1] for e in (1e-3, 0, -1e-3))
        assert v @ hvp(v) == pytest.approx(((plus - 2 * middle + minus) / 1e-6).item(), rel=1e-3)
    assert surrogate == pytest.approx(objective(theta)[0].item())


@pytest.mark.parametrize("kind, steps, activation", [*product(FORMS, (0, 1, 2), ("tanh",)), ("dice", 2, "relu")])
def test_meta_gradient_and_hessian_against_the_plain_version(kind, steps, activation):
    """Back-propagation through adaptation, twice for the KL; and JᵀFJ with dense matrices."""
    args = small_args(inner_loss=kind, inner_steps=steps, activation=activation)
    policy, theta = make_policy(args)
    data = make_data(policy, theta, args)
    _, gradient, hvp = maml.linearise(policy, theta, data, args.alpha, args)

    leaf = theta.clone().requires_grad_()
    output = policy(plain_adapt(policy, leaf, data, args.alpha, args), data[-1].obs)
    surrogate, kl = maml.surrogate(*output, data[-1]), maml.mean_kl(*output, data[-1])
    torch.testing.assert_close(gradient, torch.autograd.grad(surrogate.mean(), leaf, retain_graph=True)[0])
    v = torch.randn_like(theta)
    (slope,) = torch.autograd.grad(kl.mean(), leaf, create_graph=True)
    torch.testing.assert_close(hvp(v), torch.autograd.grad(slope @ v, leaf)[0])

    torch.testing.assert_close(hvp(v), dense(policy, theta, data, args.alpha, args)[1] @ v)


@pytest.mark.parametrize("kind, steps", list(product(FORMS, (1, 2))))
def test_with_a_rate_of_each_parameter_the_jacobian_is_not_symmetric(kind, steps):
    """∇S by differentiating through adaptation and by finite differences; JᵀFJ entry by entry."""
    args = small_args(inner_loss=kind, inner_steps=steps)
    policy, theta = make_policy(args)
    alpha = 0.5 * torch.rand_like(theta)
    alpha[::4] = 0
    data = make_data(policy, theta, args, alpha=alpha)
    _, gradient, hvp = maml.linearise(policy, theta, data, alpha, args)

    leaf = theta.clone().requires_grad_()
    surrogate = maml.surrogate(*policy(plain_adapt(policy, leaf, data, alpha, args), data[-1].obs), data[-1])
    torch.testing.assert_close(gradient, torch.autograd.grad(surrogate.mean(), leaf)[0])
    objective = lambda p: torch.stack(maml.meta_objective(policy, p, data, alpha, args))  # noqa: E731
    v = torch.randn_like(theta)
    plus, middle, minus = (objective(theta + e * v) for e in (1e-5, 0, -1e-5))
    assert gradient @ v == pytest.approx(((plus - minus)[0] / 2e-5).item(), rel=1e-5, abs=1e-7)
    assert surrogate.mean().item() == pytest.approx(middle[0].item())
    plus, middle, minus = (objective(theta + e * v)[1] for e in (1e-3, 0, -1e-3))
    assert v @ hvp(v) == pytest.approx(((plus - 2 * middle + minus) / 1e-6).item(), rel=1e-3)

    jacobian, hessian = dense(policy, theta, data, alpha, args)
    assert (jacobian - jacobian.mT).abs().max() > 1e-2
    found = torch.stack([hvp(e) for e in torch.eye(len(theta))])
    torch.testing.assert_close(found, hessian)
    torch.testing.assert_close(found, found.T)
    assert torch.linalg.eigvalsh(found)[0] > -1e-9 and v @ found @ v > 0


def test_float32_is_enough_and_chunks_do_not_matter(monkeypatch):
    args = small_args(inner_steps=2)
    policy, theta = make_policy(args)
    data, v = make_data(policy, theta, args, tasks=5), torch.randn_like(theta)
    exact = [part(v) if callable(part) else part for part in maml.linearise(policy, theta, data, args.alpha, args)]
    for chunk in (1, 2, 7):
        monkeypatch.setattr(maml, "CHUNK", chunk)
        again = [part(v) if callable(part) else part for part in maml.linearise(policy, theta, data, args.alpha, args)]
        for a, b in zip(again, exact):
            torch.testing.assert_close(a, b)
    single = [maml.Batch(*(x.float() for x in batch)) for batch in data]
    rough = [
        p(v.float()) if callable(p) else p for p in maml.linearise(policy, theta.float(), single, args.alpha, args)
    ]
    for a, b in zip(rough, exact):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-4)


def test_without_inner_steps_it_is_plain_trpo():
    """The gradient is the policy gradient over all tasks, the Hessian the mean Fisher matrix."""
    args = small_args(inner_steps=0)
    policy, theta = make_policy(args)
    (batch,) = data = make_data(policy, theta, args)
    _, gradient, hvp = maml.linearise(policy, theta, data, args.alpha, args)
    leaf = theta.clone().requires_grad_()
    log_pi = maml.log_prob(*policy(leaf.expand(6, -1), batch.obs), batch)
    loss = -(batch.weight * batch.advantage * log_pi).sum() / 6
    torch.testing.assert_close(gradient, torch.autograd.grad(loss, leaf)[0])
    v, kl = torch.randn_like(theta), lambda p: maml.meta_objective(policy, p, data, args.alpha, args)[1]
    assert v @ hvp(v) == pytest.approx((kl(theta + 1e-3 * v) + kl(theta - 1e-3 * v)).item() / 1e-6, rel=1e-3)


def test_damping_is_added():
    args = small_args()
    policy, theta = make_policy(args)
    data, v = make_data(policy, theta, args), torch.randn_like(theta)
    plain = maml.linearise(policy, theta, data, args.alpha, args)[2](v)
    damped = maml.linearise(policy, theta, data, args.alpha, dataclasses.replace(args, damping=0.3))[2](v)
    torch.testing.assert_close(damped, plain + 0.3 * v)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_at_the_start_the_kl_and_the_surrogate_are_0(steps):
    args = small_args(inner_steps=steps)
    policy, theta = make_policy(args)
    surrogate, kl = maml.meta_objective(policy, theta, make_data(policy, theta, args), args.alpha, args)
    assert abs(surrogate) < 1e-6 and abs(kl) < 1e-6


def test_conjugate_gradient_against_solve():
    a = torch.randn(12, 12)
    a, b = a @ a.T + torch.eye(12), torch.randn(12)
    x, curvature = maml.conjugate_gradient(lambda v: a @ v, b, 50)
    torch.testing.assert_close(x, torch.linalg.solve(a, b), atol=1e-4, rtol=1e-4)
    for iterations in (1, 3, 50):
        x, curvature = maml.conjugate_gradient(lambda v: a @ v, b, iterations)
        torch.testing.assert_close(curvature, x @ a @ x)


@pytest.mark.parametrize("steps, delta", list(product((0, 1, 2), (1e-3, 1e-2, 1.0))))
def test_accepted_steps_lower_the_surrogate_within_the_trust_region(steps, delta):
    args = small_args(inner_steps=steps, delta=delta, rollouts=10, horizon=10)
    policy, theta = make_policy(args)
    data = make_data(policy, theta, args)
    new, stats = maml.trpo_step(policy, theta, data, args.alpha, args)
    surrogate, kl = maml.meta_objective(policy, new, data, args.alpha, args)
    assert 0 < kl <= delta and surrogate < stats["trpo/surrogate_before"]
    assert stats["trpo/kl"] == pytest.approx(kl.item()) and stats["trpo/step_ratio"] > 0
    step = (new - theta) / stats["trpo/step_ratio"]
    _, _, product = maml.linearise(policy, theta, data, args.alpha, args)
    assert 0.5 * (step @ product(step)).item() == pytest.approx(delta, rel=1e-4), "the quadratic model hits δ"
    if stats["trpo/step_ratio"] < 1:  # the candidate before was no good
        worse = maml.meta_objective(policy, theta + stats["trpo/step_ratio"] / 0.8 * step, data, args.alpha, args)
        assert worse[1] > delta or worse[0] >= stats["trpo/surrogate_before"]


def test_a_step_that_helps_nowhere_is_not_taken(monkeypatch):
    args = small_args()
    policy, theta = make_policy(args)
    data = make_data(policy, theta, args)
    nan = torch.tensor(float("nan"))
    for answer in ((torch.tensor(-1.0), torch.tensor(2.0)), (torch.tensor(1.0), torch.tensor(0.0)), (nan, nan)):
        asked = []
        monkeypatch.setattr(maml, "meta_objective", lambda _, x, *__, answer=answer, to=asked: to.append(x) or answer)
        new, stats = maml.trpo_step(policy, theta, data, args.alpha, args)
        assert (new == theta).all() and stats["trpo/step_ratio"] == 0 and len(asked) == 15
        steps = torch.stack([candidate - theta for candidate in asked])
        torch.testing.assert_close(steps[1:], 0.8 * steps[:-1])


def test_slack_accepts_a_little_more_than_the_trust_region(monkeypatch):
    args = small_args(delta=0.01)
    policy, theta = make_policy(args)
    data = make_data(policy, theta, args)
    for slack, kl, taken in ((0, 0.01, 1), (0, 0.0105, 0), (0.1, 0.0105, 1), (0.1, 0.0111, 0)):
        answer = torch.tensor(-1.0), torch.tensor(kl)
        monkeypatch.setattr(maml, "meta_objective", lambda *_, answer=answer: answer)
        _, stats = maml.trpo_step(policy, theta, data, args.alpha, dataclasses.replace(args, kl_slack=slack))
        assert stats["trpo/step_ratio"] == taken and stats["trpo/kl"] == pytest.approx(kl * taken)


def test_the_step_with_a_rate_of_each_parameter():
    args = small_args(inner_steps=2)
    policy, theta = make_policy(args)
    alpha = 0.3 * torch.rand_like(theta)
    data = make_data(policy, theta, args, alpha=alpha)
    new, stats = maml.trpo_step(policy, theta, data, alpha, args)
    after, kl = maml.meta_objective(policy, new, data, alpha, args)
    assert stats["trpo/kl"] == pytest.approx(kl.item()) and stats["trpo/surrogate_after"] == pytest.approx(after.item())
    assert 0 < kl <= args.delta and after < stats["trpo/surrogate_before"]
    assert (maml.trpo_step(policy, theta, data, args.alpha, args)[0] - new).abs().max() > 1e-3


def test_meta_gradient_of_a_bandit_by_hand():
    """One action from N(m, 1), parameters (m, ln σ): ∇J = (I - α H) ∇J(θ'), with score, H and ∇J(θ') written out."""
    for kind in ("log-likelihood", "likelihood-ratio"):
        args = small_args(rollouts=50, horizon=1, hidden=(), inner_loss=kind)
        policy, theta = maml.GaussianPolicy(1, 1, args), torch.zeros(3)  # weight, bias m, log σ
        data = []
        for theta_k in (theta, None):
            theta_k = maml.adapt(policy, theta[None], data[0], 0.1, args) if data else theta[None]
            batch = make_batch(policy, theta_k, args)
            batch = batch._replace(obs=torch.zeros_like(batch.obs), weight=torch.full((1, 50, 1), 0.02))
            mean, log_std = policy(theta_k, batch.obs)
            action = mean + log_std.exp() * torch.randn_like(mean)
            reward = -((action - 1) ** 2).view(1, 50, 1)
            batch = batch._replace(mean=mean, log_std=log_std, action=action, reward=reward)
            data.append(maml.process(batch, args))
        _, gradient, _ = maml.linearise(policy, theta, data, args.alpha, args)
        first, second = data
        a, A = first.action.flatten(), first.advantage.flatten()
        m, sigma = (0.1 * A * a).mean(), (0.1 * A * (a**2 - 1)).mean().exp()
        torch.testing.assert_close(second.mean.flatten(), m.expand(50))
        b, B = (second.action.flatten() - m) / sigma, second.advantage.flatten()
        slope = torch.stack([-(B * b).mean() / sigma, -(B * (b**2 - 1)).mean()])  # of J in (mean, log σ)
        H = torch.tensor([[A.mean(), (2 * A * a).mean()], [(2 * A * a).mean(), (2 * A * a**2).mean()]])
        if kind == "likelihood-ratio":
            score = torch.stack([a, a**2 - 1])
            H = H - (A * score) @ score.T / 50
        torch.testing.assert_close(gradient[1:], (torch.eye(2) - 0.1 * H) @ slope)


# -- sampler -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def single():
    torch.set_default_dtype(torch.float32)


def test_the_step_in_which_a_simulation_diverges_is_not_taken(single):
    args, env = maml.Args(rollouts=1, horizon=6, hidden=(4,)), probes.Breaks(num_envs=2, horizon=6)
    policy = maml.GaussianPolicy(2, 2, args)
    theta = policy.init(torch.Generator().manual_seed(0)).expand(2, -1)
    batch = maml.sample(env, env.task_set("train")[:2], policy, theta, torch.Generator().manual_seed(0), args)
    assert batch.taken.sum((1, 2)).tolist() == [6, 3]
    torch.testing.assert_close(batch.weight.sum((1, 2)), torch.ones(2))


@pytest.mark.parametrize("env_id", ["walker-dir", "ml2"])
def test_samples_are_what_the_environment_said(single, env_id):
    """Replayed one copy at a time: scaled and clipped actions, the task's own parameters, masks after falls."""
    args = maml.Args(rollouts=2, horizon=80, num_threads=1, hidden=(4,))
    env = gym.make_vec(env_id, num_envs=6, horizon=80)
    tasks = env.unwrapped.sample_tasks(3, np.random.default_rng(0))
    policy = maml.GaussianPolicy(17, 6, args)
    theta = torch.stack([policy.init(torch.Generator().manual_seed(i)) for i in range(3)])
    theta[:, -6:] = 1.5  # some actions leave the box
    rng = torch.Generator().manual_seed(5)
    batch = maml.sample(env, tasks, policy, theta, rng, args)
    seed = maml.random_seed(torch.Generator().manual_seed(5))
    fell = 0
    for i, k in product(range(3), range(2)):
        alone = gym.make_vec(env_id, num_envs=1, horizon=80)
        obs, _ = alone.reset(seed=seed + 2 * i + k, options={"tasks": tasks[i]})
        over = False
        for t in range(80):
            n = k * 80 + t
            np.testing.assert_array_equal(batch.obs[i, n], obs[0])
            mean, log_std = policy(theta[i : i + 1], batch.obs[i : i + 1, n : n + 1])
            torch.testing.assert_close(batch.mean[i, n], mean[0, 0])
            torch.testing.assert_close(batch.log_std[i], log_std[0])
            assert (batch.weight[i, k, t] > 0) == (not over)
            obs, reward, terminated, *_ = alone.step((batch.action[i, n : n + 1] / 10).clamp(-1, 1).numpy())
            assert batch.reward[i, k, t] == pytest.approx(reward[0], rel=1e-5)
            over |= bool(terminated[0])
        fell += over
    assert fell > 0
    noise = ((batch.action - batch.mean) / batch.log_std.exp()).flatten()
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05 and (batch.action.abs() > 10).any()


def test_the_next_phase_keeps_the_tasks_and_draws_new_starts(single):
    args = maml.Args(rollouts=2, horizon=3, num_threads=1)
    env = gym.make_vec("cheetah-vel", num_envs=6, horizon=3)
    tasks = env.unwrapped.sample_tasks(3, np.random.default_rng(0))
    policy = maml.GaussianPolicy(20, 6, args)
    theta, rng = policy.init(torch.Generator()).expand(3, -1), torch.Generator().manual_seed(0)
    first = maml.sample(env, tasks, policy, theta, rng, args)
    second = maml.sample(env, None, policy, theta, rng, args)
    np.testing.assert_array_equal(env.unwrapped.tasks.params, np.repeat(tasks.params, 2, 0))
    assert (first.obs[:, 0] != second.obs[:, 0]).any(-1).all()
    again = maml.sample(env, tasks, policy, theta, torch.Generator().manual_seed(0), args)
    assert all(torch.equal(a, b) for a, b in zip(first[:-1], again[:-1]))


def test_collect_is_the_loop_over_samples_and_gradient_steps(single):
    args = maml.Args(rollouts=2, horizon=30, num_threads=1, hidden=(4,))
    env = gym.make_vec("walker-dir", num_envs=6, horizon=30)
    tasks = env.unwrapped.sample_tasks(3, np.random.default_rng(0))
    policy = maml.GaussianPolicy(17, 6, args)
    theta = torch.stack([policy.init(torch.Generator().manual_seed(i)) for i in range(3)])
    alphas = [0.1, 0.2 * torch.rand(theta.shape[1]), 0.2 * torch.rand_like(theta)]
    found = maml.collect(env, tasks, policy, theta, alphas, torch.Generator().manual_seed(5), args)

    rng, data = torch.Generator().manual_seed(5), []
    for k in range(4):
        if k > 0:
            theta = theta.clone().requires_grad_()
            loss = maml.inner_loss(policy, theta, data[-1], args).sum()
            theta = (theta - alphas[k - 1] * torch.autograd.grad(loss, theta)[0]).detach()
        batch = maml.sample(env, tasks if k == 0 else None, policy, theta, rng, args)
        data.append(maml.process(batch, args))
    assert len(found) == 4
    for a, b in zip(found, data):
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert not torch.equal(data[2].mean[:, 0], data[3].mean[:, 0])


def test_padding_actions_leave_the_policy_with_the_flag(single):
    args = maml.Args(rollouts=2, horizon=5, num_threads=1, mask_pad_actions=True)
    env = gym.make_vec("ant-cheetah-dir", num_envs=8, horizon=5)
    tasks = env.unwrapped.sample_tasks(4, np.random.default_rng(0))
    policy = maml.GaussianPolicy(111, 8, args)
    theta, rng = policy.init(torch.Generator()).expand(4, -1), torch.Generator().manual_seed(0)
    for masked in (True, False):
        args = dataclasses.replace(args, mask_pad_actions=masked, inner_loss="dice")
        batch = maml.process(maml.sample(env, tasks, policy, theta, rng, args), args)
        assert [int(n) for n in batch.used.sum((1, 2))] == [8 if c == 0 or not masked else 6 for c in tasks.cluster]
        gradient, hessian = maml.inner_gradient(policy, theta, batch, args)
        _, outer, fisher = maml.outer_gradient(policy, theta, batch)
        v = torch.randn(theta.shape[1])
        for out in (gradient, outer, hessian(v), fisher(v)):
            log_std_of_padding = out[torch.from_numpy(tasks.cluster == 1), -2:]
            assert (log_std_of_padding == 0).all() == masked


# -- evaluation and command line ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps, expected",
    [
        (dict(inner_steps=2, eval_steps=3), [0.1, 0.1, 0.05]),
        (dict(inner_steps=2), [0.1, 0.1]),
        (dict(inner_steps=0), [0.1]),
    ],
    ids=str,
)
def test_evaluation_gives_the_true_cluster_its_learner_and_halves_later_steps(single, monkeypatch, steps, expected):
    args = maml.Args(rollouts=2, horizon=4, num_threads=1, oracle=True, **steps)
    env = gym.make_vec("cheetah-dir", num_envs=8, horizon=4)
    tasks = envs.Tasks(np.array([[1.0], [-1], [-1], [1]]), np.array([0, 1, 1, 0]))
    policy = maml.GaussianPolicy(17, 6, args)
    theta = torch.stack([policy.init(torch.Generator().manual_seed(i)) for i in range(2)])
    sampled, rates, batches, sample, adapt = [], [], [], maml.sample, maml.adapt
    monkeypatch.setattr(maml, "sample", lambda *a: sampled.append(a[3]) or batches.append(sample(*a)) or batches[-1])
    monkeypatch.setattr(maml, "adapt", lambda *a: rates.append(a[3]) or adapt(*a))
    metrics, traces = maml.evaluate(env, tasks, policy, theta, args)
    assert torch.equal(sampled[0], theta[[0, 1, 1, 0]]) and rates == expected
    assert traces["returns"].shape == (len(expected) + 1, 4, 2)
    for k in range(len(expected) + 1):
        mean, first_rollouts = traces["returns"][k].mean(1), batches[k].obs[:, :4, :2]
        np.testing.assert_array_equal(traces["trace"][k], first_rollouts.transpose(0, 1))
        assert metrics[f"eval/return_step_{k}"] == pytest.approx(mean.mean())
        assert metrics[f"eval/return_step_{k}_cluster_1"] == pytest.approx(mean[1:3].mean())
    again, _ = maml.evaluate(env, tasks, policy, theta, args)
    assert again == metrics


def test_learners_are_the_true_clusters_of_the_oracle():
    tasks = envs.Tasks(np.zeros((3, 1)), np.array([1, 0, 1]))
    assert maml.assign(tasks, maml.Args(oracle=True)).tolist() == [1, 0, 1]
    assert maml.assign(tasks, maml.Args()).tolist() == [0, 0, 0]


def test_the_defaults_are_promps_maml_run_and_flags_make_them_finns():
    assert maml.parse_args([]) == maml.parse_args(["--preset", "paper"]) == maml.Args(preset="paper")
    a = maml.Args()
    assert (a.tasks, a.rollouts, a.horizon, a.inner_steps, a.alpha) == (40, 20, 100, 1, 0.1)
    assert (a.gamma, a.gae_lambda, a.delta, a.cg_iterations, a.backtracks) == (0.99, 1.0, 0.01, 10, 15)
    finn = maml.parse_args("--env cheetah-vel --horizon 200 --hidden 100 100 --activation relu".split())
    assert (finn.horizon, finn.hidden, finn.activation) == (200, (100, 100), "relu")
    none = maml.parse_args(["--inner-steps", "0", "--eval-steps", "0", "--num-threads", "0"])
    assert none.inner_steps == none.eval_steps == 0


RULES = [
    ("--env cheetah-vel --oracle", "--oracle needs clusters, and cheetah-vel has none"),
    ("--env point-goal-4c --tasks 3", "--tasks must be at least 4, which hold every cluster"),
    ("--oracle --tasks 3", "--oracle needs --tasks to be a multiple of 2"),
    ("--mask-pad-actions", "--mask-pad-actions is for environments of several robots"),
    ("--alpha 0", "--alpha, --action-scale and --delta must be positive"),
    ("--action-scale -1", "--alpha, --action-scale and --delta must be positive"),
    ("--delta 0", "--alpha, --action-scale and --delta must be positive"),
    ("--damping -1", "--damping and --kl-slack must be at least 0"),
    ("--kl-slack -0.1", "--damping and --kl-slack must be at least 0"),
    ("--gamma 2", "--gamma and --gae-lambda must be in [0, 1]"),
    ("--gae-lambda -0.5", "--gamma and --gae-lambda must be in [0, 1]"),
]


@pytest.mark.parametrize("flags, message", RULES)
def test_what_must_hold(flags, message):
    with pytest.raises(SystemExit) as caught:
        maml.parse_args(flags.split())
    assert str(caught.value) == f"maml.py: error: {message}"


def test_every_rule_has_a_case():
    assert len({message for _, message in RULES}) == len(maml.check(maml.Args(), envs.ENVIRONMENTS["cheetah-dir"]))
    maml.parse_args("--env ant-cheetah-dir --oracle --tasks 4 --mask-pad-actions --damping 0".split())


def test_every_learner_of_multi_maml_gets_the_tasks_of_its_cluster(single, monkeypatch, tmp_path):
    """And does with them what a single MAML would."""
    args = maml.Args(rollouts=2, horizon=5, tasks=4, oracle=True, iterations=1, run_dir=str(tmp_path), num_threads=1)
    run = maml.Run(args)
    steps, batches, trpo_step, sample = [], [], maml.trpo_step, maml.sample
    monkeypatch.setattr(maml, "sample", lambda env, *a: batches.append((env, sample(env, *a))) or batches[-1][1])
    monkeypatch.setattr(maml, "trpo_step", lambda p, t, *a: steps.append((p, t.clone(), *a)) or trpo_step(p, t, *a))
    maml.train(args, run)
    (env, before), (_, after) = batches[2:4]  # between the evaluations
    cluster = env.unwrapped.tasks.cluster[::2]
    assert sorted(cluster) == [0, 0, 1, 1] and len(steps) == 2
    assert run.frames == sum(int(batch.taken.sum()) for batch in (before, after)) == 2 * 4 * 2 * 5
    saved = torch.load(run.path / "agent.pt", weights_only=True)["agent"]["theta"]
    for m, (policy, theta, data, alpha, _) in enumerate(steps):
        for batch, everyones in zip(data, (before, after)):
            assert torch.equal(batch.obs, everyones.obs[cluster == m])
        assert torch.equal(saved[m], trpo_step(policy, theta, data, alpha, args)[0])


# -- every flag, every task, every step --------------------------------------------------------------------------------


def test_advantages_are_gae_over_the_baseline_of_the_steps_taken():
    args = small_args(rollouts=20, horizon=9, gamma=0.9, gae_lambda=0.7)
    policy, theta = make_policy(args)
    batch = make_batch(policy, theta.expand(3, -1), args)
    baseline = maml.linear_baseline(batch.obs, maml.discounted_returns(batch.reward, 0.9), batch.taken)
    advantage = maml.gae(batch.reward, baseline, 0.9, 0.7)
    assert not batch.taken.all()
    for found, expected, taken in zip(batch.advantage, advantage, batch.taken):
        a = expected[taken]
        torch.testing.assert_close(found[taken], (a - a.mean()) / a.std(correction=0), atol=1e-5, rtol=1e-5)


def test_the_numbers_of_candidates_and_of_conjugate_gradients_are_the_flags(monkeypatch):
    args = small_args(backtracks=4, cg_iterations=3)
    policy, theta = make_policy(args)
    data, asked, iterations, solve = make_data(policy, theta, args), [], [], maml.conjugate_gradient
    monkeypatch.setattr(maml, "conjugate_gradient", lambda *a: iterations.append(a[2]) or solve(*a))
    never = torch.tensor(1.0), torch.tensor(0.0)
    monkeypatch.setattr(maml, "meta_objective", lambda *a: asked.append(a) or never)
    maml.trpo_step(policy, theta, data, args.alpha, args)
    assert len(asked) == 4 and iterations == [3]


def test_training_is_the_loop_of_algorithm_3(single, monkeypatch, tmp_path):
    """Fresh tasks, n steps of α, every learner's own step, all frames; held-out tasks at evaluation; what is logged."""
    flags = dict(env="walker-dir", oracle=True, tasks=12, rollouts=2, horizon=50, inner_steps=2, alpha=0.03)
    flags |= dict(action_scale=1.0, hidden=(4,), iterations=2, eval_every=2, seed=3, num_threads=1)
    args = maml.Args(**flags, run_dir=str(tmp_path))
    run, seen, steps, collect, trpo_step = maml.Run(args), [], [], maml.collect, maml.trpo_step
    drawn, sample_tasks = [], envs.TaskVectorEnv.sample_tasks

    def record(env, tasks, policy, theta, alphas, rng, args):
        seen.append((tasks, theta.clone(), alphas, rng, collect(env, tasks, policy, theta, alphas, rng, args)))
        return seen[-1][-1]

    def step(policy, theta, data, alpha, args):
        steps.append((alpha, *trpo_step(policy, theta, data, alpha, args)))
        return steps[-1][1:]

    def draw(env, n, rng):
        drawn.append(str(rng.bit_generator.state))
        return sample_tasks(env, n, rng)

    monkeypatch.setattr(envs.TaskVectorEnv, "sample_tasks", draw)
    monkeypatch.setattr(maml, "collect", record)
    monkeypatch.setattr(maml, "trpo_step", step)
    maml.train(args, run)
    first, *training, last = seen
    assert len(training) == 2 and len(set(drawn)) == 2, "fresh tasks"
    held_out = gym.make_vec(args.env, num_envs=1).unwrapped.task_set("test")
    for tasks, _, alphas, rng, _ in (first, last):
        np.testing.assert_array_equal(tasks.params, held_out.params)
        assert alphas == [0.03] * 2 and rng.initial_seed() == 10**6 + 3
    with (run.path / "metrics.csv").open() as file:
        table = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert len(training[0][1].unique(dim=0)) == 2, "every learner begins elsewhere"
    frames, policy = 0, maml.GaussianPolicy(17, 6, args)
    for k, ((_, _, alphas, rng, data), row) in enumerate(zip(training, table)):
        mine = steps[2 * k : 2 * k + 2]
        assert alphas == [0.03] * 2 and rng is run.rng and [alpha for alpha, *_ in mine] == [0.03] * 2
        taken = sum(int(batch.taken.sum()) for batch in data)
        frames += taken
        assert row["charts/frames"] == frames and taken < 3 * 12 * 2 * 50, "falls"
        for n, batch in enumerate(data):
            assert row[f"train/return_step_{n}"] == pytest.approx(batch.reward.sum(-1).mean().item(), rel=1e-4)
        assert row["trpo/kl"] == pytest.approx(np.mean([stats["trpo/kl"] for *_, stats in mine]), rel=1e-4)
        std, adapted = policy.log_std(torch.stack([new for _, new, _ in mine])).exp(), data[-1].log_std.exp()
        assert row["policy/std"] == pytest.approx(std.mean().item(), rel=1e-5)
        assert row["policy/std_adapted"] == pytest.approx(adapted.mean().item(), rel=1e-5)
