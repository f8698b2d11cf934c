"""docs/differences.md: how many lines each script has changed of the script that it is derived from.

The last section, which is the same in every script, is not counted.

python tests/test_differences.py     writes the table anew
"""

import difflib
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "differences.md"
PAIRS = [
    ("milet", "varibad"), ("varibad", "rl2"), ("milet", "rl2"), ("maml", "promp"), ("maml", "cml"), ("cml", "fcml"),
    ("maml", "rmaml"), ("maml", "hom"), ("promp", "mmaml"), ("pearl", "sop"), ("pearl", "metacure"),
]  # fmt: skip
TABLE = re.compile(r"(?<=<!-- table -->\n\n).*?(?=\n<!-- end -->)", re.S)


def sections(script: str) -> dict[str, list[str]]:
    """The lines of a script by section, without empty lines and copy marks; the algorithm's own sections as one."""
    own, found = "the algorithm's own sections", {}
    shared = "Args", "Networks", "Sampler", "Evaluation", "Training"
    text = (ROOT / "algos" / f"{script}.py").read_text().split("# == The same in every script")[0]
    parts = re.split(r"^# == (.+?) =+\n", text, flags=re.M)
    header, imports = re.match(r'(""".*?""")(.*)', parts[0], re.S).groups()
    named = [("header", header), ("imports", imports), *zip(parts[1::2], parts[2::2])]
    for name, text in named:
        lines = [line for line in text.splitlines() if line.strip() and not line.startswith("# Copied from")]
        found.setdefault(name if name in shared or name in ("header", "imports") else own, []).extend(lines)
    return found


def change(before: list[str], after: list[str]) -> tuple[int, int]:
    """Lines removed and added."""
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    same = sum(block.size for block in matcher.get_matching_blocks())
    return len(before) - same, len(after) - same


def table() -> str:
    """A row a pair, a column a section: lines removed, lines added."""
    found = {script: sections(script) for pair in PAIRS for script in pair}
    names = list(found["milet"])
    rows = [["", *names, "all", "kept"], ["---"] * (len(names) + 3)]
    for base, derived in PAIRS:
        changes = [change(found[base].get(name, []), found[derived].get(name, [])) for name in names]
        removed, added = map(sum, zip(*changes))
        size = sum(map(len, found[derived].values()))
        counts = [f"−{m} +{n}" if m or n else "the same" for m, n in [*changes, (removed, added)]]
        rows.append([f"{base} → {derived}", *counts, f"{1 - added / size:.0%} of {size} lines"])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def test_the_table_is_that_of_the_scripts():
    assert TABLE.search(PAGE.read_text())[0] == table(), f"run {Path(__file__).name} as a script"


def test_changes_are_counted():
    assert change(list("abcd"), list("abxyd")) == (1, 2)
    assert change(list("ab"), list("ab")) == (0, 0)


def test_a_derived_script_is_a_small_edit():
    """Outside the header and the algorithm's own sections most lines are the base's.

    But for RL2's, which is VariBAD, and MetaCURE's, whose two agents and ordered contexts half of PEARL does not fit.
    """
    for base, derived in set(PAIRS) - {("milet", "rl2"), ("pearl", "metacure")}:
        before, after = sections(base), sections(derived)
        names = set(before) - {"header", "the algorithm's own sections"}
        added = sum(change(before[name], after[name])[1] for name in names)
        assert added < 0.42 * sum(len(after[name]) for name in names), (base, derived)


if __name__ == "__main__":
    PAGE.write_text(TABLE.sub(lambda _: table(), PAGE.read_text()))
