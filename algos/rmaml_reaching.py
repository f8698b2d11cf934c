"""RMAML's toy, 2D REACHING: which tasks are worth replaying (Nguyen et al., ICASSP 2021, Section 5 and Fig. 3).

Official code: none. An agent is a point θ of the plane, a task a point g that it must reach, and MAML is perfect: its
update moves θ towards the tasks of the meta-batch. A third of the tasks are noise, far from the useful ones, and draw
θ away from these. Four strategies of rmaml.py's buffer run side by side, from one start and with the same draws.

Tasks        g_i, i = 1 .. 300: 200 useful and 50 + 50 noise, of three normal distributions                   Eq. (1)
Update       θ <- θ + β E_i[ g_i - θ ], the gradient step on the loss E_i |θ - g_i|² / 2                      Eq. (2)
Return       R_i = -|θ - g_i|, of the updated θ: the priority of task i                                       Eq. (3)
Task buffer  L = MAX_L (k - 1) / (N - 1) of the M tasks of iteration k of N are from B, the last batch:       Eq. (9)
             those with the highest (easy), middle or lowest (hard) returns; uniform: no buffer              Eq. (10)
Algorithm 2  l. 3-6  L tasks of B, M - L fresh ones -> meta_batch, replay_count, replayed
             l. 7-13  θ -> update, returns_of     l. 15  B -> train     (l. 14: there is no α)

Symbols      θ -> theta [strategy, repeat, 2]; g -> points [300, 2], goals [strategy, repeat, M, 2]; R -> returns;
             B -> buffer: tasks, returns [strategy, repeat, M]. The equations' numbers are ours; (9), (10): rmaml.py's.

Deviations from the paper
  D1 It gives no centres, spread, start, M, β, nor N: here the useful points about (0, 0), the noise about (8, 0) and
     (8, 4), sd 1; θ from (8, 2); M = 20, β = 0.1, N = 100.
  D2 MAX_L is a quarter of M in its experiments on robots, and not given here: M (--max-share).
  D3 It shows one run; here 50 at once (--repeats), whose points are the same and whose draws differ.
  D4 It draws tasks uniformly: here the fresh ones of a batch are distinct, but a replayed one may be drawn again, and
     then stands in B twice.

Tested       python algos/rmaml_reaching.py   (3 seconds on one core of an AMD EPYC, 2,000 tasks an agent):
             distance to the useful centre 2.79 uniform, 1.84 easy, 0.27 medium, 4.27 hard, from 8.25 at the start.
"""

import json
import os
import re
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import envs

# == Args ==============================================================================================================


@dataclass
class Args:
    env: str = "reaching-2d"  # environment id (module:id imports the module first)
    preset: Literal["paper", "fast"] | None = None  # published, or ours, of about an hour (default where there is one)
    seed: int = 0  # seed of everything random
    device: Literal["cpu", "cuda"] = "cpu"  # device of the networks
    num_threads: int = 0  # number of threads of the physics and of the updates (0: all CPUs)
    iterations: int = 100  # N, number of meta-iterations (D1)
    eval_every: int = 2  # meta-iterations between evaluations on the held-out tasks
    save_every: int = 50  # meta-iterations between checkpoints
    track: bool = False  # mirror the run to Weights & Biases
    run_dir: str = "runs"  # folder in which the run gets its own folder
    name: str | None = None  # name of the run's folder (if it exists, its run is continued; default: with the time)
    resume: str | None = None  # run folder to continue (its args.json applies)
    evaluate: str | None = None  # run folder to evaluate without training (its args.json applies)

    repeats: int = 50  # number of agents of every strategy, which differ in their draws (D3)
    tasks: int = 20  # M, number of tasks per meta-iteration (D1)
    horizon: int = 1  # steps of an episode: the agent chooses its position, once
    beta: float = 0.1  # β, part of the way to the mean task that an update goes (D1)
    max_share: float = 1.0  # MAX_L / M, share of replayed tasks in the last meta-batch (D2)


PAPER: dict[str, dict] = {}  # Args has our settings: the paper gives none (D1)
FAST: dict[str, dict] = {}  # none: it takes seconds
MAY_BE_0 = ("seed", "num_threads")
STRATEGIES = "uniform", "easy", "medium", "hard"
POINTS = 300
CENTRES = np.array([[0.0, 0.0], [8.0, 0.0], [8.0, 4.0]])  # of the useful points, and of both kinds of noise (D1)
START = 8.0, 2.0  # (D1)


def check(args: Args, env: type[envs.TaskVectorEnv]) -> dict[str, bool]:
    """What must hold; where it does not, the message is the error."""
    return {
        f"--env must be reaching-2d, not {args.env}": args.env == "reaching-2d",
        "--horizon must be 1": args.horizon == 1,
        f"--tasks must be at most {POINTS}, which are all": args.tasks <= POINTS,
        "--beta must be in (0, 1]": 0 < args.beta <= 1,
        "--max-share must be in [0, 1]": 0 <= args.max_share <= 1,
    }


# == Networks ==========================================================================================================


def make_agent(args: Args) -> nn.ParameterDict:
    """Alg. 2, l. 1: the weights of an agent are its position."""
    theta = torch.tensor(START, dtype=torch.float64, device=args.device).repeat(len(STRATEGIES), args.repeats, 1)
    return nn.ParameterDict(dict(theta=nn.Parameter(theta, requires_grad=False)))


# == Sampler ===========================================================================================================


class Reaching(envs.TaskVectorEnv):
    """`reaching-2d`: the task is a point, the action a position, in tens: reward -|10 a - g|. One step, nothing to see.

    Two thirds of the training tasks are useful (cluster 0), a sixth each is noise (1, 2); all test tasks are useful.
    """

    obs_dim, action_dim, task_dim, num_clusters, horizon, dt = 1, 2, 2, 3, 1, 1.0

    @classmethod
    def cluster_cycle(cls, split):
        return [0, 0, 0, 0, 1, 2] if split == "train" else [0]

    def draw(self, cluster, rng):
        return rng.normal(CENTRES[cluster])  # Eq. (1)

    def nearest_cluster(self, params):
        return np.linalg.norm(params[:, None] - CENTRES, axis=-1).argmin(1)

    def reset_state(self, ids):
        pass

    def advance(self, ids, action):
        pass

    def observation(self):
        return np.zeros((self.num_envs, 1))

    def reward(self, action):
        return -np.linalg.norm(10 * action - self.tasks.params, axis=1)


envs.register("reaching-2d", Reaching)


def meta_batch(buffer: nn.ParameterDict, iteration: int, rng: torch.Generator, args: Args) -> Tensor:
    """Alg. 2, l. 3-5: the tasks of every agent, [strategy, repeat, M]; the fresh ones of all strategies agree."""
    fresh = torch.rand(args.repeats, POINTS, generator=rng).argsort(-1).to(args.device)  # all points, shuffled (D4)
    count, batches = replay_count(iteration, args), []  # L; the batch of every strategy
    for strategy, stored, returns in zip(STRATEGIES, buffer["tasks"], buffer["returns"]):
        replays = stored.gather(-1, replayed(returns, count, strategy))  # [repeat, L], T_B of Alg. 2, l. 3
        batches.append(torch.cat([replays, fresh[:, : args.tasks - replays.shape[-1]]], dim=-1))
    return torch.stack(batches)


# == Prioritised task buffer ===========================================================================================


def make_buffer(args: Args) -> nn.ParameterDict:
    """B of every agent: indices of the points of its last batch, and their returns; at first of none."""
    zeros = torch.zeros(len(STRATEGIES), args.repeats, args.tasks, dtype=torch.float64, device=args.device)
    parts = dict(tasks=zeros.long(), returns=zeros)
    return nn.ParameterDict({k: nn.Parameter(x, requires_grad=False) for k, x in parts.items()})


# Copied from algos/rmaml.py
def replay_count(iteration: int, args: Args) -> int:
    """L of Eq. (9), from 0 in the first iteration to MAX_L in the last."""
    return round(args.max_share * args.tasks * (iteration - 1) / max(1, args.iterations - 1))


# Copied from algos/rmaml.py
def replayed(returns: Tensor, count: int, strategy: str) -> Tensor:
    """Eq. (10): which of the buffer's tasks, of returns [..., M], are in the next batch: [..., L], or uniform: none."""
    ranked = returns.argsort(dim=-1, descending=True, stable=True)  # the task of the highest return first
    rest = returns.shape[-1] - count
    first = dict(easy=0, medium=rest // 2, hard=rest, uniform=returns.shape[-1])[strategy]
    return ranked[..., first : first + count]


# == Perfect MAML ======================================================================================================


def update(theta: Tensor, goals: Tensor, beta: float) -> Tensor:
    """Eq. (2), from θ [..., 2] and the tasks of its meta-batch [..., M, 2]."""
    return theta + beta * (goals.mean(-2) - theta)


def returns_of(theta: Tensor, goals: Tensor) -> Tensor:
    """Eq. (3): of θ [..., 2] in every task [..., M, 2], [..., M]."""
    return -torch.linalg.vector_norm(theta[..., None, :] - goals, dim=-1)


# == Evaluation ========================================================================================================


def evaluate(test_tasks: envs.Tasks, tasks: envs.Tasks, theta: Tensor) -> tuple[dict, dict]:
    """Mean return, Eq. (3), of the agents of each strategy in the held-out tasks, all of them useful; where they are.

    The distance is that of an agent to the centre of the useful points, the mean over agents; x and y are the position
    of the first one. For the figure: the training tasks, and theta [strategy, repeat, 2] of all agents.
    """
    theta, metrics = theta.cpu(), {}
    for strategy, positions in zip(STRATEGIES, theta):
        metrics[f"eval/return_{strategy}"] = returns_of(positions, torch.from_numpy(test_tasks.params)).mean().item()
        distance = torch.linalg.vector_norm(positions - torch.from_numpy(CENTRES[0]), dim=-1).mean()
        x, y = positions[0].tolist()
        metrics |= {f"eval/distance_{strategy}": distance.item(), f"eval/x_{strategy}": x, f"eval/y_{strategy}": y}
    return metrics, dict(params=tasks.params, cluster=tasks.cluster, theta=theta.numpy().copy())


# == Training ==========================================================================================================


def train(args: Args, run: "Run") -> None:
    """Algorithm 2 of the paper, of all agents at once."""
    env = run.make_env(1).unwrapped
    tasks = env.task_set("train")[:POINTS]  # 50 rounds of the cycle of clusters
    points = torch.from_numpy(tasks.params).to(args.device)  # g [300, 2]
    is_noise = torch.from_numpy(tasks.cluster > 0).to(args.device)

    # Alg. 2, l. 1
    agent, buffer = make_agent(args), make_buffer(args)
    theta = agent["theta"]

    evaluation = partial(evaluate, env.task_set("test"), tasks, theta)
    for iteration in run.loop(args.iterations, dict(agent=agent, buffer=buffer), evaluation):
        # l. 3-6: L tasks of the buffer, and M - L fresh ones
        with run.timer("sample"):
            batch = meta_batch(buffer, iteration, run.rng, args)  # [strategy, repeat, M]
        run.frames += args.tasks  # that an agent has visited

        # l. 7-13: what perfect adaptation and a perfect meta-update come to
        theta.copy_(update(theta, points[batch], args.beta))

        # l. 15: B holds this batch, with its returns at the new θ, and nothing else
        buffer["tasks"].copy_(batch)
        buffer["returns"].copy_(returns_of(theta, points[batch]))

        metrics = {"reaching/replayed": replay_count(iteration, args)}
        for n, strategy in enumerate(STRATEGIES):
            metrics[f"train/return_{strategy}"] = buffer["returns"][n].mean().item()
            metrics[f"reaching/noise_{strategy}"] = is_noise[batch[n]].double().mean().item()
        run.log(metrics)


# == The same in every script ==========================================================================================
# The algorithm ends here. Below, to the byte as in every other script: run folder, checkpoint, signals, command line.
SCRIPT = Path(__file__).stem
ON_RESUME = "resume frames iterations eval_every save_every data device num_threads track run_dir".split()  # may change
ON_EVALUATE = "evaluate seed alpha eval_steps eval_episodes eval_prior_episodes data device num_threads run_dir".split()


def fail(message: object, when: object = True) -> None:
    """End the program with one line on the standard error, and code 1."""
    if when:
        raise SystemExit(f"{SCRIPT}.py: error: {' '.join(str(message).split())}")


@contextmanager
def blame(what: str) -> Iterator[None]:
    """Whatever exception the block raises becomes one line, which begins with what is to blame."""
    try:
        yield
    except Exception as error:
        fail(f"{what}: {type(error).__name__}: {error}")


class Run:
    """What surrounds an algorithm: random numbers, environments, run folder, checkpoints, logs, progress, signals."""

    def __init__(self, args: Args):
        now = f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() // 1000 % 10**6:06}"
        name = args.name or f"{args.env.split(':')[-1]}__{SCRIPT}__{args.seed}__{now}"
        self.path = Path(args.resume or args.evaluate or Path(args.run_dir) / name)
        self.args, self.owner, self.bar, self.spoke = args, f"{SCRIPT}.py on {args.env}", None, time.time()
        self.iteration, self.frames, self.stopped = 0, 0, 0  # frames: environment steps, which the algorithm counts
        self.columns, self.sizes = {}, {}  # of the CSV files: names, and bytes, which nobody else may change
        torch.manual_seed(args.seed)
        self.rng = torch.Generator().manual_seed(args.seed)  # on the CPU; like torch's own it is part of checkpoints
        torch.set_num_threads(min(args.num_threads or torch.get_num_threads(), os.cpu_count()))
        self.make_env = partial(gym.make_vec, args.env, num_threads=torch.get_num_threads(), horizon=args.horizon)

    def loop(self, iterations: int, state: dict, evaluate: Callable[[], tuple[dict, dict]]) -> Iterator[int]:
        """Yield the iterations still to do; around them resume, evaluate, save, and stop after a signal."""
        figures = f"figures: python results/plot.py {self.path}"
        tqdm.write(f"{self.owner}, {self.args.preset} preset, seed {self.args.seed}, {self.args.device} -> {self.path}")
        self.state, self.evaluate = state, evaluate  # what checkpoints hold; what gives a row of eval.csv, and eval.npz
        if self.args.evaluate:
            self.load("agent.pt", {"agent": state["agent"]})
            return print(*(f"{name} {value:.6g}" for name, value in self.evaluation().items()), figures, sep="\n")
        if self.args.resume:
            self.load("checkpoint.pt", state)
            fail(f"{self.path} is at iteration {self.iteration} already", when=self.iteration > iterations)
        self.open(iterations)
        if self.iteration == 0:
            self.save()
            self.evaluation()
        for done in self.bar:
            self.iteration = done + 1
            self.began, self.seconds, self.frames_before = time.perf_counter(), defaultdict(float), self.frames
            yield self.iteration
            if self.iteration == iterations or self.iteration % self.args.eval_every == 0:
                self.evaluation()
            if self.iteration == iterations or self.iteration % self.args.save_every == 0 or self.stopped:
                self.save()
                if self.stopped:
                    tqdm.write(f"stopped by signal {self.stopped}; continue: python {sys.argv[0]} --resume {self.path}")
                    raise SystemExit(128 + self.stopped)
        tqdm.write(f"{self.path}: args.json, metrics.csv, eval.csv, eval.npz, checkpoint.pt, agent.pt\n{figures}")

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to this iteration's column time/name."""
        began = time.perf_counter()
        yield
        self.seconds[f"time/{name}"] += time.perf_counter() - began

    def log(self, metrics: dict[str, float]) -> None:
        """A row of metrics.csv, with times; and what the progress bar shows."""
        for name, value in [*metrics.items(), *self.state["agent"].named_parameters()]:
            if not torch.as_tensor(value).isfinite().all():
                raise FloatingPointError(f"{name} is not finite")
        speed = (self.frames - self.frames_before) / (seconds := time.perf_counter() - self.began)
        times = self.seconds | {"time/update": seconds - self.seconds.get("time/sample", 0), "charts/sps": speed}
        self.write("metrics", metrics | times)
        returns = (f"{v:.1f}" for k, v in metrics.items() if k.startswith("train/return") and "_cluster_" not in k)
        self.bar.set_postfix_str(f"{speed:,.0f} frames/s, training returns {', '.join(returns)}", refresh=False)
        if self.bar.disable and time.time() - self.spoke > 60:  # no terminal: a line a minute
            self.spoke = time.time()
            tqdm.write(f"iteration {self.iteration}/{self.bar.total} · frames {self.frames:,} · {self.bar.postfix}")

    def evaluation(self) -> dict[str, float]:
        metrics, arrays = self.evaluate()
        np.savez_compressed(self.path / "eval.npz", **arrays)
        if not self.args.evaluate:
            self.write("eval", metrics)
            pooled = [f"{k.removeprefix('eval/')} {v:.4g}" for k, v in metrics.items() if "_cluster_" not in k]
            tqdm.write(f"iteration {self.iteration} · frames {self.frames:,} · {' · '.join(pooled)}")
        return metrics

    def write(self, name: str, metrics: dict[str, float]) -> None:
        """A row of NAME.csv, whose columns never change, and of TensorBoard, over frames."""
        row = {"iteration": self.iteration, "charts/frames": self.frames} | metrics
        fail(f"{name}.csv has other columns than {list(row)}", when=[*row] != self.columns.setdefault(name, [*row]))
        with (self.path / f"{name}.csv").open("ab") as file:
            fail(f"another process writes {file.name}", when=file.tell() != self.sizes[f"{name}.csv"])
            values = ",".join(str(v) if isinstance(v, int) else f"{v:.6g}" for v in row.values()) + "\n"
            self.sizes[f"{name}.csv"] += file.write((values if file.tell() else f"{','.join(row)}\n{values}").encode())
        [self.tensorboard.add_scalar(key, value, self.frames) for key, value in metrics.items()]

    def open(self, iterations: int) -> None:
        """The run folder, new, or cut back to the checkpoint that was loaded; TensorBoard, W&B, and the screen."""
        self.path.mkdir(parents=True, exist_ok=bool(self.args.resume or self.args.name))
        stored = {"script": SCRIPT} | asdict(replace(self.args, resume=None))
        (self.path / "saving.json").write_text(json.dumps(stored, indent=2) + "\n")
        os.replace(self.path / "saving.json", self.path / "args.json")
        for name in ("metrics.csv", "eval.csv"):
            with (self.path / name).open("a") as file:
                self.sizes[name] = file.truncate(min(file.tell(), self.sizes.get(name, 0)))
        if self.args.track:
            run = dict(name=self.path.name, id="-".join(self.path.resolve().parts[-3:]), dir=self.path, config=stored)
            with blame("--track (`wandb login` first, or set WANDB_MODE=offline)"):
                from wandb import init
                init(**run, project=os.getenv("WANDB_PROJECT", "clean-meta-rl"), resume="allow", sync_tensorboard=True)
        self.tensorboard = SummaryWriter(str(self.path), purge_step=self.frames + 1)
        self.tensorboard.add_text("args", f"```\n{json.dumps(stored, indent=2)}\n```")
        self.bar = tqdm(range(self.iteration, iterations), total=iterations, initial=self.iteration, disable=None)

    def save(self) -> None:
        """agent.pt and checkpoint.pt; aside, then renamed: a kill leaves the last ones whole."""
        parts = {name: part.state_dict() for name, part in self.state.items()}
        parts["run"] = self.columns, self.sizes, self.rng.get_state(), torch.get_rng_state()
        for name, content in {"agent.pt": {"agent": parts["agent"]}, "checkpoint.pt": parts}.items():
            content |= dict(owner=self.owner, iteration=self.iteration, frames=self.frames)
            torch.save(content, self.path / "saving.pt")
            os.replace(self.path / "saving.pt", self.path / name)

    def load(self, name: str, parts: dict) -> None:
        """Into the parts, which are on their device already; weights_only: a checkpoint runs no code."""
        with blame(f"{self.path / name} is missing, damaged, or of other arguments"):
            saved = torch.load(self.path / name, map_location="cpu", mmap=True, weights_only=True)
            fail(f"{self.path} belongs to {saved['owner']}, not to {self.owner}", when=saved["owner"] != self.owner)
            [part.load_state_dict(saved[key]) for key, part in parts.items()]
            self.iteration, self.frames = int(saved["iteration"]), int(saved["frames"])
            if self.args.resume:
                self.columns, self.sizes, rng, torch_rng = saved["run"]
                self.rng.set_state(rng.clone())
                torch.set_rng_state(torch_rng.clone())

    def on_signal(self, signum: int, _) -> None:
        """The first signal in training lets the iteration finish and be saved; any other ends the program at once."""
        if self.stopped or self.bar is None:
            raise SystemExit(128 + signum)
        self.stopped = signum


def parse_args(argv: list[str]) -> Args:
    """The preset of --env, or the args.json of --resume or --evaluate, overridden by the explicit flags; checked."""
    given, _ = tyro.cli(Args, args=[x for x in argv if x not in ("-h", "--help")], return_unknown_args=True)
    fail("--resume and --evaluate contradict each other", when=given.resume and given.evaluate)
    preset, folder = given.preset or ("fast" if given.env in FAST else "paper"), given.resume or given.evaluate
    fail(f"{given.env} has no fast preset", when=not folder and preset == "fast" and given.env not in FAST)
    with blame(f"--env {given.env}"):
        env = envs.find(given.env)
    own = {"horizon": env.horizon} | (FAST if preset == "fast" else PAPER).get(given.env, {})
    default = replace(Args(), env=given.env, preset=preset, **own)
    rows = Path(given.run_dir, given.name or "", "eval.csv")
    begun = given.name and not folder and rows.is_file() and rows.stat().st_size > 0  # a checkpoint comes before rows
    if folder := str(rows.parent) if begun else folder:
        with blame(f"{folder} is not a run folder, or its args.json is damaged"):
            stored = json.loads((Path(folder) / "args.json").read_text())
            fail(f"{folder} is a run of {stored['script']}.py", when=stored.pop("script") != SCRIPT)
            differ = (stored.keys() - vars(default)) | ({"env", "seed", "horizon"} - stored.keys())
            fail(f"{folder} does not fit this {SCRIPT}.py, because of {', '.join(sorted(differ))}", when=differ)
            [tqdm.write(f"{folder} has no {x}: default {getattr(Args, x)}") for x in vars(default) if x not in stored]
            stored = TypeAdapter(Args).validate_json(json.dumps(asdict(Args()) | stored), strict=True)
            env = envs.find(stored.env)
        default = replace(default, resume=folder) if begun else stored
    fit = [x for x, c in envs.ENVIRONMENTS.items() if all(check(Args(env=x, **PAPER.get(x, {})), c).values())]
    about = f"{__doc__.splitlines()[0]} Environments: {', '.join(fit)}; fast: {', '.join(FAST) or None}."
    args = tyro.cli(Args, args=argv, default=default, description=about)
    fixed = asdict(args).keys() - (ON_EVALUATE if args.evaluate else ON_RESUME) if folder else ()
    for name, value in asdict(args).items():
        flag, least = f"--{name.replace('_', '-')}", int(name not in MAY_BE_0)
        fail(f"{flag} cannot change on an existing run", when=name in fixed and value != getattr(stored, name))
        for n in value if isinstance(value, tuple) else (value,):
            fail(f"{flag} must be from {least} to 2^31", when=type(n) is int and not least <= n <= 2**31)
            fail(f"{flag} must be finite", when=type(n) is float and not np.isfinite(n))
    [fail(message, when=not holds) for message, holds in check(args, env).items()]
    fail("--device cuda, but PyTorch finds no GPU", when=args.device == "cuda" and not torch.cuda.is_available())
    return args


if __name__ == "__main__":  # faults of the user or of the machine become one line; those of the program, a traceback
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    try:
        run = Run(args := parse_args(sys.argv[1:]))
        [signal.signal(signum, run.on_signal) for signum in (signal.SIGINT, signal.SIGTERM)]
        train(args, run)
    except FloatingPointError as error:
        fail(f"iteration {run.iteration}: {error}; last good checkpoint: {run.path / 'checkpoint.pt'}")
    except (OSError, MemoryError, RuntimeError, KeyboardInterrupt) as error:
        if isinstance(error, RuntimeError) and not re.search("allocate|Storage size|Writer|iostream", str(error)):
            raise
        fail(str(error) or type(error).__name__)
