"""Speed on the machine at hand, into results/speed.csv: `./benchmark.sh speed`.

The physics limit of an environment is the rate of bare `Batch.step` calls with random controls, with the copies,
threads, bound fields and stage of the environment. A script is judged by the share of it that it reaches while it
samples and end to end (median iteration after a warm-up, evaluation and checkpoints left out), with a full buffer.
"""

import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gymnasium as gym
import numpy as np

import envs

ROOT = Path(__file__).parent.parent
ITERATIONS, WARM_UP = 40, 10
COLUMNS = ["what", "copies", "frames_per_s", "share", "sample_share", "sample_s", "ppo_s", "elbo_s", "peak_memory_gb"]

# The trial buffer starts full of noise, so that memory and memory traffic are those of a long run.
CHILD = """
import sys; sys.path.insert(0, {algos!r})
import milet
init = milet.TrialBuffer.__init__
def full(self, *args):
    init(self, *args)
    for x in self.data.values(): x.normal_()
    self.added = self.capacity
milet.TrialBuffer.__init__ = full
milet.train(milet.parse_args(sys.argv[1:]))
import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def physics_limit(env_id: str, copies: int, seconds: float = 5.0) -> float:
    """Environment steps per second (frame skip included) of bare physics, resets every 100 steps left out."""
    env = gym.make_vec(env_id, num_envs=copies).unwrapped
    env.reset(seed=0)
    controls = env.control(np.random.default_rng(0).uniform(-1, 1, (env.horizon, copies, env.action_dim)))
    spent = steps = 0
    while spent < seconds:
        env.reset()
        begin = time.perf_counter()
        for control in controls:
            env.ctrl[:] = control
            env.batch.step(nstep=env.frame_skip, stage=env.stage)
        spent, steps = spent + time.perf_counter() - begin, steps + copies * env.horizon
    return steps / spent


def measure_milet(*flags: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        options = ["--frames", str(3200 * ITERATIONS), "--eval-every", "1000", "--run-dir", folder, *flags]
        code = CHILD.format(algos=str(ROOT / "algos"))
        command = [sys.executable, "-c", code, *options]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        with next(Path(folder).glob("*/metrics.csv")).open() as file:
            rows = list(csv.DictReader(file))[WARM_UP:]
    medians = {key: float(np.median([float(row[key]) for row in rows])) for key in rows[0]}
    return medians | {"peak_memory_gb": float(output.split()[-1])}


def main() -> None:
    table, limits = [], {}
    for env_id, env_class in envs.ENVIRONMENTS.items():
        if issubclass(env_class, envs.MujocoVectorEnv):
            for copies in (16, 320):
                rate = limits[env_id, copies] = physics_limit(env_id, copies)
                table.append({"what": f"physics limit {env_id}", "copies": copies, "frames_per_s": round(rate)})
                print(table[-1]["what"], copies, round(rate), flush=True)
    limit = limits["ant-goal-4c", 16]
    for name, flags in {"exact update": [], "--decodes 50": ["--decodes", "50"]}.items():
        median = measure_milet("--env", "ant-goal-4c", *flags)
        row = {
            "what": f"milet.py ant-goal-4c, {name}",
            "copies": 16,
            "frames_per_s": round(median["charts/sps"]),
            "share": round(median["charts/sps"] / limit, 3),
            "sample_share": round(3200 / median["time/sample"] / limit, 3),
            "sample_s": round(median["time/sample"], 3),
            "ppo_s": round(median["time/ppo"], 3),
            "elbo_s": round(median["time/elbo"], 3),
            "peak_memory_gb": round(median["peak_memory_gb"], 2),
        }
        table.append(row)
        print(row, flush=True)
    with (ROOT / "results" / "speed.csv").open("w", newline="") as file:
        file.write(f"# {os.cpu_count()} CPUs, {time.strftime('%Y-%m-%d')}\n")
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    print()
    for row in [dict(zip(COLUMNS, COLUMNS)), *table]:
        print("  ".join(str(row.get(k, "")).rjust(14 if k != "what" else 40) for k in COLUMNS))


if __name__ == "__main__":
    main()
