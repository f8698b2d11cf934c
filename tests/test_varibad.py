"""VariBAD's mathematics: the chain of beliefs, the ELBO against a slow one, the return of a trial."""

import copy

import gymnasium as gym
import literal
import numpy as np
import pytest
import torch
import varibad
from conftest import train
from test_milet import literal_ppo
from torch.distributions import Normal, kl_divergence


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small_args(**kwargs) -> varibad.Args:
    defaults = dict(hidden=8, embed=(5, 4, 3), latent_dim=3, reward_decoder=(7, 6), num_threads=1)
    return varibad.Args(**(defaults | kwargs))


def trials(n=3, horizon=5, obs_dim=6, action_dim=2):
    return torch.randn(n, 2, horizon + 1, obs_dim), torch.randn(n, 2, horizon, action_dim), torch.randn(n, 2, horizon)


# -- variational inference ---------------------------------------------------------------------------------------------


def test_kl_of_a_belief_that_stays_at_the_prior_is_zero():
    args = small_args()
    agent = varibad.make_agent(6, 2, 2, args)
    for head in (agent["encoder"].mean, agent["encoder"].log_var):
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    assert varibad.elbo_loss(agent, *trials(), args)["kl_z"] == 0


@pytest.mark.parametrize("state_decoder", [(), (9, 5)])
@pytest.mark.parametrize("sampled", [dict(), dict(elbo_terms=4, decodes=3)])
def test_elbo_against_a_slow_reference(state_decoder, sampled):
    """Step by step, term by term, transition by transition, with the same random numbers; and its gradients."""
    args = small_args(state_decoder=state_decoder, kl_weight=0.7, lambda_s=0.5, **sampled)
    agent, (obs, action, reward) = varibad.make_agent(6, 2, 2, args), trials()
    encoder, n, steps = agent["encoder"], len(obs), 10
    torch.manual_seed(1)
    ours = varibad.elbo_loss(agent, obs, action, reward, args)

    torch.manual_seed(1)
    terms = torch.randint(steps + 1, (n, 4)) if sampled else torch.arange(steps + 1).expand(n, -1)
    noise = torch.randn(*terms.shape, 3)
    decoded = torch.randint(steps, (*terms.shape, 3)) if sampled else torch.arange(steps).expand(*terms.shape, -1)
    loss = 0.0
    for i in range(n):
        transitions = [
            (obs[i, e, t], action[i, e, t], reward[i, e, t], obs[i, e, t + 1]) for e in range(2) for t in range(5)
        ]
        h, beliefs = torch.zeros(1, 8), [Normal(torch.zeros(3), torch.ones(3))]
        for t in range(steps + 1):
            if t > 0:
                _, a, r, s2 = transitions[t - 1]
                h = encoder(a[None, None], r[None, None], s2[None, None], h)[0]
            beliefs.append(Normal(encoder.mean(h)[0], (0.5 * encoder.log_var(h)[0]).exp()))
        for k, t in enumerate(terms[i].tolist()):
            z = beliefs[t + 1].mean + beliefs[t + 1].stddev * noise[i, k]
            loss += 0.7 * kl_divergence(beliefs[t + 1], beliefs[t]).sum() / n
            for j in decoded[i, k].tolist():
                s, a, r, s2 = transitions[j]
                loss += (decode(agent["reward_decoder"], z, s, a, s2) - r).square().sum() / n
                if state_decoder:
                    loss += 0.5 * (decode(agent["state_decoder"], z, s, a, s2) - s2).square().mean() / n
    assert ours["loss"].item() == pytest.approx(loss.item(), rel=1e-4)
    trained = [p for name, p in agent.named_parameters() if not name.startswith("policy")]
    for a, b in zip(*(torch.autograd.grad(x, trained) for x in (ours["loss"], loss))):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def decode(decoder, z, s, a, s2):
    """Of one transition, on the plain concatenation."""
    state, action = decoder.embed_state(s).relu(), decoder.embed_action(a).relu()
    parts = [z, decoder.embed_state(s2).relu(), action, state] if decoder.sees_next else [z, action, state]
    return decoder.rest(decoder.first(torch.cat(parts)))


def test_truncation_cuts_the_gradient_and_nothing_else():
    agent, batch, found = varibad.make_agent(6, 2, 2, small_args()), trials(), {}
    for truncate in (0, 10, 3):
        torch.manual_seed(1)
        loss = varibad.elbo_loss(agent, *batch, small_args(truncate=truncate))["loss"]
        found[truncate] = loss.detach(), torch.autograd.grad(loss, agent["encoder"].gru.weight_hh_l0)[0]
    for (loss, gradient), same in ((found[10], True), (found[3], False)):
        torch.testing.assert_close(loss, found[0][0])
        assert torch.allclose(gradient, found[0][1], rtol=1e-3) == same


def test_one_update_moves_the_encoder_and_not_the_policy():
    args = small_args()
    agent = varibad.make_agent(6, 2, 2, args)
    before = {name: p.clone() for name, p in agent.named_parameters()}
    optimizer = torch.optim.Adam(agent.parameters(), 1e-2)
    varibad.vae_update(agent, optimizer, list(trials()), args)
    moved = {name.split(".")[0] for name, p in agent.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"encoder", "reward_decoder"}


def test_one_step_on_the_elbo_against_a_literal_one():
    """Nothing is left of earlier gradients, and the norm of every network is cut by its own."""
    args, batch = small_args(state_decoder=(9, 5)), [100 * x for x in trials()]
    agent = varibad.make_agent(6, 2, 2, args)
    twin = copy.deepcopy(agent)
    varibad.elbo_loss(agent, *batch, args)["loss"].backward()
    torch.manual_seed(1)
    varibad.vae_update(agent, torch.optim.SGD(agent.parameters(), 0.5), batch, args)
    torch.manual_seed(1)
    loss = varibad.elbo_loss(twin, *batch, args)["loss"]
    groups = [([*twin[name].parameters()], 1.0) for name in ("encoder", "reward_decoder", "state_decoder")]
    assert literal.descend(loss, groups, 0.5)
    for p, wanted in zip(agent.parameters(), twin.parameters()):
        torch.testing.assert_close(p, wanted)


def test_the_policy_is_paid_scaled_rewards_and_trials_enter_the_buffer_in_their_order(monkeypatch, tmp_path):
    scaled, paid, added, add = [], [], [], varibad.TrialBuffer.add
    monkeypatch.setattr(
        varibad, "scale_rewards", lambda *a, f=varibad.scale_rewards: scaled.append((a[1], f(*a))) or scaled[-1][1]
    )
    monkeypatch.setattr(varibad, "ppo_update", lambda *a, f=varibad.ppo_update: paid.append(a[3]) or f(*a))
    monkeypatch.setattr(varibad.TrialBuffer, "add", lambda self, *pair: added.append(pair) or add(self, *pair))
    train(varibad, env="point-goal-4c", horizon=5, num_envs=4, frames=160, run_dir=str(tmp_path), eval_every=9)
    assert len(scaled) == len(added) == 4 == 1 + len(paid)
    for (raw, wanted), reward in zip(scaled[1:], paid):  # of the first trials only the scale is learned
        assert torch.equal(reward, wanted) and not torch.allclose(reward, raw, atol=0.1)
    for (first, second), (raw, _) in zip(added, scaled):
        assert torch.equal(raw, torch.cat([first.reward, second.reward]))
        assert torch.equal(first.belief[-1], second.belief[0])
        assert not torch.equal(first.belief[0], second.belief[-1])


# -- sampler -----------------------------------------------------------------------------------------------------------


def play(args, env_id="hopper-params-4c", n=3):
    env = gym.make_vec(env_id, num_envs=n)
    dims = env.single_observation_space.shape[0] + 1, env.single_action_space.shape[0], env.unwrapped.task_dim
    agent = varibad.make_agent(*dims, args)
    return agent, *varibad.run_trial(env, env.unwrapped.task_set("train")[:n], 0, agent, args, test=False)


def test_the_belief_lives_for_one_trial():
    """From the heads of h = 0 over both episodes, equal to one pass over the whole trial."""
    agent, first, second = play(small_args())
    torch.testing.assert_close(second.belief[0], first.belief[-1], atol=0, rtol=0)
    action, reward = (torch.cat([getattr(e, k) for e in (first, second)]) for k in ("action", "reward"))
    next_obs = torch.cat([e.obs[1:] for e in (first, second)])
    with torch.no_grad():
        h = agent["encoder"](action, reward, next_obs, torch.zeros(3, 8))
        belief = agent["encoder"].belief(torch.cat([torch.zeros(1, 3, 8), h]))
    torch.testing.assert_close(belief, torch.cat([first.belief, second.belief[1:]]), atol=1e-5, rtol=1e-4)


def test_the_oracle_is_told_the_task_and_infers_nothing(monkeypatch, tmp_path):
    args = small_args(oracle=True)
    _, *episodes = play(args)
    params = torch.from_numpy(gym.make_vec("hopper-params-4c").unwrapped.task_set("train").params[:3]).float()
    for episode in episodes:
        torch.testing.assert_close(episode.belief, params.expand(101, -1, -1))
    monkeypatch.setattr(varibad, "vae_update", lambda *a: pytest.fail("an oracle has nothing to infer"))
    flags = dict(env="point-goal-4c", horizon=5, num_envs=4, frames=120, eval_every=9, run_dir=str(tmp_path))
    run = train(varibad, oracle=True, **flags)
    assert torch.load(run / "checkpoint.pt", weights_only=True)["buffer"] == {"trials": []}
    with np.load(run / "eval.npz") as arrays:
        goals = arrays["params"].astype(np.float32)
        np.testing.assert_array_equal(arrays["belief_mean"], np.broadcast_to(goals, (2, 6, 32, 2)))
        assert (arrays["belief_std"] == 0).all()


def test_episodes_end_with_the_flag_and_begin_with_a_reset():
    for keep in (False, True):
        _, first, second = play(small_args(keep_terminal=keep), env_id="point-goal-4c")
        for episode in (first, second):
            assert (episode.obs[1:-1, :, -1] == 0).all() and (episode.obs[-1, :, -1] == 1).all()
        state = first.obs[-1] if keep else torch.zeros(3, 3)  # a point starts at the origin
        torch.testing.assert_close(second.obs[0], state, atol=0, rtol=0)


@pytest.mark.parametrize("squash", ["none", "mean", "sample"])
def test_the_mean_is_squashed_where_asked(squash):
    policy = varibad.Policy(12, 6, 6, small_args(squash=squash))
    policy.actor[-1].bias.data += 5
    pi, _ = policy(torch.randn(4, 12), torch.randn(4, 6))
    assert (pi.mean.abs() <= 1).all() == (squash == "mean")


# -- the policy --------------------------------------------------------------------------------------------------------


def test_the_return_of_episode_2_reaches_episode_1_unless_cut():
    reward, value = torch.randn(10, 2), torch.randn(11, 2)
    other = reward + torch.arange(10)[:, None].ge(5)  # another episode 2
    whole, cut = small_args(horizon=5), small_args(horizon=5, cut_episodes=True)
    assert not torch.isclose(varibad.advantages(reward, value, whole), varibad.advantages(other, value, whole)).any()
    same = torch.isclose(varibad.advantages(reward, value, cut), varibad.advantages(other, value, cut))
    assert same[:5].all() and not same[5:9].any()


def test_cut_advantages_against_the_official_recursion():
    """Backwards over the trial; at the last step of an episode the advantage so far is set to zero."""
    args = small_args(horizon=5, cut_episodes=True)
    reward, value = torch.randn(10, 2), torch.randn(11, 2)
    expected, last = torch.zeros(10, 2), torch.zeros(2)
    for t in reversed(range(10)):
        last = reward[t] + args.gamma * value[t + 1] - value[t] + args.gamma * args.gae_lambda * last
        last = torch.zeros(2) if t % 5 == 4 else last
        expected[t] = last
    torch.testing.assert_close(varibad.advantages(reward, value, args), expected)


def make_trial(steps=10, n=4) -> varibad.Episode:
    """Random states whose last number is the done flag: 0 along the trial and 1 at its end."""
    obs, sample = torch.randn(steps + 1, n, 6), torch.randn(steps, n, 2)
    obs[..., -1] = torch.arange(steps + 1)[:, None] == steps
    return varibad.Episode(obs, sample, sample, torch.empty(0), torch.randn(steps + 1, n, 6))


def test_ppo_against_literal_steps():
    ppo = dict(ppo_epochs=3, minibatches=1, clip=0.1, gamma=0.9, gae_lambda=0.8, entropy=0.3, value_coef=0.8)
    args = small_args(**ppo)
    policy, trial, reward = varibad.Policy(6, 6, 2, args), make_trial(), torch.randn(10, 4)
    twin = copy.deepcopy(policy)
    varibad.ppo_update(policy, torch.optim.SGD(policy.parameters(), 0.5), trial, reward, args)
    literal_ppo(twin, twin.observe, trial, reward)
    for p, wanted in zip(policy.parameters(), twin.parameters()):
        torch.testing.assert_close(p, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("policy_embed", [0, 64])
def test_the_value_at_the_time_limit_is_that_of_the_state(policy_embed):
    """... and hangs neither on the done flag, which statistics never see at 1, nor on strays (D10)."""
    args = small_args(policy_embed=policy_embed, normalise_belief=True)
    policy, trial = varibad.Policy(6, 6, 2, args), make_trial(50, 16)
    optimizer = torch.optim.Adam(policy.parameters(), 1e-3)
    for _ in range(5):
        varibad.ppo_update(policy, optimizer, trial, torch.randn(50, 16), args)
    end, same = trial.obs[-1], trial.obs[-1].clone()
    same[:, -1] = 0
    (_, value), (_, without_flag) = (policy(obs, trial.belief[-1]) for obs in (end, same))
    assert (end[:, -1] == 1).all() and value.std() > 1e-3, "not saturated"
    torch.testing.assert_close(value, without_flag)
    end[:, 0] = 1e6
    assert policy.stats.normalise(end[:, :-1]).abs().max() == 10
    assert policy.belief_stats.normalise(1e6 * trial.belief).abs().max() == 10


def test_ppo_learns_from_the_advantages_of_the_trial(monkeypatch):
    """With the values of all H+ + 1 states, by the statistics that acted; its first ratios are 1 by the new ones."""
    args = small_args(normalise_belief=True, ppo_epochs=1, clip=1e9)
    policy, seen, advantages = varibad.Policy(6, 6, 2, args), [], varibad.advantages
    policy.belief_stats.update(3 + torch.randn(100, 6))
    trial = make_trial()
    with torch.no_grad():
        expected = policy(trial.obs, trial.belief)[1]
    monkeypatch.setattr(varibad, "advantages", lambda r, v, a: seen.append(v) or advantages(r, v, a))
    losses = varibad.ppo_update(policy, torch.optim.Adam(policy.parameters(), 1e-3), trial, torch.randn(10, 4), args)
    torch.testing.assert_close(seen[0], expected)
    assert losses["policy_loss"] == pytest.approx(0, abs=1e-5), "minus the mean of normalised advantages"


@pytest.mark.parametrize("anneal, anneal_vae", [(True, False), (False, False), (False, True)])
def test_rates_numbers_of_updates_and_statistics_before_the_first(monkeypatch, tmp_path, anneal, anneal_vae):
    rates, counts = [], []
    monkeypatch.setattr(varibad, "ppo_update", lambda *a, f=varibad.ppo_update: (
        rates.append(a[1].param_groups[0]["lr"]) or counts.append(round(a[0].stats.count.item())) or f(*a)
    ))  # fmt: skip
    monkeypatch.setattr(varibad, "vae_update", lambda *a, f=varibad.vae_update: (
        rates.append(a[1].param_groups[0]["lr"]) or f(*a)
    ))  # fmt: skip
    train(
        varibad, env="point-goal-4c", horizon=5, num_envs=4, frames=160, vae_updates=3, vae_batch=2,
        anneal=anneal, anneal_vae=anneal_vae, lr_policy=4e-3, lr_vae=2e-3, run_dir=str(tmp_path), eval_every=9,
    )  # fmt: skip
    policy = (3e-3, 2e-3, 1e-3) if anneal else (4e-3, 4e-3, 4e-3)
    vae = (1.5e-3, 1e-3, 0.5e-3) if anneal_vae else (2e-3, 2e-3, 2e-3)
    assert rates == pytest.approx([rate for p, v in zip(policy, vae) for rate in (p, v, v, v)])
    assert counts == [40, 80, 120]


def test_normalised_beliefs():
    args = small_args(normalise_belief=True)
    policy, trial = varibad.Policy(6, 6, 2, args), make_trial()
    trial = trial._replace(belief=5 + 2 * trial.belief)
    optimizer = torch.optim.Adam(policy.parameters(), 1e-3)
    varibad.ppo_update(policy, optimizer, trial, torch.randn(10, 4), args)
    torch.testing.assert_close(policy.belief_stats.mean.float(), trial.belief[:-1].mean((0, 1)), atol=1e-3, rtol=0)
    shifted = varibad.Policy(6, 6, 2, args)
    shifted.load_state_dict(policy.state_dict())
    shifted.belief_stats.mean += 1
    torch.testing.assert_close(policy(trial.obs, trial.belief)[1], shifted(trial.obs, trial.belief + 1)[1])


def test_evaluation():
    args = small_args(horizon=3)
    env = gym.make_vec("point-goal-4c", num_envs=32, horizon=3)
    metrics, arrays = varibad.evaluate(env, env.unwrapped.task_set("test"), varibad.make_agent(3, 2, 2, args), args)
    shapes = dict(trace=(2, 4, 32, 2), reward=(2, 3, 32), action=(2, 3, 32, 2), belief_mean=(2, 4, 32, 3))
    shapes |= dict(belief_std=(2, 4, 32, 3), embedding=(32, 3))
    assert {name: arrays[name].shape for name in shapes} == shapes
    assert arrays.keys() - shapes == {"params", "cluster", "seed"}
    assert metrics["eval/belief_std_2"] == pytest.approx(arrays["belief_std"][1, -1].mean())
    assert metrics["eval/return_episode_2"] == pytest.approx(arrays["reward"][1].sum(0).mean())
    np.testing.assert_array_equal(arrays["embedding"], arrays["belief_mean"][0, -1])


# -- command line ------------------------------------------------------------------------------------------------------

# frames, H, copies, epochs, minibatches, clip, lr, anneal, γ, entropy, hidden, embedding, initialisation, normalised
# beliefs, squashing, latent, state decoder, terms, decodes, truncation, ELBO updates, weight of the KL
ANT = (5e7, 100, 16, 2, 1, 0.05, 1e-3, True, 0.97, 0.01, (128, 128), 64, "orthogonal", False, "none", 10, (), 0, 0, 0)
ANT += (5, 1.0)
HUMANOID = (3e7, 100, 64, 4, 2, 0.1, 7e-4, True, 0.99, 1e-3, (512, 256), 0, "orthogonal", False, "sample", 10, (), 100)
HUMANOID += (100, 0, 10, 1.0)
WALKER = (1e7, 100, 16, 2, 2, 0.05, 7e-4, False, 0.97, 0.01, (128, 128), 64, "normc", True, "none", 10, (256, 128), 50)
WALKER += (50, 50, 1, 10.0)
DIR = (1e8, 200, 32, 16, 4, 0.1, 7e-4, False, 0.97, 0.01, (128, 128), 64, "normc", True, "mean", 5, (), 50, 50, 50)
DIR += (1, 1.0)
VEL = (1e8, 200, 16, 2, 8, 0.1, 7e-4, False, 0.97, 0.01, (128, 128), 64, "normc", True, "none", 5, (), 50, 50, 50)
VEL += (1, 1.0)
OFFICIAL = {
    "ant-goal-4c": ANT,
    "ant-goal-partial-4c": ANT,
    "ant-goal-u": ANT,
    "humanoid-dir-4c": HUMANOID,
    "humanoid-dir-sparse-4c": HUMANOID,
    "hopper-params-4c": WALKER,
    "walker-params-4c": WALKER,
    "cheetah-dir": DIR,
    "cheetah-vel": VEL,
}


@pytest.mark.parametrize("env_id", OFFICIAL)
def test_presets_are_the_official_configurations_of_the_robot(env_id):
    a = varibad.parse_args(["--env", env_id, "--preset", "paper"])
    ppo = (a.frames, a.horizon, a.num_envs, a.ppo_epochs, a.minibatches, a.clip, a.lr_policy, a.anneal, a.gamma)
    policy = (a.entropy, a.policy_hidden, a.policy_embed, a.policy_init, a.normalise_belief, a.squash, a.latent_dim)
    elbo = (a.state_decoder, a.elbo_terms, a.decodes, a.truncate, a.vae_updates, a.kl_weight)
    assert ppo + policy + elbo == OFFICIAL[env_id]
    decoder = ((32, 32, 32), (256, 64)) if env_id.endswith("params-4c") else ((32, 16, 16), (64, 32))
    assert (a.embed, a.reward_decoder) == decoder
    assert (a.hidden, a.vae_batch, a.lr_vae, a.buffer_trials) == (128, 10, 1e-3, 10_000)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--frames", "12000"], "--frames must be at least 12800"),
        (["--elbo-terms", "-1"], "--elbo-terms must be from 0"),
        (["--num-envs", "501"], "at most 500"),
        (["--env", "ant-dir"], "may end an episode early"),
        (["--minibatches", "1000000"], "--minibatches must be at most"),
        (["--lr-policy", "-1"], "--lr-policy .* must be positive"),
        (["--gamma", "2"], r"must be in \[0, 1\]"),
        (["--horizon", "1", "--cut-episodes"], "leaves nothing"),
    ],
)
def test_wrong_input_stops(argv, message):
    with pytest.raises(SystemExit, match=message):
        varibad.parse_args(argv)
