"""Whole runs: probe, smoke, kill and resume, evaluate, signals, tracking, and what must stop a run with one line."""

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import maml
import milet
import numpy as np
import pearl
import probes  # noqa: F401
import promp
import pytest
import rl2
import torch
import varibad
from conftest import ROOT

MODULES = {"milet": milet, "varibad": varibad, "rl2": rl2, "maml": maml, "promp": promp, "pearl": pearl}
QUICK = {  # flags of a short run
    "milet": "--vae-batch 8 --elbo-terms 4 --decodes 5 --buffer-trials 64",
    "varibad": "--vae-batch 4 --elbo-terms 4 --decodes 5 --buffer-trials 64 --vae-updates 1 --horizon 50 "
    "--precollect 1000",
    "rl2": "--horizon 50",
    "maml": "--tasks 4 --rollouts 2 --inner-steps 2 --horizon 50",
    "promp": "--tasks 4 --rollouts 2 --inner-steps 2 --horizon 50 --adapt-eta --train-alpha",
    "pearl": "--train-tasks 4 --horizon 50 --initial-steps 100 --visits 2 --prior-steps 100 --posterior-steps 100 "
    "--extra-steps 50 --gradient-steps 3 --batch 16 --context 16 --meta-batch 4 --hidden 16 16 --encoder-hidden 16",
}
QUICK = {script: f"{flags} --eval-every 1 --save-every 2 --num-threads 1".split() for script, flags in QUICK.items()}
LONG = {  # twelve meta-iterations; MILET's buffer is full after 4: trials are overwritten before and after a kill
    "milet": "--env hopper-params-4c --frames 38400".split(),
    "varibad": "--env hopper-params-4c --frames 19200".split(),
    "rl2": "--env hopper-params-4c --frames 19200".split(),
    "maml": "--env ml2 --oracle --iterations 12".split(),
    "promp": "--env ml2 --oracle --iterations 12".split(),
    "pearl": "--env ml2 --iterations 12".split(),
}
EVALUATED = {script: "eval/return_episode_{}" for script in MODULES} | {
    script: "eval/return_step_{}" for script in ("maml", "promp")
}
CLOCK = ("charts/sps", "time/sample", "time/ppo", "time/elbo", "time/update")
NAN = [("milet", "--lr-vae"), ("varibad", "--lr-vae"), ("rl2", "--lr-policy"), ("maml", "--alpha")]
NAN += [("promp", "--lr"), ("pearl", "--lr")]
scripts = pytest.mark.parametrize("script", MODULES)


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
    with path.open() as file:
        return list(csv.DictReader(file))


def plot(*paths: Path) -> set[str]:
    """The names of the figures of a run, or of several."""
    result = subprocess.run([sys.executable, str(ROOT / "results" / "plot.py"), *map(str, paths)], capture_output=True)
    assert result.returncode == 0, result.stderr
    return {p.name for p in (paths[0] / "figures").iterdir()}


def wait_for_rows(folder: Path, count: int, process: subprocess.Popen) -> Path:
    for _ in range(1200):
        files = list(folder.glob("*/eval.csv"))
        if files and len(rows(files[0])) >= count:
            return files[0].parent
        assert process.poll() is None, "the run ended before it could be interrupted"
        time.sleep(0.05)
    raise AssertionError("the run does not come forward")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> dict[str, Path]:
    """A short uninterrupted run of every script on a real MuJoCo environment."""
    folders = {script: tmp_path_factory.mktemp(script) for script in MODULES}
    for script, folder in folders.items():
        run(script, *LONG[script], "--run-dir", folder, *QUICK[script])
    return {script: only_run(folder) for script, folder in folders.items()}


@pytest.fixture
def keep_signals():
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def test_probe_recovers_the_clusters_and_adapts(tmp_path, keep_signals):
    """Two clusters that only the reward tells apart: NMI 1, and a second episode near the oracle's 0 (no task: -10)."""
    args = milet.Args(
        env="probe-guess-sign", frames=60_000, run_dir=str(tmp_path), clusters=2, num_threads=1, eval_every=50,
        horizon=10, save_every=1000, precollect=1000, lr_vae=3e-3, vae_updates=2, elbo_terms=20, lr_phi=3e-3,
        lr_psi=3e-3, clip=0.2, minibatches=2, kl_z_weight=1e-3,
    )  # fmt: skip
    milet.train(args)
    first, last = (rows(only_run(tmp_path) / "eval.csv")[i] for i in (0, -1))
    assert float(last["eval/nmi"]) > 0.9
    assert float(last["eval/return_episode_2"]) > -3 > float(first["eval/return_episode_2"])


@pytest.mark.parametrize("script, rates", [("varibad", dict(lr_vae=3e-3)), ("rl2", dict(lr_encoder=3e-3))])
def test_probe_is_solved_in_the_second_episode(tmp_path, keep_signals, script, rates):
    """As MILET's, for one policy and one belief, or memory."""
    args = MODULES[script].Args(
        env="probe-guess-sign", frames=64_000, run_dir=str(tmp_path), horizon=10, num_threads=1, eval_every=50,
        num_envs=32, hidden=16, clip=0.2, minibatches=2, lr_policy=3e-3, entropy=1e-4, save_every=1000, **rates,
    )  # fmt: skip
    MODULES[script].train(args)
    first, last = (rows(only_run(tmp_path) / "eval.csv")[i] for i in (0, -1))
    assert float(last["eval/return_episode_2"]) > -3 > float(first["eval/return_episode_2"])


def test_probe_bandit_is_solved_after_one_gradient_step(tmp_path, keep_signals):
    """One action, goals -1 and +1: without the task 0 is best, which pays -1 - σ² and more; who knows it gets 0."""
    args = maml.Args(
        env="probe-guess-sign", run_dir=str(tmp_path), horizon=1, action_scale=1.0, tasks=20, iterations=100,
        num_threads=1, eval_every=50, hidden=(16,),
    )  # fmt: skip
    maml.train(args)
    first, last = (rows(only_run(tmp_path) / "eval.csv")[i] for i in (0, -1))
    assert float(first["eval/return_step_1"]) < -0.9
    assert float(last["eval/return_step_1"]) > -0.1 and float(last["eval/return_step_0"]) < -0.9


def test_probe_pearl_infers_the_goal_from_one_episode(tmp_path, keep_signals):
    """Without the task the best return is -10; after an episode with its rewards, who infers the goal gets 0."""
    args = pearl.Args(
        env="probe-guess-sign", run_dir=str(tmp_path), horizon=10, train_tasks=20, initial_steps=20, visits=10,
        prior_steps=20, extra_steps=20, gradient_steps=100, iterations=30, eval_every=30, num_threads=1, batch=32,
        hidden=(32, 32), encoder_hidden=(32,), context=10, meta_batch=8, lr=3e-3, gamma=0.5,
    )  # fmt: skip
    pearl.train(args)
    first, last = (rows(only_run(tmp_path) / "eval.csv")[i] for i in (0, -1))
    assert float(first["eval/return_episode_2"]) < -8
    assert float(last["eval/return_episode_2"]) > -3 > float(last["eval/return_episode_1"])


@scripts
def test_smoke_leaves_the_whole_run_folder(finished, script):
    names = {p.name for p in finished[script].iterdir()}
    assert {"args.json", "metrics.csv", "eval.csv", "eval.npz", "checkpoint.pt"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    evaluations, metrics = rows(finished[script] / "eval.csv"), rows(finished[script] / "metrics.csv")
    assert [int(r["iteration"]) for r in evaluations] == list(range(13))
    assert [int(r["iteration"]) for r in metrics] == list(range(1, 13))[-len(metrics) :] and len(metrics) > 10
    for key in ("charts/frames", "charts/sps", "time/sample", "time/update"):
        assert key in metrics[0]
    for key in (EVALUATED[script].format(1), EVALUATED[script].format(2) + "_cluster_1"):
        assert key in evaluations[0]


def test_milet_logs_its_own(finished):
    finished = finished["milet"]
    assert finished.name.startswith("hopper-params-4c__milet__0__")
    assert json.loads((finished / "args.json").read_text())["state_decoder"] == [256, 128]
    evaluations, metrics = rows(finished / "eval.csv"), rows(finished / "metrics.csv")
    assert [int(r["charts/frames"]) for r in metrics] == [3200 * i for i in range(2, 13)]
    for key in ("eval/return_episode_2_cluster_3", "eval/nmi", "eval/ari", "eval/nmi_ceiling"):
        assert key in evaluations[0]
    for key in ("train/bonus_h", "train/bonus_c", "elbo/kl_z", "psi/policy_loss"):
        assert key in metrics[0]


def test_maml_counts_the_frames_taken(finished):
    """Not those after a fall."""
    frames = [int(r["charts/frames"]) for r in rows(finished["maml"] / "metrics.csv")]
    assert all(0 < b - a <= 4 * 2 * 3 * 50 for a, b in zip([0, *frames], frames)) and frames[-1] < 12 * 4 * 2 * 3 * 50


@scripts
@pytest.mark.parametrize("after, save_every", [(1, 100), (2, 2), (5, 2)])
def test_killed_and_resumed_ends_with_the_same_eval_csv(finished, tmp_path, script, after, save_every):
    """After so many evaluations; with 100 the only checkpoint is the one before the first iteration."""
    flags = [*LONG[script], "--run-dir", tmp_path, *QUICK[script], "--save-every", save_every]
    process = subprocess.Popen(command(script, *flags), stdout=subprocess.DEVNULL)
    path = wait_for_rows(tmp_path, after, process)
    time.sleep(random.Random(after).uniform(0, 0.5))
    assert process.poll() is None, "the run ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    with (path / "eval.csv").open("a") as file:
        file.write("1")  # a row that the kill cut short
    run(script, "--resume", path)
    assert (path / "eval.csv").read_text() == (finished[script] / "eval.csv").read_text()
    tables = [rows(folder / "metrics.csv") for folder in (path, finished[script])]
    logged = [[{k: v for k, v in row.items() if k not in CLOCK} for row in table] for table in tables]
    assert logged[0] == logged[1]


@scripts
def test_evaluate_gives_what_training_logged(finished, script):
    last = rows(finished[script] / "eval.csv")[-1]
    output = run(script, "--evaluate", finished[script]).stdout
    for k in (1, 2):
        assert f" {k} {float(last[EVALUATED[script].format(k)]):.1f}" in output


def test_maml_evaluates_with_other_steps_and_rates(finished, tmp_path):
    path = shutil.copytree(finished["maml"], tmp_path / "run")
    last = rows(path / "eval.csv")[-1]
    for alpha in (0.1, 1e-6):
        output = run("maml", "--evaluate", path, "--eval-steps", 4, "--alpha", alpha).stdout
        values = {k: float(last[f"eval/return_step_{k}"]) for k in (0, 1)}
        same = {k: f"eval/return_step_{k} {value:.2f}\n" in output for k, value in values.items()}
        assert same == {0: True, 1: alpha == 0.1} and "eval/return_step_4_cluster_1" in output
    assert float(np.load(path / "eval.npz")["alpha"]) == 1e-6


@pytest.mark.parametrize("script", ["maml", "promp", "pearl"])
def test_goes_on_for_more_iterations(finished, tmp_path, script):
    path = shutil.copytree(finished[script], tmp_path / "run")
    run(script, "--resume", path, "--iterations", 14)
    args = json.loads((path / "args.json").read_text())
    assert (args["iterations"], args["resume"]) == (14, None), "for whoever resumes it again"
    assert [int(r["iteration"]) for r in rows(path / "eval.csv")] == list(range(15))


@scripts
@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_finish_the_iteration_and_save(tmp_path, script, signum, code):
    flags = ["--env", "point-goal-4c", "--run-dir", tmp_path, *QUICK[script]]
    process = subprocess.Popen(command(script, *flags), stdout=subprocess.PIPE, text=True)
    path = wait_for_rows(tmp_path, 2, process)
    process.send_signal(signum)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"--resume {path}" in output
    saved = torch.load(path / "checkpoint.pt", weights_only=True)["iteration"]
    assert saved == int(rows(path / "eval.csv")[-1]["iteration"])


def test_no_exploration_tracks_offline_and_plots(tmp_path):
    env = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    flags = ["--env", "point-goal-4c", "--frames", 3 * 3200, "--no-exploration", "--track"]
    run("milet", *flags, "--run-dir", tmp_path, *QUICK["milet"], env=env)
    path = only_run(tmp_path)
    assert list(path.glob("wandb/offline-run-*/*.wandb"))
    assert "psi/policy_loss" not in rows(path / "metrics.csv")[0]
    curves = {"learning_curve.png", "learning_curve_clusters.png"}
    assert plot(path) == curves | {"cluster_map.png", "belief.png", "embedding.png", "reward_weights.png"}


def test_belief_of_a_trial_is_plotted(tmp_path):
    run("varibad", "--env", "point-goal-4c", "--frames", 12800, "--run-dir", tmp_path, *QUICK["varibad"])
    curves = {"learning_curve.png", "learning_curve_clusters.png"}
    assert plot(only_run(tmp_path)) == curves | {"cluster_map.png", "belief.png", "embedding.png"}


def test_pearl_plots(tmp_path):
    flags = ["--env", "point-goal-4c", "--iterations", 1, "--latent-dim", 1, "--run-dir", tmp_path]
    run("pearl", *flags, *QUICK["pearl"])
    curves = {"learning_curve.png", "learning_curve_clusters.png"}
    assert plot(only_run(tmp_path)) == curves | {"cluster_map.png", "embedding.png"}


def test_maml_plots(finished, tmp_path):
    assert plot(finished["maml"]) == {"learning_curve.png", "learning_curve_clusters.png"}
    for env, figure in (("cheetah-vel", "return_by_velocity.png"), ("point-goal-4c", "cluster_map.png")):
        run("maml", "--env", env, "--iterations", 1, "--run-dir", tmp_path / env, *QUICK["maml"])
        assert figure in plot(only_run(tmp_path / env))
    flags = ["--env", "ml2", "--oracle", "--iterations", 2, *QUICK["maml"]]
    other = [["--seed", 1], ["--inner-steps", 1]]  # another number of frames; another number of gradient steps
    for i, change in enumerate(other):
        run("maml", *flags, *change, "--run-dir", tmp_path / str(i))
    assert plot(*(only_run(tmp_path / str(i)) for i in (1, 0)), finished["maml"])


@pytest.mark.parametrize("script, flag", NAN)
def test_nan_stops_the_run(tmp_path, script, flag):
    flags = ["--env", "point-goal-4c", flag, "1e30", "--run-dir", tmp_path, *QUICK[script]]
    result = run(script, *flags, ok=False)
    assert result.returncode == 1
    assert re.search(r"iteration \d+: .+ (is not finite|NaN or infinity); last good checkpoint: ", result.stderr)
    assert "Traceback" not in result.stderr


@scripts
def test_wrong_checkpoints_get_one_line(finished, tmp_path, script):
    def error(*flags):
        with pytest.raises(SystemExit) as caught:
            MODULES[script].train(MODULES[script].parse_args([str(f) for f in flags]))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    finished = finished[script]
    assert "cannot change on an existing run" in error("--resume", finished, "--gamma", 0.5)
    stored = json.loads((finished / "args.json").read_text())
    changes = {"env": {"env": "walker-params-4c", "oracle": False}, "script": {"script": "nobody"}}
    changes["env"] = {k: v for k, v in changes["env"].items() if k in stored}
    changes |= {"damaged": {}, "other": {"hidden": 32 if script in ("milet", "varibad", "rl2") else [7]}}
    for name, change in changes.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text(json.dumps(stored | change))
        checkpoint = (finished / "checkpoint.pt").read_bytes()
        (tmp_path / name / "checkpoint.pt").write_bytes(checkpoint[:1000] if name == "damaged" else checkpoint)
    assert f"belongs to {script}.py on {stored['env']}" in error("--evaluate", tmp_path / "env")
    assert "is a run of nobody.py" in error("--evaluate", tmp_path / "script")
    assert "damaged" in error("--evaluate", tmp_path / "damaged")
    assert "damaged" in error("--evaluate", tmp_path / "other")
    (tmp_path / "other" / "args.json").write_text("{")
    assert "damaged" in error("--evaluate", tmp_path / "other")
    if not torch.cuda.is_available():
        assert "no GPU" in error("--env", "point-goal-4c", "--device", "cuda")
