"""MMAML, few-shot regression: multimodal MAML by task-aware modulation (Vuorio, Sun, Hu and Lim, NeurIPS 2019).

Official code: github.com/vuoristo/MMAML-Regression. Five points of an unknown function are given, its values elsewhere
are asked for; the functions are of two, three or five families. An LSTM reads the points and modulates a network, whose
weights gradient steps on the same points adapt. With --modulation none it is MAML, with --oracle too Multi-MAML, one
learner a family; with --inner-steps 0 the LSTM learner: modulation alone.

Embedding    υ = h({(x_k, y_k)}, k = 1 .. K; ω_h), a bidirectional LSTM over the support points                 Eq. (1)
Modulation   τ_i = g_i(υ; ω_g), one linear map for every hidden layer i                                        Eq. (2)
             φ_i = θ_i ⊙ τ_i: of the layer's output a before its ReLU, FiLM a (1 + τ') + τ'' (τ = [τ', τ'']),
             softmax a softmax(τ), sigmoid a σ(τ)                                                              Eq. (3)
Adaptation   θ_0 = θ,  θ_k+1 = θ_k - α ∇L_i(f(θ_k, τ); D_train),  θ'_i = θ_n;  L the mean squared error         Eq. (4)
Objective    min over θ, ω:  E_i[ L_i(f(θ'_i, τ); D_val) ], through all steps                                  Eq. (5)
In low rank  a layer after some steps is h W' = h W - α (h Hᵀ) Δ + α h E, without copies of θ: see LowRank       Eq. (6)
Algorithm 1  l. 4    tasks T_i -> sample_tasks, draw_pairs     l. 6-7    υ, τ -> Modulation
             l. 8-9  θ'_i -> adapt, predict                   l. 11-13  θ, ω -> meta_step

Symbols      θ -> TaskNet; θ_k of all tasks -> PerTask or LowRank; υ -> embedding [task, 80]; τ -> tau, a list of
             [task, 1, 200] (FiLM); ω_h, ω_g -> Modulation; D_train, D_val -> support, query; K -> shots; α -> alpha;
             β -> lr. (1), (2): the paper's numbers, the others are ours. The paper leaves all settings to a
             supplement; those here are of the official code (C).

Deviations from the paper (P) or C
  D1 P sorts the points by x before the LSTM, C does not; here as P (--no-sort).
  D2 P modulates every layer; C's commands for two modes the first hidden layer alone; here as P (--modulated-layers 1).
  D3 MAML's network in C sees a learned vector t of 20 numbers beside x, which starts at 0 and adapts, MMAML's does not,
     though P gives both one network; here as C (--bias-dim 0).
  D4 Multi-MAML in C is one run: one clip of all gradients, t from N(0, 1) and not adapted. Here M learners, each with
     the loss of its tasks, a clip of its own, and t as MAML's. Losses are means over tasks, as in C; P sums them.
  D5 C clamps the entries of the inner gradient to [-10, 10], in MMAML alone; P is silent. Here as C (--inner-clip).
  D6 C's LSTM learner takes an inner step of size 0; here no step.
  D7 C evaluates on batches of the training distribution; here on 1000 fixed tasks of every family, with fixed points.

Tested       python algos/mmaml_regression.py --iterations 5000 --eval-every 500 --num-threads 1   (6.25 million points,
             8 minutes of one core of an AMD EPYC): squared error 3.28 after modulation, 1.02 after five steps; MAML
             (--modulation none) 16.15, then 2.15. 70,000 meta-iterations are the paper's.
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
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import envs

# == Args ==============================================================================================================


@dataclass
class Args:
    env: str = "functions-5m"  # environment id (module:id imports the module first)
    preset: Literal["paper", "fast"] | None = None  # published, or ours, of about an hour (default where there is one)
    seed: int = 0  # seed of everything random
    device: Literal["cpu", "cuda"] = "cpu"  # device of the networks
    num_threads: int = 0  # number of threads of the physics and of the updates (0: all CPUs)
    iterations: int = 70000  # number of meta-iterations
    eval_every: int = 1000  # meta-iterations between evaluations on the held-out tasks
    save_every: int = 1000  # meta-iterations between checkpoints
    track: bool = False  # mirror the run to Weights & Biases
    run_dir: str = "runs"  # folder in which the run gets its own folder
    name: str | None = None  # name of the run's folder (if it exists, its run is continued; default: with the time)
    resume: str | None = None  # run folder to continue (its args.json applies)
    evaluate: str | None = None  # run folder to evaluate without training (its args.json applies)

    oracle: bool = False  # Multi-MAML: a learner for every true family (with --modulation none)
    modulation: Literal["film", "softmax", "sigmoid", "none"] = "film"  # operator ⊙ of Eq. (3) (none: MAML)
    modulated_layers: int = 3  # hidden layers that are modulated, from the first on (D2; not with --modulation none)
    sort: bool = True  # sort the support points by x before the LSTM reads them (D1)
    bias_dim: int = 20  # with --modulation none alone: size of the learned vector beside x (D3)

    tasks: int = 125  # number of tasks per meta-iteration, in equal parts of every family
    horizon: int = 10  # points of a task: K for the adaptation, the others to be predicted
    shots: int = 5  # K, support points
    inner_steps: int = 5  # n, gradient steps of the adaptation (0: the LSTM learner, D6; of MAML: pre-training)
    alpha: float = 0.001  # α, inner step size
    inner_clip: float | None = None  # largest entry of an inner gradient (0: no limit; default: 10 if modulated, D5)
    low_rank: bool = True  # keep adapted weights in low rank, which is faster (else a copy of θ for every task)
    eval_steps: int = 0  # gradient steps at evaluation (0: as many as in training)

    hidden: tuple[int, ...] = (100, 100, 100)  # widths of the task network's hidden layers
    lstm_hidden: int = 40  # width of the LSTM, in each direction (not used with --modulation none)
    lr: float = 1e-3  # β, learning rate of Adam
    outer_clip: float = 2.0  # largest norm of the meta-gradient of a learner, and of ω (0: no limit)


PAPER: dict[str, dict] = {"functions-2m": dict(tasks=50), "functions-3m": dict(tasks=75)}  # 25 tasks of every family
FAST: dict[str, dict] = {}  # none: the published length takes hours, nothing is tuned
MAY_BE_0 = ("seed", "num_threads", "bias_dim", "inner_steps", "eval_steps")


def check(args: Args, env: type[envs.TaskVectorEnv]) -> dict[str, bool]:
    """What must hold; where it does not, the message is the error."""
    families, layers = env.num_clusters, 0 if args.modulation == "none" else args.modulated_layers
    idle = (args.modulated_layers, args.sort, args.lstm_hidden) == (Args.modulated_layers, Args.sort, Args.lstm_hidden)
    return {
        f"--env must be functions-2m, -3m or -5m, not {args.env}": issubclass(env, Functions5M),
        f"--tasks must be a multiple of {families}": args.tasks % families == 0,
        "--oracle needs --modulation none": not args.oracle or args.modulation == "none",
        f"--modulated-layers must be at most {len(args.hidden)}": layers <= len(args.hidden),
        "--modulated-layers, --no-sort and --lstm-hidden need a --modulation": idle or args.modulation != "none",
        "--bias-dim needs --modulation none (D3)": args.bias_dim == Args.bias_dim or args.modulation == "none",
        "--shots must be less than --horizon": args.shots < args.horizon,
        "--alpha and --lr must be positive": min(args.alpha, args.lr) > 0,
        "--inner-clip and --outer-clip must be at least 0": min(args.inner_clip or 0, args.outer_clip) >= 0,
    }


# == Networks ==========================================================================================================


class TaskNet(nn.Module):
    """θ of one learner: a perceptron's weights, biases in the last row, and the vector t beside its input (D3)."""

    def __init__(self, args: Args):
        super().__init__()
        bias_dim = args.bias_dim if args.modulation == "none" else 0
        shapes = [*pairwise((1 + bias_dim, *args.hidden, 1))]
        self.t = nn.Parameter(torch.zeros(bias_dim))
        weights = (torch.cat([0.01 * torch.randn(a, b), torch.zeros(1, b)]) for a, b in shapes)
        self.weights = nn.ParameterList(weights)


class Modulation(nn.Module):
    """υ and τ of every task from its support points."""

    def __init__(self, args: Args):
        super().__init__()
        self.sort, layers = args.sort, args.hidden[: args.modulated_layers]
        self.lstm = nn.LSTM(2, args.lstm_hidden, num_layers=2, bidirectional=True, batch_first=True)
        halves = 2 if args.modulation == "film" else 1
        self.heads = nn.ModuleList(nn.Linear(2 * args.lstm_hidden, halves * width) for width in layers)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        """x, y [task, K, 1] -> υ [task, 80], and τ_i [task, 1, 200] (FiLM; else 100) of every modulated layer."""
        pairs = torch.cat([x, y], -1)
        if self.sort:  # D1
            pairs = pairs.gather(1, x.argsort(1).expand_as(pairs))
        _, (last, _) = self.lstm(pairs)
        embedding = torch.cat([last[-2], last[-1]], -1)  # Eq. (1): forward at the last point, backward at the first
        return embedding, [head(embedding)[:, None] for head in self.heads]  # Eq. (2)


def modulate(a: Tensor, tau: Tensor, operator: str) -> Tensor:
    """φ of Eq. (3): the outputs a [task, point, unit] of a layer, before its ReLU."""
    if operator == "film":
        scale, shift = tau.chunk(2, -1)
        return a * (1 + scale) + shift
    return a * (tau.softmax(-1) if operator == "softmax" else tau.sigmoid())


# == Sampler ===========================================================================================================


class Family(NamedTuple):
    """Functions a s(x - c) + b, of uniform parameters."""

    shape: Callable[[Tensor], Tensor]  # s
    low: tuple[float, float, float]  # least a, c, b
    high: tuple[float, float, float]  # largest
    both_signs: bool = False  # of a


FAMILIES = (  # an environment has the first two, three or five
    Family(torch.sin, (0.1, 0, 0), (5, math.pi, 0)),
    Family(torch.positive, (-3, 0, -3), (3, 0, 3)),  # a line
    Family(torch.square, (0.02, -3, -3), (0.15, 3, 3), both_signs=True),
    Family(torch.tanh, (-3, -3, -3), (3, 3, 3)),
    Family(torch.abs, (-3, -3, -3), (3, 3, 3)),
)
NOISE = 0.3  # standard deviation of the outputs, of support and query points


def value(params: Tensor, x: Tensor) -> Tensor:
    """The functions, without noise: params [task, 4] (family; a, c, b), x [task, point] -> [task, point]."""
    family, a, c, b = params[..., None].unbind(1)  # [task, 1]
    shapes = torch.stack([each.shape(x - c) for each in FAMILIES])  # [family, task, point]
    return a * shapes[family[:, 0].long(), torch.arange(len(x), device=x.device)] + b


class Functions5M(envs.TaskVectorEnv):
    """`functions-5m`: the task is a function; a step shows x, and 30 a is the answer. Reward -(30 a - y)² / H.

    Families: 0 sine, 1 line, 2 parabola, 3 hyperbolic tangent, 4 absolute value. x ~ U(-5, 5); y = f(x) + noise.
    """

    obs_dim, action_dim, task_dim, num_clusters, horizon, dt, num_test_tasks = 1, 1, 4, 5, 10, 1.0, 5000

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.x, self.clean, self.y = np.zeros((3, self.num_envs))

    def draw(self, cluster, rng):
        families = [FAMILIES[m] for m in cluster]
        params = rng.uniform([f.low for f in families], [f.high for f in families])
        negative = np.array([f.both_signs for f in families]) & (rng.uniform(size=len(families)) < 0.5)
        params[negative, 0] *= -1
        return np.column_stack([cluster, params])

    def nearest_cluster(self, params):
        return params[:, 0].astype(int)

    def reset_state(self, ids):
        self.x[ids] = [self.rngs[i].uniform(-5, 5) for i in ids]
        self.clean[ids] = value(torch.from_numpy(self.tasks.params[ids]), torch.from_numpy(self.x[ids, None]))[:, 0]

    def advance(self, ids, action):
        ids = np.arange(self.num_envs)[ids]
        self.y[ids] = self.clean[ids] + [NOISE * self.rngs[i].normal() for i in ids]
        self.reset_state(ids)

    def observation(self):
        return self.x[:, None]

    def reward(self, action):
        return -np.square(30 * action[:, 0] - self.y) / self.horizon

    def oracle_action(self):
        """The action of one who knows the function, [num_envs, 1]: what is left is the noise."""
        return self.clean[:, None] / 30


class Functions3M(Functions5M):
    """`functions-3m`: sines, lines and parabolas."""

    num_clusters, num_test_tasks = 3, 3000


class Functions2M(Functions5M):
    """`functions-2m`: sines and lines."""

    num_clusters, num_test_tasks = 2, 2000


for functions in (Functions2M, Functions3M, Functions5M):
    envs.register(f"functions-{functions.num_clusters}m", functions)


# Copied from algos/maml.py
def random_seed(rng: torch.Generator) -> int:
    return torch.randint(2**31, (), generator=rng).item()


class Pairs(NamedTuple):
    """Points of every task."""

    x: Tensor  # [task, point, 1]
    y: Tensor  # [task, point, 1], with noise
    clean: Tensor  # [task, point, 1], without

    def of(self, tasks: np.ndarray | slice) -> "Pairs":
        return Pairs(*(part[tasks] for part in self))


def draw_pairs(tasks: envs.Tasks, rng: torch.Generator, args: Args) -> tuple[Pairs, Pairs]:
    """D_train and D_val of every task (Alg. 1, l. 4): x ~ U(-5, 5), noise on all y."""
    params = torch.from_numpy(tasks.params).float().to(args.device)
    x = 10 * torch.rand(len(params), args.horizon, generator=rng).to(params) - 5
    clean = value(params, x)
    y = clean + NOISE * torch.randn(x.shape, generator=rng).to(params)
    parts = [part[..., None] for part in (x, y, clean)]
    return Pairs(*(p[:, : args.shots] for p in parts)), Pairs(*(p[:, args.shots :] for p in parts))


# == Inner adaptation ==================================================================================================


class PerTask(NamedTuple):
    """θ_k, a copy for every task."""

    t: Tensor  # [task, 1, bias_dim]
    weights: list[Tensor]  # [task, in + 1, out]

    @classmethod
    def of(cls, net: TaskNet, tasks: int) -> "PerTask":
        """θ_0: views of θ."""
        return cls(net.t.expand(tasks, 1, -1), [w.expand(tasks, -1, -1) for w in net.weights])

    def linear(self, i: int, h: Tensor) -> Tensor:
        """Layer i of [h, 1], [task, point, in + 1] -> [task, point, out]."""
        return torch.bmm(h, self.weights[i])

    def step(self, loss: Tensor, layers: list, args: Args, create_graph: bool) -> "PerTask":
        """θ_k+1 of Eq. (4). The loss is a sum over tasks, each of which has weights of its own; layers is LowRank's."""
        gradients = torch.autograd.grad(loss, [self.t, *self.weights], create_graph=create_graph)
        clip = inner_clip(args)
        t, *weights = (p - args.alpha * g.clamp(-clip, clip) for p, g in zip([self.t, *self.weights], gradients))
        return PerTask(t, weights)


def inner_clip(args: Args) -> float:
    """Largest entry of an inner gradient (D5)."""
    if args.inner_clip is None:
        return math.inf if args.modulation == "none" else 10.0
    return args.inner_clip or math.inf


def run_layers(theta: "PerTask | LowRank", x: Tensor, tau: list[Tensor], args: Args) -> list[tuple[Tensor, Tensor]]:
    """Every layer's inputs, with a 1 for the bias, and its outputs before modulation; the last are f(x; θ_k, τ)."""
    h, layers = torch.cat([x, theta.t.expand(-1, x.shape[1], -1)], -1), []
    for i in range(len(theta.weights)):
        h = nn.functional.pad(h, (0, 1), value=1.0)
        a = theta.linear(i, h)
        layers.append((h, a))
        h = torch.relu(modulate(a, tau[i], args.modulation) if i < len(tau) else a)
    return layers  # the last is neither modulated nor rectified


def predict(theta: "PerTask | LowRank", x: Tensor, tau: list[Tensor], args: Args) -> Tensor:
    """f(x; θ_k, τ), [task, point, 1]."""
    return run_layers(theta, x, tau, args)[-1][1]


def squared_error(prediction: Tensor, y: Tensor) -> Tensor:
    """L of Eq. (4) and (5), [task]."""
    return (prediction - y).square().mean((1, 2))


def adapt(
    net: TaskNet, tau: list[Tensor], support: Pairs, steps: int, args: Args, create_graph: bool = True
) -> list["PerTask | LowRank"]:
    """θ_0 .. θ_n of every task, Eq. (4); τ stays as it is (Alg. 1, l. 8-9)."""
    thetas = [(LowRank if args.low_rank else PerTask).of(net, len(support.x))]
    for _ in range(steps):
        layers = run_layers(thetas[-1], support.x, tau, args)
        loss = squared_error(layers[-1][1], support.y).sum()
        thetas.append(thetas[-1].step(loss, layers, args, create_graph))
    return thetas


class LowRank(NamedTuple):
    """PerTask without the copies, for speed: the same numbers, from the θ of all tasks and what steps have changed.

    The gradient of a layer's weights is Hᵀ Δ: its inputs H at the K support points, and the loss's gradients Δ at its
    outputs. So after some steps the layer is Eq. (6), with H and Δ of all of them. E is what the clamp takes off Hᵀ Δ
    (D5), where it takes anything.
    """

    t: Tensor  # [task, 1, bias_dim]
    weights: nn.ParameterList  # θ, [in + 1, out]
    changes: list[tuple[Tensor, Tensor, list]]  # H [task, k K, in + 1], -α Δ [task, k K, out], the entries of α E

    @classmethod
    def of(cls, net: TaskNet, tasks: int) -> "LowRank":
        """θ_0."""
        none = [(w.new_zeros(tasks, 0, len(w)), w.new_zeros(tasks, 0, w.shape[1]), []) for w in net.weights]
        return cls(net.t.expand(tasks, 1, -1), net.weights, none)

    def linear(self, i: int, h: Tensor) -> Tensor:
        """Eq. (6)."""
        inputs, deltas, excess = self.changes[i]
        a = (h.flatten(0, 1) @ self.weights[i]).unflatten(0, h.shape[:2])
        a = torch.baddbmm(a, torch.bmm(h, inputs.mT), deltas) if inputs.shape[1] else a
        for task, row, unit, e in excess:  # + h α E, entry by entry: a[task, :, unit] += h[task, :, row] e
            a = a.mT.index_put((task, unit), h.mT[task, row] * e[:, None], accumulate=True).mT
        return a

    def step(self, loss: Tensor, layers: list, args: Args, create_graph: bool) -> "LowRank":
        """θ_k+1 of Eq. (4)."""
        outputs = [a for _, a in layers]
        of_t, *gradients = torch.autograd.grad(loss, [self.t, *outputs], create_graph=create_graph)
        clip, changes = inner_clip(args), []
        for (h, _), delta, (inputs, deltas, excess) in zip(layers, gradients, self.changes):
            excess = excess + [(*where, args.alpha * e) for *where, e in clipped_off(h, delta, clip)]
            changes.append((torch.cat([inputs, h], 1), torch.cat([deltas, -args.alpha * delta], 1), excess))
        return LowRank(self.t - args.alpha * of_t.clamp(-clip, clip), self.weights, changes)


def clipped_off(h: Tensor, delta: Tensor, clip: float) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """What the clamp takes off Hᵀ Δ, h [task, K, in + 1], delta [task, K, out]: task, row, unit and E of each such
    entry, [entry] each. There are few; if there is none, nothing. No entry is larger than the sum over points of
    max |H| max |Δ|, which tells cheaply in which tasks to look.
    """
    with torch.no_grad():
        near = ((h.abs().amax(-1) * delta.abs().amax(-1)).sum(-1) > clip).nonzero()[:, 0]  # tasks
        i, row, unit = (torch.bmm(h[near].mT, delta[near]).abs() > clip).nonzero().T
    task = near[i]
    entry = (h.mT[task, row] * delta.mT[task, unit]).sum(-1)
    return [(task, row, unit, entry - entry.clamp(-clip, clip))] if len(i) else []


# == Outer step ========================================================================================================


def make_agent(args: Args, learners: int) -> nn.ModuleDict:
    """Alg. 1, l. 2: θ of every learner, and ω."""
    agent = nn.ModuleDict(dict(theta=nn.ModuleList(TaskNet(args) for _ in range(learners))))
    if args.modulation != "none":
        agent["omega"] = Modulation(args)
    return agent.to(args.device)


def modulation_of(agent: nn.ModuleDict, support: Pairs) -> tuple[Tensor | None, list[Tensor]]:
    """υ and τ (Alg. 1, l. 6-7); without a modulation network none."""
    return agent["omega"](support.x, support.y) if "omega" in agent else (None, [])


def meta_step(
    agent: nn.ModuleDict, adam: torch.optim.Adam, support: Pairs, query: Pairs, learner: np.ndarray, args: Args
) -> tuple[Tensor, dict[str, float]]:
    """Alg. 1, l. 5-13: the query error of every task before and after its steps, [2, task], and gradient norms."""
    errors = support.x.new_empty(2, len(learner))
    adam.zero_grad()
    for m in np.unique(learner):  # one, but for Multi-MAML (D4)
        mine = np.flatnonzero(learner == m)
        own_support, own_query = support.of(mine), query.of(mine)
        _, tau = modulation_of(agent, own_support)
        thetas = adapt(agent["theta"][m], tau, own_support, args.inner_steps, args)
        before, after = (squared_error(predict(thetas[k], own_query.x, tau, args), own_query.y) for k in (0, -1))
        after.mean().backward()  # Eq. (5)
        errors[:, mine] = torch.stack([before, after]).detach()
    norms = clip_gradients(agent, args)  # D4
    adam.step()
    return errors, norms


def clip_gradients(agent: nn.ModuleDict, args: Args) -> dict[str, float]:
    """Clip the meta-gradients of every learner and of ω by their norms -> what these were."""
    groups = {f"theta_{m}": net for m, net in enumerate(agent["theta"])}
    if "omega" in agent:
        groups["omega"] = agent["omega"]
    limit = args.outer_clip or math.inf
    norms = {k: nn.utils.clip_grad_norm_(part.parameters(), limit) for k, part in groups.items()}
    return {f"adam/gradient_{k}": norm.item() for k, norm in norms.items()}


# == Evaluation ========================================================================================================

CHUNK = 250  # tasks at a time
SHOWN = 1000  # test tasks of which eval.npz tells more


# Copied from algos/milet.py
def returns_by_cluster(name: str, returns: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """The mean of the returns [task] and, if there are several, of every true cluster."""
    present = np.unique(clusters)
    by_cluster = {f"{name}_cluster_{m}": float(returns[clusters == m].mean()) for m in present}
    return {name: float(returns.mean())} | (by_cluster if len(present) > 1 else {})


def intervals(name: str, scores: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """Half the width of the 95 % interval of a mean over tasks: of every true cluster, and of all, in equal parts."""
    groups = {m: scores[clusters == m] for m in np.unique(clusters)}
    halves = {f"{name}_cluster_{m}": float(1.96 * x.std(ddof=1) / np.sqrt(len(x))) for m, x in groups.items()}
    return {name: math.hypot(*halves.values()) / len(halves)} | halves


def predictions(
    agent: nn.ModuleDict, tau: list[Tensor], support: Pairs, x: Tensor, learner: np.ndarray, steps: int, args: Args
) -> np.ndarray:
    """f(x; θ_k, τ) after 0 .. n steps at x [task, point, 1], [step, task, point]."""
    values = np.empty((steps + 1, *x.shape[:2]))
    for m in np.unique(learner):
        mine = np.flatnonzero(learner == m)
        for part in np.array_split(mine, math.ceil(len(mine) / CHUNK)):
            own = [each[part] for each in tau]
            thetas = adapt(agent["theta"][m], own, support.of(part), steps, args, create_graph=False)
            with torch.no_grad():
                values[:, part] = [predict(theta, x[part], own, args)[..., 0].cpu().numpy() for theta in thetas]
    return values


def fitted_curves(
    agent: nn.ModuleDict, tau: list[Tensor], support: Pairs, tasks: envs.Tasks, learner: np.ndarray, args: Args
) -> dict[str, np.ndarray]:
    """Of four tasks of every family, on a grid of x: the function, and the prediction before modulation, after it and
    after adaptation, [3, task, x]."""
    few, steps = np.arange(4 * len(np.unique(tasks.cluster))), args.eval_steps or args.inner_steps  # families in turn
    x = torch.linspace(-5, 5, 101, device=args.device).expand(len(few), -1)
    truth = value(torch.from_numpy(tasks.params[few]).to(x), x)
    given = support.of(few), x[..., None], learner[few]
    plain = predictions(agent, [], *given, 0, args)
    adapted = predictions(agent, [each[few] for each in tau], *given, steps, args)
    curves, pairs = np.stack([plain[0], adapted[0], adapted[-1]]), torch.cat([support.x, support.y], -1)[few]
    return dict(curves=curves, x=x[0].cpu().numpy(), truth=truth.cpu().numpy(), support=pairs.cpu().numpy())


def evaluate(tasks: envs.Tasks, agent: nn.ModuleDict, args: Args) -> tuple[dict, dict]:
    """Minus the mean squared error of the query points of 1000 tasks of every family (D7), after 0 .. n steps.

    Before and after adaptation also the error to the function without noise, and half the width of the 95 % interval of
    the mean; after adaptation the error with the mean τ of all tasks, which does not tell them apart. For the figures,
    of the first tasks: errors [step, task], embeddings [task, 80], and what fitted_curves gives.
    """
    steps, cluster, learner = args.eval_steps or args.inner_steps, tasks.cluster, assign(tasks, args)
    support, query = draw_pairs(tasks, torch.Generator().manual_seed(10**6), args)
    with torch.no_grad():
        embedding, tau = modulation_of(agent, support)
    values = predictions(agent, tau, support, query.x, learner, steps, args)  # [step, task, point]
    error, clean = (np.square(values - y[..., 0].cpu().numpy()).mean(-1) for y in (query.y, query.clean))

    metrics = {}
    for k in range(steps + 1):
        metrics |= returns_by_cluster(f"eval/return_step_{k}", -error[k], cluster)
    for k in sorted({0, steps}):
        metrics |= returns_by_cluster(f"eval/clean_error_step_{k}", clean[k], cluster)
        metrics |= intervals(f"eval/interval_step_{k}", error[k], cluster)

    arrays = dict(params=tasks.params[:SHOWN], cluster=cluster[:SHOWN], error=error[:, :SHOWN])
    arrays |= fitted_curves(agent, tau, support, tasks, learner, args)
    if tau:
        mean = [each.mean(0, keepdim=True).expand_as(each) for each in tau]
        values = predictions(agent, mean, support, query.x, learner, steps, args)[-1]
        same = np.square(values - query.y[..., 0].cpu().numpy()).mean(-1)
        metrics |= returns_by_cluster("eval/return_mean_modulated", -same, cluster)
        arrays["embedding"] = embedding[:SHOWN].cpu().numpy()
    return metrics, arrays


# == Training ==========================================================================================================


# Copied from algos/maml.py
def assign(tasks: envs.Tasks, args: Args) -> np.ndarray:
    """The learner of each task: with --oracle that of its true cluster, else the only one."""
    return tasks.cluster if args.oracle else np.zeros(len(tasks), int)


def train(args: Args, run: "Run") -> None:
    """Algorithm 1."""
    env = run.make_env(1).unwrapped
    test_tasks = env.task_set("test")

    # Alg. 1, l. 2: θ of every learner (Multi-MAML: one a family, else one), and ω
    agent = make_agent(args, env.num_clusters if args.oracle else 1)
    adam = torch.optim.Adam(agent.parameters(), args.lr)  # of θ and ω: two with one rate are one

    evaluation = partial(evaluate, test_tasks, agent, args)
    for _ in run.loop(args.iterations, dict(agent=agent, adam=adam), evaluation):
        # l. 4: fresh functions, and points of each
        with run.timer("sample"):
            tasks = env.sample_tasks(args.tasks, np.random.default_rng(random_seed(run.rng)))
            support, query = draw_pairs(tasks, run.rng, args)
        run.frames += args.tasks * args.horizon

        # l. 5-13: modulate, adapt, and a step of Adam on the query error
        errors, norms = meta_step(agent, adam, support, query, assign(tasks, args), args)

        errors, metrics = -errors.cpu().numpy(), {}
        for k, values in zip((0, args.inner_steps), errors):
            metrics |= returns_by_cluster(f"train/return_step_{k}", values, tasks.cluster)
        run.log(metrics | norms)


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
