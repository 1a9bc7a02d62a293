"""The one place where the model makes its dense layers, so that they can be swapped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

LinearFactory = Callable[[int, int, bool], nn.Module]


def _dense(in_features: int, out_features: int, bias: bool) -> nn.Module:
    return nn.Linear(in_features, out_features, bias=bias)


_factory: ContextVar[LinearFactory] = ContextVar("brise_linear_factory", default=_dense)


def make_linear(in_features: int, out_features: int, bias: bool = False) -> nn.Module:
    """Make one dense layer, `[..., in_features] -> [..., out_features]`.

    Projections, the language-model head and the task heads all come from here. The caller may rely on
    the call alone: the result need not have a `.weight`.
    """
    return _factory.get()(in_features, out_features, bias)


@contextmanager
def linear_factory(factory: LinearFactory) -> Iterator[None]:
    """Make every dense layer of the models built inside the `with` block by `factory(in, out, bias)`.

    Layers of models that exist already are not touched; to swap those, replace the modules.
    """
    token = _factory.set(factory)
    try:
        yield
    finally:
        _factory.reset(token)
