"""The half-cheetah that must run in a direction (ProMP, CML) or at a velocity (MAML, RMAML, MetaCURE)."""

import numpy as np

from envs.runner import DirectionRunner, Runner


class HalfCheetah(Runner):
    """What all of them share: the robot, its start, no termination."""

    xml, frame_skip, dt = "half_cheetah.xml", 5, 0.05
    action_dim = 6

    def start_state(self, rng):
        noise = rng.uniform(-0.1, 0.1, self.model.nq)
        return self.model.qpos0 + noise, 0.1 * rng.standard_normal(self.model.nv)

    def joints(self) -> np.ndarray:
        """qpos[1:] (8), qvel (9)."""
        return np.concatenate([self.qpos[:, 1:], self.qvel], axis=1)


class CheetahDir(HalfCheetah, DirectionRunner):
    """`cheetah-dir`: forward or backward.

    Observation [17]: qpos[1:] (8), qvel (9).
    Reward: d dx/dt - 0.05 |a|^2. Episode: 100 steps of 0.05 s, no termination.
    """

    obs_dim = 17

    def observation(self):
        return self.joints()

    def reward(self, action):
        return self.directed_velocity() - 0.05 * np.square(action).sum(1)


class CheetahVel(HalfCheetah):
    """`cheetah-vel`: target velocities v ~ U(0, 2) m/s; no clusters.

    Observation [20]: qpos[1:] (8), qvel (9), torso position (3).
    Reward: -|dx/dt - v| - 0.05 |a|^2. Episode: 100 steps of 0.05 s, no termination.
    """

    obs_dim, task_dim, num_test_tasks, task_is = 20, 1, 40, "velocity"

    def draw(self, cluster, rng):
        return rng.uniform(0, 2, (len(cluster), 1))

    def observation(self):
        x, z = self.qpos[:, 0], self.qpos[:, 1] + self.model.body("torso").pos[2]
        return np.concatenate([self.joints(), np.stack([x, np.zeros_like(x), z], axis=1)], axis=1)

    def reward(self, action):
        error = self.velocity() - self.tasks.params[:, 0]
        return self.velocity_reward(error) - 0.05 * np.square(action).sum(1)

    def velocity_reward(self, error: np.ndarray) -> np.ndarray:
        return -np.abs(error)


class CheetahVelNoise(CheetahVel):
    """`cheetah-vel-noise`: every fifth training task is noise, v ~ U(3, 4) (cluster 1); no test task is."""

    num_clusters = 2

    @classmethod
    def cluster_cycle(cls, split):
        return [0, 0, 0, 0, 1] if split == "train" else [0]

    def draw(self, cluster, rng):
        useful, noise = rng.uniform(0, 2, len(cluster)), rng.uniform(3, 4, len(cluster))  # test tasks as `cheetah-vel`
        return np.where(cluster == 1, noise, useful)[:, None]

    def nearest_cluster(self, params):
        return (params[:, 0] > 2.5).astype(int)


class CheetahVelSparse(CheetahVel):
    """`cheetah-vel-sparse`: MetaCURE's; target velocities v ~ U(0, 3) m/s, felt only near them.

    Observation as `cheetah-vel`. Reward: 2 - |dx/dt - v| where that is at least 1.5, else 0, and - 0.05 |a|^2.
    Episode: 64 steps of 0.05 s, no termination.
    """

    horizon = 64

    def draw(self, cluster, rng):
        return rng.uniform(0, 3, (len(cluster), 1))

    def velocity_reward(self, error):
        return np.where(np.abs(error) <= 0.5, 2 - np.abs(error), 0)
