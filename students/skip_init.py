"""Building a network without its random initialization, which takes longer than reading the file that replaces it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, init
from torch.overrides import TorchFunctionMode

_DRAWS = (Tensor.uniform_, Tensor.normal_, Tensor.erfinv_, init.uniform_, init.normal_, init.kaiming_uniform_)
"""Functions that draw initial values. Those of torch.nn.init are intercepted whole, not the calls inside them; timm
makes normal numbers from uniform ones by the inverse error function."""


class SkipInit(TorchFunctionMode):
    """A context in which parameters are zero instead of random, and most of them do not advance the random state.

    Only for a network whose parameters are all replaced afterwards, which the caller must check. Buffers are still
    drawn, because a file need not hold them.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        keywords = dict(kwargs or {})
        if func in _DRAWS:
            target = args[0] if args else keywords["tensor"]
            if isinstance(target, Parameter):
                # Zeroed, not uninitialised: torch's trunc_normal_ redraws values outside its bounds.
                with torch.no_grad():
                    return target.zero_()
        return func(*args, **keywords)
