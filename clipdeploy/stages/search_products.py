"""The configuration of a graph from the products that a search puts in 8 bits."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from calibration.config import QuantizeConfig, Remainder
from calibration.formats import FormatName
from calibration.policy import Scope
from calibration.scheme import SchemeConfig
from clipdeploy.tuning.search import is_attention

__all__ = ["product_config"]


def product_config(
    order: Iterable[str],
    quantised: Collection[str],
    form: FormatName,
    scheme: SchemeConfig,
    *,
    remainder: Remainder = "fp16",
    outputs: bool = False,
) -> QuantizeConfig:
    """How to write the graph with the products ``quantised``, of ``order``, in 8 bits."""
    scope = Scope(attention=any(map(is_attention, quantised)), outputs=outputs)
    exclude = (
        node
        for name in order
        if name not in quantised
        for node in _nodes(name, attention=scope.attention)
    )
    # The search judges accuracy itself, and decides which products stay.
    return QuantizeConfig(tuple(exclude), remainder, scheme, scope, min_sqnr=None, format=form)


def _nodes(name: str, *, attention: bool) -> tuple[str, ...]:
    """What a graph calls a product, as far as it is in a scope with or without ``attention``."""
    if not is_attention(name):
        return (name,)
    return (f"{name}.scores", f"{name}.mix") if attention else ()
