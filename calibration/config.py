"""The configuration of a quantised graph, and the form in which passports and recipes store it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from calibration.formats import FORMATS, FormatName, NumberFormat
from calibration.policy import Scope
from calibration.quality import MIN_SQNR_DB
from calibration.scheme import SchemeConfig
from clipdeploy.core.errors import UsageError
from clipdeploy.core.passport import Precision, ScaleForm, settings_of
from clipdeploy.core.spans import SQNR_DB, check_numbers

__all__ = [
    "SCHEME_KEY",
    "Effort",
    "QuantizeConfig",
    "Remainder",
    "is_made_with",
    "stored_settings",
]

Remainder = Literal["fp16", "fp32"]
Effort = Literal["fast", "best"]
# The JSON key of ``scheme`` in every passport and recipe written so far.
SCHEME_KEY = "plan"


@dataclass(frozen=True)
class QuantizeConfig:
    """How to make the quantised graph.

    ``format``: of the quantised tensors.  ``exclude``: name patterns of Linears and products to
    leave unquantised.  ``remainder``: type of the unquantised nodes; ``fp16`` for TensorRT engines,
    ``fp32`` for ONNX Runtime's int8 kernels on a CPU.  ``scheme``: how ranges are found and
    outliers smoothed.  ``scope``: what to quantise besides the Linears of the blocks.
    ``min_sqnr``: lowest signal-to-noise ratio in dB; a Linear whose output would fall below it is
    left unquantised, a graph whose logits fall below it is refused.  None disables both checks.
    ``weight_scales``: form of the weight scales, see :mod:`calibration.write`; None selects the
    form for the format and the installed TensorRT.  ``effort``: ``fast`` computes everything from
    the statistics, ``best`` also shifts and scales each channel of GELU's output and fits weights
    and biases to the images that the calibration stores.

    Raises:
        UsageError: an unknown value, ``min_sqnr`` out of range, or a ``remainder`` that ``format``,
            ``weight_scales`` or ``scope`` does not fit.
    """

    exclude: tuple[str, ...] = ()
    remainder: Remainder = "fp16"
    scheme: SchemeConfig = field(default_factory=SchemeConfig)
    scope: Scope = field(default_factory=Scope)
    min_sqnr: float | None = MIN_SQNR_DB
    weight_scales: ScaleForm | None = None
    format: FormatName = "int8"
    effort: Effort = "fast"

    def __post_init__(self) -> None:
        for what, value, known in (
            ("the remainder", self.remainder, get_args(Remainder)),
            ("the form of the weight scales", self.weight_scales, (None, *get_args(ScaleForm))),
            ("the format", self.format, tuple(FORMATS)),
            ("the effort", self.effort, get_args(Effort)),
        ):
            if value not in known:
                names = " or ".join(name for name in known if name)
                raise UsageError(f"{what} cannot be {value!r}", hint=f"choose {names}")
        if self.remainder == "fp32" and self.weight_scales not in (None, "channel"):
            raise UsageError(
                f"weight scales in {self.weight_scales} form are for TensorRT engines, "
                "remainder fp32 is for ONNX Runtime",
                hint="leave one of the two out",
            )
        if self.remainder == "fp32" and self.scope.outputs:
            raise UsageError(
                "8-bit outputs are for TensorRT engines, remainder fp32 is for ONNX Runtime",
                hint="leave one of the two out",
            )
        if self.remainder == "fp32" and self.format == "fp8":
            raise UsageError(
                "FP8 is for TensorRT engines, remainder fp32 is for ONNX Runtime's INT8 kernels",
                hint="leave one of the two out",
            )
        check_numbers(self, min_sqnr=SQNR_DB.or_none)

    @property
    def number_format(self) -> NumberFormat:
        """The format of the quantised tensors."""
        return FORMATS[self.format]

    @property
    def default_scales(self) -> ScaleForm:
        """The form of the weight scales if none is named and no backend is known.

        A relative error, as that of FP8, gains nothing from a scale for each channel.
        """
        return "channel" if self.number_format.even else "tensor"

    @property
    def precision(self) -> Precision:
        """The precision of the graph."""
        return "int8-cpu" if self.remainder == "fp32" else self.format


def stored_settings(config: QuantizeConfig) -> dict[str, Any]:
    """``config`` as passports and recipes store it.

    Its keys are the field names, except that ``scheme`` is stored as ``plan``: the key of earlier
    versions, whose graphs would otherwise be made again and whose recipes would not load.  For the
    same reason ``format`` and ``effort`` are stored only if they are not the defaults, and
    ``scope.outputs`` only if set.
    """
    stored = {SCHEME_KEY if k == "scheme" else k: v for k, v in settings_of(config).items()}
    # Of a configuration read from JSON, msgspec does not encode defaults that were left out.
    for name in ("format", "effort"):
        if getattr(config, name) == getattr(QuantizeConfig, name):
            stored.pop(name, None)
    if not config.scope.outputs:
        stored["scope"].pop("outputs", None)
    return stored


def is_made_with(settings: Mapping[str, Any], config: QuantizeConfig) -> bool:
    """Whether a quantised graph with these ``settings`` in its passport was made with ``config``.

    A setting that :func:`stored_settings` leaves out must be left out there as well.
    """
    names = {SCHEME_KEY, *(each.name for each in fields(config))}
    return {k: v for k, v in settings.items() if k in names} == stored_settings(config)
