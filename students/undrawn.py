"""Building a network whose weights a file will give, without drawing them first, which takes longer than the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode

_DRAWS = (Tensor.uniform_, Tensor.normal_, Tensor.erfinv_, init.uniform_, init.normal_, init.kaiming_uniform_)
"""What modules draw with. A function of torch.nn.init is seen here whole, and what it calls is not; timm makes normal
numbers of even ones by the inverse error function."""


class Undrawn(TorchFunctionMode):
    """Within it tensors keep what their memory held instead of random numbers, and no random state moves.

    Only for a network of which every parameter is replaced afterwards, and seen to be.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func not in _DRAWS:
            return func(*args, **given)
        return args[0] if args else given["tensor"]
