"""Speed on the machine at hand, into results/speed.csv: `./benchmark.sh speed`.

The physics limit of an environment is the rate of bare `Batch.step` calls with random controls, with the copies,
threads, bound fields and stage of the environment. Uniform controls, unless a script acts otherwise: how fast a robot
is simulated depends on how it moves. A script is judged by the share of the limit that it reaches while it samples and
end to end (median iteration after a warm-up, evaluation and checkpoints left out), with a full buffer. For the 800
copies of maml.py bare physics and sampling are timed in turn, because a machine's speed drifts by more than the rest.
"""

import csv
import os
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

import envs

ROOT = Path(__file__).parent.parent
COLUMNS = ["what", "copies", "frames_per_s", "share", "sample_share", "sample_s", "update_s", "updates_per_s"]
COLUMNS += ["peak_memory_gb"]

CHILD = """
import sys; sys.path.insert(0, {algos!r})
import {script}
{before}
args = {script}.parse_args(sys.argv[1:])
{script}.train(args, {script}.Run(args))
import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""

# MILET's and VariBAD's trial buffer is full of the first trials at once: memory and its traffic as in a long run.
FULL_BUFFER = """
def fill(self, *episodes, add={script}.TrialBuffer.add):
    add(self, *episodes)
    while len(self.trials) < self.trials.maxlen: add(self, *episodes)
{script}.TrialBuffer.add = fill
"""

# Code that serves speed only, replaced by the plain form that it equals: what does it gain on a preset?
PLAIN = {
    "rl2": "rl2.Recurrence.apply = staticmethod(lambda gru, x, h, *weights: gru(x, h[None])[0])",
    "pearl": "pearl.forward_onednn = lambda net, x: net.head(net.features(x))",
}
# glibc gives memory back after every step, and takes it again page by page, unless it is told to keep it.
KEEP_MEMORY = "import ctypes; libc = ctypes.CDLL(None); libc.mallopt(-3, 1 << 30); libc.mallopt(-1, 2**31 - 1)"

# Copies for H = 200 and the frames that an update has in the official code of VariBAD and RL2.
OFFICIAL = {"varibad": {"cheetah-dir": 32, "ant-goal-4c": 8}, "rl2": {"cheetah-dir": 8, "ant-goal-4c": 8}}


def uniform(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.uniform(-1, 1, shape)


def untrained(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """The actions of the gradient family's untrained policy, standard deviation 1 on an action scale of 10."""
    return np.clip(rng.normal(0, 0.1, shape), -1, 1)


def physics_limit(env_id: str, copies: int, horizon: int = 100, actions=uniform, seconds: float = 5.0) -> float:
    """Environment steps per second (frame skip included) of bare physics, resets every H steps left out."""
    env = gym.make_vec(env_id, num_envs=copies, horizon=horizon).unwrapped
    env.reset(seed=0)
    controls = env.control(actions(np.random.default_rng(0), (env.horizon, copies, env.action_dim)))
    spent = steps = 0
    while spent < seconds:
        env.reset()
        begin = time.perf_counter()
        for control in controls:
            env.ctrl[:] = control
            env.batch.step(nstep=env.frame_skip, stage=env.stage)
        spent, steps = spent + time.perf_counter() - begin, steps + copies * env.horizon
    return steps / spent


def measure(script: str, warm_up: int, flags: list[str], before: str = "") -> dict[str, float]:
    """Medians of the columns of metrics.csv over the iterations after the warm-up, and the peak memory.

    before: code that runs between the import of the script and its training.
    """
    with tempfile.TemporaryDirectory() as folder:
        before += "\n" + FULL_BUFFER.format(script=script) if script in ("milet", "varibad") else ""
        code = CHILD.format(algos=str(ROOT / "algos"), script=script, before=before)
        command = [sys.executable, "-c", code, *flags, "--eval-every", "1000", "--run-dir", folder]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        with next(Path(folder).glob("*/metrics.csv")).open() as file:
            rows = list(csv.DictReader(file))[warm_up:]
    medians = {key: float(np.median([float(row[key]) for row in rows])) for key in rows[0]}
    return medians | {"peak_memory_gb": float(output.split()[-1])}


def maml_sampling(rounds: int = 12) -> tuple[float, float]:
    """Frames per second of bare physics and of sampling, both with an untrained policy's actions, timed in turn."""
    sys.path.insert(0, str(ROOT / "algos"))
    import maml

    args, rng = maml.Args(), torch.Generator().manual_seed(0)
    env = gym.make_vec(args.env, num_envs=args.tasks * args.rollouts)
    tasks = env.unwrapped.sample_tasks(args.tasks, np.random.default_rng(0))
    policy = maml.GaussianPolicy(env.unwrapped.obs_dim, env.unwrapped.action_dim, args)
    theta, seconds = policy.init(rng).expand(args.tasks, -1), []
    for _ in range(rounds):
        bare = env.num_envs * args.horizon / physics_limit(args.env, env.num_envs, actions=untrained, seconds=0.1)
        begin = time.perf_counter()
        maml.sample(env, tasks, policy, theta, rng, args)
        seconds.append((bare, time.perf_counter() - begin))
    bare, sampling = env.num_envs * args.horizon / np.median(seconds[2:], axis=0)
    return float(bare), float(sampling)


def share(what: str, copies: int, limit: float, median: dict[str, float]) -> dict[str, str | float]:
    """The row of a script in the table."""
    frames = median["charts/sps"] * (median["time/sample"] + median["time/update"])
    return {
        "what": what,
        "copies": copies,
        "frames_per_s": round(median["charts/sps"]),
        "share": round(median["charts/sps"] / limit, 3),
        "sample_share": round(frames / median["time/sample"] / limit, 3),
        "sample_s": round(median["time/sample"], 3),
        "update_s": round(median["time/update"], 3),
        "peak_memory_gb": round(median["peak_memory_gb"], 2),
    }


def main() -> None:
    table = []

    def add(row: dict[str, str | float]) -> None:
        table.append(row)
        print(row, flush=True)

    @cache
    def add_limit(env_id: str, copies: int, horizon: int = 100) -> float:
        rate = physics_limit(env_id, copies, horizon)
        what = f"physics limit {env_id}" + f", H = {horizon}" * (horizon != 100)
        add({"what": what, "copies": copies, "frames_per_s": round(rate)})
        return rate

    for env_id, env_class in envs.ENVIRONMENTS.items():
        if issubclass(env_class, envs.MujocoVectorEnv):
            for copies in (16, 320):
                add_limit(env_id, copies)
    for preset, copies in {"paper": 16, "fast": 32}.items():
        flags = ["--env", "ant-goal-4c", "--preset", preset, "--frames", str(40 * 200 * copies)]
        for name, before in {"": "", ", memory kept": KEEP_MEMORY}.items():
            median = measure("milet", 10, flags, before)
            limit = add_limit("ant-goal-4c", copies)
            add(share(f"milet.py ant-goal-4c, {preset} preset{name}", copies, limit, median))
    for script in ("varibad", "rl2"):
        median = measure(script, 10, ["--env", "ant-goal-4c", "--preset", "paper", "--frames", str(40 * 3200)])
        add(share(f"{script}.py ant-goal-4c", 16, add_limit("ant-goal-4c", 16), median))
        for env_id, copies in OFFICIAL[script].items():
            flags = ["--env", env_id, "--preset", "paper", "--horizon", "200", "--num-envs", str(copies)]
            flags += ["--frames", str(25 * 400 * copies)]
            limit, median = add_limit(env_id, copies, 200), measure(script, 5, flags)
            add(share(f"{script}.py {env_id}, H = 200", copies, limit, median))
            if script == "rl2":
                median = measure(script, 5, flags, PLAIN["rl2"])
                add(share(f"{script}.py {env_id}, H = 200, nn.GRU's backward pass", copies, limit, median))
    limit, sampling = maml_sampling()
    add({"what": "physics limit cheetah-dir, untrained policy", "copies": 800, "frames_per_s": round(limit)})
    median = measure("maml", 4, ["--env", "cheetah-dir", "--iterations", "14"])
    row = share("maml.py cheetah-dir, 40 tasks x 20 rollouts", 800, limit, median)
    add(row | {"sample_share": round(sampling / limit, 3)})
    median = measure("promp", 4, ["--env", "cheetah-dir", "--iterations", "14"])
    row = share("promp.py cheetah-dir, 40 tasks x 20 rollouts", 800, limit, median)
    add(row | {"sample_share": round(sampling / limit, 3)})  # its sampler is maml.py's

    for env_id, batch in {"cheetah-dir": "4 x 256", "ant-goal-4c": "16 x 256"}.items():
        flags = ["--env", env_id, "--iterations", "4", "--gradient-steps", "100", "--meta-batch", batch.split()[0]]
        flags += ["--horizon", "200", "--prior-steps", "1000", "--extra-steps", "1000"]  # 5 visits of 5 episodes, twice
        limit = add_limit(env_id, 25, 200)
        variants = {"": "", ", without oneDNN": PLAIN["pearl"], ", memory kept": KEEP_MEMORY}
        for name, before in variants.items():
            median = measure("pearl", 1, flags, before)
            row = share(f"pearl.py {env_id}, batch {batch}{name}", 25, limit, median)
            add(row | {"updates_per_s": round(100 / median["time/update"], 1)})

    # No physics here: updates_per_s are meta-iterations, with second derivatives; "plain": a copy of θ for every task
    for script, flags, what in (
        ("mmaml_regression", [], "functions-5m, MMAML, 125 tasks, 5 steps"),
        ("mmaml_regression", ["--no-low-rank"], "functions-5m, MMAML, 125 tasks, 5 steps, plain"),
        ("mmaml_regression", ["--modulation", "none"], "functions-5m, MAML, 125 tasks, 5 steps"),
        ("mmaml_classification", ["--eval-episodes", "2"], "drawn-3m, MMAML, 6 tasks, 5 steps"),
    ):
        median = measure(script, 10, [*flags, "--iterations", "40"])
        seconds = median["time/sample"] + median["time/update"]
        row = {"what": f"{script}.py {what}", "frames_per_s": round(median["charts/sps"])}
        row |= {key: round(median[f"time/{key[:-2]}"], 4) for key in ("sample_s", "update_s")}
        add(row | {"updates_per_s": round(1 / seconds, 2), "peak_memory_gb": round(median["peak_memory_gb"], 2)})

    with (ROOT / "results" / "speed.csv").open("w", newline="") as file:
        file.write(f"# {os.cpu_count()} CPUs, {time.strftime('%Y-%m-%d')}\n")
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    print()
    for row in [dict(zip(COLUMNS, COLUMNS)), *table]:
        print("  ".join(str(row.get(k, "")).rjust(14 if k != "what" else 45) for k in COLUMNS))


if __name__ == "__main__":
    main()
