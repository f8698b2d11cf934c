"""What is the same in several scripts stays the same.

A function under `# Copied from algos/x.py` has the lines of x.py's, comments included; the last section of every script
is milet.py's, to the byte.

python tests/test_copies.py     rewrites every copy from its source, and every last section from milet.py
"""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MARK = re.compile(r"^# Copied from (\S+)\n((?:@.*\n)*(?:def|class) (\w+))", re.M)
SCRIPTS = sorted((ROOT / "algos").glob("*.py"))
COPIES = [(script, source, name) for script in SCRIPTS for source, _, name in MARK.findall(script.read_text())]
LAST = "# == The same in every script ==========="
ORIGINAL = ROOT / "algos" / "milet.py"


def halves(script: Path) -> tuple[str, str]:
    """The algorithm, and the last section."""
    algorithm, last = script.read_text().split(LAST)
    return algorithm, LAST + last


@functools.cache
def parsed(text: str) -> ast.Module:
    return ast.parse(text)


def definition(path: Path, name: str) -> slice:
    """The lines of the top-level function or class of that name, decorators included."""
    for node in parsed(path.read_text()).body:
        if getattr(node, "name", None) == name:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            return slice(first - 1, node.end_lineno)
    raise LookupError(f"{path} defines no {name}")


def same(script: Path, source: Path, name: str) -> bool:
    copy, original = (path.read_text().splitlines()[definition(path, name)] for path in (script, source))
    return copy == original


def rewrite(script: Path, source: Path, name: str) -> None:
    """Replace the copy in the script by the source's definition."""
    lines, original = script.read_text().splitlines(True), source.read_text().splitlines(True)
    lines[definition(script, name)] = original[definition(source, name)]
    script.write_text("".join(lines))


@pytest.mark.parametrize("script, source, name", COPIES, ids=lambda x: getattr(x, "stem", x))
def test_copies_agree_with_their_source(script, source, name):
    assert script != ROOT / source
    assert same(script, ROOT / source, name), f"{name} differs from {source}: change that, then run {__file__}"


def test_every_mark_is_read():
    marks = sum(script.read_text().count("Copied from algos/") for script in SCRIPTS)
    assert marks == len(COPIES) > 0


def test_what_two_scripts_share_is_marked():
    """Definitions of the same name and content in two scripts: one of them says that it is a copy."""
    found, marked = {}, {(script, name) for script, _, name in COPIES}
    for script in SCRIPTS:
        for node in ast.parse(halves(script)[0]).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (script, node.name) not in marked:
                other = found.setdefault(ast.dump(node), script)
                assert other == script, f"{other.name}, {script.name}: one {node.name} needs the line # Copied from"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_the_last_section_is_the_same_and_nobody_reads_more_than_650_lines(script):
    algorithm, last = halves(script)
    assert last == halves(ORIGINAL)[1], f"run {__file__} as a script"
    assert len(last.splitlines()) <= 200 and len(algorithm.splitlines()) <= 650, "too many lines"


def test_a_drifted_copy_is_found_and_rewritten(tmp_path):
    source, copy = tmp_path / "a.py", tmp_path / "b.py"
    source.write_text("import os\n\n\n@os.fspath\ndef f(x):\n    return x  # why\n\n\nY = 1\n")
    for drifted in ("def f(x):\n    y = x\n    return y", "@os.fspath\ndef f(x):\n    return x  # because"):
        copy.write_text(f"X = 2\n\n\n# Copied from a.py\n{drifted}\n\n\nZ = 3\n")
        assert not same(copy, source, "f")
        rewrite(copy, source, "f")
        assert same(copy, source, "f")
        expected = "X = 2\n\n\n# Copied from a.py\n@os.fspath\ndef f(x):\n    return x  # why\n\n\nZ = 3\n"
        assert copy.read_text() == expected


if __name__ == "__main__":
    for script, source, name in COPIES:
        if not same(script, ROOT / source, name):
            rewrite(script, ROOT / source, name)
            print(f"{script.name}: {name} rewritten from {source}")
    for script in SCRIPTS:
        if halves(script)[1] != halves(ORIGINAL)[1]:
            script.write_text(halves(script)[0] + halves(ORIGINAL)[1])
            print(f"{script.name}: last section rewritten from {ORIGINAL.name}")
