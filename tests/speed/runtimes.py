"""An exported student in runtimes outside Python: onnxruntime-node, and headless Chromium with wasm and WebGPU.

npm install --ignore-scripts onnxruntime-node onnxruntime-web playwright-core
python -m tests.speed.runtimes FOLDER NODE_MODULES [--chromium /usr/bin/chromium] [--only webgpu]

FOLDER is the output of `distill export STUDENT FOLDER --browser`. Two images go through the network in Node, and
through the page itself; each map is compared with `distill predict`'s. It prints the mean difference in deviations of
the map, and the milliseconds of the second run. A missing runtime is reported and skipped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

from distill.core import crops
from distill.students import checkpoint, onnx_graph

SIZES = ((240, 320), (451, 300))
SCRIPT = Path(__file__).with_suffix(".js")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("node_modules", type=Path)
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome") or "")
    parser.add_argument("--only", choices=["all", "node", "wasm", "webgpu"], default="all")
    args = parser.parse_args()
    student = checkpoint.load(args.folder)
    draw = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        cases, expected = [], {}
        for i, (height, width) in enumerate(SIZES):
            noise = torch.nn.functional.interpolate(torch.rand(1, 3, 9, 12, generator=draw), (height, width))[0]
            photo = (noise * 255).round().to(torch.uint8)
            size = crops.native_shape(height, width, student.native_size, student.encoder.patch_size)
            images = crops.resize(photo[None].float() / 255, *size)
            rgba = torch.cat([photo, torch.full_like(photo[:1], 255)]).permute(1, 2, 0)
            Path(folder, f"{i}.images").write_bytes(images.numpy().tobytes())
            Path(folder, f"{i}.rgba").write_bytes(rgba.contiguous().numpy().tobytes())
            cases.append({"case": i, "height": height, "width": width, "rows": size[0], "columns": size[1]})
            with torch.no_grad():
                expected["node", i] = student(images)[0].numpy()
                page_map = onnx_graph.at_native(student, student, photo).numpy()
            expected["wasm", i] = expected["webgpu", i] = page_map
        Path(folder, "cases.json").write_text(json.dumps(cases))
        command = ["node", SCRIPT, args.folder.resolve(), args.node_modules.resolve(), folder, args.only, args.chromium]
        subprocess.run([str(word) for word in command], check=True)
        for runtime in ("node", "wasm", "webgpu"):
            for case in cases:
                path = Path(folder, f"{case['case']}.{runtime}")
                if path.is_file():
                    truth = expected[runtime, case["case"]]
                    result = np.frombuffer(path.read_bytes(), np.float32).reshape(truth.shape)
                    off = np.abs(result - truth).mean() / truth.std()
                    print(f"{runtime:7} {case['height']} x {case['width']}: off {off:.2g} of the map's deviation")


if __name__ == "__main__":
    main()
