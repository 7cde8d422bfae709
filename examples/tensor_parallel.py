"""EvictingCache under tensor parallelism: a model's heads lie on several ranks, and each rank evicts from its own.

    torchrun --nproc-per-node 3 examples/tensor_parallel.py [--tokens 800] [--keep 0.3] [--policy recommended]
    torchrun --nproc-per-node 2 examples/tensor_parallel.py

Rank 0 does the same in one process as well, and compares what is said. The KV heads have to be a multiple of the ranks:
SmolLM2 has 3. On another number of ranks the model is a tiny one with 4, whose weights are random: what it says is no
text, but depends on what is kept. Needs kvevict[hf].
"""

import argparse
import tempfile

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

from kvevict import models
from kvevict.demo import ANSWER, QUESTION, build_prompt
from kvevict.hf import EvictingCache


class Letters:
    """A tokenizer for which a text's bytes are its tokens."""

    def __call__(self, text: str, **options) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("latin-1")


def save_tiny(scratch: str) -> str:
    """The folder of rank 0, with a tiny model; of a single machine's ranks."""
    folder = [scratch]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=128, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=4096, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(4)  # far from uniform attention
    if dist.get_rank() == 0:
        model.save_pretrained(scratch)
    dist.broadcast_object_list(folder)
    return folder[0]


def answer(model, tokenizer, text: torch.Tensor, policy: str, keep: float) -> str:
    """What the model says after the question, of a text whose cache has been cut."""
    cache = EvictingCache(model, policy, keep=keep)  # finds the ranks that hold the other heads in the model
    model(text, past_key_values=cache, logits_to_keep=1)
    question = torch.tensor([tokenizer(QUESTION, add_special_tokens=False)["input_ids"]], device=text.device)
    ids = torch.cat([text, question], 1)
    count = len(tokenizer(ANSWER, add_special_tokens=False)["input_ids"])
    options = dict(attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
    said = model.generate(ids, past_key_values=cache, **options)
    return tokenizer.decode(said[0, ids.shape[1] :].tolist())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=800, help="of the text")
    parser.add_argument("--keep", type=float, default=0.3, help="share of the cache")
    parser.add_argument("--policy", default="recommended", help="by name; heads of this one share their tokens")
    parser.add_argument(
        "--model", choices=("smollm2", "tiny"), help="default: smollm2 if its 3 KV heads suit the ranks"
    )
    options = parser.parse_args()

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    name = options.model or ("smollm2" if 3 % ranks == 0 else "tiny")
    whole = dict(dtype=torch.float32)
    parts = whole | dict(distributed_config=DistributedConfig(tp_size=ranks))
    tokenizer = Letters() if name == "tiny" else models.load()[1]
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_tiny(scratch) if name == "tiny" else models.fetch_smollm2()
        one, spread = (AutoModelForCausalLM.from_pretrained(folder, **each).eval() for each in (whole, parts))
        dist.barrier()  # all have read it
    text = build_prompt(tokenizer, models.sample_text(), options.tokens)
    said = answer(spread, tokenizer, text.to(spread.device), options.policy, options.keep)
    if rank == 0:
        expected = answer(one, tokenizer, text, options.policy, options.keep)
        same = "the same" if said == expected else "OTHER WORDS"
        print(f"{name}: {ranks} ranks say {said!r}, one process {expected!r}: {same}")
        assert said == expected
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
