"""The learned scorer: sigmoid(w2 · relu(W1 · h + b1) + b2) for every hidden state h, the hidden layer kept on chip.

Shapes: hidden [B, S, M], any strides with a contiguous last dimension; w1 [N, M] (an nn.Linear's weight), b1 [N],
w2 [N], b2 [1], contiguous, of hidden's dtype; scores [B, S] float32.
Bytes: hidden once from memory and N/64 times from L2, W1 once and then from L2 for every 64 tokens, 4·B·S of scores.
Operations: 2·B·S·N·(M + 1), on tensor cores in 16 bits.
Launch: one program per 64 tokens; it walks the hidden layer 64 units at a time.
"""

import torch
import triton
import triton.language as tl

from .launch_config import cdiv
from .primitives import dot_type, row_pointers


@triton.jit(do_not_specialize=["S", "tokens_in_all"])
def mlp_scores_kernel(
    hidden_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, scores_ptr, S, tokens_in_all, stride_b, stride_s,
    M: tl.constexpr, N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = tokens < tokens_in_all
    hidden_rows = hidden_ptr + (tokens // S * stride_b + tokens % S * stride_s)[:, None]
    score = tl.zeros([BLOCK_T], tl.float32)
    for first_unit in range(0, N, BLOCK_N):
        units = first_unit + tl.arange(0, BLOCK_N)
        unit_inside = units < N
        activation = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        for first_column in range(0, M, BLOCK_M):
            columns = first_column + tl.arange(0, BLOCK_M)
            column_inside = (columns < M)[None, :]
            hidden = tl.load(hidden_rows + columns[None, :], mask=inside[:, None] & column_inside, other=0.0)
            w1 = tl.load(row_pointers(w1_ptr, units, M, columns), mask=unit_inside[:, None] & column_inside, other=0.0)
            activation = tl.dot(hidden.to(COMPUTE), tl.trans(w1.to(COMPUTE)), activation, input_precision="ieee")
        activation += tl.load(b1_ptr + units, mask=unit_inside, other=0.0).to(tl.float32)[None, :]
        w2 = tl.load(w2_ptr + units, mask=unit_inside, other=0.0).to(tl.float32)
        # Not tl.maximum, which drops NaN.
        score += tl.sum(tl.where(activation < 0.0, 0.0, activation) * w2[None, :], 1)
    score += tl.load(b2_ptr).to(tl.float32)
    tl.store(scores_ptr + tokens, 1.0 / (1.0 + tl.exp(-score)), mask=inside)


def mlp_scores(
    hidden: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Fill out [B, S] float32 with sigmoid(w2 · relu(W1 · hidden + b1) + b2)."""
    B, S, M = hidden.shape
    N = w1.shape[0]
    # 64 × 64 float32 activations over 4 warps: 32 registers each; 64 columns in 16 bits are whole lines of 128 bytes.
    # float32 runs without tensor cores, its operands in registers: half the tile each way.
    compute, size = dot_type(hidden)
    block = 64 if size < 4 else 32
    mlp_scores_kernel[(cdiv(B * S, block),)](
        hidden, w1, b1, w2, b2, out, S, B * S, *hidden.stride()[:2],
        M=M, N=N, BLOCK_T=block, BLOCK_N=block, BLOCK_M=block, COMPUTE=compute,
    )  # fmt: skip
