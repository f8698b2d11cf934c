"""What an agent does, as a film: side by side a held-out task of every true cluster (of one cluster, four of them).

    python results/video.py RUN               RUN/figures/video.gif
    python results/video.py RUN --tasks 3 7 --out FILE.gif

Of the scripts whose eval.npz holds actions: milet.py, varibad.py, rl2.py, pearl.py, sop.py, metacure.py.
The actions that the last evaluation wrote into eval.npz are taken again, from the same starts; so the film shows the
very episodes of its returns, and needs no weights. Goals, directions and velocities are drawn in red. Robots are
rendered by OpenGL, without a display too: through EGL or OSMesa (MUJOCO_GL chooses).
"""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mujoco
import numpy as np
import tyro
from mujoco.rendering.classic import gl_context
from PIL import Image, ImageDraw, ImageFont
from plot import CLUSTER_COLOURS, Unusable, has_column, is_supervised, make_env, no_arrays, read_args, read_arrays

import envs

SIZE, CAPTION = 180, 62  # pixels of a panel, and of the text above it
FRAMES, BYTES = 100, 4_000_000  # at most, about
RED = np.array([0.85, 0.1, 0.1, 1], np.float32)
TRY_OPENGL = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>'), 8, 8).close()"


@dataclass
class Options:
    run: tyro.conf.Positional[Path]  # run folder
    out: Path | None = None  # the file; default: figures/video.gif in the run folder
    tasks: tuple[int, ...] = ()  # which of the held-out tasks, from 0; default: the first of every true cluster


# == Replay ============================================================================================================


def replay(env: envs.TaskVectorEnv, data: dict[str, np.ndarray]) -> Iterator[tuple[int, int, np.ndarray]]:
    """Episode, step, and the returns so far [task]; meanwhile env stands at that step.

    Where one seed is recorded, the later episodes go on from the first, in the same tasks; else each has its own.
    """
    tasks = envs.Tasks(data["params"], data["cluster"])
    for k, actions in enumerate(data["action"]):
        if k == 0 or data["seed"].ndim:
            env.reset(seed=int(np.atleast_1d(data["seed"])[k]), options={"tasks": tasks})
        else:
            env.reset()
        returns = np.zeros(len(tasks))
        yield k, 0, returns
        for t, action in enumerate(actions, start=1):
            obs, reward, *_ = env.step(action)
            if np.abs(obs[:, :2] - data["trace"][k, t]).max() > 1e-4:
                raise Unusable(
                    f"the replay leaves the recorded trace in step {t} of episode {k + 1}: "
                    "evaluate the run again (--evaluate) on this machine"
                )
            returns = returns + reward
            yield k, t, returns


# == Rendering =========================================================================================================


def choose_opengl() -> None:
    """Tells MuJoCo which OpenGL to use. Tried out in other processes, for some of them abort."""
    if "MUJOCO_GL" in os.environ or sys.platform != "linux":
        names = [os.environ.get("MUJOCO_GL", "")]
    else:
        names = ["egl", "osmesa", "glfw"]
    for name in names:
        environment = os.environ | ({"MUJOCO_GL": name} if name else {})
        if subprocess.run([sys.executable, "-c", TRY_OPENGL], env=environment, capture_output=True).returncode == 0:
            if name in ("egl", "osmesa", "glfw"):
                gl_context.GLContext = importlib.import_module(f"mujoco.{name}").GLContext
            return
    raise Unusable(
        f"no OpenGL to render with (tried {', '.join(filter(None, names)) or 'the default'}): install libegl1 or "
        "libosmesa6, or set MUJOCO_GL"
    )


class Camera:
    """Renders single copies of an environment, with what their tasks ask for."""

    def __init__(self, env: envs.TaskVectorEnv):
        self.env, self.renderers = env, {}
        if any(isinstance(robot, envs.MujocoVectorEnv) for robot in (env, *getattr(env, "parts", ()))):
            choose_opengl()

    def picture(self, i: int) -> Image.Image:
        """Copy i, [SIZE, SIZE]."""
        robot = self.env
        if hasattr(robot, "parts"):  # several robots: the first parameter of a task says which
            robot = robot.parts[int(robot.tasks.params[i, 0])]
        if not isinstance(robot, envs.MujocoVectorEnv):
            try:
                return Image.fromarray(robot.render()[i]).resize((SIZE, SIZE))
            except NotImplementedError:
                raise Unusable(f"{type(robot).__name__} cannot be rendered") from None
        if robot not in self.renderers:
            self.renderers[robot] = mujoco.Renderer(robot.model, SIZE, SIZE)
        renderer, model, data = self.renderers[robot], robot.batch.get_model(i), robot.batch.get_data(i)
        mujoco.mj_forward(model, data)
        params, torso = robot.tasks.params[i], data.xpos[1]  # body 0 is the world
        farthest = np.linalg.norm(robot.tasks.params[:, :2], axis=1).max()
        view = above_all_goals(farthest) if robot.task_is == "goal" else beside(torso, steep=len(params) == 2)
        renderer.update_scene(data, camera=view)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            renderer.scene.flags[flag] = False
        if robot.task_is == "goal":
            disc = add_geom(renderer.scene, mujoco.mjtGeom.mjGEOM_CYLINDER)
            disc.pos, disc.size = (*params[:2], farthest / 100), farthest / 100 * np.array([12, 12, 1])
        elif robot.task_is:
            start = torso + [0, 0, 0.7]
            along = 0.6 * np.pad(params[:2].astype(float), (0, 3 - len(params[:2])))
            arrow = add_geom(renderer.scene, mujoco.mjtGeom.mjGEOM_ARROW)
            mujoco.mjv_connector(arrow, mujoco.mjtGeom.mjGEOM_ARROW, 0.05, start, start + along)
        return Image.fromarray(renderer.render())

    def close(self) -> None:
        for renderer in self.renderers.values():
            renderer.close()


def above_all_goals(farthest: float) -> mujoco.MjvCamera:
    """x to the right, y up."""
    return free_camera(np.zeros(3), 3.3 * farthest, elevation=-60)


def beside(torso: np.ndarray, steep: bool) -> mujoco.MjvCamera:
    """x to the right, y to the back. Not the model's own camera: scaled masses mislead that."""
    return free_camera(np.array([*torso[:2], 0.8]), 4.0, elevation=-35 if steep else -12)


def free_camera(lookat: np.ndarray, distance: float, elevation: float) -> mujoco.MjvCamera:
    camera = mujoco.MjvCamera()
    camera.lookat, camera.distance, camera.azimuth, camera.elevation = lookat, distance, 90, elevation
    return camera


def add_geom(scene: mujoco.MjvScene, kind: mujoco.mjtGeom) -> mujoco.MjvGeom:
    geom = scene.geoms[scene.ngeom]
    mujoco.mjv_initGeom(geom, kind, np.full(3, 0.1), np.zeros(3), np.eye(3).ravel(), RED)
    geom.emission = 0.6  # red in the dark too
    scene.ngeom += 1
    return geom


# == The film ==========================================================================================================


def captioned(pictures: list[Image.Image], captions: list[list[tuple[str, tuple | None]]]) -> Image.Image:
    """Pictures side by side, above each its lines of text, and a square of a colour before those that have one."""
    frame = Image.new("RGB", (SIZE * len(pictures), CAPTION + SIZE), "white")
    pen, font = ImageDraw.Draw(frame), ImageFont.load_default(size=11)
    for i, (picture, lines) in enumerate(zip(pictures, captions)):
        frame.paste(picture, (SIZE * i, CAPTION))
        pen.rectangle((SIZE * i, CAPTION, SIZE * (i + 1) - 1, CAPTION + SIZE - 1), outline="white", width=2)
        for n, (text, colour) in enumerate(lines):
            x, y = SIZE * i + 6, 2 + 14 * n
            if colour:
                pen.rectangle((x, y + 3, x + 8, y + 11), fill=tuple(round(255 * c) for c in colour))
            pen.text((x + 13 * bool(colour), y), text, fill="black", font=font)
    return frame


def first_tasks(cluster: np.ndarray) -> list[int]:
    """The first task of every cluster [task]; of one cluster, four of them."""
    found = [int(np.flatnonzero(cluster == m)[0]) for m in np.unique(cluster)]
    return found if len(found) > 1 else list(range(min(4, len(cluster))))


def film(
    env: envs.TaskVectorEnv, data: dict[str, np.ndarray], chosen: list[int]
) -> tuple[list[Image.Image], list[int]]:
    """Episode after episode: the frames, and how many milliseconds each stays; the last of an episode for a second."""
    episodes, horizon = data["action"].shape[:2]
    every = max(2, -(-episodes * horizon // FRAMES))
    camera, frames, stay = Camera(env), [], []
    for k, t, returns in replay(env, data):
        if t % every and t < horizon:
            continue
        captions = []
        for i in chosen:
            cluster = f", true cluster {data['cluster'][i]}" if data["cluster"].any() else ""
            lines = [(f"task {i}{cluster}", None), (f"episode {k + 1}, step {t}", None)]
            lines += [(f"return so far {returns[i]:.1f}", None)]
            if "cluster_belief" in data:
                q = data["cluster_belief"][k, t, i]
                letter = chr(ord("A") + q.argmax())  # a number would look like that of a true cluster
                lines += [(f"inferred: {letter} ({q.max():.2f})", CLUSTER_COLOURS[q.argmax() % 10])]
            captions.append(lines)
        frames.append(captioned([camera.picture(i) for i in chosen], captions))
        stay.append(1000 if t == horizon else max(20, round(1000 * env.dt * every)))
    camera.close()
    return frames, stay


def write_gif(frames: list[Image.Image], stay: list[int], path: Path) -> None:
    """With the colours of all frames and exactly those of clusters, and half of the frames where it would be large."""
    width, height = frames[0].size
    some = frames[:: max(1, len(frames) // 8)]
    montage = Image.new("RGB", (width, height * len(some)))
    for n, frame in enumerate(some):
        montage.paste(frame, (0, height * n))
    palette = montage.quantize(128 - len(CLUSTER_COLOURS))
    exact = [round(255 * c) for colour in CLUSTER_COLOURS for c in colour]
    palette.putpalette(palette.getpalette()[: 3 * (128 - len(CLUSTER_COLOURS))] + exact)
    small = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    small[0].save(path, "GIF", save_all=True, append_images=small[1:], duration=stay, loop=0)
    if path.stat().st_size > BYTES and len(frames) > 2:
        write_gif(frames[::2], [sum(stay[n : n + 2]) for n in range(0, len(stay), 2)], path)


def render(options: Options) -> None:
    args = read_args(options.run)
    path = options.run / "eval.npz"
    if is_supervised(args) or has_column(options.run / "eval.csv", "eval/distance_"):
        raise Unusable(f"{options.run} is of {args['script']}.py, which has no robot to be filmed")
    if not path.is_file():
        raise Unusable(no_arrays(options.run, args))
    data = read_arrays(path, make_env(args))
    if missing := sorted({"action", "seed"} - data.keys()):
        raise Unusable(f"{path} has no {' and no '.join(missing)}: it cannot be replayed")
    episodes, horizon, tasks, _ = data["action"].shape
    if data["trace"].shape[1] != horizon + 1 or data["seed"].shape not in ((), (episodes,)):
        raise Unusable(f"{path}: action, trace and seed are not those of the same episodes")
    if not np.issubdtype(data["seed"].dtype, np.integer) or (data["seed"] < 0).any():
        raise Unusable(f"{path}: seed is not made of natural numbers")
    if not set(options.tasks) <= set(range(tasks)):
        raise Unusable(f"--tasks are numbers of held-out tasks, 0 to {tasks - 1}")
    env = make_env(args, num_envs=tasks, horizon=horizon, render_mode="rgb_array")
    frames, stay = film(env, data, list(options.tasks) or first_tasks(data["cluster"]))
    out = options.out or options.run / "figures" / "video.gif"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_gif(frames, stay, out)
    print(f"{out} ({out.stat().st_size / 1e6:.1f} MB)")


def main(options: Options) -> None:
    try:
        render(options)
    except (Unusable, OSError) as error:
        raise SystemExit(f"video.py: error: {' '.join(str(error).split())}") from None


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
