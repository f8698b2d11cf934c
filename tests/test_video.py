"""results/video.py: the film shows the recorded episodes, and one line for what cannot be shown."""

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from conftest import ROOT, spy_on
from PIL import Image
from test_plot import make_toy

import envs

sys.path.insert(0, str(ROOT / "results"))
import video

H, VIDEO = 12, ROOT / "results" / "video.py"


def make_run(path: Path, env_id="point-goal-4c", script="rl2", seed=7, per_episode=False, episodes=2, **extra) -> Path:
    """A run whose last evaluation took random actions."""
    tasks = gym.make_vec(env_id).unwrapped.task_set("test")
    env, rng = gym.make_vec(env_id, num_envs=len(tasks), horizon=H), np.random.default_rng(0)
    action = rng.uniform(-1, 1, (episodes, H, *env.action_space.shape)).astype(np.float32)
    trace, reward = np.zeros((episodes, H + 1, len(tasks), 2), np.float32), np.zeros((episodes, H, len(tasks)))
    for k in range(episodes):
        again = per_episode or k == 0
        obs, _ = env.reset(seed=seed + k, options={"tasks": tasks}) if again else env.reset()
        trace[k, 0] = obs[:, :2]
        for t in range(H):
            obs, reward[k, t], *_ = env.step(action[k, t])
            trace[k, t + 1] = obs[:, :2]
    seeds = seed + np.arange(episodes) if per_episode else seed
    arrays = dict(params=tasks.params, cluster=tasks.cluster, trace=trace, action=action, reward=reward, seed=seeds)
    path.mkdir(parents=True)
    (path / "args.json").write_text(json.dumps(dict(script=script, env=env_id, seed=0, horizon=H)))
    (path / "eval.csv").write_text("iteration,charts/frames,eval/return_episode_1\n0,0,1\n")
    np.savez_compressed(path / "eval.npz", **arrays | extra)
    return path


@contextmanager
def skip_without_opengl():
    try:
        yield
    except (video.Unusable, SystemExit) as error:
        if "no OpenGL" in str(error):
            pytest.skip("no OpenGL")
        raise


def change(run: Path, **arrays) -> Path:
    """Arrays of eval.npz replaced; None: left out."""
    data = dict(np.load(run / "eval.npz")) | arrays
    np.savez_compressed(run / "eval.npz", **{k: x for k, x in data.items() if x is not None})
    return run


def error(run: Path, **options) -> str:
    with pytest.raises(SystemExit) as caught:
        video.main(video.Options(run, **options))
    message = str(caught.value)
    assert message.startswith("video.py: error: ") and "\n" not in message
    return message


@pytest.mark.parametrize("per_episode", [False, True])
@pytest.mark.parametrize("env_id", ["point-goal-4c", "walker-params-4c", "ml2"])
def test_the_replay_is_the_evaluation(tmp_path, env_id, per_episode):
    run = make_run(tmp_path / "run", env_id, per_episode=per_episode)
    data = dict(np.load(run / "eval.npz"))
    env = gym.make_vec(env_id, num_envs=len(data["params"]), horizon=H).unwrapped
    steps = list(video.replay(env, data))
    assert [(k, t) for k, t, _ in steps] == [(k, t) for k in range(2) for t in range(H + 1)]
    assert np.allclose([steps[H][2], steps[-1][2]], data["reward"].sum(1), atol=1e-9)


def test_the_first_state_of_a_later_episode_may_be_another(tmp_path):
    """Where the agent is shown the last state of the episode before (--keep-terminal)."""
    run = make_run(tmp_path / "run")
    trace = np.load(run / "eval.npz")["trace"]
    trace[1, 0] = trace[0, -1]
    video.main(video.Options(change(run, trace=trace)))


def test_film_of_the_point(tmp_path):
    q = np.tile(np.eye(4)[[2]], (2, H + 1, 32, 1))
    run = make_run(tmp_path / "run", script="milet", cluster_belief=q)
    video.main(video.Options(run))
    film = Image.open(run / "figures" / "video.gif")
    assert film.size == (4 * video.SIZE, video.CAPTION + video.SIZE)
    assert film.n_frames == 2 * (H // 2 + 1) and film.info["loop"] == 0
    film.seek(film.n_frames - 1)
    last = np.asarray(film.convert("RGB")).astype(int)
    goal = np.load(run / "eval.npz")["params"][:4]
    for i, (x, y) in enumerate(goal):  # red where the goal is, in every panel
        x, y = (round((100 + 40 * z) * video.SIZE / 200) for z in (x, -y))
        assert np.abs(last[video.CAPTION + y, i * video.SIZE + x] - [200, 0, 0]).max() < 40
    colour = np.round(255 * np.array(video.CLUSTER_COLOURS[2]))
    square = last[: video.CAPTION, : video.SIZE].reshape(-1, 3)
    assert (square == colour).all(1).sum() > 40, "the colour of the inferred cluster, above its picture"


def test_the_colours_of_clusters_are_exact(tmp_path):
    """Among many others, also near to theirs: orange must not become the red of a goal."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(256, size=(video.SIZE, video.SIZE, 3), dtype=np.uint8))
    captions = [[("A", colour) for colour in video.CLUSTER_COLOURS[n : n + 4]] for n in (0, 4, 8)]
    video.write_gif([video.captioned([noise] * 3, captions)] * 2, [20, 20], tmp_path / "film.gif")
    shown = np.asarray(Image.open(tmp_path / "film.gif").convert("RGB"))[: video.CAPTION].reshape(-1, 3)
    for colour in np.round(255 * np.array(video.CLUSTER_COLOURS)):
        assert (shown == colour).all(1).sum() >= 81, colour


def test_a_film_of_chosen_tasks(tmp_path, monkeypatch):
    """In the order given, to a file of one's choice; inferred clusters have letters, for their order means nothing."""
    run = make_run(tmp_path / "run", cluster_belief=np.tile(np.eye(4)[[2]], (2, H + 1, 32, 1)))
    calls = spy_on(monkeypatch, video, "captioned")
    video.main(video.Options(run, tmp_path / "new" / "film.gif", (6, 3)))
    assert Image.open(tmp_path / "new" / "film.gif").size[0] == 2 * video.SIZE and not (run / "figures").exists()
    (_, captions), _ = calls[0]
    shown = [[text for text, _ in lines] for lines in captions]
    assert [lines[0] for lines in shown] == ["task 6, true cluster 2", "task 3, true cluster 3"]
    assert {lines[-1] for lines in shown} == {"inferred: C (1.00)"}
    assert "--tasks are numbers of held-out tasks, 0 to 31" in error(run, tasks=(0, 32))


def test_long_films_leave_frames_out(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "FRAMES", 6)
    run = make_run(tmp_path / "run", episodes=3)
    video.main(video.Options(run))
    assert Image.open(run / "figures" / "video.gif").n_frames == 3 * 3
    monkeypatch.setattr(video, "BYTES", 1000)
    video.main(video.Options(run))
    assert Image.open(run / "figures" / "video.gif").n_frames == 2


@pytest.mark.parametrize("env_id", ["ant-goal-4c", "ml2", "cheetah-vel", "ant-4m", "reacher-4m"])
def test_film_of_robots(tmp_path, env_id):
    run = make_run(tmp_path / "run", env_id)
    with skip_without_opengl():
        video.main(video.Options(run))
    film = Image.open(run / "figures" / "video.gif")
    panels = {"ml2": 2}.get(env_id, 4)
    assert film.size[0] == panels * video.SIZE
    picture = np.asarray(film.convert("RGB")).astype(int)
    for i in range(panels):
        panel = picture[video.CAPTION :, i * video.SIZE : (i + 1) * video.SIZE]
        red = (panel[..., 0] > 120) & (panel[..., 1:].max(-1) < 90)
        assert 4 < red.sum() < 2000, "the goal, direction or velocity"


def test_robots_stay_in_view_whatever_their_masses():
    """The tracking camera of the model goes by masses that a task scales."""
    env = gym.make_vec("walker-params-4c", num_envs=32).unwrapped
    env.reset(seed=0, options={"tasks": env.task_set("test")})
    with skip_without_opengl():
        camera = video.Camera(env)
    pictures = np.stack([np.asarray(camera.picture(i)) for i in range(8)]).astype(int)
    camera.close()
    robot = (pictures[..., 0] > pictures[..., 1] + 20).sum((1, 2))  # its colours, on grey and blue
    assert (robot > 300).all()


def test_without_opengl_there_is_one_line(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", "cheetah-vel")
    monkeypatch.setattr(video, "TRY_OPENGL", "raise SystemExit(1)")
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    assert "no OpenGL to render with (tried egl, osmesa, glfw): install libegl1 or libosmesa6" in error(run)
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    assert "(tried osmesa)" in error(run)
    assert not (run / "figures").exists()


class NoPicture(envs.TaskVectorEnv):
    obs_dim, action_dim, task_dim, dt = 2, 1, 1, 0.1

    def draw(self, cluster, rng):
        return rng.uniform(size=(len(cluster), 1))

    def reset_state(self, ids):
        pass

    def advance(self, ids, action):
        pass

    def observation(self):
        return np.zeros((self.num_envs, 2))

    def reward(self, action):
        return np.zeros(self.num_envs)


def test_bad_input_gets_one_line(tmp_path):
    run = make_run(tmp_path / "run")
    whole = dict(np.load(run / "eval.npz"))
    moved = whole["trace"].copy()
    moved[1, 5, 3] += 0.01
    for arrays, expected in (
        (dict(trace=moved), "leaves the recorded trace in step 5 of episode 2"),
        (dict(seed=8 + np.arange(3)), "not those of the same episodes"),
        (dict(seed=7.5), "seed is not made of natural numbers"),
        (dict(seed=-7), "seed is not made of natural numbers"),
        (dict(trace=whole["trace"][:, 1:]), "not those of the same episodes"),
        (dict(action=whole["action"][..., :1]), "action has shape"),
        (dict(action=None, seed=None), "has no action and no seed: it cannot be replayed"),
        (dict(cluster_belief=np.ones((2, H, 32, 4))), "cluster_belief has shape"),
    ):
        assert expected in error(change(run, **whole | arrays))
    (run / "eval.npz").write_bytes(b"PK")
    assert "eval.npz is damaged" in error(run)
    (run / "eval.npz").unlink()
    assert "has no eval.npz; nor agent.pt: train it again" in error(run)
    (run / "agent.pt").touch()
    assert f"--evaluate {run} writes it" in error(run)
    assert "is not a run folder: it has no args.json" in error(tmp_path)
    assert "has no robot to be filmed" in error(make_toy(tmp_path / "toy"))
    supervised = make_run(tmp_path / "images", script="mmaml_classification")
    (supervised / "args.json").write_text('{"script": "mmaml_classification", "env": "drawn-3m", "shots": 1}')
    assert "has no robot to be filmed" in error(supervised)
    envs.register("test-no-picture", NoPicture)
    assert "cannot be rendered" in error(make_run(tmp_path / "other", "test-no-picture"))


def test_from_the_command_line(tmp_path):
    run = make_run(tmp_path / "run")
    done = subprocess.run([sys.executable, str(VIDEO), str(run)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{run / 'figures' / 'video.gif'} (") and not done.stderr
