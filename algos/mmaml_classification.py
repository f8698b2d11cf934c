"""MMAML, few-shot classification: multimodal MAML by task-aware modulation (Vuorio, Sun, Hu and Lim, NeurIPS 2019).

Official code: github.com/shaohua0116/MMAML-Classification. K images of each of N classes are given with labels, others
are to be classified; the classes are those of one of several data sets. A network sees the K N images and modulates a
second one, whose weights gradient steps on these images adapt. With --modulation none it is MAML, with --oracle too
Multi-MAML, one learner a data set.

Embedding    υ = h({x_k}, k = 1 .. K N; ω_h), the mean over the support images                                 Eq. (1)
Modulation   τ_i = g_i(υ; ω_g), one linear map for every convolution i                                         Eq. (2)
             φ_i = θ_i ⊙ τ_i: of the layer's normalised output a before its ReLU, channel by channel,
             FiLM a (1 + τ') + τ'' (τ = [τ', τ'']), softmax a softmax(τ), sigmoid a σ(τ)                       Eq. (3)
Adaptation   θ_0 = θ,  θ_k+1 = θ_k - α ∇L_i(f(θ_k, τ); D_train),  θ'_i = θ_n;  L the cross-entropy             Eq. (4)
Objective    min over θ, ω:  E_i[ L_i(f(θ'_i, τ); D_val) ], through all steps                                  Eq. (5)
Algorithm 1  l. 4    tasks T_i -> sample_tasks, draw_images    l. 6-7    υ, τ -> Modulation
             l. 8-9  θ'_i -> adapt, predict                    l. 11-13  θ, ω -> meta_step

Symbols      θ -> TaskNet; θ_k of all tasks -> theta, a list of tensors [task, ...]; υ -> embedding [task, 128];
             τ -> tau, a list of [task, 2 channels] (FiLM); ω_h, ω_g -> Modulation; D_train, D_val -> support, query;
             K -> shots; N -> ways; α -> alpha; β -> lr. (1), (2): the paper's numbers, the others are ours. The paper
             leaves all settings to a supplement; those here are of the official code (C).

Deviations from the paper (P) or C
  D1 P's Eq. (1) has the labels, C has images alone; here as C (--encoder-labels).
  D2 Normalisation has the statistics of the batch at hand, query images included, at test too, as C: what is said of
     one of them depends on the others, "transductive" (--bn-frozen-support: the statistics of the support images).
  D3 Splits of OMNIGLOT and CUB follow the file system's order in C; here sorted, and shuffled with a fixed seed
     (OMNIGLOT: 1100, 100 and 423 characters; C has none for validation).
  D4 C turns the colours of FC100 into their negatives, by an overflow, and misplaces AIRCRAFT's variants with a slash
     in their name; here neither. C resizes OMNIGLOT and FC100 by Lanczos' filter; here all is bilinear.
  D5 C draws more tasks than it uses, images of small classes with replacement, and classes where there are fewer than
     N; here what is used, without replacement; too few images, or training or test classes, are an error.
  D6 Multi-MAML in C is one run a data set, each with a budget and step size of its own: so here, as MAML with the
     presets of the environments of one data set. --oracle is one run of M learners, which share the tasks.
  D7 C leaves the validation classes unused; here they are scored beside the test classes.
  D8 P's Alg. 1 sums the losses over tasks; here their mean, as C.
  D9 C does not clip the meta-gradient; here neither, but in the fast preset (--outer-clip).

Tested       python algos/mmaml_classification.py --num-threads 1   (drawn-3m, 720,000 images, 6 minutes of a shared
             core of an AMD EPYC, seed 0): accuracy 0.83 in new classes, chance 0.20 (digits 0.89, letters 0.63, stripes
             0.98; untrained 0.79, 0.24, 0.62), in seeds 1, 2 0.84, 0.85; after modulation alone 0.20.
"""

import csv
import json
import math
import os
import pickle
import re
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import matplotlib
import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw, ImageFont
from pydantic import TypeAdapter
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d, cross_entropy, one_hot
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import envs

# == Args ==============================================================================================================


@dataclass
class Args:
    env: str = "drawn-3m"  # environment id (module:id imports the module first)
    preset: Literal["paper", "fast"] | None = None  # published, or ours, of about an hour (default where there is one)
    seed: int = 0  # seed of everything random
    device: Literal["cpu", "cuda"] = "cpu"  # device of the networks
    num_threads: int = 0  # number of threads of the physics and of the updates (0: all CPUs)
    iterations: int = 60000  # number of meta-iterations
    eval_every: int = 500  # meta-iterations between evaluations on the held-out tasks
    save_every: int = 500  # meta-iterations between checkpoints
    track: bool = False  # mirror the run to Weights & Biases
    run_dir: str = "runs"  # folder in which the run gets its own folder
    name: str | None = None  # name of the run's folder (if it exists, its run is continued; default: with the time)
    resume: str | None = None  # run folder to continue (its args.json applies)
    evaluate: str | None = None  # run folder to evaluate without training (its args.json applies)

    oracle: bool = False  # Multi-MAML: a learner for every data set (with --modulation none, D6)
    modulation: Literal["film", "softmax", "sigmoid", "none"] = "film"  # operator ⊙ of Eq. (3) (none: MAML)
    encoder_labels: bool = False  # show the modulation network the labels of the support images too (D1)
    bn_frozen_support: bool = False  # normalise query images by the statistics of the support images (D2)
    data: str = "data"  # folder of the data sets, which nothing downloads (docs/mmaml_classification.md)
    img_size: int = 84  # height and width to which every image is brought

    tasks: int = 10  # number of tasks per meta-iteration
    ways: int = 5  # N, classes of a task
    horizon: int = 16  # images of every class in a task: K for the adaptation, the others to be classified
    shots: int = 1  # K, support images of every class
    inner_steps: int = 5  # n, gradient steps of the adaptation (0: modulation alone; of MAML: pre-training)
    alpha: float = 0.05  # α, inner step size
    inner_clip: float = 20.0  # largest entry of an inner gradient (0: no limit)
    eval_steps: int = 0  # gradient steps at evaluation (0: as many as in training)
    eval_episodes: int = 100  # held-out tasks of every data set at an evaluation (2 to 1000)

    channels: tuple[int, ...] = (32, 64, 128, 256)  # channels of the convolutions of both networks
    embedding: int = 128  # size of υ (not used with --modulation none)
    lr: float = 1e-3  # β, learning rate of Adam
    outer_clip: float = 0.0  # largest norm of the meta-gradient of a learner, and of ω (0: no limit)


MULTI_MAML = dict(modulation="none", tasks=4, iterations=80000, alpha=0.01)  # C's runs on one data set (D6)
PAPER: dict[str, dict] = {
    "omniglot": dict(modulation="none", alpha=0.4, inner_steps=1),
    **dict.fromkeys(("mini-imagenet", "fc100", "cub", "aircraft"), MULTI_MAML),
}
SMALL = dict(img_size=28, channels=(16, 32, 64, 64), embedding=64)
FAST: dict[str, dict] = {"drawn-3m": SMALL | dict(tasks=6, outer_clip=2.0, iterations=1500, eval_every=100)}
MAY_BE_0 = ("seed", "num_threads", "inner_steps", "eval_steps")


def check(args: Args, env: type[envs.TaskVectorEnv]) -> dict[str, bool]:
    """What must hold; where it does not, the message is the error."""
    return {
        f"--env must be of images (drawn-3m, images-2m, ...), not {args.env}": issubclass(env, FewShot),
        f"--tasks must be at least {env.num_clusters}, which hold every data set": args.tasks >= env.num_clusters,
        "--oracle needs --modulation none": not args.oracle or args.modulation == "none",
        f"--oracle needs several data sets, and {args.env} has one": not args.oracle or env.num_clusters > 1,
        "--encoder-labels needs a --modulation": not args.encoder_labels or args.modulation != "none",
        "--ways must be at least 2": args.ways >= 2,
        "--channels must name at least one layer": len(args.channels) > 0,
        "--shots must be less than --horizon": args.shots < args.horizon,
        "--eval-episodes must be from 2 to 1000": 2 <= args.eval_episodes <= 1000,
        "--alpha and --lr must be positive": min(args.alpha, args.lr) > 0,
        "--inner-clip and --outer-clip must be at least 0": min(args.inner_clip, args.outer_clip) >= 0,
    }


# == Networks ==========================================================================================================


def make_convs(channels: tuple[int, ...]) -> nn.ParameterList:
    """W, b, W, b, ... of 3 x 3 convolutions."""
    return nn.ParameterList(p for a, b in pairwise((3, *channels)) for p in nn.Conv2d(a, b, 3).parameters())


class TaskNet(nn.Module):
    """θ of one learner: convolutions, then a linear layer. Xavier-uniform weights, biases 0."""

    def __init__(self, args: Args):
        super().__init__()
        self.convs = make_convs(args.channels)
        self.linear = nn.Linear(args.channels[-1], args.ways)
        for p in self.parameters():
            nn.init.xavier_uniform_(p) if p.dim() > 1 else nn.init.zeros_(p)


class Modulation(nn.Module):
    """υ and τ of every task from its support images. Initial weights are PyTorch's, as in C."""

    def __init__(self, args: Args):
        super().__init__()
        self.args, self.convs = args, make_convs(args.channels)
        self.affine = nn.ParameterList(torch.zeros(2 * width) for width in args.channels)  # scale - 1, shift
        self.linear = nn.Linear(args.channels[-1] + args.encoder_labels * args.ways, args.embedding)
        halves = 2 if args.modulation == "film" else 1
        self.heads = nn.ModuleList(nn.Linear(args.embedding, halves * width) for width in args.channels)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """images [task, image, 3, S, S], labels [task, image] -> υ [task, 128], τ_i [task, 2 channels] (FiLM)."""
        convs, affine = ([p.expand(len(images), *p.shape) for p in part] for part in (self.convs, self.affine))
        seen = features(convs, images, affine, "film")  # FiLM by weights of its own: BatchNorm's affine part
        if self.args.encoder_labels:  # D1
            seen = torch.cat([seen, one_hot(labels, self.args.ways).to(seen)], -1)
        embedding = torch.relu(self.linear(seen)).mean(1)  # Eq. (1)
        return embedding, [head(embedding) for head in self.heads]  # Eq. (2)


def modulate(a: Tensor, tau: Tensor, operator: str) -> Tensor:
    """φ of Eq. (3): the outputs a [image, task channel, h, w] of a layer, before its ReLU."""
    if operator == "film":
        scale, shift = (part.reshape(-1, 1, 1) for part in tau.chunk(2, -1))  # [task channel, 1, 1]
        return a * (1 + scale) + shift
    return a * (tau.softmax(-1) if operator == "softmax" else tau.sigmoid()).reshape(-1, 1, 1)


def normalise(a: Tensor, first: int | None) -> Tensor:
    """Every channel of every task, [image, task channel, h, w], by the statistics of all or the first images (D2)."""
    if first is None:
        return batch_norm(a, None, None, training=True)
    var, mean = torch.var_mean(a[:first], (0, 2, 3), correction=0, keepdim=True)
    return (a - mean) * (var + 1e-5).rsqrt()


def features(convs: list[Tensor], images: Tensor, tau: list[Tensor], operator: str, first: int | None = None) -> Tensor:
    """Means over the image of what the last convolution puts out: [task, image, 3, S, S] -> [task, image, channel].

    The channels of all tasks lie side by side, a group each: so a task's weights [task, ...] meet its own images.
    """
    tasks = len(images)
    a = images.transpose(0, 1).flatten(1, 2)  # [image, task channel, S, S]
    for i, (w, b) in enumerate(zip(convs[::2], convs[1::2])):
        a = conv2d(a, w.flatten(0, 1), b.flatten(), stride=2, padding=1, groups=tasks)
        a = normalise(a, first)
        a = torch.relu(modulate(a, tau[i], operator) if tau else a)
    return a.mean((2, 3)).unflatten(1, (tasks, -1)).transpose(0, 1)


# == Data sets =========================================================================================================

Classes = dict[str, list]  # images of every class: paths, or arrays [h, w] or [h, w, 3] uint8
SHARES = 0.7, 0.15, 0.15  # of the classes for training, validation and test


def split(classes: Classes, shares: tuple[float, ...] = SHARES, sort: bool = True) -> dict[str, Classes]:
    """In an order shuffled with the official seed (D3)."""
    names = sorted(classes) if sort else [*classes]
    np.random.RandomState(123).shuffle(names)
    end_train, end_val = round(len(names) * shares[0]), round(len(names) * (shares[0] + shares[1]))
    parts = dict(train=names[:end_train], val=names[end_train:end_val], test=names[end_val:])
    return {part: {name: classes[name] for name in chosen} for part, chosen in parts.items()}


def folders(root: Path, pattern: str) -> Classes:
    """A class is a folder of images; what else lies there, or is hidden, is left out."""
    classes = {}
    for folder in sorted(root.glob(pattern)):
        name, images = str(folder.relative_to(root)), {".png", ".jpg", ".jpeg"}
        if folder.is_dir() and not re.search(r"(^|/)\.", name):
            classes[name] = sorted(file for file in folder.glob("[!.]*") if file.suffix.lower() in images)
    return classes


def omniglot(root: Path) -> dict[str, Classes]:
    """omniglot-py/{images_background,images_evaluation}/ALPHABET/characterNN/NNNN_KK.png"""
    one, two = (folders(root / "omniglot-py", f"images_{part}/*/*") for part in ("background", "evaluation"))
    return split(one | two, (1100 / 1623, 100 / 1623, 423 / 1623))


def mini_imagenet(root: Path) -> dict[str, Classes]:
    """miniimagenet/{train,val,test}/CLASS/IMAGE, or {train,val,test}.csv, with filename,label, and images/FILENAME"""
    parts, images = {}, root / "miniimagenet" / "images"
    for part in ("train", "val", "test"):
        if (root / "miniimagenet" / part).is_dir():
            parts[part] = folders(root / "miniimagenet" / part, "*")
            continue
        classes = defaultdict(list)
        with (root / "miniimagenet" / f"{part}.csv").open() as file:
            for row in csv.DictReader(file):
                classes[row["label"]].append(images / row["filename"])
        parts[part] = dict(classes)
    return parts


class CifarUnpickler(pickle.Unpickler):
    """Makes arrays, and nothing else: a data file runs no code."""

    def find_class(self, module, name):
        known = {"_reconstruct": np._core.multiarray._reconstruct, "ndarray": np.ndarray, "dtype": np.dtype}
        if module.split(".")[0] != "numpy" or name not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return known[name]


def fc100(root: Path) -> dict[str, Classes]:
    """cifar-100-python/{train,test}, the pickled files of CIFAR-100"""
    superclasses = dict(val=(8, 11, 13, 16), test=(0, 7, 12, 14))
    part_of = {number: part for part, numbers in superclasses.items() for number in numbers}
    parts = dict(train=defaultdict(list), val=defaultdict(list), test=defaultdict(list))
    for name in ("train", "test"):  # pooled
        with (root / "cifar-100-python" / name).open("rb") as file:
            content = CifarUnpickler(file, encoding="bytes").load()
        images = content[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # uint8: nothing overflows (D4)
        for image, fine, coarse in zip(images, content[b"fine_labels"], content[b"coarse_labels"]):
            parts[part_of.get(coarse, "train")][str(fine)].append(image)
    return {part: dict(sorted(classes.items())) for part, classes in parts.items()}


def cub(root: Path) -> dict[str, Classes]:
    """CUB_200_2011/images/NNN.NAME/*.jpg"""
    return split(folders(root / "CUB_200_2011" / "images", "*"))


def aircraft(root: Path) -> dict[str, Classes]:
    """fgvc-aircraft-2013b/data/{variants.txt,images_variant_trainval.txt,images_variant_test.txt,images/NNNNNNN.jpg}"""
    data = root / "fgvc-aircraft-2013b" / "data"
    variants, *lists = (  # without empty lines
        [line for line in (data / f"{name}.txt").read_text().splitlines() if line.strip()]
        for name in ("variants", "images_variant_trainval", "images_variant_test")
    )
    classes = {variant: [] for variant in variants}
    for line in chain(*lists):
        number, variant = line.split(" ", 1)  # a variant may hold spaces and slashes (D4)
        classes[variant].append(data / "images" / f"{number}.jpg")
    return split(classes, sort=False)


def digits(root: Path) -> dict[str, Classes]:
    """scikit-learn's handwritten digits, upright and turned by 90 degrees: 20 classes, both turns in one part"""
    data = load_digits()
    images = {f"{digit}": (15.9 * data.images[data.target == digit]).astype(np.uint8) for digit in range(10)}
    classes = {}
    for part, of_digit in split(images, (0.4, 0.3, 0.3)).items():
        turned = {(d, k): [np.rot90(image, k) for image in of_digit[d]] for d in of_digit for k in (0, 1)}
        classes[part] = {f"{d} turned {k}": rotated for (d, k), rotated in turned.items()}
    return classes


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZΓΔΘΛΞΠΣΦΨΩБДЖИЛЦЧШЭЮЯ"


def letters(root: Path) -> dict[str, Classes]:
    """capitals in six fonts of Matplotlib, dark on light, of many places and slants: 47 classes"""
    folder, rng = Path(matplotlib.get_data_path()) / "fonts" / "ttf", np.random.RandomState(0)
    families = [f"DejaVu{kind}{style}.ttf" for kind in ("Sans", "SansMono", "Serif") for style in ("", "-Bold")]
    fonts = [ImageFont.truetype(folder / name, 20) for name in families]
    classes = {}
    for letter in LETTERS:
        classes[letter] = []
        for _ in range(40):
            light, x, y = int(rng.randint(160, 256)), 14 + rng.randint(-3, 4), 14 + rng.randint(-3, 4)
            image = Image.new("L", (28, 28), light)
            ImageDraw.Draw(image).text((x, y), letter, int(rng.randint(0, 80)), fonts[rng.randint(6)], anchor="mm")
            classes[letter].append(np.asarray(image.rotate(rng.uniform(-20, 20), Image.BILINEAR, fillcolor=light)))
    return split(classes)


def gratings(root: Path) -> dict[str, Classes]:
    """coloured stripes, of a class's two colours, direction and width, with noise: 60 classes"""
    rng = np.random.RandomState(1)
    y, x = np.mgrid[:28, :28] / 28
    classes = {}
    for number in range(60):
        colours, angle, waves = rng.uniform(0, 1, (2, 3)), rng.uniform(0, np.pi), rng.uniform(2, 6)
        classes[f"{number:02}"] = []
        for _ in range(40):
            a, phase = angle + rng.normal(0, 0.15), rng.uniform(0, 2 * np.pi)
            part = 0.5 + 0.5 * np.sin(2 * np.pi * waves * (x * np.cos(a) + y * np.sin(a)) + phase)
            image = colours[0] + (colours[1] - colours[0]) * part[..., None] + rng.normal(0, 0.15, (28, 28, 3))
            classes[f"{number:02}"].append((255 * image.clip(0, 1)).astype(np.uint8))
    return split(classes)


def check_part(part: str, classes: Classes, args: Args) -> None:
    """D5: classes and images that are enough; of every class one image is looked for."""
    least = 1 if part == "val" else args.ways  # a validation score of fewer than N classes is left out
    if len(classes) < least:
        raise ValueError(f"{part} has {len(classes)} classes and needs {least}")
    for name, images in classes.items():
        if len(images) < args.horizon:
            raise ValueError(f"{part}, {name} has {len(images)} images, and --horizon needs {args.horizon}")
        if isinstance(images[0], Path) and not images[0].is_file():
            raise FileNotFoundError(images[0])


class DataSet:
    """The images of one mode, brought to one size, and kept once they were read."""

    def __init__(self, reader: Callable[[Path], dict[str, Classes]], args: Args):
        self.name, self.size, self.cache = reader.__name__, args.img_size, {}
        with blame(f"{self.name}, read from {reader.__doc__} (--data {args.data})"):
            parts = reader(Path(args.data))
            for part, classes in parts.items():
                check_part(part, classes, args)
        self.classes = {part: [*classes.values()] for part, classes in parts.items()}

    def image(self, part: str, number: int, index: int) -> np.ndarray:
        """[S, S, 3] uint8."""
        key = part, number, index
        if key not in self.cache:
            item = self.classes[part][number][index]
            with blame(f"an image of {self.name}, {item if isinstance(item, Path) else key}"):
                image = Image.open(item) if isinstance(item, Path) else Image.fromarray(item)
                if self.name == "omniglot":
                    image = image.convert("L").point(lambda v: 255 - v)  # strokes become bright
                image = image.convert("RGB").resize((self.size, self.size), Image.BILINEAR)  # D4
            self.cache[key] = np.asarray(image)
        return self.cache[key]

    def draw(self, seed: int, part: str, args: Args) -> np.ndarray:
        """K + Q images of each of N classes, whose order is their labels: [N, K + Q, S, S, 3] uint8."""
        rng = np.random.default_rng(seed)
        images = []
        for number in rng.permutation(len(self.classes[part]))[: args.ways]:
            chosen = rng.permutation(len(self.classes[part][number]))[: args.horizon]
            turns = rng.integers(4) if self.name == "omniglot" else 0  # a class in this task
            images.append([np.rot90(self.image(part, number, i), turns) for i in chosen])
        return np.array(images)


# == Sampler ===========================================================================================================


class FewShot(envs.TaskVectorEnv):
    """The task is a data set and a seed, which draws its classes and images. Nobody acts in it: the reward is 0."""

    obs_dim, action_dim, task_dim, horizon, dt = 1, 1, 2, 16, 1.0
    readers: tuple[Callable, ...]

    def draw(self, cluster, rng):
        return np.column_stack([cluster, rng.integers(2**31, size=len(cluster))])

    def nearest_cluster(self, params):
        return params[:, 0].astype(int)

    def reset_state(self, ids):
        pass

    def advance(self, ids, action):
        pass

    def observation(self):
        return np.zeros((self.num_envs, 1))

    def reward(self, action):
        return np.zeros(self.num_envs)


PUBLISHED = omniglot, mini_imagenet, fc100, cub, aircraft
MODES = {reader.__name__.replace("_", "-"): (reader,) for reader in PUBLISHED}
MODES |= {f"images-{n}m": PUBLISHED[:n] for n in (2, 3, 5)}
MODES["drawn-3m"] = digits, letters, gratings
for env_id, readers in MODES.items():
    sizes = dict(num_clusters=len(readers), num_test_tasks=1000 * len(readers))
    envs.register(env_id, type("FewShot", (FewShot,), dict(readers=readers) | sizes))


# Copied from algos/maml.py
def random_seed(rng: torch.Generator) -> int:
    return torch.randint(2**31, (), generator=rng).item()


class Images(NamedTuple):
    """Labelled images of every task."""

    x: Tensor  # [task, image, 3, S, S] in [0, 1]
    y: Tensor  # [task, image]

    def of(self, tasks: np.ndarray | slice) -> "Images":
        return Images(self.x[tasks], self.y[tasks])


def draw_images(tasks: envs.Tasks, data: list[DataSet], part: str, args: Args) -> tuple[Images, Images]:
    """D_train and D_val of every task (Alg. 1, l. 4), of the classes for training, validation or test."""
    drawn = np.stack([data[int(mode)].draw(int(seed), part, args) for mode, seed in tasks.params])
    x = torch.from_numpy(drawn).to(args.device).movedim(-1, 3).float() / 255  # [task, N, K + Q, 3, S, S]
    y = torch.arange(args.ways, device=args.device)[:, None].expand(len(x), -1, args.horizon)
    support = Images(x[:, :, : args.shots].flatten(1, 2), y[:, :, : args.shots].flatten(1, 2))
    query = Images(x[:, :, args.shots :].flatten(1, 2), y[:, :, args.shots :].flatten(1, 2))
    return support, query


# == Inner adaptation ==================================================================================================


def predict(
    theta: list[Tensor], images: Tensor, tau: list[Tensor], args: Args, support: Tensor | None = None
) -> Tensor:
    """f(x; θ_k, τ), the logits [task, image, N]; with support images, by their statistics (D2)."""
    *convs, w, b = theta
    if support is None or not args.bn_frozen_support:
        h = features(convs, images, tau, args.modulation)
    else:
        shown = support.shape[1]
        h = features(convs, torch.cat([support, images], 1), tau, args.modulation, shown)[:, shown:]
    return torch.baddbmm(b[:, None], h, w.mT)


def loss_of(logits: Tensor, y: Tensor) -> Tensor:
    """L of Eq. (4) and (5), [task]."""
    return cross_entropy(logits.mT, y, reduction="none").mean(1)


def adapt(
    net: TaskNet, tau: list[Tensor], support: Images, steps: int, args: Args, create_graph: bool = True
) -> list[list[Tensor]]:
    """θ_0 .. θ_n of every task, Eq. (4); τ stays as it is (Alg. 1, l. 8-9).

    The loss is a sum over tasks, each of which has weights of its own.
    """
    clip = args.inner_clip or math.inf
    thetas = [[p.expand(len(support.x), *p.shape) for p in net.parameters()]]
    for _ in range(steps):
        loss = loss_of(predict(thetas[-1], support.x, tau, args), support.y).sum()
        gradients = torch.autograd.grad(loss, thetas[-1], create_graph=create_graph)
        thetas.append([p - args.alpha * g.clamp(-clip, clip) for p, g in zip(thetas[-1], gradients)])
    return thetas


# == Outer step ========================================================================================================


# Copied from algos/mmaml_regression.py
def make_agent(args: Args, learners: int) -> nn.ModuleDict:
    """Alg. 1, l. 2: θ of every learner, and ω."""
    agent = nn.ModuleDict(dict(theta=nn.ModuleList(TaskNet(args) for _ in range(learners))))
    if args.modulation != "none":
        agent["omega"] = Modulation(args)
    return agent.to(args.device)


def modulation_of(agent: nn.ModuleDict, support: Images) -> tuple[Tensor | None, list[Tensor]]:
    """υ and τ (Alg. 1, l. 6-7); without a modulation network none."""
    return agent["omega"](support.x, support.y) if "omega" in agent else (None, [])


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Share of the images that are classified rightly, [task]."""
    return (logits.argmax(-1) == y).double().mean(1)


def meta_step(
    agent: nn.ModuleDict, adam: torch.optim.Adam, support: Images, query: Images, learner: np.ndarray, args: Args
) -> tuple[np.ndarray, dict[str, float]]:
    """Alg. 1, l. 5-13: the query accuracy of every task after its steps, [task], and the mean loss."""
    hits, losses = np.empty(len(learner)), np.empty(len(learner))
    adam.zero_grad()
    for m in np.unique(learner):  # one, but for Multi-MAML (D6)
        mine = np.flatnonzero(learner == m)
        own_support, own_query = support.of(mine), query.of(mine)
        _, tau = modulation_of(agent, own_support)
        theta = adapt(agent["theta"][m], tau, own_support, args.inner_steps, args)[-1]
        logits = predict(theta, own_query.x, tau, args, own_support.x)
        loss = loss_of(logits, own_query.y)
        loss.mean().backward()  # Eq. (5), D8
        hits[mine], losses[mine] = accuracy(logits, own_query.y).cpu(), loss.detach().cpu()
    norms = clip_gradients(agent, args)  # D9
    adam.step()
    return hits, {"train/loss": losses.mean()} | norms


# Copied from algos/mmaml_regression.py
def clip_gradients(agent: nn.ModuleDict, args: Args) -> dict[str, float]:
    """Clip the meta-gradients of every learner and of ω by their norms -> what these were."""
    groups = {f"theta_{m}": net for m, net in enumerate(agent["theta"])}
    if "omega" in agent:
        groups["omega"] = agent["omega"]
    limit = args.outer_clip or math.inf
    norms = {k: nn.utils.clip_grad_norm_(part.parameters(), limit) for k, part in groups.items()}
    return {f"adam/gradient_{k}": norm.item() for k, norm in norms.items()}


# == Evaluation ========================================================================================================

CHUNK = 10  # tasks at a time


# Copied from algos/milet.py
def returns_by_cluster(name: str, returns: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """The mean of the returns [task] and, if there are several, of every true cluster."""
    present = np.unique(clusters)
    by_cluster = {f"{name}_cluster_{m}": float(returns[clusters == m].mean()) for m in present}
    return {name: float(returns.mean())} | (by_cluster if len(present) > 1 else {})


# Copied from algos/mmaml_regression.py
def intervals(name: str, scores: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """Half the width of the 95 % interval of a mean over tasks: of every true cluster, and of all, in equal parts."""
    groups = {m: scores[clusters == m] for m in np.unique(clusters)}
    halves = {f"{name}_cluster_{m}": float(1.96 * x.std(ddof=1) / np.sqrt(len(x))) for m, x in groups.items()}
    return {name: math.hypot(*halves.values()) / len(halves)} | halves


def score_tasks(
    tasks: envs.Tasks, data: list[DataSet], part: str, agent: nn.ModuleDict, args: Args, shared: Tensor | None = None
) -> tuple[np.ndarray, Tensor]:
    """The accuracy of every task before and after its steps, [2, task], and υ [task, 128] (without ω: 0).

    shared: [128], one υ for all tasks, in place of their own. With the mean υ it is the mean τ: Eq. (2) is affine.
    """
    steps, learner = args.eval_steps or args.inner_steps, assign(tasks, args)
    scores, embeddings = np.zeros((2, len(tasks))), torch.zeros(len(tasks), args.embedding)
    for m in np.unique(learner):
        mine = np.flatnonzero(learner == m)
        for ids in np.array_split(mine, math.ceil(len(mine) / CHUNK)):
            support, query = draw_images(tasks[ids], data, part, args)
            with torch.no_grad():
                embedding, tau = modulation_of(agent, support)
                if shared is not None:
                    tau = [head(shared.expand(len(ids), -1)) for head in agent["omega"].heads]  # Eq. (2)
            thetas = adapt(agent["theta"][m], tau, support, steps, args, create_graph=False)
            with torch.no_grad():
                for k in (0, -1):
                    logits = predict(thetas[k], query.x, tau, args, support.x)
                    scores[k, ids] = accuracy(logits, query.y).cpu()
            if embedding is not None:
                embeddings[ids] = embedding.cpu()
    return scores, embeddings


def evaluate(tasks: envs.Tasks, data: list[DataSet], agent: nn.ModuleDict, args: Args) -> tuple[dict, dict]:
    """Accuracy in fixed tasks of the test classes before and after adaptation, and of the validation classes after it
    (D7); half the width of the 95 % interval of the mean; the accuracy with the mean τ of all test tasks, which does
    not tell them apart. For the figures, of the test tasks: accuracies [2, task], embeddings [task, 128]; the support
    images of one task of every data set [mode, K N, 3, S, S].
    """
    steps, cluster, metrics = args.eval_steps or args.inner_steps, tasks.cluster, {}
    (before, after), embedding = score_tasks(tasks, data, "test", agent, args)
    metrics |= returns_by_cluster("eval/return_step_0", before, cluster)
    metrics |= returns_by_cluster(f"eval/return_step_{steps}", after, cluster)
    metrics |= intervals(f"eval/interval_step_{steps}", after, cluster)
    if all(len(one.classes["val"]) >= args.ways for one in data):  # MINI-IMAGENET has 16 classes
        (_, validation), _ = score_tasks(tasks, data, "val", agent, args)
        metrics |= returns_by_cluster(f"eval/validation_step_{steps}", validation, cluster)
    if "omega" in agent:
        (_, same), _ = score_tasks(tasks, data, "test", agent, args, embedding.mean(0).to(args.device))
        metrics |= returns_by_cluster("eval/return_mean_modulated", same, cluster)
    examples, _ = draw_images(tasks[: len(data)], data, "test", args)  # data sets are in turn
    arrays = dict(params=tasks.params, cluster=cluster, accuracy=(before, after), examples=examples.x.cpu().numpy())
    return metrics, arrays | (dict(embedding=embedding.numpy()) if "omega" in agent else {})


# == Training ==========================================================================================================


# Copied from algos/maml.py
def assign(tasks: envs.Tasks, args: Args) -> np.ndarray:
    """The learner of each task: with --oracle that of its true cluster, else the only one."""
    return tasks.cluster if args.oracle else np.zeros(len(tasks), int)


def train(args: Args, run: "Run") -> None:
    """Algorithm 1."""
    env = run.make_env(1).unwrapped
    data = [DataSet(reader, args) for reader in env.readers]
    test_tasks = env.task_set("test")[: args.eval_episodes * len(data)]

    # Alg. 1, l. 2: θ of every learner (Multi-MAML: one a data set, else one), and ω
    agent = make_agent(args, len(data) if args.oracle else 1)
    adam = torch.optim.Adam(agent.parameters(), args.lr)  # of θ and ω: two with one rate are one

    evaluation = partial(evaluate, test_tasks, data, agent, args)
    for _ in run.loop(args.iterations, dict(agent=agent, adam=adam), evaluation):
        # l. 4: tasks of all data sets in turn, from a random one on
        with run.timer("sample"):
            tasks = env.sample_tasks(args.tasks, np.random.default_rng(random_seed(run.rng)))
            support, query = draw_images(tasks, data, "train", args)
        run.frames += args.tasks * args.ways * args.horizon

        # l. 5-13: modulate, adapt, and a step of Adam on the query loss
        hits, metrics = meta_step(agent, adam, support, query, assign(tasks, args), args)
        run.log(returns_by_cluster(f"train/return_step_{args.inner_steps}", hits, tasks.cluster) | metrics)


# == The same in every script ==========================================================================================
# The algorithm ends here. Below, to the byte as in every other script: run folder, checkpoint, signals, command line.
SCRIPT = Path(__file__).stem
ON_RESUME = "resume frames iterations eval_every save_every data device num_threads track run_dir".split()  # may change
ON_EVALUATE = "evaluate seed alpha eval_steps eval_episodes eval_prior_episodes data device num_threads run_dir".split()


def fail(message: object, when: object = True) -> None:
    """End the program with one line on the standard error, and code 1."""
    if when:
        raise SystemExit(f"{SCRIPT}.py: error: {' '.join(str(message).split())}")


@contextmanager
def blame(what: str) -> Iterator[None]:
    """Whatever exception the block raises becomes one line, which begins with what is to blame."""
    try:
        yield
    except Exception as error:
        fail(f"{what}: {type(error).__name__}: {error}")


class Run:
    """What surrounds an algorithm: random numbers, environments, run folder, checkpoints, logs, progress, signals."""

    def __init__(self, args: Args):
        now = f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() // 1000 % 10**6:06}"
        name = args.name or f"{args.env.split(':')[-1]}__{SCRIPT}__{args.seed}__{now}"
        self.path = Path(args.resume or args.evaluate or Path(args.run_dir) / name)
        self.args, self.owner, self.bar, self.spoke = args, f"{SCRIPT}.py on {args.env}", None, time.time()
        self.iteration, self.frames, self.stopped = 0, 0, 0  # frames: environment steps, which the algorithm counts
        self.columns, self.sizes = {}, {}  # of the CSV files: names, and bytes, which nobody else may change
        torch.manual_seed(args.seed)
        self.rng = torch.Generator().manual_seed(args.seed)  # on the CPU; like torch's own it is part of checkpoints
        torch.set_num_threads(min(args.num_threads or torch.get_num_threads(), os.cpu_count()))
        self.make_env = partial(gym.make_vec, args.env, num_threads=torch.get_num_threads(), horizon=args.horizon)

    def loop(self, iterations: int, state: dict, evaluate: Callable[[], tuple[dict, dict]]) -> Iterator[int]:
        """Yield the iterations still to do; around them resume, evaluate, save, and stop after a signal."""
        figures = f"figures: python results/plot.py {self.path}"
        tqdm.write(f"{self.owner}, {self.args.preset} preset, seed {self.args.seed}, {self.args.device} -> {self.path}")
        self.state, self.evaluate = state, evaluate  # what checkpoints hold; what gives a row of eval.csv, and eval.npz
        if self.args.evaluate:
            self.load("agent.pt", {"agent": state["agent"]})
            return print(*(f"{name} {value:.6g}" for name, value in self.evaluation().items()), figures, sep="\n")
        if self.args.resume:
            self.load("checkpoint.pt", state)
            fail(f"{self.path} is at iteration {self.iteration} already", when=self.iteration > iterations)
        self.open(iterations)
        if self.iteration == 0:
            self.save()
            self.evaluation()
        for done in self.bar:
            self.iteration = done + 1
            self.began, self.seconds, self.frames_before = time.perf_counter(), defaultdict(float), self.frames
            yield self.iteration
            if self.iteration == iterations or self.iteration % self.args.eval_every == 0:
                self.evaluation()
            if self.iteration == iterations or self.iteration % self.args.save_every == 0 or self.stopped:
                self.save()
                if self.stopped:
                    tqdm.write(f"stopped by signal {self.stopped}; continue: python {sys.argv[0]} --resume {self.path}")
                    raise SystemExit(128 + self.stopped)
        tqdm.write(f"{self.path}: args.json, metrics.csv, eval.csv, eval.npz, checkpoint.pt, agent.pt\n{figures}")

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to this iteration's column time/name."""
        began = time.perf_counter()
        yield
        self.seconds[f"time/{name}"] += time.perf_counter() - began

    def log(self, metrics: dict[str, float]) -> None:
        """A row of metrics.csv, with times; and what the progress bar shows."""
        for name, value in [*metrics.items(), *self.state["agent"].named_parameters()]:
            if not torch.as_tensor(value).isfinite().all():
                raise FloatingPointError(f"{name} is not finite")
        speed = (self.frames - self.frames_before) / (seconds := time.perf_counter() - self.began)
        times = self.seconds | {"time/update": seconds - self.seconds.get("time/sample", 0), "charts/sps": speed}
        self.write("metrics", metrics | times)
        returns = (f"{v:.1f}" for k, v in metrics.items() if k.startswith("train/return") and "_cluster_" not in k)
        self.bar.set_postfix_str(f"{speed:,.0f} frames/s, training returns {', '.join(returns)}", refresh=False)
        if self.bar.disable and time.time() - self.spoke > 60:  # no terminal: a line a minute
            self.spoke = time.time()
            tqdm.write(f"iteration {self.iteration}/{self.bar.total} · frames {self.frames:,} · {self.bar.postfix}")

    def evaluation(self) -> dict[str, float]:
        metrics, arrays = self.evaluate()
        np.savez_compressed(self.path / "eval.npz", **arrays)
        if not self.args.evaluate:
            self.write("eval", metrics)
            pooled = [f"{k.removeprefix('eval/')} {v:.4g}" for k, v in metrics.items() if "_cluster_" not in k]
            tqdm.write(f"iteration {self.iteration} · frames {self.frames:,} · {' · '.join(pooled)}")
        return metrics

    def write(self, name: str, metrics: dict[str, float]) -> None:
        """A row of NAME.csv, whose columns never change, and of TensorBoard, over frames."""
        row = {"iteration": self.iteration, "charts/frames": self.frames} | metrics
        fail(f"{name}.csv has other columns than {list(row)}", when=[*row] != self.columns.setdefault(name, [*row]))
        with (self.path / f"{name}.csv").open("ab") as file:
            fail(f"another process writes {file.name}", when=file.tell() != self.sizes[f"{name}.csv"])
            values = ",".join(str(v) if isinstance(v, int) else f"{v:.6g}" for v in row.values()) + "\n"
            self.sizes[f"{name}.csv"] += file.write((values if file.tell() else f"{','.join(row)}\n{values}").encode())
        [self.tensorboard.add_scalar(key, value, self.frames) for key, value in metrics.items()]

    def open(self, iterations: int) -> None:
        """The run folder, new, or cut back to the checkpoint that was loaded; TensorBoard, W&B, and the screen."""
        self.path.mkdir(parents=True, exist_ok=bool(self.args.resume or self.args.name))
        stored = {"script": SCRIPT} | asdict(replace(self.args, resume=None))
        (self.path / "saving.json").write_text(json.dumps(stored, indent=2) + "\n")
        os.replace(self.path / "saving.json", self.path / "args.json")
        for name in ("metrics.csv", "eval.csv"):
            with (self.path / name).open("a") as file:
                self.sizes[name] = file.truncate(min(file.tell(), self.sizes.get(name, 0)))
        if self.args.track:
            run = dict(name=self.path.name, id="-".join(self.path.resolve().parts[-3:]), dir=self.path, config=stored)
            with blame("--track (`wandb login` first, or set WANDB_MODE=offline)"):
                from wandb import init
                init(**run, project=os.getenv("WANDB_PROJECT", "clean-meta-rl"), resume="allow", sync_tensorboard=True)
        self.tensorboard = SummaryWriter(str(self.path), purge_step=self.frames + 1)
        self.tensorboard.add_text("args", f"```\n{json.dumps(stored, indent=2)}\n```")
        self.bar = tqdm(range(self.iteration, iterations), total=iterations, initial=self.iteration, disable=None)

    def save(self) -> None:
        """agent.pt and checkpoint.pt; aside, then renamed: a kill leaves the last ones whole."""
        parts = {name: part.state_dict() for name, part in self.state.items()}
        parts["run"] = self.columns, self.sizes, self.rng.get_state(), torch.get_rng_state()
        for name, content in {"agent.pt": {"agent": parts["agent"]}, "checkpoint.pt": parts}.items():
            content |= dict(owner=self.owner, iteration=self.iteration, frames=self.frames)
            torch.save(content, self.path / "saving.pt")
            os.replace(self.path / "saving.pt", self.path / name)

    def load(self, name: str, parts: dict) -> None:
        """Into the parts, which are on their device already; weights_only: a checkpoint runs no code."""
        with blame(f"{self.path / name} is missing, damaged, or of other arguments"):
            saved = torch.load(self.path / name, map_location="cpu", mmap=True, weights_only=True)
            fail(f"{self.path} belongs to {saved['owner']}, not to {self.owner}", when=saved["owner"] != self.owner)
            [part.load_state_dict(saved[key]) for key, part in parts.items()]
            self.iteration, self.frames = int(saved["iteration"]), int(saved["frames"])
            if self.args.resume:
                self.columns, self.sizes, rng, torch_rng = saved["run"]
                self.rng.set_state(rng.clone())
                torch.set_rng_state(torch_rng.clone())

    def on_signal(self, signum: int, _) -> None:
        """The first signal in training lets the iteration finish and be saved; any other ends the program at once."""
        if self.stopped or self.bar is None:
            raise SystemExit(128 + signum)
        self.stopped = signum


def parse_args(argv: list[str]) -> Args:
    """The preset of --env, or the args.json of --resume or --evaluate, overridden by the explicit flags; checked."""
    given, _ = tyro.cli(Args, args=[x for x in argv if x not in ("-h", "--help")], return_unknown_args=True)
    fail("--resume and --evaluate contradict each other", when=given.resume and given.evaluate)
    preset, folder = given.preset or ("fast" if given.env in FAST else "paper"), given.resume or given.evaluate
    fail(f"{given.env} has no fast preset", when=not folder and preset == "fast" and given.env not in FAST)
    with blame(f"--env {given.env}"):
        env = envs.find(given.env)
    own = {"horizon": env.horizon} | (FAST if preset == "fast" else PAPER).get(given.env, {})
    default = replace(Args(), env=given.env, preset=preset, **own)
    rows = Path(given.run_dir, given.name or "", "eval.csv")
    begun = given.name and not folder and rows.is_file() and rows.stat().st_size > 0  # a checkpoint comes before rows
    if folder := str(rows.parent) if begun else folder:
        with blame(f"{folder} is not a run folder, or its args.json is damaged"):
            stored = json.loads((Path(folder) / "args.json").read_text())
            fail(f"{folder} is a run of {stored['script']}.py", when=stored.pop("script") != SCRIPT)
            differ = (stored.keys() - vars(default)) | ({"env", "seed", "horizon"} - stored.keys())
            fail(f"{folder} does not fit this {SCRIPT}.py, because of {', '.join(sorted(differ))}", when=differ)
            [tqdm.write(f"{folder} has no {x}: default {getattr(Args, x)}") for x in vars(default) if x not in stored]
            stored = TypeAdapter(Args).validate_json(json.dumps(asdict(Args()) | stored), strict=True)
            env = envs.find(stored.env)
        default = replace(default, resume=folder) if begun else stored
    fit = [x for x, c in envs.ENVIRONMENTS.items() if all(check(Args(env=x, **PAPER.get(x, {})), c).values())]
    about = f"{__doc__.splitlines()[0]} Environments: {', '.join(fit)}; fast: {', '.join(FAST) or None}."
    args = tyro.cli(Args, args=argv, default=default, description=about)
    fixed = asdict(args).keys() - (ON_EVALUATE if args.evaluate else ON_RESUME) if folder else ()
    for name, value in asdict(args).items():
        flag, least = f"--{name.replace('_', '-')}", int(name not in MAY_BE_0)
        fail(f"{flag} cannot change on an existing run", when=name in fixed and value != getattr(stored, name))
        for n in value if isinstance(value, tuple) else (value,):
            fail(f"{flag} must be from {least} to 2^31", when=type(n) is int and not least <= n <= 2**31)
            fail(f"{flag} must be finite", when=type(n) is float and not np.isfinite(n))
    [fail(message, when=not holds) for message, holds in check(args, env).items()]
    fail("--device cuda, but PyTorch finds no GPU", when=args.device == "cuda" and not torch.cuda.is_available())
    return args


if __name__ == "__main__":  # faults of the user or of the machine become one line; those of the program, a traceback
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    try:
        run = Run(args := parse_args(sys.argv[1:]))
        [signal.signal(signum, run.on_signal) for signum in (signal.SIGINT, signal.SIGTERM)]
        train(args, run)
    except FloatingPointError as error:
        fail(f"iteration {run.iteration}: {error}; last good checkpoint: {run.path / 'checkpoint.pt'}")
    except (OSError, MemoryError, RuntimeError, KeyboardInterrupt) as error:
        if isinstance(error, RuntimeError) and not re.search("allocate|Storage size|Writer|iostream", str(error)):
            raise
        fail(str(error) or type(error).__name__)
