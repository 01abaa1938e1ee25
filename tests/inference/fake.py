"""An estimator with known output, and inputs for it."""

from __future__ import annotations

from fractions import Fraction

import av
import cv2
import numpy as np
import torch
from PIL import Image

from distill.core.depth import DepthMap, Kind
from distill.inference import predict


class Fake:
    """Predicts the red channel as disparity, and counts its calls."""

    class card:  # noqa: N801
        weights, revision, native_size, kind, licence = "fake", "r1", 64, Kind.AFFINE_DISPARITY, "CC0"

    takes_focal, options = False, {}

    def __init__(self):
        self.calls = 0

    def predict(self, images):
        self.calls += 1
        values = images[:, 0] if images.ndim == 4 else images[:1]
        values = values.float()
        return DepthMap(values, torch.ones_like(values, dtype=torch.bool), Kind.AFFINE_DISPARITY)


def silent(done, total, **numbers):
    pass


def call(estimator, *inputs, out, formats=("npy",), report=silent):
    """Predicts as the `predict` command does, with the test's estimator."""
    jobs = predict.survey([str(path) for path in inputs], out=out).jobs
    done = predict.run(estimator, jobs, out=out, formats=list(formats), report=report)
    return done.written, done.present, done.problems


def grey(path, value, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def shoot(path, frames, size=(40, 30), codec="mp4v"):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), 10, size)
    for i in range(frames):
        writer.write(np.full((size[1], size[0], 3), 20 * i, np.uint8) + np.arange(size[0], dtype=np.uint8)[:, None])
    writer.release()


def value(path):
    return float(np.load(path).mean())


def film(path, times, *, sides=(32, 24), aspect=None, sound=0.0, codec="mpeg4", options=None):
    """A film with frames at these milliseconds, and seconds of silence beside it."""
    with av.open(str(path), "w", options=options or {}) as out:
        stream = out.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = *sides, "yuv420p"
        if codec != "mpeg2video":  # which has rates of its own
            stream.codec_context.time_base = Fraction(1, 1000)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        audio = out.add_stream("aac", rate=8000) if sound else None
        for time in times:
            noise = np.random.default_rng(time).integers(0, 256, (sides[1], sides[0], 3), np.uint8)
            frame = av.VideoFrame.from_ndarray(noise, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        for i in range(int(sound * 8000 / 1024) if audio else 0):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.sample_rate, silence.pts = 8000, 1024 * i
            out.mux(audio.encode(silence))
        if audio:
            out.mux(audio.encode(None))
    return path
