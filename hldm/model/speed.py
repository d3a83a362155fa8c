"""The one door to speed: finds the faster form of a plain function or class, where there is one.

`hldm.model` and `hldm.generation` hold the plain formula of everything. Faster forms live in `hldm.kernels`, whose
table `hldm.kernels.forms.FORMS` maps each plain function or class to its faster form. This module alone knows that the
package exists; without it all works, slower.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_FORMS: dict[Any, Any] = {}  # the faster form of each plain function or class


def has_faster_form(plain: Callable[P, R]) -> Callable[P, R]:
    """Decorator: call the faster form of a plain function instead, where there is one.

    The form takes the same arguments and returns the same up to rounding, gradients included. It may decline a call
    by returning NotImplemented (wrong device or dtype, no compiler); then the plain function runs. Costs 0.3 us a call
    (measured). The plain function itself is `function.__wrapped__`.
    """

    @wraps(plain)
    def fastest_form(*args: P.args, **kwargs: P.kwargs) -> R:
        form = _FORMS.get(fastest_form) if _find_forms() else None
        if form is not None:
            found = form(*args, **kwargs)
            if found is not NotImplemented:
                return cast(R, found)
        return plain(*args, **kwargs)

    return fastest_form


def fastest(plain: T) -> T:
    """The faster form of a class or function, or the plain one itself. Ask when it is used, not on import."""
    return cast(T, _FORMS.get(plain, plain)) if _find_forms() else plain


@torch.compiler.assume_constant_result  # which sees the table as it is after this
def _find_forms() -> bool:
    """Fill the table, once; False where there is nothing to fill it with."""
    return _fill()


@cache
def _fill() -> bool:
    spec = find_spec("hldm.kernels")
    if spec is None or spec.origin is None:  # a folder without the package, as of a left-over __pycache__
        return False
    _FORMS.update(import_module("hldm.kernels.forms").current())  # an error in there is not hidden
    return True


def why_plain() -> str:
    """Why plain formulas compute on this machine's processor, in words; "" where faster forms do."""
    if not _find_forms():
        return "none, plain torch does the same (hldm/kernels is not there)"
    return cast(str, import_module("hldm.kernels.forms").why_none())
