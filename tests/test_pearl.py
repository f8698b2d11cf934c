"""PEARL's mathematics: the posterior, the losses against slow references, buffers and blocks of collection."""

import copy
import functools
import math

import gymnasium as gym
import numpy as np
import pearl
import probes  # noqa: F401
import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

import envs

OBS, ACTION = 3, 2


def small_args(**kwargs) -> pearl.Args:
    sizes = dict(latent_dim=2, encoder_hidden=(6, 5), hidden=(7, 6), meta_batch=4, batch=5, context=8)
    return pearl.Args(**(sizes | dict(num_threads=1) | kwargs))


@pytest.fixture
def agent():
    torch.manual_seed(0)
    return pearl.make_agent(OBS, ACTION, small_args())


def generator(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_buffer(tasks=6, steps=40, capacity=600) -> pearl.Buffer:
    torch.manual_seed(1)
    buffer = pearl.Buffer(tasks, capacity, OBS, ACTION)
    for task in range(tasks):
        buffer.add(task, make_episodes(steps // 10, 10), to_context=True)
    return buffer


def make_episodes(copies: int, horizon: int, alive=None) -> pearl.Episodes:
    obs, action = torch.randn(copies, horizon + 1, OBS), torch.rand(copies, horizon, ACTION)
    reward = torch.randn(copies, horizon)
    alive = torch.ones(copies, horizon, dtype=torch.bool) if alive is None else alive
    terminated = (alive & ~torch.cat([alive[:, 1:], torch.ones(copies, 1, dtype=torch.bool)], 1)).float()
    return pearl.Episodes(obs, action, reward, terminated, alive)


# -- networks ----------------------------------------------------------------------------------------------------------


def test_sizes_are_the_official_codes():
    agent = pearl.make_agent(20, 6, pearl.Args())
    count = {name: sum(p.numel() for p in module.parameters()) for name, module in agent.items()}
    assert count == dict(encoder=88_010, policy=192_012, q=2 * 190_501, v=188_701, target=188_701)


def test_initialisation_is_the_official_codes():
    torch.manual_seed(0)
    net = pearl.MLP(50, 100, 200, 10, copies=2)
    for weight, bias, bound in zip(net.weights, net.biases, (1 / math.sqrt(100), 1 / math.sqrt(200), 3e-3)):
        assert 0.95 * bound < weight.abs().max() <= bound
        assert (bias == 0.1).all() if bound > 3e-3 else 0 < bias.abs().max() <= bound
    assert (net.weights[0][0] != net.weights[0][1]).all(), "two different networks"


def modules(net: pearl.MLP, i: int) -> nn.Sequential:
    """Network i as PyTorch's own layers."""
    layers = []
    for weight, bias in zip(net.weights, net.biases):
        layer = nn.Linear(*weight.shape[1:])
        layer.weight.data, layer.bias.data = weight[i].T.clone(), bias[i, 0].clone()
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def test_batched_networks_are_the_single_ones(agent):
    x, y = torch.randn(9, OBS + ACTION), torch.randn(9, 2)
    out = agent["q"](x, y)
    assert out.shape == (2, 9, 1)
    for i in range(2):
        torch.testing.assert_close(out[i], modules(agent["q"], i)(torch.cat([x, y], 1)))


@pytest.mark.parametrize("rows", [9, 600])
def test_large_batches_take_another_way_to_the_same_numbers_and_gradients(agent, rows):
    net, x = agent["q"], torch.randn(rows, OBS + ACTION + 2, requires_grad=True)
    out = net(x)
    expected = torch.stack([modules(net, i)(x) for i in range(2)])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    weight = torch.randn_like(out)
    ours = torch.autograd.grad((out * weight).sum(), [x, *net.parameters()])
    plain = [modules(net, i) for i in range(2)]
    (sum((plain[i](x) * weight[i]).sum() for i in range(2))).backward()
    torch.testing.assert_close(ours[0], x.grad, atol=1e-4, rtol=1e-3)
    for k in range(3):
        for i in range(2):
            torch.testing.assert_close(ours[1 + k][i].T, plain[i][2 * k].weight.grad, atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(ours[4 + k][i, 0], plain[i][2 * k].bias.grad, atol=1e-3, rtol=1e-3)


def test_squashed_density_against_change_of_variables():
    mean, log_std = torch.tensor([[0.3]]), torch.tensor([[-0.4]])
    noise = torch.linspace(-2.5, 2.5, 2001)[:, None]
    action, log_pi = pearl.squashed(mean, log_std, noise)
    u = mean + log_std.exp() * noise
    torch.testing.assert_close(action, u.tanh())
    density = (
        Normal(mean, log_std.exp()).log_prob(u).exp()[:, 0] / torch.gradient(u.tanh()[:, 0], spacing=(u[:, 0],))[0]
    )
    torch.testing.assert_close(log_pi.exp()[5:-5], density[5:-5], rtol=2e-3, atol=1e-4)
    integral = torch.trapezoid(log_pi.exp(), action[:, 0])
    assert integral == pytest.approx(math.erf(2.5 / math.sqrt(2)), abs=1e-3)


def test_squashed_density_is_finite_far_out():
    mean = torch.tensor([[10.0], [-10.0]], requires_grad=True)
    _, log_pi = pearl.squashed(mean, torch.zeros(2, 1), torch.zeros(2, 1))
    log_pi.sum().backward()
    assert log_pi.isfinite().all() and mean.grad.isfinite().all()


def test_log_std_is_clamped(agent):
    agent["policy"].biases[-1].data[0, 0, ACTION:] = torch.tensor([50.0, -50.0])
    assert pearl.pre_tanh(agent["policy"], torch.randn(1, OBS), torch.randn(1, 2))[1].tolist() == [[2, -20]]


# -- posterior ---------------------------------------------------------------------------------------------------------


def test_posterior_is_a_product_of_gaussians(agent):
    encoder, token = agent["encoder"], torch.randn(1, 1, OBS + ACTION + 1)
    one, many = pearl.posterior(encoder, token), pearl.posterior(encoder, token.expand(1, 7, -1))
    raw_mean, raw_var = encoder(token[0])[0].chunk(2, -1)
    torch.testing.assert_close(one.mean, raw_mean)
    torch.testing.assert_close(one.variance, torch.nn.functional.softplus(raw_var))
    torch.testing.assert_close(many.mean, one.mean)
    torch.testing.assert_close(many.variance, one.variance / 7)
    context = torch.randn(3, 9, OBS + ACTION + 1)
    q, shuffled = pearl.posterior(encoder, context), pearl.posterior(encoder, context[:, torch.randperm(9)])
    torch.testing.assert_close(q.mean, shuffled.mean)
    x = torch.linspace(-40, 40, 200_001, dtype=torch.float64)
    mean, raw_var = encoder(context[1])[0].double().chunk(2, -1)
    log_product = Normal(mean[:, :1], torch.nn.functional.softplus(raw_var[:, :1]).sqrt()).log_prob(x).sum(0)
    weights = (log_product - log_product.max()).exp()
    assert q.mean[1, 0].item() == pytest.approx(((weights * x).sum() / weights.sum()).item(), abs=1e-3)


def test_posterior_leaves_out_what_came_after_a_fall(agent):
    context = torch.randn(2, 9, OBS + ACTION + 1)
    alive = torch.arange(9).expand(2, 9) < 4
    masked, short = pearl.posterior(agent["encoder"], context, alive), pearl.posterior(agent["encoder"], context[:, :4])
    torch.testing.assert_close(masked.mean, short.mean)
    torch.testing.assert_close(masked.variance, short.variance)


def test_tokens_with_and_without_the_next_state():
    parts = torch.ones(2, 4, OBS), 2 * torch.ones(2, 4, ACTION), 3 * torch.ones(2, 4, 1), 4 * torch.ones(2, 4, OBS)
    assert pearl.tokens(*parts, small_args())[0, 0].tolist() == [1, 1, 1, 2, 2, 3]
    assert pearl.tokens(*parts, small_args(next_obs_in_context=True))[0, 0].tolist() == [1, 1, 1, 2, 2, 3, 4, 4, 4]


# -- losses ------------------------------------------------------------------------------------------------------------


def test_the_slow_copy_starts_at_v(agent):
    for slow, fast in zip(agent["target"].parameters(), agent["v"].parameters()):
        assert torch.equal(slow, fast) and slow is not fast and not slow.requires_grad


def row_batch(rows=20) -> list[torch.Tensor]:
    torch.manual_seed(2)
    terminated = (torch.rand(rows, 1) < 0.3).float()
    return [torch.randn(rows, OBS), torch.rand(rows, ACTION), torch.randn(rows, 1), torch.randn(rows, OBS), terminated]


def test_critic_loss_against_a_slow_reference(agent):
    args, batch = small_args(), row_batch()
    q_z = Normal(torch.randn(4, 2), torch.rand(4, 2) + 0.1)
    z = q_z.sample().repeat_interleave(5, 0)
    loss = pearl.critic_loss(agent, batch, z, q_z, args)
    errors = 0.0
    for j in range(2):
        q, target = modules(agent["q"], j), modules(agent["target"], 0)
        for s, a, r, s2, d, latent in zip(*batch, z):
            goal = 5 * r + (1 - d) * 0.99 * target(torch.cat([s2, latent]))
            errors += (q(torch.cat([s, a, latent])) - goal).item() ** 2 / 20
    assert loss["q_error"].item() == pytest.approx(errors, rel=1e-4)
    kl = (0.5 * (q_z.variance + q_z.mean**2 - 1) - q_z.stddev.log()).sum()
    torch.testing.assert_close(loss["kl"], kl)
    torch.testing.assert_close(loss["loss"], loss["q_error"] + 0.1 * kl)


def test_the_kl_is_a_sum_over_tasks(agent):
    args, batch, q_z = small_args(), row_batch(), Normal(torch.randn(4, 2), torch.rand(4, 2) + 0.1)
    twice = Normal(q_z.mean.repeat(2, 1), q_z.stddev.repeat(2, 1))
    once = pearl.critic_loss(agent, batch, torch.zeros(20, 2), q_z, args)["kl"]
    torch.testing.assert_close(pearl.critic_loss(agent, batch, torch.zeros(20, 2), twice, args)["kl"], 2 * once)
    torch.testing.assert_close(once, kl_divergence(q_z, Normal(0.0, 1.0)).sum())


def test_actor_loss_against_a_slow_reference(agent):
    args, (obs, *_), z, noise = small_args(), row_batch(), torch.randn(20, 2), torch.randn(20, ACTION)
    loss = pearl.actor_loss(agent, obs, z, noise, args)
    v_error = policy_loss = penalty = 0.0
    policy, v, q = modules(agent["policy"], 0), modules(agent["v"], 0), [modules(agent["q"], j) for j in range(2)]
    for s, latent, eps in zip(obs, z, noise):
        mean, log_std = policy(torch.cat([s, latent])).chunk(2)
        u = mean + log_std.exp() * eps
        a = u.tanh()
        log_pi = (Normal(mean, log_std.exp()).log_prob(u) - (1 - a**2 + 1e-6).log()).sum()
        min_q = min(net(torch.cat([s, a, latent])).item() for net in q)
        v_error += (v(torch.cat([s, latent])).item() - (min_q - log_pi.item())) ** 2 / 20
        policy_loss += (log_pi.item() - min_q) / 20
        penalty += 1e-3 * ((mean**2).mean() + (log_std**2).mean()).item() / 20
    assert loss["v_error"].item() == pytest.approx(v_error, rel=1e-4)
    assert loss["policy_loss"].item() == pytest.approx(policy_loss + penalty, rel=1e-4, abs=1e-5)


def test_only_the_critic_and_the_kl_train_the_encoder(agent):
    args, batch = small_args(), row_batch()
    q_z = pearl.posterior(agent["encoder"], torch.randn(4, 8, OBS + ACTION + 1))
    z = pearl.draw(q_z, generator()).repeat_interleave(5, 0)
    encoder = list(agent["encoder"].parameters())
    for term in ("q_error", "kl"):
        loss = pearl.critic_loss(agent, batch, z, q_z, args)[term]
        assert all(g.abs().sum() > 0 for g in torch.autograd.grad(loss, encoder, retain_graph=True))
    seen = []
    original = pearl.actor_loss
    pearl_args = small_args()
    try:
        pearl.actor_loss = lambda agent, obs, z, noise, args: seen.append(z) or original(agent, obs, z, noise, args)
        pearl.gradient_step(agent, pearl.make_optimizers(agent, pearl_args), make_buffer(), generator(), pearl_args)
    finally:
        pearl.actor_loss = original
    assert not seen[0].requires_grad


def test_gradient_step_against_the_official_order_with_five_optimisers(agent):
    """Five plain Adams, one after the other, in the order of the spec; networks as PyTorch's layers."""
    args, buffer = small_args(), make_buffer()
    nets = {name: modules(agent[name], 0) for name in ("encoder", "policy", "v", "target")}
    nets |= {f"q{j}": modules(agent["q"], j) for j in range(2)}
    adam = {name: torch.optim.Adam(net.parameters(), 3e-4) for name, net in nets.items() if name != "target"}
    optimizers = pearl.make_optimizers(agent, args)
    for i in range(3):
        pearl.gradient_step(agent, optimizers, buffer, generator(i), args)

        rng = generator(i)
        tasks = torch.randint(6, (4,), generator=rng)
        context = torch.cat(buffer.sample_context(tasks, 8, rng)[:3], -1)
        s, a, r, s2, d = (x.flatten(0, 1) for x in buffer.sample(tasks, 5, rng))
        noise = torch.randn(20, ACTION, generator=rng)
        mean, raw = nets["encoder"](context).chunk(2, -1)
        var_n = nn.functional.softplus(raw)
        var = 1 / (1 / var_n).sum(1)
        mu = var * (mean / var_n).sum(1)
        z = (mu + var.sqrt() * torch.randn(4, 2, generator=rng)).repeat_interleave(5, 0)
        m, log_std = nets["policy"](torch.cat([s, z.detach()], 1)).chunk(2, -1)
        u = m + log_std.exp() * noise
        action = u.tanh()
        log_pi = (Normal(m, log_std.exp()).log_prob(u) - (1 - action**2 + 1e-6).log()).sum(1, keepdim=True)
        y = 5 * r + (1 - d) * 0.99 * nets["target"](torch.cat([s2, z], 1)).detach()
        loss = 0.1 * 0.5 * (var + mu**2 - 1 - var.log()).sum()
        loss = loss + sum((nets[f"q{j}"](torch.cat([s, a, z], 1)) - y).square().mean() for j in range(2))
        for name in ("encoder", "q0", "q1"):
            adam[name].zero_grad()
        loss.backward()
        for name in ("encoder", "q0", "q1"):
            adam[name].step()
        min_q = torch.minimum(*(nets[f"q{j}"](torch.cat([s, action, z.detach()], 1)) for j in range(2)))
        v = nets["v"](torch.cat([s, z.detach()], 1))
        adam["v"].zero_grad()
        (v - (min_q - log_pi).detach()).square().mean().backward()
        adam["v"].step()
        with torch.no_grad():
            for slow, fast in zip(nets["target"].parameters(), nets["v"].parameters()):
                slow.copy_(0.995 * slow + 0.005 * fast)
        adam["policy"].zero_grad()
        ((log_pi - min_q).mean() + 1e-3 * m.square().mean() + 1e-3 * log_std.square().mean()).backward()
        adam["policy"].step()
    for name, net in nets.items():
        ours = agent["q"] if name.startswith("q") else agent[name]
        copy_ = int(name[1]) if name.startswith("q") else 0
        for layer, weight, bias in zip(net[::2], ours.weights, ours.biases):
            torch.testing.assert_close(weight[copy_].T, layer.weight, atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(bias[copy_, 0], layer.bias, atol=1e-6, rtol=1e-4)


# -- buffer and collection ---------------------------------------------------------------------------------------------


def test_buffer_keeps_the_steps_taken_and_their_successors():
    buffer = pearl.Buffer(2, 100, OBS, ACTION)
    alive = torch.ones(2, 5, dtype=torch.bool)
    alive[1, 3:] = False
    episodes = make_episodes(2, 5, alive)
    buffer.add(0, make_episodes(1, 5), to_context=True)
    buffer.add(1, episodes, to_context=False)
    assert buffer.size.tolist() == [5, 8] and buffer.used == 6 + 6 + 4
    found = buffer.sample(torch.tensor([1]), 500, generator())
    expected = [torch.cat([x[0, :5], x[1, :3]]) for x in (episodes.obs, episodes.action, episodes.reward[..., None])]
    expected += [torch.cat([episodes.obs[0, 1:], episodes.obs[1, 1:4]]), torch.tensor([0.0] * 7 + [1])[:, None]]
    rows = [torch.cat([x[n] for x in expected]).tolist() for n in range(8)]
    drawn = torch.cat(found, -1)[0].tolist()
    assert {tuple(r) for r in drawn} == {tuple(r) for r in rows}, "a fall ends, a time limit does not"


def cache_of_envs(env_id: str, horizon: int):
    return functools.cache(lambda n: gym.make_vec(env_id, num_envs=n, horizon=horizon))


def marked(value: float, copies: int) -> pearl.Episodes:
    return make_episodes(copies, 10)._replace(reward=torch.full((copies, 10), value))


def test_buffer_samples_only_what_is_there_and_the_context_only_its_own():
    buffer = pearl.Buffer(3, 200, OBS, ACTION)
    visits = (0, 1, True, False), (2, 2, True, False), (2, 3, True, True), (0, 6, False, False), (2, 4, False, False)
    for task, value, to_context, clear in visits:
        if clear:
            buffer.clear_context(task)
        buffer.add(task, marked(float(value), 2), to_context)
    tasks = torch.tensor([0, 2, 2])
    rewards, context = (f(tasks, 600, generator())[2][..., 0] for f in (buffer.sample, buffer.sample_context))
    assert [set(r.tolist()) for r in rewards] == [{1.0, 6.0}, {2.0, 3.0, 4.0}, {2.0, 3.0, 4.0}]
    assert [set(r.tolist()) for r in context] == [{1.0}, {3.0}, {3.0}]


def test_buffer_grows_its_index():
    buffer = pearl.Buffer(2, 1100 * 11, OBS, ACTION)
    for value in (1.0, 2.0):
        buffer.add(1, marked(value, 550), to_context=True)
    assert buffer.size.tolist() == [0, 11_000]
    rewards = buffer.sample_context(torch.tensor([1]), 4000, generator())[2]
    assert rewards.mean().item() == pytest.approx(1.5, abs=0.05)


def test_buffer_state_survives():
    buffer = make_buffer()
    buffer.clear_context(3)
    buffer.add(3, make_episodes(2, 10), to_context=True)
    again = pearl.Buffer(6, 600, OBS, ACTION)
    again.load_state_dict(copy.deepcopy(buffer.state_dict()))
    for b in (buffer, again):
        torch.manual_seed(5)
        b.add(1, make_episodes(2, 10), to_context=True)
    tasks = torch.tensor([0, 5, 1, 3])
    for name in ("sample", "sample_context"):
        for a, b in zip(getattr(buffer, name)(tasks, 9, generator()), getattr(again, name)(tasks, 9, generator())):
            assert torch.equal(a, b)


def test_blocks_of_an_iteration(monkeypatch, tmp_path):
    """Episodes a block, prior z first, clearing only of visited tasks, extra data never in the context (spec 4.5-6)."""
    buffers, calls, draws = [], [], []
    init, collect, draw = pearl.Buffer.__init__, pearl.collect, pearl.draw_posterior

    def spy(make_env, agent, buffer, train_tasks, tasks, z, rng, to_context, clear):
        before = buffer.size.clone(), buffer.context_start.clone(), buffer.context_end.clone()
        episodes = collect(make_env, agent, buffer, train_tasks, tasks, z, rng, to_context, clear)
        after = buffer.size.clone(), buffer.context_start.clone(), buffer.context_end.clone()
        calls.append((tasks, z.clone(), to_context, before, after))
        return episodes

    monkeypatch.setattr(pearl.Buffer, "__init__", lambda self, *a: buffers.append(self) or init(self, *a))
    monkeypatch.setattr(pearl, "collect", spy)
    monkeypatch.setattr(pearl, "draw_posterior", lambda *a: draws.append(draw(*a)) or draws[-1])
    monkeypatch.setattr(pearl.signal, "signal", lambda *_: None)
    args = small_args(
        env="point-goal-4c", train_tasks=6, horizon=20, initial_steps=30, visits=2, prior_steps=41, posterior_steps=40,
        extra_steps=60, gradient_steps=1, iterations=1, run_dir=str(tmp_path),
    )  # fmt: skip
    pearl.train(args)
    assert [(len(v), z.shape[1], to_context) for v, z, to_context, *_ in calls] == [
        (6, 2, True), (2, 3, True), (2, 1, True), (2, 1, True), (2, 3, False),
    ]  # fmt: skip
    visited, untouched = calls[1][0], [t for t in range(6) if t not in calls[1][0]]
    assert len(set(visited.tolist())) == 2, "a seed with two different tasks"
    for _, _, to_context, (size, _, end), (size_after, start_after, end_after) in calls[1:]:
        assert (size_after > size)[visited].all() and (size_after == size)[untouched].all()
        assert ((end_after > end)[visited] == to_context).all() and (end_after == end)[untouched].all()
        assert (start_after[visited] == 40).all() and (start_after[untouched] == 0).all(), "cleared, and only these"
    assert buffers[0].context_end[visited].tolist() == [140, 140] and buffers[0].size[visited].tolist() == [200, 200]
    assert len(draws) == 2, "after the first episode of the posterior block, and for the extra block but its first"
    assert torch.equal(calls[3][1][:, 0], draws[0]) and torch.equal(calls[4][1][:, 1:], draws[1].view(2, 3, 2)[:, 1:])


def test_a_task_visited_twice_keeps_one_prior_block_and_both_posterior_blocks(agent):
    args, env = small_args(env="point-goal-4c", horizon=10), cache_of_envs("point-goal-4c", 10)
    net, tasks = pearl.make_agent(2, 2, args), env(1).unwrapped.task_set("train")[:3]
    buffer, twice = pearl.Buffer(3, 500, 2, 2), torch.tensor([1, 1])
    for to_context, clear in ((True, True), (True, False), (False, False)):
        pearl.collect(env, net, buffer, tasks, twice, torch.zeros(2, 4, 2), generator(), to_context, clear)
    assert buffer.size.tolist() == [0, 3 * 2 * 40, 0]
    assert (buffer.context_start[1], buffer.context_end[1]) == (40, 160), "D1"


def make_fall(policy: pearl.MLP) -> None:
    """A walker's: strong actions, of little noise."""
    policy.biases[-1].data[..., :6], policy.biases[-1].data[..., 6:] = 1.0, -1.5


@pytest.mark.parametrize("test", [True, False])
def test_rollout_replayed_one_copy_at_a_time(agent, test):
    torch.manual_seed(0)
    args = small_args()
    net = pearl.make_agent(17, 6, args)["policy"]
    env = gym.make_vec("walker-dir", num_envs=3, horizon=200)
    tasks, z = env.unwrapped.sample_tasks(3, np.random.default_rng(0)), torch.randn(3, 2)
    make_fall(net)
    rng = generator(4)
    episodes = pearl.rollout(env, tasks, net, z, rng, test)
    assert 0 < episodes.terminated.sum() and not episodes.alive.all(), "some fall"
    rng = generator(4)
    seed, noise = pearl.random_seed(rng), torch.randn(200, 3, 6, generator=rng) * (not test)
    for i in range(3):
        alone = gym.make_vec("walker-dir", num_envs=1, horizon=200)
        obs, _ = alone.reset(seed=seed + i, options={"tasks": tasks[i]})
        over = False
        for t in range(200):
            np.testing.assert_array_equal(episodes.obs[i, t], obs[0])
            assert episodes.alive[i, t] == (not over)
            mean, log_std = pearl.pre_tanh(net, torch.from_numpy(obs), z[i : i + 1])
            action = (mean + log_std.exp() * noise[t, i]).tanh()
            torch.testing.assert_close(episodes.action[i, t], action[0])
            obs, reward, terminated, *_ = alone.step(episodes.action[i : i + 1, t].numpy())
            assert episodes.reward[i, t].item() == pytest.approx(reward[0], rel=1e-5)
            assert episodes.terminated[i, t] == (terminated[0] and not over)
            over |= bool(terminated[0])


def test_evaluation_draws_from_the_prior_and_then_from_everything_seen(monkeypatch):
    """With mean actions, and without what came after a fall."""
    torch.manual_seed(0)
    args = small_args(eval_episodes=4, eval_prior_episodes=2, horizon=200)
    env = gym.make_vec("walker-dir", num_envs=4, horizon=200)
    tasks, net = env.unwrapped.sample_tasks(4, np.random.default_rng(0)), pearl.make_agent(17, 6, args)
    make_fall(net["policy"])
    calls, rollout, rng = [], pearl.rollout, generator(10**6)

    def spy(env, tasks, policy, z, rng, test):
        assert test
        calls.append((z, episode := rollout(env, tasks, policy, z, rng, test)))
        return episode

    monkeypatch.setattr(pearl, "rollout", spy)
    metrics, data = pearl.evaluate(env, tasks, net, args)
    assert len(calls) == 4 and not all(episode.alive.all() for _, episode in calls), "some fall"
    for k, (z, _) in enumerate(calls):
        mean, std = torch.zeros(4, 2), torch.ones(4, 2)
        for i in range(4) if k >= 2 else ():
            steps = [[x[i][e.alive[i]] for x in (e.obs[:, :-1], e.action, e.reward[..., None])] for _, e in calls[:k]]
            q_z = pearl.posterior(net["encoder"], torch.cat([torch.cat(s, 1) for s in steps])[None])
            mean[i], std[i] = q_z.mean[0], q_z.stddev[0]
        torch.testing.assert_close(z, mean + std * torch.randn(4, 2, generator=rng))
        pearl.random_seed(rng)  # of the environments
    assert [f"eval/return_episode_{k}" in metrics for k in (1, 4, 5)] == [True, True, False]
    assert data["trace"].shape == (4, 201, 4, 2) and data["latent"].shape == (4, 4)
    monkeypatch.undo()
    assert pearl.evaluate(env, tasks, net, args)[0] == metrics


# -- command line ------------------------------------------------------------------------------------------------------


def test_training_tasks_are_the_first_different_ones():
    env = gym.make_vec("cheetah-dir").unwrapped
    assert pearl.different(env.task_set("train"), 500).params.tolist() == [[1], [-1]]
    env = gym.make_vec("cheetah-vel").unwrapped
    np.testing.assert_array_equal(pearl.different(env.task_set("train"), 7).params, env.task_set("train").params[:7])
    assert len(pearl.different(gym.make_vec("ml2").unwrapped.task_set("train"), 4)) == 4


@pytest.mark.parametrize(
    "env, tasks, meta_batch, initial, prior, extra, gradient_steps, context, visits, next_obs",
    [
        ("cheetah-dir", 2, 4, 2000, 1000, 1000, 2000, 256, 5, False),
        ("cheetah-vel", 100, 16, 2000, 400, 600, 2000, 100, 5, False),
        ("ant-dir", 2, 4, 2000, 400, 600, 4000, 256, 5, False),
        ("ml2", 4, 4, 2000, 1000, 1000, 2000, 256, 10, False),
        ("ant-goal-4c", 500, 16, 200, 400, 600, 4000, 256, 5, False),
        ("hopper-params-4c", 500, 16, 200, 400, 600, 4000, 256, 5, True),
    ],
)
def test_presets_are_the_papers(
    env, tasks, meta_batch, initial, prior, extra, gradient_steps, context, visits, next_obs
):
    args = pearl.parse_args(["--env", env])
    assert (args.train_tasks, args.meta_batch, args.visits, args.gradient_steps) == (
        tasks, meta_batch, visits, gradient_steps,
    )  # fmt: skip
    assert (args.initial_steps, args.prior_steps, args.posterior_steps, args.extra_steps) == (initial, prior, 0, extra)
    assert (args.context, args.next_obs_in_context, args.batch, args.latent_dim) == (context, next_obs, 256, 5)
    official = tasks < 500
    assert (args.horizon, args.eval_episodes, args.eval_prior_episodes) == ((200, 3, 2) if official else (100, 2, 1))
    assert (args.kl_weight, args.reward_scale, args.gamma, args.tau, args.lr) == (0.1, 5, 0.99, 0.005, 3e-4)


def test_every_preset_names_an_environment_and_fields():
    for env_id, preset in pearl.PRESETS.items():
        assert env_id in envs.ENVIRONMENTS
        args = pearl.parse_args(["--env", env_id])
        assert all(getattr(args, k) == v for k, v in preset.items())


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--env", "point-goal-5c"], "did you mean point-goal-4c"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--tau", "0"], "--tau in (0, 1]"),
        (["--lr", "nan"], "--lr must be finite"),
        (["--reward-scale", "-1"], "must be positive"),
        (["--env", "point-goal-4c", "--eval-prior-episodes", "5"], "at most --eval-episodes"),
        (["--resume", "nowhere"], "not a run folder"),
    ],
)
def test_wrong_input_gets_one_line(flags, message):
    with pytest.raises(SystemExit) as caught:
        pearl.parse_args(flags)
    assert str(caught.value).startswith("pearl.py: error: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)
