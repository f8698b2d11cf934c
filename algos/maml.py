"""MAML-TRPO: model-agnostic meta-learning for reinforcement learning (Finn, Abbeel and Levine, ICML 2017).

Official code: github.com/cbfinn/maml_rl. Defaults are those of ProMP's MAML-TRPO and of CML, which moved it to Gym's
robots. With --oracle it is Multi-MAML; with --inner-steps 0, TRPO on all tasks, the "Pretrain" of the papers.

Objective    min over θ:  E_i[ L_i(θ'_i) ],  θ'_i = θ - α ∇L_i(θ),  L_i(θ) = -E_πθ[ return in task i ]           Eq. (4)
Algorithm 3  l. 3   sample tasks M_i -> sample_tasks        l. 5, 8  sample K trajectories, D_k -> sample
             l. 6   ∇L_i -> process, inner_loss             l. 7     θ'_i = θ - α ∇L_i -> adapt
             l. 10  Eq. (1), θ <- θ - step -> trpo_step, by TRPO (Schulman et al., ICML 2015): minimise the surrogate
                    S(θ) = E_i E_Dn[-A π_θ'i / π_old]  subject to  E_i E_Dn[KL(π_old ‖ π_θ'i)] ≤ δ

  n inner steps    θ_0 = θ,  θ_k+1 = θ_k - α ∇L_i(θ_k; D_k),  D_k sampled by θ_k,  θ'_i = θ_n,  D_n for S and KL
  chain rule       J_i = ∂θ'_i/∂θ = Π_k (I - α ∇²L_i(θ_k; D_k)),  ∇S = E_i J_iᵀ ∇S(θ'_i),  ∇²KL = E_i J_iᵀ F_i J_i
                   F_i the Fisher matrix of π_θ'i on D_n -> linearise

Symbols      θ -> theta [d], all parameters as one vector, log σ included; θ_k of all tasks [task, d]; α -> alpha;
             D_k -> Batch; π_θ(a|s) -> GaussianPolicy; A -> advantage [task, rollout, step]; δ -> delta

Deviations from the paper (P) or the official codes (C)
  D1  P has the return, minus a linear baseline, in Eq. (4); here GAE, normalised in each task, as C.
  D2  P is silent on the end of an episode: the value after the last step is 0, time limit or fall, as C.
  D3  P and C take finite differences of ∇KL; here J_iᵀ F_i J_i, the exact Hessian at θ, damped by 1e-5.
  D4  ProMP fills M K H steps over all tasks, and drops tails; here K episodes a task, and nothing after a fall.
  D5  ProMP floors σ at 1e-6 before adaptation only; here always.
  D6  C tries a larger ridge when the baseline is NaN; here when the Cholesky factorisation fails.
  D7  ProMP's DiCE has rewards minus a baseline; here the advantages (Loaded DiCE, Farquhar et al. 2019), so that all
      inner losses have the same gradient where the data was sampled, and one α fits them. Its box is the ratio to the
      policy that sampled: the same derivatives there, and right away from it too.
  D8  CML leaves the actions that pad a small robot in π, as noise; so here (--mask-pad-actions takes them out).
  D9  P takes α / 2 at test after the first step; here after as many steps as in training (at least one).
  D10 P draws tasks independently; here the clusters of a meta-batch are balanced, where there are clusters.
  D11 C's Pretrain is TRPO on pooled rollouts, of a goal apparently drawn once; here (--inner-steps 0) the tasks,
      rollouts, baselines and advantages of MAML, without its inner step.

Tested       python algos/maml.py --env cheetah-dir --num-threads 1   (32 million frames, 31 and 35 minutes on one core
             of an AMD EPYC): return after one gradient step 146 and 147 at meta-iteration 50 (seeds 0, 1), 172 and 183
             at 200; before it -2.
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
from collections.abc import Callable
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
    preset: Literal["promp", "finn"] = "promp"  # whose hyper-parameters
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

    oracle: bool = False  # Multi-MAML: a learner for every true cluster
    tasks: int = 40  # tasks per meta-iteration
    rollouts: int = 20  # K, episodes per task and inner step
    horizon: int = 100  # H, steps per episode
    inner_steps: int = 1  # n (0: no adaptation in training, D11)
    alpha: float = 0.1  # α, inner step size
    inner_loss: Literal["log-likelihood", "likelihood-ratio", "dice"] = "log-likelihood"  # its second-order terms
    eval_steps: int = 0  # gradient steps at evaluation (0: as in training, at least one)
    mask_pad_actions: bool = False  # take the actions that a small robot does not use out of π (D8)

    hidden: tuple[int, ...] = (64, 64)  # widths of the policy's hidden layers
    activation: Literal["tanh", "relu"] = "tanh"  # of these layers
    action_scale: float = 10.0  # the action box is [-action_scale, action_scale] for the policy
    gamma: float = 0.99  # discount
    gae_lambda: float = 1.0  # λ of generalised advantage estimation
    delta: float = 0.01  # δ, trust region: mean KL between adapted policies
    cg_iterations: int = 10  # of conjugate gradient
    damping: float = 1e-5  # added to the Hessian of the KL (D3)
    backtracks: int = 15  # candidate steps, each 0.8 of the one before


PRESETS = {
    "promp": {},  # ProMP's maml_run_mujoco and CML, with damping; they run 1001 meta-iterations
    "finn": dict(horizon=200, hidden=(100, 100), activation="relu"),  # the paper's horizon and network (§5.3)
}

# == Networks ==========================================================================================================


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
        return torch.baddbmm(bias, obs, weight), log_std.clamp(min=math.log(1e-6))  # D5


# == Sampler ===========================================================================================================


class Batch(NamedTuple):
    """D_k: K rollouts of every task, in K H rows. After a fall the weight is 0."""

    obs: Tensor  # [task, row, obs_dim]
    action: Tensor  # [task, row, action_dim], the policy's, before scaling
    mean: Tensor  # [task, row, action_dim], of the policy that sampled
    log_std: Tensor  # [task, 1, action_dim], its log σ
    used: Tensor  # [task, 1, action_dim], 0 for actions that are no part of π (D8)
    reward: Tensor  # [task, rollout, step]
    weight: Tensor  # [task, rollout, step], 1 / (steps taken in the task)
    advantage: Tensor | None = None  # [task, rollout, step], what process adds

    def of(self, tasks: slice | np.ndarray) -> "Batch":
        return Batch(*(x[tasks] for x in self))


def random_seed(rng: torch.Generator) -> int:
    return torch.randint(2**31, (), generator=rng).item()


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
    return Batch(*rows, log_std, used, reward, alive / alive.sum((1, 2), keepdim=True))  # D4


# == Sample processing =================================================================================================


def discounted_returns(reward: Tensor, gamma: float) -> Tensor:
    """R_t = r_t + γ R_{t+1}, [..., step]."""
    returns = reward.clone()
    for t in reversed(range(returns.shape[-1] - 1)):
        returns[..., t] += gamma * returns[..., t + 1]
    return returns


def linear_baseline(obs: Tensor, returns: Tensor, alive: Tensor) -> Tensor:
    """Ridge regression of the returns [task, rollout, step] on features of state and time, fitted in every task."""
    s = obs.clamp(-10, 10).double()  # [task, row, obs_dim]
    t = torch.arange(returns.shape[2]).expand(returns.shape).flatten(1)[..., None].to(s) / 100  # [task, row, 1]
    x = torch.cat([s, s**2, t, t**2, t**3, torch.ones_like(t)], dim=-1) * alive.flatten(1)[..., None]
    for ridge in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
        factor, failed = torch.linalg.cholesky_ex(x.mT @ x + ridge * torch.eye(x.shape[-1]).to(x))
        if not failed.any():  # D6
            break
    fit = torch.cholesky_solve(x.mT @ returns.flatten(1)[..., None].double(), factor)
    return (x @ fit).view_as(returns).float()


def gae(reward: Tensor, value: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantages [..., step]; the value after the last step is 0 (D2)."""
    delta = reward - value
    delta[..., :-1] += gamma * value[..., 1:]
    return discounted_returns(delta, gamma * lam)


def process(batch: Batch, args: Args) -> Batch:
    """The batch with its advantages, normalised in every task."""
    baseline = linear_baseline(batch.obs, discounted_returns(batch.reward, args.gamma), batch.weight > 0)
    advantage = gae(batch.reward, baseline, args.gamma, args.gae_lambda)
    centred = advantage - (batch.weight * advantage).sum((1, 2), keepdim=True)
    std = (batch.weight * centred**2).sum((1, 2), keepdim=True).sqrt()
    return batch._replace(advantage=centred / (std + 1e-8) * (batch.weight > 0))  # D1


# == Inner adaptation ==================================================================================================


def log_prob(mean: Tensor, log_std: Tensor, batch: Batch) -> Tensor:
    """ln π(a|s) of the actions of a batch, but for a constant; 0 after a fall: [task, rollout, step]."""
    deviation = (batch.action - mean) * (-log_std).exp()
    return -((0.5 * deviation**2 + log_std) * batch.used).sum(-1).view_as(batch.reward) * (batch.weight > 0)


def inner_loss(policy: GaussianPolicy, theta: Tensor, batch: Batch, kind: str) -> Tensor:
    """L_i(θ; D) of Eq. (4), [task]; the forms have the same gradient at the parameters that sampled D."""
    score = log_prob(*policy(theta, batch.obs), batch)
    if kind != "log-likelihood":
        log_ratio = score - log_prob(batch.mean, batch.log_std, batch)
        score = log_ratio.exp()  # π/π_old
    if kind == "dice":  # what step t adds to the ratio of the whole episode so far (D7)
        score = log_ratio.cumsum(-1).exp() - (log_ratio.cumsum(-1) - log_ratio).exp()
    return -(batch.weight * score * batch.advantage).sum((1, 2))


def inner_gradient(policy: GaussianPolicy, theta: Tensor, batch: Batch, kind: str) -> tuple[Tensor, Callable]:
    """∇L_i(θ; D) [task, d], and the product v -> ∇²L_i(θ; D) v by differentiating it once more."""
    theta = theta.detach().requires_grad_()
    loss = inner_loss(policy, theta, batch, kind).sum()
    (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)

    def hessian(v: Tensor) -> Tensor:
        return torch.autograd.grad(gradient, theta, v.expand_as(theta), retain_graph=True)[0]

    return gradient.detach(), hessian


def adapt(policy: GaussianPolicy, theta: Tensor, batch: Batch, alpha: float, kind: str) -> Tensor:
    """θ_k+1 = θ_k - α ∇L_i(θ_k; D_k), [task, d] (Alg. 3, l. 6-7)."""
    theta = theta.detach().requires_grad_()
    loss = inner_loss(policy, theta, batch, kind).sum()
    return theta.detach() - alpha * torch.autograd.grad(loss, theta)[0]


# == Outer TRPO step ===================================================================================================

CHUNK = 4  # tasks at a time, whose activations stay in the cache


def surrogate(mean: Tensor, log_std: Tensor, batch: Batch) -> Tensor:
    """S_i = E_D[-A π/π_old], [task]; π_old sampled the batch."""
    ratio = (log_prob(mean, log_std, batch) - log_prob(batch.mean, batch.log_std, batch)).exp()
    return -(batch.weight * ratio * batch.advantage).sum((1, 2))


def mean_kl(mean: Tensor, log_std: Tensor, batch: Batch) -> Tensor:
    """E_D[KL(π_old ‖ π)], [task]; π_old sampled the batch."""
    var = (2 * batch.log_std).exp() + (batch.mean - mean) ** 2
    kl = (log_std - batch.log_std + 0.5 * var * (-2 * log_std).exp() - 0.5) * batch.used
    return (batch.weight.flatten(1) * kl.sum(-1)).sum(1)


def outer_gradient(policy: GaussianPolicy, theta: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Callable]:
    """S_i(θ') [task], its gradient [task, d], and the product u -> F_i u with the Fisher matrix of π_θ' on D_n.

    F = GᵀΛG, G = ∂(mean, log σ)/∂θ', Λ = diag(σ⁻², 2): w -> Gᵀw is a gradient, linear in w; its own gradient is G u.
    """
    theta = theta.detach().requires_grad_()
    output = policy(theta, batch.obs)
    loss = surrogate(*output, batch)
    (gradient,) = torch.autograd.grad(loss.sum(), theta, retain_graph=True)
    w = [torch.zeros_like(x, requires_grad=True) for x in output]
    (pullback,) = torch.autograd.grad(output, theta, w, create_graph=True)
    metric = batch.weight.flatten(1)[..., None] * batch.used * (-2 * output[1].detach()).exp(), 2 * batch.used

    def fisher(u: Tensor) -> Tensor:
        push = torch.autograd.grad(pullback, w, u.expand_as(theta), retain_graph=True)
        return torch.autograd.grad(output, theta, [a * b for a, b in zip(metric, push)], retain_graph=True)[0]

    return loss.detach(), gradient, fisher


def linearise(
    policy: GaussianPolicy, theta: Tensor, data: list[Batch], args: Args
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """S(θ), ∇S(θ) [d], and the product v -> (E_i J_iᵀ F_i J_i + damping) v, on the graphs kept from one pass (D3).

    The factors I - α ∇²L_i of J_i are symmetric: its transpose applies them in the opposite order.
    """
    loss, gradient, kept, tasks = 0.0, torch.zeros_like(theta), [], len(data[0].obs)
    for first in range(0, tasks, CHUNK):
        *inner, outer = (batch.of(slice(first, first + CHUNK)) for batch in data)
        theta_k, hessians = theta.expand(len(outer.obs), -1), []
        for batch in inner:
            g, hessian = inner_gradient(policy, theta_k, batch, args.inner_loss)
            theta_k = theta_k - args.alpha * g
            hessians.append(hessian)
        s, g, fisher = outer_gradient(policy, theta_k, outer)
        for hessian in reversed(hessians):
            g = g - args.alpha * hessian(g)  # J_iᵀ ∇S(θ'_i)
        loss += s.sum()
        gradient += g.sum(0)
        kept.append((hessians, fisher))

    def product(v: Tensor) -> Tensor:
        total = torch.zeros_like(v)
        for hessians, fisher in kept:
            u = v
            for hessian in hessians:
                u = u - args.alpha * hessian(u)  # J_i v
            u = fisher(u)
            for hessian in reversed(hessians):
                u = u - args.alpha * hessian(u)  # J_iᵀ F_i J_i v
            total += u.sum(0)
        return total / tasks + args.damping * v

    return loss / tasks, gradient / tasks, product


def conjugate_gradient(product: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """x with A x ≈ b for the positive definite A that product applies, and xᵀA x = xᵀ(b - residual)."""
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    rr = r @ r
    for _ in range(iterations):
        if rr < 1e-10:
            break
        ap = product(p)
        step = rr / (p @ ap)
        x, r = x + step * p, r - step * ap
        rr, previous = r @ r, rr
        p = r + rr / previous * p
    return x, x @ (b - r)


def meta_objective(policy: GaussianPolicy, theta: Tensor, data: list[Batch], args: Args) -> tuple[Tensor, Tensor]:
    """S(θ) and KL(θ), adaptation included."""
    *inner, outer = data
    theta_k = theta.expand(len(outer.obs), -1)
    for batch in inner:
        theta_k = adapt(policy, theta_k, batch, args.alpha, args.inner_loss)
    with torch.no_grad():
        output = policy(theta_k, outer.obs)
        return surrogate(*output, outer).mean(), mean_kl(*output, outer).mean()


def trpo_step(policy: GaussianPolicy, theta: Tensor, data: list[Batch], args: Args) -> tuple[Tensor, dict[str, float]]:
    """Eq. (1): the largest candidate step from θ [d] that lowers S within the trust region, if any (Alg. 3, l. 10)."""
    before, gradient, product = linearise(policy, theta, data, args)
    x, curvature = conjugate_gradient(product, gradient, args.cg_iterations)
    step = (2 * args.delta / (curvature + 1e-8)).sqrt() * x  # the quadratic model of the KL hits δ
    for ratio in (0.8**k for k in range(args.backtracks)):
        candidate = theta - ratio * step
        after, kl = meta_objective(policy, candidate, data, args)
        if after < before and kl <= args.delta:
            break
    else:
        candidate, after, kl, ratio = theta, before, 0.0, 0.0
    stats = dict(surrogate_before=before, surrogate_after=after, kl=kl, step_ratio=ratio, gradient_norm=gradient.norm())
    return candidate, {f"trpo/{k}": float(v) for k, v in stats.items()}


# == Evaluation ========================================================================================================


# Copied from algos/milet.py
def returns_by_cluster(name: str, returns: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """The mean of the returns [task] and, if there are several, of every true cluster."""
    present = np.unique(clusters)
    by_cluster = {f"{name}_cluster_{m}": float(returns[clusters == m].mean()) for m in present}
    return {name: float(returns.mean())} | (by_cluster if len(present) > 1 else {})


def evaluate(
    env: gym.vector.VectorEnv, tasks: envs.Tasks, policy: GaussianPolicy, theta: Tensor, args: Args
) -> tuple[dict, dict]:
    """Fresh rollouts of every held-out task before and after each gradient step, from theta [learner, d].

    The metrics, and for the figures: returns [gradient step, task, rollout], and the first two state variables of
    the first rollout [gradient step, H, task, 2].
    """
    rng = torch.Generator().manual_seed(10**6 + args.seed)
    as_trained = max(1, args.inner_steps)
    theta_k = theta[tasks.cluster if args.oracle else np.zeros(len(tasks), int)]
    metrics, returns, traces, steps = {}, [], [], args.eval_steps or as_trained
    for k in range(steps + 1):
        batch = sample(env, tasks if k == 0 else None, policy, theta_k, rng, args)
        returns.append(batch.reward.double().sum(-1).cpu().numpy())
        traces.append(batch.obs[:, : args.horizon, :2].transpose(0, 1).cpu().numpy())
        metrics |= returns_by_cluster(f"eval/return_step_{k}", returns[-1].mean(1), tasks.cluster)
        if k < steps:
            alpha = args.alpha if k < as_trained else args.alpha / 2  # D9
            theta_k = adapt(policy, theta_k, process(batch, args), alpha, args.inner_loss)
    traces = dict(returns=np.stack(returns), trace=np.stack(traces), alpha=args.alpha)
    return metrics, dict(params=tasks.params, cluster=tasks.cluster) | traces


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


def train(args: Args) -> None:
    args = replace(args, num_threads=args.num_threads or torch.get_num_threads())
    torch.set_num_threads(args.num_threads)
    rng = torch.Generator().manual_seed(args.seed)
    make_env = partial(gym.make_vec, args.env, num_threads=args.num_threads, horizon=args.horizon)
    env = make_env(num_envs=args.tasks * args.rollouts)
    test_tasks = env.unwrapped.task_set("test")
    test_env = make_env(num_envs=len(test_tasks) * args.rollouts)

    # Alg. 3, l. 1: θ of every learner (Multi-MAML: one a cluster, else one)
    policy = GaussianPolicy(env.single_observation_space.shape[0], env.single_action_space.shape[0], args)
    learners = env.unwrapped.num_clusters if args.oracle else 1
    theta = torch.stack([policy.init(rng) for _ in range(learners)]).to(args.device)
    agent, done, frames = nn.ParameterDict({"theta": nn.Parameter(theta, requires_grad=False)}), 0, 0
    theta = agent["theta"]  # [learner, d], changed in place
    if args.evaluate:
        load_checkpoint(args.evaluate, args, {"agent": agent})
        try:
            metrics, traces = evaluate(test_env, test_tasks, policy, theta, args)
        except FloatingPointError as error:
            fail(f"--alpha {args.alpha}: {error}")
        np.savez_compressed(Path(args.evaluate) / "eval.npz", **traces)
        print(*(f"{name} {value:.2f}" for name, value in metrics.items()), sep="\n")
        print(summary(metrics), f"figures: python results/plot.py {args.evaluate}", sep="\n")
        return
    if args.resume:
        state = load_checkpoint(args.resume, args, {"agent": agent})
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
        metrics, traces = evaluate(test_env, test_tasks, policy, theta, args)
        run.log("eval", iteration, {"charts/frames": frames} | metrics)
        np.savez_compressed(run.path / "eval.npz", **traces)
        run.say(f"iteration {iteration} · frames {frames:,} · {summary(metrics)}")

    def save(iteration: int) -> None:
        state = dict(script=SCRIPT, env=args.env, iteration=iteration, frames=frames, rng=rng.get_state())
        state["agent"] = agent.state_dict()
        torch.save(state, run.path / "checkpoint.tmp")  # aside, then renamed: a kill leaves the last one whole
        os.replace(run.path / "checkpoint.tmp", run.path / "checkpoint.pt")

    iteration = done
    try:
        if done == 0:
            save(0)
            evaluate_and_log(0)
        for iteration in range(done + 1, args.iterations + 1):
            # Alg. 3, l. 3: fresh tasks (D10); the true cluster chooses the learner of Multi-MAML
            begin, sampling, before = time.time(), 0.0, frames
            tasks = env.unwrapped.sample_tasks(args.tasks, np.random.default_rng(random_seed(rng)))
            learner = tasks.cluster if args.oracle else np.zeros(args.tasks, int)

            # l. 4-9: sample D_k, adapt to it, n times; then sample D_n
            theta_k, data, returns = theta[learner], [], {}
            for k in range(args.inner_steps + 1):
                if k > 0:
                    theta_k = adapt(policy, theta_k, data[-1], args.alpha, args.inner_loss)
                clock = time.time()
                batch = sample(env, tasks if k == 0 else None, policy, theta_k, rng, args)
                sampling += time.time() - clock
                data.append(process(batch, args))
                frames += int((batch.weight > 0).sum())
                task_returns = batch.reward.double().sum(-1).mean(1).cpu().numpy()
                returns |= returns_by_cluster(f"train/return_step_{k}", task_returns, tasks.cluster)

            # l. 10: every learner takes a step on its own tasks
            stats = []
            for m in np.unique(learner):
                theta[m], stat = trpo_step(policy, theta[m], [batch.of(learner == m) for batch in data], args)
                stats.append(stat)

            seconds = time.time() - begin
            metrics = {"charts/frames": frames} | returns
            metrics |= {key: sum(stat[key] for stat in stats) / len(stats) for key in stats[0]}
            metrics["policy/std"] = theta[:, -policy.sizes[-1] :].exp().mean().item()
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
    """The preset, or the args.json of --resume or --evaluate, overridden by the explicit flags."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--preset", "--resume", "--evaluate"):
        first.add_argument(flag)
    known, _ = first.parse_known_args(argv)
    if known.resume and known.evaluate:
        fail("--resume and --evaluate contradict each other")
    folder, preset = known.resume or known.evaluate, known.preset or Args.preset
    default = load_args(folder) if folder else Args(**PRESETS.get(preset, {}))
    args = tyro.cli(Args, default=default, args=argv, description=__doc__.split("\n")[0])
    free = ("resume", "evaluate", "device", "num_threads", "track", "run_dir")
    free += ("alpha", "eval_steps") if args.evaluate else ("iterations",)
    changed = [k for k, v in asdict(args).items() if k not in free and v != getattr(default, k)]
    if folder and changed:
        fail(f"--{changed[0].replace('_', '-')} cannot change on an existing run")
    cycle = env_class(args.env).cluster_cycle("train")
    if args.oracle and len(cycle) == 1:
        fail(f"--oracle needs clusters, and {args.env} has none")
    check_numbers(args, may_be_0=("seed", "num_threads", "inner_steps", "eval_steps"))
    if args.tasks < len(cycle):
        fail(f"--tasks must be at least {len(cycle)}, which hold every cluster of {args.env}")
    if min(args.alpha, args.action_scale, args.delta) <= 0 or args.damping < 0:
        fail("--alpha, --action-scale and --delta must be positive, --damping at least 0")
    if not (0 <= args.gamma <= 1 and 0 <= args.gae_lambda <= 1):
        fail("--gamma and --gae-lambda must be in [0, 1]")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda, but PyTorch finds no GPU")
    return args


if __name__ == "__main__":
    train(parse_args())
