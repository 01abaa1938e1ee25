"""Building a network without its random initialization, which takes longer than reading the file that replaces it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, init
from torch.overrides import TorchFunctionMode

_DRAWS = (Tensor.uniform_, Tensor.normal_, Tensor.erfinv_, init.uniform_, init.normal_, init.kaiming_uniform_)
"""What modules draw with. A function of torch.nn.init is seen here whole, and what it calls is not; timm makes normal
numbers of even ones by the inverse error function."""


class SkipInit(TorchFunctionMode):
    """A context in which parameters are zero instead of random, and most of them do not move the random state.

    Only for a network of which every parameter is replaced afterwards, and seen to be. Buffers are drawn: a file need
    not hold them.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in _DRAWS:
            drawn = args[0] if args else given["tensor"]
            if isinstance(drawn, Parameter):
                # Not as the memory was: torch's trunc_normal_ draws again what lies out of its bounds.
                with torch.no_grad():
                    return drawn.zero_()
        return func(*args, **given)
