"""ProMP: Proximal Meta-Policy Search (Rothfuss, Lee, Clavera, Asfour and Abbeel, ICLR 2019).

Official code: github.com/jonasrothfuss/ProMP. With --oracle it is Multi-ProMP; with --inner-steps 0, PPO without
minibatches on all tasks.

Objective    min over θ:  E_i[ S_clip(θ_n) + 1/n Σ_k<n η_k KL(π_old,k ‖ π_θ_k) ],  with gradients through all steps
             S_clip = E_Dn[ -min(ρ A, clip(ρ, 1 - ε, 1 + ε) A) ],  ρ = π_θ_n / π_old,n
Inner steps  θ_0 = θ,  θ_k+1 = θ_k - α ∇L_i(θ_k; D_k),  L_i = -E_Dk[ A π_θ_k / π_old,k ] (the low-variance curvature)
             D_k sampled by π_old,k, which is π_θ_k before the first update of θ
Loop         sample tasks -> sample_tasks        D_0, then D_1 .. D_n after a step each -> sample, process, adapt
             some full-batch steps of Adam on the objective -> promp_update, meta_objective

Symbols      θ -> theta [d], all parameters as one vector, log σ included; θ_k of all tasks [task, d]; D_k -> Batch;
             α -> alpha [d], a rate for each parameter; η -> eta [learner, n]; ε -> clip; A -> advantage [task, rollout,
             step]; π_θ(a|s) -> GaussianPolicy

Deviations from the paper (P) or the official code (C)
  D1  C has variables for a step size of each parameter, but none of its optimisers changes them; here they train with
      θ, if asked to (--train-alpha); nothing keeps them positive.
  D2  C fills M K H steps over all tasks, and drops tails; here K episodes a task, and nothing after a fall. The value
      after the last step is 0, time limit or fall, as in C.
  D3  C floors σ at 1e-6 before adaptation only; here always.
  D4  C tries a larger ridge when the baseline is NaN; here when the Cholesky factorisation fails.
  D5  P adds up the KL penalties of the steps; here their mean, as C.
  D6  C draws tasks independently; here the clusters of a meta-batch are balanced, where there are clusters.
  D7  P adapts η always; here only if asked to, as C, whose runs do so where physical parameters vary.
  D8  P's Multi-ProMP is a run on a single mode; here (--oracle) every learner has its share of the meta-batch.

Tested       python algos/promp.py --env cheetah-dir --iterations 100 --num-threads 1   (16 million frames, 12 and 14
             minutes on one core of an AMD EPYC, two seeds): return after one gradient step 168 and 174 at
             meta-iteration 50, 235 and 252 at 100; before it -3 and -2. MAML's at 100: 170 and 160.
"""

import argparse
import csv
import difflib
import importlib
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import envs

# == Args ==============================================================================================================


@dataclass
class Args:
    env: str = "cheetah-dir"  # environment id (module:id imports the module first)
    seed: int = 0  # of everything random
    device: Literal["cpu", "cuda"] = "cpu"  # where the networks live
    num_threads: int = 0  # of physics and updates (0: all CPUs)
    iterations: int = 200  # meta-iterations
    eval_every: int = 10  # meta-iterations between evaluations on the held-out tasks
    save_every: int = 10  # meta-iterations between checkpoints
    track: bool = False  # mirror the run to Weights & Biases
    run_dir: str = "runs"  # folder for the run's own folder
    resume: str | None = None  # run folder to continue (its args.json applies)
    evaluate: str | None = None  # run folder to evaluate without training (its args.json applies)

    oracle: bool = False  # Multi-ProMP: a learner for every true cluster (D8)
    tasks: int = 40  # tasks per meta-iteration
    rollouts: int = 20  # K, episodes per task and inner step
    horizon: int = 100  # H, steps per episode
    inner_steps: int = 1  # n (0: no adaptation in training)
    alpha: float = 0.1  # α, inner step size, of every parameter (at first, with --train-alpha)
    train_alpha: bool = False  # α with θ (D1)
    eval_steps: int = 0  # gradient steps at evaluation (0: as in training, at least one)
    mask_pad_actions: bool = False  # take the actions that a small robot does not use out of π

    hidden: tuple[int, ...] = (64, 64)  # widths of the policy's hidden layers
    activation: Literal["tanh", "relu"] = "tanh"  # of these layers
    action_scale: float = 10.0  # the action box is [-action_scale, action_scale] for the policy
    gamma: float = 0.99  # discount
    gae_lambda: float = 1.0  # λ of generalised advantage estimation
    updates: int = 5  # full-batch steps of Adam on the same data
    lr: float = 1e-3  # of Adam
    clip: float = 0.3  # ε, of the ratio
    eta: float = 5e-4  # η, weight of the KL at every step of adaptation
    adapt_eta: bool = False  # double or halve it, so that the KL stays near its target (D7)
    kl_target: float = 0.01  # of adapt_eta


# C's all_envs_eval: of its own random parameters, here for MILET's
RANDOM_PARAMETERS = dict(horizon=200, alpha=0.05, updates=3, eta=1e-3, adapt_eta=True)
PRESETS = {"hopper-params-4c": RANDOM_PARAMETERS, "walker-params-4c": RANDOM_PARAMETERS}

# == Networks ==========================================================================================================


# Copied from algos/maml.py
class GaussianPolicy:
    """π_θ(a|s), a diagonal Gaussian. Its parameters are an argument, one vector a task: [task, d]."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        layers = pairwise((obs_dim, *args.hidden, action_dim))
        self.shapes = [shape for a, b in layers for shape in ((a, b), (1, b))] + [(1, action_dim)]  # W, b, ...; log σ
        self.sizes = [a * b for a, b in self.shapes]
        self.activation = getattr(torch, args.activation)

    def init(self, rng: torch.Generator) -> Tensor:
        """Xavier-uniform weights, biases 0, log σ = 0: [d]."""
        bounds = [bound for a, b in self.shapes[:-1:2] for bound in (math.sqrt(6 / (a + b)), 0.0)] + [0.0]
        return torch.cat([b * (2 * torch.rand(size, generator=rng) - 1) for b, size in zip(bounds, self.sizes)])

    def __call__(self, theta: Tensor, obs: Tensor) -> tuple[Tensor, Tensor]:
        """theta [task, d], obs [task, row, obs_dim] -> mean [task, row, action_dim], log σ [task, 1, action_dim]."""
        parts = [p.unflatten(-1, shape) for p, shape in zip(theta.split(self.sizes, -1), self.shapes)]
        *layers, weight, bias, log_std = parts
        for w, b in zip(layers[::2], layers[1::2]):
            obs = self.activation(torch.baddbmm(b, obs, w))
        return torch.baddbmm(bias, obs, weight), log_std.clamp(min=math.log(1e-6))  # D3


# == Sampler ===========================================================================================================


# Copied from algos/maml.py
class Batch(NamedTuple):
    """D_k: K rollouts of every task, in K H rows. After a fall the weight is 0."""

    obs: Tensor  # [task, row, obs_dim]
    action: Tensor  # [task, row, action_dim], the policy's, before scaling
    mean: Tensor  # [task, row, action_dim], of the policy that sampled
    log_std: Tensor  # [task, 1, action_dim], its log σ
    used: Tensor  # [task, 1, action_dim], 0 for actions that are no part of π
    reward: Tensor  # [task, rollout, step]
    weight: Tensor  # [task, rollout, step], 1 / (steps taken in the task)
    advantage: Tensor | None = None  # [task, rollout, step], what process adds

    def of(self, tasks: slice | np.ndarray) -> "Batch":
        return Batch(*(x[tasks] for x in self))


# Copied from algos/maml.py
def random_seed(rng: torch.Generator) -> int:
    return torch.randint(2**31, (), generator=rng).item()


# Copied from algos/maml.py
@torch.no_grad()
def sample(
    env: gym.vector.VectorEnv, tasks: envs.Tasks | None, policy: GaussianPolicy, theta: Tensor, rng, args: Args
) -> Batch:
    """K rollouts of every task in lockstep, with its own parameters [task, d] (tasks None: those of the last call)."""
    threads, shape = torch.get_num_threads(), (len(theta), args.rollouts)
    torch.set_num_threads(1)  # torch's threads would fight with those of the physics
    if tasks is None:
        state, _ = env.reset()
    else:
        copies = tasks[np.repeat(np.arange(len(tasks)), args.rollouts)]
        state, _ = env.reset(seed=random_seed(rng), options={"tasks": copies})
    noise = torch.randn(args.horizon, *shape, env.single_action_space.shape[0], generator=rng).to(theta.device)
    steps, done = [], np.zeros(len(state), bool)
    for t in range(args.horizon):
        obs = torch.from_numpy(state).to(theta.device).view(*shape, -1)
        mean, log_std = policy(theta, obs)
        action = torch.addcmul(mean, log_std.exp(), noise[t])
        control = (action / args.action_scale).clamp(-1, 1).flatten(0, 1)
        alive = ~done
        state, reward, terminated, truncated, _ = env.step(control.cpu().numpy())
        done = terminated | truncated
        steps.append((obs, action, mean, *(torch.from_numpy(x).to(obs).view(shape) for x in (reward, alive))))
    torch.set_num_threads(threads)
    obs, action, mean, reward, alive = (torch.stack(x, dim=2) for x in zip(*steps))  # [task, rollout, step, ·]
    used = torch.ones_like(log_std)
    if args.mask_pad_actions:
        used *= torch.from_numpy(env.unwrapped.used_actions()[:: args.rollouts, None]).to(theta.device)
    rows = (x.flatten(1, 2) for x in (obs, action, mean))
    return Batch(*rows, log_std, used, reward, alive / alive.sum((1, 2), keepdim=True))  # D2


# == Sample processing =================================================================================================


# Copied from algos/maml.py
def discounted_returns(reward: Tensor, gamma: float) -> Tensor:
    """R_t = r_t + γ R_{t+1}, [..., step]."""
    returns = reward.clone()
    for t in reversed(range(returns.shape[-1] - 1)):
        returns[..., t] += gamma * returns[..., t + 1]
    return returns


# Copied from algos/maml.py
def linear_baseline(obs: Tensor, returns: Tensor, alive: Tensor) -> Tensor:
    """Ridge regression of the returns [task, rollout, step] on features of state and time, fitted in every task."""
    s = obs.clamp(-10, 10).double()  # [task, row, obs_dim]
    t = torch.arange(returns.shape[2]).expand(returns.shape).flatten(1)[..., None].to(s) / 100  # [task, row, 1]
    x = torch.cat([s, s**2, t, t**2, t**3, torch.ones_like(t)], dim=-1) * alive.flatten(1)[..., None]
    for ridge in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
        factor, failed = torch.linalg.cholesky_ex(x.mT @ x + ridge * torch.eye(x.shape[-1]).to(x))
        if not failed.any():  # D4
            break
    fit = torch.cholesky_solve(x.mT @ returns.flatten(1)[..., None].double(), factor)
    return (x @ fit).view_as(returns).float()


# Copied from algos/maml.py
def gae(reward: Tensor, value: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantages [..., step]; the value after the last step is 0 (D2)."""
    delta = reward - value
    delta[..., :-1] += gamma * value[..., 1:]
    return discounted_returns(delta, gamma * lam)


# Copied from algos/maml.py
def process(batch: Batch, args: Args) -> Batch:
    """The batch with its advantages, normalised in every task."""
    baseline = linear_baseline(batch.obs, discounted_returns(batch.reward, args.gamma), batch.weight > 0)
    advantage = gae(batch.reward, baseline, args.gamma, args.gae_lambda)
    centred = advantage - (batch.weight * advantage).sum((1, 2), keepdim=True)
    std = (batch.weight * centred**2).sum((1, 2), keepdim=True).sqrt()
    return batch._replace(advantage=centred / (std + 1e-8) * (batch.weight > 0))


# == Inner adaptation ==================================================================================================


# Copied from algos/maml.py
def log_prob(mean: Tensor, log_std: Tensor, batch: Batch) -> Tensor:
    """ln π(a|s) of the actions of a batch, but for a constant; 0 after a fall: [task, rollout, step]."""
    deviation = (batch.action - mean) * (-log_std).exp()
    return -((0.5 * deviation**2 + log_std) * batch.used).sum(-1).view_as(batch.reward) * (batch.weight > 0)


def surrogate(mean: Tensor, log_std: Tensor, batch: Batch, clip: float = math.inf) -> Tensor:
    """E_D[-A π/π_old], with a range of the ratio S_clip, [task]; π_old sampled the batch."""
    ratio = (log_prob(mean, log_std, batch) - log_prob(batch.mean, batch.log_std, batch)).exp()
    gain = torch.minimum(ratio * batch.advantage, ratio.clamp(1 - clip, 1 + clip) * batch.advantage)
    return -(batch.weight * gain).sum((1, 2))


def inner_loss(policy: GaussianPolicy, theta: Tensor, batch: Batch) -> Tensor:
    """L_i(θ_k; D_k), [task]."""
    return surrogate(*policy(theta, batch.obs), batch)


def adapt(policy: GaussianPolicy, theta: Tensor, batch: Batch, alpha: Tensor, differentiable: bool = False) -> Tensor:
    """θ_k+1 = θ_k - α ∇L_i(θ_k; D_k), [task, d]; differentiable in θ_k and α, or for sampling only."""
    theta = theta if differentiable else theta.detach().requires_grad_()
    loss = inner_loss(policy, theta, batch).sum()
    (gradient,) = torch.autograd.grad(loss, theta, create_graph=differentiable)
    theta = theta - alpha * gradient
    return theta if differentiable else theta.detach()


# == Outer proximal update =============================================================================================

CHUNK = 4  # tasks at a time, whose activations stay in the cache


# Copied from algos/maml.py
def mean_kl(mean: Tensor, log_std: Tensor, batch: Batch) -> Tensor:
    """E_D[KL(π_old ‖ π)], [task]; π_old sampled the batch."""
    var = (2 * batch.log_std).exp() + (batch.mean - mean) ** 2
    kl = (log_std - batch.log_std + 0.5 * var * (-2 * log_std).exp() - 0.5) * batch.used
    return (batch.weight.flatten(1) * kl.sum(-1)).sum(1)


def meta_objective(
    policy: GaussianPolicy, theta: Tensor, alpha: Tensor, eta: Tensor, data: list[Batch], clip: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The objective [task], S_clip(θ_n) [task] and the KLs at θ_0 .. θ_n [n + 1, task].

    From theta and alpha [task, d] and eta [task, n].
    """
    *inner, outer = data
    kls = []
    for batch in inner:
        kls.append(mean_kl(*policy(theta, batch.obs), batch))
        theta = adapt(policy, theta, batch, alpha, differentiable=True)
    output = policy(theta, outer.obs)
    s_clip, kls = surrogate(*output, outer, clip), torch.stack([*kls, mean_kl(*output, outer)])
    penalty = (eta.T * kls[:-1]).sum(0) / max(1, len(inner))  # D5
    return s_clip + penalty, s_clip, kls


def promp_update(
    policy: GaussianPolicy, agent: nn.ParameterDict, optimizer: torch.optim.Optimizer, learner: np.ndarray,
    data: list[Batch], args: Args,
) -> dict[str, float]:  # fmt: skip
    """Some steps of Adam on the objective, in place; task i belongs to learner[i]. The last pass only measures."""
    share = torch.from_numpy(1 / np.bincount(learner)[learner]).to(agent["theta"])  # for means over a learner's tasks
    surrogates = []
    for step in range(args.updates + 1):
        optimizer.zero_grad()
        found = []
        for first in range(0, len(learner), CHUNK):
            part = slice(first, first + CHUNK)
            theta, alpha, eta = (agent[name][learner[part]] for name in ("theta", "alpha", "eta"))
            loss, *values = meta_objective(policy, theta, alpha, eta, [batch.of(part) for batch in data], args.clip)
            if step < args.updates:
                (share[part] * loss).sum().backward()
            found.append([x.detach() for x in values])
        s_clip, kls = (torch.cat(x, dim=-1) for x in zip(*found))  # [task], [n + 1, task]
        surrogates.append(s_clip.mean())
        if step < args.updates:
            optimizer.step()
    stats = dict(surrogate_before=surrogates[0], surrogate_after=surrogates[-1], kl_outer=kls[-1].mean())
    for k, kl in enumerate(kls[:-1]):
        stats |= {f"kl_inner_{k}": kl.mean(), f"eta_{k}": agent["eta"][:, k].mean()}
    if args.adapt_eta:  # D7
        kl = torch.stack([kls[:-1, learner == m].mean(1) for m in range(len(agent["eta"]))])  # [learner, n]
        agent["eta"].copy_(adapted_eta(agent["eta"], kl, args.kl_target))
    return {f"promp/{k}": float(v) for k, v in stats.items()}


def adapted_eta(eta: Tensor, kl: Tensor, target: float) -> Tensor:
    """η, doubled where the KL is above 1.5 times its target, halved where it is below a 1.5th."""
    return eta * torch.where(kl > 1.5 * target, 2.0, torch.where(kl < target / 1.5, 0.5, 1.0))


# == Evaluation ========================================================================================================


# Copied from algos/milet.py
def returns_by_cluster(name: str, returns: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """The mean of the returns [task] and, if there are several, of every true cluster."""
    present = np.unique(clusters)
    by_cluster = {f"{name}_cluster_{m}": float(returns[clusters == m].mean()) for m in present}
    return {name: float(returns.mean())} | (by_cluster if len(present) > 1 else {})


def evaluate(
    env: gym.vector.VectorEnv, tasks: envs.Tasks, policy: GaussianPolicy, agent: nn.ParameterDict, args: Args
) -> tuple[dict, dict]:
    """Fresh rollouts of every held-out task before and after each gradient step, from θ and α of its learner.

    The metrics, and for the figures: returns [gradient step, task, rollout], and the first two state variables of
    the first rollout [gradient step, H, task, 2].
    """
    rng = torch.Generator().manual_seed(10**6 + args.seed)
    learner = tasks.cluster if args.oracle else np.zeros(len(tasks), int)
    theta_k, alpha = agent["theta"].detach()[learner], agent["alpha"].detach()[learner]
    metrics, returns, traces, steps = {}, [], [], args.eval_steps or max(1, args.inner_steps)
    for k in range(steps + 1):
        batch = sample(env, tasks if k == 0 else None, policy, theta_k, rng, args)
        returns.append(batch.reward.double().sum(-1).cpu().numpy())
        traces.append(batch.obs[:, : args.horizon, :2].transpose(0, 1).cpu().numpy())
        metrics |= returns_by_cluster(f"eval/return_step_{k}", returns[-1].mean(1), tasks.cluster)
        if k < steps:
            theta_k = adapt(policy, theta_k, process(batch, args), alpha)
    traces = dict(returns=np.stack(returns), trace=np.stack(traces), alpha=alpha.mean().item())
    return metrics, dict(params=tasks.params, cluster=tasks.cluster) | traces


# Copied from algos/maml.py
def summary(metrics: dict[str, float]) -> str:
    steps = [v for k, v in metrics.items() if k.startswith("eval/return_step_") and "cluster" not in k]
    return " · ".join(f"step {k} {value:.1f}" for k, value in enumerate(steps))


# == Run folder and checkpoint =========================================================================================

SCRIPT = Path(__file__).stem


# Copied from algos/milet.py
def fail(message: str):
    raise SystemExit(f"{SCRIPT}.py: error: {message}")


# Copied from algos/milet.py
class Run:
    """The run folder, Weights & Biases, and the terminal."""

    def __init__(self, path: Path, args: Args, iteration: int, iterations: int):
        self.path, self.last_line = path, time.time()
        if not args.resume:
            if path.exists():
                fail(f"{path} exists already")
            path.mkdir(parents=True)
        (path / "args.tmp").write_text(json.dumps({"script": SCRIPT} | asdict(replace(args, resume=None)), indent=2))
        os.replace(path / "args.tmp", path / "args.json")
        for file in path.glob("*.csv"):  # a resumed run writes again what came after its checkpoint
            header, *rows = file.read_text().splitlines() or [""]
            rows = [r for r in rows if r.count(",") == header.count(",") and int(r.split(",")[0]) <= iteration > 0]
            file.with_suffix(".tmp").write_text("".join(f"{row}\n" for row in [header, *rows] if rows))
            os.replace(file.with_suffix(".tmp"), file)
        self.tensorboard, self.wandb = SummaryWriter(str(path), purge_step=iteration + 1), None
        if args.track:
            import wandb

            options = dict(project="clean-meta-rl", name=path.name, id=path.name, dir=path, resume="allow")
            self.wandb = wandb.init(**options, config=asdict(args))
        self.bar = tqdm(total=iterations, initial=iteration, unit="it", disable=not sys.stderr.isatty())

    def log(self, name: str, iteration: int, metrics: dict[str, float]) -> None:
        """A row of NAME.csv, TensorBoard, Weights & Biases."""
        with (self.path / f"{name}.csv").open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if file.tell() == 0:
                writer.writerow(["iteration", *metrics])
            writer.writerow([iteration, *(v if isinstance(v, int) else f"{v:.6g}" for v in metrics.values())])
        for key, value in metrics.items():
            self.tensorboard.add_scalar(key, value, iteration)
        if self.wandb:
            self.wandb.log({"iteration": iteration} | metrics)

    def say(self, line: str) -> None:
        self.last_line = time.time()
        tqdm.write(line)
        sys.stdout.flush()

    def progress(self, metrics: dict[str, float]) -> None:
        """The bar; without a terminal, a line a minute."""
        returns = [f"{v:.1f}" for k, v in metrics.items() if k.startswith("train/return_") and "cluster" not in k]
        line = f"{metrics['charts/sps']:,.0f} frames/s · training returns {', '.join(returns)}"
        self.bar.set_postfix_str(line, refresh=False)
        self.bar.update()
        if self.bar.disable and time.time() - self.last_line > 60:
            self.say(f"frames {metrics['charts/frames']:,} · {line}")

    def close(self) -> None:
        self.bar.close()
        self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


# Copied from algos/milet.py
def load_checkpoint(folder: str, args: Args, parts: dict) -> dict:
    """Load the state of the parts; returns all of the checkpoint."""
    path = Path(folder) / "checkpoint.pt"
    if not path.exists():
        fail(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # weights only: it cannot run code
        owner = state["script"], state["env"]
        for name, part in parts.items() if owner == (SCRIPT, args.env) else ():
            part.load_state_dict(state[name])
    except Exception as error:
        fail(f"{path} is damaged or not a checkpoint ({type(error).__name__})")
    if owner != (SCRIPT, args.env):
        fail(f"{path} belongs to {owner[0]}.py on {owner[1]}, not to {SCRIPT}.py on {args.env}")
    return state


# Copied from algos/milet.py
def check_finite(agent: nn.Module, metrics: dict[str, float]) -> None:
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    bad += [name for name, p in agent.named_parameters() if not p.isfinite().all()]
    if bad:
        raise FloatingPointError(f"{bad[0]} is not finite")


# == Training ==========================================================================================================


def make_agent(policy: GaussianPolicy, learners: int, rng: torch.Generator, args: Args) -> nn.ParameterDict:
    """θ, α [learner, d] and η [learner, n] of every learner (Multi-ProMP: one a cluster, else one)."""
    theta = torch.stack([policy.init(rng) for _ in range(learners)])
    parts = dict(theta=theta, alpha=torch.full_like(theta, args.alpha))
    parts["eta"] = torch.full((learners, args.inner_steps), args.eta).to(theta)
    trained = dict(theta=True, alpha=args.train_alpha, eta=False)
    return nn.ParameterDict({k: nn.Parameter(x.to(args.device), trained[k]) for k, x in parts.items()})


def train(args: Args) -> None:
    args = replace(args, num_threads=args.num_threads or torch.get_num_threads())
    torch.set_num_threads(args.num_threads)
    rng = torch.Generator().manual_seed(args.seed)
    make_env = partial(gym.make_vec, args.env, num_threads=args.num_threads, horizon=args.horizon)
    env = make_env(num_envs=args.tasks * args.rollouts)
    test_tasks = env.unwrapped.task_set("test")
    test_env = make_env(num_envs=len(test_tasks) * args.rollouts)

    policy = GaussianPolicy(env.single_observation_space.shape[0], env.single_action_space.shape[0], args)
    agent = make_agent(policy, env.unwrapped.num_clusters if args.oracle else 1, rng, args)
    optimizer = torch.optim.Adam([p for p in agent.values() if p.requires_grad], args.lr)
    stateful, done, frames = {"agent": agent, "optimizer": optimizer}, 0, 0
    if args.evaluate:
        load_checkpoint(args.evaluate, args, {"agent": agent})
        try:
            metrics, traces = evaluate(test_env, test_tasks, policy, agent, args)
        except FloatingPointError as error:
            fail(f"--eval-steps {args.eval_steps}: {error}")
        np.savez_compressed(Path(args.evaluate) / "eval.npz", **traces)
        print(*(f"{name} {value:.2f}" for name, value in metrics.items()), sep="\n")
        print(summary(metrics), f"figures: python results/plot.py {args.evaluate}", sep="\n")
        return
    if args.resume:
        state = load_checkpoint(args.resume, args, stateful)
        done, frames = state["iteration"], state["frames"]
        rng.set_state(state["rng"].clone())

    name = f"{args.env.split(':')[-1]}__{SCRIPT}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run = Run(Path(args.resume or Path(args.run_dir) / name), args, done, args.iterations)
    run.say(f"{SCRIPT}.py · {args.env} · seed {args.seed} · {args.device}, {args.num_threads} threads")
    run.say(f"{args.iterations:,} meta-iterations of {args.tasks} tasks x {args.rollouts} rollouts -> {run.path}")
    stop = []  # the signals received: finish the iteration, save, leave
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda received, _: stop.append(received))

    def evaluate_and_log(iteration: int) -> None:
        metrics, traces = evaluate(test_env, test_tasks, policy, agent, args)
        run.log("eval", iteration, {"charts/frames": frames} | metrics)
        np.savez_compressed(run.path / "eval.npz", **traces)
        run.say(f"iteration {iteration} · frames {frames:,} · {summary(metrics)}")

    def save(iteration: int) -> None:
        state = {name: part.state_dict() for name, part in stateful.items()}
        state |= dict(script=SCRIPT, env=args.env, iteration=iteration, frames=frames, rng=rng.get_state())
        torch.save(state, run.path / "checkpoint.tmp")  # aside, then renamed: a kill leaves the last one whole
        os.replace(run.path / "checkpoint.tmp", run.path / "checkpoint.pt")

    iteration = done
    try:
        if done == 0:
            save(0)
            evaluate_and_log(0)
        for iteration in range(done + 1, args.iterations + 1):
            # fresh tasks (D6); the true cluster chooses the learner of Multi-ProMP
            begin, sampling, before = time.time(), 0.0, frames
            tasks = env.unwrapped.sample_tasks(args.tasks, np.random.default_rng(random_seed(rng)))
            learner = tasks.cluster if args.oracle else np.zeros(args.tasks, int)

            # sample D_k, adapt to it, n times; then sample D_n
            theta_k, alpha = (agent[name][learner].detach() for name in ("theta", "alpha"))
            data, returns = [], {}
            for k in range(args.inner_steps + 1):
                if k > 0:
                    theta_k = adapt(policy, theta_k, data[-1], alpha)
                clock = time.time()
                batch = sample(env, tasks if k == 0 else None, policy, theta_k, rng, args)
                sampling += time.time() - clock
                data.append(process(batch, args))
                frames += int((batch.weight > 0).sum())
                task_returns = batch.reward.double().sum(-1).mean(1).cpu().numpy()
                returns |= returns_by_cluster(f"train/return_step_{k}", task_returns, tasks.cluster)

            # every learner steps on its own tasks
            stats = promp_update(policy, agent, optimizer, learner, data, args)
            seconds = time.time() - begin
            metrics = {"charts/frames": frames} | returns
            metrics |= stats
            metrics |= {"policy/alpha": agent["alpha"].mean().item(), "policy/alpha_min": agent["alpha"].min().item()}
            metrics["policy/std"] = agent["theta"][:, -policy.sizes[-1] :].exp().mean().item()
            metrics |= {"time/sample": sampling, "time/update": seconds - sampling}
            metrics["charts/sps"] = (frames - before) / seconds
            check_finite(agent, metrics)
            run.log("metrics", iteration, metrics)
            run.progress(metrics)

            last = iteration == args.iterations
            if iteration % args.eval_every == 0 or last:
                evaluate_and_log(iteration)
            if iteration % args.save_every == 0 or last or stop:
                save(iteration)
            if stop:
                run.close()
                print(f"stopped by signal {stop[0]}; continue with --resume {run.path}")
                raise SystemExit(128 + stop[0])
    except FloatingPointError as error:
        fail(f"iteration {iteration}: {error}; last good checkpoint: {run.path / 'checkpoint.pt'}")
    run.close()
    print(f"{run.path}: args.json, metrics.csv, eval.csv, eval.npz, checkpoint.pt")
    print(f"figures: python results/plot.py {run.path}")


# == Command line ======================================================================================================


# Copied from algos/milet.py
def load_args(folder: str) -> Args:
    """The args.json of a run folder of this script."""
    path = Path(folder) / "args.json"
    if not path.exists():
        fail(f"{folder} is not a run folder: it has no args.json")
    try:
        stored = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(path.read_text()).items()}
        script = stored.pop("script")
        args = Args(**stored) if script == SCRIPT else None
    except (ValueError, KeyError, TypeError):
        fail(f"{path} is damaged, or of another version")
    return args or fail(f"{folder} is a run of {script}.py")


# Copied from algos/milet.py
def env_class(env: str) -> type[envs.TaskVectorEnv]:
    """The class of an environment id; of module:id after importing the module."""
    *module, env_id = env.split(":")
    try:
        for name in module:
            importlib.import_module(name)
    except ImportError as error:
        fail(f"--env {env}: {error}")
    if env_id not in envs.ENVIRONMENTS:
        near = difflib.get_close_matches(env_id, envs.ENVIRONMENTS, n=3, cutoff=0)
        fail(f"unknown environment {env_id!r}; did you mean {', '.join(near)}?")
    return envs.ENVIRONMENTS[env_id]


# Copied from algos/milet.py
def check_numbers(args: Args, may_be_0: tuple[str, ...]) -> None:
    """Integers are at least 1, or 0; floats are finite."""
    for name, value in asdict(args).items():
        for v in value if isinstance(value, tuple) else [value]:
            flag, least = f"--{name.replace('_', '-')}", int(name not in may_be_0)
            if type(v) is int and not least <= v < 2**62:
                fail(f"{flag} must be at least {least}" if v < least else f"{flag} is too large")
            if type(v) is float and not math.isfinite(v):
                fail(f"{flag} must be finite")


def parse_args(argv: list[str] | None = None) -> Args:
    """The preset of --env, or the args.json of --resume or --evaluate, overridden by the explicit flags."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--env", "--resume", "--evaluate"):
        first.add_argument(flag)
    known, _ = first.parse_known_args(argv)
    if known.resume and known.evaluate:
        fail("--resume and --evaluate contradict each other")
    env, folder = known.env or Args.env, known.resume or known.evaluate
    default = load_args(folder) if folder else Args(**{"env": env} | PRESETS.get(env, {}))
    args = tyro.cli(Args, default=default, args=argv, description=__doc__.split("\n")[0])
    free = ("resume", "evaluate", "device", "num_threads", "track", "run_dir")
    free += ("eval_steps",) if args.evaluate else ("iterations",)
    changed = [k for k, v in asdict(args).items() if k not in free and v != getattr(default, k)]
    if folder and changed:
        fail(f"--{changed[0].replace('_', '-')} cannot change on an existing run")
    cycle = env_class(args.env).cluster_cycle("train")
    if args.oracle and len(cycle) == 1:
        fail(f"--oracle needs clusters, and {args.env} has none")
    check_numbers(args, may_be_0=("seed", "num_threads", "inner_steps", "eval_steps"))
    if args.tasks < len(cycle):
        fail(f"--tasks must be at least {len(cycle)}, which hold every cluster of {args.env}")
    if min(args.alpha, args.action_scale, args.lr, args.clip, args.kl_target) <= 0 or args.eta < 0:
        fail("--alpha, --action-scale, --lr, --clip and --kl-target must be positive, --eta at least 0")
    if args.inner_steps == 0 and (args.train_alpha or args.adapt_eta):
        fail("--train-alpha and --adapt-eta need --inner-steps of at least 1")
    if not (0 <= args.gamma <= 1 and 0 <= args.gae_lambda <= 1):
        fail("--gamma and --gae-lambda must be in [0, 1]")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda, but PyTorch finds no GPU")
    return args


if __name__ == "__main__":
    train(parse_args())
