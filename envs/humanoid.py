"""The Humanoid-Dir family of MILET (App. C): a humanoid that must move in a given direction."""

import numpy as np

from envs.base import MujocoVectorEnv
from envs.circle import CENTRES, circle, nearest_centre


class HumanoidDir4C(MujocoVectorEnv):
    """`humanoid-dir-4c`: directions g = (cos pi s, sin pi s), s ~ N(m_k, 0.2^2), m = 0.25, 0.75, 1.25, 1.75.

    Observation [376]: qpos[2:] (22), qvel (23), cinert (140), cvel (84), qfrc_actuator (23), cfrc_ext (84).
    Action: box [-1, 1]^17, times 0.4 (the model's control range).
    Reward: 2.5 g.v - 0.05 |ctrl|^2 - min(5e-7 |cfrc_ext|^2, 10), v the velocity of the centre of mass over the step.
    Episode: 100 steps of 0.015 s, no termination.
    """

    xml, frame_skip, dt, contact_forces = "humanoid.xml", 5, 0.015, True
    obs_dim, action_dim, task_dim, num_clusters, task_is = 376, 17, 2, 4, "direction"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        names = ("cinert", "cvel", "qfrc_actuator", "cfrc_ext", "xipos")
        self.cinert, self.cvel, self.qfrc_actuator, self.cfrc_ext, self.xipos = map(self.batch.bind, names)
        self.before = np.zeros((self.num_envs, 2))

    def draw(self, cluster, rng):
        return circle(rng.normal(CENTRES[cluster], 0.2))

    def nearest_cluster(self, params):
        return nearest_centre(params)

    def start_state(self, rng):
        qpos = self.model.qpos0 + rng.uniform(-0.01, 0.01, self.model.nq)
        return qpos, rng.uniform(-0.01, 0.01, self.model.nv)

    def control(self, action):
        return 0.4 * action

    def centre_of_mass(self) -> np.ndarray:
        """[num_envs, 2], the mass-weighted mean of the body positions."""
        mass = self.model.body_mass
        return np.einsum("b,nbd->nd", mass, self.xipos[:, :, :2]) / mass.sum()

    def advance(self, ids, action):
        self.before = self.centre_of_mass()
        super().advance(ids, action)

    def observation(self):
        parts = (
            self.qpos[:, 2:],
            self.qvel,
            self.cinert.reshape(self.num_envs, -1),
            self.cvel.reshape(self.num_envs, -1),
            self.qfrc_actuator,
            self.cfrc_ext.reshape(self.num_envs, -1),
        )
        return np.concatenate(parts, axis=1)

    def reward(self, action):
        contact = 5e-7 * np.square(self.cfrc_ext).sum((1, 2))
        cost = 0.05 * np.square(self.control(action)).sum(1) + np.minimum(contact, 10)
        return self.velocity_reward((self.centre_of_mass() - self.before) / self.dt) - cost

    def velocity_reward(self, velocity: np.ndarray) -> np.ndarray:
        return 2.5 * (velocity * self.tasks.params).sum(1)


class HumanoidDirSparse4C(HumanoidDir4C):
    """`humanoid-dir-sparse-4c`: the velocity pays only while its angle to g has a cosine above 0.8."""

    def velocity_reward(self, velocity):
        speed = np.linalg.norm(velocity, axis=1)
        aligned = (velocity * self.tasks.params).sum(1) > 0.8 * speed
        return np.where(aligned, super().velocity_reward(velocity), 0)
