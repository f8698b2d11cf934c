"""SoP's mathematics: embeddings against derivatives, clusters, assignment; K = 1 is PEARL; a herd to be found."""

import csv
import dataclasses
import functools
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pearl
import probes  # noqa: F401
import pytest
import sop
import torch
from conftest import spy_on, train
from sklearn.metrics import adjusted_rand_score
from torch.distributions import Normal

import envs

OBS, ACTION = 3, 2
SIZES = dict(latent_dim=2, encoder_hidden=(6, 5), hidden=(7, 6), meta_batch=4, batch=5, context=8)
TINY = SIZES | dict(env="point-goal-4c", horizon=5, train_tasks=6, initial_steps=15, visits=6, prior_steps=10)
TINY |= dict(extra_steps=10, gradient_steps=2, eval_every=1, eval_episodes=3, eval_prior_episodes=1)


def small_args(**kwargs) -> sop.Args:
    return sop.Args(**(SIZES | dict(num_threads=1) | kwargs))


def generator(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(path: Path) -> list[dict[str, str]]:
    """Without clocks, and without what only pearl.py logs: the evaluation of training tasks."""
    with path.open() as file:
        table = list(csv.DictReader(file))
    skipped = "time/", "charts/sps", "eval/train_return"
    return [{k: v for k, v in row.items() if not k.startswith(skipped)} for row in table]


# -- embeddings --------------------------------------------------------------------------------------------------------


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_episodes(tasks=5, horizon=6) -> sop.Episodes:
    """Of different lengths; one task only punishes, another has rewards a hundred times as large."""
    torch.manual_seed(3)
    length = torch.tensor([horizon, 3, horizon, 1, 4])[:tasks]
    alive = torch.arange(horizon) < length[:, None]
    reward = torch.randn(tasks, horizon) * alive
    reward[1] = -reward[1].abs()
    reward[2] *= 100
    obs, action = torch.randn(tasks, horizon + 1, OBS), torch.rand(tasks, horizon, ACTION)
    return sop.Episodes(obs, action, reward, torch.zeros(tasks, horizon), alive)


def explicit(agent, e: sop.Episodes, i: int, z: torch.Tensor, noise: torch.Tensor, after: bool) -> dict:
    """φ(T) of task i step by step: derivatives of ln π by the last layer, the mean over ã by quadrature."""
    policy, length = agent["policy"], int(e.alive[i].sum())
    weight, bias = policy.weights[-1][0].detach(), policy.biases[-1][0, 0].detach()
    nodes, chances = np.polynomial.hermite_e.hermegauss(6)  # of N(0, 1): exact for ε^4

    def score(h, epsilon):
        w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        mean, log_std = (h @ w + b).chunk(2)
        a = (mean + log_std.exp() * epsilon).detach().tanh()
        log_pi = (Normal(mean, log_std.exp()).log_prob(a.atanh()) - (1 - a**2).log()).sum()
        return torch.cat([x.view(-1, 2 * ACTION) for x in torch.autograd.grad(log_pi, (w, b))]).flatten()

    fisher = states = gradient = 0.0
    for t in range(length):
        r = e.reward[i, t] / e.reward[i].abs().max() / length
        h = policy.features(torch.cat([e.obs[i, t], z[i]])[None])[0, 0].detach()
        gradient = gradient + r * score(h, noise[t, i])
        fisher = fisher + abs(r) * sum(c * score(h, x) ** 2 for x, c in zip(nodes, chances / chances.sum()))
        both = torch.cat([e.obs[i, t], e.obs[i, t + 1]])
        states = states + abs(r) * torch.outer(both, both).flatten()
    parts = e.obs[i, :-1], e.action[i], e.reward[i, :, None], e.obs[i, 1:]
    context = torch.cat(parts[: 3 + after], dim=1)[:length]
    latent = sop.posterior(agent["encoder"], context[None]).mean[0].detach()
    return dict(zip(sop.KINDS, (fisher, states, latent, gradient)))


def make_probe(**kwargs) -> torch.nn.ModuleDict:
    """With means and standard deviations that depend on the state."""
    torch.manual_seed(0)
    agent = sop.make_agent(OBS, ACTION, small_args(**kwargs))
    agent["policy"].weights[-1].data.normal_(0, 0.5)
    agent["encoder"].weights[-1].data.normal_(0, 0.5)
    return agent


@pytest.mark.parametrize("after", [False, True])
def test_embeddings_are_what_derivatives_and_loops_give(double, monkeypatch, after):
    agent, e, seen = make_probe(next_obs_in_context=after), make_episodes(), []
    monkeypatch.setattr(sop, "rollout", lambda *a: seen.append(a) or e)
    env = SimpleNamespace(action_space=SimpleNamespace(shape=(5, ACTION)))
    played, seed, phi = sop.observe(env, range(5), agent, generator(), small_args(horizon=6, next_obs_in_context=after))
    ((_, _, policy, z, used, noise, play),) = seen
    assert played is e and used == seed and policy is agent["policy"] and play.tolist() == [True] * 5
    assert [*phi] == [*sop.KINDS] and noise.shape == (6, 5, ACTION)
    for i in range(5):
        for kind, wanted in explicit(agent, e, i, z.clone(), noise.clone(), after).items():
            torch.testing.assert_close(phi[kind][i], wanted, rtol=1e-5, atol=1e-8)


def test_the_probe_plays_sampled_actions_with_z_of_the_prior(monkeypatch):
    args = small_args(horizon=50, latent_dim=3)
    env = gym.make_vec("point-goal-4c", num_envs=64, horizon=50)
    tasks, agent = env.unwrapped.task_set("train")[:64], sop.make_agent(2, 2, args)
    calls = spy_on(monkeypatch, sop, "rollout")
    episode, _, phi = sop.observe(env, tasks, agent, generator(5), args)
    ((_, played_in, _, z, _, noise, _), _) = calls[0]
    assert played_in is tasks and episode.alive.all()
    for x in (z, noise):
        assert abs(x.mean()) < 0.25 and abs(x.std() - 1) < 0.1
    assert z.shape == (64, 3) and (z[0] != z[1]).all()
    with torch.inference_mode():
        mean, log_std = sop.pre_tanh(agent["policy"], episode.obs[:, 0], z)
    torch.testing.assert_close(episode.action[:, 0], (mean + log_std.exp() * noise[0]).tanh())
    assert phi["fisher"].shape == (64, 7 * 4) and phi["latent"].shape == (64, 3)


def test_networks_are_pearls():
    """Without the way through oneDNN, which takes large inputs to the same numbers but for rounding."""
    nets = []
    for script in (sop, pearl):
        torch.manual_seed(0)
        nets.append(script.MLP(OBS, 7, 6, 4, copies=2))
    ours, theirs = nets
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    x, y = torch.randn(600, 2), torch.randn(600, 1)
    assert torch.equal(ours(x[:9], y[:9]), theirs(x[:9], y[:9]))
    torch.testing.assert_close(ours(x, y), theirs(x, y))


# -- clusters ----------------------------------------------------------------------------------------------------------


def apart(points: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
    return torch.cdist(torch.as_tensor(points), torch.as_tensor(to)) ** 2


def standardised(x: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """By mean and standard deviation of the known ones, cut off at two of these."""
    return ((x.double() - known.double().mean(0)) / known.double().std(0)).clamp(-2, 2)


def test_coordinates_keep_distances_of_standardised_embeddings():
    """New ones may leave the space of the known ones: by as much from everywhere."""
    torch.manual_seed(0)
    known, new = torch.randn(20, 30).double() * torch.logspace(-3, 3, 30) + 5, torch.randn(7, 30).double() + 5
    known[:, 4] = 2.0  # says nothing, whatever new ones have there
    scaled = [standardised(x, known) for x in (known, new)]
    scaled = [torch.cat([x[:, :4], x[:, 5:]], dim=1) for x in scaled]
    found = sop.coordinates(known, known, "fisher")
    torch.testing.assert_close(apart(found, found), apart(scaled[0], scaled[0]))
    to_known, wanted = apart(sop.coordinates(known, new, "fisher"), found), apart(scaled[1], scaled[0])
    torch.testing.assert_close(to_known - to_known[:, :1], wanted - wanted[:, :1])
    latents = sop.coordinates(known, known, "latent")
    torch.testing.assert_close(apart(latents, latents), apart(known, known))


def test_coordinates_are_fifty_at_most():
    torch.manual_seed(0)
    known = torch.randn(90, 60).double()
    scaled = standardised(known, known)
    _, vectors = torch.linalg.eigh(torch.cov(scaled.T))
    found, wanted = sop.coordinates(known, known, "gradient"), scaled @ vectors[:, -50:]
    assert found.shape == (90, 50)
    torch.testing.assert_close(apart(found, found), apart(wanted, wanted))


def test_a_rare_number_does_not_outweigh_all_others():
    """Half of 200 points is +1 in ten numbers, the others -1; and one point has, alone, something in 100 numbers."""
    sign = torch.arange(200) % 2 * 2.0 - 1
    known = torch.cat([sign[:, None].repeat(1, 10) + 0.1 * torch.randn(200, 10), torch.zeros(200, 100)], dim=1)
    known[7, 10:] = 1.0
    points = sop.coordinates(known, known, "fisher")
    labels = sop.AgglomerativeClustering(2, linkage="ward").fit_predict(points)
    assert sop.adjusted_rand_score(sign.numpy(), labels) == 1


@pytest.mark.parametrize("kind", ["fisher", "latent"])
def test_assignment_is_to_the_nearest_centroid_of_those_who_own_a_task(kind):
    torch.manual_seed(0)
    known, new = torch.randn(12, 40) * torch.logspace(-1, 1, 40), torch.randn(50, 40) * torch.logspace(-1, 1, 40)
    member = np.array([1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 1])
    places = [x.double() if kind == "latent" else standardised(x, known) for x in (known, new)]
    for owner in ([1, 2, 3], [3, 1, 1]):
        centroids = torch.stack([places[0][member == k].mean(0) for k in sorted({*owner})])
        nearest = np.array(sorted({*owner}))[torch.cdist(places[1], centroids).argmin(1)]
        assert sop.assign(known, member, np.array(owner), new, kind).tolist() == nearest.tolist()
        assert set(nearest) == set(owner)


def separate(monkeypatch, sigmas=10.0) -> None:
    """Embeddings become two Gaussians, so many standard deviations apart, by true cluster."""
    observe, noise = sop.observe, np.random.default_rng(0)

    def synthetic(env, tasks, *rest):
        episode, seed, phi = observe(env, tasks, *rest)
        found = {kind: torch.zeros(x.shape) for kind, x in phi.items()}
        for x in found.values():
            at = sigmas * tasks.cluster[:, None] + noise.normal(size=(len(tasks), 2))
            x[:, :2] = torch.from_numpy(at)  # the other numbers say nothing
        return episode, seed, found

    monkeypatch.setattr(sop, "observe", synthetic)


@pytest.mark.parametrize("kind", sop.KINDS)
def test_two_gaussians_are_two_members_and_one_cluster_is_one(monkeypatch, tmp_path, kind):
    separate(monkeypatch)
    flags = TINY | dict(env="ml2", train_tasks=4, probe_iterations=1, iterations=2, embed_repeats=5, embedding=kind)
    for clusters in (2, 1):
        run = train(sop, run_dir=str(tmp_path / str(clusters)), **flags | dict(clusters=clusters))
        before, _, after = rows(run / "eval.csv")
        names = ["eval/accuracy", "herd/purity", "eval/nmi", "eval/ari", "herd/ari"]
        names += [f"herd/ari_{name}" for name in sop.KINDS]
        right = [1.0] * 9 if clusters == 2 else [0.5] * 2 + [0.0] * 7
        assert [float(after[k]) for k in names] == pytest.approx(right)
        assert float(before["herd/ari"]) == float(before["eval/ari"]) == 0
        learner = np.load(run / "eval.npz")["learner"]
        assert set(learner) == ({1, 2} if clusters == 2 else {1})


# -- collection --------------------------------------------------------------------------------------------------------


def real_learner(script, tasks=2) -> pearl.Learner | sop.Learner:
    torch.manual_seed(0)
    args = script.Args(**SIZES, env="walker-dir", horizon=200, num_threads=1)
    make_env = functools.cache(lambda n: gym.make_vec("walker-dir", num_envs=n, horizon=200))
    make = script.Learner if script is sop else script.make_learner
    return make(make_env, make_env(1).unwrapped.task_set("train")[:tasks], args)


def test_blocks_are_pearls_where_walkers_fall():
    """A prior block, then one of the posterior that stays out of the context."""
    ours, theirs = real_learner(sop), real_learner(pearl)
    tasks, contexts, rng = torch.tensor([0, 1, 0]), [sop.Index(3), pearl.Index(3)], [generator(), generator()]
    for steps, infer in ((250, False), (500, True)):
        one = sop.collect(ours, tasks, contexts[0], steps, infer, rng[0])
        two = pearl.collect(theirs, tasks, contexts[1], steps, infer, not infer, rng[1])
        assert one == two and ours.frames == theirs.frames > 3 * steps
    for a, b in ((ours.rl, theirs.rl), (ours.context, theirs.context), contexts):
        assert all(torch.equal(x, y) for x, y in zip(a.rows, b.rows, strict=True))
    for rows in ours.rl.rows:
        for x, y in zip(ours.storage.read(rows[None]), theirs.storage.read(rows[None]), strict=True):
            assert torch.equal(x, y)
    assert torch.equal(rng[0].get_state(), rng[1].get_state())


# -- runs --------------------------------------------------------------------------------------------------------------


def test_with_one_cluster_it_is_pearl_up_to_the_probes_offset(monkeypatch, tmp_path):
    """Before the herd as it is, then from the networks and random numbers with which the member begins."""
    begin, collect = [], sop.collect

    def watch(learner, tasks, contexts, steps, infer, rng):
        if steps == 15:  # the first data of a learner
            begin.append((learner, rng.get_state(), {k: v.clone() for k, v in learner.agent.state_dict().items()}))
        return collect(learner, tasks, contexts, steps, infer, rng)

    monkeypatch.setattr(sop, "collect", watch)
    flags = TINY
    herd = dict(clusters=1, probe_iterations=2, embed_repeats=2)
    path = train(sop, iterations=5, run_dir=str(tmp_path / "sop"), **flags, **herd)
    (probe, *_), (member, state, weights) = begin
    assert member is not probe

    first = train(pearl, iterations=2, run_dir=str(tmp_path / "first"), **flags)
    make_agent = pearl.make_agent

    def members(*args):
        agent = make_agent(*args)
        agent.load_state_dict(weights)
        return agent

    monkeypatch.setattr(pearl, "make_agent", members)
    args = pearl.Args(preset="paper", num_threads=1, iterations=3, run_dir=str(tmp_path / "second"), **flags)
    second = pearl.Run(args)
    second.rng.set_state(state)
    pearl.train(args, second)

    ours, metrics = rows(path / "metrics.csv"), rows(first / "metrics.csv") + rows(second.path / "metrics.csv")
    offset = int(ours[1]["charts/frames"]) + 6 * 2 * 5
    for n, (a, b) in enumerate(zip(ours, metrics, strict=True)):
        shared = (a.keys() & b.keys()) - {"iteration", "charts/frames"}
        assert len(shared) == 7 and {k: a[k] for k in shared} == {k: b[k] for k in shared}
        assert int(a["charts/frames"]) == int(b["charts/frames"]) + (offset if n > 1 else 0)
    for a, b in zip(rows(path / "eval.csv")[:3], rows(first / "eval.csv"), strict=True):
        assert b.items() <= a.items(), "until there is a herd, the evaluation of a single learner"


def test_the_oracle_of_a_single_cluster_is_pearl(monkeypatch, tmp_path):
    """The whole run: no probe, no embedding, every episode of a test the member's."""
    flags = TINY | dict(env="cheetah-vel", iterations=2, eval_prior_episodes=2)
    path = train(sop, run_dir=str(tmp_path / "sop"), oracle=True, clusters=1, probe_iterations=1, **flags)
    make_agent = pearl.make_agent
    monkeypatch.setattr(pearl, "make_agent", lambda *a: [make_agent(*a) for _ in range(2)][1])  # the probe's are first
    single = train(pearl, run_dir=str(tmp_path / "pearl"), **flags)
    for name, count in (("metrics", 9), ("eval", 6)):
        for a, b in zip(rows(path / f"{name}.csv"), rows(single / f"{name}.csv"), strict=True):
            assert b.items() <= a.items() and len(b) == count
    assert {*np.load(path / "eval.npz")["learner"]} == {1} and not np.load(path / "eval.npz")["train_learner"].any()


def test_the_oracle_has_a_member_for_each_robot(monkeypatch, tmp_path):
    calls = spy_on(monkeypatch, sop, "gradient_step")
    monkeypatch.delattr(sop, "observe")
    flags = TINY | dict(env="ml2", train_tasks=4, iterations=2, probe_iterations=1, oracle=True)
    run = train(sop, run_dir=str(tmp_path), **flags)
    for (learner, _), _ in calls:
        assert len({*learner.tasks.cluster}) == 1 and len(learner.tasks) == 2 and learner.args.visits == 3
    (last,) = rows(run / "eval.csv")[-1:]
    assert float(last["eval/accuracy"]) == float(last["herd/purity"]) == float(last["eval/ari"]) == 1
    data = np.load(run / "eval.npz")
    assert data["learner"].tolist() == (1 + data["cluster"]).tolist()
    assert [{k: int(v) for k, v in row.items() if k.startswith("frames/")} for row in rows(run / "metrics.csv")] == [
        {"frames/probe": 0, "frames/embedding": 0, "frames/member_1": n, "frames/member_2": n} for n in (90, 60)
    ]


@pytest.mark.parametrize("labels, owner", [
    ([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0, 2, 1, 1], [1, 2, 2, 3, 1, 2]),
    ([0, 0, 2, 0, 0, 2, 1, 1, 2, 1, 1, 2, 0, 0, 2, 1, 1, 2], [1, 1, 2, 2, 1, 2]),  # nobody is with the third
])  # fmt: skip
def test_members_learn_what_they_own_in_equal_parts_and_all_frames_count(monkeypatch, tmp_path, labels, owner):
    """Most of the three points of a task decide; a cluster without a task has no member."""
    fixed, steps, blocks = SimpleNamespace(fit_predict=lambda x: np.array(labels)), [], []
    monkeypatch.setattr(sop, "AgglomerativeClustering", lambda clusters: fixed)
    for kept, name, original in ((steps, "gradient_step", sop.gradient_step), (blocks, "collect", sop.collect)):

        def watch(learner, *rest, kept=kept, original=original):
            result = original(learner, *rest)
            kept.append((learner, learner.tasks.params, learner.args.visits, result))
            return result

        monkeypatch.setattr(sop, name, watch)
    path = train(sop, run_dir=str(tmp_path), **TINY, clusters=3, probe_iterations=1, embed_repeats=3, iterations=3)
    owner, members = np.array(owner), sorted({*owner})
    pool = gym.make_vec("point-goal-4c").unwrapped.task_set("train").params[:6]
    assert len(steps) == 2 * (1 + 2 * len(members)) and len(blocks) == 3 + (3 + 2) * len(members)
    for n, (_, params, visits, _) in enumerate(steps):
        mine = owner == members[(n // 2 - 1) % len(members)] if n > 1 else owner > 0
        np.testing.assert_array_equal(params, pool[mine])
        assert visits == (6 // len(members) if n > 1 else 6)
    assert len({id(learner) for learner, *_ in steps}) == 1 + len(members)

    table = rows(path / "metrics.csv")
    names = ["frames/probe", "frames/embedding", *(f"frames/member_{m}" for m in (1, 2, 3))]
    assert [k for k in table[0] if k.startswith("frames/")] == names
    last = [returns for *_, returns in blocks[-2 * len(members) :]]  # of every member, before and after it knows z
    for column, mean in (("prior", np.mean(last[::2])), ("extra", np.mean(last[1::2]))):
        assert float(table[-1][f"train/return_{column}"]) == pytest.approx(mean, rel=1e-5), column
    spent = [[int(row[k]) for k in names] for row in table]
    block = [6 // len(members) * 20 * int((owner == m).any()) for m in (1, 2, 3)]  # every visit 10 and 10 steps
    first = [15 * int((owner == m).sum()) for m in (1, 2, 3)]
    assert spent == [[6 * 15 + 6 * 20, 0, 0, 0, 0], [0, 18 * 5, *map(sum, zip(block, first))], [0, 0, *block]]
    assert [int(row["charts/frames"]) for row in table] == np.cumsum(np.sum(spent, 1)).tolist()
    saved = torch.load(path / "agent.pt", weights_only=True)["agent"]
    assert saved["herd.owner"].tolist() == owner.tolist()
    assert saved["herd.labels"].tolist() == [[1 + x for x in labels]] * 4
    assert saved["herd.phi"].any(1).all() and saved["herd.points"].any(2).all()


def test_what_is_saved_gives_the_clusters_again(tmp_path):
    """On robots that fall: coordinates, inner products and clusters from φ(T) in agent.pt."""
    flags = TINY | dict(env="ml2", horizon=60, train_tasks=4, embed_repeats=6, probe_iterations=1, iterations=2)
    run = train(sop, run_dir=str(tmp_path), **flags | dict(embedding="gradient"))
    saved, data = torch.load(run / "agent.pt", weights_only=True)["agent"], np.load(run / "eval.npz")
    points = sop.coordinates(saved["herd.phi"], saved["herd.phi"], "gradient")
    labels = sop.AgglomerativeClustering(2, linkage="ward").fit_predict(points)
    assert adjusted_rand_score(labels, saved["herd.labels"][3]) == 1 and {*data["train_learner"]} == {1, 2}
    np.testing.assert_allclose(data["train_points"][3, :, : points.shape[1]], points, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(data["train_products"], points @ points.T, rtol=1e-3, atol=1e-3)
    assert (data["train_cluster"].reshape(4, 6).sum(1) % 6 == 0).all() and sum(data["train_cluster"]) == 12
    assert data["train_points"].shape == (4, 24, 50) and data["train_learner"].shape == (24,)
    frames = int(rows(run / "metrics.csv")[1]["frames/embedding"])
    assert 24 * 20 < frames < 24 * 60, "steps after a fall are none"


def test_evaluation_spends_an_episode_on_finding_the_member(monkeypatch):
    """Every task's episodes are the probe's first, then its own member's; replayed from what is recorded."""
    args = small_args(env="ml2", horizon=30, train_tasks=4, embed_repeats=2, eval_episodes=4, eval_prior_episodes=2)
    env = gym.make_vec("ml2", num_envs=6, horizon=30)
    tasks, pool = env.unwrapped.task_set("test")[:6], env.unwrapped.task_set("train")[:4]  # clusters 0, 1, 0, 1, ...
    torch.manual_seed(0)
    learners = torch.nn.ModuleList(sop.make_agent(17, 6, args) for _ in range(3))
    for m, learner in enumerate(learners):
        learner["policy"].biases[-1].data[..., :6] = m / 3
    labels = torch.tensor([2, 2, 1, 1, 2, 2, 2, 1])  # seven right, the last point not
    herd = dict(phi=torch.randn(8, 4), labels=labels.repeat(4, 1), points=torch.randn(4, 8, 50))
    agent = dict(learners=learners, herd=herd | dict(owner=torch.tensor([2, 1, 2, 1])))
    monkeypatch.setattr(sop, "assign", lambda *a: asked.append(a) or np.array([2, 1, 2, 1, 1, 1]))
    asked, met, adapted = [], spy_on(monkeypatch, sop, "observe"), spy_on(monkeypatch, sop, "adapt")
    metrics, data = sop.evaluate(env, tasks, pool, agent, args)
    (((_, _, by, *_), (played, seed, phi)),) = met
    ((known, member, owner, new, kind),) = asked
    assert by is learners[0] and known is herd["phi"] and member.tolist() == labels.tolist()
    assert owner.tolist() == [2, 1, 2, 1] and new is phi["fisher"] and kind == "fisher"
    assert [a[2] is learners[m] for (a, _), m in zip(adapted, (1, 2), strict=True)] == [True] * 2
    assert all((a[4].eval_episodes, a[4].eval_prior_episodes) == (3, 1) for a, _ in adapted)
    for k in range(4):
        own = [played if k == 0 else adapted[m - 1][1][0][k - 1] for m in (2, 1, 2, 1, 1, 1)]
        returns = [episode.reward[i].sum().item() for i, episode in enumerate(own)]
        for part, suffix in ((slice(None), ""), (slice(0, 6, 2), "_cluster_0"), (slice(1, 6, 2), "_cluster_1")):
            found = metrics[f"eval/return_episode_{k + 1}{suffix}"]
            assert found == pytest.approx(np.mean(returns[part]), abs=1e-3)
        obs, _ = env.reset(seed=int(data["seed"][k]), options={"tasks": tasks})
        for t in range(30):
            np.testing.assert_array_equal(data["trace"][k, t], obs[:, :2])
            obs, *_ = env.step(data["action"][k, t])
    assert "eval/return_episode_5" not in metrics and data["seed"][0] == seed
    assert len({*data["seed"]}) == 4, "the probe's start is not the member's"
    assert metrics["eval/accuracy"] == pytest.approx(5 / 6) and metrics["herd/purity"] == 7 / 8
    assert metrics["herd/ari"] == pytest.approx(adjusted_rand_score(np.repeat([0, 1, 0, 1], 2), labels))
    assert 0 < metrics["eval/ari"] < 1 and 0 < metrics["eval/nmi"] < 1
    assert data["learner"].tolist() == [2, 1, 2, 1, 1, 1] and data["train_learner"].tolist() == labels.tolist()
    assert sop.evaluate(env, tasks, pool, agent, args)[0] == metrics


def test_two_signs_are_told_apart_and_their_members_need_no_context(tmp_path):
    """Rewards -(a - g)², g near -1 or 1, 20 steps: with z of the prior one PEARL gets at best -20, a member 0."""
    run = train(
        sop, env="probe-guess-sign", run_dir=str(tmp_path), horizon=20, train_tasks=20, initial_steps=20, visits=10,
        prior_steps=20, extra_steps=20, gradient_steps=50, iterations=14, probe_iterations=8, eval_every=20, batch=16,
        save_every=100, hidden=(16, 16), encoder_hidden=(16,), context=20, meta_batch=8, lr=1e-2, gamma=0.0,
        embed_repeats=2, latent_dim=1, embedding="latent", kl_weight=0.01,
    )  # fmt: skip
    before, after = ({k: float(v) for k, v in row.items()} for row in rows(run / "eval.csv"))
    assert min(after[k] for k in ("herd/purity", "eval/accuracy")) > 0.9 and after["herd/ari"] > 0.7
    assert after["herd/ari"] == after["herd/ari_latent"] and after["herd/ari_state-next-state"] < 0.2
    assert before["eval/return_episode_2"] < -18 and after["eval/return_episode_2"] > -6


# -- command line ------------------------------------------------------------------------------------------------------


def test_the_preset_of_ml2_is_the_papers_table():
    a = sop.parse_args([])
    assert a == dataclasses.replace(sop.parse_args(["--env", "ant-cheetah-dir"]), env="ml2") and a.env == "ml2"
    assert (a.latent_dim, a.encoder_hidden, a.hidden, a.meta_batch) == (5, (200,) * 3, (300,) * 3, 4)
    assert (a.gradient_steps, a.initial_steps, a.visits, a.prior_steps, a.extra_steps) == (2000, 2000, 10, 1000, 1000)
    assert (a.batch, a.context, a.horizon, a.reward_scale, a.clusters) == (256, 256, 200, 5, 2)
    assert (a.eval_episodes, a.eval_prior_episodes, a.embed_repeats, a.embedding) == (3, 2, 50, "fisher")
    ours, theirs = dataclasses.asdict(a), dataclasses.asdict(pearl.parse_args(["--env", "ml2"]))
    assert {k for k in ours.keys() & theirs.keys() if ours[k] != theirs[k]} == {"iterations"}
    assert (ours["iterations"], theirs["iterations"]) == (150, 155), "so many more for the embedding and two beginnings"


def test_more_training_tasks_than_there_are_get_one_line(tmp_path):
    with pytest.raises(SystemExit, match="--train-tasks must be at most 4: ml2 has no more"):
        train(sop, train_tasks=5, run_dir=str(tmp_path))
    assert not any(tmp_path.iterdir())


MEMBERS = "--visits must be a multiple of --clusters, --train-tasks at least --clusters"
POINTS = "--train-tasks times --embed-repeats must be from 3, and above --clusters"
EPISODES = "--eval-episodes must be at least 2 and --eval-prior-episodes"
RULES = [
    ("--iterations 10 --probe-iterations 10", "--probe-iterations must be below --iterations"),
    ("--clusters 3", MEMBERS),
    ("--clusters 5", MEMBERS),
    ("--train-tasks 2 --embed-repeats 1", POINTS),
    ("--clusters 4 --visits 8 --embed-repeats 1", POINTS),
    ("--oracle --clusters 1", "--oracle needs --clusters 2"),
    ("--env cheetah-vel --oracle", "--oracle needs --clusters 1"),
    ("--eval-episodes 1 --eval-prior-episodes 1", EPISODES),
    ("--eval-prior-episodes 4", EPISODES),
    ("--reward-scale 0", "--reward-scale and --lr must be positive"),
    ("--lr 0", "--reward-scale and --lr must be positive"),
    ("--kl-weight -1", "--kl-weight, --policy-regularisation must be at least 0"),
    ("--policy-regularisation -1", "--kl-weight, --policy-regularisation must be at least 0"),
    ("--gamma 1.1", "--gamma must be in [0, 1], and --tau in (0, 1]"),
    ("--tau 0", "--gamma must be in [0, 1], and --tau in (0, 1]"),
]


@pytest.mark.parametrize("flags, message", RULES)
def test_what_must_hold(flags, message):
    with pytest.raises(SystemExit) as caught:
        sop.parse_args(flags.split())
    assert str(caught.value) == f"sop.py: error: {message}"


def test_every_rule_has_a_case():
    names = {message if "--oracle" not in message else "oracle" for _, message in RULES}
    assert len(names) == len(sop.check(sop.Args(), envs.ENVIRONMENTS["ml2"]))
    sop.parse_args("--probe-iterations 0 --clusters 1 --train-tasks 1 --embed-repeats 3 --kl-weight 0".split())
    for flag in ("--clusters", "--embed-repeats", "--extra-steps"):
        with pytest.raises(SystemExit, match=f"{flag} must be from 1"):
            sop.parse_args([flag, "0"])


# -- every flag, every task, every block -------------------------------------------------------------------------------


def test_with_other_numbers_too_the_oracle_of_a_single_cluster_is_pearl(monkeypatch, tmp_path):
    """Every number away from its default: the same networks in the end."""
    flags = TINY | dict(env="cheetah-vel", iterations=2, prior_steps=5, extra_steps=15, kl_weight=0.3, reward_scale=2.0)
    flags |= dict(gamma=0.8, tau=0.1, lr=1e-3, policy_regularisation=0.05, next_obs_in_context=True, seed=3)
    path = train(sop, run_dir=str(tmp_path / "sop"), oracle=True, clusters=1, probe_iterations=1, **flags)
    make_agent = pearl.make_agent
    monkeypatch.setattr(pearl, "make_agent", lambda *a: [make_agent(*a) for _ in range(2)][1])  # the probe's are first
    single = train(pearl, run_dir=str(tmp_path / "pearl"), **flags)
    for a, b in zip(rows(path / "eval.csv"), rows(single / "eval.csv"), strict=True):
        assert b.items() <= a.items()
    ours, theirs = (torch.load(run / "agent.pt", weights_only=True)["agent"] for run in (path, single))
    assert all(torch.equal(ours[f"learners.1.{name}"], weight) for name, weight in theirs.items())
    frames = [[row["charts/frames"] for row in rows(run / "metrics.csv")] for run in (path, single)]
    assert frames[0] == frames[1] and int(frames[0][0]) == 6 * 15 + 6 * (5 + 15)


def test_losses_are_means_over_the_members(monkeypatch, tmp_path):
    calls = spy_on(monkeypatch, sop, "gradient_step")
    flags = TINY | dict(env="ml2", train_tasks=4, iterations=1, oracle=True)
    (row,) = rows(train(sop, run_dir=str(tmp_path), **flags) / "metrics.csv")
    assert len(calls) == 2 * 2, "two members, two steps each"
    for name in ("q_error", "kl", "v_error", "policy_loss", "log_pi"):
        wanted = np.mean([terms[name].item() for _, terms in calls])
        assert float(row[f"sac/{name}"]) == pytest.approx(wanted, rel=1e-4)
