"""Run every step of the tests, print the time of each, and close with one summary that names every skip."""

import argparse
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

REPORTS = Path("_build/reports")
SIDE_BY_SIDE = ["-n", "2"]
STEPS = {
    "units, oracles, peers, the book's rules": [
        "tests",
        *(f"--ignore=tests/{folder}" for folder in ("notebooks", "site", "speed")),
        *SIDE_BY_SIDE,
    ],
    "speed beside learn2learn": ["tests/speed"],
    "notebooks, strict, as on Colab": ["tests/notebooks", *SIDE_BY_SIDE],
    "the site in a browser": ["tests/site", *SIDE_BY_SIDE],
}


class Result(NamedTuple):
    """What came of one step: numbers of tests, one line per skip, seconds."""

    passed: int
    failed: int
    skips: list[str]
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {len(self.skips)} skipped"


def run(name: str, arguments: list[str], environment: dict[str, str]) -> Result:
    """One pytest step, with `environment` on top of the present one."""
    if not Path(arguments[0]).is_dir():
        return Result(0, 0, [f"{name}: there is no folder {arguments[0]}"])
    print(f"\n=== {name}", flush=True)
    REPORTS.mkdir(parents=True, exist_ok=True)
    report = REPORTS / f"{''.join(c if c.isalnum() else '-' for c in name)}.xml"
    report.unlink(missing_ok=True)
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}", *arguments]
    code = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment).returncode
    result = read(report, code)._replace(seconds=time.perf_counter() - start)
    print(f"=== {name}: {result} in {result.seconds:.0f} s", flush=True)
    return result


def read(report: Path, code: int) -> Result:
    """The result that a JUnit report holds; pytest's exit code counts as a failure where the report names none."""
    cases = list(ET.parse(report).iter("testcase")) if report.exists() else []
    skips = [skip(case) for case in cases if case.find("skipped") is not None]
    failed = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    return Result(len(cases) - failed - len(skips), failed or int(code != 0), skips)


def skip(case: ET.Element) -> str:
    """One line that names a skipped test and says why."""
    name = ".".join(filter(None, (case.get("classname"), case.get("name"))))
    return f"{name}: {' '.join(case.find('skipped').get('message', '').split())}"


def summary(results: dict[str, Result]) -> Result:
    """Print every step, every skip and, as the last line, the totals; returns the totals."""
    print("\n=== summary")
    for name, result in results.items():
        print(f"{result.seconds:6.0f} s  {name}: {result}")
    skips = [line for result in results.values() for line in result.skips]
    for line in skips:
        print("skipped:", line)
    total = Result(sum(r.passed for r in results.values()), sum(r.failed for r in results.values()), skips)
    print(total, flush=True)
    return total


def main() -> int:
    """Run the steps; the exit code is 1 after a failure, or after a skip with --no-skips."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-skips", action="store_true", help="count a skipped test as a failure")
    arguments = parser.parse_args()
    total = summary({name: run(name, step, {}) for name, step in STEPS.items()})
    if total.skips and arguments.no_skips:
        print("Skipped tests count as failures here (--no-skips).", file=sys.stderr)
    return int(total.failed > 0 or (bool(total.skips) and arguments.no_skips))


if __name__ == "__main__":
    sys.exit(main())
