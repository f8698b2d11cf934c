"""MMAML: Multimodal Model-Agnostic Meta-Learning via Task-Aware Modulation (Vuorio, Sun, Hu and Lim, NeurIPS 2019).

The reinforcement-learning part. Official code: github.com/vuoristo/MMAML-rl, made from ProMP's. With --modulation none
it is ProMP; then --oracle makes it Multi-ProMP, and --inner-steps 0 PPO without minibatches on all tasks.

Inner loss   L_i(θ; D) = -E_D[ A π_θ / π_old ], π_old sampled D                                               Eq. (1)
             θ_0 = θ,  θ_k+1 = θ_k - α ∇L_i(θ_k; D_k): n inner steps, D_k sampled by π_old,k                  Eq. (2)
             π_old,k is π_θ_k at the θ and ω that sampled, and stays while they are updated
Outer loss   S_i(θ) = E_Dn[ -min(ρ A, clip(ρ, 1 - ε, 1 + ε) A) ],  ρ = π_θ_n / π_old,n                        Eq. (3)
             KL_k(θ) = E_Dk[ KL(π_old,k ‖ π_θ_k) ]                                                            Eq. (4)
Objective    min over θ, ω:  E_i[ S_i + 1/n Σ_k<n η_k KL_k ], with gradients through all inner steps          Eq. (5)
             then, if asked to: η_k <- 2 η_k where KL_k > 1.5 target, η_k / 2 where KL_k < target / 1.5       Eq. (6)
Modulation   υ = h(D_0; ω_h), the embedding of a task                                                         Eq. (7)
             τ = g(υ; ω_g), fixed from here on                                                                Eq. (8)
             φ_k = θ_k ⊙ τ;  for k ≥ 1, π_θ_k in (1) to (4) stands for the policy of φ_k                      Eq. (9)
Algorithm 1  l. 4   sample tasks T_j -> sample_tasks      l. 6, 7    υ = h(D_0), τ = g(υ) -> Encoder
             l. 8, 9  θ' = θ - α ∇L -> adapt, modulate    l. 11-13   N updates of θ, ω_g, ω_h -> promp_update

Symbols      θ -> theta [d], all parameters as one vector, with log σ; θ_k, φ_k of all tasks [task, d]; D_k -> Batch;
             α -> alpha [d], a rate of each parameter; η -> eta [learner, n]; ε -> clip; A -> advantage [task, rollout,
             step]; π_θ(a|s) -> GaussianPolicy; υ -> embedding [task, width]; τ -> tau [task, gains (and shifts) of all
             hidden units]; ω -> agent.encoder. The numbers of the equations are ours: (7) to (9) are the paper's (1),
             (2) and its φ = θ ⊙ τ, the others those of promp.py.

Deviations from the paper (P), from ProMP's, or from the official code (C)
  D1  ProMP's paper sums A over an episode; here means, of GAE on a linear baseline, normalised in each task, as C.
  D2  The value after the last step is 0, time limit or fall, as C.
  D3  C has variables for a step size of each parameter, but none of its optimisers changes them; here they train with
      θ, if asked to (--train-alpha); nothing keeps them positive.
  D4  C fills M K H steps over all tasks, and drops tails; here K episodes a task; no step after a fall, none diverging.
  D5  C floors σ at 1e-6 before adaptation only; here always.
  D6  C tries a larger ridge when the baseline is NaN; here when the Cholesky factorisation fails.
  D7  ProMP writes one inner step, with its KL; of several, C takes the mean of η_k KL_k: here too.
  D8  C has one robot. Of several, CML leaves the actions that pad a small one in π, as noise: here too
      (--mask-pad-actions takes them out).
  D9  C, as ProMP's code, has one η a step and can adapt them; its runs do not: here too (--adapt-eta does).
  D10 C draws modes at random, or (six modes of the point, four of the ant) in turn; here they are balanced.
  D11 P's Multi-ProMP is a run on one mode; here (--oracle) every learner has its share of the meta-batch.
  D12 P's listing takes the first gradient with τ; its text and C without, as D_0 was sampled: here too
      (--modulate-first-step takes it as listed).
  D13 C takes the number of arrays in a batch for the length of its rollouts: its encoder sees the first 5 K
      transitions, cut into rollouts of 5 with H - 5 zeros before each. Here all of D_0 (--encoder-official-bug).
  D14 P scales and shifts what hidden units put out (FiLM); C only scales, before the activation: here too (--modulation
      film shifts). Softmax (P, in regression) and sigmoid (its code) are not in C's reinforcement learning.
  D15 P lists gradient descent with a rate β; here Adam with one rate for θ and ω, N times on the same data, as C.
  D16 C's GRU is Keras' older one (hard sigmoids, reset before the product); here PyTorch's.
  D17 C pads short rollouts with zeros, which pass through the GRU; here the state after the last step taken counts.

Tested       python algos/mmaml.py --env point-4m --num-threads 1   (10.8 million frames, 4 minutes of an AMD core,
             seed 0): -704, then -304 after modulation and two gradient steps; --modulation none (ProMP) -714, -552.
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
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

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
    env: str = "point-2m"  # environment id (module:id imports the module first)
    preset: Literal["paper", "fast"] | None = None  # published, or ours, of about an hour (default where there is one)
    seed: int = 0  # seed of everything random
    device: Literal["cpu", "cuda"] = "cpu"  # device of the networks
    num_threads: int = 0  # number of threads of the physics and of the updates (0: all CPUs)
    iterations: int = 200  # number of meta-iterations (official: 401, 501 or 1001)
    eval_every: int = 10  # meta-iterations between evaluations on the held-out tasks
    save_every: int = 10  # meta-iterations between checkpoints
    track: bool = False  # mirror the run to Weights & Biases
    run_dir: str = "runs"  # folder in which the run gets its own folder
    name: str | None = None  # name of the run's folder (if it exists, its run is continued; default: with the time)
    resume: str | None = None  # run folder to continue (its args.json applies)
    evaluate: str | None = None  # run folder to evaluate without training (its args.json applies)

    modulation: Literal["film-scale", "film", "softmax", "sigmoid", "none"] = "film-scale"  # of hidden units by τ (D14)
    encoder_width: int = 64  # width of the task encoder's GRU and layers (not used with --modulation none)
    encoder_official_bug: bool = False  # show the encoder only 5 K transitions, cut as in the official code (D13)
    modulate_first_step: bool = False  # take the first inner gradient with τ, as the paper's listing has it (D12)

    oracle: bool = False  # Multi-ProMP: a learner for every true cluster (D11)
    tasks: int = 40  # number of tasks per meta-iteration
    rollouts: int = 20  # K, episodes per task and inner step
    horizon: int = 100  # H, steps per episode (default: the environment's own)
    inner_steps: int = 2  # n, gradient steps of the adaptation in training (0: none)
    alpha: float = 0.1  # α, inner step size (with --train-alpha where it starts; --evaluate takes the trained)
    train_alpha: bool = False  # train a step size of each parameter with θ (D3)
    eval_steps: int = 0  # gradient steps at evaluation (0: as many as in training, at least one)
    mask_pad_actions: bool = False  # take the actions that a small robot does not use out of π (D8)

    hidden: tuple[int, ...] = (64, 64)  # widths of the policy's hidden layers
    activation: Literal["tanh", "relu"] = "tanh"  # activation of these layers
    action_scale: float = 10.0  # half the width of the policy's action box, which is mapped to [-1, 1]
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 1.0  # λ of generalised advantage estimation
    updates: int = 5  # full-batch steps of Adam on the same data
    lr: float = 1e-3  # learning rate of Adam
    clip: float = 0.1  # ε, how far the ratio may leave 1 in Eq. (3)
    eta: float = 5e-4  # η, weight of the KL of every step of adaptation (the first one, with --adapt-eta)
    adapt_eta: bool = False  # double or halve η, so that the KL stays near its target (D9)
    kl_target: float = 0.01  # target of the KL for --adapt-eta


# C's configurations, of ProMP as the baseline too
POINT = dict(iterations=401, alpha=0.01, lr=5e-5)
REACHER = dict(iterations=501, horizon=50)
ANT = dict(iterations=1001, horizon=250, inner_steps=3)
PAPER = {f"point-{modes}": POINT for modes in ("1m", "2m", "4m", "6m", "6m-far")}
PAPER |= {f"reacher-{modes}": REACHER for modes in ("1m", "2m", "4m", "6m", "6m-bug")}
PAPER |= {f"ant-{modes}": ANT for modes in ("1m", "2m", "4m")}
# Ours: a ninth of the frames, and ten times the learning rate
FAST = {f"point-{m}m": dict(iterations=300, tasks=12, rollouts=10, alpha=0.01, lr=5e-4) for m in (2, 4, 6)}
MAY_BE_0 = ("seed", "num_threads", "inner_steps", "eval_steps")


def check(args: Args, env: type[envs.TaskVectorEnv]) -> dict[str, bool]:
    """What must hold; where it does not, the message is the error."""
    clusters = len(env.cluster_cycle("train"))
    positive = (args.alpha, args.action_scale, args.lr, args.clip, args.kl_target)
    none = args.modulation == "none"
    return {
        "--oracle is Multi-ProMP: it needs --modulation none": none or not args.oracle,
        "--modulation needs an inner step, or to be none": none or args.inner_steps > 0,
        "--modulation needs a hidden layer, or to be none": none or len(args.hidden) > 0,
        "--encoder-official-bug and --modulate-first-step need --modulation": (
            not none or not (args.encoder_official_bug or args.modulate_first_step)
        ),
        "--encoder-official-bug needs --horizon of at least 5": args.horizon >= 5 or not args.encoder_official_bug,
        f"--oracle needs clusters, and {args.env} has none": clusters > 1 or not args.oracle,
        f"--tasks must be at least {clusters}, which hold every cluster": args.tasks >= clusters,
        f"--oracle needs --tasks to be a multiple of {clusters}": args.tasks % clusters == 0 or not args.oracle,
        "--mask-pad-actions is for environments of several robots": (
            env.used_actions is not envs.TaskVectorEnv.used_actions or not args.mask_pad_actions
        ),
        "--train-alpha and --adapt-eta need --inner-steps of at least 1": (
            args.inner_steps > 0 or not (args.train_alpha or args.adapt_eta)
        ),
        "--alpha, --action-scale, --lr, --clip and --kl-target must be positive": min(positive) > 0,
        "--eta must be at least 0": args.eta >= 0,
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


# == Modulation ========================================================================================================


class Encoder(nn.Module):
    """The modulation network of Eq. (7) and (8): a GRU over every rollout of D_0, a mean over rollouts, and layers."""

    def __init__(self, policy: GaussianPolicy, args: Args):
        super().__init__()
        obs_dim, action_dim, width = policy.shapes[0][0], policy.shapes[-1][1], args.encoder_width
        self.gru = nn.GRU(obs_dim + action_dim + 1, width, batch_first=True)  # D16; 1: the reward
        self.of_rollout = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.of_task = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.generator = nn.Linear(width, sum(args.hidden) * (2 if args.modulation == "film" else 1))
        for name, parameter in self.named_parameters():
            init = nn.init.orthogonal_ if "weight_hh" in name else nn.init.xavier_uniform_
            init(parameter) if parameter.ndim > 1 else nn.init.zeros_(parameter)

    def forward(self, batch: Batch, args: Args) -> tuple[Tensor, Tensor]:
        """υ [task, width] and τ [task, sum of hidden widths, with film twice as many] from D_0."""
        x = torch.cat([batch.obs, batch.action, batch.reward.flatten(1)[..., None]], dim=-1)  # [task, row, inputs]
        n, k, h = batch.reward.shape
        steps = batch.taken.sum(-1)  # [task, rollout]
        if args.encoder_official_bug:  # D13
            pieces = x[:, : 5 * k].unflatten(1, (k, 5))  # [task, piece, 5, inputs]
            x = nn.functional.pad(pieces, (0, 0, h - 5, 0))  # zeros, then the piece
            steps = torch.full_like(steps, h)
        state, _ = self.gru(x.reshape(n * k, h, -1))
        state = nn.functional.pad(state, (0, 0, 1, 0))  # [rollout, step + 1, width]: 0 before the first step
        last = state[torch.arange(n * k), steps.flatten()]  # [rollout, width], D17
        embedding = self.of_task(self.of_rollout(last).view(n, k, -1).mean(1))  # Eq. (7); Alg. 1, l. 6
        return embedding, self.generator(embedding)  # Eq. (8); Alg. 1, l. 7


def infer(encoder: Encoder | None, batch: Batch, args: Args) -> Tensor | None:
    """τ of every task from its D_0; none without modulation."""
    return None if encoder is None else encoder(batch, args)[1]


def gains_and_shifts(tau: Tensor, args: Args) -> list[tuple[Tensor, Tensor | float]]:
    """What τ does to the units of every hidden layer, [task, unit] each: FiLM, softmax or sigmoid (D14)."""
    if args.modulation == "film":
        layers = tau.split([2 * width for width in args.hidden], -1)
        return [(1 + gamma, beta) for gamma, beta in (layer.chunk(2, -1) for layer in layers)]
    gain = {"film-scale": lambda x: 1 + x, "softmax": lambda x: x.softmax(-1), "sigmoid": torch.sigmoid}
    return [(gain[args.modulation](layer), 0.0) for layer in tau.split(args.hidden, -1)]


def modulate(policy: GaussianPolicy, theta: Tensor, tau: Tensor | None, args: Args) -> Tensor:
    """φ = θ ⊙ τ of Eq. (9), [task, d]: a unit x w + b with gain g and shift s becomes g (x w + b) + s."""
    if tau is None:
        return theta
    parts = list(theta.split(policy.sizes, -1))  # W, b, W, b, ..; log σ
    for layer, (gain, shift) in enumerate(gains_and_shifts(tau, args)):
        w = 2 * layer
        weight = parts[w].unflatten(-1, policy.shapes[w])  # [task, in, unit]
        parts[w] = (weight * gain[:, None]).flatten(1)
        parts[w + 1] = parts[w + 1] * gain + shift
    return torch.cat(parts, -1)


def gain_statistics(encoder: Encoder | None, batch: Batch, args: Args) -> dict[str, float]:
    """Mean and root mean square of all gains [task, unit], by D_0; their deviation over tasks, mean over units."""
    if encoder is None:
        return {}
    with torch.no_grad():
        gain = torch.cat([gain for gain, _ in gains_and_shifts(infer(encoder, batch, args), args)], -1)  # [task, unit]
    rms, spread = gain.square().mean().sqrt(), gain.std(0, correction=0).mean()
    stats = dict(gain=gain.mean(), gain_rms=rms, gain_between_tasks=spread)
    return {f"policy/{name}": value.item() for name, value in stats.items()}


def with_tau(policy: GaussianPolicy, tau: Tensor | None, args: Args) -> Callable:
    """The policy with τ fixed: called with θ_k, it acts with φ_k."""
    return lambda theta, obs: policy(modulate(policy, theta, tau, args), obs)


# == Inner adaptation ==================================================================================================


# Copied from algos/maml.py
def log_prob(mean: Tensor, log_std: Tensor, batch: Batch) -> Tensor:
    """ln π(a|s) of the actions of a batch without the constants -ln √2π, 0 after a fall: [task, rollout, step]."""
    deviation = (batch.action - mean) * (-log_std).exp()
    return -((0.5 * deviation**2 + log_std) * batch.used).sum(-1).view_as(batch.reward) * batch.taken


# Copied from algos/promp.py
def surrogate(mean: Tensor, log_std: Tensor, batch: Batch, clip: float = math.inf) -> Tensor:
    """E_D[-min(ρ A, clip(ρ) A)] of Eq. (3), without clip E_D[-ρ A] of Eq. (1), [task]; π_old sampled the batch."""
    ratio = (log_prob(mean, log_std, batch) - log_prob(batch.mean, batch.log_std, batch)).exp()  # ρ
    clipped = torch.minimum(ratio * batch.advantage, ratio.clamp(1 - clip, 1 + clip) * batch.advantage)
    return -(batch.weight * clipped).sum((1, 2))


# Copied from algos/promp.py
def inner_loss(policy: GaussianPolicy, theta: Tensor, batch: Batch, args: Args) -> Tensor:
    """L_i(θ; D) of Eq. (1), [task]. Does not use args, which MAML's adapt, copied below, passes."""
    return surrogate(*policy(theta, batch.obs), batch)


# Copied from algos/maml.py
def adapt(policy: GaussianPolicy, theta: Tensor, batch: Batch, alpha: float | Tensor, args: Args) -> Tensor:
    """θ_k+1 = θ_k - α ∇L_i(θ_k; D_k) of Eq. (2), [task, d]."""
    theta = theta.detach().requires_grad_()
    loss = inner_loss(policy, theta, batch, args).sum()
    return theta.detach() - alpha * torch.autograd.grad(loss, theta)[0]


def collect(
    env: gym.vector.VectorEnv, tasks: envs.Tasks, policy: GaussianPolicy, tau_of: Callable[[Batch], Tensor | None],
    theta: Tensor, alphas: list[float | Tensor], rng: torch.Generator, args: Args,
) -> list[Batch]:  # fmt: skip
    """D_0 .. D_n of every task: from θ_0 [task, d], and after a gradient step with each of the rates, Eq. (2).

    tau_of: τ of every task, given D_0, or none.
    """
    data = [process(sample(env, tasks, policy, theta, rng, args), args)]  # without τ
    with torch.no_grad():
        tau = tau_of(data[0])
    for k, alpha in enumerate(alphas):
        pi = policy if k == 0 and not args.modulate_first_step else with_tau(policy, tau, args)  # D12
        theta = adapt(pi, theta, data[-1], alpha, args)
        data.append(process(sample(env, None, policy, modulate(policy, theta, tau, args), rng, args), args))
    return data


# == Outer proximal update =============================================================================================

CHUNK = 4  # tasks at a time, whose activations stay in the cache


# Copied from algos/maml.py
def mean_kl(mean: Tensor, log_std: Tensor, batch: Batch) -> Tensor:
    """E_D[KL(π_old ‖ π)] of Eq. (4), [task]; π_old sampled the batch."""
    square = (2 * batch.log_std).exp() + (batch.mean - mean) ** 2  # E_old[(a - mean)²]
    kl = (log_std - batch.log_std + 0.5 * square * (-2 * log_std).exp() - 0.5) * batch.used
    return (batch.weight.flatten(1) * kl.sum(-1)).sum(1)


def meta_objective(
    policy: GaussianPolicy, encoder: Encoder | None, theta: Tensor, data: list[Batch], alpha: Tensor, eta: Tensor,
    args: Args,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Eq. (5) before the mean over tasks [task], S_i [task], and KL_0 .. KL_n [n + 1, task].

    From theta and alpha [task, d] and eta [task, n], differentiable in them and in ω: through S_i and KL_k, k > 0, and
    through the inner steps that τ is in.
    """
    *inner, outer = data
    modulated = with_tau(policy, infer(encoder, data[0], args), args)
    kls = []
    for k, batch in enumerate(inner):
        output = (modulated if k else policy)(theta, batch.obs)  # of the policy that sampled D_k
        kls.append(mean_kl(*output, batch))  # Eq. (4)
        if k == 0 and args.modulate_first_step:  # D12
            output = modulated(theta, batch.obs)
        (gradient,) = torch.autograd.grad(surrogate(*output, batch).sum(), theta, create_graph=True)  # Eq. (1)
        theta = theta - alpha * gradient  # Eq. (2), (9); Alg. 1, l. 8-9
    output = (modulated if inner else policy)(theta, outer.obs)
    s, kls = surrogate(*output, outer, args.clip), torch.stack([*kls, mean_kl(*output, outer)])  # Eq. (3), (4)
    penalty = (eta.T * kls[:-1]).sum(0) / max(1, len(inner))  # D7
    return s + penalty, s, kls  # Eq. (5)


def promp_update(
    policy: GaussianPolicy, agent: nn.ParameterDict, optimizer: torch.optim.Optimizer, learner: np.ndarray,
    data: list[Batch], args: Args,
) -> dict[str, float]:  # fmt: skip
    """Steps of Adam on Eq. (5), in place; task i trains learner[i]. One more pass, the last, only measures."""
    share = torch.from_numpy(1 / np.bincount(learner)[learner]).to(agent["theta"])  # for means over a learner's tasks
    surrogates = []
    for step in range(args.updates + 1):
        optimizer.zero_grad()
        found = []
        for first in range(0, len(learner), CHUNK):
            part = slice(first, first + CHUNK)
            theta, alpha, eta = (agent[name][learner[part]] for name in ("theta", "alpha", "eta"))
            mine = [batch.of(part) for batch in data]
            loss, s, kls = meta_objective(policy, agent.encoder, theta, mine, alpha, eta, args)
            if step < args.updates:
                (share[part] * loss).sum().backward()
            found.append((s.detach(), kls.detach()))
        s, kls = (torch.cat(x, dim=-1) for x in zip(*found))  # [task], [n + 1, task]
        surrogates.append(s.mean())
        if step < args.updates:
            optimizer.step()
    stats = dict(surrogate_before=surrogates[0], surrogate_after=surrogates[-1], kl_outer=kls[-1].mean())
    for k, kl in enumerate(kls[:-1]):
        stats |= {f"kl_inner_{k}": kl.mean(), f"eta_{k}": agent["eta"][:, k].mean()}
    if args.adapt_eta:  # D9
        kl = torch.stack([kls[:-1, learner == m].mean(1) for m in range(len(agent["eta"]))])  # [learner, n]
        agent["eta"].copy_(adapted_eta(agent["eta"], kl, args.kl_target))
    return {f"promp/{k}": float(v) for k, v in stats.items()}


# Copied from algos/promp.py
def adapted_eta(eta: Tensor, kl: Tensor, target: float) -> Tensor:
    """Eq. (6)."""
    return eta * torch.where(kl > 1.5 * target, 2.0, torch.where(kl < target / 1.5, 0.5, 1.0))


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


def evaluate(
    env: gym.vector.VectorEnv, tasks: envs.Tasks, policy: GaussianPolicy, agent: nn.ParameterDict, args: Args
) -> tuple[dict, dict]:
    """Fresh rollouts of every held-out task before and after each gradient step, from θ and α of its learner.

    The metrics, and for the figures: returns [gradient step, task, rollout], the first two state variables of the first
    rollout [gradient step, H, task, 2], and υ. Besides, the returns of τ without any gradient step, and of as many
    gradient steps without τ, or with its mean over the tasks, which tells them nothing.
    """
    rng = torch.Generator().manual_seed(10**6 + args.seed)
    theta, alpha = (agent[name].detach()[assign(tasks, args)] for name in ("theta", "alpha"))
    alpha = alpha if args.train_alpha else torch.full_like(alpha, args.alpha)  # may be another one at evaluation
    alphas = [alpha] * (args.eval_steps or max(1, args.inner_steps))
    data = collect(env, tasks, policy, partial(infer, agent.encoder, args=args), theta, alphas, rng, args)
    arrays = dict(
        params=tasks.params, cluster=tasks.cluster, alpha=alpha.mean().item(),
        returns=np.stack([batch.reward.double().sum(-1).cpu().numpy() for batch in data]),
        # the first H rows of a task are its first rollout
        trace=np.stack([batch.obs[:, : args.horizon, :2].transpose(0, 1).cpu().numpy() for batch in data]),
    )  # fmt: skip
    metrics = returns_by_step("eval/return_step", data, tasks.cluster)
    if agent.encoder is not None:
        with torch.no_grad():
            embedding, tau = agent.encoder(data[0], args)
            phi = modulate(policy, theta, tau, args)
        arrays["embedding"] = embedding.cpu().numpy()
        only_tau = sample(env, None, policy, phi, rng, args)
        *_, only_steps = collect(env, tasks, policy, lambda _: None, theta, alphas, rng, args)
        mean_tau = tau.mean(0, keepdim=True).expand_as(tau)
        *_, with_mean = collect(env, tasks, policy, lambda _: mean_tau, theta, alphas, rng, args)
        for name, batch in dict(modulated=only_tau, unmodulated=only_steps, mean_modulated=with_mean).items():
            returns = batch.reward.double().sum(-1).mean(1).cpu().numpy()
            metrics |= returns_by_cluster(f"eval/return_{name}", returns, tasks.cluster)
    return metrics, arrays


# == Training ==========================================================================================================


# Copied from algos/maml.py
def assign(tasks: envs.Tasks, args: Args) -> np.ndarray:
    """The learner of each task: with --oracle that of its true cluster, else the only one."""
    return tasks.cluster if args.oracle else np.zeros(len(tasks), int)


def make_agent(policy: GaussianPolicy, learners: int, rng: torch.Generator, args: Args) -> nn.ParameterDict:
    """θ, α [learner, d] and η [learner, n] of every learner (Multi-ProMP: one a cluster, else one); and ω."""
    theta = torch.stack([policy.init(rng) for _ in range(learners)])
    parts = dict(theta=theta, alpha=torch.full_like(theta, args.alpha))
    parts["eta"] = torch.full((learners, args.inner_steps), args.eta).to(theta)
    trained = dict(theta=True, alpha=args.train_alpha, eta=False)  # by Adam
    agent = nn.ParameterDict({k: nn.Parameter(x.to(args.device), trained[k]) for k, x in parts.items()})
    agent.encoder = None if args.modulation == "none" else Encoder(policy, args).to(args.device)
    return agent


def train(args: Args, run: "Run") -> None:
    """Algorithm 1."""
    env = run.make_env(args.tasks * args.rollouts)
    test_tasks = env.unwrapped.task_set("test")
    test_env = run.make_env(len(test_tasks) * args.rollouts)

    # l. 2: θ, α and η of every learner, ω, and one Adam (D15)
    policy = GaussianPolicy(env.single_observation_space.shape[0], env.single_action_space.shape[0], args)
    agent = make_agent(policy, env.unwrapped.num_clusters if args.oracle else 1, run.rng, args)
    adam = torch.optim.Adam([p for p in agent.parameters() if p.requires_grad], args.lr)

    evaluation = partial(evaluate, test_env, test_tasks, policy, agent, args)
    for _ in run.loop(args.iterations, dict(agent=agent, adam=adam), evaluation):
        # l. 4: fresh tasks (D10), and who learns them
        tasks = env.unwrapped.sample_tasks(args.tasks, np.random.default_rng(random_seed(run.rng)))
        learner = assign(tasks, args)

        # l. 5-10: sample D_0, infer τ; adapt to D_k and sample D_k+1 with τ, n times
        with run.timer("sample"):
            theta, alpha = (agent[name].detach()[learner] for name in ("theta", "alpha"))
            tau_of = partial(infer, agent.encoder, args=args)
            data = collect(env, tasks, policy, tau_of, theta, [alpha] * args.inner_steps, run.rng, args)
        run.frames += sum(int(batch.taken.sum()) for batch in data)

        # l. 11-13: every learner steps on its own tasks, and ω on all
        stats = promp_update(policy, agent, adam, learner, data, args)

        metrics = returns_by_step("train/return_step", data, tasks.cluster) | stats
        metrics |= {"policy/alpha": agent["alpha"].mean().item(), "policy/alpha_min": agent["alpha"].min().item()}
        std, adapted = policy.log_std(agent["theta"].detach()).exp(), data[-1].log_std.exp()
        metrics |= {"policy/std": std.mean().item(), "policy/std_min": std.min().item()}
        metrics |= {"policy/std_adapted": adapted.mean().item(), "policy/std_adapted_min": adapted.min().item()}
        run.log(metrics | gain_statistics(agent.encoder, data[0], args))


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
