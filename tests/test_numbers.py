"""Most rows of the README's tables against the last rows of the stored eval.csv."""

import csv
import re

import pytest
from conftest import ROOT

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")

# columns of eval.csv -> how a row begins, whose third and fourth cell show them -> runs below results/, a mean of seeds
MEANS = {
    ("return_episode_1", "return_episode_2"): {
        "RL² | 3.2 M": "rl2/point-goal-4c__rl2__{012}",
        "MILET | 3.2 M": "milet/point-goal-4c__milet__{012}",
        "VariBAD (one seed ends": "varibad/point-goal-4c__varibad__{012}",
        "MetaCURE, one seed": "metacure/point-goal-4c__metacure__{0}__20k",
        "an oracle: VariBAD's": "varibad/point-goal-4c__varibad__{012}__oracle",
        "RL² | 3 |": "rl2/point-goal-sparse__rl2__{012}",
        "VariBAD | 3 | 16": "varibad/point-goal-sparse__varibad__{012}",
        "MILET | 3 | 10 |": "milet/point-goal-sparse__milet__{012}",
        "MetaCURE | 3": "metacure/point-goal-sparse__metacure__{012}",
        "PEARL | 3": "pearl/point-goal-sparse__pearl__{012}",
    },
    ("return_episode_1", "return_episode_3"): {"pearl, by older code": "pearl/cheetah-dir__pearl__{0}"},
    ("return_episode_1", "return_episode_4"): {"PEARL, first and fourth": "pearl/point-goal-4c__pearl__{012}"},
    ("return_episode_2", "return_episode_3"): {"sop, z from": "sop/ml2__sop__{01}__short"},
    ("return_step_0", "return_step_1"): {
        "maml | cheetah-dir": "maml/cheetah-dir__maml__{01}",
        "promp | cheetah-dir": "promp/cheetah-dir__promp__{01}",
        "rmaml | cheetah-vel-noise": "rmaml/cheetah-vel-noise__rmaml__{01}__quarter",
        "cml | ant-cheetah-dir": "cml/ant-cheetah-dir__cml__{01}__half",
        "cml | point-goal-4c": "cml/point-goal-4c__cml__{0}__small",
        "fcml, `--epsilon 0.05`": "fcml/point-goal-4c__fcml__{0}__small-0.05",
        "hom | ml2": "hom/ml2__hom__{012}",
    },
    ("return_step_0", "return_step_2"): {"mmaml | reacher-4m": "mmaml/reacher-4m__mmaml__{012}__share"},
    ("return_step_0", "return_step_5"): {
        "mmaml_classification": "mmaml_classification/drawn-3m__mmaml_classification__{012}",
    },
}
MODES = {  # rows with a column for each of three environments
    "MMAML | -": ("mmaml/{env}__mmaml__{012}", "return_step_2"),
    "ProMP | -": ("mmaml/{env}__mmaml__{012}__promp", "return_step_2"),
    "Multi-ProMP | -": ("mmaml/{env}__mmaml__{012}__multi", "return_step_2"),
    "MMAML, with the same mean": ("mmaml/{env}__mmaml__{012}", "return_mean_modulated"),
}
SEEDS = {  # rows with the seeds one beside the other
    "MILET | 3 | 10 M": "milet/ant-goal-4c__milet__{012}__fast",
    "VariBAD | 3 | 10 M": "varibad/ant-goal-4c__varibad__{012}",
    "RL², stopped": "rl2/ant-goal-4c__rl2__{0}__stopped",
    "oracle | 3 | 10 M": "varibad/ant-goal-4c__varibad__{012}__oracle",
}


def row(start: str) -> list[str]:
    """The cells of the README's only table row that begins so."""
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| {start}")]
    assert len(lines) == 1, (start, lines)
    return [cell.strip() for cell in lines[0].strip("|").split("|")]


def last(pattern: str, column: str) -> list[float]:
    """The last value of every seed, which the digits in braces are."""
    before, seeds, after = re.fullmatch(r"(.*)\{(\d+)\}(.*)", pattern).groups()
    values = []
    for seed in seeds:
        with (ROOT / "results" / f"{before}{seed}{after}" / "eval.csv").open() as file:
            values.append(float([*csv.DictReader(file)][-1][f"eval/{column}"]))
    return values


def shown(text: str, value: float) -> None:
    """That a number is the value, rounded to the number's own decimals."""
    decimals = len(text.partition(".")[2])
    assert abs(float(text) - value) <= 0.5 * 10**-decimals * 1.001, (text, value)


@pytest.mark.parametrize("columns, start", [(columns, start) for columns, rows in MEANS.items() for start in rows])
def test_means_over_seeds(columns, start):
    for column, cell in zip(columns, row(start)[2:4], strict=True):
        values = last(MEANS[columns][start], column)
        shown(cell, sum(values) / len(values))


@pytest.mark.parametrize("start", MODES)
def test_means_by_modes(start):
    pattern, column = MODES[start]
    for env, cell in zip(("point-2m", "point-4m", "point-6m"), row(start)[1:], strict=True):
        values = last(pattern.replace("{env}", env), column)
        shown(NUMBER.search(cell).group(), sum(values) / len(values))


@pytest.mark.parametrize("start", SEEDS)
def test_every_seed(start):
    cells = row(start)
    assert bool(cells[5]) == start.startswith("MILET")
    columns = ("return_episode_1", "return_episode_2", "nmi")[: 3 if cells[5] else 2]
    for column, cell in zip(columns, cells[3:]):
        for text, value in zip(NUMBER.findall(cell), last(SEEDS[start], column), strict=True):
            shown(text, value)
