import os
import sys
from pathlib import Path

os.environ.setdefault("MUJOCO_GL", "osmesa")  # rendering without a screen
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "algos"), str(ROOT / "tests")]
