"""What milet.py, varibad.py and rl2.py do with tasks, trials and rewards around their updates."""

import csv
from dataclasses import replace
from itertools import chain

import gymnasium as gym
import milet
import numpy as np
import pytest
import rl2
import torch
import varibad
from conftest import spy_on, train

import envs

SMALL = {
    milet: dict(hidden=4, embed=(3, 2, 2), policy_hidden=(4,), reward_decoder=(4,), elbo_terms=2, vae_batch=3),
    varibad: dict(hidden=4, embed=(3, 2, 2), policy_hidden=(4,), reward_decoder=(4,), vae_batch=3),
    rl2: dict(hidden=4, embed=(3, 2, 2), belief_dim=4, policy_hidden=(4,)),
}
SCRIPTS = pytest.mark.parametrize("script", SMALL, ids=lambda script: script.__name__)
FLAGS = dict(env="point-goal-4c", horizon=5, num_envs=6, frames=240, eval_every=9, minibatches=2)  # 4 iterations


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make_agent(script, args, env):
    """Of states with the done flag; the oracle's policy needs to know how many parameters a task has."""
    dims = env.single_observation_space.shape[0] + 1, env.single_action_space.shape[0], env.unwrapped.task_dim
    return script.make_agent(*dims[: 3 if script is varibad else 2], args)


def policies(agent) -> list:
    """That of the first and that of the second episode."""
    return [agent["psi"], agent["phi"]] if "psi" in agent else [agent["policy"]] * 2


@SCRIPTS
def test_training_and_evaluation_have_their_own_tasks(script, monkeypatch, tmp_path):
    calls = spy_on(monkeypatch, script, "run_trial")
    train(script, **FLAGS, **SMALL[script], run_dir=str(tmp_path))
    training, evaluations = ([tasks for (_, tasks, *_), _ in calls if len(tasks) == n] for n in (6, 32))
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
@pytest.mark.parametrize("squash", ["none", "mean", "sample"])
def test_the_environment_and_the_encoder_get_the_squashed_action(script, squash, monkeypatch):
    args = script.Args(squash=squash, init_std=2.0, num_threads=1, **SMALL[script], horizon=5)
    env = Recorder(gym.make_vec("point-goal-4c", num_envs=3, horizon=5))
    agent = make_agent(script, args, env)
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
@pytest.mark.parametrize("test", [False, True])
def test_actions_are_those_of_the_policy_at_its_state_and_belief(script, test, monkeypatch):
    """With its standard deviation; at a test its means."""
    args, drawn, randn = script.Args(init_std=0.4, num_threads=1, **SMALL[script], horizon=5), [], torch.randn
    env = gym.make_vec("point-goal-4c", num_envs=3, horizon=5)
    agent = make_agent(script, args, env)
    monkeypatch.setattr(torch, "randn", lambda *shape: drawn.append(randn(*shape)) or drawn[-1])
    trial = script.run_trial(env, env.unwrapped.task_set("train")[:3], 0, agent, args, test)
    assert len(drawn) == (0 if test else 2)
    for episode, policy, noise in zip(trial, policies(agent), drawn or [0, 0]):
        with torch.no_grad():
            pi, _ = policy(*(episode.obs[:-1], episode.belief[:-1])[script is rl2 :])  # RL²'s memory has seen the state
        torch.testing.assert_close(episode.sample, pi.mean + 0.4 * noise)
        assert (pi.mean.diff(dim=0).abs() > 1e-4).any(2).all(), "of the step before it would be another"


@SCRIPTS
def test_every_epoch_of_ppo_splits_the_steps_anew(script, monkeypatch):
    """Each into four minibatches of different steps, which are all of them, and in no order."""
    flags = dict(minibatches=4, ppo_epochs=2, num_threads=1, horizon=10)
    args = script.Args(**SMALL[script] | flags)
    env = gym.make_vec("point-goal-4c", num_envs=4, horizon=10)
    agent = make_agent(script, args, env)
    trial = script.run_trial(env, env.unwrapped.task_set("train")[:4], 0, agent, args, test=False)
    adam = {name: torch.optim.Adam(agent[name].parameters(), 0.0) for name in agent if "stats" not in name}
    numbers, taken = torch.arange(80.0).view(20, 4), []  # every step is told by its action
    first, second = (e._replace(sample=n[..., None].expand(-1, -1, 2)) for e, n in zip(trial, numbers.split(10)))
    watch = lambda pi, x: taken.append(x[:, 0].int().tolist()) or torch.zeros(x.shape)  # noqa: E731
    monkeypatch.setattr(torch.distributions.Normal, "log_prob", watch)
    if script is rl2:
        rl2.ppo_update(agent, adam, (first, second), torch.randn(20, 4), args)
    elif script is varibad:
        whole = varibad.Episode(*(torch.cat([x[:10], y]) for x, y in zip(first, second)))
        varibad.ppo_update(agent["policy"], adam["policy"], whole, torch.randn(20, 4), args)
    else:
        milet.ppo_update(agent["phi"], adam["phi"], second, torch.randn(10, 4), 0.0, args)
    _, *minibatches = taken  # before them, the whole batch
    steps = range(40, 80) if script is milet else range(80)
    epochs = minibatches[:4], minibatches[4:]
    for epoch in epochs:
        assert [len(rows) for rows in epoch] == [len(steps) // 4] * 4 and sorted(chain(*epoch)) == [*steps]
        assert all(rows != sorted(rows) for rows in epoch)
    assert epochs[0] != epochs[1]


@SCRIPTS
def test_fewer_steps_than_minibatches_are_minibatches_of_one(script):
    """So few are left where trials diverge; the command line sees to it for whole batches."""
    args = script.Args(**SMALL[script] | dict(minibatches=50, num_threads=1, horizon=5))
    env = gym.make_vec("point-goal-4c", num_envs=4, horizon=5)
    agent = make_agent(script, args, env)
    first, second = script.run_trial(env, env.unwrapped.task_set("train")[:4], 0, agent, args, test=False)
    adam = {name: torch.optim.Adam(agent[name].parameters()) for name in agent if "stats" not in name}
    if script is rl2:
        metrics = rl2.ppo_update(agent, adam, (first, second), torch.randn(10, 4), args)
    elif script is varibad:
        whole = varibad.Episode(*(torch.cat([x[:5], y]) for x, y in zip(first, second)))
        metrics = varibad.ppo_update(agent["policy"], adam["policy"], whole, torch.randn(10, 4), args)
    else:
        metrics = milet.ppo_update(agent["phi"], adam["phi"], second, torch.randn(5, 4), 0.0, args)
    assert np.isfinite([*metrics.values()]).all()


@SCRIPTS
def test_the_fast_humanoid_has_the_ants_ppo_and_milets_frames(script):
    args, ant = (script.parse_args(["--env", env]) for env in ("humanoid-dir-4c", "ant-goal-4c"))
    own = dict(env="humanoid-dir-4c", horizon=args.horizon, frames=2_000_000, gamma=0.99)
    assert args == replace(ant, **own | ({} if script is rl2 else dict(vae_updates=3)))


@SCRIPTS
def test_a_row_has_the_frames_and_the_returns_of_its_iteration(script, monkeypatch, tmp_path):
    calls = spy_on(monkeypatch, script, "run_trial")
    bonuses = spy_on(monkeypatch, milet, "exploration_bonus")
    run = train(script, **FLAGS, **SMALL[script], run_dir=str(tmp_path))
    trials = [trial for (_, tasks, *_), trial in calls if len(tasks) == 6]  # 32 in an evaluation
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == (4 if script is rl2 else 3), "the first iteration of the others only collects"
    for row in rows:
        iteration = int(row["iteration"])
        assert int(row["charts/frames"]) == 2 * 5 * 6 * iteration
        wanted = {f"return_episode_{k}": episode.reward for k, episode in enumerate(trials[iteration - 1], start=1)}
        if script is milet:
            wanted |= dict(zip(("bonus_h", "bonus_c"), bonuses[iteration - 1][1]))
        for name, of_steps in wanted.items():
            assert float(row[f"train/{name}"]) == pytest.approx(of_steps.sum(0).mean().item(), rel=1e-4)


@SCRIPTS
def test_an_evaluation_can_be_replayed_and_keeps_what_it_says(script, monkeypatch):
    """Of its own seed; the belief's mean and standard deviation, and its mean at the end of the first episode."""
    args = script.Args(seed=3, num_threads=1, **SMALL[script], horizon=5)
    env = gym.make_vec("cheetah-dir", num_envs=40, horizon=5)
    agent, tasks = make_agent(script, args, env), env.unwrapped.task_set("test")
    calls = spy_on(monkeypatch, script, "run_trial")
    _, arrays = script.evaluate(env, tasks, agent, args)
    assert arrays["seed"] == 10**6 + 3000 and (arrays["params"] == tasks.params).all()
    obs, _ = env.reset(seed=arrays["seed"], options={"tasks": tasks})
    ((_, trial),) = calls
    for k, episode in enumerate(trial):
        np.testing.assert_array_equal(arrays["trace"][k], episode.obs[..., :2])
        np.testing.assert_array_equal(arrays["trace"][k, 0], obs[:, :2])
        for t, action in enumerate(arrays["action"][k]):
            obs, reward, *_ = env.step(action)
            np.testing.assert_allclose(reward, arrays["reward"][k, t], rtol=1e-6)
            np.testing.assert_array_equal(arrays["trace"][k, t + 1], obs[:, :2])
        if script is milet:
            mean, variance = episode.belief.chunk(2, dim=-1)
            np.testing.assert_array_equal(arrays["belief_mean"][k], mean)
            np.testing.assert_allclose(arrays["belief_std"][k], variance.sqrt())
        obs, _ = env.reset()
    embedding = trial[0].belief[-1]
    np.testing.assert_array_equal(arrays["embedding"], embedding if script is rl2 else embedding.chunk(2, -1)[0])


@SCRIPTS
def test_rewards_are_scaled_with_the_discount(script, monkeypatch, tmp_path):
    calls = spy_on(monkeypatch, script, "scale_rewards")
    flags = dict(normalise_reward=True) if "normalise_reward" in vars(script.Args()) else {}
    train(script, **FLAGS, **SMALL[script], **flags, gamma=0.37, run_dir=str(tmp_path))
    assert len(calls) == 4 and all(discount == 0.37 for (_, _, discount), _ in calls)


@pytest.mark.parametrize("script", [milet, varibad], ids=lambda script: script.__name__)
def test_number_and_size_of_elbo_updates(script, monkeypatch, tmp_path):
    calls = spy_on(monkeypatch, script, "vae_update")
    run = train(script, **FLAGS, **SMALL[script], vae_updates=2, buffer_trials=7, run_dir=str(tmp_path))
    assert len(calls) == 2 * 3, "the first iteration only collects"
    assert all(len(x) == 3 for (_, _, batch, _), _ in calls for x in batch)
    stored = torch.load(run / "checkpoint.pt", weights_only=True)["buffer"]["trials"]
    assert [len(x) for x in stored] == [7] * 3


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
