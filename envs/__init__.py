"""Importing this package registers every environment with Gymnasium."""

import importlib
from difflib import get_close_matches

import gymnasium as gym

from envs.ant import Ant1M, Ant2M, Ant4M, AntDir, AntGoal4C, AntGoalPartial4C, AntGoalU
from envs.base import MujocoVectorEnv, SingleEnv, Tasks, TaskVectorEnv
from envs.half_cheetah import CheetahDir, CheetahVel, CheetahVelNoise, CheetahVelSparse
from envs.humanoid import HumanoidDir4C, HumanoidDirSparse4C
from envs.mixed import ML2, AntCheetahDir
from envs.point import Point1M, Point2M, Point4M, Point6M, Point6MFar, PointGoal4C, PointGoalSparse
from envs.rand_params import HopperParams4C, WalkerParams4C
from envs.reacher import Reacher1M, Reacher2M, Reacher4M, Reacher6M, Reacher6MBug
from envs.walker2d import WalkerDir

__all__ = ["ENVIRONMENTS", "MujocoVectorEnv", "SingleEnv", "TaskVectorEnv", "Tasks", "find", "register", "vector_env"]

ENVIRONMENTS: dict[str, type[TaskVectorEnv]] = {  # id: class
    "ant-goal-4c": AntGoal4C,  # MILET
    "ant-goal-partial-4c": AntGoalPartial4C,  # MILET
    "ant-goal-u": AntGoalU,  # MILET
    "humanoid-dir-4c": HumanoidDir4C,  # MILET
    "humanoid-dir-sparse-4c": HumanoidDirSparse4C,  # MILET
    "hopper-params-4c": HopperParams4C,  # MILET
    "walker-params-4c": WalkerParams4C,  # MILET
    "point-goal-4c": PointGoal4C,  # ours
    "point-goal-sparse": PointGoalSparse,  # MetaCURE
    "cheetah-dir": CheetahDir,  # ProMP, CML
    "cheetah-vel": CheetahVel,  # MAML, RMAML
    "cheetah-vel-noise": CheetahVelNoise,  # RMAML
    "cheetah-vel-sparse": CheetahVelSparse,  # MetaCURE
    "ant-dir": AntDir,  # ProMP, CML
    "walker-dir": WalkerDir,  # ProMP, Herd
    "ant-cheetah-dir": AntCheetahDir,  # CML
    "ml2": ML2,  # Herd
    "point-1m": Point1M,  # MMAML
    "point-2m": Point2M,  # MMAML
    "point-4m": Point4M,  # MMAML
    "point-6m": Point6M,  # MMAML
    "point-6m-far": Point6MFar,  # ours
    "reacher-1m": Reacher1M,  # MMAML
    "reacher-2m": Reacher2M,  # MMAML
    "reacher-4m": Reacher4M,  # MMAML
    "reacher-6m": Reacher6M,  # MMAML
    "reacher-6m-bug": Reacher6MBug,  # MMAML's code
    "ant-1m": Ant1M,  # MMAML
    "ant-2m": Ant2M,  # MMAML
    "ant-4m": Ant4M,  # MMAML
}


def register(env_id: str, env_class: type[TaskVectorEnv]) -> None:
    """Make an environment known to `gym.make` (one copy) and `gym.make_vec` (many)."""
    ENVIRONMENTS[env_id] = env_class
    gym.register(env_id, "envs:SingleEnv", vector_entry_point="envs:vector_env", kwargs={"env_id": env_id})


def find(name: str) -> type[TaskVectorEnv]:
    """The class of an environment id; `module:id` imports the module first, which registers it."""
    module, colon, env_id = name.rpartition(":")
    if colon:
        importlib.import_module(module)
    if env_id not in ENVIRONMENTS:
        near = get_close_matches(env_id, ENVIRONMENTS)
        hint = f"Did you mean: `{'`, `'.join(near)}`?" if near else f"There are {', '.join(ENVIRONMENTS)}"
        raise LookupError(f"it does not exist. {hint}")
    return ENVIRONMENTS[env_id]


def vector_env(env_id: str, **kwargs) -> TaskVectorEnv:
    """What Gymnasium calls: a name in a string, so that specs can be written as JSON."""
    return ENVIRONMENTS[env_id](**kwargs)


for _id, _class in list(ENVIRONMENTS.items()):
    register(_id, _class)
