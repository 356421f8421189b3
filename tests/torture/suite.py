"""Runs the cases of all parts in forked workers, and prints the table."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from . import badinput, crashpoints, disk, fuzz, kills, power, writers
from .cases import KINDS, Case, Fault, Part, Start
from .project import preload
from .workers import run_cases

ALL = (kills.PART, crashpoints.PART, power.PART, writers.PART, disk.PART, fuzz.PART, badinput.PART)
PARTS = {part.name: part for part in ALL}


@dataclass
class Row:
    """One row of the table."""

    name: str
    tried: int = 0
    faults: list[tuple[Fault, str]] = field(default_factory=list)  # each with the command that shows it again
    seconds: float = 0.0


def main(argv: list[str] | None = None) -> int:
    """Run the suite; returns 1 if anything was found."""
    flags = parse(argv)
    preload()
    with tempfile.TemporaryDirectory(prefix="torture-") as name:
        root = Path(name)
        root.chmod(0o755)  # some programs run as another user
        start = Start(root / "start")
        rows = [run_part(PARTS[part], start, root, flags) for part in flags.only]
    print_table(rows)
    return int(any(row.faults for row in rows))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Flags of the suite."""
    parser = argparse.ArgumentParser(prog="tests/torture/run.py", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="random seed of moments, damages and the choice of --quick")
    parser.add_argument("--quick", action="store_true", help="a random part of the cases, at most two minutes")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--case", type=int, help="this case alone, by its number")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    flags = parser.parse_args(argv)
    if unknown := [name for name in flags.only if name not in PARTS]:
        parser.error(f"--only {','.join(unknown)}: choose from {', '.join(PARTS)}")
    return flags


def run_part(part: Part, start: Start, root: Path, flags: argparse.Namespace) -> Row:
    """Run one part."""
    row, began = Row(part.name), time.monotonic()
    cases = part.cases(start)
    numbers = chosen(cases, part, flags)
    if missing := part.without():
        print(f"{part.name}: skipped {missing}", flush=True)
    for number, faults in run_cases(cases, numbers, root / part.name, f"{flags.seed}-{part.name}", flags.jobs):
        row.tried += 1
        again = f"python tests/torture/run.py --seed {flags.seed} --only {part.name} --case {number}"
        for fault in faults:
            row.faults.append((fault, again))
            print(f"{fault.kind}: {part.name}/{cases[number].name}: {fault.text}\n    {again}", flush=True)
        show_progress(part.name, row.tried, len(numbers))
    row.seconds = time.monotonic() - began
    return row


def chosen(cases: Sequence[Case], part: Part, flags: argparse.Namespace) -> list[int]:
    """Numbers of the cases to run; `--quick` takes some of each name; their numbers stay."""
    if flags.case is not None:
        return [flags.case]
    numbers = list(range(len(cases)))
    if not flags.quick:
        return numbers
    Random(f"{flags.seed}-{part.name}").shuffle(numbers)
    names, seen = Counter(case.name for case in cases), Counter()
    order = {}  # the first of each name, the second...; of names with more cases more
    for number in numbers:
        name = cases[number].name
        order[number] = seen[name] / names[name]
        seen[name] += 1
    return sorted(sorted(numbers, key=order.__getitem__)[: part.quick])


def show_progress(name: str, done: int, total: int) -> None:
    """Count on a terminal."""
    if sys.stderr.isatty() and (done == total or done % max(1, total // 100) == 0):
        print(f"\r{name} {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def print_table(rows: list[Row]) -> None:
    """The result: how many cases were tried, and how many faults of each kind were found."""
    head = ["part", "tried", *KINDS, "seconds"]
    lines = [head]
    for row in rows:
        counts = [str(sum(fault.kind == kind for fault, _ in row.faults)) for kind in KINDS]
        lines.append([row.name, str(row.tried), *counts, f"{row.seconds:.0f}"])
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    print()
    for line in lines:
        print(
            "  ".join(
                text.ljust(w) if n == 0 else text.rjust(w) for n, (text, w) in enumerate(zip(line, widths, strict=True))
            )
        )
    print(f"{os.cpu_count()} cores, {sum(row.seconds for row in rows):.0f} s", flush=True)
