"""PTX modules by hand, for the tests of the emulator itself."""

import torch


def module(body: str, parameters: int, threads: int = 32) -> str:
    """An entry of 64-bit parameters, which lie in %rd1, %rd2, ...; %r1 is the thread's number."""
    declared = ", ".join(f".param .u64 .ptr .global .align 1 f_param_{k}" for k in range(parameters))
    loads = "\n".join(f"ld.param.b64 %rd{k + 1}, [f_param_{k}];" for k in range(parameters))
    return (
        f".version 8.7\n.target sm_90a\n.address_size 64\n"
        f".visible .entry f({declared})\n.reqntid {threads}\n{{\n.reg .b32 %r<99>;\n{loads}\n"
        f"mov.u32 %r1, %tid.x;\n{body}\nret;\n}}\n"
    )


def word_of_thread(register: str, base: str) -> str:
    """The address of the thread's own word of 4 bytes."""
    return f"mad.wide.u32 {register}, %r1, 4, {base};"


def words(count: int, fill: int = 0) -> torch.Tensor:
    return torch.full((count,), fill, dtype=torch.int32)
