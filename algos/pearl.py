"""PEARL: off-policy meta-reinforcement learning with probabilistic context variables (Rakelly et al., ICML 2019).

Official code: github.com/katerakelly/oyster, with its settings where it has the task; numbers of equations are ours.

Objective    Eq. (1)  q_φ(z|c) ∝ Π_n N(z; μ_φ(c_n), σ²_φ(c_n)), the product over the transitions c_n of a context c
             Eq. (2)  KL = Σ_i KL(q_φ(z|c_i) ‖ N(0, I)), i the tasks of a batch
             Eq. (3)  y = ρ r + (1 - d) γ V̄(s',z), d = 1 at a fall
             Eq. (4)  min over φ, Q:  Σ_j (Q_j(s,a,z) - y)² + β KL, with z ~ q_φ(z|c)
             Eq. (5)  ã = tanh(u), u = m(s,z) + σ(s,z) ε, ε ~ N(0,I);  ln π(ã|s,z) = Σ ln N(u; m,σ²) - ln(1 - ã² + 1e-6)
             Eq. (6)  min over V:  (V(s,z) - [min_j Q_j(s,ã,z) - ln π(ã|s,z)])²
             Eq. (7)  min over π:  ln π(ã|s,z) - min_j Q_j(s,ã,z) + 1e-3 (mean m² + mean ln²σ)
             Eq. (8)  V̄ <- (1 - τ) V̄ + τ V
             Only the critic and the KL train φ: V and π see a z without gradient.

Algorithm 1  l. 1  before the first iteration, a prior block of every training task -> collect
             l. 2  visits to tasks drawn with replacement, each with the three blocks below -> collect_iteration
             l. 3  gradient steps, each on tasks drawn with replacement -> train_iteration
             l. 4    a context of each gives its z; critic and encoder learn from other transitions of it, then V and
                     policy, then the slow copy of V -> gradient_step, critic_loss, kl_to_prior, actor_loss
Algorithm 2  l. 1  a test task: z from the prior, or from the posterior of all episodes so far -> adapt
             l. 2  an episode of mean actions, which joins the context -> adapt, evaluate

  one visit to a task   |  prior block           |  posterior block                       |  extra block
  z of an episode       |  N(0, I)               |  1st N(0, I), then q(z|c), one by one  |  1st N(0, I), then q(z|c)
  into the context      |  yes, after a clearing |  yes                                   |  no
  into the RL data      |  yes                   |  yes                                   |  yes

Symbols      φ -> encoder; Q_1, Q_2 -> q (one batched network); V, V̄ -> v, target; π -> policy; c -> context
             [task, token, ·]; z [task, latent_dim]; ρ, β, γ, τ -> reward_scale, kl_weight, gamma, tau

Deviations from the official code (C)
  D1  C visits one task after another and plays one episode at a time; here all visits of an iteration go block by block
      and their episodes in lockstep, which fills the cores. The data are distributed as C's: no network changes
      meanwhile, each visit infers from a context of its own, and plays until it has its steps.
  D2  C counts steps at test too, so that robots that fall get more episodes; here everyone gets eval_episodes.
  D3  C keeps contexts in a second buffer, both float64 and of 1e6 steps a task; here one float32 storage holds the
      whole run, and two indices say which of its rows belong to a task, and which to its context. So none is forgotten
      (C forgets in cheetah-dir from iteration 200 on). The step in which a simulation diverges is dropped.
  D4  C has five optimisers; here one for critic and encoder, one for V and π. Adam is elementwise: the same steps.
  D5  C tests on its own tasks; here on the environment's own, where directions repeat too.
      C has 20 observations in cheetah-dir (here 17), and velocities up to 3 in cheetah-vel (here 2). Its sparse point
      has H = 20 and feels goals within 0.2 (here 32, 0.3), and is paid densely in training (D6). Its ant-dir has
      two random directions, no contact forces among 27 observations, and death outside heights of 0.2 to 1; here
      forward and backward, 111 observations, 0 to 1.
  D6  Left out, C's options: dense reward with sparse context, encoder without bottleneck, recurrent encoder.

Tested       python algos/pearl.py --env cheetah-dir --iterations 60   (604,000 frames, two hours on one core of an AMD
             EPYC): 1141 in the episode after inference (forward 1091, backward 1190), -118 and 51 in the two before.
             That run was made before D1 to D3 were what they are: blocks counted episodes, not steps.
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
    env: str = "cheetah-dir"  # environment id (module:id imports the module first)
    preset: Literal["paper", "fast"] | None = None  # published, or ours, of about an hour (default where there is one)
    seed: int = 0  # seed of everything random
    device: Literal["cpu", "cuda"] = "cpu"  # device of the networks
    num_threads: int = 0  # number of threads of the physics and of the updates (0: all CPUs)
    iterations: int = 500  # number of iterations of collecting and training
    eval_every: int = 10  # iterations between evaluations on the held-out tasks
    save_every: int = 5  # iterations between checkpoints
    track: bool = False  # mirror the run to Weights & Biases
    run_dir: str = "runs"  # folder in which the run gets its own folder
    name: str | None = None  # name of the run's folder (if it exists, its run is continued; default: with the time)
    resume: str | None = None  # run folder to continue (its args.json applies)
    evaluate: str | None = None  # run folder to evaluate without training (its args.json applies)

    train_tasks: int = 500  # number of training tasks, the first different ones of the environment's training set
    horizon: int = 100  # H, steps per episode (default: the environment's own)
    initial_steps: int = 200  # steps in every training task before the first update, z from the prior
    visits: int = 5  # number of tasks visited per iteration, drawn with replacement
    prior_steps: int = 400  # steps of a visit with z from the prior
    posterior_steps: int = 0  # steps of a visit with z from the posterior that join the context
    extra_steps: int = 600  # steps of a visit with z from the posterior that do not join the context
    gradient_steps: int = 4000  # number of gradient steps per iteration
    eval_episodes: int = 2  # number of episodes in each held-out task
    eval_prior_episodes: int = 1  # how many of these, the first ones, have z from the prior

    latent_dim: int = 5  # dimensions of z
    next_obs_in_context: bool = False  # context of (s, a, r, s') instead of (s, a, r)
    encoder_hidden: tuple[int, ...] = (200, 200, 200)  # widths of the encoder's hidden layers
    hidden: tuple[int, ...] = (300, 300, 300)  # widths of the hidden layers of policy, Q and V
    meta_batch: int = 16  # number of tasks in a gradient step
    batch: int = 256  # transitions of each of these tasks
    context: int = 256  # transitions in the context of each of these tasks
    kl_weight: float = 0.1  # β, weight of the KL, which is a sum over tasks
    reward_scale: float = 5.0  # ρ, factor on the reward, beside the entropy's weight of 1
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # τ, rate at which the slow copy of V follows
    lr: float = 3e-4  # learning rate of all networks
    policy_regularisation: float = 1e-3  # weight of the squared mean and log σ of the policy


# oyster's configurations. MILET's suite has Args' values: two episodes of 100 steps, as in its comparison; the rest is
# oyster's humanoid-dir.json (context 256, extra steps 600, gradient steps 4000) with a tenth of the initial steps.
OYSTER = dict(horizon=200, initial_steps=2000, eval_episodes=3, eval_prior_episodes=2)
CHEETAH_DIR = OYSTER | dict(train_tasks=2, meta_batch=4, prior_steps=1000, extra_steps=1000, gradient_steps=2000)
TWO_ROBOTS = dict(train_tasks=4, visits=10, iterations=155)
PAPER = {
    "cheetah-dir": CHEETAH_DIR,
    "cheetah-vel": OYSTER | dict(train_tasks=100, gradient_steps=2000, context=100),
    "ant-dir": OYSTER | dict(train_tasks=2, meta_batch=4),
    "walker-dir": CHEETAH_DIR,  # Taming the Herd, Table 4, for one robot
    "ml2": CHEETAH_DIR | TWO_ROBOTS,  # Taming the Herd, Table 4; the iterations are ours
    "ant-cheetah-dir": CHEETAH_DIR | TWO_ROBOTS,  # ours, as in ml2
    "point-goal-sparse": dict(  # oyster's sparse-point-robot, but for D2, D5 and D6
        train_tasks=80, visits=10, prior_steps=100, posterior_steps=900, extra_steps=0, gradient_steps=1000,
        context=1024, eval_episodes=13, eval_prior_episodes=5, kl_weight=1.0, reward_scale=100.0, gamma=0.9,
    ),
    "hopper-params-4c": dict(next_obs_in_context=True),  # as in oyster's rand-params
    "walker-params-4c": dict(next_obs_in_context=True),
}  # fmt: skip
FAST = {
    "point-goal-4c": dict(
        train_tasks=500, initial_steps=200, visits=100, prior_steps=200, extra_steps=200, gradient_steps=1000,
        iterations=80, eval_every=2, eval_episodes=4, encoder_hidden=(128, 128), hidden=(128, 128), context=64,
        batch=64, gamma=0.9, reward_scale=20.0, tau=0.01, lr=1e-3,
    ),
    "point-goal-sparse": dict(  # budget and sizes as MetaCURE's
        train_tasks=500, horizon=32, initial_steps=64, visits=20, prior_steps=32, extra_steps=320, gradient_steps=200,
        iterations=200, encoder_hidden=(64, 64), hidden=(64, 64), meta_batch=8, context=33, batch=33, gamma=0.9,
        reward_scale=100.0, tau=0.01, lr=2e-3,
    ),
}  # fmt: skip
MAY_BE_0 = ("seed", "num_threads", "posterior_steps", "extra_steps")


def check(args: Args, env: type[envs.TaskVectorEnv]) -> dict[str, bool]:
    """What must hold; where it does not, the message is the error."""
    return {
        "--reward-scale and --lr must be positive": min(args.reward_scale, args.lr) > 0,
        "--kl-weight must be at least 0": args.kl_weight >= 0,
        "--policy-regularisation must be at least 0": args.policy_regularisation >= 0,
        "--gamma must be in [0, 1]": 0 <= args.gamma <= 1,
        "--tau must be in (0, 1]": 0 < args.tau <= 1,
        "--eval-prior-episodes must be at most --eval-episodes": args.eval_prior_episodes <= args.eval_episodes,
    }


# == Networks ==========================================================================================================


class MLP(nn.Module):
    """`copies` networks of ReLU layers, evaluated together, with the initialisation of the official code."""

    def __init__(self, *sizes: int, copies: int = 1, last: float = 3e-3):
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        *hidden, (inputs, outputs) = pairwise(sizes)
        for before, after in hidden:
            bound = 1 / math.sqrt(after)
            self.weights.append(torch.empty(copies, before, after).uniform_(-bound, bound))
            self.biases.append(torch.full((copies, 1, after), 0.1))
        self.weights.append(torch.empty(copies, inputs, outputs).uniform_(-last, last))
        self.biases.append(torch.empty(copies, 1, outputs).uniform_(-last, last))
        self.layers = list(zip(self.weights, self.biases))  # once: reading a ParameterList is slow

    def forward(self, *parts: Tensor) -> Tensor:
        """Inputs, joined along the last dimension, [row, ·] -> [copy, row, out]."""
        x = torch.cat(parts, dim=-1)
        return forward_onednn(self, x) if x.device.type == "cpu" and len(x) >= 512 else self.head(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """The last hidden layer, [row, in] -> [copy, row, hidden]."""
        x = x.expand(len(self.weights[0]), -1, -1)
        for w, b in self.layers[:-1]:
            x = torch.baddbmm(b, x, w).relu_()
        return x

    def head(self, h: Tensor) -> Tensor:
        """The output layer, [copy, row, hidden] -> [copy, row, out]."""
        w, b = self.layers[-1]
        return torch.baddbmm(b, h, w)


def make_agent(obs_dim: int, action_dim: int, args: Args) -> nn.ModuleDict:
    token, state = obs_dim * (1 + args.next_obs_in_context) + action_dim + 1, obs_dim + args.latent_dim
    agent = nn.ModuleDict(dict(
        encoder=MLP(token, *args.encoder_hidden, 2 * args.latent_dim),
        policy=MLP(state, *args.hidden, 2 * action_dim, last=1e-3),
        q=MLP(state + action_dim, *args.hidden, 1, copies=2),
        v=MLP(state, *args.hidden, 1),
        target=MLP(state, *args.hidden, 1),
    ))  # fmt: skip
    agent["target"].requires_grad_(False).load_state_dict(agent["v"].state_dict())
    return agent.to(args.device)


def pre_tanh(policy: MLP, obs: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """m and ln σ of Eq. (5), [row, action_dim] each."""
    mean, log_std = policy(obs, z)[0].chunk(2, dim=-1)
    return mean, log_std.clamp(-20, 2)


def squashed(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """ã [row, action_dim] and ln π(ã|s,z) [row] of Eq. (5), ε the noise."""
    action = (mean + log_std.exp() * noise).tanh()
    log_normal = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
    return action, (log_normal - (1 - action**2 + 1e-6).log()).sum(-1)


def forward_onednn(net: MLP, x: Tensor) -> Tensor:
    """`net.head(net.features(x))`, for speed on a CPU: oneDNN's products are faster than batched ones, if large.

    h_0 = x, h_k = relu(h_(k-1) W_k + b_k), and the output is h_n W_(n+1) + b_(n+1), for each of the copies.
    """
    outputs = []
    for i in range(len(net.weights[0])):
        h = x.to_mkldnn()
        for w, b in net.layers[:-1]:
            h = F.linear(h, w[i].T, b[i, 0]).relu()
        w, b = net.layers[-1]
        outputs.append(F.linear(h, w[i].T, b[i, 0]).to_dense())
    return torch.stack(outputs)


# == Sampler ===========================================================================================================


class Episodes(NamedTuple):
    """An episode of every copy."""

    obs: Tensor  # [copy, H+1, obs_dim]
    action: Tensor  # [copy, H, action_dim]
    reward: Tensor  # [copy, H]
    terminated: Tensor  # [copy, H], 1 at a fall; a time limit is none
    alive: Tensor  # [copy, H] bool: steps taken, none after a fall, nor the one in which a simulation diverges (D3)


# Copied from algos/maml.py
def random_seed(rng: torch.Generator) -> int:
    return torch.randint(2**31, (), generator=rng).item()


@torch.inference_mode()
def rollout(
    env: gym.vector.VectorEnv, tasks: envs.Tasks, policy: MLP, z: Tensor, seed: int, noise: Tensor, play: np.ndarray
) -> Episodes:
    """An episode of the copies that play [copy] bool, in lockstep, each in its own task and with its own z [copy, ·].

    noise: the ε of Eq. (5), [H, copy, action_dim].
    """
    threads, device = torch.get_num_threads(), next(policy.parameters()).device
    torch.set_num_threads(1)  # torch's threads would fight with those of the physics
    z, noise = z.to(device), noise.to(device)
    horizon, copies, action_dim = noise.shape
    obs = np.zeros((copies, horizon + 1, *env.single_observation_space.shape), np.float32)
    action, reward = np.zeros((copies, horizon, action_dim), np.float32), np.zeros((copies, horizon), np.float32)
    terminated, alive = np.zeros((copies, horizon), np.float32), np.zeros((copies, horizon), bool)
    obs[:, 0], _ = env.reset(seed=seed, options={"tasks": tasks, "reset_mask": play})
    for t in range(horizon):
        if not play.any():
            obs[:, t + 1 :] = obs[:, t : t + 1]
            break
        mean, log_std = pre_tanh(policy, torch.from_numpy(obs[:, t]).to(device), z)
        action[:, t] = (mean + log_std.exp() * noise[t]).tanh().cpu().numpy()
        obs[:, t + 1], reward[:, t], fell, out_of_time, info = env.step(action[:, t])
        alive[:, t] = play & ~info["diverged"]
        terminated[:, t] = fell & alive[:, t]
        play = play & ~(fell | out_of_time)
    torch.set_num_threads(threads)
    return Episodes(*map(torch.from_numpy, (obs, action, reward, terminated, alive)))


# == Replay data =======================================================================================================


class Transitions(NamedTuple):
    """[task, transition, ·] or [row, ·] each."""

    obs: Tensor
    action: Tensor
    reward: Tensor
    next_obs: Tensor
    terminated: Tensor


class Storage:
    """All states and steps of the run in the order of collection (D3), grown as needed.

    An episode of n steps takes n + 1 rows, one a state; so the next state of row i is in row i + 1. A copy that does
    not play takes a row too.
    """

    def __init__(self, obs_dim: int, action_dim: int):
        self.widths = obs_dim, action_dim, 1, 1  # of state, action, reward, fall
        self.data, self.used = torch.empty(2**16, sum(self.widths)), 0

    def add(self, episodes: Episodes) -> list[Tensor]:
        """Returns, for every episode, the rows of the steps taken."""
        rows = []
        for obs, action, reward, terminated, alive in zip(*episodes):
            steps, first = int(alive.sum()), self.used
            last = first + steps  # the row of the last state
            if last >= len(self.data):
                self.data.resize_(2 * (last + 1), sum(self.widths))
            parts = obs[:-1], action, reward[:, None], terminated[:, None]
            self.data[first:last] = torch.cat(parts, dim=1)[:steps]
            self.data[last, : self.widths[0]] = obs[steps]
            rows.append(torch.arange(first, last))
            self.used = last + 1
        return rows

    def read(self, rows: Tensor) -> Transitions:
        """Of rows [task, n] (index_select is several times as fast as indexing)."""
        now, after = (self.data.index_select(0, r.flatten()).view(*r.shape, -1) for r in (rows, rows + 1))
        obs, action, reward, terminated = now.split(self.widths, dim=-1)
        return Transitions(obs, action, reward, after[..., : self.widths[0]], terminated)

    def state_dict(self) -> dict:
        return dict(data=self.data[: self.used].clone())

    def load_state_dict(self, state: dict) -> None:
        self.data, self.used = state["data"].clone(), len(state["data"])


class Index:
    """Which rows of a storage belong to each of n tasks (or visits), in the order of collection."""

    def __init__(self, n: int):
        self.rows = [torch.empty(0, dtype=torch.int64)] * n

    def add(self, i: int, rows: Tensor) -> None:
        self.rows[i] = torch.cat([self.rows[i], rows])

    def sample(self, which: Tensor, n: int, rng: torch.Generator) -> Tensor:
        """n rows of each of `which`, with replacement: [len(which), n]."""
        uniform = torch.rand(len(which), n, generator=rng, dtype=torch.float64)
        mine = [self.rows[i] for i in which.tolist()]
        return torch.stack([rows[(u * len(rows)).long()] for rows, u in zip(mine, uniform)])

    def state_dict(self) -> dict:
        return dict(rows=self.rows)

    def load_state_dict(self, state: dict) -> None:
        self.rows = [rows.clone() for rows in state["rows"]]


# == Task inference ====================================================================================================


def tokens(c: Transitions, args: Args) -> Tensor:
    """c_n: (s, a, r), or (s, a, r, s'), the reward as the environment gives it (D6)."""
    parts = (c.obs, c.action, c.reward, c.next_obs) if args.next_obs_in_context else (c.obs, c.action, c.reward)
    return torch.cat(parts, dim=-1)


def posterior(encoder: MLP, context: Tensor, alive: Tensor | None = None) -> Normal:
    """Eq. (1) of contexts [task, token, ·] (those that are alive [task, token]; the prior, if none is)."""
    mean, raw_var = encoder(context.flatten(0, 1))[0].view(*context.shape[:2], -1).chunk(2, dim=-1)
    precision = 1 / F.softplus(raw_var).clamp(min=1e-7)
    precision = precision if alive is None else precision * alive[..., None]
    total = precision.sum(1)
    var = 1 / total.where(total > 0, 1.0)  # [task, latent_dim]; of no token the prior
    return Normal(var * (precision * mean).sum(1), var.sqrt(), validate_args=False)


def draw(q: Normal, rng: torch.Generator) -> Tensor:
    return q.mean + q.stddev * torch.randn(q.mean.shape, generator=rng).to(q.mean.device)


def kl_to_prior(q: Normal) -> Tensor:
    """Eq. (2), a sum over tasks and dimensions."""
    return kl_divergence(q, Normal(torch.zeros_like(q.mean), 1.0, validate_args=False)).sum()


# == Soft actor-critic =================================================================================================


def critic_loss(agent: nn.ModuleDict, batch: Transitions, z: Tensor, next_z: Tensor, args: Args) -> Tensor:
    """Of Q_1, Q_2 and φ, Eq. (4) without the KL; batch and z [row, ·], next_z the z of the next state."""
    with torch.no_grad():
        next_v = agent["target"](batch.next_obs, next_z)[0]
        bellman = args.reward_scale * batch.reward + (1 - batch.terminated) * args.gamma * next_v  # Eq. (3)
    error = agent["q"](batch.obs, batch.action, z) - bellman  # [2, row, 1]
    return error.square().mean((1, 2)).sum()  # Eq. (4)


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
    """A gradient step on the parameters of the optimiser alone."""
    parameters = optimizer.param_groups[0]["params"]
    for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
        p.grad = gradient
    optimizer.step()


# == Learner ===========================================================================================================


class Learner(NamedTuple):
    """One PEARL: its networks, its data, its training tasks."""

    agent: nn.ModuleDict
    adam_critic: torch.optim.Optimizer  # of Q and encoder (D4)
    adam_actor: torch.optim.Optimizer  # of V and π
    storage: Storage
    rl: Index  # of the storage, the rows of every training task
    context: Index  # of these, the rows of its context
    tasks: envs.Tasks
    make_env: Callable[[int], gym.vector.VectorEnv]  # by the number of copies
    args: Args

    @property
    def frames(self) -> int:
        """The steps kept so far."""
        return sum(map(len, self.rl.rows))


def make_learner(make_env: Callable[[int], gym.vector.VectorEnv], tasks: envs.Tasks, args: Args) -> Learner:
    env = make_env(1)
    obs_dim, action_dim = env.single_observation_space.shape[0], env.single_action_space.shape[0]
    agent = make_agent(obs_dim, action_dim, args)
    adam = partial(torch.optim.Adam, lr=args.lr, fused=True)
    adam_critic = adam([*agent["q"].parameters(), *agent["encoder"].parameters()])
    adam_actor = adam([*agent["v"].parameters(), *agent["policy"].parameters()])
    storage, rl, context = Storage(obs_dim, action_dim), Index(len(tasks)), Index(len(tasks))
    return Learner(agent, adam_critic, adam_actor, storage, rl, context, tasks, make_env, args)


@torch.inference_mode()
def posterior_z(learner: Learner, contexts: Index, episodes: int, rng: torch.Generator) -> Tensor:
    """z ~ q_φ(z|c), c of every z a new sample of the visit's context: [visit, episode, latent_dim]."""
    args, visits = learner.args, len(contexts.rows)
    which = torch.arange(visits).repeat_interleave(episodes)
    context = learner.storage.read(contexts.sample(which, args.context, rng))
    q_z = posterior(learner.agent["encoder"], tokens(context, args).to(args.device))
    return draw(q_z, rng).cpu().view(visits, episodes, -1)


def collect(
    learner: Learner, tasks: Tensor, contexts: Index, steps: int, infer: bool, to_context: bool, rng: torch.Generator
) -> float:
    """The mean return of a block of the visits to tasks [visit], each with a context of its own (D1).

    infer: z from the posterior, but for a visit's first episode. A round plays all the episodes that are surely needed;
    only one, if it changes the posterior of the next.
    """
    args, visits, taken, returns = learner.args, len(tasks), torch.zeros(len(tasks)), []
    episodes = 1 if infer and to_context else math.ceil(steps / args.horizon)  # of a visit in a round
    visit = torch.arange(visits).repeat_interleave(episodes)  # [copy]
    task = tasks[visit]  # [copy]
    env, env_tasks = learner.make_env(len(visit)), learner.tasks[task.numpy()]
    while (taken < steps).any():
        z = from_prior = torch.randn(visits, 1 if infer else episodes, args.latent_dim, generator=rng)
        if infer:
            z = posterior_z(learner, contexts, episodes, rng)
            if not taken.any():  # the first episode of each visit
                z = torch.cat([from_prior, z[:, 1:]], dim=1)
        needed = ((steps - taken) / args.horizon).ceil()  # episodes [visit]; at most 0: done
        play = (torch.arange(episodes) < needed[:, None]).flatten()  # [copy]
        seed, noise = random_seed(rng), torch.randn(args.horizon, *env.action_space.shape, generator=rng)
        played = rollout(env, env_tasks, learner.agent["policy"], z.flatten(0, 1), seed, noise, play.numpy())
        returns.append(played.reward.sum(1)[play])
        if len(returns) > steps + 100:  # who plays gets a step in each round, unless it diverges at once
            raise FloatingPointError("the physics diverges in the first step of an episode, again and again")
        for i, k, rows in zip(visit.tolist(), task.tolist(), learner.storage.add(played)):
            learner.rl.add(k, rows)
            if to_context:
                contexts.add(i, rows)
            taken[i] += len(rows)
    return torch.cat(returns).mean().item()


def collect_iteration(learner: Learner, rng: torch.Generator) -> dict[str, float]:
    """Alg. 1, l. 2: the mean return of every block."""
    args, contexts, returns = learner.args, Index(learner.args.visits), {}
    tasks = torch.randint(len(learner.tasks), (args.visits,), generator=rng)
    blocks = dict(  # steps, z from the posterior?, into the context?
        prior=(args.prior_steps, False, True),
        posterior=(args.posterior_steps, True, True),
        extra=(args.extra_steps, True, False),
    )
    for name, (steps, infer, to_context) in blocks.items():
        if steps > 0:
            returns[f"train/return_{name}"] = collect(learner, tasks, contexts, steps, infer, to_context, rng)
    for task, rows in zip(tasks.tolist(), contexts.rows):
        learner.context.rows[task] = rows  # in place of the old ones; of two visits to a task the last one's stay
    return returns


def gradient_step(learner: Learner, rng: torch.Generator) -> dict[str, Tensor]:
    """Alg. 1, l. 4, in the order of the official code: the terms of the losses."""
    agent, args = learner.agent, learner.args
    tasks = torch.randint(len(learner.tasks), (args.meta_batch,), generator=rng)
    context = learner.storage.read(learner.context.sample(tasks, args.context, rng))  # [task, token, ·]
    batch = learner.storage.read(learner.rl.sample(tasks, args.batch, rng))  # [task, transition, ·]
    batch = Transitions(*(x.flatten(0, 1).to(args.device) for x in batch))  # [row, ·]
    noise = torch.randn(batch.action.shape, generator=rng).to(args.device)

    q_z = posterior(agent["encoder"], tokens(context, args).to(args.device))
    z = draw(q_z, rng).repeat_interleave(args.batch, dim=0)  # [row, latent_dim]
    q_error, kl = critic_loss(agent, batch, z, z, args), kl_to_prior(q_z)
    step(learner.adam_critic, q_error + args.kl_weight * kl)  # Eq. (4)

    v_error, policy_loss, log_pi = actor_loss(agent, batch.obs, z.detach(), noise, args)
    step(learner.adam_actor, v_error + policy_loss)
    with torch.no_grad():
        for slow, fast in zip(agent["target"].parameters(), agent["v"].parameters()):
            slow.lerp_(fast, args.tau)  # Eq. (8)
    terms = dict(q_error=q_error, kl=kl, v_error=v_error, policy_loss=policy_loss, log_pi=log_pi)
    return {name: value.detach() for name, value in terms.items()}


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
def adapt(
    env: gym.vector.VectorEnv, tasks: envs.Tasks, agent: nn.ModuleDict, rng: torch.Generator, args: Args
) -> tuple[list[Episodes], list[int], Normal]:
    """Alg. 2 on each of the tasks: its episodes (D2), their reset seeds, and the posterior after the last."""
    q_z = prior = Normal(torch.zeros(len(tasks), args.latent_dim), 1.0)
    episodes, seeds, context, alive = [], [], [], []  # of every episode
    mean_actions, everyone = torch.zeros(args.horizon, *env.action_space.shape), np.ones(len(tasks), bool)
    for k in range(args.eval_episodes):
        z = draw(prior if k < args.eval_prior_episodes else q_z, rng)  # Alg. 2, l. 1
        seed = random_seed(rng)
        e = rollout(env, tasks, agent["policy"], z, seed, mean_actions, everyone)  # l. 2
        seen = Transitions(e.obs[:, :-1], e.action, e.reward[..., None], e.obs[:, 1:], e.terminated[..., None])
        episodes.append(e)
        seeds.append(seed)
        context.append(tokens(seen, args))
        alive.append(e.alive)
        q_z = posterior(agent["encoder"], torch.cat(context, 1).to(args.device), torch.cat(alive, 1).to(args.device))
    return episodes, seeds, q_z


def evaluate(
    make_env: Callable, tasks: envs.Tasks, known: envs.Tasks, agent: nn.ModuleDict, args: Args
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Adaptation to the held-out tasks (D5): the metrics, and what the figures need. Known tasks are scored too."""
    rngs = [torch.Generator().manual_seed(10**6 + args.seed) for _ in range(2)]  # alike: the same z and starts
    trained, _, _ = adapt(make_env(len(known)), known, agent, rngs[0], args)
    episodes, seeds, q_z = adapt(make_env(len(tasks)), tasks, agent, rngs[1], args)
    metrics = {f"eval/train_return_episode_{k}": e.reward.sum(1).mean().item() for k, e in enumerate(trained, start=1)}
    for k, episode in enumerate(episodes, start=1):
        returns = episode.reward.double().sum(1).numpy()
        metrics |= returns_by_cluster(f"eval/return_episode_{k}", returns, tasks.cluster)
    metrics["eval/posterior_std"] = q_z.stddev.mean().item()
    arrays = dict(
        params=tasks.params,
        cluster=tasks.cluster,
        trace=np.stack([e.obs[:, :, :2].transpose(0, 1).numpy() for e in episodes]),  # [episode, H+1, task, 2]
        action=np.stack([e.action.transpose(0, 1).numpy() for e in episodes]),  # [episode, H, task, action_dim]
        seed=np.array(seeds),  # [episode]
        embedding=q_z.mean.cpu().numpy(),  # [task, latent_dim]
    )
    return metrics, arrays


# == Training ==========================================================================================================


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
    parts = "agent", "storage", "rl", "context", "adam_critic", "adam_actor"
    state = {name: getattr(learner, name) for name in parts}
    evaluation = partial(evaluate, learner.make_env, test_tasks, tasks[: len(test_tasks)], learner.agent, args)
    for iteration in run.loop(args.iterations, state, evaluation):
        with run.timer("sample"):
            if iteration == 1:  # l. 1
                every = torch.arange(len(tasks))
                collect(learner, every, learner.context, args.initial_steps, infer=False, to_context=True, rng=run.rng)
            returns = collect_iteration(learner, run.rng)  # l. 2
        run.frames = learner.frames
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
