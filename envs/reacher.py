"""The reacher of MMAML: an arm of three links in the plane, whose fingertip must go to a goal."""

import mujoco
import numpy as np

from envs.base import MujocoVectorEnv
from envs.modes import MODES, Modes


class Reacher(Modes, MujocoVectorEnv):
    """What all its modes share.

    Goals: (x, y, 0.03), x and y of N(m_k, 0.1^2); those farther than 0.3 from the origin are moved onto that sphere.
    Observation [7]: cosines and sines of the first two angles, the third angle, the first two angular velocities.
    Reward: -|x - g|_1 - 0.1 |a|^2, x the position of the fingertip after the step, in three dimensions.
    Episode: 50 steps of 0.02 s, no termination.
    """

    obs_dim, action_dim, task_dim, horizon, sd = 7, 3, 3, 50, 0.1
    frame_skip, dt, stage = 2, 0.02, mujoco.mjtStage.mjSTAGE_POS

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.fingertip = self.batch.bind("xpos")[:, self.model.body("fingertip").id]

    def build_spec(self):
        spec = mujoco.MjSpec()
        spec.compiler.degree = False
        spec.option.timestep, spec.option.integrator = 0.01, mujoco.mjtIntegrator.mjINT_RK4
        spec.worldbody.add_light(pos=[0, 0, 1])
        spec.worldbody.add_camera(name="track", pos=[0, 0, 1])
        ghost = dict(contype=0, conaffinity=0)  # nothing touches anything
        link = dict(type=mujoco.mjtGeom.mjGEOM_CAPSULE, fromto=[0, 0, 0, 0.1, 0, 0], size=[0.01, 0, 0], **ghost)
        joint = dict(type=mujoco.mjtJoint.mjJNT_HINGE, axis=[0, 0, 1], damping=1, armature=1)
        body = spec.worldbody
        for i, pos in enumerate(([0, 0, 0.01], [0.1, 0, 0], [0.1, 0, 0])):
            body = body.add_body(name=f"link{i}", pos=pos)
            body.add_geom(**link, rgba=[*np.eye(3)[i], 1])
            limits = dict(limited=True, range=[-5, 3]) if i == 2 else dict(limited=False)
            body.add_joint(name=f"joint{i}", **joint, **limits)
            motor = spec.add_actuator(
                target=f"joint{i}", trntype=mujoco.mjtTrn.mjTRN_JOINT, ctrllimited=True, ctrlrange=[-1, 1]
            )
            motor.set_to_motor()
            motor.gear[0] = 200
        tip = body.add_body(name="fingertip", pos=[0.11, 0, 0])
        tip.add_geom(type=mujoco.mjtGeom.mjGEOM_SPHERE, size=[0.01, 0, 0], **ghost)
        return spec

    def start_state(self, rng):
        return rng.uniform(-0.1, 0.1, 3), rng.uniform(-0.005, 0.005, 3)

    def draw(self, cluster, rng):
        goals = np.concatenate([super().draw(cluster, rng), np.full((len(cluster), 1), 0.03)], axis=1)
        return goals * np.minimum(1, 0.3 / np.linalg.norm(goals, axis=1, keepdims=True))

    def observation(self):
        arm, hand = self.qpos[:, :2], self.qpos[:, 2:]
        return np.concatenate([np.cos(arm), np.sin(arm), hand, self.qvel[:, :2]], axis=1)

    def reward(self, action):
        return -np.abs(self.fingertip - self.tasks.params).sum(1) - 0.1 * np.square(action).sum(1)


class Reacher1M(Reacher):
    """`reacher-1m`: one mode, (0.225, 0.225)."""

    centres, num_clusters = MODES["reacher-1m"], 1


class Reacher2M(Reacher):
    """`reacher-2m`: two modes, opposite corners of a square."""

    centres, num_clusters = MODES["reacher-2m"], 2


class Reacher4M(Reacher):
    """`reacher-4m`: four modes, (+-0.225, +-0.225)."""

    centres, num_clusters = MODES["reacher-4m"], 4


class Reacher6M(Reacher):
    """`reacher-6m`: six modes, a regular hexagon of radius 0.318."""

    centres, num_clusters = MODES["reacher-6m"], 6


class Reacher6MBug(Reacher):
    """`reacher-6m-bug`: the two neighbours of that hexagon that the official code draws from."""

    centres, num_clusters = MODES["reacher-6m-bug"], 2
