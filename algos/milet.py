"""MILET: Meta Reinforcement Learning via Exploratory Task Clustering (ICLR 2023 submission; AAAI 2024).

Official code: github.com/zdchu/MiLEt. Written from the paper; the numbered deviations say where and why it departs.

Objective    max over θ, ω:  E[ Σ_t ELBO_t - λ_I L_I - λ_P L_P ]                                               Eq. (8)
             ELBO_t = E_q[ln p_ω(τ+|z)] - E_q(c)[KL(q_θ(z|c,τ:t) ‖ p_ω(z|c))] - KL(q_θ(c|τ:t) ‖ p(c))          Eq. (4)
Algorithm 1  l. 3-4 sample tasks, collect -> run_trial       l. 5    insert into V -> TrialBuffer.add
             l. 6   r_h and r_c -> exploration_bonus         l. 7-8  train πψ and πφ by PPO -> ppo_update
             l. 9-10 update θ, ω on a batch of V -> vae_update, elbo_loss
Algorithm 2  a trial on given tasks -> run_trial (at meta-test, evaluate calls it with test=True)

  one trial        |  exploration episode, H steps, πψ  |  exploitation episode, H steps, πφ  |  next trial
  state, done flag |  s_0, 0 ................... s_H, 1 |  s'_0, 0 .................. s'_H, 1 |  reset
  h_α, h_β, q, z   |  0 --- updated every step ---------- carried over, updated every step -> |  0

Symbols      c cluster -> y [batch, C], Gumbel-softmax sample or one-hot; z task latent [batch, latent_dim];
             h_α, h_β -> h_alpha, h_beta [batch, hidden]; q_θ(c|τ:t) -> q [batch, C]; θ -> encoder; p_tgt -> target;
             ω -> prior, reward_decoder, state_decoder; πψ, πφ -> psi, phi; H+ = 2 H, the steps of a trial

Deviations from the paper (P) or the official code (C)
  D1  P sums in Eq. (4), (5), (8); here means over terms and state dimensions, with weights kl_z_weight, kl_c_weight
      for the two KLs, as C.
  D2  P has λ_I, λ_P outside the sum over t; here inside the weighted groups, as C (else they are negligible).
  D3  C estimates KL(z) by one sample, reverses L_I (between random steps) and L_P (at a sampled y); here as P.
  D4  C starts episode 2 on the terminal state of episode 1; here on the true reset state (--keep-terminal for C's).
  D5  C loses the last reward of every episode; here a time limit bootstraps from V(terminal state).
  D6  C adds 1e-8 to both densities of PPO's ratio, which stops the gradients of improbable actions; here plain.
  D7  P has the raw reward in Eq. (12); here normalised, as C; its scale is updated once a trial (C: every step).
  D8  C takes q(c|τ:0) in r_h, r_c as uniform; here the encoder's own, as P.
  D9  C samples c at t = 0 of a test, and learns from a trial one iteration late; here argmax always, and at once.
  D10 P is silent on networks, Gumbel temperature, variance by softplus, buffer, PPO settings: here as C. P gives the
      policies z, and copies the target every 50 epochs; here mean and variance of z, and meta-iterations, as C.

Tested       python algos/milet.py --env point-goal-4c   (12-15 minutes on one core of an AMD EPYC): episode 2 about -50
             (three seeds: -42, -52, -54), standing still -280, one who knows the goal -19; NMI 1.0.
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
from itertools import pairwise, product
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import Tensor, nn
from torch.distributions import Gumbel, Normal, kl_divergence
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import envs

# == Args ==============================================================================================================


@dataclass
class Args:
    env: str = "ant-goal-4c"  # environment id (module:id imports the module first)
    seed: int = 0  # of everything random
    device: Literal["cpu", "cuda"] = "cpu"  # where the networks live
    num_threads: int = 0  # of physics and updates (0: all CPUs)
    frames: int = 50_000_000  # environment steps of the run, exploration included; learning rates anneal over them
    eval_every: int = 25  # meta-iterations between evaluations on the held-out tasks
    save_every: int = 100  # meta-iterations between checkpoints
    track: bool = False  # mirror the run to Weights & Biases
    run_dir: str = "runs"  # folder for the run's own folder
    resume: str | None = None  # run folder to continue (its args.json applies)
    evaluate: str | None = None  # run folder to evaluate without training (its args.json applies)

    num_envs: int = 16  # tasks, one copy of the environment each, per meta-iteration
    horizon: int = 100  # H, steps per episode
    clusters: int = 4  # C of the model
    exploration: bool = True  # a separate exploration policy (ablation: πφ acts in both episodes)
    stacked_gru: bool = True  # C-GRU and T-GRU (ablation: one GRU feeds both heads)
    consistency: bool = True  # the regularisers L_I and L_P (ablation: both weights 0)
    keep_terminal: bool = False  # start episode 2 on the terminal state of episode 1, as the official code (D4)

    embed: tuple[int, int, int] = (32, 16, 16)  # widths of the state, action and reward embeddings
    hidden: int = 32  # width of h_α and h_β
    latent_dim: int = 10  # dimension of z
    temperature: float = 0.8  # of the Gumbel-softmax
    reward_decoder: tuple[int, ...] = (64, 32)  # hidden layers
    state_decoder: tuple[int, ...] = ()  # hidden layers (none: no state decoder)
    lambda_s: float = 1.0  # weight of the state reconstruction, Eq. (5)
    lambda_i: float = 1.0  # λ_I, in-trial consistency, Eq. (6)
    lambda_p: float = 0.1  # λ_P, prior consistency, Eq. (7)
    kl_z_weight: float = 0.01  # of KL(q(z|c) ‖ p(z|c)) + λ_P L_P (D1)
    kl_c_weight: float = 0.001  # of KL(q(c) ‖ p(c)) + λ_I L_I (D1)
    elbo_terms: int = 100  # steps t of a trial at which ELBO_t is taken
    decodes: int = 0  # transitions decoded per ELBO term, at random (0: the whole trial)
    vae_batch: int = 50  # trials per ELBO update
    vae_updates: int = 1  # ELBO updates per meta-iteration
    lr_vae: float = 1e-3  # learning rate of θ and ω
    buffer_trials: int = 10_000  # capacity of V
    precollect: int = 5_000  # frames before the first update
    target_every: int = 50  # meta-iterations between copies of the prior into its target

    policy_embed: int = 64  # width of the policies' state and latent embeddings (0: raw concatenation)
    policy_hidden: tuple[int, ...] = (128, 64)  # hidden layers of actor and critic
    policy_init: Literal["orthogonal", "normc"] = "orthogonal"  # of those layers
    squash: bool = False  # tanh-squashed actions
    gamma: float = 0.97  # discount
    gae_lambda: float = 0.9  # λ of generalised advantage estimation
    ppo_epochs: int = 2  # passes over an episode's batch
    minibatches: int = 8  # per pass
    clip: float = 0.05  # PPO's range, of ratio and value
    value_coef: float = 0.5  # weight of the value loss
    lr_psi: float = 1e-4  # learning rate of πψ, annealed to 0
    lr_phi: float = 1e-4  # learning rate of πφ, annealed to 0
    entropy_psi: float = 1e-3  # entropy bonus of πψ
    entropy_phi: float = 1e-4  # entropy bonus of πφ


# The official code's configurations; learning rates of the policies from the paper, App. D. Ant-Goal: as above.
HUMANOID = dict(
    frames=30_000_000, hidden=128, kl_z_weight=1e-3, kl_c_weight=1e-4, elbo_terms=50, decodes=100, policy_embed=0,
    policy_hidden=(512, 256), squash=True, ppo_epochs=4, minibatches=2, clip=0.1, gamma=0.99,
)  # fmt: skip
HOPPER = dict(
    frames=10_000_000, embed=(32, 32, 32), hidden=64, reward_decoder=(256, 64), state_decoder=(256, 128),
    kl_z_weight=1e-4, kl_c_weight=1e-4, elbo_terms=50, decodes=50, policy_hidden=(128, 128), policy_init="normc",
    entropy_phi=1e-3, entropy_psi=1e-2,
)  # fmt: skip
POINT = dict(  # tuned by us
    frames=6_400_000, num_envs=64, minibatches=16, hidden=64, reward_decoder=(64, 64), kl_z_weight=3e-3,
    kl_c_weight=3e-3, elbo_terms=30, decodes=30, vae_updates=8, lr_vae=2e-3, clip=0.1, lr_psi=1e-3, lr_phi=2e-3,
)  # fmt: skip
PRESETS = {
    "humanoid-dir-4c": HUMANOID,
    "humanoid-dir-sparse-4c": HUMANOID,
    "hopper-params-4c": HOPPER,
    "walker-params-4c": HOPPER | dict(kl_z_weight=1e-3, kl_c_weight=1e-3),
    "point-goal-4c": POINT,
}

# == Networks ==========================================================================================================


class RunningStats(nn.Module):
    """Mean and variance of all rows seen so far, by the parallel update of Chan et al. (1979)."""

    def __init__(self, *shape: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(1e-4, dtype=torch.float64))

    def update(self, x: Tensor) -> None:
        x = x.double().reshape(-1, *self.mean.shape)
        n, delta, total = len(x), x.mean(0) - self.mean, self.count + len(x)
        squares = self.var * self.count + x.var(0, correction=0) * n + delta**2 * self.count * n / total
        self.mean += delta * n / total
        self.var.copy_(squares / total)
        self.count.copy_(total)

    def normalise(self, x: Tensor) -> Tensor:
        return ((x - self.mean) / (self.var + 1e-8).sqrt()).float()


def mlp(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with activations between them."""
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1])


def gaussian(mean: Tensor, raw_var: Tensor) -> Normal:
    """Diagonal; its variance is the softplus of the second argument (D10)."""
    return Normal(mean, (F.softplus(raw_var) + 1e-10).sqrt(), validate_args=False)


class Encoder(nn.Module):
    """q_θ(c | τ:t) and q_θ(z | τ:t, c): two stacked GRUs with a head on each (Figure 1)."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        state, action, reward = args.embed
        self.embed_state, self.embed_action = nn.Linear(obs_dim, state), nn.Linear(action_dim, action)
        self.embed_reward = nn.Linear(1, reward)
        self.c_gru = nn.GRU(sum(args.embed), args.hidden)
        self.t_gru = nn.GRU(sum(args.embed) + args.hidden, args.hidden) if args.stacked_gru else None
        for name, p in self.named_parameters():
            if "gru" in name:
                nn.init.orthogonal_(p) if "weight" in name else nn.init.zeros_(p)
        self.cluster_logits = mlp(args.hidden, 32, args.clusters)  # of q(c | h_α)
        self.task_head = mlp(args.hidden + args.clusters, 32, 2 * args.latent_dim)

    def forward(self, action: Tensor, reward: Tensor, next_obs: Tensor, h_alpha: Tensor, h_beta: Tensor):
        """Encode [time, batch, ·] from the hidden states [batch, hidden] -> h_alpha, h_beta [time, batch, hidden]."""
        parts = self.embed_state(next_obs), self.embed_action(action), self.embed_reward(reward[..., None])
        e = torch.cat(parts, dim=-1).relu()
        alpha, _ = self.c_gru(e, h_alpha[None])
        if self.t_gru is None:
            return alpha, alpha
        beta, _ = self.t_gru(torch.cat([e, alpha], dim=-1), h_beta[None])
        return alpha, beta

    def task(self, h_beta: Tensor, y: Tensor) -> Normal:
        """q(z | h_β, y), [..., latent_dim]."""
        return gaussian(*self.task_head(torch.cat([h_beta, y], dim=-1)).chunk(2, dim=-1))


class Prior(nn.Module):
    """p_ω(z | c), a Gaussian of every cluster."""

    def __init__(self, args: Args):
        super().__init__()
        self.mean, self.raw_var = (mlp(args.clusters, 32, args.latent_dim) for _ in range(2))

    def forward(self, y: Tensor) -> Normal:
        return gaussian(self.mean(y), self.raw_var(y))


class Decoder(nn.Module):
    """r̂(s, a, s', z), or ŝ(s, a, z). Its first layer, linear in [z, transition], is applied in these two parts."""

    def __init__(self, obs_dim: int, action_dim: int, sees_next: bool, sizes: tuple[int, ...], args: Args):
        super().__init__()
        self.latent_dim, self.sees_next = args.latent_dim, sees_next
        state, action, _ = args.embed
        self.embed_state, self.embed_action = nn.Linear(obs_dim, state), nn.Linear(action_dim, action)
        self.first = nn.Linear(args.latent_dim + (1 + sees_next) * state + action, sizes[0])
        self.rest = nn.Sequential(nn.ReLU(), *mlp(*sizes))

    def from_z(self, z: Tensor) -> Tensor:
        return F.linear(z, self.first.weight[:, : self.latent_dim])

    def from_transition(self, obs: Tensor, action: Tensor) -> Tensor:
        """obs [trial, 2, H+1, obs_dim], action [trial, 2, H, action_dim] -> [trial, H+, sizes[0]]."""
        s, a = self.embed_state(obs).relu(), self.embed_action(action).relu()
        parts = [s[:, :, 1:], a, s[:, :, :-1]] if self.sees_next else [a, s[:, :, :-1]]
        return F.linear(torch.cat(parts, -1).flatten(1, 2), self.first.weight[:, self.latent_dim :], self.first.bias)


class Policy(nn.Module):
    """π(a | s, mean and variance of q(z|c)) and its value function: tanh networks on raw states."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        latent, width = 2 * args.latent_dim, args.policy_embed
        self.stats = RunningStats(obs_dim)
        self.embed_state = nn.Sequential(nn.Linear(obs_dim, width), nn.Tanh()) if width else nn.Identity()
        self.embed_latent = nn.Sequential(nn.Linear(latent, width), nn.Tanh()) if width else nn.Identity()
        sizes = 2 * width or obs_dim + latent, *args.policy_hidden
        self.actor, self.critic = (mlp(*sizes, n, activation=nn.Tanh) for n in (action_dim, 1))
        self.log_std = nn.Parameter(torch.zeros(action_dim))
        hidden_init = nn.init.orthogonal_ if args.policy_init == "orthogonal" else normc_
        for layer in (*self.actor[:-1:2], *self.critic[:-1:2]):
            hidden_init(layer.weight, 5 / 3)
            nn.init.zeros_(layer.bias)
        normc_(self.actor[-1].weight, 1.0)
        nn.init.zeros_(self.actor[-1].bias)

    def embed(self, obs: Tensor, latent: Tensor) -> Tensor:
        return torch.cat([self.embed_state(self.stats.normalise(obs)), self.embed_latent(latent)], dim=-1)

    def mean(self, x: Tensor) -> Tensor:
        return self.actor(x)

    def value(self, x: Tensor) -> Tensor:
        return self.critic(x)[..., 0]

    def std(self) -> Tensor:
        return self.log_std.exp().clamp(min=1e-6)

    def distribution(self, x: Tensor) -> Normal:
        """Before the squashing, whose Jacobian cancels in PPO's ratio."""
        return Normal(self.mean(x), self.std(), validate_args=False)


def normc_(weight: Tensor, gain: float) -> None:
    """Gaussian rows, scaled to length gain."""
    with torch.no_grad():
        weight.copy_(gain * F.normalize(torch.randn_like(weight), dim=1))


# == Sampler ===========================================================================================================


class Belief(NamedTuple):
    """What the agent knows of its task after t transitions."""

    h_alpha: Tensor  # [env, hidden]
    h_beta: Tensor  # [env, hidden]
    q: Tensor  # q(c | τ:t) [env, C]
    latent: Tensor  # mean and variance of q(z | c, τ:t) [env, 2 latent_dim] (D10)


class Episode(NamedTuple):
    """One episode of every environment; obs, q and latent begin before the first step."""

    obs: Tensor  # [H+1, env, obs_dim], the done flag last
    action: Tensor  # [H, env, action_dim], as the environment got it
    sample: Tensor  # [H, env, action_dim], before the squashing
    reward: Tensor  # [H, env]
    q: Tensor  # [H+1, env, C]
    latent: Tensor  # [H+1, env, 2 latent_dim]


def join(a: Episode, b: Episode) -> Episode:
    """Two episodes as one of 2H steps."""
    return Episode(*(torch.cat([x[: len(a.reward)], y]) for x, y in zip(a, b)))


def start(env: gym.vector.VectorEnv, **options) -> np.ndarray:
    """Reset, and append the done flag, 0: [env, obs_dim]."""
    return np.pad(env.reset(**options)[0], ((0, 0), (0, 1)))


def infer(encoder: Encoder, h_alpha: Tensor, h_beta: Tensor, noise: Tensor | None, temperature: float) -> Belief:
    """The belief of hidden states; c is a Gumbel-softmax sample, or at test (no noise) the argmax (Algorithm 2)."""
    logits = encoder.cluster_logits(h_alpha)
    if noise is None:
        y = F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    else:
        y = ((logits + noise) / temperature).softmax(-1)
    q_z = encoder.task(h_beta, y)
    return Belief(h_alpha, h_beta, logits.softmax(-1), torch.cat([q_z.mean, q_z.variance], dim=-1))


@torch.inference_mode()
def rollout(
    env: gym.vector.VectorEnv, obs: np.ndarray, policy: Policy, encoder: Encoder, belief: Belief, args: Args, test: bool
) -> tuple[Episode, Belief]:
    """One episode of all environments in lockstep, from the first states and belief (test: mean actions, argmax c)."""
    horizon, (n, action_dim) = env.unwrapped.horizon, env.action_space.shape
    noise = policy.std() * (torch.zeros if test else torch.randn)(horizon, n, action_dim).to(args.device)
    gumbel = [None] * horizon if test else Gumbel(0.0, 1.0).sample((horizon, n, args.clusters)).to(args.device)
    states, rewards = np.zeros((horizon + 1, n, obs.shape[1]), np.float32), np.zeros((horizon, n), np.float32)
    actions, samples, beliefs = [], [], [belief]
    states[0] = obs
    for t in range(horizon):
        x = policy.embed(torch.from_numpy(states[t]).to(args.device), belief.latent)
        sample = policy.mean(x) + noise[t]
        action = sample.tanh() if args.squash else sample
        states[t + 1, :, :-1], rewards[t], *_ = env.step(action.cpu().numpy())
        states[t + 1, :, -1] = t + 1 == horizon  # the done flag
        reward, state = (torch.from_numpy(x).to(args.device)[None] for x in (rewards[t], states[t + 1]))
        h_alpha, h_beta = encoder(action[None], reward, state, belief.h_alpha, belief.h_beta)
        belief = infer(encoder, h_alpha[0], h_beta[0], gumbel[t], args.temperature)
        actions.append(action)
        samples.append(sample)
        beliefs.append(belief)
    lists = actions, samples, [b.q for b in beliefs], [b.latent for b in beliefs]
    actions, samples, q, latent = (torch.stack(x).cpu() for x in lists)
    return Episode(torch.from_numpy(states), actions, samples, torch.from_numpy(rewards), q, latent), belief


@torch.inference_mode()
def run_trial(
    env: gym.vector.VectorEnv, tasks: envs.Tasks, seed: int, agent: nn.ModuleDict, args: Args, test: bool
) -> tuple[Episode, Episode]:
    """Algorithm 2, with one exploitation episode: what πψ and then πφ do in each task, on one running belief."""
    torch.set_num_threads(1)  # torch's threads would fight with those of the physics
    encoder, zero = agent["encoder"], torch.zeros(len(tasks), args.hidden, device=args.device)
    noise = None if test else Gumbel(0.0, 1.0).sample((len(tasks), args.clusters)).to(args.device)  # D9
    belief = infer(encoder, zero, zero, noise, args.temperature)
    obs = start(env, seed=seed, options={"tasks": tasks})
    explore, belief = rollout(env, obs, agent["psi" if args.exploration else "phi"], encoder, belief, args, test)
    obs = start(env)
    obs = explore.obs[-1].numpy() if args.keep_terminal else obs  # D4
    exploit, _ = rollout(env, obs, agent["phi"], encoder, belief, args, test)
    torch.set_num_threads(args.num_threads)
    return explore, exploit


class TrialBuffer:
    """The latest trials, each of two episodes in one task."""

    def __init__(self, capacity: int, horizon: int, obs_dim: int, action_dim: int):
        shapes = {"obs": (horizon + 1, obs_dim), "action": (horizon, action_dim), "reward": (horizon,)}
        self.data = {name: torch.empty(capacity, 2, *shape) for name, shape in shapes.items()}
        self.capacity, self.added = capacity, 0

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(self, *episodes: Episode) -> None:
        rows = torch.arange(self.added, self.added + episodes[0].reward.shape[1]) % self.capacity
        for name, storage in self.data.items():
            storage[rows] = torch.stack([getattr(e, name) for e in episodes]).movedim(2, 0)
        self.added += len(rows)

    def sample(self, batch: int) -> list[Tensor]:
        """Different trials: obs [trial, 2, H+1, obs_dim], action [trial, 2, H, action_dim], reward [trial, 2, H]."""
        rows = torch.randperm(len(self))[:batch]
        return [storage[rows] for storage in self.data.values()]

    def state_dict(self) -> dict:
        full = len(self) == self.capacity  # a slice would be saved with all of its storage
        return {"added": self.added} | {k: x if full else x[: len(self)].clone() for k, x in self.data.items()}

    def load_state_dict(self, state: dict) -> None:
        self.added = state["added"]
        for name, storage in self.data.items():
            storage[: len(self)] = state[name]


# == Cluster-based variational inference ===============================================================================


class Reconstruction(torch.autograd.Function):
    """Mean squared error of decoding the transitions of each trial from each of its z, computed in chunks.

    z [trial, term, width] and x [trial, H+, width] are the two parts of the decoder's first layer, goal is
    [trial, H+, out], steps [trial, term, decode] the transitions to decode (None: all). Every chunk goes forward and
    backward while it is in cache, so that the million rows of an update never exist at once.
    """

    CHUNK = 2**18  # floats of the first activation

    @staticmethod
    def forward(ctx, rest: nn.Module, z: Tensor, x: Tensor, goal: Tensor, steps: Tensor | None, *weights: Tensor):
        decodes = x.shape[1] if steps is None else steps.shape[2]
        terms = max(1, Reconstruction.CHUNK // (decodes * z.shape[2]))
        count, error_sum = z.shape[0] * z.shape[1] * decodes * goal.shape[2], 0.0
        sums = [torch.zeros_like(v) for v in (z, x, *weights)]  # gradients
        for b, k in product(range(len(z)), range(0, z.shape[1], terms)):
            e = slice(k, k + terms)
            chosen = slice(None) if steps is None else steps[b, e]
            with torch.enable_grad():
                z_part, x_part = z[b, e].detach().requires_grad_(), x[b].detach().requires_grad_()
                error = (rest(z_part[:, None] + x_part[chosen]) - goal[b, chosen]).square().sum() / count
            grads = torch.autograd.grad(error, [z_part, x_part, *weights])
            for total, grad in zip([sums[0][b, e], sums[1][b], *sums[2:]], grads):
                total += grad
            error_sum += error.detach()
        ctx.save_for_backward(*sums)
        return error_sum

    @staticmethod
    def backward(ctx, scale: Tensor):
        z_grad, x_grad, *weight_grads = (scale * grad for grad in ctx.saved_tensors)
        return None, z_grad, x_grad, None, None, *weight_grads


def elbo_loss(agent: nn.ModuleDict, obs: Tensor, action: Tensor, reward: Tensor, args: Args) -> dict[str, Tensor]:
    """-Eq. (8), weighted as D1 and D2 say, on trials shaped as TrialBuffer.sample gives them; and its terms."""
    encoder, prior, device = agent["encoder"], agent["prior"], obs.device
    next_obs, a, r = obs[:, :, 1:].flatten(1, 2), action.flatten(1, 2), reward.flatten(1, 2)  # [trial, H+, ·]

    # h_α, h_β and ln q(c|τ:t), t = 0..H+: [H+ + 1, trial, ·]. s_0 is not encoded: t = 0 has h = 0.
    zero = torch.zeros(len(obs), args.hidden, device=device)
    h = encoder(a.transpose(0, 1), r.T, next_obs.transpose(0, 1), zero, zero)
    h_alpha, h_beta = (torch.cat([zero[None], x]) for x in h)
    log_q = encoder.cluster_logits(h_alpha).log_softmax(-1)

    # ELBO_t at random steps t of every trial, by one sample of c and one of z each (App. A): [trial, term, ·]
    t = torch.randint(len(log_q), (len(obs), args.elbo_terms)).to(device)
    trial = torch.arange(len(obs), device=device)[:, None]
    noise = Gumbel(0.0, 1.0).sample((*t.shape, args.clusters)).to(device)
    y = ((log_q[t, trial] + noise) / args.temperature).softmax(-1)
    q_z = encoder.task(h_beta[t, trial], y)
    z = q_z.mean + q_z.stddev * torch.randn(q_z.mean.shape).to(device)

    # ln p_ω(τ+|z), Eq. (5)
    steps = torch.randint(r.shape[1], (*t.shape, args.decodes)).to(device) if args.decodes else None
    errors = {"reward": torch.zeros((), device=device), "state": torch.zeros((), device=device)}
    for name, goal in (("reward", r[..., None]), ("state", next_obs)):
        if f"{name}_decoder" in agent:
            decoder = agent[f"{name}_decoder"]
            parts = decoder.from_z(z), decoder.from_transition(obs, action)
            errors[name] = Reconstruction.apply(decoder.rest, *parts, goal, steps, *decoder.rest.parameters())

    # The KLs of Eq. (4), p(c) uniform; L_I, Eq. (6), over consecutive steps; L_P, Eq. (7), over clusters (D3)
    kl_z = kl_divergence(q_z, prior(y)).sum(-1).mean()
    kl_c = math.log(args.clusters) + (log_q.exp() * log_q).sum(-1)[t, trial].mean()
    l_i = (log_q[:-1].exp() * (log_q[:-1] - log_q[1:])).sum(-1).mean(1).sum() / (len(log_q) - 2)
    every_c = torch.eye(args.clusters, device=device)
    l_p = kl_divergence(prior(every_c), agent["target"](every_c)).sum(-1).mean()

    lambda_i, lambda_p = (args.lambda_i, args.lambda_p) if args.consistency else (0.0, 0.0)
    kls = args.kl_z_weight * (kl_z + lambda_p * l_p) + args.kl_c_weight * (kl_c + lambda_i * l_i)  # D1, D2
    loss = errors["reward"] + args.lambda_s * errors["state"] + kls
    terms = dict(loss=loss, reward_error=errors["reward"], state_error=errors["state"])
    return terms | dict(kl_z=kl_z, kl_c=kl_c, l_i=l_i, l_p=l_p)


def vae_update(agent: nn.ModuleDict, optimizer: torch.optim.Optimizer, batch: list[Tensor], args: Args) -> dict:
    """One gradient step on θ and ω (Alg. 1, l. 10)."""
    terms = elbo_loss(agent, *(x.to(args.device) for x in batch), args)
    optimizer.zero_grad()
    terms["loss"].backward()
    for names in (("encoder", "prior"), ("reward_decoder",), ("state_decoder",)):
        nn.utils.clip_grad_norm_([p for name in names if name in agent for p in agent[name].parameters()], 1.0)
    optimizer.step()
    return {f"elbo/{k}": v.item() for k, v in terms.items()}


# == Exploration reward and PPO ========================================================================================


def reward_weights(t: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
    """γ_h from 0.1 to 0, γ_c from -0.1 to 0.1, Eq. (13)."""
    decay = torch.exp(-0.1 * (horizon - t))
    return 0.1 - 0.1 * decay, -0.1 + 0.2 * decay


def exploration_bonus(q: Tensor) -> tuple[Tensor, Tensor]:
    """γ_h r_h and γ_c r_c of Eq. (10)-(13), [H, env] each, from q(c|τ:t) [H+1, env, C] (D8)."""
    log_q = (q + 1e-8).log()
    entropy = -(q * log_q).sum(-1)
    r_h = entropy[:-1] - entropy[1:]  # Eq. (10)
    r_c = -(q[:-1] * (log_q[:-1] - log_q[1:])).sum(-1)  # Eq. (11)
    gamma_h, gamma_c = reward_weights(torch.arange(len(r_h))[:, None], len(r_h))
    return gamma_h * r_h, gamma_c * r_c


def discounted_sums(reward: Tensor, gamma: float) -> Tensor:
    """R_t = γ R_{t-1} + r_t from R_{-1} = 0, [T, env]."""
    sums = reward.clone()
    for t in range(1, len(sums)):
        sums[t] += gamma * sums[t - 1]
    return sums


def gae(reward: Tensor, value: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantages [T, env]; value [T+1, env] ends with that of the state at the time limit."""
    delta = reward + gamma * value[1:] - value[:-1]
    advantage, last = torch.empty_like(delta), torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        last = advantage[t] = delta[t] + gamma * lam * last
    return advantage


def value_loss(value: Tensor, old: Tensor, goal: Tensor, clip: float) -> Tensor:
    """PPO's clipped value loss, with Huber's error."""
    clipped = old + (value - old).clamp(-clip, clip)
    return 0.5 * torch.maximum(*(F.smooth_l1_loss(v, goal, reduction="none") for v in (value, clipped))).mean()


def ppo_update(
    policy: Policy, optimizer: torch.optim.Optimizer, episode: Episode, reward: Tensor, entropy_coef: float, args: Args
) -> Tensor:
    """PPO on one episode with the given rewards [T, env] -> mean policy loss, value loss, entropy [3]."""
    obs, sample, latent, reward = (x.to(args.device) for x in (episode.obs, episode.sample, episode.latent, reward))
    with torch.no_grad():
        value = policy.value(policy.embed(obs, latent))  # of the statistics that acted
        advantage = gae(reward, value, args.gamma, args.gae_lambda)  # D5
        goal = advantage + value[:-1]
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-5)
        policy.stats.update(obs[:-1])
        old = policy.distribution(policy.embed(obs[:-1], latent[:-1])).log_prob(sample).sum(-1)
    batch = [x.flatten(0, 1) for x in (obs[:-1], latent[:-1], sample, old, value[:-1], goal, advantage)]
    size, losses = reward.numel() // args.minibatches, []
    for _ in range(args.ppo_epochs):
        for rows in torch.randperm(reward.numel()).to(args.device).split(size)[: args.minibatches]:
            s, z, u, old, v, g, adv = (x[rows] for x in batch)
            x = policy.embed(s, z)
            pi = policy.distribution(x)
            ratio = (pi.log_prob(u).sum(-1) - old).exp()  # D6
            policy_loss = -torch.minimum(ratio * adv, ratio.clamp(1 - args.clip, 1 + args.clip) * adv).mean()
            critic_loss = value_loss(policy.value(x), v, g, args.clip)
            entropy = pi.entropy().sum(-1).mean()
            optimizer.zero_grad()
            (policy_loss + args.value_coef * critic_loss - entropy_coef * entropy).backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
            optimizer.step()
            losses.append(torch.stack([policy_loss, critic_loss, entropy]).detach())
    return torch.stack(losses).mean(0)


# == Evaluation ========================================================================================================


def nmi_anchors(env: envs.TaskVectorEnv, tasks: envs.Tasks, clusters: int) -> dict[str, float]:
    """The NMI of one who sees the task parameters (nearest true centre), and the mean NMI of random guesses."""
    if len(np.unique(tasks.cluster)) == 1:
        return {}
    rng = np.random.default_rng(0)
    guesses = rng.integers(clusters, size=(1000, len(tasks)))
    chance = np.mean([normalized_mutual_info_score(tasks.cluster, guess) for guess in guesses])
    ceiling = normalized_mutual_info_score(tasks.cluster, env.nearest_cluster(tasks.params))
    return {"eval/nmi_ceiling": float(ceiling), "eval/nmi_chance": float(chance)}


def returns_by_cluster(name: str, returns: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """The mean of the returns [task] and, if there are several, of every true cluster."""
    present = np.unique(clusters)
    by_cluster = {f"{name}_cluster_{m}": float(returns[clusters == m].mean()) for m in present}
    return {name: float(returns.mean())} | (by_cluster if len(present) > 1 else {})


def evaluate(env: gym.vector.VectorEnv, tasks: envs.Tasks, agent: nn.ModuleDict, args: Args) -> tuple[dict, dict]:
    """One trial of every held-out task (Algorithm 2): the metrics, and traces and beliefs for the figures."""
    explore, exploit = run_trial(env, tasks, 10**6 + args.seed, agent, args, test=True)
    metrics = {}
    for k, episode in enumerate((explore, exploit), start=1):
        returns = episode.reward.double().sum(0).numpy()
        metrics |= returns_by_cluster(f"eval/return_episode_{k}", returns, tasks.cluster)
    guess = explore.q.argmax(-1).numpy()  # [H+1, task]
    metrics["eval/belief_entropy"] = -(explore.q[-1] * (explore.q[-1] + 1e-8).log()).sum(-1).mean()
    metrics["eval/clusters_used"] = len(np.unique(guess[-1]))
    if len(np.unique(tasks.cluster)) > 1:
        metrics["eval/nmi"] = normalized_mutual_info_score(tasks.cluster, guess[-1])
        metrics["eval/nmi_step_20"] = normalized_mutual_info_score(tasks.cluster, guess[min(20, len(guess) - 1)])
        metrics["eval/ari"] = adjusted_rand_score(tasks.cluster, guess[-1])
    pairs = {k: np.stack([getattr(explore, k), getattr(exploit, k)]) for k in ("obs", "q", "latent", "reward")}
    traces = dict(params=tasks.params, cluster=tasks.cluster, trace=pairs.pop("obs")[..., :2], **pairs)
    traces["reward_weights"] = np.stack(reward_weights(torch.arange(len(guess) - 1), len(guess) - 1))  # γ_h, γ_c
    return {k: float(v) for k, v in metrics.items()}, traces


def summary(metrics: dict[str, float]) -> str:
    line = " · ".join(f"return {k} {metrics[f'eval/return_episode_{k}']:.1f}" for k in (1, 2))
    if "eval/nmi" in metrics:
        line += " · NMI {eval/nmi:.2f} (ceiling {eval/nmi_ceiling:.2f}, chance {eval/nmi_chance:.2f})".format(**metrics)
    return line


# == Run folder and checkpoint =========================================================================================

SCRIPT = Path(__file__).stem


def fail(message: str):
    raise SystemExit(f"{SCRIPT}.py: error: {message}")


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


def check_finite(agent: nn.Module, metrics: dict[str, float]) -> None:
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    bad += [name for name, p in agent.named_parameters() if not p.isfinite().all()]
    if bad:
        raise FloatingPointError(f"{bad[0]} is not finite")


# == Training ==========================================================================================================


def make_agent(obs_dim: int, action_dim: int, args: Args) -> nn.ModuleDict:
    agent = nn.ModuleDict(dict(encoder=Encoder(obs_dim, action_dim, args), prior=Prior(args), target=Prior(args)))
    agent["reward_decoder"] = Decoder(obs_dim, action_dim, True, (*args.reward_decoder, 1), args)
    if args.state_decoder:
        agent["state_decoder"] = Decoder(obs_dim, action_dim, False, (*args.state_decoder, obs_dim), args)
    for name in ("psi", "phi") if args.exploration else ("phi",):
        agent[name] = Policy(obs_dim, action_dim, args)
    agent["reward_stats"] = RunningStats()
    agent["target"].requires_grad_(False).load_state_dict(agent["prior"].state_dict())
    return agent.to(args.device)


def train(args: Args) -> None:
    args = replace(args, num_threads=args.num_threads or torch.get_num_threads())
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads)
    make_env = partial(gym.make_vec, args.env, num_threads=args.num_threads, horizon=args.horizon)
    env = make_env(num_envs=args.num_envs)
    train_tasks, test_tasks = env.unwrapped.task_set("train"), env.unwrapped.task_set("test")
    test_env = make_env(num_envs=len(test_tasks))
    obs_dim, action_dim = env.single_observation_space.shape[0] + 1, env.single_action_space.shape[0]
    frames_per_iteration = 2 * args.horizon * args.num_envs
    iterations = max(1, args.frames // frames_per_iteration)

    agent = make_agent(obs_dim, action_dim, args)
    vae = [p for name in agent if name not in ("psi", "phi", "target") for p in agent[name].parameters()]
    optimizers = {name: agent[name].parameters() for name in ("psi", "phi") if name in agent} | {"vae": vae}
    optimizers = {k: torch.optim.Adam(p, getattr(args, f"lr_{k}"), fused=True) for k, p in optimizers.items()}
    buffer = TrialBuffer(args.buffer_trials, args.horizon, obs_dim, action_dim)
    stateful, done = {"agent": agent, "buffer": buffer, **optimizers}, 0
    anchors = nmi_anchors(env.unwrapped, test_tasks, args.clusters)
    if args.evaluate:
        load_checkpoint(args.evaluate, args, {"agent": agent})
        metrics, traces = evaluate(test_env, test_tasks, agent, args)
        np.savez_compressed(Path(args.evaluate) / "eval.npz", **traces)
        print(summary(metrics | anchors), f"figures: python results/plot.py {args.evaluate}", sep="\n")
        return
    if args.resume:
        state = load_checkpoint(args.resume, args, stateful)
        done = state["iteration"]
        torch.set_rng_state(state["rng"].clone())

    name = f"{args.env.split(':')[-1]}__{SCRIPT}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run = Run(Path(args.resume or Path(args.run_dir) / name), args, done, iterations)
    run.say(f"{SCRIPT}.py · {args.env} · seed {args.seed} · {args.device}, {args.num_threads} threads")
    run.say(f"{iterations:,} meta-iterations of {frames_per_iteration:,} frames -> {run.path}")
    stop = []  # the signals received: finish the iteration, save, leave
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda received, _: stop.append(received))

    def evaluate_and_log(iteration: int) -> None:
        metrics, traces = evaluate(test_env, test_tasks, agent, args)
        metrics |= anchors
        run.log("eval", iteration, {"charts/frames": iteration * frames_per_iteration} | metrics)
        np.savez_compressed(run.path / "eval.npz", **traces)
        run.say(f"frames {iteration * frames_per_iteration:,} · {summary(metrics)}")

    def save(iteration: int) -> None:
        state = {name: part.state_dict() for name, part in stateful.items()}
        state |= dict(script=SCRIPT, env=args.env, iteration=iteration, rng=torch.get_rng_state())
        torch.save(state, run.path / "checkpoint.tmp")  # aside, then renamed: a kill leaves the last one whole
        os.replace(run.path / "checkpoint.tmp", run.path / "checkpoint.pt")

    iteration = done
    try:
        if done == 0:
            save(0)
            evaluate_and_log(0)
        for iteration in range(done + 1, iterations + 1):
            # Alg. 1, l. 3-4: a trial on each of num_envs different training tasks
            clock = [time.time()]
            tasks = train_tasks[torch.randperm(len(train_tasks))[: args.num_envs].numpy()]
            explore, exploit = run_trial(env, tasks, torch.randint(2**31, ()).item(), agent, args, test=False)
            clock.append(time.time())

            # l. 5-6: into the buffer at once (D9); exploration rewards; the scale of the rewards (D7)
            buffer.add(explore, exploit)
            bonus_h, bonus_c = exploration_bonus(explore.q)
            reward = torch.cat([explore.reward, exploit.reward])  # [H+, env]
            agent["reward_stats"].update(discounted_sums(reward, args.gamma).to(args.device))
            reward = (reward / (agent["reward_stats"].var.cpu() + 1e-8).sqrt()).clamp(-10, 10).float()
            metrics = {
                "charts/frames": iteration * frames_per_iteration,
                "train/return_episode_1": explore.reward.sum(0).mean().item(),
                "train/return_episode_2": exploit.reward.sum(0).mean().item(),
                "train/bonus_h": bonus_h.sum(0).mean().item(),
                "train/bonus_c": bonus_c.sum(0).mean().item(),
            }

            if iteration * frames_per_iteration > args.precollect:
                # l. 7-8: πψ maximises Eq. (12), πφ Eq. (1)
                batches = {"phi": (join(explore, exploit), reward)}
                if args.exploration:
                    eq12 = reward[: args.horizon] + bonus_h + bonus_c
                    batches = {"psi": (explore, eq12), "phi": (exploit, reward[args.horizon :])}
                anneal = 1 - (iteration - 1) / iterations
                for name, batch in batches.items():
                    optimizers[name].param_groups[0]["lr"] = anneal * getattr(args, f"lr_{name}")
                    losses = ppo_update(agent[name], optimizers[name], *batch, getattr(args, f"entropy_{name}"), args)
                    metrics |= zip((f"{name}/{k}" for k in ("policy_loss", "value_loss", "entropy")), losses.tolist())
                clock.append(time.time())

                # l. 9-10: θ and ω maximise Eq. (8)
                if iteration % args.target_every == 0:  # D10
                    agent["target"].load_state_dict(agent["prior"].state_dict())
                for _ in range(args.vae_updates):
                    terms = vae_update(agent, optimizers["vae"], buffer.sample(args.vae_batch), args)
                clock.append(time.time())

                metrics |= terms | {f"time/{k}": b - a for k, a, b in zip(("sample", "ppo", "elbo"), clock, clock[1:])}
                metrics["time/update"] = clock[3] - clock[1]
                metrics["charts/sps"] = frames_per_iteration / (clock[-1] - clock[0])
                check_finite(agent, metrics)
                run.log("metrics", iteration, metrics)
                run.progress(metrics)

            last = iteration == iterations
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


def check_numbers(args: Args, may_be_0: tuple[str, ...]) -> None:
    """Integers are at least 1, or 0; floats are finite."""
    for name, value in asdict(args).items():
        for v in value if isinstance(value, tuple) else [value]:
            flag, least = f"--{name.replace('_', '-')}", int(name not in may_be_0)
            if type(v) is int and not least <= v < 2**62:
                fail(f"{flag} must be at least {least}" if v < least else f"{flag} is too large")
            if type(v) is float and not math.isfinite(v):
                fail(f"{flag} must be finite")


def check_ranges(args: Args, rates: tuple[str, ...]) -> None:
    """What PPO needs."""
    if env_class(args.env).terminated is not envs.TaskVectorEnv.terminated:
        fail(f"episodes of {args.env} may end with a fall, and {SCRIPT}.py needs them to be equally long")
    for rate in rates:
        if getattr(args, rate) <= 0:
            fail(f"--{rate.replace('_', '-')} must be positive")
    if not (0 <= args.gamma <= 1 and 0 <= args.gae_lambda <= 1 and args.clip > 0):
        fail("--gamma and --gae-lambda must be in [0, 1], --clip positive")
    if args.minibatches > args.horizon * args.num_envs:
        fail("--minibatches must be at most --horizon times --num-envs")


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
    changed = [k for k, v in asdict(args).items() if k not in free and v != getattr(default, k)]
    if folder and changed:
        fail(f"--{changed[0].replace('_', '-')} cannot change on an existing run")
    env_class(args.env)
    may_be_0 = "seed", "num_threads", "decodes", "policy_embed", "precollect"
    check_numbers(args, may_be_0)
    check_ranges(args, ("lr_psi", "lr_phi", "lr_vae"))
    if not 0 < args.temperature or not args.reward_decoder:
        fail("--temperature must be positive, and --reward-decoder must name a layer")
    if args.num_envs > min(500, args.buffer_trials):
        fail("--num-envs must be at most 500 (the training tasks) and --buffer-trials")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda, but PyTorch finds no GPU")
    return args


if __name__ == "__main__":
    train(parse_args())
