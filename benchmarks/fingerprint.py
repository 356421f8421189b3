"""Print what refactoring must not change: digests of weights and outputs, losses and scores, as JSON.

    python benchmarks/fingerprint.py > before.json      (then change the code)
    python benchmarks/fingerprint.py --against before.json

Trains on a synthetic stack and, if the ISBI 2012 stack is there, three epochs on it with both normalisations, on 24
sections each. On one CPU and one version of torch the digests of two runs are equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch

ROOT = Path(__file__).resolve().parent.parent
ISBI = ROOT.parent / "shared" / "isbi2012"
DEMO = "--nch_ker 16 --ny_load 192 --nx_load 192 --num_epoch 30"
REAL = "--nch_ker 16 --num_epoch 3 --norm "


def main() -> int:
    """Print the digests, or compare them with those of a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="JSON of an earlier run to compare with")
    parser.add_argument("--root", type=Path, default=ROOT, help="clone to run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run_all(args.root, Path(folder))
    if not args.against:
        print(json.dumps(found, indent=1))
        return 0
    differences = list(compare(json.loads(args.against.read_text()), found))
    print("\n".join(differences) or "all equal")
    return int(bool(differences))


def run_all(root: Path, work: Path) -> dict[str, Any]:
    """Digests of each training, under its name."""
    program(root, work, "run_make_database.py", "--name_data demo --synthetic 30 --num_val 3 --num_test 3")
    found = {"demo": run(root, work, "demo", DEMO)}
    if ISBI.is_dir():
        stacks = f"--input {ISBI / 'train-volume.tif'} --label {ISBI / 'train-labels.tif'}"
        program(root, work, "run_make_database.py", f"--name_data em {stacks} --num_val 3 --num_test 3")
        found |= {norm: run(root, work, "em", f"{REAL}{norm} --scope {norm}") for norm in ("bnorm", "inorm")}
    return found


def run(root: Path, work: Path, name: str, flags: str) -> dict[str, Any]:
    """Train, test and predict once."""
    scope = flags.partition("--scope ")[2] or "unet"
    common = f"--name_data {name} --scope {scope} --gpu_ids -1"
    program(root, work, "main.py", f"--mode train {common} {flags.partition('--scope')[0]}")
    program(root, work, "main.py", f"--mode test {common}")
    image = work / "image.npy"
    np.save(image, np.load(work / "datasets" / name / "test" / "00000.npy")["input"][..., 0])
    predict = f"--mode predict {common} --input {image} --what probability,mask,cells --dtype float32 --output"
    program(root, work, "main.py", f"{predict} {work / 'out.tif'}")
    newest = max((work / "checkpoints" / scope / name).glob("model_epoch*.pth"))
    saved = torch.load(newest, weights_only=True)
    return {
        "weights": digest(saved["net"]),
        "average": digest(saved["average"]["net"]),
        "losses": saved["losses"],
        "threshold": saved["threshold"],
        "scores": json.loads((work / "results" / scope / name / "metrics.json").read_text())["mean"],
        "pictures": digest({p.name: p.read_bytes() for p in (work / "results" / scope / name / "images").iterdir()}),
        "outputs": digest({path.name: tifffile.imread(path) for path in work.glob("out-*.tif")}),
    }


def program(root: Path, work: Path, script: str, flags: str) -> None:
    """Run a program, silently unless it fails."""
    done = subprocess.run([sys.executable, root / script, *flags.split()], cwd=work, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{script} {flags}: {done.stderr}")


def digest(parts: dict[str, Any]) -> str:
    """SHA-256 of named arrays, tensors or bytes, in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(parts):
        part = parts[name]
        total.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).tobytes())
    return total.hexdigest()


def compare(before: Any, after: Any, path: str = "") -> Any:
    """Lines with the differences of two results."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            yield from compare(before.get(key), after.get(key), f"{path}/{key}")
    elif before != after:
        yield f"{path}: {before} -> {after}"


if __name__ == "__main__":
    sys.exit(main())
