"""MetaCURE: meta-RL with empowerment-driven exploration (Zhang, Wang, Hu, Chen, Chen, Fan and Zhang, ICML 2021).

Official code: github.com/NagisaZj/MetaCURE-Public. Deviations are from it; settings are its own, where it has the task.
Numbers of equations and lines are this file's. An explorer gathers a context; on what it says an exploiter acts.

Objective    Eq. (1)  q_φ(z|c_0 .. c_i) = N(m_i, diag v_i) after every token of a context c;  b_i = (m_i, v_i)
             Eq. (2)  KL = mean over tasks and i of KL(q_φ(z|c_0 .. c_i) ‖ N(0, I))
             Eq. (3)  y = ρ r + (1 - d) γ V̄(s',z'), d = 1 at a fall
             Eq. (4)  min over φ, Q:  Σ_j (Q_j(s,a,z) - y)² + β KL, with z = z' ~ q_φ(z|c_0 .. c_i)
             Eq. (5)-(8)  as in pearl.py: ã = tanh(m(s,z) + σ(s,z) ε), ε ~ N(0,I); V to min_j Q_j - ln π,
                      π to minimise ln π - min_j Q_j + 1e-3 (mean m² + mean ln²σ); V̄ slowly after V
             Eq. (9)  e_D = (D(b,s,a) - r)²,  e_P = (P(k,s,a) - r)², k the id of a training task; with --dynamics, D and
                      P predict s' too, and its mean square error is added;    Eq. (10) min over D, P:  e_D + e_P
             Eq. (11) r + λ (e_D - e_P): the explorer is paid where the id tells more of the outcome than b does
             The exploiter has (3)-(8); the explorer too, with networks of its own, b_i for z, b_i+1 for z', (11) for r.
             Only the exploiter's critic and the KL train φ: all else sees z and b without gradient.

Algorithm 1  l. 1  in every training task, trials of the explorer and steps of the exploiter -> collect_trials, collect
             l. 2  visits to tasks drawn with replacement: trials, z of the prior, z from trials -> collect_iteration
             l. 3  gradient steps, each on tasks drawn with replacement -> train_iteration, gradient_step
             l. 4    stored trials are contexts, and the belief after their i-th token goes with the i-th of N random
                     transitions of the task: exploiter and encoder learn -> critic_loss, kl_to_prior, actor_loss
             l. 5    D and P learn -> prediction_errors      l. 6    the explorer learns -> soft_actor_critic
Algorithm 2  l. 1  a test task: a trial of the explorer, mean actions -> explore
             l. 2  z ~ q_φ(z|all of it), and an episode of the exploiter with it, mean actions -> evaluate

Symbols      φ, D, P -> encoder, decoder, predictor; Q_1, Q_2, V, V̄, π -> q (two copies), v, target, policy; c_0 = (s_0,
             0, 0), c_i = (s_i, a_i-1, r_i-1) -> context [task, token, ·]; z, b [task, token, latent_dim or twice that];
             E, λ, ρ, β, γ, τ -> explorer_episodes, intrinsic_weight, reward_scale, kl_weight, gamma, tau

Deviations from the official code (C)
  D1  C plays one episode at a time; here all visits of an iteration in lockstep, the explorer's trials first.
  D2  C tests on its own tasks, some twice, goals evenly spaced; here on the environment's own, once, at random.
  D3  C has float64 buffers of 1e6 steps; here float32, as needed. An episode that ends early is filled up: last state,
      action and reward 0. So all trials have as many tokens; no transition of these is kept, nor a diverging step.
  D4  C has 13 optimisers and two a task, and weights prediction errors by 1 or 10; here five, and 1. Adam is
      elementwise, and blind to the scale of a loss: the same steps, but where a task is drawn twice (C: its P steps
      twice; here once, on both batches). C predicts r and s' by two networks; here by one.
  D5  C takes the variance for the standard deviation in the KL; here it does not (--kl-as-code).
  D6  C's stored contexts lack the tokens of resets but the first, its newest trial is never drawn, and the last s' of
      an episode inside a trial is the next one's first state; here none of it.
  D7  b_i+1 follows from tokens c_1 .. c_i+1, without c_0, and not from the row's own step: as C. C computes it, and
      the errors in (11), with φ, D and P as this gradient step leaves them; here as it finds them.
  D8  Half of the explorer's trials in C should start from a posterior, but do not; here they are of one kind. The
      exploiter's posterior and extra blocks are alike in C; here one block, as long as both, with one prior z for two.
  D9  C draws the z of that block from shuffled transitions; here from a context as in training.
  D10 C counts the steps between renewals of b through a trial; here in every episode.
  D11 C's encoder is SNAIL, or an LSTM whose state outlives an encoding; here a GRU, or SNAIL, its last layer as MLP's.
      Here the last layer that reads a token has random biases, in C 0.1.
  D12 C has a P of its own for each task where the environment's name has "vel" or "point" in it; here below 100 tasks.

Tested       python algos/metacure.py --num-threads 1   (1.5 million frames, seed 0): explorer 13.4, then exploiter 17.9
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
    env: str = "point-goal-sparse"  # environment id (module:id imports the module first)
    preset: Literal["paper", "fast"] | None = None  # published, or ours, of about an hour (default where there is one)
    seed: int = 0  # seed of everything random
    device: Literal["cpu", "cuda"] = "cpu"  # device of the networks
    num_threads: int = 0  # number of threads of the physics and of the updates (0: all CPUs)
    iterations: int = 1000  # number of iterations of collecting and training
    eval_every: int = 10  # iterations between evaluations on the held-out tasks
    save_every: int = 5  # iterations between checkpoints
    track: bool = False  # mirror the run to Weights & Biases
    run_dir: str = "runs"  # folder in which the run gets its own folder
    name: str | None = None  # name of the run's folder (if it exists, its run is continued; default: with the time)
    resume: str | None = None  # run folder to continue (its args.json applies)
    evaluate: str | None = None  # run folder to evaluate without training (its args.json applies)

    train_tasks: int = 500  # number of training tasks, the first different ones of the environment's training set
    horizon: int = 100  # H, steps per episode (default: the environment's own)
    explorer_episodes: int = 1  # E, episodes in a trial of the explorer
    initial_trials: int = 2  # trials of the explorer in every training task before the first update
    initial_steps: int = 200  # steps of the exploiter in every training task before the first update, z from the prior
    visits: int = 5  # number of tasks visited per iteration, drawn with replacement
    trials: int = 4  # trials of the explorer in a visit (D8)
    prior_steps: int = 200  # steps of the exploiter in a visit with z from the prior
    posterior_steps: int = 400  # steps of the exploiter in a visit with z from the posterior (D8)
    gradient_steps: int = 1000  # number of gradient steps per iteration
    refresh: int = 4  # steps after which the explorer's belief is renewed, in training (D10)
    eval_refresh: int = 1  # the same (steps between renewals) on the held-out tasks

    latent_dim: int = 5  # dimensions of z
    encoder: Literal["gru", "snail"] = "gru"  # network that reads contexts (D11)
    encoder_hidden: tuple[int, ...] = (64, 64, 64)  # widths of the layers before GRU or SNAIL; the last also the GRU's
    hidden: tuple[int, ...] = (300, 300, 300)  # widths of the hidden layers of policies, Q, V and D
    id_hidden: tuple[int, ...] = (64, 64, 64)  # widths of the hidden layers of P (D12)
    dynamics: bool = False  # D and P predict the next state too
    intrinsic_weight: float = 0.2  # λ, weight of the intrinsic reward
    meta_batch: int = 16  # number of tasks in a gradient step
    batch: int = 100  # N, tokens in the context of each of these tasks, and transitions that go with them
    kl_weight: float = 0.1  # β, weight of the KL, which is a mean over tasks and tokens
    kl_as_code: bool = False  # the official code's KL, with the variance as standard deviation (D5)
    reward_scale: float = 5.0  # ρ, factor on the reward, beside the entropy's weight of 1
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # τ, rate at which the slow copy of V follows
    lr: float = 3e-4  # learning rate of all networks
    policy_regularisation: float = 1e-3  # weight of the squared mean and log σ of the policy


# The official configurations, and ours of directions. MILET's suite has Args' values: trials of one episode, 100 steps.
PAPER = {
    "cheetah-vel-sparse": dict(
        train_tasks=100, horizon=64, latent_dim=2, kl_weight=1e-3, reward_scale=10.0, batch=64, initial_trials=3,
        initial_steps=256, prior_steps=256, posterior_steps=256, refresh=1, iterations=5000,
    ),
    "point-goal-sparse": dict(
        train_tasks=40, horizon=32, explorer_episodes=3, iterations=3000, kl_weight=1e-3, reward_scale=100.0, gamma=0.9,
        initial_steps=0, visits=10, prior_steps=128, posterior_steps=256, refresh=1, batch=64, id_hidden=(300,) * 3,
    ),
    **{f"{robot}-params-4c": dict(dynamics=True) for robot in ("hopper", "walker")},
    **{f"{robot}-dir": dict(train_tasks=2) for robot in ("ant", "cheetah", "walker")},  # one for each direction
    **{env: dict(train_tasks=4) for env in ("ml2", "ant-cheetah-dir")},  # and robot
}  # fmt: skip
FAST = {"point-goal-sparse": PAPER["point-goal-sparse"] | dict(
    train_tasks=500, explorer_episodes=1, initial_trials=2, initial_steps=64, visits=20, trials=6, prior_steps=64,
    lr=2e-3, posterior_steps=96, gradient_steps=200, batch=33, meta_batch=8, hidden=(64, 64), id_hidden=(64, 64),
    encoder_hidden=(32,), tau=0.01, iterations=200,
)}  # fmt: skip
MAY_BE_0 = ("seed", "num_threads", "initial_steps")
FEW = 100  # with fewer training tasks each has a P of its own (D12)


def check(args: Args, env: type[envs.TaskVectorEnv]) -> dict[str, bool]:
    """What must hold; where it does not, the message is the error."""
    weights = args.kl_weight, args.intrinsic_weight, args.policy_regularisation
    return {
        "--reward-scale and --lr must be positive": min(args.reward_scale, args.lr) > 0,
        "--kl-weight, --intrinsic-weight and --policy-regularisation must be at least 0": min(weights) >= 0,
        "--gamma must be in [0, 1], --tau in (0, 1]": 0 <= args.gamma <= 1 and 0 < args.tau <= 1,
        "--encoder-hidden must name a width": len(args.encoder_hidden) > 0,
    }


# == Networks ==========================================================================================================


class MLP(nn.Module):
    """`copies` networks of ReLU layers, with the initialisation of the official code."""

    def __init__(self, *sizes: int, copies: int = 1, last: float = 3e-3):
        super().__init__()
        self.nets = nn.ModuleList()
        for _ in range(copies):
            layers = [nn.Linear(*pair) for pair in pairwise(sizes)]
            for layer in layers[:-1]:
                bound = 1 / math.sqrt(layer.out_features)
                layer.weight.data.uniform_(-bound, bound)
                layer.bias.data.fill_(0.1)
            for p in layers[-1].parameters():
                p.data.uniform_(-last, last)
            self.nets.append(nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1]))

    def forward(self, *parts: Tensor) -> Tensor:
        """Inputs, joined along the last dimension, [row, ·] -> [copy, row, out]; large ones by oneDNN on a CPU."""
        x = torch.cat(parts, dim=-1)
        if x.device.type == "cpu" and len(x) >= 512:
            return torch.stack([net(x.to_mkldnn()).to_dense() for net in self.nets])
        return torch.stack([net(x) for net in self.nets])


class Snail(nn.Module):
    """Twice some causal convolutions and an attention; each layer appends its outputs to what it reads."""

    def __init__(self, width: int, tokens: int):
        super().__init__()
        self.layers, dilations = nn.ModuleList(), [2**k for k in range(math.ceil(math.log2(tokens)))]
        for dilation in [*dilations, None] * 2:  # None: attention, whose 96 are queries, keys and values
            self.layers.append(nn.Conv1d(width, 32, 2, dilation=dilation) if dilation else nn.Linear(width, 96))
            width += 16 if dilation else 32  # a convolution's 32 are 16 values and 16 gates
        self.hidden_size = width

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[task, token, in] -> [task, token, hidden_size], in a pair as nn.GRU's."""
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                new = F.scaled_dot_product_attention(*layer(x).chunk(3, dim=-1), is_causal=True)
            else:
                value, gate = layer(F.pad(x.mT, (*layer.dilation, 0))).mT.chunk(2, dim=-1)
                new = value.tanh() * gate.sigmoid()
            x = torch.cat([x, new], dim=-1)
        return x, None


class Encoder(nn.Module):
    """m_i, and v_i before its softplus, of Eq. (1): causal, what stands at token i hangs on c_0 .. c_i alone."""

    def __init__(self, token: int, args: Args):
        super().__init__()
        width, gru = args.encoder_hidden[-1], args.encoder == "gru"
        self.read = MLP(token, *args.encoder_hidden, last=1 / math.sqrt(width))
        self.recall = nn.GRU(width, width, batch_first=True) if gru else Snail(width, args.batch)  # D11
        self.head = MLP(self.recall.hidden_size, 2 * args.latent_dim)

    def forward(self, context: Tensor) -> Tensor:
        """[task, token, ·] -> [task, token, 2 latent_dim]."""
        h, _ = self.recall(self.read(context)[0].relu())
        return self.head(h)[0]


def actor_critic(state: int, action_dim: int, args: Args) -> nn.ModuleDict:
    """Of the exploiter, whose state is (s, z), or of the explorer, (s, b)."""
    networks = nn.ModuleDict(dict(
        policy=MLP(state, *args.hidden, 2 * action_dim, last=1e-3),
        q=MLP(state + action_dim, *args.hidden, 1, copies=2),
        v=MLP(state, *args.hidden, 1),
        target=MLP(state, *args.hidden, 1),
    ))  # fmt: skip
    networks["target"].requires_grad_(False).load_state_dict(networks["v"].state_dict())
    return networks


def make_agent(obs_dim: int, action_dim: int, args: Args) -> nn.ModuleDict:
    known, outcome = obs_dim + action_dim, 1 + args.dynamics * obs_dim  # what D and P are given, and predict
    ids, copies = (0, args.train_tasks) if args.train_tasks < FEW else (args.train_tasks, 1)  # width, networks of P
    agent = nn.ModuleDict(dict(
        encoder=Encoder(known + 1, args),
        exploiter=actor_critic(obs_dim + args.latent_dim, action_dim, args),
        explorer=actor_critic(obs_dim + 2 * args.latent_dim, action_dim, args),
        decoder=MLP(2 * args.latent_dim + known, *args.hidden, outcome),
        predictor=MLP(ids + known, *args.id_hidden, outcome, copies=copies),
    ))  # fmt: skip
    return agent.to(args.device)


# Copied from algos/pearl.py
def pre_tanh(policy: MLP, obs: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """m and ln σ of Eq. (5), [row, action_dim] each."""
    mean, log_std = policy(obs, z)[0].chunk(2, dim=-1)
    return mean, log_std.clamp(-20, 2)


# Copied from algos/pearl.py
def squashed(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """ã [row, action_dim] and ln π(ã|s,z) [row] of Eq. (5), ε the noise."""
    action = (mean + log_std.exp() * noise).tanh()
    log_normal = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
    return action, (log_normal - (1 - action**2 + 1e-6).log()).sum(-1)


# == Sampler ===========================================================================================================


# Copied from algos/pearl.py
class Episodes(NamedTuple):
    """An episode of every copy."""

    obs: Tensor  # [copy, H+1, obs_dim]
    action: Tensor  # [copy, H, action_dim]
    reward: Tensor  # [copy, H]
    terminated: Tensor  # [copy, H], 1 at a fall; a time limit is none
    alive: Tensor  # [copy, H] bool: steps taken, none after a fall, nor the one in which a simulation diverges (D3)


def tokens(obs: Tensor, action: Tensor, reward: Tensor) -> Tensor:
    """c_0 = (s_0, 0, 0) and c_i = (s_i, a_i-1, r_i-1) of n steps of every copy, [copy, n+1, ·]."""
    return torch.cat([obs, F.pad(action, (0, 0, 1, 0)), F.pad(reward, (1, 0))[..., None]], dim=-1)


@torch.inference_mode()
def rollout(
    env: gym.vector.VectorEnv, tasks: envs.Tasks, policy: MLP, z: Tensor | Callable[[Tensor], Tensor], seed: int,
    noise: Tensor, play: np.ndarray, refresh: int = 1,
) -> Episodes:  # fmt: skip
    """An episode of the copies that play [copy] bool, in lockstep, each in its own task and with its own z [copy, ·].

    z: or the explorer's b, given the episode's tokens, every `refresh` steps. noise: ε of Eq. (5), [H, copy, ·].
    """
    threads, device = torch.get_num_threads(), next(policy.parameters()).device
    torch.set_num_threads(1)  # torch's threads would fight with those of the physics
    noise, known = noise.to(device), None if callable(z) else z.to(device)
    horizon, copies, action_dim = noise.shape
    obs = np.zeros((copies, horizon + 1, *env.single_observation_space.shape), np.float32)
    action, reward = np.zeros((copies, horizon, action_dim), np.float32), np.zeros((copies, horizon), np.float32)
    terminated, alive = np.zeros((copies, horizon), np.float32), np.zeros((copies, horizon), bool)
    obs[:, 0], _ = env.reset(seed=seed, options={"tasks": tasks, "reset_mask": play})
    for t in range(horizon):
        if callable(z) and t % refresh == 0:  # D10
            known = z(tokens(*map(torch.from_numpy, (obs[:, : t + 1], action[:, :t], reward[:, :t]))))
        mean, log_std = pre_tanh(policy, torch.from_numpy(obs[:, t]).to(device), known)
        action[:, t] = (mean + log_std.exp() * noise[t]).tanh().cpu().numpy()
        after, reward[:, t], fell, out_of_time, info = env.step(action[:, t])
        alive[:, t] = play & ~info["diverged"]
        obs[:, t + 1] = np.where(alive[:, t, None], after, obs[:, t])  # an end lasts (D3)
        terminated[:, t] = fell & alive[:, t]
        play = play & ~(fell | out_of_time)
    torch.set_num_threads(threads)
    return Episodes(*map(torch.from_numpy, (obs, action * alive[..., None], reward, terminated, alive)))  # D3


def explore(
    env: gym.vector.VectorEnv, tasks: envs.Tasks, agent: nn.ModuleDict, seeds: list[int], noise: Tensor, refresh: int
) -> tuple[list[Episodes], Tensor]:
    """Alg. 2, l. 1 on each of the tasks: the E episodes, and the context [task, E (H+1), ·]; noise [E, H, task, ·]."""
    episodes, seen, everyone = [], [], np.ones(len(tasks), bool)

    def b(seen: list[Tensor], now: Tensor) -> Tensor:  # [task, 2 latent_dim], after these episodes and this one so far
        return belief(posterior(agent["encoder"], torch.cat([*seen, now], dim=1).to(noise.device)))[:, -1]

    for seed, eps in zip(seeds, noise):
        e = rollout(env, tasks, agent["explorer"]["policy"], partial(b, seen), seed, eps, everyone, refresh)
        episodes.append(e)
        seen.append(tokens(e.obs, e.action, e.reward))
    return episodes, torch.cat(seen, dim=1)


# == Replay data =======================================================================================================


# Copied from algos/pearl.py
class Transitions(NamedTuple):
    """[task, transition, ·] or [row, ·] each."""

    obs: Tensor
    action: Tensor
    reward: Tensor
    next_obs: Tensor
    terminated: Tensor


def transitions(e: Episodes) -> Tensor:
    """The transitions (s, a, r, s', d) of every copy, [copy, H, ·]."""
    return torch.cat([e.obs[:, :-1], e.action, e.reward[..., None], e.obs[:, 1:], e.terminated[..., None]], dim=-1)


class Replay:
    """Rows of each of n tasks, in the order of collection (D3); a row has a shape."""

    def __init__(self, n: int, *shape: int):
        self.rows = [torch.empty(0, *shape)] * n

    def add(self, i: int, rows: Tensor) -> None:
        self.rows[i] = torch.cat([self.rows[i], rows])

    def sample(self, which: Tensor, n: int, rng: torch.Generator) -> Tensor:
        """n rows of each of `which`, with replacement: [len(which), n, *shape]."""
        uniform = torch.rand(len(which), n, generator=rng, dtype=torch.float64)
        mine = [self.rows[i] for i in which.tolist()]
        return torch.stack([rows[(u * len(rows)).long()] for rows, u in zip(mine, uniform)])

    def state_dict(self) -> dict:
        return dict(rows=self.rows)

    def load_state_dict(self, state: dict) -> None:
        self.rows = [rows.clone() for rows in state["rows"]]


# == Task inference ====================================================================================================


def posterior(encoder: Encoder, context: Tensor) -> Normal:
    """Eq. (1) after every token of contexts [task, token, ·]."""
    mean, raw_var = encoder(context).chunk(2, dim=-1)
    return Normal(mean, F.softplus(raw_var).clamp(min=1e-7).sqrt(), validate_args=False)


def belief(q: Normal) -> Tensor:
    """b of Eq. (1), [task, token, 2 latent_dim]."""
    return torch.cat([q.mean, q.variance], dim=-1)


# Copied from algos/pearl.py
def draw(q: Normal, rng: torch.Generator) -> Tensor:
    return q.mean + q.stddev * torch.randn(q.mean.shape, generator=rng).to(q.mean.device)


def kl_to_prior(q: Normal, as_code: bool) -> Tensor:
    """Eq. (2), a sum over dimensions, and a mean over tasks and tokens."""
    q = Normal(q.mean, q.variance if as_code else q.stddev, validate_args=False)  # D5
    return kl_divergence(q, Normal(torch.zeros_like(q.mean), 1.0, validate_args=False)).sum(-1).mean()


def prediction_errors(
    agent: nn.ModuleDict, tasks: Tensor, batch: Transitions, b: Tensor, args: Args
) -> tuple[Tensor, Tensor]:
    """e_D and e_P of Eq. (9), [row] each, of a batch [row, ·] that has one task after the other, and b [row, ·]."""
    x, n, predictor = torch.cat([batch.obs, batch.action], dim=-1), len(b) // len(tasks), agent["predictor"]
    by_belief = agent["decoder"](b, x)[0]
    if args.train_tasks < FEW:
        by_id = torch.cat([predictor.nets[k](rows) for k, rows in zip(tasks.tolist(), x.split(n))])
    else:
        by_id = predictor(F.one_hot(tasks, args.train_tasks).repeat_interleave(n, dim=0), x)[0]
    outcome = torch.cat([batch.reward, batch.next_obs], dim=-1)[:, : by_id.shape[1]]  # r; (r, s') with --dynamics
    squares = [(prediction - outcome).square() for prediction in (by_belief, by_id)]
    e_d, e_p = (error[:, 0] + error[:, 1:].sum(-1) / batch.obs.shape[1] for error in squares)  # the sum: 0 without s'
    return e_d, e_p


# == Soft actor-critic =================================================================================================


# Copied from algos/pearl.py
def critic_loss(agent: nn.ModuleDict, batch: Transitions, z: Tensor, next_z: Tensor, args: Args) -> Tensor:
    """Of Q_1, Q_2 and φ, Eq. (4) without the KL; batch and z [row, ·], next_z the z of the next state."""
    with torch.no_grad():
        next_v = agent["target"](batch.next_obs, next_z)[0]
        bellman = args.reward_scale * batch.reward + (1 - batch.terminated) * args.gamma * next_v  # Eq. (3)
    error = agent["q"](batch.obs, batch.action, z) - bellman  # [2, row, 1]
    return error.square().mean((1, 2)).sum()  # Eq. (4)


# Copied from algos/pearl.py
def actor_loss(
    agent: nn.ModuleDict, obs: Tensor, z: Tensor, noise: Tensor, args: Args
) -> tuple[Tensor, Tensor, Tensor]:
    """Of V and of π, whose parameters are disjoint, and mean ln π; z comes without gradient."""
    mean, log_std = pre_tanh(agent["policy"], obs, z)
    action, log_pi = squashed(mean, log_std, noise)  # Eq. (5)
    min_q = agent["q"](obs, action, z)[..., 0].amin(0)
    v_error = (agent["v"](obs, z)[0, :, 0] - (min_q - log_pi).detach()).square().mean()  # Eq. (6)
    penalty = args.policy_regularisation * (mean.square().mean() + log_std.square().mean())
    policy_loss = (log_pi - min_q).mean() + penalty  # Eq. (7)
    return v_error, policy_loss, log_pi.mean()


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """A gradient step on the parameters of the optimiser alone, and of these, those in the loss."""
    parameters = optimizer.param_groups[0]["params"]
    for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True)):
        p.grad = gradient  # None: P of a task that was not drawn, which Adam passes over
    optimizer.step()


# == Learner ===========================================================================================================


class Learner(NamedTuple):
    """One MetaCURE: its networks, its data, its training tasks."""

    agent: nn.ModuleDict
    adam: dict[str, torch.optim.Optimizer]  # by what they train (D4)
    rl: Replay  # transitions of the explorer and of the exploiter
    trials: Replay  # tokens of the explorer's trials, [E (H+1), ·] each
    widths: tuple[int, ...]  # of the parts of a transition
    tasks: envs.Tasks
    make_env: Callable[[int], gym.vector.VectorEnv]  # by the number of copies
    args: Args


def make_learner(make_env: Callable[[int], gym.vector.VectorEnv], tasks: envs.Tasks, args: Args) -> Learner:
    env = make_env(1)
    obs_dim, action_dim = env.single_observation_space.shape[0], env.single_action_space.shape[0]
    agent = make_agent(obs_dim, action_dim, args)
    parts = dict(predictions=[agent["decoder"], agent["predictor"]])
    for who in ("exploiter", "explorer"):
        parts |= {f"{who}_critic": [agent[who]["q"]], f"{who}_actor": [agent[who]["v"], agent[who]["policy"]]}
    parts["exploiter_critic"].insert(0, agent["encoder"])  # φ learns with the exploiter's critic
    adam = {k: torch.optim.Adam(nn.ModuleList(v).parameters(), lr=args.lr, fused=True) for k, v in parts.items()}
    widths, tokens_a_trial = (obs_dim, action_dim, 1, obs_dim, 1), args.explorer_episodes * (args.horizon + 1)
    rl, trials = Replay(len(tasks), sum(widths)), Replay(len(tasks), tokens_a_trial, obs_dim + action_dim + 1)
    return Learner(agent, adam, rl, trials, widths, tasks, make_env, args)


def draw_contexts(learner: Learner, tasks: Tensor, n: int, rng: torch.Generator) -> Tensor:
    """n tokens of each of the tasks: stored trials, one after the other, cut (D6); [task, n, ·]."""
    contexts = learner.trials.sample(tasks, math.ceil(n / learner.trials.rows[0].shape[1]), rng)  # a trial's tokens
    return contexts.flatten(1, 2)[:, :n].to(learner.args.device)


def collect_trials(learner: Learner, tasks: Tensor, trials: int, rng: torch.Generator) -> float:
    """The mean return of an episode of the explorer, in visits to tasks [visit] (D1)."""
    args, tasks = learner.args, tasks.repeat_interleave(trials)  # [copy]
    env, seeds = learner.make_env(len(tasks)), torch.randint(2**31, (args.explorer_episodes,), generator=rng).tolist()
    noise = torch.randn(args.explorer_episodes, args.horizon, *env.action_space.shape, generator=rng).to(args.device)
    episodes, contexts = explore(env, learner.tasks[tasks.numpy()], learner.agent, seeds, noise, args.refresh)
    steps, alive = torch.cat([transitions(e) for e in episodes], dim=1), torch.cat([e.alive for e in episodes], dim=1)
    for i, k in enumerate(tasks.tolist()):
        learner.trials.add(k, contexts[i : i + 1])
        learner.rl.add(k, steps[i, alive[i]])
    return torch.stack([e.reward.sum(1) for e in episodes]).mean().item()


def collect(learner: Learner, tasks: Tensor, n: int, infer: bool, rng: torch.Generator) -> float:
    """The mean return of a block of n steps of the exploiter; infer: z from a context (D9), but for episode 1."""
    args, agent, env = learner.args, learner.agent, learner.make_env(len(tasks))
    env_tasks, taken, returns = learner.tasks[tasks.numpy()], torch.zeros(len(tasks)), []
    while (play := taken < n).any():
        z = torch.randn(len(tasks), args.latent_dim, generator=rng)
        if infer and taken.any():
            z = draw(posterior(agent["encoder"], draw_contexts(learner, tasks, args.batch, rng)), rng)[:, -1].detach()
        seed = torch.randint(2**31, (), generator=rng).item()
        noise = torch.randn(args.horizon, *env.action_space.shape, generator=rng)
        e = rollout(env, env_tasks, agent["exploiter"]["policy"], z, seed, noise, play.numpy())
        returns.append(e.reward.sum(1)[play])
        if len(returns) > n + 100:  # who plays gets a step in each round, unless it diverges at once
            raise FloatingPointError("the physics diverges in the first step of an episode, again and again")
        for k, rows, alive in zip(tasks.tolist(), transitions(e), e.alive):
            learner.rl.add(k, rows[alive])
        taken += e.alive.sum(1)
    return torch.cat(returns).mean().item()


def collect_iteration(learner: Learner, rng: torch.Generator) -> dict[str, float]:
    """Alg. 1, l. 2: the mean returns."""
    args, tasks = learner.args, torch.randint(len(learner.tasks), (learner.args.visits,), generator=rng)
    explorer = collect_trials(learner, tasks, args.trials, rng)
    uninformed = collect(learner, tasks, args.prior_steps, infer=False, rng=rng)
    informed = collect(learner, tasks, args.posterior_steps, infer=True, rng=rng)
    return {"train/return_explorer": explorer, "train/return_prior": uninformed, "train/return_posterior": informed}


def soft_actor_critic(
    learner: Learner, who: str, batch: Transitions, z: Tensor, next_z: Tensor, noise: Tensor, kl: float | Tensor = 0.0
) -> dict[str, Tensor]:
    """A step of the exploiter's networks, or of the explorer's with b for z: the terms of the losses."""
    networks, args = learner.agent[who], learner.args
    q_error = critic_loss(networks, batch, z, next_z, args)
    step(learner.adam[f"{who}_critic"], q_error + args.kl_weight * kl)  # Eq. (4)
    v_error, policy_loss, log_pi = actor_loss(networks, batch.obs, z.detach(), noise, args)
    step(learner.adam[f"{who}_actor"], v_error + policy_loss)
    with torch.no_grad():
        for slow, fast in zip(networks["target"].parameters(), networks["v"].parameters()):
            slow.lerp_(fast, args.tau)  # Eq. (8)
    terms = dict(q_error=q_error, v_error=v_error, policy_loss=policy_loss, log_pi=log_pi)
    return {f"{who}_{name}": value.detach() for name, value in terms.items()}


def gradient_step(learner: Learner, rng: torch.Generator) -> dict[str, Tensor]:
    """Alg. 1, l. 4-6: the terms of the losses."""
    agent, args = learner.agent, learner.args
    tasks = torch.randint(len(learner.tasks), (args.meta_batch,), generator=rng)
    context = draw_contexts(learner, tasks, args.batch + 1, rng)  # [task, N+1, ·]
    rows = learner.rl.sample(tasks, args.batch, rng).flatten(0, 1).to(args.device)  # [row, ·], N a task
    batch = Transitions(*rows.split(learner.widths, dim=-1))
    noise = torch.randn(2, *batch.action.shape, generator=rng).to(args.device)

    q_z = posterior(agent["encoder"], context[:, :-1])  # Alg. 1, l. 4
    with torch.no_grad():
        later = posterior(agent["encoder"], context[:, 1:])  # q after c_1 .. c_i+1, without c_0 (D7)
        b, next_b = belief(q_z).flatten(0, 1), belief(later).flatten(0, 1)  # [row, 2 latent_dim]
    z, kl = draw(q_z, rng).flatten(0, 1), kl_to_prior(q_z, args.kl_as_code)
    exploiter = soft_actor_critic(learner, "exploiter", batch, z, z, noise[0], kl)

    e_d, e_p = prediction_errors(agent, tasks.to(args.device), batch, b, args)  # Alg. 1, l. 5
    step(learner.adam["predictions"], (e_d + e_p).mean())  # Eq. (10)

    gain = (e_d - e_p).detach()[:, None]
    paid = batch._replace(reward=batch.reward + args.intrinsic_weight * gain)  # Eq. (11)
    explorer = soft_actor_critic(learner, "explorer", paid, b, next_b, noise[1])  # Alg. 1, l. 6
    return exploiter | explorer | dict(error_by_belief=e_d.detach(), error_by_id=e_p.detach(), kl=kl.detach())


# Copied from algos/pearl.py
def train_iteration(learner: Learner, rng: torch.Generator) -> dict[str, float]:
    """Alg. 1, l. 3: the means of the losses' terms."""
    steps = tqdm(range(learner.args.gradient_steps), "gradient steps", leave=False, disable=None)
    terms = [gradient_step(learner, rng) for _ in steps]
    return {f"sac/{name}": torch.stack([t[name] for t in terms]).mean().item() for name in terms[0]}


# == Evaluation ========================================================================================================


# Copied from algos/milet.py
def returns_by_cluster(name: str, returns: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """The mean of the returns [task] and, if there are several, of every true cluster."""
    present = np.unique(clusters)
    by_cluster = {f"{name}_cluster_{m}": float(returns[clusters == m].mean()) for m in present}
    return {name: float(returns.mean())} | (by_cluster if len(present) > 1 else {})


@torch.inference_mode()
def evaluate(
    env: gym.vector.VectorEnv, tasks: envs.Tasks, agent: nn.ModuleDict, args: Args
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Alg. 2 on the held-out tasks (D2): the metrics, and what the figures need."""
    rng = torch.Generator().manual_seed(10**6 + args.seed)
    seeds = torch.randint(2**31, (args.explorer_episodes + 1,), generator=rng).tolist()
    mean_actions = torch.zeros(args.explorer_episodes, args.horizon, *env.action_space.shape, device=args.device)
    episodes, context = explore(env, tasks, agent, seeds[:-1], mean_actions, args.eval_refresh)  # Alg. 2, l. 1
    q_z = posterior(agent["encoder"], context.to(args.device))
    z, everyone, metrics = draw(q_z, rng)[:, -1], np.ones(len(tasks), bool), {}  # z after the last token
    episodes.append(rollout(env, tasks, agent["exploiter"]["policy"], z, seeds[-1], mean_actions[0], everyone))  # l. 2
    for k, episode in enumerate(episodes, start=1):  # the last is the exploiter's
        returns = episode.reward.double().sum(1).numpy()
        metrics |= returns_by_cluster(f"eval/return_episode_{k}", returns, tasks.cluster)
    metrics["eval/posterior_std"] = q_z.stddev[:, -1].mean().item()
    arrays = dict(
        params=tasks.params, cluster=tasks.cluster, seed=np.array(seeds), embedding=q_z.mean[:, -1].cpu().numpy(),
        trace=np.stack([e.obs[:, :, :2].transpose(0, 1).numpy() for e in episodes]),  # [episode, H+1, task, 2]
        action=np.stack([e.action.transpose(0, 1).numpy() for e in episodes]),  # [episode, H, task, action_dim]
    )  # fmt: skip
    return metrics, arrays


# == Training ==========================================================================================================


# Copied from algos/pearl.py
def different(tasks: envs.Tasks, n: int) -> envs.Tasks:
    """The first n different ones."""
    _, first = np.unique(tasks.params, axis=0, return_index=True)
    return tasks[np.sort(first)[:n]]


def train(args: Args, run: "Run") -> None:
    """Algorithm 1."""
    env = run.make_env(1).unwrapped
    test_tasks, tasks = env.task_set("test"), different(env.task_set("train"), args.train_tasks)
    fail(f"--train-tasks must be at most {len(tasks)}: {args.env} has no more", when=len(tasks) < args.train_tasks)
    learner = make_learner(cache(run.make_env), tasks, args)
    state = dict(agent=learner.agent, rl=learner.rl, trials=learner.trials) | learner.adam
    evaluation = partial(evaluate, run.make_env(len(test_tasks)), test_tasks, learner.agent, args)
    for iteration in run.loop(args.iterations, state, evaluation):
        with run.timer("sample"):
            if iteration == 1:  # l. 1
                every = torch.arange(len(tasks))
                collect_trials(learner, every, args.initial_trials, run.rng)
                if args.initial_steps > 0:
                    collect(learner, every, args.initial_steps, infer=False, rng=run.rng)
            returns = collect_iteration(learner, run.rng)  # l. 2
        run.frames = sum(map(len, learner.rl.rows))
        with run.timer("sac"):
            losses = train_iteration(learner, run.rng)  # l. 3
        run.log(returns | losses)


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
