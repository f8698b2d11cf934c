"""VariBAD: Variational Bayes-Adaptive Deep RL via Meta-Learning (Zintgraf et al., ICLR 2020).

Official code: github.com/lmzintgraf/varibad. Deviations are from it (C); the MILET suite has MILET's protocol.

Objective    max over ψ:     E[ Σ_t γ^t r_t ] over whole trials, by PPO, without gradient to φ
             max over φ, θ:  E[ Σ_t ELBO_t ]
             ELBO_t = E_q[ln p_θ(τ+|z)] - KL(q_φ(z|τ:t) ‖ q_φ(z|τ:t-1)),  where q_φ(z|τ:-1) is N(0, I)
Loop         collect a trial on each of some tasks -> run_trial     into the buffer -> TrialBuffer.add
             train π by PPO -> ppo_update                           train φ, θ -> vae_update, elbo_loss
             a trial on held-out tasks -> evaluate

  one trial        |  episode 1, H steps            |  episode 2, H steps             |  next trial
  state, done flag |  s_0, 0 ............... s_H, 1 |  s'_0, 0 ............. s'_H, 1  |  reset
  h                |  0 --- updated every step -----  carried over, updated on ---->  |  0
  return of π      |  --------- of both episodes together, unless --cut-episodes -->  |

Symbols      z task latent [batch, latent_dim]; h, the state of the GRU -> h [batch, hidden]; q_φ(z|τ:t) -> latent, its
             mean and log-variance [batch, 2 latent_dim]; φ -> encoder; θ -> reward_decoder, state_decoder;
             π (ψ) -> policy; H+ = 2 H, the steps of a trial

Deviations from the official code (C)
  D1  C sums over terms and decoded steps, as here, and averages that over the trials of a batch; but its KL is summed
      over the 10 trials too. Here a mean, with 10 times C's weight.
  D2  C cuts the return at the end of each episode, and loses its last reward; here the return is that of the trial,
      and the trial's time limit bootstraps from V(terminal state) (--cut-episodes for C's).
  D3  C starts episode 2 on the terminal state of episode 1; here on the true reset state (--keep-terminal for C's).
  D4  C learns from a trial one iteration late, and not at all in the first; here at once.
  D5  C collects 16 processes of several trials, or of half a trial, per update; here every copy plays one trial, and
      their number is such that an update has C's frames. So no running trial is encoded again, and unlike in C no
      trial begins with the last step of another.
  D6  C draws fresh tasks without end; here the environment's 500 training and its held-out tasks.
  D7  C's observation of cheetah-dir has 20 numbers, its velocities in cheetah-vel go to 3; here 17, and 2.
  D8  C's scale of the rewards is updated every step; here once a trial.
  D9  With --decodes K the K errors stand for all, but are not scaled up: the KL weighs H+ / K times more. So in C.

Tested       python algos/varibad.py --env point-goal-4c --num-threads 1   (3.2 million frames, 4 minutes on one core of
             an AMD EPYC, three seeds): episode 1 -57, -53, -60, episode 2 -47, -47, -47; one who knows the goal -19.
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
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
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
    frames: int = 50_000_000  # environment steps of the run
    eval_every: int = 25  # meta-iterations between evaluations on the held-out tasks
    save_every: int = 100  # meta-iterations between checkpoints
    track: bool = False  # mirror the run to Weights & Biases
    run_dir: str = "runs"  # folder for the run's own folder
    resume: str | None = None  # run folder to continue (its args.json applies)
    evaluate: str | None = None  # run folder to evaluate without training (its args.json applies)

    num_envs: int = 16  # tasks, one copy of the environment each, per meta-iteration (D5)
    horizon: int = 100  # H, steps per episode
    keep_terminal: bool = False  # start episode 2 on the terminal state of episode 1, as the official code (D3)
    cut_episodes: bool = False  # the return of episode 2 does not reach episode 1, as in the official code (D2)

    embed: tuple[int, int, int] = (32, 16, 16)  # widths of the state, action and reward embeddings
    hidden: int = 128  # width of h
    latent_dim: int = 10  # dimension of z
    reward_decoder: tuple[int, ...] = (64, 32)  # hidden layers
    state_decoder: tuple[int, ...] = ()  # hidden layers (none: no state decoder)
    lambda_s: float = 1.0  # weight of the state reconstruction
    kl_weight: float = 1.0  # of the KL (D1)
    elbo_terms: int = 0  # steps t of a trial at which ELBO_t is taken, at random (0: all)
    decodes: int = 0  # transitions decoded per ELBO term, at random (0: the whole trial; D9)
    truncate: int = 0  # steps through which the encoder's gradient goes back (0: the whole trial)
    vae_batch: int = 10  # trials per ELBO update
    vae_updates: int = 5  # ELBO updates per meta-iteration
    lr_vae: float = 1e-3  # learning rate of φ and θ
    buffer_trials: int = 10_000  # capacity of the buffer
    precollect: int = 5_000  # frames before the first update

    policy_embed: int = 64  # width of the policy's state and latent embeddings (0: raw concatenation)
    policy_hidden: tuple[int, ...] = (128, 128)  # hidden layers of actor and critic
    policy_init: Literal["orthogonal", "normc"] = "orthogonal"  # of those layers
    normalise_latent: bool = False  # the policy's q(z), by running statistics
    squash: Literal["none", "mean", "sample"] = "none"  # what of an action goes through a tanh
    gamma: float = 0.97  # discount
    gae_lambda: float = 0.9  # λ of generalised advantage estimation
    ppo_epochs: int = 2  # passes over a batch of trials
    minibatches: int = 1  # per pass
    clip: float = 0.05  # PPO's range, of ratio and value
    value_coef: float = 0.5  # weight of the value loss
    lr_policy: float = 1e-3  # learning rate of π
    anneal: bool = True  # lr_policy to 0, over the run
    entropy: float = 0.01  # entropy bonus


# The official code's configurations (D7); on MILET's suite that of the same robot, with MILET's H, frames and decoders
# (the hopper's is the walker's). Ant-Goal: as above.
HUMANOID = dict(
    frames=30_000_000, num_envs=64, elbo_terms=100, decodes=100, vae_updates=10, policy_embed=0,
    policy_hidden=(512, 256), squash="sample", ppo_epochs=4, minibatches=2, clip=0.1, lr_policy=7e-4, gamma=0.99,
    entropy=1e-3,
)  # fmt: skip
CHEETAH = dict(
    frames=100_000_000, horizon=200, latent_dim=5, elbo_terms=50, decodes=50, truncate=50, vae_updates=1,
    policy_init="normc", normalise_latent=True, clip=0.1, lr_policy=7e-4, anneal=False,
)  # fmt: skip
WALKER = dict(
    frames=10_000_000, embed=(32, 32, 32), reward_decoder=(256, 64), state_decoder=(256, 128), kl_weight=10.0,
    elbo_terms=50, decodes=50, truncate=50, vae_updates=1, policy_init="normc", normalise_latent=True, minibatches=2,
    lr_policy=7e-4, anneal=False,
)  # fmt: skip
POINT = dict(  # tuned by us
    frames=3_200_000, num_envs=64, hidden=64, reward_decoder=(64, 64), elbo_terms=30, decodes=30,
    vae_batch=50, lr_vae=2e-3, policy_hidden=(128, 64), minibatches=16, clip=0.1, lr_policy=2e-3, entropy=1e-4,
)  # fmt: skip
PRESETS = {
    "humanoid-dir-4c": HUMANOID,
    "humanoid-dir-sparse-4c": HUMANOID,
    "hopper-params-4c": WALKER,
    "walker-params-4c": WALKER,
    "cheetah-dir": CHEETAH | dict(num_envs=32, ppo_epochs=16, minibatches=4, squash="mean"),
    "cheetah-vel": CHEETAH | dict(minibatches=8),
    "point-goal-4c": POINT,
}

# == Networks ==========================================================================================================


# Copied from algos/milet.py
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


# Copied from algos/milet.py
def mlp(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with activations between them."""
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1])


class Encoder(nn.Module):
    """q_φ(z | τ:t), a GRU with a head for the mean and one for the log-variance."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        state, action, reward = args.embed
        self.embed_state, self.embed_action = nn.Linear(obs_dim, state), nn.Linear(action_dim, action)
        self.embed_reward = nn.Linear(1, reward)
        self.gru = nn.GRU(sum(args.embed), args.hidden)
        for name, p in self.gru.named_parameters():
            nn.init.orthogonal_(p) if "weight" in name else nn.init.zeros_(p)
        self.mean, self.log_var = (nn.Linear(args.hidden, args.latent_dim) for _ in range(2))

    def forward(self, action: Tensor, reward: Tensor, next_obs: Tensor, h: Tensor) -> Tensor:
        """Encode [time, batch, ·] from the hidden state [batch, hidden] -> h [time, batch, hidden]."""
        parts = self.embed_state(next_obs), self.embed_action(action), self.embed_reward(reward[..., None])
        return self.gru(torch.cat(parts, dim=-1).relu(), h[None])[0]

    def latent(self, h: Tensor) -> Tensor:
        """Mean and log-variance of q(z | h), [..., 2 latent_dim]."""
        return torch.cat([self.mean(h), self.log_var(h)], dim=-1)


def gaussian(latent: Tensor) -> Normal:
    mean, log_var = latent.chunk(2, dim=-1)
    return Normal(mean, (0.5 * log_var).exp(), validate_args=False)


# Copied from algos/milet.py
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
    """π(a | s, mean and log-variance of q(z)) and its value function: tanh networks on raw states."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        latent, width = 2 * args.latent_dim, args.policy_embed
        self.stats, self.latent_stats = RunningStats(obs_dim), RunningStats(latent) if args.normalise_latent else None
        self.squash_mean = args.squash == "mean"
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
        latent = self.latent_stats.normalise(latent) if self.latent_stats else latent
        return torch.cat([self.embed_state(self.stats.normalise(obs)), self.embed_latent(latent)], dim=-1)

    def mean(self, x: Tensor) -> Tensor:
        mean = self.actor(x)
        return mean.tanh() if self.squash_mean else mean

    def value(self, x: Tensor) -> Tensor:
        return self.critic(x)[..., 0]

    def std(self) -> Tensor:
        return self.log_std.exp().clamp(min=1e-6)

    def distribution(self, x: Tensor) -> Normal:
        """Before the squashing, whose Jacobian cancels in PPO's ratio."""
        return Normal(self.mean(x), self.std(), validate_args=False)


# Copied from algos/milet.py
def normc_(weight: Tensor, gain: float) -> None:
    """Gaussian rows, scaled to length gain."""
    with torch.no_grad():
        weight.copy_(gain * F.normalize(torch.randn_like(weight), dim=1))


# == Sampler ===========================================================================================================


class Episode(NamedTuple):
    """One episode of every environment; obs and latent begin before the first step."""

    obs: Tensor  # [H+1, env, obs_dim], the done flag last
    action: Tensor  # [H, env, action_dim], as the environment got it
    sample: Tensor  # [H, env, action_dim], before the squashing
    reward: Tensor  # [H, env]
    latent: Tensor  # [H+1, env, 2 latent_dim]


# Copied from algos/milet.py
def join(a: Episode, b: Episode) -> Episode:
    """Two episodes as one of 2H steps."""
    return Episode(*(torch.cat([x[: len(a.reward)], y]) for x, y in zip(a, b)))


# Copied from algos/milet.py
def start(env: gym.vector.VectorEnv, **options) -> np.ndarray:
    """Reset, and append the done flag, 0: [env, obs_dim]."""
    return np.pad(env.reset(**options)[0], ((0, 0), (0, 1)))


@torch.inference_mode()
def rollout(
    env: gym.vector.VectorEnv, obs: np.ndarray, policy: Policy, encoder: Encoder, h: Tensor, args: Args, test: bool
) -> tuple[Episode, Tensor]:
    """One episode of all environments in lockstep, from the first states and hidden state (test: mean actions)."""
    horizon, (n, action_dim) = env.unwrapped.horizon, env.action_space.shape
    noise = policy.std() * (torch.zeros if test else torch.randn)(horizon, n, action_dim).to(args.device)
    states, rewards = np.zeros((horizon + 1, n, obs.shape[1]), np.float32), np.zeros((horizon, n), np.float32)
    actions, samples, latents = [], [], [encoder.latent(h)]
    states[0] = obs
    for t in range(horizon):
        x = policy.embed(torch.from_numpy(states[t]).to(args.device), latents[t])
        sample = policy.mean(x) + noise[t]
        action = sample.tanh() if args.squash == "sample" else sample
        states[t + 1, :, :-1], rewards[t], *_ = env.step(action.cpu().numpy())
        states[t + 1, :, -1] = t + 1 == horizon  # the done flag
        reward, state = (torch.from_numpy(x).to(args.device)[None] for x in (rewards[t], states[t + 1]))
        h = encoder(action[None], reward, state, h)[0]
        actions.append(action)
        samples.append(sample)
        latents.append(encoder.latent(h))
    actions, samples, latents = (torch.stack(x).cpu() for x in (actions, samples, latents))
    return Episode(torch.from_numpy(states), actions, samples, torch.from_numpy(rewards), latents), h


@torch.inference_mode()
def run_trial(
    env: gym.vector.VectorEnv, tasks: envs.Tasks, seed: int, agent: nn.ModuleDict, args: Args, test: bool
) -> tuple[Episode, Episode]:
    """Two episodes in each task, on one running belief."""
    torch.set_num_threads(1)  # torch's threads would fight with those of the physics
    h = torch.zeros(len(tasks), args.hidden, device=args.device)
    obs = start(env, seed=seed, options={"tasks": tasks})
    first, h = rollout(env, obs, agent["policy"], agent["encoder"], h, args, test)
    obs = start(env)
    obs = first.obs[-1].numpy() if args.keep_terminal else obs  # D3
    second, _ = rollout(env, obs, agent["policy"], agent["encoder"], h, args, test)
    torch.set_num_threads(args.num_threads)
    return first, second


# Copied from algos/milet.py
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


# == Variational inference =============================================================================================


# Copied from algos/milet.py
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
    """-Σ_t ELBO_t, weighted, of trials shaped as TrialBuffer.sample gives them; and its terms."""
    encoder, device = agent["encoder"], obs.device
    next_obs, a, r = obs[:, :, 1:].flatten(1, 2), action.flatten(1, 2), reward.flatten(1, 2)  # [trial, H+, ·]

    # q(z|τ:t), t = 0..H+: [H+ + 1, trial, ·]. s_0 is not encoded: t = 0 has h = 0.
    # Gradients go back within pieces of `truncate` steps.
    h = [torch.zeros(1, len(obs), args.hidden, device=device)]
    for part in zip(*(x.transpose(0, 1).split(args.truncate or r.shape[1]) for x in (a, r, next_obs))):
        h.append(encoder(*part, h[-1][-1].detach()))
    latent = encoder.latent(torch.cat(h))
    before = torch.cat([torch.zeros_like(latent[:1]), latent[:-1]])  # zeros: N(0, I)
    kl_z = kl_divergence(gaussian(latent), gaussian(before)).sum(-1)  # [H+ + 1, trial]

    # ELBO_t at all or at random steps t of every trial, by one sample of z each: [trial, term, ·]
    every = torch.arange(len(latent)).expand(len(obs), -1)
    t = (torch.randint(len(latent), (len(obs), args.elbo_terms)) if args.elbo_terms else every).to(device)
    trial = torch.arange(len(obs), device=device)[:, None]
    q_z = gaussian(latent[t, trial])
    z = q_z.mean + q_z.stddev * torch.randn(q_z.mean.shape).to(device)

    # ln p_θ(τ+|z)
    steps = torch.randint(r.shape[1], (*t.shape, args.decodes)).to(device) if args.decodes else None
    errors = {"reward": torch.zeros((), device=device), "state": torch.zeros((), device=device)}
    for name, goal in (("reward", r[..., None]), ("state", next_obs)):
        if f"{name}_decoder" in agent:
            decoder = agent[f"{name}_decoder"]
            parts = decoder.from_z(z), decoder.from_transition(obs, action)
            errors[name] = Reconstruction.apply(decoder.rest, *parts, goal, steps, *decoder.rest.parameters())

    # Sums over the terms and over the decoded steps of each, means over trials and state dimensions
    kl_z = kl_z[t, trial].mean()
    decodes = args.decodes or r.shape[1]  # D9
    loss = t.shape[1] * (decodes * (errors["reward"] + args.lambda_s * errors["state"]) + args.kl_weight * kl_z)  # D1
    return dict(loss=loss, reward_error=errors["reward"], state_error=errors["state"], kl_z=kl_z)


def vae_update(agent: nn.ModuleDict, optimizer: torch.optim.Optimizer, batch: list[Tensor], args: Args) -> dict:
    """One gradient step on φ and θ."""
    terms = elbo_loss(agent, *(x.to(args.device) for x in batch), args)
    optimizer.zero_grad()
    terms["loss"].backward()
    for name in ("encoder", "reward_decoder", "state_decoder"):
        if name in agent:
            nn.utils.clip_grad_norm_(agent[name].parameters(), 1.0)
    optimizer.step()
    return {f"elbo/{k}": v.item() for k, v in terms.items()}


# == PPO ===============================================================================================================


# Copied from algos/milet.py
def discounted_sums(reward: Tensor, gamma: float) -> Tensor:
    """R_t = γ R_{t-1} + r_t from R_{-1} = 0, [T, env]."""
    sums = reward.clone()
    for t in range(1, len(sums)):
        sums[t] += gamma * sums[t - 1]
    return sums


# Copied from algos/milet.py
def gae(reward: Tensor, value: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantages [T, env]; value [T+1, env] ends with that of the state at the time limit."""
    delta = reward + gamma * value[1:] - value[:-1]
    advantage, last = torch.empty_like(delta), torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        last = advantage[t] = delta[t] + gamma * lam * last
    return advantage


def advantages(reward: Tensor, value: Tensor, args: Args) -> Tensor:
    """Of a trial, reward [H+, env], value [H+ + 1, env]; or of each episode alone, its last step left out (D2)."""
    if not args.cut_episodes:
        return gae(reward, value, args.gamma, args.gae_lambda)
    episodes = zip(reward.split(args.horizon), value[:-1].split(args.horizon))
    parts = [gae(r[:-1], v, args.gamma, args.gae_lambda) for r, v in episodes]
    return torch.cat([F.pad(part, (0, 0, 0, 1)) for part in parts])


# Copied from algos/milet.py
def value_loss(value: Tensor, old: Tensor, goal: Tensor, clip: float) -> Tensor:
    """PPO's clipped value loss, with Huber's error."""
    clipped = old + (value - old).clamp(-clip, clip)
    return 0.5 * torch.maximum(*(F.smooth_l1_loss(v, goal, reduction="none") for v in (value, clipped))).mean()


def ppo_update(policy: Policy, optimizer: torch.optim.Optimizer, trial: Episode, reward: Tensor, args: Args) -> Tensor:
    """PPO on trials, joined, with the given rewards [H+, env] -> mean policy loss, value loss, entropy [3]."""
    obs, sample, latent, reward = (x.to(args.device) for x in (trial.obs, trial.sample, trial.latent, reward))
    with torch.no_grad():
        value = policy.value(policy.embed(obs, latent))  # of the statistics that acted
        advantage = advantages(reward, value, args)
        goal = advantage + value[:-1]
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-5)
        policy.stats.update(obs[:-1])
        if policy.latent_stats:
            policy.latent_stats.update(latent[:-1])
        old = policy.distribution(policy.embed(obs[:-1], latent[:-1])).log_prob(sample).sum(-1)
    batch = [x.flatten(0, 1) for x in (obs[:-1], latent[:-1], sample, old, value[:-1], goal, advantage)]
    size, losses = reward.numel() // args.minibatches, []
    for _ in range(args.ppo_epochs):
        for rows in torch.randperm(reward.numel()).to(args.device).split(size)[: args.minibatches]:
            s, z, u, old, v, g, adv = (x[rows] for x in batch)
            x = policy.embed(s, z)
            pi = policy.distribution(x)
            ratio = (pi.log_prob(u).sum(-1) - old).exp()
            policy_loss = -torch.minimum(ratio * adv, ratio.clamp(1 - args.clip, 1 + args.clip) * adv).mean()
            critic_loss = value_loss(policy.value(x), v, g, args.clip)
            entropy = pi.entropy().sum(-1).mean()
            optimizer.zero_grad()
            (policy_loss + args.value_coef * critic_loss - args.entropy * entropy).backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
            optimizer.step()
            losses.append(torch.stack([policy_loss, critic_loss, entropy]).detach())
    return torch.stack(losses).mean(0)


# == Evaluation ========================================================================================================


# Copied from algos/milet.py
def returns_by_cluster(name: str, returns: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """The mean of the returns [task] and, if there are several, of every true cluster."""
    present = np.unique(clusters)
    by_cluster = {f"{name}_cluster_{m}": float(returns[clusters == m].mean()) for m in present}
    return {name: float(returns.mean())} | (by_cluster if len(present) > 1 else {})


def evaluate(env: gym.vector.VectorEnv, tasks: envs.Tasks, agent: nn.ModuleDict, args: Args) -> tuple[dict, dict]:
    """One trial of every held-out task: the metrics, and traces and beliefs for the figures."""
    trial = run_trial(env, tasks, 10**6 + args.seed, agent, args, test=True)
    metrics = {}
    for k, episode in enumerate(trial, start=1):
        returns = episode.reward.double().sum(0).numpy()
        metrics |= returns_by_cluster(f"eval/return_episode_{k}", returns, tasks.cluster)
        metrics[f"eval/belief_std_{k}"] = gaussian(episode.latent[-1]).stddev.mean().item()
    pairs = {k: np.stack([getattr(episode, k) for episode in trial]) for k in ("obs", "latent", "reward")}
    return metrics, dict(params=tasks.params, cluster=tasks.cluster, trace=pairs.pop("obs")[..., :2], **pairs)


def summary(metrics: dict[str, float]) -> str:
    return " · ".join(f"return {k} {metrics[f'eval/return_episode_{k}']:.1f}" for k in (1, 2))


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


def make_agent(obs_dim: int, action_dim: int, args: Args) -> nn.ModuleDict:
    agent = nn.ModuleDict(dict(encoder=Encoder(obs_dim, action_dim, args), policy=Policy(obs_dim, action_dim, args)))
    agent["reward_decoder"] = Decoder(obs_dim, action_dim, True, (*args.reward_decoder, 1), args)
    if args.state_decoder:
        agent["state_decoder"] = Decoder(obs_dim, action_dim, False, (*args.state_decoder, obs_dim), args)
    agent["reward_stats"] = RunningStats()
    return agent.to(args.device)


def train(args: Args) -> None:
    args = replace(args, num_threads=args.num_threads or torch.get_num_threads())
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads)
    make_env = partial(gym.make_vec, args.env, num_threads=args.num_threads, horizon=args.horizon)
    env = make_env(num_envs=args.num_envs)
    train_tasks, test_tasks = env.unwrapped.task_set("train"), env.unwrapped.task_set("test")  # D6
    test_env = make_env(num_envs=len(test_tasks))
    obs_dim, action_dim = env.single_observation_space.shape[0] + 1, env.single_action_space.shape[0]
    frames_per_iteration = 2 * args.horizon * args.num_envs
    iterations = max(1, args.frames // frames_per_iteration)

    agent = make_agent(obs_dim, action_dim, args)
    vae = [p for name in agent if name != "policy" for p in agent[name].parameters()]
    optimizers = {"policy": agent["policy"].parameters(), "vae": vae}
    optimizers = {k: torch.optim.Adam(p, getattr(args, f"lr_{k}"), fused=True) for k, p in optimizers.items()}
    buffer = TrialBuffer(args.buffer_trials, args.horizon, obs_dim, action_dim)
    stateful, done = {"agent": agent, "buffer": buffer, **optimizers}, 0
    if args.evaluate:
        load_checkpoint(args.evaluate, args, {"agent": agent})
        metrics, traces = evaluate(test_env, test_tasks, agent, args)
        np.savez_compressed(Path(args.evaluate) / "eval.npz", **traces)
        print(summary(metrics), f"figures: python results/plot.py {args.evaluate}", sep="\n")
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
            # a trial on each of num_envs different training tasks
            clock = [time.time()]
            tasks = train_tasks[torch.randperm(len(train_tasks))[: args.num_envs].numpy()]
            first, second = run_trial(env, tasks, torch.randint(2**31, ()).item(), agent, args, test=False)
            clock.append(time.time())

            # into the buffer at once (D4); the scale of the rewards (D8)
            buffer.add(first, second)
            reward = torch.cat([first.reward, second.reward])  # [H+, env]
            agent["reward_stats"].update(discounted_sums(reward, args.gamma).to(args.device))
            reward = (reward / (agent["reward_stats"].var.cpu() + 1e-8).sqrt()).clamp(-10, 10).float()
            metrics = {
                "charts/frames": iteration * frames_per_iteration,
                "train/return_episode_1": first.reward.sum(0).mean().item(),
                "train/return_episode_2": second.reward.sum(0).mean().item(),
            }

            if iteration * frames_per_iteration > args.precollect:
                # π maximises the return of the trial
                anneal = 1 - (iteration - 1) / iterations if args.anneal else 1.0
                optimizers["policy"].param_groups[0]["lr"] = anneal * args.lr_policy
                losses = ppo_update(agent["policy"], optimizers["policy"], join(first, second), reward, args)
                metrics |= zip(("policy/policy_loss", "policy/value_loss", "policy/entropy"), losses.tolist())
                clock.append(time.time())

                # φ and θ maximise the ELBO
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


# Copied from algos/milet.py
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
    may_be_0 = "seed", "num_threads", "elbo_terms", "decodes", "truncate", "policy_embed", "precollect"
    check_numbers(args, may_be_0)
    check_ranges(args, ("lr_policy", "lr_vae"))
    if not args.reward_decoder:
        fail("--reward-decoder must name a layer")
    if args.cut_episodes and args.horizon < 2:
        fail("--cut-episodes leaves nothing of episodes of one step")
    if args.num_envs > min(500, args.buffer_trials):
        fail("--num-envs must be at most 500 (the training tasks) and --buffer-trials")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda, but PyTorch finds no GPU")
    return args


if __name__ == "__main__":
    train(parse_args())
