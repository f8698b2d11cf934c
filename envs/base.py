"""Task distributions and batched MuJoCo environments.

An environment is a `TaskVectorEnv`: `num_envs` copies of one robot, each with a task of its own, stepped together.
A definition fills in four short methods on arrays (observation, reward, state reset, task distribution); everything
here is bookkeeping that no definition should have to repeat.

Conventions: rows are copies; observations are float32, physics and rewards float64; autoreset is disabled, so a copy
that has terminated, diverged or run out of time is frozen (no physics, reward 0, same observation) until `reset`
names it. `ids`, wherever it is an argument, is an index of rows.
"""

import operator
import os
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from mujoco.batch import Batch

DIVERGED = [int(getattr(mujoco.mjtWarning, f"mjWARN_BAD{name}")) for name in ("QPOS", "QVEL", "QACC")]
ASSETS = os.path.join(os.path.dirname(gym.__file__), "envs", "mujoco", "assets")


@dataclass(frozen=True, eq=False)
class Tasks:
    """A batch of n tasks.

    params:  [n, task_dim] float64, what defines each task (goal, direction, multipliers: see the environment).
    cluster: [n] int64, the ground-truth mode. For oracles and scores only: no algorithm may train on it.
    """

    params: np.ndarray
    cluster: np.ndarray

    def __len__(self) -> int:
        return len(self.params)

    def __getitem__(self, index) -> "Tasks":
        """The tasks that a slice, an index array or a boolean mask selects (an integer gives a batch of one)."""
        if np.ndim(index) == 0 and not isinstance(index, slice):
            index = [index]
        return Tasks(self.params[index], self.cluster[index])

    def __add__(self, other: "Tasks") -> "Tasks":
        """Both batches, one after the other."""
        return Tasks(np.concatenate([self.params, other.params]), np.concatenate([self.cluster, other.cluster]))

    def __eq__(self, other) -> bool:
        """Whether all tasks are the same, in the same order."""
        same = isinstance(other, Tasks) and np.array_equal(self.params, other.params)
        return same and np.array_equal(self.cluster, other.cluster)


class LegacyRandom(np.random.RandomState):
    """NumPy's legacy generator; what only today's generators have (`integers`, ...) comes from the same stream."""

    def __getattr__(self, name):
        return getattr(np.random.Generator(self._bit_generator), name)


class TaskVectorEnv(gym.vector.VectorEnv):
    """Copies of one environment, each with its own task, its own clock and its own random stream.

    A definition sets `obs_dim`, `action_dim`, `task_dim`, `num_clusters` (1: no cluster structure), `horizon`
    (steps per episode, which the constructor can override), `dt` (seconds per step), `num_test_tasks`, `task_is` (what
    the first parameters are, for figures and films: a goal [x, y], a direction or a velocity), and implements

        draw(cluster, rng) -> params          one task of each given cluster, [n] -> [n, task_dim]
        nearest_cluster(params) -> cluster    the guess of one who sees the parameters; default: the only cluster
        reset_state(ids)                      put the copies `ids` at the start of an episode; ids is an integer array
        advance(ids, action)                  one control step of the copies `ids`; ids is slice(None) while all are
                                              alive, else an integer array, and indexes self.x[ids] and action[ids]
        observation() -> [num_envs, obs_dim]
        reward(action) -> [num_envs]          of the step just taken
        terminated() -> [num_envs] bool       default: never
        apply_tasks(ids)                      default: nothing; write task parameters into the simulations
        cluster_cycle(split)                  default: every cluster once; the clusters that tasks take in turn
        diverged() -> [num_envs] bool         default: never; broken simulations: their episode is cut off, unpaid
    """

    metadata = {"render_modes": ["rgb_array"], "autoreset_mode": AutoresetMode.DISABLED}

    obs_dim: int
    action_dim: int
    task_dim: int
    num_clusters: int = 1
    horizon: int = 100
    dt: float
    num_test_tasks: int = 32
    task_is: Literal["goal", "direction", "velocity"] | None = None

    def __init__(
        self, num_envs: int = 1, num_threads: int = 0, render_mode: str | None = None, horizon: int | None = None
    ):
        if num_envs < 1 or num_threads < 0:
            raise ValueError(f"num_envs must be at least 1 and num_threads 0, got {num_envs} and {num_threads}")
        self.horizon = operator.index(self.horizon if horizon is None else horizon)
        if self.horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {horizon}")
        self.metadata = self.metadata | {"render_fps": round(1 / self.dt)}
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode must be None or 'rgb_array', got {render_mode!r}")
        self.num_envs, self.render_mode = num_envs, render_mode
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (self.obs_dim,), np.float32)
        self.single_action_space = gym.spaces.Box(-1.0, 1.0, (self.action_dim,), np.float32)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.tasks = Tasks(np.zeros((num_envs, self.task_dim)), np.zeros(num_envs, int))
        self.has_task = np.zeros(num_envs, bool)  # [env]
        self.rngs: list[np.random.Generator] = []
        self.elapsed = np.full(num_envs, self.horizon)  # [env] steps taken in this episode
        self.fell = np.zeros(num_envs, bool)  # [env] ended by termination
        self.broke = np.zeros(num_envs, bool)  # [env] cut off, because the simulation diverged
        self.done = np.ones(num_envs, bool)  # [env] frozen until reset

    # -- task distribution ------------------------------------------------------------------------------------------

    def sample_tasks(self, n: int, rng: np.random.Generator) -> Tasks:
        """n fresh training tasks; their clusters are balanced, starting from a random one."""
        cycle = np.array(self.cluster_cycle("train"))
        first = rng.integers(len(cycle))
        return self._drawn(cycle[(first + np.arange(n)) % len(cycle)], rng)

    def task_set(self, split: str) -> Tasks:
        """The fixed "train" (500) or "test" (num_test_tasks) tasks, the same for every seed, clusters in turn.

        Disjoint wherever there are enough tasks (two directions are all in both). Drawn in one go from NumPy's legacy
        generator with seed 123, as MILET's official code does, so that goals and directions are the paper's own.
        """
        if split not in ("train", "test"):
            raise ValueError(f"task_set takes 'train' or 'test', got {split!r}")
        train = np.resize(self.cluster_cycle("train"), 500)
        test = np.resize(self.cluster_cycle("test"), self.num_test_tasks)
        tasks = self._drawn(np.concatenate([train, test]), LegacyRandom(123))
        return tasks[:500] if split == "train" else tasks[500:]

    def _drawn(self, cluster: np.ndarray, rng: np.random.Generator) -> Tasks:
        """A task of each of these clusters [n]."""
        return Tasks(self._checked("draw", self.draw(cluster, rng), len(cluster), self.task_dim), cluster)

    def nearest_cluster(self, params: np.ndarray) -> np.ndarray:
        if self.num_clusters > 1:
            name = type(self).__name__
            raise NotImplementedError(f"{name} has {self.num_clusters} clusters, and no nearest_cluster(params)")
        return np.zeros(len(params), int)

    def used_actions(self) -> np.ndarray:
        """[num_envs, action_dim] bool, False where an action only pads a robot that has fewer."""
        return np.ones((self.num_envs, self.action_dim), bool)

    # -- Gymnasium --------------------------------------------------------------------------------------------------

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Start a new episode in every copy, or in those of options["reset_mask"].

        seed: copy i draws from a stream seeded with seed + i, so row i equals the single form with that seed.
        options["reset_mask"]: boolean array [num_envs], at least one of them true.
        options["tasks"]: Tasks of length num_envs (with a mask, only the masked rows are read). Without it a copy
            keeps its task; a given seed, or the first reset, draws a new one.
        Returns observations [num_envs, obs_dim] float32 of all copies, and {}.
        """
        options = options or {}
        if unknown := set(options) - {"reset_mask", "tasks"}:
            raise ValueError(f"unknown reset options {sorted(unknown)}; known are 'reset_mask' and 'tasks'")
        mask = options.get("reset_mask", np.ones(self.num_envs, bool))
        if not isinstance(mask, np.ndarray) or mask.dtype != bool:
            raise TypeError(f"options['reset_mask'] must be a boolean array, got {mask!r}")
        if mask.shape != (self.num_envs,) or not mask.any():
            raise ValueError(f"options['reset_mask'] must have shape ({self.num_envs},) and name a copy, got {mask}")
        tasks = options.get("tasks")
        if not isinstance(tasks, Tasks | None):
            raise TypeError(f"options['tasks'] must be envs.Tasks, got {type(tasks).__name__}")
        shapes = (self.num_envs, self.task_dim), (self.num_envs,)
        if tasks is not None and (np.shape(tasks.params), np.shape(tasks.cluster)) != shapes:
            raise ValueError(f"options['tasks'] needs params of shape {shapes[0]} and cluster of shape {shapes[1]}")

        super().reset(seed=seed)
        ids = np.flatnonzero(mask)
        self._seed(seed, ids)
        self._assign(tasks, seed, ids)
        self.reset_state(ids)
        self.elapsed[mask] = 0
        self.fell[mask] = self.broke[mask] = self.done[mask] = False
        return self._checked("observation", self.observation(), self.num_envs, self.obs_dim).astype(np.float32), {}

    def _seed(self, seed: int | None, ids: np.ndarray) -> None:
        """The streams of the copies ids; at the first reset those of all."""
        if not self.rngs:
            seed, ids = self.np_random_seed if seed is None else seed, np.arange(self.num_envs)
            self.rngs = [None] * self.num_envs
        if seed is not None:
            for i in ids:
                self.rngs[i] = seeding.np_random(seed + int(i))[0]

    def _assign(self, tasks: Tasks | None, seed: int | None, ids: np.ndarray) -> None:
        """The given tasks, or fresh ones where a seed asks for them or there are none yet, to the copies ids."""
        before, params, cluster = self.tasks, self.tasks.params.copy(), self.tasks.cluster.copy()
        for i in ids:
            if tasks is not None:
                params[i], cluster[i] = tasks.params[i], tasks.cluster[i]
            elif seed is not None or not self.has_task[i]:
                drawn = self.sample_tasks(1, self.rngs[i])
                params[i], cluster[i] = drawn.params[0], drawn.cluster[0]
        try:
            self.tasks = Tasks(params, cluster)
            self.apply_tasks(ids)
        except ValueError:  # a task that the definition refuses
            self.tasks = before
            raise
        self.has_task[ids] = True

    def step(self, action):
        """One control step of every copy that is not frozen.

        action: [num_envs, action_dim]. Values outside the box reach the simulator, which clamps the control; the
            control cost is charged on what was given.
        Returns observation [num_envs, obs_dim] float32, reward [num_envs] float64, terminated, truncated and
            {"diverged": [num_envs] bool}. A simulation that diverges is truncated, unpaid; it shows a state that no
            physics led to, so the transition is not to be learned from. All three stay true until a reset.
        """
        action = np.asarray(action, np.float64)
        if action.shape != (self.num_envs, self.action_dim):
            raise ValueError(f"action must have shape ({self.num_envs}, {self.action_dim}), got {action.shape}")
        if not np.isfinite(action).all():
            raise FloatingPointError("action contains NaN or infinity")
        if not self.rngs:
            raise gym.error.ResetNeeded("call reset before step")
        alive = ~self.done
        self.advance(slice(None) if alive.all() else np.flatnonzero(alive), action)
        self.elapsed[alive] += 1
        broke = alive & self.diverged()  # no fall, whatever the state is then
        paid = alive & ~broke
        self.broke |= broke
        self.fell |= paid & self.terminated()
        reward = np.where(paid, self._checked("reward", self.reward(action), self.num_envs), 0.0)
        if not np.isfinite(reward).all():
            raise FloatingPointError(f"{type(self).__name__}.reward gave NaN or infinity")
        truncated = (self.broke | (self.elapsed >= self.horizon)) & ~self.fell
        self.done = self.fell | truncated
        info = {"diverged": self.broke.copy()}
        obs = self._checked("observation", self.observation(), self.num_envs, self.obs_dim).astype(np.float32)
        return obs, reward, self.fell.copy(), truncated, info

    def _checked(self, method: str, array: np.ndarray, *shape: int) -> np.ndarray:
        """What a definition's method gave, if it has this shape: nothing may be broadcast unseen."""
        if np.shape(array) != shape:
            name = f"{type(self).__name__}.{method}"
            raise ValueError(f"{name} gave an array of shape {np.shape(array)}, expected {shape}")
        return array

    def close_extras(self, **kwargs) -> None:
        """Nothing to close; Gymnasium's arguments (`terminate`, `timeout`) are for worker processes."""

    # -- copies (copy.deepcopy, pickle): built anew, then put where the original is ---------------------------------

    def __new__(cls, *args, **kwargs):
        env = super().__new__(cls)
        env.arguments = args, kwargs
        return env

    def __getstate__(self):  # without the objects of MuJoCo, which __init__ makes anew
        return {name: x for name, x in vars(self).items() if not type(x).__module__.startswith("mujoco")}

    def __setstate__(self, state):
        args, kwargs = state["arguments"]
        self.__init__(*args, **kwargs)
        for name, saved in state.items():
            setattr(self, name, put_back(getattr(self, name, None), saved))

    # -- what a definition may override -----------------------------------------------------------------------------

    def terminated(self) -> np.ndarray:
        return np.zeros(self.num_envs, bool)

    def apply_tasks(self, ids: np.ndarray) -> None:
        pass

    @classmethod
    def cluster_cycle(cls, split: str) -> list[int]:
        return list(range(cls.num_clusters))

    def diverged(self) -> np.ndarray:
        return np.zeros(self.num_envs, bool)


class MujocoVectorEnv(TaskVectorEnv):
    """A `TaskVectorEnv` whose copies are simulations of one MuJoCo model, stepped by C++ threads.

    A definition sets `xml` (one of Gymnasium's assets, or an absolute path), `frame_skip` and, to override that of the
    file, `timestep`.
    `stage` is how much of the forward pass each step ends with at its new state. Without it qpos and qvel are current,
    and all that MuJoCo derives from them is a substep late; mjSTAGE_POS makes positions of bodies and sites current,
    mjSTAGE_ACC everything. `contact_forces = True` keeps `cfrc_ext` alive: a force sensor makes MuJoCo compute it, and
    the stage is mjSTAGE_ACC.
    """

    xml: str
    frame_skip: int
    timestep: float | None = None
    stage: mujoco.mjtStage = mujoco.mjtStage.mjSTAGE_NONE
    contact_forces: bool = False

    def __init__(
        self, num_envs: int = 1, num_threads: int = 0, render_mode: str | None = None, horizon: int | None = None
    ):
        super().__init__(num_envs, num_threads, render_mode, horizon)
        self.model = self.build_model()
        if not np.isclose(self.model.opt.timestep * self.frame_skip, self.dt):
            raise ValueError(f"dt is {self.dt}, but the model steps {self.model.opt.timestep * self.frame_skip}")
        self.batch = Batch(self.model, num_envs, num_threads)
        self.stage = int(mujoco.mjtStage.mjSTAGE_ACC if self.contact_forces else self.stage)
        self.physics, self.warnings = self.batch.state, self.batch.warning  # views, which put_back fills in a copy
        self.qpos, self.qvel, self.ctrl = (self.batch.bind(name) for name in ("qpos", "qvel", "ctrl"))
        self.renderer = None

    def build_spec(self) -> mujoco.MjSpec:
        """The robot."""
        return mujoco.MjSpec.from_file(os.path.join(ASSETS, self.xml))

    def build_model(self) -> mujoco.MjModel:
        spec = self.build_spec()
        if self.timestep is not None:
            spec.option.timestep = self.timestep
        if self.contact_forces:
            spec.worldbody.first_body().add_site(name="contact")
            spec.add_sensor(
                type=mujoco.mjtSensor.mjSENS_FORCE, objtype=mujoco.mjtObj.mjOBJ_SITE, objname="contact", name="contact"
            )
        with warnings.catch_warnings():  # half_cheetah.xml has an attribute that MuJoCo is about to drop
            warnings.filterwarnings("ignore", "compiler attribute 'settotalmass'", UserWarning)
            return spec.compile()

    def start_state(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """qpos [nq] and qvel [nv] at the start of an episode."""
        raise NotImplementedError

    def reset_state(self, ids: np.ndarray) -> None:
        self.batch.reset(ids, stage=int(mujoco.mjtStage.mjSTAGE_NONE))
        self.warnings[ids] = 0
        for i in ids:
            self.qpos[i], self.qvel[i] = self.start_state(self.rngs[i])
        self.batch.forward(ids)

    def __setstate__(self, state):
        super().__setstate__(state)
        self.batch.forward()  # the derived fields are not part of the state
        self.physics[:] = state["physics"]  # again: forward has changed the warm start

    def advance(self, ids: slice | np.ndarray, action: np.ndarray) -> None:
        self.ctrl[ids] = self.control(action)[ids]
        before = self.diverged()
        self.batch.step(None if isinstance(ids, slice) else ids, nstep=self.frame_skip, stage=self.stage)
        copies = np.flatnonzero(self.diverged() & ~before)
        if copies.size:
            gym.logger.warn(f"{type(self).__name__}: copies {copies} diverged, MuJoCo reset them")

    def diverged(self):
        return self.warnings[:, DIVERGED, 1].any(1)

    def control(self, action: np.ndarray) -> np.ndarray:
        """Actuator controls [num_envs, nu] of an action."""
        return action

    def render(self) -> tuple[np.ndarray, ...]:
        """One [480, 480, 3] uint8 image a copy, seen by the model's tracking camera, or else by the free one (-1)."""
        if self.renderer is None:
            self.renderer = mujoco.Renderer(self.model, 480, 480)
        camera = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
        frames = []
        for i in range(self.num_envs):
            model, data = self.batch.get_model(i), self.batch.get_data(i)
            mujoco.mj_forward(model, data)
            self.renderer.update_scene(data, camera=camera)
            frames.append(self.renderer.render())
        return tuple(frames)

    def close_extras(self, **kwargs) -> None:
        if self.renderer is not None:
            self.renderer.close()


def put_back(fresh, saved):
    """An attribute of a copied environment: arrays that show the simulator's memory are written, others replaced."""
    if isinstance(fresh, np.ndarray) and not fresh.flags.owndata:  # it shows the simulator's memory
        if fresh.flags.writeable:  # a state; else derived from one
            fresh[...] = saved
        return fresh
    if isinstance(fresh, list) and len(fresh) == len(saved):
        return [put_back(*pair) for pair in zip(fresh, saved)]
    return saved


class SingleEnv(gym.Env):
    """The single-environment form of a registered `TaskVectorEnv`: its row 0, as `gym.make` returns it."""

    metadata = TaskVectorEnv.metadata

    def __init__(self, env_id: str, render_mode: str | None = None, **kwargs):
        self.vector = gym.make_vec(env_id, num_envs=1, render_mode=render_mode, **kwargs).unwrapped
        self.metadata, self.render_mode = self.vector.metadata, render_mode
        self.observation_space = self.vector.single_observation_space
        self.action_space = self.vector.single_action_space
        self.task_set, self.sample_tasks = self.vector.task_set, self.vector.sample_tasks

    @property
    def tasks(self) -> Tasks:
        return self.vector.tasks

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        obs, info = self.vector.reset(seed=seed, options=options)
        return obs[0], info

    def step(self, action):
        obs, reward, terminated, truncated, info = self.vector.step(np.asarray(action)[None])
        info = {"diverged": bool(info["diverged"][0])}
        return obs[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), info

    def render(self) -> np.ndarray | None:
        return self.vector.render()[0] if self.render_mode else None

    def close(self) -> None:
        self.vector.close()
