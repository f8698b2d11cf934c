"""MetaCURE's mathematics: beliefs, intrinsic reward, a gradient step against a slow reference, both policies' data."""

import copy
import csv
import functools
from pathlib import Path

import gymnasium as gym
import metacure
import numpy as np
import probes  # noqa: F401
import pytest
import torch
from conftest import spy_on, train
from test_pearl import NUMBERS
from torch import nn
from torch.distributions import Normal

import envs

OBS, ACTION, TOKEN = 3, 2, 6


def small_args(**kwargs) -> metacure.Args:
    sizes = dict(latent_dim=2, encoder_hidden=(6, 5), hidden=(7, 6), id_hidden=(5,), meta_batch=4, batch=9)
    return metacure.Args(**(sizes | dict(num_threads=1, train_tasks=6) | kwargs))


@pytest.fixture
def agent():
    torch.manual_seed(0)
    return metacure.make_agent(OBS, ACTION, small_args(dynamics=True))


def generator(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_episodes(copies: int, horizon: int) -> metacure.Episodes:
    obs, action = torch.randn(copies, horizon + 1, OBS), torch.rand(copies, horizon, ACTION)
    reward, terminated = torch.randn(copies, horizon), (torch.rand(copies, horizon) < 0.2).float()
    return metacure.Episodes(obs, action, reward, terminated, torch.ones(copies, horizon, dtype=torch.bool))


def make_learner(horizon=5, trials=3, **kwargs) -> metacure.Learner:
    """A learner that has seen, in each task, trials of two episodes of the explorer, and two of the exploiter."""
    torch.manual_seed(1)
    args = small_args(horizon=horizon, explorer_episodes=2, **kwargs)
    env = gym.vector.VectorEnv()
    env.single_observation_space = gym.spaces.Box(-1, 1, (OBS,))
    env.single_action_space = gym.spaces.Box(-1, 1, (ACTION,))
    tasks = envs.Tasks(np.zeros((args.train_tasks, 1)), np.zeros(args.train_tasks, int))
    learner = metacure.make_learner(lambda n: env, tasks, args)
    say_more(learner.agent["encoder"])
    for task in range(args.train_tasks):
        first, second, other = (make_episodes(n, horizon) for n in (trials, trials, 2))
        contexts = [metacure.tokens(e.obs, e.action, e.reward) for e in (first, second)]
        learner.trials.add(task, torch.cat(contexts, dim=1))
        for e in (first, second, other):
            learner.rl.add(task, metacure.transitions(e).flatten(0, 1))
    return learner


def evaluations(run: Path) -> list[dict[str, float]]:
    with (run / "eval.csv").open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


# -- networks ----------------------------------------------------------------------------------------------------------


def count(part: nn.Module) -> int:
    return sum(p.numel() for p in part.parameters())


@pytest.mark.parametrize("tasks, copies, inputs", [(40, 40, 26), (100, 1, 126)])
def test_sizes_are_the_official_codes(tasks, copies, inputs):
    agent = metacure.make_agent(20, 6, metacure.Args(train_tasks=tasks))
    for name, size in dict(policy=192_012, q=2 * 190_501, v=188_701, target=188_701).items():
        assert count(agent["exploiter"][name]) == size, "PEARL's"
        more = (2 if name == "q" else 1) * 5 * 300
        assert count(agent["explorer"][name]) == size + more, "which sees ten numbers in place of five"
    assert count(agent["decoder"]) == (10 + 26 + 1) * 300 + 2 * 301 * 300 + 301
    assert count(agent["predictor"]) == copies * ((inputs + 1) * 64 + 2 * 65 * 64 + 65)


def test_initialisation_is_the_official_codes(agent):
    net = metacure.MLP(50, 100, 200, 10, copies=2)
    for one in net.nets:
        for layer, bound in zip(one[::2], (1 / 10, 1 / 200**0.5, 3e-3)):
            assert 0.95 * bound < layer.weight.abs().max() <= bound
            assert (layer.bias == 0.1).all() if bound > 3e-3 else 0 < layer.bias.abs().max() <= bound
    assert (net.nets[0][0].weight != net.nets[1][0].weight).all(), "two different networks"
    for who in ("explorer", "exploiter"):
        last = {name: part.nets[0][-1].weight.abs().max() for name, part in agent[who].items()}
        assert 5e-4 < last["policy"] <= 1e-3 < last["q"] and last["v"] <= 3e-3


def test_onednn_takes_another_way_to_the_same_numbers_and_gradients():
    torch.manual_seed(0)
    net, x = metacure.MLP(5, 7, 6, 3, copies=2), torch.randn(600, 5, requires_grad=True)
    plain = torch.stack([one(x) for one in net.nets])
    weight = torch.randn_like(plain)
    fast = net(x[:, :2], x[:, 2:])
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-4)
    for a, b in zip(*(torch.autograd.grad((out * weight).sum(), [x, *net.parameters()]) for out in (fast, plain))):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_snail_grows_as_the_official_code():
    snail = metacure.Snail(64, 64)
    widths = [layer.in_channels if isinstance(layer, nn.Conv1d) else layer.in_features for layer in snail.layers]
    assert [widths[i] for i in (0, 6, 7, 13)] == [64, 160, 192, 288] and snail.hidden_size == 320
    assert [c.dilation[0] for c in snail.layers[:6]] == [1, 2, 4, 8, 16, 32]


def test_snail_by_hand():
    """Gated convolutions of x_t and x_t-d, and attention to what came before, a token at a time."""
    snail, tokens = metacure.Snail(3, 4), 4
    x = torch.randn(2, tokens, 3)
    known, _ = snail(x)
    for layer in snail.layers:
        new = []
        for t in range(tokens):
            if isinstance(layer, nn.Conv1d):
                (d,) = layer.dilation
                before = x[:, t - d] if t >= d else torch.zeros_like(x[:, 0])
                out = before @ layer.weight[..., 0].T + x[:, t] @ layer.weight[..., 1].T + layer.bias
                new.append(out[:, :16].tanh() * out[:, 16:].sigmoid())
            else:
                query, key, value = layer(x).split(32, dim=-1)
                weight = ((query[:, t, None] * key[:, : t + 1]).sum(-1) / 32**0.5).softmax(-1)
                new.append((weight[..., None] * value[:, : t + 1]).sum(1))
        x = torch.cat([x, torch.stack(new, 1)], dim=-1)
    torch.testing.assert_close(known, x)


def say_more(encoder: metacure.Encoder) -> None:
    """Untrained, it says nearly the same of all contexts."""
    for p in encoder.head.parameters():
        p.data *= 100


def make_encoder(encoder: str, **kwargs) -> metacure.Encoder:
    torch.manual_seed(0)
    net = metacure.Encoder(TOKEN, small_args(encoder=encoder, **kwargs))
    say_more(net)
    return net


@pytest.mark.parametrize("encoder", ["gru", "snail"])
def test_what_is_known_after_a_token_hangs_on_no_later_one(encoder):
    net, context = make_encoder(encoder, batch=16), torch.randn(3, 16, TOKEN)
    q = metacure.posterior(net, context)
    assert q.mean.shape == q.stddev.shape == (3, 16, 2)
    for j in (0, 7, 15):
        other = context.clone()
        other[1, j] += 1
        changed = metacure.posterior(net, other)
        for before, after in ((q.mean, changed.mean), (q.stddev, changed.stddev)):
            torch.testing.assert_close(after[1, :j], before[1, :j], rtol=0, atol=1e-6)
            torch.testing.assert_close(after[[0, 2]], before[[0, 2]], rtol=0, atol=1e-6)
            assert (after[1, j:] != before[1, j:]).any(1).all(), "but all from there on"


@pytest.mark.parametrize("encoder", ["gru", "snail"])
def test_a_rollout_reads_what_there_is_so_far_and_training_all_at_once(encoder):
    net, context = make_encoder(encoder), torch.randn(3, 9, TOKEN)
    raw_mean, raw_var = net(context).chunk(2, -1)
    whole = torch.cat([raw_mean, nn.functional.softplus(raw_var)], -1)
    for n in (1, 4, 9):
        b = metacure.belief(metacure.posterior(net, context[:, :n]))
        torch.testing.assert_close(b, whole[:, :n])


def modules(net: metacure.MLP, i: int = 0) -> nn.Sequential:
    return copy.deepcopy(net.nets[i])


# -- the intrinsic reward ----------------------------------------------------------------------------------------------


def row_batch(rows=20) -> metacure.Transitions:
    torch.manual_seed(2)
    terminated = (torch.rand(rows, 1) < 0.3).float()
    obs, action, reward, next_obs = (torch.randn(rows, n) for n in (OBS, ACTION, 1, OBS))
    return metacure.Transitions(obs, action, reward, next_obs, terminated)


@pytest.mark.parametrize("dynamics", [False, True])
@pytest.mark.parametrize("tasks", [6, 100])
def test_prediction_errors_by_hand(tasks, dynamics):
    """A network a task, or from 100 tasks on one that sees the id; rewards alone, or next states too."""
    torch.manual_seed(0)
    args = small_args(train_tasks=tasks, dynamics=dynamics)
    agent = metacure.make_agent(OBS, ACTION, args)
    batch, b, ids = row_batch(8), torch.randn(8, 4), torch.tensor([5, 1])
    e_d, e_p = metacure.prediction_errors(agent, ids, batch, b, args)
    assert e_d.shape == e_p.shape == (8,)
    for i in range(8):
        x, k = torch.cat([batch.obs[i], batch.action[i]]), ids[i // 4]
        by_belief = agent["decoder"].nets[0](torch.cat([b[i], x]))
        by_id = (
            agent["predictor"].nets[k](x)
            if tasks == 6
            else agent["predictor"].nets[0](torch.cat([torch.eye(100)[k], x]))
        )
        for error, predicted in ((e_d[i], by_belief), (e_p[i], by_id)):
            expected = (predicted[0] - batch.reward[i, 0]).square()
            if dynamics:
                expected = expected + (predicted[1:] - batch.next_obs[i]).square().mean()
            assert error.item() == pytest.approx(expected.item(), rel=1e-4) and len(predicted) == 1 + OBS * dynamics


def test_equal_predictions_pay_nothing_and_perfect_ones_pay(agent):
    for p in (*agent["decoder"].parameters(), *agent["predictor"].parameters()):
        p.data.zero_()
    batch, b, tasks = row_batch(8), torch.randn(8, 4), torch.tensor([5, 1])
    e_d, e_p = metacure.prediction_errors(agent, tasks, batch, b, small_args())
    assert (e_d - e_p == 0).all() and (e_d > 0).all()
    known = batch._replace(reward=torch.full((8, 1), 2.0), next_obs=torch.full((8, OBS), 3.0))
    for net in agent["predictor"].nets:
        net[-1].bias.data = torch.tensor([2.0, 3, 3, 3])
    e_d, e_p = metacure.prediction_errors(agent, tasks, known, b, small_args())
    assert e_p.abs().max() == 0 and (e_d == 4 + 9).all()


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_the_explorer_is_paid_with_the_networks_of_the_moment(monkeypatch, weight):
    """Never stored: the same transition pays otherwise in the next step; with λ = 0 the reward is the task's."""
    learner = make_learner(intrinsic_weight=weight)
    seen, errors = spy_on(monkeypatch, metacure, "critic_loss"), spy_on(monkeypatch, metacure, "prediction_errors")
    stored = [rows.clone() for rows in learner.rl.rows]
    for i in range(2):
        metacure.gradient_step(learner, generator())
        (_, plain, *_), _ = seen[2 * i]
        (networks, paid, *_), _ = seen[2 * i + 1]
        assert networks is learner.agent["explorer"] and not paid.reward.requires_grad
        _, (e_d, e_p) = errors[i]
        torch.testing.assert_close(paid.reward, plain.reward + weight * (e_d - e_p)[:, None])
    assert torch.equal(seen[1][0][1].obs, seen[3][0][1].obs), "the same seed, the same batch"
    assert torch.equal(seen[1][0][1].reward, seen[3][0][1].reward) == (weight == 0)
    assert all(torch.equal(a, b) for a, b in zip(learner.rl.rows, stored))


# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_code", [False, True])
def test_the_kl_is_a_mean_over_tasks_and_tokens(as_code):
    q = Normal(torch.randn(4, 5, 2), torch.rand(4, 5, 2) + 0.1)
    spread = q.variance if as_code else q.stddev
    kl = metacure.kl_to_prior(q, as_code)
    torch.testing.assert_close(kl, (0.5 * (spread**2 + q.mean**2 - 1) - spread.log()).sum() / 20)
    twice = Normal(q.mean.repeat(2, 1, 1), q.stddev.repeat(2, 1, 1))
    torch.testing.assert_close(metacure.kl_to_prior(twice, as_code), kl)


def test_only_the_exploiters_critic_and_the_kl_train_the_encoder(monkeypatch):
    learner = make_learner()
    encoder = list(learner.agent["encoder"].parameters())
    names = "critic_loss", "actor_loss", "prediction_errors"
    critics, actors, predictions = (spy_on(monkeypatch, metacure, name) for name in names)
    metacure.gradient_step(learner, generator())
    assert [z.requires_grad for (_, _, z, *_), _ in critics] == [True, False], "exploiter, explorer"
    assert not critics[1][0][3].requires_grad
    assert len(actors) == 2 and not any(z.requires_grad for (_, _, z, *_), _ in actors)
    assert not predictions[0][0][3].requires_grad
    q = metacure.posterior(learner.agent["encoder"], torch.randn(4, 9, TOKEN))
    z = metacure.draw(q, generator()).flatten(0, 1)
    batch = row_batch(36)
    critic = metacure.critic_loss(learner.agent["exploiter"], batch, z, z, learner.args)
    for loss in (critic, metacure.kl_to_prior(q, False)):
        gradients = torch.autograd.grad(loss, encoder, retain_graph=True)
        assert all(g.abs().sum() > 0 for g in gradients)


def test_every_network_but_the_slow_copies_is_trained_by_one_optimiser():
    learner = make_learner(dynamics=True, train_tasks=100)
    trained = [id(p) for adam in learner.adam.values() for p in adam.param_groups[0]["params"]]
    wanted = [id(p) for name, p in learner.agent.named_parameters() if ".target." not in name]
    assert sorted(trained) == sorted(wanted)
    encoder = set(map(id, learner.agent["encoder"].parameters()))
    critic = set(map(id, learner.adam["exploiter_critic"].param_groups[0]["params"]))
    assert encoder < critic
    before = {name: p.clone() for name, p in learner.agent.named_parameters()}
    metacure.gradient_step(learner, generator())
    for name, p in learner.agent.named_parameters():
        assert not torch.equal(p, before[name]), name


def test_networks_of_tasks_that_were_not_drawn_stay():
    learner = make_learner(meta_batch=2)
    nets = learner.agent["predictor"].nets
    for i in range(4):
        before = [[p.clone() for p in net.parameters()] for net in nets]
        metacure.gradient_step(learner, generator(i))
        drawn = set(torch.randint(6, (2,), generator=generator(i)).tolist())
        moved = {k for k in range(6) if any((p != q).any() for p, q in zip(nets[k].parameters(), before[k]))}
        assert moved == drawn and len(moved) < 6


@pytest.mark.parametrize("numbers", [dict(kl_as_code=True, intrinsic_weight=0.7), NUMBERS], ids=["defaults", "others"])
def test_gradient_step_against_the_official_order_with_an_optimiser_a_network(numbers):
    """Plain Adams, one after the other."""
    learner = make_learner(dynamics=True, **numbers)
    beta, scale, gamma, tau, lr, weight = (getattr(learner.args, name) for name in NUMBERS)
    agent, encoder, nets = learner.agent, copy.deepcopy(learner.agent["encoder"]), {}
    for who in ("exploiter", "explorer"):
        agent[who]["target"].nets[0][-1].weight.data *= 100  # what comes next is to count
        nets |= {f"{who} {name}": modules(agent[who][name]) for name in ("policy", "v", "target")}
        nets |= {f"{who} q{j}": modules(agent[who]["q"], j) for j in range(2)}
    nets["decoder"] = modules(agent["decoder"])
    nets |= {f"predictor {k}": modules(agent["predictor"], k) for k in range(6)}
    adam = {name: torch.optim.Adam(net.parameters(), lr) for name, net in (nets | {"encoder": encoder}).items()}

    def descend(loss, *names):
        for name in names:
            adam[name].zero_grad()
        loss.backward()
        for name in names:
            adam[name].step()

    def soft_actor_critic(who, s, a, r, s2, d, z, z2, noise, kl=0.0):
        policy, v, target = (nets[f"{who} {name}"] for name in ("policy", "v", "target"))
        q = [nets[f"{who} q{j}"] for j in range(2)]
        y = scale * r + (1 - d) * gamma * target(torch.cat([s2, z2], 1)).detach()
        loss = sum((q_j(torch.cat([s, a, z], 1)) - y).square().mean() for q_j in q) + beta * kl
        descend(loss, f"{who} q0", f"{who} q1", *(["encoder"] if who == "exploiter" else []))
        z = z.detach()
        m, log_std = policy(torch.cat([s, z], 1)).chunk(2, -1)
        u = m + log_std.exp() * noise
        a = u.tanh()
        log_pi = (Normal(m, log_std.exp()).log_prob(u) - (1 - a**2 + 1e-6).log()).sum(1, keepdim=True)
        min_q = torch.minimum(*(q_j(torch.cat([s, a, z], 1)) for q_j in q))
        descend((v(torch.cat([s, z], 1)) - (min_q - log_pi).detach()).square().mean(), f"{who} v")
        with torch.no_grad():
            for slow, fast in zip(target.parameters(), v.parameters()):
                slow.copy_((1 - tau) * slow + tau * fast)
        penalty = weight * (m.square().mean() + log_std.square().mean())
        descend((log_pi - min_q).mean() + penalty, f"{who} policy")

    def believe(context):
        mean, raw = encoder(context).chunk(2, -1)
        return mean, nn.functional.softplus(raw)

    for i in range(3):
        metacure.gradient_step(learner, generator(i))

        rng = generator(i)
        tasks = torch.randint(6, (4,), generator=rng)
        context = metacure.draw_contexts(learner, tasks, 10, rng)
        s, a, r, s2, d = learner.rl.sample(tasks, 9, rng).flatten(0, 1).split([OBS, ACTION, 1, OBS, 1], -1)
        noise = torch.randn(2, 36, ACTION, generator=rng)
        m, v = believe(context[:, :9])
        z = (m + v.sqrt() * torch.randn(4, 9, 2, generator=rng)).flatten(0, 1)
        b = torch.cat([m, v], -1).detach().flatten(0, 1)
        b2 = torch.cat(believe(context[:, 1:]), -1).detach().flatten(0, 1)
        var = v**2 if learner.args.kl_as_code else v
        kl = 0.5 * (var - var.log() + m**2 - 1).sum(-1).mean()
        soft_actor_critic("exploiter", s, a, r, s2, d, z, z.detach(), noise[0], kl)

        outcome = torch.cat([r, s2], 1)
        error = lambda predicted: ((predicted - outcome) ** 2 @ torch.tensor([1, 1 / 3, 1 / 3, 1 / 3]))[:, None]  # noqa: E731, B023
        e_d = error(nets["decoder"](torch.cat([b, s, a], 1)))
        x = torch.cat([s, a], 1).view(4, 9, -1)
        e_p = error(torch.cat([nets[f"predictor {k}"](x_k) for k, x_k in zip(tasks.tolist(), x)]))
        gain = (e_d - e_p).detach()
        descend(e_d.mean(), "decoder")
        descend(e_p.mean(), *{f"predictor {k}" for k in tasks.tolist()})
        soft_actor_critic("explorer", s, a, r + learner.args.intrinsic_weight * gain, s2, d, b, b2, noise[1])

    for ours, theirs in zip(agent["encoder"].parameters(), encoder.parameters()):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    for name, net in nets.items():
        first, *rest = name.split()
        if first in ("decoder", "predictor"):
            ours = agent[first].nets[int(rest[0]) if rest else 0]
        else:
            ours = agent[first]["q"].nets[int(rest[0][1])] if rest[0][0] == "q" else agent[first][rest[0]].nets[0]
        for p, q in zip(ours.parameters(), net.parameters()):
            torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


# -- replay data -------------------------------------------------------------------------------------------------------


def test_tokens_and_steps_by_hand():
    e = make_episodes(2, 4)
    context, steps = metacure.tokens(e.obs, e.action, e.reward), metacure.transitions(e)
    assert context.shape == (2, 5, TOKEN) and not context[:, 0, OBS:].any()
    for i in range(2):
        for t in range(4):
            led_here = [*e.obs[i, t + 1], *e.action[i, t], e.reward[i, t]]
            assert context[i, t + 1].tolist() == led_here and context[i, t, :OBS].tolist() == e.obs[i, t].tolist()
            step = [*e.obs[i, t], *e.action[i, t], e.reward[i, t], *e.obs[i, t + 1], e.terminated[i, t]]
            assert steps[i, t].tolist() == step


def test_replay_samples_rows_of_its_own_and_survives_a_checkpoint(tmp_path):
    replay, again = metacure.Replay(3, 2), metacure.Replay(3, 2)
    for i, rows in ((0, [5, 6]), (2, [7, 8]), (0, [9])):
        replay.add(i, torch.tensor(rows)[:, None].expand(-1, 2))
    torch.save(replay.state_dict(), tmp_path / "x.pt")
    again.load_state_dict(torch.load(tmp_path / "x.pt", weights_only=True))
    drawn, same = (r.sample(torch.tensor([0, 2, 2]), 600, generator()) for r in (replay, again))
    assert torch.equal(drawn, same) and drawn.shape == (3, 600, 2) and torch.equal(drawn[..., 0], drawn[..., 1])
    assert [sorted(set(d.tolist())) for d in drawn[..., 0]] == [[5, 6, 9], [7, 8], [7, 8]]
    assert not torch.equal(drawn[1], drawn[2])
    assert torch.bincount(drawn[0, :, 0].long())[[5, 6, 9]].min() > 150, "uniform"


def test_contexts_are_whole_trials_one_after_the_other():
    learner = make_learner(horizon=5)  # trials of 12 tokens
    contexts = metacure.draw_contexts(learner, torch.tensor([2, 0, 2]), 30, generator())
    assert contexts.shape == (3, 30, TOKEN)
    for k, c in zip((2, 0, 2), contexts):
        trials = learner.trials.rows[k]
        for part in c.split(12):
            assert (trials[:, : len(part)] == part).all((1, 2)).sum() == 1
    many = metacure.draw_contexts(learner, torch.zeros(300, dtype=torch.int64), 5, generator())
    counts = [(many == trial[:5]).all((1, 2)).sum() for trial in learner.trials.rows[0]]
    assert sum(counts) == 300 and min(counts) > 60, "any trial, the newest too"
    resets = contexts[..., OBS:].abs().sum(-1) == 0
    assert resets.nonzero()[:, 1].tolist() == [0, 6, 12, 18, 24] * 3


# -- collection --------------------------------------------------------------------------------------------------------


def real_learner(env: type, n: int, **kwargs) -> metacure.Learner:
    torch.manual_seed(0)
    args = small_args(train_tasks=n, **kwargs)
    make_env = functools.cache(lambda n: env(num_envs=n, horizon=args.horizon))
    return metacure.make_learner(make_env, make_env(1).task_set("train")[:n], args)


def test_an_iteration_of_collection(monkeypatch):
    """Trials and blocks of each visit; the exploiter's steps are in no context; nothing is ever forgotten."""
    point = envs.ENVIRONMENTS["point-goal-sparse"]
    flags = dict(horizon=10, explorer_episodes=2, visits=2, trials=3, prior_steps=21, posterior_steps=30)
    learner = real_learner(point, 6, **flags)
    metacure.collect_trials(learner, torch.arange(6), 2, rng := generator(1))
    metacure.collect(learner, torch.arange(6), 20, infer=False, rng=rng)
    assert [len(r) for r in learner.rl.rows] == [60] * 6 and [len(r) for r in learner.trials.rows] == [2] * 6
    before = list(zip(learner.rl.rows, learner.trials.rows))
    played, contexts = spy_on(monkeypatch, metacure, "rollout"), spy_on(monkeypatch, metacure, "draw_contexts")
    returns = metacure.collect_iteration(learner, rng)
    assert [len(e.obs) for _, e in played] == [6, 6, 2, 2, 2, 2, 2, 2], "two episodes of trials, two blocks of three"
    assert all(a[7] == learner.args.refresh != learner.args.eval_refresh for a, _ in played[:2])
    assert all(a[5].std() > 0.5 for a, _ in played), "sampled actions"
    assert all(a[3].std() > 0.1 for a, _ in played[2:5]), "z of the prior"
    means = [torch.stack([e.reward.sum(1) for _, e in part]).mean() for part in (played[:2], played[2:5], played[5:])]
    assert list(returns.values()) == pytest.approx([m.item() for m in means])
    assert len(contexts) == 2, "in the last two episodes: the first z of a block comes from the prior"
    visited = {k for k in range(6) if len(learner.rl.rows[k]) > 60}
    assert len(visited) == 2, "a seed with two different tasks"
    for k in range(6):
        rl, trials = learner.rl.rows[k], learner.trials.rows[k]
        assert torch.equal(rl[:60], before[k][0]) and torch.equal(trials[:2], before[k][1])
        assert (len(rl), len(trials)) == ((60 + 60 + 60, 5) if k in visited else (60, 2))
        known = [tuple(row) for row in rl[:, :2].tolist()]  # states from which a step was taken
        starts = [tuple(s) for s in trials.view(-1, 2, 11, 5)[:, :, :-1, :2].flatten(0, 2).tolist()]
        assert set(starts) < set(known), "both learn from the data of both, the encoder from the explorer's"
        assert len(starts) == (100 if k in visited else 40)


def test_z_of_the_exploiter_comes_from_stored_trials_of_its_task(monkeypatch):
    learner = real_learner(envs.ENVIRONMENTS["point-goal-sparse"], 3, horizon=4)
    metacure.collect_trials(learner, torch.arange(3), 2, rng := generator())
    seen, played, drawn = (spy_on(monkeypatch, metacure, name) for name in ("posterior", "rollout", "draw"))
    metacure.collect(learner, torch.tensor([2, 0]), 8, True, rng)
    (encoder, context), q = seen[0]
    assert len(seen) == 1 and context.shape == (2, 9, 5) and encoder is learner.agent["encoder"]
    for k, c in zip((2, 0), context):
        assert (learner.trials.rows[k] == c[:5]).all((1, 2)).any()
    assert drawn[0][0][0] is q and torch.equal(played[1][0][3], drawn[0][1][:, -1])


class Ends(envs.ENVIRONMENTS["point-goal-4c"]):
    """Copy 1 falls in step 3, the simulation of copy 2 diverges in step 4."""

    def terminated(self):
        return (np.arange(self.num_envs) == 1) & (self.elapsed == 3)

    def diverged(self):
        return (np.arange(self.num_envs) == 2) & (self.elapsed == 4)


def test_nothing_is_learned_from_what_comes_after_an_end():
    learner = real_learner(Ends, 3, horizon=6, explorer_episodes=2)
    metacure.collect_trials(learner, torch.arange(3), 1, generator())
    assert [len(r) for r in learner.rl.rows] == [12, 6, 6] and [r.shape for r in learner.trials.rows] == [
        (1, 14, 5)
    ] * 3
    assert [r[:, -1].nonzero()[:, 0].tolist() for r in learner.rl.rows] == [[], [2, 5], []]
    for k in (1, 2):
        context = learner.trials.rows[k].view(2, 7, 5)
        assert (context[:, 4:, :2] == context[:, 3:4, :2]).all() and context[:, 3, :2].all()
        assert context[:, 1:4, 2:].all() and not context[:, 4:, 2:].any()


@pytest.mark.parametrize("infer", [False, True])
def test_blocks_are_of_steps_where_walkers_fall(monkeypatch, infer):
    learner = real_learner(envs.ENVIRONMENTS["walker-dir"], 2, horizon=200)
    metacure.collect_trials(learner, torch.arange(2), 1, rng := generator())
    before, played = sum(map(len, learner.rl.rows)), spy_on(monkeypatch, metacure, "rollout")
    found = metacure.collect(learner, torch.tensor([0, 1, 0]), 150, infer, rng)
    returns = torch.cat([e.reward.sum(1)[a[6]] for a, e in played])
    assert found == pytest.approx(returns.mean().item(), rel=1e-5), "of those that played"
    taken = torch.zeros(3)
    for a, e in played:
        assert a[6].tolist() == (taken < 150).tolist() and not e.alive[~a[6]].any()
        taken += e.alive.sum(1)
    assert len(played) > 2 and (taken >= 150).all() and (taken < 350).all()
    assert sum(map(len, learner.rl.rows)) == before + taken.sum()


@pytest.mark.parametrize("test", [True, False])
def test_the_explorer_sees_what_it_has_met(test):
    """Its belief is that of the tokens so far, of earlier episodes too, renewed every other step."""
    torch.manual_seed(0)
    agent = metacure.make_agent(2, 2, small_args())
    say_more(agent["encoder"])
    agent["explorer"]["policy"].nets[0][-1].weight.data *= 100
    env = gym.make_vec("point-goal-sparse", num_envs=3, horizon=5)
    tasks, noise = env.unwrapped.task_set("train")[:3], torch.randn(2, 5, 3, 2, generator=generator()) * (not test)
    episodes, context = metacure.explore(env, tasks, agent, [7, 8], noise, 2)
    assert context.shape == (3, 12, 5) and not torch.equal(*(e.action for e in episodes))
    for k, e in enumerate(episodes):
        assert torch.equal(context[:, 6 * k : 6 * k + 6], metacure.tokens(e.obs, e.action, e.reward))
        obs, _ = env.reset(seed=7 + k, options={"tasks": tasks})
        for t in range(5):
            assert np.array_equal(e.obs[:, t], obs)
            q = metacure.posterior(agent["encoder"], context[:, : 6 * k + t - t % 2 + 1])
            b = torch.cat([q.mean[:, -1], q.variance[:, -1]], 1)
            mean, log_std = metacure.pre_tanh(agent["explorer"]["policy"], e.obs[:, t], b)
            torch.testing.assert_close(e.action[:, t], (mean + log_std.exp() * noise[k, t]).tanh())
            obs, reward, *_ = env.step(e.action[:, t].numpy())
            np.testing.assert_allclose(e.reward[:, t], reward, rtol=1e-6)


def test_evaluation_is_a_trial_and_an_episode_of_the_exploiter(monkeypatch):
    torch.manual_seed(0)
    args = small_args(explorer_episodes=2, horizon=6, eval_refresh=3)
    env = gym.make_vec("point-goal-4c", num_envs=4, horizon=6)
    tasks, agent = env.unwrapped.task_set("test")[:4], metacure.make_agent(2, 2, args)
    for p in agent["encoder"].parameters():
        p.data.normal_(0, 0.5)  # what is seen matters
    calls, rng = spy_on(monkeypatch, metacure, "rollout"), generator(10**6)
    metrics, data = metacure.evaluate(env, tasks, agent, args)
    seeds = torch.randint(2**31, (3,), generator=rng).tolist()
    assert [a[4] for a, _ in calls] == seeds == data["seed"].tolist()
    assert not any(a[5].any() for a, _ in calls) and calls[0][0][7] == calls[1][0][7] == 3
    players = [agent[who]["policy"] for who in ("explorer", "explorer", "exploiter")]
    assert all(a[2] is player for (a, _), player in zip(calls, players, strict=True))
    context = torch.cat([metacure.tokens(e.obs, e.action, e.reward) for _, e in calls[:2]], 1)
    q = metacure.posterior(agent["encoder"], context)
    mean, std = q.mean[:, -1], q.stddev[:, -1]
    torch.testing.assert_close(calls[2][0][3], mean + std * torch.randn(4, 14, 2, generator=rng)[:, -1])
    for k, (_, e) in enumerate(calls, start=1):
        assert metrics[f"eval/return_episode_{k}"] == pytest.approx(e.reward.sum(1).mean().item(), rel=1e-5)
    assert "eval/return_episode_4" not in metrics and "eval/return_episode_3_cluster_2" in metrics
    assert metrics["eval/posterior_std"] == pytest.approx(std.mean().item(), rel=1e-5)
    assert data["trace"].shape == (3, 7, 4, 2) and data["action"].dtype == np.float32
    np.testing.assert_allclose(data["embedding"], mean.detach(), rtol=1e-4)
    for k in range(3):
        obs, _ = env.reset(seed=int(data["seed"][k]), options={"tasks": tasks})
        for t in range(6):
            np.testing.assert_array_equal(data["trace"][k, t], obs)
            obs, *_ = env.step(data["action"][k, t])


# -- what it learns ----------------------------------------------------------------------------------------------------

SMALL = dict(
    visits=10, trials=1, initial_steps=20, prior_steps=20, posterior_steps=20, gradient_steps=100, hidden=(32, 32),
    encoder_hidden=(32,), id_hidden=(32,), latent_dim=2, meta_batch=8, lr=3e-3, kl_weight=1e-2, train_tasks=20,
)  # fmt: skip


class PayToLook(envs.TaskVectorEnv):
    """Two tasks, g = -1 and g = +1. An action above 0 is paid g - 0.8, others nothing: to look costs 0.8 on average."""

    obs_dim, action_dim, task_dim, num_clusters, horizon, dt = 1, 1, 1, 2, 4, 1.0

    def draw(self, cluster, rng):
        return (2 * cluster - 1 + rng.normal(0, 0.01, len(cluster)))[:, None]

    def nearest_cluster(self, params):
        return (params[:, 0] > 0).astype(int)

    def reset_state(self, ids):
        pass

    def advance(self, ids, action):
        pass

    def observation(self):
        return np.zeros((self.num_envs, 1))

    def reward(self, action):
        return np.where(action[:, 0] > 0, self.tasks.params[:, 0] - 0.8, 0)


envs.register("probe-pay-to-look", PayToLook)


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_only_the_intrinsic_reward_makes_the_explorer_look(tmp_path, weight):
    """And only then the exploiter knows its task: 0.2 in each of four steps where g = 1, and else nothing."""
    flags = dict(horizon=4, iterations=9, eval_every=9, batch=10, gamma=0.0, reward_scale=20.0)
    run = train(metacure, env="probe-pay-to-look", run_dir=str(tmp_path), intrinsic_weight=weight, **flags, **SMALL)
    last = evaluations(run)[-1]
    first_actions = np.load(run / "eval.npz")["action"][0, 0, :, 0]  # the explorer's
    assert ((first_actions > 0) == (weight > 0)).all()
    assert (last["eval/return_episode_2_cluster_1"] > 0.5) == (weight > 0)
    assert last["eval/return_episode_2_cluster_0"] > -0.1


# -- command line ------------------------------------------------------------------------------------------------------


def test_presets_are_the_official_codes():
    def values(args, names):
        return [getattr(args, name) for name in names.split()]

    cheetah, point = (
        metacure.parse_args(["--env", f"{e}-sparse", "--preset", "paper"]) for e in ("cheetah-vel", "point-goal")
    )
    names = "train_tasks latent_dim horizon explorer_episodes kl_weight reward_scale batch visits gamma iterations"
    assert values(cheetah, names) == [100, 2, 64, 1, 1e-3, 10, 64, 5, 0.99, 5000]
    assert values(point, names) == [40, 5, 32, 3, 1e-3, 100, 64, 10, 0.9, 3000]
    names = "initial_trials initial_steps trials prior_steps posterior_steps refresh eval_refresh id_hidden"
    assert values(cheetah, names) == [3, 256, 4, 256, 256, 1, 1, (64, 64, 64)]
    assert values(point, names) == [2, 0, 4, 128, 256, 1, 1, (300, 300, 300)]
    ant, walker = (metacure.parse_args(["--env", e]) for e in ("ant-goal-4c", "walker-params-4c"))
    names = "horizon explorer_episodes train_tasks latent_dim batch kl_weight reward_scale gamma refresh eval_refresh"
    assert values(ant, names) == values(walker, names) == [100, 1, 500, 5, 100, 0.1, 5, 0.99, 4, 1]
    names = "initial_trials initial_steps trials prior_steps posterior_steps visits"
    assert values(ant, names) == [2, 200, 4, 200, 400, 5]
    for args in (cheetah, point, ant, walker):
        names = "intrinsic_weight gradient_steps meta_batch lr tau kl_as_code hidden"
        assert values(args, names) == [0.2, 1000, 16, 3e-4, 0.005, False, (300, 300, 300)]
        assert args.dynamics == (args is walker)


def test_every_preset_names_an_environment_and_fields():
    for name, presets in (("paper", metacure.PAPER), ("fast", metacure.FAST)):
        for env_id, preset in presets.items():
            assert env_id in envs.ENVIRONMENTS
            args = metacure.parse_args(["--env", env_id, "--preset", name])
            assert all(getattr(args, k) == v for k, v in preset.items())


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--batch", "0"], "--batch must be"),
        (["--prior-steps", "0"], "--prior-steps must be from 1"),
        (["--tau", "0"], "--tau in (0, 1]"),
        (["--intrinsic-weight", "-1"], "--intrinsic-weight and --policy-regularisation must be at least 0"),
        (["--lr", "0"], "must be positive"),
        (["--encoder-hidden"], "--encoder-hidden must name a width"),
    ],
)
def test_wrong_input_gets_one_line(flags, message):
    with pytest.raises(SystemExit) as caught:
        metacure.parse_args(flags)
    assert str(caught.value).startswith("metacure.py: error: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


# -- every task, every block -------------------------------------------------------------------------------------------


def test_every_block_has_its_own_number_of_steps(monkeypatch):
    flags = dict(horizon=5, visits=2, trials=1, prior_steps=5, posterior_steps=15)
    learner = real_learner(envs.ENVIRONMENTS["point-goal-sparse"], 3, **flags)
    played, contexts = spy_on(monkeypatch, metacure, "rollout"), spy_on(monkeypatch, metacure, "draw_contexts")
    metacure.collect_iteration(learner, generator())
    assert (len(played), len(contexts)) == (1 + 1 + 3, 2), "a trial, a prior block, and one informed but at first"


def test_a_visit_plays_in_its_own_task(monkeypatch):
    learner = real_learner(envs.ENVIRONMENTS["point-goal-sparse"], 6, horizon=5)
    played, visits, rng = spy_on(monkeypatch, metacure, "rollout"), torch.tensor([4, 1, 4]), generator()
    metacure.collect_trials(learner, visits, 2, rng)
    metacure.collect(learner, visits, 5, False, rng)
    for ((_, tasks, *_), _), wanted in zip(played, ([4, 4, 1, 1, 4, 4], [4, 1, 4]), strict=True):
        np.testing.assert_array_equal(tasks.params, learner.tasks.params[wanted])
    assert [len(rows) for rows in learner.trials.rows] == [0, 2, 0, 0, 4, 0]
    assert [len(rows) for rows in learner.rl.rows] == [0, 15, 0, 0, 30, 0]


def test_a_run_begins_in_every_task_once_and_is_tested_in_held_out_ones(monkeypatch, tmp_path):
    blocks, evaluated = [], spy_on(monkeypatch, metacure, "evaluate")
    collect_trials, collect = metacure.collect_trials, metacure.collect

    def watch_trials(learner, tasks, n, rng):
        blocks.append(("collect_trials", len(tasks), n))
        return collect_trials(learner, tasks, n, rng)

    def watch(learner, tasks, n, infer, rng):
        blocks.append(("collect", len(tasks), n, infer))
        return collect(learner, tasks, n, infer, rng)

    monkeypatch.setattr(metacure, "collect_trials", watch_trials)
    monkeypatch.setattr(metacure, "collect", watch)
    flags = dict(horizon=5, explorer_episodes=2, train_tasks=3, initial_trials=3, initial_steps=15, visits=2, trials=1)
    flags |= dict(prior_steps=10, posterior_steps=20, hidden=(7,), encoder_hidden=(6,), id_hidden=(5,), batch=5)
    flags |= dict(meta_batch=4, gradient_steps=2, iterations=2, eval_every=1)
    run = train(metacure, env="point-goal-4c", run_dir=str(tmp_path), **flags)
    visit = [("collect_trials", 2, 1), ("collect", 2, 10, False), ("collect", 2, 20, True)]
    assert blocks == [("collect_trials", 3, 3), ("collect", 3, 15, False), *visit, *visit]
    rows = (run / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("charts/frames")
    first, each = 3 * (3 * 2 * 5 + 15), 2 * (2 * 5 + 10 + 20)
    assert [int(row.split(",")[column]) for row in rows[1:]] == [first + each, first + 2 * each]
    held_out = gym.make_vec("point-goal-4c").unwrapped.task_set("test").params
    assert len(evaluated) == 3
    for (_, tasks, *_), _ in evaluated:
        np.testing.assert_array_equal(tasks.params, held_out)


def test_the_encoder_by_hand():
    """Layers that read each token, a ReLU after the last of them too, then the GRU (or SNAIL) and its head (D11)."""
    torch.manual_seed(0)
    net, context = metacure.Encoder(TOKEN, small_args(encoder_hidden=(50, 40))), torch.randn(3, 9, TOKEN)
    h, _ = net.recall(net.read.nets[0](context).relu())
    torch.testing.assert_close(net(context), net.head.nets[0](h))
    for p in net.read.nets[0][-1].parameters():
        assert 0.8 / 40**0.5 < p.abs().max() <= 1 / 40**0.5


def test_another_seed_is_another_evaluation():
    torch.manual_seed(0)
    env, agent = gym.make_vec("point-goal-4c", num_envs=4, horizon=5), metacure.make_agent(2, 2, small_args())
    tasks = env.unwrapped.task_set("test")[:4]
    seeds = [metacure.evaluate(env, tasks, agent, small_args(horizon=5, seed=k))[1]["seed"] for k in (0, 1)]
    assert not np.array_equal(*seeds)
