"""Verify the stored outputs under other thread counts and instruction sets: `make matrix`."""

import os
import subprocess
import sys

SETTINGS = {
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "no vector instructions in ATen": {"ATEN_CPU_CAPABILITY": "default"},
    "AVX2 in ATen": {"ATEN_CPU_CAPABILITY": "avx2"},
    "MKL in compatible mode": {"MKL_CBWR": "COMPATIBLE"},
}


def main() -> int:
    """One strict run of every notebook per setting; the exit code is 1 if one differs."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/notebooks", "-k", "strictly"]
    failed = 0
    for name, variables in SETTINGS.items():
        print(f"=== {name}", flush=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "METALEARN_UNTIMED": "1"} | variables
        failed += subprocess.run(command, env=environment).returncode != 0
    print(f"{len(SETTINGS) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
