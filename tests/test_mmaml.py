"""MMAML's mathematics: what ProMP's tests do not cover, which is the encoder, the modulation, and their gradients."""

import csv
import dataclasses
import math
from functools import partial

import gymnasium as gym
import mmaml
import numpy as np
import promp
import pytest
import torch
from conftest import train
from test_maml import double, make_batch  # noqa: F401  (float64 throughout)
from torch import nn
from torch.distributions import Normal, kl_divergence

import envs

OPERATORS = ["film-scale", "film", "softmax", "sigmoid"]


def small_args(**kwargs) -> mmaml.Args:
    return mmaml.Args(**(dict(hidden=(5, 4), rollouts=3, horizon=6, num_threads=1, encoder_width=7) | kwargs))


def make_agent(args: mmaml.Args) -> tuple[mmaml.GaussianPolicy, nn.ParameterDict, torch.optim.Optimizer]:
    """With a weight η of its own for every step, and an encoder whose biases are not 0."""
    policy = mmaml.GaussianPolicy(3, 2, args)
    agent = mmaml.make_agent(policy, 1, torch.Generator().manual_seed(1), args)
    for parameter in (agent["theta"], *agent.encoder.parameters()):
        parameter.data += 0.3 * torch.randn_like(parameter)
    agent["eta"].data *= 1 + torch.arange(agent["eta"].numel()).view_as(agent["eta"])
    return policy, agent, torch.optim.Adam([p for p in agent.parameters() if p.requires_grad], args.lr)


def sampled(policy, theta, args) -> mmaml.Batch:
    """What the policy of these parameters might have sampled; after a fall there is rubbish."""
    return mmaml.Batch(*make_batch(policy, theta, args))


def plain_mean(policy, theta, obs, tau, args) -> torch.Tensor:
    """The mean of one task's policy, [row, action]: the operator is applied to what goes into the activation."""
    parts = [p.view(shape) for p, shape in zip(theta.split(policy.sizes), policy.shapes)]
    for n, width in enumerate(args.hidden):
        h = obs @ parts[2 * n] + parts[2 * n + 1]
        if tau is not None:
            mine, tau = tau.split([size := width * (1 + (args.modulation == "film")), len(tau) - size])
            if args.modulation == "film-scale":
                h = h + h * mine
            elif args.modulation == "film":
                h = h + h * mine[:width] + mine[width:]
            elif args.modulation == "softmax":
                h = h * mine.exp() / mine.exp().sum()
            else:
                h = h / (1 + (-mine).exp())
        obs = h.tanh()
    return obs @ parts[-3] + parts[-2]


def plain_tau(encoder, batch, i) -> torch.Tensor:
    """τ of task i: one GRU call a rollout, over its own steps."""
    means = []
    obs, action = (x[i].unflatten(0, batch.reward.shape[1:]) for x in (batch.obs, batch.action))
    for k, reward in enumerate(batch.reward[i]):
        steps = int(batch.taken[i, k].sum())
        x = torch.cat([obs[k], action[k], reward[:, None]], -1)[:steps]
        means.append(encoder.of_rollout(encoder.gru(x)[1][0]) if steps else encoder.of_rollout(torch.zeros(7)))
    return encoder.generator(encoder.of_task(sum(means) / len(means)))


def plain_objective(policy, encoder, theta, alpha, eta, data, args) -> torch.Tensor:
    """The mean over tasks, one after the other."""
    total, tasks = 0.0, len(data[0].obs)
    for i in range(tasks):
        tau, theta_k = plain_tau(encoder, data[0], i), theta
        for k, batch in enumerate(data):
            obs, weight, adv = batch.obs[i], batch.weight[i].flatten(), batch.advantage[i].flatten()
            old = Normal(batch.mean[i], batch.log_std[i].exp())

            def new(tau, theta_k=theta_k, obs=obs):
                return Normal(plain_mean(policy, theta_k, obs, tau, args), theta_k[-2:].exp())

            def ratio(new, old=old, action=batch.action[i]):
                return (new.log_prob(action) - old.log_prob(action)).sum(-1).exp()

            if k == args.inner_steps:
                rho = ratio(new(tau))
                gain = torch.minimum(rho * adv, rho.clamp(1 - args.clip, 1 + args.clip) * adv)
                total = total - (weight * gain).sum() / tasks
            else:
                kl = kl_divergence(old, new(tau if k > 0 else None)).sum(-1)
                total = total + eta[k] * (weight * kl).sum() / args.inner_steps / tasks
                first = args.modulate_first_step or k > 0
                loss = -(weight * ratio(new(tau if first else None)) * adv).sum()
                theta_k = theta_k - alpha * torch.autograd.grad(loss, theta_k, create_graph=True)[0]
    return total


def make_data(policy, agent, tasks, args) -> list[mmaml.Batch]:
    """D_0 .. D_n as collect would sample them."""
    theta = agent["theta"].detach().expand(tasks, -1)
    data, alpha = [sampled(policy, theta, args)], agent["alpha"].detach()
    tau = mmaml.infer(agent.encoder, data[0], args).detach()
    for k in range(args.inner_steps):
        in_force = tau if k > 0 or args.modulate_first_step else None
        theta = mmaml.adapt(mmaml.with_tau(policy, in_force, args), theta, data[-1], alpha, args)
        data.append(sampled(policy, mmaml.modulate(policy, theta, tau, args), args))
    return data


# -- without modulation ------------------------------------------------------------------------------------------------


def rows(path) -> list[dict[str, str]]:
    """Of a CSV, without its columns of the clock."""
    with path.open() as file:
        table = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "charts/sps"))} for row in table]


@pytest.mark.parametrize("oracle, inner_steps", [(False, 2), (True, 2), (False, 0)])
def test_without_modulation_it_is_promp_to_the_last_digit(tmp_path, oracle, inner_steps):
    torch.set_default_dtype(torch.float32)
    flags = dict(env="point-2m", tasks=4, rollouts=3, horizon=8, iterations=3, eval_every=1, hidden=(6,))
    flags |= dict(inner_steps=inner_steps)
    flags |= dict(clip=0.2, lr=0.01, oracle=oracle, train_alpha=oracle, adapt_eta=oracle)
    paths = [
        train(promp, run_dir=str(tmp_path / "promp"), **flags),
        train(mmaml, run_dir=str(tmp_path / "mmaml"), modulation="none", **flags),
    ]
    evaluations = [(path / "eval.csv").read_text() for path in paths]
    assert evaluations[0] == evaluations[1] and len(evaluations[0].splitlines()) == 5
    metrics = [rows(path / "metrics.csv") for path in paths]
    assert metrics[0] == metrics[1] and all(float(row["promp/kl_outer"]) > 0 for row in metrics[0])
    first, second = (torch.load(path / "agent.pt", weights_only=True)["agent"] for path in paths)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# -- the operators -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS)
def test_modulated_parameters_do_what_modulated_activations_do(operator):
    args = small_args(modulation=operator)
    policy, agent, _ = make_agent(args)
    theta, obs = torch.randn(3, sum(policy.sizes)), torch.randn(3, 9, 3)
    tau = torch.randn(3, agent.encoder.generator.out_features)
    phi = mmaml.modulate(policy, theta, tau, args)
    mean, log_std = mmaml.with_tau(policy, tau, args)(theta, obs)
    torch.testing.assert_close(mean, policy(phi, obs)[0])
    for i in range(3):
        torch.testing.assert_close(mean[i], plain_mean(policy, theta[i], obs[i], tau[i], args))
    torch.testing.assert_close(phi[:, -12:], theta[:, -12:])  # output layer [4, 2], its bias, log σ
    torch.testing.assert_close(log_std[:, 0], theta[:, -2:])
    assert mmaml.modulate(policy, theta, None, args) is theta
    zero = mmaml.modulate(policy, theta, torch.zeros_like(tau), args)
    assert torch.equal(zero, theta) == operator.startswith("film")


# -- the encoder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator, outputs", [("film-scale", 128), ("film", 256), ("softmax", 128), ("sigmoid", 128)])
def test_the_encoder_has_the_official_sizes(operator, outputs):
    """For the point: 7 inputs; a GRU and four layers of 64 units. PyTorch's GRU has two biases a gate, Keras' one."""
    args = mmaml.Args(modulation=operator)
    encoder = mmaml.Encoder(mmaml.GaussianPolicy(4, 2, args), args)
    count = sum(p.numel() for p in encoder.parameters())
    assert count == 3 * 64 * (7 + 64 + 2) + 4 * (64 * 64 + 64) + outputs * 65
    weights = {name: p for name, p in encoder.named_parameters() if p.ndim > 1}
    assert all((p == 0).all() for name, p in encoder.named_parameters() if name not in weights)
    recurrent = weights.pop("gru.weight_hh_l0")
    torch.testing.assert_close(recurrent.T @ recurrent, torch.eye(64))
    for weight in weights.values():
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.9 * bound < weight.abs().max() <= bound


def test_the_encoder_against_one_call_a_rollout():
    args = small_args()
    policy, agent, _ = make_agent(args)
    batch = sampled(policy, agent["theta"].detach().expand(5, -1), args)
    assert (batch.obs.view(5, 3, 6, 3)[~batch.taken] != 0).any(), "falls, and rubbish after them"
    embedding, tau = agent.encoder(batch, args)
    assert embedding.shape == (5, 7) and tau.shape == (5, 9)
    torch.testing.assert_close(agent.encoder.generator(embedding), tau)
    for i in range(5):
        torch.testing.assert_close(tau[i], plain_tau(agent.encoder, batch, i))


def test_nothing_after_a_fall_reaches_the_embedding_and_everything_before_does():
    args = small_args()
    policy, agent, _ = make_agent(args)
    batch = sampled(policy, agent["theta"].detach().expand(2, -1), args)
    inputs = [x.clone().requires_grad_() for x in (batch.obs, batch.action, batch.reward)]
    embedding, _ = agent.encoder(batch._replace(obs=inputs[0], action=inputs[1], reward=inputs[2]), args)
    for gradient, size in zip(torch.autograd.grad(embedding[:, 0].sum(), inputs), (3, 2, 1)):
        reached = (gradient.reshape(2, 3, 6, size) != 0).all(-1)
        assert torch.equal(reached, batch.taken)


def test_the_official_bug_shows_pieces_of_five_steps():
    args = small_args(horizon=9, encoder_official_bug=True)
    policy, agent, _ = make_agent(args)
    batch = sampled(policy, agent["theta"].detach().expand(2, -1), args)
    _, tau = agent.encoder(batch, args)
    x = torch.cat([batch.obs, batch.action, batch.reward.view(2, 27, 1)], -1)
    for i in range(2):
        pieces = [torch.cat([torch.zeros(4, 6), x[i, 5 * k : 5 * k + 5]]) for k in range(3)]
        means = [agent.encoder.of_rollout(agent.encoder.gru(piece)[1][0]) for piece in pieces]
        torch.testing.assert_close(tau[i], agent.encoder.generator(agent.encoder.of_task(sum(means) / 3)))
    assert not torch.allclose(tau, agent.encoder(batch, small_args(horizon=9))[1])


# -- the order of operations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [False, True])
def test_tau_comes_from_the_first_sample_and_stays(monkeypatch, first):
    """D_0 by θ; the first gradient without τ, or with; D_1, D_2 by φ of the same τ; the second gradient with τ."""
    torch.set_default_dtype(torch.float32)
    args = small_args(modulate_first_step=first, alpha=0.5)
    env = gym.make_vec("point-2m", num_envs=4 * args.rollouts, horizon=args.horizon)
    tasks = env.unwrapped.sample_tasks(4, np.random.default_rng(0))
    policy = mmaml.GaussianPolicy(4, 2, args)
    agent = mmaml.make_agent(policy, 1, torch.Generator().manual_seed(0), args)
    theta = agent["theta"].detach().expand(4, -1)
    acted, sample = [], mmaml.sample
    monkeypatch.setattr(mmaml, "sample", lambda *a: acted.append(a[3]) or sample(*a))
    tau_of, rng = partial(mmaml.infer, agent.encoder, args=args), torch.Generator().manual_seed(0)
    data = mmaml.collect(env, tasks, policy, tau_of, theta, [0.5, 0.5], rng, args)
    tau = agent.encoder(data[0], args)[1].detach()

    def step(theta, batch, tau):
        after = []
        for i in range(4):
            leaf = theta[i].clone().requires_grad_()
            new = Normal(plain_mean(policy, leaf, batch.obs[i], tau if tau is None else tau[i], args), leaf[-2:].exp())
            old = Normal(batch.mean[i], batch.log_std[i].exp())
            ratio = (new.log_prob(batch.action[i]) - old.log_prob(batch.action[i])).sum(-1).exp()
            loss = -(ratio * batch.advantage[i].flatten()).mean()
            after.append(theta[i] - 0.5 * torch.autograd.grad(loss, leaf)[0])
        return torch.stack(after)

    theta_1 = step(theta, data[0], tau if first else None)
    theta_2 = step(theta_1, data[1], tau)
    expected = [theta, *(mmaml.modulate(policy, x, tau, args) for x in (theta_1, theta_2))]
    for got, wanted in zip(acted, expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(step(theta, data[0], tau), step(theta, data[0], None), atol=1e-4), "the order matters"


# -- the objective -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("operator, first", [("film", False), ("film-scale", True), ("softmax", False)])
def test_the_objective_and_its_gradient_against_one_task_after_the_other(steps, operator, first):
    """At a point where the ratios are not 1: θ and ω have moved since the data was sampled."""
    args = small_args(modulation=operator, modulate_first_step=first, inner_steps=steps, eta=2.0)
    policy, agent, _ = make_agent(args)
    data = make_data(policy, agent, 3, args)
    leaves = [agent["theta"], *agent.encoder.parameters()]
    for leaf in leaves:
        leaf.data += 0.03 * torch.randn_like(leaf)
    theta, alpha, eta = (agent[name][np.zeros(3, int)] for name in ("theta", "alpha", "eta"))
    got = mmaml.meta_objective(policy, agent.encoder, theta, data, alpha, eta, args)[0].mean()
    wanted = plain_objective(policy, agent.encoder, agent["theta"][0], agent["alpha"][0], agent["eta"][0], data, args)
    torch.testing.assert_close(got, wanted)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(wanted, leaves)):
        torch.testing.assert_close(a, b)
        assert b.abs().max() > 1e-6


def test_the_gradient_against_finite_differences_in_theta_and_omega():
    """Second order through the modulated step: ω has a gradient through θ_2 as well as through the last output."""
    args = small_args(modulation="film", inner_steps=2, eta=2.0, alpha=0.5)
    policy, agent, _ = make_agent(args)
    data = make_data(policy, agent, 3, args)

    def objective():
        theta, alpha, eta = (agent[name][np.zeros(3, int)] for name in ("theta", "alpha", "eta"))
        return mmaml.meta_objective(policy, agent.encoder, theta, data, alpha, eta, args)[0].mean()

    encoder = agent.encoder
    leaves = [agent["theta"], encoder.gru.weight_ih_l0, encoder.of_task[2].bias, encoder.generator.weight]
    for leaf in leaves:
        leaf.data += 0.02 * torch.randn_like(leaf)
    for leaf, gradient in zip(leaves, torch.autograd.grad(objective(), leaves)):
        for i in torch.randperm(leaf.numel())[:4].tolist():
            values = []
            for sign in (1, -1):
                leaf.data.view(-1)[i] += sign * 1e-5
                values.append(objective().item())
                leaf.data.view(-1)[i] -= sign * 1e-5
            slope = (values[0] - values[1]) / 2e-5
            assert gradient.flatten()[i].item() == pytest.approx(slope, abs=1e-8, rel=1e-5)


def test_updates_against_adam_on_the_plain_objective():
    """θ and ω have one rate; two in a row."""
    args = small_args(modulation="film-scale", inner_steps=2, eta=3.0, lr=0.01, updates=2)
    policy, agent, optimizer = make_agent(args)
    _, twin, adam = make_agent(args)
    twin.load_state_dict(agent.state_dict())
    start = {name: p.detach().clone() for name, p in agent.named_parameters()}
    for _ in range(2):
        data = make_data(policy, agent, 5, args)
        mmaml.promp_update(policy, agent, optimizer, np.zeros(5, int), data, args)
        for _ in range(args.updates):
            adam.zero_grad()
            theta, alpha, eta = (twin[name][0] for name in ("theta", "alpha", "eta"))
            plain_objective(policy, twin.encoder, theta, alpha, eta, data, args).backward()
            adam.step()
    for (name, a), b in zip(agent.named_parameters(), twin.parameters()):
        torch.testing.assert_close(a, b)
        assert torch.equal(a, start[name]) == (name in ("alpha", "eta")), name


# -- evaluation and training -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", ["film", "none"])
def test_evaluation_tells_modulation_and_gradient_steps_apart(monkeypatch, operator):
    torch.set_default_dtype(torch.float32)
    args = small_args(modulation=operator)
    env = gym.make_vec("point-2m", num_envs=4 * args.rollouts, horizon=args.horizon)
    tasks = env.unwrapped.sample_tasks(4, np.random.default_rng(0))
    policy = mmaml.GaussianPolicy(4, 2, args)
    agent = mmaml.make_agent(policy, 1, torch.Generator().manual_seed(0), args)
    theta = agent["theta"].detach().expand(4, -1)
    batches, acted, sample = [], [], mmaml.sample

    def record(*a):
        acted.append(a[3])
        batches.append(sample(*a))
        return batches[-1]

    monkeypatch.setattr(mmaml, "sample", record)
    metrics, arrays = mmaml.evaluate(env, tasks, policy, agent, args)
    assert arrays["returns"].shape == (3, 4, args.rollouts) and arrays["trace"].shape == (3, args.horizon, 4, 2)
    if operator == "none":
        assert len(acted) == 3 and len(metrics) == 9 and "embedding" not in arrays
        return
    embedding, tau = agent.encoder(batches[0], args)
    np.testing.assert_array_equal(arrays["embedding"], embedding.detach().numpy())
    assert len(acted) == 10 and torch.equal(acted[3], mmaml.modulate(policy, theta, tau, args))
    plain = mmaml.adapt(policy, theta, mmaml.process(batches[4], args), agent["alpha"].detach().expand(4, -1), args)
    torch.testing.assert_close(acted[5], plain)
    plain = mmaml.adapt(policy, theta, mmaml.process(batches[7], args), agent["alpha"].detach().expand(4, -1), args)
    torch.testing.assert_close(acted[8], mmaml.modulate(policy, plain, tau.mean(0).expand(4, -1), args))
    for name, batch in (("modulated", batches[3]), ("unmodulated", batches[6]), ("mean_modulated", batches[9])):
        returns = batch.reward.sum(-1).mean(1)
        assert metrics[f"eval/return_{name}"] == pytest.approx(returns.mean().item())
        for m in range(2):
            wanted = returns[torch.from_numpy(tasks.cluster == m)].mean().item()
            assert metrics[f"eval/return_{name}_cluster_{m}"] == pytest.approx(wanted)


def test_it_learns_to_tell_two_modes_apart_before_any_gradient_step(tmp_path):
    """Reward -(a - g)^2 with g = -1 or 1, nothing to see: -10 is the best without knowing which, 0 with τ."""
    torch.set_default_dtype(torch.float32)
    flags = dict(env="probes:probe-guess-sign", tasks=8, rollouts=10, horizon=10, iterations=40, eval_every=40)
    flags |= dict(modulation="film", hidden=(16,), encoder_width=16, inner_steps=1, alpha=1e-3, lr=0.01, action_scale=1)
    path = train(mmaml, run_dir=str(tmp_path), **flags)
    last = rows(path / "eval.csv")[-1]
    assert float(last["eval/return_modulated"]) > -6 and float(last["eval/return_unmodulated"]) < -9
    assert float(last["eval/return_mean_modulated"]) < -9, "one τ for all tasks tells none of them"
    arrays = np.load(path / "eval.npz")
    embedding, cluster = arrays["embedding"], arrays["cluster"]
    centres = np.stack([embedding[cluster == m].mean(0) for m in (0, 1)])
    nearest = np.linalg.norm(embedding[:, None] - centres, axis=-1).argmin(1)
    assert embedding.shape == (32, 16) and (nearest == cluster).mean() > 0.95
    gains = [float(row["policy/gain_between_tasks"]) for row in rows(path / "metrics.csv")]
    assert gains[-1] > 2 * gains[0]
    before = [float(row["promp/surrogate_before"]) for row in rows(path / "metrics.csv")]
    assert max(map(abs, before)) < 1e-5, "at first π is what sampled, and advantages have mean 0"


def test_one_task_has_no_spread_of_gains(tmp_path):
    torch.set_default_dtype(torch.float32)
    flags = dict(env="point-1m", tasks=1, rollouts=2, horizon=5, iterations=1, modulation="softmax", hidden=(5, 5))
    (row,) = rows(train(mmaml, run_dir=str(tmp_path), **flags) / "metrics.csv")
    assert float(row["policy/gain_between_tasks"]) == 0
    assert float(row["policy/gain"]) == pytest.approx(1 / 5), "a softmax over five units"


def test_statistics_of_the_gains_by_hand():
    args = small_args(modulation="softmax")
    policy, agent, _ = make_agent(args)
    batch = sampled(policy, agent["theta"].detach().expand(3, -1), args)
    tau = agent.encoder(batch, args)[1].detach().numpy()
    e = [np.exp(tau[:, :5]), np.exp(tau[:, 5:])]
    gain = np.concatenate([layer / layer.sum(1, keepdims=True) for layer in e], axis=1)  # [task, unit]
    spread = np.sqrt(((gain - gain.mean(0)) ** 2).mean(0)).mean()
    wanted = {"gain": gain.mean(), "gain_rms": np.sqrt((gain**2).mean()), "gain_between_tasks": spread}
    stats = mmaml.gain_statistics(agent.encoder, batch, args)
    assert stats == pytest.approx({f"policy/{name}": value for name, value in wanted.items()})
    assert mmaml.gain_statistics(None, batch, args) == {}


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env_id, steps, horizon, alpha, lr, iterations",
    [
        ("point-2m", 2, 100, 0.01, 5e-5, 401),
        ("point-6m-far", 2, 100, 0.01, 5e-5, 401),
        ("reacher-4m", 2, 50, 0.1, 1e-3, 501),
        ("ant-4m", 3, 250, 0.1, 1e-3, 1001),
    ],
)
def test_presets_are_the_official_configurations(env_id, steps, horizon, alpha, lr, iterations):
    a = mmaml.parse_args(["--env", env_id, "--preset", "paper"])
    assert (a.inner_steps, a.horizon, a.alpha, a.lr, a.iterations) == (steps, horizon, alpha, lr, iterations)
    assert (a.tasks, a.rollouts, a.clip, a.eta, a.adapt_eta, a.updates) == (40, 20, 0.1, 5e-4, False, 5)
    assert (a.hidden, a.gamma, a.gae_lambda, a.encoder_width, a.modulation) == ((64, 64), 0.99, 1, 64, "film-scale")
    frames = a.iterations * a.tasks * a.rollouts * a.horizon * (a.inner_steps + 1)
    assert round(frames / 1e6) == {"point": 96, "reach": 60, "ant-4": 801}[env_id[:5]]


def test_the_fast_preset_is_of_three_points_with_a_ninth_of_the_frames():
    assert set(mmaml.FAST) == {"point-2m", "point-4m", "point-6m"}
    paper, fast = (mmaml.parse_args(["--env", "point-4m", "--preset", preset]) for preset in ("paper", "fast"))
    assert mmaml.parse_args(["--env", "point-4m"]) == fast
    assert mmaml.parse_args(["--env", "reacher-4m"]).preset == "paper"
    ratio = (paper.iterations * paper.tasks * paper.rollouts) / (fast.iterations * fast.tasks * fast.rollouts)
    assert round(ratio) == 9 and fast.lr == pytest.approx(10 * paper.lr)
    shorter = dict(preset="fast", iterations=300, tasks=12, rollouts=10, lr=5e-4)
    assert fast == dataclasses.replace(paper, **shorter), "the rest is published"


POSITIVE = "--alpha, --action-scale, --lr, --clip and --kl-target must be positive"
NONE = "--modulation none"
RULES = [
    ("--oracle", "--oracle is Multi-ProMP: it needs --modulation none"),
    ("--inner-steps 0", "--modulation needs an inner step, or to be none"),
    ("--hidden", "--modulation needs a hidden layer, or to be none"),
    (f"{NONE} --encoder-official-bug", "--encoder-official-bug and --modulate-first-step need --modulation"),
    (f"{NONE} --modulate-first-step", "--encoder-official-bug and --modulate-first-step need --modulation"),
    ("--encoder-official-bug --horizon 4", "--encoder-official-bug needs --horizon of at least 5"),
    (f"{NONE} --env point-1m --oracle", "--oracle needs clusters, and point-1m has none"),
    ("--tasks 1", "--tasks must be at least 2, which hold every cluster"),
    (f"{NONE} --oracle --tasks 3", "--oracle needs --tasks to be a multiple of 2"),
    ("--mask-pad-actions", "--mask-pad-actions is for environments of several robots"),
    (f"{NONE} --inner-steps 0 --adapt-eta", "--train-alpha and --adapt-eta need --inner-steps of at least 1"),
    *((f"--{name} 0", POSITIVE) for name in ("alpha", "action-scale", "lr", "clip", "kl-target")),
    ("--eta -1", "--eta must be at least 0"),
    ("--gamma 2", "--gamma and --gae-lambda must be in [0, 1]"),
]


@pytest.mark.parametrize("flags, message", RULES)
def test_what_must_hold(flags, message):
    with pytest.raises(SystemExit) as caught:
        mmaml.parse_args(flags.split())
    assert str(caught.value) == f"mmaml.py: error: {message}"


def test_every_rule_has_a_case():
    assert len({message for _, message in RULES}) == len(mmaml.check(mmaml.Args(), envs.ENVIRONMENTS["point-2m"]))
    mmaml.parse_args(f"{NONE} --oracle --tasks 4 --eta 0 --inner-steps 0 --hidden".split())
    mmaml.parse_args("--encoder-official-bug --horizon 5 --modulate-first-step".split())


# -- every flag, every task, every block -------------------------------------------------------------------------------


def test_rates_and_weights_start_where_the_flags_say():
    args = small_args(alpha=0.3, eta=2.0, inner_steps=3)
    policy = mmaml.GaussianPolicy(3, 2, args)
    agent = mmaml.make_agent(policy, 2, torch.Generator().manual_seed(0), args)
    assert torch.equal(agent["alpha"], torch.full((2, sum(policy.sizes)), 0.3))
    assert torch.equal(agent["eta"], torch.full((2, 3), 2.0))


@pytest.mark.parametrize("target, factor", [(1e-12, 2.0), (1e6, 0.5)])
def test_eta_doubles_or_halves_by_the_target_that_is_asked_for(target, factor):
    args = small_args(adapt_eta=True, kl_target=target, lr=0.01)
    policy, agent, optimizer = make_agent(args)
    before = agent["eta"].detach().clone()
    mmaml.promp_update(policy, agent, optimizer, np.zeros(5, int), make_data(policy, agent, 5, args), args)
    torch.testing.assert_close(agent["eta"].detach(), factor * before)


@pytest.mark.parametrize("train_alpha", [False, True])
def test_evaluation_takes_steps_seed_and_rate_from_the_flags(train_alpha):
    """The rate is the flag's, or the trained one."""
    torch.set_default_dtype(torch.float32)
    flags = dict(train_alpha=train_alpha, rollouts=2)
    args = small_args(**flags)
    env = gym.make_vec("point-2m", num_envs=8, horizon=args.horizon)
    tasks, policy = env.unwrapped.task_set("test")[:4], mmaml.GaussianPolicy(4, 2, args)
    agent = mmaml.make_agent(policy, 1, torch.Generator().manual_seed(0), args)
    agent["alpha"].data.fill_(0.25)
    found = [
        mmaml.evaluate(env, tasks, policy, agent, small_args(**flags, eval_steps=steps, alpha=0.7, seed=seed))[1]
        for steps, seed in ((4, 0), (1, 0), (1, 1))
    ]
    assert [len(arrays["returns"]) for arrays in found] == [5, 2, 2]
    assert found[0]["alpha"] == pytest.approx(0.25 if train_alpha else 0.7)
    np.testing.assert_allclose(found[0]["returns"][0], found[1]["returns"][0])
    assert not np.allclose(found[1]["returns"][0], found[2]["returns"][0])


def test_a_run_trains_all_of_theta_and_omega(monkeypatch, tmp_path):
    torch.set_default_dtype(torch.float32)
    moved, update = [], mmaml.promp_update

    def watch(policy, agent, *rest):
        before = {name: p.detach().clone() for name, p in agent.named_parameters()}
        stats = update(policy, agent, *rest)
        moved.append({name for name, p in agent.named_parameters() if not torch.equal(p, before[name])})
        names.update(before)
        return stats

    names = set()
    monkeypatch.setattr(mmaml, "promp_update", watch)
    flags = dict(env="point-2m", tasks=4, rollouts=2, horizon=6, iterations=2, hidden=(5, 5), encoder_width=6)
    train(mmaml, run_dir=str(tmp_path), **flags)
    assert moved == [names - {"alpha", "eta"}] * 2 and "encoder.generator.weight" in names


def test_figures_and_gains_are_of_the_data_they_name(monkeypatch, tmp_path):
    """The trace is the first rollout; the gains are by τ of D_0."""
    torch.set_default_dtype(torch.float32)
    collected, taus, collect, infer = [], [], mmaml.collect, mmaml.infer
    monkeypatch.setattr(mmaml, "collect", lambda *a: collected.append(collect(*a)) or collected[-1])
    monkeypatch.setattr(mmaml, "infer", lambda *a, **kw: taus.append(a[1]) or infer(*a, **kw))
    flags = dict(env="point-2m", tasks=4, rollouts=2, horizon=6, iterations=1, eval_every=1, hidden=(5,))
    run = train(mmaml, run_dir=str(tmp_path), encoder_width=6, updates=1, **flags)
    training, last = collected[3], collected[4]  # an evaluation collects three times, the first is with τ
    trace = np.load(run / "eval.npz")["trace"]
    for batch, found in zip(last, trace, strict=True):
        np.testing.assert_array_equal(found, batch.obs[:, :6, :2].transpose(0, 1))
    in_training = [i for i, batch in enumerate(taus) if batch is training[0]]
    assert len(in_training) == 2, "to sample, and for the gains"
