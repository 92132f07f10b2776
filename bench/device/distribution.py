"""Make a source tree visible as an installed distribution, without pip and without a copy.

    python3 bench/device/distribution.py FOLDER     (FOLDER is on PYTHONPATH, as the tree is)

Problem: SGLang finds plugins through the entry points of installed distributions, and a GPU
machine without a package index has no build backend for ``pip install -e``.

Approach: what importlib.metadata reads is a folder ``NAME-VERSION.dist-info`` with METADATA and
entry_points.txt; both follow from setup.cfg.
"""

from __future__ import annotations

import configparser
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def write_dist_info(folder: Path, root: Path = ROOT) -> Path:
    """Write the dist-info of the tree at ``root`` into ``folder`` and return it."""
    setup = configparser.ConfigParser(delimiters=("=",))
    setup.read_string((root / "setup.cfg").read_text())
    name, version = setup["metadata"]["name"], setup["metadata"]["version"]
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    groups = setup["options.entry_points"].items()
    text = "\n".join(f"[{group}]\n{entries.strip()}\n" for group, entries in groups)
    (info / "entry_points.txt").write_text(text)
    return info


if __name__ == "__main__":
    print(write_dist_info(Path(sys.argv[1])))
