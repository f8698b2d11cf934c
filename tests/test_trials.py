"""What milet.py, varibad.py and rl2.py do with tasks, trials and rewards around their updates."""

import gymnasium as gym
import milet
import numpy as np
import pytest
import rl2
import torch
import varibad
from conftest import train

import envs

SMALL = {
    milet: dict(hidden=4, embed=(3, 2, 2), policy_hidden=(4,), reward_decoder=(4,), elbo_terms=2, vae_batch=3),
    varibad: dict(hidden=4, embed=(3, 2, 2), policy_hidden=(4,), reward_decoder=(4,), vae_batch=3),
    rl2: dict(hidden=4, embed=(3, 2, 2), belief_dim=4, policy_hidden=(4,)),
}
SCRIPTS = pytest.mark.parametrize("script", SMALL, ids=lambda script: script.__name__)
FLAGS = dict(env="point-goal-4c", horizon=5, num_envs=6, frames=240, eval_every=9, minibatches=2)  # 4 iterations


def spy(monkeypatch, script, name: str) -> list[tuple[tuple, dict]]:
    """The arguments of all calls of a function that still does its work."""
    calls, function = [], getattr(script, name)

    def called(*args, **kwargs):
        calls.append((args, kwargs))
        return function(*args, **kwargs)

    monkeypatch.setattr(script, name, called)
    return calls


@SCRIPTS
def test_training_and_evaluation_have_their_own_tasks(script, monkeypatch, tmp_path):
    calls = spy(monkeypatch, script, "run_trial")
    train(script, **FLAGS, **SMALL[script], run_dir=str(tmp_path))
    training, evaluations = ([args[1] for args, kwargs in calls if kwargs["test"] == test] for test in (False, True))
    env = envs.ENVIRONMENTS["point-goal-4c"]()
    train_set = {tuple(row) for row in env.task_set("train").params}
    seen = [{tuple(row) for row in tasks.params} for tasks in training]
    assert len(seen) == 4 and all(len(rows) == 6 and rows <= train_set for rows in seen)
    assert len(set.union(*seen)) > 12, "an iteration has tasks of its own"
    assert len(evaluations) == 2 and all(tasks == env.task_set("test") for tasks in evaluations)


class Recorder(gym.vector.VectorWrapper):
    """Keeps the actions that it gets."""

    def __init__(self, env):
        super().__init__(env)
        self.actions = []

    def step(self, action):
        self.actions.append(action.copy())
        return super().step(action)


@SCRIPTS
@pytest.mark.parametrize("squash", ["none", "sample"])
def test_the_environment_and_the_encoder_get_the_squashed_action(script, squash, monkeypatch):
    args = script.Args(squash=squash, init_std=2.0, num_threads=1, **SMALL[script], horizon=5)
    env = Recorder(gym.make_vec("point-goal-4c", num_envs=3, horizon=5))
    agent = script.make_agent(*([3, 2, 2] if script is varibad else [3, 2]), args)
    encoded, forward = [], type(agent["encoder"]).forward
    monkeypatch.setattr(
        type(agent["encoder"]), "forward", lambda self, a, *rest: encoded.append(a) or forward(self, a, *rest)
    )
    tasks = env.unwrapped.task_set("train")[:3]
    trial = script.run_trial(env, tasks, 0, agent, args, test=False)
    taken, sampled = (torch.cat([getattr(episode, name) for episode in trial]) for name in ("action", "sample"))
    torch.testing.assert_close(taken, sampled.tanh() if squash == "sample" else sampled)
    np.testing.assert_array_equal(np.stack(env.actions), taken)
    torch.testing.assert_close(torch.cat(encoded), taken)
    for episode in trial:
        assert episode.obs[:, :, -1].tolist() == [[0.0] * 3] * 5 + [[1.0] * 3], "the done flag"


@SCRIPTS
def test_rewards_are_scaled_with_the_discount(script, monkeypatch, tmp_path):
    calls = spy(monkeypatch, script, "scale_rewards")
    flags = dict(normalise_reward=True) if "normalise_reward" in vars(script.Args()) else {}
    train(script, **FLAGS, **SMALL[script], **flags, gamma=0.37, run_dir=str(tmp_path))
    assert len(calls) == 4 and all(args[2] == 0.37 for args, _ in calls)


@pytest.mark.parametrize("script", [milet, varibad], ids=lambda script: script.__name__)
def test_number_and_size_of_elbo_updates(script, monkeypatch, tmp_path):
    calls = spy(monkeypatch, script, "vae_update")
    train(script, **FLAGS, **SMALL[script], vae_updates=2, run_dir=str(tmp_path))
    assert len(calls) == 2 * 3, "the first iteration only collects"
    assert all(len(x) == 3 for (_, _, batch, _), _ in calls for x in batch)


def test_the_second_episode_starts_where_it_was_reset(monkeypatch, tmp_path):
    """VariBAD's PPO has s'_0 at step H, not the end of the first episode (RL²'s encodes both anew: test_rl2.py)."""
    trials, updates, run_trial = [], [], varibad.run_trial
    monkeypatch.setattr(varibad, "run_trial", lambda *a, **k: trials.append(run_trial(*a, **k)) or trials[-1])
    monkeypatch.setattr(varibad, "ppo_update", lambda policy, optimizer, trial, *_: updates.append(trial) or {})
    train(varibad, **FLAGS, **SMALL[varibad], run_dir=str(tmp_path))
    assert len(updates) == 3 and len(trials) == 6  # evaluations first and last; the first iteration only collects
    for (first, second), whole in zip(trials[2:5], updates):
        assert torch.equal(whole.obs, torch.cat([first.obs[:5], second.obs]))
        assert torch.equal(whole.belief, torch.cat([first.belief[:5], second.belief]))


def test_softplus_gives_variances():
    """D10, not standard deviations."""
    args = milet.Args(num_threads=1, **SMALL[milet])
    agent, y, h = milet.make_agent(3, 2, args), torch.eye(4), torch.randn(4, 4)
    raw = agent["encoder"].task_head(torch.cat([h, y], -1)).chunk(2, -1)[1], agent["prior"].raw_var(y)
    for q, raw_var in zip((agent["encoder"].task(h, y), agent["prior"](y)), raw):
        torch.testing.assert_close(q.variance, torch.nn.functional.softplus(raw_var), atol=1e-6, rtol=1e-5)
