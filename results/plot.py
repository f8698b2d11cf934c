"""Every figure of every script.

    python results/plot.py RUN                the figures of one run, into RUN/figures/
    python results/plot.py RUN RUN ... --out FOLDER   learning curves of several runs on one figure; runs that
                                              differ in nothing but the seed: mean and 95 % bootstrap interval

A run is a folder with args.json and eval.csv. Figures of a single run also read eval.npz, and leave out what a run
does not have (no clusters, no goals, no beliefs).
"""

import csv
import json
from collections import defaultdict
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import gymnasium as gym
import matplotlib
import numpy as np
import tyro
from scipy.stats import bootstrap
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import normalized_mutual_info_score

import envs  # noqa: F401  (registers the environments)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NOT_THE_METHOD = {"script", "seed", "run_dir", "resume", "evaluate", "device", "num_threads", "track", "save_every"}
NOT_THE_METHOD |= {"eval_every", "eval_steps"}
CLUSTER_COLOURS = plt.get_cmap("tab10").colors
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "font.size": 9}


@dataclass
class Options:
    runs: tyro.conf.Positional[list[Path]]
    """run folders"""
    out: Path | None = None
    """where the figures go; default: figures/ in the first run"""


def read_csv(path: Path) -> dict[str, np.ndarray]:
    """Columns by name, [rows] each."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {key: np.array([float(row[key]) for row in rows]) for key in rows[0]}


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % bootstrap interval of the mean over the first axis, [seed, n] -> [n], [n]; with one seed, the value."""
    if len(values) == 1:
        return values[0], values[0]
    result = bootstrap((values,), np.mean, axis=0, method="percentile", rng=np.random.default_rng(0))
    return result.confidence_interval.low, result.confidence_interval.high


def scripted_return(env_id: str, horizon: int | None, action: str) -> np.ndarray | None:
    """Returns in the test tasks [task], mean of three seeds: zero actions ("still"), or who knows them ("oracle")."""
    tasks = gym.make_vec(env_id).unwrapped.task_set("test")
    env = gym.make_vec(env_id, num_envs=len(tasks), horizon=horizon)
    if action == "oracle" and not hasattr(env.unwrapped, "oracle_action"):
        return None
    total = np.zeros(len(tasks))
    for seed in range(3):
        env.reset(seed=seed, options={"tasks": tasks})
        for _ in range(env.unwrapped.horizon):
            move = env.unwrapped.oracle_action() if action == "oracle" else np.zeros(env.action_space.shape)
            total += env.step(move)[1] / 3
    return total


def learning_curves(runs: list[Path], out: Path) -> None:
    """Held-out return of every episode (or gradient step) over environment frames, with scripted anchors.

    Pooled into learning_curve.png; of every true cluster, where there are several, into learning_curve_clusters.png.
    """
    groups = defaultdict(list)
    settings = [json.loads((run / "args.json").read_text()) for run in runs]
    if len(environments := {args["env"] for args in settings}) > 1:
        raise SystemExit(f"plot.py: error: runs of different environments: {', '.join(sorted(environments))}")
    (env,) = environments
    for run, args in zip(runs, settings):
        same_script = [other for other in settings if other["script"] == args["script"]]
        shared = [k for k in args if k not in NOT_THE_METHOD and all(k in other for other in same_script)]
        differs = [f"{k}={args[k]}" for k in shared if any(args[k] != other[k] for other in same_script)]
        groups[" ".join([args["script"], *differs])].append(read_csv(run / "eval.csv"))
    anchors = {action: scripted_return(env, settings[0].get("horizon"), action) for action in ("oracle", "still")}
    every = dict.fromkeys(k for tables in groups.values() for k in tables[0])
    columns = [k for k in every if k.startswith("eval/return_")]
    pooled = [k for k in columns if "cluster" not in k]
    cluster = gym.make_vec(env).unwrapped.task_set("test").cluster
    draw_curves(groups, {k: (slice(None), anchors) for k in pooled}, env, 1, out / "learning_curve.png")
    by_cluster = {k: (cluster == int(k.split("_cluster_")[1]), anchors) for k in columns if k not in pooled}
    if by_cluster:
        rows = len(by_cluster) // len(pooled)
        ordered = dict(sorted(by_cluster.items(), key=lambda item: item[0].split("_cluster_")[::-1]))
        draw_curves(groups, ordered, env, rows, out / "learning_curve_clusters.png")


def draw_curves(groups: dict[str, list], panels: dict[str, tuple], env: str, rows: int, path: Path) -> None:
    """A panel a column of eval.csv; with it the test tasks that the column is of, and the anchors of all tasks."""
    columns = len(panels) // rows
    size = 4.2 * columns, 2.6 * rows + 0.6
    figure, axes = plt.subplots(rows, columns, figsize=size, sharex=True, sharey="row", squeeze=False)
    seen = [[] for _ in axes]  # returns that must be in the picture of a row
    for i, (axis, (column, (tasks, anchors))) in enumerate(zip(axes.flat, panels.items())):
        levels = {action: level[tasks].mean() for action, level in anchors.items() if level is not None}
        seen[i // columns] += levels.values()
        for n, (label, tables) in enumerate(groups.items()):
            if column not in tables[0]:
                continue
            common = reduce(np.intersect1d, [t["iteration"] for t in tables])
            kept = [np.isin(t["iteration"], common) for t in tables]
            frames = np.mean([t["charts/frames"][rows] for t, rows in zip(tables, kept)], axis=0)
            values = np.stack([t[column][rows] for t, rows in zip(tables, kept)])
            label = f"{label} ({len(tables)} seed{'s'[: len(tables) > 1]})"
            axis.plot(frames, values.mean(0), color=f"C{n}", label=label)
            axis.fill_between(frames, *interval(values), alpha=0.25, color=f"C{n}", linewidth=0)
            seen[i // columns] += [values[:, len(frames) // 4 :].min(), values.max()]  # untrained agents may fall out
        for action, level in levels.items():
            name, style = ("oracle (knows the task)", "--") if action == "oracle" else ("standing still", ":")
            axis.axhline(level, color="0.4", linestyle=style, linewidth=1, label=f"{name}: {round(level)}")
        axis.set_title(column.removeprefix("eval/return_").replace("_", " "))
    for axis in axes[-1]:
        axis.set_xlabel("environment frames")
    for row, values in zip(axes, seen):
        margin = 0.05 * (max(values) - min(values))
        row[0].set_ylim(min(values) - margin, max(values) + margin)
        row[0].set_ylabel("return on held-out tasks")
        most = max(row, key=lambda axis: len(axis.get_lines()))  # not every method has every episode
        most.legend(fontsize=7)
    figure.suptitle(env)
    save(figure, path)


def cluster_map(env: str, data: dict[str, np.ndarray], path: Path) -> None:
    """Test goals (crosses) and traces, coloured by the cluster inferred after exploration, or else by the true one."""
    inferred = "q" in data
    guess = data["q"][0, -1].argmax(-1) if inferred else data["cluster"]
    titles = [f"episode {k}" for k in range(1, len(data["trace"]) + 1)]
    if "alpha" in data:
        titles = [f"after {k} gradient step{'s'[k == 1 :]}" for k in range(len(data["trace"]))]
    figure, axes = plt.subplots(1, len(titles), figsize=(4 * len(titles), 4), sharex=True, sharey=True, squeeze=False)
    for axis, trace, title in zip(axes[0], data["trace"], titles):
        for i, goal in enumerate(data["params"]):
            colour = CLUSTER_COLOURS[guess[i] % 10]
            axis.plot(*trace[:, i].T, color=colour, linewidth=0.8, alpha=0.7)
            axis.plot(*goal, "x", color=colour, markersize=7, markeredgewidth=2)
        axis.set(title=title, aspect="equal", xlabel="x")
    axes[0][0].set_ylabel("y")
    clusters = f"inferred clusters, NMI {nmi(data['cluster'], guess):.2f}" if inferred else "true clusters"
    figure.suptitle(f"{env}: {len(np.unique(guess))} {clusters}")
    save(figure, path)


def return_by_velocity(env: str, data: dict[str, np.ndarray], path: Path) -> None:
    """Return of every test task over its target velocity, before and after adaptation: mean and sd of the rollouts."""
    figure, axis = plt.subplots(figsize=(5, 3.4))
    order = np.argsort(data["params"][:, 0])
    for k, returns in enumerate(data["returns"]):
        velocity, mean, sd = data["params"][order, 0], returns.mean(1)[order], returns.std(1)[order]
        (line,) = axis.plot(velocity, mean, "o-", markersize=3, label=f"after {k} gradient step{'s'[k == 1 :]}")
        axis.fill_between(velocity, mean - sd, mean + sd, alpha=0.2, color=line.get_color(), linewidth=0)
    axis.set(xlabel="target velocity (m/s)", ylabel="return", title=f"{env}, α = {data['alpha']}")
    axis.legend(fontsize=8)
    save(figure, path)


def belief(env: str, data: dict[str, np.ndarray], path: Path) -> None:
    """NMI of the inferred clusters, and the posterior's entropy, over the steps of the exploration episode."""
    q = data["q"][0]  # [H+1, task, C]
    entropy = -(q * np.log(q + 1e-8)).sum(-1)
    figure, axes = plt.subplots(1, 2, figsize=(8, 3))
    if data["cluster"].max() > 0:
        tasks = gym.make_vec(env).unwrapped
        ceiling = nmi(data["cluster"], tasks.nearest_cluster(data["params"]))
        rng = np.random.default_rng(0)
        chance = np.mean([nmi(data["cluster"], rng.integers(q.shape[-1], size=q.shape[1])) for _ in range(1000)])
        axes[0].plot([nmi(data["cluster"], step.argmax(-1)) for step in q])
        axes[0].axhline(ceiling, color="0.4", linestyle="--", linewidth=1, label=f"knows the task: {ceiling:.2f}")
        axes[0].axhline(chance, color="0.4", linestyle=":", linewidth=1, label=f"chance: {chance:.2f}")
        axes[0].legend(fontsize=7)
    axes[0].set(xlabel="step of the exploration episode", ylabel="NMI", ylim=(-0.02, 1.05))
    axes[1].plot(entropy.mean(1))
    axes[1].fill_between(range(len(q)), *np.quantile(entropy, (0.1, 0.9), axis=1), alpha=0.25, linewidth=0)
    axes[1].axhline(np.log(q.shape[-1]), color="0.4", linestyle=":", linewidth=1, label="uniform belief")
    axes[1].set(xlabel="step of the exploration episode", ylabel="entropy of q(c) (nats)", ylim=(0, None))
    axes[1].legend(fontsize=7)
    figure.suptitle(env)
    save(figure, path)


def task_belief(env: str, data: dict[str, np.ndarray], path: Path) -> None:
    """Over the steps of a trial: the standard deviation of q(z), and where its mean goes, a line a test task."""
    first, second = data["latent"]  # [H+1, task, mean and log-variance of z]
    mean, log_var = np.split(np.concatenate([first, second[1:]]), 2, axis=-1)
    std = np.exp(0.5 * log_var).mean(-1)  # [H+ + 1, task]
    direction = PCA(1).fit(mean[-1]).components_[0]
    figure, axes = plt.subplots(1, 2, figsize=(8, 3))
    axes[0].plot(std.mean(1))
    axes[0].fill_between(range(len(std)), *np.quantile(std, (0.1, 0.9), axis=1), alpha=0.25, linewidth=0)
    axes[0].set(ylabel="standard deviation of q(z)", ylim=(0, None))
    for line, cluster in zip((mean @ direction).T, data["cluster"]):
        axes[1].plot(line, color=CLUSTER_COLOURS[cluster % 10], linewidth=0.8)
    axes[1].set_ylabel("mean of q(z), first PC")
    for axis in axes:
        axis.axvline(len(first) - 1, color="0.4", linestyle=":", linewidth=1)
        axis.set_xlabel("step of the trial")
    figure.suptitle(f"{env}: the belief; dotted: the second episode begins; colour: true cluster")
    save(figure, path)


def embedding(env: str, data: dict[str, np.ndarray], path: Path) -> None:
    """PCA and t-SNE of the task embeddings (means of z) after the first episode (PEARL: after the last).

    Colour inferred, shape true cluster. Where no clusters are inferred, the colour is the true cluster too.
    """
    latent = data["latent"] if data["latent"].ndim == 2 else data["latent"][0, -1]  # mean of z, and how sure
    mean = latent[:, : latent.shape[1] // 2]  # [task, latent_dim]
    mean = np.pad(mean, ((0, 0), (0, max(0, 2 - mean.shape[1]))))  # a point in the plane needs two numbers
    guess = data["q"][0, -1].argmax(-1) if "q" in data else data["cluster"]
    maps = {"PCA": PCA(2), "t-SNE": TSNE(2, perplexity=min(10, len(mean) - 1), random_state=0)}
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.6))
    for axis, (name, method) in zip(axes, maps.items()):
        for (x, y), inferred, true in zip(method.fit_transform(mean), guess, data["cluster"]):
            axis.plot(x, y, "os^Dv<>"[true % 7], color=CLUSTER_COLOURS[inferred % 10], markersize=6, alpha=0.8)
        axis.set_title(f"{name} of the task embeddings")
    figure.suptitle(f"{env}: " + ("colour inferred, shape true cluster" if "q" in data else "true clusters"))
    save(figure, path)


def reward_weights(data: dict[str, np.ndarray], path: Path) -> None:
    """MILET's Eq. (13): the weights of the two exploration rewards over an episode."""
    figure, axis = plt.subplots(figsize=(4.2, 3))
    for weight, name in zip(data["reward_weights"], (r"$\gamma_h$ (certainty)", r"$\gamma_c$ (consistency)")):
        axis.plot(weight, label=name)
    axis.set(xlabel="step of the exploration episode", title="exploration reward weights, Eq. (13)")
    axis.legend()
    save(figure, path)


def nmi(labels: np.ndarray, clusters: np.ndarray) -> float:
    return float(normalized_mutual_info_score(labels, clusters))


def save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    print(path)


def main(options: Options) -> None:
    for run in options.runs:
        for name in ("args.json", "eval.csv"):
            if not (run / name).exists():
                raise SystemExit(f"plot.py: error: {run} is not a run folder: it has no {name}")
    plt.rcParams.update(STYLE)
    out = options.out or options.runs[0] / "figures"
    out.mkdir(parents=True, exist_ok=True)
    learning_curves(options.runs, out)
    run = options.runs[0]
    if len(options.runs) > 1 or not (run / "eval.npz").exists():
        return
    args, data = json.loads((run / "args.json").read_text()), dict(np.load(run / "eval.npz"))
    if "goal" in args["env"]:
        cluster_map(args["env"], data, out / "cluster_map.png")
    if "q" in data:
        belief(args["env"], data, out / "belief.png")
    elif "latent" in data and data["latent"].ndim == 4:
        task_belief(args["env"], data, out / "belief.png")
    if "latent" in data:
        embedding(args["env"], data, out / "embedding.png")
    if "vel" in args["env"] and "returns" in data:
        return_by_velocity(args["env"], data, out / "return_by_velocity.png")
    if "reward_weights" in data:
        reward_weights(data, out / "reward_weights.png")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
