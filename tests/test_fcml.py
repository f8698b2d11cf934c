"""FCML: one slot is MAML, several are CML; when a cluster is founded, by which task, how its parameters are tuned."""

import csv
from functools import cache
from itertools import pairwise
from pathlib import Path

import cml
import fcml
import gymnasium as gym
import maml
import numpy as np
import probes  # noqa: F401  (registers them)
import pytest
import torch
from conftest import train
from sklearn.metrics import normalized_mutual_info_score

import envs

QUICK = dict(env="point-goal-4c", tasks=8, rollouts=2, horizon=5, iterations=3, hidden=(4,), eval_every=1)
GROWS = dict(warmup=1, epsilon=0.0, tune_steps=4)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def column(run: Path, name: str) -> list[float]:
    return [float(row[name]) for row in rows(run / "metrics.csv")]


def saved_theta(run: Path) -> torch.Tensor:
    return torch.load(run / "checkpoint.pt", weights_only=True)["agent"]["theta"]


def make(**kwargs):
    args = fcml.Args(**(dict(rollouts=3, horizon=4, num_threads=1, hidden=(4,)) | kwargs))
    policy = fcml.GaussianPolicy(2, 2, args)
    theta = policy.init(torch.Generator().manual_seed(0))[None]
    env_of = cache(lambda tasks: gym.make_vec("point-goal-4c", num_envs=tasks * args.rollouts, horizon=args.horizon))
    tasks = env_of(1).unwrapped.sample_tasks(5, np.random.default_rng(0))
    return args, env_of, tasks, policy, theta


# -- what it has in common with MAML and CML ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more, shared",
    [
        (dict(max_learners=1), {}),
        (dict(max_learners=1), dict(inner_steps=2, eval_steps=3)),
        (dict(max_learners=1), dict(inner_steps=0)),
        (dict(warmup=3), {}),
        (dict(GROWS, epsilon=1e9), {}),
    ],
)
def test_as_long_as_nothing_is_founded_it_is_maml_to_the_last_digit(tmp_path, more, shared):
    """The last case looks for a founder in two of three iterations, so only the first one can be compared."""
    runs = [train(maml, **QUICK, run_dir=str(tmp_path / "maml"), **shared)]
    runs += [train(fcml, **QUICK, run_dir=str(tmp_path / "fcml"), **more, **shared)]
    until = 2 if "epsilon" in more else 4
    for name in ("eval.csv", "metrics.csv"):
        mamls, ours = ([r for r in rows(run / name) if int(r["iteration"]) < until] for run in runs)
        shared = [key for key in mamls[0] if not key.startswith(("time/", "charts/sps"))]
        assert [[row[key] for key in shared] for row in mamls] == [[row[key] for key in shared] for row in ours]
    if until == 4:
        assert torch.equal(saved_theta(runs[0])[0], saved_theta(runs[1])[0])
        assert not saved_theta(runs[1])[1:].any(), "empty slots are zeros"
    else:
        frames = column(runs[1], "charts/frames")
        assert frames == [160, 400, 640], "two samples of 8 x 2 x 5 steps, then a third one for the further step"


def test_the_inner_loss_is_mamls():
    args, env_of, tasks, policy, theta = make()
    (batch,) = fcml.collect(env_of(5), tasks, policy, theta.expand(5, -1), [], torch.Generator().manual_seed(0), args)
    point = theta + 0.1 * torch.randn(5, theta.shape[1])
    ours, mamls = (script.inner_loss(policy, point, batch, maml.Args()) for script in (fcml, maml))
    assert torch.equal(ours, mamls) and ours.shape == (5,)


def test_with_as_many_learners_it_samples_and_evaluates_as_cml():
    """Three of four slots are in use."""
    args, env_of, tasks, policy, _ = make(**QUICK)
    theta = torch.stack([policy.init(torch.Generator().manual_seed(j)) for j in range(3)])
    rngs, cmls_args = [torch.Generator().manual_seed(5) for _ in range(2)], cml.Args(**QUICK, learners=3)
    ours = fcml.collect_all(env_of, tasks, policy, theta, [0.1], rngs[0], args)
    cmls = cml.collect_all(env_of(15), tasks, policy, theta, [0.1], rngs[1], cmls_args)
    for a, b in zip(ours, cmls):
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    slots = torch.cat([theta, torch.zeros(1, theta.shape[1])])
    found, arrays = fcml.evaluate(env_of, tasks, policy, slots, args)
    expected, _ = cml.evaluate(env_of(15), tasks, policy, theta, cmls_args)
    assert expected == {key: found[key] for key in expected} and found["eval/learners"] == 3
    assert found["eval/tasks_3"] == 0 and arrays["learner_returns"].shape == (3, 5)


# -- when a cluster is founded -----------------------------------------------------------------------------------------


def test_relative_improvement_by_hand():
    args = fcml.Args(least_return=10.0)
    after, before = np.array([30.0, -30, 5, -4, 90]), np.array([20.0, -40, 0, -5, 100])
    np.testing.assert_allclose(fcml.gain(after, before, args), [0.5, 0.25, 0.5, 0.1, -0.1])


@pytest.fixture
def seen(monkeypatch):
    """What collect, tune and trpo_step were called with and gave, in order; of sample, the parameters and the batch."""
    calls = dict(collect=[], sample=[], tune=[], trpo_step=[])

    def watch(name):
        function = getattr(fcml, name)

        def call(*a):
            a = [x.clone() if isinstance(x, torch.Tensor) else x for x in a]
            result = function(*a)
            calls[name].append((a, result, len(calls["collect"]), len(calls["sample"])))
            return result

        monkeypatch.setattr(fcml, name, call)

    [*map(watch, calls)]
    return calls


def means(batch) -> np.ndarray:
    return batch.reward.double().sum(-1).mean(1).numpy()


def further(policy, theta, data, args) -> list[torch.Tensor]:
    """θ' and θ''."""
    for batch in data[:-1]:
        theta = fcml.adapt(policy, theta, batch, args.alpha, args)
    return [theta, fcml.adapt(policy, theta, data[-1], args.alpha, args)]


CASES = [(1, 4, 1, True), (1, 1, 1, False), (1, 6, -1, False), (2, 11, 1, True), (2, 4, 1, False)]


@pytest.mark.parametrize("inner_steps, seed, sign, founded", CASES)
def test_the_task_with_the_largest_improvement_founds_the_cluster_and_leaves_its_own(
    seen, tmp_path, inner_steps, seed, sign, founded
):
    """Everything that the second iteration computes, again by hand: confirmed, above 0 but not ε, or below 0."""
    flags = QUICK | dict(iterations=2, eval_every=2) | GROWS | dict(epsilon=0.006, least_return=1.0)
    run = train(fcml, **flags, run_dir=str(tmp_path), inner_steps=inner_steps, seed=seed)
    first = 3  # two of the evaluation, one of the first iteration
    (_, tasks, policy, theta, _, _, args), data, _, samples = seen["collect"][first]
    (_, _, _, theta_2, _, _), last, *_ = seen["sample"][samples]
    adapted, expected = further(policy, theta, data, args)
    assert torch.equal(theta_2, expected) and torch.equal(last.mean, policy(theta_2, last.obs)[0])
    g = (means(last) - means(data[-1])) / np.maximum(np.abs(means(data[-1])), 1)
    founder = g.argmax()
    assert 0 < (g > args.epsilon).sum() < (g > 0).sum()

    ((args_of_tune, (new, again, returns, frames), *_),) = seen["tune"]
    assert torch.equal(args_of_tune[3], torch.stack([adapted[founder], expected[founder]]))
    (_, both_tasks, _, pair, alphas, _, _), (both,), *_ = seen["collect"][first + 1]
    np.testing.assert_array_equal(both_tasks.params, tasks.params[[founder, founder]])
    assert torch.equal(pair, args_of_tune[3]) and alphas == []
    before, after = means(both)
    assert again == pytest.approx((after - before) / max(abs(before), 1)) and returns[0] == pytest.approx(after)
    assert (again > args.epsilon, np.sign(again)) == (founded, sign)

    theta_1, *others = saved_theta(run)
    own = np.arange(8) != (founder if founded else -1)
    mine = seen["trpo_step"][1][0][2]
    assert len(seen["trpo_step"]) == 2 and all(torch.equal(a.obs, b.obs[own]) for a, b in zip(mine, data))
    assert torch.equal(theta_1, seen["trpo_step"][1][1][0])
    assert not torch.stack(others[founded:]).any() and (not founded or torch.equal(others[0], new))

    cluster = int(tasks.cluster[founder]) if founded else -1
    assert column(run, "fcml/learners") == [1, 1 + founded] and column(run, "fcml/founder_cluster") == [-1, cluster]
    assert len(returns) == 1 or founded
    assert column(run, "fcml/tuned") == [0, len(returns)] and column(run, "fcml/skipped") == [0, 0]
    sampled = 80 * (inner_steps + 1)
    assert column(run, "charts/frames") == [sampled, 2 * sampled + 80 + frames]
    assert frames == 10 * (1 + len(returns)), "θ' once, θ'' and what is tuned"
    for name, value in (("gain", g.mean()), ("gain_max", g.max()), ("gain_confirmed", again)):
        assert column(run, f"fcml/{name}") == pytest.approx([0, value], rel=1e-4)
    assert column(run, "fcml/candidates") == [0, (g > args.epsilon).mean()]
    assert [float(row["eval/learners"]) for row in rows(run / "eval.csv")] == [1, 1 + founded]


@pytest.fixture
def always(monkeypatch):
    """Whatever a further step does counts as an improvement."""
    gain = fcml.gain
    monkeypatch.setattr(fcml, "gain", lambda *a: np.abs(gain(*a)))


@pytest.mark.parametrize("inner_steps", [1, 2])
def test_the_further_step_goes_on_from_the_learner_of_each_task(seen, always, tmp_path, inner_steps):
    """In the third iteration, when there are two learners, each of which wins a task."""
    flags = dict(QUICK, eval_every=3, tasks=12, inner_steps=inner_steps) | GROWS
    run = train(fcml, **flags, run_dir=str(tmp_path))
    (_, tasks, policy, theta, _, _, args), data, _, samples = seen["collect"][seen["tune"][0][2]]
    (_, _, _, theta_2, *_), last, *_ = seen["sample"][samples]
    score = means(data[-1]).reshape(2, 12)
    learner = score.argmax(0)
    rows_of_learner = np.array([12 * j + i for i, j in enumerate(learner)])
    chosen = [batch.of(rows_of_learner) for batch in data]
    _, expected = further(policy, theta[rows_of_learner], chosen, args)
    assert torch.equal(theta_2, expected) and len(np.unique(learner)) == 2
    g = np.abs(means(last) - score.max(0)) / np.maximum(np.abs(score.max(0)), 10)
    assert g[learner == 1].min() > 0
    g = g * (learner == 0)  # the other is of the iteration before, too young for its tasks to found
    row = {key: float(value) for key, value in rows(run / "metrics.csv")[2].items()}
    assert row["fcml/gain"] == pytest.approx(g.mean(), rel=1e-4)

    assert [row[f"fcml/tasks_{j}"] for j in range(4)] == np.bincount(learner, minlength=4).tolist()
    cluster = tasks.cluster[:12]
    assert row["fcml/nmi"] == pytest.approx(normalized_mutual_info_score(cluster, learner), rel=1e-4)
    assert row["fcml/margin"] == pytest.approx(np.abs(score[0] - score[1]).mean(), rel=1e-4)
    for k, batch in enumerate(chosen):
        assert row[f"train/return_step_{k}"] == pytest.approx(means(batch).mean(), rel=1e-4)
    std = policy.log_std(saved_theta(run)[:2]).exp()
    assert row["policy/std"] == pytest.approx(std.mean().item(), rel=1e-5)


def test_slots_fill_one_at_a_time_and_no_more(always, tmp_path):
    """With the rule met in every iteration; a run that is resumed goes on as one that was not."""
    flags = dict(QUICK, eval_every=4, save_every=2, max_learners=3, **GROWS)
    whole = train(fcml, **(flags | dict(iterations=5)), run_dir=str(tmp_path / "whole"))
    assert column(whole, "fcml/learners") == [1, 2, 3, 3, 3]
    frames = np.diff(column(whole, "charts/frames"))
    assert frames[2:].tolist() == [3 * 160] * 2, "nothing is tried when the slots are full"
    assert (saved_theta(whole) != 0).any(1).all() and saved_theta(whole).shape[0] == 3
    assert torch.equal(fcml.in_use(saved_theta(whole)), saved_theta(whole))
    half = train(fcml, **(flags | dict(iterations=2)), run_dir=str(tmp_path / "half"))
    assert (saved_theta(half) != 0).any(1).tolist() == [True, True, False]
    assert torch.equal(fcml.in_use(saved_theta(half)), saved_theta(half)[:2])
    args = fcml.parse_args(["--resume", str(half), "--iterations", "5"])
    fcml.train(args, fcml.Run(args))
    assert torch.equal(saved_theta(half), saved_theta(whole))
    assert (half / "eval.csv").read_text().splitlines()[-1] == (whole / "eval.csv").read_text().splitlines()[-1]


# -- tuning ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "before, returns, steps, count",
    [
        (50, [100.0] * 40, 20, 10),  # five and five
        (50, [100.0 * 1.01**k for k in range(40)], 20, 21),  # never settles: as many as there may be
        (-100, [0.0] * 3 + [100.0] * 40, 20, 13),  # the three are out of the last ten
        (50, [100.0] * 5 + [100.9] * 40, 20, 10),
        (50, [100.0] * 5 + [101.1] * 40, 20, 11),  # 1.1 % better than the five before, then 0.9 %
        (-200, [-100.0 + k for k in range(40)], 3, 4),
        (100, [119.0] * 40, 20, 1),  # a fifth better or more founds a cluster, this does not
        (100, [121.0] * 40, 20, 10),
        (100, [50.0] * 40, 20, 1),
    ],
)
def test_tuning_ends_when_returns_settle_or_the_steps_are_used_up(monkeypatch, before, returns, steps, count):
    args, env_of, tasks, policy, theta = make(tune_steps=steps)
    given, sampled, collect = iter(returns), [], fcml.collect

    def fake(*a):
        (batch,) = collect(*a)
        values = torch.tensor([before, next(given)][-len(batch.reward) :]) / args.horizon
        batch = batch._replace(reward=values[:, None, None].expand_as(batch.reward))
        sampled.append((a[3][-1:], batch.of([-1])))
        return [batch]

    monkeypatch.setattr(fcml, "collect", fake)
    pair = torch.cat([theta, 1.1 * theta])
    rng = torch.Generator().manual_seed(0)
    new, g, found, frames = fcml.tune(env_of, tasks[[1]], policy, pair, rng, args)
    assert g == pytest.approx((returns[0] - before) / abs(before))
    assert found == pytest.approx(returns[:count]) and frames == (1 + count) * 3 * 4
    assert torch.equal(sampled[0][0], pair[1:])
    for (theta_k, batch), (after, _) in pairwise(sampled):
        assert torch.equal(after, fcml.adapt(policy, theta_k, batch, args.alpha, args))
    assert torch.equal(new, sampled[-1][0][0]), "what the last return was measured with"


def test_tuning_learns_its_task():
    args, env_of, tasks, policy, theta = make(horizon=20, rollouts=20, alpha=0.2, tune_steps=30, epsilon=-1.0)
    rng = torch.Generator().manual_seed(0)
    new, _, returns, _ = fcml.tune(env_of, tasks[[2]], policy, theta.expand(2, -1), rng, args)
    assert returns[-1] > returns[0] + 10 and new.shape == theta[0].shape


# -- a known answer ----------------------------------------------------------------------------------------------------


def test_it_founds_a_cluster_for_each_of_two_goals_and_then_stops(tmp_path):
    """A step of 0.02 from between the goals helps and is not enough; who stands at a goal has nothing to gain."""
    run = train(
        fcml, env="probe-guess-sign", run_dir=str(tmp_path), horizon=1, action_scale=1.0, tasks=10, iterations=12,
        eval_every=12, hidden=(4,), alpha=0.02, delta=0.05, warmup=2, least_return=0.5,
    )  # fmt: skip
    first, last = ({k: float(v) for k, v in row.items()} for row in rows(run / "eval.csv"))
    assert first["eval/learners"] == 1 and last["eval/learners"] == 3 < fcml.Args().max_learners
    assert last["eval/nmi"] == 1 and last["eval/tasks_1"] == last["eval/tasks_2"] == 16
    assert first["eval/return_step_1"] < -1 and last["eval/return_step_0"] > -0.1
    founders = [int(cluster) for cluster in column(run, "fcml/founder_cluster") if cluster >= 0]
    assert sorted(founders) == [0, 1]
    args = fcml.Args(hidden=(4,))
    policy, slots = fcml.GaussianPolicy(1, 1, args), fcml.in_use(saved_theta(run))
    stands = policy(slots, torch.zeros(3, 1, 1))[0].flatten().clamp(-1, 1).tolist()
    assert stands[1:] == pytest.approx([2 * cluster - 1 for cluster in founders], abs=0.1), (
        "at the goals of the founders"
    )
    assert abs(stands[0]) < 0.9, "the first between them"


# -- command line ------------------------------------------------------------------------------------------------------

RULES = [
    ("--env point-goal-4c --tasks 3", "--tasks must be at least 4, for every cluster and a founder"),
    ("--env cheetah-vel --tasks 1", "--tasks must be at least 2, for every cluster and a founder"),
    ("--warmup 10 --iterations 10", "--warmup must be shorter than --iterations"),
    ("--epsilon -0.1", "--epsilon must be at least 0, --least-return positive"),
    ("--least-return 0", "--epsilon must be at least 0, --least-return positive"),
    ("--env cheetah-dir --mask-pad-actions", "--mask-pad-actions is for environments of several robots"),
    ("--alpha 0", "--alpha, --action-scale and --delta must be positive"),
    ("--kl-slack -1", "--damping and --kl-slack must be at least 0"),
    ("--gamma 2", "--gamma and --gae-lambda must be in [0, 1]"),
    ("--max-learners 0", "--max-learners must be from 1 to 2^31"),
    ("--tune-steps 0", "--tune-steps must be from 1 to 2^31"),
]


@pytest.mark.parametrize("flags, message", RULES)
def test_what_must_hold(flags, message):
    with pytest.raises(SystemExit) as caught:
        fcml.parse_args(flags.split())
    assert str(caught.value) == f"fcml.py: error: {message}"


def test_every_rule_has_a_case_and_what_it_allows_passes():
    rules = {message.replace("least 2", "least 4") for _, message in RULES if not message.endswith("2^31")}
    assert len(rules) == len(fcml.check(fcml.Args(), envs.ENVIRONMENTS["cheetah-dir"]))
    fcml.parse_args("--warmup 0 --epsilon 0 --tasks 2 --mask-pad-actions".split())
    fcml.parse_args("--iterations 1 --max-learners 1".split())


def test_the_defaults():
    assert fcml.parse_args([]) == fcml.Args(preset="paper")
    a = fcml.Args()
    assert (a.env, a.max_learners, a.epsilon, a.least_return, a.warmup) == ("ant-cheetah-dir", 4, 0.2, 10, 25)
    assert (a.tune_steps, a.tasks, a.rollouts, a.inner_steps, a.alpha) == (50, 40, 20, 1, 0.1)


# -- every flag, every task, every step --------------------------------------------------------------------------------


def test_a_resumed_run_remembers_how_old_its_learners_are(always, tmp_path):
    """In the third iteration the tasks of the learner that the second one founded gain, but may not found."""
    flags = dict(QUICK, eval_every=4, save_every=2, tasks=12) | GROWS
    whole = train(fcml, **(flags | dict(iterations=3)), run_dir=str(tmp_path / "whole"))
    half = train(fcml, **(flags | dict(iterations=2)), run_dir=str(tmp_path / "half"))
    args = fcml.parse_args(["--resume", str(half), "--iterations", "3"])
    fcml.train(args, fcml.Run(args))
    assert column(whole, "fcml/gain") == column(half, "fcml/gain")
    born = torch.load(half / "checkpoint.pt", weights_only=True)["agent"]["born"]
    assert born.tolist() == [0, 2, 3, 0]


def test_evaluation_takes_as_many_steps_as_training_and_at_least_one(monkeypatch):
    asked, collect_all = [], fcml.collect_all
    monkeypatch.setattr(fcml, "collect_all", lambda *a: asked.append(a[4]) or collect_all(*a))
    for steps in (dict(inner_steps=0), dict(inner_steps=2), dict(inner_steps=2, eval_steps=3)):
        args, env_of, tasks, policy, theta = make(**steps)
        fcml.evaluate(env_of, tasks, policy, theta, args)
    assert asked[::2] == asked[1::2] == [[0.1], [0.1, 0.1], [0.1, 0.1, 0.05]]
