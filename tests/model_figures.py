"""Figures of bench.model for kernels whose figures are known by hand, as one JSON object. A process of its own: it
replaces Triton's driver, and TRITON_INTERPRET must not be set."""

import json

from bench import machine_code, model, trips  # isort: skip

import torch
import triton
import triton.language as tl


@triton.jit
def double_kernel(x_ptr, out_ptr, tiles, BLOCK: tl.constexpr):
    for tile in range(0, tiles):
        offsets = (tl.program_id(0) * tiles + tile) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out_ptr + offsets, 2 * tl.load(x_ptr + offsets))


@triton.jit
def chain_kernel(next_ptr):
    at = tl.load(next_ptr)
    while at > 0:
        at = tl.load(next_ptr + at)
    tl.store(next_ptr, at)


if __name__ == "__main__":
    launches: list = []
    machine_code.compile_only(machine_code.TARGETS["sm_90"], launches.append)
    x, out = torch.empty(264 * 11 * 512), torch.empty(264 * 11 * 512)
    double_kernel[(264,)](x, out, 11, 512)
    chain_kernel[(1,)](torch.empty(8, dtype=torch.int32))
    double, chain = launches
    run = trips.executed(double, machine_code.sass(double.compiled))
    cost = model.launch_cost(double, model.H100, [x, out])
    try:
        unknown = str(trips.executed(chain, machine_code.sass(chain.compiled)))
    except trips.UnknownLoop as error:
        unknown = str(error)
    figures = {
        name: sum(count for one, count in zip(run.code, run.counts, strict=True) if one.name == name)
        for name in ("LDG", "STG")
    }
    stages = model.stages(model.keydiff_compact, model.Shape(8, 4096), model.H100, launches)
    decode = [
        model.stages(make, model.Shape(8, 8192), model.H100, launches)[-1]
        for make in (model.paged_decode_equal_heads, model.paged_decode_unequal_heads)
    ]
    ends = [model.last_end([3, 1, 1, 1], 2), model.last_end([1, 1, 1, 3], 2), model.last_end([5], 2)]
    fit = [model.H100.fit(4, 93, 2048), model.H100.fit(16, 128, 0), model.H100.fit(4, 32, 100 << 10)]
    print(
        json.dumps(
            dict(double=figures, cost=vars(cost), unknown=unknown, stages=stages, decode=decode, ends=ends, fit=fit)
        )
    )
