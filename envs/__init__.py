"""Importing this package registers every environment with Gymnasium."""

import gymnasium as gym

from envs.ant import AntDir, AntGoal4C, AntGoalPartial4C, AntGoalU
from envs.base import MujocoVectorEnv, SingleEnv, Tasks, TaskVectorEnv
from envs.half_cheetah import CheetahDir, CheetahVel, CheetahVelNoise
from envs.humanoid import HumanoidDir4C, HumanoidDirSparse4C
from envs.mixed import ML2, AntCheetahDir
from envs.point import PointGoal4C
from envs.rand_params import HopperParams4C, WalkerParams4C
from envs.walker2d import WalkerDir

__all__ = ["ENVIRONMENTS", "MujocoVectorEnv", "SingleEnv", "TaskVectorEnv", "Tasks", "register", "vector_env"]

ENVIRONMENTS: dict[str, type[TaskVectorEnv]] = {  # id: class
    "ant-goal-4c": AntGoal4C,  # MILET
    "ant-goal-partial-4c": AntGoalPartial4C,  # MILET
    "ant-goal-u": AntGoalU,  # MILET
    "humanoid-dir-4c": HumanoidDir4C,  # MILET
    "humanoid-dir-sparse-4c": HumanoidDirSparse4C,  # MILET
    "hopper-params-4c": HopperParams4C,  # MILET
    "walker-params-4c": WalkerParams4C,  # MILET
    "point-goal-4c": PointGoal4C,  # ours
    "cheetah-dir": CheetahDir,  # ProMP, CML
    "cheetah-vel": CheetahVel,  # MAML, RMAML
    "cheetah-vel-noise": CheetahVelNoise,  # RMAML
    "ant-dir": AntDir,  # ProMP, CML
    "walker-dir": WalkerDir,  # ProMP, Herd
    "ant-cheetah-dir": AntCheetahDir,  # CML
    "ml2": ML2,  # Herd
}


def register(env_id: str, env_class: type[TaskVectorEnv]) -> None:
    """Make an environment known to `gym.make` (one copy) and `gym.make_vec` (many)."""
    ENVIRONMENTS[env_id] = env_class
    gym.register(env_id, "envs:SingleEnv", vector_entry_point="envs:vector_env", kwargs={"env_id": env_id})


def vector_env(env_id: str, **kwargs) -> TaskVectorEnv:
    """What Gymnasium calls: a name in a string, so that specs can be written as JSON."""
    return ENVIRONMENTS[env_id](**kwargs)


for _id, _class in list(ENVIRONMENTS.items()):
    register(_id, _class)
