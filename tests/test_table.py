"""results/table.py: the last evaluations, against means and deviations by hand."""

import importlib
import json
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
from conftest import ROOT
from pydantic import TypeAdapter
from test_plot import make_run, make_toy

sys.path.insert(0, str(ROOT / "results"))
import plot
import table


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()]


def test_a_row_a_method_and_the_last_evaluation(tmp_path, capsys):
    two = [make_run(tmp_path / f"{seed}", seed=seed) for seed in (0, 3)]
    other = make_run(tmp_path / "other", script="maml", kind="step", ks=(0, 1))
    lines = (two[0] / "eval.csv").read_text().splitlines()
    (two[0] / "eval.csv").write_text("\n".join(x + end for x, end in zip(lines, [",eval/nmi", *[",0.5"] * 9])) + "\n")
    table.main(table.Options((*two, other), digits=3))
    head, line, milet, maml = rows(capsys.readouterr().out)
    assert head == [
        "",
        "million frames",
        "episode 1",
        "episode 2",
        "before a gradient step",
        "after 1 gradient step",
        "NMI",
    ]
    assert set(line) == {"---"} and len(line) == len(milet) == len(maml) == 7
    last = [plot.read_csv(run / "eval.csv")["eval/return_episode_2"][-1] for run in two]
    mean, sd = np.mean(last), abs(last[0] - last[1]) / np.sqrt(2)
    assert milet == ["MILET (2 seeds)", "0.00", milet[2], f"{mean:.3f} ± {sd:.3f}", "", "", "0.50"]
    assert maml[0] == "MAML (1 seed)" and maml[2:4] == ["", ""] and "±" not in maml[5]


def test_seeds_are_compared_at_the_last_evaluation_that_all_have(tmp_path, capsys):
    runs = [make_run(tmp_path / "0"), make_run(tmp_path / "1", seed=1)]
    lines = (runs[1] / "eval.csv").read_text().splitlines(keepends=True)
    (runs[1] / "eval.csv").write_text("".join(lines[:3]))
    table.main(table.Options(tuple(runs), digits=3))
    values = [plot.read_csv(run / "eval.csv")["eval/return_episode_1"][1] for run in runs]
    row = rows(capsys.readouterr().out)[2]
    assert row[2].split(" ±")[0] == f"{np.mean(values):.3f}"
    assert row[0] == "MILET (2 seeds; mean up to the end of the shortest)"


def test_clusters(tmp_path, capsys):
    run = make_run(tmp_path / "run", clusters=2, ks=(1,))
    table.main(table.Options((run,), clusters=True))
    assert rows(capsys.readouterr().out)[0][2:] == ["episode 1", "episode 1, cluster 0", "episode 1, cluster 1"]


def test_an_argument_that_older_runs_lack_tells_methods_apart(tmp_path, capsys):
    old, new = make_run(tmp_path / "old"), make_run(tmp_path / "new", seed=1, anneal_vae=True)
    table.main(table.Options((old, new)))
    *_, first, second = rows(capsys.readouterr().out)
    assert [first[0], second[0]] == ["MILET, --anneal-vae unknown (1 seed)", "MILET, --anneal-vae (1 seed)"]


def test_what_cannot_stand_in_one_table(tmp_path):
    point, ant = make_run(tmp_path / "point"), make_run(tmp_path / "ant", env="ant-goal-4c")
    long, whole = make_run(tmp_path / "long", horizon=50), make_run(tmp_path / "whole", horizon=None)
    shots = [make_run(tmp_path / f"{n}", "mmaml_classification", "drawn-3m", shots=n, ways=5) for n in (1, 5)]
    ways = make_run(tmp_path / "ways", "mmaml_classification", "drawn-3m", shots=1, ways=3)
    for runs, message in [
        ((point, ant), "runs that differ in env do not compare: ant-goal-4c, point-goal-4c"),
        ((point, long), "runs that differ in horizon do not compare: 5, 50"),
        ((whole, long), "differ in horizon do not compare: 100, 50"),
        (shots, "differ in shots do not compare: 1, 5"),
        ((shots[0], ways), "differ in ways do not compare: 3, 5"),
        ((point, point), "given twice"),
    ]:
        with pytest.raises(SystemExit, match=message):
            table.main(table.Options(tuple(runs)))
    table.main(table.Options((whole, make_run(tmp_path / "same", seed=1, horizon=100))))


@pytest.mark.parametrize("runs, message", [([], "no run folder given"), (["nowhere"], "nowhere is not a run folder")])
def test_wrong_input_gets_one_line(runs, message):
    done = subprocess.run([sys.executable, ROOT / "results" / "table.py", *runs], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and message in done.stderr


def older(args: dict) -> bool:
    """Stored by milet.py and varibad.py as they were before D11 and D10, by rl2.py before its belief_dim."""
    return "precollect" in args or (args["script"] == "rl2" and "latent_dim" in args)


@pytest.mark.parametrize("path", sorted(ROOT.glob("results/*/*/args.json")), ids=lambda path: path.parent.name)
def test_stored_runs_fit_their_scripts(path):
    """So that a new run is a further seed of them."""
    args = json.loads(path.read_text())
    if older(args):
        pytest.skip("a run of an older script")
    script = importlib.import_module(args.pop("script"))
    TypeAdapter(script.Args).validate_python(args, strict=False)
    assert args.keys() == asdict(script.Args()).keys() and args["preset"] in ("paper", "fast", None)


def test_accuracies_have_three_digits_and_the_toy_no_table(tmp_path, capsys):
    run = make_run(tmp_path / "run", script="mmaml_classification", env="drawn-3m", kind="step", ks=(0, 5), shots=1)
    table.main(table.Options((run,)))
    assert [len(cell.split(".")[1]) for cell in rows(capsys.readouterr().out)[2][2:]] == [3, 3]
    toy = make_toy(tmp_path / "toy")
    with pytest.raises(SystemExit, match="has strategies, and no table"):
        table.main(table.Options((toy,)))
