"""Slow second implementations, which more than one script is held against."""

import torch
from torch.distributions import Normal


def targets(reward: torch.Tensor, value: torch.Tensor, gamma: float, lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised advantages by their sums, and targets of V: [T * env] each, of reward [T, env], value [T+1, env]."""
    steps, delta = len(reward), reward + gamma * value[1:] - value[:-1]
    sums = [sum((gamma * lam) ** k * delta[t + k] for k in range(steps - t)) for t in range(steps)]
    advantage = torch.stack(sums)
    normalised = (advantage - advantage.mean()) / (advantage.std() + 1e-5)
    return normalised.flatten(), (advantage + value[:-1]).flatten()


def ppo_loss(pi: Normal, value, sample, old, old_value, advantage, target, entropy: float) -> tuple[torch.Tensor, bool]:
    """PPO's loss with a clip of 0.1 and a value coefficient of 0.8, and whether the ratio leaves the clip both ways."""
    ratio = (pi.log_prob(sample).sum(-1).flatten() - old).exp()
    gain = torch.where(advantage > 0, ratio.clamp(max=1.1), ratio.clamp(min=0.9)) * advantage
    near = old_value + (value.flatten() - old_value).clamp(-0.1, 0.1)
    huber = [torch.where((e := (x - target).abs()) < 1, e**2 / 2, e - 0.5) for x in (value.flatten(), near)]
    loss = 0.8 * 0.5 * torch.maximum(*huber).mean() - gain.mean() - entropy * pi.entropy().sum(-1).mean()
    return loss, bool(((advantage > 0) & (ratio > 1.1)).any() and ((advantage < 0) & (ratio < 0.9)).any())


def descend(loss: torch.Tensor, groups: list[tuple[list, float]], lr: float) -> bool:
    """A step of plain gradient descent, in place, every group's gradient cut to its norm; whether all were cut."""
    gradients = iter(torch.autograd.grad(loss, [p for group, _ in groups for p in group]))
    cut = True
    for group, norm in groups:
        own = [next(gradients) for _ in group]
        scale = min(1, norm / torch.cat([g.flatten() for g in own]).norm().item())
        cut &= scale < 1
        for p, g in zip(group, own):
            p.data -= lr * scale * g
    return cut
