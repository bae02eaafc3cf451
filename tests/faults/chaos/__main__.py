"""A trial on the command line: python -m tests.faults.chaos --seed 1 --seconds 3600"""

from __future__ import annotations

import argparse
import random
import signal
import sys
from pathlib import Path

from tests.faults.chaos.trial import Options, Trial


def main() -> int:
    """Run a trial; the exit status is 1 if anything did not hold."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument(
        "--seed", type=int, default=random.randrange(2**32), help="seed of the faults [random]"
    )
    parser.add_argument("--seconds", type=float, default=Options.seconds, help="length [%(default)s]")
    parser.add_argument("--faults", type=int, default=Options.faults, help="number of faults at most")
    parser.add_argument(
        "--every", type=float, default=Options.every, help="seconds between two [%(default)s]"
    )
    parser.add_argument("--jobs", type=int, default=Options.jobs, help="training jobs at once [%(default)s]")
    parser.add_argument(
        "--patience", type=float, default=Options.patience, help="seconds to go on [%(default)s]"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the result as JSON")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="folder for the files of failed runs")
    given = vars(parser.parse_args())
    file, keep = given.pop("json"), given.pop("keep")
    options = Options(**given)
    print(options.command(), flush=True)
    for number in (signal.SIGTERM, signal.SIGHUP):  # else jobs, mounts and namespaces stay
        signal.signal(number, lambda *_: sys.exit(1))
    result = Trial(options, lambda line: print(line, flush=True), keep).run()
    print(result)
    if file is None:
        print(result.json())
    else:
        file.write_text(result.json())
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())
