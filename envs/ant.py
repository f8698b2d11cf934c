"""The ant, a quadruped: it must reach a goal on a circle of radius 2 (MILET, App. C) or near one of several modes
(MMAML), or run in a direction (CML)."""

import numpy as np

from envs.base import MujocoVectorEnv
from envs.circle import CENTRES, circle, nearest_centre
from envs.modes import MODES, Modes
from envs.runner import DirectionRunner


class Ant(MujocoVectorEnv):
    """What all ants share: the robot, its start, its state. `contact_forces = False` leaves 29 of the observations."""

    xml, frame_skip, dt, contact_forces = "ant.xml", 5, 0.05, True
    obs_dim, action_dim = 113, 8

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.cfrc_ext = self.batch.bind("cfrc_ext") if self.contact_forces else np.zeros((self.num_envs, 0))

    def start_state(self, rng):
        noise = rng.uniform(-0.1, 0.1, self.model.nq)
        return self.model.qpos0 + noise, 0.1 * rng.standard_normal(self.model.nv)

    def contact_forces_clipped(self) -> np.ndarray:
        """[num_envs, 84], of all 14 bodies; [num_envs, 0] of an ant without."""
        return np.clip(self.cfrc_ext, -1, 1).reshape(self.num_envs, -1)

    def contact_cost(self) -> np.ndarray:
        return 0.0005 * np.square(self.contact_forces_clipped()).sum(1)

    def observation(self):
        return np.concatenate([self.qpos, self.qvel, self.contact_forces_clipped()], axis=1)


class AntGoal4C(Ant):
    """`ant-goal-4c`: goals 2 (cos pi s, sin pi s), s ~ N(m_k, 0.2^2), m = 0.25, 0.75, 1.25, 1.75.

    Observation [113]: qpos (15), qvel (14), contact forces of all 14 bodies clipped to [-1, 1] (84).
    Reward: -|x - g|_1 - 0.01 |a|^2 - 0.0005 |clip(cfrc_ext, -1, 1)|^2, x the torso position after the step.
    Episode: 100 steps of 0.05 s, no termination.
    """

    task_dim, num_clusters, task_is = 2, 4, "goal"

    def draw(self, cluster, rng):
        return 2 * circle(rng.normal(CENTRES[cluster], 0.2))

    def nearest_cluster(self, params):
        return nearest_centre(params)

    def reward(self, action):
        return self.goal_reward() - 0.01 * np.square(action).sum(1) - self.contact_cost()

    def goal_reward(self) -> np.ndarray:
        return -np.abs(self.qpos[:, :2] - self.tasks.params).sum(1)


class AntGoalPartial4C(AntGoal4C):
    """`ant-goal-partial-4c`: the goal is felt only within an L1 distance of 3, as 3 - |x - g|_1, else 0."""

    def goal_reward(self):
        return np.maximum(3 + super().goal_reward(), 0)


class AntGoalU(AntGoal4C):
    """`ant-goal-u`: goals uniform on the circle, s ~ U(0, 2); no clusters."""

    num_clusters = 1

    def draw(self, cluster, rng):
        return 2 * circle(rng.uniform(0, 2, len(cluster)))

    def nearest_cluster(self, params):
        return np.zeros(len(params), int)


class AntDir(Ant, DirectionRunner):
    """`ant-dir`: forward or backward.

    Observation [111]: qpos[2:] (13), qvel (14), contact forces of all 14 bodies clipped to [-1, 1] (84).
    Reward: d dx/dt + 1 - 0.5 |a|^2 - 0.0005 |clip(cfrc_ext, -1, 1)|^2.
    Episode: 100 steps of 0.05 s; it ends when the height of the torso leaves [0, 1].
    """

    obs_dim = 111

    def observation(self):
        return super().observation()[:, 2:]

    def reward(self, action):
        return self.directed_velocity() + 1 - 0.5 * np.square(action).sum(1) - self.contact_cost()

    def terminated(self):
        return (self.qpos[:, 2] < 0) | (self.qpos[:, 2] > 1)


class AntModes(Modes, Ant):
    """What the ants of MMAML share.

    Goals: (x, y), each of N(m_k, 0.8^2), at the height 0.03. Observation [29]: qpos (15), qvel (14).
    Reward: -|x - g|_1 - 0.1 |a|^2, x the torso position after the step, in three dimensions.
    Episode: 250 steps of 0.02 s, no termination.
    """

    obs_dim, horizon, frame_skip, dt, contact_forces, sd = 29, 250, 2, 0.02, False, 0.8

    def reward(self, action):
        off_ground = np.abs(self.qpos[:, 2] - 0.03)
        return -np.abs(self.qpos[:, :2] - self.tasks.params).sum(1) - off_ground - 0.1 * np.square(action).sum(1)


class Ant1M(AntModes):
    """`ant-1m`: one mode, (-4, 0)."""

    centres, num_clusters = MODES["ant-1m"], 1


class Ant2M(AntModes):
    """`ant-2m`: two modes, (-4, 0) and (4, 0)."""

    centres, num_clusters = MODES["ant-2m"], 2


class Ant4M(AntModes):
    """`ant-4m`: four modes on a half circle of radius 4."""

    centres, num_clusters = MODES["ant-4m"], 4
