"""Tasks on a circle: the four clusters of directions that MILET's goal and direction environments share (App. C)."""

import numpy as np

CENTRES = np.array([0.25, 0.75, 1.25, 1.75])  # of the four clusters, in units of pi


def circle(s: np.ndarray) -> np.ndarray:
    """Points (cos pi s, sin pi s) of the unit circle, [n] -> [n, 2]."""
    return np.stack([np.cos(np.pi * s), np.sin(np.pi * s)], axis=1)


def nearest_centre(points: np.ndarray) -> np.ndarray:
    """The cluster whose centre is nearest in angle, [n, 2] -> [n]."""
    return (points @ circle(CENTRES).T).argmax(1)
