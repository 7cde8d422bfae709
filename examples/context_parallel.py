"""A cache over several ranks: a model reads a text that hides a fact, every rank keeps its part of the cache, the parts
are cut together, and the answer is decoded over what is left of them.

    torchrun --nproc-per-node 2 examples/context_parallel.py [--tokens 800] [--keep 0.3] [--layout zigzag]

Rank 0 does the same in one process as well, and compares. Needs kvevict[hf]. On GPUs each rank reads its part of the
text, under torch's context_parallel, which deals it as "zigzag" does. On CPUs, where that has no attention, and for
other layouts every rank reads the whole text, and drops what is not its own.
"""

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

import kvevict
from kvevict import distributed, models
from kvevict.demo import ANSWER, QUESTION, build_prompt
from kvevict.distributed import Shard


def append(shard: Shard, key: Tensor, value: Tensor, position: int) -> Shard:
    """The shard with one more token [B, H, 1, D] behind each head's last."""
    at = shard.counts[..., None, None]
    keys, values = (
        F.pad(rows, (0, 0, 0, 1)).scatter(2, at.expand(new.shape), new)
        for rows, new in ((shard.keys, key), (shard.values, value))
    )
    positions = F.pad(shard.positions, (0, 1), value=-1).scatter(2, at[..., 0], position)
    return Shard(keys, values, positions, shard.counts + 1)


def ring_attention(module, query, key, value, attention_mask, scaling=None, **options):
    """As torch's context_parallel finds and replaces it: causal, and with as many heads of keys as of queries."""
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def with_attention(model, name: str, attention, read):
    """What read() gives while the model's attention is another one."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, lambda *arguments, **options: None)
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        return read()
    finally:
        model.set_attn_implementation(before)


def cached(model, ids: Tensor, **options) -> list[Tensor]:
    """Keys and values [layers, H, L, D] of these tokens."""
    cache = DynamicCache()
    model(ids, past_key_values=cache, logits_to_keep=1, **options)
    return [torch.cat([getattr(x, name) for x in cache.layers]) for name in ("keys", "values")]


def read_in_parts(model, text: Tensor, mesh: DeviceMesh) -> list[Tensor]:
    """Keys and values of this rank's tokens, those of "zigzag". Their number is a multiple of twice the ranks."""
    ids, places = text.clone(), torch.arange(text.shape[1], device=text.device)[None]
    with context_parallel(mesh, buffers=[ids, places], buffer_seq_dims=[1, 1], no_restore_buffers={ids, places}):
        return with_attention(model, "ring", ring_attention, lambda: cached(model, ids, position_ids=places))


def whole(part: Tensor, own: Tensor) -> Tensor:
    """Of the parts [layers, H, L, D] of all ranks, as many tokens each, at positions `own` [L]."""
    parts, places = ([torch.empty_like(x) for _ in range(dist.get_world_size())] for x in (part, own))
    dist.all_gather(parts, part.contiguous())
    dist.all_gather(places, own)
    return torch.cat(parts, 2)[:, :, torch.cat(places).argsort()]


class Sharded:
    """Attention over the shards of all ranks, for a model that is given one token at a time and no cache."""

    def __init__(self, shards: list[Shard]) -> None:
        self.shards, self.position = shards, 0

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **options):
        layer = module.layer_idx
        if self.position % dist.get_world_size() == dist.get_rank():  # new tokens go to the ranks in turn
            self.shards[layer] = append(self.shards[layer], key, value, self.position)
        out = distributed.decode_attention(query, self.shards[layer], group=None, scale=scaling)
        return out.transpose(1, 2).contiguous(), None


def decode(step, ids: Tensor, first: int, count: int) -> list[int]:
    """Read `ids` from position `first` on, then generate greedily. step(token [1, 1], position) gives logits."""
    position = first
    for token in ids.split(1, 1):
        logits = step(token, position)
        position += 1
    said = []
    for _ in range(count):
        said.append(int(logits.argmax()))
        logits = step(torch.full_like(ids[:, :1], said[-1]), position)
        position += 1
    return said


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=800, help="of the text")
    parser.add_argument("--keep", type=float, default=0.3, help="share of the cache")
    parser.add_argument("--layout", default="zigzag", choices=("contiguous", "zigzag", "striped"))
    options = parser.parse_args()

    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if cuda:
        torch.cuda.set_device(rank % torch.cuda.device_count())
        if options.layout == "zigzag" and options.tokens % (2 * ranks):
            parser.error(f"--tokens is {options.tokens}: expected a multiple of {2 * ranks}, twice the ranks")
    model, tokenizer = models.load(device=f"cuda:{torch.cuda.current_device()}" if cuda else "cpu")
    text = build_prompt(tokenizer, models.sample_text(), options.tokens).to(model.device)
    question = torch.tensor([tokenizer(QUESTION, add_special_tokens=False)["input_ids"]], device=model.device)
    answer = len(tokenizer(ANSWER, add_special_tokens=False)["input_ids"])

    selection = dict(keep=options.keep, sink=4, recent=32)
    own = distributed.positions_of(options.layout, options.tokens, ranks, rank).to(model.device)
    if cuda and options.layout == "zigzag":
        part = read_in_parts(model, text, init_device_mesh("cuda", (ranks,)))
        keys, values = (whole(x, own) for x in part)
    else:
        keys, values = cached(model, text)
        part = [x[:, :, own] for x in (keys, values)]

    # The layers are one batch, so that all of them take the collectives of one.
    cut = distributed.keydiff_compact(*part, positions=own, tokens=options.tokens, group=None, **selection)
    attend = Sharded([Shard(*(x[layer : layer + 1] for x in cut)) for layer in range(len(keys))])

    def sharded_step(token: Tensor, position: int) -> Tensor:
        attend.position = position
        places = torch.full_like(token, position)
        return model(token, position_ids=places, use_cache=False).logits[0, -1]

    said = with_attention(model, "sharded", attend, lambda: decode(sharded_step, question, options.tokens, answer))
    held = cut.counts.sum().item() / cut.counts.numel()
    print(f"rank {rank}: {len(own)} tokens read, {held:.1f} of a head kept, says {tokenizer.decode(said)!r}")

    if rank == 0:
        one = kvevict.keydiff_compact(keys, values, inplace=False, **selection)
        small = DynamicCache()
        for layer in range(len(keys)):
            small.update(one.keys[layer : layer + 1], one.values[layer : layer + 1], layer)

        def step(token: Tensor, position: int) -> Tensor:
            return model(token, position_ids=torch.full_like(token, position), past_key_values=small).logits[0, -1]

        expected = decode(step, question, options.tokens, answer)
        same = "the same tokens" if said == expected else "OTHER TOKENS"
        print(f"one process says {tokenizer.decode(expected)!r}: {same}")
        assert said == expected
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
