"""RL2: Fast Reinforcement Learning via Slow Reinforcement Learning (Duan et al., 2016), with PPO.

Official code: none by its authors; settings of the RL2 in github.com/lmzintgraf/varibad (C), deviations are from it.
The numbers of the formulas are ours.

Objective    max over θ, ψ:  E[ Σ_t γ^t r_t ] over whole trials: a policy with a memory of actions and rewards
             learns to adapt, and that memory is all it knows of the task                                      Eq. (1)
  by PPO     E[ min(ρ_t A_t, clip(ρ_t, 1 - ε, 1 + ε) A_t) ],  ρ_t = π(a_t|·) / π_old(a_t|·)                    Eq. (2)
             A_t = Σ_k (γλ)^k δ_{t+k},  δ_t = r_t + γ V_{t+1} - V_t;  V is fitted to A_t + V_t                 Eq. (3)
             h_t = GRU(h_{t-1}; a_{t-1}, r_{t-1}, s_t),  h_0 = 0                                               Eq. (4)
             π(a|b_t), V(b_t),  b_t = relu(W h_t + w)                                                          Eq. (5)
Loop         collect a trial on each of some tasks -> run_trial     train θ and ψ by PPO -> ppo_update, encode_trial
             a trial on held-out tasks -> evaluate

  one trial        |  episode 1, H steps            |  episode 2, H steps             |  next trial
  state, done flag |  s_0, 0 ............... s_H, 1 |  s'_0, 0 ............. s'_H, 1  |  reset
  memory h         |  0 --- updated every step -----  carried over, updated on ---->  |  0
  π sees only h    |  of (a_0,r_0,s_1) .. (a_t-1,r_t-1,s_t); s_0 and s'_0 are not seen, unless --encode-first
  return           |  --------- of both episodes together, unless --cut-episodes -->  |

Symbols      h, the state of the GRU -> h [batch, hidden]; b, what π sees of it -> belief [batch, belief_dim];
             θ -> encoder; π (ψ) -> policy; H+ = 2 H, the steps of a trial

Deviations from the official code (C)
  D1  C zeroes h at every update (but the humanoid's): if these are shorter than a trial, no memory reaches episode 2
      in training. Here an update has whole trials, one a copy; their number is such that it has C's frames.
  D2  C cuts the return at the end of each episode, and loses its last reward; here the return is that of the trial,
      and V(h) at its time limit stands for what would follow (--cut-episodes for C's).
  D3  C takes the belief of h = 0 as a constant; here it trains the biases of its layer.
  D4  C learns nothing in the first iteration; here from the first on.
  D5  C draws fresh tasks without end; here the environment's 500 training and its held-out tasks.
  D6  C's observation of cheetah-dir has 20 numbers, its velocities in cheetah-vel go to 3; here 17, and 2.
  D7  C's scale of the rewards is updated every step; here once a trial.
  D8  C is silent on physics that diverges; here nothing is learned from the trial, and the run ends if all diverge.

Tested       python algos/rl2.py --env point-goal-4c --num-threads 1   (3.2 million frames, 7-8 minutes on one core of
             an AMD EPYC, three seeds): episode 1 -42, -42, -41, episode 2 -37, -35, -32; one who knows the goal -19.
"""

import json
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
import torch.nn.functional as F
import tyro
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.distributions import Normal
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

    num_envs: int = 16  # number of tasks, one copy of the environment each, per meta-iteration (D1)
    horizon: int = 100  # number of steps per episode, H (default: the environment's own)
    cut_episodes: bool = False  # the return of episode 2 does not reach episode 1, as in the official code (D2)
    encode_first: bool = False  # encode the first state of each episode too, with action and reward 0

    embed: tuple[int, int, int] = (32, 16, 16)  # widths of the state, action and reward embeddings
    hidden: int = 128  # width of the hidden state h
    belief_dim: int = 256  # width of what π sees of h (C: its heads for mean and log-variance, 128 each)
    relu: bool = True  # a ReLU on what π sees of h

    policy_embed: int = 64  # width of the policy's embedding of the belief (0: none)
    policy_hidden: tuple[int, ...] = (128,)  # widths of the hidden layers of actor and critic
    policy_init: Literal["orthogonal", "normc"] = "orthogonal"  # initialisation of those layers
    squash: Literal["none", "mean", "sample"] = "none"  # what of an action goes through a tanh
    init_std: float = 1.0  # standard deviation of the actions before training
    normalise_reward: bool = True  # scale the rewards by the running deviation of their discounted sums
    gamma: float = 0.97  # discount factor
    gae_lambda: float = 0.9  # λ of generalised advantage estimation
    ppo_epochs: int = 2  # number of passes over a batch of trials
    minibatches: int = 1  # number of minibatches per pass
    clip: float = 0.05  # range of PPO's clipping, of ratio and value
    value_coef: float = 0.5  # weight of the value loss
    lr_policy: float = 3e-4  # learning rate of π
    lr_encoder: float = 3e-4  # learning rate of θ
    anneal: bool = True  # let both rates fall to 0 over the run, linearly in the frames
    encoder_clip: float = 0.5  # largest norm of the gradient of θ
    entropy: float = 0.01  # weight of the entropy bonus


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
PAPER = {
    "humanoid-dir-4c": HUMANOID,
    "humanoid-dir-sparse-4c": HUMANOID,
    "hopper-params-4c": WALKER,
    "walker-params-4c": WALKER,
    "cheetah-dir": CHEETAH | dict(num_envs=8),
    "cheetah-vel": CHEETAH | dict(num_envs=32),
}
FAST = {  # tuned by us
    "ant-goal-4c": dict(
        frames=10_000_000, num_envs=32, hidden=64, init_std=0.4, gae_lambda=0.95, ppo_epochs=4, minibatches=4, clip=0.1,
        lr_policy=5e-4, lr_encoder=5e-4, entropy=1e-3,
    ),
    "point-goal-4c": dict(
        frames=3_200_000, num_envs=64, hidden=64, minibatches=8, clip=0.1, lr_policy=2e-3, lr_encoder=2e-3,
        entropy=1e-4,
    ),
}  # fmt: skip
FAST |= dict.fromkeys(("ant-goal-partial-4c", "ant-goal-u"), FAST["ant-goal-4c"])
FAST["humanoid-dir-4c"] = FAST["ant-goal-4c"] | dict(frames=2_000_000, gamma=0.99)  # as MILET's
FAST["point-goal-sparse"] = FAST["point-goal-4c"] | dict(frames=1_400_000, horizon=32)
MAY_BE_0 = "seed", "num_threads", "policy_embed"


def check(args: Args, env: type[envs.TaskVectorEnv]) -> dict[str, bool]:
    """What must hold; where it does not, the message is the error."""
    batch = 2 * args.horizon * args.num_envs  # steps of a trial in all environments
    same_length = env.terminated is envs.TaskVectorEnv.terminated
    return {
        f"{args.env} may end an episode early, and this algorithm needs episodes of equal length": same_length,
        f"--frames must be at least {batch} (one meta-iteration)": args.frames >= batch,
        "--num-envs must be at most 500 (the training tasks)": args.num_envs <= 500,
        "--minibatches must be at most --horizon times --num-envs": args.minibatches <= args.horizon * args.num_envs,
        "--cut-episodes leaves nothing of episodes of one step": args.horizon > 1 or not args.cut_episodes,
        "--gamma and --gae-lambda must be in [0, 1]": 0 <= args.gamma <= 1 and 0 <= args.gae_lambda <= 1,
        "--clip, --encoder-clip and --init-std must be positive": min(args.clip, args.encoder_clip, args.init_std) > 0,
        "--lr-policy and --lr-encoder must be positive": min(args.lr_policy, args.lr_encoder) > 0,
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
    """The memory, Eq. (4): a GRU; and a layer on it, Eq. (5)."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        state, action, reward = args.embed
        self.embed_state, self.embed_action = nn.Linear(obs_dim, state), nn.Linear(action_dim, action)
        self.embed_reward = nn.Linear(1, reward)
        self.gru = nn.GRU(sum(args.embed), args.hidden)
        for name, p in self.gru.named_parameters():
            nn.init.orthogonal_(p) if "weight" in name else nn.init.zeros_(p)
        self.head, self.relu = nn.Linear(args.hidden, args.belief_dim), args.relu

    def forward(self, action: Tensor, reward: Tensor, next_obs: Tensor, h: Tensor) -> Tensor:
        """Encode [time, batch, ·] from the hidden state [batch, hidden] -> h [time, batch, hidden]."""
        parts = self.embed_state(next_obs), self.embed_action(action), self.embed_reward(reward[..., None])
        x = torch.cat(parts, dim=-1).relu()
        if torch.is_grad_enabled() and not x.is_cuda:
            return Recurrence.apply(self.gru, x, h, *self.gru.parameters())
        return self.gru(x, h[None])[0]

    def belief(self, h: Tensor) -> Tensor:
        """What π sees of h, Eq. (5): [..., belief_dim]."""
        return self.head(h).relu() if self.relu else self.head(h)

    def first(self, obs: Tensor, h: Tensor) -> Tensor:
        """h after the first state of an episode, with action and reward 0."""
        action = torch.zeros(1, len(obs), self.embed_action.in_features, device=obs.device)
        return self(action, torch.zeros_like(action[..., 0]), obs[None], h)[0]


class Policy(nn.Module):
    """π(a | belief) and its value function, Eq. (5): tanh networks."""

    def __init__(self, action_dim: int, args: Args):
        super().__init__()
        width = args.policy_embed
        self.squash_mean = args.squash == "mean"
        self.embed = nn.Sequential(nn.Linear(args.belief_dim, width), nn.Tanh()) if width else nn.Identity()
        input_dim = width if width else args.belief_dim
        self.actor, self.critic = (mlp(input_dim, *args.policy_hidden, n, activation=nn.Tanh) for n in (action_dim, 1))
        self.log_std = nn.Parameter(torch.full((action_dim,), args.init_std).log())
        hidden_init = nn.init.orthogonal_ if args.policy_init == "orthogonal" else normc_
        for layer in (*self.actor[:-1:2], *self.critic[:-1:2]):
            hidden_init(layer.weight, 5 / 3)
            nn.init.zeros_(layer.bias)
        normc_(self.actor[-1].weight, 1.0)
        nn.init.zeros_(self.actor[-1].bias)

    def forward(self, belief: Tensor) -> tuple[Normal, Tensor]:
        """π before the squashing of a sample, whose Jacobian cancels in PPO's ratio; and V, [...]."""
        x = self.embed(belief)
        mean = self.actor(x).tanh() if self.squash_mean else self.actor(x)
        return Normal(mean, self.log_std.exp().clamp(min=1e-6), validate_args=False), self.critic(x)[..., 0]


# Copied from algos/milet.py
def normc_(weight: Tensor, gain: float) -> None:
    """Gaussian rows, scaled to length gain."""
    weight.data = gain * F.normalize(torch.randn_like(weight), dim=1)


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
        dc = (1 - z) * (1 - c**2)  # ∂h'/∂x_c
        dh = torch.stack([dc * h_c * r * (1 - r), (h - c) * z * (1 - z), dc * r], dim=2)  # ∂h'/∂(h_r, h_z, h_c)
        total, from_later = grad.clone(), torch.zeros_like(h[0])  # ∂loss/∂h', and its share from later steps
        for t in reversed(range(len(grad))):  # dh becomes ∂loss/∂(h_r, h_z, h_c)
            total[t] += from_later
            dh[t] *= total[t, :, None]
            from_later = torch.addmm(total[t] * z[t], dh[t].flatten(1), w_h)
        dx = torch.cat([dh[:, :, :2].flatten(2), dc * total], dim=2)
        dx, dh, x, h = (v.flatten(0, 1) for v in (dx, dh.flatten(2), x, h))
        return None, (dx @ w_x).unflatten(0, grad.shape[:2]), from_later, dx.T @ x, dh.T @ h, dx.sum(0), dh.sum(0)


# == Sampler ===========================================================================================================


# Copied from algos/varibad.py
class Episode(NamedTuple):
    """One episode of every environment; obs and belief begin before its first step."""

    obs: Tensor  # [H+1, env, obs_dim], the done flag last
    action: Tensor  # [H, env, action_dim], as the environment got it
    sample: Tensor  # [H, env, action_dim], before the squashing
    reward: Tensor  # [H, env]
    belief: Tensor  # [H+1, env, ·], what π sees of the memory


@torch.no_grad()  # not inference_mode: the update differentiates through what is stored
def rollout(
    env: gym.vector.VectorEnv, obs: np.ndarray, policy: Policy, encoder: Encoder, h: Tensor, args: Args, test: bool
) -> tuple[Episode, Tensor]:
    """One episode of all environments in lockstep, from the first states and hidden state (test: mean actions)."""
    horizon, (n, action_dim) = env.unwrapped.horizon, env.action_space.shape
    noise = (torch.zeros if test else torch.randn)(horizon, n, action_dim).to(args.device)
    states, rewards = np.zeros((horizon + 1, n, obs.shape[1]), np.float32), np.zeros((horizon, n), np.float32)
    h = encoder.first(torch.from_numpy(obs).to(args.device), h) if args.encode_first else h
    actions, samples, beliefs = [], [], [encoder.belief(h)]
    states[0] = obs
    for t in range(horizon):
        pi, _ = policy(beliefs[t])
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


@torch.no_grad()
def run_trial(
    env: gym.vector.VectorEnv, tasks: envs.Tasks, seed: int, agent: nn.ModuleDict, args: Args, test: bool
) -> tuple[Episode, Episode]:
    """Two episodes in each task, with one memory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's threads would fight with those of the physics
    h = torch.zeros(len(tasks), args.hidden, device=args.device)
    with_flag = partial(np.pad, pad_width=((0, 0), (0, 1)))  # appends the done flag, 0, to every state
    obs = with_flag(env.reset(seed=seed, options={"tasks": tasks})[0])
    first, h = rollout(env, obs, agent["policy"], agent["encoder"], h, args, test)
    fine = ~env.unwrapped.broke  # [env], before the reset clears it (D8)
    obs = with_flag(env.reset()[0])
    second, _ = rollout(env, obs, agent["policy"], agent["encoder"], h, args, test)
    torch.set_num_threads(threads)
    keep = (fine & ~env.unwrapped.broke) | test  # D8; in a test every task keeps its row
    if not keep.any():
        raise FloatingPointError("the physics diverged in all trials")
    return tuple(Episode(*(x[:, keep] for x in episode)) for episode in (first, second))


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


# Copied from algos/varibad.py
def advantages(reward: Tensor, value: Tensor, args: Args) -> Tensor:
    """Eq. (3), of a trial: reward [H+, env], value [H+ + 1, env]; or of each episode without its last step (D2)."""
    if not args.cut_episodes:
        return gae(reward, value, args.gamma, args.gae_lambda)
    episodes = zip(reward.split(args.horizon), value[:-1].split(args.horizon))
    parts = [gae(r[:-1], v, args.gamma, args.gae_lambda) for r, v in episodes]
    return torch.cat([F.pad(part, (0, 0, 0, 1)) for part in parts])


def encode_trial(encoder: Encoder, trial: tuple[Episode, Episode], args: Args) -> Tensor:
    """h before each step of the trials, Eq. (4), with the gradients of all steps before: [H+, env, hidden]."""
    h = torch.zeros(trial[0].obs.shape[1], args.hidden, device=args.device)
    before = []
    for episode in trial:
        h = encoder.first(episode.obs[0], h) if args.encode_first else h
        after = encoder(episode.action, episode.reward, episode.obs[1:], h)  # [H, env, hidden]
        before += [h[None], after[:-1]]
        h = after[-1]
    return torch.cat(before)


def ppo_update(
    agent: nn.ModuleDict, adam: dict[str, torch.optim.Adam], trial: tuple[Episode, Episode], reward: Tensor, args: Args
) -> dict[str, float]:
    """PPO on a batch of trials with the given rewards [H+, env] -> its diagnostics, means over the minibatches.

    Every step encodes the trials anew, so that the loss trains the memory too.
    """
    policy, encoder, reward = agent["policy"], agent["encoder"], reward.to(args.device)
    trial = tuple(Episode(*(x.to(args.device) for x in episode)) for episode in trial)
    whole = Episode(*(torch.cat([x[: args.horizon], y]) for x, y in zip(*trial)))  # [H+, ...]: s'_0 follows s_{H-1}
    with torch.no_grad():
        _, value = policy(whole.belief)  # value [H+ + 1, env]
        advantage = advantages(reward, value, args)  # Eq. (3)
        returns = advantage + value[:-1]
        explained_variance = 1 - (returns - value[:-1]).var() / (returns.var() + 1e-8)
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-5)
        old = policy(whole.belief[:-1])[0].log_prob(whole.sample).sum(-1)
    batch = [x.flatten(0, 1) for x in (whole.sample, old, value[:-1], returns, advantage)]
    size, diagnostics = max(1, reward.numel() // args.minibatches), []
    for _ in range(args.ppo_epochs):
        for rows in torch.randperm(reward.numel()).to(args.device).split(size)[: args.minibatches]:  # no remainder
            h = encode_trial(encoder, trial, args).flatten(0, 1)[rows]
            u, old_log_prob, old_value, target, adv = (x[rows] for x in batch)
            pi, value = policy(encoder.belief(h))  # D3
            log_ratio = pi.log_prob(u).sum(-1) - old_log_prob
            ratio = log_ratio.exp()  # ρ of Eq. (2)
            policy_loss = -torch.minimum(ratio * adv, ratio.clamp(1 - args.clip, 1 + args.clip) * adv).mean()  # Eq. (2)
            clipped_value = old_value + (value - old_value).clamp(-args.clip, args.clip)
            huber = [F.smooth_l1_loss(v, target, reduction="none") for v in (value, clipped_value)]
            critic_loss = 0.5 * torch.maximum(*huber).mean()  # Eq. (3)
            entropy = pi.entropy().sum(-1).mean()
            for optimizer in adam.values():
                optimizer.zero_grad()
            (policy_loss + args.value_coef * critic_loss - args.entropy * entropy).backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
            nn.utils.clip_grad_norm_(encoder.parameters(), args.encoder_clip)
            for optimizer in adam.values():
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
    metrics = {}
    for k, episode in enumerate(trial, start=1):
        returns = episode.reward.double().sum(0).numpy()
        metrics |= returns_by_cluster(f"eval/return_episode_{k}", returns, tasks.cluster)
    both = Episode(*(torch.stack(pair).numpy() for pair in zip(*trial)))  # [episode, ...] each
    arrays = dict(params=tasks.params, cluster=tasks.cluster, seed=seed, embedding=both.belief[0, -1])
    arrays |= dict(trace=both.obs[..., :-1][..., :2], action=both.action, reward=both.reward)  # no done flag
    return metrics, arrays


# == Training ==========================================================================================================


def make_agent(obs_dim: int, action_dim: int, args: Args) -> nn.ModuleDict:
    agent = nn.ModuleDict(dict(encoder=Encoder(obs_dim, action_dim, args), policy=Policy(action_dim, args)))
    agent["reward_stats"] = RunningStats()
    return agent.to(args.device)


def train(args: Args, run: "Run") -> None:
    """The loop of the header."""
    env = run.make_env(args.num_envs)
    train_tasks, test_tasks = env.unwrapped.task_set("train"), env.unwrapped.task_set("test")  # D5
    test_env = run.make_env(len(test_tasks))
    obs_dim, action_dim = env.single_observation_space.shape[0] + 1, env.single_action_space.shape[0]
    frames_per_iteration = 2 * args.horizon * args.num_envs
    iterations = args.frames // frames_per_iteration

    agent = make_agent(obs_dim, action_dim, args)
    rates = {"policy": args.lr_policy, "encoder": args.lr_encoder}
    adam = {name: torch.optim.Adam(agent[name].parameters(), rate, fused=True) for name, rate in rates.items()}
    state = dict(agent=agent, **{f"adam_{name}": optimizer for name, optimizer in adam.items()})

    for iteration in run.loop(iterations, state, partial(evaluate, test_env, test_tasks, agent, args)):
        # a trial on each of num_envs different training tasks
        with run.timer("sample"):
            tasks = train_tasks[torch.randperm(len(train_tasks))[: args.num_envs].numpy()]
            trial = run_trial(env, tasks, torch.randint(2**31, ()).item(), agent, args, test=False)
        run.frames += frames_per_iteration

        # π is paid by normalised rewards (D7)
        rewards = torch.cat([episode.reward for episode in trial])  # [H+, env]
        if args.normalise_reward:
            rewards = scale_rewards(agent["reward_stats"], rewards, args.gamma)

        # π and its memory maximise the return of the trial, Eq. (1) (D4)
        with run.timer("ppo"):
            left = 1 - (iteration - 1) / iterations  # of the run
            for name, rate in rates.items():
                adam[name].param_groups[0]["lr"] = rate * (left if args.anneal else 1)
            losses = ppo_update(agent, adam, trial, rewards, args)
        returns = {f"train/return_episode_{k}": e.reward.sum(0).mean().item() for k, e in enumerate(trial, start=1)}
        run.log(returns | {f"policy/{key}": value for key, value in losses.items()})


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
