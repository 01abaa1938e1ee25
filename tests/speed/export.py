"""Export of every decoder as ONNX and as a program: seconds, and the difference from torch (too large: an error).

python -m tests.speed.export
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from distill.core.plugins import names
from distill.students import export, onnx_graph
from tests.students.tiny import tiny


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for decoder in names("distill.students.decoders"):
            student = tiny(decoder, depth=1).eval()
            began = time.process_time()
            program = export.to_program(student)
            traced = time.process_time()
            onnx = onnx_graph.write_onnx(student, Path(folder, "m.onnx"), program=program)
            written = time.process_time()
            program_error = export.write_program(student, Path(folder, "m.pt2"), program=program)
            print(
                f"{decoder:10} trace {traced - began:5.1f} s   onnx {written - traced:5.1f} s, off {onnx:.1g}   "
                f"program {time.process_time() - written:5.1f} s, off {program_error:.1g}",
                flush=True,
            )


if __name__ == "__main__":
    main()
