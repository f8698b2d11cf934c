"""RMAML's toy: closed forms, a slow second version of everything, and the paper's finding."""

import csv

import numpy as np
import pytest
import rmaml_reaching as toy
import torch
from conftest import train
from sklearn.metrics import normalized_mutual_info_score as nmi

import envs


def small_args(**kwargs) -> toy.Args:
    return toy.Args(**(dict(repeats=3, tasks=8, iterations=6, num_threads=1) | kwargs))


def read(path) -> list[dict[str, float]]:
    with path.open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The default run."""
    return train(toy, run_dir=str(tmp_path_factory.mktemp("toy")), eval_every=50)


def test_the_points_are_two_hundred_useful_ones_and_twice_fifty_of_noise():
    env = envs.ENVIRONMENTS["reaching-2d"]()
    tasks, test = env.task_set("train")[: toy.POINTS], env.task_set("test")
    assert len(tasks) == 300 and np.bincount(tasks.cluster).tolist() == [200, 50, 50] and (test.cluster == 0).all()
    for m, centre in enumerate([(0, 0), (8, 0), (8, 4)]):
        mine = tasks.params[tasks.cluster == m]
        np.testing.assert_allclose(mine.mean(0), centre, atol=4 / np.sqrt(len(mine)))
        np.testing.assert_allclose(mine.std(0), 1, atol=0.3)
    assert nmi(env.nearest_cluster(tasks.params), tasks.cluster) > 0.85


def test_the_environment_pays_minus_the_distance():
    env = envs.ENVIRONMENTS["reaching-2d"](num_envs=2)
    tasks = envs.Tasks(np.array([[3.0, 4.0], [8.0, 1.0]]), np.array([0, 1]))
    env.reset(seed=0, options={"tasks": tasks})
    _, reward, terminated, truncated, _ = env.step(np.array([[0.0, 0.0], [0.8, -0.2]]))
    assert reward.tolist() == pytest.approx([-5, -3]) and truncated.all() and not terminated.any()
    env.reset(seed=0, options={"tasks": tasks})
    points = torch.from_numpy(tasks.params)
    theta = torch.tensor([[0.0, 0.0], [8.0, -2.0]], dtype=torch.float64)
    assert toy.returns_of(theta, points[:, None]).flatten().tolist() == pytest.approx(reward.tolist())


def test_the_update_is_a_gradient_step_on_half_the_mean_squared_distance():
    theta, goals = torch.randn(4, 3, 2, dtype=torch.float64), torch.randn(4, 3, 7, 2, dtype=torch.float64)
    leaf = theta.clone().requires_grad_()
    loss = ((leaf[:, :, None] - goals) ** 2).sum(-1).mean(-1) / 2
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    torch.testing.assert_close(toy.update(theta, goals, 0.3), theta - 0.3 * gradient)


def test_with_all_points_in_every_batch_the_way_is_known(tmp_path):
    """θ_k = mean + (1 - β)^k (θ_0 - mean), whoever."""
    run = train(toy, run_dir=str(tmp_path), tasks=300, repeats=2, iterations=7, eval_every=1, max_share=0.0, beta=0.2)
    mean = envs.ENVIRONMENTS["reaching-2d"]().task_set("train").params[:300].mean(0)
    for k, row in enumerate(read(run / "eval.csv")):
        x, y = mean + 0.8**k * (np.array([8.0, 2.0]) - mean)
        for strategy in toy.STRATEGIES:
            assert (row[f"eval/x_{strategy}"], row[f"eval/y_{strategy}"]) == pytest.approx((x, y), rel=1e-4)


def test_a_replayed_task_may_be_drawn_again_a_fresh_one_not():
    """D4: 8 of 300 points are replayed, and 292 drawn of all: some stand in the batch twice."""
    args = small_args(repeats=1, tasks=300, max_share=8 / 300, iterations=2)
    buffer = toy.make_buffer(args)
    buffer["tasks"].copy_(torch.arange(300).expand(4, 1, -1))
    buffer["returns"].copy_(-torch.arange(300.0).expand(4, 1, -1))
    batches = toy.meta_batch(buffer, 2, torch.Generator().manual_seed(0), args)[:, 0].tolist()
    kept = dict(easy=range(8), medium=range(146, 154), hard=range(292, 300))
    for strategy, batch in zip(toy.STRATEGIES[1:], batches[1:]):
        assert batch[:8] == [*kept[strategy]] and len({*batch[8:]}) == 292 and batch[8:] == batches[0][:292]
        assert len({*batch}) < 300, "some stand in it twice"
    assert sorted(batches[0]) == [*range(300)]


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_training_against_one_agent_at_a_time(monkeypatch, tmp_path, share):
    """With the recorded draws; ranks, replays, positions, scores by lists and loops."""
    draws, rand = [], torch.rand
    monkeypatch.setattr(torch, "rand", lambda *a, **k: draws.append(rand(*a, **k)) or draws[-1])
    args = small_args(max_share=share, run_dir=str(tmp_path), eval_every=6)
    run = toy.Run(args)
    toy.train(args, run)
    env = envs.ENVIRONMENTS["reaching-2d"]()
    tasks, test_tasks = env.task_set("train")[:300], env.task_set("test")
    counts = [round(share * 8 * k / 5) for k in range(6)]
    row, metrics = read(run.path / "eval.csv")[-1], read(run.path / "metrics.csv")
    distances, positions, noise, returns = {}, {}, {}, {}
    for strategy in toy.STRATEGIES:
        for repeat in range(3):
            theta, old = np.array([8.0, 2.0]), None
            for k, draw in enumerate(draws):
                count = 0 if strategy == "uniform" else counts[k]
                batch = draw[repeat].argsort().tolist()[: 8 - count]
                if count > 0:
                    nearest = sorted(old, key=lambda i: np.linalg.norm(tasks.params[i] - theta))
                    first = dict(easy=0, medium=(8 - count) // 2, hard=8 - count)[strategy]
                    batch = nearest[first : first + count] + batch
                theta, old = theta + 0.1 * (np.mean([tasks.params[i] for i in batch], axis=0) - theta), batch
            distances.setdefault(strategy, []).append(np.linalg.norm(theta))
            positions.setdefault(strategy, []).append(theta)
            noise.setdefault(strategy, []).append(np.mean([tasks.cluster[i] > 0 for i in batch]))
            returns.setdefault(strategy, []).append(-np.mean([np.linalg.norm(tasks.params[i] - theta) for i in batch]))
        assert row[f"eval/distance_{strategy}"] == pytest.approx(np.mean(distances[strategy]), rel=1e-5)
        xy = row[f"eval/x_{strategy}"], row[f"eval/y_{strategy}"]
        assert xy == pytest.approx(positions[strategy][0].tolist(), rel=1e-4)
        ways = [np.linalg.norm(test_tasks.params - p, axis=1).mean() for p in positions[strategy]]
        assert row[f"eval/return_{strategy}"] == pytest.approx(-np.mean(ways), rel=1e-5)
        assert metrics[-1][f"train/return_{strategy}"] == pytest.approx(np.mean(returns[strategy]), rel=1e-5)
        assert metrics[-1][f"reaching/noise_{strategy}"] == pytest.approx(np.mean(noise[strategy]), abs=1e-5)
    assert [m["reaching/replayed"] for m in metrics] == counts and len(draws) == 6
    assert [m["charts/frames"] for m in metrics] == [8 * k for k in range(1, 7)]
    assert len({tuple(np.round(p[0], 6)) for p in positions.values()}) == 4, "a case in which they differ"
    saved = np.load(run.path / "eval.npz")["theta"]
    np.testing.assert_allclose(saved, [positions[s] for s in toy.STRATEGIES])


def test_the_paper_s_finding(finished):
    """Medium gets to the useful points, easy part of the way, uniform to the mean, hard to the noise (Fig. 3)."""
    start, _, end = read(finished / "eval.csv")
    distance = {s: end[f"eval/distance_{s}"] for s in toy.STRATEGIES}
    assert all(start[f"eval/distance_{s}"] == pytest.approx(np.hypot(8, 2), rel=1e-4) for s in toy.STRATEGIES)
    assert end["eval/return_medium"] == max(end[f"eval/return_{s}"] for s in toy.STRATEGIES)
    assert distance["medium"] < 0.5 < distance["easy"] < distance["uniform"] < 3 < distance["hard"]
    noise = {s: read(finished / "metrics.csv")[-1][f"reaching/noise_{s}"] for s in toy.STRATEGIES}
    assert noise["medium"] < 0.1 < 0.25 < noise["uniform"] < 0.45 < noise["hard"]


def test_the_state_is_all_there_is(finished, tmp_path):
    """A run cut after a checkpoint and resumed ends the same: θ, B and the random numbers are saved."""
    flags = dict(run_dir=str(tmp_path), eval_every=50, preset="paper", num_threads=1, save_every=20)
    args = toy.Args(**flags)
    run = toy.Run(args)
    log, stop = run.log, KeyboardInterrupt

    def until_30(metrics):
        log(metrics)
        if run.iteration == 30:
            raise stop

    run.log = until_30
    with pytest.raises(stop):
        toy.train(args, run)
    again = toy.Args(**(flags | dict(resume=str(run.path))))
    toy.train(again, toy.Run(again))
    assert (run.path / "eval.csv").read_text() == (finished / "eval.csv").read_text()


RULES = [
    ("--env point-goal-4c", "--env must be reaching-2d, not point-goal-4c"),
    ("--horizon 2", "--horizon must be 1"),
    ("--tasks 301", "--tasks must be at most 300, which are all"),
    ("--beta 0", "--beta must be in (0, 1]"),
    ("--beta 1.1", "--beta must be in (0, 1]"),
    ("--max-share 1.1", "--max-share must be in [0, 1]"),
    ("--max-share -1", "--max-share must be in [0, 1]"),
]


@pytest.mark.parametrize("flags, message", RULES)
def test_what_must_hold(flags, message):
    with pytest.raises(SystemExit) as caught:
        toy.parse_args(flags.split())
    assert str(caught.value) == f"rmaml_reaching.py: error: {message}"


def test_every_rule_has_a_case():
    assert len(toy.check(toy.Args(), toy.Reaching)) == len({message for _, message in RULES})
    assert toy.parse_args([]) == toy.Args(preset="paper")
    toy.parse_args("--tasks 300 --beta 1 --max-share 0 --repeats 1".split())
