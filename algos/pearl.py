"""PEARL: off-policy meta-reinforcement learning with probabilistic context variables (Rakelly et al., ICML 2019).

Official code: github.com/katerakelly/oyster. Deviations are from it; settings are its own, where it has the task.

Objective    min over φ, Q:  E_z[ Σ_j (Q_j(s,a,z) - [ρ r + γ V̄(s',z)])² ] + β Σ_i KL(q_φ(z|c_i) ‖ N(0, I))
             min over V:     (V(s,z) - [min_j Q_j(s,ã,z) - ln π(ã|s,z)])²
             min over π:     ln π(ã|s,z) - min_j Q_j(s,ã,z)
             z ~ q_φ(z|c) ∝ Π_n N(z; μ_φ(c_n), σ²_φ(c_n)), a product over the transitions c_n of a context c;
             ã ~ π(·|s,z). Only the critic and the KL train φ: V and π see a z without gradient.

Algorithm 1  what every training task has seen -> Buffer
             collect with z from the prior, and with z from the posterior of the context -> collect
             gradient steps on φ, Q, V, π -> gradient_step
Algorithm 2  a test task: z from the prior, act, update the context, z from the posterior -> evaluate

  one visit to a task   |  prior block           |  posterior block                       |  extra block
  z of an episode       |  N(0, I)               |  1st N(0, I), then q(z|c), one by one  |  1st N(0, I), then q(z|c)
  into the context      |  yes, after a clearing |  yes                                   |  no
  into the RL buffer    |  yes                   |  yes                                   |  yes

Symbols      φ -> encoder; Q_1, Q_2 -> q (one batched network); V, V̄ -> v, target; π -> policy; c -> context
             [task, token, ·]; z [task, latent_dim]; ρ, β, γ, τ -> reward_scale, kl_weight, gamma, tau

Deviations from the official code (C)
  D1  C visits one task after another and collects one episode at a time; here the episodes of all visits of an
      iteration run in lockstep, block by block, which fills the cores. A posterior block still redraws z after every
      episode; if a task is visited twice in one iteration, both visits' posterior blocks enter its context.
  D2  C counts steps, in a block and at test; here episodes, the steps divided by the horizon and rounded up: the number
      of copies stays the same, and robots that fall give less.
  D3  C keeps contexts in a second buffer, both float64 and of 1e6 steps a task; here as ranges of one float32 buffer
      that holds the whole run.
  D4  C has five optimisers; here one for critic and encoder, one for V and π. Adam is elementwise: the same steps.
  D5  C tests on its own tasks, several times each where there are few; here on the environment's 32 or 40, once each.
      C has 20 observations in cheetah-dir (here 17), and velocities up to 3 in cheetah-vel (here 2).
  D6  No option of C: dense reward with sparse context, encoder without bottleneck, recurrent encoder.

Tested       python algos/pearl.py --env cheetah-dir --iterations 60   (604,000 frames, two hours on one core of an AMD
             EPYC): 1141 in the episode after inference (forward 1091, backward 1190), -118 and 51 in the two before.
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
from functools import cache, partial
from itertools import pairwise
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
    env: str = "cheetah-dir"  # environment id (module:id imports the module first)
    seed: int = 0  # of everything random
    device: Literal["cpu", "cuda"] = "cpu"  # where the networks live
    num_threads: int = 0  # of physics and updates (0: all CPUs)
    iterations: int = 500  # of collecting and training
    eval_every: int = 10  # iterations between evaluations on the held-out tasks
    save_every: int = 5  # iterations between checkpoints
    track: bool = False  # mirror the run to Weights & Biases
    run_dir: str = "runs"  # folder for the run's own folder
    resume: str | None = None  # run folder to continue (its args.json applies)
    evaluate: str | None = None  # run folder to evaluate without training (its args.json applies)

    train_tasks: int = 500  # training tasks: the first different ones of the environment's training set
    horizon: int = 100  # H, steps per episode
    initial_steps: int = 200  # of every training task with z from the prior, before the first update
    visits: int = 5  # tasks visited per iteration, drawn with replacement
    prior_steps: int = 400  # per visit, z from the prior
    posterior_steps: int = 0  # per visit, z from the posterior, into the context
    extra_steps: int = 600  # per visit, z from the posterior, not into the context
    gradient_steps: int = 4000  # per iteration
    eval_episodes: int = 2  # per held-out task, the context growing
    eval_prior_episodes: int = 1  # of these, with z from the prior

    latent_dim: int = 5  # dimension of z
    next_obs_in_context: bool = False  # tokens (s, a, r, s') instead of (s, a, r)
    encoder_hidden: tuple[int, ...] = (200, 200, 200)  # hidden layers of φ
    hidden: tuple[int, ...] = (300, 300, 300)  # hidden layers of π, Q and V
    meta_batch: int = 16  # tasks per gradient step
    batch: int = 256  # transitions per task and gradient step
    context: int = 256  # transitions per context
    kl_weight: float = 0.1  # β, of the sum over tasks
    reward_scale: float = 5.0  # ρ, against the entropy's weight of 1
    gamma: float = 0.99  # discount
    tau: float = 0.005  # of the slow copy of V
    lr: float = 3e-4  # of all networks
    policy_regularisation: float = 1e-3  # of the squared mean and log σ of π


# The official configurations; MILET's suite has Args' values (H = 100, one prior and one posterior episode), ml2 is
# Taming the Herd's Table 4. H, initial steps and gradient steps are per environment.
OFFICIAL = dict(horizon=200, initial_steps=2000, eval_episodes=3, eval_prior_episodes=2)
CHEETAH_DIR = OFFICIAL | dict(train_tasks=2, meta_batch=4, prior_steps=1000, extra_steps=1000, gradient_steps=2000)
POINT = dict(  # tuned by us
    train_tasks=100, initial_steps=200, visits=20, prior_steps=200, extra_steps=200, gradient_steps=1000,
    iterations=80, eval_every=2, eval_episodes=4, encoder_hidden=(128, 128), hidden=(128, 128), context=64, batch=64,
    gamma=0.9, reward_scale=20.0, tau=0.01, lr=1e-3,
)  # fmt: skip
PRESETS = {
    "cheetah-dir": CHEETAH_DIR,
    "cheetah-vel": OFFICIAL | dict(train_tasks=100, gradient_steps=2000, context=100),
    "ant-dir": OFFICIAL | dict(train_tasks=2, meta_batch=4),
    "ml2": CHEETAH_DIR | dict(train_tasks=4, visits=10, iterations=155),
    "hopper-params-4c": dict(next_obs_in_context=True),
    "walker-params-4c": dict(next_obs_in_context=True),
    "point-goal-4c": POINT,
}

# == Networks ==========================================================================================================


class MLP(nn.Module):
    """`copies` networks of ReLU layers, evaluated together, with the initialisation of the official code."""

    def __init__(self, *sizes: int, copies: int = 1, last: float = 3e-3):
        super().__init__()
        shapes = list(pairwise(sizes))
        bounds = [(1 / math.sqrt(out), None) for _, out in shapes[:-1]] + [(last, last)]  # of weights, of biases
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for (inputs, outputs), (weight, bias) in zip(shapes, bounds):
            self.weights.append(torch.empty(copies, inputs, outputs).uniform_(-weight, weight))
            shape = copies, 1, outputs
            self.biases.append(torch.full(shape, 0.1) if bias is None else torch.empty(shape).uniform_(-bias, bias))
        self.layers = list(zip(self.weights, self.biases))  # once: reading a ParameterList is slow

    def forward(self, *parts: Tensor) -> Tensor:
        """Inputs, joined along the last dimension, [row, ·] -> [copies, row, out]."""
        x, (*hidden, (weight, bias)) = torch.cat(parts, dim=-1), self.layers
        if x.device.type == "cpu" and len(x) >= 512:  # oneDNN's products are faster than batched ones, if large
            return torch.stack([self.one(x.to_mkldnn(), i).to_dense() for i in range(len(weight))])
        x = x.expand(len(weight), -1, -1)
        for w, b in hidden:
            x = torch.baddbmm(b, x, w).relu_()
        return torch.baddbmm(bias, x, weight)

    def one(self, x: Tensor, i: int) -> Tensor:
        """Network i, [row, ·] -> [row, out]."""
        *hidden, (weight, bias) = self.layers
        for w, b in hidden:
            x = F.linear(x, w[i].T, b[i, 0]).relu()
        return F.linear(x, weight[i].T, bias[i, 0])


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
    """Mean and log σ of π(·|s,z) before the tanh, [row, action_dim] each."""
    mean, log_std = policy(obs, z)[0].chunk(2, dim=-1)
    return mean, log_std.clamp(-20, 2)


def squashed(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """ã = tanh(u), u = mean + σ noise, and ln π(ã|s,z) [row]."""
    u = mean + log_std.exp() * noise
    action = u.tanh()
    log_pi = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi) - (1 - action**2 + 1e-6).log()
    return action, log_pi.sum(-1)


# == Sampler ===========================================================================================================


class Episodes(NamedTuple):
    """One episode of every copy; after a fall alive is False."""

    obs: Tensor  # [copy, H+1, obs_dim]
    action: Tensor  # [copy, H, action_dim]
    reward: Tensor  # [copy, H]
    terminated: Tensor  # [copy, H], 1 at a fall; a time limit is none
    alive: Tensor  # [copy, H] bool


# Copied from algos/maml.py
def random_seed(rng: torch.Generator) -> int:
    return torch.randint(2**31, (), generator=rng).item()


@torch.inference_mode()
def rollout(
    env: gym.vector.VectorEnv, tasks: envs.Tasks, policy: MLP, z: Tensor, rng: torch.Generator, test: bool
) -> Episodes:
    """One episode of every copy in lockstep, each in its own task and with its own z [copy, latent_dim].

    At test actions are the tanh of the mean.
    """
    threads, horizon, z = torch.get_num_threads(), env.unwrapped.horizon, z.to(next(policy.parameters()).device)
    torch.set_num_threads(1)  # torch's threads would fight with those of the physics
    state, _ = env.reset(seed=random_seed(rng), options={"tasks": tasks})
    noise = (torch.zeros if test else partial(torch.randn, generator=rng))(horizon, *env.action_space.shape).to(z)
    states, steps, done = [state], [], np.zeros(len(state), bool)
    for t in range(horizon):
        mean, log_std = pre_tanh(policy, torch.from_numpy(state).to(z), z)
        action = (mean + log_std.exp() * noise[t]).tanh().cpu().numpy()
        alive = ~done
        state, reward, terminated, truncated, _ = env.step(action)
        done = terminated | truncated
        states.append(state)
        steps.append((action, reward.astype(np.float32), (terminated & alive).astype(np.float32), alive))
    torch.set_num_threads(threads)
    rest = (torch.from_numpy(np.stack(x, axis=1)) for x in zip(*steps))
    return Episodes(torch.from_numpy(np.stack(states, axis=1)), *rest)


# == Replay buffer =====================================================================================================


class Buffer:
    """All transitions in the order of collection; which are of a training task, and which are its context (D3).

    An episode of n steps takes n + 1 rows, one a state; so the next state of row i is in row i + 1.
    """

    def __init__(self, tasks: int, capacity: int, obs_dim: int, action_dim: int):
        widths = dict(obs=obs_dim, action=action_dim, reward=1, terminated=1)
        self.data = {name: torch.empty(capacity, width) for name, width in widths.items()}
        self.used = 0
        self.rows = torch.zeros(tasks, 1024, dtype=torch.int32)  # [task, its n-th transition], grows
        self.size, self.context_start, self.context_end = torch.zeros(3, tasks, dtype=torch.int64)

    def add(self, task: int, episodes: Episodes, to_context: bool) -> None:
        """The steps taken. The context of a task are transitions that follow each other."""
        taken = episodes.alive
        states = torch.cat([torch.ones_like(taken[:, :1]), taken], dim=1)  # [copy, H+1], seen before the end
        row = self.used + states.flatten().cumsum(0).view(states.shape) - 1
        rows = row[:, :-1][taken]
        self.data["obs"][row[states]] = episodes.obs[states]
        for name, value in zip(("action", "reward", "terminated"), episodes[1:4]):
            self.data[name][rows] = value[taken].view(len(rows), -1)
        self.used += int(states.sum())
        first, last = int(self.size[task]), int(self.size[task]) + len(rows)
        while last > self.rows.shape[1]:
            self.rows = torch.cat([self.rows, torch.zeros_like(self.rows)], dim=1)
        self.rows[task, first:last] = rows.int()
        self.size[task] = last
        if to_context:
            self.context_end[task] = last

    def clear_context(self, task: int) -> None:
        self.context_start[task] = self.context_end[task] = self.size[task]

    def sample(self, tasks: Tensor, n: int, rng: torch.Generator) -> list[Tensor]:
        """n transitions of each task, with replacement: obs, action, reward, next_obs, terminated [task, n, ·]."""
        return self._sample(tasks, torch.zeros_like(tasks), self.size[tasks], n, rng)

    def sample_context(self, tasks: Tensor, n: int, rng: torch.Generator) -> list[Tensor]:
        """The same out of the context of each task."""
        return self._sample(tasks, self.context_start[tasks], self.context_end[tasks], n, rng)

    def _sample(self, tasks: Tensor, start: Tensor, end: Tensor, n: int, rng: torch.Generator) -> list[Tensor]:
        uniform = torch.rand(len(tasks), n, generator=rng, dtype=torch.float64)
        nth = start[:, None] + (uniform * (end - start)[:, None]).long()
        rows = self.rows[tasks[:, None], nth].long().flatten()
        obs, action, reward, terminated = (x.index_select(0, rows) for x in self.data.values())
        parts = obs, action, reward, self.data["obs"].index_select(0, rows + 1), terminated
        return [x.view(len(tasks), n, -1) for x in parts]

    def state_dict(self) -> dict:
        state = {name: x[: self.used].clone() for name, x in self.data.items()}
        return state | {k: getattr(self, k) for k in ("used", "rows", "size", "context_start", "context_end")}

    def load_state_dict(self, state: dict) -> None:
        self.used = state["used"]
        for name in ("rows", "size", "context_start", "context_end"):
            setattr(self, name, state[name].clone())
        for name, storage in self.data.items():
            storage[: self.used] = state[name]


# == Task inference ====================================================================================================


def tokens(obs: Tensor, action: Tensor, reward: Tensor, next_obs: Tensor, args: Args) -> Tensor:
    """c_n: (s, a, r), or (s, a, r, s'); [..., ·] each, the reward as the environment gives it (D6)."""
    return torch.cat([obs, action, reward] + [next_obs] * args.next_obs_in_context, dim=-1)


def posterior(encoder: MLP, context: Tensor, alive: Tensor | None = None) -> Normal:
    """q_φ(z|c) of contexts [task, token, ·] (those that are alive [task, token]): [task, latent_dim]."""
    mean, raw_var = encoder(context.flatten(0, 1))[0].view(*context.shape[:2], -1).chunk(2, dim=-1)
    precision = 1 / F.softplus(raw_var).clamp(min=1e-7)
    precision = precision if alive is None else precision * alive[..., None]
    var = 1 / precision.sum(1)
    return Normal(var * (precision * mean).sum(1), var.sqrt(), validate_args=False)


def draw(q: Normal, rng: torch.Generator) -> Tensor:
    return q.mean + q.stddev * torch.randn(q.mean.shape, generator=rng).to(q.mean.device)


@torch.inference_mode()
def draw_posterior(agent: nn.ModuleDict, buffer: Buffer, tasks: Tensor, rng: torch.Generator, args: Args) -> Tensor:
    """z ~ q_φ(z|c), c a sample of the task's context: [task, latent_dim]."""
    *context, _ = buffer.sample_context(tasks, args.context, rng)
    return draw(posterior(agent["encoder"], tokens(*context, args).to(args.device)), rng).cpu()


def collect(
    make_env: Callable[[int], gym.vector.VectorEnv], agent: nn.ModuleDict, buffer: Buffer, train_tasks: envs.Tasks,
    tasks: Tensor, z: Tensor, rng: torch.Generator, to_context: bool, clear: bool,
) -> Episodes:  # fmt: skip
    """An episode in every visited task for each of its z [visit, episode, latent_dim], all in lockstep (D1)."""
    copies = tasks.repeat_interleave(z.shape[1])
    env = make_env(len(copies))
    episodes = rollout(env, train_tasks[copies.numpy()], agent["policy"], z.flatten(0, 1), rng, test=False)
    for i, task in enumerate(tasks.tolist()):
        mine = slice(i * z.shape[1], (i + 1) * z.shape[1])
        if clear:
            buffer.clear_context(task)
        buffer.add(task, Episodes(*(x[mine] for x in episodes)), to_context)
    return episodes


# == Soft actor-critic =================================================================================================


def make_optimizers(agent: nn.ModuleDict, args: Args) -> dict[str, torch.optim.Optimizer]:
    """Of the critic with the encoder, and of V with π (D4)."""
    groups = {"critic": ("q", "encoder"), "actor": ("v", "policy")}
    parameters = {k: [p for name in names for p in agent[name].parameters()] for k, names in groups.items()}
    return {k: torch.optim.Adam(p, args.lr, fused=True) for k, p in parameters.items()}


def critic_loss(agent: nn.ModuleDict, batch: list[Tensor], z: Tensor, q_z: Normal, args: Args) -> dict[str, Tensor]:
    """Of Q_1, Q_2 and φ; batch and z [row, ·], q_z [task, latent_dim]."""
    obs, action, reward, next_obs, terminated = batch
    with torch.no_grad():
        goal = args.reward_scale * reward + (1 - terminated) * args.gamma * agent["target"](next_obs, z)[0]
    error = (agent["q"](obs, action, z) - goal).square().mean((1, 2)).sum()
    kl = kl_divergence(q_z, Normal(torch.zeros_like(q_z.mean), 1.0, validate_args=False)).sum()
    return dict(q_error=error, kl=kl, loss=error + args.kl_weight * kl)


def actor_loss(agent: nn.ModuleDict, obs: Tensor, z: Tensor, noise: Tensor, args: Args) -> dict[str, Tensor]:
    """Of V and π, whose parameters are disjoint; z comes without gradient."""
    mean, log_std = pre_tanh(agent["policy"], obs, z)
    action, log_pi = squashed(mean, log_std, noise)
    min_q = agent["q"](obs, action, z)[..., 0].amin(0)
    v_error = (agent["v"](obs, z)[0, :, 0] - (min_q - log_pi).detach()).square().mean()
    penalty = args.policy_regularisation * (mean.square().mean() + log_std.square().mean())
    policy_loss = (log_pi - min_q).mean() + penalty
    return dict(v_error=v_error, policy_loss=policy_loss, log_pi=log_pi.mean(), loss=v_error + policy_loss)


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """A gradient step on the parameters of the optimiser alone."""
    parameters = optimizer.param_groups[0]["params"]
    for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
        p.grad = gradient
    optimizer.step()


def gradient_step(
    agent: nn.ModuleDict, optimizers: dict[str, torch.optim.Optimizer], buffer: Buffer, rng: torch.Generator, args: Args
) -> dict[str, Tensor]:
    """A training step of Algorithm 1, in the order of the official code; the terms of the losses."""
    tasks = torch.randint(len(buffer.size), (args.meta_batch,), generator=rng)
    *context, _ = buffer.sample_context(tasks, args.context, rng)
    batch = [x.flatten(0, 1).to(args.device) for x in buffer.sample(tasks, args.batch, rng)]  # [row, ·]
    noise = torch.randn(batch[1].shape, generator=rng).to(args.device)

    q_z = posterior(agent["encoder"], tokens(*context, args).to(args.device))
    z = draw(q_z, rng).repeat_interleave(args.batch, dim=0)
    critic = critic_loss(agent, batch, z, q_z, args)
    step(optimizers["critic"], critic.pop("loss"))

    actor = actor_loss(agent, batch[0], z.detach(), noise, args)
    step(optimizers["actor"], actor.pop("loss"))
    with torch.no_grad():
        for slow, fast in zip(agent["target"].parameters(), agent["v"].parameters()):
            slow.lerp_(fast, args.tau)
    return {name: value.detach() for name, value in (critic | actor).items()}


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
    """Algorithm 2 on every held-out task (D5), with mean actions: the metrics, and what the figures need.

    z is drawn anew for every episode: from the prior, and after eval_prior_episodes from the posterior of all
    transitions so far.
    """
    rng = torch.Generator().manual_seed(10**6 + args.seed)
    q_z = prior = Normal(torch.zeros(len(tasks), args.latent_dim), 1.0)
    metrics, traces, context, alive = {}, [], [], []
    for k in range(1, args.eval_episodes + 1):
        z = draw(prior if k <= args.eval_prior_episodes else q_z, rng)
        episode = rollout(env, tasks, agent["policy"], z, rng, test=True)
        seen = episode.obs[:, :-1], episode.action, episode.reward[..., None], episode.obs[:, 1:]
        context.append(tokens(*seen, args))
        alive.append(episode.alive)
        q_z = posterior(agent["encoder"], torch.cat(context, 1).to(args.device), torch.cat(alive, 1).to(args.device))
        returns = episode.reward.double().sum(1).numpy()
        metrics |= returns_by_cluster(f"eval/return_episode_{k}", returns, tasks.cluster)
        traces.append(episode.obs[:, :, :2].transpose(0, 1).numpy())
    metrics["eval/posterior_std"] = q_z.stddev.mean().item()
    latent = torch.cat([q_z.mean, q_z.variance], dim=-1).cpu().numpy()
    return metrics, dict(params=tasks.params, cluster=tasks.cluster, trace=np.stack(traces), latent=latent)


def summary(metrics: dict[str, float]) -> str:
    returns = [v for k, v in metrics.items() if k.startswith("eval/return_episode_") and "cluster" not in k]
    return " · ".join(f"return {k} {value:.1f}" for k, value in enumerate(returns, start=1))


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


def different(tasks: envs.Tasks, n: int) -> envs.Tasks:
    """The first n different ones."""
    _, first = np.unique(tasks.params, axis=0, return_index=True)
    return tasks[np.sort(first)[:n]]


def train(args: Args) -> None:
    args = replace(args, num_threads=args.num_threads or torch.get_num_threads())
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(args.seed)
    make_env = cache(lambda n: gym.make_vec(args.env, num_envs=n, num_threads=args.num_threads, horizon=args.horizon))
    env = make_env(1)
    test_tasks = env.unwrapped.task_set("test")
    train_tasks = different(env.unwrapped.task_set("train"), args.train_tasks)
    obs_dim, action_dim = env.single_observation_space.shape[0], env.single_action_space.shape[0]
    steps = (args.initial_steps, args.prior_steps, args.posterior_steps, args.extra_steps)
    initial, prior, post, extra = (math.ceil(n / args.horizon) for n in steps)  # episodes (D2)

    agent = make_agent(obs_dim, action_dim, args)
    optimizers = make_optimizers(agent, args)
    episodes = len(train_tasks) * initial + args.iterations * args.visits * (prior + post + extra)
    capacity = (args.horizon + 1) * episodes
    buffer = Buffer(len(train_tasks), capacity, obs_dim, action_dim)
    stateful, done, frames = {"agent": agent, "buffer": buffer, **optimizers}, 0, 0
    if args.evaluate:
        load_checkpoint(args.evaluate, args, {"agent": agent})
        metrics, traces = evaluate(make_env(len(test_tasks)), test_tasks, agent, args)
        np.savez_compressed(Path(args.evaluate) / "eval.npz", **traces)
        print(*(f"{name} {value:.2f}" for name, value in metrics.items()), sep="\n")
        print(summary(metrics), f"figures: python results/plot.py {args.evaluate}", sep="\n")
        return
    if args.resume:
        state = load_checkpoint(args.resume, args, stateful)
        done, frames = state["iteration"], state["frames"]
        rng.set_state(state["rng"].clone())

    name = f"{args.env.split(':')[-1]}__{SCRIPT}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run = Run(Path(args.resume or Path(args.run_dir) / name), args, done, args.iterations)
    run.say(f"{SCRIPT}.py · {args.env} · seed {args.seed} · {args.device}, {args.num_threads} threads")
    size = f"{len(train_tasks)} training tasks, {args.iterations:,} iterations of {args.gradient_steps:,} updates"
    run.say(f"{size} -> {run.path}")
    stop = []  # the signals received: finish the iteration, save, leave
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda received, _: stop.append(received))

    def evaluate_and_log(iteration: int) -> None:
        metrics, traces = evaluate(make_env(len(test_tasks)), test_tasks, agent, args)
        run.log("eval", iteration, {"charts/frames": frames} | metrics)
        np.savez_compressed(run.path / "eval.npz", **traces)
        run.say(f"iteration {iteration} · frames {frames:,} · {summary(metrics)}")

    def save(iteration: int) -> None:
        state = {name: part.state_dict() for name, part in stateful.items()}
        state |= dict(script=SCRIPT, env=args.env, iteration=iteration, frames=frames, rng=rng.get_state())
        torch.save(state, run.path / "checkpoint.tmp")  # aside, then renamed: a kill leaves the last one whole
        os.replace(run.path / "checkpoint.tmp", run.path / "checkpoint.pt")

    def prior_z(tasks: Tensor, episodes: int) -> Tensor:
        return torch.randn(len(tasks), episodes, args.latent_dim, generator=rng)

    def posterior_z(tasks: Tensor, episodes: int) -> Tensor:
        z = draw_posterior(agent, buffer, tasks.repeat_interleave(episodes), rng, args)
        return z.view(len(tasks), episodes, args.latent_dim)

    def visit(tasks: Tensor, z: Tensor, to_context: bool, clear: bool = False) -> float:
        nonlocal frames
        episodes = collect(make_env, agent, buffer, train_tasks, tasks, z, rng, to_context, clear)
        frames += int(episodes.alive.sum())
        return episodes.reward.sum(1).mean().item()

    iteration = done
    try:
        if not args.resume:
            every = torch.arange(len(train_tasks))
            visit(every, prior_z(every, initial), to_context=True)
            save(0)
        if done == 0:
            evaluate_and_log(0)
        for iteration in range(done + 1, args.iterations + 1):
            # Alg. 1, data: visit some tasks. A first episode has its z from the prior in every block.
            begin, before = time.time(), frames
            tasks = torch.randint(len(train_tasks), (args.visits,), generator=rng)
            returns = {"train/return_prior": visit(tasks, prior_z(tasks, prior), to_context=True, clear=True)}
            for k in range(post):
                z = posterior_z(tasks, 1) if k > 0 else prior_z(tasks, 1)
                returns["train/return_posterior"] = visit(tasks, z, to_context=True)
            if extra:
                z = torch.cat([prior_z(tasks, 1), posterior_z(tasks, extra)[:, 1:]], dim=1)
                returns["train/return_extra"] = visit(tasks, z, to_context=False)
            sampling = time.time() - begin

            # Alg. 1, training: on all tasks
            updates = tqdm(range(args.gradient_steps), "gradient steps", leave=False, disable=run.bar.disable)
            terms = [gradient_step(agent, optimizers, buffer, rng, args) for _ in updates]
            seconds = time.time() - begin

            metrics = {"charts/frames": frames} | returns
            metrics |= {f"sac/{k}": torch.stack([t[k] for t in terms]).mean().item() for k in terms[0]}
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
    free += ("eval_episodes", "eval_prior_episodes") if args.evaluate else ("iterations",)
    changed = [k for k, v in asdict(args).items() if k not in free and v != getattr(default, k)]
    if folder and changed:
        fail(f"--{changed[0].replace('_', '-')} cannot change on an existing run")
    env_class(args.env)
    check_numbers(args, may_be_0=("seed", "num_threads", "posterior_steps", "extra_steps"))
    if min(args.reward_scale, args.lr) <= 0 or args.kl_weight < 0:
        fail("--reward-scale and --lr must be positive, --kl-weight at least 0")
    if not (0 <= args.gamma <= 1 and 0 < args.tau <= 1):
        fail("--gamma must be in [0, 1], --tau in (0, 1]")
    if args.eval_prior_episodes > args.eval_episodes:
        fail("--eval-prior-episodes must be at most --eval-episodes")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda, but PyTorch finds no GPU")
    return args


if __name__ == "__main__":
    train(parse_args())
