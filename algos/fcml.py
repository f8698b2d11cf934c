"""FCML: Flexible Clustered Meta-Learning (Haghgoo, Sano and Pal, Stanford University, project report, about 2019).

No official code: the paper lists it as future work, and github.com/behzadhaghgoo/cml has CML only. CML that begins with
one meta-parameter and adds one when a task is still learning after adaptation. With --max-learners 1 it is maml.py.

Objective    max over θ_1 .. θ_m:  Σ_i max_j R_i(θ'_ij),  R_i the return in task i  (Sec. 3.1.1)
MAML         L_i(θ) = -E_πθ[ return in task i ],  ∇L_i ∝ -E_D[ A ∇ln π_θ(a|s) ]                               Eq. (1)
             θ_0 = θ_j,  θ_k+1 = θ_k - α ∇L_i(θ_k; D_k),  θ'_ij = θ_n: n inner steps, D_k sampled by θ_k      Eq. (2)
TRPO step    min of S(θ) = E_i E_Dn[ -A π_θ'i / π_old ]  subject to  E_i E_Dn[ KL(π_old ‖ π_θ'i) ] ≤ δ   Eq. (3), (4)
             J_i = ∂θ'_i/∂θ = Π_k (I - α ∇²L_i(θ_k; D_k)),  ∇S = E_i J_iᵀ ∇S(θ'_i)                            Eq. (5)
             H = ∇²KL = E_i J_iᵀ F_i J_i,  F_i the Fisher matrix of π_θ'i on D_n                              Eq. (6)
             θ <- θ - √(2δ / xᵀHx) x,  H x = ∇S by conjugate gradient, backtracked (Schulman et al., 2015)    Eq. (7)
Assignment   c_i = argmax_j R_i(θ'_ij), mean returns of D_n;  (3)-(7) of θ_j are over its own tasks, c_i = j  Eq. (8)
Score        C = 2 | E|I_true - I_pred| - ½ |, for two clusters and m = 2  (Sec. 5.2.1)                       Eq. (9)
New cluster  g_i = (R_i(θ'') - R_i(θ')) / max(|R_i(θ')|, R_min) > ε,  θ'' = θ' - α ∇L_i(θ'; D_n), θ' of c_i  Eq. (10)
Algorithm 2  l. 2  sample K tasks -> sample_tasks    l. 5-13  D, θ'_ij, D', argmax_k -> collect_all, rollouts_of_learner
             l. 14-19  θ'', tuned till convergence -> gain, tune    l. 16-17  U_j, C_j (D18) -> trpo_step

Symbols      θ_1 .. θ_m -> theta [slot, d]; R_i(θ'_ij) -> score [learner, task]; c_i -> learner; g_i -> g; the listing's
             D and D', D_0 and D_n -> Batch; A -> advantage. Numbers of equations and lines are ours; Alg. 3 is MAML's.

Deviations from the paper (P) or CML's official code (C); D1 to D14 are those of cml.py, with the reasons there
  D1  GAE on a linear baseline, as C, not returns. D2 After the last step the value is 0. D3 The exact Hessian, damped.
  D4  K episodes a task, nothing after a fall. D5 σ is floored always. D6 A larger ridge only where Cholesky fails.
  D7  No other inner losses here. D8 Pad actions stay in π, as C. D9 At test α / 2 after as many steps as in training.
  D10 Clusters are balanced. D11 One inner step, as C (P: 2). D12 KL ≤ δ, but for --kl-slack. D13 TRPO through the
      adaptation, as C; no step without tasks. D14 train/ has the very rollouts that chose, as P and C; eval/ others.
  D15 P's listing keeps the cluster if (R(θ) - R(θ'')) / R(θ) ≤ ε, θ unadapted: for R > 0 true unless adapting harms.
      P's text means: if the last step gains little. Here so: g_i ≤ ε, relative to R(θ').
  D16 P has no ε, R_min, limit or warm-up. Here one task an iteration founds, that of the largest g_i, others above ε
      stay; and only tasks of a learner older than --warmup iterations may found.
  D17 "Till convergence" is here: until five returns average less than 1 % above the five before, or for 50 steps.
  D18 P's listing collects U and C and never applies them, and its argmax is over a loss; here CML's step, and returns.
  D19 P's θ'' has a rate β, a sum over all tasks, returns "using D'"; here α, the one task, fresh rollouts of θ''.
  D20 The largest of 40 noisy g_i is above ε by chance; here fresh rollouts of θ' and θ'' must confirm it.

Tested       python algos/fcml.py --env point-goal-4c --tasks 20 --rollouts 10 --iterations 100 --epsilon 0.05
             (12.1 million frames, 4 minutes): -200, then -73 after one step; four learners, three used, NMI 0.86.
"""

import json
import math
import os
import re
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from pydantic import TypeAdapter
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import envs

# == Args ==============================================================================================================


@dataclass
class Args:
    env: str = "ant-cheetah-dir"  # environment id (module:id imports the module first)
    preset: Literal["paper", "fast"] | None = None  # published, or ours, of about an hour (default where there is one)
    seed: int = 0  # seed of everything random
    device: Literal["cpu", "cuda"] = "cpu"  # device of the networks
    num_threads: int = 0  # number of threads of the physics and of the updates (0: all CPUs)
    iterations: int = 200  # number of meta-iterations (CML's code: 1001)
    eval_every: int = 10  # meta-iterations between evaluations on the held-out tasks
    save_every: int = 10  # meta-iterations between checkpoints
    track: bool = False  # mirror the run to Weights & Biases
    run_dir: str = "runs"  # folder in which the run gets its own folder
    name: str | None = None  # name of the run's folder (if it exists, its run is continued; default: with the time)
    resume: str | None = None  # run folder to continue (its args.json applies)
    evaluate: str | None = None  # run folder to evaluate without training (its args.json applies)

    max_learners: int = 4  # slots, the most meta-parameters (1: MAML)
    epsilon: float = 0.2  # ε, relative improvement by a further gradient step above which a task founds a cluster
    least_return: float = 10.0  # R_min, least return that improvements are relative to
    warmup: int = 25  # first meta-iterations of a learner, in which its tasks found no cluster (D16)
    tune_steps: int = 50  # most gradient steps of a new meta-parameter on the task that founds its cluster (D17)
    tasks: int = 40  # number of tasks per meta-iteration
    rollouts: int = 20  # K, episodes per task and inner step
    horizon: int = 100  # H, steps per episode (default: the environment's own)
    inner_steps: int = 1  # n, gradient steps of the adaptation in training (paper: 2; D11)
    alpha: float = 0.1  # α, inner step size
    eval_steps: int = 0  # gradient steps at evaluation (0: as many as in training, at least one)
    mask_pad_actions: bool = False  # take the actions that a small robot does not use out of π (D8)

    hidden: tuple[int, ...] = (64, 64)  # widths of the policy's hidden layers (Finn et al.: 100 100)
    activation: Literal["tanh", "relu"] = "tanh"  # activation of these layers (Finn et al.: relu)
    action_scale: float = 10.0  # half the width of the policy's action box, which is mapped to [-1, 1]
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 1.0  # λ of generalised advantage estimation
    delta: float = 0.01  # δ, trust region: largest mean KL between adapted policies
    kl_slack: float = 0.0  # part of δ by which an accepted step may exceed it (D12)
    cg_iterations: int = 10  # iterations of conjugate gradient
    damping: float = 1e-5  # multiple of the identity added to H (D3)
    backtracks: int = 15  # candidate steps, each 0.8 of the one before


PAPER: dict[str, dict] = {}  # Args has the settings of CML's code, for all environments
FAST: dict[str, dict] = {}  # none: nothing is tuned
MAY_BE_0 = "seed num_threads warmup inner_steps eval_steps".split()


def check(args: Args, env: type[envs.TaskVectorEnv]) -> dict[str, bool]:
    """What must hold; where it does not, the message is the error."""
    least = max(2, len(env.cluster_cycle("train")))
    pads = env.used_actions is not envs.TaskVectorEnv.used_actions
    return {
        f"--tasks must be at least {least}, for every cluster and a founder": args.tasks >= least,
        "--warmup must be shorter than --iterations": args.warmup < args.iterations or args.max_learners == 1,
        "--epsilon must be at least 0, --least-return positive": args.epsilon >= 0 and args.least_return > 0,
        "--mask-pad-actions is for environments of several robots": pads or not args.mask_pad_actions,
        "--alpha, --action-scale and --delta must be positive": min(args.alpha, args.action_scale, args.delta) > 0,
        "--damping and --kl-slack must be at least 0": min(args.damping, args.kl_slack) >= 0,
        "--gamma and --gae-lambda must be in [0, 1]": 0 <= args.gamma <= 1 and 0 <= args.gae_lambda <= 1,
    }


# == Networks ==========================================================================================================


# Copied from algos/maml.py
class GaussianPolicy:
    """π_θ(a|s), a diagonal Gaussian. Its parameters are an argument, one vector a task: [task, d]."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        widths = pairwise((obs_dim, *args.hidden, action_dim))  # of a layer's input and output
        self.shapes = [shape for a, b in widths for shape in ((a, b), (1, b))] + [(1, action_dim)]  # W, b, ...; log σ
        self.sizes = [rows * columns for rows, columns in self.shapes]
        self.activation = getattr(torch, args.activation)

    def init(self, rng: torch.Generator) -> Tensor:
        """Xavier-uniform weights (even k), biases 0 (odd k), log σ = 0: [d]."""
        parts = [2 * torch.rand(size, generator=rng) - 1 for size in self.sizes]
        bounds = [0.0 if k % 2 else math.sqrt(6 / sum(x)) for k, x in enumerate(self.shapes[:-1])] + [0.0]
        return torch.cat([bound * part for bound, part in zip(bounds, parts)])

    def log_std(self, theta: Tensor) -> Tensor:
        """log σ [..., action_dim] of parameters [..., d]."""
        return theta[..., -self.sizes[-1] :].clamp(min=math.log(1e-6))  # D5

    def __call__(self, theta: Tensor, obs: Tensor) -> tuple[Tensor, Tensor]:
        """theta [task, d], obs [task, row, obs_dim] -> mean [task, row, action_dim], log σ [task, 1, action_dim]."""
        *hidden, last_w, last_b, _ = (p.unflatten(-1, x) for p, x in zip(theta.split(self.sizes, -1), self.shapes))
        h = obs
        for weight, bias in zip(hidden[::2], hidden[1::2]):
            h = self.activation(torch.baddbmm(bias, h, weight))
        return torch.baddbmm(last_b, h, last_w), self.log_std(theta)[:, None]


# == Sampler ===========================================================================================================


# Copied from algos/maml.py
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

    @property
    def taken(self) -> Tensor:
        """[task, rollout, step] bool, False after a fall."""
        return self.weight > 0

    def of(self, tasks: slice | np.ndarray) -> "Batch":
        return Batch(*(x[tasks] for x in self))


# Copied from algos/maml.py
def random_seed(rng: torch.Generator) -> int:
    return torch.randint(2**31, (), generator=rng).item()


# Copied from algos/maml.py
@torch.no_grad()
def sample(
    env: gym.vector.VectorEnv, tasks: envs.Tasks | None, policy: GaussianPolicy, theta: Tensor, rng: torch.Generator,
    args: Args,
) -> Batch:  # fmt: skip
    """K rollouts of every task in lockstep, with its own parameters [task, d] (tasks None: those of the last call)."""
    num_tasks, rollouts, horizon = len(theta), args.rollouts, args.horizon
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's threads would fight with those of the physics
    if tasks is None:
        state, _ = env.reset()
    else:
        copies = tasks[np.repeat(np.arange(num_tasks), rollouts)]
        state, _ = env.reset(seed=random_seed(rng), options={"tasks": copies})
    action_dim = env.single_action_space.shape[0]
    noise = torch.randn(horizon, num_tasks, rollouts, action_dim, generator=rng).to(theta.device)
    obs = theta.new_empty(num_tasks, rollouts, horizon, state.shape[1])
    action, mean = theta.new_empty(2, num_tasks, rollouts, horizon, action_dim)
    reward, alive = theta.new_empty(2, num_tasks, rollouts, horizon)
    done = np.zeros(num_tasks * rollouts, bool)
    for t in range(horizon):
        s = torch.from_numpy(state).to(theta.device).view(num_tasks, rollouts, -1)
        mu, log_std = policy(theta, s)
        a = torch.addcmul(mu, log_std.exp(), noise[t])
        obs[:, :, t], mean[:, :, t], action[:, :, t] = s, mu, a
        control = (a / args.action_scale).clamp(-1, 1).flatten(0, 1)
        state, r, terminated, truncated, info = env.step(control.cpu().numpy())
        alive[:, :, t] = torch.from_numpy(~done & ~info["diverged"]).view(num_tasks, rollouts)  # D4
        reward[:, :, t] = torch.from_numpy(r).view(num_tasks, rollouts)
        done = terminated | truncated
    torch.set_num_threads(threads)
    used = torch.ones_like(log_std)
    if args.mask_pad_actions:
        used *= torch.from_numpy(env.unwrapped.used_actions()[::rollouts, None]).to(theta.device)
    obs, action, mean = (x.flatten(1, 2) for x in (obs, action, mean))
    return Batch(obs, action, mean, log_std, used, reward, alive / alive.sum((1, 2), keepdim=True))


# == Sample processing =================================================================================================


# Copied from algos/maml.py
def discounted_returns(reward: Tensor, gamma: float) -> Tensor:
    """R_t = r_t + γ R_{t+1}, [..., step]."""
    returns = reward.clone()
    for t in reversed(range(returns.shape[-1] - 1)):
        returns[..., t] += gamma * returns[..., t + 1]
    return returns


# Copied from algos/maml.py
def linear_baseline(obs: Tensor, returns: Tensor, taken: Tensor) -> Tensor:
    """Ridge regression of the returns [task, rollout, step] on features of state and time, fitted in every task."""
    s = obs.clamp(-10, 10).double()  # [task, row, obs_dim]
    tasks, rollouts, steps = returns.shape
    t = (torch.arange(steps).to(s) / 100).repeat(rollouts).expand(tasks, -1)[..., None]  # [task, row, 1]
    features = torch.cat([s, s**2, t, t**2, t**3, torch.ones_like(t)], dim=-1)  # [task, row, 2 obs_dim + 4]
    x = features * taken.flatten(1)[..., None]
    for ridge in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
        factor, failed = torch.linalg.cholesky_ex(x.mT @ x + ridge * torch.eye(x.shape[-1]).to(x))
        if not failed.any():  # D6
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
    """The batch with the advantages A of Eq. (1) and (3), normalised in every task."""
    baseline = linear_baseline(batch.obs, discounted_returns(batch.reward, args.gamma), batch.taken)
    advantage = gae(batch.reward, baseline, args.gamma, args.gae_lambda)
    centred = advantage - (batch.weight * advantage).sum((1, 2), keepdim=True)
    std = (batch.weight * centred**2).sum((1, 2), keepdim=True).sqrt()
    return batch._replace(advantage=centred / (std + 1e-8) * batch.taken)  # D1


# == Inner adaptation ==================================================================================================


# Copied from algos/maml.py
def log_prob(mean: Tensor, log_std: Tensor, batch: Batch) -> Tensor:
    """ln π(a|s) of the actions of a batch without the constants -ln √2π, 0 after a fall: [task, rollout, step]."""
    deviation = (batch.action - mean) * (-log_std).exp()
    return -((0.5 * deviation**2 + log_std) * batch.used).sum(-1).view_as(batch.reward) * batch.taken


def inner_loss(policy: GaussianPolicy, theta: Tensor, batch: Batch, args: Args) -> Tensor:
    """L_i(θ; D) of Eq. (1), [task] (D7). Does not use args, which MAML's adapt, copied below, passes."""
    return -(batch.weight * log_prob(*policy(theta, batch.obs), batch) * batch.advantage).sum((1, 2))


# Copied from algos/maml.py
def adapt(policy: GaussianPolicy, theta: Tensor, batch: Batch, alpha: float | Tensor, args: Args) -> Tensor:
    """θ_k+1 = θ_k - α ∇L_i(θ_k; D_k) of Eq. (2), [task, d]."""
    theta = theta.detach().requires_grad_()
    loss = inner_loss(policy, theta, batch, args).sum()
    return theta.detach() - alpha * torch.autograd.grad(loss, theta)[0]


# Copied from algos/maml.py
def collect(
    env: gym.vector.VectorEnv, tasks: envs.Tasks, policy: GaussianPolicy, theta: Tensor, alphas: list[float | Tensor],
    rng: torch.Generator, args: Args,
) -> list[Batch]:  # fmt: skip
    """D_0 .. D_n of every task: from θ_0 [task, d], and after a gradient step with each of the rates, Eq. (2)."""
    data = [process(sample(env, tasks, policy, theta, rng, args), args)]
    for alpha in alphas:
        theta = adapt(policy, theta, data[-1], alpha, args)
        data.append(process(sample(env, None, policy, theta, rng, args), args))
    return data


# == Outer TRPO step ===================================================================================================

CHUNK = 4  # tasks at a time, whose activations stay in the cache


# Copied from algos/maml.py
def surrogate(mean: Tensor, log_std: Tensor, batch: Batch) -> Tensor:
    """E_D[-A π/π_old] of Eq. (3), [task]; π_old sampled the batch."""
    ratio = (log_prob(mean, log_std, batch) - log_prob(batch.mean, batch.log_std, batch)).exp()
    return -(batch.weight * ratio * batch.advantage).sum((1, 2))


# Copied from algos/maml.py
def mean_kl(mean: Tensor, log_std: Tensor, batch: Batch) -> Tensor:
    """E_D[KL(π_old ‖ π)] of Eq. (4), [task]; π_old sampled the batch."""
    square = (2 * batch.log_std).exp() + (batch.mean - mean) ** 2  # E_old[(a - mean)²]
    kl = (log_std - batch.log_std + 0.5 * square * (-2 * log_std).exp() - 0.5) * batch.used
    return (batch.weight.flatten(1) * kl.sum(-1)).sum(1)


# Copied from algos/maml.py
def inner_gradient(policy: GaussianPolicy, theta: Tensor, batch: Batch, args: Args) -> tuple[Tensor, Callable]:
    """∇L_i(θ; D) [task, d], and the product v -> ∇²L_i(θ; D) v by differentiating it once more."""
    theta = theta.detach().requires_grad_()
    loss = inner_loss(policy, theta, batch, args).sum()
    (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)

    def hessian(v: Tensor) -> Tensor:
        return torch.autograd.grad(gradient, theta, v.expand_as(theta), retain_graph=True)[0]

    return gradient.detach(), hessian


# Copied from algos/maml.py
def outer_gradient(policy: GaussianPolicy, theta: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Callable]:
    """S_i(θ') [task], its gradient [task, d], and the product u -> F_i u with the Fisher matrix of π_θ' on D_n.

    F = GᵀΛG, G = ∂(mean, log σ)/∂θ', Λ = diag(σ⁻², 2). Autograd gives Gᵀw; the gradient of u·Gᵀw in w is G u.
    """
    theta = theta.detach().requires_grad_()
    output = policy(theta, batch.obs)  # mean, log σ
    loss = surrogate(*output, batch)
    (gradient,) = torch.autograd.grad(loss.sum(), theta, retain_graph=True)
    w = [torch.zeros_like(x, requires_grad=True) for x in output]
    (gt_w,) = torch.autograd.grad(output, theta, w, create_graph=True)  # Gᵀw
    weight = batch.weight.flatten(1)[..., None]  # [task, row, 1], of sum 1: so Λ has 2 for log σ, which all rows share
    precision = weight * batch.used * (-2 * output[1].detach()).exp()  # σ⁻²

    def fisher(u: Tensor) -> Tensor:
        of_mean, of_std = torch.autograd.grad(gt_w, w, u.expand_as(theta), retain_graph=True)  # G u
        return torch.autograd.grad(output, theta, [precision * of_mean, 2 * batch.used * of_std], retain_graph=True)[0]

    return loss.detach(), gradient, fisher


# Copied from algos/maml.py
def linearise(
    policy: GaussianPolicy, theta: Tensor, data: list[Batch], alpha: float | Tensor, args: Args
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """S(θ), ∇S(θ) [d], and the product v -> (H + damping) v, Eq. (5) and (6), on the graphs kept from one pass (D3).

    With a rate of each parameter J_i is a product of I - diag(α) ∇²L_i, which is not symmetric.
    """
    tasks, loss, gradient, graphs = len(data[0].obs), 0.0, torch.zeros_like(theta), []

    def forward(v: Tensor, hessians: list[Callable]) -> Tensor:
        """J_i v."""
        for hessian in hessians:
            v = v - alpha * hessian(v)
        return v

    def transposed(u: Tensor, hessians: list[Callable]) -> Tensor:
        """J_iᵀ u."""
        for hessian in reversed(hessians):
            u = u - hessian(alpha * u)
        return u

    for first in range(0, tasks, CHUNK):
        *inner, outer = (batch.of(slice(first, first + CHUNK)) for batch in data)
        theta_k, hessians = theta.expand(len(outer.obs), -1), []
        for batch in inner:
            inner_grad, hessian = inner_gradient(policy, theta_k, batch, args)
            theta_k = theta_k - alpha * inner_grad  # Eq. (2)
            hessians.append(hessian)
        s, outer_grad, fisher = outer_gradient(policy, theta_k, outer)
        loss += s.sum()
        gradient += transposed(outer_grad, hessians).sum(0)  # Eq. (5)
        graphs.append((hessians, fisher))

    def product(v: Tensor) -> Tensor:
        total = torch.zeros_like(v)
        for hessians, fisher in graphs:
            total += transposed(fisher(forward(v, hessians)), hessians).sum(0)  # Eq. (6)
        return total / tasks + args.damping * v

    return loss / tasks, gradient / tasks, product


# Copied from algos/maml.py
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


# Copied from algos/maml.py
def meta_objective(
    policy: GaussianPolicy, theta: Tensor, data: list[Batch], alpha: float | Tensor, args: Args
) -> tuple[Tensor, Tensor]:
    """S(θ) of Eq. (3) and the KL of Eq. (4), adaptation included."""
    *inner, outer = data
    theta_k = theta.expand(len(outer.obs), -1)
    for batch in inner:
        theta_k = adapt(policy, theta_k, batch, alpha, args)
    with torch.no_grad():
        output = policy(theta_k, outer.obs)
        return surrogate(*output, outer).mean(), mean_kl(*output, outer).mean()


# Copied from algos/maml.py
def trpo_step(
    policy: GaussianPolicy, theta: Tensor, data: list[Batch], alpha: float | Tensor, args: Args
) -> tuple[Tensor, dict[str, float]]:
    """Eq. (7): the largest candidate step from θ [d] that lowers S within the trust region, if any (Alg. 3, l. 10)."""
    before, gradient, product = linearise(policy, theta, data, alpha, args)
    x, curvature = conjugate_gradient(product, gradient, args.cg_iterations)
    step = (2 * args.delta / (curvature + 1e-8)).sqrt() * x  # Eq. (7): the quadratic model of the KL hits δ
    for ratio in (0.8**k for k in range(args.backtracks)):
        candidate = theta - ratio * step
        after, kl = meta_objective(policy, candidate, data, alpha, args)
        if after < before and kl <= args.delta * (1 + args.kl_slack):  # D12
            break
    else:  # none is accepted
        candidate, after, kl, ratio = theta, before, 0.0, 0.0
    stats = dict(surrogate_before=before, surrogate_after=after, kl=kl, step_ratio=ratio, gradient_norm=gradient.norm())
    return candidate, {f"trpo/{k}": float(v) for k, v in stats.items()}


# == Clusters of tasks =================================================================================================


def collect_all(
    env_of: Callable, tasks: envs.Tasks, policy: GaussianPolicy, theta: Tensor, alphas: list[float | Tensor],
    rng: torch.Generator, args: Args,
) -> list[Batch]:  # fmt: skip
    """D_0 .. D_n of every task under every θ_j, in one call: [learner x task], first those of θ_1 (Alg. 2, l. 5-11)."""
    copies = tasks[np.tile(np.arange(len(tasks)), len(theta))]
    return collect(env_of(len(copies)), copies, policy, theta.repeat_interleave(len(tasks), 0), alphas, rng, args)


def in_use(theta: Tensor) -> Tensor:
    """Of θ [slot, d] the slots in use [learner, d], which come first."""
    return theta[theta.any(1)]


# Copied from algos/cml.py
def mean_returns(batch: Batch, learners: int) -> np.ndarray:
    """R_i(θ'_ij) of Eq. (8), [learner, task]: mean undiscounted returns of D_n, as collect_all gives it."""
    return batch.reward.double().sum(-1).mean(1).view(learners, -1).cpu().numpy()


# Copied from algos/cml.py
def rollouts_of_learner(learner: np.ndarray, data: list[Batch]) -> list[Batch]:
    """D_0 .. D_n of every task under its own learner c_i, [task], out of those of collect_all, [learner x task]."""
    rows = learner * len(learner) + np.arange(len(learner))  # c_i · tasks + i
    return [batch.of(rows) for batch in data]


# Copied from algos/cml.py
def clustering(name: str, score: np.ndarray, true: np.ndarray, learners: int) -> dict[str, float]:
    """How Eq. (8) divides tasks by scores [learner, task], beside true clusters; a column for each learner."""
    guess, present = score.argmax(0), np.unique(true)
    table = np.zeros((learners, true.max() + 1), int)
    np.add.at(table, (guess, true), 1)
    best = np.sort(score, 0)[-2:]  # the second best and the best return in every task
    metrics = returns_by_cluster(f"{name}/margin", best[-1] - best[0], true)
    metrics |= {f"{name}/tasks_{j}": int(row.sum()) for j, row in enumerate(table)}
    if len(present) > 1:
        metrics |= {f"{name}/tasks_{j}_cluster_{c}": int(table[j, c]) for j in range(learners) for c in present}
        metrics[f"{name}/nmi"] = float(normalized_mutual_info_score(true, guess))
        metrics[f"{name}/ari"] = float(adjusted_rand_score(true, guess))
        metrics[f"{name}/accuracy"] = float(table[linear_sum_assignment(table, maximize=True)].sum() / len(true))
    if learners == len(present) == 2:
        metrics[f"{name}/C"] = float(2 * abs(np.abs(true - guess).mean() - 0.5))  # Eq. (9)
    return metrics


def gain(after: np.ndarray | float, before: np.ndarray | float, args: Args) -> np.ndarray | float:
    """The relative improvement g_i of Eq. (10)."""
    return (after - before) / np.maximum(np.abs(before), args.least_return)


def tune(
    env_of: Callable, task: envs.Tasks, policy: GaussianPolicy, pair: Tensor, rng: torch.Generator, args: Args
) -> tuple[Tensor, float, list[float], int]:
    """g_i of θ', θ'' [2, d] on fresh rollouts; if above ε, tunes θ'' (Alg. 2, l. 19) -> θ_m+1, g_i, returns, frames."""
    (both,) = collect(env_of(2), task[[0, 0]], policy, pair, [], rng, args)
    before, after = mean_returns(both, 1)[0].tolist()
    theta, batch, returns, frames = pair[1:], both.of([1]), [after], int(both.taken.sum())
    g = gain(after, before, args)
    for _ in range(args.tune_steps if g > args.epsilon else 0):  # D20
        theta = adapt(policy, theta, batch, args.alpha, args)
        (batch,) = collect(env_of(1), task, policy, theta, [], rng, args)
        returns.append(mean_returns(batch, 1).item())
        frames += int(batch.taken.sum())
        if len(returns) >= 10 and gain(sum(returns[-5:]) / 5, sum(returns[-10:-5]) / 5, args) < 0.01:  # D17
            break
    return theta[0], g, returns, frames


# == Evaluation ========================================================================================================


# Copied from algos/milet.py
def returns_by_cluster(name: str, returns: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """The mean of the returns [task] and, if there are several, of every true cluster."""
    present = np.unique(clusters)
    by_cluster = {f"{name}_cluster_{m}": float(returns[clusters == m].mean()) for m in present}
    return {name: float(returns.mean())} | (by_cluster if len(present) > 1 else {})


# Copied from algos/maml.py
def returns_by_step(name: str, data: list[Batch], clusters: np.ndarray) -> dict[str, float]:
    """Mean returns after 0, 1, .. gradient steps, pooled and by cluster."""
    metrics = {}
    for k, batch in enumerate(data):
        metrics |= returns_by_cluster(f"{name}_{k}", batch.reward.double().sum(-1).mean(1).cpu().numpy(), clusters)
    return metrics


def evaluate(env_of: Callable, tasks: envs.Tasks, policy: GaussianPolicy, theta: Tensor, args: Args) -> tuple:
    """Every held-out task before and after each gradient step, from the θ_j that did best on other rollouts (D14)."""
    theta = in_use(theta)
    as_trained = max(1, args.inner_steps)
    alphas = [args.alpha if k < as_trained else args.alpha / 2 for k in range(args.eval_steps or as_trained)]  # D9
    choosing, reported = (torch.Generator().manual_seed(seed + args.seed) for seed in (2 * 10**6, 10**6))
    score = mean_returns(collect_all(env_of, tasks, policy, theta, alphas, choosing, args)[-1], len(theta))
    learner = score.argmax(0)  # Eq. (8)
    fresh = collect_all(env_of, tasks, policy, theta, alphas, reported, args)
    data = rollouts_of_learner(learner, fresh)
    arrays = dict(
        params=tasks.params, cluster=tasks.cluster, alpha=args.alpha, learner=learner,
        learner_returns=mean_returns(fresh[-1], len(theta)),  # [learner, task], of all
        returns=np.stack([batch.reward.double().sum(-1).cpu().numpy() for batch in data]),  # [step, task, rollout]
        # two state variables [gradient step, H, task, 2]; the first H rows of a task are its first rollout
        trace=np.stack([batch.obs[:, : args.horizon, :2].transpose(0, 1).cpu().numpy() for batch in data]),
    )  # fmt: skip
    metrics = returns_by_step("eval/return_step", data, tasks.cluster) | {"eval/choosing_return": score.max(0).mean()}
    return metrics | clustering("eval", score, tasks.cluster, args.max_learners) | {"eval/learners": len(theta)}, arrays


# == Training ==========================================================================================================


def train(args: Args, run: "Run") -> None:
    """Algorithm 2."""
    env_of = cache(lambda tasks: run.make_env(tasks * args.rollouts))
    env = env_of(args.tasks)

    # Alg. 2, input: θ_1, and slots for more, which are zeros while they are empty
    policy = GaussianPolicy(env.single_observation_space.shape[0], env.single_action_space.shape[0], args)
    theta = nn.Parameter(torch.zeros(args.max_learners, sum(policy.sizes)).to(args.device), requires_grad=False)
    theta[0] = policy.init(run.rng)  # [slot, d], changed in place
    born = nn.Parameter(torch.zeros(args.max_learners), requires_grad=False)  # [slot], the iteration of its founding
    agent = nn.ParameterDict(dict(theta=theta, born=born))
    evaluation = partial(evaluate, env_of, env.unwrapped.task_set("test"), policy, theta, args)
    for iteration in run.loop(args.iterations, dict(agent=agent), evaluation):
        # l. 2: fresh tasks (D10)
        tasks = env.unwrapped.sample_tasks(args.tasks, np.random.default_rng(random_seed(run.rng)))
        m = len(in_use(theta))

        # l. 5-11: every learner samples D in every task, adapts, and samples D'
        with run.timer("sample"):
            data = collect_all(env_of, tasks, policy, theta[:m], [args.alpha] * args.inner_steps, run.rng, args)
        run.frames += sum(int(batch.taken.sum()) for batch in data)

        # l. 12-13: the learner of each task, and its D and D'
        scores = mean_returns(data[-1], m)
        learner = scores.argmax(0)  # Eq. (8)
        data = rollouts_of_learner(learner, data)

        # l. 14-15: θ'', does the further step still help?
        g, confirmed, tuning_returns = np.zeros(args.tasks), 0.0, []
        may_found = iteration - born.numpy(force=True)[learner] > args.warmup  # D16
        if may_found.any() and m < args.max_learners:
            with run.timer("sample"):
                adapted = theta[learner]
                for batch in data[:-1]:
                    adapted = adapt(policy, adapted, batch, args.alpha, args)  # θ', as above
                further = adapt(policy, adapted, data[-1], args.alpha, args)  # θ'', D19
                last = sample(env, tasks, policy, further, run.rng, args)  # D19
            run.frames += int(last.taken.sum())
            g = may_found * gain(mean_returns(last, 1)[0], mean_returns(data[-1], 1)[0], args)  # Eq. (10), D15

        # l. 18-19: the task that it helps most founds a cluster, if fresh rollouts confirm that it helps (D20)
        i = int(g.argmax())
        if g[i] > args.epsilon:  # so g was measured: it is 0 otherwise
            with run.timer("sample"):
                pair = torch.stack([adapted[i], further[i]])
                tuned, confirmed, tuning_returns, frames = tune(env_of, tasks[[i]], policy, pair, run.rng, args)
            run.frames += frames
        if confirmed > args.epsilon:
            theta[m], born[m] = tuned, iteration
            learner[i] = -1  # the founder has no part in its old learner's step

        # l. 16-17: every learner takes a step on its own tasks, if it has any (D13, D18)
        stats = []
        for j in np.unique(learner[learner >= 0]):
            mine = [batch.of(learner == j) for batch in data]
            theta[j], stat = trpo_step(policy, theta[j], mine, args.alpha, args)
            stats.append(stat)

        metrics = returns_by_step("train/return_step", data, tasks.cluster)
        metrics |= {key: sum(stat[key] for stat in stats) / len(stats) for key in stats[0]}
        metrics |= clustering("fcml", scores, tasks.cluster, args.max_learners) | {"fcml/skipped": m - len(stats)}
        metrics |= returns_by_cluster("fcml/gain", g, tasks.cluster) | {"fcml/learners": len(in_use(theta))}
        metrics |= returns_by_cluster("fcml/candidates", g > args.epsilon, tasks.cluster)
        metrics |= {"fcml/tuned": len(tuning_returns), "fcml/gain_max": g[i], "fcml/gain_confirmed": confirmed}
        metrics |= {"fcml/founder_cluster": int(tasks.cluster[i]) if confirmed > args.epsilon else -1}
        std, adapted = policy.log_std(theta[:m]).exp(), data[-1].log_std.exp()
        metrics |= {"policy/std": std.mean().item(), "policy/std_min": std.min().item()}
        metrics |= {"policy/std_adapted": adapted.mean().item(), "policy/std_adapted_min": adapted.min().item()}
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
