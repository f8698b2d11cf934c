"""A 2-D point that moves 0.1 x action a step: MILET's four goal clusters in seconds instead of hours."""

import numpy as np

from envs.base import TaskVectorEnv
from envs.circle import CENTRES, circle, nearest_centre


class PointGoal4C(TaskVectorEnv):
    """`point-goal-4c`: goals 2 (cos pi s, sin pi s), s ~ N(m_k, 0.05^2): the clusters of `ant-goal-4c`, kept apart.

    Observation: position [2]. Reward: -|x - g|_1 - 0.01 |a|^2, x after the step. Episode: 100 steps, from the origin.
    """

    obs_dim, action_dim, task_dim, num_clusters, dt = 2, 2, 2, 4, 0.1

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.position = np.zeros((self.num_envs, 2))

    def draw(self, cluster, rng):
        return 2 * circle(rng.normal(CENTRES[cluster], 0.05))

    def nearest_cluster(self, params):
        return nearest_centre(params)

    def reset_state(self, ids):
        self.position[ids] = 0

    def advance(self, ids, action):
        self.position[ids] += 0.1 * np.clip(action[ids], -1, 1)

    def observation(self):
        return self.position

    def reward(self, action):
        return -np.abs(self.position - self.tasks.params).sum(1) - 0.01 * np.square(action).sum(1)

    def oracle_action(self):
        """The action of one who knows the goal: straight to it, full speed, [num_envs, 2]."""
        return np.clip((self.tasks.params - self.position) / 0.1, -1, 1)

    def render(self):
        """One [200, 200, 3] uint8 image a copy, 5 x 5 units: the point in black, its goal in red."""
        frames = np.full((self.num_envs, 200, 200, 3), 255, np.uint8)
        for frame, point, goal in zip(frames, self.position, self.tasks.params):
            for (x, y), colour in ((goal, (200, 0, 0)), (point, (0, 0, 0))):
                column, row = np.clip([100 + 40 * x, 100 - 40 * y], 4, 195).astype(int)
                frame[row - 4 : row + 5, column - 4 : column + 5] = colour
        return tuple(frames)
