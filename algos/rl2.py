"""RL2: Fast Reinforcement Learning via Slow Reinforcement Learning (Duan et al., 2016), with PPO.

Official code: none by its authors; settings of the RL2 in github.com/lmzintgraf/varibad (C), deviations are from it.

Objective    max over θ, ψ:  E[ Σ_t γ^t r_t ] over whole trials, by PPO: a policy with a memory of actions and
             rewards learns to adapt, and that memory is all it knows of the task
Loop         collect a trial on each of some tasks -> run_trial     train θ and ψ by PPO -> ppo_update, encode_trial
             a trial on held-out tasks -> evaluate

  one trial        |  episode 1, H steps            |  episode 2, H steps             |  next trial
  state, done flag |  s_0, 0 ............... s_H, 1 |  s'_0, 0 ............. s'_H, 1  |  reset
  memory h         |  0 --- updated every step -----  carried over, updated on ---->  |  0
  π sees only h    |  of (a_0,r_0,s_1) .. (a_t-1,r_t-1,s_t); s_0 and s'_0 are not seen, unless --encode-first
  return           |  --------- of both episodes together, unless --cut-episodes -->  |

Symbols      h, the state of the GRU -> h [batch, hidden]; what π sees of it -> latent [batch, latent_dim];
             θ -> encoder; π (ψ) -> policy; H+ = 2 H, the steps of a trial

Deviations from the official code (C)
  D1  C zeroes h at every update (but the humanoid's): if these are shorter than a trial, no memory reaches episode 2
      in training. Here an update has whole trials, one a copy; their number is such that it has C's frames.
  D2  C cuts the return at the end of each episode, and loses its last reward; here the return is that of the trial,
      and the trial's time limit bootstraps from V(terminal state) (--cut-episodes for C's).
  D3  C takes the latent of h = 0 as a constant; here it trains the biases of its layer.
  D4  C learns nothing in the first iteration; here from the first on.
  D5  C draws fresh tasks without end; here the environment's 500 training and its held-out tasks.
  D6  C's observation of cheetah-dir has 20 numbers, its velocities in cheetah-vel go to 3; here 17, and 2.
  D7  C's scale of the rewards is updated every step; here once a trial.

Tested       python algos/rl2.py --env point-goal-4c --num-threads 1   (2.56 million frames, 4 minutes on one core of an
             AMD EPYC, three seeds): episode 1 -47, -46, -40, episode 2 -44, -42, -32; one who knows the goal -19.
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
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.distributions import Normal
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

    num_envs: int = 16  # tasks, one copy of the environment each, per meta-iteration (D1)
    horizon: int = 100  # H, steps per episode
    cut_episodes: bool = False  # the return of episode 2 does not reach episode 1, as in the official code (D2)
    encode_first: bool = False  # the first state of each episode too, with action and reward 0

    embed: tuple[int, int, int] = (32, 16, 16)  # widths of the state, action and reward embeddings
    hidden: int = 128  # width of h
    latent_dim: int = 256  # width of what π sees of h (C: its heads for mean and log-variance, 128 each)
    relu: bool = True  # on it

    policy_embed: int = 64  # width of the policy's embedding of the latent (0: none)
    policy_hidden: tuple[int, ...] = (128,)  # hidden layers of actor and critic
    policy_init: Literal["orthogonal", "normc"] = "orthogonal"  # of those layers
    squash: Literal["none", "mean", "sample"] = "none"  # what of an action goes through a tanh
    normalise_reward: bool = True  # by the running scale of their discounted sums
    gamma: float = 0.97  # discount
    gae_lambda: float = 0.9  # λ of generalised advantage estimation
    ppo_epochs: int = 2  # passes over a batch of trials
    minibatches: int = 1  # per pass
    clip: float = 0.05  # PPO's range, of ratio and value
    value_coef: float = 0.5  # weight of the value loss
    lr_policy: float = 3e-4  # learning rate of π
    lr_encoder: float = 3e-4  # learning rate of θ
    anneal: bool = True  # both rates to 0, over the run
    encoder_clip: float = 0.5  # largest norm of the gradient of θ
    entropy: float = 0.01  # entropy bonus


# The official code's configurations (D6); on MILET's suite that of the same robot, with MILET's H and frames (the
# hopper's is the walker's). Ant-Goal: as above.
HUMANOID = dict(
    frames=30_000_000, num_envs=32, relu=False, policy_embed=0, policy_hidden=(128, 128), squash="sample",
    normalise_reward=False, ppo_epochs=4, minibatches=2, clip=0.1, lr_policy=7e-4, lr_encoder=1e-3, encoder_clip=1.0,
    gamma=0.99, entropy=1e-3,
)  # fmt: skip
OTHERS = dict(policy_embed=0, policy_init="normc", lr_policy=7e-4, lr_encoder=7e-4, anneal=False)
CHEETAH = OTHERS | dict(frames=100_000_000, horizon=200, minibatches=4, clip=0.1)
WALKER = OTHERS | dict(frames=10_000_000)
POINT = dict(  # tuned by us
    frames=2_560_000, num_envs=64, hidden=64, minibatches=8, clip=0.1, lr_policy=2e-3, lr_encoder=2e-3, entropy=1e-4,
)  # fmt: skip
PRESETS = {
    "humanoid-dir-4c": HUMANOID,
    "humanoid-dir-sparse-4c": HUMANOID,
    "hopper-params-4c": WALKER,
    "walker-params-4c": WALKER,
    "cheetah-dir": CHEETAH | dict(num_envs=8),
    "cheetah-vel": CHEETAH | dict(num_envs=32),
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


class Recurrence(torch.autograd.Function):
    """nn.GRU over [time, batch, ·], with a backward pass that is faster on a CPU, most so for small batches.

    Step by step goes only what the gradient of h has to; all else is computed for all steps at once.

    r, z = σ(x_r + h_r), σ(x_z + h_z);  c = tanh(x_c + r h_c);  h' = (1 - z) c + z h;  x_·, h_· are linear in x and h.
    """

    @staticmethod
    def forward(ctx, gru: nn.GRU, x: Tensor, h: Tensor, *weights: Tensor) -> Tensor:
        after = gru(x, h[None])[0]
        ctx.save_for_backward(x, torch.cat([h[None], after[:-1]]), *weights)
        return after

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, h, w_x, w_h, b_x, b_h = ctx.saved_tensors
        x_r, x_z, x_c = F.linear(x, w_x, b_x).chunk(3, dim=-1)
        h_r, h_z, h_c = F.linear(h, w_h, b_h).chunk(3, dim=-1)
        r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
        c = (x_c + r * h_c).tanh()
        dc = (1 - z) * (1 - c**2)  # ∂h'/∂x_c; below, ∂h'/∂h_r, ∂h'/∂h_z, ∂h'/∂h_c, which the loop makes the loss's
        dh = torch.stack([dc * h_c * r * (1 - r), (h - c) * z * (1 - z), dc * r], dim=2)
        total, from_later = grad.clone(), torch.zeros_like(h[0])
        for total_t, dh_t, z_t in reversed(list(zip(total, dh, z))):
            total_t += from_later
            dh_t *= total_t[:, None]
            from_later = torch.addmm(total_t * z_t, dh_t.flatten(1), w_h)
        dx = torch.cat([dh[:, :, :2].flatten(2), dc * total], dim=2)
        dx, dh, x, h = (v.flatten(0, 1) for v in (dx, dh.flatten(2), x, h))
        return None, (dx @ w_x).unflatten(0, grad.shape[:2]), from_later, dx.T @ x, dh.T @ h, dx.sum(0), dh.sum(0)


class Encoder(nn.Module):
    """The memory: a GRU, and a layer on it that π sees."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        state, action, reward = args.embed
        self.embed_state, self.embed_action = nn.Linear(obs_dim, state), nn.Linear(action_dim, action)
        self.embed_reward = nn.Linear(1, reward)
        self.gru = nn.GRU(sum(args.embed), args.hidden)
        for name, p in self.gru.named_parameters():
            nn.init.orthogonal_(p) if "weight" in name else nn.init.zeros_(p)
        self.head, self.relu = nn.Linear(args.hidden, args.latent_dim), args.relu

    def forward(self, action: Tensor, reward: Tensor, next_obs: Tensor, h: Tensor) -> Tensor:
        """Encode [time, batch, ·] from the hidden state [batch, hidden] -> h [time, batch, hidden]."""
        parts = self.embed_state(next_obs), self.embed_action(action), self.embed_reward(reward[..., None])
        x = torch.cat(parts, dim=-1).relu()
        if torch.is_grad_enabled() and not x.is_cuda:
            return Recurrence.apply(self.gru, x, h, *self.gru.parameters())
        return self.gru(x, h[None])[0]

    def latent(self, h: Tensor) -> Tensor:
        """What π sees of h, [..., latent_dim]."""
        return self.head(h).relu() if self.relu else self.head(h)

    def first(self, obs: Tensor, h: Tensor) -> Tensor:
        """h after the first state of an episode, with action and reward 0."""
        action = torch.zeros(len(obs), self.embed_action.in_features, device=obs.device)
        return self(action[None], action[None, :, 0], obs[None], h)[0]


class Policy(nn.Module):
    """π(a | latent) and its value function: tanh networks."""

    def __init__(self, action_dim: int, args: Args):
        super().__init__()
        latent, width = args.latent_dim, args.policy_embed
        self.squash_mean = args.squash == "mean"
        self.embed = nn.Sequential(nn.Linear(latent, width), nn.Tanh()) if width else nn.Identity()
        sizes = width or latent, *args.policy_hidden
        self.actor, self.critic = (mlp(*sizes, n, activation=nn.Tanh) for n in (action_dim, 1))
        self.log_std = nn.Parameter(torch.zeros(action_dim))
        hidden_init = nn.init.orthogonal_ if args.policy_init == "orthogonal" else normc_
        for layer in (*self.actor[:-1:2], *self.critic[:-1:2]):
            hidden_init(layer.weight, 5 / 3)
            nn.init.zeros_(layer.bias)
        normc_(self.actor[-1].weight, 1.0)
        nn.init.zeros_(self.actor[-1].bias)

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


# Copied from algos/varibad.py
class Episode(NamedTuple):
    """One episode of every environment; obs and latent begin before the first step."""

    obs: Tensor  # [H+1, env, obs_dim], the done flag last
    action: Tensor  # [H, env, action_dim], as the environment got it
    sample: Tensor  # [H, env, action_dim], before the squashing
    reward: Tensor  # [H, env]
    latent: Tensor  # [H+1, env, latent_dim]


# Copied from algos/milet.py
def join(a: Episode, b: Episode) -> Episode:
    """Two episodes as one of 2H steps."""
    return Episode(*(torch.cat([x[: len(a.reward)], y]) for x, y in zip(a, b)))


# Copied from algos/milet.py
def start(env: gym.vector.VectorEnv, **options) -> np.ndarray:
    """Reset, and append the done flag, 0: [env, obs_dim]."""
    return np.pad(env.reset(**options)[0], ((0, 0), (0, 1)))


@torch.no_grad()  # not inference_mode: the update differentiates through what is stored
def rollout(
    env: gym.vector.VectorEnv, obs: np.ndarray, policy: Policy, encoder: Encoder, h: Tensor, args: Args, test: bool
) -> tuple[Episode, Tensor]:
    """One episode of all environments in lockstep, from the first states and hidden state (test: mean actions)."""
    horizon, (n, action_dim) = env.unwrapped.horizon, env.action_space.shape
    noise = policy.std() * (torch.zeros if test else torch.randn)(horizon, n, action_dim).to(args.device)
    states, rewards = np.zeros((horizon + 1, n, obs.shape[1]), np.float32), np.zeros((horizon, n), np.float32)
    h = encoder.first(torch.from_numpy(obs).to(args.device), h) if args.encode_first else h
    actions, samples, latents = [], [], [encoder.latent(h)]
    states[0] = obs
    for t in range(horizon):
        sample = policy.mean(policy.embed(latents[t])) + noise[t]
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


@torch.no_grad()
def run_trial(
    env: gym.vector.VectorEnv, tasks: envs.Tasks, seed: int, agent: nn.ModuleDict, args: Args, test: bool
) -> tuple[Episode, Episode]:
    """Two episodes in each task, with one memory."""
    torch.set_num_threads(1)  # torch's threads would fight with those of the physics
    h = torch.zeros(len(tasks), args.hidden, device=args.device)
    obs = start(env, seed=seed, options={"tasks": tasks})
    first, h = rollout(env, obs, agent["policy"], agent["encoder"], h, args, test)
    obs = start(env)
    second, _ = rollout(env, obs, agent["policy"], agent["encoder"], h, args, test)
    torch.set_num_threads(args.num_threads)
    return first, second


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


# Copied from algos/varibad.py
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


def encode_trial(encoder: Encoder, trial: tuple[Episode, Episode], args: Args) -> Tensor:
    """h before each of the H+ steps of the trials, with the gradients of all steps before: [H+, env, hidden]."""
    h, memory = torch.zeros(trial[0].obs.shape[1], args.hidden, device=args.device), []
    for obs, action, _, reward, _ in trial:
        h = encoder.first(obs[0], h) if args.encode_first else h
        memory.append(torch.cat([h[None], encoder(action, reward, obs[1:], h)]))
        h = memory[-1][-1]
    return torch.cat([m[:-1] for m in memory])


def ppo_update(
    agent: nn.ModuleDict, optimizers: dict[str, torch.optim.Optimizer], trial: tuple[Episode, Episode], reward: Tensor,
    args: Args,
) -> Tensor:  # fmt: skip
    """PPO on a batch of trials with the given rewards [T, env] -> mean policy loss, value loss, entropy [3].

    Every step encodes the trials anew, so that the loss trains the memory too.
    """
    policy, encoder, reward = agent["policy"], agent["encoder"], reward.to(args.device)
    trial = tuple(Episode(*(x.to(args.device) for x in episode)) for episode in trial)
    episode = join(*trial)
    with torch.no_grad():
        x = policy.embed(episode.latent)
        value = policy.value(x)
        advantage = advantages(reward, value, args)
        goal = advantage + value[:-1]
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-5)
        old = policy.distribution(x[:-1]).log_prob(episode.sample).sum(-1)
    batch = [x.flatten(0, 1) for x in (episode.sample, old, value[:-1], goal, advantage)]
    size, losses = reward.numel() // args.minibatches, []
    for _ in range(args.ppo_epochs):
        for rows in torch.randperm(reward.numel()).to(args.device).split(size)[: args.minibatches]:
            h = encode_trial(encoder, trial, args).flatten(0, 1)[rows]
            u, old, v, g, adv = (x[rows] for x in batch)
            x = policy.embed(encoder.latent(h))  # D3
            pi = policy.distribution(x)
            ratio = (pi.log_prob(u).sum(-1) - old).exp()
            policy_loss = -torch.minimum(ratio * adv, ratio.clamp(1 - args.clip, 1 + args.clip) * adv).mean()
            critic_loss = value_loss(policy.value(x), v, g, args.clip)
            entropy = pi.entropy().sum(-1).mean()
            for optimizer in optimizers.values():
                optimizer.zero_grad()
            (policy_loss + args.value_coef * critic_loss - args.entropy * entropy).backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
            nn.utils.clip_grad_norm_(encoder.parameters(), args.encoder_clip)
            for optimizer in optimizers.values():
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
    """One trial of every held-out task: the metrics, and traces for the figures."""
    trial = run_trial(env, tasks, 10**6 + args.seed, agent, args, test=True)
    metrics = {}
    for k, episode in enumerate(trial, start=1):
        returns = episode.reward.double().sum(0).numpy()
        metrics |= returns_by_cluster(f"eval/return_episode_{k}", returns, tasks.cluster)
    trace, reward = (np.stack(pair) for pair in zip(*((e.obs[..., :2], e.reward) for e in trial)))
    return metrics, dict(params=tasks.params, cluster=tasks.cluster, trace=trace, reward=reward)


# Copied from algos/varibad.py
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
    agent = nn.ModuleDict(dict(encoder=Encoder(obs_dim, action_dim, args), policy=Policy(action_dim, args)))
    agent["reward_stats"] = RunningStats()
    return agent.to(args.device)


def train(args: Args) -> None:
    args = replace(args, num_threads=args.num_threads or torch.get_num_threads())
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.num_threads)
    make_env = partial(gym.make_vec, args.env, num_threads=args.num_threads, horizon=args.horizon)
    env = make_env(num_envs=args.num_envs)
    train_tasks, test_tasks = env.unwrapped.task_set("train"), env.unwrapped.task_set("test")  # D5
    test_env = make_env(num_envs=len(test_tasks))
    obs_dim, action_dim = env.single_observation_space.shape[0] + 1, env.single_action_space.shape[0]
    frames_per_iteration = 2 * args.horizon * args.num_envs
    iterations = max(1, args.frames // frames_per_iteration)

    agent = make_agent(obs_dim, action_dim, args)
    rates = {"policy": args.lr_policy, "encoder": args.lr_encoder}
    optimizers = {k: torch.optim.Adam(agent[k].parameters(), lr, fused=True) for k, lr in rates.items()}
    stateful, done = {"agent": agent, **optimizers}, 0
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

            # the scale of the rewards (D7)
            reward = torch.cat([first.reward, second.reward])  # [H+, env]
            agent["reward_stats"].update(discounted_sums(reward, args.gamma).to(args.device))
            if args.normalise_reward:
                reward = (reward / (agent["reward_stats"].var.cpu() + 1e-8).sqrt()).clamp(-10, 10).float()
            metrics = {
                "charts/frames": iteration * frames_per_iteration,
                "train/return_episode_1": first.reward.sum(0).mean().item(),
                "train/return_episode_2": second.reward.sum(0).mean().item(),
            }

            # π and its memory maximise the return of the trial (D4)
            anneal = 1 - (iteration - 1) / iterations if args.anneal else 1.0
            for name, rate in rates.items():
                optimizers[name].param_groups[0]["lr"] = anneal * rate
            losses = ppo_update(agent, optimizers, (first, second), reward, args)
            metrics |= zip(("policy/policy_loss", "policy/value_loss", "policy/entropy"), losses.tolist())
            clock.append(time.time())

            metrics |= {f"time/{k}": b - a for k, a, b in zip(("sample", "update"), clock, clock[1:])}
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
    may_be_0 = "seed", "num_threads", "policy_embed"
    check_numbers(args, may_be_0)
    check_ranges(args, ("lr_policy", "lr_encoder"))
    if args.cut_episodes and args.horizon < 2:
        fail("--cut-episodes leaves nothing of episodes of one step")
    if args.num_envs > 500:
        fail("--num-envs must be at most 500 (the training tasks)")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda, but PyTorch finds no GPU")
    return args


if __name__ == "__main__":
    train(parse_args())
