"""Every algorithm reaches the known answer of a tiny environment, in seconds."""

import csv
from pathlib import Path

import maml
import milet
import pearl
import probes  # noqa: F401  (registers them)
import promp
import pytest
import rl2
import varibad
from conftest import train


def first_and_last(run: Path) -> tuple[dict[str, float], dict[str, float]]:
    with (run / "eval.csv").open() as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    return rows[0], rows[-1]


def test_milet_recovers_the_clusters_and_adapts(tmp_path):
    """Two clusters that only the reward tells apart: NMI 1, and a second episode near the oracle's 0 (no task: -10)."""
    run = train(
        milet, env="probe-guess-sign", run_dir=str(tmp_path), frames=60_000, clusters=2, eval_every=50, horizon=10,
        save_every=1000, lr_vae=3e-3, vae_updates=2, elbo_terms=20, lr_phi=3e-3, lr_psi=3e-3,
        clip=0.2, minibatches=2, kl_z_weight=1e-3,
    )  # fmt: skip
    first, last = first_and_last(run)
    assert last["eval/nmi"] > 0.9
    assert last["eval/return_episode_2"] > -3 > first["eval/return_episode_2"]


@pytest.mark.parametrize("script, rates", [(varibad, dict(lr_vae=3e-3)), (rl2, dict(lr_encoder=3e-3))])
def test_belief_and_memory_solve_the_second_episode(tmp_path, script, rates):
    """As MILET's, for one policy and one belief, or memory."""
    run = train(
        script, env="probe-guess-sign", run_dir=str(tmp_path), frames=64_000, horizon=10, eval_every=50, num_envs=32,
        hidden=16, clip=0.2, minibatches=2, lr_policy=3e-3, entropy=1e-4, save_every=1000, **rates,
    )  # fmt: skip
    first, last = first_and_last(run)
    assert last["eval/return_episode_2"] > -3 > first["eval/return_episode_2"]


@pytest.mark.parametrize("script, step", [(maml, {}), (promp, dict(lr=1e-2))])  # rmaml: test_rmaml.py
def test_bandit_is_solved_after_one_gradient_step(tmp_path, script, step):
    """One action, goals -1 and +1: without the task 0 is best, which pays -1 - σ² and more; who knows it gets 0."""
    run = train(
        script, env="probe-guess-sign", run_dir=str(tmp_path), horizon=1, action_scale=1.0, tasks=20, iterations=100,
        eval_every=50, hidden=(16,), **step,
    )  # fmt: skip
    first, last = first_and_last(run)
    assert first["eval/return_step_1"] < -0.9
    assert last["eval/return_step_1"] > -0.1 and last["eval/return_step_0"] < -0.9


def test_pearl_infers_the_goal_from_one_episode(tmp_path):
    """Without the task the best return is -10; after an episode with its rewards, who infers the goal gets 0."""
    run = train(
        pearl, env="probe-guess-sign", run_dir=str(tmp_path), horizon=10, train_tasks=20, initial_steps=20, visits=10,
        prior_steps=20, extra_steps=20, gradient_steps=100, iterations=30, eval_every=30, batch=32, hidden=(32, 32),
        encoder_hidden=(32,), context=10, meta_batch=8, lr=3e-3, gamma=0.5,
    )  # fmt: skip
    first, last = first_and_last(run)
    assert first["eval/return_episode_2"] < -8
    assert last["eval/return_episode_2"] > -3 > last["eval/return_episode_1"]
