"""MILET's mathematics: closed forms, slow second implementations, identities of the paper."""

import copy

import gymnasium as gym
import literal
import milet
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import spy_on, train
from torch.distributions import Categorical, Gumbel, Normal, kl_divergence


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


SMALL = dict(hidden=8, embed=(5, 4, 3), latent_dim=3, clusters=4)


def small_args(**kwargs) -> milet.Args:
    defaults = dict(reward_decoder=(7, 6), state_decoder=(9, 5), elbo_terms=4, num_threads=1)
    return milet.Args(**(SMALL | defaults | kwargs))


def trials(n=3, horizon=5, obs_dim=6, action_dim=2):
    return torch.randn(n, 2, horizon + 1, obs_dim), torch.randn(n, 2, horizon, action_dim), torch.randn(n, 2, horizon)


# -- exploration rewards, Eq. (10)-(13) --------------------------------------------------------------------------------


def test_reward_weights():
    t = torch.tensor([0.0, 50, 80, 90, 93, 95, 99])
    h = [0.100, 0.099, 0.086, 0.063, 0.050, 0.039, 0.010]
    c = [-0.100, -0.099, -0.073, -0.026, -0.001, 0.021, 0.081]
    gamma_h, gamma_c = milet.reward_weights(t, 100)
    torch.testing.assert_close(gamma_h, torch.tensor(h), atol=6e-4, rtol=0)
    torch.testing.assert_close(gamma_c, torch.tensor(c), atol=6e-4, rtol=0)
    before, after = milet.reward_weights(torch.tensor([93.0, 94.0]), 100)[1]
    assert before < 0 < after


def test_bonus_against_definition_and_telescoping():
    q = torch.rand(11, 3, 4).softmax(-1)
    bonus_h, bonus_c = milet.exploration_bonus(q)
    gamma_h, gamma_c = milet.reward_weights(torch.arange(10), 10)
    for t in range(10):
        before, after = Categorical(probs=q[t]), Categorical(probs=q[t + 1])
        r_h = before.entropy() - after.entropy()
        r_c = -kl_divergence(before, after)
        torch.testing.assert_close(bonus_h[t], gamma_h[t] * r_h, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(bonus_c[t], gamma_c[t] * r_c, atol=1e-6, rtol=1e-4)
    r_h = bonus_h / gamma_h[:, None]
    total = Categorical(probs=q[0]).entropy() - Categorical(probs=q[-1]).entropy()
    torch.testing.assert_close(r_h.sum(0), total, atol=1e-5, rtol=1e-4)


# -- variational inference ---------------------------------------------------------------------------------------------


def test_task_gru_sees_the_cluster_gru_and_the_cluster_head_does_not_see_the_task_gru():
    args = small_args()
    encoder = milet.Encoder(6, 2, args)
    _, h_beta = encoder(torch.randn(4, 3, 2), torch.randn(4, 3), torch.randn(4, 3, 6), *torch.zeros(2, 3, 8))
    h_beta.sum().backward()
    assert encoder.c_gru.weight_ih_l0.grad.abs().sum() > 0
    h_alpha = torch.randn(3, 8)
    q = [milet.infer(encoder, h_alpha, torch.randn(3, 8), None, 0.8)[0] for _ in range(2)]
    torch.testing.assert_close(q[0], q[1], atol=0, rtol=0)


def test_one_gru_ablation():
    encoder = milet.Encoder(6, 2, small_args(stacked_gru=False))
    alpha, beta = encoder(torch.randn(4, 3, 2), torch.randn(4, 3), torch.randn(4, 3, 6), *torch.zeros(2, 3, 8))
    assert alpha is beta and encoder.t_gru is None


def test_cluster_sample_is_soft_in_training_and_one_hot_at_test():
    encoder = milet.Encoder(6, 2, small_args())
    h = torch.randn(500, 8)
    seen = []
    encoder.task = lambda h_beta, y: (seen.append(y), Normal(h_beta, 1.0))[1]
    gumbel = Gumbel(0.0, 1.0).sample((500, 4))
    milet.infer(encoder, h, h, gumbel, 0.8)
    milet.infer(encoder, h, h, None, 0.8)
    logits = encoder.cluster_logits(h)
    torch.testing.assert_close(seen[0], ((logits + gumbel) / 0.8).softmax(-1))
    torch.testing.assert_close(seen[1], F.one_hot(logits.argmax(-1), 4).float())


def test_first_decoder_layer_in_parts_equals_the_concatenation():
    args = small_args()
    for sees_next in (True, False):
        decoder = milet.Decoder(6, 2, sees_next, (7, 6), args)
        obs, action, _ = trials()
        z = torch.randn(3, 10, 3)
        parts = sum(decoder.parts(z, obs, action))
        s = decoder.embed_state(obs).relu()
        inputs = [s[:, :, 1:]] * sees_next + [decoder.embed_action(action).relu(), s[:, :, :-1]]
        whole = decoder.first(torch.cat([z, *(x.flatten(1, 2) for x in inputs)], dim=-1))
        torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("decodes", [0, 4])
def test_decoding_error_is_a_mean_over_trials_terms_and_steps(decodes):
    decoder, (obs, action, _) = milet.Decoder(6, 2, True, (7, 6, 2), small_args()), trials()
    z, goal = torch.randn(3, 5, 3), torch.randn(3, 10, 2)
    steps = torch.randint(10, (3, 5, decodes)) if decodes else [slice(None)] * 3
    index, rows = steps if decodes else torch.arange(10).expand(3, 5, 10), torch.arange(3)[:, None, None]
    of_z, of_x = decoder.parts(z, obs, action)
    plain = (decoder.rest(of_z[:, :, None] + of_x[rows, index]) - goal[rows, index]).square().mean()
    torch.testing.assert_close(decoder.error(z, obs, action, goal, steps), plain)


def literal_elbo(agent, obs, action, reward, args, seed):
    """Eq. (4)-(8) in loops over trials, terms, transitions and clusters, with the random draws of elbo_loss."""
    n, _, h, _ = action.shape
    torch.manual_seed(seed)
    t = torch.randint(2 * h + 1, (n, args.elbo_terms))
    gumbel = Gumbel(0.0, 1.0).sample((n, args.elbo_terms, args.clusters))
    noise = torch.randn(n, args.elbo_terms, args.latent_dim)
    steps = torch.randint(2 * h, (n, args.elbo_terms, args.decodes)) if args.decodes else None
    encoder, total = agent["encoder"], dict.fromkeys(("reward", "state", "kl_z", "kl_c", "l_i"), 0.0)
    for b in range(n):
        s, s_next = obs[b, :, :-1].reshape(2 * h, -1), obs[b, :, 1:].reshape(2 * h, -1)
        a, r = action[b].reshape(2 * h, -1), reward[b].reshape(-1)
        alpha = beta = torch.zeros(1, args.hidden)
        hidden = [(alpha, beta)]
        for i in range(2 * h):
            alpha, beta = encoder(a[None, i : i + 1], r[None, i : i + 1], s_next[None, i : i + 1], alpha, beta)
            alpha, beta = alpha[0], beta[0]
            hidden.append((alpha, beta))
        q = [Categorical(logits=encoder.cluster_logits(alpha)[0]) for alpha, _ in hidden]
        total["l_i"] += sum(kl_divergence(q[i], q[i + 1]) for i in range(2 * h)) / (2 * h - 1) / n  # Eq. (6)
        for e in range(args.elbo_terms):
            alpha, beta = hidden[t[b, e]]
            y = ((encoder.cluster_logits(alpha)[0] + gumbel[b, e]) / args.temperature).softmax(-1)
            q_z, p_z = encoder.task(beta[0], y), agent["prior"](y)
            z = q_z.mean + q_z.stddev * noise[b, e]
            weight = 1 / (n * args.elbo_terms)
            total["kl_z"] += weight * kl_divergence(q_z, p_z).sum()
            total["kl_c"] += weight * kl_divergence(q[t[b, e]], Categorical(logits=torch.zeros(args.clusters)))
            chosen = range(2 * h) if steps is None else steps[b, e].tolist()
            for i in chosen:  # Eq. (5)
                for name, goal in (("reward", r[i, None]), ("state", s_next[i])):
                    decoder = agent[f"{name}_decoder"]
                    before, after = decoder.embed_state(s[i]).relu(), decoder.embed_state(s_next[i]).relu()
                    act = decoder.embed_action(a[i]).relu()
                    inputs = [z, after, act, before] if name == "reward" else [z, act, before]
                    error = (decoder.rest(decoder.first(torch.cat(inputs))) - goal).square().mean()
                    total[name] += weight * error / len(chosen)
    l_p = 0.0
    for c in torch.eye(args.clusters):  # Eq. (7)
        l_p += kl_divergence(agent["prior"](c), agent["target"](c)).sum() / args.clusters
    lambda_i, lambda_p = (args.lambda_i, args.lambda_p) if args.consistency else (0, 0)
    loss = total["reward"] + args.lambda_s * total["state"]
    loss += args.kl_z_weight * (total["kl_z"] + lambda_p * l_p)
    return loss + args.kl_c_weight * (total["kl_c"] + lambda_i * total["l_i"]), l_p


@pytest.mark.parametrize("kwargs", [{}, {"decodes": 3}, {"consistency": False}, {"stacked_gru": False}])
def test_elbo_against_literal_equations(kwargs):
    weights = dict(kl_z_weight=0.3, kl_c_weight=0.2, lambda_s=0.5, lambda_i=0.6, lambda_p=0.3)
    args = small_args(temperature=0.4, **weights, **kwargs)
    agent = milet.make_agent(6, 2, args)
    for p in agent["target"].parameters():  # so that L_P is not zero
        p.data += 0.3 * torch.randn_like(p)
    batch = trials()
    torch.manual_seed(7)
    terms = milet.elbo_loss(agent, *batch, args)
    loss = terms["loss"]
    expected, l_p = literal_elbo(agent, *batch, args, seed=7)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["l_p"], l_p)
    trained = [p for k, m in agent.items() if k not in ("target", "psi", "phi") for p in m.parameters()]
    for a, b in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_prior_consistency_is_zero_after_the_copy():
    args = small_args()
    agent = milet.make_agent(6, 2, args)
    assert milet.elbo_loss(agent, *trials(), args)["l_p"] == 0
    agent["prior"].mean[0].weight.data += 1
    assert milet.elbo_loss(agent, *trials(), args)["l_p"] > 0


def test_one_step_on_theta_and_omega_against_a_literal_one():
    """Nothing is left of earlier gradients, and the norms of three parts are cut, each by its own."""
    args, batch = small_args(), [100 * x for x in trials()]
    agent = milet.make_agent(6, 2, args)
    twin = copy.deepcopy(agent)
    groups = [[*twin["encoder"].parameters(), *twin["prior"].parameters()]]
    groups += [[*twin[name].parameters()] for name in ("reward_decoder", "state_decoder")]
    milet.elbo_loss(agent, *batch, args)["loss"].backward()
    torch.manual_seed(1)
    milet.vae_update(agent, torch.optim.SGD(agent.parameters(), 0.5), batch, args)
    torch.manual_seed(1)
    loss = milet.elbo_loss(twin, *batch, args)["loss"]
    assert literal.descend(loss, [(group, 1.0) for group in groups], 0.5)
    for p, wanted in zip(agent.parameters(), twin.parameters()):
        torch.testing.assert_close(p, wanted)


# -- sampler -----------------------------------------------------------------------------------------------------------


def play(args, test=False, env_id="hopper-params-4c", n=3):
    env = gym.make_vec(env_id, num_envs=n)
    agent = milet.make_agent(env.single_observation_space.shape[0] + 1, env.single_action_space.shape[0], args)
    return agent, *milet.run_trial(env, env.unwrapped.task_set("train")[:n], 0, agent, args, test)


def test_hidden_states_live_for_one_trial(monkeypatch):
    """Zero at the start of the trial, carried over between its episodes, equal to one pass over the whole trial."""
    memories, rollout = [], milet.rollout

    def spy(env, obs, policy, encoder, memory, args, test):
        episode, last = rollout(env, obs, policy, encoder, memory, args, test)
        memories.append((memory, last))
        return episode, last

    monkeypatch.setattr(milet, "rollout", spy)
    agent, explore, exploit = play(small_args())
    (first, middle), (carried, end) = memories
    assert (first[0] == 0).all() and (first[1] == 0).all() and carried is middle
    torch.testing.assert_close(exploit.q[0], explore.q[-1], atol=0, rtol=0)
    torch.testing.assert_close(exploit.belief[0], explore.belief[-1], atol=0, rtol=0)
    action, reward = (torch.cat([getattr(e, k) for e in (explore, exploit)]) for k in ("action", "reward"))
    next_obs = torch.cat([e.obs[1:] for e in (explore, exploit)])
    with torch.no_grad():
        h_alpha, h_beta = agent["encoder"](action, reward, next_obs, *torch.zeros(2, 3, 8))
        q = agent["encoder"].cluster_logits(h_alpha).softmax(-1)
    for t, memory in ((99, middle), (199, end)):
        torch.testing.assert_close(h_alpha[t], memory[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(h_beta[t], memory[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(q, torch.cat([explore.q[1:], exploit.q[1:]]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("test", [False, True])
def test_the_belief_is_that_of_a_soft_sample_of_c_and_of_the_argmax_at_a_test(monkeypatch, test):
    """Mean and variance of q(z|c, τ:t), of a sample of c drawn anew at every step (Algorithm 2; D9)."""
    args, drawn, sample = small_args(temperature=0.4), [], Gumbel.sample
    monkeypatch.setattr(Gumbel, "sample", lambda self, shape: drawn.append(sample(self, shape)) or drawn[-1])
    agent, explore, exploit = play(args, test)
    action, reward = (torch.cat([getattr(e, k) for e in (explore, exploit)]) for k in ("action", "reward"))
    next_obs, zero = torch.cat([e.obs[1:] for e in (explore, exploit)]), torch.zeros(3, 8)
    with torch.no_grad():
        h_alpha, h_beta = (torch.cat([zero[None], h]) for h in agent["encoder"](action, reward, next_obs, zero, zero))
        logits = agent["encoder"].cluster_logits(h_alpha)
        y = F.one_hot(logits.argmax(-1), 4).float()
        if not test:
            noise = torch.cat([drawn[0][None], *drawn[1:]])  # before the first step, and after each
            y = ((logits + noise) / 0.4).softmax(-1)
        q_z = agent["encoder"].task(h_beta, y)
    belief = torch.cat([explore.belief, exploit.belief[1:]])
    torch.testing.assert_close(belief, torch.cat([q_z.mean, q_z.variance], -1), atol=1e-5, rtol=1e-4)


def test_psi_explores_and_phi_exploits():
    args, acted = small_args(horizon=4), []
    env = gym.make_vec("point-goal-4c", num_envs=3, horizon=4)
    agent = milet.make_agent(3, 2, args)
    for name in ("psi", "phi"):
        agent[name].register_forward_hook(lambda *_, name=name: acted.append(name))
    milet.run_trial(env, env.unwrapped.task_set("test")[:3], 0, agent, args, test=False)
    assert acted == ["psi"] * 4 + ["phi"] * 4


def test_second_episode_starts_from_the_reset_state():
    """... and not from the terminal one, unless asked for (D4)."""
    for keep in (False, True):
        _, explore, exploit = play(small_args(keep_terminal=keep), env_id="point-goal-4c")
        assert (exploit.obs[0, :, -1] == float(keep)).all()
        state = explore.obs[-1, :, :-1] if keep else torch.zeros(3, 2)  # a point starts at the origin
        torch.testing.assert_close(exploit.obs[0, :, :-1], state, atol=0, rtol=0)


def test_ant_has_114_inputs():
    _, explore, _ = play(small_args(), env_id="ant-goal-4c", n=2)
    assert explore.obs.shape == (101, 2, 114)
    assert explore.obs[1:, :, 29:113].abs().max() > 0  # the ant has landed


def test_test_trials_are_deterministic_and_training_ones_are_not():
    for test in (True, False):
        args = small_args()
        agent, explore, _ = play(args, test)
        env = gym.make_vec("hopper-params-4c", num_envs=3)
        again, _ = milet.run_trial(env, env.unwrapped.task_set("train")[:3], 0, agent, args, test)
        assert (explore.action == again.action).all() == test


@pytest.mark.parametrize("squash", ["none", "mean", "sample"])
def test_the_mean_is_squashed_where_asked(squash):
    policy = milet.Policy(12, 2, small_args(squash=squash, policy_embed=0))
    policy.actor[-1].bias.data += 5
    pi, _ = policy(torch.randn(4, 12), torch.randn(4, 6))
    assert (pi.mean.abs() <= 1).all() == (squash == "mean")


@pytest.mark.parametrize("without", ["nothing", "exploration", "r_h", "r_c"])
def test_what_the_policies_are_paid(monkeypatch, tmp_path, without):
    """πψ Eq. (12) for the first episode, πφ Eq. (1) for the second; or one policy the reward alone, for both."""
    scaled, bonuses = (spy_on(monkeypatch, milet, name) for name in ("scale_rewards", "exploration_bonus"))
    paid = {}
    monkeypatch.setattr(milet, "ppo_update", lambda policy, _, *rest: paid.setdefault(policy, rest[:3]) and {})
    flags = dict(env="point-goal-4c", horizon=5, num_envs=4, frames=80, elbo_terms=2, vae_batch=2)
    rates = dict(entropy_psi=0.3, entropy_phi=0.4)
    flags |= {without: False} if without != "nothing" else {}
    train(milet, **SMALL, **flags, **rates, run_dir=str(tmp_path), eval_every=9)
    ((_, raw, _), rewards), ((q,), (bonus_h, bonus_c)), batches = scaled[-1], bonuses[-1], list(paid.values())
    assert rewards.shape == (10, 4) and bonus_h.abs().max() > 0 and bonus_c.abs().max() > 0
    if without == "exploration":
        ((episode, reward, entropy),) = batches
        torch.testing.assert_close(reward, rewards)
        assert torch.equal(raw, episode.reward)
        assert entropy == 0.4 and len(episode.obs) == len(episode.belief) == 11 and len(episode.action) == 10
        assert (episode.obs[[0, 5], :, :2] == 0).all() and (episode.obs[-1, :, -1] == 1).all()
        return
    (explore, r_e, entropy_psi), (exploit, r, entropy_phi) = batches
    torch.testing.assert_close(r_e, rewards[:5] + (without != "r_h") * bonus_h + (without != "r_c") * bonus_c)
    torch.testing.assert_close(r, rewards[5:])
    assert torch.equal(raw, torch.cat([explore.reward, exploit.reward])) and torch.equal(q, explore.q)
    assert (entropy_psi, entropy_phi) == (0.3, 0.4) and len(explore.obs) == len(exploit.obs) == 6
    torch.testing.assert_close(explore.q[-1], exploit.q[0])


def test_the_target_is_copied_in_time(monkeypatch, tmp_path):
    """L_P is 0 right after a copy, and grows until the next: every third iteration here, and at the start."""
    l_p, update = [], milet.vae_update
    monkeypatch.setattr(milet, "vae_update", lambda *a: (terms := update(*a), l_p.append(terms["elbo/l_p"]))[0])
    flags = dict(env="point-goal-4c", horizon=5, num_envs=4, frames=400, elbo_terms=2, vae_batch=2, target_every=3)
    train(milet, **SMALL, **flags, kl_z_weight=1.0, run_dir=str(tmp_path), eval_every=99)
    assert [x == 0 for x in l_p] == [True, True, False, False, True, False, False, True, False]  # iterations 2, ..., 10


def test_trials_enter_v_in_their_order(monkeypatch, tmp_path):
    """The belief at the end of the first episode is that at the start of the second."""
    added, add = [], milet.TrialBuffer.add
    monkeypatch.setattr(milet.TrialBuffer, "add", lambda self, *pair: added.append(pair) or add(self, *pair))
    flags = dict(env="point-goal-4c", horizon=5, num_envs=4, frames=160, elbo_terms=2, vae_batch=2)
    train(milet, **SMALL, **flags, run_dir=str(tmp_path), eval_every=9)
    assert len(added) == 4
    for explore, exploit in added:
        assert torch.equal(explore.q[-1], exploit.q[0]) and not torch.equal(explore.q[0], exploit.q[-1])


def test_buffer_keeps_the_latest_trials():
    buffer = milet.TrialBuffer(5)
    for value in range(4):  # 8 trials, of 2 each: 0 0 1 1 2 2 3 3
        x = torch.full((3, 2, 1), float(value))
        episode = milet.Episode(x, x[:2], x[:2], 1 + x[:2, :, 0], x, x)
        buffer.add(episode, episode._replace(reward=-1 - x[:2, :, 0]))
    assert len(buffer.trials) == 5
    obs, action, reward = buffer.sample(50)
    assert obs.shape == (5, 2, 3, 1) and action.shape == (5, 2, 2, 1)
    assert sorted(obs[:, 0, 0, 0].tolist()) == [1, 2, 2, 3, 3]
    torch.testing.assert_close(reward[:, 0], 1 + obs[:, 0, 1:, 0])
    torch.testing.assert_close(reward[:, 1], -reward[:, 0])
    other = milet.TrialBuffer(5)
    other.load_state_dict(buffer.state_dict())
    for ours, theirs in zip(buffer.trials, other.trials, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


# -- policies ----------------------------------------------------------------------------------------------------------


def test_gae_against_the_sum():
    reward, value = torch.randn(6, 2), torch.randn(7, 2)
    delta = reward + 0.9 * value[1:] - value[:-1]
    expected = torch.stack([sum((0.9 * 0.8) ** (j - i) * delta[j] for j in range(i, 6)) for i in range(6)])
    torch.testing.assert_close(milet.gae(reward, value, 0.9, 0.8), expected)


def test_time_limit_is_bootstrapped():
    value = torch.full((101, 3), 1 / (1 - 0.97), dtype=torch.float64)
    advantage = milet.gae(torch.ones(100, 3, dtype=torch.float64), value, 0.97, 0.9)
    torch.testing.assert_close(advantage, torch.zeros_like(advantage), atol=1e-10, rtol=0)


def test_rewards_are_scaled_by_their_discounted_sums():
    stats, reward = milet.RunningStats(), torch.tensor([[1.0, 8.0], [1.0, 0.0], [1.0, 0.0]])
    scaled = milet.scale_rewards(stats, reward, 0.5)
    sums = torch.tensor([1, 8, 1.5, 4, 1.75, 2])
    torch.testing.assert_close(stats.var.float(), sums.var(correction=0), atol=1e-3, rtol=0)
    torch.testing.assert_close(scaled, reward / sums.std(correction=0), atol=1e-3, rtol=0)
    stats.update(torch.randn(10_000))
    assert milet.scale_rewards(stats, torch.tensor([[50.0, -50.0]]), 0.0).tolist() == [[10, -10]]


@pytest.mark.parametrize("clip", [0.1, 1e9])
def test_value_loss(clip):
    """Huber's, clipped: with one minibatch the values that are trained are those that acted, but normalised anew."""
    args = small_args(ppo_epochs=1, minibatches=1, gamma=0.0, gae_lambda=1.0, clip=clip)
    policy, episode, reward = milet.Policy(6, 2, args), make_episode(), 3 * torch.randn(10, 4)
    episode = episode._replace(obs=2 + 3 * episode.obs)
    old = policy(episode.obs, episode.belief)[1][:-1].flatten().tolist()
    found = milet.ppo_update(policy, torch.optim.Adam(policy.parameters(), 0.0), episode, reward, 0.0, args)
    expected, moved = 0.0, policy(episode.obs, episode.belief)[1][:-1].flatten().tolist()
    for v, o, g in zip(moved, old, reward.flatten().tolist()):
        bounded = min(max(v, o - clip), o + clip)
        huber = [0.5 * (x - g) ** 2 if abs(x - g) < 1 else abs(x - g) - 0.5 for x in (v, bounded)]
        expected += 0.5 * max(huber) / 40
    assert found["value_loss"] == pytest.approx(expected, rel=1e-4)
    assert max(abs(v - o) for v, o in zip(moved, old)) > 0.1, "some are clipped"


def test_running_stats():
    stats, x = milet.RunningStats(3), 5 + 2 * torch.randn(4, 10, 3)
    for part in x:
        stats.update(part)
    torch.testing.assert_close(stats.mean, x.double().mean((0, 1)), atol=1e-3, rtol=0)
    torch.testing.assert_close(stats.var, x.double().flatten(0, 1).var(0, correction=0), atol=1e-2, rtol=0)


def make_episode(steps=10, n=4) -> milet.Episode:
    """Random states whose last number is the done flag: 0 along the episode and 1 at its end."""
    obs, sample = torch.randn(steps + 1, n, 6), torch.randn(steps, n, 2)
    obs[..., -1] = torch.arange(steps + 1)[:, None] == steps
    return milet.Episode(obs, sample, sample, torch.empty(0), torch.empty(0), torch.randn(steps + 1, n, 6))


def test_where_nothing_is_paid_the_actor_stays():
    """D14: normalised, the errors of V would be advantages of full size. What V shares with the policy still learns."""
    args, episode = small_args(), make_episode()
    for reward, stays in ((torch.zeros(10, 4), True), (torch.full((10, 4), 0.3), True), (torch.eye(10, 4), False)):
        policy = milet.Policy(6, 2, args)
        before = copy.deepcopy(policy)
        milet.ppo_update(policy, torch.optim.Adam(policy.parameters(), 1e-3), episode, reward, 0.1, args)
        same = [torch.equal(x, y) for x, y in zip(policy.actor.parameters(), before.actor.parameters())]
        assert all(same) == torch.equal(policy.log_std, before.log_std) == stays
        assert not torch.equal(policy.critic[0].weight, before.critic[0].weight)


def literal_ppo(policy, observe, episode, reward):
    """Three full-batch steps by plain gradient descent, in place, of a policy that first observes its own batch."""
    obs, belief, sample = episode.obs[:-1], episode.belief[:-1], episode.sample
    with torch.no_grad():
        value = policy(episode.obs, episode.belief)[1]
        advantage, target = literal.targets(reward, value, 0.9, 0.8)
        observe(obs, belief)
        old = policy(obs, belief)[0].log_prob(sample).sum(-1).flatten()
    for _ in range(3):
        acted = *policy(obs, belief), sample, old, value[:-1].flatten()
        loss, left = literal.ppo_loss(*acted, advantage, target, 0.3)
        left &= literal.descend(loss, [([*policy.parameters()], 0.5)], 0.5)
    assert left, "a case in which clips matter"


def test_ppo_against_literal_steps():
    args = small_args(ppo_epochs=3, minibatches=1, clip=0.1, gamma=0.9, gae_lambda=0.8, value_coef=0.8)
    policy, episode, reward = milet.Policy(6, 2, args), make_episode(), torch.randn(10, 4)
    twin = copy.deepcopy(policy)
    milet.ppo_update(policy, torch.optim.SGD(policy.parameters(), 0.5), episode, reward, 0.3, args)
    literal_ppo(twin, lambda obs, _: twin.stats.update(obs[..., :-1]), episode, reward)
    for p, wanted in zip(policy.parameters(), twin.parameters()):
        torch.testing.assert_close(p, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("policy_embed", [0, 64])
def test_the_value_at_the_time_limit_is_that_of_the_state(policy_embed):
    """... and hangs neither on the done flag, which statistics never see at 1, nor on strays (D11)."""
    args = small_args(policy_embed=policy_embed)
    policy, episode = milet.Policy(6, 2, args), make_episode(50, 16)
    optimizer = torch.optim.Adam(policy.parameters(), 1e-3)
    for _ in range(5):
        milet.ppo_update(policy, optimizer, episode, torch.randn(50, 16), 0.0, args)
    end, same = episode.obs[-1], episode.obs[-1].clone()
    same[:, -1] = 0
    (_, value), (_, without_flag) = (policy(obs, episode.belief[-1]) for obs in (end, same))
    assert (end[:, -1] == 1).all() and value.std() > 1e-3, "not saturated"
    torch.testing.assert_close(value, without_flag)
    end[:, 0] = 1e6
    assert policy.stats.normalise(end[:, :-1]).abs().max() == 10
    assert policy(end, episode.belief[-1])[1].isfinite().all()


def test_ppo_bootstraps_from_the_state_at_the_time_limit(monkeypatch):
    args = small_args()
    policy, seen, episode = milet.Policy(6, 2, args), [], make_episode()
    optimizer = torch.optim.Adam(policy.parameters(), 1e-3)
    with torch.no_grad():
        expected = policy(episode.obs, episode.belief)[1]
    gae = milet.gae
    monkeypatch.setattr(milet, "gae", lambda reward, value, *rest: (seen.append(value), gae(reward, value, *rest))[1])
    milet.ppo_update(policy, optimizer, episode, torch.randn(10, 4), 0.0, args)
    torch.testing.assert_close(seen[0], expected)  # the values of all 11 states, by the statistics that acted


def test_diagnostics_of_ppo():
    """One step has ratios of 1; explained variance is that of the values that acted, 1 where they are the returns."""
    once = small_args(ppo_epochs=1, minibatches=1, gae_lambda=1.0, gamma=0.0)
    policy, episode = milet.Policy(6, 2, once), make_episode()
    policy.stats.update(episode.obs[:-1, :, :-1])
    optimizer = torch.optim.Adam(policy.parameters(), 1e-1)
    with torch.no_grad():
        reward = policy(episode.obs, episode.belief)[1][:-1]
    found = milet.ppo_update(policy, optimizer, episode, reward, 0.0, once)
    assert found["explained_variance"] == pytest.approx(1, abs=1e-3)
    assert found["approx_kl"] == pytest.approx(0, abs=1e-5) and found["clip_fraction"] == 0
    found = milet.ppo_update(policy, optimizer, episode, torch.randn(10, 4), 0.0, small_args(ppo_epochs=5))
    assert found["approx_kl"] > 0 and 0 < found["clip_fraction"] <= 1 and found["explained_variance"] < 0.9


def test_statistics_are_updated_before_the_first_update_too(monkeypatch, tmp_path):
    """And then they are those of all states acted in, without a jump at the first update."""
    counts, update = [], milet.ppo_update
    spy = lambda policy, *rest: counts.append(round(policy.stats.count.item())) or update(policy, *rest)  # noqa: E731
    monkeypatch.setattr(milet, "ppo_update", spy)
    flags = dict(env="point-goal-4c", horizon=5, num_envs=4, frames=120, elbo_terms=2, vae_batch=2)
    train(milet, **SMALL, **flags, run_dir=str(tmp_path), eval_every=9)
    assert counts == [20, 20, 40, 40]  # a trial of 20 steps an episode was observed before


@pytest.mark.parametrize("anneal", [True, False])
def test_rate_of_the_elbo(monkeypatch, tmp_path, anneal):
    rates, update = [], milet.vae_update
    monkeypatch.setattr(milet, "vae_update", lambda *a: rates.append(a[1].param_groups[0]["lr"]) or update(*a))
    flags = dict(env="point-goal-4c", horizon=5, num_envs=4, frames=160, elbo_terms=2, vae_batch=2, vae_updates=1)
    train(milet, **SMALL, **flags, run_dir=str(tmp_path), eval_every=9, lr_vae=4e-3, anneal_vae=anneal)
    assert rates == pytest.approx([3e-3, 2e-3, 1e-3] if anneal else [4e-3] * 3)


@pytest.mark.parametrize("anneal", [True, False])
def test_rates(monkeypatch, tmp_path, anneal):
    rates, update = [], milet.ppo_update
    spy = lambda *a: rates.append(a[1].param_groups[0]["lr"]) or update(*a)  # noqa: E731
    monkeypatch.setattr(milet, "ppo_update", spy)
    flags = dict(env="point-goal-4c", horizon=5, num_envs=4, frames=160, elbo_terms=2, vae_batch=2)
    rates_of = dict(anneal=anneal, lr_psi=2e-3, lr_phi=4e-3)
    train(milet, **SMALL, **flags, **rates_of, run_dir=str(tmp_path), eval_every=9)
    assert rates == pytest.approx([1.5e-3, 3e-3, 1e-3, 2e-3, 0.5e-3, 1e-3] if anneal else [2e-3, 4e-3] * 3)


def test_initialisation():
    policy = milet.Policy(6, 2, small_args(policy_init="normc", policy_hidden=(9, 7), init_std=0.3))
    torch.testing.assert_close(policy(torch.randn(4, 6), torch.randn(4, 6))[0].stddev, torch.full((4, 2), 0.3))
    for layer in (policy.actor[0], policy.actor[2], policy.critic[0], policy.critic[2]):
        torch.testing.assert_close(layer.weight.norm(dim=1), torch.full((len(layer.weight),), 5 / 3))
        assert (layer.bias == 0).all()
    torch.testing.assert_close(policy.actor[4].weight.norm(dim=1), torch.ones(2))
    encoder = milet.Encoder(6, 2, small_args())
    recurrent = encoder.c_gru.weight_hh_l0
    torch.testing.assert_close(recurrent.T @ recurrent, torch.eye(8), atol=1e-5, rtol=0)


# -- scores and command line -------------------------------------------------------------------------------------------


def test_evaluation():
    """The score of one who sees the goals; and what the figures and the videos get."""
    args = small_args(horizon=3)
    env = gym.make_vec("ant-goal-4c", num_envs=32, horizon=3)
    agent, tasks = milet.make_agent(114, 8, args), env.unwrapped.task_set("test")
    metrics, arrays = milet.evaluate(env, tasks, agent, args)
    assert abs(metrics["eval/nmi_by_parameters"] - 0.65) < 0.01
    shapes = dict(trace=(2, 4, 32, 2), reward=(2, 3, 32), action=(2, 3, 32, 8), cluster_belief=(2, 4, 32, 4))
    shapes |= dict(belief_mean=(2, 4, 32, 3), belief_std=(2, 4, 32, 3), embedding=(32, 3), reward_weights=(2, 3))
    assert {name: arrays[name].shape for name in shapes} == shapes
    assert arrays.keys() - shapes == {"params", "cluster", "seed"}
    np.testing.assert_allclose(arrays["cluster_belief"].sum(-1), 1, rtol=1e-5)


def test_scores_are_of_the_end_of_exploration_and_returns_of_their_episodes(monkeypatch):
    """Beliefs that begin with one cluster, swap two at step 20, and end with the true ones under other names."""
    env = gym.make_vec("point-goal-4c", num_envs=32, horizon=30)
    tasks, rewards = env.unwrapped.task_set("test"), torch.rand(2, 30, 32)
    q = torch.zeros(31, 32, 4)
    q[:20, :, 0] = 1
    q[20:30, torch.arange(32), torch.from_numpy(np.minimum(tasks.cluster, 2))] = 1
    q[30] = 0.1
    q[30, torch.arange(32), torch.from_numpy(3 - tasks.cluster)] = 0.7
    zeros = torch.zeros(31, 32, 6)
    trial = [milet.Episode(zeros, zeros[1:, :, :2], zeros[1:, :, :2], r, q, zeros) for r in rewards]
    monkeypatch.setattr(milet, "run_trial", lambda *a, **k: tuple(trial))
    metrics, _ = milet.evaluate(env, tasks, None, small_args(horizon=30))
    assert metrics["eval/nmi"] == pytest.approx(1) == metrics["eval/ari"] and metrics["eval/clusters_used"] == 4
    assert metrics["eval/belief_entropy"] == pytest.approx(Categorical(q[30, 0]).entropy().item(), abs=1e-4)
    assert metrics["eval/nmi_step_20"] == pytest.approx(6 / 7)  # H = 1.5 and 2 bits, 1.5 of them shared
    for k in (0, 1):
        assert metrics[f"eval/return_episode_{k + 1}"] == pytest.approx(rewards[k].sum(0).mean().item())


ANT = (50e6, 32, (64, 32), (), 0.01, 0.001, 100, 0, 64, (128, 64), 2, 8, 0.05, 0.97, 1e-4, 1e-3)
HUMANOID = (30e6, 128, (64, 32), (), 1e-3, 1e-4, 50, 100, 0, (512, 256), 4, 2, 0.1, 0.99, 1e-4, 1e-3)
HOPPER = (10e6, 64, (256, 64), (256, 128), 1e-4, 1e-4, 50, 50, 64, (128, 128), 2, 8, 0.05, 0.97, 1e-3, 1e-2)
WALKER = (10e6, 64, (256, 64), (256, 128), 1e-3, 1e-3, 50, 50, 64, (128, 128), 2, 8, 0.05, 0.97, 1e-3, 1e-2)
OFFICIAL = {
    "ant-goal-4c": ANT,
    "ant-goal-partial-4c": ANT,
    "ant-goal-u": ANT,
    "humanoid-dir-4c": HUMANOID,
    "humanoid-dir-sparse-4c": HUMANOID,
    "hopper-params-4c": HOPPER,
    "walker-params-4c": WALKER,
}


@pytest.mark.parametrize("env_id", OFFICIAL)
def test_presets_are_the_official_configurations(env_id):
    a = milet.parse_args(["--env", env_id, "--preset", "paper"])
    networks = (a.frames, a.hidden, a.reward_decoder, a.state_decoder, a.kl_z_weight, a.kl_c_weight, a.elbo_terms)
    policies = (a.decodes, a.policy_embed, a.policy_hidden, a.ppo_epochs, a.minibatches, a.clip, a.gamma)
    assert networks + policies + (a.entropy_phi, a.entropy_psi) == OFFICIAL[env_id]
    robot = env_id.split("-")[0]
    assert a.embed == ((32, 32, 32) if robot in ("hopper", "walker") else (32, 16, 16))
    assert a.policy_init == ("normc" if robot in ("hopper", "walker") else "orthogonal")
    assert a.squash == ("sample" if robot == "humanoid" else "none")


def test_flags_beat_presets():
    args = milet.parse_args("--env humanoid-dir-sparse-4c --gamma 0.5 --no-consistency --clusters 6".split())
    assert (args.squash, args.policy_hidden) == ("sample", (512, 256))
    assert (args.gamma, args.consistency, args.clusters) == (0.5, False, 6)


def test_the_fast_preset_is_the_default_where_there_is_one():
    assert milet.parse_args([]).preset == "fast" and milet.parse_args([]).num_envs == 32
    assert milet.parse_args(["--preset", "paper"]).num_envs == 16
    assert milet.parse_args(["--env", "humanoid-dir-sparse-4c"]).preset == "paper"


def test_help_shows_the_preset(capsys):
    with pytest.raises(SystemExit):
        milet.parse_args(["--env", "hopper-params-4c", "--preset", "paper", "--help"])
    assert "(default: 256 64)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--env", "ant-dir"], "may end an episode early"),
        (["--frames", "0"], "--frames must be from 1"),
        (["--frames", "12000"], "--frames must be at least 12800"),
        (["--frames", "6000", "--preset", "paper"], "--frames must be at least 6400"),
        (["--decodes", "-1"], "--decodes must be from 0"),
        (["--num-envs", "501"], "at most 500"),
        (["--buffer-trials", "10"], "--num-envs must be at most 500 .* and --buffer-trials"),
        (["--minibatches", "1000000"], "--minibatches must be at most"),
        (["--temperature", "0"], "must be positive"),
        (["--lr-vae", "0"], "must be positive"),
        (["--gamma", "2"], r"must be in \[0, 1\]"),
        (["--reward-decoder"], "must name a layer"),
        (["--clusters", "0"], "--clusters must be from 1"),
    ],
)
def test_wrong_input_gets_one_line(argv, message):
    with pytest.raises(SystemExit, match=message) as error:
        milet.parse_args(argv)
    assert "\n" not in str(error.value)
