"""MILET: Meta-Reinforcement Learning via Exploratory Task Clustering (Chu, Cai and Wang, AAAI 2024; ICLR 2023 subm.).

Official code: github.com/zdchu/MiLEt. Written from the paper; the numbered deviations say where and why it departs.

Objective    max over θ, ω:  E[ Σ_t ELBO_t - λ_I L_I - λ_P L_P ]                                               Eq. (8)
             ELBO_t = E_q[ln p_ω(τ+|z)] - E_q(c)[KL(q_θ(z|c,τ:t) ‖ p_ω(z|c))] - KL(q_θ(c|τ:t) ‖ p(c))          Eq. (4)
Algorithm 1  l. 3-4 sample tasks, collect -> train, run_trial  l. 5    insert into V -> TrialBuffer.add
             l. 6   r_h, r_c, Eq. (10)-(13) -> exploration_bonus  l. 7-8  πψ on Eq. (12), πφ on Eq. (1) -> ppo_update
             l. 9-10 θ, ω on a batch of V, Eq. (4)-(8) -> vae_update, elbo_loss
Algorithm 2  a trial on given tasks -> run_trial (at meta-test, evaluate calls it with test=True)

  one trial        |  exploration episode, H steps, πψ  |  exploitation episode, H steps, πφ  |  next trial
  state, done flag |  s_0, 0 ................... s_H, 1 |  s'_0, 0 .................. s'_H, 1 |  reset
  h_α, h_β (q, z)  |  0 --- updated every step ---------- carried over, updated every step -> |  0

Symbols      c cluster -> y [batch, C], Gumbel-softmax sample or one-hot; z task latent, a sample [batch, latent_dim];
             h_α, h_β -> h_alpha, h_beta [batch, hidden]; q_θ(c|τ:t) -> q [batch, C]; mean and variance of q_θ(z|c,τ:t)
             -> belief [batch, 2 latent_dim]; θ -> encoder; ω -> prior, reward_decoder, state_decoder;
             p_tgt -> target; πψ, πφ -> psi, phi; H+ = 2 H, the steps of a trial

Deviations from the paper (P) or the official code (C)
  D1  P sums in Eq. (4), (5), (8); here, as C, means over terms and dimensions, KLs weighted (kl_z_weight, kl_c_weight).
  D2  P has λ_I, λ_P outside the sum over t; here inside the weighted groups, as C (else they are negligible).
  D3  C estimates KL(z) by one sample, reverses L_I (random steps) and L_P (a sampled y), ablates L_P alone; here as P.
  D4  C starts episode 2 on the terminal state of episode 1; here on the true reset state (--keep-terminal for C's).
  D5  C drops the last reward of every episode; here V(s_H) stands for what follows (--no-exploration: V(s'_0)).
  D6  C adds 1e-8 to both densities of PPO's ratio, which stops the gradients of improbable actions; here plain.
  D7  P has the raw reward in Eq. (12); here normalised, as C; its scale is updated once a trial (C: every step).
  D8  C takes q(c|τ:0) in r_h, r_c as uniform; here the encoder's own, as P.
  D9  C samples c at t = 0 of a test, here the argmax; a trial enters V an iteration late in C, here at once.
  D10 P is silent on networks, Gumbel temperature, softplus variance, buffer, PPO and the first iteration, which only
      collects: here as C. The policies' rates are P's, and both begin at once (C: πψ one later). They see q(z), as C
      and Alg. 2 (Sec. 4.1: z); the target is copied every 50 iterations, as C (P: epochs).
  D11 C shows the policies the done flag, and states normalised without bounds, from the first PPO step on; here within
      [-10, 10], from iteration 1 on, and no flag: it is 1 only in s_H, where nobody acts (unless --keep-terminal).
  D12 Both are silent on physics that diverges; here nothing is learned from the trial, and the run ends if all diverge.
  D13 P encodes (s_t, a_t, r_t, s_t+1), and sums over all t; here, as C, no s_t: never s_0 nor s'_0; t is random.
  D14 Where all steps pay the same (πψ's bonuses always differ), C's advantages are V's errors; here V's loss counts.

Tested       python algos/milet.py --num-threads 1   (ant-goal-4c, 10 million frames, 110 minutes on one core of an AMD
             EPYC beside other runs, seed 0): episode 1 -158, episode 2 -131, NMI 0.72; standing still -261.
"""

import json
import os
import re
import signal
import sys
import time
from collections import defaultdict, deque
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
import torch.nn.functional as F
import tyro
from pydantic import TypeAdapter
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
    preset: Literal["paper", "fast"] | None = None  # published, or ours, of about an hour (default where there is one)
    seed: int = 0  # seed of everything random
    device: Literal["cpu", "cuda"] = "cpu"  # device of the networks
    num_threads: int = 0  # number of threads of the physics and of the updates (0: all CPUs)
    frames: int = 50_000_000  # number of environment steps of the run, exploration included
    eval_every: int = 25  # meta-iterations between evaluations on the held-out tasks
    save_every: int = 100  # meta-iterations between checkpoints
    track: bool = False  # mirror the run to Weights & Biases
    run_dir: str = "runs"  # folder in which the run gets its own folder
    name: str | None = None  # name of the run's folder (if it exists, its run is continued; default: with the time)
    resume: str | None = None  # run folder to continue (its args.json applies)
    evaluate: str | None = None  # run folder to evaluate without training (its args.json applies)

    num_envs: int = 16  # number of tasks, one copy of the environment each, per meta-iteration
    horizon: int = 100  # number of steps per episode, H (default: the environment's own)
    clusters: int = 4  # number of clusters of the model, C
    exploration: bool = True  # a separate exploration policy (ablation: πφ acts in both episodes)
    stacked_gru: bool = True  # two GRUs, C-GRU and T-GRU (ablation: one GRU feeds both heads)
    consistency: bool = True  # the regularisers L_I and L_P (ablation: both weights 0)
    r_h: bool = True  # pay πψ for a more certain cluster, Eq. (10) (not used with --no-exploration)
    r_c: bool = True  # pay πψ for a change of cluster, later for keeping it, Eq. (11) (not used with --no-exploration)
    keep_terminal: bool = False  # start episode 2 on the terminal state of episode 1, as the official code (D4)

    embed: tuple[int, int, int] = (32, 16, 16)  # widths of the state, action and reward embeddings
    hidden: int = 32  # width of the hidden states h_α and h_β
    latent_dim: int = 10  # dimension of the task latent z
    temperature: float = 0.8  # temperature of the Gumbel-softmax
    reward_decoder: tuple[int, ...] = (64, 32)  # widths of the hidden layers of the reward decoder
    state_decoder: tuple[int, ...] = ()  # widths of the hidden layers of the state decoder (none: no such decoder)
    lambda_s: float = 1.0  # weight of the state reconstruction, λ_s of Eq. (5) (not used without a state decoder)
    lambda_i: float = 1.0  # weight of the in-trial consistency, λ_I, Eq. (6) (not used with --no-consistency)
    lambda_p: float = 0.1  # weight of the prior consistency, λ_P, Eq. (7) (not used with --no-consistency)
    kl_z_weight: float = 0.01  # weight of KL(q(z|c) ‖ p(z|c)) + λ_P L_P (D1)
    kl_c_weight: float = 0.001  # weight of KL(q(c) ‖ p(c)) + λ_I L_I (D1)
    elbo_terms: int = 100  # number of steps t of a trial at which ELBO_t is taken, at random
    decodes: int = 0  # number of transitions decoded per ELBO term, at random (0: the whole trial)
    vae_batch: int = 50  # number of trials per ELBO update
    vae_updates: int = 1  # number of ELBO updates per meta-iteration
    lr_vae: float = 1e-3  # learning rate of θ and ω
    buffer_trials: int = 10_000  # number of trials that the buffer V holds
    target_every: int = 50  # meta-iterations between copies of the prior into p_tgt (not used with --no-consistency)

    policy_embed: int = 64  # width of the policies' embeddings of state and belief (0: raw concatenation)
    policy_hidden: tuple[int, ...] = (128, 64)  # widths of the hidden layers of actor and critic
    policy_init: Literal["orthogonal", "normc"] = "orthogonal"  # initialisation of those layers
    squash: Literal["none", "mean", "sample"] = "none"  # what of an action goes through a tanh
    init_std: float = 1.0  # standard deviation of the actions before training
    gamma: float = 0.97  # discount factor
    gae_lambda: float = 0.9  # λ of generalised advantage estimation
    ppo_epochs: int = 2  # number of passes over an episode's batch
    minibatches: int = 8  # number of minibatches per pass
    clip: float = 0.05  # range of PPO's clipping, of ratio and value
    value_coef: float = 0.5  # weight of the value loss
    lr_psi: float = 1e-4  # learning rate of πψ (not used with --no-exploration)
    lr_phi: float = 1e-4  # learning rate of πφ
    anneal: bool = True  # let both rates fall to 0 over the run, linearly in the frames
    anneal_vae: bool = False  # let lr_vae fall to 0 with them, so that the belief rests when its readers do
    entropy_psi: float = 1e-3  # weight of the entropy bonus of πψ (not used with --no-exploration)
    entropy_phi: float = 1e-4  # weight of the entropy bonus of πφ


# The official code's configurations; learning rates of the policies from the paper, App. D. Ant-Goal: as above.
HUMANOID = dict(
    frames=30_000_000, hidden=128, kl_z_weight=1e-3, kl_c_weight=1e-4, elbo_terms=50, decodes=100, policy_embed=0,
    policy_hidden=(512, 256), squash="sample", ppo_epochs=4, minibatches=2, clip=0.1, gamma=0.99,
)  # fmt: skip
HOPPER = dict(
    frames=10_000_000, embed=(32, 32, 32), hidden=64, reward_decoder=(256, 64), state_decoder=(256, 128),
    kl_z_weight=1e-4, kl_c_weight=1e-4, elbo_terms=50, decodes=50, policy_hidden=(128, 128), policy_init="normc",
    entropy_phi=1e-3, entropy_psi=1e-2,
)  # fmt: skip
PAPER = {
    **dict.fromkeys(("humanoid-dir-4c", "humanoid-dir-sparse-4c"), HUMANOID),
    "hopper-params-4c": HOPPER,
    "walker-params-4c": HOPPER | dict(kl_z_weight=1e-3, kl_c_weight=1e-3),
}
FAST = {  # tuned by us
    "ant-goal-4c": dict(
        frames=10_000_000, num_envs=32, hidden=64, kl_z_weight=3e-3, kl_c_weight=3e-3, elbo_terms=30, decodes=30,
        vae_updates=5, lr_vae=2e-3, gae_lambda=0.95, ppo_epochs=4, clip=0.1, lr_psi=5e-4, lr_phi=5e-4, init_std=0.4,
    ),
    "point-goal-4c": dict(
        frames=3_200_000, num_envs=64, hidden=64, reward_decoder=(64, 64), kl_z_weight=3e-3, kl_c_weight=3e-3,
        elbo_terms=30, decodes=30, vae_updates=8, lr_vae=2e-3, minibatches=16, clip=0.1, lr_psi=1e-3, lr_phi=2e-3,
    ),
}  # fmt: skip
FAST |= dict.fromkeys(("ant-goal-partial-4c", "ant-goal-u"), FAST["ant-goal-4c"])
FAST["humanoid-dir-4c"] = FAST["ant-goal-4c"] | dict(frames=2_000_000, vae_updates=3, gamma=0.99)
FAST |= dict.fromkeys(("hopper-params-4c", "walker-params-4c"), HOPPER | FAST["ant-goal-4c"] | dict(
    frames=2_500_000, reward_decoder=(64, 64), state_decoder=(128, 64), kl_z_weight=1e-2, kl_c_weight=1e-2,
    elbo_terms=20, decodes=20, vae_updates=3, init_std=0.5,
))  # fmt: skip
FAST["point-goal-sparse"] = FAST["point-goal-4c"] | dict(frames=1_400_000, horizon=32)
MAY_BE_0 = "seed", "num_threads", "decodes", "policy_embed"


def check(args: Args, env: type[envs.TaskVectorEnv]) -> dict[str, bool]:
    """What must hold; where it does not, the message is the error."""
    batch = args.horizon * args.num_envs  # steps of one episode in all environments
    same_length, most = env.terminated is envs.TaskVectorEnv.terminated, min(500, args.buffer_trials)
    return {
        f"{args.env} may end an episode early, and this algorithm needs episodes of equal length": same_length,
        f"--frames must be at least {4 * batch} (the first meta-iteration only collects)": args.frames >= 4 * batch,
        "--num-envs must be at most 500 (the training tasks) and --buffer-trials": args.num_envs <= most,
        "--minibatches must be at most --horizon times --num-envs": args.minibatches <= batch,
        "--reward-decoder must name a layer": len(args.reward_decoder) > 0,
        "--gamma and --gae-lambda must be in [0, 1]": 0 <= args.gamma <= 1 and 0 <= args.gae_lambda <= 1,
        "--clip, --temperature and --init-std must be positive": min(args.clip, args.temperature, args.init_std) > 0,
        "--lr-psi, --lr-phi and --lr-vae must be positive": min(args.lr_psi, args.lr_phi, args.lr_vae) > 0,
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
        self.mean, self.var, self.count = self.mean + delta * n / total, squares / total, total

    def normalise(self, x: Tensor) -> Tensor:
        return ((x - self.mean) / (self.var + 1e-8).sqrt()).clamp(-10, 10).float()


def mlp(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with activations between them."""
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1])


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
        mean, raw_var = self.task_head(torch.cat([h_beta, y], dim=-1)).chunk(2, dim=-1)
        return Normal(mean, (F.softplus(raw_var) + 1e-10).sqrt(), validate_args=False)  # D10


class Prior(nn.Module):
    """p_ω(z | c), a Gaussian of every cluster."""

    def __init__(self, args: Args):
        super().__init__()
        self.mean, self.raw_var = (mlp(args.clusters, 32, args.latent_dim) for _ in range(2))

    def forward(self, y: Tensor) -> Normal:
        return Normal(self.mean(y), (F.softplus(self.raw_var(y)) + 1e-10).sqrt(), validate_args=False)


class Decoder(nn.Module):
    """r̂(s, a, s', z), or ŝ(s, a, z). The first layer, linear, is in two parts: faster if all steps are decoded."""

    def __init__(self, obs_dim: int, action_dim: int, sees_next: bool, sizes: tuple[int, ...], args: Args):
        super().__init__()
        self.sees_next, (state, action, _) = sees_next, args.embed
        self.embed_state, self.embed_action = nn.Linear(obs_dim, state), nn.Linear(action_dim, action)
        self.first = nn.Linear(args.latent_dim + (1 + sees_next) * state + action, sizes[0])
        self.rest = nn.Sequential(nn.ReLU(), *mlp(*sizes))

    def parts(self, z: Tensor, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """z [trial, term, latent_dim], obs [trial, 2, H+1, ·], action [trial, 2, H, ·] -> [trial, term or H+, ·]."""
        s, a = self.embed_state(obs).relu(), self.embed_action(action).relu()
        x = torch.cat([s[:, :, 1:], a, s[:, :, :-1]] if self.sees_next else [a, s[:, :, :-1]], dim=-1).flatten(1, 2)
        of_z, of_x = self.first.weight.split([z.shape[-1], x.shape[-1]], dim=1)
        return F.linear(z, of_z), F.linear(x, of_x, self.first.bias)

    def error(self, z: Tensor, obs: Tensor, action: Tensor, truth: Tensor, steps: Tensor | list[slice]) -> Tensor:
        """Eq. (5), mean over all z and steps t, [trial, term, decode] or all; a trial at a time: it stays in cache."""
        of_z, of_x = self.parts(z, obs, action)
        errors = [(self.rest(of_z[i][:, None] + of_x[i][t]) - truth[i][t]).square().mean() for i, t in enumerate(steps)]
        return torch.stack(errors).mean()


class Policy(nn.Module):
    """π(a | s, mean and variance of q(z|c)) and its value function: tanh networks on normalised states."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        state_dim, belief_dim, width = obs_dim - 1, 2 * args.latent_dim, args.policy_embed  # no done flag (D11)
        self.stats, self.squash_mean = RunningStats(state_dim), args.squash == "mean"
        self.embed_state = nn.Sequential(nn.Linear(state_dim, width), nn.Tanh()) if width else nn.Identity()
        self.embed_belief = nn.Sequential(nn.Linear(belief_dim, width), nn.Tanh()) if width else nn.Identity()
        input_dim = 2 * width if width else state_dim + belief_dim
        self.actor, self.critic = (mlp(input_dim, *args.policy_hidden, n, activation=nn.Tanh) for n in (action_dim, 1))
        self.log_std = nn.Parameter(torch.full((action_dim,), args.init_std).log())
        hidden_init = nn.init.orthogonal_ if args.policy_init == "orthogonal" else normc_
        for layer in (*self.actor[:-1:2], *self.critic[:-1:2]):
            hidden_init(layer.weight, 5 / 3)
            nn.init.zeros_(layer.bias)
        normc_(self.actor[-1].weight, 1.0)
        nn.init.zeros_(self.actor[-1].bias)

    def forward(self, obs: Tensor, belief: Tensor) -> tuple[Normal, Tensor]:
        """π before the squashing of a sample, whose Jacobian cancels in PPO's ratio; and V, [...]."""
        state = self.stats.normalise(obs[..., :-1])  # D11
        x = torch.cat([self.embed_state(state), self.embed_belief(belief)], dim=-1)
        mean = self.actor(x).tanh() if self.squash_mean else self.actor(x)
        return Normal(mean, self.log_std.exp().clamp(min=1e-6), validate_args=False), self.critic(x)[..., 0]


def normc_(weight: Tensor, gain: float) -> None:
    """Gaussian rows, scaled to length gain."""
    weight.data = gain * F.normalize(torch.randn_like(weight), dim=1)


# == Sampler ===========================================================================================================


class Episode(NamedTuple):
    """One episode of every environment; obs, q and belief begin before its first step."""

    obs: Tensor  # [H+1, env, obs_dim], the done flag last
    action: Tensor  # [H, env, action_dim], as the environment got it
    sample: Tensor  # [H, env, action_dim], before the squashing
    reward: Tensor  # [H, env]
    q: Tensor  # [H+1, env, C], q(c | τ:t)
    belief: Tensor  # [H+1, env, 2 latent_dim], mean and variance of q(z | c, τ:t) (D10)


def infer(encoder: Encoder, h_alpha: Tensor, h_beta: Tensor, gumbel: Tensor | None, temperature: float) -> tuple:
    """q(c) and belief of hidden states; c is a Gumbel-softmax sample, at test (no noise) the argmax (Algorithm 2)."""
    logits = encoder.cluster_logits(h_alpha)
    one_hot = F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    y = one_hot if gumbel is None else ((logits + gumbel) / temperature).softmax(-1)
    q_z = encoder.task(h_beta, y)
    return logits.softmax(-1), torch.cat([q_z.mean, q_z.variance], dim=-1)


@torch.inference_mode()
def rollout(
    env: gym.vector.VectorEnv, obs: np.ndarray, policy: Policy, encoder: Encoder, memory: tuple, args: Args, test: bool
) -> tuple[Episode, tuple]:
    """One episode of all environments in lockstep; memory: h_α, h_β, q, belief; test: mean actions, argmax c."""
    horizon, (n, action_dim) = env.unwrapped.horizon, env.action_space.shape
    noise = (torch.zeros if test else torch.randn)(horizon, n, action_dim).to(args.device)
    gumbel = [None] * horizon if test else Gumbel(0.0, 1.0).sample((horizon, n, args.clusters)).to(args.device)
    states, rewards = np.zeros((horizon + 1, n, obs.shape[1]), np.float32), np.zeros((horizon, n), np.float32)
    h_alpha, h_beta, q, belief = memory
    states[0], actions, samples, qs, beliefs = obs, [], [], [q], [belief]
    for t in range(horizon):
        pi, _ = policy(torch.from_numpy(states[t]).to(args.device), belief)
        sample = pi.mean + pi.stddev * noise[t]
        action = sample.tanh() if args.squash == "sample" else sample
        states[t + 1, :, :-1], rewards[t], *_ = env.step(action.cpu().numpy())
        states[t + 1, :, -1] = t + 1 == horizon  # the done flag
        reward, state = (torch.from_numpy(x).to(args.device)[None] for x in (rewards[t], states[t + 1]))
        h_alpha, h_beta = (h[0] for h in encoder(action[None], reward, state, h_alpha, h_beta))
        q, belief = infer(encoder, h_alpha, h_beta, gumbel[t], args.temperature)
        for kept, x in zip((actions, samples, qs, beliefs), (action, sample, q, belief)):
            kept.append(x)
    actions, samples, qs, beliefs = (torch.stack(kept).cpu() for kept in (actions, samples, qs, beliefs))
    episode = Episode(torch.from_numpy(states), actions, samples, torch.from_numpy(rewards), qs, beliefs)
    return episode, (h_alpha, h_beta, q, belief)


@torch.inference_mode()
def run_trial(
    env: gym.vector.VectorEnv, tasks: envs.Tasks, seed: int, agent: nn.ModuleDict, args: Args, test: bool
) -> tuple[Episode, Episode]:
    """Algorithm 2, with one exploitation episode: what πψ and then πφ do in each task, with one memory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's threads would fight with those of the physics
    encoder, zero = agent["encoder"], torch.zeros(len(tasks), args.hidden, device=args.device)
    gumbel = None if test else Gumbel(0.0, 1.0).sample((len(tasks), args.clusters)).to(args.device)  # D9
    memory = zero, zero, *infer(encoder, zero, zero, gumbel, args.temperature)
    with_flag = partial(np.pad, pad_width=((0, 0), (0, 1)))  # appends the done flag, 0, to every state
    obs = with_flag(env.reset(seed=seed, options={"tasks": tasks})[0])
    explore, memory = rollout(env, obs, agent["psi" if args.exploration else "phi"], encoder, memory, args, test)
    fine = ~env.unwrapped.broke  # [env], before the reset clears it (D12)
    start = with_flag(env.reset()[0])
    obs = explore.obs[-1].numpy() if args.keep_terminal else start  # D4
    exploit, _ = rollout(env, obs, agent["phi"], encoder, memory, args, test)
    torch.set_num_threads(threads)
    keep = (fine & ~env.unwrapped.broke) | test  # D12; in a test every task keeps its row
    if not keep.any():
        raise FloatingPointError("the physics diverged in all trials")
    return tuple(Episode(*(x[:, keep] for x in episode)) for episode in (explore, exploit))


class TrialBuffer:
    """The latest trials: of each obs [2, H+1, obs_dim], action [2, H, action_dim] and reward [2, H]."""

    def __init__(self, capacity: int):
        self.trials = deque(maxlen=capacity)

    def add(self, *episodes: Episode) -> None:
        pairs = zip(*((e.obs, e.action, e.reward) for e in episodes))
        self.trials.extend(zip(*(torch.stack(pair).movedim(2, 0).contiguous() for pair in pairs)))  # [env, 2, T, ·]

    def sample(self, batch: int) -> list[Tensor]:
        """Different trials, stacked."""
        rows = torch.randperm(len(self.trials))[:batch].tolist()
        return [torch.stack(part) for part in zip(*(self.trials[row] for row in rows))]

    def state_dict(self) -> dict:
        return {"trials": [torch.stack(part) for part in zip(*self.trials)]}

    def load_state_dict(self, state: dict) -> None:
        self.trials.extend(zip(*(part.clone() for part in state["trials"])))  # copies: these are views of a file


# == Cluster-based variational inference ===============================================================================


def elbo_loss(agent: nn.ModuleDict, obs: Tensor, action: Tensor, reward: Tensor, args: Args) -> dict[str, Tensor]:
    """-Eq. (8), weighted as D1 and D2 say, on trials shaped as TrialBuffer.sample gives them; and its terms."""
    encoder, prior, device = agent["encoder"], agent["prior"], obs.device
    next_obs, a, r = obs[:, :, 1:].flatten(1, 2), action.flatten(1, 2), reward.flatten(1, 2)  # [trial, H+, ·]

    # h_α, h_β and ln q(c|τ:t), t = 0..H+: [H+ + 1, trial, ·]. s_0 is not encoded (D13): t = 0 has h = 0.
    zero = torch.zeros(len(obs), args.hidden, device=device)
    h = encoder(a.transpose(0, 1), r.T, next_obs.transpose(0, 1), zero, zero)
    h_alpha, h_beta = (torch.cat([zero[None], x]) for x in h)
    log_q = encoder.cluster_logits(h_alpha).log_softmax(-1)

    # ELBO_t at random steps t of every trial (D13), by one sample of c and one of z each (App. A): [trial, term, ·]
    t = torch.randint(len(log_q), (len(obs), args.elbo_terms)).to(device)
    row = torch.arange(len(obs), device=device)[:, None]
    gumbel = Gumbel(0.0, 1.0).sample((*t.shape, args.clusters)).to(device)
    y = ((log_q[t, row] + gumbel) / args.temperature).softmax(-1)
    q_z = encoder.task(h_beta[t, row], y)
    z = q_z.mean + q_z.stddev * torch.randn(q_z.mean.shape).to(device)

    # ln p_ω(τ+|z), Eq. (5), at args.decodes random steps of the trial (0: at all)
    steps = torch.randint(r.shape[1], (*t.shape, args.decodes)).to(device) if args.decodes else [slice(None)] * len(t)
    reward_error = agent["reward_decoder"].error(z, obs, action, r[..., None], steps)
    state_error = torch.zeros((), device=device)
    if "state_decoder" in agent:
        state_error = agent["state_decoder"].error(z, obs, action, next_obs, steps)

    # The KLs of Eq. (4), p(c) uniform; L_I, Eq. (6), over consecutive steps; L_P, Eq. (7), over clusters (D3)
    kl_z = kl_divergence(q_z, prior(y)).sum(-1).mean()
    kl_c = np.log(args.clusters) + (log_q.exp() * log_q).sum(-1)[t, row].mean()
    kl_next = (log_q[:-1].exp() * (log_q[:-1] - log_q[1:])).sum(-1)  # [H+, trial]
    l_i = kl_next.sum(0).mean() / (len(kl_next) - 1)  # the paper's 1 / (H+ - 1), of H+ terms
    every_c = torch.eye(args.clusters, device=device)
    l_p = kl_divergence(prior(every_c), agent["target"](every_c)).sum(-1).mean()

    lambda_i, lambda_p = (args.lambda_i, args.lambda_p) if args.consistency else (0.0, 0.0)
    kls = args.kl_z_weight * (kl_z + lambda_p * l_p) + args.kl_c_weight * (kl_c + lambda_i * l_i)  # D1, D2
    loss = reward_error + args.lambda_s * state_error + kls
    return dict(loss=loss, reward_error=reward_error, state_error=state_error, kl_z=kl_z, kl_c=kl_c, l_i=l_i, l_p=l_p)


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
    """γ_h = b_h - a_h exp(-s (H - t)), from 0.1 towards 0, γ_c = -b_c + a_c exp(-s (H - t)), from -0.1 towards 0.1."""
    a_h, b_h, a_c, b_c, s = 0.1, 0.1, 0.2, 0.1, 0.1
    decay = torch.exp(-s * (horizon - t))
    return b_h - a_h * decay, -b_c + a_c * decay  # Eq. (13)


def exploration_bonus(q: Tensor) -> tuple[Tensor, Tensor]:
    """γ_h r_h and γ_c r_c of Eq. (10)-(13), [H, env] each, from q(c|τ:t) [H+1, env, C] (D8)."""
    log_q = (q + 1e-8).log()
    r_h = (q * log_q).sum(-1).diff(dim=0)  # Eq. (10), the fall of the entropy -Σ q ln q
    r_c = -(q[:-1] * (log_q[:-1] - log_q[1:])).sum(-1)  # Eq. (11)
    gamma_h, gamma_c = reward_weights(torch.arange(len(r_h))[:, None], len(r_h))
    return gamma_h * r_h, gamma_c * r_c


def scale_rewards(stats: RunningStats, reward: Tensor, gamma: float) -> Tensor:
    """[T, env], by the running deviation of R_t = γ R_{t-1} + r_t, R_{-1} = 0, the discounted sums."""
    sums = reward.clone()
    for t in range(1, len(sums)):
        sums[t] += gamma * sums[t - 1]
    stats.update(sums.to(stats.var.device))
    return (reward / (stats.var.cpu() + 1e-8).sqrt()).clamp(-10, 10).float()


def gae(reward: Tensor, value: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantages [T, env]; value [T+1, env] ends with that of the state at the time limit."""
    delta = reward + gamma * value[1:] - value[:-1]
    advantage, last = torch.empty_like(delta), torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        last = advantage[t] = delta[t] + gamma * lam * last
    return advantage


def ppo_update(
    policy: Policy, optimizer: torch.optim.Optimizer, episode: Episode, reward: Tensor, entropy_coef: float, args: Args
) -> dict[str, float]:
    """PPO on an episode, or a whole trial, of rewards [T, env] -> its diagnostics, means over the minibatches."""
    obs, sample, belief, reward = (x.to(args.device) for x in (episode.obs, episode.sample, episode.belief, reward))
    with torch.no_grad():
        _, value = policy(obs, belief)  # [T+1, env], of the statistics that acted
        advantage = gae(reward, value, args.gamma, args.gae_lambda)  # D5
        returns = advantage + value[:-1]
        explained_variance = 1 - (returns - value[:-1]).var() / (returns.var() + 1e-8)
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-5)
        policy.stats.update(obs[:-1, :, :-1])  # D11
        old = policy(obs[:-1], belief[:-1])[0].log_prob(sample).sum(-1)
    batch = [x.flatten(0, 1) for x in (obs[:-1], belief[:-1], sample, old, value[:-1], returns, advantage)]
    size, paid, diagnostics = max(1, reward.numel() // args.minibatches), bool(reward.min() < reward.max()), []
    for _ in range(args.ppo_epochs):
        for rows in torch.randperm(reward.numel()).to(args.device).split(size)[: args.minibatches]:  # no remainder
            state, b, u, old_log_prob, old_value, target, adv = (x[rows] for x in batch)
            pi, value = policy(state, b)
            log_ratio = pi.log_prob(u).sum(-1) - old_log_prob
            ratio = log_ratio.exp()  # D6
            policy_loss = -torch.minimum(ratio * adv, ratio.clamp(1 - args.clip, 1 + args.clip) * adv).mean()
            clipped_value = old_value + (value - old_value).clamp(-args.clip, args.clip)
            huber = [F.smooth_l1_loss(v, target, reduction="none") for v in (value, clipped_value)]
            critic_loss = 0.5 * torch.maximum(*huber).mean()
            entropy = pi.entropy().sum(-1).mean()
            loss = policy_loss + args.value_coef * critic_loss - entropy_coef * entropy
            optimizer.zero_grad()
            (loss if paid else critic_loss).backward()  # D14
            nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
            optimizer.step()
            approx_kl, clip_fraction = (ratio - 1 - log_ratio).mean(), ((ratio - 1).abs() > args.clip).float().mean()
            diagnostics.append(torch.stack([policy_loss, critic_loss, entropy, approx_kl, clip_fraction]).detach())
    names = "policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction"
    return dict(zip(names, torch.stack(diagnostics).mean(0).tolist()), explained_variance=explained_variance.item())


# == Evaluation ========================================================================================================


def returns_by_cluster(name: str, returns: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """The mean of the returns [task] and, if there are several, of every true cluster."""
    present = np.unique(clusters)
    by_cluster = {f"{name}_cluster_{m}": float(returns[clusters == m].mean()) for m in present}
    return {name: float(returns.mean())} | (by_cluster if len(present) > 1 else {})


def evaluate(env: gym.vector.VectorEnv, tasks: envs.Tasks, agent: nn.ModuleDict, args: Args) -> tuple[dict, dict]:
    """One trial of every held-out task (Algorithm 2): the metrics, and the arrays of eval.npz."""
    explore, exploit = run_trial(env, tasks, seed := 10**6 + 1000 * args.seed, agent, args, test=True)
    guess, metrics = explore.q.argmax(-1).numpy(), {}  # [H+1, task]
    for k, episode in enumerate((explore, exploit), start=1):
        returns = episode.reward.double().sum(0).numpy()
        metrics |= returns_by_cluster(f"eval/return_episode_{k}", returns, tasks.cluster)
    metrics["eval/belief_entropy"] = -(explore.q[-1] * (explore.q[-1] + 1e-8).log()).sum(-1).mean()
    metrics["eval/clusters_used"] = len(np.unique(guess[-1]))
    if len(np.unique(tasks.cluster)) > 1:
        nmi = partial(normalized_mutual_info_score, tasks.cluster)
        metrics["eval/nmi"], metrics["eval/nmi_step_20"] = nmi(guess[-1]), nmi(guess[min(20, len(guess) - 1)])
        metrics["eval/ari"] = adjusted_rand_score(tasks.cluster, guess[-1])
        metrics["eval/nmi_by_parameters"] = nmi(env.unwrapped.nearest_cluster(tasks.params))  # who sees the parameters
    both = Episode(*(torch.stack(pair).numpy() for pair in zip(explore, exploit)))  # [episode, ...] each
    mean, var = np.split(both.belief, 2, axis=-1)  # [episode, H+1, task, latent_dim]
    arrays = dict(params=tasks.params, cluster=tasks.cluster, seed=seed, embedding=mean[0, -1])
    arrays |= dict(trace=both.obs[..., :-1][..., :2], action=both.action, reward=both.reward)  # no done flag
    arrays |= dict(cluster_belief=both.q, belief_mean=mean, belief_std=np.sqrt(var))
    arrays |= dict(reward_weights=torch.stack(reward_weights(torch.arange(args.horizon), args.horizon)).numpy())
    return {k: float(v) for k, v in metrics.items()}, arrays


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


def train(args: Args, run: "Run") -> None:
    """Algorithm 1."""
    env = run.make_env(args.num_envs)
    train_tasks, test_tasks = env.unwrapped.task_set("train"), env.unwrapped.task_set("test")
    test_env = run.make_env(len(test_tasks))
    obs_dim, action_dim = env.single_observation_space.shape[0] + 1, env.single_action_space.shape[0]
    frames_per_iteration = 2 * args.horizon * args.num_envs
    iterations = args.frames // frames_per_iteration

    agent = make_agent(obs_dim, action_dim, args)
    trained = {name: [*agent[name].parameters()] for name in ("psi", "phi") if name in agent}
    trained["vae"] = [p for name in agent if name not in ("psi", "phi", "target") for p in agent[name].parameters()]
    rates = dict(psi=args.lr_psi, phi=args.lr_phi, vae=args.lr_vae)
    adam = {name: torch.optim.Adam(ps, rates[name], fused=True) for name, ps in trained.items()}
    buffer = TrialBuffer(args.buffer_trials)
    state = dict(agent=agent, buffer=buffer, **{f"adam_{name}": optimizer for name, optimizer in adam.items()})

    for iteration in run.loop(iterations, state, partial(evaluate, test_env, test_tasks, agent, args)):
        # Alg. 1, l. 3-4: a trial on each of num_envs different training tasks
        with run.timer("sample"):
            tasks = train_tasks[torch.randperm(len(train_tasks))[: args.num_envs].numpy()]
            explore, exploit = run_trial(env, tasks, torch.randint(2**31, ()).item(), agent, args, test=False)
        run.frames += frames_per_iteration

        # l. 5: into V, at once (D9)
        buffer.add(explore, exploit)

        # l. 6: what πψ and πφ are paid, Eq. (12) and (1), by normalised rewards (D7)
        bonus_h, bonus_c = exploration_bonus(explore.q)
        trial = Episode(*(torch.cat([x[: args.horizon], y]) for x, y in zip(explore, exploit)))  # s'_0 in place of s_H
        rewards = scale_rewards(agent["reward_stats"], trial.reward, args.gamma)  # [H+, env]
        r_e = rewards[: args.horizon] + args.r_h * bonus_h + args.r_c * bonus_c
        batches = dict(psi=(explore, r_e, args.entropy_psi), phi=(exploit, rewards[args.horizon :], args.entropy_phi))
        if not args.exploration:
            batches = dict(phi=(trial, rewards, args.entropy_phi))
        if iteration == 1:  # D10
            for name, (episode, *_) in batches.items():
                agent[name].stats.update(episode.obs[:-1, :, :-1].to(args.device))
            continue

        sums = dict(return_episode_1=explore.reward, return_episode_2=exploit.reward, bonus_h=bonus_h, bonus_c=bonus_c)
        metrics = {f"train/{name}": x.sum(0).mean().item() for name, x in sums.items()}

        # l. 7-8: πψ maximises Eq. (12), πφ Eq. (1)
        with run.timer("ppo"):
            left = 1 - (iteration - 1) / iterations  # of the run
            for name, batch in batches.items():
                adam[name].param_groups[0]["lr"] = rates[name] * (left if args.anneal else 1)
                losses = ppo_update(agent[name], adam[name], *batch, args)
                metrics |= {f"{name}/{key}": value for key, value in losses.items()}

        # l. 9-10: θ and ω maximise Eq. (8)
        with run.timer("elbo"):
            adam["vae"].param_groups[0]["lr"] = args.lr_vae * (left if args.anneal_vae else 1)
            if iteration % args.target_every == 0:  # D10
                agent["target"].load_state_dict(agent["prior"].state_dict())
            for _ in range(args.vae_updates):
                terms = vae_update(agent, adam["vae"], buffer.sample(args.vae_batch), args)
        run.log(metrics | terms)


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
