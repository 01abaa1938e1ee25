"""Choice of the rendering backend: compiled loops or torch on a CPU, or a GPU; all give the same bits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from threading import Lock, local

import numpy as np
import torch
from torch import Tensor

from distill.core.threads import one_thread
from distill.core.trial import DifferentResultError, failure
from distill.data.scenes import reference
from distill.data.scenes.film import Film, develop, draw_film
from distill.data.scenes.indoors import table
from distill.data.scenes.outdoors import street
from distill.data.scenes.stage import Stage
from distill.data.scenes.variety import vary


def take_picture(stage: Stage, size: tuple[int, int], film: Film) -> tuple[Tensor, Tensor]:
    """Render image (3,H,W) and depth (H,W), inf in the sky, of height x width = `size`; both returned on the CPU."""
    with one_thread():  # thousands of small operations
        device = _device  # read once: another thread may leave `render_on` meanwhile
        if device is not None:
            try:
                if _trusted(device):
                    return _on_gpu(stage, size, film, device)
            except torch.OutOfMemoryError:
                pass  # the teacher uses the memory; the CPU gives the same bits
        return developed(*cpu_path()(stage, size), film)


def developed(depth: Tensor, colour: Tensor, film: Film) -> tuple[Tensor, Tensor]:
    """The picture and its depth from the output of `reference.light_up`, on the same device."""
    _, _, height, width = colour.shape
    centre, corner = colour[:, 1, : height - 1, : width - 1], colour[:, 0]
    around = corner[:, :-1, :-1] + corner[:, 1:, :-1] + corner[:, :-1, 1:] + corner[:, 1:, 1:]
    return develop(film, 0.5 * centre + 0.125 * around), depth[1, : height - 1, : width - 1]


_device: torch.device | None = None
_trials: dict[torch.device, bool] = {}
_trying = Lock()
_streams = local()
_TRIAL_SEED = [7919, 1]


@contextmanager
def render_on(device: torch.device) -> Iterator[None]:
    """Inside this context the process renders on `device` if it is a suitable GPU (distill.data.scenes.gpu).

    Its pictures are bit-identical to the CPU's: this is checked on two views before the first picture. Where it does
    not hold, or the GPU fails, there is one warning and the CPU renders.
    """
    global _device
    outer, _device = _device, device if device.type == "cuda" else None
    try:
        yield
    finally:
        _device = outer


def _on_gpu(stage: Stage, size: tuple[int, int], film: Film, device: torch.device) -> tuple[Tensor, Tensor]:
    """As `take_picture`, on a stream of this thread, so that it does not wait for a teacher's work on the GPU."""
    from distill.data.scenes import gpu  # imports Triton

    with _stream(device):
        image, depth = developed(*gpu.light_up(stage, size, device), film)
        return image.cpu(), depth.cpu()


@contextmanager
def _stream(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        if not hasattr(_streams, str(device)):
            setattr(_streams, str(device), torch.cuda.Stream(device))
        with torch.cuda.stream(getattr(_streams, str(device))):
            yield


def _trusted(device: torch.device) -> bool:
    """Whether this device renders the same bits as the CPU; checked once, while other threads wait."""
    with _trying:
        if device not in _trials:
            _trials[device] = _try(device)
    return _trials[device]


def _try(device: torch.device) -> bool:
    def compare() -> None:
        for build in (street, table):  # the sun, sky and haze; lamps and a room
            rng = np.random.default_rng(_TRIAL_SEED)
            stage = Stage(rng=rng)
            build(stage)
            vary(stage)
            film = draw_film(rng, 40, 56)
            expected = developed(*cpu_path()(stage, (40, 56)), film)
            if not all(map(torch.equal, _on_gpu(stage, (40, 56), film, device), expected)):
                raise DifferentResultError(f"its picture of a {build.__name__} differs from the CPU's")

    reason = failure(compare)
    if reason:
        warnings.warn(f"{device} cannot render scenes ({reason}): the slower CPU renders them", stacklevel=2)
    return not reason


@cache
def cpu_path() -> Callable[[Stage, tuple[int, int]], tuple[Tensor, Tensor]]:
    """The CPU backend: compiled loops where numba is installed, else torch. Both give the same bits."""
    if find_spec("numba") is None:
        return reference.light_up
    try:
        from distill.data.scenes.fused import light_up
    except (ImportError, KeyError) as error:  # numba's errors for a too new numpy and an unknown option
        warnings.warn(f"numba does not load, so scenes render several times slower: {error}", stacklevel=2)
        return reference.light_up
    return light_up
