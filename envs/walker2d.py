"""The walker that must run in a direction (Taming the Herd; reward and termination of ProMP, Gym's frame skip)."""

import numpy as np

from envs.runner import DirectionRunner, HopperOrWalker


class WalkerDir(HopperOrWalker, DirectionRunner):
    """`walker-dir`: forward or backward.

    Observation [17]: qpos[1:] (8), qvel clipped to [-10, 10] (9).
    Reward: d dx/dt + 1 - 0.001 |a|^2.
    Episode: 100 steps of 0.008 s; it ends when the height leaves (0.8, 2) or the pitch (-1, 1).
    """

    xml, frame_skip, dt = "walker2d.xml", 4, 0.008
    obs_dim, action_dim = 17, 6

    def reward(self, action):
        return self.directed_velocity() + 1 - 0.001 * np.square(action).sum(1)

    def terminated(self):
        height, pitch = self.qpos[:, 1], self.qpos[:, 2]
        return (height <= 0.8) | (height >= 2) | (np.abs(pitch) >= 1)
