"""The CUDA tests under compute-sanitizer, in parts side by side: `make sanitize`, or python tests/sanitize.py --help.

Exits 1 if a tool found an error or a test failed, and shows that part's whole output.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

# Every allocation by itself, not from CuPy's pool, or memcheck would take the neighbour's bytes for the array's. It is
# the pool that makes OutOfMemoryError, which the wrappers expect, of the runtime's error: so it is done here too.
RUN_TESTS = """
import sys, cupy, pytest
from cupy.cuda.runtime import CUDARuntimeError

def allocate(size):
    try:
        return cupy.cuda.MemoryPointer(cupy.cuda.Memory(size), 0)
    except CUDARuntimeError as error:
        if error.status != 2:  # cudaErrorMemoryAllocation
            raise
        raise cupy.cuda.memory.OutOfMemoryError(size, 0) from error

class Report:
    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            print(f"{report.nodeid} {report.outcome} {report.duration:.1f} s", flush=True)

cupy.cuda.set_allocator(allocate)
sys.exit(pytest.main(["-p", "no:cacheprovider", "-p", "no:xdist", *sys.argv[1:]], [Report()]))
"""
# CuPy turns every failed call into an exception, so an unexpected one fails its test. Reported by memcheck, the call
# that the out-of-memory test provokes would be an error of its own. racecheck finds races within cuBLAS's own kernels
# for Hopper, which are not this project's to mend.
OPTIONS = {"memcheck": ["--report-api-errors", "no"], "racecheck": ["--kernel-name-exclude", "kernel_substring=nvjet"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog="Other arguments go to pytest.")
    parser.add_argument("--sanitizer", default="compute-sanitizer")
    parser.add_argument("--tools", nargs="+", default=["memcheck", "racecheck"])
    parser.add_argument("--parts", type=int, default=8, help="processes per tool, each with its share of the tests")
    parser.add_argument("--jobs", type=int, default=16, help="processes at a time")
    parser.add_argument("--logs", type=Path, help="where each part's output goes; a temporary folder if not given")
    args, for_pytest = parser.parse_known_args()
    logs = args.logs or Path(tempfile.mkdtemp(prefix="sanitize-"))
    logs.mkdir(parents=True, exist_ok=True)

    def run(job: tuple[str, int]) -> tuple[str, int, int, Path, float]:
        tool, part = job
        command = [args.sanitizer, "--tool", tool, "--error-exitcode", "1", *OPTIONS.get(tool, ()), sys.executable,
                   "-c", RUN_TESTS, *for_pytest]
        path, begin = logs / f"{tool}-{part}.log", time.perf_counter()
        with path.open("w") as log:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=Path(__file__).parents[1],
                                  env={**os.environ, "COCKTAIL_PART": f"{part}/{args.parts}"}, check=False)
        return tool, part, done.returncode, path, time.perf_counter() - begin

    failed, passed = 0, dict.fromkeys(args.tools, 0)
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(run, (tool, part)) for tool in args.tools for part in range(args.parts)]
        for job in as_completed(jobs):  # who stops this after a while has seen all that ended by then
            tool, part, code, path, seconds = job.result()
            output = path.read_text()
            tests = re.search(r"(\d+) passed", output)
            passed[tool] += int(tests[1]) if tests else 0
            found = re.search(r"(ERROR|RACECHECK) SUMMARY: .*", output)
            print(f"{tool} {part + 1}/{args.parts}: {tests[0] if tests else 'no test passed'}, "
                  f"{found[0] if found else 'no summary'} ({seconds:.0f} s)", flush=True)
            if code or not found or not tests:
                failed += 1
                print(output, flush=True)
    print("; ".join(f"{tool}: {n} tests passed" for tool, n in passed.items()) + f"; {failed} parts failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
