"""Goals around modes: the multimodal task distributions that the point, the reacher and the ant of MMAML share."""

import numpy as np

from envs.base import TaskVectorEnv
from envs.circle import circle

SQUARE = np.array([[-1, -1], [1, -1], [-1, 1], [1, 1]])
HEXAGON = circle(np.arange(6) / 3)
MODES = {  # their centres, [mode, 2]
    "point-1m": 5 * SQUARE[[3]],
    "point-2m": 5 * SQUARE[[0, 3]],
    "point-4m": 5 * SQUARE,
    "point-6m": 5 * HEXAGON,
    "point-6m-far": np.sqrt(50) * HEXAGON,  # as far away as the corners of the square
    "reacher-1m": 0.225 * SQUARE[[3]],
    "reacher-2m": 0.225 * SQUARE[[0, 3]],
    "reacher-4m": 0.225 * SQUARE,
    "reacher-6m": 0.225 * np.sqrt(2) * HEXAGON,
    "reacher-6m-bug": 0.225 * np.sqrt(2) * HEXAGON[:2],  # the official code draws from the first two of the six
    "ant-1m": 4 * HEXAGON[[3]],
    "ant-2m": 4 * HEXAGON[[3, 0]],
    "ant-4m": 4 * HEXAGON[[3, 2, 1, 0]],  # a half circle
}


class Modes(TaskVectorEnv):
    """Goals N(m_k, sd^2 I) around the centre of a mode, which is the cluster. A definition sets `centres` and `sd`."""

    task_dim, num_test_tasks, task_is = 2, 48, "goal"
    centres: np.ndarray  # [mode, 2]
    sd: float

    def draw(self, cluster, rng):
        return self.centres[cluster] + rng.normal(0, self.sd, (len(cluster), 2))

    def nearest_cluster(self, params):
        return np.linalg.norm(params[:, None, :2] - self.centres, axis=2).argmin(1)
