"""Foreign checkpoints that are not what they say: converted, or refused with an error of this package, and no other."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foreign import EXPECTED, case, write_directory
from lowbit_rs import LowbitError
from lowbit_rs.integrations.checkpoints import convert_file

CASES = sorted(EXPECTED)
DTYPES = (torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.bool)
SIZES = st.sampled_from([0, 1, 2, 4, 16, 31, 32, 64, 128, 129])

#: Values for options, of which most are wrong for any of them.
VALUES: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, False, 0, 1, 3, 4, 8, 16, 32, -1, -7, 2**40, 0.5, "", "gptq", "gemv", [], [1], {}, {"weights": None}]
)


def survives(path: Any, tensors: Any, config: Any) -> None:
    source = write_directory(path / "x", tensors, config)
    with contextlib.suppress(LowbitError):
        convert_file(source, path / "out")


@given(data=st.data(), name=st.sampled_from(CASES))
def test_tensors_of_another_kind(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str) -> None:
    tensors, config = case(name)
    for key in data.draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=3, unique=True)):
        if data.draw(st.integers(0, 5)) == 0:
            del tensors[key]
            continue
        shape = data.draw(st.lists(SIZES, max_size=3)) if data.draw(st.booleans()) else tensors[key].shape
        values = torch.randint(-(2**31), 2**31, tuple(shape))
        tensors[key] = values.to(data.draw(st.sampled_from(DTYPES)))
    survives(tmp_path_factory.mktemp("tensors"), tensors, config)


@given(data=st.data(), name=st.sampled_from(CASES), value=VALUES)
def test_options_of_another_kind(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str, value: Any
) -> None:
    tensors, config = case(name)
    places = [config]
    if "config_groups" in config:
        places += [config["config_groups"]["group_0"], config["config_groups"]["group_0"]["weights"]]
    place = data.draw(st.sampled_from(places))
    place[data.draw(st.sampled_from(sorted(place)))] = value
    survives(tmp_path_factory.mktemp("options"), tensors, config)
