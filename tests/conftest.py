import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

import envs

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "algos"), str(ROOT / "tests")]
torch.set_num_threads(1)  # pytest has one worker a core: more threads would wait for each other


@contextmanager
def own_environments() -> Iterator[None]:
    """A script that is run by its path registers classes of its own; those of the imported one come back."""
    known = dict(envs.ENVIRONMENTS)
    yield
    envs.ENVIRONMENTS.update(known)


def spy_on(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> list[tuple[tuple, object]]:
    """Arguments and result of every call of a function, or of a method, that still does its work."""
    calls, function = [], getattr(owner, name)

    def called(*args, **kwargs):
        calls.append((args, function(*args, **kwargs)))
        return calls[-1][1]

    monkeypatch.setattr(owner, name, called)
    return calls


def train(script: ModuleType, **flags) -> Path:
    """Train with these arguments in this process; the run folder."""
    args = script.Args(preset="paper", num_threads=1, **flags)
    run = script.Run(args)
    script.train(args, run)
    return run.path
