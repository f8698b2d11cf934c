"""Tiny environments: one with a known answer, which every algorithm must reach in seconds, and one that breaks."""

import numpy as np

import envs


class GuessSign(envs.TaskVectorEnv):
    """Two clusters, g = -1 and g = +1 (sd 0.05): reward -(a - g)^2, nothing to see; 10 steps an episode.

    Without knowing the task the best return is -10 (a = 0); who infers g gets 0.
    """

    obs_dim, action_dim, task_dim, num_clusters, horizon, dt = 1, 1, 1, 2, 10, 1.0

    def draw(self, cluster, rng):
        return (2 * cluster - 1 + rng.normal(0, 0.05, len(cluster)))[:, None]

    def nearest_cluster(self, params):
        return (params[:, 0] > 0).astype(int)

    def reset_state(self, ids):
        pass

    def advance(self, ids, action):
        pass

    def observation(self):
        return np.zeros((self.num_envs, 1))

    def reward(self, action):
        return -((action - self.tasks.params)[:, 0] ** 2)


class Breaks(envs.ENVIRONMENTS["point-goal-4c"]):
    """The simulation of copy 1 diverges in step 4."""

    def diverged(self):
        return (np.arange(self.num_envs) == 1) & (self.elapsed == 4)


envs.register("probe-guess-sign", GuessSign)
