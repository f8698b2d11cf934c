"""The last evaluation of runs as a Markdown table; the last, not the best; of several seeds the last that all have.

    python results/table.py RUN RUN ...               a row a method: runs that differ in nothing but the seed
    python results/table.py RUN RUN ... --clusters    and the returns in every true cluster

A cell is the mean over the seeds, ± their standard deviation where there are several, of what eval.csv holds of the
held-out tasks after every episode or gradient step: returns (of the supervised scripts minus the squared
error, or the accuracy; their frames are points and images), and the NMI. A run is a folder with args.json and eval.csv.
"""

from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import tyro
from plot import RETURN, Method, Unusable, has_column, is_supervised, methods, must_agree, read_args, read_csv, title_of


@dataclass
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()  # run folders
    clusters: bool = False  # show every true cluster
    digits: int | None = None  # digits of returns after the point (default: 1; of errors and accuracies 3)


def cell(values: list[float], digits: int) -> str:
    """Mean ± standard deviation; nothing where there is no value."""
    if not values:
        return ""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def table(compared: list[Method], clusters: bool, digits: int) -> str:
    """A row a method; the columns that any of their runs has, in the order of eval.csv."""
    names = dict.fromkeys(k for method in compared for seed in method.tables for k in seed)
    shown = [k for k in names if RETURN.fullmatch(k) and (clusters or "_cluster_" not in k)]
    heads = [title_of(k) for k in shown]
    if "eval/nmi" in names:
        shown, heads = [*shown, "eval/nmi"], [*heads, "NMI"]
    rows = [["", "million frames", *heads], ["---"] * (2 + len(shown))]
    for method in compared:
        common = reduce(np.intersect1d, [seed["iteration"] for seed in method.tables])
        if not len(common):
            raise Unusable(f"the seeds of {method.label} have no evaluation in common")
        last = [{k: column[seed["iteration"] == common[-1]][0] for k, column in seed.items()} for seed in method.tables]
        frames = f"{np.mean([row['charts/frames'] for row in last]) / 1e6:.2f}"
        values = {k: [row[k] for row in last if k in row] for k in shown}
        cells = [cell(x, 2 if k == "eval/nmi" else digits) for k, x in values.items()]
        rows.append([method.label, frames, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(options: Options) -> None:
    try:
        if not options.runs:
            raise Unusable("no run folder given, see --help")
        settings = [read_args(run) for run in options.runs]
        if len({run.resolve() for run in options.runs}) < len(options.runs):
            raise Unusable("a run is given twice")
        must_agree(settings)
        if has_column(options.runs[0] / "eval.csv", "eval/distance_"):
            raise Unusable("rmaml_reaching.py has strategies, and no table: see its eval.csv")
        compared = methods(settings, [read_csv(run / "eval.csv") for run in options.runs])
        digits = options.digits if options.digits is not None else 3 if is_supervised(settings[0]) else 1
        print(table(compared, options.clusters, digits))
    except (Unusable, OSError) as error:
        raise SystemExit(f"table.py: error: {' '.join(str(error).split())}") from None


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
