"""Every figure of every script.

    python results/plot.py RUN                the figures of one run, into RUN/figures/
    python results/plot.py RUN RUN ... --out FOLDER   learning curves of several runs on one figure; runs that differ
                                              in nothing but the seed are one method: its mean (bold), and below five
                                              seeds each of them (thin), else the 95 % bootstrap interval of the mean;
                                              over frames, or with --x iterations as some papers count

A run is a folder with args.json and eval.csv. Figures of a single run also read eval.npz, and leave out what a run
does not have (no clusters, no goals, no beliefs).
"""

import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Literal

import gymnasium as gym
import matplotlib
import numpy as np
import tyro
from scipy.stats import bootstrap
from sklearn.cluster import AgglomerativeClustering
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import adjusted_rand_score, silhouette_score
from sklearn.metrics import normalized_mutual_info_score as nmi

import envs

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.ticker import EngFormatter

NOT_THE_METHOD = {"script", "seed", "run_dir", "name", "resume", "evaluate", "device", "num_threads", "track"}
NOT_THE_METHOD |= {"save_every", "eval_every", "eval_steps", "eval_episodes", "data", "low_rank"}
RETURN = re.compile(r"eval/return_(episode|step)_(\d+)(_cluster_\d+)?")
CLUSTER_COLOURS = plt.get_cmap("tab10").colors
COLOURS = {  # a method has one colour in all figures
    "milet": "C0", "rl2": "C1", "varibad": "C2", "pearl": "C3", "maml": "C4", "promp": "C5", "cml": "C6", "rmaml": "C8",
    "fcml": "C9", "hom": "darkgreen", "mmaml": "teal", "sop": "goldenrod", "metacure": "darkred",
}  # fmt: skip
NAMES = {
    "milet": "MILET", "rl2": "RL²", "varibad": "VariBAD", "pearl": "PEARL", "maml": "MAML", "promp": "ProMP",
    "cml": "CML", "rmaml": "RMAML", "fcml": "FCML", "hom": "HoM", "mmaml": "MMAML", "mmaml_regression": "MMAML",
    "mmaml_classification": "MMAML", "sop": "SoP", "metacure": "MetaCURE",
}  # fmt: skip
UNMODULATED = {"mmaml": "promp", "mmaml_regression": "maml", "mmaml_classification": "maml"}  # with --modulation none
OTHER_COLOURS = "black", "deeppink", "lime", "sienna"  # of scripts that are not in the list
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "font.size": 9}

# What eval.npz may hold. Sizes of one name agree; a gradient-based method has gradient steps in place of episodes.
SHAPES = {
    "params": ("task", "parameter"),
    "cluster": ("task",),
    "trace": ("episode", "state", "task", "coordinate"),
    "returns": ("episode", "task", "rollout"),
    "cluster_belief": ("episode", "state", "task", "inferred cluster"),
    "belief_mean": ("episode", "state", "task", "latent"),
    "belief_std": ("episode", "state", "task", "latent"),
    "embedding": ("task", "dimension"),
    "reward_weights": ("weight", "step"),
    "action": ("episode", "step", "task", "action"),
    "learner": ("task",),
    "learner_returns": ("learner", "task"),
    "train_cluster": ("point",),
    "train_learner": ("point",),
    "train_products": ("point", "point"),
    "train_points": ("kind", "point", "component"),
    "curves": ("stage", "shown task", "x"),
    "truth": ("shown task", "x"),
    "x": ("x",),
    "support": ("shown task", "support point", "coordinate"),
    "examples": ("mode", "image", "colour", "row", "column"),
}
HERD_EMBEDDINGS = "fisher", "state-next-state", "latent", "gradient"  # the kinds of train_points
NO_SHAPE = "alpha", "seed"  # a number, or several
X_COLUMN = {"frames": "charts/frames", "iterations": "iteration"}

# What is known of environments that only their scripts know: names of their modes, and the variance of the noise.
SUPERVISED = {"mmaml_regression", "mmaml_classification"}
OWN_ARGUMENT = dict(bias_dim="mmaml_regression", ways="mmaml_classification", repeats="rmaml_reaching", rates="rmaml")
MODES = {
    "functions": ("sine", "line", "parabola", "hyperbolic tangent", "absolute value"),
    "images": ("OMNIGLOT", "MINI-IMAGENET", "FC100", "CUB", "AIRCRAFT"),
    "drawn": ("digits", "letters", "stripes"),
}
NOISE = 0.09


@dataclass
class Options:
    runs: tyro.conf.Positional[list[Path]]
    """run folders"""
    out: Path | None = None
    """where the figures go; default: figures/ in the first run"""
    x: Literal["frames", "iterations"] = "frames"
    """over what learning curves go: frames are fair to all, some papers count iterations"""


class Unusable(Exception):
    """What is wrong with the input; it becomes the one line of an error."""


# == Reading ===========================================================================================================


@contextmanager
def blame(what: str) -> Iterator[None]:
    """Whatever exception the block raises becomes one line, which begins with what is to blame."""
    try:
        yield
    except Exception as error:
        raise Unusable(f"{what}: {error}") from None


def read_args(run: Path) -> dict:
    """args.json, checked where it is used here."""
    for name in ("args.json", "eval.csv"):
        if not (run / name).is_file():
            raise Unusable(f"{run} is not a run folder: it has no {name}")
    with blame(f"{run / 'args.json'} is damaged"):
        args = json.loads((run / "args.json").read_text())
        if not all(isinstance(args[name], str) and args[name] for name in ("script", "env")):
            raise ValueError("script and env must be names")
        counts = [args[name] for name in ("horizon", "eval_prior_episodes", "ways") if args.get(name) is not None]
        if any(type(n) is not int or n < 1 for n in counts):
            raise ValueError("horizon, eval_prior_episodes and ways must be positive integers")
    return args


def origin(args: dict) -> str:
    """The script whose figures a run has: its own, or that from which it was copied, told by an argument."""
    return next((script for argument, script in OWN_ARGUMENT.items() if argument in args), args["script"])


def make_env(args: dict, **kwargs) -> envs.TaskVectorEnv:
    with blame(f"environment {args['env']!r} cannot be made"):  # "module:id" may import anything
        env = gym.make_vec(args["env"], **kwargs).unwrapped
    if not isinstance(env, envs.TaskVectorEnv):
        raise Unusable(f"environment {args['env']!r} has no tasks")
    return env


def read_csv(path: Path, wanted: re.Pattern = RETURN) -> dict[str, np.ndarray]:
    """eval.csv or metrics.csv: columns by name, [rows] each; some must be wanted.

    The last row of a run that was killed, or still writes, may be cut, or followed by rubbish: it is left out.
    """
    *lines, _ = path.read_text(errors="replace").split("\n")  # nothing, or a line without its end
    if len(lines) < 2:
        raise Unusable(f"{path} has no rows yet")
    with blame(f"{path} is damaged"):
        names, *rows = [line.split(",") for line in lines]
        try:
            values = np.array([[float(cell) for cell in row] for row in rows])
        except ValueError:
            values = np.array([[float(cell) for cell in row] for row in rows[:-1]])
        if values.shape[1:] != (len(names),):
            raise ValueError(f"it has no rows of {len(names)} numbers")
        table = dict(zip(names, values.T))
        returns = [name for name in names if wanted.fullmatch(name)]
        if not {"iteration", "charts/frames"} <= set(names) or not returns:
            raise ValueError(f"it lacks the columns iteration, charts/frames, or any like {wanted.pattern}")
        if not np.isfinite([table[name] for name in ("iteration", "charts/frames", *returns)]).all():
            raise ValueError("it has returns, iterations or frames that are not finite")
        if (np.diff(table["iteration"]) <= 0).any() or (np.diff(table["charts/frames"]) < 0).any():
            raise ValueError("iterations and frames do not increase")
    return table


def read_arrays(path: Path, env: envs.TaskVectorEnv | None) -> dict[str, np.ndarray]:
    """Of eval.npz what SHAPES and NO_SHAPE name. env: None for SUPERVISED, in whose tasks nobody walks."""
    clusters, needed, sizes = 5, {"params", "cluster"}, dict(weight=2, stage=3, colour=3)
    if env is None:
        sizes |= dict(coordinate=2)
    else:
        clusters, needed = env.num_clusters, needed | {"trace"}
        sizes |= dict(parameter=env.task_dim, action=env.action_dim, coordinate=min(2, env.obs_dim))
    with blame(f"{path} is damaged"):
        with np.load(path) as file:
            data = {name: file[name] for name in (*SHAPES, *NO_SHAPE) if name in file.files}
        needed |= {"belief_std"} if "belief_mean" in data else set()
        needed |= {"truth", "x", "support"} if "curves" in data else set()
        if missing := sorted(needed - data.keys()):
            raise ValueError(f"it has no {', '.join(missing)}")
        for name, array in data.items():
            if name in SHAPES:
                check_shape(name, list(array.shape), SHAPES[name], sizes)
            if not np.isfinite(array).all():
                raise ValueError(f"{name} is not made of finite numbers")
        if not np.isin(data["cluster"], range(clusters)).all():
            raise ValueError(f"cluster holds other numbers than 0 to {clusters - 1}")
    return data | {"cluster": data["cluster"].astype(int)}


def check_shape(name: str, shape: list[int], axes: tuple[str, ...], sizes: dict[str, int]) -> None:
    """Axes of one name have one size in all arrays; sizes is given those that are new."""
    known = [sizes.setdefault(axis, n) for axis, n in zip(axes, shape)]
    if len(axes) != len(shape) or shape != known or 0 in known:
        raise ValueError(f"{name} has shape {shape}, not [{', '.join(axes)}] = {known}")


# == Learning curves ===================================================================================================


@dataclass
class Method:
    """Runs that differ in nothing but the seed."""

    label: str
    args: dict
    colour: tuple
    line: str
    tables: list[dict[str, np.ndarray]]  # eval.csv of every seed

    def returns(self) -> list[str]:
        """The pooled returns that all seeds have, in the order of adaptation."""
        names = [k for k in self.tables[0] if (match := RETURN.fullmatch(k)) and not match[3]]
        names = [k for k in names if all(k in table for table in self.tables)]
        return sorted(names, key=lambda k: int(RETURN.fullmatch(k)[2]))


def algorithm(args: dict) -> str:
    """The script whose algorithm a run has."""
    script = args["script"]
    return UNMODULATED.get(script, script) if args.get("modulation") == "none" else script


def family(args: dict) -> str:
    """What the field calls it: a script may hold several methods."""
    script, oracle = algorithm(args), args.get("oracle") is True
    if script == "mmaml_regression" and args.get("inner_steps") == 0:
        return "LSTM learner"
    name = NAMES.get(script, script)
    return f"Multi-{name}" if oracle and name in ("MAML", "ProMP") else f"{name}, oracle" if oracle else name


def method_name(args: dict, settings: list[dict]) -> str:
    """Its family, and the arguments in which its methods differ, but for values that more than half of them have.

    A run of an older script may lack some.
    """
    others = [other for other in settings if family(other) == family(args)]
    others = [{key: value for key, value in other.items() if key not in NOT_THE_METHOD} for other in others]
    others = [other for n, other in enumerate(others) if other not in others[:n]]  # one of every method
    parts = [family(args)]
    for key in dict.fromkeys(itertools.chain(*others)):
        value, words = args.get(key, "unknown"), key.replace("_", " ")
        like = sum(value == other.get(key, "unknown") for other in others)
        if like <= len(others) / 2:
            parts.append(words if value is True else f"no {words}" if value is False else f"{words} {value}")
    return ", ".join(parts)


def methods(settings: list[dict], tables: list[dict[str, np.ndarray]]) -> list[Method]:
    """Methods of one algorithm have shades of its colour, and lines of their own."""
    groups = defaultdict(list)
    for args, table in zip(settings, tables):
        groups[method_name(args, settings)].append((args, table))
    others = sorted({algorithm(args) for args in settings} - COLOURS.keys())
    colours = COLOURS | dict(zip(others, itertools.cycle(OTHER_COLOURS)))
    result, shade = [], defaultdict(itertools.count)
    for label, runs in groups.items():
        args, seeds = runs[0][0], [args["seed"] for args, _ in runs if "seed" in args]
        if len(set(seeds)) < len(seeds):
            raise Unusable(f"two runs of {label} have the same seed: is one a copy, or of older code?")
        colour, n = np.array(to_rgb(colours[algorithm(args)])), next(shade[algorithm(args)])
        much = 0.7 ** min(n, 2)  # more would be black or white
        colour = colour if n == 0 else colour * much if n % 2 else 1 - (1 - colour) * much  # darker, lighter, ...
        label = f"{label} ({len(runs)} seed{'s' * (len(runs) > 1)})".replace("$", r"\$")
        line = ("-", "--", "-.", ":")[n % 4]
        result.append(Method(label, args, tuple(colour), line, [table for _, table in runs]))
    return result


def title_of(column: str) -> str:
    kind, k, _ = RETURN.fullmatch(column).groups()
    return f"episode {k}" if kind == "episode" else after(int(k))


def after(k: int) -> str:
    return f"after {k} gradient step{'s' * (k != 1)}" if k else "before a gradient step"


def panels(compared: list[Method]) -> dict[str, list[str]]:
    """By title, the column of every method that a panel shows.

    Methods that differ in the number of episodes (or gradient steps) have only the first and the last in common: the
    first knows nothing of the task, the last is what adaptation makes of it.
    """
    columns = [method.returns() for method in compared]
    if all(names == columns[0] for names in columns):
        return {title_of(name): [name] * len(compared) for name in columns[0]}
    first, last = ([names[i] for names in columns] for i in (0, -1))
    return {"first: in an unknown task": first, "last: adapted to it": last}


def scripted_return(args: dict, action: str) -> np.ndarray | None:
    """Returns in the test tasks [task], mean of ten seeds: zero actions ("still"), or who knows them ("oracle")."""
    tasks = make_env(args).task_set("test")
    env = make_env(args, num_envs=len(tasks), horizon=args.get("horizon"))
    if action == "oracle" and not hasattr(env, "oracle_action"):
        return None
    total = np.zeros(len(tasks))
    for seed in range(0, 10000, 1000):  # neighbouring seeds share almost all random streams
        env.reset(seed=seed, options={"tasks": tasks})
        for _ in range(env.horizon):
            move = env.oracle_action() if action == "oracle" else np.zeros(env.action_space.shape)
            total += env.step(move)[1] / 10
    return total


def learning_curves(env: envs.TaskVectorEnv, settings: list[dict], tables: list[dict], out: Path, x: str) -> None:
    """Held-out returns over x, environment frames or iterations, with scripted anchors.

    Pooled into learning_curve.png; of every true cluster, where there are several, into learning_curve_clusters.png.
    """
    horizons = {args.get("horizon") or env.horizon for args in settings}
    for what, values in (("environments", {args["env"] for args in settings}), ("horizons", horizons)):
        if len(values) > 1:
            raise Unusable(f"runs of different {what} on one figure: {', '.join(map(str, sorted(values)))}")
    compared = methods(settings, tables)
    shown = panels(compared)
    anchors = {action: scripted_return(settings[0], action) for action in ("oracle", "still")}
    anchors = {action: returns for action, returns in anchors.items() if returns is not None}
    figure = draw_curves(compared, [shown], [{k: returns.mean() for k, returns in anchors.items()}], x)
    figure.suptitle(settings[0]["env"])
    save(figure, out / "learning_curve.png")

    cluster = env.task_set("test").cluster
    suffixes = {m: f"_cluster_{m}" for m in np.unique(cluster)}
    suffixes = {m: s for m, s in suffixes.items() if any(k.endswith(s) for table in tables for k in table)}
    if suffixes:
        rows = [{f"{k}, cluster {m}": [c + s for c in shown[k]] for k in shown} for m, s in suffixes.items()]
        levels = [{k: returns[cluster == m].mean() for k, returns in anchors.items()} for m in suffixes]
        figure = draw_curves(compared, rows, levels, x)
        figure.suptitle(settings[0]["env"])
        save(figure, out / "learning_curve_clusters.png")


def draw_curves(compared: list[Method], rows: list[dict[str, list[str]]], anchors: list[dict], x: str) -> plt.Figure:
    """The panels of every row, with the anchors of that row, by name."""
    size = 4.2 * len(rows[0]), 2.6 * len(rows) + 0.6
    figure, axes = plt.subplots(len(rows), len(rows[0]), figsize=size, sharex=True, sharey="row", squeeze=False)
    budgets = [table[X_COLUMN[x]][-1] for method in compared for table in method.tables]
    for row, row_axes, levels in zip(rows, axes, anchors):
        drawn = [(method, column) for columns in row.values() for method, column in zip(compared, columns)]
        late = [t[column][len(t[column]) // 4 :] for method, column in drawn for t in method.tables if column in t]
        shown = np.concatenate([*late, [*levels.values()]])  # an untrained agent may fall out of the picture
        margin = 0.05 * np.ptp(shown) or 1
        row_axes[0].set_ylim(shown.min() - margin, shown.max() + margin)
        row_axes[0].set_ylabel("return on held-out tasks")
        for axis, (title, columns) in zip(row_axes, row.items()):
            usual, all_differ = max(columns, key=columns.count), len(set(columns)) == len(columns) > 1
            for method, column in zip(compared, columns):
                draw_method(axis, method, column, named=all_differ or column != usual, x=x)
            for action, level in levels.items():
                name, style = ("oracle (knows the task)", "--") if action == "oracle" else ("standing still", ":")
                label = f"{name}: {round(level)}" if len(rows) == 1 else name  # every row has its own level
                axis.axhline(level, color="0.4", linestyle=style, linewidth=1, label=label)
            axis.set_title(title)
    entries = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels())}
    columns = 1 if max(map(len, entries)) > 40 else 3
    place = dict(loc="upper center", bbox_to_anchor=(0.5, 0), ncol=columns)  # below: it would hide curves
    figure.legend(entries.values(), entries.keys(), fontsize=7, **place)
    for axis in axes[-1]:
        axis.set_xlabel("environment frames" if x == "frames" else x)
    if max(budgets) >= 10 * min(budgets) > 0:
        axes[0][0].set_xscale("log", nonpositive="mask")
    for axis in axes[-1]:
        axis.xaxis.set_major_formatter(EngFormatter())  # 2 M
    return figure


def draw_method(axis: plt.Axes, method: Method, column: str, named: bool = False, x: str = "frames") -> None:
    """Mean and seeds of a column; named: the legend says which, for the panel shows others of other methods."""
    tables = [table for table in method.tables if column in table]
    if not tables:
        return
    common = reduce(np.intersect1d, [table["iteration"] for table in tables])
    kept = [np.isin(table["iteration"], common) for table in tables]
    done = np.mean([table[X_COLUMN[x]][rows] for table, rows in zip(tables, kept)], axis=0)
    values = np.stack([table[column][rows] for table, rows in zip(tables, kept)])  # [seed, n]
    kind, k, _ = RETURN.fullmatch(column).groups()
    label = f"{method.label}, {title_of(column)}" if named else method.label
    if kind == "episode" and int(k) <= (method.args.get("eval_prior_episodes") or 0):
        label += ", z of the prior"  # not adapted within the episode, as others are
    if len(tables) >= 5:
        result = bootstrap((values,), np.mean, axis=0, method="percentile", rng=np.random.default_rng(0))
        axis.fill_between(done, *result.confidence_interval, alpha=0.25, color=method.colour, linewidth=0)
    elif len(tables) > 1:
        for table in tables:
            axis.plot(table[X_COLUMN[x]], table[column], color=method.colour, linewidth=0.6, alpha=0.6)
    marker = "o" if len(done) < 3 else None  # a point alone makes no line
    style = dict(color=method.colour, linestyle=method.line, linewidth=1.8, marker=marker, markersize=3)
    axis.plot(done, values.mean(0), label=label, **style)


# == Figures of one run ================================================================================================


def shown_cluster(data: dict[str, np.ndarray]) -> tuple[np.ndarray, str]:
    """The cluster of every task that was inferred after exploration, or else the true one; and which it is."""
    if "cluster_belief" in data:
        return data["cluster_belief"][0, -1].argmax(-1), "inferred"
    if "learner" in data and ("learner_returns" in data or data["learner"].any()):  # HoM's 0 is its probe
        return data["learner"].astype(int), "inferred"
    return data["cluster"], "true"


def draw_spread(axis: plt.Axes, values: np.ndarray) -> None:
    """Of values [step, task], the mean and the range of the middle 80 % of the tasks."""
    axis.plot(values.mean(1))
    axis.fill_between(range(len(values)), *np.quantile(values, (0.1, 0.9), axis=1), alpha=0.25, linewidth=0)


def cluster_map(env: str, data: dict[str, np.ndarray], path: Path) -> None:
    """Test goals (crosses) and traces, coloured by the cluster inferred after exploration, or else by the true one.

    A dotted line joins a goal to its trace where that ends more than a quarter of the way off, after the first episode,
    in which the goal is not known.
    """
    guess, which = shown_cluster(data)
    titles = [after(k) if "returns" in data else f"episode {k + 1}" for k in range(len(data["trace"]))]
    far = np.linalg.norm(data["params"], axis=1).mean() / 4
    figure, axes = plt.subplots(1, len(titles), figsize=(4 * len(titles), 4), sharex=True, sharey=True, squeeze=False)
    for k, (axis, trace, title) in enumerate(zip(axes[0], data["trace"], titles)):
        strays = np.linalg.norm(trace[-1] - data["params"], axis=1) > far
        for i, goal in enumerate(data["params"]):
            colour = CLUSTER_COLOURS[guess[i] % 10]
            axis.plot(*trace[:, i].T, color=colour, linewidth=0.8, alpha=0.7)
            axis.plot(*goal, "x", color=colour, markersize=7, markeredgewidth=2)
            if strays[i] and k > 0:
                axis.plot(*np.stack([trace[-1, i], goal]).T, ":", color=colour, linewidth=0.8)
        axis.set(title=f"{title}: {strays.sum()} of {len(strays)} end far off", aspect="equal", xlabel="x (m)")
    axes[0][0].set_ylabel("y (m)")
    figure.set_figheight(1 + 3.4 * np.ptp(axes[0][0].get_ylim()) / np.ptp(axes[0][0].get_xlim()))
    score = f", NMI {nmi(data['cluster'], guess):.2f}" if which == "inferred" else ""
    figure.suptitle(f"{env}: {len(np.unique(guess))} {which} clusters{score}" if data["cluster"].any() else env)
    save(figure, path)


def return_by_velocity(env: str, data: dict[str, np.ndarray], path: Path) -> None:
    """Return of every test task over its target velocity, before and after adaptation: mean and sd of the rollouts."""
    figure, axis = plt.subplots(figsize=(5, 3.4))
    order = np.argsort(data["params"][:, 0])
    for k, returns in enumerate(data["returns"]):
        velocity, mean, sd = data["params"][order, 0], returns.mean(1)[order], returns.std(1)[order]
        (line,) = axis.plot(velocity, mean, "o-", markersize=3, label=after(k))
        axis.fill_between(velocity, mean - sd, mean + sd, alpha=0.2, color=line.get_color(), linewidth=0)
    alpha = f", α = {data['alpha']:g}" if "alpha" in data and data["alpha"].ndim == 0 else ""
    axis.set(xlabel="target velocity (m/s)", ylabel="return", title=f"{env}{alpha}")
    axis.legend(fontsize=8)
    save(figure, path)


def cluster_belief(env: str, data: dict[str, np.ndarray], table: dict[str, np.ndarray], path: Path) -> None:
    """NMI of the inferred clusters, and the posterior's entropy, over the steps of the exploration episode."""
    q = data["cluster_belief"][0]  # [H+1, task, C]
    entropy = -(q * np.log(q + 1e-8)).sum(-1)
    figure, axes = plt.subplots(1, 2, figsize=(8, 3))
    if data["cluster"].max() > 0:
        axes[0].plot([nmi(data["cluster"], step.argmax(-1)) for step in q], label="inferred clusters")
        rng = np.random.default_rng(0)
        chance = np.mean([nmi(data["cluster"], rng.integers(q.shape[-1], size=q.shape[1])) for _ in range(200)])
        axes[0].axhline(chance, color="0.4", linestyle=":", linewidth=1, label=f"chance: {chance:.2f}")
        if "eval/nmi_by_parameters" in table:
            level = table["eval/nmi_by_parameters"][-1]
            axes[0].axhline(level, color="0.4", linestyle="--", linewidth=1, label=f"sees the task: {level:.2f}")
        axes[0].legend(fontsize=7, loc="lower right")
    axes[0].set(xlabel="step of the exploration episode", ylabel="NMI", ylim=(-0.02, 1.05))
    draw_spread(axes[1], entropy)
    axes[1].axhline(np.log(q.shape[-1]), color="0.4", linestyle=":", linewidth=1, label="uniform belief")
    axes[1].set(
        xlabel="step of the exploration episode",
        ylabel="entropy of q(c) (nats)",
        ylim=(0, 1.1 * np.log(q.shape[-1]) + 0.01),
    )
    axes[1].legend(fontsize=7)
    figure.suptitle(env)
    save(figure, path)


def task_belief(env: str, data: dict[str, np.ndarray], path: Path) -> None:
    """Over the steps of a trial: the standard deviation of q(z), and where its mean goes, a line a test task."""
    mean, std = (np.concatenate([x[0], *x[1:, 1:]]) for x in (data["belief_mean"], data["belief_std"]))  # [H+ + 1, ...]
    direction = PCA(1).fit(mean[-1]).components_[0] if mean.shape[1] > 1 else np.eye(mean.shape[2])[0]
    figure, axes = plt.subplots(1, 2, figsize=(8, 3))
    draw_spread(axes[0], std.mean(-1))
    axes[0].set(ylabel="standard deviation of q(z)", ylim=(0, None))
    for line, cluster in zip((mean @ direction).T, data["cluster"]):
        axes[1].plot(line, color=CLUSTER_COLOURS[cluster % 10], linewidth=0.8)
    axes[1].set_ylabel("mean of q(z), first PC")
    for axis in axes:
        axis.axvline(data["belief_mean"].shape[1] - 1, color="0.4", linestyle=":", linewidth=1)
        axis.set_xlabel("step of the trial")
    figure.suptitle(f"{env}: the belief; dotted: the second episode begins; colour: true cluster")
    save(figure, path)


def planes(points: np.ndarray, perplexity: int = 30) -> dict[str, np.ndarray]:
    """Points [n, dim] in the plane, by PCA and by t-SNE, [n, 2]."""
    points = np.pad(points, ((0, 0), (0, max(0, 2 - points.shape[1]))))  # a point in the plane needs two numbers
    methods = {"PCA": PCA(2), "t-SNE": TSNE(2, perplexity=min(perplexity, len(points) - 1), random_state=0)}
    return {name: method.fit_transform(points) for name, method in methods.items()}


def draw_points(
    axis: plt.Axes, plane: np.ndarray, colour: np.ndarray, shape: np.ndarray, size: int = 16, names: list | None = None
) -> None:
    """Points [n, 2], whose colour is one cluster and whose shape another, [n] each; names: of the shapes."""
    for kind in np.unique(shape):
        mine = shape == kind
        style = dict(marker="os^Dv<>"[kind % 7], s=size, alpha=0.8, label=names and names[kind])
        axis.scatter(*plane[mine].T, c=[CLUSTER_COLOURS[c % 10] for c in colour[mine]], **style)


def embedding(env: str, data: dict[str, np.ndarray], path: Path, names: list[str] | None = None) -> None:
    """PCA and t-SNE of what the method knows of each task after the first episode (PEARL: after the last).

    Colour inferred, shape true cluster. Where no clusters are inferred, the colour is the true cluster too.
    """
    points = data["embedding"]  # [task, dim]
    colours, which = shown_cluster(data)
    many = len(points) > 100
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.6))
    for axis, (name, plane) in zip(axes, planes(points, 30 if many else 10).items()):
        draw_points(axis, plane, colours, data["cluster"], size=6 if many else 36, names=names)
        axis.set_title(f"{name} of the task embeddings")
    if names:
        legend_below(figure, axes[0], columns=5)
    figure.suptitle(f"{env}: colour {'and' if which == 'true' else 'inferred,'} shape true cluster")
    save(figure, path)


def reward_weights(data: dict[str, np.ndarray], path: Path) -> None:
    """MILET's Eq. (13): the weights of the two exploration rewards over an episode."""
    figure, axis = plt.subplots(figsize=(4.2, 3))
    for weight, name in zip(data["reward_weights"], (r"$\gamma_h$ (certainty)", r"$\gamma_c$ (consistency)")):
        axis.plot(weight, label=name)
    axis.set(xlabel="step of the exploration episode", title="exploration reward weights, Eq. (13)")
    axis.legend()
    save(figure, path)


def herd(env: str, data: dict[str, np.ndarray], path: Path) -> None:
    """PCA and t-SNE of what HoM and SoP cluster, from the inner products of the embeddings; silhouettes over clusters.

    Colour member, shape true cluster. The members' number of clusters is the filled point.
    """
    values, vectors = np.linalg.eigh(data["train_products"].astype(float))
    points = vectors * np.sqrt(values.clip(0))  # the embeddings, but for a rotation
    member, true = data["train_learner"].astype(int), data["train_cluster"].astype(int)
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4))
    for axis, (name, plane) in zip(axes, planes(points).items()):
        draw_points(axis, plane, member - 1, true)
        axis.set_title(f"{name} of {len(points)} embeddings")
    clusters = range(2, min(7, len(points)))
    scores = [silhouette_score(points, AgglomerativeClustering(k).fit_predict(points)) for k in clusters]
    axes[2].plot(clusters, scores, "o-", markerfacecolor="white")
    if member.max() in clusters:
        axes[2].plot(member.max(), scores[member.max() - 2], "oC0")
    axes[2].set(xlabel="clusters", ylabel="silhouette", title="Ward's clusters")
    figure.suptitle(f"{env}: colour member, shape true cluster, NMI {nmi(true, member):.2f}")
    save(figure, path)


def herd_embeddings(env: str, data: dict[str, np.ndarray], path: Path) -> None:
    """Herd's Fig. 3 and 4: PCA and t-SNE of SoP's points by each embedding; colour Ward's cluster, shape true one."""
    true, k = data["train_cluster"].astype(int), int(data["train_learner"].max())
    figure, axes = plt.subplots(2, len(data["train_points"]), figsize=(13, 6.4), squeeze=False)
    for column, name, points in zip(axes.T, HERD_EMBEDDINGS, data["train_points"]):
        found = AgglomerativeClustering(k).fit_predict(points)
        for axis, (kind, plane) in zip(column, planes(points).items()):
            draw_points(axis, plane, found, true)
            axis.set_title(f"{kind}, {name}, ARI {adjusted_rand_score(true, found):.2f}")
    figure.suptitle(f"{env}: colour cluster, shape true cluster")
    save(figure, path)


def reaching(table: dict[str, np.ndarray], run: Path, path: Path) -> None:
    """RMAML's Fig. 3: the way of the first agent of every strategy, where all of them end, and how far off they are."""
    with blame(f"{run / 'eval.npz'} is damaged"):
        with np.load(run / "eval.npz") as file:
            points, cluster, theta = file["params"], file["cluster"], file["theta"]  # theta [strategy, repeat, 2]
    strategies = [name.removeprefix("eval/distance_") for name in table if name.startswith("eval/distance_")]
    figure, (plane, curve) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(1.5, 1))
    plane.plot(*points[cluster == 0].T, ".", color="0.6", markersize=4, label="useful tasks")
    plane.plot(*points[cluster > 0].T, ".", color="0.85", markersize=4, label="noise tasks")
    for strategy, ends, colour in zip(strategies, theta, CLUSTER_COLOURS):
        way = table[f"eval/x_{strategy}"], table[f"eval/y_{strategy}"]
        plane.plot(*way, ".-", color=colour, linewidth=1.5, markersize=3, label=strategy)
        plane.plot(*ends.T, "o", color=colour, markersize=4, alpha=0.25, markeredgewidth=0)
        curve.plot(table["iteration"], table[f"eval/distance_{strategy}"], color=colour, label=strategy)
    plane.plot(way[0][0], way[1][0], "k*", markersize=10, label="start")
    plane.set(aspect="equal", xlabel="x", ylabel="y", title=f"ways of one agent; dots: the ends of {theta.shape[1]}")
    curve.set(xlabel="meta-iteration", ylabel="distance to the useful centre", ylim=(0, None), title="mean over agents")
    plane.legend(fontsize=7, loc="upper left")
    curve.legend(fontsize=7)
    save(figure, path)


def learned_rates(env: str, rates: str, table: dict[str, np.ndarray], path: Path) -> None:
    """RMAML: α of every layer, and how many tasks of the batch, and of the replayed ones, are of every true cluster."""
    frames, batch = table["charts/frames"], [name for name in table if name.startswith("rmaml/batch_cluster_")]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3))
    layers = [name for name in table if name.startswith("policy/alpha_layer_")]
    for k, name in enumerate(layers[:1] if rates == "scalar" else layers):
        label = "all parameters" if rates == "scalar" else "log σ" if name == layers[-1] else f"layer {k + 1}"
        left.plot(frames, table[name], label=label)
    left.set(yscale="log", xlabel="environment frames", ylabel="α")
    for m, name in enumerate(batch):
        right.plot(frames, table[name], color=CLUSTER_COLOURS[m % 10], label=f"cluster {m}")
        right.plot(frames, table[name.replace("batch", "replayed")], ":", color=CLUSTER_COLOURS[m % 10])
    right.set(xlabel="environment frames", ylabel="tasks of the batch (dotted: replayed)", ylim=(0, None))
    for axis in (left, right):
        axis.legend(fontsize=7)
        axis.xaxis.set_major_formatter(EngFormatter())
    figure.suptitle(env)
    save(figure, path)


def mode_name(env: str, mode: int) -> str:
    """Of environments that are known to their scripts alone."""
    names = MODES.get(env.split(":")[-1].split("-")[0], ())
    return names[mode] if mode < len(names) else f"cluster {mode}"


def supervised_curves(settings: list[dict], tables: list[dict[str, np.ndarray]], path: Path, x: str) -> None:
    """MMAML's regression (error) and classification (accuracy): all held-out tasks, and those of every mode.

    Solid: after all gradient steps; dotted: before them, after modulation alone where there is one.
    """
    env, is_error = settings[0]["env"], origin(settings[0]) == "mmaml_regression"
    sign = -1 if is_error else 1
    tables = [{k: sign * v if RETURN.fullmatch(k) else v for k, v in table.items()} for table in tables]
    compared = methods(settings, tables)
    for method, colour in zip(compared, itertools.cycle(CLUSTER_COLOURS)):
        method.colour = colour  # of one script: shades would be too near
    modes = sorted({match[3] for t in tables for k in t if (match := RETURN.fullmatch(k)) and match[3]})
    titles = {"": "all"} | {suffix: mode_name(env, int(suffix.removeprefix("_cluster_"))) for suffix in modes}
    anchors = {"noise": NOISE} if is_error else {}
    if settings[0].get("ways"):
        anchors["chance"] = 1 / settings[0]["ways"]
    width = len(titles) if len(titles) % 3 else 3
    shape, size = (len(titles) // width, width), (3 * width, 2.6 * (len(titles) // width) + 0.6)
    figure, axes = plt.subplots(*shape, figsize=size, sharex=True, sharey=True, squeeze=False)
    for axis, (suffix, title) in zip(axes.flat, titles.items()):
        for method in compared:
            first, last = (method.returns()[k] + suffix for k in (0, -1))
            draw_method(axis, method, last, x=x)
            for table in method.tables:
                if first != last and first in table:
                    axis.plot(table[X_COLUMN[x]], table[first], ":", color=method.colour, linewidth=1)
        for name, level in anchors.items():
            axis.axhline(level, color="0.4", linestyle="--", linewidth=1, label=f"{name}: {level:.2f}")
        axis.set(title=title, yscale="log" if is_error else "linear")
    for axis in axes[-1]:
        axis.set_xlabel(x if x == "iterations" else "points seen" if is_error else "images seen")
        axis.xaxis.set_major_formatter(EngFormatter())
        axis.locator_params(axis="x", nbins=4)
    for axis in axes[:, 0]:
        axis.set_ylabel("mean squared error" if is_error else "accuracy")
    legend_below(figure, axes[0][0], columns=2)
    figure.suptitle(f"{env}: held-out tasks after all gradient steps (dotted: before them)")
    save(figure, path)


def legend_below(figure: plt.Figure, axis: plt.Axes, columns: int) -> None:
    """One legend for all panels, of what the first has."""
    figure.legend(
        *axis.get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncol=columns, fontsize=8
    )


def fitted_curves(env: str, data: dict[str, np.ndarray], path: Path) -> None:
    """Four test functions of every family (rows): support points, and what is predicted at every stage."""
    cluster, curves = data["cluster"][: len(data["truth"])], data["curves"]  # curves [stage, shown task, x]
    modulated, adapted = (not np.array_equal(*pair) for pair in itertools.pairwise(curves))
    stages = {"before modulation" if modulated else "before adaptation": (curves[0], "0.7")}
    stages |= {"after modulation": (curves[1], "C1")} if modulated else {}
    stages |= {"after adaptation": (curves[2], "C0")} if adapted else {}
    families = np.unique(cluster)
    figure, axes = plt.subplots(len(families), 4, figsize=(11, 2.1 * len(families)), sharex=True, squeeze=False)
    for row, family in zip(axes, families):
        for axis, i in zip(row, np.flatnonzero(cluster == family)):
            truth, (x, y) = data["truth"][i], data["support"][i].T
            axis.plot(data["x"], truth, color="0.4", linestyle="--", linewidth=1, label="function")
            for stage, (values, colour) in stages.items():
                axis.plot(data["x"], values[i], color=colour, linewidth=1.2, label=stage)
            axis.plot(x, y, "o", color="black", markersize=3.5, label="support points")
            inside = np.concatenate([truth, y, curves[2, i]])  # what comes before may fall out of the picture
            margin = 0.2 * np.ptp(inside) + 0.2
            axis.set_ylim(inside.min() - margin, inside.max() + margin)
        row[0].set_ylabel(mode_name(env, family))
    legend_below(figure, axes[0][0], columns=5)
    figure.suptitle(env)
    save(figure, path)


def examples(env: str, data: dict[str, np.ndarray], path: Path) -> None:
    """The support images of a test task of every data set, a row each."""
    images = data["examples"].transpose(0, 1, 3, 4, 2)  # [mode, image, row, column, colour]
    figure, axes = plt.subplots(*images.shape[:2], figsize=(images.shape[1], len(images)), squeeze=False)
    for mode, row in enumerate(axes):
        for axis, image in zip(row, images[mode]):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(mode_name(env, mode))
    figure.suptitle(f"{env}: the support images of a task of every data set")
    save(figure, path)


def supervised(settings: list[dict], tables: list[dict], data: dict[str, np.ndarray], out: Path, x: str) -> None:
    """The figures of mmaml_regression.py and mmaml_classification.py; without data, the learning curves alone."""
    for key, what in dict(script="scripts", env="environments", shots="shots", ways="ways").items():
        if len(values := {str(args.get(key)) for args in settings}) > 1:
            raise Unusable(f"runs of different {what} on one figure: {', '.join(sorted(values))}")
    env = settings[0]["env"]
    supervised_curves(settings, tables, out / "learning_curve.png", x)
    if "curves" in data:
        fitted_curves(env, data, out / "curves.png")
    if "examples" in data:
        examples(env, data, out / "examples.png")
    if "embedding" in data and len(data["embedding"]) > 2:
        embedding(env, data, out / "embedding.png", [mode_name(env, m) for m in range(5)])


def save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    print(path)


def draw(options: Options) -> None:
    if not options.runs:
        raise Unusable("no run folder given, see --help")
    settings = [read_args(run) for run in options.runs]
    run, data = options.runs[0], {}
    out = options.out or run / "figures"
    origins = {origin(args) for args in settings}
    if "rmaml_reaching" in origins:  # the toy has no environment to look at
        if len(settings) > 1:
            raise Unusable("a run of rmaml_reaching.py is a figure of its own")
        table = read_csv(run / "eval.csv", re.compile(r"eval/(distance|x|y)_\w+"))
        out.mkdir(parents=True, exist_ok=True)
        with plt.rc_context(STYLE):
            return reaching(table, run, out / "reaching.png")
    tables = [read_csv(run / "eval.csv") for run in options.runs]
    is_supervised = not SUPERVISED.isdisjoint(origins)
    env = None if is_supervised else make_env(settings[0])
    if len(options.runs) == 1:
        if (run / "eval.npz").exists():
            data = read_arrays(run / "eval.npz", env)
        else:
            print(f"{run} has no eval.npz, so that there are curves alone")
    out.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        if is_supervised:
            return supervised(settings, tables, data, out, options.x)
        learning_curves(env, settings, tables, out, options.x)
        if len(settings) == 1:
            figures_of_a_run(env, settings[0], run, data, tables[0], out)


def figures_of_a_run(env: envs.TaskVectorEnv, args: dict, run: Path, data: dict, table: dict, out: Path) -> None:
    """Those for which data, of eval.npz, and metrics.csv have what they need."""
    name = args["env"]
    if env.task_is == "goal" and data and data["trace"].shape[-1] == data["params"].shape[-1] == 2:
        cluster_map(name, data, out / "cluster_map.png")
    if "cluster_belief" in data:
        cluster_belief(name, data, table, out / "belief.png")
    elif "belief_mean" in data:
        task_belief(name, data, out / "belief.png")
    if "embedding" in data and len(data["embedding"]) > 2:
        embedding(name, data, out / "embedding.png")
    if "train_products" in data and data["train_learner"].any():
        herd(name, data, out / "herd.png")
        if "train_points" in data:
            herd_embeddings(name, data, out / "embeddings.png")
    if env.task_is == "velocity" and "returns" in data:
        return_by_velocity(name, data, out / "return_by_velocity.png")
    if origin(args) == "rmaml" and (run / "metrics.csv").is_file() and table["iteration"][-1] > 0:
        training = read_csv(run / "metrics.csv", re.compile(r"policy/alpha_layer_\d+"))
        learned_rates(name, args["rates"], training, out / "learned_rates.png")
    if "reward_weights" in data:
        reward_weights(data, out / "reward_weights.png")


def main(options: Options) -> None:
    try:
        draw(options)
    except (Unusable, OSError) as error:
        raise SystemExit(f"plot.py: error: {' '.join(str(error).split())}") from None


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
