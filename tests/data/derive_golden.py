"""Derives golden.npz from the full record of bitsandbytes' outputs: `python derive_golden.py RECORD.npz golden.npz`.

The record holds every input in three dtypes and every dequantized output; both follow from what is kept here, so the
inputs stay in float32 alone and the outputs as SHA-256 digests.
"""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import numpy as np

CASES = ("even", "ragged", "tiny", "zeroblock", "heavy", "tinyvals", "grid")
DTYPES = ("float32", "float16", "bfloat16")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DOUBLE_QUANT_BLOCK_SIZES = (64, 256)

Array = np.ndarray[Any, np.dtype[Any]]


def digest(values: Array) -> Array:
    return np.frombuffer(hashlib.sha256(values.tobytes()).digest(), dtype=np.uint8)


def derive(record: Any) -> dict[str, Array]:
    kept: dict[str, Array] = {}
    for case in CASES:
        kept[f"{case}|x"] = record[f"{case}|float32|x"].view(np.float32)
        for format_name in ("nf4", "fp4"):
            keys = [[f"{case}|{dtype}|{format_name}|{size}" for size in BLOCK_SIZES] for dtype in DTYPES]
            name = f"{case}|{format_name}"
            kept[f"{name}|codes"] = np.array([[record[f"{key}|q"] for key in row] for row in keys])
            kept[f"{name}|y"] = np.array([[digest(record[f"{key}|y"]) for key in row] for row in keys])
            for index, size in enumerate(BLOCK_SIZES):
                absmax = np.array([record[f"{row[index]}|absmax"] for row in keys])
                known = kept.setdefault(f"{case}|{size}|absmax", absmax)
                assert np.array_equal(known, absmax), "absmax does not depend on the format"
            for size in DOUBLE_QUANT_BLOCK_SIZES:
                for part in ("dq_absmax", "dq_offset", "dq_absmax2"):
                    rows = np.array([record[f"{case}|{dtype}|{format_name}|{size}|{part}"] for dtype in DTYPES])
                    known = kept.setdefault(f"{case}|{size}|{part}", rows)
                    assert np.array_equal(known, rows), "scales do not depend on the format"
                digests = [digest(record[f"{case}|{dtype}|{format_name}|{size}|dq_y"]) for dtype in DTYPES]
                kept[f"{name}|{size}|dq_y"] = np.array(digests)
    for shape in ("5x48x96", "33x64x256"):
        for part in ("W", "CB", "SCB"):
            kept[f"int8|{shape}|{part}"] = record[f"int8|{shape}|0.0|{part}"]
        for threshold in ("0.0", "6.0"):
            for part in ("A", "CA", "SCA", "cols", "y"):
                kept[f"int8|{shape}|{part}|{threshold}"] = record[f"int8|{shape}|{threshold}|{part}"]
    return kept


if __name__ == "__main__":
    source, target = sys.argv[1:]
    np.savez_compressed(target, **derive(np.load(source)))  # type: ignore[arg-type]  # its stub forgets the keywords
