"""benchmark.sh, with a python and an sbatch that only write down what they are asked; and its commands."""

import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT

PYTHON = r"""#!/usr/bin/env bash
# A run of some short steps: begins, continues or leaves RUN_DIR/NAME; on SIGTERM it ends the step, saves, exits 143.
echo "python $*"
while [ $# -gt 0 ]; do
  case $1 in --name) name=$2 ;; --run-dir) folder=$2 ;; --out) figures=$2 ;; esac
  shift
done
if [ "$figures" ]; then
  mkdir -p "$figures"; cd "$figures"
  echo "${PWD##*/}" > learning_curve.png; echo "clusters of ${PWD##*/}" > learning_curve_clusters.png
  exit
fi
[ "$name" != "$FAIL" ] || { sleep "${FAIL_AFTER:-0}"; echo "the cause"; exit 1; }
mkdir -p "$folder/$name"; steps=$folder/$name/steps; touch "$steps"; stopped=''
mkdir "$folder/$name/lock" || exit 9
trap 'stopped=yes' TERM
echo "begin $name" >> "$folder/events"
while [ "$(wc -l < "$steps")" -lt 4 ] && [ ! "$stopped" ]; do sleep "${STEP:-0.05}"; echo step >> "$steps"; done
rmdir "$folder/$name/lock"
echo "end $name" >> "$folder/events"
[ ! "$stopped" ] || { echo saved; exit 143; }
"""
SBATCH = '#!/usr/bin/env bash\nprintf "%s\\n" "$@" "" >> submitted\necho $((RANDOM + 1000))\n'
RUNS = [f"point-goal-4c__milet__{seed}" for seed in (0, 1, 2)]


@pytest.fixture
def house(tmp_path) -> Path:
    """A copy of benchmark.sh in a folder of its own, with both programs."""
    shutil.copy(ROOT / "benchmark.sh", tmp_path)
    (tmp_path / "bin").mkdir()
    for name, text in {"python": PYTHON, "sbatch": SBATCH}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def benchmark(house: Path, *words: str, wait=True, **environment) -> subprocess.CompletedProcess | subprocess.Popen:
    path = f"{house / 'bin'}:{os.environ['PATH']}"
    kwargs = dict(cwd="/", text=True, env=os.environ | dict(PATH=path, FAIL="-") | environment)
    kwargs |= dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    command = [str(house / "benchmark.sh"), *words]
    return subprocess.run(command, timeout=60, **kwargs) if wait else subprocess.Popen(command, **kwargs)


@pytest.fixture(autouse=True)
def as_from_a_terminal():
    """A shell cannot trap what was ignored when it began, and background jobs and nohup ignore some."""
    before = {s: signal.signal(s, signal.SIG_DFL) for s in (signal.SIGHUP, signal.SIGINT)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def steps(folder: Path) -> list[int]:
    files = [folder / name / "steps" for name in RUNS]
    return [len(file.read_text().splitlines()) if file.exists() else 0 for file in files]


def wait_until(condition) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("nothing comes forward")


def all_campaigns() -> dict[str, int]:
    """The list, without an argument: campaigns and their numbers of runs."""
    text = subprocess.run(ROOT / "benchmark.sh", check=True, capture_output=True, text=True, cwd="/").stdout
    table = text.split("\nCAMPAIGN ", 1)[1].splitlines()[1:]
    return {name: int(count) for name, count, _ in (line.split(maxsplit=2) for line in table)}


def test_runs_figure_and_again(house):
    first, folder = benchmark(house, "milet-point", "-j", "2"), house / "runs" / "milet-point"
    assert first.returncode == 0, first.stdout
    assert steps(folder) == [4, 4, 4] and (folder / "figures" / "point-goal-4c").is_dir()
    log = (folder / f"{RUNS[1]}.log").read_text()
    assert "algos/milet.py --env point-goal-4c --seed 1" in log and "--num-threads 1" in log
    now, most = 0, 0
    for line in (folder / "events").read_text().splitlines():
        now += 1 if line.startswith("begin") else -1
        most = max(most, now)
    assert most == 2, "runs at a time"
    again = benchmark(house, "milet-point")
    assert again.returncode == 0 and steps(folder) == [4, 4, 4]
    trial = benchmark(house, "milet-point", "-j", "3", "--", "--frames", "25600")
    assert trial.returncode == 0 and steps(house / "runs" / "milet-point--frames-25600") == [4, 4, 4]
    assert "--frames 25600" in (house / "runs" / "milet-point--frames-25600" / f"{RUNS[0]}.log").read_text()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_saves_and_the_same_command_continues(house, signum):
    folder = house / "runs" / "milet-point"
    process = benchmark(house, "milet-point", "-j", "2", wait=False, STEP="0.3")
    wait_until(lambda: min(steps(folder)[:2]) >= 1)
    process.send_signal(signum)
    assert process.wait(timeout=30) == (-9 if signum == signal.SIGKILL else 128 + signum)
    if signum != signal.SIGKILL:
        assert not list(folder.glob("*/lock")) and max(steps(folder)) < 4 and steps(folder)[2] == 0
        assert "saved" in (folder / f"{RUNS[0]}.log").read_text()
    assert not (folder / "figures").exists()
    again = benchmark(house, "milet-point", "-j", "2")  # after SIGKILL: behind the runs that still go on
    assert again.returncode == 0, again.stdout
    assert steps(folder) == [4, 4, 4] and (folder / "figures").exists()


def test_a_failure_is_told_stops_the_others_and_draws_nothing(house):
    folder = house / "runs" / "milet-point"
    result = benchmark(house, "milet-point", "-j", "2", FAIL=RUNS[1], FAIL_AFTER="0.5", STEP="0.4")
    assert result.returncode == 1
    assert f"{RUNS[1]} failed, status 1" in result.stdout and "the cause" in result.stdout
    assert 0 < steps(folder)[0] < 4 and steps(folder)[1:] == [0, 0] and not (folder / "figures").exists()
    assert "saved" in (folder / f"{RUNS[0]}.log").read_text()


def test_slurm_submits_every_run_and_then_the_figure(house):
    result = benchmark(house, "milet-point", "--", "--frames", "25600", SLURM="1", TIME="1:00:00")
    assert result.returncode == 0, result.stdout
    *jobs, figure = (house / "submitted").read_text().strip().split("\n\n")
    assert len(jobs) == 3
    for name, job in zip(RUNS, jobs):
        folder = "milet-point--frames-25600"
        wanted = f"--job-name={folder}/{name} --output=runs/{folder}/{name}.log --open-mode=append --requeue "
        wanted += "--signal=B:TERM@600 --time=1:00:00 --dependency=singleton"
        assert set(wanted.split()) <= set(job.split("\n"))
        assert f"--wrap=exec ./benchmark.sh milet-point --only {name} -- --frames 25600" in job
    ids = re.findall(r"^job (\d+)", result.stdout, re.M)
    assert f"--dependency=singleton,afterok:{':'.join(ids[:3])}\n" in figure and "--only figure-point-goal-4c" in figure
    one = benchmark(house, "milet-point", "--only", RUNS[2], "--", "--frames", "25600")  # what the job does
    assert one.returncode == 0 and steps(house / "runs" / folder) == [0, 0, 4]


@pytest.mark.parametrize("state, requeued", [("RUNNING", True), ("COMPLETING", False)])
def test_a_job_whose_time_is_over_saves_and_queues_again_and_one_that_was_cancelled_does_not(house, state, requeued):
    folder = house / "runs" / "milet-point"
    programs = {"squeue": f'[ "$*" = "-h -j 7 -o %T" ] && echo {state}', "scontrol": 'echo "$@" >> requeued'}
    for name, line in programs.items():
        (house / "bin" / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
        (house / "bin" / name).chmod(0o755)
    process = benchmark(house, "milet-point", "--only", RUNS[0], wait=False, STEP="0.3", SLURM_JOB_ID="7")
    wait_until(lambda: steps(folder)[0] >= 1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    assert 1 <= steps(folder)[0] < 4 and not list(folder.glob("*/lock")), "saved"
    asked = house / "requeued"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 7\n" if requeued else "")


@pytest.mark.parametrize("words", [["no-such"], ["milet-point", "-j"], ["milet-point", "-x"], ["promp", "maml"]])
def test_wrong_words_are_one_line(house, words):
    result = benchmark(house, *words)
    assert result.returncode == 2 and result.stdout.count("\n") == 1 and not (house / "runs").exists()


@pytest.mark.parametrize("campaign, count", all_campaigns().items())
def test_the_scripts_take_the_commands(campaign, count):
    text = subprocess.run([ROOT / "benchmark.sh", campaign, "-n"], check=True, capture_output=True, text=True).stdout
    commands = [shlex.split(line) for line in text.splitlines()]
    runs = {f"{c[c.index('--run-dir') + 1]}/{c[-1]}": c for c in commands if c[1].startswith("algos/")}
    figures = [c for c in commands if c[1].startswith("results/")]
    assert len(runs) == count == len(commands) - len(figures) and figures
    for name, (_, script, *flags) in runs.items():
        if "__0" in name:
            importlib.import_module(Path(script).stem).parse_args(flags)
    for _, _, *words in figures:
        for word in words[: -2 if "--out" in words else None]:
            assert word in runs or (ROOT / word / "eval.csv").exists(), word


def test_help_starts_nothing(house):
    for words in (["--help"], ["ant", "-h"]):
        result = benchmark(house, *words)
        assert result.returncode == 0 and "CAMPAIGN" in result.stdout and not (house / "runs").exists()


def test_figures_are_those_of_the_pages_and_of_stored_runs():
    commands = subprocess.run([ROOT / "benchmark.sh", "figures", "-n"], capture_output=True, text=True).stdout
    for command in commands.splitlines():
        *runs, option, out = command.split()[2:]
        assert option == "--out" and (ROOT / "results" / "figures" / f"{Path(out).name}.png").is_file()
        assert runs and all((ROOT / run / "eval.csv").is_file() for run in runs), command
    drawn = [Path(command.split()[-1]).name for command in commands.splitlines()]
    curves = [path.stem for path in (ROOT / "results" / "figures").glob("*.png")]
    assert {name for name in curves if name.endswith(("_curve", "_all"))} <= set(drawn)


def test_speed_measures_the_named_rows_alone(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "results")
    speed = importlib.import_module("speed")
    monkeypatch.setattr(speed, "physics_limit", lambda *args, **kwargs: 100.0)
    row = {"charts/sps": 50.0, "time/sample": 1.0, "time/update": 3.0, "peak_memory_gb": 0.5}
    monkeypatch.setattr(speed, "measure", lambda *args: row)
    monkeypatch.setattr(speed, "maml_sampling", lambda: (100.0, 90.0))
    out = tmp_path / "speed.csv"
    speed.main(speed.Options(("rmaml", "physics limit hopper"), out))
    names = [line.split(",")[0].strip('"') for line in out.read_text().splitlines()[2:]]
    assert names == ["rmaml.py cheetah-dir", "physics limit hopper-params-4c", "physics limit hopper-params-4c"]
    out.unlink()
    with pytest.raises(SystemExit, match="no row has one of these words: nothing"):
        speed.main(speed.Options(("nothing",), out))
    assert not out.exists()
    speed.main(speed.Options((), out))
    assert len(out.read_text().splitlines()) > 60


def test_the_figures_go_where_the_pages_show_them(house):
    (house / "results" / "figures").mkdir(parents=True)
    stale = house / "runs" / "figures" / "figures" / "stale"
    stale.mkdir(parents=True)
    (stale / "learning_curve.png").touch()
    result = benchmark(house, "figures", "-j", "4")
    assert result.returncode == 0, result.stdout
    shown = {path.stem: path.read_text().strip() for path in (house / "results" / "figures").iterdir()}
    assert shown["point_all"] == "point_all" and "stale" not in shown
    assert shown["maml_inner_loss"] == "clusters of maml_inner_loss"
    assert shown["promp_cheetah_directions"] == "clusters of promp_cheetah_curve"
    assert {f"{name}.png" for name in shown} <= set(os.listdir(ROOT / "results" / "figures"))
