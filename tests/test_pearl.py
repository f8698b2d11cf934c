"""PEARL's mathematics: the posterior, the losses against slow references, buffers and blocks of collection."""

import functools
import math

import gymnasium as gym
import metacure
import numpy as np
import pearl
import probes
import pytest
import sop
import torch
from conftest import spy_on, train
from test_words import SHORT
from torch import nn
from torch.distributions import Normal

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


def make_learner(net=None, tasks=6, steps=40, **kwargs) -> pearl.Learner:
    """A learner that has seen `steps` random transitions of every task, in episodes of 10."""
    torch.manual_seed(1)
    args = small_args(horizon=10, **kwargs)
    params = envs.Tasks(np.zeros((tasks, 1)), np.zeros(tasks, int))
    env = gym.vector.VectorEnv()
    env.single_observation_space = gym.spaces.Box(-1, 1, (OBS,))
    env.single_action_space = gym.spaces.Box(-1, 1, (ACTION,))
    learner = pearl.make_learner(lambda n: env, params, args)
    learner.agent.load_state_dict((net or learner.agent).state_dict())
    for task in range(tasks):
        rows = torch.cat(learner.storage.add(make_episodes(steps // 10, 10)))
        learner.rl.add(task, rows)
        learner.context.add(task, rows)
    return learner


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


def test_features_and_head_are_the_network(agent):
    net, x = agent["q"], torch.randn(9, OBS + ACTION + 2)
    h = net.features(x)
    assert h.shape == (2, 9, 6) and (h >= 0).all()
    for i in range(2):
        torch.testing.assert_close(h[i], modules(net, i)[:-1](x))
    assert torch.equal(net.head(h), net(x))


def test_onednn_takes_another_way_to_the_same_numbers_and_gradients(agent, monkeypatch):
    net, x = agent["q"], torch.randn(600, OBS + ACTION + 2, requires_grad=True)
    plain = net.head(net.features(x))
    weight = torch.randn_like(plain)
    gradients = lambda out: torch.autograd.grad((out * weight).sum(), [x, *net.parameters()])  # noqa: E731
    fast = pearl.forward_onednn(net, x)
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-4)
    for a, b in zip(gradients(fast), gradients(plain)):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    monkeypatch.setattr(pearl, "forward_onednn", lambda net, x: "large")
    assert net(x) == "large" and torch.is_tensor(net(x[:511]))


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


def test_posterior_of_a_context_in_which_nothing_is_alive_is_the_prior(agent):
    alive = torch.tensor([[True] * 9, [False] * 9])
    q = pearl.posterior(agent["encoder"], torch.randn(2, 9, OBS + ACTION + 1), alive)
    assert q.mean[1].tolist() == [0, 0] and q.stddev[1].tolist() == [1, 1] and q.mean[0].all()


def test_tokens_with_and_without_the_next_state():
    parts = pearl.Transitions(*(k * torch.ones(2, 4, n) for k, n in enumerate((OBS, ACTION, 1, OBS, 1), start=1)))
    assert pearl.tokens(parts, small_args())[0, 0].tolist() == [1, 1, 1, 2, 2, 3]
    assert pearl.tokens(parts, small_args(next_obs_in_context=True))[0, 0].tolist() == [1, 1, 1, 2, 2, 3, 4, 4, 4]


# -- losses ------------------------------------------------------------------------------------------------------------


def test_the_slow_copy_starts_at_v(agent):
    for slow, fast in zip(agent["target"].parameters(), agent["v"].parameters()):
        assert torch.equal(slow, fast) and slow is not fast and not slow.requires_grad


def row_batch(rows=20) -> pearl.Transitions:
    torch.manual_seed(2)
    terminated = (torch.rand(rows, 1) < 0.3).float()
    obs, action, reward, next_obs = (torch.randn(rows, n) for n in (OBS, ACTION, 1, OBS))
    return pearl.Transitions(obs, action, reward, next_obs, terminated)


def test_critic_loss_against_a_slow_reference(agent):
    """V̄ sees the z of the next state, which need not be the one of the state."""
    args, batch, z, next_z = small_args(), row_batch(), torch.randn(20, 2), torch.randn(20, 2)
    expected = 0.0
    for j in range(2):
        q, target = modules(agent["q"], j), modules(agent["target"], 0)
        for s, a, r, s2, d, latent, next_latent in zip(*batch, z, next_z):
            bellman = 5 * r + (1 - d) * 0.99 * target(torch.cat([s2, next_latent]))
            expected += (q(torch.cat([s, a, latent])) - bellman).item() ** 2 / 20
    assert pearl.critic_loss(agent, batch, z, next_z, args).item() == pytest.approx(expected, rel=1e-4)


def test_the_kl_is_a_sum_over_tasks():
    q_z = Normal(torch.randn(4, 2), torch.rand(4, 2) + 0.1)
    twice = Normal(q_z.mean.repeat(2, 1), q_z.stddev.repeat(2, 1))
    kl = pearl.kl_to_prior(q_z)
    torch.testing.assert_close(kl, (0.5 * (q_z.variance + q_z.mean**2 - 1) - q_z.stddev.log()).sum())
    torch.testing.assert_close(pearl.kl_to_prior(twice), 2 * kl)


def test_actor_loss_against_a_slow_reference(agent):
    args, obs, z, noise = small_args(), row_batch().obs, torch.randn(20, 2), torch.randn(20, ACTION)
    ours = [x.item() for x in pearl.actor_loss(agent, obs, z, noise, args)]
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
    assert ours[:2] == pytest.approx([v_error, policy_loss + penalty], rel=1e-4, abs=1e-5)


def test_only_the_critic_and_the_kl_train_the_encoder(monkeypatch):
    learner = make_learner()
    encoder = list(learner.agent["encoder"].parameters())
    q_z = pearl.posterior(learner.agent["encoder"], torch.randn(4, 8, OBS + ACTION + 1))
    z = pearl.draw(q_z, generator()).repeat_interleave(5, 0)
    for loss in (pearl.critic_loss(learner.agent, row_batch(), z, z, learner.args), pearl.kl_to_prior(q_z)):
        assert all(g.abs().sum() > 0 for g in torch.autograd.grad(loss, encoder, retain_graph=True))
    seen = spy_on(monkeypatch, pearl, "actor_loss")
    pearl.gradient_step(learner, generator())
    (_, _, z, *_), _ = seen[0]
    assert not z.requires_grad


NUMBERS = dict(kl_weight=3.0, reward_scale=2.0, gamma=0.5, tau=0.5, lr=1e-3, policy_regularisation=100.0)


@pytest.mark.parametrize("numbers", [{}, NUMBERS], ids=["defaults", "others"])
def test_gradient_step_against_the_official_order_with_five_optimisers(agent, numbers):
    """Five plain Adams, one after the other, in the order of the spec; networks as PyTorch's layers."""
    learner = make_learner(agent, **numbers)
    agent, (beta, scale, gamma, tau, lr, weight) = learner.agent, (getattr(learner.args, name) for name in NUMBERS)
    nets = {name: modules(agent[name], 0) for name in ("encoder", "policy", "v", "target")}
    nets |= {f"q{j}": modules(agent["q"], j) for j in range(2)}
    adam = {name: torch.optim.Adam(net.parameters(), lr) for name, net in nets.items() if name != "target"}
    for i in range(3):
        pearl.gradient_step(learner, generator(i))

        rng = generator(i)
        tasks = torch.randint(6, (4,), generator=rng)
        context = torch.cat(learner.storage.read(learner.context.sample(tasks, 8, rng))[:3], -1)
        s, a, r, s2, d = (x.flatten(0, 1) for x in learner.storage.read(learner.rl.sample(tasks, 5, rng)))
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
        y = scale * r + (1 - d) * gamma * nets["target"](torch.cat([s2, z], 1)).detach()
        loss = beta * 0.5 * (var + mu**2 - 1 - var.log()).sum()
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
                slow.copy_((1 - tau) * slow + tau * fast)
        adam["policy"].zero_grad()
        ((log_pi - min_q).mean() + weight * m.square().mean() + weight * log_std.square().mean()).backward()
        adam["policy"].step()
    for name, net in nets.items():
        ours = agent["q"] if name.startswith("q") else agent[name]
        copy_ = int(name[1]) if name.startswith("q") else 0
        for layer, weight, bias in zip(net[::2], ours.weights, ours.biases):
            torch.testing.assert_close(weight[copy_].T, layer.weight, atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(bias[copy_, 0], layer.bias, atol=1e-6, rtol=1e-4)


# -- replay data and collection ----------------------------------------------------------------------------------------


def test_storage_keeps_the_steps_taken_and_their_successors():
    storage, alive = pearl.Storage(OBS, ACTION), torch.ones(2, 5, dtype=torch.bool)
    alive[1, 3:] = False
    episodes = make_episodes(2, 5, alive)
    storage.add(make_episodes(1, 5))
    rows = storage.add(episodes)
    assert [len(r) for r in rows] == [5, 3] and storage.used == 6 + 6 + 4
    rows = torch.cat(rows)
    expected = [torch.cat([x[0, :5], x[1, :3]]) for x in (episodes.obs, episodes.action, episodes.reward[..., None])]
    expected += [torch.cat([episodes.obs[0, 1:], episodes.obs[1, 1:4]]), torch.tensor([0.0] * 7 + [1])[:, None]]
    for found, wanted in zip(storage.read(rows[None]), expected):
        assert torch.equal(found[0], wanted), "a fall ends, a time limit does not"


def test_storage_grows_and_keeps_what_it_has():
    storage = pearl.Storage(OBS, ACTION)
    episodes = make_episodes(1, 40_000)
    rows = [storage.add(episodes) for _ in range(4)]
    for (r,) in rows:
        assert torch.equal(storage.read(r[None]).next_obs[0], episodes.obs[0, 1:])


@pytest.mark.parametrize("steps, grows", [(2**16 - 1, False), (2**16, True)])
def test_storage_can_be_full_to_the_last_row(steps, grows):
    storage, episodes = pearl.Storage(OBS, ACTION), make_episodes(1, steps)
    (rows,) = storage.add(episodes)
    assert (len(storage.data) > 2**16) == grows
    assert torch.equal(storage.read(rows[None]).next_obs[0], episodes.obs[0, 1:])


def test_storage_goes_on_from_an_empty_checkpoint():
    storage, episodes = pearl.Storage(OBS, ACTION), make_episodes(2, 5)
    storage.load_state_dict(pearl.Storage(OBS, ACTION).state_dict())
    rows = torch.cat(storage.add(episodes))
    assert torch.equal(storage.read(rows[None]).obs[0], episodes.obs[:, :5].flatten(0, 1))


def test_index_samples_each_of_its_own_rows():
    index = pearl.Index(3)
    for i, rows in ((0, [5, 6]), (2, [7, 8]), (0, [9])):
        index.add(i, torch.tensor(rows))
    drawn = index.sample(torch.tensor([0, 2, 2]), 600, generator())
    assert [sorted(set(d.tolist())) for d in drawn] == [[5, 6, 9], [7, 8], [7, 8]]
    assert not torch.equal(drawn[1], drawn[2])
    assert torch.bincount(drawn[0])[[5, 6, 9]].min() > 150, "uniform"


def test_replay_data_survive_a_checkpoint(tmp_path):
    learner, again = make_learner(), make_learner(tasks=0)
    torch.save({k: getattr(learner, k).state_dict() for k in ("storage", "rl", "context")}, tmp_path / "x.pt")
    state = torch.load(tmp_path / "x.pt", weights_only=True)
    for name, part in state.items():
        getattr(again, name).load_state_dict(part)
    for each in (learner, again):
        torch.manual_seed(5)
        each.rl.add(1, torch.cat(each.storage.add(make_episodes(2, 10))))
    for name in ("rl", "context"):
        rows, same = (getattr(x, name).sample(torch.tensor([0, 5, 1, 3]), 9, generator()) for x in (learner, again))
        assert torch.equal(rows, same)
        assert all(torch.equal(a, b) for a, b in zip(learner.storage.read(rows), again.storage.read(rows)))


def real_learner(env_id: str, n: int, **kwargs) -> pearl.Learner:
    torch.manual_seed(0)
    args = small_args(env=env_id, **kwargs)
    make_env = functools.cache(lambda n: gym.make_vec(env_id, num_envs=n, horizon=args.horizon))
    return pearl.make_learner(make_env, make_env(1).unwrapped.task_set("train")[:n], args)


def test_blocks_of_an_iteration(monkeypatch):
    """Episodes a block, prior z first, extra data never in the context, only visited tasks cleared."""
    blocks = dict(prior_steps=41, posterior_steps=40, extra_steps=60)
    learner = real_learner("point-goal-4c", 6, horizon=20, visits=2, **blocks)
    pearl.collect(learner, torch.arange(6), learner.context, 30, False, True, rng := generator(1))
    assert learner.frames == 6 * 40 and [len(r) for r in learner.context.rows] == [40] * 6
    old = list(learner.context.rows)
    played, drawn = spy_on(monkeypatch, pearl, "rollout"), spy_on(monkeypatch, pearl, "posterior_z")
    returns = pearl.collect_iteration(learner, rng)
    assert learner.frames == 6 * 40 + 2 * (60 + 40 + 60) and len(returns) == 3
    assert [len(a[3]) for a, _ in played] == [2 * 3, 2, 2, 2 * 3], "rounds of 2 visits"
    z = [a[3].view(2, -1, 2) for a, _ in played]
    torch.testing.assert_close(z[2], drawn[1][1])
    torch.testing.assert_close(z[3][:, 1:], drawn[2][1][:, 1:])
    for first, (_, inferred) in ((z[1], drawn[0]), (z[3], drawn[2])):
        assert (first[:, 0] != inferred[:, 0]).all(), "the first z of a block comes from the prior"
    visited = [task for task in range(6) if len(learner.rl.rows[task]) > 40]
    assert len(visited) == 2, "a seed with two different tasks"
    for task in range(6):
        rows, context = learner.rl.rows[task], learner.context.rows[task]
        assert torch.equal(context, rows[40:140] if task in visited else old[task])
        assert len(rows) == (200 if task in visited else 40)


def test_every_visit_infers_from_its_own_context_and_the_last_one_stays(monkeypatch):
    learner = real_learner("point-goal-4c", 1, horizon=10, visits=3, prior_steps=20, posterior_steps=20, extra_steps=30)
    seen = spy_on(monkeypatch, pearl, "posterior")
    pearl.collect_iteration(learner, generator())
    rows = learner.rl.rows[0].view(-1, 10)  # [episode, step], all of one task
    prior, one, two = rows[:6].view(3, 20), rows[6:9], rows[9:12]  # [visit, step], the two of the posterior block
    assert torch.equal(learner.context.rows[0], torch.cat([prior[2], one[2], two[2]]))
    states = lambda rows: set(map(tuple, learner.storage.data[rows, :2].tolist()))  # noqa: E731
    context = [tokens[..., :2] for (_, tokens), _ in seen]  # [z, token, 2]
    assert {c.shape[1] for c in context} == {learner.args.context}
    for i in range(3):
        assert set(map(tuple, context[0][i].tolist())) <= states(prior[i])
        in_extra = set(map(tuple, context[-1].view(3, -1, 2)[i].tolist()))
        assert in_extra <= states(torch.cat([prior[i], one[i], two[i]])) and not in_extra <= states(prior[i])


@pytest.mark.parametrize("infer, to_context", [(False, True), (True, True), (True, False)])
def test_blocks_are_of_steps_where_walkers_fall(monkeypatch, infer, to_context):
    learner = real_learner("walker-dir", 2, horizon=200)  # an untrained walker falls after some 45 steps
    tasks, contexts = torch.tensor([0, 1, 0]), pearl.Index(3)
    pearl.collect(learner, tasks, contexts, 100, False, True, rng := generator())
    before = [len(r) for r in contexts.rows]
    played = spy_on(monkeypatch, pearl, "rollout")
    found = pearl.collect(learner, tasks, contexts, 500, infer, to_context, rng)
    returns = torch.cat([episodes.reward.sum(1)[play] for (*_, play), episodes in played])
    assert found == pytest.approx(returns.mean().item(), rel=1e-5), "of those that played"
    taken, sequential = torch.zeros(3), infer and to_context
    for (*_, play), episodes in played:
        play = torch.from_numpy(play).view(3, -1)
        missing = (500 - taken).clamp(min=0)
        needed = (missing > 0).long() if sequential else (missing / 200).ceil().long()
        assert play.sum(1).tolist() == needed.tolist(), "no episode more than one after another would have been"
        assert not episodes.alive[~play.flatten()].any()
        taken += episodes.alive.view(3, -1).sum(1)
    assert len(played) > 3 and (taken >= 500).all() and (taken < 700).all()
    assert learner.frames == sum(before) + taken.sum()
    assert [len(r) - b for r, b in zip(contexts.rows, before)] == (taken.tolist() if to_context else [0] * 3)


def test_a_diverged_simulation_is_no_fall_and_its_last_step_is_dropped():
    env, net = probes.Breaks(num_envs=2, horizon=6), pearl.make_agent(2, 2, small_args())
    everyone, noise = np.ones(2, bool), torch.randn(6, 2, 2, generator=generator())
    episodes = pearl.rollout(env, env.task_set("train")[:2], net["policy"], torch.zeros(2, 2), 0, noise, everyone)
    assert episodes.alive.sum(1).tolist() == [6, 3] and not episodes.terminated.any()
    storage = pearl.Storage(2, 2)
    rows = torch.cat(storage.add(episodes))
    kept = storage.read(rows[None])
    assert len(rows) == 9 and not kept.terminated.any()
    assert torch.equal(kept.next_obs[0, -1], episodes.obs[1, 3])


OFF_POLICY = pytest.mark.parametrize("script", [pearl, sop, metacure], ids=lambda script: script.__name__)


@OFF_POLICY
def test_physics_that_always_diverges_at_once_ends_the_run(script, monkeypatch, tmp_path):
    """Of one visit: the others would be done, and its steps waited for in vain."""
    env, steps = envs.ENVIRONMENTS["point-goal-4c"], []
    monkeypatch.setattr(env, "diverged", lambda self: steps.append(None) or np.arange(self.num_envs) == 0)
    flags = f"--env point-goal-4c --preset paper --num-threads 1 --run-dir {tmp_path} {SHORT[script.__name__]}"
    run = script.Run(args := script.parse_args(flags.split()))
    with pytest.raises(FloatingPointError, match="diverges in the first step of an episode, again and again"):
        script.train(args, run)
    assert len(steps) > 100, "an episode now and then does not"


class Ends(envs.ENVIRONMENTS["point-goal-4c"]):
    """All copies fall in step 3."""

    def terminated(self):
        return self.elapsed == 3


def test_the_last_state_stays_once_everyone_has_fallen():
    env, net = Ends(num_envs=2, horizon=6), pearl.make_agent(2, 2, small_args())
    everyone, noise = np.ones(2, bool), torch.randn(6, 2, 2, generator=generator())
    episodes = pearl.rollout(env, env.task_set("train")[:2], net["policy"], torch.zeros(2, 2), 0, noise, everyone)
    assert episodes.terminated.nonzero()[:, 1].tolist() == [2, 2] and episodes.obs[:, 3].all()
    assert torch.equal(episodes.obs[:, 4:], episodes.obs[:, 3:4].expand(-1, 3, -1))


def make_fall(policy: pearl.MLP) -> None:
    """A walker's: strong actions, of little noise."""
    policy.biases[-1].data[..., :6], policy.biases[-1].data[..., 6:] = 1.0, -1.5


@pytest.mark.parametrize("test", [True, False])
def test_rollout_replayed_one_copy_at_a_time(agent, test):
    torch.manual_seed(0)
    net = pearl.make_agent(17, 6, small_args())["policy"]
    env = gym.make_vec("walker-dir", num_envs=3, horizon=200)
    tasks, z = env.unwrapped.sample_tasks(3, np.random.default_rng(0)), torch.randn(3, 2)
    make_fall(net)
    seed, noise = 7, torch.randn(200, 3, 6, generator=generator(4)) * (not test)
    episodes = pearl.rollout(env, tasks, net, z, seed, noise, np.ones(3, bool))
    assert 0 < episodes.terminated.sum() and not episodes.alive.all(), "some fall"
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


@pytest.mark.parametrize("after", [False, True])
def test_evaluation_draws_from_the_prior_and_then_from_everything_seen(monkeypatch, after):
    """With mean actions, and without what came after a fall; with the states after the steps where asked."""
    torch.manual_seed(0)
    args = small_args(eval_episodes=4, eval_prior_episodes=2, horizon=200, next_obs_in_context=after)
    env = gym.make_vec("walker-dir", num_envs=4, horizon=200)
    tasks, net = env.unwrapped.sample_tasks(4, np.random.default_rng(0)), pearl.make_agent(17, 6, args)
    make_fall(net["policy"])
    net["encoder"].weights[-1].data.normal_(0, 0.5)  # what is seen matters
    calls, rng = spy_on(monkeypatch, pearl, "rollout"), generator(10**6)
    make_env, known = functools.partial(gym.make_vec, "walker-dir", horizon=200), env.unwrapped.task_set("train")[:3]
    metrics, data = pearl.evaluate(make_env, tasks, known, net, args)
    for k in range(1, 5):  # first the known tasks
        _, episode = calls.pop(0)
        assert metrics[f"eval/train_return_episode_{k}"] == pytest.approx(episode.reward.sum(1).mean().item())
        assert len(episode.reward) == 3
    assert len(calls) == 4 and not all(episode.alive.all() for _, episode in calls), "some fall"

    def belief(k: int) -> list[torch.Tensor]:
        """Mean and standard deviation of q(z | the first k episodes), task by task."""
        beliefs = []
        for i in range(4):
            seen = [(e.obs[i, :-1], e.action[i], e.reward[i, :, None], e.obs[i, 1:]) for _, e in calls[:k]]
            steps = [torch.cat(s[: 3 + after], 1)[e.alive[i]] for s, (_, e) in zip(seen, calls)]
            q_z = pearl.posterior(net["encoder"], torch.cat(steps)[None])
            beliefs.append((q_z.mean[0], q_z.stddev[0]))
        return [torch.stack(x).detach() for x in zip(*beliefs)]

    for k, ((*_, z, seed, noise, play), _) in enumerate(calls):
        mean, std = belief(k) if k >= 2 else (torch.zeros(4, 2), torch.ones(4, 2))
        torch.testing.assert_close(z, mean + std * torch.randn(4, 2, generator=rng))
        assert seed == pearl.random_seed(rng) and not noise.any() and play.all()
    assert [f"eval/return_episode_{k}" in metrics for k in (1, 4, 5)] == [True, True, False]
    np.testing.assert_allclose(data["embedding"], belief(4)[0], atol=1e-5)
    assert data["trace"].shape == (4, 201, 4, 2)
    monkeypatch.undo()
    assert pearl.evaluate(make_env, tasks, known, net, args)[0] == metrics
    for k in range(4):
        obs, _ = env.reset(seed=int(data["seed"][k]), options={"tasks": tasks})
        for t in range(200):
            np.testing.assert_array_equal(data["trace"][k, t], obs[:, :2])
            obs, *_ = env.step(data["action"][k, t])
    assert data["action"].dtype == np.float32


# -- command line ------------------------------------------------------------------------------------------------------


def test_training_tasks_are_the_first_different_ones():
    env = gym.make_vec("cheetah-dir").unwrapped
    assert pearl.different(env.task_set("train"), 500).params.tolist() == [[1], [-1]]
    env = gym.make_vec("cheetah-vel").unwrapped
    np.testing.assert_array_equal(pearl.different(env.task_set("train"), 7).params, env.task_set("train").params[:7])
    assert len(pearl.different(gym.make_vec("ml2").unwrapped.task_set("train"), 4)) == 4


@pytest.mark.parametrize("env, most", [("cheetah-dir", 2), ("ant-cheetah-dir", 4), ("point-goal-4c", 500)])
def test_more_training_tasks_than_there_are_get_one_line(tmp_path, env, most):
    with pytest.raises(SystemExit, match=f"--train-tasks must be at most {most}: {env} has no more"):
        train(pearl, env=env, train_tasks=most + 1, run_dir=str(tmp_path))
    assert not any(tmp_path.iterdir())


@OFF_POLICY
@pytest.mark.parametrize("env_id", envs.ENVIRONMENTS)
def test_every_environment_has_the_tasks_of_its_preset(env_id, script):
    n = script.parse_args(["--env", env_id]).train_tasks
    params = envs.ENVIRONMENTS[env_id]().task_set("train").params
    assert len(np.unique(params, axis=0)) >= n


@pytest.mark.parametrize(
    "env, tasks, meta_batch, initial, prior, extra, gradient_steps, context, visits, next_obs",
    [
        ("cheetah-dir", 2, 4, 2000, 1000, 1000, 2000, 256, 5, False),
        ("cheetah-vel", 100, 16, 2000, 400, 600, 2000, 100, 5, False),
        ("ant-dir", 2, 4, 2000, 400, 600, 4000, 256, 5, False),
        ("walker-dir", 2, 4, 2000, 1000, 1000, 2000, 256, 5, False),
        ("ml2", 4, 4, 2000, 1000, 1000, 2000, 256, 10, False),
        ("ant-cheetah-dir", 4, 4, 2000, 1000, 1000, 2000, 256, 10, False),
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


def test_the_sparse_point_has_the_official_settings():
    args = pearl.parse_args(["--env", "point-goal-sparse", "--preset", "paper"])
    blocks = args.initial_steps, args.prior_steps, args.posterior_steps, args.extra_steps, args.visits
    assert blocks == (200, 100, 900, 0, 10) and (args.train_tasks, args.meta_batch) == (80, 16)
    assert args.gradient_steps == 1000 and args.context == 1024
    assert (args.kl_weight, args.reward_scale, args.gamma) == (1.0, 100.0, 0.9)
    assert (args.eval_episodes, args.eval_prior_episodes) == (13, 5), "400 steps or more, five episodes to explore"


def test_every_preset_names_an_environment_and_fields():
    for name, presets in (("paper", pearl.PAPER), ("fast", pearl.FAST)):
        for env_id, preset in presets.items():
            assert env_id in envs.ENVIRONMENTS
            args = pearl.parse_args(["--env", env_id, "--preset", name])
            assert all(getattr(args, k) == v for k, v in preset.items())


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--batch", "0"], "--batch must be"),
        (["--tau", "0"], "--tau must be in (0, 1]"),
        (["--gamma", "1.1"], "--gamma must be in [0, 1]"),
        (["--reward-scale", "-1"], "must be positive"),
        (["--kl-weight", "-1"], "--kl-weight must be at least 0"),
        (["--env", "point-goal-4c", "--eval-prior-episodes", "5"], "at most --eval-episodes"),
    ],
)
def test_wrong_input_gets_one_line(flags, message):
    with pytest.raises(SystemExit) as caught:
        pearl.parse_args(flags)
    assert str(caught.value).startswith("pearl.py: error: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


# -- every task, every block -------------------------------------------------------------------------------------------


def test_contexts_and_batches_come_each_from_rows_of_their_own(monkeypatch):
    learner = make_learner()
    for k, rows in enumerate(learner.rl.rows):
        learner.context.rows[k], learner.rl.rows[k] = rows[:10], rows[10:]
    contexts, batches = spy_on(monkeypatch, pearl, "tokens"), spy_on(monkeypatch, pearl, "critic_loss")
    pearl.gradient_step(learner, generator())
    ((seen, _), _), ((_, batch, *_), _) = contexts[0], batches[0]
    for found, index in ((seen.obs.flatten(0, 1), learner.context), (batch.obs, learner.rl)):
        states = learner.storage.data[torch.cat(index.rows), :OBS].tolist()
        assert set(map(tuple, found.tolist())) <= set(map(tuple, states))


def test_a_visit_plays_in_its_own_task(monkeypatch):
    learner = real_learner("point-goal-4c", 6, horizon=10)
    played = spy_on(monkeypatch, pearl, "rollout")
    pearl.collect(learner, torch.tensor([4, 1, 4]), pearl.Index(3), 20, False, True, generator())
    ((_, tasks, *_), _) = played[0]
    np.testing.assert_array_equal(tasks.params, learner.tasks.params[[4, 4, 1, 1, 4, 4]])
    assert [len(rows) for rows in learner.rl.rows] == [0, 20, 0, 0, 40, 0]


def test_tasks_to_visit_are_drawn_with_replacement(monkeypatch):
    learner = real_learner("point-goal-4c", 6, horizon=5, visits=6, prior_steps=5, extra_steps=5)
    played, rng = spy_on(monkeypatch, pearl, "rollout"), generator()
    for _ in range(3):
        pearl.collect_iteration(learner, rng)
    drawn = [[*map(tuple, tasks.params)] for (_, tasks, *_), _ in played[::2]]
    assert any(len({*visits}) < 6 for visits in drawn) and len({task for visits in drawn for task in visits}) == 6
    assert drawn[0] != drawn[1]


def test_only_the_first_of_all_episodes_of_a_block_is_uninformed(monkeypatch):
    learner, contexts, rng = real_learner("walker-dir", 2, horizon=200), pearl.Index(2), generator()
    pearl.collect(learner, torch.arange(2), contexts, 100, False, True, rng)
    played, drawn = spy_on(monkeypatch, pearl, "rollout"), spy_on(monkeypatch, pearl, "posterior_z")
    pearl.collect(learner, torch.arange(2), contexts, 500, True, False, rng)
    assert len(played) > 1, "walkers fall: more than one round"
    for k, (((*_, z, _, _, _), _), (_, informed)) in enumerate(zip(played, drawn, strict=True)):
        z = z.view(2, -1, 2)
        assert torch.equal(z[:, 1:], informed[:, 1:]) and torch.equal(z[:, 0], informed[:, 0]) == (k > 0)


def test_a_run_begins_in_every_task_once_and_is_tested_in_held_out_ones(monkeypatch, tmp_path):
    blocks, collect, evaluated = [], pearl.collect, spy_on(monkeypatch, pearl, "evaluate")

    def watch(learner, tasks, contexts, steps, infer, to_context, rng):
        blocks.append((len(tasks), contexts is learner.context, steps, infer, to_context))
        return collect(learner, tasks, contexts, steps, infer, to_context, rng)

    monkeypatch.setattr(pearl, "collect", watch)
    flags = dict(horizon=5, train_tasks=3, initial_steps=15, visits=2, prior_steps=10, posterior_steps=5)
    flags |= dict(extra_steps=20, hidden=(7,), encoder_hidden=(6,), batch=5, context=8, meta_batch=4, gradient_steps=2)
    run = train(pearl, env="point-goal-4c", iterations=2, eval_every=1, run_dir=str(tmp_path), **flags)
    visit = [(2, False, 10, False, True), (2, False, 5, True, True), (2, False, 20, True, False)]
    assert blocks == [(3, True, 15, False, True), *visit, *visit]
    rows = (run / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("charts/frames")
    assert [int(row.split(",")[column]) for row in rows[1:]] == [3 * 15 + 2 * 35, 3 * 15 + 4 * 35]
    env = gym.make_vec("point-goal-4c").unwrapped
    assert len(evaluated) == 3
    for (_, tasks, known, *_), _ in evaluated:
        np.testing.assert_array_equal(tasks.params, env.task_set("test").params)
        np.testing.assert_array_equal(known.params, env.task_set("train").params[:3])


def test_another_seed_is_another_evaluation():
    args, make_env = small_args(horizon=5), functools.partial(gym.make_vec, "point-goal-4c", horizon=5)
    torch.manual_seed(0)
    env, agent = make_env(1).unwrapped, pearl.make_agent(2, 2, args)
    tasks = env.task_set("test")[:4]
    seeds = [pearl.evaluate(make_env, tasks, tasks, agent, small_args(horizon=5, seed=k))[1]["seed"] for k in (0, 1)]
    assert not np.array_equal(*seeds)
