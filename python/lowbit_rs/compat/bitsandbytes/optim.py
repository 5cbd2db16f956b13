"""No optimizers: every name of ``bitsandbytes.optim`` raises with the reason."""

from __future__ import annotations

from lowbit_rs.compat.bitsandbytes._absent import getattr_of

_REASON = (
    "lowbit_rs stores weights for inference and adapters, and has no 8-bit optimizer states; adapters train with those "
    "of torch.optim, or with bitsandbytes itself"
)

_FAMILIES = {
    "Adagrad": ("", "8bit", "32bit"),
    "Adam": ("", "8bit", "32bit"),
    "AdamW": ("", "8bit", "32bit"),
    "AdEMAMix": ("", "8bit", "32bit"),
    "LAMB": ("", "8bit", "32bit"),
    "LARS": ("", "8bit", "32bit"),
    "Lion": ("", "8bit", "32bit"),
    "PagedAdam": ("", "8bit", "32bit"),
    "PagedAdamW": ("", "8bit", "32bit"),
    "PagedAdEMAMix": ("", "8bit", "32bit"),
    "PagedLion": ("", "8bit", "32bit"),
    "RMSprop": ("", "8bit", "32bit"),
    "SGD": ("", "8bit", "32bit"),
    "GlobalOptimManager": ("",),
    "PytorchLARS": ("",),
}

#: Every name of bitsandbytes.optim.
NAMES = tuple(family + bits for family, all_bits in _FAMILIES.items() for bits in all_bits)

__getattr__ = getattr_of("bnb.optim", dict.fromkeys(NAMES, _REASON))
