"""``python -m tests.fuzz --draws 10000 --seed 0 --device cpu``: many draws, and totals; exits with 1 on a mismatch."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

import torch

from reimplementation import ops
from tests.fuzz.checking import Mismatch, check
from tests.fuzz.draws import draw
from tests.ops.table import OPS

ENOUGH = 20  # mismatches after which to stop


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split(":")[0])
    parser.add_argument("--draws", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--ops", nargs="+", choices=[op.name for op in OPS], help="the draws of these alone")
    parser.add_argument("--backend", choices=ops.backends.BACKENDS, help="default: any of the device's")
    parser.add_argument("--seconds", type=float, help="begin no draw after that: on triton most are compiled first")
    parser.add_argument("--only", type=int, metavar="K", help="draw number K alone")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    numbers = range(arguments.draws) if arguments.only is None else [arguments.only]

    began, totals, mismatches = time.monotonic(), Counter(), 0
    for number in numbers:
        if arguments.seconds and time.monotonic() > began + arguments.seconds:
            break
        # Should the process die, this line names the draw that it died of.
        print(f"\rdraw {number} ", end="", file=sys.stderr, flush=True)
        drawn = draw(arguments.seed, number, device, arguments.backend)
        if arguments.ops and drawn.op.name not in arguments.ops:
            continue
        what = f"{drawn.op.name} on {drawn.backend}"
        try:
            totals[what, check(drawn)] += 1
        except Mismatch as mismatch:
            mismatches += 1
            again = reproducer(arguments.seed, number, device, arguments.backend)
            print(f"\n{again}  # {what}: {mismatch} [{drawn.story}]", flush=True)
            if mismatches == ENOUGH:
                print("stopped: that is enough")
                break
    print(f"\r{' ' * 20}\r", end="", file=sys.stderr, flush=True)
    for (what, outcome), count in sorted(totals.items()):
        print(f"{what}: {count} {outcome}")
    print(
        f"seed {arguments.seed}, {device.type}: {totals.total() + mismatches} draws, {mismatches} mismatches, "
        f"{time.monotonic() - began:.0f} s; the extension: {ops.build_info()['file']}"
    )
    return 1 if mismatches else 0


def reproducer(seed: int, number: int, device: torch.device, backend: str | None) -> str:
    chosen = f" --backend {backend}" if backend else ""
    return f"python -m tests.fuzz --seed {seed} --device {device.type}{chosen} --only {number}"


if __name__ == "__main__":
    sys.exit(main())
