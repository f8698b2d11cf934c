"""VariBAD: Variational Bayes-Adaptive Deep RL via Meta-Learning (Zintgraf et al., ICLR 2020).

Official code: github.com/lmzintgraf/varibad. Deviations are from it (C); the MILET suite has MILET's protocol. The
numbers of the formulas are ours.

Objective    max over ψ:     E[ Σ_t γ^t r_t ] over whole trials, without gradient to φ                         Eq. (1)
  by PPO     E[ min(ρ_t A_t, clip(ρ_t, 1 - ε, 1 + ε) A_t) ],  ρ_t = π(a_t|·) / π_old(a_t|·)                    Eq. (2)
             A_t = Σ_k (γλ)^k δ_{t+k},  δ_t = r_t + γ V_{t+1} - V_t;  V is fitted to A_t + V_t                 Eq. (3)
             max over φ, θ:  E[ Σ_t ELBO_t ]                                                                   Eq. (4)
             ln p_θ(τ+|z) = - Σ_i [(r_i - r̂_i)² + λ_s mean (s_{i+1} - ŝ_i)²], up to a constant                 Eq. (5)
             ELBO_t = E_q[ln p_θ(τ+|z)] - KL(q_φ(z|τ:t) ‖ q_φ(z|τ:t-1)),  where q_φ(z|τ:-1) is N(0, I)         Eq. (6)
             q_φ(z|τ:t) = N(μ(h_t), σ²(h_t)),  h_t = GRU(h_{t-1}; a_{t-1}, r_{t-1}, s_t),  h_0 = 0             Eq. (7)
Loop         collect a trial on each of some tasks -> run_trial     into the buffer -> TrialBuffer.add
             train π by PPO -> ppo_update                           train φ, θ -> vae_update, elbo_loss
             a trial on held-out tasks -> evaluate

  one trial        |  episode 1, H steps            |  episode 2, H steps             |  next trial
  state, done flag |  s_0, 0 ............... s_H, 1 |  s'_0, 0 ............. s'_H, 1  |  reset
  h                |  0 --- updated every step -----  carried over, updated on ---->  |  0
  return of π      |  --------- of both episodes together, unless --cut-episodes -->  |

Symbols      z task latent, a sample [batch, latent_dim]; h, the state of the GRU -> h [batch, hidden]; q_φ(z|τ:t) ->
             belief, its mean and log-variance [batch, 2 latent_dim]; φ -> encoder; θ -> reward_decoder, state_decoder;
             π (ψ) -> policy; H+ = 2 H, the steps of a trial

Deviations from the official code (C), and from the equations (D9)
  D1  C sums over terms and decoded steps, as here, and averages that over the trials of a batch; but its KL is summed
      over the 10 trials too. Here a mean, with 10 times C's weight.
  D2  C cuts the return at the end of each episode, and loses its last reward; here the return is that of the trial,
      and the trial's time limit bootstraps from V(terminal state) (--cut-episodes for C's).
  D3  C starts episode 2 on the terminal state of episode 1; here on the true reset state (--keep-terminal for C's).
  D4  C learns from a trial one iteration late, and only after 5,000 frames; here at once, after the first iteration,
      which already counts for the policy's normalisation (C: from the first PPO step on).
  D5  C collects 16 processes of several trials, or of half a trial, per update; here every copy plays one trial, and
      their number is such that an update has C's frames. So no running trial is encoded again, and unlike in C no
      trial begins with the last step of another.
  D6  C draws fresh tasks without end; here the environment's 500 training and its held-out tasks. On hopper and
      walker C decodes states alone; here rewards too, as MILET.
  D7  C's observation of cheetah-dir has 20 numbers, its velocities in cheetah-vel go to 3; here 17, and 2.
  D8  C's scale of the rewards is updated every step; here once a trial.
  D9  With --decodes the error is a sum over K random steps instead of all H+, not scaled up: so, as in C, the KL
      weighs H+ / K times more.
  D10 C's policy sees states (and beliefs) normalised without bounds, the done flag among them; here within [-10, 10],
      and no flag: it is 1 only where nobody acts (unless --keep-terminal), and its weight would never be trained.
  D11 C is silent on physics that diverges; here nothing is learned from the trial, and the run ends if all diverge.
  D12 In (7) C never reads s_0; here neither s_0 nor, after the true reset (D3), s'_0.

Tested       python algos/varibad.py --env point-goal-4c --num-threads 1   (3.2 million frames, 5-8 minutes on one core
             of an AMD EPYC, three seeds): episode 1 -54, -90, -60, episode 2 -42, -99, -60; one who knows the goal -19.
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
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
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
    frames: int = 50_000_000  # number of environment steps of the run, all episodes included
    eval_every: int = 25  # meta-iterations between evaluations on the held-out tasks
    save_every: int = 100  # meta-iterations between checkpoints
    track: bool = False  # mirror the run to Weights & Biases
    run_dir: str = "runs"  # folder in which the run gets its own folder
    name: str | None = None  # name of the run's folder (if it exists, its run is continued; default: with the time)
    resume: str | None = None  # run folder to continue (its args.json applies)
    evaluate: str | None = None  # run folder to evaluate without training (its args.json applies)

    num_envs: int = 16  # number of tasks, one copy of the environment each, per meta-iteration (D5)
    horizon: int = 100  # number of steps per episode, H (default: the environment's own)
    oracle: bool = False  # the policy is told the parameters of the task, in place of a belief (no ELBO is trained)
    keep_terminal: bool = False  # start episode 2 on the terminal state of episode 1, as the official code (D3)
    cut_episodes: bool = False  # the return of episode 2 does not reach episode 1, as in the official code (D2)

    embed: tuple[int, int, int] = (32, 16, 16)  # widths of the state, action and reward embeddings
    hidden: int = 128  # width of the hidden state h
    latent_dim: int = 10  # dimension of the task latent z
    reward_decoder: tuple[int, ...] = (64, 32)  # widths of the hidden layers of the reward decoder
    state_decoder: tuple[int, ...] = ()  # widths of the hidden layers of the state decoder (none: no such decoder)
    lambda_s: float = 1.0  # weight of the state reconstruction, λ_s of Eq. (5) (not used without a state decoder)
    kl_weight: float = 1.0  # weight of the KL in Eq. (6) (D1)
    elbo_terms: int = 0  # number of steps t of a trial at which ELBO_t is taken, at random (0: all)
    decodes: int = 0  # number of transitions decoded per ELBO term, at random (0: the whole trial; D9)
    truncate: int = 0  # length of the pieces of a trial between which the encoder's gradient stops (0: nowhere)
    vae_batch: int = 10  # number of trials per ELBO update
    vae_updates: int = 5  # number of ELBO updates per meta-iteration
    lr_vae: float = 1e-3  # learning rate of φ and θ
    buffer_trials: int = 10_000  # number of trials that the buffer holds

    policy_embed: int = 64  # width of the policy's embeddings of state and belief (0: raw concatenation)
    policy_hidden: tuple[int, ...] = (128, 128)  # widths of the hidden layers of actor and critic
    policy_init: Literal["orthogonal", "normc"] = "orthogonal"  # initialisation of those layers
    normalise_belief: bool = False  # normalise the policy's q(z) by running statistics
    squash: Literal["none", "mean", "sample"] = "none"  # what of an action goes through a tanh
    init_std: float = 1.0  # standard deviation of the actions before training
    gamma: float = 0.97  # discount factor
    gae_lambda: float = 0.9  # λ of generalised advantage estimation
    ppo_epochs: int = 2  # number of passes over a batch of trials
    minibatches: int = 1  # number of minibatches per pass
    clip: float = 0.05  # range of PPO's clipping, of ratio and value
    value_coef: float = 0.5  # weight of the value loss
    lr_policy: float = 1e-3  # learning rate of π
    anneal: bool = True  # let lr_policy fall to 0 over the run, linearly in the frames
    anneal_vae: bool = False  # let lr_vae fall to 0 with it, so that the belief rests when its readers do
    entropy: float = 0.01  # weight of the entropy bonus


# The official code's configurations (D7); on MILET's suite that of the same robot, with MILET's H, frames and decoders
# (the hopper's is the walker's). Ant-Goal: as above.
HUMANOID = dict(
    frames=30_000_000, num_envs=64, elbo_terms=100, decodes=100, vae_updates=10, policy_embed=0,
    policy_hidden=(512, 256), squash="sample", ppo_epochs=4, minibatches=2, clip=0.1, lr_policy=7e-4, gamma=0.99,
    entropy=1e-3,
)  # fmt: skip
CHEETAH = dict(
    frames=100_000_000, horizon=200, latent_dim=5, elbo_terms=50, decodes=50, truncate=50, vae_updates=1,
    policy_init="normc", normalise_belief=True, clip=0.1, lr_policy=7e-4, anneal=False,
)  # fmt: skip
WALKER = dict(
    frames=10_000_000, embed=(32, 32, 32), reward_decoder=(256, 64), state_decoder=(256, 128), kl_weight=10.0,
    elbo_terms=50, decodes=50, truncate=50, vae_updates=1, policy_init="normc", normalise_belief=True, minibatches=2,
    lr_policy=7e-4, anneal=False,
)  # fmt: skip
PAPER = {
    "humanoid-dir-4c": HUMANOID,
    "humanoid-dir-sparse-4c": HUMANOID,
    "hopper-params-4c": WALKER,
    "walker-params-4c": WALKER,
    "cheetah-dir": CHEETAH | dict(num_envs=32, ppo_epochs=16, minibatches=4, squash="mean"),
    "cheetah-vel": CHEETAH | dict(minibatches=8),
}
FAST = {  # tuned by us
    "ant-goal-4c": dict(
        frames=10_000_000, num_envs=32, hidden=64, elbo_terms=30, decodes=30, vae_batch=50, lr_vae=2e-3,
        policy_hidden=(128, 64), init_std=0.4, gae_lambda=0.95, ppo_epochs=4, minibatches=8, clip=0.1, lr_policy=5e-4,
        entropy=1e-3,
    ),
    "point-goal-4c": dict(
        frames=3_200_000, num_envs=64, hidden=64, reward_decoder=(64, 64), elbo_terms=30, decodes=30, vae_batch=50,
        lr_vae=2e-3, policy_hidden=(128, 64), minibatches=16, clip=0.1, lr_policy=2e-3, entropy=1e-4,
    ),
    **dict.fromkeys(("hopper-params-4c", "walker-params-4c"), WALKER | dict(
        frames=2_500_000, num_envs=32, hidden=64, reward_decoder=(64, 64), state_decoder=(128, 64), kl_weight=1.0,
        elbo_terms=20, decodes=20, truncate=0, vae_batch=50, vae_updates=3, lr_vae=2e-3, normalise_belief=False,
        init_std=0.5, gae_lambda=0.95, ppo_epochs=4, minibatches=8, clip=0.1, lr_policy=5e-4, anneal=True, entropy=1e-3,
    )),
}  # fmt: skip
FAST |= dict.fromkeys(("ant-goal-partial-4c", "ant-goal-u"), FAST["ant-goal-4c"])
FAST["humanoid-dir-4c"] = FAST["ant-goal-4c"] | dict(frames=2_000_000, vae_updates=3, gamma=0.99)  # as MILET's
FAST["point-goal-sparse"] = FAST["point-goal-4c"] | dict(frames=1_400_000, horizon=32)
MAY_BE_0 = "seed", "num_threads", "elbo_terms", "decodes", "truncate", "policy_embed"


def check(args: Args, env: type[envs.TaskVectorEnv]) -> dict[str, bool]:
    """What must hold; where it does not, the message is the error."""
    batch = 2 * args.horizon * args.num_envs  # steps of a trial in all environments
    same_length = env.terminated is envs.TaskVectorEnv.terminated
    most = min(500, args.buffer_trials)
    return {
        f"{args.env} may end an episode early, and this algorithm needs episodes of equal length": same_length,
        f"--frames must be at least {2 * batch} (the first meta-iteration only collects)": args.frames >= 2 * batch,
        "--num-envs must be at most 500 (the training tasks) and --buffer-trials": args.num_envs <= most,
        "--minibatches must be at most --horizon times --num-envs": args.minibatches <= args.horizon * args.num_envs,
        "--cut-episodes leaves nothing of episodes of one step": args.horizon > 1 or not args.cut_episodes,
        "--reward-decoder must name a layer": len(args.reward_decoder) > 0,
        "--gamma and --gae-lambda must be in [0, 1]": 0 <= args.gamma <= 1 and 0 <= args.gae_lambda <= 1,
        "--lr-policy and --lr-vae must be positive": min(args.lr_policy, args.lr_vae) > 0,
        "--clip and --init-std must be positive": min(args.clip, args.init_std) > 0,
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
        self.mean, self.var, self.count = self.mean + delta * n / total, squares / total, total

    def normalise(self, x: Tensor) -> Tensor:
        return ((x - self.mean) / (self.var + 1e-8).sqrt()).clamp(-10, 10).float()


# Copied from algos/milet.py
def mlp(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with activations between them."""
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1])


class Encoder(nn.Module):
    """q_φ(z | τ:t), Eq. (7): a GRU with a head for the mean and one for the log-variance."""

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

    def belief(self, h: Tensor) -> Tensor:
        """Mean and log-variance of q(z | h), Eq. (7): [..., 2 latent_dim]."""
        return torch.cat([self.mean(h), self.log_var(h)], dim=-1)

    def task(self, belief: Tensor) -> Normal:
        """q(z | h) of its mean and log-variance, [..., latent_dim]."""
        mean, log_var = belief.chunk(2, dim=-1)
        return Normal(mean, (log_var.exp() + 1e-10).sqrt(), validate_args=False)


class Oracle(nn.Module):
    """--oracle, in the encoder's place: the belief is the parameters of the task, [..., task_dim], without doubt."""

    def forward(self, action: Tensor, reward: Tensor, next_obs: Tensor, h: Tensor) -> Tensor:
        return h[None]

    def belief(self, h: Tensor) -> Tensor:
        return h

    def task(self, belief: Tensor) -> Normal:
        return Normal(belief, torch.zeros_like(belief), validate_args=False)


# Copied from algos/milet.py
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
    """π(a | s, mean and log-variance of q(z)) and its value function: tanh networks on normalised states."""

    def __init__(self, obs_dim: int, belief_dim: int, action_dim: int, args: Args):
        super().__init__()
        state_dim, width = obs_dim - 1, args.policy_embed  # no done flag (D10)
        self.stats, self.squash_mean = RunningStats(state_dim), args.squash == "mean"
        self.belief_stats = RunningStats(belief_dim) if args.normalise_belief else None
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

    def observe(self, obs: Tensor, belief: Tensor) -> None:
        """Add the states of obs [..., obs_dim] and the beliefs to the running statistics."""
        self.stats.update(obs[..., :-1])
        if self.belief_stats:
            self.belief_stats.update(belief)

    def forward(self, obs: Tensor, belief: Tensor) -> tuple[Normal, Tensor]:
        """π before the squashing of a sample, whose Jacobian cancels in PPO's ratio; and V, [...]."""
        state = self.stats.normalise(obs[..., :-1])  # D10
        belief = self.belief_stats.normalise(belief) if self.belief_stats else belief
        x = torch.cat([self.embed_state(state), self.embed_belief(belief)], dim=-1)
        mean = self.actor(x).tanh() if self.squash_mean else self.actor(x)
        return Normal(mean, self.log_std.exp().clamp(min=1e-6), validate_args=False), self.critic(x)[..., 0]


# Copied from algos/milet.py
def normc_(weight: Tensor, gain: float) -> None:
    """Gaussian rows, scaled to length gain."""
    weight.data = gain * F.normalize(torch.randn_like(weight), dim=1)


# == Sampler ===========================================================================================================


class Episode(NamedTuple):
    """One episode of every environment; obs and belief begin before its first step."""

    obs: Tensor  # [H+1, env, obs_dim], the done flag last
    action: Tensor  # [H, env, action_dim], as the environment got it
    sample: Tensor  # [H, env, action_dim], before the squashing
    reward: Tensor  # [H, env]
    belief: Tensor  # [H+1, env, ·], what π sees of the memory


@torch.inference_mode()
def rollout(
    env: gym.vector.VectorEnv, obs: np.ndarray, policy: Policy, encoder: Encoder, h: Tensor, args: Args, test: bool
) -> tuple[Episode, Tensor]:
    """One episode of all environments in lockstep, from the first states and hidden state (test: mean actions)."""
    horizon, (n, action_dim) = env.unwrapped.horizon, env.action_space.shape
    noise = (torch.zeros if test else torch.randn)(horizon, n, action_dim).to(args.device)
    states, rewards = np.zeros((horizon + 1, n, obs.shape[1]), np.float32), np.zeros((horizon, n), np.float32)
    actions, samples, beliefs = [], [], [encoder.belief(h)]
    states[0] = obs
    for t in range(horizon):
        pi, _ = policy(torch.from_numpy(states[t]).to(args.device), beliefs[t])
        sample = pi.mean + pi.stddev * noise[t]
        action = sample.tanh() if args.squash == "sample" else sample
        states[t + 1, :, :-1], rewards[t], *_ = env.step(action.cpu().numpy())
        states[t + 1, :, -1] = t + 1 == horizon  # the done flag
        reward, state = (torch.from_numpy(x).to(args.device)[None] for x in (rewards[t], states[t + 1]))
        h = encoder(action[None], reward, state, h)[0]
        actions.append(action)
        samples.append(sample)
        beliefs.append(encoder.belief(h))
    actions, samples, beliefs = (torch.stack(x).cpu() for x in (actions, samples, beliefs))
    return Episode(torch.from_numpy(states), actions, samples, torch.from_numpy(rewards), beliefs), h


@torch.inference_mode()
def run_trial(
    env: gym.vector.VectorEnv, tasks: envs.Tasks, seed: int, agent: nn.ModuleDict, args: Args, test: bool
) -> tuple[Episode, Episode]:
    """Two episodes in each task, on one running belief."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's threads would fight with those of the physics
    h = torch.from_numpy(tasks.params).float() if args.oracle else torch.zeros(len(tasks), args.hidden)
    h = h.to(args.device)
    with_flag = partial(np.pad, pad_width=((0, 0), (0, 1)))  # appends the done flag, 0, to every state
    obs = with_flag(env.reset(seed=seed, options={"tasks": tasks})[0])
    first, h = rollout(env, obs, agent["policy"], agent["encoder"], h, args, test)
    fine = ~env.unwrapped.broke  # [env], before the reset clears it (D11)
    start = with_flag(env.reset()[0])
    obs = first.obs[-1].numpy() if args.keep_terminal else start  # D3
    second, _ = rollout(env, obs, agent["policy"], agent["encoder"], h, args, test)
    torch.set_num_threads(threads)
    keep = (fine & ~env.unwrapped.broke) | test  # D11; in a test every task keeps its row
    if not keep.any():
        raise FloatingPointError("the physics diverged in all trials")
    return tuple(Episode(*(x[:, keep] for x in episode)) for episode in (first, second))


# Copied from algos/milet.py
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


# == Variational inference =============================================================================================


def elbo_loss(agent: nn.ModuleDict, obs: Tensor, action: Tensor, reward: Tensor, args: Args) -> dict[str, Tensor]:
    """-Eq. (4), weighted, on trials shaped as TrialBuffer.sample gives them; and its terms."""
    encoder, device = agent["encoder"], obs.device
    next_obs, a, r = obs[:, :, 1:].flatten(1, 2), action.flatten(1, 2), reward.flatten(1, 2)  # [trial, H+, ·]
    trial_length = r.shape[1]  # H+

    # q(z|τ:t), Eq. (7), t = 0..H+: [H+ + 1, trial, ·]. h_0 = 0; gradients stop between pieces of `truncate` steps.
    h = [torch.zeros(1, len(obs), args.hidden, device=device)]
    pieces = (x.transpose(0, 1).split(args.truncate or trial_length) for x in (a, r, next_obs))
    for a_piece, r_piece, next_obs_piece in zip(*pieces):  # [step, trial, ·]
        h.append(encoder(a_piece, r_piece, next_obs_piece, h[-1][-1].detach()))  # D12
    belief = encoder.belief(torch.cat(h))
    prior = torch.cat([torch.zeros_like(belief[:1]), belief[:-1]])  # the belief before; zeros: N(0, I)
    kl_z = kl_divergence(encoder.task(belief), encoder.task(prior)).sum(-1)  # of Eq. (6), [H+ + 1, trial]

    # ELBO_t at all or at random steps t of every trial, by one sample of z each: [trial, term, ·]
    all_t = torch.arange(len(belief)).expand(len(obs), -1)
    t = (torch.randint(len(belief), (len(obs), args.elbo_terms)) if args.elbo_terms else all_t).to(device)
    row = torch.arange(len(obs), device=device)[:, None]
    q_z = encoder.task(belief[t, row])
    z = q_z.mean + q_z.stddev * torch.randn(q_z.mean.shape).to(device)

    # ln p_θ(τ+|z), Eq. (5)
    steps = torch.randint(trial_length, (*t.shape, args.decodes)).to(device) if args.decodes else [slice(None)] * len(t)
    reward_error = agent["reward_decoder"].error(z, obs, action, r[..., None], steps)
    state_error = torch.zeros((), device=device)
    if "state_decoder" in agent:
        state_error = agent["state_decoder"].error(z, obs, action, next_obs, steps)

    # Eq. (4): sums over the terms and over the decoded steps of each, means over trials and state dimensions
    kl_z = kl_z[t, row].mean()
    decodes = args.decodes or trial_length  # D9
    loss = t.shape[1] * (decodes * (reward_error + args.lambda_s * state_error) + args.kl_weight * kl_z)  # D1
    return dict(loss=loss, reward_error=reward_error, state_error=state_error, kl_z=kl_z)


def vae_update(agent: nn.ModuleDict, optimizer: torch.optim.Optimizer, batch: list[Tensor], args: Args) -> dict:
    """One gradient step on φ and θ."""
    terms = elbo_loss(agent, *(x.to(args.device) for x in batch), args)
    optimizer.zero_grad()
    terms["loss"].backward()
    for name in [part for part in ("encoder", "reward_decoder", "state_decoder") if part in agent]:
        nn.utils.clip_grad_norm_(agent[name].parameters(), 1.0)
    optimizer.step()
    return {f"elbo/{k}": v.item() for k, v in terms.items()}


# == PPO ===============================================================================================================


# Copied from algos/milet.py
def scale_rewards(stats: RunningStats, reward: Tensor, gamma: float) -> Tensor:
    """[T, env], by the running deviation of R_t = γ R_{t-1} + r_t, R_{-1} = 0, the discounted sums."""
    sums = reward.clone()
    for t in range(1, len(sums)):
        sums[t] += gamma * sums[t - 1]
    stats.update(sums.to(stats.var.device))
    return (reward / (stats.var.cpu() + 1e-8).sqrt()).clamp(-10, 10).float()


# Copied from algos/milet.py
def gae(reward: Tensor, value: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantages [T, env]; value [T+1, env] ends with that of the state at the time limit."""
    delta = reward + gamma * value[1:] - value[:-1]
    advantage, last = torch.empty_like(delta), torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        last = advantage[t] = delta[t] + gamma * lam * last
    return advantage


def advantages(reward: Tensor, value: Tensor, args: Args) -> Tensor:
    """Eq. (3), of a trial: reward [H+, env], value [H+ + 1, env]; or of each episode without its last step (D2)."""
    if not args.cut_episodes:
        return gae(reward, value, args.gamma, args.gae_lambda)
    episodes = zip(reward.split(args.horizon), value[:-1].split(args.horizon))
    parts = [gae(r[:-1], v, args.gamma, args.gae_lambda) for r, v in episodes]
    return torch.cat([F.pad(part, (0, 0, 0, 1)) for part in parts])


def ppo_update(policy: Policy, optimizer: torch.optim.Optimizer, trial: Episode, reward: Tensor, args: Args) -> dict:
    """PPO on trials, joined, with the given rewards [H+, env] -> its diagnostics, means over the minibatches."""
    obs, sample, belief, reward = (x.to(args.device) for x in (trial.obs, trial.sample, trial.belief, reward))
    with torch.no_grad():
        _, value = policy(obs, belief)  # [H+ + 1, env], of the statistics that acted
        advantage = advantages(reward, value, args)  # Eq. (3)
        returns = advantage + value[:-1]
        explained_variance = 1 - (returns - value[:-1]).var() / (returns.var() + 1e-8)
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-5)
        policy.observe(obs[:-1], belief[:-1])
        old = policy(obs[:-1], belief[:-1])[0].log_prob(sample).sum(-1)
    batch = [x.flatten(0, 1) for x in (obs[:-1], belief[:-1], sample, old, value[:-1], returns, advantage)]
    size, diagnostics = max(1, reward.numel() // args.minibatches), []
    for _ in range(args.ppo_epochs):
        for rows in torch.randperm(reward.numel()).to(args.device).split(size)[: args.minibatches]:  # no remainder
            state, b, u, old_log_prob, old_value, target, adv = (x[rows] for x in batch)
            pi, value = policy(state, b)
            log_ratio = pi.log_prob(u).sum(-1) - old_log_prob
            ratio = log_ratio.exp()  # ρ of Eq. (2)
            policy_loss = -torch.minimum(ratio * adv, ratio.clamp(1 - args.clip, 1 + args.clip) * adv).mean()  # Eq. (2)
            clipped_value = old_value + (value - old_value).clamp(-args.clip, args.clip)
            huber = [F.smooth_l1_loss(v, target, reduction="none") for v in (value, clipped_value)]
            critic_loss = 0.5 * torch.maximum(*huber).mean()  # Eq. (3)
            entropy = pi.entropy().sum(-1).mean()
            optimizer.zero_grad()
            (policy_loss + args.value_coef * critic_loss - args.entropy * entropy).backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
            optimizer.step()
            approx_kl, clip_fraction = (ratio - 1 - log_ratio).mean(), ((ratio - 1).abs() > args.clip).float().mean()
            diagnostics.append(torch.stack([policy_loss, critic_loss, entropy, approx_kl, clip_fraction]).detach())
    names = "policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction"
    return dict(zip(names, torch.stack(diagnostics).mean(0).tolist()), explained_variance=explained_variance.item())


# == Evaluation ========================================================================================================


# Copied from algos/milet.py
def returns_by_cluster(name: str, returns: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """The mean of the returns [task] and, if there are several, of every true cluster."""
    present = np.unique(clusters)
    by_cluster = {f"{name}_cluster_{m}": float(returns[clusters == m].mean()) for m in present}
    return {name: float(returns.mean())} | (by_cluster if len(present) > 1 else {})


def evaluate(env: gym.vector.VectorEnv, tasks: envs.Tasks, agent: nn.ModuleDict, args: Args) -> tuple[dict, dict]:
    """One trial of every held-out task: the metrics, and the arrays of eval.npz."""
    trial = run_trial(env, tasks, seed := 10**6 + 1000 * args.seed, agent, args, test=True)
    q_z, metrics = agent["encoder"].task(torch.stack([episode.belief for episode in trial])), {}
    for k, episode in enumerate(trial):
        returns = episode.reward.double().sum(0).numpy()
        metrics |= returns_by_cluster(f"eval/return_episode_{k + 1}", returns, tasks.cluster)
        metrics[f"eval/belief_std_{k + 1}"] = q_z.stddev[k, -1].mean().item()
    both = Episode(*(torch.stack(pair).numpy() for pair in zip(*trial)))  # [episode, ...] each
    mean, std = q_z.mean.numpy(), q_z.stddev.numpy()  # [episode, H+1, task, latent_dim]
    arrays = dict(params=tasks.params, cluster=tasks.cluster, seed=seed, embedding=mean[0, -1])
    arrays |= dict(trace=both.obs[..., :-1][..., :2], action=both.action, reward=both.reward)  # no done flag
    return metrics, arrays | dict(belief_mean=mean, belief_std=std)


# == Training ==========================================================================================================


def make_agent(obs_dim: int, action_dim: int, task_dim: int, args: Args) -> nn.ModuleDict:
    belief_dim = task_dim if args.oracle else 2 * args.latent_dim
    agent = nn.ModuleDict(dict(policy=Policy(obs_dim, belief_dim, action_dim, args), reward_stats=RunningStats()))
    agent["encoder"] = Oracle() if args.oracle else Encoder(obs_dim, action_dim, args)
    agent["reward_decoder"] = Decoder(obs_dim, action_dim, True, (*args.reward_decoder, 1), args)
    if args.state_decoder:
        agent["state_decoder"] = Decoder(obs_dim, action_dim, False, (*args.state_decoder, obs_dim), args)
    return agent.to(args.device)


def train(args: Args, run: "Run") -> None:
    """The loop of the header."""
    env = run.make_env(args.num_envs)
    train_tasks, test_tasks = env.unwrapped.task_set("train"), env.unwrapped.task_set("test")  # D6
    test_env = run.make_env(len(test_tasks))
    obs_dim, action_dim = env.single_observation_space.shape[0] + 1, env.single_action_space.shape[0]
    frames_per_iteration = 2 * args.horizon * args.num_envs
    iterations = args.frames // frames_per_iteration

    agent = make_agent(obs_dim, action_dim, env.unwrapped.task_dim, args)
    trained = {"policy": [*agent["policy"].parameters()]}
    trained["vae"] = [p for name in agent if name != "policy" for p in agent[name].parameters()]
    rates = dict(policy=args.lr_policy, vae=args.lr_vae)
    adam = {name: torch.optim.Adam(ps, rates[name], fused=True) for name, ps in trained.items()}
    buffer = TrialBuffer(args.buffer_trials)
    state = dict(agent=agent, buffer=buffer, **{f"adam_{name}": optimizer for name, optimizer in adam.items()})

    for iteration in run.loop(iterations, state, partial(evaluate, test_env, test_tasks, agent, args)):
        # a trial on each of num_envs different training tasks
        with run.timer("sample"):
            tasks = train_tasks[torch.randperm(len(train_tasks))[: args.num_envs].numpy()]
            first, second = run_trial(env, tasks, torch.randint(2**31, ()).item(), agent, args, test=False)
        run.frames += frames_per_iteration

        if not args.oracle:  # whose ELBO is not trained
            buffer.add(first, second)  # at once (D4)

        # π is paid by normalised rewards (D8)
        trial = Episode(*(torch.cat([x[: args.horizon], y]) for x, y in zip(first, second)))  # s'_0 for s_H
        rewards = scale_rewards(agent["reward_stats"], trial.reward, args.gamma)  # [H+, env]
        if iteration == 1:  # D4
            agent["policy"].observe(trial.obs[:-1].to(args.device), trial.belief[:-1].to(args.device))
            continue

        sums = dict(return_episode_1=first.reward, return_episode_2=second.reward)
        metrics = {f"train/{name}": x.sum(0).mean().item() for name, x in sums.items()}

        # π maximises the return of the trial, Eq. (1)
        with run.timer("ppo"):
            left = 1 - (iteration - 1) / iterations  # of the run
            adam["policy"].param_groups[0]["lr"] = args.lr_policy * (left if args.anneal else 1)
            losses = ppo_update(agent["policy"], adam["policy"], trial, rewards, args)
            metrics |= {f"policy/{key}": value for key, value in losses.items()}

        # φ and θ maximise Eq. (4)
        with run.timer("elbo"):
            adam["vae"].param_groups[0]["lr"] = args.lr_vae * (left if args.anneal_vae else 1)
            terms = {}
            for _ in range(0 if args.oracle else args.vae_updates):
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
