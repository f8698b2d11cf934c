"""Speed on the machine at hand, into runs/speed.csv: `./benchmark.sh speed`.

    python results/speed.py                      all rows, 50 minutes
    python results/speed.py WORD ... --out FILE  only those that have one of the words in their name

The physics limit of an environment is the rate of bare `Batch.step` calls with random controls, with the copies,
threads, bound fields and stage of the environment. Uniform controls, unless a script acts otherwise: how fast a robot
is simulated depends on how it moves. A script is judged by the share of the limit that it reaches while it samples and
end to end (median iteration after a warm-up, evaluation and checkpoints left out), with a full buffer. A machine's
speed drifts by more than the rest: the limit of a script (column limit) is the mean of one measured before and one
after it, and for the 800 copies of maml.py bare physics and sampling are timed in turn.
"""

import csv
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro

import envs

ROOT = Path(__file__).parent.parent
COLUMNS = ["what", "copies", "frames_per_s", "limit", "share", "sample_share", "sample_s", "update_s"]
COLUMNS += ["updates_per_s", "peak_memory_gb"]

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
    "milet": """
def error(self, z, obs, action, truth, steps):
    import torch
    s, a = self.embed_state(obs).relu(), self.embed_action(action).relu()
    x = torch.cat([s[:, :, 1:], a, s[:, :, :-1]] if self.sees_next else [a, s[:, :, :-1]], dim=-1).flatten(1, 2)
    x, target = (torch.stack([part[t].expand(z.shape[1], -1, -1) if isinstance(t, slice) else part[t]
                              for part, t in zip(rows, steps)]) for rows in (x, truth))
    z = z[:, :, None].expand(-1, -1, x.shape[2], -1)
    return (self.rest(self.first(torch.cat([z, x], dim=-1))) - target).square().mean()
milet.Decoder.error = error
""",
    "rl2": "rl2.Recurrence.apply = staticmethod(lambda gru, x, h, *weights: gru(x, h[None])[0])",
    "maml": "maml.CHUNK = 40",  # all tasks
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


@dataclass
class Options:
    words: tyro.conf.Positional[tuple[str, ...]] = ()  # parts of the names of the wanted rows (none: all)
    out: Path = ROOT / "runs" / "speed.csv"  # written anew; ours are in results/


def main(options: Options) -> None:
    table = []

    def wanted(what: str) -> bool:
        return not options.words or any(word in what for word in options.words)

    def add(what: str, copies: int, frames_per_s: float, **columns: float) -> None:
        table.append({"what": what, "copies": copies, "frames_per_s": round(frames_per_s), **columns})
        print(table[-1], flush=True)

    def add_script(
        what: str,
        env_id: str,
        copies: int,
        flags: str,
        warm_up: int,
        before: str = "",
        gradient_steps: int = 0,
        **limit_of: object,
    ) -> None:
        """A row; the script is the first word of it. gradient_steps: in an iteration, for a rate of them."""
        if not wanted(what):
            return
        limits = [physics_limit(env_id, copies, **limit_of)]
        median = measure(what.split(".py")[0], warm_up, ["--env", env_id, *flags.split()], before)
        limit = (limits[0] + physics_limit(env_id, copies, **limit_of)) / 2
        rate, sample, update = (median[key] for key in ("charts/sps", "time/sample", "time/update"))
        columns = {"limit": round(limit), "share": round(rate / limit, 3)}
        frames = rate * (sample + update)  # of an iteration
        columns["sample_share"] = round(frames / sample / limit, 3)
        columns |= {"sample_s": round(sample, 3), "update_s": round(update, 3)}
        columns |= {"updates_per_s": round(gradient_steps / update, 1)} if gradient_steps else {}
        add(what, copies, rate, **columns, peak_memory_gb=round(median["peak_memory_gb"], 2))

    for preset, copies in {"paper": 16, "fast": 32}.items():
        flags = f"--preset {preset} --frames {40 * 200 * copies}"
        for name, before in {"": "", ", plain decoder": PLAIN["milet"]}.items():
            add_script(f"milet.py ant-goal-4c, {preset} preset{name}", "ant-goal-4c", copies, flags, 10, before)
    for script in ("varibad", "rl2"):
        flags = f"--preset paper --frames {40 * 3200}"
        add_script(f"{script}.py ant-goal-4c", "ant-goal-4c", 16, flags, 10)
        for env_id, copies in OFFICIAL[script].items():
            flags = f"--preset paper --horizon 200 --num-envs {copies} --frames {25 * 400 * copies}"
            variants = {"": ""} | ({", nn.GRU's backward pass": PLAIN["rl2"]} if script == "rl2" else {})
            for name, before in variants.items():
                add_script(f"{script}.py {env_id}, H = 200{name}", env_id, copies, flags, 5, before, horizon=200)

    limit_row, sampling_row = (f"{x} cheetah-dir, untrained policy" for x in ("physics limit", "sampling of maml.py"))
    if wanted(limit_row) or wanted(sampling_row):
        limit, sampling = maml_sampling()
        add(limit_row, 800, limit)
        add(sampling_row, 800, sampling, share=round(sampling / limit, 3))
    for script in ("maml", "promp", "rmaml", "mmaml"):
        what = f"{script}.py cheetah-dir, 40 tasks x 20 rollouts"
        variants = {"": ""} | ({", all tasks at once": PLAIN["maml"]} if script == "maml" else {})
        for name, before in variants.items():
            add_script(what + name, "cheetah-dir", 800, "--iterations 14", 4, before, actions=untrained)
    what = "hom.py cheetah-dir, 40 tasks x 20 rollouts, two members"
    add_script(what, "cheetah-dir", 800, "--probe-iterations 3 --iterations 14", 6, actions=untrained)
    what = "fcml.py cheetah-dir, 40 tasks x 20 rollouts, one learner that looks for founders"
    add_script(what, "cheetah-dir", 800, "--warmup 3 --epsilon 1e6 --iterations 14", 4, actions=untrained)
    what = "cml.py cheetah-dir, 2 learners x 40 tasks x 20 rollouts"
    add_script(what, "cheetah-dir", 1600, "--iterations 14", 4, actions=untrained)
    what = "cml.py ant-cheetah-dir, 2 learners x 40 tasks x 20 rollouts"
    if wanted(what):
        median = measure("cml", 2, ["--env", "ant-cheetah-dir", "--iterations", "5"])
        columns = {"sample_s": round(median["time/sample"], 3), "update_s": round(median["time/update"], 3)}
        add(what, 1600, median["charts/sps"], **columns, peak_memory_gb=round(median["peak_memory_gb"], 2))

    for env_id, batch in {"cheetah-dir": "4 x 256", "ant-goal-4c": "16 x 256"}.items():
        flags = f"--iterations 4 --gradient-steps 100 --meta-batch {batch.split()[0]}"
        flags += " --horizon 200 --prior-steps 1000 --extra-steps 1000"  # 5 visits of 5 episodes, twice
        variants = {"": "", ", without oneDNN": PLAIN["pearl"], ", memory kept": KEEP_MEMORY}
        for name, before in variants.items():
            what = f"pearl.py {env_id}, batch {batch}{name}"
            add_script(what, env_id, 25, flags, 1, before, gradient_steps=100, horizon=200)

    for env_id, env_class in envs.ENVIRONMENTS.items():
        if issubclass(env_class, envs.MujocoVectorEnv):
            for copies in (16, 320) if wanted(f"physics limit {env_id}") else ():
                add(f"physics limit {env_id}", copies, physics_limit(env_id, copies))

    # No physics here: copies are tasks; updates_per_s are meta-iterations with second derivatives of five inner steps,
    # or MetaCURE's gradient steps
    for what, tasks, warm_up, flags, gradient_steps in (
        ("mmaml_regression.py functions-5m, MMAML", 125, 10, "--iterations 40", 0),
        ("mmaml_regression.py functions-5m, MMAML, a copy of θ a task", 125, 10, "--iterations 40 --no-low-rank", 0),
        ("mmaml_regression.py functions-5m, MAML", 125, 10, "--iterations 40 --modulation none", 0),
        ("mmaml_classification.py drawn-3m, MMAML", 6, 10, "--iterations 40 --eval-episodes 2", 0),
        ("metacure.py point-goal-sparse, 16 x 64", 10, 1, "--preset paper --iterations 4 --gradient-steps 100", 100),
    ):
        if not wanted(what):
            continue
        median = measure(what.split(".py")[0], warm_up, flags.split())
        sample, update = median["time/sample"], median["time/update"]
        columns = {"sample_s": round(sample, 4), "update_s": round(update, 4)}
        columns |= {"updates_per_s": round(gradient_steps / update if gradient_steps else 1 / (sample + update), 2)}
        add(what, tasks, median["charts/sps"], **columns, peak_memory_gb=round(median["peak_memory_gb"], 2))

    if not table:
        raise SystemExit(f"speed.py: error: no row has one of these words: {' '.join(options.words)}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        file.write(f"# {os.cpu_count()} CPUs, {time.strftime('%Y-%m-%d')}\n")
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    print()
    for row in [dict(zip(COLUMNS, COLUMNS)), *table]:
        print("  ".join(str(row.get(k, "")).rjust(14 if k != "what" else 45) for k in COLUMNS))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
