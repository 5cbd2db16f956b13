"""LowbitConfig: the ``quantization_config`` of a model, as an argument and in its config.json."""

from __future__ import annotations

import copy
import difflib
import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit_rs._ops import THRESHOLD, check_activation, check_threshold
from lowbit_rs.errors import InvalidArgument, invalid
from lowbit_rs.files.metadata import FORMAT_VERSION
from lowbit_rs.files.recipe import BLOCK_OPTIMAL, FIT, Recipe
from lowbit_rs.functional import CodebookLike, as_codebook
from lowbit_rs.nn.model import matches
from lowbit_rs.packed import DTYPES, BlockSize, dtype_name

#: Options that an override may set for some modules.
_PACKING = (
    "format",
    "block_size",
    "double_quant",
    "codebook",
    "scale_dtype",
    "block_order",
    "signed_absmax",
    "nonfinite",
    "compute_dtype",
    "activation",
    "threshold",
)
_DTYPES = ("scale_dtype", "compute_dtype")

#: What people coming from BitsAndBytesConfig may write, and what to write instead.
_OF_BITSANDBYTES = {
    "load_in_4bit": 'format="nf4"',
    "load_in_8bit": 'format="int8", block_size="row"',
    "bnb_4bit_quant_type": 'format="nf4" or "fp4"',
    "bnb_4bit_use_double_quant": "double_quant",
    "bnb_4bit_compute_dtype": "compute_dtype",
    "bnb_4bit_blocksize": "block_size",
    "bnb_4bit_quant_storage": "nothing: packed weights are uint8 or int8",
    "llm_int8_skip_modules": "skip_modules",
    "llm_int8_threshold": 'threshold, with activation="auto"',
    "llm_int8_enable_fp32_cpu_offload": "nothing: packed layers run on the CPU, too",
}


@register_quantization_config("lowbit")
class LowbitConfig(QuantizationConfigMixin):
    """How ``from_pretrained`` packs the linear layers and experts of a model.

    - ``format``, ``block_size``, ``double_quant``, ``codebook``, ``scale_dtype``, ``block_order``, ``signed_absmax``,
      ``nonfinite``: as in :func:`lowbit_rs.quantize`; ``codebook`` may also be "block-optimal", the values that are
      best for normal weights at this block size, or "fit", those that are best for each weight.
    - ``compute_dtype``: activations are rounded to it before a product; by default they are taken as they come.
    - ``activation``: "int8" lets products round activations to 8 bits where that is faster, "auto" where it is
      much faster and beside int8 weights by row alone: see QuantLinear.
    - ``threshold``: columns of activations that reach it are not rounded; 0 or None rounds all.
    - ``skip_modules``: names or patterns of modules that stay as they are, as ``skip`` of
      :func:`lowbit_rs.quantize_model`. By default, the output head and what the model asks to have in fp32. Given, it
      takes the place of the default; modules that share their weight with another one stay in any case.
    - ``overrides``: options for the modules that match a name or pattern, as
      ``{"*.down_proj": {"block_size": 32}, "*.o_proj": {"format": "int8"}}``. Where several match, later ones win.
    - ``embeddings``: also packs embeddings.
    - ``fuse``: layers of the same input are multiplied in one go, as by :func:`lowbit_rs.fuse_model`. It concerns the
      model in memory alone: files are the same.
    - ``fuse_norms``: norms become RMSNorm and LayerNorm of lowbit_rs.nn, where those compute the same; names and files
      are the same. ``skip_modules`` holds for them, too.

    Raises InvalidArgument, a ValueError, for options that do not exist, have wrong values or do not go together.

    In a saved model these are the options that it was packed with; how each weight is stored, its files say
    (``lowbit_rs.files.metadata``). ``format`` is None where weights came packed from elsewhere. ``format_version`` is
    that of the layout: a newer one than this package knows is refused.
    """

    quant_method: Any = "lowbit"

    def __init__(
        self,
        format: str | None = "nf4",
        block_size: BlockSize = 64,
        double_quant: bool = False,
        codebook: str | CodebookLike | None = None,
        *,
        compute_dtype: torch.dtype | str | None = None,
        activation: str = "none",
        threshold: float | None = THRESHOLD,
        skip_modules: Iterable[str] | None = None,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        embeddings: bool = False,
        fuse: bool = False,
        fuse_norms: bool = False,
        scale_dtype: torch.dtype | str | None = None,
        block_order: str = "row",
        signed_absmax: bool = False,
        nonfinite: str = "error",
        format_version: int = FORMAT_VERSION,
        quant_method: str = "lowbit",
        **unknown: Any,
    ) -> None:
        _refuse_unknown(unknown)
        if quant_method != "lowbit":
            raise invalid("quant_method", repr(quant_method), '"lowbit"')
        _check_version(format_version)
        self.quant_method = "lowbit"
        self.format_version = format_version
        self.format = format
        self.block_size = block_size
        self.double_quant = double_quant
        self.codebook = _plain_codebook(codebook)
        self.compute_dtype = _dtype("compute_dtype", compute_dtype)
        self.activation = activation
        self.threshold = threshold
        self.scale_dtype = _dtype("scale_dtype", scale_dtype)
        self.block_order = block_order
        self.signed_absmax = signed_absmax
        self.nonfinite = nonfinite
        self.embeddings = _flag("embeddings", embeddings)
        self.fuse = _flag("fuse", fuse)
        self.fuse_norms = _flag("fuse_norms", fuse_norms)
        self.skip_modules = _names("skip_modules", skip_modules)
        self.overrides = _plain_overrides(overrides)
        self.post_init()

    def post_init(self) -> None:
        """Raises InvalidArgument unless the options go together, each override with the rest included."""
        self._recipe(self._options())
        for pattern, override in self.overrides.items():
            with _naming(f"overrides[{pattern!r}]"):
                self._recipe(_override(self._options(), override))

    def recipe(self, module: str) -> Recipe:
        """How the weights of a module are packed."""
        return self._recipe(self._options(module))

    def compute_dtype_of(self, module: str) -> torch.dtype | None:
        """The dtype that the activations of a module are rounded to."""
        return _dtype("compute_dtype", self._options(module)["compute_dtype"])

    def activation_of(self, module: str) -> str:
        """How the activations of a module may be rounded."""
        activation: str = self._options(module)["activation"]
        return activation

    def threshold_of(self, module: str) -> float | None:
        """The smallest outlier among the activations of a module; None or 0 for none."""
        threshold: float | None = self._options(module)["threshold"]
        return threshold

    def _options(self, module: str | None = None) -> dict[str, Any]:
        options = {name: getattr(self, name) for name in _PACKING}
        for pattern, override in self.overrides.items():
            if module is not None and matches(module, pattern):
                options = _override(options, override)
        return options

    def _recipe(self, options: Mapping[str, Any]) -> Recipe:
        _flag("double_quant", options["double_quant"])
        _flag("signed_absmax", options["signed_absmax"])
        check_activation(options["activation"])
        check_threshold(options["threshold"])
        return Recipe(
            options["format"] or "nf4",
            options["block_size"],
            options["double_quant"],
            options["codebook"],
            options["nonfinite"],
            _dtype("scale_dtype", options["scale_dtype"]),
            options["signed_absmax"],
            options["block_order"],
        )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config of a dictionary, as in config.json; keys that are not known are named in a warning."""
        _check_version(config_dict.get("format_version", FORMAT_VERSION))
        known = inspect.signature(cls).parameters.keys() - {"unknown"}
        ignored = sorted(set(config_dict) - known)
        if ignored:
            warnings.warn(f"quantization_config: ignored the unknown keys {', '.join(ignored)}", stacklevel=2)
        rest = {"format": None} | {key: value for key, value in config_dict.items() if key in known}
        parse: Any = super().from_dict
        return parse(rest, return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """All options as values of JSON; ``from_dict`` of it is this config again."""
        content = copy.deepcopy(self.__dict__)
        for name in _DTYPES:
            content[name] = None if content[name] is None else dtype_name(content[name], name)
        return content

    def to_diff_dict(self) -> dict[str, Any]:
        """The options that are not at their default, and the method and version."""
        default = LowbitConfig().to_dict()
        kept = ("quant_method", "format_version", "format")
        return {key: value for key, value in self.to_dict().items() if key in kept or value != default[key]}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LowbitConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # options can be changed


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Adds the place of an option to the message of an InvalidArgument."""
    try:
        yield
    except InvalidArgument as error:
        raise InvalidArgument(f"{where}: {error}") from None


def _override(options: dict[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` with those of ``override`` in their place; a format takes that of a codebook, and the reverse."""
    if "format" in override and "codebook" not in override:
        options = {**options, "codebook": None, "signed_absmax": False}
    elif override.get("codebook") is not None and "format" not in override:
        options = {**options, "format": "custom"}
    return {**options, **override}


def _refuse_unknown(unknown: Mapping[str, Any]) -> None:
    for name, value in unknown.items():
        if name in _OF_BITSANDBYTES:
            raise invalid(name, f"{value!r}, an option of bitsandbytes", _OF_BITSANDBYTES[name])
        known = [*inspect.signature(LowbitConfig).parameters]
        close = difflib.get_close_matches(name, known, n=1) or ["one of " + ", ".join(known[:-1])]
        raise invalid("LowbitConfig", f"the option {name!r}", close[0])


def _check_version(version: object) -> None:
    if type(version) is not int or version < 1:
        raise invalid("format_version", repr(version), f"{FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise invalid(
            "format_version", version, f"{FORMAT_VERSION} at most, which this lowbit_rs reads: install a newer one"
        )


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise invalid(name, repr(value), "True or False")
    return value


def _dtype(name: str, value: torch.dtype | str | None) -> torch.dtype | None:
    if value is None:
        return None
    dtype = DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES.values():
        raise invalid(name, repr(value), "torch.float32, torch.float16 or torch.bfloat16, or its name")
    return dtype


def _names(argument: str, names: Iterable[str] | None) -> list[str] | None:
    if names is None:
        return None
    names = [names] if isinstance(names, str) else list(names)
    if not all(isinstance(name, str) and name for name in names):
        raise invalid(argument, repr(names), "names or patterns of modules")
    return names


def _plain_codebook(codebook: str | CodebookLike | None) -> str | list[float] | None:
    """The codebook as JSON can hold it: float32 values are kept to the bit."""
    if codebook is None:
        return None
    if isinstance(codebook, str):
        if codebook in (BLOCK_OPTIMAL, FIT):
            return codebook
        raise invalid("codebook", repr(codebook), f'"{BLOCK_OPTIMAL}", "{FIT}" or 2 to 16 values')
    values: list[float] = as_codebook(codebook).tolist()
    return values


def _plain_overrides(overrides: Mapping[str, Mapping[str, Any]] | None) -> dict[str, dict[str, Any]]:
    """The overrides as values of JSON."""
    plain: dict[str, dict[str, Any]] = {}
    for pattern, override in ({} if overrides is None else dict(overrides)).items():
        if not isinstance(override, Mapping) or not set(override) <= set(_PACKING):
            raise invalid(f"overrides[{pattern!r}]", repr(override), f"a mapping of {', '.join(_PACKING)}")
        own = dict(override)
        for name in _DTYPES:
            if own.get(name) is not None:
                dtype = _dtype(f"overrides[{pattern!r}]: {name}", own[name])
                own[name] = None if dtype is None else dtype_name(dtype)
        if "codebook" in own:
            own["codebook"] = _plain_codebook(own["codebook"])
        plain[str(pattern)] = own
    return plain
