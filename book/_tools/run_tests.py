"""Run every step of the tests, print the time of each, and close with one summary that names every skip."""

import argparse
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

REPORTS = Path("_build/reports")
STEPS = {
    "units, oracles, peers, the book's rules": ["tests", "--ignore=tests/notebooks", "--ignore=tests/site", "-n", "2"],
    "notebooks, strict, as on Colab": ["tests/notebooks"],
    "the site in a browser": ["tests/site"],
}


def run(name: str, arguments: list[str]) -> tuple[dict[str, int], list[str], float]:
    """One pytest step: counts by outcome, one line per skip, seconds."""
    report = REPORTS / f"{arguments[0].replace('/', '-')}.xml"
    report.unlink(missing_ok=True)
    print(f"\n=== {name}", flush=True)
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}", *arguments]
    code = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
    seconds = time.perf_counter() - start
    if not report.exists():
        return {"passed": 0, "failed": 1, "skipped": 0}, [], seconds
    counts, skips = read(report)
    if code and not counts["failed"]:
        counts["failed"] = 1
    return counts, skips, seconds


def read(report: Path) -> tuple[dict[str, int], list[str]]:
    """Counts and skips of a JUnit report."""
    cases = list(ET.parse(report).iter("testcase"))
    skips = [f"{c.get('name')}: {c.find('skipped').get('message')}" for c in cases if c.find("skipped") is not None]
    failed = sum(c.find("failure") is not None or c.find("error") is not None for c in cases)
    return {"passed": len(cases) - failed - len(skips), "failed": failed, "skipped": len(skips)}, skips


def main() -> int:
    """Run the steps; the exit code is 1 after a failure, or after a skip with --no-skips."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-skips", action="store_true", help="count a skipped test as a failure")
    arguments = parser.parse_args()
    REPORTS.mkdir(parents=True, exist_ok=True)
    results = {name: run(name, step) for name, step in STEPS.items()}
    print("\n=== summary")
    for name, (counts, _, seconds) in results.items():
        print(f"{seconds:6.0f} s  {name}: {', '.join(f'{n} {word}' for word, n in counts.items())}")
    skips = sorted({line for _, lines, _ in results.values() for line in lines})
    for line in skips:
        print("skipped:", line)
    total = {word: sum(r[0][word] for r in results.values()) for word in ("passed", "failed", "skipped")}
    print(", ".join(f"{n} {word}" for word, n in total.items()))
    if skips and arguments.no_skips:
        print("skips are not allowed here")
    return int(total["failed"] > 0 or (bool(skips) and arguments.no_skips))


if __name__ == "__main__":
    sys.exit(main())
