"""Strikes training over ranks with faults drawn from a seed: ``soak.py [SCHEDULES] [SEED]``.

Asserts that nobody hangs, and that the survivors of each schedule end with the bits of an undisturbed run.
"""

import secrets
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from recovery_runs import schedule, survived


def main(schedules: int = 50, seed: int | None = None) -> int:
    seed = secrets.randbits(30) if seed is None else seed
    print(f"{schedules} schedules from seed {seed}", flush=True)
    failed = []
    for number in range(seed, seed + schedules):
        world, run = schedule(number)
        struck = ", ".join(f"{x.kind} {x.rank} at {x.step} ({x.phase})" for x in run.faults)
        start = time.monotonic()
        try:
            survived(world, run)
            outcome = "ok"
        except Exception:
            traceback.print_exc()
            failed.append(number)
            outcome = "FAILED"
        took = time.monotonic() - start
        print(f"{number}: {world} ranks, every {run.every}: {struck}: {outcome}, {took:.0f} s", flush=True)
    print(f"{schedules - len(failed)} of {schedules} ended as they should; not: {failed}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
