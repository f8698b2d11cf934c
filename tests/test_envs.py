"""Environments: against plain MuJoCo and Gymnasium's own, step by step; task distributions; the vector contract."""

import copy
import os
import pickle
import subprocess
import sys

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers.vector import NormalizeObservation, RecordEpisodeStatistics
from sklearn.metrics import normalized_mutual_info_score

import envs
from envs.ant import Ant, AntGoal4C
from envs.base import ASSETS, LegacyRandom, MujocoVectorEnv
from envs.half_cheetah import CheetahVel
from envs.point import PointGoal4C
from envs.rand_params import PARAMETER_SETS

SIZES = {  # id: observation, action, seconds a step, steps an episode, held-out tasks
    "ant-goal-4c": (113, 8, 0.05, 100, 32),
    "ant-goal-partial-4c": (113, 8, 0.05, 100, 32),
    "ant-goal-u": (113, 8, 0.05, 100, 32),
    "humanoid-dir-4c": (376, 17, 0.015, 100, 32),
    "humanoid-dir-sparse-4c": (376, 17, 0.015, 100, 32),
    "hopper-params-4c": (11, 3, 0.016, 100, 32),
    "walker-params-4c": (17, 6, 0.016, 100, 32),
    "point-goal-4c": (2, 2, 0.1, 100, 32),
    "point-goal-sparse": (2, 2, 0.1, 32, 32),
    "cheetah-dir": (17, 6, 0.05, 100, 40),
    "cheetah-vel": (20, 6, 0.05, 100, 40),
    "cheetah-vel-noise": (20, 6, 0.05, 100, 40),
    "cheetah-vel-sparse": (20, 6, 0.05, 64, 40),
    "ant-dir": (111, 8, 0.05, 100, 40),
    "walker-dir": (17, 6, 0.008, 100, 40),
    "ant-cheetah-dir": (111, 8, 0.05, 100, 40),
    "ml2": (17, 6, 0.05, 100, 40),
    **{f"point-{modes}": (4, 2, 0.1, 100, 48) for modes in ("1m", "2m", "4m", "6m", "6m-far")},
    **{f"reacher-{modes}": (7, 3, 0.02, 50, 48) for modes in ("1m", "2m", "4m", "6m", "6m-bug")},
    **{f"ant-{modes}": (29, 8, 0.02, 250, 48) for modes in ("1m", "2m", "4m")},
}
IDS = list(SIZES)
RAND_PARAMS = ["hopper-params-4c", "walker-params-4c"]
DIRECTIONS = ["cheetah-dir", "ant-dir", "walker-dir"]
MIXED = {"ant-cheetah-dir": ("ant-dir", "cheetah-dir"), "ml2": ("cheetah-dir", "walker-dir")}
MUJOCO_IDS = [i for i in IDS if i in MIXED or issubclass(envs.ENVIRONMENTS[i], MujocoVectorEnv)]


def make(env_id, n=4, **kwargs):
    env = gym.make_vec(env_id, num_envs=n, **kwargs)
    env.reset(seed=0)
    return env.unwrapped


class PlainReacher(MujocoVectorEnv):
    """Gymnasium's arm, which has no body of the name torso."""

    frame_skip, dt, obs_dim, action_dim, task_dim, contact_forces = 2, 0.02, 4, 2, 1, True

    def draw(self, cluster, rng):
        return np.zeros((len(cluster), 1))

    def start_state(self, rng):
        return np.zeros(4), np.zeros(4)

    def observation(self):
        return self.qpos

    def reward(self, action):
        return np.zeros(self.num_envs)


def actions(env, steps=20, seed=1):
    return np.random.default_rng(seed).normal(size=(steps, *env.action_space.shape))


# -- the contract ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", IDS)
def test_sizes_and_check_env(env_id):
    obs_dim, action_dim, *others = SIZES[env_id]
    env = make(env_id)
    assert env.single_observation_space.shape == (obs_dim,)
    assert env.single_action_space.shape == (action_dim,)
    assert [env.dt, env.horizon, env.num_test_tasks] == others
    check_env(gym.make(env_id).unwrapped, skip_render_check=True)


RENDER = """
import sys, mujoco
mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>")).close()
print("OpenGL works")
import gymnasium as gym, envs
env = gym.make("ant-goal-4c", render_mode="rgb_array")
env.reset(seed=0)
frame = env.render()
assert frame.shape == (480, 480, 3) and frame.dtype == "uint8" and frame.std() > 1
"""


def test_renders():
    env = gym.make("point-goal-4c", render_mode="rgb_array")
    env.reset(seed=0)
    frame = env.render()
    assert frame.shape == (200, 200, 3) and frame.dtype == np.uint8 and frame.std() > 1
    # MuJoCo picks its OpenGL when it is imported, and fails then if there is none: so in a process of its own
    environ = os.environ | {"MUJOCO_GL": os.environ.get("MUJOCO_GL", "osmesa")}
    result = subprocess.run([sys.executable, "-c", RENDER], capture_output=True, text=True, env=environ)
    if "OpenGL works" not in result.stdout:
        pytest.skip("no OpenGL here for MuJoCo")
    assert result.returncode == 0, result.stderr


def test_a_robot_without_a_tracking_camera_is_seen_by_the_free_one(monkeypatch):
    env, seen = make("reacher-1m", 1), []

    class Renderer:
        def __init__(self, *_):
            pass

        def update_scene(self, data, camera):
            seen.append(camera)

        def render(self):
            return np.zeros((480, 480, 3), np.uint8)

    monkeypatch.setattr(mujoco, "Renderer", Renderer)
    env.render()
    env.model = mujoco.MjModel.from_xml_string("<mujoco/>")
    env.render()
    assert seen == [0, -1]


@pytest.mark.parametrize("env_id", IDS)
def test_row_equals_single_form(env_id):
    vector, single = gym.make_vec(env_id, num_envs=3), gym.make(env_id)
    rows, (row, _) = vector.reset(seed=5)[0], single.reset(seed=5 + 2)
    np.testing.assert_array_equal(rows[2], row)
    for action in actions(vector):
        obs, reward, *_ = vector.step(action)
        row, r, *_ = single.step(action[2])
        np.testing.assert_array_equal(obs[2], row)
        assert reward[2] == r


@pytest.mark.parametrize("env_id", MUJOCO_IDS)
def test_bit_identical_at_any_thread_count(env_id):
    a, b = make(env_id, num_threads=1), make(env_id, num_threads=2)
    for action in actions(a):
        one, two = a.step(action), b.step(action)
        np.testing.assert_array_equal(one[0], two[0])
        np.testing.assert_array_equal(one[1], two[1])


def test_time_limit_freezes_until_reset():
    env = make("hopper-params-4c")
    for t, action in enumerate(actions(env, 100)):
        obs, _, terminated, truncated, _ = env.step(action)
        assert not terminated.any() and truncated.all() == (t == 99)
    after, reward, _, truncated, _ = env.step(action)
    np.testing.assert_array_equal(after, obs)
    assert (reward == 0).all() and truncated.all()
    env.reset()
    assert (env.step(action)[0] != obs).any(1).all()


def test_terminated_copy_is_frozen_and_others_go_on():
    class Falls(envs.ENVIRONMENTS["hopper-params-4c"]):
        def terminated(self):
            return (np.arange(self.num_envs) == 1) & (self.elapsed == 3)

    env = Falls(num_envs=3)
    env.reset(seed=0)
    reference = make("hopper-params-4c", 3)
    reference.reset(seed=0)
    for t, action in enumerate(actions(env, 8)):
        obs, reward, terminated, truncated, _ = env.step(action)
        expected, *_ = reference.step(action)
        np.testing.assert_array_equal(obs[[0, 2]], expected[[0, 2]])
        assert terminated.tolist() == [False, t >= 2, False] and not truncated.any()
        assert (reward[1] == 0) == (t > 2)
        if t == 2:
            last = obs[1].copy()
    np.testing.assert_array_equal(obs[1], last)


def test_falling_at_the_last_step_is_termination_and_stays_so():
    class Falls(envs.ENVIRONMENTS["hopper-params-4c"]):
        def terminated(self):
            return self.elapsed == self.horizon

    env = Falls(num_envs=1)
    env.reset(seed=0)
    for action in actions(env, 102):
        _, _, terminated, truncated, _ = env.step(action)
    assert terminated.all() and not truncated.any()


def blow_up(env, row):
    """Give one copy a state that MuJoCo refuses at the next step."""
    (env.parts[env.tasks.cluster[row]] if hasattr(env, "parts") else env).qvel[row] = 1e11


@pytest.mark.parametrize("env_id", ["hopper-params-4c", "cheetah-dir", "walker-dir", "ml2"])
def test_divergence_is_announced_and_cuts_the_episode_off_unpaid(monkeypatch, env_id):
    """No termination: where rewards are negative, a value of 0 thereafter would be a way out."""
    env, said = make(env_id), []
    monkeypatch.setattr(gym.logger, "warn", said.append)
    still, third = np.zeros(env.action_space.shape), np.arange(4) == 2
    *_, info = env.step(still)
    assert info["diverged"].dtype == bool and info["diverged"].tolist() == [False] * 4
    blow_up(env, 2)
    for _ in range(2):  # and so it stays
        _, reward, terminated, truncated, info = env.step(still)
        assert len(said) == 1 and "[2]" in said[0]
        assert not terminated.any() and ((reward == 0) == third).all()
        assert (truncated == third).all() and (info["diverged"] == third).all()
    env.reset(options={"reset_mask": third})
    _, _, terminated, truncated, info = env.step(still)
    assert not (terminated | truncated | info["diverged"]).any() and len(said) == 1


def test_a_diverged_copy_is_not_terminated_even_where_its_state_says_so(monkeypatch):
    class Falls(envs.ENVIRONMENTS["walker-dir"]):
        def terminated(self):
            return np.ones(self.num_envs, bool)

    monkeypatch.setattr(gym.logger, "warn", lambda _: None)
    env = Falls(num_envs=2)
    env.reset(seed=0)
    blow_up(env, 1)
    for _ in range(2):
        _, _, terminated, truncated, _ = env.step(np.zeros((2, 6)))
        assert terminated.tolist() == [True, False] and truncated.tolist() == [False, True]


def test_divergence_at_the_last_step_and_in_the_single_form(monkeypatch):
    monkeypatch.setattr(gym.logger, "warn", lambda _: None)
    env = gym.make("walker-dir", horizon=1)
    env.reset(seed=0)
    assert env.step(np.zeros(6, np.float32))[2:] == (False, True, {"diverged": False})
    env.reset()
    blow_up(env.unwrapped.vector, 0)
    assert env.step(np.zeros(6, np.float32))[1:] == (0, False, True, {"diverged": True})


def test_reset_mask_touches_only_its_rows():
    env = make("ant-goal-4c")
    for action in actions(env, 5):
        before, *_ = env.step(action)
    tasks, new = env.tasks, env.sample_tasks(4, np.random.default_rng(7))
    mask = np.array([True, False, False, True])
    after, _ = env.reset(options={"reset_mask": mask, "tasks": new})
    np.testing.assert_array_equal(after[~mask], before[~mask])
    assert (after[mask] != before[mask]).any(1).all()
    np.testing.assert_array_equal(env.elapsed, [0, 5, 5, 0])
    np.testing.assert_array_equal(env.tasks.params[mask], new.params[mask])
    np.testing.assert_array_equal(env.tasks.params[~mask], tasks.params[~mask])
    np.testing.assert_array_equal(env.tasks.cluster, np.where(mask, new.cluster, tasks.cluster))


def test_a_seed_with_a_mask_leaves_streams_and_tasks_of_the_other_rows():
    env, untouched = make("ant-goal-4c"), make("ant-goal-4c")
    mask = np.array([True, False, False, True])
    env.reset(seed=9, options={"reset_mask": mask})
    fresh = gym.make_vec("ant-goal-4c", num_envs=4).unwrapped
    fresh.reset(seed=9)
    np.testing.assert_array_equal(env.tasks.params, np.where(mask[:, None], fresh.tasks.params, untouched.tasks.params))
    np.testing.assert_array_equal(env.tasks.cluster, np.where(mask, fresh.tasks.cluster, untouched.tasks.cluster))
    numbers = [[rng.random() for rng in e.rngs] for e in (env, fresh, untouched)]
    np.testing.assert_array_equal(numbers[0], np.where(mask, *numbers[1:]))


def test_tasks_persist_without_a_seed_and_are_redrawn_with_one():
    env = make("ant-goal-4c")
    first = env.tasks.params
    env.reset()
    np.testing.assert_array_equal(env.tasks.params, first)
    env.reset(seed=9)
    assert (env.tasks.params != first).any()
    unknown = envs.Tasks(env.tasks.params, np.full(4, -1))  # a user's goals, of no known cluster
    env.reset(options={"tasks": unknown})
    env.reset()
    assert env.tasks == unknown


def test_batches_of_tasks():
    env = make("ant-goal-4c")
    test, train = env.task_set("test"), env.task_set("train")
    assert test == env.task_set("test") and test != train and test != test[::-1]
    assert test != envs.Tasks(test.params, test.cluster + 1) and test != 3
    assert test[:5] + test[5:] == test and len(test + train) == 532
    assert len(test[[]]) == 0 and test[[]] + test == test
    for one in (3, np.int64(3), np.array(3), [3], np.arange(32) == 3):
        assert test[one] == test[3:4]


@pytest.mark.parametrize("env_id", IDS)
def test_guesses_are_clusters(env_id):
    env = make(env_id)
    guess = env.nearest_cluster(env.task_set("test").params)
    assert guess.min() >= 0 and guess.max() < env.num_clusters and guess.dtype == int


def test_clear_errors():
    env = make("ant-goal-4c")
    with pytest.raises(ValueError, match=r"shape \(4, 8\), got \(4, 7\)"):
        env.step(np.zeros((4, 7)))
    with pytest.raises(FloatingPointError, match="NaN"):
        env.step(np.full((4, 8), np.nan))
    with pytest.raises(ValueError, match=r"must have shape \(4,\)"):
        env.reset(options={"reset_mask": np.ones(3, bool)})
    with pytest.raises(ValueError, match="name a copy"):
        env.reset(options={"reset_mask": np.zeros(4, bool)})
    for mask in ([True] * 4, np.ones(4, int)):
        with pytest.raises(TypeError, match="boolean array"):
            env.reset(options={"reset_mask": mask})
    with pytest.raises(ValueError, match=r"params of shape \(4, 2\)"):
        env.reset(options={"tasks": env.task_set("test")})
    with pytest.raises(TypeError, match=r"must be envs\.Tasks, got ndarray"):
        env.reset(options={"tasks": np.zeros((4, 2))})
    with pytest.raises(ValueError, match="unknown reset options"):
        env.reset(options={"task": None})
    with pytest.raises(ValueError, match="'train' or 'test'"):
        env.task_set("validation")
    with pytest.raises(gym.error.NameNotFound, match="ant-goal-4c"):
        gym.make_vec("ant-goal-4d")
    with pytest.raises(gym.error.ResetNeeded):
        gym.make_vec("ant-goal-4c").step(np.zeros((1, 8)))
    for horizon in (2.5, "5"):
        with pytest.raises(TypeError, match="integer"):
            gym.make_vec("point-goal-4c", horizon=horizon)
    with pytest.raises(TypeError, match="num_envs"):
        gym.make("point-goal-4c", num_envs=3)
    with pytest.raises(ValueError, match="num_threads 0, got 1 and -3"):
        gym.make_vec("point-goal-4c", num_threads=-3)
    mixed = make("ml2")
    before = mixed.tasks
    for robot in (2, 0.5, -1):
        with pytest.raises(ValueError, match="robot, 0 to 1"):
            mixed.reset(options={"tasks": envs.Tasks(np.full((4, 2), robot), np.zeros(4, int))})
    assert mixed.tasks == before and mixed.step(np.zeros((4, 6)))[1].any(), "its tasks stay"


# -- what Gymnasium expects --------------------------------------------------------------------------------------------


def test_reset_mask_is_the_one_of_gymnasiums_wrappers():
    env = RecordEpisodeStatistics(gym.make_vec("point-goal-4c", num_envs=3))
    env.reset(seed=0)
    for action in actions(env, 5):
        obs, *_ = env.step(action)
    after, _ = env.reset(options={"reset_mask": np.array([False, True, False])})
    np.testing.assert_array_equal(after[[0, 2]], obs[[0, 2]])
    assert (after[1] == 0).all() and env.episode_lengths.tolist() == [5, 0, 5]


@pytest.mark.parametrize("env_id", IDS)
def test_specs_are_strings(env_id):
    assert EnvSpec.from_json(gym.spec(env_id).to_json()) == gym.spec(env_id)
    vector, single = gym.make_vec(env_id, num_envs=3, horizon=7), gym.make(env_id, horizon=7)
    again, one = (EnvSpec.from_json(env.spec.to_json()) for env in (vector, single))
    again, one = gym.make_vec(again), gym.make(one)
    assert (again.num_envs, again.unwrapped.horizon, one.unwrapped.vector.horizon) == (3, 7, 7)
    assert type(again.unwrapped) is type(one.unwrapped.vector) is envs.ENVIRONMENTS[env_id]
    vector.close(terminate=True)
    one.close()


def test_an_environment_of_ones_own_module(tmp_path, monkeypatch):
    (tmp_path / "own_envs.py").write_text(
        "import envs\nfrom envs.point import PointGoal4C\n\n\n"
        "class Own(PointGoal4C):\n    horizon = 3\n\n\nenvs.register('own-point', Own)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert gym.make("own_envs:own-point").unwrapped.vector.horizon == 3
    vector = gym.make_vec("own_envs:own-point", num_envs=2)
    assert type(vector.unwrapped).__name__ == "Own" and gym.make_vec("own-point", num_envs=2).num_envs == 2
    assert gym.make_vec(EnvSpec.from_json(vector.spec.to_json())).num_envs == 2
    check_env(gym.make("own-point").unwrapped, skip_render_check=True)


def test_every_environment_is_tested():
    assert set(IDS) == {i for i, env in envs.ENVIRONMENTS.items() if env.__module__.startswith("envs.")}


def test_what_a_definition_does_wrong_is_named(monkeypatch):
    point = envs.ENVIRONMENTS["point-goal-4c"]
    for method, wrong, error, words in (
        ("reward", lambda self, action: np.zeros((3, 3)), ValueError, r"PointGoal4C.reward .*, expected \(3,\)"),
        ("reward", lambda self, action: np.full(3, np.nan), FloatingPointError, "PointGoal4C.reward gave NaN"),
        ("observation", lambda self: np.zeros(3), ValueError, r"PointGoal4C.observation .* expected \(3, 2\)"),
        ("draw", lambda self, c, rng: rng.normal(size=len(c)), ValueError, r"PointGoal4C.draw .* expected \(1, 2\)"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(point, method, wrong)
            env = gym.make_vec("point-goal-4c", num_envs=3)
            with pytest.raises(error, match=words):
                env.reset(seed=0)
                env.step(np.zeros((3, 2)))
    with monkeypatch.context() as patch:
        patch.delattr(point, "nearest_cluster")
        with pytest.raises(NotImplementedError, match="PointGoal4C has 4 clusters"):
            gym.make_vec("point-goal-4c").unwrapped.nearest_cluster(np.zeros((1, 2)))


def test_an_environment_is_found_by_its_id_and_module(tmp_path, monkeypatch):
    (tmp_path / "found_envs.py").write_text(
        "import envs\n\nenvs.register('found', type('Found', (envs.ENVIRONMENTS['ml2'],), {}))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert envs.find("ml2") is envs.ENVIRONMENTS["ml2"] and envs.find("found_envs:found").__name__ == "Found"
    with pytest.raises(LookupError, match="Did you mean: `cheetah-"):
        envs.find("cheetah")
    with pytest.raises(LookupError, match="There are ant-goal-4c, "):
        envs.find("x")


def test_single_form_shows_the_tasks():
    env = gym.make("ant-goal-4c").unwrapped
    env.reset(seed=0)
    test = env.task_set("test")
    np.testing.assert_array_equal(test.params, make("ant-goal-4c").task_set("test").params)
    assert len(env.tasks) == 1 and len(env.sample_tasks(5, np.random.default_rng(0))) == 5
    env.reset(options={"tasks": test[3]})
    np.testing.assert_array_equal(env.tasks.params, test.params[[3]])


def test_metadata_is_known_before_an_environment_is_made():
    for env_class in (envs.SingleEnv, *envs.ENVIRONMENTS.values()):
        assert env_class.metadata["render_modes"] == ["rgb_array"]
    assert make("walker-dir").metadata["render_fps"] == 125 and "render_fps" not in envs.TaskVectorEnv.metadata
    env = gym.make("point-goal-4c", render_mode="rgb_array_list")  # Gymnasium builds it from what metadata says
    env.reset(seed=0)
    env.step(env.action_space.sample())
    assert len(env.render()) == 2


def test_normalize_observation_wants_another_autoreset():
    with pytest.raises(ValueError, match="DISABLED"):
        NormalizeObservation(gym.make_vec("point-goal-4c"))


def through_pickle(env):
    return pickle.loads(pickle.dumps(env))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
@pytest.mark.parametrize("env_id", IDS)
def test_a_copy_goes_on_with_the_same_numbers(monkeypatch, env_id, duplicate):
    """In the middle of an episode, with a copy that has diverged and (ant-dir, walker-dir) some that fell."""
    monkeypatch.setattr(gym.logger, "warn", lambda _: None)
    env = gym.make_vec(env_id, num_envs=6, horizon=60)
    env.reset(seed=2)
    half, rest = np.split(actions(env, 60), [45])
    for t, action in enumerate(half):
        env.step(action)
        if t == 10 and env_id in MUJOCO_IDS:
            blow_up(env.unwrapped, 4)
    twin = duplicate(env)
    assert twin.unwrapped.tasks is not env.unwrapped.tasks

    def goes_on(env):
        out = [env.unwrapped.observation()]
        for action in rest:
            *step, info = env.step(action)
            out += [*step, info["diverged"]]
        out.append(env.reset(options={"reset_mask": np.arange(6) % 2 == 0})[0])
        out += env.step(rest[0])[:2]
        out.append(env.reset(seed=3)[0])
        return [*out, *env.step(rest[0])[:2], env.unwrapped.tasks.params]

    for a, b in zip(goes_on(twin), goes_on(env), strict=True):
        np.testing.assert_array_equal(a, b)


def test_copies_before_the_first_reset_and_of_the_single_form():
    for env in (gym.make_vec("hopper-params-4c", num_envs=2), gym.make("hopper-params-4c")):
        twins = copy.deepcopy(env), through_pickle(env)
        first, *others = (x.reset(seed=1)[0] for x in (env, *twins))
        assert all((first == other).all() for other in others)
        first, *others = (x.step(np.ones(x.action_space.shape, np.float32))[0] for x in (env, *twins))
        assert all((first == other).all() for other in others)


# -- the hooks of a definition -----------------------------------------------------------------------------------------


def test_ids_of_advance_index_rows():
    """A slice while all are alive (no copies of arrays), then an integer array: no case to tell apart."""
    seen = []

    class Spy(PointGoal4C):
        def advance(self, ids, action):
            super().advance(ids, action)
            seen.append(ids)

        def terminated(self):
            return (np.arange(self.num_envs) == 1) & (self.elapsed == 2)

    env = Spy(num_envs=3)
    env.reset(seed=0)
    for _ in range(3):
        obs, *_ = env.step(np.ones((3, 2)))
    assert seen[:2] == [slice(None)] * 2 and seen[2].tolist() == [0, 2]
    np.testing.assert_allclose(obs[:, 0], [0.3, 0.2, 0.3], rtol=1e-6)


def test_draw_may_use_todays_generator():
    class Lattice(PointGoal4C):
        def draw(self, cluster, rng):
            whole = rng.integers(0, 5, (len(cluster), 2), endpoint=True)
            return rng.permuted(whole, axis=1) + rng.normal(0, 0.01, (len(cluster), 2))

    env = Lattice(num_envs=2)
    env.reset(seed=0)
    train, test = env.task_set("train").params, env.task_set("test").params
    np.testing.assert_array_equal(train, Lattice().task_set("train").params)
    assert len(train) == 500 and len(test) == 32 and set(train.round().ravel()) == set(range(6))


def test_task_sets_are_of_the_legacy_stream():
    ours, theirs = LegacyRandom(123), np.random.RandomState(123)
    for name, args in {"normal": (0, 1, 5), "uniform": (0, 2, 5), "choice": (2, 7), "standard_normal": (3,)}.items():
        np.testing.assert_array_equal(getattr(ours, name)(*args), getattr(theirs, name)(*args))
    first = make("cheetah-vel").task_set("train").params[:3, 0]
    np.testing.assert_allclose(first, [1.3929383711957233, 0.5722786699007589, 0.4537029071284062], rtol=1e-15)


@pytest.mark.parametrize("stage, lag", [(mujoco.mjtStage.mjSTAGE_NONE, True), (mujoco.mjtStage.mjSTAGE_POS, False)])
def test_stage_without_contact_forces(stage, lag):
    """Kinematics after the step need mjSTAGE_POS, and no force sensor."""
    wanted = stage

    class Tracked(CheetahVel):
        stage = wanted

    env = Tracked(num_envs=2)
    xpos = env.batch.bind("xpos")
    assert env.model.nsensor == 0
    env.reset(seed=0)
    for action in actions(env, 5):
        env.step(action)
        data = env.batch.get_data(1)
        mujoco.mj_kinematics(env.model, data)
        assert (np.abs(xpos[1] - data.xpos).max() > 1e-4) == lag
    assert lag or (xpos[1] == data.xpos).all()


@pytest.mark.parametrize("base, xml", [(AntGoal4C, "ant.xml"), (PlainReacher, "reacher.xml")])
def test_a_robot_of_ones_own_keeps_its_contact_forces(base, xml):
    class Heavier(base):
        def build_spec(self):
            spec = mujoco.MjSpec.from_file(os.path.join(ASSETS, xml))
            spec.option.gravity[2] = -20
            return spec

    env = Heavier(num_envs=2)
    forces = env.batch.bind("cfrc_ext")
    env.reset(seed=0)
    assert env.model.opt.gravity[2] == -20 and env.model.nsensor == 1
    moving = [env.step(action) and np.abs(forces).max() for action in actions(env, 40)]
    assert base is PlainReacher or max(moving) > 1


def test_an_ant_of_another_frame_skip_without_contacts():
    class Bare(Ant):
        frame_skip, dt, contact_forces, obs_dim, horizon = 2, 0.02, False, 29, 250
        task_dim, num_clusters = 2, 1
        draw, nearest_cluster = AntGoal4C.draw, AntGoal4C.nearest_cluster

        def reward(self, action):
            return -self.contact_cost()

    env = Bare(num_envs=3)
    env.reset(seed=0)
    assert env.model.nsensor == 0 and (env.stage, env.horizon) == (0, 250)
    data = env.batch.get_data(1)
    for action in actions(env, 5):
        obs, reward, *_ = env.step(action)
        data.ctrl[:] = action[1]
        mujoco.mj_step(env.model, data, 2)
        np.testing.assert_array_equal(obs[1], np.concatenate([data.qpos, data.qvel]).astype(np.float32))
        assert (reward == 0).all()


def test_velocity_reward_of_the_cheetah():
    class Sparse(CheetahVel):
        def velocity_reward(self, error):
            return 1.0 * (np.abs(error) < 1)

    env, dense = Sparse(num_envs=8), make("cheetah-vel", 8)
    env.reset(seed=0)
    paid = []
    for action in actions(env, 20):
        reward, loss = env.step(action)[1], dense.step(action)[1]
        cost = 0.05 * np.square(action).sum(1)
        np.testing.assert_allclose(reward + cost, -(loss + cost) < 1, atol=1e-12)
        paid.append(reward + cost > 0.5)
    assert 0 < np.mean(paid) < 1


def test_the_sparse_cheetah_is_paid_near_its_velocity_alone():
    sparse, dense = make("cheetah-vel-sparse", 16), make("cheetah-vel", 16)
    tasks, paid = dense.sample_tasks(16, np.random.default_rng(0)), []
    tasks.params[:] *= 0.5  # untrained, it hardly moves
    for env in (sparse, dense):
        env.reset(seed=0, options={"tasks": tasks})
    for action in actions(sparse, 20):
        cost = 0.05 * np.square(action).sum(1)
        reward, error = sparse.step(action)[1] + cost, -(dense.step(action)[1] + cost)
        np.testing.assert_allclose(reward, np.where(error <= 0.5, 2 - error, 0), atol=1e-12)
        paid.append(error <= 0.5)
    assert 0 < np.mean(paid) < 1
    velocities = sparse.sample_tasks(5000, np.random.default_rng(0)).params
    np.testing.assert_allclose(np.quantile(velocities, (0, 0.5, 1)), (0, 1.5, 3), atol=0.07)


# -- task distributions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", IDS)
def test_task_sets_are_fixed_balanced_and_disjoint(env_id):
    a, b = make(env_id), make(env_id)
    b.reset(seed=123)
    train, test = a.task_set("train"), a.task_set("test")
    assert (len(train), len(test)) == (500, a.num_test_tasks)
    np.testing.assert_array_equal(train.params, b.task_set("train").params)
    np.testing.assert_array_equal(test.params, b.task_set("test").params)
    if env_id not in (*DIRECTIONS, *MIXED):  # there are not enough directions to keep some for tests
        assert len(np.unique(np.concatenate([train.params, test.params]), axis=0)) == 500 + len(test)
    if env_id == "cheetah-vel-noise":
        assert np.bincount(train.cluster).tolist() == [400, 100] and (test.cluster == 0).all()
        return
    for tasks, size in ((train, 500), (test, a.num_test_tasks)):
        counts = np.bincount(tasks.cluster)  # 500 is no multiple of 6
        assert (len(counts), counts.sum()) == (a.num_clusters, size) and np.ptp(counts) <= (size % a.num_clusters > 0)


@pytest.mark.parametrize("env_id", IDS)
def test_single_tasks_come_from_every_cluster(env_id):
    env, rng = make(env_id, 1), np.random.default_rng(0)
    assert {int(env.sample_tasks(1, rng).cluster[0]) for _ in range(50)} == set(env.cluster_cycle("train"))


def test_goals_are_the_papers():
    s = np.array([0.0329, 0.9495, 1.3066, 1.4487])
    goals = make("ant-goal-4c").task_set("train").params[:4]
    np.testing.assert_allclose(goals, 2 * np.stack([np.cos(np.pi * s), np.sin(np.pi * s)], 1), atol=1e-3)


@pytest.mark.parametrize("env_id, sd", [("ant-goal-4c", 0.2), ("humanoid-dir-4c", 0.2), ("point-goal-4c", 0.05)])
def test_four_clusters_on_the_circle(env_id, sd):
    tasks = make(env_id).sample_tasks(4000, np.random.default_rng(0))
    radius = 1 if env_id.startswith("humanoid") else 2
    np.testing.assert_allclose(np.linalg.norm(tasks.params, axis=1), radius)
    angle = np.arctan2(*tasks.params.T[::-1]) / np.pi
    for k, centre in enumerate((0.25, 0.75, 1.25, 1.75)):
        offset = (angle[tasks.cluster == k] - centre + 1) % 2 - 1
        assert abs(offset.mean()) < 0.02 and abs(offset.std() - sd) < 0.02


def test_uniform_goals_have_no_clusters():
    env = make("ant-goal-u")
    tasks = env.sample_tasks(4000, np.random.default_rng(0))
    assert (tasks.cluster == 0).all() and env.num_clusters == 1
    counts, _ = np.histogram(np.arctan2(*tasks.params.T), bins=8, range=(-np.pi, np.pi))
    assert counts.min() > 400


def test_nmi_by_parameters():
    tasks = {i: make(i).task_set("test") for i in ("ant-goal-4c", "point-goal-4c", "hopper-params-4c")}
    score = {i: normalized_mutual_info_score(t.cluster, make(i).nearest_cluster(t.params)) for i, t in tasks.items()}
    assert abs(score["ant-goal-4c"] - 0.65) < 0.01
    assert score["point-goal-4c"] == score["hopper-params-4c"] == pytest.approx(1)


@pytest.mark.parametrize("env_id", DIRECTIONS)
def test_two_directions(env_id):
    env = make(env_id)
    tasks = env.sample_tasks(9, np.random.default_rng(0))
    np.testing.assert_array_equal(tasks.params[:, 0], 1 - 2 * tasks.cluster)
    assert abs(tasks.params.sum()) == 1
    np.testing.assert_array_equal(env.nearest_cluster(tasks.params), tasks.cluster)


@pytest.mark.parametrize("env_id", ["cheetah-vel", "cheetah-vel-noise"])
def test_velocities(env_id):
    env = make(env_id)
    tasks = env.sample_tasks(5000, np.random.default_rng(0))
    useful, noise = (tasks.params[tasks.cluster == c, 0] for c in (0, 1))
    assert len(noise) == (1000 if env_id == "cheetah-vel-noise" else 0)
    for draws, low, high in ((useful, 0, 2), (noise, 3, 4)):
        if len(draws):
            np.testing.assert_allclose(np.quantile(draws, (0, 0.5, 1)), (low, (low + high) / 2, high), atol=0.05)
    np.testing.assert_array_equal(env.nearest_cluster(tasks.params), tasks.cluster)
    assert env.task_set("test").params.max() < 2
    np.testing.assert_array_equal(env.task_set("test").params, make("cheetah-vel").task_set("test").params)


@pytest.mark.parametrize("env_id", MIXED)
def test_mixed_tasks(env_id):
    tasks = make(env_id).sample_tasks(4000, np.random.default_rng(0))
    np.testing.assert_array_equal(tasks.params[:, 0], tasks.cluster)
    for robot in (0, 1):
        directions = tasks.params[tasks.cluster == robot, 1]
        assert len(directions) == 2000 and set(directions) == {-1, 1} and abs(directions.mean()) < 0.06


@pytest.mark.parametrize("env_id", MIXED)
def test_mixed_rows_equal_the_robots_alone(env_id):
    """Any mix of tasks, padding with zeros at the end, a robot's own share of the actions; falls freeze a row."""
    n = 8
    env, parts = make(env_id, n), [make(part, n) for part in MIXED[env_id]]
    robot, direction = np.array([0, 1, 1, 0, 1, 0, 0, 1]), np.array([1, 1, -1, -1, 1, 1, -1, -1])
    params = np.stack([robot, direction], 1).astype(float)
    obs, _ = env.reset(seed=3, options={"tasks": envs.Tasks(params, robot)})
    expected = [p.reset(seed=3, options={"tasks": envs.Tasks(params[:, 1:], robot)})[0] for p in parts]
    for action in [None, *actions(env, 70)]:
        if action is not None:
            obs, reward, terminated, truncated, _ = env.step(action)
            steps = [part.step(action[:, : part.action_dim]) for part in parts]
            expected = [step[0] for step in steps]
        for i, r in enumerate(robot):
            np.testing.assert_array_equal(obs[i, : parts[r].obs_dim], expected[r][i])
            assert (obs[i, parts[r].obs_dim :] == 0).all()
            if action is not None:
                assert (reward[i], terminated[i], truncated[i]) == tuple(x[i] for x in steps[r][1:4])
    assert terminated[robot == 1].any() == (env_id == "ml2")
    assert env.used_actions().sum(1).tolist() == [parts[r].action_dim for r in robot]
    assert (np.diff(env.used_actions().astype(int)) <= 0).all(), "the first of the actions"
    assert all(part.used_actions().all() for part in parts)
    mask = np.arange(n) < 3
    again, _ = env.reset(options={"reset_mask": mask})
    np.testing.assert_array_equal(again[~mask], obs[~mask])
    assert (again[mask] != obs[mask]).any(1).all()


@pytest.mark.parametrize("env_id, mu, sigma", [("hopper-params-4c", 3, 1.5), ("walker-params-4c", 6, 1)])
def test_rand_params_scale_exactly_one_set(env_id, mu, sigma):
    env = make(env_id, 8)
    tasks = env.task_set("train")[:8]
    env.reset(seed=0, options={"tasks": tasks})
    for i in range(8):
        model = env.batch.get_model(i)
        changed = [(getattr(model, name) != getattr(env.model, name)).any() for name in PARAMETER_SETS]
        assert np.flatnonzero(changed).tolist() == [tasks.cluster[i]]
        assert model.opt.timestep == 0.004
    many = env.sample_tasks(4000, np.random.default_rng(0)).params
    draws = many[many != 1]
    assert abs(draws.mean() - mu) < 0.05 and abs(draws.std() - sigma) < 0.1 and draws.min() > 0


@pytest.mark.parametrize("env_id", RAND_PARAMS)
def test_rand_params_start_noise(env_id):
    """U(-0.005, 0.005) on positions and velocities, positions first."""
    env = make(env_id, 200)
    env.reset(seed=5, options={"tasks": env.tasks})
    noise = np.concatenate([env.qpos - env.model.qpos0, env.qvel], axis=1)
    for i in (0, 199):
        expected = np.random.default_rng(5 + i).uniform(-0.005, 0.005, noise.shape[1])
        np.testing.assert_allclose(noise[i], expected, atol=1e-15)
    assert (np.abs(noise) <= 0.005).all() and (noise.std(0) > 0.0025).all()


@pytest.mark.parametrize("env_id", RAND_PARAMS)
def test_rand_params_change_the_motion(env_id):
    env = make(env_id, 4)
    tasks = env.task_set("train")[:4]
    plain = envs.Tasks(np.ones_like(tasks.params), tasks.cluster)
    moved, still = [], []
    for out, used in ((moved, tasks), (still, plain)):
        env.reset(seed=0, options={"tasks": used})
        for action in actions(env, 60):
            out.append(env.step(action)[0])
    assert (np.abs(np.array(moved) - np.array(still)).max((0, 2)) > 1e-2).all()


# -- physics and rewards against plain MuJoCo --------------------------------------------------------------------------


def replay(env, i, steps=40):
    """Step copy i of the environment and a plain MjData on the same model; yields both after each step."""
    model, data = env.batch.get_model(i), mujoco.MjData(env.model)
    data.qpos[:], data.qvel[:] = env.qpos[i], env.qvel[i]
    mujoco.mj_forward(model, data)
    mujoco.mj_rnePostConstraint(model, data)
    for action in actions(env, steps):
        before = data.qpos.copy(), data.xipos.copy()
        data.ctrl[:] = env.control(action)[i]
        for _ in range(env.frame_skip):
            mujoco.mj_step(model, data)
        if env.contact_forces:
            mujoco.mj_forward(model, data)
            mujoco.mj_rnePostConstraint(model, data)
        obs, reward, *_ = env.step(action)
        yield model, data, before, action[i], obs[i], reward[i]


@pytest.mark.parametrize("env_id", ["ant-goal-4c", "ant-goal-partial-4c"])
def test_ant_against_plain_mujoco(env_id):
    env, touched = make(env_id), 0
    goal = env.tasks.params[1]
    for _, data, _, action, obs, reward in replay(env, 1):
        contact = np.clip(data.cfrc_ext, -1, 1).ravel()
        np.testing.assert_array_equal(obs, np.concatenate([data.qpos, data.qvel, contact]).astype(np.float32))
        distance = abs(data.qpos[0] - goal[0]) + abs(data.qpos[1] - goal[1])
        goal_reward = -distance if env_id == "ant-goal-4c" else (3 - distance if distance <= 3 else 0)
        assert reward == pytest.approx(goal_reward - 0.01 * (action**2).sum() - 0.0005 * (contact**2).sum(), abs=1e-12)
        touched += (contact != 0).any()
    assert touched > 10, "the feet touch the ground, so the contact forces must not stay zero"


@pytest.mark.parametrize("copy", range(2))
def test_ant_dir_against_plain_mujoco(copy):
    env, touched = make("ant-dir"), 0
    direction = env.tasks.params[copy, 0]
    for _, data, (qpos, _), action, obs, reward in replay(env, copy):
        contact = np.clip(data.cfrc_ext, -1, 1).ravel()
        np.testing.assert_array_equal(obs, np.concatenate([data.qpos[2:], data.qvel, contact]).astype(np.float32))
        velocity = (data.qpos[0] - qpos[0]) / 0.05
        expected = direction * velocity + 1 - 0.5 * (action**2).sum() - 0.0005 * (contact**2).sum()
        assert reward == pytest.approx(expected, abs=1e-10)
        touched += (contact != 0).any()
        assert env.fell[copy] == (not 0 <= data.qpos[2] <= 1)
        if env.fell[copy]:
            break
    assert touched > 3


@pytest.mark.parametrize("env_id", ["cheetah-dir", "cheetah-vel", "cheetah-vel-noise", "cheetah-vel-sparse"])
@pytest.mark.parametrize("copy", range(2))
def test_cheetah_against_plain_mujoco(env_id, copy):
    env = make(env_id)
    task = env.tasks.params[copy, 0]
    for model, data, (qpos, _), action, obs, reward in replay(env, copy):
        velocity = (data.qpos[0] - qpos[0]) / 0.05
        state = [data.qpos[1:], data.qvel]
        if env_id != "cheetah-dir":
            mujoco.mj_kinematics(model, data)
            state.append(data.body("torso").xpos)
        np.testing.assert_allclose(obs, np.concatenate(state).astype(np.float32), atol=1e-6)
        error = abs(velocity - task)
        moving = task * velocity if env_id == "cheetah-dir" else -error
        if env_id == "cheetah-vel-sparse":
            moving = 2 - error if error <= 0.5 else 0
        assert reward == pytest.approx(moving - 0.05 * (action**2).sum(), abs=1e-10)


@pytest.mark.parametrize("copy", range(2))
def test_walker_dir_against_plain_mujoco(copy):
    env, falls = make("walker-dir"), []
    direction = env.tasks.params[copy, 0]
    for _, data, (qpos, _), action, obs, reward in replay(env, copy, steps=100):
        height, pitch = data.qpos[1:3]
        expected = np.concatenate([data.qpos[1:], np.clip(data.qvel, -10, 10)])
        np.testing.assert_array_equal(obs, expected.astype(np.float32))
        velocity = (data.qpos[0] - qpos[0]) / 0.008
        assert reward == pytest.approx(direction * velocity + 1 - 0.001 * (action**2).sum(), abs=1e-10)
        falls.append(not (0.8 < height < 2.0 and abs(pitch) < 1))
        assert env.fell[copy] == falls[-1]
        if falls[-1]:
            break
    assert falls[-1], "a walker that flails falls"


def test_ant_dir_ends_off_the_heights_from_0_to_1():
    env = make("ant-dir", 5)
    env.qpos[:, 2] = [0.5, 1.01, -0.01, 0.99, 0.01]
    assert env.terminated().tolist() == [False, True, True, False, False]
    env.reset()
    env.qpos[1, 2] = 1.5
    obs, _, terminated, *_ = env.step(np.zeros((5, 8)))
    assert terminated.tolist() == [False, True, False, False, False]
    after, reward, *_ = env.step(np.zeros((5, 8)))
    assert ((after == obs).all(1) == terminated).all() and ((reward == 0) == terminated).all()


@pytest.mark.parametrize("env_id", ["humanoid-dir-4c", "humanoid-dir-sparse-4c"])
def test_humanoid_against_plain_mujoco(env_id):
    env, paid = make(env_id), 0
    goal = env.tasks.params[2]
    for model, data, (_, xipos), _, obs, reward in replay(env, 2):
        parts = (data.qpos[2:], data.qvel, data.cinert, data.cvel, data.qfrc_actuator, data.cfrc_ext)
        np.testing.assert_array_equal(obs, np.concatenate([p.ravel() for p in parts]).astype(np.float32))
        move = (model.body_mass @ (data.xipos - xipos))[:2] / model.body_mass.sum()
        velocity_reward = 0.5 * (goal @ move) / 0.003
        if "sparse" in env_id and goal @ move <= 0.8 * np.linalg.norm(move):
            velocity_reward = 0
        paid += velocity_reward != 0
        cost = 0.05 * (data.ctrl**2).sum() + min(5e-7 * (data.cfrc_ext**2).sum(), 10)
        assert reward == pytest.approx(velocity_reward - cost, abs=1e-10)
    assert 0 < paid < 40 if "sparse" in env_id else paid == 40


@pytest.mark.parametrize("env_id, alive", [("hopper-params-4c", 1), ("walker-params-4c", 0)])
@pytest.mark.parametrize("copy", range(4))
def test_rand_params_against_plain_mujoco(env_id, alive, copy):
    env = make(env_id)
    env.reset(seed=0, options={"tasks": env.task_set("train")[:4]})
    for _, data, (qpos, _), action, obs, reward in replay(env, copy):
        expected = np.concatenate([data.qpos[1:], np.clip(data.qvel, -10, 10)])
        np.testing.assert_array_equal(obs, expected.astype(np.float32))
        forward = (data.qpos[0] - qpos[0]) / 0.016
        assert reward == pytest.approx(forward + alive - 0.001 * (action**2).sum(), abs=1e-10)


def test_point_by_hand():
    env = make("point-goal-4c", 2)
    goal = np.array([[1.0, 0.5], [-1.0, 2.0]])
    env.reset(options={"tasks": envs.Tasks(goal, np.zeros(2, int))})
    obs, reward, *_ = env.step(np.array([[0.5, -3.0], [1.0, 1.0]]))
    np.testing.assert_allclose(obs, [[0.05, -0.1], [0.1, 0.1]])
    np.testing.assert_allclose(reward, [-(0.95 + 0.6) - 0.01 * 9.25, -(1.1 + 1.9) - 0.02])


def test_sparse_point_by_hand():
    env = make("point-goal-sparse", 4)
    goals = np.array([[1.0, 0.0], [0.3, 0.0], [0.1, 0.3], [0.1, 0.35]])
    env.reset(options={"tasks": envs.Tasks(goals, np.zeros(4, int))})
    obs, reward, *_ = env.step(np.array([[3.0, 0.0]] * 3 + [[1.0, 1.0]]))
    np.testing.assert_allclose(obs, [[0.1, 0.0]] * 3 + [[0.1, 0.1]])
    np.testing.assert_allclose(reward, [0, 0.8, 0.7, 0.75], err_msg="actions are free")
    assert not env.step(np.array([[0.0, -0.1]] * 4))[1][[0, 2]].any(), "a little further off it is not felt"


def test_goals_on_half_a_circle():
    goals = make("point-goal-sparse").sample_tasks(4000, np.random.default_rng(0)).params
    np.testing.assert_allclose(np.linalg.norm(goals, axis=1), 1)
    angles = np.arctan2(*goals.T[::-1])
    counts, _ = np.histogram(angles, bins=8, range=(0, np.pi))
    assert counts.sum() == 4000 and counts.min() > 400


GYM = {  # id: (Gymnasium's id, its arguments, what of its observation agrees with ours)
    "ant-goal-4c": ("Ant-v5", {"exclude_current_positions_from_observation": False}, slice(0, 29)),
    "humanoid-dir-4c": ("Humanoid-v5", {}, slice(0, 45)),
    "hopper-params-4c": ("Hopper-v5", {}, slice(0, 11)),
    "walker-params-4c": ("Walker2d-v5", {"xml_file": "walker2d.xml"}, slice(0, 17)),
    "walker-dir": ("Walker2d-v5", {"xml_file": "walker2d.xml"}, slice(0, 17)),
    "cheetah-dir": ("HalfCheetah-v5", {}, slice(0, 17)),
    "ant-dir": ("Ant-v5", {}, slice(0, 27)),
}


@pytest.mark.parametrize("env_id", GYM)
def test_against_gymnasium(env_id):
    """The same robot from the same state under the same actions goes the same way."""
    name, kwargs, common = GYM[env_id]
    env = make(env_id, 1)
    if env_id in RAND_PARAMS:
        plain = envs.Tasks(np.ones((1, env.task_dim)), np.zeros(1, int))
        env.reset(options={"tasks": plain})
    if "Cheetah" not in name:
        kwargs = kwargs | {"terminate_when_unhealthy": False}
    theirs = gym.make(name, frame_skip=env.frame_skip, **kwargs).unwrapped
    theirs.reset(seed=0)
    theirs.model.opt.timestep = env.model.opt.timestep
    theirs.set_state(env.qpos[0], env.qvel[0])
    for action in actions(env, 15) * 0.3:
        obs, reward, *_ = env.step(action)
        expected, _, _, _, info = theirs.step(env.control(action)[0])
        np.testing.assert_allclose(obs[0, common], expected[common], atol=2e-5)
        if hasattr(env, "velocity") and env_id != "ant-dir":  # theirs is of the torso's frame, one substep late
            assert info["x_velocity"] == pytest.approx(env.velocity()[0], abs=1e-4)
        if env_id in RAND_PARAMS:
            ours = reward[0] - env.alive_bonus
            assert ours == pytest.approx(info["reward_forward"] + info["reward_ctrl"], abs=1e-4)


@pytest.mark.parametrize(
    "env_id, low, high",
    [
        ("ant-goal-4c", -276, -236),
        ("ant-goal-u", -275, -235),
        ("ant-goal-partial-4c", 24, 64),
        ("hopper-params-4c", 80, 110),
        ("walker-params-4c", -15, 15),
    ],
)
def test_standing_still(env_id, low, high):
    """Near -256, -255, +44, +100 and 0, but the robots drift as they land."""
    env = make(env_id, 32)
    env.reset(seed=0, options={"tasks": env.task_set("test")})
    still = np.zeros(env.action_space.shape)
    assert low < sum(env.step(still)[1].mean() for _ in range(100)) < high


@pytest.mark.parametrize(
    "env_id, mean, sd", [("cheetah-dir", -0.45, 1.2), ("ant-dir", 94.6, 4.7), ("walker-dir", 43.6, 20)]
)
def test_untrained_policy(env_id, mean, sd):
    """A zero-mean policy of standard deviation 1 on an action scale of 10, over 20 episodes elsewhere."""
    env = make(env_id, 200)
    total = sum(env.step(np.clip(action / 10, -1, 1))[1] for action in actions(env, 100))
    assert abs(total.mean() - mean) < 4 * sd / np.sqrt(20)
    assert 0.5 < total.std() / sd < 2


def test_horizon_can_be_set():
    env = gym.make_vec("cheetah-dir", num_envs=2, horizon=7)
    env.reset(seed=0)
    for t in range(7):
        *_, truncated, _ = env.step(np.zeros((2, 6)))
        assert truncated.all() == (t == 6)
    assert gym.make_vec("ml2", horizon=7).unwrapped.horizon == 7
    with pytest.raises(ValueError, match="horizon must be at least 1"):
        gym.make_vec("point-goal-4c", horizon=0)
