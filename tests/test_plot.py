"""results/plot.py: which figures a run gives, what is drawn on them, and one line for what cannot be drawn."""

import importlib
import io
import json
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import probes
import pytest
from conftest import ROOT

import envs

sys.path.insert(0, str(ROOT / "results"))
import plot

H, FRAMES = 5, (0, 1000, 2000, 4000)
CURVES = {"learning_curve.png", "learning_curve_clusters.png"}
PLOT = ROOT / "results" / "plot.py"


def table(columns: list[str], frames=FRAMES, seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    rows = [[i, f, *(-200 + 10 * i + rng.uniform(0, 5, len(columns))).round(3)] for i, f in enumerate(frames)]
    return "".join(",".join(map(str, row)) + "\n" for row in [["iteration", "charts/frames", *columns], *rows])


def arrays(env: str, episodes: int = 2, states: int = H + 1) -> dict[str, np.ndarray]:
    tasks = gym.make_vec(env).unwrapped.task_set("test")
    coordinates = min(2, gym.make_vec(env).unwrapped.obs_dim)
    trace = np.linspace(0, 1, states)[None, :, None, None] * np.ones((episodes, states, len(tasks), coordinates))
    return dict(params=tasks.params, cluster=tasks.cluster, trace=trace)


def belief(data: dict[str, np.ndarray], latent: int = 3) -> dict[str, np.ndarray]:
    """Means near the true cluster, and ever less spread."""
    shape = (*data["trace"].shape[:3], latent)
    mean = data["cluster"][:, None] + np.random.default_rng(0).normal(size=shape)
    std = np.exp(-np.arange(shape[1]))[None, :, None, None] * np.ones(shape)
    return dict(belief_mean=mean, belief_std=std, embedding=mean[0, -1])


def cluster_belief(data: dict[str, np.ndarray], clusters: int = 4) -> dict[str, np.ndarray]:
    """Sure of the true cluster from the first step on."""
    q = np.tile(np.eye(clusters)[data["cluster"]], (*data["trace"].shape[:2], 1, 1))
    q[:, 0] = 1 / clusters
    return dict(cluster_belief=q, reward_weights=np.stack([np.linspace(1, 0, H), np.linspace(0, 1, H)]))


def make_run(path: Path, script="milet", env="point-goal-4c", seed=0, kind="episode", ks=(1, 2), frames=FRAMES,
             data=None, clusters=4, **args) -> Path:  # fmt: skip
    columns = [f"eval/return_{kind}_{k}{c}" for k in ks for c in ["", *(f"_cluster_{m}" for m in range(clusters))]]
    path.mkdir(parents=True)
    (path / "args.json").write_text(json.dumps(dict(script=script, env=env, seed=seed, horizon=H) | args))
    (path / "eval.csv").write_text(table(columns, frames, seed))
    if data is not None:
        np.savez_compressed(path / "eval.npz", **data)
    return path


@pytest.fixture
def drawn(monkeypatch) -> dict[str, plot.plt.Figure]:
    """The figures of plot.main by file name, instead of files."""
    figures = {}

    def save(figure, path, title):
        figure.suptitle(title)
        figures[path.name] = figure

    monkeypatch.setattr(plot, "save", save)
    yield figures
    plot.plt.close("all")


def draw(*runs: Path, **options) -> None:
    """Of a single run into its own folder, as without --out."""
    plot.main(plot.Options(list(runs), **dict(out=runs[0].parent / "out" if len(runs) > 1 else None) | options))


def error(*runs: Path, **options) -> str:
    with pytest.raises(SystemExit) as caught:
        draw(*runs, **options)
    message = str(caught.value)
    assert message.startswith("plot.py: error: ") and "\n" not in message
    return message


def lines(axis, label: str) -> list:
    """The bold line of that label, and the thin ones of its colour."""
    (bold,) = (line for line in axis.get_lines() if str(line.get_label()).startswith(label))
    return [bold, *(line for line in axis.get_lines() if line.get_color() == bold.get_color() and line is not bold)]


# == The figures of a run ==============================================================================================


def test_all_figures_of_a_run_that_infers_clusters(tmp_path, drawn):
    data = arrays("point-goal-4c")
    data |= belief(data) | cluster_belief(data) | dict(seed=3, reward=np.zeros((2, H, 32)))
    figures = {"cluster_map.png", "belief.png", "embedding.png", "reward_weights.png"}
    draw(make_run(tmp_path / "run", data=data))
    assert set(drawn) == CURVES | figures


def test_figures_of_a_run_that_infers_a_latent(tmp_path, drawn):
    data = arrays("point-goal-4c")
    run = make_run(tmp_path / "run", script="varibad", data=data | belief(data))
    draw(run)
    assert set(drawn) == CURVES | {"cluster_map.png", "belief.png", "embedding.png"}


@pytest.mark.parametrize("dim", [1, 5])
def test_figures_of_a_run_with_an_embedding_alone(tmp_path, drawn, dim):
    data = arrays("point-goal-4c", episodes=3)
    data["embedding"] = np.random.default_rng(0).normal(size=(32, dim))
    run = make_run(tmp_path / "run", script="pearl", ks=(1, 2, 3), data=data, eval_prior_episodes=1)
    draw(run)
    assert set(drawn) == CURVES | {"cluster_map.png", "embedding.png"}


def test_figures_of_a_gradient_based_run(tmp_path, drawn):
    data = arrays("point-goal-4c", states=H) | dict(returns=np.zeros((2, 32, 4)), alpha=0.1)
    run = make_run(tmp_path / "point", "maml", kind="step", ks=(0, 1), data=data)
    draw(run)
    assert set(drawn) == CURVES | {"cluster_map.png"}
    drawn.clear()
    data = arrays("cheetah-vel", states=H) | dict(returns=np.zeros((2, 40, 4)), alpha=np.zeros(7))
    run = make_run(tmp_path / "vel", "maml", "cheetah-vel", kind="step", ks=(0, 1), data=data, clusters=0)
    draw(run)
    assert set(drawn) == {"learning_curve.png", "return_by_velocity.png"}


@pytest.mark.parametrize("env", ["probe-guess-sign", "probe-goal"])
def test_figures_of_an_environment_with_one_observation(tmp_path, drawn, env):
    """No map, even where the id says that there are goals."""
    if env not in envs.ENVIRONMENTS:
        envs.register(env, type("ProbeGoal", (probes.GuessSign,), {}))
    data = arrays(env)
    run = make_run(tmp_path / "run", env=env, data=data | belief(data), clusters=2)
    draw(run)
    assert set(drawn) == CURVES | {"belief.png", "embedding.png"}


def test_without_eval_npz_and_with_old_arguments(tmp_path, drawn):
    run = make_run(tmp_path / "run", "maml", "ml2", kind="step", ks=(0, 1), clusters=2)
    (run / "args.json").write_text('{"script": "maml", "env": "ml2"}')
    draw(run)
    assert set(drawn) == CURVES


def test_cluster_map_marks_strays_once_the_goal_can_be_known(tmp_path, drawn):
    data = arrays("point-goal-4c")
    data["trace"] = np.zeros_like(data["trace"])
    data["trace"][1, -1] = data["params"]
    data["trace"][1, -1, :3] = 0
    draw(make_run(tmp_path / "run", data=data))
    first, second = drawn["cluster_map.png"].axes
    away = np.linalg.norm(data["trace"] - data["params"], axis=-1)[1]
    far = np.linalg.norm(data["params"], axis=1).mean() / 4
    assert second.get_title().startswith(f"episode 2: {away.mean():.2f} off on average,\n{away[-1].mean():.2f} at the")
    assert "32 of 32" in first.get_title() and f"3 of 32 are more than {far:.2f} off" in second.get_title()
    dotted = [[line for line in axis.get_lines() if line.get_linestyle() == ":"] for axis in (first, second)]
    assert [len(x) for x in dotted] == [0, 3]
    assert np.allclose([line.get_xydata() for line in dotted[1]], [[(0, 0), goal] for goal in data["params"][:3]])


@pytest.mark.parametrize(
    "modulation, title", [("film", "after modulation and 1 gradient step"), ("none", "after 1 gradient")]
)
def test_cluster_map_of_a_gradient_based_run(tmp_path, drawn, modulation, title):
    """Its markers are true clusters; a stray does not set the limits; only robots walk in metres."""
    data = arrays("point-4m", states=99) | dict(returns=np.zeros((2, 48, 4)))
    data["trace"][0, -40:, 0] = 1000
    run = make_run(tmp_path / "run", "mmaml", "point-4m", kind="step", ks=(0, 1), data=data, modulation=modulation)
    draw(run)
    first, second = drawn["cluster_map.png"].axes
    assert first.get_title().startswith("before a gradient step:") and second.get_title().startswith(title)
    assert first.get_xlabel() == "x" and first.get_ylabel() == "y" and not second.get_ylabel()
    assert data["params"][:, 0].max() < max(first.get_xlim()) < 9
    goals = {tuple(line.get_xydata()[0]): line.get_marker() for line in first.get_lines()}
    shapes = [goals[tuple(goal)] for goal in data["params"]]
    assert shapes == [plot.MARKERS[m] for m in data["cluster"]]
    drawn.clear()
    draw(make_run(tmp_path / "ant", env="ant-goal-4c", data=arrays("ant-goal-4c")))
    assert drawn["cluster_map.png"].axes[0].get_xlabel() == "x (m)"


def test_belief_on_one_true_cluster_is_one_panel(tmp_path, drawn):
    data = arrays("point-goal-4c") | cluster_belief(arrays("point-goal-4c"))
    draw(make_run(tmp_path / "run", data=data | dict(cluster=0 * data["cluster"])))
    (axis,) = drawn["belief.png"].axes
    assert axis.get_ylabel().startswith("entropy")


def test_belief_reaches_one_who_sees_the_task(tmp_path, drawn):
    data = arrays("point-goal-4c")
    run = make_run(tmp_path / "run", data=data | cluster_belief(data))
    table = (run / "eval.csv").read_text().splitlines()
    ends = [",eval/nmi_by_parameters", *[",1"] * len(FRAMES)]
    (run / "eval.csv").write_text("".join(f"{line}{end}\n" for line, end in zip(table, ends)))
    draw(run)
    labels = drawn["belief.png"].axes[0].get_legend_handles_labels()[1]
    assert labels == ["inferred clusters", "chance: 0.13", "sees the task: 1.00"]
    (legend,) = drawn["belief.png"].legends
    assert "middle 80 % of the tasks" in [text.get_text() for text in legend.get_texts()]
    nmi, entropy = (axis.get_lines()[0].get_ydata() for axis in drawn["belief.png"].axes)
    assert np.allclose(nmi, [0] + H * [1]) and np.allclose(entropy, [np.log(4)] + H * [0], atol=1e-5)
    assert drawn["cluster_map.png"].get_suptitle().endswith(": colour inferred, shape true cluster, NMI 1.00")


# == Learning curves ===================================================================================================


@pytest.mark.parametrize("seeds", [1, 3, 5])
def test_few_seeds_are_drawn_one_by_one(tmp_path, drawn, seeds):
    draw(*[make_run(tmp_path / str(seed), seed=seed) for seed in range(seeds)])
    for axis in drawn["learning_curve.png"].axes:
        bold, *thin = lines(axis, f"MILET ({seeds} seed{'s' * (seeds > 1)})")
        assert len(thin) == (seeds if seeds == 3 else 0) and len(axis.collections) == (seeds == 5)
        assert all(line.get_linewidth() < bold.get_linewidth() / 2 for line in thin)
        if thin:
            assert np.allclose(bold.get_ydata(), np.mean([line.get_ydata() for line in thin], axis=0))


def test_the_mean_ends_with_the_shortest_seed(tmp_path, drawn):
    runs = [make_run(tmp_path / "0"), make_run(tmp_path / "1", seed=1, frames=FRAMES[:2])]
    draw(*runs)
    bold, *thin = lines(drawn["learning_curve.png"].axes[0], "MILET (2 seeds; mean up to the end of the shortest)")
    assert [len(line.get_xdata()) for line in (bold, *thin)] == [2, 4, 2]


def test_other_numbers_of_episodes_share_the_first_and_the_last(tmp_path, drawn):
    runs = [make_run(tmp_path / "milet"), make_run(tmp_path / "maml", "maml", kind="step", ks=(0, 1, 2))]
    runs += [make_run(tmp_path / "pearl", "pearl", ks=(1, 2, 3, 4), eval_prior_episodes=1)]
    draw(*runs)
    first, last = drawn["learning_curve.png"].axes
    labels = [[label for label in axis.get_legend_handles_labels()[1] if "seed" in label] for axis in (first, last)]
    assert labels[0] == [
        "MILET (1 seed)", "MAML (1 seed), before a gradient step",
        "PEARL (1 seed), z of the prior",
    ]  # fmt: skip
    assert labels[1] == [
        "MILET (1 seed), episode 2", "MAML (1 seed), after 2 gradient steps", "PEARL (1 seed), episode 4",
    ]  # fmt: skip
    expected = plot.read_csv(runs[2] / "eval.csv")["eval/return_episode_4"]
    assert np.array_equal(lines(last, "PEARL")[0].get_ydata(), expected)
    clusters = drawn["learning_curve_clusters.png"].axes
    assert len({axis.get_ylim() for axis in clusters}) == 1, "clusters compare"
    assert [bool(axis.get_ylabel()) for axis in clusters] == 4 * [True, False]
    titles = [axis.get_title() for axis in clusters]
    assert len(titles) == 8 and "cluster 0" in titles[0] and "cluster 0" in titles[1] and "cluster 3" in titles[7]


def test_the_same_episodes_have_a_panel_each(tmp_path, drawn):
    draw(*[make_run(tmp_path / script, script) for script in ("milet", "rl2")])
    axes = drawn["learning_curve.png"].axes
    assert [axis.get_title() for axis in axes] == ["episode 1", "episode 2"]
    (legend,) = axes[0].figure.legends
    assert [text.get_text() for text in legend.get_texts()[:2]] == ["MILET (1 seed)", "RL² (1 seed)"]
    assert axes[0].xaxis.get_major_formatter()(2e6) == "2 M"


def test_an_untrained_agent_may_fall_out_of_the_picture(tmp_path, drawn):
    run = make_run(tmp_path / "run", ks=(1,), clusters=0, frames=range(0, 8000, 1000))
    whole = (run / "eval.csv").read_text()
    (run / "eval.csv").write_text(whole.replace("\n0,0,-", "\n0,0,-99999"))
    draw(run)
    (axis,) = drawn["learning_curve.png"].axes
    low, high = axis.get_ylim()
    values = lines(axis, "MILET")[0].get_ydata()
    levels = [line.get_ydata()[0] for line in axis.get_lines()[1:]]
    assert len(levels) == 2
    assert values[0] < -99999 < low < min(*values[2:], *levels) and max(*values, *levels) < high


def test_a_method_keeps_its_colour(tmp_path, drawn):
    colours = set()
    for n, scripts in enumerate([("milet", "rl2"), ("pearl", "mine", "rl2")]):
        draw(*[make_run(tmp_path / str(n) / script, script) for script in scripts])
        for axis in drawn["learning_curve.png"].axes:
            names = [plot.NAMES.get(script, script) for script in scripts]
            assert len({lines(axis, name)[0].get_color() for name in names}) == len(names)
            colours.add(lines(axis, "RL²")[0].get_color())
    assert colours == {plot.to_rgb(plot.COLOURS["RL²"])}
    assert len({plot.to_rgb(c) for c in plot.COLOURS.values()}) == len(plot.COLOURS)


def test_other_arguments_make_another_method(tmp_path, drawn):
    names = {"a": {}, "b": dict(seed=1), "c": dict(oracle=True), "d": dict(oracle=True, eval_every=3, seed=1)}
    draw(*[make_run(tmp_path / k, "maml", **dict(oracle=False) | v) for k, v in names.items()])
    axis = drawn["learning_curve.png"].axes[0]
    without, oracle = lines(axis, "MAML (2 seeds)")[0], lines(axis, "Multi-MAML (2 seeds)")[0]
    assert without.get_color() != oracle.get_color()


def test_runs_of_one_seed_are_no_seeds(tmp_path):
    runs = [make_run(tmp_path / "run"), make_run(tmp_path / "older", name="older")]
    assert "two runs of MILET have the same seed" in error(*runs)


def test_supervised_scripts_are_known_by_their_arguments():
    """Those that no other script has, so that copies are known too."""
    scripts = {path.stem: vars(importlib.import_module(path.stem).Args()) for path in (ROOT / "algos").glob("*.py")}
    supervised = {"mmaml_regression", "mmaml_classification"}
    assert {name for name, args in scripts.items() if plot.is_supervised(args)} == supervised
    assert {name for name, args in scripts.items() if "ways" in args} == {"mmaml_classification"}


@pytest.mark.parametrize(
    "script, settings, names",
    [
        ("hom", [dict(centre=False), dict(centre=True)], ["HoM, --no-centre", "HoM, --centre"]),
        ("mmaml", [dict(modulation="film"), dict(modulation="none")], ["MMAML", "ProMP"]),
        ("promp", [dict(oracle=True, lr=x) for x in (1, 2)], ["Multi-ProMP, --lr 1", "Multi-ProMP, --lr 2"]),
        ("varibad", [dict(), dict(oracle=True), dict(lr=8)],
         ["VariBAD, --lr unknown", "VariBAD, told the task", "VariBAD, --lr 8"]),
        ("maml", [dict(inner_clip=x) for x in (None, 0.0, False)],
         ["MAML, --inner-clip None", "MAML, --inner-clip 0.0", "MAML, --no-inner-clip"]),
        ("pearl", [dict(hidden=[64, 64]), dict(hidden=[300])], ["PEARL, --hidden 64 64", "PEARL, --hidden 300"]),
        ("mine", [dict()], ["mine"]),
        ("milet", [dict(r_h=True, clusters=4, seed=s) for s in (0, 1)] + [dict(r_h=False, clusters=4, seed=0),
         dict(r_h=True, clusters=2, seed=0)], ["MILET", "MILET", "MILET, --no-r-h", "MILET, --clusters 2"]),
        ("rl2", [dict(preset="paper", lr=1, gamma=1), dict(preset="fast", lr=2, gamma=2),
         dict(preset="fast", lr=2, gamma=3), dict(lr=9)],
         ["RL², paper preset", "RL², fast preset, --gamma 2", "RL², fast preset, --gamma 3", "RL², no preset"]),
    ],
    ids=str,
)  # fmt: skip
def test_methods_have_the_names_of_the_field(script, settings, names):
    settings = [dict(script=script, env="x") | args for args in settings]
    assert [plot.method_name(args, settings) for args in settings] == names


@pytest.mark.parametrize("factor, scale", [(9, "linear"), (10, "log")])
def test_frames_are_logarithmic_where_budgets_differ(tmp_path, drawn, factor, scale):
    long = make_run(tmp_path / "rl2", "rl2", frames=[factor * f for f in FRAMES])
    draw(make_run(tmp_path / "milet"), long)
    assert {axis.get_xscale() for axis in drawn["learning_curve.png"].axes} == {scale}


@pytest.mark.parametrize("begun, scale", [((0, 100), "linear"), ((0, 100, 200), "log")])
def test_a_run_that_has_just_begun_leaves_frames_linear(tmp_path, drawn, begun, scale):
    draw(make_run(tmp_path / "milet"), make_run(tmp_path / "rl2", "rl2", frames=begun))
    assert {axis.get_xscale() for axis in drawn["learning_curve.png"].axes} == {scale}


def test_of_many_variants_each_has_a_colour(tmp_path, drawn):
    """The first that of its algorithm, none that of another; of two, the second is a shade."""
    form = dict(clusters=2, kind="step", ks=(0, 1))
    runs = {("CML", n): make_run(tmp_path / f"cml{n}", "cml", lr=n, **form) for n in range(6)}
    runs |= {("MAML", n): make_run(tmp_path / f"maml{n}", "maml", lr=n, **form) for n in range(2)}
    draw(*runs.values())
    axis = drawn["learning_curve.png"].axes[0]
    colours = [lines(axis, f"{name}, --lr {n} ")[0].get_color() for name, n in runs]
    maml = plot.to_rgb(plot.COLOURS["MAML"])
    assert len(set(colours)) == 8 and colours[0] == plot.to_rgb(plot.COLOURS["CML"])
    assert set(colours[1:6]) <= set(plot.CLUSTER_COLOURS) - {maml}
    assert colours[6:] == [maml, tuple(0.6 * c for c in maml)]


def test_curves_that_coincide_are_all_seen(tmp_path, drawn):
    """What is above is thinner, and dashed lines are above the others."""
    runs = [make_run(tmp_path / script, script) for script in ("milet", "rl2")]
    draw(runs[0], make_run(tmp_path / "other", clusters=2, lr=9), runs[1])
    axis = drawn["learning_curve.png"].axes[0]
    shown = [lines(axis, name)[0] for name in ("MILET, --lr unknown", "RL²", "MILET, --lr 9")]
    assert [line.get_linestyle() for line in shown] == ["-", "-", "--"]
    height, width = ([getattr(line, f"get_{what}")() for line in shown] for what in ("zorder", "linewidth"))
    assert height == sorted(set(height)) and width == sorted(set(width), reverse=True)


# == What cannot be drawn ==============================================================================================


@pytest.mark.parametrize(
    "script, kind, ks, label",
    [("milet", "episode", (1, 2), "environment frames"), ("mmaml_classification", "step", (0, 5), "images seen")],
)
def test_curves_over_iterations(tmp_path, drawn, script, kind, ks, label):
    env = "drawn-3m" if kind == "step" else "point-goal-4c"
    supervised = dict(shots=1, ways=5) if kind == "step" else {}
    run = make_run(tmp_path / "run", script, env, kind=kind, ks=ks, **supervised)
    table = plot.read_csv(run / "eval.csv")
    for x, axis_label, column in (("frames", label, "charts/frames"), ("iterations", "iterations", "iteration")):
        draw(run, x=x)
        axis = drawn["learning_curve.png"].axes[0]
        assert axis.get_xlabel() == axis_label
        assert {tuple(line.get_xdata()) for line in lines(axis, plot.NAMES[script])} == {tuple(table[column])}
    assert not np.array_equal(table["charts/frames"], table["iteration"])


def test_runs_that_do_not_compare(tmp_path):
    runs = {"point": make_run(tmp_path / "a"), "ml2": make_run(tmp_path / "b", env="ml2", clusters=2)}
    runs["short"] = make_run(tmp_path / "c", horizon=3)
    assert "runs that differ in env do not compare: ml2, point-goal-4c" in error(runs["point"], runs["ml2"])
    assert "runs that differ in horizon do not compare: 3, 5" in error(runs["point"], runs["short"])
    assert "several runs: say where the figure goes, --out FOLDER" in error(runs["point"], runs["point"], out=None)
    old = json.loads((runs["short"] / "args.json").read_text())
    del old["horizon"]  # then it is the environment's
    (runs["short"] / "args.json").write_text(json.dumps(old))
    assert "differ in horizon do not compare: 100, 5" in error(runs["point"], runs["short"])


@pytest.mark.parametrize("tail", [b"4,50", b"4,5000,-1.0,-1", b"\0\0\0", b"\xff\xfe\0\n", b"4,5000\n", b"4,x\n"])
def test_what_a_kill_leaves_at_the_end_is_skipped(tmp_path, tail):
    run = make_run(tmp_path / "run")
    whole = plot.read_csv(run / "eval.csv")
    with (run / "eval.csv").open("ab") as file:
        file.write(tail)
    assert all(np.array_equal(column, whole[name]) for name, column in plot.read_csv(run / "eval.csv").items())
    (run / "eval.csv").write_bytes((run / "eval.csv").read_bytes().replace(b"\n", b"\r\n", 3))
    assert len(plot.read_csv(run / "eval.csv")["iteration"]) == len(FRAMES)


GOOD = table(["eval/return_episode_1"])
ARGS = dict(script="milet", env="point-goal-4c", seed=0)
BAD = {  # case: file, content (None: a folder), part of the error
    "csv empty": ("eval.csv", "", "eval.csv has no rows yet"),
    "csv with NULs alone": ("eval.csv", "\0" * 9, "eval.csv has no rows yet"),
    "csv header only": ("eval.csv", GOOD.splitlines(True)[0], "eval.csv has no rows yet"),
    "csv cut in the header": ("eval.csv", GOOD[:20], "eval.csv has no rows yet"),
    "csv cut in its only row": ("eval.csv", GOOD[: GOOD.index("\n1,")], "eval.csv has no rows yet"),
    "csv without frames": ("eval.csv", GOOD.replace("charts/frames", "x"), "lacks the columns"),
    "csv without returns": ("eval.csv", GOOD.replace("eval/return", "x"), "lacks the columns"),
    "csv with a bad number": ("eval.csv", GOOD.replace("1000", "1oo0"), "eval.csv is damaged: "),
    "csv with a short row": ("eval.csv", GOOD.replace("2,2000,", "2,"), "eval.csv is damaged: "),
    "csv with a long row": ("eval.csv", GOOD.replace("0,0,", "0,0,0,"), "eval.csv is damaged: "),
    "csv with an empty line": ("eval.csv", GOOD.replace("\n1,", "\n\n1,"), "eval.csv is damaged: "),
    "csv with NULs inside": ("eval.csv", GOOD.replace("\n1,", "\n\0\0"), "eval.csv is damaged: "),
    "csv with a header twice": ("eval.csv", GOOD + GOOD, "eval.csv is damaged: "),
    "csv that goes back": ("eval.csv", GOOD + GOOD.split("\n", 2)[1] + "\n", "do not increase"),
    "csv with nan": ("eval.csv", GOOD.replace(",2000,", ",nan,"), "not finite"),
    "csv with one name twice": ("eval.csv", GOOD.replace("iteration,", "iteration,iteration,"), "no rows of 4 numbers"),
    "csv binary": ("eval.csv", bytes(range(256)) * 8, "eval.csv is damaged"),
    "csv a folder": ("eval.csv", None, "not a run folder: it has no eval.csv"),
    "args empty": ("args.json", "", "args.json is damaged"),
    "args cut": ("args.json", '{"script": "mil', "args.json is damaged"),
    "args binary": ("args.json", b"\xff\xfe\0", "args.json is damaged"),
    "args nested deep": ("args.json", "[" * 100_000, "args.json is damaged"),
    "args a folder": ("args.json", None, "not a run folder: it has no args.json"),
    "args a list": ("args.json", [ARGS], "args.json is damaged"),
    "args a string": ("args.json", "milet".__repr__().replace("'", '"'), "args.json is damaged"),
    "args null": ("args.json", "null", "args.json is damaged"),
    "args without script": ("args.json", {"env": "point-goal-4c"}, "args.json is damaged: 'script'"),
    "args without env": ("args.json", {"script": "milet"}, "args.json is damaged: 'env'"),
    "args with a list for env": ("args.json", ARGS | {"env": ["ml2"]}, "script and env must be names"),
    "args with null for script": ("args.json", ARGS | {"script": None}, "script and env must be names"),
    "args with an unknown env": ("args.json", ARGS | {"env": "point-gaol-4c"}, "'point-gaol-4c' cannot be made"),
    "args with an empty module": ("args.json", ARGS | {"env": ":"}, "':' cannot be made"),
    "args with another env": ("args.json", ARGS | {"env": "CartPole-v1"}, "has no tasks"),
    "args with a float horizon": ("args.json", ARGS | {"horizon": 5.0}, "must be positive integers"),
    "args with no horizon left": ("args.json", ARGS | {"horizon": 0}, "must be positive integers"),
    "args with a bad count": ("args.json", ARGS | {"eval_prior_episodes": "1"}, "must be positive integers"),
    "npz empty": ("eval.npz", "", "eval.npz is damaged"),
    "npz text": ("eval.npz", "hello", "eval.npz is damaged"),
    "npz a folder": ("eval.npz", None, "eval.npz is damaged"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_get_one_line(tmp_path, case):
    name, content, expected = BAD[case]
    path = make_run(tmp_path / "run", ks=(1,), clusters=0) / name
    path.unlink(missing_ok=True)
    if content is None:
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    assert expected in error(tmp_path / "run")
    assert not (tmp_path / "run" / "figures").exists(), "nothing is drawn of what is damaged"


DATA = arrays("point-goal-4c")
BAD_ARRAYS = {  # case: what changes, part of the error
    "no trace": (dict(trace=None), "eval.npz is damaged: it has no trace"),
    "nothing": (dict.fromkeys(DATA), "it has no cluster, params, trace"),
    "mean without std": (dict(belief_mean=belief(DATA)["belief_mean"]), "has no belief_std"),
    "strings": (dict(params=np.full(DATA["params"].shape, "a")), "eval.npz is damaged: "),
    "nan": (dict(params=DATA["params"] * np.nan), "params is not made of finite numbers"),
    "objects": (dict(trace=np.array([None])), "eval.npz is damaged"),
    "other params": (dict(params=DATA["params"][:, :1]), "params has shape [32, 1], not [task, parameter]"),
    "fewer tasks": (dict(trace=DATA["trace"][:, :, :5]), "trace has shape"),
    "a coordinate too few": (dict(trace=DATA["trace"][..., :1]), "trace has shape"),
    "a number too few": (dict(trace=DATA["trace"][..., 0]), "trace has shape"),
    "no episodes": (dict(trace=DATA["trace"][:0]), "trace has shape"),
    "an unknown cluster": (dict(cluster=DATA["cluster"] + 1), "other numbers than 0 to 3"),
    "a fraction of a cluster": (dict(cluster=DATA["cluster"] / 2), "other numbers than 0 to 3"),
    "another belief": (dict(cluster_belief=np.ones((2, H + 1, 31, 4))), "cluster_belief has shape"),
    "one weight": (dict(reward_weights=np.ones((1, H))), "reward_weights has shape [1, 5], not [weight, step]"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays_get_one_line(tmp_path, case):
    change, expected = BAD_ARRAYS[case]
    data = {name: array for name, array in (DATA | change).items() if array is not None}
    assert expected in error(make_run(tmp_path / "run", data=data))


def test_damaged_arrays_get_one_line(tmp_path):
    """A byte changed, or the end cut off, at many places."""
    run = make_run(tmp_path / "run", data=DATA)
    whole = (run / "eval.npz").read_bytes()
    env = gym.make_vec("point-goal-4c").unwrapped
    places, refused = range(0, len(whole), max(1, len(whole) // 50)), {"cut": 0, "changed": 0}
    for n in places:
        for how, bad in dict(cut=whole[:n], changed=whole[:n] + bytes([whole[n] ^ 255]) + whole[n + 1 :]).items():
            (run / "eval.npz").write_bytes(bad)
            try:
                plot.read_arrays(run / "eval.npz", env)
            except plot.Unusable:
                refused[how] += 1
    assert refused["cut"] == len(places) and refused["changed"] > len(places) // 2
    stream = io.BytesIO()
    np.save(stream, DATA["params"])
    (run / "eval.npz").write_bytes(stream.getvalue())
    assert "eval.npz is damaged" in error(run)


def test_bad_paths_get_one_line(tmp_path):
    run = make_run(tmp_path / "run")
    assert "no run folder given" in error()
    assert "not a run folder: it has no args.json" in error(tmp_path / "nothing")
    assert "not a run folder: it has no args.json" in error(run / "eval.csv")
    assert "File exists" in error(run, out=run / "eval.csv")
    assert "Not a directory" in error(run, out=run / "eval.csv" / "figures")
    assert "/proc" in error(run, out=Path("/proc/figures"))


def test_from_the_command_line(tmp_path):
    runs = [str(make_run(tmp_path / str(seed), seed=seed)) for seed in range(2)]
    command = [sys.executable, str(PLOT)]
    done = subprocess.run([*command, *runs, "--out", str(tmp_path / "out")], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(tmp_path / "out" / name) for name in sorted(CURVES)]
    assert {path.name for path in (tmp_path / "out").iterdir()} == CURVES
    nothing = subprocess.run(command, capture_output=True, text=True)
    assert (nothing.returncode, nothing.stderr) == (1, "plot.py: error: no run folder given, see --help\n")


# -- RMAML -------------------------------------------------------------------------------------------------------------

STRATEGIES = "uniform", "easy", "medium", "hard"


def make_toy(path: Path) -> Path:
    """A run of rmaml_reaching.py with three evaluations and two agents of every strategy."""
    columns = [f"eval/{what}_{s}" for s in STRATEGIES for what in ("return", "distance", "x", "y")]
    path.mkdir(parents=True)
    (path / "args.json").write_text(json.dumps(dict(script="rmaml_reaching", env="reaching-2d", horizon=1)))
    (path / "eval.csv").write_text(table(columns, frames=(0, 20, 40)))
    points, theta = np.random.default_rng(0).normal(size=(9, 2)), np.zeros((4, 2, 2))
    np.savez_compressed(path / "eval.npz", params=points, cluster=np.arange(9) % 3, theta=theta)
    return path


def test_the_toy_of_rmaml_is_one_figure(tmp_path, drawn):
    run = make_toy(tmp_path / "toy")
    draw(run)
    assert set(drawn) == {"reaching.png"}
    plane, curve = drawn["reaching.png"].axes
    rows = plot.read_csv(run / "eval.csv", plot.re.compile(r"eval/x_\w+"))
    for strategy in STRATEGIES:
        (way,) = (line for line in plane.get_lines() if line.get_label() == strategy)
        np.testing.assert_array_equal(way.get_xydata().T, [rows[f"eval/{a}_{strategy}"] for a in "xy"])
        (far,) = (line for line in curve.get_lines() if line.get_label() == strategy)
        np.testing.assert_array_equal(far.get_ydata(), rows[f"eval/distance_{strategy}"])
    useful, noise = plane.get_lines()[:2]
    assert len(useful.get_xdata()) == 3 and len(noise.get_xdata()) == 6
    assert "a figure of its own" in error(run, make_toy(tmp_path / "other"))
    (run / "eval.npz").write_bytes(b"noise")
    assert "eval.npz is damaged" in error(run)


@pytest.mark.parametrize("rates, lines_", [("scalar", ["all parameters"]), ("layer", ["layer 1", "layer 2", "log σ"])])
def test_learned_rates_are_drawn(tmp_path, drawn, rates, lines_):
    data = arrays("cheetah-vel-noise", states=H) | dict(returns=np.zeros((2, 40, 4)), alpha=0.1)
    run = make_run(tmp_path / "run", "rmaml", "cheetah-vel-noise", kind="step", ks=(0, 1), data=data, rates=rates)
    assert draw(run) is None and "learned_rates.png" not in drawn, "without metrics.csv"
    columns = [f"policy/alpha_layer_{k}" for k in range(3)]
    columns += [f"rmaml/{what}_cluster_{m}" for what in ("batch", "replayed") for m in range(2)]
    (run / "metrics.csv").write_text(table(columns).replace(",-", ","))
    draw(run)
    left, right = drawn["learned_rates.png"].axes
    assert [line.get_label() for line in left.get_lines()] == lines_ and len(right.get_lines()) == 4


# -- learners and herds ------------------------------------------------------------------------------------------------


def test_tasks_have_the_colour_of_their_learner_once_there_are_several(tmp_path, drawn):
    data = arrays("point-goal-4c", states=H)
    for learner, kind in ((np.zeros(32, int), "true"), (3 - data["cluster"], "inferred")):
        assert plot.shown_cluster(data | dict(learner=learner))[1] == kind
        shown, _ = plot.shown_cluster(data | dict(learner=learner))
        np.testing.assert_array_equal(shown, data["cluster"] if kind == "true" else learner)
    collapsed = data | dict(learner=np.zeros(32, int), learner_returns=np.zeros((2, 32)))
    assert plot.shown_cluster(collapsed)[1] == "inferred", "CML's first learner has all tasks"


def test_the_herd_is_drawn_from_inner_products(tmp_path, drawn):
    """Three bunches of training tasks: their silhouette is best at three, and the member's colour is theirs."""
    rng, true = np.random.default_rng(0), np.repeat(np.arange(3), 10)
    points = np.eye(3)[true] + 0.05 * rng.normal(size=(30, 3))
    data = arrays("point-goal-4c", states=H) | dict(returns=np.zeros((2, 32, 4)), alpha=0.1, learner=np.ones(32, int))
    data |= dict(train_products=points @ points.T, train_cluster=true, train_learner=1 + true)
    run = make_run(tmp_path / "run", "hom", kind="step", ks=(0, 1), data=data)
    draw(run)
    pca, tsne, silhouette = drawn["herd.png"].axes
    scores, chosen = silhouette.get_lines()
    assert scores.get_xdata()[scores.get_ydata().argmax()] == 3 == chosen.get_xdata()[0]
    shapes = pca.collections  # a true cluster each
    assert [len(points.get_offsets()) for points in (*shapes, *tsne.collections)] == 6 * [10]
    centres = np.stack([points.get_offsets().mean(0) for points in shapes])
    assert np.linalg.norm(centres[:, None] - centres, axis=-1)[np.triu_indices(3, 1)].min() > 1, "a rotation, no more"
    colours = np.stack([points.get_facecolors()[:, :3] for points in shapes])  # [cluster, point, rgb]
    np.testing.assert_allclose(colours, np.array(plot.CLUSTER_COLOURS[:3])[:, None].repeat(10, axis=1))
    drawn.clear()
    data["train_learner"][:] = 0  # still the probe's
    draw(make_run(tmp_path / "probe", "hom", kind="step", ks=(0, 1), data=data))
    assert "herd.png" not in drawn


def test_the_herd_is_drawn_by_every_embedding(tmp_path, drawn):
    """One that shows the true clusters, and three that show nothing."""
    rng, true = np.random.default_rng(0), np.repeat([0, 1], 15)
    points = rng.normal(size=(4, 30, 3)) + np.array([0, 0, 9, 0])[:, None, None] * true[:, None]
    data = arrays("point-goal-4c", states=H) | dict(learner=np.ones(32, int), train_points=points)
    data |= dict(train_products=points[0] @ points[0].T, train_cluster=true, train_learner=1 + true)
    draw(make_run(tmp_path / "run", "sop", data=data))
    pca, tsne = np.reshape(drawn["embeddings.png"].axes, (2, 4))
    scores = [float(axis.get_title().split()[-1]) for axis in pca]
    assert scores[2] == 1 > 0.5 > max(scores[:2] + scores[3:]) and "latent" in tsne[2].get_title()
    colours = [{tuple(rgb) for rgb in points.get_facecolors()} for points in tsne[2].collections]
    assert [len(of_shape) for of_shape in colours] == [1, 1] and colours[0] != colours[1]


# -- MMAML's regression and classification -----------------------------------------------------------------------------


def functions(modulated=True, adapted=True) -> dict[str, np.ndarray]:
    """Of eight tasks of two families: before modulation 0, after it half of what is true, after adaptation all."""
    cluster, x = np.arange(8) % 2, np.linspace(-5, 5, 11)
    truth = (1 + np.arange(8))[:, None] * x
    curves = np.stack([0 * truth, truth / 2 if modulated else 0 * truth, truth])
    curves[2] = truth if adapted else curves[1]
    support = np.stack([np.tile(x[::2], (8, 1)), truth[:, ::2]], -1)
    data = dict(params=np.zeros((8, 4)), cluster=cluster, x=x, truth=truth, curves=curves, support=support)
    return data | (dict(embedding=np.eye(8)) if modulated else {})


def images(tasks: int = 8) -> dict[str, np.ndarray]:
    cluster = np.arange(tasks) % 2
    data = dict(params=np.zeros((tasks, 2)), cluster=cluster, examples=np.linspace(0, 1, 2 * 5 * 3 * 16))
    data["examples"] = data["examples"].reshape(2, 5, 3, 4, 4)
    return data | dict(embedding=np.random.default_rng(0).normal(size=(tasks, 4)))


def make_supervised(path: Path, kind="regression", modes=2, ks=(0, 1, 2), **args) -> Path:
    args = (dict(env=f"functions-{modes}m") if kind == "regression" else dict(env="drawn-3m", ways=5)) | args
    args = dict(shots=1) | args
    return make_run(path, f"mmaml_{kind}", kind="step", ks=ks, clusters=modes if modes > 1 else 0, **args)


STAGES = {  # what of it there is; what is drawn, and which of the curves it is
    "MMAML": (dict(), {"before modulation": 0, "after modulation": 1, "after adaptation": 2}),
    "MAML": (dict(modulated=False), {"before adaptation": 0, "after adaptation": 2}),
    "LSTM learner": (dict(adapted=False), {"before modulation": 0, "after modulation": 1}),
}


@pytest.mark.parametrize("method", STAGES)
def test_functions_are_drawn_at_every_stage(tmp_path, drawn, method):
    form, stages = STAGES[method]
    data = functions(**form)
    draw(make_supervised(tmp_path / "run", data=data))
    assert set(drawn) == {"learning_curve.png", "curves.png", *(["embedding.png"] if "embedding" in data else [])}
    axes = drawn["curves.png"].axes
    assert [axis.get_ylabel() for axis in axes] == ["sine", "", "", "", "line", "", "", ""]
    shown = {line.get_label(): line for line in axes[6].get_lines()}  # the third task of the second family
    assert list(shown) == ["function", *stages, "support points"]
    np.testing.assert_array_equal(shown["function"].get_ydata(), data["truth"][5])
    np.testing.assert_array_equal(shown["support points"].get_xydata(), data["support"][5])
    for stage, k in stages.items():
        np.testing.assert_array_equal(shown[stage].get_ydata(), data["curves"][k, 5])


@pytest.mark.parametrize("modes, titles", [(1, ["all"]), (2, ["all", "sine", "line"]), (3, None), (5, None)])
def test_errors_of_every_family(tmp_path, drawn, modes, titles):
    run = make_supervised(tmp_path / "run", modes=modes)
    draw(run)
    assert set(drawn) == {"learning_curve.png"}
    axes, rows = drawn["learning_curve.png"].axes, plot.read_csv(run / "eval.csv")
    assert len(axes) == modes + (modes > 1) and (titles is None or [axis.get_title() for axis in axes] == titles)
    for axis, suffix in zip(axes, ["", *(f"_cluster_{m}" for m in range(modes))]):
        after, before = lines(axis, "MMAML (1 seed)")
        np.testing.assert_array_equal(after.get_ydata(), -rows[f"eval/return_step_2{suffix}"])
        np.testing.assert_array_equal(before.get_ydata(), -rows[f"eval/return_step_0{suffix}"])
        assert before.get_linestyle() == ":" and axis.get_yscale() == "log"
        assert axis.get_lines()[-1].get_label() == "noise: 0.09"


def test_methods_of_one_script_have_colours_of_their_own(tmp_path, drawn):
    """Seeds are one method; the LSTM learner has one line, for it takes no step."""
    film = [make_supervised(tmp_path / f"film{seed}", seed=seed, modulation="film", inner_steps=2) for seed in (0, 1)]
    maml = make_supervised(tmp_path / "maml", modulation="none", inner_steps=2)
    lstm = make_supervised(tmp_path / "lstm", ks=(0,), modulation="film", inner_steps=0)
    draw(*film, maml, lstm)
    assert set(drawn) == {"learning_curve.png"}
    axis = drawn["learning_curve.png"].axes[0]
    drawn_lines = [lines(axis, name) for name in ("MMAML (2 seeds)", "MAML (1 seed)", "LSTM learner (1 seed)")]
    assert [len(found) for found in drawn_lines] == [5, 2, 1], "mean, two seeds after and before; after and before; one"
    assert len({found[0].get_color() for found in drawn_lines}) == 3


def test_accuracies_and_images_of_every_data_set(tmp_path, drawn):
    data = images(tasks=120)
    run = make_supervised(tmp_path / "run", "classification", ks=(0, 5), data=data)
    draw(run)
    assert set(drawn) == {"learning_curve.png", "examples.png", "embedding.png"}
    axes, rows = drawn["learning_curve.png"].axes, plot.read_csv(run / "eval.csv")
    assert [axis.get_title() for axis in axes] == ["all", "digits", "letters"]
    after, before = lines(axes[2], "MMAML")
    np.testing.assert_array_equal(after.get_ydata(), rows["eval/return_step_5_cluster_1"])
    np.testing.assert_array_equal(before.get_ydata(), rows["eval/return_step_0_cluster_1"])
    assert axes[0].get_yscale() == "linear" and axes[0].get_lines()[-1].get_label() == "chance: 0.20"
    pictures = drawn["examples.png"].axes
    np.testing.assert_array_equal(pictures[7].get_images()[0].get_array(), data["examples"][1, 2].transpose(1, 2, 0))
    assert [axis.get_ylabel() for axis in pictures[::5]] == ["digits", "letters"]
    for axis in drawn["embedding.png"].axes:
        found = {str(points.get_label()): len(points.get_offsets()) for points in axis.collections}
        assert found == {"digits": 60, "letters": 60}


def test_modes_without_a_name_have_their_number(tmp_path, drawn):
    run = make_supervised(tmp_path / "run", "classification", env="mine:my-images-2m", data=images())
    draw(run)
    assert [axis.get_title() for axis in drawn["learning_curve.png"].axes] == ["all", "cluster 0", "cluster 1"]


@pytest.mark.parametrize("change", [dict(modes=3), dict(shots=5), dict(kind="classification"), dict(ways=3)], ids=str)
def test_supervised_runs_that_do_not_compare(tmp_path, change):
    other = make_supervised(tmp_path / "b", **change)
    assert "do not compare" in error(make_supervised(tmp_path / "a"), other)


BAD_SUPERVISED = {  # what changes in eval.npz, part of the error
    "no truth": (dict(truth=None), "it has no truth"),
    "no support": (dict(support=None), "it has no support"),
    "two stages": (dict(curves=functions()["curves"][:2]), "curves has shape [2, 8, 11], not [stage, shown task, x]"),
    "another grid": (dict(x=np.zeros(10)), "has shape"),
    "support without y": (dict(support=np.zeros((8, 5, 1))), "support has shape [8, 5, 1]"),
    "nan": (dict(truth=functions()["truth"] * np.nan), "truth is not made of finite numbers"),
    "an unknown family": (dict(cluster=np.full(8, 5)), "other numbers than 0 to 4"),
}


@pytest.mark.parametrize("case", BAD_SUPERVISED)
def test_bad_arrays_of_functions_get_one_line(tmp_path, case):
    change, expected = BAD_SUPERVISED[case]
    data = {name: array for name, array in (functions() | change).items() if array is not None}
    run = make_supervised(tmp_path / "run", data=data)
    message = error(run)
    assert "eval.npz is damaged" in message and expected in message
    assert not (run / "figures").exists()


def test_a_run_without_arrays_says_that_there_are_curves_alone(tmp_path, drawn, capsys):
    run = make_run(tmp_path / "run")
    (run / "eval.npz").unlink(missing_ok=True)
    draw(run)
    said = capsys.readouterr().out
    assert f"{run} has no eval.npz; nor agent.pt: train it again, python algos/milet.py; " in said
    assert "without it there are curves alone" in said and set(drawn) == CURVES
    (run / "agent.pt").touch()
    draw(run)
    assert f"{run} has no eval.npz; python algos/milet.py --evaluate {run} writes it" in capsys.readouterr().out
