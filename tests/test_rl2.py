"""RL2: the memory and its life, and that the policy's loss trains it."""

import copy

import gymnasium as gym
import literal
import pytest
import rl2
import torch
from conftest import train
from torch.distributions import Normal


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small_args(**kwargs) -> rl2.Args:
    defaults = dict(hidden=8, embed=(5, 4, 3), belief_dim=12, policy_embed=5, policy_hidden=(7,), num_threads=1)
    return rl2.Args(**(defaults | kwargs))


def play(args, env_id="hopper-params-4c", n=3):
    env = gym.make_vec(env_id, num_envs=n)
    agent = rl2.make_agent(env.single_observation_space.shape[0] + 1, env.single_action_space.shape[0], args)
    return agent, rl2.run_trial(env, env.unwrapped.task_set("train")[:n], 0, agent, args, test=False)


# -- memory ------------------------------------------------------------------------------------------------------------


def seen(agent, trial, args):
    """What π sees at every step of the trials, encoded as in the update."""
    return agent["encoder"].belief(rl2.encode_trial(agent["encoder"], trial, args))


@pytest.mark.parametrize("encode_first", [False, True])
def test_what_acted_is_what_the_update_encodes(encode_first):
    """Step by step in the rollout, in one pass over both episodes in the update."""
    args = small_args(encode_first=encode_first)
    agent, (first, second) = play(args)
    belief = seen(agent, (first, second), args)
    assert belief.shape == (200, 3, 12)
    torch.testing.assert_close(belief, torch.cat([first.belief[:-1], second.belief[:-1]]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 7])
def test_the_gradients_of_the_memory_are_those_of_nn_gru(steps):
    gru = torch.nn.GRU(5, 4).double()
    x, h, weight = (torch.randn(*shape, dtype=torch.double) for shape in ((steps, 3, 5), (3, 4), (steps, 3, 4)))
    inputs = [x.requires_grad_(), h.requires_grad_(), *gru.parameters()]
    out, own = gru(x, h[None])[0], rl2.Recurrence.apply(gru, *inputs)
    torch.testing.assert_close(own, out)
    grads = (torch.autograd.grad((weight * y.square()).sum(), inputs) for y in (own, out))
    for mine, theirs in zip(*grads):
        torch.testing.assert_close(mine, theirs)


def test_memory_survives_the_episode_and_dies_with_the_trial():
    agent, (first, second) = play(small_args())
    zero = agent["encoder"].belief(torch.zeros(3, 8))
    torch.testing.assert_close(first.belief[0], zero, atol=1e-6, rtol=0)
    assert torch.equal(second.belief[0], first.belief[-1]) and not torch.isclose(second.belief[0], zero).all()


def test_the_first_states_are_unseen_unless_encoded():
    for encode_first in (False, True):
        _, (first, second) = play(small_args(encode_first=encode_first))
        assert (first.belief[0] == first.belief[0, :1]).all() == (not encode_first)
        assert torch.equal(second.belief[0], first.belief[-1]) == (not encode_first)


def test_an_action_of_episode_2_depends_on_episode_1_and_none_on_the_future():
    args = small_args()
    agent, trial = play(args)
    first, second = trial
    action = first.action.requires_grad_()
    belief = seen(agent, (first._replace(action=action), second), args)
    (gradient,) = torch.autograd.grad(belief[105].sum(), action, retain_graph=True)
    assert (gradient.abs().sum((1, 2))[60:] > 0).all()
    (none,) = torch.autograd.grad(belief[50].sum(), action)
    assert (none[50:] == 0).all() and (none[49] != 0).any()


def test_the_empty_memory_trains_its_layer():
    args = small_args()
    agent, trial = play(args)
    belief = seen(agent, trial, args)
    assert torch.autograd.grad(belief[0].sum(), agent["encoder"].head.bias)[0].sum() > 0, "D3"


def test_what_pi_sees_is_rectified_where_asked():
    h = torch.randn(20, 8)
    assert (rl2.Encoder(6, 2, small_args()).belief(h) >= 0).all()
    assert (rl2.Encoder(6, 2, small_args(relu=False)).belief(h) < 0).any()


# -- update ------------------------------------------------------------------------------------------------------------


def optimizers(agent, lr=1e-3):
    return {name: torch.optim.Adam(agent[name].parameters(), lr) for name in ("policy", "encoder")}


def test_the_first_step_has_ratios_of_one_and_the_second_has_not(monkeypatch):
    """The same beliefs as those that acted; then new ones, encoded with the new θ."""
    args, memory = small_args(ppo_epochs=2, clip=1e9, squash="sample"), []
    agent, trial = play(args)
    encode, before = rl2.encode_trial, seen(agent, trial, args).detach()
    monkeypatch.setattr(rl2, "encode_trial", lambda *a: memory.append(encode(*a)) or memory[-1])
    rl2.ppo_update(agent, optimizers(agent), trial, torch.randn(200, 3), args)
    acted = torch.cat([episode.belief[:-1] for episode in trial])
    torch.testing.assert_close(before, acted, atol=1e-5, rtol=1e-4)
    assert len(memory) == 2 and not torch.allclose(memory[0], memory[1], atol=1e-4)
    once = small_args(ppo_epochs=1, clip=1e9, squash="sample")
    agent, trial = play(once)
    losses = rl2.ppo_update(agent, optimizers(agent), trial, torch.randn(200, 3), once)
    assert losses["policy_loss"] == pytest.approx(0, abs=1e-5) == losses["approx_kl"]


def test_ppo_against_literal_steps():
    """Full-batch gradient descent on both networks, each with its own clip; the memory is encoded step by step."""
    ppo = dict(ppo_epochs=3, minibatches=1, clip=0.1, gamma=0.9, gae_lambda=0.8, entropy=0.3, value_coef=0.8)
    args = small_args(**ppo, encoder_clip=0.02, horizon=10)
    env = gym.make_vec("point-goal-4c", num_envs=4, horizon=10)
    agent, reward = rl2.make_agent(3, 2, args), torch.randn(20, 4)
    trial = rl2.run_trial(env, env.unwrapped.task_set("train")[:4], 0, agent, args, test=False)
    twin, (first, second) = copy.deepcopy(agent), trial
    rl2.ppo_update(agent, {0: torch.optim.SGD(agent.parameters(), 0.5)}, trial, reward, args)

    policy, encoder = twin["policy"], twin["encoder"]
    action, sample, paid = (torch.cat([getattr(e, x) for e in trial]) for x in ("action", "sample", "reward"))
    obs, belief = torch.cat([first.obs[1:], second.obs[1:]]), torch.cat([first.belief[:10], second.belief])
    with torch.no_grad():
        pi, value = policy(belief)
        old = Normal(pi.mean[:-1], pi.stddev[:-1]).log_prob(sample).sum(-1).flatten()
    (advantage, target), clips = literal.targets(reward, value, 0.9, 0.8), []
    for _ in range(3):
        h = [torch.zeros(4, args.hidden)]
        for t in range(19):
            h.append(encoder(action[t : t + 1], paid[t : t + 1], obs[t : t + 1], h[-1])[0])
        acted = *policy(encoder.belief(torch.stack(h))), sample, old, value[:-1].flatten()
        loss, left = literal.ppo_loss(*acted, advantage, target, 0.3)
        cut = literal.descend(loss, [([*policy.parameters()], 0.5), ([*encoder.parameters()], 0.02)], 0.5)
        clips.append((left, cut))
    assert all(map(any, zip(*clips))), "a case in which all clips matter"
    for p, wanted in zip(agent.parameters(), twin.parameters()):
        torch.testing.assert_close(p, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("anneal", [True, False])
def test_rates_and_scale_of_the_rewards(monkeypatch, tmp_path, anneal):
    rates, raw, update = [], [], rl2.ppo_update

    def spy(agent, adam, trial, reward, args):
        rates.append([adam[name].param_groups[0]["lr"] for name in ("policy", "encoder")])
        raw.append(torch.equal(reward, torch.cat([episode.reward for episode in trial])))
        return update(agent, adam, trial, reward, args)

    monkeypatch.setattr(rl2, "ppo_update", spy)
    train(
        rl2, env="point-goal-4c", horizon=5, num_envs=4, frames=120, anneal=anneal, normalise_reward=anneal,
        lr_policy=0.3, lr_encoder=0.6, run_dir=str(tmp_path), eval_every=9,
    )  # fmt: skip
    expected = [[0.3, 0.6], [0.2, 0.4], [0.1, 0.2]] if anneal else [[0.3, 0.6]] * 3
    assert [r for pair in rates for r in pair] == pytest.approx([r for pair in expected for r in pair])
    assert raw == [not anneal] * 3


def test_evaluation():
    args = small_args(horizon=3)
    env = gym.make_vec("point-goal-4c", num_envs=32, horizon=3)
    metrics, arrays = rl2.evaluate(env, env.unwrapped.task_set("test"), rl2.make_agent(3, 2, args), args)
    shapes = dict(trace=(2, 4, 32, 2), reward=(2, 3, 32), action=(2, 3, 32, 2), embedding=(32, 12))
    assert {name: arrays[name].shape for name in shapes} == shapes
    assert arrays.keys() - shapes == {"params", "cluster", "seed"}
    assert metrics["eval/return_episode_2"] == pytest.approx(arrays["reward"][1].sum(0).mean())


# -- command line ------------------------------------------------------------------------------------------------------

# frames, H, copies, epochs, minibatches, clip, both rates, anneal, γ, entropy, ReLU, hidden, embedding, initialisation,
# squashing, normalised rewards, clip of θ's gradient
ANT = (5e7, 100, 16, 2, 1, 0.05, 3e-4, 3e-4, True, 0.97, 0.01, True, (128,), 64, "orthogonal", "none", True, 0.5)
HUMANOID = (3e7, 100, 32, 4, 2, 0.1, 7e-4, 1e-3, True, 0.99, 1e-3, False, (128, 128), 0, "orthogonal", "sample", False)
HUMANOID += (1.0,)
WALKER = (1e7, 100, 16, 2, 1, 0.05, 7e-4, 7e-4, False, 0.97, 0.01, True, (128,), 0, "normc", "none", True, 0.5)
DIR = (1e8, 200, 8, 2, 4, 0.1, 7e-4, 7e-4, False, 0.97, 0.01, True, (128,), 0, "normc", "none", True, 0.5)
VEL = (1e8, 200, 32, 2, 4, 0.1, 7e-4, 7e-4, False, 0.97, 0.01, True, (128,), 0, "normc", "none", True, 0.5)
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
    a = rl2.parse_args(["--env", env_id, "--preset", "paper"])
    ppo = (a.frames, a.horizon, a.num_envs, a.ppo_epochs, a.minibatches, a.clip, a.lr_policy, a.lr_encoder, a.anneal)
    rest = (a.gamma, a.entropy, a.relu, a.policy_hidden, a.policy_embed, a.policy_init, a.squash, a.normalise_reward)
    assert ppo + rest + (a.encoder_clip,) == OFFICIAL[env_id]
    assert (a.embed, a.hidden, a.belief_dim, a.gae_lambda) == ((32, 16, 16), 128, 256, 0.9)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--frames", "6000"], "--frames must be at least 6400"),
        (["--minibatches", "0"], "--minibatches must be from 1"),
        (["--num-envs", "501"], "at most 500"),
        (["--env", "ant-dir"], "may end an episode early"),
        (["--minibatches", "1000000"], "--minibatches must be at most"),
        (["--lr-policy", "-1"], "--lr-policy .* must be positive"),
        (["--gamma", "2"], r"must be in \[0, 1\]"),
        (["--horizon", "1", "--cut-episodes"], "leaves nothing"),
    ],
)
def test_wrong_input_gets_one_line(argv, message):
    with pytest.raises(SystemExit, match=message) as error:
        rl2.parse_args(argv)
    assert "\n" not in str(error.value)
