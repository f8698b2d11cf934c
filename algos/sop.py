"""SoP, a String of PEARLs: Taming the Herd (Müller, Parker-Holder and Pacchiano, LifelongML workshop at ICML 2020).

No official code. A probe, a PEARL on all tasks, plays episodes in the training tasks; what it meets is embedded, the
embeddings are clustered, and each cluster gets a PEARL of its own. A new task finds its member through an episode of
the probe. Equations' numbers are ours; (1)-(8), Alg. 1 and 2 are pearl.py's, the paper's 1 and 2 here 3 and 4.

PEARL        q_φ(z|c) ∝ Π_n N(z; μ_φ(c_n), σ²_φ(c_n));  KL = Σ_i KL(q_φ(z|c_i) ‖ N(0, I))                 Eq. (1), (2)
             min over φ, Q:  Σ_j (Q_j(s,a,z) - y)² + β KL,  y = ρ r + (1 - d) γ V̄(s',z), d = 1 at a fall  Eq. (3), (4)
             soft actor-critic for π and V: ã = tanh(m(s,z) + σ(s,z) ε), ε ~ N(0,I), V̄ slowly after V      Eq. (5)-(8)
Embedding    φ(T) = E[ r diag E_ã[v vᵀ] ],  v = ∇ ln π(ã|s,z): a reward-weighted Fisher matrix                   Eq. (9)
             or E[ r x xᵀ ], x = [s, s'];  or the mean of q_φ(z|c);  or E[ r ∇ ln π(a|s,z) ]             Eq. (10)-(12)
             ∇ by the last layer, h its input: [h, 1] ⊗ [ε/σ, ε² - 1]; E_ã of its square [h, 1]² ⊗ [σ⁻², 2]     Eq. (13)
Assignment   argmin over k of ‖φ(T) - c_k‖,  c_k the mean embedding of cluster k                                Eq. (14)
Algorithm 3  l. 1  train the probe -> train           l. 2  embed the training tasks -> observe
             l. 3  cluster -> coordinates, train      l. 4  train every member on its cluster -> train
Algorithm 4  l. 1  embed a test task -> observe       l. 2  nearest centroid -> assign    l. 3  adapt -> adapt, evaluate

Symbols      learner 0 the probe, 1 .. the members; points: the probe's episodes in training tasks; labels [kind, point]
             and owner [task]: their learners; E is over an episode, r over the largest |r|; else as in pearl.py.

Deviations from the paper (P), and from the official code of PEARL (C), which P runs; D1 to D5 are pearl.py's
  D1  C plays one episode at a time; here in lockstep. D2 C counts steps at test too; here episodes. D3 One float32
      storage; the step in which a simulation diverges is dropped. D4 Two optimisers of C's five. D5 C tests on its own
      tasks. D6 No option of C: posterior block (P has none), sparse context, no bottleneck, recurrent encoder.
  D7  P is silent on linkage, K, the number of points, how long and from where learners train; here Ward's, 2, 50 in
      each training task, 50 iterations of the probe and 100 of the members, which begin anew.
  D8  P's members make 5 visits each to the probe's 10; here they share 10, so that an iteration costs the same frames.
  D9  P divides r by max r, undefined at 0, of wrong sign below; here by max |r| of its episode, not of its task, and
      (9), (10) have |r|. D10 P does not say of which weights (9) is, and draws an ã; here the last layer's diagonal,
      and the mean over ã. P prints (12) with ∇π; here ∇ ln π. D11 Embeddings, but latents, are standardised over the
      points, cut at ±2, and to 50 principal components. D12 A training task joins the cluster of most of its points;
      one of none has no member. D13 P is silent on the probe's play; here z from the prior, sampled, one episode.

Tested       python algos/sop.py --iterations 12 --probe-iterations 4 --gradient-steps 500 --initial-steps 1000   (ml2,
             280,000 frames, 27 minutes of a shared core, too short): 46, then 54 (standing still 56); it finds both.
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
from sklearn.cluster import AgglomerativeClustering
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, pairwise_distances_argmin
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import envs

# == Args ==============================================================================================================


@dataclass
class Args:
    env: str = "ml2"  # environment id (module:id imports the module first)
    preset: Literal["paper", "fast"] | None = None  # published, or ours, of about an hour (default where there is one)
    seed: int = 0  # seed of everything random
    device: Literal["cpu", "cuda"] = "cpu"  # device of the networks
    num_threads: int = 0  # number of threads of the physics and of the updates (0: all CPUs)
    iterations: int = 150  # number of iterations of collecting and training, those of the probe included
    eval_every: int = 10  # iterations between evaluations on the held-out tasks
    save_every: int = 5  # iterations between checkpoints
    track: bool = False  # mirror the run to Weights & Biases
    run_dir: str = "runs"  # folder in which the run gets its own folder
    name: str | None = None  # name of the run's folder (if it exists, its run is continued; default: with the time)
    resume: str | None = None  # run folder to continue (its args.json applies)
    evaluate: str | None = None  # run folder to evaluate without training (its args.json applies)

    clusters: int = 2  # number of clusters and of members, the paper's K
    embedding: Literal["fisher", "state-next-state", "latent", "gradient"] = "fisher"  # φ(T), Eq. (9)-(12)
    probe_iterations: int = 50  # iterations in which the probe learns (0: none; not used with --oracle)
    embed_repeats: int = 50  # episodes of the probe in each training task, every one a point to be clustered
    oracle: bool = False  # members by the true clusters, without a probe
    train_tasks: int = 4  # number of training tasks, the first different ones of the environment's training set
    horizon: int = 200  # H, steps per episode (default: the environment's own)
    initial_steps: int = 2000  # steps of a learner in each of its training tasks before its first update
    visits: int = 10  # number of tasks visited per iteration, by all members together, drawn with replacement (D8)
    prior_steps: int = 1000  # steps of a visit with z from the prior, which are the context
    extra_steps: int = 1000  # steps of a visit with z from the posterior, which do not join the context
    gradient_steps: int = 2000  # number of gradient steps of every learner per iteration
    eval_episodes: int = 3  # number of episodes in each held-out task, the first of them the probe's (D13)
    eval_prior_episodes: int = 2  # how many of these, the first ones, have z from the prior
    latent_dim: int = 5  # dimensions of z
    next_obs_in_context: bool = False  # context of (s, a, r, s') instead of (s, a, r)
    encoder_hidden: tuple[int, ...] = (200, 200, 200)  # widths of the encoder's hidden layers
    hidden: tuple[int, ...] = (300, 300, 300)  # widths of the hidden layers of policy, Q and V
    meta_batch: int = 4  # number of tasks in a gradient step
    batch: int = 256  # transitions of each of these tasks
    context: int = 256  # transitions in the context of each of these tasks
    kl_weight: float = 0.1  # β, weight of the KL, which is a sum over tasks
    reward_scale: float = 5.0  # ρ, factor on the reward, beside the entropy's weight of 1
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # τ, rate at which the slow copy of V follows
    lr: float = 3e-4  # learning rate of all networks
    policy_regularisation: float = 1e-3  # weight of the squared mean and log σ of the policy


PAPER = {env: dict(horizon=200) for env in ("ml2", "ant-cheetah-dir")}  # else as above: the paper's Table 4, and D7
PAPER |= {f"{robot}-dir": dict(train_tasks=2, horizon=200) for robot in ("ant", "cheetah", "walker")}  # by direction
FAST: dict[str, dict] = {}  # none: nothing is tuned
MAY_BE_0 = ("seed", "num_threads", "probe_iterations")
KINDS = "fisher", "state-next-state", "latent", "gradient"  # of embeddings, in this order


def check(args: Args, env: type[envs.TaskVectorEnv]) -> dict[str, bool]:
    """What must hold; where it does not, the message is the error."""
    k, n, most = args.clusters, args.train_tasks, args.eval_episodes
    return {
        "--probe-iterations must be below --iterations": args.oracle or args.probe_iterations < args.iterations,
        "--visits must be a multiple of --clusters, --train-tasks at least --clusters": args.visits % k == 0 and n >= k,
        "--train-tasks times --embed-repeats must be from 3, and above --clusters": n * args.embed_repeats > max(2, k),
        f"--oracle needs --clusters {env.num_clusters}": not args.oracle or k == env.num_clusters,
        "--eval-episodes must be at least 2 and --eval-prior-episodes": most >= max(2, args.eval_prior_episodes),
        "--reward-scale and --lr must be positive": min(args.reward_scale, args.lr) > 0,
        "--kl-weight, --policy-regularisation must be at least 0": min(args.kl_weight, args.policy_regularisation) >= 0,
        "--gamma must be in [0, 1], and --tau in (0, 1]": 0 <= args.gamma <= 1 and 0 < args.tau <= 1,
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
        return self.head(self.features(torch.cat(parts, dim=-1)))

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


# Copied from algos/pearl.py
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


# Copied from algos/maml.py
def random_seed(rng: torch.Generator) -> int:
    return torch.randint(2**31, (), generator=rng).item()


# Copied from algos/pearl.py
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


# Copied from algos/pearl.py
class Transitions(NamedTuple):
    """[task, transition, ·] or [row, ·] each."""

    obs: Tensor
    action: Tensor
    reward: Tensor
    next_obs: Tensor
    terminated: Tensor


# Copied from algos/pearl.py
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


# Copied from algos/pearl.py
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


# Copied from algos/pearl.py
def tokens(c: Transitions, args: Args) -> Tensor:
    """c_n: (s, a, r), or (s, a, r, s'), the reward as the environment gives it (D6)."""
    parts = (c.obs, c.action, c.reward, c.next_obs) if args.next_obs_in_context else (c.obs, c.action, c.reward)
    return torch.cat(parts, dim=-1)


# Copied from algos/pearl.py
def posterior(encoder: MLP, context: Tensor, alive: Tensor | None = None) -> Normal:
    """Eq. (1) of contexts [task, token, ·] (those that are alive [task, token]; the prior, if none is)."""
    mean, raw_var = encoder(context.flatten(0, 1))[0].view(*context.shape[:2], -1).chunk(2, dim=-1)
    precision = 1 / F.softplus(raw_var).clamp(min=1e-7)
    precision = precision if alive is None else precision * alive[..., None]
    total = precision.sum(1)
    var = 1 / total.where(total > 0, 1.0)  # [task, latent_dim]; of no token the prior
    return Normal(var * (precision * mean).sum(1), var.sqrt(), validate_args=False)


# Copied from algos/pearl.py
def draw(q: Normal, rng: torch.Generator) -> Tensor:
    return q.mean + q.stddev * torch.randn(q.mean.shape, generator=rng).to(q.mean.device)


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


# Copied from algos/pearl.py
def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """A gradient step on the parameters of the optimiser alone."""
    parameters = optimizer.param_groups[0]["params"]
    for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
        p.grad = gradient
    optimizer.step()


# == Learner ===========================================================================================================


class Learner:
    """One PEARL: its networks, its data, its training tasks."""

    def __init__(self, make_env: Callable[[int], gym.vector.VectorEnv], tasks: envs.Tasks, args: Args):
        env = make_env(1)
        obs_dim, action_dim = env.single_observation_space.shape[0], env.single_action_space.shape[0]
        self.make_env, self.tasks, self.args = make_env, tasks, args
        self.agent = agent = make_agent(obs_dim, action_dim, args)
        adam = partial(torch.optim.Adam, lr=args.lr, fused=True)
        self.adam_critic = adam([*agent["q"].parameters(), *agent["encoder"].parameters()])  # D4
        self.adam_actor = adam([*agent["v"].parameters(), *agent["policy"].parameters()])
        self.storage, self.rl, self.context = Storage(obs_dim, action_dim), Index(len(tasks)), Index(len(tasks))

    @property
    def frames(self) -> int:
        return sum(map(len, self.rl.rows))


@torch.no_grad()
def collect(learner: Learner, tasks: Tensor, contexts: Index, steps: int, infer: bool, rng: torch.Generator) -> float:
    """The mean return of a block of the visits to tasks [visit], each with a context of its own (D1).

    infer: z from the posterior, but for the first episode, and none joins the context. In every round of episodes a
    visit plays as many as its missing steps need at least.
    """
    args, visits, taken, returns = learner.args, len(tasks), torch.zeros(len(tasks)), []
    episodes = math.ceil(steps / args.horizon)  # of a visit in a round
    visit = torch.arange(visits).repeat_interleave(episodes)  # [copy]
    task = tasks[visit]  # [copy]
    env, env_tasks = learner.make_env(len(visit)), learner.tasks[task.numpy()]
    while (taken < steps).any():
        z = torch.randn(visits, 1 if infer else episodes, args.latent_dim, generator=rng)  # from the prior
        if infer:  # z ~ q_φ(z|c), c of every z a new sample of the visit's context; the first of all episodes keeps it
            context = tokens(learner.storage.read(contexts.sample(visit, args.context, rng)), args).to(args.device)
            informed = draw(posterior(learner.agent["encoder"], context), rng).cpu().view(visits, episodes, -1)
            z = informed if taken.any() else torch.cat([z, informed[:, 1:]], dim=1)
        needed = ((steps - taken) / args.horizon).ceil()  # episodes [visit]; at most 0: done
        play = (torch.arange(episodes) < needed[:, None]).flatten()  # [copy]
        seed, noise = random_seed(rng), torch.randn(args.horizon, *env.action_space.shape, generator=rng)
        played = rollout(env, env_tasks, learner.agent["policy"], z.flatten(0, 1), seed, noise, play.numpy())
        returns.append(played.reward.sum(1)[play])
        if len(returns) > steps + 100:  # who plays gets a step in each round, unless it diverges at once
            raise FloatingPointError("the physics diverges in the first step of an episode, again and again")
        for i, k, rows in zip(visit.tolist(), task.tolist(), learner.storage.add(played)):
            learner.rl.add(k, rows)
            if not infer:
                contexts.add(i, rows)
            taken[i] += len(rows)
    return torch.cat(returns).mean().item()


def collect_iteration(learner: Learner, rng: torch.Generator) -> dict[str, float]:
    """Alg. 1, l. 2: the mean return of both blocks (D6)."""
    args, contexts = learner.args, Index(learner.args.visits)
    tasks = torch.randint(len(learner.tasks), (args.visits,), generator=rng)
    returns = {"train/return_prior": collect(learner, tasks, contexts, args.prior_steps, False, rng)}
    returns["train/return_extra"] = collect(learner, tasks, contexts, args.extra_steps, True, rng)
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
    kl = kl_divergence(q_z, Normal(torch.zeros_like(q_z.mean), 1.0, validate_args=False)).sum()  # Eq. (2)
    q_error = critic_loss(agent, batch, z, z, args)
    step(learner.adam_critic, q_error + args.kl_weight * kl)  # Eq. (4)
    v_error, policy_loss, log_pi = actor_loss(agent, batch.obs, z.detach(), noise, args)
    step(learner.adam_actor, v_error + policy_loss)
    with torch.no_grad():
        for slow, fast in zip(agent["target"].parameters(), agent["v"].parameters()):
            slow.lerp_(fast, args.tau)  # Eq. (8)
    terms = dict(q_error=q_error, kl=kl, v_error=v_error, policy_loss=policy_loss, log_pi=log_pi)
    return {name: value.detach() for name, value in terms.items()}


# == Embeddings and clusters of tasks ==================================================================================


@torch.inference_mode()
def observe(
    env: gym.vector.VectorEnv, tasks: envs.Tasks, agent: nn.ModuleDict, rng: torch.Generator, args: Args
) -> tuple[Episodes, int, dict[str, Tensor]]:
    """An episode of the probe in each of the tasks (D13), its reset seed, and what it tells: φ(T) [task, ·] by kind."""
    z, seed = torch.randn(len(tasks), args.latent_dim, generator=rng), random_seed(rng)
    noise = torch.randn(args.horizon, *env.action_space.shape, generator=rng)
    e = rollout(env, tasks, agent["policy"], z, seed, noise, np.ones(len(tasks), bool))

    r = e.reward / (e.reward.abs().amax(1, keepdim=True) + 1e-8)  # [task, H], 0 after a fall (D9)
    r = r / e.alive.sum(1, keepdim=True).clamp(min=1)  # with the weight of the step in E
    s, after, one, epsilon = e.obs[:, :-1], e.obs[:, 1:], torch.ones_like(r)[..., None], noise.transpose(0, 1)
    h = agent["policy"].features(torch.cat([s, z[:, None] * one], dim=-1).flatten(0, 1).to(args.device))
    std = agent["policy"].head(h)[0].chunk(2, dim=-1)[1].clamp(-20, 2).exp()
    h, std = h[0].cpu().view(*e.reward.shape, -1), std.cpu().view(*e.reward.shape, -1)
    h1, x = torch.cat([h, one], dim=-1), torch.cat([s, after], dim=-1)  # [h, 1] of Eq. (13), x of Eq. (10)
    gradient = torch.cat([epsilon / std, epsilon**2 - 1], dim=-1)  # Eq. (13): by m and ln σ
    square = torch.cat([std**-2, 2 * one.expand_as(std)], dim=-1)  # Eq. (13): the mean of its square over ã (D10)
    context = Transitions(s, e.action, e.reward[..., None], after, e.terminated[..., None])
    q_z = posterior(agent["encoder"], tokens(context, args).to(args.device), e.alive.to(args.device))
    outer = partial(torch.einsum, "nt,nti,ntj->nij")  # E[ weight a bᵀ ] of weights, a and b
    unsigned = r.abs()  # (9) and (10) are second moments: no weight below 0 (D9)
    phi = outer(unsigned, h1**2, square), outer(unsigned, x, x), q_z.mean.cpu(), outer(r, h1, gradient)  # Eq. (9)-(12)
    return e, seed, dict(zip(KINDS, (x.flatten(1) for x in phi)))


def coordinates(known: Tensor, new: Tensor, kind: str) -> np.ndarray:
    """Where embeddings [·, d] are compared: 50 principal components of the known ones, standardised and cut (D11)."""
    mean, std = known.double().mean(0), known.double().std(0)
    if kind != "latent":  # cut: a unit that is on in one episode of 200 would count fourteenfold
        known, new = (((x - mean) / std.where(std > 0, 1.0)).clamp(-2, 2) for x in (known, new))
    return PCA(min(50, *known.shape), svd_solver="full").fit(known.double().numpy()).transform(new.double().numpy())


def assign(known: Tensor, member: np.ndarray, owner: np.ndarray, new: Tensor, kind: str) -> np.ndarray:
    """Eq. (14): of every new embedding the member, among those who own a training task (D12)."""
    old, points = np.split(coordinates(known, torch.cat([known, new]), kind), [len(known)])
    centroids = [old[member == m].mean(0) for m in np.unique(owner)]
    return np.unique(owner)[pairwise_distances_argmin(points, centroids)]


# == Evaluation ========================================================================================================


# Copied from algos/milet.py
def returns_by_cluster(name: str, returns: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """The mean of the returns [task] and, if there are several, of every true cluster."""
    present = np.unique(clusters)
    by_cluster = {f"{name}_cluster_{m}": float(returns[clusters == m].mean()) for m in present}
    return {name: float(returns.mean())} | (by_cluster if len(present) > 1 else {})


# Copied from algos/pearl.py
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
    env: gym.vector.VectorEnv, tasks: envs.Tasks, pool: envs.Tasks, agent: nn.ModuleDict, args: Args
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Alg. 4 in the held-out tasks (D5): metrics (herd/: of the points, in the training tasks pool), and arrays."""
    learners, herd, rng = agent["learners"], agent["herd"], torch.Generator().manual_seed(2 * 10**6 + args.seed)
    labels, points, owner = (herd[name].numpy() for name in ("labels", "points", "owner"))
    kind, episodes, seeds, learner = KINDS.index(args.embedding), [], [], np.where(args.oracle, 1 + tasks.cluster, 0)
    if owner.any() and not args.oracle:  # before, learner 0 is a single PEARL
        played, seed, phi = observe(env, tasks, learners[0], rng, args)  # Alg. 4, l. 1
        learner = assign(herd["phi"], labels[kind], owner, phi[args.embedding], args.embedding)  # l. 2
        args = replace(args, eval_episodes=args.eval_episodes - 1, eval_prior_episodes=args.eval_prior_episodes - 1)
        episodes, seeds = [played], [seed]  # D13
    who, own_who = np.unique(learner, return_inverse=True)  # l. 3: learners at work, in every task from the same starts
    found = [adapt(env, tasks, learners[m], torch.Generator().manual_seed(10**6 + args.seed), args) for m in who]
    own = own_who, np.arange(len(tasks))  # of [learner, task, ·] what each task's own learner has
    for kth in zip(*(played for played, _, _ in found)):
        episodes.append(Episodes(*(torch.stack(x)[own] for x in zip(*kth))))
    metrics = {"eval/posterior_std": torch.stack([q_z.stddev for *_, q_z in found])[own].mean().item()}
    for k, episode in enumerate(episodes, start=1):
        returns = episode.reward.double().sum(1).numpy()
        metrics |= returns_by_cluster(f"eval/return_episode_{k}", returns, tasks.cluster)

    ari, true, member = adjusted_rand_score, np.repeat(pool.cluster, args.embed_repeats), labels[kind]  # [point]
    counts = {m: np.bincount(true[member == m]) for m in np.unique(member)}  # a learner's points by true cluster
    metrics["eval/accuracy"] = float(np.mean([counts[m].argmax() == c for m, c in zip(learner, tasks.cluster)]))
    metrics["eval/nmi"] = float(normalized_mutual_info_score(tasks.cluster, learner))
    metrics |= {"eval/ari": ari(tasks.cluster, learner), "herd/ari": ari(true, member)}
    metrics["herd/purity"] = sum(count.max() for count in counts.values()) / len(member)
    metrics |= {f"herd/ari_{name}": ari(true, x) for name, x in zip(KINDS, labels)}
    arrays = dict(
        params=tasks.params, cluster=tasks.cluster, learner=learner, seed=np.array([*seeds, *found[0][1]]),
        trace=np.stack([e.obs[:, :, :2].transpose(0, 1).numpy() for e in episodes]),  # [episode, H+1, task, 2]
        action=np.stack([e.action.transpose(0, 1).numpy() for e in episodes]),  # [episode, H, task, action_dim]
        train_cluster=true, train_learner=member * (not args.oracle), train_products=points[kind] @ points[kind].T,
        train_points=points,  # [kind, point, 50]
    )  # fmt: skip
    return metrics, arrays


# == Training ==========================================================================================================


def train(args: Args, run: "Run") -> None:
    """Algorithm 3."""
    env, make_env = run.make_env(1).unwrapped, cache(run.make_env)
    test_tasks, tasks = env.task_set("test"), env.task_set("train")
    _, first = np.unique(tasks.params, axis=0, return_index=True)  # of the different ones
    fail(f"--train-tasks must be at most {len(first)}: {args.env} has no more", when=len(first) < args.train_tasks)
    tasks = tasks[np.sort(first)[: args.train_tasks]]
    # The probe is learner 0. Room for φ(T) and the coordinates of points, and for whose points and tasks are
    learners = [Learner(make_env, tasks, args) for _ in range(1 + args.clusters)]
    n, layer = len(tasks) * args.embed_repeats, sum(x.numel() for x in learners[0].agent["policy"].layers[-1])
    size = {"state-next-state": (2 * env.obs_dim) ** 2, "latent": args.latent_dim}.get(args.embedding, layer)
    herd = dict(phi=torch.zeros(n, size), points=torch.zeros(len(KINDS), n, 50))
    herd["owner"] = torch.from_numpy(np.where(args.oracle, 1 + tasks.cluster, 0))
    herd["labels"] = herd["owner"].repeat_interleave(args.embed_repeats).repeat(len(KINDS), 1)
    herd = nn.ParameterDict({name: nn.Parameter(x, requires_grad=False) for name, x in herd.items()})
    agent = nn.ModuleDict(dict(learners=nn.ModuleList(learner.agent for learner in learners), herd=herd))
    names = "storage", "rl", "context", "adam_critic", "adam_actor"
    state = {f"{name}_{m}": getattr(learner, name) for m, learner in enumerate(learners) for name in names}
    evaluation = partial(evaluate, run.make_env(len(test_tasks)), test_tasks, tasks, agent, args)
    for iteration in run.loop(args.iterations, dict(agent=agent) | state, evaluation):
        frames = {"frames/probe": 0, "frames/embedding": 0} | {f"frames/member_{m}": 0 for m in range(1, len(learners))}
        # Alg. 3, l. 2-3, once: the trained probe meets the training tasks, they are clustered, and members begin
        if iteration == args.probe_iterations + 1 and not args.oracle:
            with run.timer("sample"):
                points = tasks[np.repeat(np.arange(len(tasks)), args.embed_repeats)]
                seen, _, phi = observe(make_env(n), points, learners[0].agent, run.rng, args)
            frames["frames/embedding"] = int(seen.alive.sum())
            herd["phi"].copy_(phi[args.embedding])
            for kind, name in enumerate(KINDS):
                x = coordinates(phi[name], phi[name], name)
                herd["points"][kind, :, : x.shape[1]] = torch.from_numpy(x)
                herd["labels"][kind] = 1 + torch.from_numpy(AgglomerativeClustering(args.clusters).fit_predict(x))  # D7
            herd["owner"].copy_(herd["labels"][KINDS.index(args.embedding)].view(len(tasks), -1).mode(1).values)  # D12
        # Alg. 3, l. 1, the probe on all tasks; after it l. 4, every member on the tasks that it owns
        owner, metrics = herd["owner"].numpy(), []
        for m in np.unique(owner):
            learner, mine, visits = learners[m], tasks[owner == m], args.visits // len(np.unique(owner))  # D8
            learner.tasks, learner.args, before = mine, replace(args, visits=visits), learner.frames
            with run.timer("sample"):
                if before == 0:  # Alg. 1, l. 1
                    collect(learner, torch.arange(len(mine)), learner.context, args.initial_steps, False, run.rng)
                returns = collect_iteration(learner, run.rng)  # Alg. 1, l. 2
            with run.timer("sac"):
                steps = tqdm(range(args.gradient_steps), "gradient steps", leave=False, disable=None)
                terms = [gradient_step(learner, run.rng) for _ in steps]  # Alg. 1, l. 3
            metrics.append(returns | {f"sac/{k}": torch.stack([t[k] for t in terms]).mean().item() for k in terms[0]})
            frames[f"frames/member_{m}" if m else "frames/probe"] = learner.frames - before
        run.frames += sum(frames.values())
        run.log({name: sum(x[name] for x in metrics) / len(metrics) for name in metrics[0]} | frames)


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
