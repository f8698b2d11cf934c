"""Whole runs: probe, smoke, kill and resume, evaluate, signals, tracking, and what must stop a run with one line."""

import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import milet
import pytest
import torch
from conftest import ROOT

# The buffer is full after 4 of 12 meta-iterations: trials are overwritten before and after a kill.
QUICK = "--buffer-trials 64 --eval-every 1 --save-every 2 --num-threads 1".split()
QUICK += "--vae-batch 8 --elbo-terms 4 --decodes 5".split()


def command(*flags, script="milet") -> list[str]:
    return [sys.executable, str(ROOT / "algos" / f"{script}.py"), *map(str, flags)]


def run(*flags, ok=True, **kwargs) -> subprocess.CompletedProcess:
    result = subprocess.run(command(*flags), capture_output=True, text=True, timeout=240, **kwargs)
    assert not ok or result.returncode == 0, result.stdout + result.stderr
    return result


def only_run(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def wait_for_rows(folder: Path, count: int, process: subprocess.Popen) -> Path:
    for _ in range(1200):
        files = list(folder.glob("*/eval.csv"))
        if files and len(rows(files[0])) >= count:
            return files[0].parent
        assert process.poll() is None, "the run ended before it could be interrupted"
        time.sleep(0.05)
    raise AssertionError("the run does not come forward")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A short uninterrupted run on a real MuJoCo environment."""
    folder = tmp_path_factory.mktemp("finished")
    run("--env", "hopper-params-4c", "--frames", 12 * 3200, "--run-dir", folder, *QUICK)
    return only_run(folder)


def test_probe_recovers_the_clusters_and_adapts(tmp_path):
    """Two clusters that only the reward tells apart: NMI 1, and a second episode near the oracle's 0 (no task: -10)."""
    import probes  # noqa: F401

    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    args = milet.Args(
        env="probe-guess-sign", frames=60_000, run_dir=str(tmp_path), clusters=2, num_threads=1, eval_every=50,
        save_every=1000, precollect=1000, lr_vae=3e-3, vae_updates=2, elbo_terms=20, lr_phi=3e-3, lr_psi=3e-3, clip=0.2,
        minibatches=2, kl_z_weight=1e-3,
    )  # fmt: skip
    milet.train(args)
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    first, last = (rows(only_run(tmp_path) / "eval.csv")[i] for i in (0, -1))
    assert float(last["eval/nmi"]) > 0.9
    assert float(last["eval/return_episode_2"]) > -3 > float(first["eval/return_episode_2"])


def test_smoke_leaves_the_whole_run_folder(finished):
    names = {p.name for p in finished.iterdir()}
    assert {"args.json", "metrics.csv", "eval.csv", "eval.npz", "checkpoint.pt"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert finished.name.startswith("hopper-params-4c__milet__0__")
    assert json.loads((finished / "args.json").read_text())["state_decoder"] == [256, 128]
    evaluations, metrics = rows(finished / "eval.csv"), rows(finished / "metrics.csv")
    assert [int(r["iteration"]) for r in evaluations] == list(range(13))
    assert [int(r["charts/frames"]) for r in metrics] == [3200 * i for i in range(2, 13)]
    for key in ("eval/return_episode_1", "eval/return_episode_2_cluster_3", "eval/nmi", "eval/ari", "eval/nmi_ceiling"):
        assert key in evaluations[0]
    for key in ("train/bonus_h", "train/bonus_c", "elbo/kl_z", "time/sample", "charts/sps", "psi/policy_loss"):
        assert key in metrics[0]


@pytest.mark.parametrize("after", [2, 5])
def test_killed_and_resumed_ends_with_the_same_eval_csv(finished, tmp_path, after):
    process = subprocess.Popen(
        command("--env", "hopper-params-4c", "--frames", 12 * 3200, "--run-dir", tmp_path, *QUICK),
        stdout=subprocess.DEVNULL,
    )
    path = wait_for_rows(tmp_path, after, process)
    time.sleep(random.Random(after).uniform(0, 0.5))
    assert process.poll() is None, "the run ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    with (path / "eval.csv").open("a") as file:
        file.write("1")  # a row that the kill cut short
    run("--resume", path)
    assert (path / "eval.csv").read_text() == (finished / "eval.csv").read_text()
    clock = ("charts/sps", "time/sample", "time/ppo", "time/elbo", "time/update")
    tables = [rows(folder / "metrics.csv") for folder in (path, finished)]
    logged = [[{k: v for k, v in row.items() if k not in clock} for row in table] for table in tables]
    assert logged[0] == logged[1]


def test_evaluate_gives_what_training_logged(finished):
    last = rows(finished / "eval.csv")[-1]
    output = run("--evaluate", finished).stdout
    for k in (1, 2):
        assert f"return {k} {float(last[f'eval/return_episode_{k}']):.1f}" in output


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_finish_the_iteration_and_save(tmp_path, signum, code):
    process = subprocess.Popen(
        command("--env", "point-goal-4c", "--run-dir", tmp_path, *QUICK), stdout=subprocess.PIPE, text=True
    )
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
    run(*flags, "--run-dir", tmp_path, *QUICK, env=env)
    path = only_run(tmp_path)
    assert list(path.glob("wandb/offline-run-*/*.wandb"))
    assert "psi/policy_loss" not in rows(path / "metrics.csv")[0]
    plot = [sys.executable, str(ROOT / "results" / "plot.py"), str(path)]
    assert subprocess.run(plot, capture_output=True).returncode == 0
    figures = {p.name for p in (path / "figures").iterdir()}
    assert figures == {"learning_curve.png", "cluster_map.png", "belief.png", "embedding.png", "reward_weights.png"}


def test_nan_stops_the_run(tmp_path):
    result = run("--env", "point-goal-4c", "--lr-vae", "1e30", "--run-dir", tmp_path, *QUICK, ok=False)
    assert result.returncode == 1
    assert re.search(r"iteration \d+: .+ (is not finite|NaN or infinity); last good checkpoint: ", result.stderr)
    assert "Traceback" not in result.stderr


def test_wrong_checkpoints_get_one_line(finished, tmp_path):
    def error(*flags):
        with pytest.raises(SystemExit) as caught:
            milet.train(milet.parse_args([str(f) for f in flags]))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "cannot change on an existing run" in error("--resume", finished, "--gamma", 0.5)
    stored = json.loads((finished / "args.json").read_text())
    changes = {"env": {"env": "walker-params-4c"}, "script": {"script": "varibad"}}
    changes |= {"damaged": {}, "other": {"hidden": 32}}
    for name, change in changes.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text(json.dumps(stored | change))
        checkpoint = (finished / "checkpoint.pt").read_bytes()
        (tmp_path / name / "checkpoint.pt").write_bytes(checkpoint[:1000] if name == "damaged" else checkpoint)
    assert "belongs to milet.py on hopper-params-4c" in error("--evaluate", tmp_path / "env")
    assert "is a run of varibad.py" in error("--evaluate", tmp_path / "script")
    assert "damaged" in error("--evaluate", tmp_path / "damaged")
    assert "damaged" in error("--evaluate", tmp_path / "other")
    (tmp_path / "other" / "args.json").write_text("{")
    assert "damaged" in error("--evaluate", tmp_path / "other")
    if not torch.cuda.is_available():
        assert "no GPU" in error("--env", "point-goal-4c", "--device", "cuda")
