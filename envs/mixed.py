"""Several robots in one task distribution: the cluster of a task is its robot."""

from collections.abc import Callable

import numpy as np

from envs.ant import AntDir
from envs.base import Tasks, TaskVectorEnv
from envs.half_cheetah import CheetahDir
from envs.walker2d import WalkerDir


class MixedVectorEnv(TaskVectorEnv):
    """One vector environment made of one Batch per robot; the task of a copy says which robot it is.

    A definition sets `robots`, and the largest of their sizes. Task parameters are the robot's index and then its own
    parameters. Observations and parameters are padded with zeros at the end; a robot gets the first of the actions.
    """

    robots: tuple[type[TaskVectorEnv], ...]
    num_test_tasks = 40

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.parts = [robot(*args, **kwargs) for robot in self.robots]  # each as large as the whole: any mix fits

    def rows(self, ids: slice | np.ndarray = slice(None)):
        """Every part, with those of the copies `ids` that are its robot."""
        ids, robot = np.arange(self.num_envs)[ids], self.tasks.params[:, 0]
        return [(part, ids[robot[ids] == r]) for r, part in enumerate(self.parts)]

    def draw(self, cluster, rng):
        params = np.zeros((len(cluster), self.task_dim))
        params[:, 0] = cluster
        for r, part in enumerate(self.parts):
            mine = np.flatnonzero(cluster == r)
            params[mine, 1 : 1 + part.task_dim] = part.draw(rng.choice(part.num_clusters, len(mine)), rng)
        return params

    def nearest_cluster(self, params):
        return params[:, 0].astype(int)

    def used_actions(self):
        sizes = np.array([part.action_dim for part in self.parts])[self.tasks.params[:, 0].astype(int)]
        return np.arange(self.action_dim) < sizes[:, None]

    def apply_tasks(self, ids):
        if not np.isin(self.tasks.params[ids, 0], range(len(self.parts))).all():
            raise ValueError(f"the first parameter of a task is its robot, 0 to {len(self.parts) - 1}")
        for part, mine in self.rows(ids):
            part.tasks = Tasks(self.tasks.params[:, 1 : 1 + part.task_dim], self.tasks.cluster)
            part.apply_tasks(mine)

    def reset_state(self, ids):
        for part, mine in self.rows(ids):
            part.rngs = self.rngs
            part.reset_state(mine)

    def advance(self, ids, action):
        for part, mine in self.rows(ids):
            part.advance(mine, action[:, : part.action_dim])

    def observation(self):
        obs = np.zeros((self.num_envs, self.obs_dim))
        for part, mine in self.rows():
            obs[mine, : part.obs_dim] = part.observation()[mine]
        return obs

    def gathered(self, of: Callable[[TaskVectorEnv], np.ndarray], dtype: type = float) -> np.ndarray:
        """[num_envs], of every copy what its robot gives."""
        values = np.zeros(self.num_envs, dtype)
        for part, mine in self.rows():
            values[mine] = of(part)[mine]
        return values

    def reward(self, action):
        return self.gathered(lambda part: part.reward(action[:, : part.action_dim]))

    def terminated(self):
        return self.gathered(lambda part: part.terminated(), bool)

    def diverged(self):
        return self.gathered(lambda part: part.diverged(), bool)

    def render(self):
        frames = [part.render() for part in self.parts]
        return tuple(frames[int(robot)][i] for i, robot in enumerate(self.tasks.params[:, 0]))

    def close_extras(self, **kwargs):
        for part in self.parts:
            part.close(**kwargs)


class AntCheetahDir(MixedVectorEnv):
    """`ant-cheetah-dir`: `ant-dir` (cluster 0) and `cheetah-dir` (cluster 1), each forward or backward by a fair coin.

    Observation [111]: that of the robot, the cheetah's 17 followed by 94 zeros. The cheetah gets 6 of the 8 actions.
    """

    robots = AntDir, CheetahDir
    obs_dim, action_dim, task_dim, num_clusters, dt = 111, 8, 2, 2, 0.05


class ML2(MixedVectorEnv):
    """`ml2`: `cheetah-dir` (cluster 0) and `walker-dir` (cluster 1), each forward or backward by a fair coin.

    Both robots have 17 observations and 6 actions: nothing but the dynamics tells them apart. A step is 0.05 s of the
    cheetah and 0.008 s of the walker.
    """

    robots = CheetahDir, WalkerDir
    obs_dim, action_dim, task_dim, num_clusters, dt = 17, 6, 2, 2, 0.05  # dt is the cheetah's
