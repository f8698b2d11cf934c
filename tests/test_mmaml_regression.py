"""MMAML's regression: its functions, closed forms, finite differences, a slow second version, and what it learns."""

import csv

import mmaml_regression as reg
import numpy as np
import pytest
import torch
from conftest import train
from gymnasium.utils.env_checker import check_env
from torch import nn

import envs

FORMS = [dict(modulation="film"), dict(modulation="softmax"), dict(modulation="sigmoid"), dict(modulation="none")]
SMALL = dict(hidden=(6, 5), modulated_layers=2, lstm_hidden=3, tasks=4, inner_steps=3, alpha=0.05, num_threads=1)


@pytest.fixture
def double():
    """Float64, where finite differences are sharp."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small_args(**kwargs) -> reg.Args:
    return reg.Args(**(SMALL | kwargs))


def make_agent(args: reg.Args, learners: int = 1) -> nn.ModuleDict:
    """With weights that do something, biases and t that are not 0."""
    agent = reg.make_agent(args, learners).double()
    for net in agent["theta"]:
        for p in net.parameters():
            p.data += 0.4 * torch.randn_like(p)
    return agent


def make_pairs(tasks: int = 4, points: int = 5) -> reg.Pairs:
    x = 4 * torch.rand(tasks, points, 1) - 2
    clean = x.sin()
    return reg.Pairs(x, clean + 0.1 * torch.randn_like(x), clean)


def draw(env_id: str, n: int, **kwargs) -> tuple[envs.Tasks, reg.Pairs, reg.Pairs]:
    tasks = envs.ENVIRONMENTS[env_id]().sample_tasks(n, np.random.default_rng(0))
    return tasks, *reg.draw_pairs(tasks, torch.Generator().manual_seed(0), reg.Args(**kwargs))


def query_error(agent: nn.ModuleDict, support: reg.Pairs, query: reg.Pairs, args: reg.Args) -> torch.Tensor:
    """The objective, Eq. (5)."""
    _, tau = reg.modulation_of(agent, support)
    theta = reg.adapt(agent["theta"][0], tau, support, args.inner_steps, args)[-1]
    return reg.squared_error(reg.predict(theta, query.x, tau, args), query.y).mean()


def read(path) -> list[dict[str, float]]:
    with path.open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


# -- functions ---------------------------------------------------------------------------------------------------------


def test_functions_are_those_of_the_five_families():
    tasks, support, query = draw("functions-5m", 10)
    formulas = [
        lambda a, c, b, x: a * np.sin(x - c),
        lambda a, c, b, x: a * x + b,
        lambda a, c, b, x: a * (x - c) ** 2 + b,
        lambda a, c, b, x: a * np.tanh(x - c) + b,
        lambda a, c, b, x: a * np.abs(x - c) + b,
    ]
    for pairs in (support, query):
        assert pairs.x.shape == pairs.y.shape == pairs.clean.shape == (10, 5, 1)
        for i, (family, *params) in enumerate(tasks.params):
            expected = formulas[int(family)](*params, pairs.x[i, :, 0].numpy())
            np.testing.assert_allclose(pairs.clean[i, :, 0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("families", [2, 3, 5])
def test_parameters_fill_their_ranges_and_families_are_balanced(families):
    env = envs.ENVIRONMENTS[f"functions-{families}m"]()
    tasks = env.sample_tasks(25 * families, np.random.default_rng(1))
    assert np.bincount(tasks.cluster).tolist() == [25] * families
    test = env.task_set("test")
    assert np.bincount(test.cluster).tolist() == [1000] * families
    assert (env.nearest_cluster(test.params) == test.cluster).all()
    ranges = [  # a, c, b
        [(0.1, 5), (0, np.pi), (0, 0)],
        [(-3, 3), (0, 0), (-3, 3)],
        [(-0.15, 0.15), (-3, 3), (-3, 3)],
        [(-3, 3), (-3, 3), (-3, 3)],
        [(-3, 3), (-3, 3), (-3, 3)],
    ]
    for family in range(families):
        for values, (low, high) in zip(test.params[test.cluster == family, 1:].T, ranges[family]):
            margin = 0.02 * (high - low)
            assert low <= values.min() <= low + margin and high - margin <= values.max() <= high
    a = test.params[test.cluster == 2, 1]
    if families > 2:
        assert 0.4 < (a > 0).mean() < 0.6 and 0.02 <= np.abs(a).min() < 0.022


def test_points_are_uniform_and_support_and_query_have_the_same_noise():
    for pairs in draw("functions-5m", 2000)[1:]:
        residual = pairs.y - pairs.clean
        assert residual.std().item() == pytest.approx(0.3, rel=0.03) and abs(residual.mean()) < 0.02
        assert -5 <= pairs.x.min() < -4.95 and 4.95 < pairs.x.max() <= 5 and abs(pairs.x.mean()) < 0.1
    _, support, query = draw("functions-2m", 6, shots=3, horizon=20)
    assert support.x.shape == (6, 3, 1) and query.x.shape == (6, 17, 1) and not np.isin(support.x, query.x).any()


def test_the_environment_pays_minus_the_squared_error():
    env = envs.ENVIRONMENTS["functions-3m"](num_envs=300)
    tasks = env.sample_tasks(300, np.random.default_rng(0))
    obs, _ = env.reset(seed=0, options={"tasks": tasks})
    returns, still = np.zeros(300), np.zeros(300)
    for _ in range(10):
        truth = reg.value(torch.from_numpy(tasks.params), torch.from_numpy(obs).double()).numpy()
        np.testing.assert_allclose(env.oracle_action(), truth / 30, atol=1e-6)
        still += (truth[:, 0] ** 2 + 0.09) / 10
        obs, reward, _, truncated, _ = env.step(truth / 30)
        returns += reward
    assert truncated.all() and -returns.mean() == pytest.approx(0.09, rel=0.1)
    env.reset(seed=0, options={"tasks": tasks})
    zero = sum(env.step(np.zeros((300, 1)))[1] for _ in range(10))
    assert -zero.mean() == pytest.approx(still.mean(), rel=0.02)


def test_the_environment_is_one_of_gymnasium():
    import gymnasium as gym

    check_env(gym.make("functions-2m").unwrapped, skip_render_check=True)


# -- networks ----------------------------------------------------------------------------------------------------------


def count(*parameters) -> int:
    return sum(p.numel() for p in parameters)


def test_numbers_of_parameters():
    maml, mmaml = (reg.make_agent(reg.Args(modulation=m), 1) for m in ("none", "film"))
    assert count(*maml.parameters()) == 22_521 and "omega" not in maml
    assert count(*mmaml["theta"].parameters()) == 20_501
    assert count(*mmaml["omega"].lstm.parameters()) == 53_120
    assert [count(*head.parameters()) for head in mmaml["omega"].heads] == [16_200] * 3
    for operator in ("softmax", "sigmoid"):
        omega = reg.make_agent(reg.Args(modulation=operator, modulated_layers=1), 1)["omega"]
        assert [count(*head.parameters()) for head in omega.heads] == [8_100]
    weights = torch.cat([w[:-1].flatten() for w in maml["theta"][0].weights])
    assert weights.std().item() == pytest.approx(0.01, rel=0.03)
    assert (maml["theta"][0].t == 0).all() and all((w[-1] == 0).all() for w in maml["theta"][0].weights), "biases"


def test_operators(double):
    a, tau = torch.randn(2, 3, 4), torch.randn(2, 1, 8)
    assert torch.equal(reg.modulate(a, 0 * tau, "film"), a)
    torch.testing.assert_close(reg.modulate(a, tau, "film"), a + a * tau[..., :4] + tau[..., 4:])
    softmax = reg.modulate(torch.ones(2, 3, 4), tau[..., :4], "softmax")
    torch.testing.assert_close(softmax.sum(-1), torch.ones(2, 3))
    torch.testing.assert_close(softmax[:, 0], torch.softmax(tau[:, 0, :4], -1))
    torch.testing.assert_close(reg.modulate(a, tau[..., :4], "sigmoid"), a / (1 + (-tau[..., :4]).exp()))


def test_the_embedding_is_the_last_state_of_each_direction(double):
    args, pairs = small_args(sort=False), make_pairs()
    omega = make_agent(args)["omega"]
    embedding, tau = omega(pairs.x, pairs.y)
    output, _ = omega.lstm(torch.cat([pairs.x, pairs.y], -1))
    torch.testing.assert_close(embedding, torch.cat([output[:, -1, :3], output[:, 0, 3:]], -1))
    for head, of_layer, width in zip(omega.heads, tau, (6, 5), strict=True):
        torch.testing.assert_close(of_layer, (embedding @ head.weight.T + head.bias)[:, None])
        assert of_layer.shape == (4, 1, 2 * width)


def test_the_order_of_the_points_matters_only_without_sorting(double):
    x, y, _ = make_pairs()
    order = torch.tensor([3, 1, 4, 0, 2])
    for is_sorted in (True, False):
        omega = make_agent(small_args(sort=is_sorted))["omega"]
        same = torch.allclose(omega(x, y)[0], omega(x[:, order], y[:, order])[0])
        assert same == is_sorted
    ascending = x.argsort(1)
    omega.sort = True
    sorted_before = omega(x, y)[0]
    omega.sort = False
    torch.testing.assert_close(sorted_before, omega(x.gather(1, ascending), y.gather(1, ascending))[0])


# -- adaptation --------------------------------------------------------------------------------------------------------


def one_task(agent: nn.ModuleDict, support: reg.Pairs, query: reg.Pairs, args: reg.Args) -> tuple:
    """θ'_i, a dictionary, and the query error of the only task, by plain formulas; the graph is kept."""
    net, tau = agent["theta"][0], []
    if "omega" in agent:
        tau = [part[0, 0] for part in agent["omega"](support.x, support.y)[1]]
    theta = dict(net.named_parameters())

    def f(theta, x):
        h = torch.cat([x, theta["t"].expand(len(x), -1)], -1)
        for i in range(3):
            w = theta[f"weights.{i}"]
            h = h @ w[:-1] + w[-1]
            if i < len(tau):
                width = h.shape[1]
                h = {
                    "film": lambda h, p, w: h + h * p[:w] + p[w:],
                    "softmax": lambda h, p, w: h * torch.softmax(p, 0),
                    "sigmoid": lambda h, p, w: h * torch.sigmoid(p),
                }[args.modulation](h, tau[i], width)
            h = h.clamp(min=0) if i < 2 else h
        return h

    for _ in range(args.inner_steps):
        loss = ((f(theta, support.x[0]) - support.y[0]) ** 2).mean()
        gradients = torch.autograd.grad(loss, [*theta.values()], create_graph=True)
        if args.inner_clip:
            gradients = [g.clip(-args.inner_clip, args.inner_clip) for g in gradients]
        theta = {k: p - args.alpha * g for (k, p), g in zip(theta.items(), gradients)}
    return theta, ((f(theta, query.x[0]) - query.y[0]) ** 2).mean()


@pytest.mark.parametrize("form", [*FORMS, dict(modulation="none", bias_dim=0), dict(modulated_layers=1)], ids=str)
@pytest.mark.parametrize("inner_clip", [0.0, 0.2, 0.02])  # of no, of some and of all layers
@pytest.mark.parametrize("low_rank", [True, False])
def test_objective_and_meta_gradient_against_one_task_at_a_time(double, form, inner_clip, low_rank):
    args = small_args(inner_clip=inner_clip, low_rank=low_rank, **form)
    agent, support, query = make_agent(args), make_pairs(), make_pairs()
    objective = query_error(agent, support, query, args)
    gradient = torch.autograd.grad(objective, [*agent.parameters()])
    alone = [one_task(agent, support.of([i]), query.of([i]), args) for i in range(4)]
    expected = sum(error for _, error in alone) / 4
    torch.testing.assert_close(objective, expected, rtol=0, atol=1e-9)
    for p, q in zip(gradient, torch.autograd.grad(expected, [*agent.parameters()], retain_graph=True)):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)
    if not low_rank:
        tau = reg.modulation_of(agent, support)[1]
        theta = reg.adapt(agent["theta"][0], tau, support, 3, args)[-1]
        for i, (single, _) in enumerate(alone):
            torch.testing.assert_close(theta.weights[1][i], single["weights.1"], rtol=0, atol=1e-9)


def test_the_clamp_of_the_case_above_meets_some_layers_and_all(double):
    """Else its three cases were one."""
    support, met = make_pairs(), {}
    for inner_clip in (0.0, 0.2, 0.02):
        args = small_args(inner_clip=inner_clip)
        torch.manual_seed(0)
        agent = make_agent(args)
        theta = reg.adapt(agent["theta"][0], reg.modulation_of(agent, support)[1], support, 3, args)[-1]
        met[inner_clip] = [len(excess) > 0 for _, _, excess in theta.changes]
    assert met[0.0] == [False] * 3 and sum(met[0.2]) in (1, 2) and met[0.02] == [True] * 3


@pytest.mark.parametrize(
    "flags, limit",
    [("", 10), ("--modulation none", np.inf), ("--modulation none --inner-clip 3", 3), ("--inner-clip 0", np.inf)],
)
def test_without_a_flag_only_the_modulated_network_is_clamped(flags, limit):
    assert reg.inner_clip(reg.parse_args(flags.split())) == limit


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_meta_gradient_by_finite_differences(double, form):
    """Along a random direction of every parameter; exact only with second derivatives, and through τ."""
    args = small_args(**form)
    agent, support, query = make_agent(args), make_pairs(), make_pairs()
    for name, p in agent.named_parameters():
        if p.numel() == 0:  # t, which MMAML does not have
            continue
        (gradient,) = torch.autograd.grad(query_error(agent, support, query, args), p)
        direction, values = torch.randn_like(p), []
        for step in (1e-6, -2e-6):
            p.data += step * direction
            values.append(query_error(agent, support, query, args).item())
        p.data += 1e-6 * direction
        slope = (values[0] - values[1]) / 2e-6
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-4, abs=1e-7), name
        assert gradient.abs().max() > 0, name


def test_a_step_of_a_linear_model_is_the_one_derived_by_hand(double):
    args = small_args(hidden=(), modulation="none", bias_dim=0, inner_steps=1, alpha=0.1)
    agent, (x, y, _) = make_agent(args), make_pairs()
    net = agent["theta"][0]
    theta = reg.adapt(net, [], reg.Pairs(x, y, y), 1, args)[-1]
    weight, bias = net.weights[0]
    residual = x * weight + bias - y
    w = weight - 0.1 * 2 * (residual * x).mean(1, keepdim=True)
    b = bias - 0.1 * 2 * residual.mean(1, keepdim=True)
    query = torch.randn(4, 7, 1)
    torch.testing.assert_close(reg.predict(theta, query, [], args), query * w + b)


def test_without_a_step_or_with_one_of_size_0_it_is_the_lstm_learner(double):
    args = small_args()
    agent, support, query = make_agent(args), make_pairs(), make_pairs()
    expected = query_error(agent, support, query, small_args(inner_steps=0))
    still, moved = (query_error(agent, support, query, small_args(alpha=alpha)) for alpha in (0.0, 0.05))
    torch.testing.assert_close(still, expected)
    assert abs(moved - expected) > 1e-3


@pytest.mark.parametrize("low_rank", [True, False])
def test_adaptation_leaves_tau_and_theta_alone(double, low_rank):
    args = small_args(low_rank=low_rank)
    agent, support = make_agent(args), make_pairs()
    before = {k: p.clone() for k, p in agent.named_parameters()}
    _, tau = reg.modulation_of(agent, support)
    first = [part.clone() for part in tau]
    thetas = reg.adapt(agent["theta"][0], tau, support, 3, args)
    assert len(thetas) == 4 and all(torch.equal(a, b) for a, b in zip(first, tau))
    assert all(torch.equal(before[k], p) for k, p in agent.named_parameters())
    errors = [reg.squared_error(reg.predict(theta, support.x, tau, args), support.y).sum() for theta in thetas]
    assert errors[3] < errors[2] < errors[1] < errors[0]


# -- outer step --------------------------------------------------------------------------------------------------------


class Adam(torch.optim.SGD):
    """Plain gradient steps of size 1, whose parameters show the gradient."""

    def __init__(self, agent):
        super().__init__(agent.parameters(), 1.0)


@pytest.mark.parametrize("clip", [0.01, 0.0])
def test_a_meta_step_is_a_clipped_step_on_the_objective(double, clip):
    args = small_args(outer_clip=clip)
    agent, support, query = make_agent(args), make_pairs(), make_pairs()
    gradients = dict(zip(dict(agent.named_parameters()), torch.autograd.grad(
        query_error(agent, support, query, args), [*agent.parameters()])))  # fmt: skip
    before = {k: p.clone() for k, p in agent.named_parameters()}
    tau = reg.modulation_of(agent, support)[1]
    thetas = reg.adapt(agent["theta"][0], tau, support, args.inner_steps, args)
    expected = [reg.squared_error(reg.predict(thetas[k], query.x, tau, args), query.y) for k in (0, -1)]
    for p in agent.parameters():
        p.grad = torch.ones_like(p)  # left over
    errors, norms = reg.meta_step(agent, Adam(agent), support, query, np.zeros(4, int), args)
    torch.testing.assert_close(errors, torch.stack(expected))
    assert (errors[0] != errors[1]).all()
    for group, key in (("theta", "theta_0"), ("omega", "omega")):
        norm = sum((g**2).sum() for k, g in gradients.items() if k.startswith(group)).sqrt().item()
        assert norms[f"adam/gradient_{key}"] == pytest.approx(norm) and norm > 0.01
        for k, g in gradients.items():
            if k.startswith(group):
                step = g * min(1.0, (clip or np.inf) / (norm + 1e-6))
                torch.testing.assert_close(before[k] - agent.get_parameter(k), step)


def test_learners_of_multi_maml_learn_from_their_own_tasks_alone(double):
    """Each as a MAML that has no other tasks, in loss and clip; one without tasks stays where it is."""
    args = small_args(modulation="none", oracle=True, outer_clip=0.01, tasks=6)
    agent, support, query = make_agent(args, 3), make_pairs(6), make_pairs(6)
    start = [{k: p.clone() for k, p in net.named_parameters()} for net in agent["theta"]]
    learner = np.array([0, 2, 0, 0, 2, 0])
    errors, _ = reg.meta_step(agent, Adam(agent), support, query, learner, args)
    for m in range(3):
        alone, mine = make_agent(args), np.flatnonzero(learner == m)
        alone["theta"][0].load_state_dict(start[m])
        if len(mine):
            own = reg.meta_step(alone, Adam(alone), support.of(mine), query.of(mine), np.zeros(len(mine), int), args)[0]
            torch.testing.assert_close(errors[:, mine], own)
        for k, p in agent["theta"][m].named_parameters():
            torch.testing.assert_close(p, alone["theta"][0].get_parameter(k))
            assert torch.equal(p, start[m][k]) == (m == 1)


def test_assignment():
    tasks = envs.Tasks(np.zeros((3, 4)), np.array([2, 0, 1]))
    assert reg.assign(tasks, small_args()).tolist() == [0, 0, 0]
    assert reg.assign(tasks, small_args(oracle=True)).tolist() == [2, 0, 1]


# -- evaluation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [dict(), dict(modulation="none", oracle=True), dict(low_rank=False)], ids=str)
def test_evaluation_against_plain_means(monkeypatch, form):
    monkeypatch.setattr(reg, "CHUNK", 7)  # does not divide the tasks of a family
    monkeypatch.setattr(reg, "SHOWN", 12)
    args = small_args(**form)
    torch.manual_seed(0)
    agent = make_agent(args, 3 if args.oracle else 1).float()
    tasks = envs.ENVIRONMENTS["functions-3m"]().task_set("test")[:30]
    metrics, arrays = reg.evaluate(tasks, agent, args)
    again = reg.evaluate(tasks, agent, small_args(seed=9, **form))[0]
    assert metrics == again, "the points are those of every seed"

    support, query = reg.draw_pairs(tasks, torch.Generator().manual_seed(10**6), args)
    error, clean = np.zeros((2, 4, 30))
    for i in range(30):
        net = agent["theta"][tasks.cluster[i] if args.oracle else 0]
        own = support.of([i])
        tau = reg.modulation_of(agent, own)[1]
        for k, theta in enumerate(reg.adapt(net, tau, own, 3, args)):
            prediction = reg.predict(theta, query.x[[i]], tau, args)
            error[k, i] = ((prediction - query.y[i]) ** 2).mean().item()
            clean[k, i] = ((prediction - query.clean[i]) ** 2).mean().item()
    np.testing.assert_allclose(arrays["error"], error[:, :12], rtol=1e-4)
    assert (arrays["params"].shape, arrays["cluster"].tolist()) == ((12, 4), [0, 1, 2] * 4)
    groups = {"": tasks.cluster >= 0} | {f"_cluster_{m}": tasks.cluster == m for m in range(3)}
    for suffix, mine in groups.items():
        for k in range(4):
            assert metrics[f"eval/return_step_{k}{suffix}"] == pytest.approx(-error[k, mine].mean(), rel=1e-4)
        for k in (0, 3):
            values = error[k, mine].reshape(-1, 1 if suffix else 3)  # a column a family: families do not vary
            half = 1.96 * np.sqrt((values.var(0, ddof=1) / len(values)).sum()) / values.shape[1]
            assert metrics[f"eval/interval_step_{k}{suffix}"] == pytest.approx(half, rel=1e-4)
            assert metrics[f"eval/clean_error_step_{k}{suffix}"] == pytest.approx(clean[k, mine].mean(), rel=1e-4)
    if "omega" not in agent:
        assert "eval/return_mean_modulated" not in metrics
        return
    mean = [part.mean(0, keepdim=True).expand_as(part) for part in reg.modulation_of(agent, support)[1]]
    theta = reg.adapt(agent["theta"][0], mean, support, 3, args)[-1]
    same = ((reg.predict(theta, query.x, mean, args) - query.y) ** 2).mean((1, 2)).detach().numpy()
    assert metrics["eval/return_mean_modulated"] == pytest.approx(-same.mean(), rel=1e-4)
    assert metrics["eval/return_mean_modulated_cluster_2"] == pytest.approx(-same[tasks.cluster == 2].mean(), rel=1e-4)
    assert abs(same.mean() - error[3].mean()) > 1e-3

    assert arrays["curves"].shape == (3, 12, 101) and arrays["support"].shape == (12, 5, 2)
    truth = reg.value(torch.from_numpy(tasks.params[:12]), torch.from_numpy(arrays["x"]).double().expand(12, -1))
    np.testing.assert_allclose(arrays["truth"], truth, atol=1e-5)
    np.testing.assert_allclose(arrays["support"][..., 1], support.y[:12, :, 0])
    grid, i = torch.from_numpy(arrays["x"])[None, :, None], 5
    net, own = agent["theta"][2 if args.oracle else 0], support.of([i])
    embedding, tau = reg.modulation_of(agent, own)
    thetas = reg.adapt(net, tau, own, 3, args)
    for curve, theta, modulation in zip(arrays["curves"][:, i], (thetas[0], thetas[0], thetas[3]), ([], tau, tau)):
        np.testing.assert_allclose(curve, reg.predict(theta, grid, modulation, args)[0, :, 0].detach(), atol=1e-4)
    assert ("embedding" in arrays) == (embedding is not None)
    if embedding is not None:
        np.testing.assert_allclose(arrays["embedding"][i], embedding[0].detach(), atol=1e-5)


def test_more_steps_at_evaluation():
    args = small_args(eval_steps=5)
    tasks = envs.ENVIRONMENTS["functions-2m"]().task_set("test")[:8]
    metrics, arrays = reg.evaluate(tasks, reg.make_agent(args, 1), args)
    assert "eval/return_step_5_cluster_1" in metrics and "eval/interval_step_5" in metrics
    assert arrays["error"].shape == (6, 8)


# -- training ----------------------------------------------------------------------------------------------------------

METHODS = {
    "MMAML": dict(),
    "MAML": dict(modulation="none"),
    "Multi-MAML": dict(modulation="none", oracle=True),
    "LSTM learner": dict(inner_steps=0),
}
PROBE = dict(env="functions-2m", tasks=20, hidden=(40, 40), modulated_layers=2, lstm_hidden=16, alpha=0.01, lr=3e-3)


@pytest.fixture
def few_test_tasks(monkeypatch):
    monkeypatch.setattr(reg.Functions2M, "num_test_tasks", 200)


@pytest.mark.parametrize("method", METHODS)
def test_three_hundred_iterations_halve_the_error(method, tmp_path, few_test_tasks):
    run = train(reg, run_dir=str(tmp_path), iterations=300, eval_every=300, **(PROBE | METHODS[method]))
    table, last = read(run / "eval.csv"), 0 if method == "LSTM learner" else 5
    before, after = (-row[f"eval/return_step_{last}"] for row in table)
    assert after < before / 2
    if method in ("MMAML", "LSTM learner"):  # MMAML has hardly begun to tell tasks apart
        same_for_all = -table[-1]["eval/return_mean_modulated"]
        assert same_for_all > (1.05 if method == "MMAML" else 3) * after
    metrics = read(run / "metrics.csv")
    assert [row["charts/frames"] for row in metrics] == [200 * k for k in range(1, 301)]
    late = np.mean([row[f"train/return_step_{last}"] for row in metrics[-50:]])
    assert late == pytest.approx(-after, rel=0.5), "held-out functions are of the same distribution"
    learners = sum(key.startswith("adam/gradient_theta") for key in metrics[0])
    assert learners == (2 if method == "Multi-MAML" else 1)


def test_training_is_a_loop_of_meta_steps(tmp_path, few_test_tasks):
    """Of fresh tasks, drawn by the run's generator, with Adam on θ and ω."""
    args = reg.Args(**(PROBE | dict(iterations=3, run_dir=str(tmp_path), preset="paper", num_threads=1)))
    run = reg.Run(args)
    reg.train(args, run)
    other = reg.Run(args)
    agent = reg.make_agent(args, 1)
    adam = torch.optim.Adam(agent.parameters(), 3e-3)
    env = envs.ENVIRONMENTS["functions-2m"]()
    for row in read(run.path / "metrics.csv"):
        seed = torch.randint(2**31, (), generator=other.rng).item()
        tasks = env.sample_tasks(20, np.random.default_rng(seed))
        support, query = reg.draw_pairs(tasks, other.rng, args)
        errors, norms = reg.meta_step(agent, adam, support, query, np.zeros(20, int), args)
        for k, values in ((0, errors[0]), (5, errors[1])):
            assert row[f"train/return_step_{k}"] == pytest.approx(-values.mean().item(), rel=1e-4)
            of_one = values[torch.from_numpy(tasks.cluster) == 1].mean().item()
            assert row[f"train/return_step_{k}_cluster_1"] == pytest.approx(-of_one, rel=1e-4)
        assert row["adam/gradient_omega"] == pytest.approx(norms["adam/gradient_omega"], rel=1e-4)
    trained = torch.load(run.path / "agent.pt", weights_only=True)["agent"]
    for key, value in agent.state_dict().items():
        torch.testing.assert_close(trained[key], value)


# -- arguments ---------------------------------------------------------------------------------------------------------

RULES = [
    ("--env point-goal-4c", "--env must be functions-2m, -3m or -5m, not point-goal-4c"),
    ("--env functions-3m --tasks 50", "--tasks must be a multiple of 3"),
    ("--oracle", "--oracle needs --modulation none"),
    ("--hidden 10 10", "--modulated-layers must be at most 2"),
    *[
        (f"{flag} --modulation none", "--modulated-layers, --no-sort and --lstm-hidden need a --modulation")
        for flag in ("--modulated-layers 1", "--no-sort", "--lstm-hidden 7")
    ],
    ("--bias-dim 7", "--bias-dim needs --modulation none (D3)"),
    ("--shots 10", "--shots must be less than --horizon"),
    ("--alpha 0", "--alpha and --lr must be positive"),
    ("--lr -1", "--alpha and --lr must be positive"),
    ("--outer-clip -1", "--inner-clip and --outer-clip must be at least 0"),
    ("--inner-clip -1", "--inner-clip and --outer-clip must be at least 0"),
]


@pytest.mark.parametrize("flags, message", RULES)
def test_what_must_hold(flags, message):
    with pytest.raises(SystemExit) as caught:
        reg.parse_args([*flags.split(), *([] if "--tasks" in flags else ["--tasks", "60"])])
    assert str(caught.value) == f"mmaml_regression.py: error: {message}"


def test_every_rule_has_a_case_and_presets_have_25_tasks_of_every_family():
    assert len(reg.check(reg.Args(), reg.Functions5M)) == len({message for _, message in RULES})
    for families in (2, 3, 5):
        a = reg.parse_args(["--env", f"functions-{families}m"])
        assert (a.tasks, a.shots, a.horizon, a.hidden, a.lstm_hidden) == (25 * families, 5, 10, (100,) * 3, 40)
        assert (a.iterations, a.inner_steps, a.alpha, a.lr, a.outer_clip) == (70_000, 5, 1e-3, 1e-3, 2)
    reg.parse_args("--oracle --modulation none --inner-steps 0 --bias-dim 0 --hidden 8 8".split())
    reg.parse_args("--inner-clip 0 --modulated-layers 1 --hidden 8".split())
