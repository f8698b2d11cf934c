"""MILET's Rand-Params environments (App. C): the cluster is the set of physical parameters that is scaled.

A task is a vector of multipliers, one for every element of every set, in the order mass, damping, inertia, friction;
those of the task's own set are drawn from N(mu, sigma^2), negative ones replaced by 0.1, and all others are 1. They
are applied to the compiled model as they are; constants derived from it (inverse weights, subtree masses) stay.
"""

import numpy as np

from envs.runner import HopperOrWalker

PARAMETER_SETS = ("body_mass", "dof_damping", "body_inertia", "geom_friction")  # cluster 0, 1, 2, 3


class RandParams4C(HopperOrWalker):
    """What hopper and walker share here: 16 ms steps, multipliers, a reward for moving forward."""

    timestep, frame_skip, dt = 0.004, 4, 0.016
    num_clusters = 4
    multiplier: tuple[float, float]  # mean and standard deviation
    alive_bonus: float

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.fields = [self.batch.expand(name) for name in PARAMETER_SETS]  # each [num_envs, ...]
        self.nominal = np.concatenate([getattr(self.model, name).ravel() for name in PARAMETER_SETS])

    def draw(self, cluster, rng):
        draws = rng.normal(*self.multiplier, (len(cluster), self.task_dim))
        draws[draws < 0] = 0.1
        return np.where(self.set_index() == cluster[:, None], draws, 1.0)

    def set_index(self) -> np.ndarray:
        """[task_dim], which parameter set each multiplier belongs to."""
        sizes = [getattr(self.model, name).size for name in PARAMETER_SETS]
        return np.repeat(np.arange(4), sizes)

    def nearest_cluster(self, params):
        scaled = (params != 1) @ np.eye(4)[self.set_index()]  # [n, 4] how many multipliers of each set differ from 1
        return scaled.argmax(1)

    def apply_tasks(self, ids):
        values = self.nominal * self.tasks.params[ids]
        splits = np.cumsum([field[0].size for field in self.fields])[:-1]
        for field, part in zip(self.fields, np.split(values, splits, axis=1)):
            field[ids] = part.reshape(len(ids), *field.shape[1:])

    def reward(self, action):
        return self.velocity() + self.alive_bonus - 0.001 * np.square(action).sum(1)


class HopperParams4C(RandParams4C):
    """`hopper-params-4c`: multipliers from N(3, 1.5^2).

    Observation [11]: qpos[1:] (5), qvel clipped to [-10, 10] (6).
    Reward: dx/dt + 1 - 0.001 |a|^2. Episode: 100 steps of 0.016 s, no termination.
    """

    xml, obs_dim, action_dim, task_dim = "hopper.xml", 11, 3, 41
    multiplier, alive_bonus = (3.0, 1.5), 1.0


class WalkerParams4C(RandParams4C):
    """`walker-params-4c`: multipliers from N(6, 1^2).

    Observation [17]: qpos[1:] (8), qvel clipped to [-10, 10] (9).
    Reward: dx/dt - 0.001 |a|^2. Episode: 100 steps of 0.016 s, no termination.
    """

    xml, obs_dim, action_dim, task_dim = "walker2d.xml", 17, 6, 65
    multiplier, alive_bonus = (6.0, 1.0), 0.0
