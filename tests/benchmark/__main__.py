"""Command line: `python -m tests.benchmark`, see --help and the Makefile."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sqlite3
import sys
from pathlib import Path
from typing import Any

from .limits import limits
from .peers import BASELINE, PEERS
from .report import losses, markdown, svg
from .runner import Raw, measure, medians, ratios
from .workloads import NAMES, NORMAL, QUICK

HERE = Path(__file__).parent
STORED = HERE / "ratios.json"
PLOT = HERE.parents[1] / "docs" / "performance.svg"
ALLOWED = 0.25  # loss that `--check` tolerates
PEER = "NEO"


def describe() -> dict[str, Any]:
    """The machine."""
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "limits": limits(),
    }


def joined(paths: list[Path]) -> tuple[dict[str, Any], dict[str, str], Raw]:
    """Several outputs as if they were of one run, with the machine of the last one."""
    raw: Raw = {}
    absent: dict[str, str] = {}
    for path in paths:
        content = json.loads(path.read_text())
        absent.update(content["absent"])
        for workload, by_peer in content["raw"].items():
            for peer, runs in by_peer.items():
                raw.setdefault(workload, {}).setdefault(peer, []).extend(runs)
    return content["machine"], absent, raw


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.benchmark", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="smaller sizes")
    add("--repetitions", type=int, default=3)
    add("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER")
    add("--workloads", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME")
    add("--output", type=Path, help="write all figures as JSON")
    add("--show", type=Path, nargs="+", help="of former runs instead of a new one")
    add("--plot", action="store_true", help=f"make {PLOT.name} anew")
    add("--store", action="store_true", help=f"make {STORED.name} anew")
    add("--check", action="store_true", help="fail if a stored ratio is lost")
    args = parser.parse_args()
    if args.store or args.check:
        args.peers = [BASELINE, PEER]
    if args.show:
        machine, absent, raw = joined(args.show)
    else:
        machine = describe()
        print(json.dumps(machine, indent=1))
        sizes = QUICK if args.quick else NORMAL
        raw, absent = measure(args.peers, args.workloads, sizes, args.repetitions)
    table = medians(raw)
    found = ratios(table)
    present = [peer for peer in args.peers if peer not in absent]
    print(f"\nMedians\n\n{markdown(table, present)}")
    print(f"\nTimes better than {BASELINE}\n\n{markdown(found, present)}")
    if args.output:
        content = {"machine": machine, "absent": absent, "raw": raw}
        args.output.write_text(json.dumps(content, indent=1) + "\n")
    if args.plot:
        PLOT.write_text(svg(found, present, f"Times better than {BASELINE}"))
    own = {metric: row[PEER] for metric, row in found.items() if PEER in row}
    # The slowest of many depends on the machine's other work.
    own = {metric: round(x, 2) for metric, x in own.items() if "p99" not in metric}
    if args.store:
        STORED.write_text(json.dumps(own, indent=1) + "\n")
    if args.check:
        stored = json.loads(STORED.read_text())
        wanted = {m: x for m, x in stored.items() if m.split()[0] in args.workloads}
        lost = losses(found, wanted, PEER, ALLOWED)
        print("\n".join(["", *lost, f"{len(lost)} of {len(wanted)} ratios lost"]))
        return bool(lost)
    return 0


if __name__ == "__main__":
    sys.exit(main())
