"""RMAML: the hypergradient by finite differences, the buffer by hand, and MAML where there is neither."""

import csv

import maml
import numpy as np
import probes  # noqa: F401  (registers them)
import pytest
import rmaml
import torch
from conftest import train
from test_maml import FORMS, double, make_data, make_policy, plain_adapt  # noqa: F401  (float64 throughout)

import envs

RATES = ["scalar", "layer", "parameter"]


def small_args(**kwargs) -> rmaml.Args:
    return rmaml.Args(**(dict(hidden=(5,), rollouts=3, horizon=4, damping=0.0, num_threads=1) | kwargs))


def make_case(tasks=6, **kwargs) -> tuple:
    """A policy, its θ, rates of each parameter, D_0 .. D_n and args."""
    args = small_args(**kwargs)
    policy, theta = make_policy(args)
    alpha = 0.05 + 0.3 * torch.rand_like(theta)
    return policy, theta, alpha, make_data(policy, theta, args, tasks, alpha), args


@pytest.fixture
def single():
    torch.set_default_dtype(torch.float32)


def read(path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


# -- learned step size -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, steps", [(kind, steps) for kind in FORMS for steps in (1, 2, 3)])
def test_hypergradient_against_finite_differences(kind, steps):
    """Of Σ_i S_i in each α: of all parameters, of a layer, of single parameters."""
    policy, theta, alpha, data, args = make_case(inner_loss=kind, inner_steps=steps)
    slope = rmaml.hypergradient(policy, theta, data, alpha, args)
    total = lambda a: len(data[0].obs) * rmaml.meta_objective(policy, theta, data, a, args)[0].item()  # noqa: E731
    for rates in RATES:
        rate = rmaml.group_of(policy, rates)
        for index in rate.unique()[:: 7 if rates == "parameter" else 1]:
            step = 1e-4 * (rate == index)
            expected = -(total(alpha + step) - total(alpha - step)) / 2e-4
            assert slope[rate == index].sum().item() == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("steps", [1, 2])
def test_hypergradient_against_differentiating_through_adaptation(steps):
    """More tasks than go through at a time."""
    policy, theta, alpha, data, args = make_case(tasks=2 * rmaml.CHUNK + 1, inner_steps=steps)
    leaf = alpha.clone().requires_grad_()
    adapted = plain_adapt(policy, theta.clone().requires_grad_(), data, leaf, args)
    (expected,) = torch.autograd.grad(maml.surrogate(*policy(adapted, data[-1].obs), data[-1]).sum(), leaf)
    torch.testing.assert_close(rmaml.hypergradient(policy, theta, data, alpha, args), -expected)


def test_after_one_step_it_is_the_product_of_two_policy_gradients():
    """The paper's formula, task by task."""
    policy, theta, alpha, data, args = make_case(inner_steps=1)
    total = 0.0
    for i in range(len(data[0].obs)):
        before, after = (batch.of(slice(i, i + 1)) for batch in data)
        inner = torch.func.grad(lambda p: maml.inner_loss(policy, p[None], before, args)[0])(theta)  # noqa: B023
        outer = torch.func.grad(lambda p: maml.surrogate(*policy(p[None], after.obs), after)[0])  # noqa: B023
        total = total + outer(theta - alpha * inner) @ inner
    assert rmaml.hypergradient(policy, theta, data, alpha, args).sum().item() == pytest.approx(total.item())


def test_which_parameters_share_a_rate():
    policy, theta = make_policy(small_args(hidden=(5, 4)))
    layers = [3 * 5 + 5, 5 * 4 + 4, 4 * 2 + 2, 2]
    assert rmaml.group_of(policy, "scalar").tolist() == [0] * sum(layers)
    assert rmaml.group_of(policy, "layer").tolist() == [n for n, size in enumerate(layers) for _ in range(size)]
    assert rmaml.group_of(policy, "parameter").tolist() == list(range(len(theta)))


def test_alpha_goes_up_the_hypergradient_and_stays_in_its_range():
    alpha, slope = torch.full((5,), 0.1), torch.tensor([1.0, 2.0, -4.0, 0.5, 0.25])
    step = lambda rate, alpha_0=0.01: rmaml.next_alpha(alpha, torch.tensor(rate), slope, alpha_0).tolist()  # noqa: E731
    assert step([0] * 5) == pytest.approx([0.1 - 0.0025] * 5)
    assert step([0, 0, 1, 1, 1]) == pytest.approx([0.13, 0.13, 0.0675, 0.0675, 0.0675])
    assert step([0, 1, 2, 3, 4]) == pytest.approx([0.11, 0.12, 0.06, 0.105, 0.1025])
    assert step([0, 1, 2, 3, 4], 1.0) == pytest.approx([1.0, 1.0, 1e-4, 0.6, 0.35])
    assert step([0, 1, 2, 3, 4], 0.0) == alpha.tolist()


def test_the_printed_outer_step_is_gradient_descent_on_the_sum_over_tasks():
    policy, theta, alpha, data, args = make_case(inner_steps=2, alpha_0=0.03)
    leaf = theta.clone().requires_grad_()
    output = policy(plain_adapt(policy, leaf, data, alpha, args), data[-1].obs)
    (gradient,) = torch.autograd.grad(maml.surrogate(*output, data[-1]).sum(), leaf)
    new, stats = rmaml.sgd_step(policy, theta, data, alpha, args)
    torch.testing.assert_close(new, theta - 0.03 * gradient)
    assert stats["sgd/gradient_norm"] == pytest.approx(gradient.norm().item() / len(data[0].obs))


# -- buffer ------------------------------------------------------------------------------------------------------------


def test_the_number_of_replays_grows_from_none_to_the_largest():
    args = small_args(tasks=40, iterations=11)
    assert [rmaml.replay_count(k, args) for k in range(1, 12)] == list(range(11))
    args = small_args(tasks=8, iterations=5, max_share=1.0)
    assert [rmaml.replay_count(k, args) for k in range(1, 6)] == [0, 2, 4, 6, 8]
    args = small_args(tasks=9, iterations=6, max_share=1 / 3)
    assert [rmaml.replay_count(k, args) for k in range(1, 7)] == [0, 1, 1, 2, 2, 3]  # rounded
    assert rmaml.replay_count(1, small_args(iterations=1)) == 0


def test_which_tasks_are_replayed():
    returns = torch.tensor([3.0, -1.0, 7.0, 0.0, 5.0, 1.0])  # by rank: 2 4 0 5 3 1
    found = {s: rmaml.replayed(returns, 2, s).tolist() for s in ("easy", "medium", "hard", "uniform")}
    assert found == dict(easy=[2, 4], medium=[0, 5], hard=[3, 1], uniform=[])
    assert rmaml.replayed(returns, 3, "medium").tolist() == [4, 0, 5]
    for strategy in ("easy", "medium", "hard"):
        assert rmaml.replayed(returns, 0, strategy).tolist() == []
        assert sorted(rmaml.replayed(returns, 6, strategy).tolist()) == list(range(6))
    rows = torch.stack([returns, -returns])
    assert rmaml.replayed(rows, 2, "easy").tolist() == [[2, 4], [1, 3]]


# -- training ----------------------------------------------------------------------------------------------------------

TINY = dict(rollouts=2, horizon=10, hidden=(8,), iterations=3, eval_every=3)
CLOCK = ("time/", "charts/sps")


@pytest.mark.parametrize(
    "env, no_buffer, steps", [("cheetah-vel-noise", dict(strategy="uniform"), 1), ("ml2", dict(max_share=0.0), 2)]
)
def test_with_a_fixed_rate_and_no_buffer_it_is_maml_to_the_last_digit(single, tmp_path, env, no_buffer, steps):
    flags = TINY | dict(env=env, tasks=6, inner_steps=steps, eval_steps=3, run_dir=str(tmp_path))
    flags |= dict(horizon=60) if env == "ml2" else {}  # in which walkers fall
    theirs = train(maml, alpha=0.07, **flags)
    ours = train(rmaml, alpha_init=0.07, alpha_0=0.0, **no_buffer, **flags)
    evaluations = read(ours / "eval.csv")
    assert [row.pop("eval/alpha") for row in evaluations] == ["0.07"] * 2
    assert evaluations == read(theirs / "eval.csv")
    a, b = (torch.load(path / "agent.pt", weights_only=True)["agent"]["theta"] for path in (theirs, ours))
    assert torch.equal(a[0], b)
    for row, same in zip(read(theirs / "metrics.csv"), read(ours / "metrics.csv"), strict=True):
        assert {k: same[k] for k in row if not k.startswith(CLOCK)} == {
            k: v for k, v in row.items() if not k.startswith(CLOCK)
        }
        assert same["policy/alpha_min"] == same["policy/alpha_max"] == "0.07"


@pytest.mark.parametrize("strategy, rates, outer", [("medium", "layer", "trpo"), ("hard", "scalar", "sgd")])
def test_training_is_algorithm_2(single, monkeypatch, tmp_path, strategy, rates, outer):
    """Every iteration, from what was collected: the batch, the steps of θ and α, and what is logged."""
    flags = dict(env="cheetah-vel-noise", tasks=12, max_share=0.5, alpha_init=0.1, alpha_0=0.002, inner_steps=2)
    args = rmaml.Args(**(TINY | flags), strategy=strategy, rates=rates, outer=outer, run_dir=str(tmp_path))
    args.num_threads, args.iterations, args.eval_every = 1, 4, 4
    seen, collect, run = [], rmaml.collect, rmaml.Run(args)

    def record(env, tasks, policy, theta, alphas, rng, args):
        data = collect(env, tasks, policy, theta, alphas, rng, args)
        seen.append((tasks, policy, theta.clone(), [a.clone() for a in alphas], data))
        return data

    monkeypatch.setattr(rmaml, "collect", record)
    rmaml.train(args, run)
    seen = seen[1:-1]  # without evaluations
    table, previous, replays = read(run.path / "metrics.csv"), None, [0, 2, 4, 6]
    assert len(seen) == 4
    for k, ((tasks, policy, theta, alphas, data), row) in enumerate(zip(seen, table)):
        assert len(tasks) == 12 and (theta == theta[0]).all() and all(torch.equal(a, alphas[0]) for a in alphas)
        count = replays[k]
        if previous:
            ranked = sorted(range(12), key=lambda i: -previous[1][i])
            first = dict(medium=(12 - count) // 2, hard=12 - count)[strategy]
            picked = ranked[first : first + count]
            np.testing.assert_array_equal(tasks.params[:count], previous[0].params[picked])
            np.testing.assert_array_equal(tasks.cluster[:count], previous[0].cluster[picked])
            assert not np.isin(tasks.params[count:], previous[0].params).any(), "the others are fresh"
        returns = [b.reward.double().sum(-1).mean(1).numpy() for b in data]
        previous = tasks, returns[-1]
        assert float(row["train/return_step_2"]) == pytest.approx(returns[2][count:].mean(), rel=1e-5)
        assert float(row["train/return_step_0"]) == pytest.approx(returns[0][count:].mean(), rel=1e-5)
        assert int(row["rmaml/replayed"]) == count and int(row["charts/frames"]) == (k + 1) * 12 * 2 * 10 * 3
        assert int(row["rmaml/batch_cluster_1"]) == (tasks.cluster == 1).sum()
        assert int(row["rmaml/replayed_cluster_0"]) == (tasks.cluster[:count] == 0).sum()

        slope = rmaml.hypergradient(policy, theta[0], data, alphas[0], args)
        step = rmaml.sgd_step if outer == "sgd" else rmaml.trpo_step
        new_theta, _ = step(policy, theta[0], data, alphas[0], args)
        new_alpha = rmaml.next_alpha(alphas[0], rmaml.group_of(policy, rates), slope, args.alpha_0)
        assert float(row["rmaml/hypergradient"]) == pytest.approx(slope.sum().item(), rel=1e-4)
        assert float(row["policy/alpha_layer_1"]) == pytest.approx(new_alpha[-7].item(), rel=1e-5)
        assert float(row["policy/alpha_layer_2"]) == pytest.approx(new_alpha[-1].item(), rel=1e-5)
        assert float(row["policy/alpha_min"]) == pytest.approx(new_alpha.min().item(), rel=1e-5)
        assert float(row["policy/alpha_max"]) == pytest.approx(new_alpha.max().item(), rel=1e-5)
        if k < 3:
            assert torch.equal(seen[k + 1][2][0], new_theta) and torch.equal(seen[k + 1][3][0], new_alpha)
    assert len(new_alpha.unique()) == dict(layer=3, scalar=1)[rates] and not torch.isin(new_alpha, 0.1).any()
    saved = torch.load(run.path / "checkpoint.pt", weights_only=True)
    assert torch.equal(saved["agent"]["theta"], new_theta) and torch.equal(saved["agent"]["alpha"], new_alpha)
    np.testing.assert_array_equal(saved["buffer"]["params"].numpy(), tasks.params)
    np.testing.assert_array_equal(saved["buffer"]["returns"].numpy(), returns[-1])


def test_evaluation_takes_the_learned_rates_and_halves_those_of_later_steps(single, monkeypatch):
    args = small_args(inner_steps=2, eval_steps=3)
    env = envs.ENVIRONMENTS["cheetah-vel"](num_envs=12, horizon=4, num_threads=1)
    tasks = env.sample_tasks(4, np.random.default_rng(0))
    policy = rmaml.GaussianPolicy(20, 6, args)
    theta = torch.nn.Parameter(policy.init(torch.Generator().manual_seed(0)), requires_grad=False)
    alpha = torch.nn.Parameter(torch.rand_like(theta), requires_grad=False)
    agent, asked, adapt = torch.nn.ParameterDict(dict(theta=theta, alpha=alpha)), [], rmaml.adapt
    monkeypatch.setattr(rmaml, "adapt", lambda *a: asked.append((a[1], a[3])) or adapt(*a))
    metrics, arrays = rmaml.evaluate(env, tasks, policy, agent, args)
    assert torch.equal(asked[0][0], theta.expand(4, -1))
    for (_, rate), expected in zip(asked, (alpha, alpha, alpha / 2), strict=True):
        assert torch.equal(rate, expected)
    assert arrays["returns"].shape == (4, 4, 3) and arrays["trace"].shape == (4, 4, 4, 2)
    assert arrays["alpha"] == metrics["eval/alpha"] == pytest.approx(alpha.mean().item())
    for k in range(4):
        assert metrics[f"eval/return_step_{k}"] == pytest.approx(arrays["returns"][k].mean())
    assert rmaml.evaluate(env, tasks, policy, agent, args)[0] == metrics


@pytest.mark.parametrize(
    "rates, alpha_0, solved", [("scalar", 0.01, True), ("layer", 0.01, True), ("scalar", 0.0, False)]
)
def test_a_bandit_that_the_first_rate_cannot_solve(single, tmp_path, rates, alpha_0, solved):
    """One action, goals -1 and +1: a step of 0.01 hardly moves the policy; a learned one solves it."""
    run = train(
        rmaml, env="probe-guess-sign", rates=rates, alpha_0=alpha_0, run_dir=str(tmp_path), horizon=1, tasks=20,
        action_scale=1.0, iterations=15, eval_every=15, hidden=(8,),
    )  # fmt: skip
    first, last = ({k: float(v) for k, v in row.items()} for row in read(run / "eval.csv"))
    assert first["eval/return_step_1"] < -0.9 and last["eval/return_step_0"] < -0.9
    assert (last["eval/return_step_1"] > -0.1) == solved
    assert (float(read(run / "metrics.csv")[-1]["policy/alpha_max"]) > 0.05) == solved


# -- command line ------------------------------------------------------------------------------------------------------


def test_the_defaults_are_the_papers():
    a = rmaml.parse_args([])
    assert a == rmaml.parse_args(["--preset", "paper"]) == rmaml.Args(preset="paper")
    assert (a.tasks, a.rollouts, a.inner_steps, a.alpha_init, a.alpha_0) == (40, 20, 1, 0.01, 0.01)
    assert (a.strategy, a.max_share, a.rates, a.outer) == ("medium", 0.25, "scalar", "trpo")
    assert (a.gamma, a.gae_lambda, a.delta, a.hidden, a.horizon) == (0.99, 1.0, 0.01, (64, 64), 100)


FRESH = "--tasks and --max-share must leave {} fresh tasks, which hold every cluster"
RULES = [
    ("--max-share 1.5", "--max-share must be in [0, 1]"),
    ("--outer sgd --kl-slack 0.1", "--kl-slack is for --outer trpo"),
    ("--max-share -0.1 --tasks 2", "--max-share must be in [0, 1]"),
    ("--max-share 1", FRESH.format(1)),
    ("--env cheetah-vel-noise --tasks 6", FRESH.format(5)),
    ("--env cheetah-vel-noise --tasks 4 --strategy uniform", FRESH.format(5)),
    ("--mask-pad-actions", "--mask-pad-actions is for environments of several robots"),
    ("--alpha-init 0", "--alpha-init must be in [0.0001, 1.0], where α is kept"),
    ("--alpha-init 2", "--alpha-init must be in [0.0001, 1.0], where α is kept"),
    ("--alpha-0 -1", "--alpha-0 must be at least 0"),
    ("--alpha-0 0 --outer sgd", "--outer sgd needs an --alpha-0, its step size"),
    ("--inner-steps 0", "--inner-steps must be from 1 to 2^31"),
    ("--action-scale 0", "--action-scale and --delta must be positive"),
    ("--delta 0", "--action-scale and --delta must be positive"),
    ("--damping -1", "--damping and --kl-slack must be at least 0"),
    ("--kl-slack -0.1", "--damping and --kl-slack must be at least 0"),
    ("--gamma 2", "--gamma and --gae-lambda must be in [0, 1]"),
    ("--gae-lambda -0.5", "--gamma and --gae-lambda must be in [0, 1]"),
]


@pytest.mark.parametrize("flags, message", RULES)
def test_what_must_hold(flags, message):
    with pytest.raises(SystemExit) as caught:
        rmaml.parse_args(flags.split())
    assert str(caught.value) == f"rmaml.py: error: {message}"


def test_every_rule_has_a_case():
    rules = rmaml.check(rmaml.Args(), envs.ENVIRONMENTS["cheetah-vel"])
    assert set(rules) <= {message for _, message in RULES}
    rmaml.parse_args("--env ant-cheetah-dir --mask-pad-actions --damping 0 --tasks 2 --max-share 0".split())
    rmaml.parse_args("--env cheetah-vel-noise --tasks 5 --strategy uniform --max-share 1 --alpha-0 0".split())


# -- every flag, every task, every step --------------------------------------------------------------------------------


def test_evaluation_takes_as_many_steps_as_training(single, monkeypatch):
    env = envs.ENVIRONMENTS["cheetah-vel"](num_envs=12, horizon=4, num_threads=1)
    tasks, asked, collect = env.sample_tasks(4, np.random.default_rng(0)), [], rmaml.collect
    monkeypatch.setattr(rmaml, "collect", lambda *a: asked.append(len(a[4])) or collect(*a))
    for steps in (dict(inner_steps=1), dict(inner_steps=2), dict(inner_steps=2, eval_steps=1)):
        args = small_args(**steps)
        policy = rmaml.GaussianPolicy(20, 6, args)
        theta = policy.init(torch.Generator().manual_seed(0))
        rmaml.evaluate(env, tasks, policy, dict(theta=theta, alpha=torch.full_like(theta, 0.1)), args)
    assert asked == [1, 2, 1]
