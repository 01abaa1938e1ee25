"""a page on this machine: a photo in, its depth beside it with a slider, files to download

distill serve                                   http://127.0.0.1:7860, the built-in model
distill serve --student runs/own --port 8000
distill serve --teacher depth_anything_v2 --weights depth-anything/Depth-Anything-V2-Small
"""

from __future__ import annotations

import argparse
import errno
import socket
from functools import partial
from typing import Any

from distill.app.verbs._recipe import take_teacher, teacher_options


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--student", metavar="NAME", help="a run, a student's folder, pocket (default), or OWNER/NAME")
    take_teacher(parser)
    parser.add_argument("--device", default="auto", help="auto (CUDA, then Apple's GPU, then CPU), cpu, cuda:1, mps")
    parser.add_argument(
        "--host", default="127.0.0.1", help="who may connect: by default only this machine; 0.0.0.0: all"
    )
    parser.add_argument(
        "--allow-name",
        metavar="NAME",
        action="append",
        default=[],
        help="a further name under which browsers reach this machine, as of a proxy; may be repeated",
    )
    parser.add_argument("--port", type=int, default=7860, help="default: 7860; 0 picks a free one")


def run(args: argparse.Namespace) -> int:
    from distill.app.console import note, say
    from distill.app.serve import DepthServer
    from distill.inference.api import load, load_teacher

    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port is from 0 to 65535, not {args.port}")
    if args.teacher and args.student:
        raise ValueError("--student and --teacher both name a model: keep one")
    options = teacher_options(args)
    name = args.teacher or args.student or "the built-in model"
    model: Any
    if args.teacher:
        model = partial(load_teacher, args.teacher, args.weights, device=args.device, **options)
    else:
        model = partial(load, args.student or "pocket", device=args.device)
    note(f"loading {name} ...")
    try:
        server = DepthServer(model, name, host=args.host, port=args.port, names=args.allow_name)
    except socket.gaierror as error:
        raise OSError(
            f"--host {args.host}: {error.strerror}; 127.0.0.1 is only this machine, 0.0.0.0 all its addresses"
        ) from error
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES, errno.EADDRNOTAVAIL):
            raise
        raise OSError(f"port {args.port} of {args.host}: {error.strerror}; give another --port or --host") from error
    with server:
        address = f"http://{args.host}:{server.server_address[1]}"
        say(f"{address} (Ctrl-C stops it)", address=address)
        if args.host not in ("127.0.0.1", "localhost", "::1"):
            note("anyone who can reach this machine may send it photos; there is no password")
        server.serve_forever()
    return 0
