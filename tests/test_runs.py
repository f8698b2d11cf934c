"""Whole runs. Every script: smoke, kill and resume, evaluate. The last section, on the cheapest script: the rest."""

import csv
import importlib
import json
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import maml
import numpy as np
import pytest
import torch
from conftest import ROOT, own_environments

QUICK = {  # a short run of eight meta-iterations; MILET's buffer is full after four: a kill finds old and new trials
    "milet": "--env hopper-params-4c --preset paper --frames 6400 --horizon 25 --vae-batch 8 --elbo-terms 4 "
    "--decodes 5 --buffer-trials 64",
    "varibad": "--env hopper-params-4c --preset paper --frames 6400 --horizon 25 --vae-batch 4 --elbo-terms 4 "
    "--decodes 5 --buffer-trials 64 --vae-updates 1",
    "rl2": "--env hopper-params-4c --frames 6400 --horizon 25",
    "maml": "--env ml2 --oracle --iterations 8 --tasks 4 --rollouts 2 --inner-steps 2 --horizon 20",
    "promp": "--env ml2 --oracle --iterations 8 --tasks 4 --rollouts 2 --inner-steps 2 --horizon 10 --adapt-eta "
    "--train-alpha",
    "rmaml": "--env ml2 --iterations 8 --tasks 4 --rollouts 2 --inner-steps 2 --horizon 10 --rates layer "
    "--max-share 0.5",
    "cml": "--env ml2 --iterations 8 --tasks 4 --rollouts 2 --horizon 10 --init task-specific "
    "--pretrain 3 --explore-iterations 4 --learners 4",
    "fcml": "--env ml2 --iterations 8 --tasks 4 --rollouts 2 --horizon 10 --warmup 2 --epsilon 0 --tune-steps 3",
    "mmaml": "--env ml2 --iterations 8 --tasks 4 --rollouts 2 --inner-steps 2 --horizon 10 --adapt-eta --train-alpha "
    "--encoder-width 16",
    "mmaml_regression": "--env functions-2m --iterations 8 --tasks 4 --hidden 8 8 --modulated-layers 2 --lstm-hidden 4",
    "mmaml_classification": "--iterations 8 --tasks 3 --img-size 8 --channels 4 4 --embedding 4 --horizon 3 "
    "--eval-episodes 2",
    "hom": "--env ml2 --iterations 8 --probe-iterations 3 --train-tasks 8 --tasks 4 --rollouts 3 --inner-steps 2 "
    "--horizon 20 --embedding full",
    "rmaml_reaching": "--iterations 8 --repeats 10000 --tasks 8",
    "pearl": "--env ml2 --iterations 8 --train-tasks 4 --horizon 20 --initial-steps 40 --visits 2 --prior-steps 40 "
    "--posterior-steps 40 --extra-steps 20 --gradient-steps 3 --batch 16 --context 16 --meta-batch 4 --hidden 16 16 "
    "--encoder-hidden 16",
    "sop": "--env ml2 --iterations 8 --probe-iterations 3 --train-tasks 4 --embed-repeats 4 --horizon 20 "
    "--initial-steps 40 --visits 2 --prior-steps 40 --extra-steps 20 --gradient-steps 3 --batch 16 --context 16 "
    "--hidden 16 16 --encoder-hidden 16",
    "metacure": "--env ml2 --iterations 8 --train-tasks 4 --horizon 20 --explorer-episodes 2 --initial-trials 1 "
    "--initial-steps 20 --visits 2 --trials 2 --prior-steps 20 --posterior-steps 40 --gradient-steps 3 --batch 16 "
    "--meta-batch 4 --hidden 16 16 --id-hidden 16 --encoder-hidden 16",
}
EVERY = "--eval-every 4 --save-every 2 --num-threads 1".split()
CLOCK = ("charts/sps", "time/")
CHEAP = "--env point-goal-4c --iterations 3 --tasks 4 --rollouts 2 --horizon 5 --num-threads 1".split()


def command(script: str, *flags) -> list[str]:
    return [sys.executable, str(ROOT / "algos" / f"{script}.py"), *map(str, flags)]


def run(script: str, *flags, ok=True, **kwargs) -> subprocess.CompletedProcess:
    result = subprocess.run(command(script, *flags), capture_output=True, text=True, timeout=240, **kwargs)
    assert not ok or result.returncode == 0, result.stdout + result.stderr
    return result


def only_run(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))  # read at once: a run may be writing it


def wait_for(table: str, iteration: int, folder: Path, process: subprocess.Popen) -> Path:
    """The run folder, folder or the one in it, when its table has a row of this iteration, or of a later one."""
    for _ in range(60000):
        files = [*folder.glob(table), *folder.glob(f"*/{table}")]
        if files and any(int(row["iteration"]) >= iteration for row in rows(files[0])):
            return files[0].parent
        assert process.poll() is None, "the run ended before it could be interrupted"
        time.sleep(0.002)
    raise AssertionError("the run does not come forward")


@pytest.fixture(autouse=True)
def restored():
    """Signal handlers, torch's threads and environments, which main changes."""
    handlers, threads = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}, torch.get_num_threads()
    with own_environments():
        yield
    torch.set_num_threads(threads)
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def main(*flags, script: str = "maml") -> None:
    """`python algos/SCRIPT.py FLAGS` within this process, which saves the imports."""
    sys.argv = [f"{script}.py", *map(str, flags)]
    runpy.run_path(str(ROOT / "algos" / f"{script}.py"), run_name="__main__")


# -- every script ------------------------------------------------------------------------------------------------------


def test_every_script_has_a_short_run():
    assert QUICK.keys() == {path.stem for path in (ROOT / "algos").glob("*.py")}


@pytest.mark.parametrize("script", QUICK)
def test_smoke_kill_resume_evaluate(script, tmp_path, capsys, monkeypatch):
    flags = [*QUICK[script].split(), *EVERY]
    main(*flags, "--run-dir", tmp_path / "whole", script=script)
    whole = only_run(tmp_path / "whole")
    files = {"args.json", "metrics.csv", "eval.csv", "eval.npz", "checkpoint.pt", "agent.pt"}
    assert files <= {p.name for p in whole.iterdir()} and list(whole.glob("events.out.tfevents*"))
    evaluations, metrics = rows(whole / "eval.csv"), rows(whole / "metrics.csv")
    assert [int(r["iteration"]) for r in evaluations] == [0, 4, 8]
    assert [int(r["iteration"]) for r in metrics] == list(range(1, 9))[-len(metrics) :] and len(metrics) > 6
    assert {"charts/frames", "charts/sps", "time/sample", "time/update"} <= set(metrics[0])
    pooled = [k for k in evaluations[0] if k.startswith("eval/return_") and "_cluster_" not in k]
    assert len(pooled) >= 2 and (f"{pooled[1]}_cluster_1" in evaluations[0]) == (script != "rmaml_reaching")

    cut, begin = tmp_path / "cut", [*flags, "--run-dir", tmp_path / "cut"]
    kills = [(5, 2)]  # after which iteration, and how often it is saved: mostly after the last save
    if script in ("milet", "cml", "fcml", "hom", "sop"):  # and before any save, and in the first phase
        kills = [(2, 100), (3, 2), *kills]
    for iteration, save_every in kills:
        process = subprocess.Popen(command(script, *begin, "--save-every", save_every), stdout=subprocess.DEVNULL)
        cut = wait_for("metrics.csv", iteration, cut, process)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it ended before"
        begin = ["--resume", cut]
    with (cut / "eval.csv").open("ab") as file:
        file.write(b"1\x00\xff")  # a row that the kill cut short
    main("--resume", cut, script=script)
    assert (cut / "eval.csv").read_text() == (whole / "eval.csv").read_text()
    tables = [rows(folder / "metrics.csv") for folder in (cut, whole)]
    logged = [[{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in table] for table in tables]
    assert logged[0] == logged[1]

    (whole / "checkpoint.pt").unlink()  # args.json and agent.pt are enough
    capsys.readouterr()
    threads = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    main("--evaluate", whole, script=script)
    monkeypatch.undo()
    assert threads[1:] == [1, 2] * (len(threads) // 2), "who samples gives torch its threads back"
    assert (len(threads) > 1) == (script not in ("mmaml_regression", "mmaml_classification", "rmaml_reaching"))
    shown = dict(re.findall(r"^(eval/\S+) (\S+)$", capsys.readouterr().out, re.M))  # two decimals; the CSV six digits
    for key in pooled:
        assert float(shown[key]) == pytest.approx(float(evaluations[-1][key]), abs=0.0051, rel=1e-5)
    assert (whole / "eval.csv").read_text() == (cut / "eval.csv").read_text()


# -- the last section, on the cheapest script --------------------------------------------------------------------------


def error(*flags) -> str:
    """The one line with which it ends."""
    with pytest.raises(SystemExit) as caught:
        main(*flags)
    message = str(caught.value.code)
    assert message.startswith("maml.py: error: ") and "\n" not in message
    return message


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cheap")
    main(*CHEAP, "--run-dir", folder)
    return only_run(folder)


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@pytest.mark.parametrize("after, save_every", [(0, 100), (10, 2)])
def test_killed_anywhere_and_resumed_ends_the_same(finished, tmp_path, after, save_every):
    """With 100 the only checkpoint is the one before the first iteration."""
    flags = [*CHEAP, "--iterations", 30, "--eval-every", 10, "--save-every", save_every]
    run("maml", *flags, "--run-dir", tmp_path / "whole")
    process = subprocess.Popen(command("maml", *flags, "--run-dir", tmp_path / "cut"), stdout=subprocess.DEVNULL)
    cut = wait_for("eval.csv", after, tmp_path / "cut", process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    main("--resume", cut)
    assert (cut / "eval.csv").read_text() == (only_run(tmp_path / "whole") / "eval.csv").read_text()


def test_a_named_run_is_begun_continued_or_left_by_one_command(finished, tmp_path):
    """The same command in every case: new, killed before or after its first checkpoint, finished."""
    command = [*CHEAP, "--run-dir", tmp_path, "--name", "some/run"]
    path = tmp_path / "some" / "run"
    main(*command, "--iterations", 2)
    main(*command, "--iterations", 3)
    expected = (finished / "eval.csv").read_text()
    assert [int(r["iteration"]) for r in rows(path / "eval.csv")] == [0, 2, 3]
    assert rows(path / "eval.csv")[-1] == rows(finished / "eval.csv")[-1]
    for name in ("checkpoint.pt", "args.json"):  # killed before the first row: nothing to be kept
        (path / "eval.csv").write_text("")
        (path / name).unlink()
        main(*command)
        assert (path / "eval.csv").read_text() == expected
    main(*command)
    assert (path / "eval.csv").read_text() == expected
    assert "--horizon cannot change on an existing run" in error(*command, "--horizon", 6)
    fewer = [word for word in command if word not in ("--tasks", "4")]  # what is not said is the preset's
    assert "--tasks cannot change on an existing run" in error(*fewer)
    (path / "checkpoint.pt").unlink()
    assert "checkpoint.pt is missing" in error(*command), "and not begun anew"
    assert (path / "eval.csv").read_text() == expected
    assert "--name cannot change on an existing run" in error("--resume", path, "--name", "other")


def test_a_run_from_before_an_argument_takes_its_default(copy, capsys):
    """Who adds a field to Args can still evaluate and continue what there is, and is told."""
    edit(without="gamma")(copy)
    main("--evaluate", copy)
    assert f"{copy} has no gamma: default 0.99\n" in capsys.readouterr().out
    main("--resume", copy, "--iterations", 4)
    assert json.loads((copy / "args.json").read_text())["gamma"] == 0.99


def test_of_two_processes_on_one_run_one_stops(tmp_path):
    """The first stands still while the second goes on from its checkpoint, and stops when it finds that out."""
    flags = [*CHEAP, "--iterations", 100, "--eval-every", 10, "--save-every", 35]  # it is not caught while it saves
    run("maml", *flags, "--run-dir", tmp_path / "whole")
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    first = subprocess.Popen(command("maml", *flags, "--run-dir", tmp_path / "two"), **pipes)
    path = wait_for("eval.csv", 10, tmp_path / "two", first)
    first.send_signal(signal.SIGSTOP)
    main("--resume", path)
    first.send_signal(signal.SIGCONT)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 1 and "maml.py: error: another process writes " in errors, errors
    assert (path / "eval.csv").read_text() == (only_run(tmp_path / "whole") / "eval.csv").read_text()


def test_two_runs_in_one_second_have_two_folders(tmp_path):
    args = maml.parse_args([*CHEAP, "--run-dir", str(tmp_path)])
    assert len({maml.Run(args).path for _ in range(2)}) == 2


def test_no_run_gets_shorter(copy):
    before = (copy / "args.json").read_text()
    assert "is at iteration 3 already" in error("--resume", copy, "--iterations", 2)
    assert (copy / "args.json").read_text() == before


def test_goes_on_for_more_iterations(copy):
    main("--resume", copy, "--iterations", 5, "--eval-every", 1)
    args = json.loads((copy / "args.json").read_text())
    assert (args["iterations"], args["resume"]) == (5, None), "for whoever resumes it again"
    assert [int(r["iteration"]) for r in rows(copy / "eval.csv")] == [0, 3, 4, 5]


def test_evaluates_with_other_steps_and_rates(copy, capsys):
    last = rows(copy / "eval.csv")[-1]
    for alpha in (0.1, 1e-6):
        main("--evaluate", copy, "--eval-steps", 4, "--alpha", alpha)
        output = capsys.readouterr().out
        same = {k: f"eval/return_step_{k} {float(last[f'eval/return_step_{k}']):.6g}\n" in output for k in (0, 1)}
        assert same == {0: True, 1: alpha == 0.1} and "eval/return_step_4_cluster_1" in output
    assert float(np.load(copy / "eval.npz")["alpha"]) == 1e-6


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_iteration_and_saves(tmp_path, signum, code):
    flags = [*CHEAP, "--iterations", 10**6, "--eval-every", 1, "--run-dir", tmp_path]
    process = subprocess.Popen(command("maml", *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    path = wait_for("eval.csv", 1, tmp_path, process)
    process.send_signal(signum)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (code, "") and output.endswith(f"--resume {path}\n")
    saved = torch.load(path / "checkpoint.pt", weights_only=True)["iteration"]
    assert saved == int(rows(path / "eval.csv")[-1]["iteration"])


def test_a_second_signal_ends_it_at_once(tmp_path):
    flags = [*CHEAP, "--inner-steps", 5000, "--eval-steps", 1, "--run-dir", tmp_path]  # an iteration of many seconds
    process = subprocess.Popen(command("maml", *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for("eval.csv", 0, tmp_path, process)
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (143, "")


def test_a_signal_outside_of_training_ends_it(copy):
    main("--evaluate", copy)
    with pytest.raises(SystemExit) as caught:
        signal.raise_signal(signal.SIGINT)
    assert caught.value.code == 130


def test_nan_stops_the_run_with_the_last_good_checkpoint(tmp_path):
    message = error(*CHEAP, "--alpha", 1e30, "--run-dir", tmp_path)
    assert "iteration 1: trpo/surrogate_before is not finite; last good checkpoint: " in message
    path = only_run(tmp_path)
    assert torch.load(path / "checkpoint.pt", weights_only=True)["iteration"] == 0


@pytest.mark.parametrize("script", ["milet", "varibad", "rl2"])
def test_a_trial_whose_physics_diverges_teaches_nothing(monkeypatch, script):
    """In either episode; at a test it counts, without pay after that step. If all diverge, the run ends."""
    algo, broken = importlib.import_module(script), {}  # copy -> the step in which it diverges, of 2 x 5
    args = algo.Args(env="point-goal-4c", horizon=5, hidden=8, num_threads=1)
    env = gym.make_vec(args.env, num_envs=4, horizon=5)
    steps = []

    def diverged(self):
        steps.append(None)
        return np.array([broken.get(copy) == len(steps) for copy in range(4)])

    monkeypatch.setattr(type(env.unwrapped), "diverged", diverged)
    sizes = [env.single_observation_space.shape[0] + 1, env.single_action_space.shape[0]]
    agent = algo.make_agent(*sizes, *([env.unwrapped.task_dim] if script == "varibad" else []), args)
    tasks = env.unwrapped.task_set("test")[:4]
    whole = algo.run_trial(env, tasks, 0, agent, args, test=True)
    torch.manual_seed(0)
    sampled = algo.run_trial(env, tasks, 0, agent, args, test=False)
    for new, left in ({1: 3}, [0, 2, 3]), ({1: 3, 2: 8}, [0, 3]):
        broken.update(new)
        for test in (True, False):
            steps.clear()
            torch.manual_seed(0)
            episodes = algo.run_trial(env, tasks, 0, agent, args, test)
            assert all(len(episode.reward[0]) == (4 if test else len(left)) for episode in episodes)
            if not test:
                for episode, all_copies in zip(episodes, sampled):
                    for mine, x in zip(episode, all_copies):
                        torch.testing.assert_close(mine, x[:, left])
            else:
                assert all(torch.equal(e.reward[:, left], w.reward[:, left]) for e, w in zip(episodes, whole))
                assert (episodes[0].reward[2:, 1] == 0).all() and (episodes[0].reward[:2, 1] != 0).all()
    broken.update(dict.fromkeys(range(4), 2))
    steps.clear()
    with pytest.raises(FloatingPointError, match="the physics diverged in all trials"):  # one line, from main
        algo.run_trial(env, tasks, 0, agent, args, test=False)


def test_a_metric_that_is_not_finite_is_named(tmp_path):
    instance = maml.Run(maml.parse_args([*CHEAP, "--run-dir", str(tmp_path)]))
    agent = torch.nn.ParameterDict(dict(theta=torch.nn.Parameter(torch.ones(2))))
    for _ in instance.loop(1, dict(agent=agent), lambda: ({}, {})):
        with pytest.raises(FloatingPointError, match="loss is not finite"):
            instance.log(dict(loss=float("nan")))
        agent["theta"].data[1] = float("inf")
        with pytest.raises(FloatingPointError, match="theta is not finite"):
            instance.log(dict(loss=1.0))


def test_nobody_else_may_write_the_tables(tmp_path):
    instance = maml.Run(maml.parse_args([*CHEAP, "--run-dir", str(tmp_path)]))
    agent = torch.nn.ParameterDict(dict(theta=torch.nn.Parameter(torch.ones(2))))
    for iteration in instance.loop(3, dict(agent=agent), lambda: ({"eval/x": 1.0}, {})):
        if iteration < 3:
            instance.log({"weight/λ": 1.0})  # sizes are counted in bytes
            continue
        with (instance.path / "metrics.csv").open("a") as file:
            file.write("a row\n")
        with pytest.raises(SystemExit, match="another process writes "):
            instance.log({"weight/λ": 1.0})


def test_columns_never_change(tmp_path):
    instance = maml.Run(maml.parse_args([*CHEAP, "--run-dir", str(tmp_path)]))
    agent = torch.nn.ParameterDict(dict(theta=torch.nn.Parameter(torch.ones(2))))
    for iteration in instance.loop(2, dict(agent=agent), lambda: ({"eval/x": 1.0}, {})):
        if iteration == 1:
            instance.log(dict(loss=1.0))
            continue
        with pytest.raises(SystemExit, match="has other columns"):
            instance.log(dict(loss=1.0, more=2.0))
        instance.log(dict(loss=2.0))
    assert [row["loss"] for row in rows(instance.path / "metrics.csv")] == ["1", "2"]


def test_tracks_offline(tmp_path):
    env = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_PROJECT": "of-mine"}
    run("maml", *CHEAP, "--track", "--run-dir", tmp_path, env=env)
    (stored,) = only_run(tmp_path).glob("wandb/offline-run-*/*.wandb")
    assert {b"eval/return_step_1", b"charts/sps", b"of-mine"} <= {*re.findall(rb"[\w/-]+", stored.read_bytes())}


# -- what must end with one line ---------------------------------------------------------------------------------------


def write(name: str, content: str | bytes):
    return lambda path: (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def edit(without: str = "", **changes):
    """Change keys of args.json, or take one out."""

    def apply(path: Path) -> None:
        stored = json.loads((path / "args.json").read_text()) | changes
        stored.pop(without, None)
        (path / "args.json").write_text(json.dumps(stored))

    return apply


def cut(name: str, size: int):
    return lambda path: os.truncate(path / name, size)


def poison(path: Path) -> None:
    state = torch.load(path / "agent.pt", weights_only=True)
    state["agent"]["theta"][:] = float("nan")
    torch.save(state, path / "agent.pt")


def reshape(**changes):
    """Change entries of the checkpoint."""
    return lambda path: torch.save(torch.load(path / "checkpoint.pt") | changes, path / "checkpoint.pt")


BAD_RUNS = {  # flags, what is done to the folder, what the line says
    "no args.json": ("--resume", lambda path: (path / "args.json").unlink(), "not a run folder"),
    "args.json cut": ("--resume", write("args.json", "{"), "args.json is damaged"),
    "args.json empty": ("--evaluate", write("args.json", ""), "args.json is damaged"),
    "args.json not UTF-8": ("--evaluate", write("args.json", b"\xff\xfe\x00"), "args.json is damaged"),
    "args.json a list": ("--resume", write("args.json", "[]"), "args.json is damaged"),
    "args.json null": ("--resume", write("args.json", "null"), "args.json is damaged"),
    "a string for a number": ("--resume", edit(seed="0"), "args.json is damaged"),
    "a fraction for an integer": ("--resume", edit(seed=0.5), "args.json is damaged"),
    "a list for a number": ("--resume", edit(alpha=[1]), "args.json is damaged"),
    "a number for a list": ("--evaluate", edit(hidden=7), "args.json is damaged"),
    "an unknown choice": ("--evaluate", edit(activation="gelu"), "args.json is damaged"),
    "a key too many": ("--resume", edit(colour="red"), "does not fit this maml.py, because of colour"),
    "a key too few": ("--resume", edit(without="env"), "because of env"),
    "another script": ("--evaluate", edit(script="nobody"), "is a run of nobody.py"),
    "no script": ("--resume", edit(without="script"), "args.json is damaged"),
    "another environment": ("--resume", edit(env="cheetah-dir"), "belongs to maml.py on point-goal-4c"),
    "other sizes": ("--evaluate", edit(hidden=[7]), "of other arguments"),
    "no checkpoint": ("--resume", lambda path: (path / "checkpoint.pt").unlink(), "missing"),
    "no agent": ("--evaluate", lambda path: (path / "agent.pt").unlink(), "missing"),
    "checkpoint cut": ("--resume", cut("checkpoint.pt", 1000), "damaged"),
    "an iteration that is none": ("--resume", reshape(iteration="x"), "damaged"),
    "checkpoint empty": ("--resume", cut("checkpoint.pt", 0), "damaged"),
    "agent of noise": ("--evaluate", write("agent.pt", b"noise" * 1000), "damaged"),
    "agent of NaN": ("--evaluate", poison, "NaN"),
}


@pytest.mark.parametrize(
    "script, flags, horizon",
    [
        ("maml", "--env reacher-4m", 50),
        ("maml", "--env reacher-4m --horizon 20", 20),
        ("milet", "--env cheetah-vel-sparse", 64),
        ("pearl", "--env point-goal-sparse --preset paper", 32),
        ("pearl", "--env ml2", 200),
        ("sop", "", 200),
    ],
)
def test_the_horizon_is_the_environments_unless_preset_or_user_say_otherwise(script, flags, horizon):
    assert importlib.import_module(script).parse_args(flags.split()).horizon == horizon


@pytest.mark.parametrize("case", BAD_RUNS)
def test_a_bad_run_folder_gets_one_line(copy, case):
    flag, spoil, words = BAD_RUNS[case]
    spoil(copy)
    assert words in error(flag, copy)


def test_a_checkpoint_cannot_run_code(copy):
    class Malice:
        def __reduce__(self):
            return print, ("it ran",)

    torch.save({"owner": Malice()}, copy / "agent.pt")
    assert "UnpicklingError" in error("--evaluate", copy)


def test_only_its_own_tables_are_cut_back_and_none_is_made_longer(copy):
    (copy / "notes.csv").write_text("mine\n")
    os.truncate(copy / "metrics.csv", 10)
    main("--resume", copy)
    assert (copy / "notes.csv").read_text() == "mine\n" and (copy / "metrics.csv").stat().st_size == 10


def test_a_kill_between_the_two_files_is_mended_by_a_resume(tmp_path, monkeypatch):
    """agent.pt is written first: where only it is new, the checkpoint is old, and the resumed run writes both."""
    replace = os.replace

    def fail_at_the_last_checkpoint(source, target):
        if target.name == "checkpoint.pt" and torch.load(source, weights_only=True)["iteration"] == 3:
            raise OSError("killed")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_at_the_last_checkpoint)
    assert "killed" in error(*CHEAP, "--run-dir", tmp_path)
    monkeypatch.undo()
    path = only_run(tmp_path)
    saved = [torch.load(path / f"{name}.pt", weights_only=True)["iteration"] for name in ("agent", "checkpoint")]
    assert saved == [3, 0]
    main("--resume", path)
    assert torch.load(path / "checkpoint.pt", weights_only=True)["iteration"] == 3


def test_a_fault_of_the_program_keeps_its_traceback(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("more than one element of the written-to tensor refers to a single memory location")

    monkeypatch.setattr(torch.linalg, "cholesky_ex", broken)
    with pytest.raises(RuntimeError, match="single memory location"):
        main(*CHEAP, "--run-dir", tmp_path)


def test_tails_of_the_tables_do_not_stop_a_resume(copy):
    for name in ("eval.csv", "metrics.csv"):
        before = (copy / name).read_bytes()
        (copy / name).write_bytes(before + b"3,\x00\xff\n4,1,2\n5")
        main("--resume", copy)
        assert (copy / name).read_bytes() == before


BAD_FLAGS = {
    "--env point-goal-3c": "Did you mean: `point-goal-4c`,",
    "--env CartPole-v1": "--env CartPole-v1: ",
    "--env :": "Empty module name",
    "--env no_such_module:id": "No module named 'no_such_module'",
    "--env raises_at_import:id": "ZeroDivisionError",
    "--preset fast": "has no fast preset",
    "--resume a --evaluate b": "contradict each other",
    "--resume nowhere": "not a run folder",
    "--iterations 0": "--iterations must be from 1",
    "--seed -1": "--seed must be from 0",
    "--seed 99999999999999999999": "--seed must be from 0",
    "--hidden 8 0": "--hidden must be from 1",
    "--gamma nan": "--gamma must be finite",
    "--gamma 1.5": "--gamma and --gae-lambda must be in [0, 1]",
    "--kl-slack nan": "--kl-slack must be finite",
    "--alpha inf": "--alpha must be finite",
    "--alpha 0": "--delta must be positive",
    "--delta -1": "--delta must be positive",
    "--tasks 3": "--tasks must be at least 4",
    "--oracle --tasks 6": "multiple of 4",
    "--env cheetah-vel --oracle": "has none",
    "--mask-pad-actions": "several robots",
    "--env cheetah-dir --hidden 2147483648": "memory",
    "--hidden 4611686018427387904": "--hidden must be from 1",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_get_one_line(tmp_path, monkeypatch, flags):
    (tmp_path / "raises_at_import.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    message = error(*CHEAP, "--run-dir", tmp_path / "runs", *flags.split())
    assert BAD_FLAGS[flags] in message
    assert not (tmp_path / "runs").exists()


def test_no_gpu_gets_one_line():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "no GPU" in error(*CHEAP, "--device", "cuda")


def test_hyper_parameters_of_a_run_are_fixed(finished):
    assert "--gamma cannot change" in error("--resume", finished, "--gamma", 0.5)
    assert "--alpha cannot change" in error("--resume", finished, "--alpha", 0.5)
    assert "--preset cannot change" in error("--resume", finished, "--preset", "fast")
    assert "--env cannot change" in error("--evaluate", finished, "--env", "cheetah-dir")
    assert "--horizon cannot change" in error("--evaluate", finished, "--horizon", 7)


def test_a_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    assert "Not a directory" in error(*CHEAP, "--run-dir", tmp_path / "file")


@pytest.mark.parametrize("size", [100, 30_000])
def test_a_full_disk(tmp_path, size):
    """A limit on the size of files, which all writes beyond it meet as an OSError."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # noqa: E731
    result = run("maml", *CHEAP, "--run-dir", tmp_path, ok=False, preexec_fn=limit)
    assert result.returncode == 1 and "maml.py: error: " in result.stderr.splitlines()[-1], result.stderr
    assert "Traceback" not in result.stderr


def test_tracking_without_a_login(tmp_path):
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"HOME": str(tmp_path)}
    result = run("maml", *CHEAP, "--track", "--run-dir", tmp_path, ok=False, env=env, stdin=subprocess.DEVNULL)
    assert result.returncode == 1 and "wandb login" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr and len(result.stderr.splitlines()) <= 3, result.stderr


def test_help_lists_environments_and_shows_the_preset():
    output = " ".join(run("rl2", "--env", "point-goal-4c", "--help").stdout.split())
    assert "ant-goal-4c" in output and "discount factor" in output
    assert "ant-cheetah-dir" not in output, "which it refuses"
    assert re.search(r"fast: .*point-goal-4c", output)
    assert "(default: fast)" in output and "(default: 3200000)" in output


@pytest.mark.parametrize("script, fit", [("mmaml_regression", "functions-2m"), ("rmaml_reaching", "reaching-2d")])
def test_help_lists_no_environment_that_the_script_refuses(script, fit, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse_args(["--help"])
    output = capsys.readouterr().out
    assert fit in output and "ant-goal-4c" not in output


def test_a_misspelled_flag_is_answered_with_the_default_of_the_preset(capsys):
    with pytest.raises(SystemExit):
        importlib.import_module("milet").parse_args(["--env", "point-goal-4c", "--framse", "1"])
    shown = "".join(capsys.readouterr())
    assert "--frames" in shown and "(default: 3200000)" in " ".join(shown.split())
