"""2-D points: those that move 0.1 x action a step, with MILET's four goal clusters in seconds instead of hours, or
MetaCURE's goals that are felt only nearby; and MMAML's, which the action accelerates."""

import numpy as np

from envs.base import TaskVectorEnv
from envs.circle import CENTRES, circle, nearest_centre
from envs.modes import MODES, Modes


class PointGoal4C(TaskVectorEnv):
    """`point-goal-4c`: goals 2 (cos pi s, sin pi s), s ~ N(m_k, 0.05^2): the clusters of `ant-goal-4c`, kept apart.

    Observation: position [2]. Reward: -|x - g|_1 - 0.01 |a|^2, x after the step. Episode: 100 steps, from the origin.
    """

    obs_dim, action_dim, task_dim, num_clusters, task_is, dt = 2, 2, 2, 4, "goal", 0.1
    scale = 40  # pixels a unit

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
        """One [200, 200, 3] uint8 image a copy, 200 / `scale` units wide: the point in black, its goal in red."""
        frames = np.full((self.num_envs, 200, 200, 3), 255, np.uint8)
        for frame, point, goal in zip(frames, self.position, self.tasks.params):
            for (x, y), colour in ((goal, (200, 0, 0)), (point, (0, 0, 0))):
                column, row = np.clip([100 + self.scale * x, 100 - self.scale * y], 4, 195).astype(int)
                frame[row - 4 : row + 5, column - 4 : column + 5] = colour
        return tuple(frames)


class PointGoalSparse(PointGoal4C):
    """`point-goal-sparse`: MetaCURE's; goals (cos pi s, sin pi s), s ~ U(0, 1), on half a circle; no clusters.

    Observation: position [2]. Reward: 1 - |x - g|_2 where that is at least 0.7, else 0, x after the step.
    Episode: 32 steps, from the origin.
    """

    num_clusters, horizon, scale = 1, 32, 80

    def draw(self, cluster, rng):
        return circle(rng.uniform(0, 1, len(cluster)))

    def nearest_cluster(self, params):
        return np.zeros(len(params), int)

    def reward(self, action):
        distance = np.linalg.norm(self.position - self.tasks.params, axis=1)
        return np.where(distance <= 0.3, 1 - distance, 0)


class PointMass(Modes):
    """What the points of MMAML share.

    Goals: N(m_k, 1). Observation [4]: position, velocity. Reward: -|x - g|_2, x after the step.
    A step: v <- v + 0.1 a, x <- x + v. Episode: 100 steps, from x ~ U(-0.2, 0.2)^2 and v ~ U(-0.1, 0.1)^2.
    """

    obs_dim, action_dim, dt, sd, scale = 4, 2, 0.1, 1.0, 10

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.position, self.velocity = np.zeros((2, self.num_envs, 2))

    def reset_state(self, ids):
        for i in ids:
            self.position[i] = self.rngs[i].uniform(-0.2, 0.2, 2)
            self.velocity[i] = self.rngs[i].uniform(-0.1, 0.1, 2)

    def advance(self, ids, action):
        self.velocity[ids] += 0.1 * np.clip(action[ids], -1, 1)
        self.position[ids] += self.velocity[ids]

    def observation(self):
        return np.concatenate([self.position, self.velocity], axis=1)

    def reward(self, action):
        return -np.linalg.norm(self.position - self.tasks.params, axis=1)

    def oracle_action(self):
        """The action of one who knows the goal: as fast as it can still brake, along each axis, [num_envs, 2]."""
        way = self.tasks.params - self.position
        speed = np.minimum(np.sqrt(0.2 * np.abs(way)), np.abs(way))  # v^2 / 2 a, a = 0.1, is the way to brake
        return np.clip((np.sign(way) * speed - self.velocity) / 0.1, -1, 1)

    render = PointGoal4C.render


class Point1M(PointMass):
    """`point-1m`: one mode, (5, 5)."""

    centres, num_clusters = MODES["point-1m"], 1


class Point2M(PointMass):
    """`point-2m`: two modes, (-5, -5) and (5, 5)."""

    centres, num_clusters = MODES["point-2m"], 2


class Point4M(PointMass):
    """`point-4m`: four modes, (+-5, +-5)."""

    centres, num_clusters = MODES["point-4m"], 4


class Point6M(PointMass):
    """`point-6m`: six modes, a regular hexagon of radius 5: nearer than those of the other points."""

    centres, num_clusters = MODES["point-6m"], 6


class Point6MFar(PointMass):
    """`point-6m-far`: the same with radius 7.07, as far as the modes of the other points."""

    centres, num_clusters = MODES["point-6m-far"], 6
