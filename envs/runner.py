"""Robots that run along x: what the direction and velocity tasks of all robots share."""

import numpy as np

from envs.base import MujocoVectorEnv


class Runner(MujocoVectorEnv):
    """A robot paid for its velocity along x, the first coordinate of qpos."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.before = np.zeros(self.num_envs)  # [env] x before the step

    def advance(self, ids, action):
        self.before = self.qpos[:, 0].copy()
        super().advance(ids, action)

    def velocity(self) -> np.ndarray:
        """[num_envs], metres per second over the step just taken."""
        return (self.qpos[:, 0] - self.before) / self.dt


class HopperOrWalker(Runner):
    """What both share in Gym: the noise at the start; they observe qpos[1:] and qvel clipped to [-10, 10]."""

    def start_state(self, rng):
        noise = rng.uniform(-0.005, 0.005, self.model.nq)
        return self.model.qpos0 + noise, rng.uniform(-0.005, 0.005, self.model.nv)

    def observation(self):
        return np.concatenate([self.qpos[:, 1:], np.clip(self.qvel, -10, 10)], axis=1)


class DirectionRunner(Runner):
    """Two tasks, which are also the two clusters: d = +1, run forward (cluster 0), and d = -1, backward (cluster 1)."""

    task_dim, num_clusters, num_test_tasks, task_is = 1, 2, 40, "direction"

    def draw(self, cluster, rng):
        return 1.0 - 2.0 * cluster[:, None]

    def nearest_cluster(self, params):
        return (params[:, 0] < 0).astype(int)

    def directed_velocity(self) -> np.ndarray:
        """[num_envs], d dx/dt."""
        return self.tasks.params[:, 0] * self.velocity()
