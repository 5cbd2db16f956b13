"""What tests count products by."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from lowbit_rs import QuantLinear


def count_products(monkeypatch: pytest.MonkeyPatch, backend: Any) -> list[int]:
    """The rows of the weight of every product that is made from here on, by the quick way of a layer or the other."""
    made: list[int] = []
    linear = backend.linear

    def counted(weight: Any, *arguments: Any) -> Tensor:
        made.append(weight.rows)
        product: Tensor = linear(weight, *arguments)
        return product

    class CountedCall:
        def __init__(self, call: Any) -> None:
            self.call = call

        def run(self, layer: QuantLinear, *arguments: Any) -> Tensor | None:
            product: Tensor | None = self.call.run(layer, *arguments)
            if product is not None:
                made.append(layer.out_features)
            return product

    quick = property(
        lambda layer: CountedCall(vars(layer)["_call"]), lambda layer, call: vars(layer).update(_call=call)
    )
    monkeypatch.setattr(backend, "linear", counted)
    monkeypatch.setattr(QuantLinear, "_call", quick, raising=False)
    return made
