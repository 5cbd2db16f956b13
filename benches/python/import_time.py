"""What `import lowbit_rs` adds to `import torch`, and the size of the wheel.

    python benches/python/import_time.py            # benches/results/import_time.json

Each sample is an interpreter of its own. The two kinds alternate, so that a slow moment of the machine meets both, and
one run of each goes before them and is not counted: it fills the disk cache and writes bytecode. Without a wheel in
dist/ one is built.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

from environment import REPOSITORY, save

WITHOUT, WITH = "import torch", "import torch, lowbit_rs"
INSIDE = "import time, torch; start = time.perf_counter(); import lowbit_rs; print(time.perf_counter() - start)"
"""The same addition seen from inside: free of the start of the process and of the import of torch."""


def process_seconds(statement: str) -> float:
    """Wall time of an interpreter that executes `statement`, from start to exit."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def inside_seconds() -> float:
    """Time of `import lowbit_rs` in an interpreter that has torch already."""
    run = subprocess.run([sys.executable, "-c", INSIDE], check=True, capture_output=True, text=True)
    return float(run.stdout)


def import_times(samples: int) -> list[dict[str, Any]]:
    """A row for each kind of sample, and one for the difference of the two whole processes."""
    seconds: dict[str, list[float]] = {WITHOUT: [], WITH: [], "lowbit_rs after torch": []}
    for sample in range(-1, samples):
        measured = (process_seconds(WITHOUT), process_seconds(WITH), inside_seconds())
        if sample >= 0:
            for name, value in zip(seconds, measured, strict=True):
                seconds[name].append(value)
    rows = [row(name, statistics.median(values), min(values), samples) for name, values in seconds.items()]
    without, with_lowbit = rows[0], rows[1]
    median, fastest = (with_lowbit[key] - without[key] for key in ("median_s", "min_s"))
    return [*rows, row("difference of the processes", median, fastest, samples)]


def row(what: str, median: float, fastest: float, samples: int) -> dict[str, Any]:
    """A row of the results; times in seconds."""
    return {"what": what, "median_s": median, "min_s": fastest, "samples": samples}


def newest_wheel() -> Path:
    """The newest wheel in dist/, built if there is none."""
    dist = REPOSITORY / "dist"
    if not list(dist.glob("*.whl")):
        subprocess.run(["make", "wheel"], cwd=REPOSITORY, check=True)
    return max(dist.glob("*.whl"), key=lambda path: path.stat().st_mtime)


def wheel_row(wheel: Path) -> dict[str, Any]:
    """Bytes of the wheel, and of what it unpacks to."""
    with zipfile.ZipFile(wheel) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    return {"what": "wheel", "file": wheel.name, "bytes": wheel.stat().st_size, "unpacked_bytes": unpacked}


def main() -> None:
    """Measures, prints, saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=9, help="interpreters of each kind (default 9)")
    times, wheel = import_times(parser.parse_args().samples), wheel_row(newest_wheel())
    for measured in times:
        print(
            f"{measured['what']}: median {measured['median_s'] * 1e3:.1f} ms, fastest {measured['min_s'] * 1e3:.1f} ms"
        )
    print(f"{wheel['file']}: {wheel['bytes'] / 1e6:.2f} MB, unpacked {wheel['unpacked_bytes'] / 1e6:.2f} MB")
    print(save("import_time", [*times, wheel]))


if __name__ == "__main__":
    main()
