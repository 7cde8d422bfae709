"""`python -m bench`: every op against the machine's limits and against what people use.

On a GPU: times. On a CPU: the bytes that the kernels ask for, counted in Triton's interpreter, and the time these
would take at a stated bandwidth; it fails if an op asks for more than its gate allows. Results go to
bench/results/<device>/ as JSON; the table and the plots are made from it.

    python -m bench [--quick] [--only NAME ...] [--out DIR]
    python -m bench compare A.json B.json      changes beyond the spread; fails if anything got worse
    python -m bench model [--json [FILE]]      times computed from the machine code for an H100; needs no GPU
"""

import argparse
import importlib.util
import os
import pathlib
import platform
import sys
import time

if __name__ == "__main__" and sys.argv[1:2] == ["model"]:  # compiles, so it comes before the interpreter is chosen
    from bench import model

    sys.exit(model.main(sys.argv[2:]))

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import triton

import kvevict
from bench import RESULTS, cases, compare, device_name, measure, report


def run(chosen, quick, progress=lambda iterable: iterable):
    """The results of these cases, as they are written to JSON."""
    roofs = measure.ceilings() if HAS_GPU else measure.STATED
    device = device_name("cuda" if HAS_GPU else "cpu")
    work = [(case, point) for case in chosen for point in case.points(HAS_GPU, quick)]
    rows = []
    agreeing = {}
    for case, point in progress(work):
        torch.manual_seed(0)
        kind = (case.name, point.D, point.dtype)
        if kind not in agreeing:
            agreeing[kind] = measure.agrees(case, point, "cuda" if HAS_GPU else "cpu")
        figures = (measure.on_gpu if HAS_GPU else measure.on_cpu)(case, point, roofs)
        label = f"{point}-W{point.W}" if case.name.startswith("attention_mass") else str(point)
        rows.append(dict(case=case.name, label=label, point=vars(point), agrees=agreeing[kind], **figures))
        if HAS_GPU:
            torch.cuda.empty_cache()
    return dict(
        schema=report.SCHEMA,
        kind="timed" if HAS_GPU else report.COUNTED,
        device=device,
        ceilings=roofs,
        versions=dict(torch=torch.__version__, triton=triton.__version__, python=platform.python_version(),
                      kvevict=kvevict.__version__),
        caption=f"{device}, torch {torch.__version__}, triton {triton.__version__}, " + time.strftime("%Y-%m-%d"),
        rows=rows,
    )  # fmt: skip


def main(arguments=None):
    for name in ("matplotlib", "rich"):
        if importlib.util.find_spec(name) is None:
            raise SystemExit(f"python -m bench needs {name}: pip install -e '.[bench]'")
    from rich.progress import track

    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["compare"]:
        if len(arguments) != 3:
            raise SystemExit("usage: python -m bench compare A.json B.json")
        return compare.main(arguments[1:])
    names = [case.name for case in cases.ALL]
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one or two shapes of each op: under two minutes")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--out", type=pathlib.Path, help="folder; default: bench/results/<device>")
    options = parser.parse_args(arguments)
    chosen = [case for case in cases.ALL if case.name in options.only]
    result = run(chosen, options.quick, lambda work: track(work, description="measuring"))
    out = options.out or RESULTS / result["device"]
    report.write(result, out)
    print(f"wrote {out}/bench.json, bench.md, roofline.png, speedup.png, time.png, stages.png")
    wrong = measure.gate(result["rows"], chosen)
    for line in wrong:
        print(f"gate: {line}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
