"""MMAML's environments: goals and modes, plain MuJoCo and plain Python step by step, anchors of standing still."""

import mujoco
import numpy as np
import pytest
from test_envs import actions, make, replay

import envs

S = 0.75**0.5
HEXAGON = [(1, 0), (0.5, S), (-0.5, S), (-1, 0), (-0.5, -S), (0.5, -S)]
CORNERS, OPPOSITE = [(1, 1), (-1, 1), (1, -1), (-1, -1)], [(1, 1), (-1, -1)]
GOALS = {  # id: the centres in any order, their unit, standard deviation
    "point-1m": ([(1, 1)], 5, 1),
    "point-2m": (OPPOSITE, 5, 1),
    "point-4m": (CORNERS, 5, 1),
    "point-6m": (HEXAGON, 5, 1),
    "point-6m-far": (HEXAGON, 7.0711, 1),
    "reacher-1m": ([(1, 1)], 0.225, 0.1),
    "reacher-2m": (OPPOSITE, 0.225, 0.1),
    "reacher-4m": (CORNERS, 0.225, 0.1),
    "reacher-6m": (HEXAGON, 0.3182, 0.1),
    "reacher-6m-bug": (HEXAGON[:2], 0.3182, 0.1),
    "ant-1m": ([(-1, 0)], 4, 0.8),
    "ant-2m": ([(-1, 0), (1, 0)], 4, 0.8),
    "ant-4m": ([(-1, 0), (-0.5, S), (0.5, S), (1, 0)], 4, 0.8),
}
REACHERS = [i for i in GOALS if i.startswith("reacher")]

# The arm, every number of it written a second time.
ARM = """
<mujoco>
  <compiler angle="radian"/>
  <option integrator="RK4" timestep="0.01"/>
  <default>
    <joint axis="0 0 1" armature="1" damping="1"/>
    <geom type="capsule" size="0.01" contype="0" conaffinity="0"/>
    <motor ctrllimited="true" ctrlrange="-1 1" gear="200"/>
  </default>
  <worldbody>
    <body pos="0 0 0.01">
      <joint name="shoulder" limited="false"/> <geom fromto="0 0 0 0.1 0 0"/>
      <body pos="0.1 0 0">
        <joint name="elbow" limited="false"/> <geom fromto="0 0 0 0.1 0 0"/>
        <body pos="0.1 0 0">
          <joint name="wrist" limited="true" range="-5 3"/> <geom fromto="0 0 0 0.1 0 0"/>
          <body name="tip" pos="0.11 0 0"> <geom type="sphere"/> </body>
        </body>
      </body>
    </body>
  </worldbody>
  <actuator> <motor joint="shoulder"/> <motor joint="elbow"/> <motor joint="wrist"/> </actuator>
</mujoco>
"""


# -- goals -------------------------------------------------------------------------------------------------------------


def planar(env_id, n=6000) -> tuple[np.ndarray, np.ndarray]:
    """Goals [n, 2] and their clusters; the reacher's before they are moved onto the sphere."""
    env = make(env_id, 1)
    tasks = env.sample_tasks(n, np.random.default_rng(0))
    if env_id in REACHERS:
        return envs.modes.Modes.draw(env, tasks.cluster, np.random.default_rng(0)), tasks.cluster
    return tasks.params, tasks.cluster


@pytest.mark.parametrize("env_id", GOALS)
def test_every_mode_is_a_gaussian_around_one_of_the_centres(env_id):
    centres, unit, sd = GOALS[env_id]
    goals, cluster = planar(env_id)
    taken = set()
    for k in np.unique(cluster):
        mine = goals[cluster == k]
        distance = np.abs(mine.mean(0) - unit * np.array(centres)).max(1)
        assert distance.min() < 5 * sd / np.sqrt(len(mine))
        taken.add(int(distance.argmin()))
        np.testing.assert_allclose(mine.std(0), sd, rtol=0.1)
        assert abs(np.corrcoef(mine.T)[0, 1]) < 0.1
    assert len(taken) == len(centres) == make(env_id, 1).num_clusters


@pytest.mark.parametrize("env_id", GOALS)
def test_modes_are_balanced_in_every_batch_and_begin_with_any(env_id):
    env, rng = make(env_id, 1), np.random.default_rng(0)
    batches = [env.sample_tasks(40, rng).cluster for _ in range(60)]
    for cluster in batches:
        assert np.ptp(np.bincount(cluster, minlength=env.num_clusters)) <= (40 % env.num_clusters > 0)
    assert {cluster[0] for cluster in batches} == set(range(env.num_clusters))
    test = env.task_set("test")
    assert len(test) == 48 and np.bincount(test.cluster).tolist() == [48 // env.num_clusters] * env.num_clusters


@pytest.mark.parametrize("env_id", REACHERS)
def test_goals_of_the_reacher_are_within_its_reach(env_id):
    """The third coordinate is 0.03, and shrinks with the others where they are moved onto the sphere."""
    env = make(env_id, 1)
    tasks = env.sample_tasks(6000, np.random.default_rng(0))
    wanted = np.column_stack([*planar(env_id)[0].T, np.full(6000, 0.03)])  # other draws of the same distribution
    far = np.linalg.norm(wanted, axis=1) > 0.3
    inside = np.linalg.norm(tasks.params, axis=1) < 0.3 - 1e-12
    assert np.linalg.norm(tasks.params, axis=1).max() <= 0.3 + 1e-12 and (tasks.params[inside, 2] == 0.03).all()
    assert (tasks.params[~inside, 2] < 0.03).all() and abs(far.mean() - (~inside).mean()) < 0.03
    if env_id == "reacher-4m":
        assert abs((~inside).mean() - 0.64) < 0.02
    moved = env.draw(np.zeros(5, int), np.random.default_rng(3))
    plain = envs.modes.Modes.draw(env, np.zeros(5, int), np.random.default_rng(3))
    np.testing.assert_allclose(moved[:, 0] * plain[:, 1], moved[:, 1] * plain[:, 0])


@pytest.mark.parametrize("env_id", GOALS)
def test_the_nearest_mode_is_a_good_guess(env_id):
    """By how far the centres are apart in standard deviations; chance is one in so many modes."""
    env = make(env_id, 1)
    tasks = env.sample_tasks(6000, np.random.default_rng(0))
    right = (env.nearest_cluster(tasks.params) == tasks.cluster).mean()
    assert right > {"point": 0.98, "reach": 0.86, "ant-1": 1 - 1e-9, "ant-2": 0.99, "ant-4": 0.97}[env_id[:5]]


# -- physics and rewards -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [0, 3])
def test_the_point_against_plain_python(row):
    env = make("point-4m")
    goals = np.array([[5.0, 4.0], [0.0, 0.0], [1.0, 1.0], [-3.0, 6.0]])
    obs, _ = env.reset(seed=8, options={"tasks": envs.Tasks(goals, np.zeros(4, int))})
    rng = np.random.default_rng(8 + row)
    x, v = rng.uniform(-0.2, 0.2, 2), rng.uniform(-0.1, 0.1, 2)
    np.testing.assert_array_equal(obs[row], np.float32([*x, *v]))
    for t, action in enumerate(2 * actions(env, 100)):
        obs, reward, terminated, truncated, _ = env.step(action)
        v = v + np.clip(0.1 * action[row], -0.1, 0.1)
        x = x + v
        np.testing.assert_allclose(obs[row], [*x, *v], rtol=1e-5)
        assert reward[row] == pytest.approx(-np.hypot(*(x - goals[row])))
        assert not terminated.any() and truncated.all() == (t == 99)


def test_the_starts_of_the_point():
    env = make("point-2m", 500)
    for low, high, values in ((-0.2, 0.2, env.position), (-0.1, 0.1, env.velocity)):
        np.testing.assert_allclose(np.quantile(values, (0, 0.5, 1)), (low, 0, high), atol=0.02)


@pytest.mark.parametrize("row", [0, 3])
def test_the_reacher_against_an_arm_written_in_xml(row):
    env, model = make("reacher-4m"), mujoco.MjModel.from_xml_string(ARM)
    env.reset(seed=8, options={"tasks": env.tasks})
    data, goal, rng = mujoco.MjData(model), env.tasks.params[row], np.random.default_rng(8 + row)
    data.qpos[:], data.qvel[:] = rng.uniform(-0.1, 0.1, 3), rng.uniform(-0.005, 0.005, 3)
    np.testing.assert_array_equal(env.qpos[row], data.qpos)
    np.testing.assert_array_equal(env.qvel[row], data.qvel)
    for t, action in enumerate(2 * actions(env, 50)):
        obs, reward, terminated, truncated, _ = env.step(action)
        data.ctrl[:] = action[row]
        mujoco.mj_step(model, data, 2)
        a, b, c = data.qpos
        seen = [np.cos(a), np.cos(b), np.sin(a), np.sin(b), c, *data.qvel[:2]]
        np.testing.assert_allclose(obs[row], seen, rtol=1e-6, atol=1e-6)
        mujoco.mj_kinematics(model, data)
        tip = data.body("tip").xpos
        bearing = np.cumsum(data.qpos)
        reach = np.array([0.1, 0.1, 0.11])
        np.testing.assert_allclose(tip, [reach @ np.cos(bearing), reach @ np.sin(bearing), 0.01], atol=1e-12)
        assert reward[row] == pytest.approx(-np.abs(tip - goal).sum() - 0.1 * (action[row] ** 2).sum(), abs=1e-9)
        assert not terminated.any() and truncated.all() == (t == 49)


def test_only_the_third_joint_of_the_reacher_is_limited():
    for sign, limit in ((1, 3), (-1, -5)):
        env = make("reacher-1m", 1, horizon=400)
        for _ in range(400):
            env.step(np.full((1, 3), sign))
        assert abs(env.qpos[0, 2] - limit) < 0.5 and (np.abs(env.qpos[0, :2]) > 20).any()


def test_the_ant_against_plain_mujoco():
    env = make("ant-4m")
    goal = np.array([*env.tasks.params[1], 0.03])
    for _, data, _, action, obs, reward in replay(env, 1):
        np.testing.assert_array_equal(obs, np.concatenate([data.qpos, data.qvel]).astype(np.float32))
        expected = -np.abs(data.qpos[:3] - goal).sum() - 0.1 * (action**2).sum()
        assert reward == pytest.approx(expected, abs=1e-12)
    assert env.model.opt.timestep == 0.01 and (env.model.actuator_gear[:, 0] == 150).all()


def test_the_ant_never_falls():
    env = make("ant-2m", 2)
    env.qpos[0, 2] = 3.0
    env.qpos[1, 2] = 0.15
    _, _, terminated, truncated, _ = env.step(np.zeros((2, 8)))
    assert not (terminated | truncated).any()
    assert make("ant-2m").horizon == 250


# -- anchors -----------------------------------------------------------------------------------------------------------


def still(env_id, copies=480, before=lambda env: None) -> tuple[float, np.ndarray]:
    """The mean return of zero actions, and the goals."""
    env = make(env_id, copies)
    env.reset(seed=0, options={"tasks": env.sample_tasks(copies, np.random.default_rng(0))})
    before(env)
    zero = np.zeros(env.action_space.shape)
    return sum(env.step(zero)[1].mean() for _ in range(env.horizon)), env.tasks.params


@pytest.mark.parametrize(
    "env_id, mean", [("point-2m", -714), ("point-4m", -714), ("point-6m", -510), ("point-6m-far", -714)]
)
def test_a_point_at_rest(env_id, mean):
    """The numbers are 100 times the mean distance of the goals; the hexagon of radius 5 is nearer."""

    def rest(env):
        env.velocity[:] = 0

    assert abs(still(env_id, before=rest)[0] - mean) < 12
    assert still(env_id)[0] < mean - 50, "its first velocity takes it away"


def test_a_reacher_at_rest():
    """Its arm is stretched along x: the tip is at (0.31, 0, 0.01)."""
    total, goals = still("reacher-4m", 48)
    assert abs(total + 50 * np.abs(goals - [0.31, 0, 0.01]).sum(1).mean()) < 1


def test_an_ant_at_rest_pays_for_standing():
    """Besides its way to the goal half a unit and more of height, 250 times."""
    total, goals = still("ant-1m", 16)
    assert 0.4 < total / -250 - np.abs(goals).sum(1).mean() < 0.8


@pytest.mark.parametrize("env_id, best", [("point-2m", -60), ("point-6m", -40)])
def test_who_knows_the_goal_brakes_in_time(env_id, best):
    env = make(env_id, 200)
    total = 0
    for _ in range(100):
        total += env.step(env.oracle_action())[1].mean()
    assert total > best and np.abs(env.position - env.tasks.params).max() < 0.05


def test_the_frame_of_the_point_is_20_units_wide():
    env = make("point-1m", 1)
    env.reset(options={"tasks": envs.Tasks(np.array([[6.0, -3.0]]), np.zeros(1, int))})
    env.position[:] = 0
    (frame,) = env.render()
    assert frame[100, 100].tolist() == [0, 0, 0] and frame[130, 160].tolist() == [200, 0, 0]
