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
from threadpoolctl import threadpool_limits

import envs

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.ticker import EngFormatter

plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3})
plt.rcParams.update({"font.size": 9, "figure.constrained_layout.use": True})

NOT_THE_METHOD = {"script", "seed", "run_dir", "name", "resume", "evaluate", "device", "num_threads", "track"}
NOT_THE_METHOD |= {"preset", "save_every", "eval_every", "eval_steps", "eval_episodes", "data", "low_rank"}
RETURN = re.compile(r"eval/return_(episode|step)_(\d+)(_cluster_\d+)?")
CLUSTER_COLOURS = plt.get_cmap("tab10").colors
COLOURS = {  # in all figures, of the first method of an algorithm
    "MILET": "C0", "RL²": "C1", "VariBAD": "C2", "PEARL": "C3", "MAML": "C4", "ProMP": "C5", "CML": "C6", "RMAML": "C8",
    "FCML": "C9", "HoM": "darkgreen", "MMAML": "teal", "SoP": "goldenrod", "MetaCURE": "indigo",
}  # fmt: skip
OTHER_COLOURS = "black", "deeppink", "lime", "sienna"  # of scripts that are not in the list
NAMES = dict(rl2="RL²", mmaml_regression="MMAML", mmaml_classification="MMAML") | {k.lower(): k for k in COLOURS}
UNMODULATED = dict(mmaml="ProMP", mmaml_regression="MAML", mmaml_classification="MAML")  # with --modulation none
TOLD = {  # with --oracle
    "MAML": "Multi-MAML", "ProMP": "Multi-ProMP", "VariBAD": "VariBAD, told the task", "SoP": "SoP, told the clusters",
}  # fmt: skip
ANCHORS = {"scripted, knows the task": "--", "no action": ":"}
MARKERS = "os^Dv<>"
LINES = "-", "--", "-.", (0, (3, 1, 1, 1, 1, 1))

# What eval.npz may hold. Sizes of one name agree; a gradient-based method has gradient steps in place of episodes.
SHAPES = {
    "params": ("task", "parameter"), "cluster": ("task",), "trace": ("episode", "state", "task", "coordinate"),
    "returns": ("episode", "task", "rollout"), "action": ("episode", "step", "task", "action"),
    "cluster_belief": ("episode", "state", "task", "inferred cluster"), "reward_weights": ("weight", "step"),
    "belief_mean": ("episode", "state", "task", "latent"), "belief_std": ("episode", "state", "task", "latent"),
    "embedding": ("task", "dimension"), "learner": ("task",), "learner_returns": ("learner", "task"),
    "train_cluster": ("point",), "train_learner": ("point",), "train_products": ("point", "point"),
    "train_points": ("kind", "point", "component"), "curves": ("stage", "shown task", "x"), "x": ("x",),
    "truth": ("shown task", "x"), "support": ("shown task", "support point", "coordinate"),
    "examples": ("mode", "image", "colour", "row", "column"),
}  # fmt: skip
HERD_EMBEDDINGS = "fisher", "state-next-state", "latent", "gradient"  # the kinds of train_points
NO_SHAPE = "alpha", "seed"  # a number, or several
X_COLUMN = {"frames": "charts/frames", "iterations": "iteration"}

# What is known of environments that only their scripts know: names of their modes, and the variance of the noise.
MODES = {
    "functions": ("sine", "line", "parabola", "hyperbolic tangent", "absolute value"),
    "images": ("OMNIGLOT", "MINI-IMAGENET", "FC100", "CUB", "AIRCRAFT"),
    "drawn": ("digits", "letters", "stripes"),
}
NOISE = 0.09


@dataclass
class Options:
    runs: tyro.conf.Positional[list[Path]]  # run folders
    out: Path | None = None  # where the figures go; default, of one run: its figures/
    x: Literal["frames", "iterations"] = "frames"  # of learning curves; frames are fair, some papers count iterations


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
        counts = [args.get(name) for name in ("horizon", "eval_prior_episodes", "shots", "ways")]
        if any(type(n) is not int or n < 1 for n in counts if n is not None):
            raise ValueError("horizon, eval_prior_episodes, shots and ways must be positive integers")
    return args


def is_supervised(args: dict) -> bool:
    """Of mmaml_regression.py, mmaml_classification.py (which has ways), or a copy: in their tasks nobody walks."""
    return "shots" in args


def must_agree(settings: list[dict]) -> None:
    """Only runs on the same tasks stand on one figure, or in one table."""
    for key in ("env", "horizon", "shots", "ways"):
        values = {args.get(key) for args in settings}
        if key == "horizon" and len(values) > 1 and None in values:
            values = (values - {None}) | {make_env(settings[0]).horizon}
        if len(values) > 1:
            raise Unusable(f"runs that differ in {key} do not compare: {', '.join(sorted(map(str, values)))}")


def no_arrays(run: Path, args: dict) -> str:
    """That a run has no eval.npz, and how it gets one."""
    script = f"python algos/{args['script']}.py"
    if (run / "agent.pt").is_file():
        return f"{run} has no eval.npz; {script} --evaluate {run} writes it"
    return f"{run} has no eval.npz; nor agent.pt: train it again, {script}"


def has_column(path: Path, beginning: str) -> bool:
    with path.open(errors="replace") as file:
        return any(name.startswith(beginning) for name in file.readline().split(","))


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
    """Of eval.npz what SHAPES and NO_SHAPE name. env: None for supervised runs."""
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
            shape, axes = list(array.shape), SHAPES.get(name)
            if axes:  # axes of one name have one size in all arrays
                known = [sizes.setdefault(axis, n) for axis, n in zip(axes, shape)]
                if len(axes) != len(shape) or shape != known or 0 in known:
                    raise ValueError(f"{name} has shape {shape}, not [{', '.join(axes)}] = {known}")
            if not np.isfinite(array).all():
                raise ValueError(f"{name} is not made of finite numbers")
        if not np.isin(data["cluster"], range(clusters)).all():
            raise ValueError(f"cluster holds other numbers than 0 to {clusters - 1}")
    return data | {"cluster": data["cluster"].astype(int)}


# == Learning curves ===================================================================================================


@dataclass
class Method:
    """Runs that differ in nothing but the seed."""

    label: str
    args: dict
    style: dict  # of its line
    tables: list[dict[str, np.ndarray]]  # eval.csv of every seed

    def returns(self) -> list[str]:
        """The pooled returns that all seeds have, in the order of adaptation."""
        names = [k for k in self.tables[0] if (match := RETURN.fullmatch(k)) and not match[3]]
        names = [k for k in names if all(k in table for table in self.tables)]
        return sorted(names, key=lambda k: int(RETURN.fullmatch(k)[2]))


def algorithm(args: dict) -> str:
    names = NAMES | (UNMODULATED if args.get("modulation") == "none" else {})
    return names.get(args["script"], args["script"])


def family(args: dict) -> str:
    """What the field calls it: a script may hold several methods."""
    name = algorithm(args)
    if args["script"] == "mmaml_regression" and name == "MMAML" and args.get("inner_steps") == 0:
        return "LSTM learner"
    return TOLD.get(name, f"{name}, oracle") if args.get("oracle") is True else name


def method_name(args: dict, settings: list[dict]) -> str:
    """Its family, its preset where presets differ, and the rarer values of flags; older scripts may lack some."""
    parts, kin = [family(args)], [other for other in settings if family(other) == family(args)]
    if len({other.get("preset") for other in kin}) > 1:
        parts.append(f"{args.get('preset') or 'no'} preset")
        kin = [other for other in kin if other.get("preset") == args.get("preset")]
    kin = [{key: value for key, value in other.items() if key not in NOT_THE_METHOD} for other in kin]
    kin = [other for n, other in enumerate(kin) if other not in kin[:n]]  # one of every method
    for key in dict.fromkeys(itertools.chain(*kin)):
        value, flag = args.get(key, "unknown"), key.replace("_", "-")
        if sum(value == other.get(key, "unknown") for other in kin) <= len(kin) / 2:
            words = " ".join(map(str, value)) if isinstance(value, list) else value
            parts.append(f"--{flag}" if value is True else f"--no-{flag}" if value is False else f"--{flag} {words}")
    return ", ".join(parts)


def methods(settings: list[dict], tables: list[dict[str, np.ndarray]]) -> list[Method]:
    """The first method of an algorithm has its colour, a second one a shade of it; of more, each another colour."""
    groups, result = defaultdict(lambda: defaultdict(list)), []
    for args, table in zip(settings, tables):
        groups[algorithm(args)][method_name(args, settings)].append((args, table))
    others = dict(zip(sorted(groups.keys() - COLOURS.keys()), itertools.cycle(OTHER_COLOURS)))
    colours = {name: to_rgb((COLOURS | others)[name]) for name in groups}
    spare = itertools.cycle([c for c in CLUSTER_COLOURS if c not in colours.values()] or CLUSTER_COLOURS)
    for name, kin in groups.items():
        for n, (label, runs) in enumerate(kin.items()):
            seeds = [args["seed"] for args, _ in runs if "seed" in args]
            if len(set(seeds)) < len(seeds):
                raise Unusable(f"two runs of {label} have the same seed: is one a copy, or of older code?")
            label += f" ({len(runs)} seed{'s' * (len(runs) > 1)}"
            label += "; mean up to the end of the shortest" * (len({table["iteration"][-1] for _, table in runs}) > 1)
            colour = next(spare) if n and len(kin) > 2 else tuple(0.6**n * c for c in colours[name])
            style = dict(color=colour, linestyle=LINES[n % len(LINES)])
            result.append(Method(f"{label})".replace("$", r"\$"), runs[0][0], style, [table for _, table in runs]))
    for n, method in enumerate(sorted(result, key=lambda method: method.style["linestyle"] != "-")):
        # of curves that coincide all are seen: the upper ones are thinner, or dashed
        method.style |= dict(zorder=2 + n / 100, linewidth=2.6 - 1.4 * (n + 1) / (len(result) + 1))
    return result


def title_of(column: str) -> str:
    kind, k, cluster = RETURN.fullmatch(column).groups()
    title = f"episode {k}" if kind == "episode" else after(int(k))
    return title + (cluster or "").replace("_cluster_", ", cluster ")


def after(k: int, modulated: bool = False) -> str:
    steps = f"{'modulation and ' * modulated}{k} gradient step{'s' * (k != 1)}"
    return f"after {steps}" if k else "before a gradient step"


def panels(compared: list[Method]) -> dict[str, list[str]]:
    """By title, the column of every method that a panel shows.

    Methods that differ in the number of episodes (or gradient steps) have only the first and the last in common.
    """
    columns = [method.returns() for method in compared]
    if all(names == columns[0] for names in columns):
        return {title_of(name): [name] * len(compared) for name in columns[0]}
    first, last = ([names[i] for names in columns] for i in (0, -1))
    return {"first: in an unknown task": first, "last: adapted to it": last}


def scripted_returns(args: dict, tasks: envs.Tasks) -> dict[str, np.ndarray]:
    """Of ANCHORS: returns in these tasks [task], mean of ten seeds. Not every environment has a script that knows."""
    env = make_env(args, num_envs=len(tasks), horizon=args.get("horizon"))
    actions = getattr(env, "oracle_action", None), lambda: np.zeros(env.action_space.shape)
    result = {}
    for label, action in zip(ANCHORS, actions):
        if action:
            result[label] = np.zeros(len(tasks))
            for seed in range(0, 10000, 1000):  # neighbouring seeds share almost all random streams
                env.reset(seed=seed, options={"tasks": tasks})
                for _ in range(env.horizon):
                    result[label] += env.step(action())[1] / 10
    return result


def learning_curves(env: envs.TaskVectorEnv, settings: list[dict], tables: list[dict], out: Path, x: str) -> None:
    """Held-out returns over x, environment frames or iterations, with scripted anchors.

    Pooled into learning_curve.png; of every true cluster, where there are several, into learning_curve_clusters.png.
    """
    name, tasks, compared = settings[0]["env"], env.task_set("test"), methods(settings, tables)
    columns, anchors = panels(compared), scripted_returns(settings[0], tasks)
    look = dict(xlabel="environment frames", ylabel="return on held-out tasks")
    levels = {f"{label}: {round(returns.mean())}": returns.mean() for label, returns in anchors.items()}
    shown = [(title, names, levels) for title, names in columns.items()]
    save(draw_curves(compared, shown, len(columns), x, look), out / "learning_curve.png", name)
    shown = []
    for m in np.unique(tasks.cluster):
        if any(k.endswith(f"_cluster_{m}") for table in tables for k in table):
            levels = {label: returns[tasks.cluster == m].mean() for label, returns in anchors.items()}
            for title, names in columns.items():
                shown.append((f"{title}, cluster {m}", [f"{k}_cluster_{m}" for k in names], levels))
    if shown:
        save(draw_curves(compared, shown, len(columns), x, look), out / "learning_curve_clusters.png", name)


def supervised_curves(settings: list[dict], tables: list[dict[str, np.ndarray]], out: Path, x: str) -> None:
    """MMAML's regression (error) and classification (accuracy): all held-out tasks, and those of every mode.

    Solid: after all gradient steps; dotted: before them, after modulation alone where there is one.
    """
    name, ways = settings[0]["env"], settings[0].get("ways")
    if ways:
        look, levels = dict(xlabel="images seen", ylabel="accuracy"), {f"chance: {1 / ways:.2f}": 1 / ways}
    else:
        look, levels = dict(xlabel="points seen", ylabel="mean squared error", yscale="log"), {f"noise: {NOISE}": NOISE}
        tables = [{k: -v if RETURN.fullmatch(k) else v for k, v in table.items()} for table in tables]
    compared = methods(settings, tables)
    ends = [(names[0], names[-1]) for names in (method.returns() for method in compared)]
    modes = sorted({match[3] for t in tables for k in t if (match := RETURN.fullmatch(k)) and match[3]})
    titles = {"": "all"} | {suffix: mode_name(name, int(suffix.removeprefix("_cluster_"))) for suffix in modes}
    before = {last + suffix: first + suffix for first, last in ends if first != last for suffix in titles}
    shown = [(title, [last + suffix for _, last in ends], levels) for suffix, title in titles.items()]
    figure = draw_curves(compared, shown, 3 if len(shown) % 3 == 0 else len(shown), x, look, before)
    save(figure, out / "learning_curve.png", f"{name}: held-out tasks after all gradient steps (dotted: before them)")


def draw_curves(
    compared: list[Method], shown: list[tuple], width: int, x: str, look: dict, before: dict | None = None
) -> plt.Figure:
    """Panels, width in a row: (title, a column of every method, levels by label); before: what is dotted beside one."""
    size, height = width * (4.2 if width < 3 else 3.4), len(shown) // width
    form = dict(figsize=(size, 2.6 * height + 0.6), sharex=True, sharey=True, squeeze=False)
    figure, axes = plt.subplots(height, width, **form)
    budgets = [table[X_COLUMN[x]] for method in compared for table in method.tables]
    budgets = [done[-1] for done in budgets if (done > 0).sum() > 1]  # not of one that has just begun
    if budgets and max(budgets) >= 10 * min(budgets):
        axes[0][0].set_xscale("log", nonpositive="mask")
    for axis, (title, columns, levels) in zip(axes.flat, shown):
        usual, all_differ = max(columns, key=columns.count), len(set(columns)) == len(columns) > 1
        for method, column in zip(compared, columns):
            draw_method(axis, method, column, before is None and (all_differ or column != usual), x)
            for table in method.tables:
                if (first := (before or {}).get(column)) in table:
                    axis.plot(table[X_COLUMN[x]], table[first], ":", color=method.style["color"], linewidth=1)
        for label, level in levels.items():
            line = ANCHORS.get(label.split(":")[0], "--")
            axis.axhline(level, color="0.4", linestyle=line, linewidth=1, label=label)
        axis.set(title=title, **look | (dict(xlabel=x) if x == "iterations" else {}))
        axis.xaxis.set_major_formatter(EngFormatter())  # 2 M
        axis.label_outer()
    if before is None:  # an untrained agent may fall out of the picture
        values = [line.get_ydata() for axis in axes.flat for line in axis.get_lines()]
        late = np.concatenate([y[len(y) // 4 :] for y in values])
        margin = 0.05 * np.ptp(late) or 1
        axes[0][0].set_ylim(late.min() - margin, late.max() + margin)
    legend_below(figure)
    return figure


def draw_method(axis: plt.Axes, method: Method, column: str, named: bool, x: str) -> None:
    """Mean and seeds of a column; named: the legend says which, for the panel shows others of other methods."""
    tables, colour = [table for table in method.tables if column in table], method.style["color"]
    if not tables:
        return
    common = reduce(np.intersect1d, [table["iteration"] for table in tables])
    kept = [np.isin(table["iteration"], common) for table in tables]
    done = np.mean([table[X_COLUMN[x]][rows] for table, rows in zip(tables, kept)], axis=0)
    values = np.stack([table[column][rows] for table, rows in zip(tables, kept)])  # [seed, n]
    kind, k, _ = RETURN.fullmatch(column).groups()
    label = f"{method.label}, {title_of(column).split(',')[0]}" if named else method.label
    if kind == "episode" and int(k) <= (method.args.get("eval_prior_episodes") or 0):
        label += ", z of the prior"  # not adapted within the episode, as others are
    if len(tables) >= 5:
        result = bootstrap((values,), np.mean, axis=0, method="percentile", rng=np.random.default_rng(0))
        axis.fill_between(done, *result.confidence_interval, alpha=0.25, color=colour, linewidth=0)
    elif len(tables) > 1:
        for table in tables:
            axis.plot(table[X_COLUMN[x]], table[column], color=colour, linewidth=0.6, alpha=0.6)
    marker = "o" if len(done) < 3 else None  # a point alone makes no line
    axis.plot(done, values.mean(0), label=label, marker=marker, markersize=3, **method.style)


def legend_below(figure: plt.Figure) -> None:
    """One legend for all panels, where it hides no curve."""
    entries = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels())}
    columns = int(figure.get_figwidth() / (0.6 + 0.065 * max(map(len, entries))))  # inches
    place = dict(loc="upper center", bbox_to_anchor=(0.5, 0), ncol=min(max(1, columns), len(entries)))
    figure.legend(entries.values(), entries.keys(), fontsize=8, **place)


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
    axis.plot(values.mean(1), label="mean of the tasks")
    band = np.quantile(values, (0.1, 0.9), axis=1)
    axis.fill_between(range(len(values)), *band, alpha=0.25, linewidth=0, label="middle 80 % of the tasks")


def cluster_map(env: envs.TaskVectorEnv, args: dict, data: dict[str, np.ndarray], path: Path) -> None:
    """Test goals (shape: true cluster) and traces, coloured by the cluster inferred after exploration, or by the true.

    A dotted line joins a goal to a trace that ends far off, but not in the first episode, where the goal is not known.
    """
    (guess, which), goals, traces = shown_cluster(data), data["params"], data["trace"]
    away = np.linalg.norm(traces - goals, axis=-1)  # [episode, state, task]
    far = np.linalg.norm(goals, axis=1).mean() / 4  # a quarter of the way
    low, high = np.quantile(traces, (0.005, 0.995), axis=(0, 1, 2))  # a stray may fall out of the picture
    low, high = np.minimum(low, goals.min(0)), np.maximum(high, goals.max(0))
    margin = 0.07 * max(high - low)
    xlim, ylim = np.stack([low - margin, high + margin], axis=1)
    unit = " (m)" if isinstance(env, envs.MujocoVectorEnv) else ""
    size = 4 * len(traces), 1.2 + 3.5 * np.ptp(ylim) / np.ptp(xlim)
    figure, axes = plt.subplots(1, len(traces), figsize=size, sharex=True, sharey=True, squeeze=False)
    for k, (axis, trace) in enumerate(zip(axes[0], traces)):
        strays = away[k, -1] > far
        for i, goal in enumerate(goals):
            colour, shape = CLUSTER_COLOURS[guess[i] % 10], MARKERS[data["cluster"][i] % 7]
            axis.plot(*trace[:, i].T, color=colour, linewidth=0.8, alpha=0.7)
            axis.plot(*trace[-1, i], ".", color=colour, markersize=4)
            axis.plot(*goal, shape, color=colour, markersize=6, markeredgecolor="black", markeredgewidth=0.6)
            if strays[i] and k > 0:
                axis.plot(*np.stack([trace[-1, i], goal]).T, ":", color=colour, linewidth=0.8)
        title = after(k, args.get("modulation", "none") != "none") if "returns" in data else f"episode {k + 1}"
        title += f": {away[k].mean():.2f} off on average,\n{away[k, -1].mean():.2f} at the end, where "
        axis.set_title(title + f"{strays.sum()} of {len(strays)} are more than {far:.2f} off", fontsize=9)
        axis.set(aspect="equal", xlabel=f"x{unit}", ylabel=f"y{unit}", xlim=xlim, ylim=ylim)
        axis.label_outer()
    score = f", NMI {nmi(data['cluster'], guess):.2f}" if which == "inferred" else ""
    key = f": colour {'and' if which == 'true' else 'inferred,'} shape true cluster{score}"
    save(figure, path, args["env"] + key * bool(data["cluster"].any()))


def return_by_velocity(env: str, data: dict[str, np.ndarray], path: Path) -> None:
    """Return of every test task over its target velocity, before and after adaptation: mean and sd of the rollouts."""
    figure, axis = plt.subplots(figsize=(5, 3.4))
    order = np.argsort(data["params"][:, 0])
    for k, returns in enumerate(data["returns"]):
        velocity, mean, sd = data["params"][order, 0], returns.mean(1)[order], returns.std(1)[order]
        (line,) = axis.plot(velocity, mean, "o-", markersize=3, label=after(k))
        axis.fill_between(velocity, mean - sd, mean + sd, alpha=0.2, color=line.get_color(), linewidth=0)
    alpha = f", α = {data['alpha']:g}" if "alpha" in data and data["alpha"].ndim == 0 else ""
    axis.set(xlabel="target velocity (m/s)", ylabel="return")
    axis.legend(fontsize=8)
    save(figure, path, f"{env}{alpha}")


def cluster_belief(env: str, data: dict[str, np.ndarray], table: dict[str, np.ndarray], path: Path) -> None:
    """The posterior's entropy and, of several true clusters, the NMI of the inferred ones, over the first episode."""
    q = data["cluster_belief"][0]  # [H+1, task, C]
    count = 1 + bool(data["cluster"].any())
    figure, axes = plt.subplots(1, count, figsize=(4 * count, 3), squeeze=False)
    if count == 2:
        left = axes[0][0]
        left.plot([nmi(data["cluster"], step.argmax(-1)) for step in q], label="inferred clusters")
        rng = np.random.default_rng(0)
        chance = np.mean([nmi(data["cluster"], rng.integers(q.shape[-1], size=q.shape[1])) for _ in range(200)])
        left.axhline(chance, color="0.4", linestyle=":", linewidth=1, label=f"chance: {chance:.2f}")
        if "eval/nmi_by_parameters" in table:
            level = table["eval/nmi_by_parameters"][-1]
            left.axhline(level, color="0.4", linestyle="--", linewidth=1, label=f"sees the task: {level:.2f}")
        left.set(ylabel="NMI", ylim=(-0.02, 1.05))
    right, uniform = axes[0][-1], np.log(q.shape[-1])
    draw_spread(right, -(q * np.log(q + 1e-8)).sum(-1))
    right.axhline(uniform, color="0.4", linestyle="-.", linewidth=1, label="uniform belief")
    right.set(ylabel="entropy of q(c) (nats)", ylim=(0, 1.1 * uniform + 0.01))
    for axis in axes[0]:
        axis.set_xlabel("step of the exploration episode")
    legend_below(figure)
    save(figure, path, env)


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
    legend_below(figure)
    save(figure, path, f"{env}: the belief; dotted: the second episode begins; colour: true cluster")


def scatter_planes(
    env: str, axes: np.ndarray, points: np.ndarray, colour: np.ndarray, shape: np.ndarray, what: str
) -> None:
    """PCA and t-SNE, a panel each, of points [n, dim], whose colour is one cluster and whose shape another, [n]."""
    points = np.pad(points, ((0, 0), (0, max(0, 2 - points.shape[1]))))  # a point in the plane needs two numbers
    tsne = TSNE(2, perplexity=max(1, min(30, len(points) // 3)), random_state=0)
    for axis, (kind, method) in zip(axes, {"PCA": PCA(2), "t-SNE": tsne}.items()):
        with threadpool_limits(1):  # on a busy machine threads wait for each other
            plane = method.fit_transform(points)
        for m in np.unique(shape):
            style = dict(marker=MARKERS[m % 7], s=np.clip(3200 / len(points), 6, 36), alpha=0.8)
            colours = [CLUSTER_COLOURS[c % 10] for c in colour[shape == m]]
            axis.scatter(*plane[shape == m].T, c=colours, label=mode_name(env, m), **style)
        axis.set_title(f"{kind}, {what}")


def embedding(env: str, data: dict[str, np.ndarray], path: Path) -> None:
    """What is known of a task after the first episode (PEARL: the last); colour inferred cluster, or else the true."""
    (colours, which), true = shown_cluster(data), data["cluster"]
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.6))
    scatter_planes(env, axes, data["embedding"], colours, true, "task embeddings")
    if which == "true" and true.any():
        legend_below(figure)
    save(figure, path, f"{env}: colour {'and' if which == 'true' else 'inferred,'} shape true cluster")


def reward_weights(env: str, data: dict[str, np.ndarray], path: Path) -> None:
    """MILET's Eq. (13): the weights of the two exploration rewards over an episode."""
    figure, axis = plt.subplots(figsize=(4.2, 3))
    for weight, name in zip(data["reward_weights"], (r"$\gamma_h$ (certainty)", r"$\gamma_c$ (consistency)")):
        axis.plot(weight, label=name)
    axis.set_xlabel("step of the exploration episode")
    axis.legend()
    save(figure, path, f"{env}: exploration reward weights, Eq. (13)")


def herd(env: str, data: dict[str, np.ndarray], path: Path) -> None:
    """What HoM and SoP cluster, from inner products; silhouettes over clusters, filled: of as many as the members."""
    values, vectors = np.linalg.eigh(data["train_products"].astype(float))
    points = vectors * np.sqrt(values.clip(0))  # the embeddings, but for a rotation
    member, true = data["train_learner"].astype(int), data["train_cluster"].astype(int)
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4))
    scatter_planes(env, axes, points, member - 1, true, f"{len(points)} embeddings")
    clusters = range(2, min(7, len(points)))
    scores = [silhouette_score(points, AgglomerativeClustering(k).fit_predict(points)) for k in clusters]
    axes[2].plot(clusters, scores, "o-", markerfacecolor="white")
    if member.max() in clusters:
        axes[2].plot(member.max(), scores[member.max() - 2], "oC0")
    axes[2].set(xlabel="clusters", ylabel="silhouette", title="Ward's clusters")
    save(figure, path, f"{env}: colour member, shape true cluster, NMI {nmi(true, member):.2f}")


def herd_embeddings(env: str, data: dict[str, np.ndarray], path: Path) -> None:
    """Herd's Fig. 3 and 4: PCA and t-SNE of SoP's points by each embedding; colour Ward's cluster, shape true one."""
    true, k = data["train_cluster"].astype(int), int(data["train_learner"].max())
    figure, axes = plt.subplots(2, len(data["train_points"]), figsize=(13, 6.4), squeeze=False)
    for column, name, points in zip(axes.T, HERD_EMBEDDINGS, data["train_points"]):
        found = AgglomerativeClustering(k).fit_predict(points)
        scatter_planes(env, column, points, found, true, f"{name}, ARI {adjusted_rand_score(true, found):.2f}")
    save(figure, path, f"{env}: colour cluster, shape true cluster")


def reaching(env: str, run: Path, path: Path) -> None:
    """RMAML's Fig. 3: the way of the first agent of every strategy, where all of them end, and how far off they are."""
    table = read_csv(run / "eval.csv", re.compile(r"eval/(distance|x|y)_\w+"))
    with blame(f"{run / 'eval.npz'} is damaged"), np.load(run / "eval.npz") as file:
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
    legend_below(figure)
    save(figure, path, env)


def learned_rates(env: str, scalar: bool, table: dict[str, np.ndarray], path: Path) -> None:
    """RMAML: α of every layer, and how many tasks of the batch, and of the replayed ones, are of every true cluster."""
    frames, batch = table["charts/frames"], [name for name in table if name.startswith("rmaml/batch_cluster_")]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3))
    layers = [name for name in table if name.startswith("policy/alpha_layer_")]
    for k, name in enumerate(layers[:1] if scalar else layers):
        label = "all parameters" if scalar else "log σ" if name == layers[-1] else f"layer {k + 1}"
        left.plot(frames, table[name], label=label)
    left.set(yscale="log", ylabel="α")
    for m, name in enumerate(batch):
        right.plot(frames, table[name], color=CLUSTER_COLOURS[m % 10], label=f"cluster {m}")
        right.plot(frames, table[name.replace("batch", "replayed")], ":", color=CLUSTER_COLOURS[m % 10])
    right.set(ylabel="tasks of the batch (dotted: replayed)", ylim=(0, None))
    for axis in (left, right):
        axis.legend(fontsize=7)
        axis.set_xlabel("environment frames")
        axis.xaxis.set_major_formatter(EngFormatter())
    save(figure, path, env)


def mode_name(env: str, mode: int) -> str:
    """Of environments that are known to their scripts alone."""
    names = MODES.get(env.split(":")[-1].split("-")[0], ())
    return names[mode] if mode < len(names) else f"cluster {mode}"


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
    legend_below(figure)
    save(figure, path, env)


def examples(env: str, data: dict[str, np.ndarray], path: Path) -> None:
    """The support images of a test task of every data set, a row each."""
    images = data["examples"].transpose(0, 1, 3, 4, 2)  # [mode, image, row, column, colour]
    figure, axes = plt.subplots(*images.shape[:2], figsize=(images.shape[1], len(images)), squeeze=False)
    for mode, row in enumerate(axes):
        for axis, image in zip(row, images[mode]):
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(mode_name(env, mode))
    save(figure, path, f"{env}: the support images of a task of every data set")


def save(figure: plt.Figure, path: Path, title: str) -> None:
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    print(path)


def draw(options: Options) -> None:
    if not options.runs:
        raise Unusable("no run folder given, see --help")
    settings = [read_args(run) for run in options.runs]
    must_agree(settings)
    single, run, args, data = len(settings) == 1, options.runs[0], settings[0], {}
    if not single and not options.out:
        raise Unusable("several runs: say where the figure goes, --out FOLDER")
    out = options.out or run / "figures"
    if has_column(run / "eval.csv", "eval/distance_"):  # the toy has no environment to look at
        if not single:
            raise Unusable("a run of rmaml_reaching.py is a figure of its own")
        return reaching(args["env"], run, out / "reaching.png")
    tables = [read_csv(run / "eval.csv") for run in options.runs]
    env = None if is_supervised(args) else make_env(args)
    if single and (run / "eval.npz").exists():
        data = read_arrays(run / "eval.npz", env)
    elif single:
        print(f"{no_arrays(run, args)}; without it there are curves alone")
    if env is None:
        supervised_curves(settings, tables, out, options.x)
    else:
        learning_curves(env, settings, tables, out, options.x)
    if single:
        figures_of_a_run(env, args, run, data, tables[0], out)


def figures_of_a_run(env: envs.TaskVectorEnv | None, args: dict, run: Path, data: dict, table: dict, out: Path) -> None:
    """Those for which data, of eval.npz, and metrics.csv have what they need."""
    name, task_is = args["env"], env and env.task_is
    if task_is == "goal" and data and data["trace"].shape[-1] == data["params"].shape[-1] == 2:
        cluster_map(env, args, data, out / "cluster_map.png")
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
    if task_is == "velocity" and "returns" in data:
        return_by_velocity(name, data, out / "return_by_velocity.png")
    metrics = run / "metrics.csv"
    if metrics.is_file() and has_column(metrics, "policy/alpha_layer_") and table["iteration"][-1] > 0:
        training = read_csv(metrics, re.compile(r"policy/alpha_layer_\d+"))
        learned_rates(name, args.get("rates") == "scalar", training, out / "learned_rates.png")
    for array, figure in dict(reward_weights=reward_weights, curves=fitted_curves, examples=examples).items():
        if array in data:
            figure(name, data, out / f"{array}.png")


def main(options: Options) -> None:
    try:
        draw(options)
    except (Unusable, OSError) as error:
        raise SystemExit(f"plot.py: error: {' '.join(str(error).split())}") from None


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
