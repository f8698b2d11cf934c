"""MMAML's classification: the data sets' own formats, made small; networks, gradients, and what it learns."""

import csv
import dataclasses
import json
import math
import pickle
import struct
from pathlib import Path

import mmaml_classification as few
import numpy as np
import pytest
import torch
from conftest import train
from PIL import Image
from torch import nn
from torch.nn import functional as F

import envs

SMALL = dict(channels=(4, 5), embedding=6, img_size=8, ways=3, horizon=4, tasks=4, inner_steps=2, alpha=0.1)
FORMS = [dict(modulation="film"), dict(modulation="softmax"), dict(modulation="sigmoid"), dict(modulation="none")]
FROZEN = dict(bn_frozen_support=True)


def small_args(**kwargs) -> few.Args:
    return few.Args(**(SMALL | dict(num_threads=1) | kwargs))


@pytest.fixture
def double():
    """Float64, where finite differences are sharp."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_agent(args: few.Args, learners: int = 1) -> nn.ModuleDict:
    """With biases that are not 0."""
    agent = few.make_agent(args, learners)
    for p in agent.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return agent


def make_images(tasks: int = 4, each: int = 1, ways: int = 3) -> few.Images:
    y = torch.arange(ways).repeat_interleave(each).expand(tasks, -1)
    return few.Images(torch.rand(tasks, ways * each, 3, 8, 8), y)


def query_loss(agent: nn.ModuleDict, support: few.Images, query: few.Images, args: few.Args) -> torch.Tensor:
    """The objective, Eq. (5)."""
    _, tau = few.modulation_of(agent, support)
    theta = few.adapt(agent["theta"][0], tau, support, args.inner_steps, args)[-1]
    return few.loss_of(few.predict(theta, query.x, tau, args, support.x), query.y).mean()


def read(path) -> list[dict[str, float]]:
    with path.open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


# -- the data sets' formats --------------------------------------------------------------------------------------------


def save_image(path: Path, image: np.ndarray, **kwargs) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **kwargs)


def make_omniglot(root: Path) -> None:
    """24 characters of 4 drawings: 1-bit, 105 x 105, a black stroke on white; and copies of 12, to be left out."""
    for folder in ("images_background", "images_background_small1", "images_evaluation"):
        for alphabet in ("Braille", "Tengwar"):
            for character in range(1, 7):
                for drawing in range(1, 5):
                    image = np.full((105, 105), True)
                    image[10 * character : 10 * character + 12, 20:80] = False
                    name = f"{character:04}_{drawing:02}.png"
                    save_image(root / "omniglot-py" / folder / alphabet / f"character{character:02}" / name, image)


def make_mini_imagenet(root: Path, ragged: bool = False) -> None:
    for first, part in enumerate(("train", "val", "test")):
        rows = ["filename,label"]
        for k in range(3):
            label = f"n0{first}{k:06}"
            for i in range(4 if not ragged or k else 3):
                name = f"{label}{i:08}.jpg"
                save_image(root / "miniimagenet" / "images" / name, np.full((84, 84, 3), 60 * k + i, np.uint8))
                rows.append(f"{name},{label}")
        (root / "miniimagenet" / f"{part}.csv").write_text("\n".join(rows) + "\n")


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, content):
        size = len(content)
        short = pickle.SHORT_BINSTRING + bytes([size]) if size < 256 else pickle.BINSTRING + struct.pack("<i", size)
        self.write(short + content)
        self.memoize(content)

    dispatch[bytes] = save_bytes


def make_fc100(root: Path) -> None:
    """Three fine labels of a superclass of each part; two images each in CIFAR's own train and test files."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for name in ("train", "test"):
        labels = [(fine, coarse) for coarse in (1, 8, 0) for fine in range(5 * coarse, 5 * coarse + 3) for _ in "ab"]
        planes = [np.repeat([fine, 100 + fine, 250], 1024) for fine, _ in labels]  # R, then G, then B
        fine, coarse = map(list, zip(*labels))
        content = {b"data": np.array(planes, np.uint8), b"fine_labels": fine, b"coarse_labels": coarse}
        with (folder / name).open("wb") as file:
            Python2Pickler(file, protocol=2).dump(content)
        pickled = (folder / name).read_bytes()
        (folder / name).write_bytes(pickled.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))


def make_cub(root: Path) -> None:
    """20 folders of images of many sizes, some of them grey."""
    for k in range(1, 21):
        for i in range(4):
            shape = (40 + k, 30 + i) if i == 3 else (40 + k, 30 + i, 3)
            name = f"{k:03}.Bird_{k}/Bird_{k}_{i:04}_{1000 * k + i}.jpg"
            save_image(root / "CUB_200_2011" / "images" / name, np.full(shape, 10 * k, np.uint8))


VARIANTS = ["F/A-18", "F-16A/B", "707-320", "Boeing 717", *(f"A3{n}" for n in range(10, 26))]


def make_aircraft(root: Path) -> None:
    """20 variants, with slashes and spaces in names; four images each in two lists."""
    data = root / "fgvc-aircraft-2013b" / "data"
    lists = {"trainval": [], "test": []}
    for k, variant in enumerate(VARIANTS):
        for i in range(4):
            number = f"{1000000 + 10 * k + i}"
            save_image(data / "images" / f"{number}.jpg", np.full((60, 90 + k, 3), 12 * k, np.uint8))
            lists["trainval" if i < 3 else "test"].append(f"{number} {variant}")
    (data / "variants.txt").write_text("\n".join(VARIANTS) + "\n")
    for name, lines in lists.items():
        (data / f"images_variant_{name}.txt").write_text("\n".join(lines) + "\n")


MAKERS = {few.omniglot: make_omniglot, few.mini_imagenet: make_mini_imagenet, few.fc100: make_fc100,
          few.cub: make_cub, few.aircraft: make_aircraft}  # fmt: skip
SIZES = {
    "omniglot": (16, 2, 6),
    "mini_imagenet": (3, 3, 3),
    "fc100": (3, 3, 3),
    "cub": (14, 3, 3),
    "aircraft": (14, 3, 3),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for make in MAKERS.values():
        make(folder)
    return folder


@pytest.mark.parametrize("reader", MAKERS, ids=lambda r: r.__name__)
def test_classes_of_the_splits(reader, root, monkeypatch):
    parts = reader(root)
    assert tuple(map(len, parts.values())) == SIZES[reader.__name__] and [*parts] == ["train", "val", "test"]
    names = [name for classes in parts.values() for name in classes]
    assert len(names) == len(set(names))
    assert all(len(images) == 4 for classes in parts.values() for images in classes.values())
    glob, iterdir = Path.glob, Path.iterdir
    monkeypatch.setattr(Path, "glob", lambda *a: sorted(glob(*a), reverse=True))
    monkeypatch.setattr(Path, "iterdir", lambda *a: sorted(iterdir(*a), reverse=True))
    again = reader(root)  # from a file system that lists in another order
    assert {part: [*classes] for part, classes in again.items()} == {part: [*c] for part, c in parts.items()}
    if reader is not few.fc100:
        assert again == parts


def test_both_turns_of_a_digit_are_in_one_part(root):
    parts = [{name.split()[0] for name in classes} for classes in few.digits(root).values()]
    assert [len(part) for part in parts] == [4, 3, 3] and len(set.union(*parts)) == 10


DRAWN = {few.digits: (8, 6, 6), few.letters: (33, 7, 7), few.gratings: (42, 9, 9)}


@pytest.mark.parametrize("reader", DRAWN, ids=lambda r: r.__name__)
def test_drawn_classes(reader, root):
    parts = reader(root)
    assert tuple(map(len, parts.values())) == DRAWN[reader]
    classes = [images for part in parts.values() for images in part.values()]
    assert all(len(images) >= 40 for images in classes)
    means = np.array([np.mean(images, 0) for images in classes]).reshape(len(classes), -1)
    apart = np.abs(means[:, None] - means[None]).mean(-1)[~np.eye(len(classes), dtype=bool)]
    assert apart.min() > 0.2, "no two classes are one"


@pytest.mark.parametrize("reader", [*MAKERS, few.digits, few.letters, few.gratings], ids=lambda r: r.__name__)
def test_a_task(reader, root):
    args = few.Args(ways=2, horizon=3, data=str(root))
    data = few.DataSet(reader, args)
    tasks = envs.Tasks(np.array([[0.0, 5.0], [0.0, 6.0]]), np.zeros(2, int))
    for part in ("train", "val", "test"):
        (support, query), again = (few.draw_images(tasks, [data], part, args) for _ in range(2))
        assert support.x.shape == (2, 2, 3, 84, 84) and query.x.shape == (2, 4, 3, 84, 84)
        first = data.draw(5, part, args)[1, 2]  # the second class's last image
        np.testing.assert_allclose(query.x[0, 3], first.transpose(2, 0, 1) / 255, atol=1e-6)
        assert 0 <= query.x.min() and query.x.max() <= 1 and query.x.max() > 0.02
        assert support.y.tolist() == [[0, 1]] * 2 and query.y.tolist() == [[0, 0, 1, 1]] * 2
        assert torch.equal(again[0].x, support.x) and torch.equal(again[1].x, query.x)


def first_image(reader, root, part, number, size=84) -> np.ndarray:
    return few.DataSet(reader, few.Args(ways=2, horizon=3, data=str(root), img_size=size)).image(part, number, 0)


def test_resizing_is_bilinear():
    """A white column beside a black one: bilinear makes grey between them, the nearest pixel does not."""
    data = few.DataSet.__new__(few.DataSet)
    data.name, data.size, data.cache = "halves", 8, {}
    data.classes = dict(train=[[np.array([[0, 255], [0, 255]], np.uint8)]])
    assert (np.diff(data.image("train", 0, 0)[0, :, 0].astype(int)) >= 0).all()
    assert 0 < data.image("train", 0, 0)[0, 3, 0] < 128 < data.image("train", 0, 0)[0, 4, 0] < 255


def test_strokes_of_omniglot_are_bright(root):
    image = first_image(few.omniglot, root, "train", 0)
    assert image.shape == (84, 84, 3) and image[:, 80].max() == 0 and image.max() == 255
    assert (image == image[..., :1]).all() and 0.05 < (image > 128).mean() < 0.2


def test_pixels_of_fc100_survive(root):
    data = few.DataSet(few.fc100, few.Args(ways=2, horizon=3, data=str(root)))
    for part, fines in dict(train=(5, 6, 7), val=(40, 41, 42), test=(0, 1, 2)).items():
        colours = {tuple(int(v) for v in data.image(part, k, 0)[40, 40]) for k in range(3)}
        assert colours == {(fine, 100 + fine, 250) for fine in fines}


def test_grey_birds_are_grey_in_three_channels(root):
    parts = few.cub(root)
    (name, paths), *_ = parts["train"].items()
    value = 10 * int(name[:3])
    data = few.DataSet(few.cub, few.Args(ways=2, horizon=3, data=str(root)))
    for i in range(4):
        assert (np.abs(data.image("train", 0, i).astype(int) - value) <= 3).all(), paths[i]


def test_variants_with_a_slash_are_in_their_own_part(root):
    names = [*VARIANTS]
    np.random.RandomState(123).shuffle(names)
    parts = few.aircraft(root)
    assert [[*classes] for classes in parts.values()] == [names[:14], names[14:17], names[17:]]
    for classes in parts.values():
        for name, paths in classes.items():
            k = VARIANTS.index(name)
            assert sorted(path.stem for path in paths) == [f"{1000000 + 10 * k + i}" for i in range(4)]


REAL = {few.omniglot: (1100, 100, 423), few.cub: (140, 30, 30), few.aircraft: (70, 15, 15)}


@pytest.mark.parametrize("reader", REAL, ids=lambda r: r.__name__)
def test_parts_of_the_real_sizes(monkeypatch, tmp_path, reader):
    names = {f"{k:04}": [] for k in range(sum(REAL[reader]))}
    monkeypatch.setattr(few, "folders", lambda *_: names)
    monkeypatch.setattr(Path, "read_text", lambda path: "\n".join(names) if path.name == "variants.txt" else "")
    assert tuple(len(classes) for classes in reader(tmp_path).values()) == REAL[reader]


def test_images_of_a_task_differ_and_classes_are_drawn(root):
    """Every image of mini_imagenet has a grey of its own; classes come in all orders."""
    args = few.Args(ways=3, horizon=4, data=str(root), img_size=2)
    data, orders = few.DataSet(few.mini_imagenet, args), set()
    for seed in range(40):
        grey = data.draw(seed, "train", args)[..., 0, 0, 0].astype(int)
        assert len(np.unique(grey)) == 12 and (np.ptp(grey // 60, axis=1) == 0).all()
        orders.add(tuple(grey[:, 0] // 60))
    assert len(orders) == 6


def test_characters_are_turned_as_a_class(root):
    args = few.Args(ways=2, horizon=4, data=str(root), img_size=21)
    data, turned = few.DataSet(few.omniglot, args), set()
    for seed in range(30):
        for character in data.draw(seed, "test", args)[..., 0] > 128:
            assert (character == character[0]).all()
            rows, columns = np.nonzero(character[0])
            lies, early = np.ptp(columns) > np.ptp(rows), (rows.mean(), columns.mean()) < (9.5, 9.5)
            turned.add((bool(lies), bool(early)))
    assert len(turned) >= 3
    letters = few.DataSet(few.letters, args)
    known = [[letters.image("val", k, i) for i in range(len(c))] for k, c in enumerate(letters.classes["val"])]
    for images in letters.draw(3, "val", args):  # only characters are turned
        assert any(all(any(np.array_equal(x, y) for y in images_of) for x in images) for images_of in known)


ERRORS = {
    "nothing there": (lambda root: None, "read from miniimagenet/{train,val,test}/CLASS/IMAGE, or"),
    "a list without its columns": (lambda root: (root / "miniimagenet" / "val.csv").write_text("a,b\nc,d\n"), "label"),
    "an empty list": (lambda root: (root / "miniimagenet" / "val.csv").write_text(""), "val has 0 classes and needs 1"),
    "a list whose images are elsewhere": (
        lambda root: (root / "miniimagenet" / "images").rename(root / "images"),
        "FileNotFoundError: ",
    ),
    "too few images": (
        lambda root: make_mini_imagenet(root, ragged=True),
        "train, n00000000 has 3 images, and --horizon needs 4",
    ),
    "too few classes": (lambda root: keep_lines(root, "test", 5), "test has 1 classes and needs 2"),
}


def keep_lines(root: Path, part: str, count: int) -> None:
    """Of a list of mini_imagenet; a class has four, and the first line names the columns."""
    path = root / "miniimagenet" / f"{part}.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))


@pytest.mark.parametrize("case", ERRORS)
def test_what_is_missing_gets_one_line_with_the_layout(tmp_path, case):
    spoil, words = ERRORS[case]
    if case != "nothing there":
        make_mini_imagenet(tmp_path)
    spoil(tmp_path)
    with pytest.raises(SystemExit) as caught:
        few.DataSet(few.mini_imagenet, few.Args(ways=2, horizon=4, data=str(tmp_path)))
    message = str(caught.value)
    start = "mmaml_classification.py: error: mini_imagenet, read from miniimagenet/"
    assert message.startswith(start) and words in message and "\n" not in message


def test_one_validation_class_is_enough_but_then_there_is_no_validation_score(tmp_path):
    make_mini_imagenet(tmp_path)
    args = small_args(data=str(tmp_path), ways=2, eval_episodes=2)
    tasks, agent = envs.ENVIRONMENTS["mini-imagenet"]().task_set("test")[:2], few.make_agent(args, 1)
    assert "eval/validation_step_2" in few.evaluate(tasks, [few.DataSet(few.mini_imagenet, args)], agent, args)[0]
    keep_lines(tmp_path, "val", 5)
    metrics, _ = few.evaluate(tasks, [few.DataSet(few.mini_imagenet, args)], agent, args)
    assert "eval/return_step_2" in metrics and not any("validation" in name for name in metrics)


def test_a_damaged_image_is_named(tmp_path):
    make_cub(tmp_path)
    for path in tmp_path.rglob("*.jpg"):
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(SystemExit, match=r"error: an image of cub, .*Bird_\d+_000\d_\d+\.jpg: OSError: "):
        first_image(few.cub, tmp_path, "train", 0)


def test_empty_lines_of_a_list_are_no_variants(tmp_path):
    make_aircraft(tmp_path)
    before = few.aircraft(tmp_path)
    for path in (tmp_path / "fgvc-aircraft-2013b" / "data").glob("*.txt"):
        path.write_text(path.read_text() + "\n\n")
    assert few.aircraft(tmp_path) == before


def test_mini_imagenet_may_be_in_folders_and_what_else_lies_there_is_left_out(root, tmp_path):
    """As the official code reads it: the same classes, of the same images, as by lists."""
    lists = few.mini_imagenet(root)
    for part, classes in lists.items():
        for name, images in classes.items():
            for image in images:
                copy = tmp_path / "miniimagenet" / part / name / image.name
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(image.read_bytes())
    (tmp_path / "miniimagenet" / "train" / ".ipynb_checkpoints").mkdir()
    assert few.folders(tmp_path, "*/*/*").keys() == {f"miniimagenet/{p}/{name}" for p in lists for name in lists[p]}
    for stray in (".DS_Store", "._1.jpg", "Thumbs.db"):
        (copy.parent / stray).touch()
    found = few.mini_imagenet(tmp_path)
    for part, classes in lists.items():
        assert [*found[part]] == sorted(classes), "in an order that no file system has a part in"
        for name, images in classes.items():
            assert [image.name for image in found[part][name]] == [image.name for image in images]


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_the_data_may_have_moved_when_a_run_goes_on(tmp_path, flag):
    stored = {"script": "mmaml_classification"} | dataclasses.asdict(few.Args(env="drawn-3m", preset="fast"))
    (tmp_path / "args.json").write_text(json.dumps(stored))
    assert few.parse_args([flag, str(tmp_path), "--data", "elsewhere"]).data == "elsewhere"
    with pytest.raises(SystemExit, match="--ways cannot change on an existing run"):
        few.parse_args([flag, str(tmp_path), "--ways", "3"])


@pytest.mark.parametrize("reader", MAKERS, ids=lambda r: r.__name__)
def test_no_data_gets_one_line(tmp_path, reader):
    args = few.Args(env=reader.__name__.replace("_", "-"), data=str(tmp_path), run_dir=str(tmp_path / "runs"))
    with pytest.raises(SystemExit, match=rf"error: {reader.__name__}, read from .* \(--data {tmp_path}\): "):
        few.train(args, few.Run(args))
    assert not (tmp_path / "runs").exists(), "nothing was begun"


def test_a_data_file_runs_no_code(tmp_path):
    class Malice:
        def __reduce__(self):
            return (tmp_path / "it_ran").touch, ()

    make_fc100(tmp_path)
    (tmp_path / "cifar-100-python" / "test").write_bytes(pickle.dumps(Malice()))
    with pytest.raises(SystemExit, match="UnpicklingError: it asks for"):
        few.DataSet(few.fc100, few.Args(data=str(tmp_path)))
    assert not (tmp_path / "it_ran").exists()


# -- environments ------------------------------------------------------------------------------------------------------


def test_environments():
    for env_id, modes in {"images-2m": 2, "images-3m": 3, "images-5m": 5, "drawn-3m": 3, "cub": 1}.items():
        env = envs.ENVIRONMENTS[env_id](num_envs=2)
        assert len(env.readers) == env.num_clusters == modes
        tasks = env.sample_tasks(10 * modes, np.random.default_rng(0))
        assert np.bincount(tasks.cluster).tolist() == [10] * modes and (tasks.params[:, 0] == tasks.cluster).all()
        test = env.task_set("test")
        assert len(test) == 1000 * modes and len(np.unique(test.params[:, 1])) > 999 * modes
        assert (env.nearest_cluster(test.params) == test.cluster).all()
        env.reset(seed=0)
        assert env.step(np.zeros((2, 1)))[1].tolist() == [0, 0]
    assert envs.ENVIRONMENTS["images-5m"].readers == (few.omniglot, few.mini_imagenet, few.fc100, few.cub, few.aircraft)
    assert envs.ENVIRONMENTS["mini-imagenet"].readers == (few.mini_imagenet,)


# -- networks ----------------------------------------------------------------------------------------------------------


def count(*parameters) -> int:
    return sum(p.numel() for p in parameters)


def test_numbers_of_parameters():
    agent = few.make_agent(few.Args(), 1)
    assert count(*agent["theta"].parameters()) == 389_701
    assert count(*agent["omega"].parameters()) == 546_112
    assert count(*agent["omega"].convs) == 388_416 and count(*agent["omega"].heads.parameters()) == 123_840
    assert count(*few.TaskNet(few.Args(ways=20)).parameters()) == 393_556
    assert "omega" not in few.make_agent(few.Args(modulation="none"), 1)


def test_initial_weights():
    """θ: Xavier's, biases 0; the modulation network's are PyTorch's, uniform within 1/√inputs, biases too (C)."""
    agent = few.make_agent(few.Args(), 1)
    theta, omega = agent["theta"][0], agent["omega"]
    for w, b in zip(theta.convs[::2], theta.convs[1::2]):
        bound = (6 / (9 * (w.shape[0] + w.shape[1]))) ** 0.5
        assert 0.95 * bound < w.abs().max() <= bound and (b == 0).all()
    assert theta.linear.weight.abs().max() <= (6 / (256 + 5)) ** 0.5 and (theta.linear.bias == 0).all()
    for p, inputs in (omega.convs[2], 9 * 32), (omega.convs[3], 9 * 32), (omega.heads[3].weight, 128):
        assert 0.95 * inputs**-0.5 < p.abs().max() <= inputs**-0.5


def by_modules(theta, x, tau, args, statistics=None) -> torch.Tensor:
    """The logits [image, N] of one task, from F.conv2d, nn.BatchNorm2d's formula and a list of its parameters."""
    for i in range(2):
        w, b = theta[2 * i : 2 * i + 2]
        x = F.conv2d(x, w, b, stride=2, padding=1)
        seen = x if statistics is None else x[:statistics]
        mean, var = seen.mean((0, 2, 3), keepdim=True), seen.var((0, 2, 3), keepdim=True, correction=0)
        x = (x - mean) / (var + 1e-5).sqrt()
        if tau:
            p = tau[i][:, None, None]
            n = x.shape[1]
            x = {"film": lambda: x * (1 + p[:n]) + p[n:], "softmax": lambda: x * p.softmax(0),  # noqa: B023
                 "sigmoid": lambda: x * p.sigmoid()}[args.modulation]()  # noqa: B023  # fmt: skip
        x = x.clamp(min=0)
    return x.mean((2, 3)) @ theta[-2].T + theta[-1]


@pytest.mark.parametrize("form", [*FORMS, dict(encoder_labels=True), FROZEN], ids=str)
@pytest.mark.parametrize("inner_clip", [20.0, 0.02, 0.0])
def test_objective_and_meta_gradient_against_one_task_at_a_time(double, form, inner_clip):
    args, limit = small_args(inner_clip=inner_clip, **form), inner_clip or math.inf
    agent, support, query = make_agent(args), make_images(), make_images(each=3)
    objective, alone = query_loss(agent, support, query, args), []
    for i in range(4):
        tau = [part[0] for part in few.modulation_of(agent, support.of([i]))[1]]
        theta = [*agent["theta"][0].parameters()]
        for _ in range(2):
            loss = F.cross_entropy(by_modules(theta, support.x[i], tau, args), support.y[i])
            gradients = torch.autograd.grad(loss, theta, create_graph=True)
            theta = [p - args.alpha * g.clip(-limit, limit) for p, g in zip(theta, gradients)]
        frozen = args.bn_frozen_support
        images = torch.cat([support.x[i], query.x[i]]) if frozen else query.x[i]
        logits = by_modules(theta, images, tau, args, 3 if frozen else None)[-9:]
        alone.append(F.cross_entropy(logits, query.y[i]))
    torch.testing.assert_close(objective, sum(alone) / 4, rtol=0, atol=1e-9)
    parameters = [*agent.parameters()]
    expected = torch.autograd.grad(sum(alone) / 4, parameters)
    for p, q in zip(torch.autograd.grad(objective, parameters), expected):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_meta_gradient_by_finite_differences(double, form):
    """Along a random direction of every parameter; exact only with second derivatives, and through τ."""
    args = small_args(**form)
    agent, support, query = make_agent(args), make_images(), make_images(each=2)
    gradients = torch.autograd.grad(query_loss(agent, support, query, args), [*agent.parameters()])
    for (name, p), gradient in zip(agent.named_parameters(), gradients):
        direction, values = torch.randn_like(p), []
        for step in (1e-6, -2e-6):
            p.data += step * direction
            values.append(query_loss(agent, support, query, args).item())
        p.data += 1e-6 * direction
        slope = (values[0] - values[1]) / 2e-6
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-3, abs=1e-7), name
        assert (gradient.abs().max() > 1e-6) != (".convs." in name and p.ndim == 1), f"{name}: normalised away"


def test_operators(double):
    a, tau = torch.randn(5, 8, 2, 2), torch.randn(2, 8)  # two tasks of four channels
    assert torch.equal(few.modulate(a, 0 * tau, "film"), a)
    film = few.modulate(a, tau, "film")
    torch.testing.assert_close(film[:, 5], a[:, 5] * (1 + tau[1, 1]) + tau[1, 5])
    torch.testing.assert_close(few.modulate(torch.ones_like(a), tau[:, :4], "softmax").unflatten(1, (2, 4)).sum(2),
                               torch.ones(5, 2, 2, 2))  # fmt: skip
    gate = few.modulate(a, tau[:, :4], "sigmoid")
    torch.testing.assert_close(gate[:, 6], a[:, 6] * torch.sigmoid(tau[1, 2]))


@pytest.mark.parametrize("form", [dict(), dict(encoder_labels=True)], ids=str)
def test_the_embedding_against_modules(double, form):
    """And that it is the same in any order; labels count only if they are shown."""
    args, (x, y) = small_args(**form), make_images(each=2)
    omega = make_agent(args)["omega"]
    embedding, tau = omega(x, y)
    for i in range(4):
        h = x[i]
        for w, b, affine in zip(omega.convs[::2], omega.convs[1::2], omega.affine):
            n = len(b)
            norm = nn.BatchNorm2d(n)
            norm.weight.data, norm.bias.data = 1 + affine[:n].data, affine[n:].data
            h = torch.relu(norm(F.conv2d(h, w, b, stride=2, padding=1)))
        h = h.mean((2, 3))
        if args.encoder_labels:
            h = torch.cat([h, torch.eye(3)[y[i]]], 1)
        expected = torch.relu(omega.linear(h)).mean(0)
        torch.testing.assert_close(embedding[i], expected)
        for head, part, n in zip(omega.heads, tau, (4, 5), strict=True):
            torch.testing.assert_close(part[i], head(expected))
            assert part.shape == (4, 2 * n)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    torch.testing.assert_close(omega(x[:, order], y[:, order])[0], embedding)
    assert torch.allclose(omega(x, y.flip(1))[0], embedding) != args.encoder_labels


def test_frozen_statistics_make_query_images_independent(double):
    for frozen in (True, False):
        args = small_args(bn_frozen_support=frozen)
        agent, support, query = make_agent(args), make_images(), make_images(each=3)
        tau = few.modulation_of(agent, support)[1]
        theta = few.adapt(agent["theta"][0], tau, support, 2, args)[-1]
        together = few.predict(theta, query.x, tau, args, support.x)
        alone = few.predict(theta, query.x[:, :1], tau, args, support.x)
        assert together.shape == (4, 9, 3) and torch.allclose(together[:, :1], alone) == frozen


# -- adaptation and outer step -----------------------------------------------------------------------------------------


def test_adaptation_leaves_tau_and_theta_alone(double):
    args = small_args(inner_steps=4)
    agent, support = make_agent(args), make_images()
    before = [p.clone() for p in agent.parameters()]
    _, tau = few.modulation_of(agent, support)
    first = [part.clone() for part in tau]
    thetas = few.adapt(agent["theta"][0], tau, support, 4, args)
    losses = [few.loss_of(few.predict(theta, support.x, tau, args), support.y).sum() for theta in thetas]
    assert len(losses) == 5 and losses[4] < losses[2] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(first, tau))
    assert all(torch.equal(a, b) for a, b in zip(before, agent.parameters()))
    still = query_loss(agent, support, support, small_args(alpha=0.0))
    torch.testing.assert_close(still, query_loss(agent, support, support, small_args(inner_steps=0)))
    assert still != query_loss(agent, support, support, args)


class Adam(torch.optim.SGD):
    """Plain gradient steps of size 1."""

    def __init__(self, agent):
        super().__init__(agent.parameters(), 1.0)


@pytest.mark.parametrize("form", [dict(), FROZEN, dict(outer_clip=0.01)], ids=str)
def test_a_meta_step_is_a_step_on_the_objective(double, form):
    args = small_args(**form)
    agent, support, query = make_agent(args), make_images(), make_images(each=3)
    objective = query_loss(agent, support, query, args)
    gradients = torch.autograd.grad(objective, [*agent.parameters()])
    before = [p.clone() for p in agent.parameters()]
    tau = few.modulation_of(agent, support)[1]
    theta = few.adapt(agent["theta"][0], tau, support, 2, args)[-1]
    hits = few.predict(theta, query.x, tau, args, support.x).argmax(-1) == query.y
    for p in agent.parameters():
        p.grad = torch.ones_like(p)  # left over
    accuracies, metrics = few.meta_step(agent, Adam(agent), support, query, np.zeros(4, int), args)
    np.testing.assert_allclose(accuracies, hits.double().mean(1))
    assert metrics["train/loss"] == pytest.approx(objective.item())
    names = [k for k, _ in agent.named_parameters()]
    for group, key in (("theta", "theta_0"), ("omega", "omega")):
        norm = sum((g**2).sum() for k, g in zip(names, gradients) if k.startswith(group)).sqrt().item()
        assert metrics[f"adam/gradient_{key}"] == pytest.approx(norm) and norm > 0.01
        scale = min(1.0, (args.outer_clip or math.inf) / (norm + 1e-6))
        for k, old, gradient in zip(names, before, gradients):
            if k.startswith(group):
                torch.testing.assert_close(old - agent.get_parameter(k), gradient * scale)


def test_learners_of_multi_maml_learn_from_their_own_tasks_alone(double):
    """Each as a MAML that has no other tasks, in loss and clip; one without tasks stays where it is."""
    args = small_args(modulation="none", oracle=True, outer_clip=0.01)
    agent, support, query = make_agent(args, 3), make_images(6), make_images(6, each=3)
    start = [{k: p.clone() for k, p in net.named_parameters()} for net in agent["theta"]]
    learner = np.array([0, 2, 0, 0, 2, 0])
    hits, _ = few.meta_step(agent, Adam(agent), support, query, learner, args)
    for m in range(3):
        alone, mine = make_agent(args), np.flatnonzero(learner == m)
        alone["theta"][0].load_state_dict(start[m])
        if len(mine):
            own = few.meta_step(alone, Adam(alone), support.of(mine), query.of(mine), np.zeros(len(mine), int), args)[0]
            np.testing.assert_array_equal(hits[mine], own)
        for k, p in agent["theta"][m].named_parameters():
            torch.testing.assert_close(p, alone["theta"][0].get_parameter(k))
            if m == 1 or not (k.startswith("convs.") and p.dim() == 1):  # whose gradient the normalisation takes away
                assert torch.equal(p, start[m][k]) == (m == 1)


# -- evaluation and training -------------------------------------------------------------------------------------------


def colours(root: Path) -> dict[str, few.Classes]:
    """Classes of a colour of their own, with noise: 12, 4 and 4."""
    rng, classes = np.random.RandomState(2), {}
    for k in range(20):
        colour = 255 * rng.uniform(size=3)
        images = [np.clip(colour + rng.normal(0, 10, (8, 8, 3)), 0, 255).astype(np.uint8) for _ in range(8)]
        classes[f"{k:02}"] = images
    return few.split(classes, (0.6, 0.2, 0.2))


def shapes(root: Path) -> dict[str, few.Classes]:
    """Classes of a pattern of their own, 2 x 2 squares: 12, 4 and 4."""
    rng, classes = np.random.RandomState(3), {}
    for k in range(20):
        pattern = np.kron(rng.randint(0, 256, (4, 4)), np.ones((2, 2)))
        images = [np.clip(pattern + rng.normal(0, 20, (8, 8)), 0, 255).astype(np.uint8) for _ in range(8)]
        classes[f"{k:02}"] = images
    return few.split(classes, (0.6, 0.2, 0.2))


class Probe(few.FewShot):
    readers, num_clusters, num_test_tasks = (colours, shapes), 2, 2000


envs.register("colours-and-shapes", Probe)
PROBE = dict(env="colours-and-shapes", img_size=8, channels=(8, 16), embedding=8, ways=4, horizon=5, tasks=4)
PROBE |= dict(inner_steps=2, alpha=0.1, lr=3e-3, eval_episodes=25)


@pytest.mark.parametrize("form", [dict(), dict(modulation="none", oracle=True)], ids=["MMAML", "Multi-MAML"])
def test_it_learns_to_tell_new_classes_apart(form, tmp_path):
    """Chance is 0.25."""
    run = train(few, run_dir=str(tmp_path), iterations=60, eval_every=60, **(PROBE | form))
    start, end = read(run / "eval.csv")
    for m in range(2):
        assert end[f"eval/return_step_2_cluster_{m}"] > 0.6, end
        assert end[f"eval/validation_step_2_cluster_{m}"] > 0.6
    assert end["eval/return_step_2"] > start["eval/return_step_2"] + 0.05
    metrics = read(run / "metrics.csv")
    loss = [row["train/loss"] for row in metrics]
    assert np.mean(loss[-20:]) < 0.8 * np.mean(loss[:10])
    assert [row["charts/frames"] for row in metrics] == [80 * k for k in range(1, 61)]
    arrays = np.load(run / "eval.npz")
    assert arrays["examples"].shape == (2, 4, 3, 8, 8) and ("embedding" in arrays) == (not form)


def test_a_real_format_can_be_learned(root, tmp_path):
    flags = dict(data=str(root), ways=2, horizon=3, img_size=16, channels=(8, 8), tasks=4, eval_episodes=3)
    run = train(few, env="images-5m", run_dir=str(tmp_path), iterations=20, eval_every=20, **(flags | dict(tasks=5)))
    loss = [row["train/loss"] for row in read(run / "metrics.csv")]
    assert np.mean(loss[-5:]) < 0.9 * np.mean(loss[:5])
    assert "eval/return_step_5_cluster_4" in read(run / "eval.csv")[0]


def test_evaluation_without_a_step():
    """Modulation alone: what is before and after adaptation is one."""
    args = few.Args(**(PROBE | dict(inner_steps=0)))
    tasks, data = Probe().task_set("test")[:4], [few.DataSet(reader, args) for reader in Probe.readers]
    metrics, arrays = few.evaluate(tasks, data, few.make_agent(args, 1), args)
    assert metrics["eval/return_step_0"] == arrays["accuracy"][0].mean() == arrays["accuracy"][1].mean()
    assert "eval/interval_step_0" in metrics and "eval/validation_step_0" in metrics


@pytest.mark.parametrize("form", [dict(), dict(modulation="none", oracle=True), dict(eval_steps=3), FROZEN], ids=str)
def test_evaluation_against_plain_means(monkeypatch, form):
    monkeypatch.setattr(few, "CHUNK", 3)
    args = few.Args(**(PROBE | form))
    torch.manual_seed(0)
    agent, data = make_agent(args, 2 if args.oracle else 1), [few.DataSet(reader, args) for reader in Probe.readers]
    tasks = Probe().task_set("test")[:14]
    metrics, arrays = few.evaluate(tasks, data, agent, args)
    n = args.eval_steps or 2
    scores = np.zeros((2, 2, 14))
    for p, part in enumerate(("test", "val")):
        for i in range(14):
            support, query = few.draw_images(tasks[i], data, part, args)
            embedding, tau = few.modulation_of(agent, support)
            thetas = few.adapt(agent["theta"][tasks.cluster[i] if args.oracle else 0], tau, support, n, args)
            for k in (0, -1):
                logits = few.predict(thetas[k], query.x, tau, args, support.x)
                scores[p, k, i] = (logits.argmax(-1) == query.y).double().mean()
            if part == "test" and embedding is not None:
                np.testing.assert_allclose(arrays["embedding"][i], embedding[0].detach(), atol=1e-5)
    np.testing.assert_allclose(arrays["accuracy"], scores[0])
    assert ("embedding" in arrays) == (not args.oracle) and arrays["examples"].shape == (2, 4, 3, 8, 8)
    if not args.oracle:
        images = [few.draw_images(tasks[i], data, "test", args) for i in range(14)]
        taus = [few.modulation_of(agent, support)[1] for support, _ in images]
        mean, same = [torch.stack(part).mean(0) for part in zip(*taus)], np.zeros(14)
        for i, (support, query) in enumerate(images):
            theta = few.adapt(agent["theta"][0], mean, support, n, args)[-1]
            logits = few.predict(theta, query.x, mean, args, support.x)
            same[i] = (logits.argmax(-1) == query.y).double().mean()
        assert metrics["eval/return_mean_modulated"] == pytest.approx(same.mean())
        assert metrics["eval/return_mean_modulated_cluster_1"] == pytest.approx(same[1::2].mean())
    assert ("eval/return_mean_modulated" in metrics) == (not args.oracle)
    assert arrays["cluster"].tolist() == [0, 1] * 7
    groups = {"": tasks.cluster >= 0, "_cluster_0": tasks.cluster == 0, "_cluster_1": tasks.cluster == 1}
    for suffix, mine in groups.items():
        test = scores[0][:, mine]
        assert metrics[f"eval/return_step_0{suffix}"] == pytest.approx(test[0].mean())
        assert metrics[f"eval/return_step_{n}{suffix}"] == pytest.approx(test[-1].mean())
        assert metrics[f"eval/validation_step_{n}{suffix}"] == pytest.approx(scores[1, -1, mine].mean())
        values = test[-1].reshape(-1, 1 if suffix else 2)  # a column a data set: data sets do not vary
        half = 1.96 * np.sqrt((values.var(0, ddof=1) / len(values)).sum()) / values.shape[1]
        assert metrics[f"eval/interval_step_{n}{suffix}"] == pytest.approx(half)


def test_training_is_a_loop_of_meta_steps(tmp_path):
    """Of tasks of the training classes, drawn by the run's generator, with Adam on θ and ω."""
    args = few.Args(**(PROBE | dict(iterations=3, run_dir=str(tmp_path), preset="paper", num_threads=1)))
    run = few.Run(args)
    few.train(args, run)
    other, data = few.Run(args), [few.DataSet(reader, args) for reader in Probe.readers]
    agent = few.make_agent(args, 1)
    adam = torch.optim.Adam(agent.parameters(), 3e-3)
    for row in read(run.path / "metrics.csv"):
        seed = torch.randint(2**31, (), generator=other.rng).item()
        tasks = Probe().sample_tasks(4, np.random.default_rng(seed))
        support, query = few.draw_images(tasks, data, "train", args)
        hits, metrics = few.meta_step(agent, adam, support, query, np.zeros(4, int), args)
        assert row["train/return_step_2"] == pytest.approx(hits.mean(), rel=1e-4)
        assert row["train/return_step_2_cluster_1"] == pytest.approx(hits[tasks.cluster == 1].mean(), rel=1e-4)
        assert row["train/loss"] == pytest.approx(metrics["train/loss"], rel=1e-4)
    trained = torch.load(run.path / "agent.pt", weights_only=True)["agent"]
    for key, value in agent.state_dict().items():
        torch.testing.assert_close(trained[key], value)


# -- arguments ---------------------------------------------------------------------------------------------------------

RULES = [
    ("--env point-goal-4c", "--env must be of images (drawn-3m, images-2m, ...), not point-goal-4c"),
    ("--tasks 2", "--tasks must be at least 3, which hold every data set"),
    ("--oracle", "--oracle needs --modulation none"),
    ("--env omniglot --oracle", "--oracle needs several data sets, and omniglot has one"),
    ("--encoder-labels --modulation none", "--encoder-labels needs a --modulation"),
    ("--ways 1", "--ways must be at least 2"),
    ("--channels", "--channels must name at least one layer"),
    ("--shots 16", "--shots must be less than --horizon"),
    ("--eval-episodes 1", "--eval-episodes must be from 2 to 1000"),
    ("--eval-episodes 1001", "--eval-episodes must be from 2 to 1000"),
    ("--alpha 0", "--alpha and --lr must be positive"),
    ("--lr 0", "--alpha and --lr must be positive"),
    ("--inner-clip -1", "--inner-clip and --outer-clip must be at least 0"),
    ("--outer-clip -1", "--inner-clip and --outer-clip must be at least 0"),
]


@pytest.mark.parametrize("flags, message", RULES)
def test_what_must_hold(flags, message):
    with pytest.raises(SystemExit) as caught:
        few.parse_args(flags.split())
    assert str(caught.value) == f"mmaml_classification.py: error: {message}"


def test_every_rule_has_a_case_and_presets_are_the_published_ones():
    assert len(few.check(few.Args(), envs.ENVIRONMENTS["drawn-3m"])) == len({message for _, message in RULES})
    five, one = few.parse_args(["--env", "images-5m"]), few.parse_args(["--env", "omniglot"])
    assert (five.tasks, five.iterations, five.alpha, five.inner_steps) == (10, 60000, 0.05, 5)
    assert (five.ways, five.shots, five.horizon, five.img_size, five.modulation) == (5, 1, 16, 84, "film")
    assert (five.lr, five.inner_clip, five.outer_clip) == (1e-3, 20, 0)
    fast = dict(img_size=28, channels=(16, 32, 64, 64), embedding=64, tasks=6, outer_clip=2, iterations=1500)
    assert few.parse_args([]) == few.Args(preset="fast", eval_every=100, **fast), "the rest is published"
    assert (one.tasks, one.iterations, one.alpha, one.inner_steps, one.modulation) == (10, 60000, 0.4, 1, "none")
    cub = few.parse_args(["--env", "cub"])
    assert (cub.tasks, cub.iterations, cub.alpha, cub.inner_steps, cub.modulation) == (4, 80000, 0.01, 5, "none")
    few.parse_args("--oracle --modulation none --inner-clip 0 --inner-steps 0".split())
