"""What the words promise: citations, commands, tables, links."""

import importlib
import re
import runpy
import shlex
import shutil
import signal
import sys
import tokenize
from pathlib import Path

import pytest
from conftest import ROOT, own_environments

import envs

SCRIPTS = sorted((ROOT / "algos").glob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BELIEF = "--frames 240 --num-envs 4 --horizon 10"
GRADIENT = "--iterations 2 --tasks 4 --rollouts 2 --horizon 10"
SHORT = {  # flags of a short run
    "milet": f"{BELIEF} --vae-batch 8 --elbo-terms 4 --decodes 5 --minibatches 8",
    "varibad": f"{BELIEF} --vae-batch 8 --elbo-terms 4 --decodes 5",
    "rl2": BELIEF,
    "maml": GRADIENT,
    "promp": GRADIENT,
    "cml": GRADIENT,
    "fcml": f"{GRADIENT} --warmup 1",
    "mmaml": "--iterations 2 --tasks 12 --rollouts 2 --horizon 10",
    "mmaml_regression": "--iterations 2 --tasks 30 --hidden 8 8 8",
    "mmaml_classification": "--iterations 2 --tasks 3 --img-size 8 --channels 4 4 --embedding 4 --eval-episodes 2",
    "rmaml": "--iterations 2 --tasks 8 --rollouts 2 --horizon 10",
    "hom": "--iterations 2 --tasks 4 --rollouts 3 --horizon 10 --probe-iterations 1 --train-tasks 8",
    "rmaml_reaching": "--iterations 2 --repeats 2",
    "pearl": "--iterations 2 --train-tasks 2 --horizon 20 --initial-steps 40 --prior-steps 40 --extra-steps 40 "
    "--gradient-steps 2 --meta-batch 2",
    "sop": "--iterations 2 --probe-iterations 1 --train-tasks 4 --embed-repeats 2 --horizon 20 --initial-steps 40 "
    "--visits 4 --prior-steps 40 --extra-steps 40 --gradient-steps 2 --meta-batch 2",
    "metacure": "--iterations 2 --train-tasks 4 --horizon 20 --explorer-episodes 1 --initial-trials 1 "
    "--initial-steps 20 --visits 2 --trials 1 --prior-steps 20 --posterior-steps 40 --gradient-steps 2 "
    "--meta-batch 2 --batch 16",
}
COMMANDS = sorted({c.strip() for page in PAGES for c in re.findall(r"python algos/[^`\n#]+", page.read_text())})


def shortened(command: str) -> str:
    """For two or three meta-iterations: commands that differ in their budget become one."""
    _, script, *words = [w.rstrip(",.;)") for w in shlex.split(command)]
    short = ["--num-threads", "1"]
    if "--evaluate" not in words:
        short += ["--eval-every", "2", *SHORT[Path(script).stem].split()]
    for flag in {f for f in short if f.startswith("--")} & set(words):
        del words[words.index(flag) : words.index(flag) + 2]
    for flag in {"--switch-at", "--oracle-warmup"} & set(words):  # within the short run
        words[words.index(flag) + 1] = "1"
    if "task-specific" in words:
        short += ["--pretrain", "1"]
    return shlex.join([script, *words, *short])


def names(script: Path) -> set[str]:
    """Of what its code defines or uses, not of what it says."""
    with script.open() as file:
        return {token.string for token in tokenize.generate_tokens(file.readline) if token.type == tokenize.NAME}


def equations(text: str) -> set[int]:
    """The numbers n of `Eq. (n)`, `Eq. (m), (n)` and `Eq. (m)-(n)`."""
    found = set()
    for group in re.findall(r"Eq\. (\(\d+\)(?:(?:-|, )\(\d+\))*)", text):
        for first, last in re.findall(r"\((\d+)\)(?:-\((\d+)\))?", group):
            found |= set(range(int(first), int(last or first) + 1))
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_equations_and_functions_of_the_header_stand_in_the_body_and_deviations_in_both(script):
    _, header, body = script.read_text().split('"""', 2)
    deviations = lambda text: set(re.findall(r"\bD\d+\b", text))  # noqa: E731
    assert equations(header) == equations(body)
    code = body.split("# == Networks")[1]
    assert len(re.findall(r"\b(?:Eq|Alg)\. ", code)) >= 8, "places that say which equation they compute"
    assert deviations(header) == deviations(body)
    for name in re.findall(r"(?<=-> )[A-Za-z_.]+(?:, [A-Za-z_.]+)*", header):
        for word in re.findall(r"\w+", name):
            assert word in names(script), word


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.stem != "rmaml_reaching"], ids=lambda p: p.stem)
def test_the_page_names_what_is_in_the_script(script):
    """In the column `where` of its table of equations."""
    page = (ROOT / "docs" / f"{script.stem}.md").read_text()
    rows = re.search(r"^\|.*\| where \|\n\|[-|]+\n((?:\|.*\n)+)", page, re.M)[1]
    cells = " ".join(re.findall(r"[^|]*(?= \|$)", rows, re.M))
    found = re.findall(r"[a-zA-Z_]+", " ".join(re.findall(r"`([^`]+)`", cells)))
    assert len(found) > 3 and {*found} <= names(script)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_the_same_sections_in_the_same_order(script):
    sections = re.findall(r"^# == (.+?) =+$", script.read_text(), re.M)
    order = ["Args", "Networks", "Sampler", "Evaluation", "Training", "The same in every script"]
    assert [s for s in sections if s in order] == order


def test_the_first_fields_of_args_are_the_same_in_every_script():
    """But for default values, the budget, and what is counted between evaluations and checkpoints."""
    fields = {}
    for script in SCRIPTS:
        own = re.search(r"class Args:\n(.*?)\n\n", script.read_text(), re.S)[1]
        fields[script.stem] = [re.sub(r" = [^#]+ #", " #", line) for line in own.splitlines() if "_every:" not in line]
    for script, lines in fields.items():
        same = [line for line in lines if not line.startswith(("    frames:", "    iterations:"))]
        assert same == [x for x in fields["milet"] if not x.startswith("    frames:")], script


def test_tables_list_every_environment_and_script():
    readme, page = (ROOT / "README.md").read_text(), (ROOT / "docs" / "environments.md").read_text()
    shipped = [i for i, env in envs.ENVIRONMENTS.items() if env.__module__.startswith("envs.")]
    for env_id in shipped:
        assert f"`{env_id}`" in readme and f"`{env_id}`" in page
    for script in SCRIPTS:
        assert f"algos/{script.name}" in readme and f"](docs/{script.stem.split('_')[0]}" in readme
        lines = script.read_text().split("# == The same in every script")[0].count("\n")
        assert re.search(rf"algos/{script.name}\).*\| {lines} \|", readme), "the number of lines above the last section"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_the_agent_in_ones_own_code_walks(monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "milet.md").read_text(), re.S)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    names = {}
    exec(code, names)
    assert names["exploit"].reward.sum(0).mean() > -160  # standing still: -261


@pytest.mark.parametrize("command", sorted({shortened(c) for c in COMMANDS if "RUN" not in c}), ids=str)
def test_documented_commands_run(command, tmp_path, monkeypatch):
    """Within this process; those on RUN are in test_runs.py."""
    if "my_envs" in command:
        source = (ROOT / "docs" / "environments.md").read_text()
        (template,) = re.findall(r"```python\n(import numpy as np\n\nimport envs\n.*?)```", source, re.S)
        (tmp_path / "my_envs.py").write_text(template)
        assert len(template.splitlines()) <= 35
    script, *words = shlex.split(command)
    if "--evaluate" in words:
        folder = words.index("--evaluate") + 1
        words[folder] = str(shutil.copytree(ROOT / words[folder], tmp_path / "runs" / "copy"))
    else:
        words += ["--run-dir", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.syspath_prepend(tmp_path)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    with own_environments():
        runpy.run_path(str(ROOT / script), run_name="__main__")
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    (data,) = (tmp_path / "runs").glob("*/eval.npz")
    if "my_envs" in command:  # a trace of one coordinate
        plot = runpy.run_path(str(ROOT / "results" / "plot.py"))
        plot["main"](plot["Options"](runs=(data.parent,)))
        assert (data.parent / "figures" / "learning_curve.png").exists()


def test_commands_on_runs_name_real_flags():
    on_runs = [c for c in COMMANDS if "RUN" in c]
    assert on_runs
    for command in on_runs:
        script = importlib.import_module(re.match(r"python algos/(\w+)\.py", command)[1])
        for flag in re.findall(r"--([a-z-]+)", command):
            assert hasattr(script.Args, flag.replace("-", "_")), command


def test_nothing_is_left_to_be_filled_in():
    for path in [*SCRIPTS, *PAGES]:
        assert not re.search(r"TODO|TESTED|RESULT|LINES|@[A-Z]{2}|[A-Z]RES:", path.read_text()), path


def test_package_ships_only_the_environments():
    config = (ROOT / "pyproject.toml").read_text()
    assert 'packages = ["envs"]' in config
    requirements = Path(ROOT / "requirements.txt").read_text().splitlines()
    assert requirements[-1] == "-e ." and all("==" in line for line in requirements[:-1])
