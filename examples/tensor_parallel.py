"""EvictingCache under tensor parallelism: a model's heads lie on several ranks, and each rank evicts from its own.

    torchrun --nproc-per-node 3 examples/tensor_parallel.py [--tokens 800] [--keep 0.3] [--policy recommended]

Rank 0 does the same in one process as well, and compares what is said. The KV heads have to be a multiple of the ranks:
SmolLM2 has 3. Needs kvevict[hf].
"""

import argparse

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from kvevict import models
from kvevict.demo import ANSWER, QUESTION, build_prompt
from kvevict.hf import EvictingCache


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
    options = parser.parse_args()

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    one, tokenizer = models.load()
    text = build_prompt(tokenizer, models.sample_text(), options.tokens)
    spread = AutoModelForCausalLM.from_pretrained(
        models.fetch_smollm2(), dtype=torch.float32, distributed_config=DistributedConfig(tp_size=ranks)
    ).eval()
    said = answer(spread, tokenizer, text.to(spread.device), options.policy, options.keep)
    if rank == 0:
        expected = answer(one, tokenizer, text, options.policy, options.keep)
        same = "the same" if said == expected else "OTHER WORDS"
        print(f"{ranks} ranks say {said!r}, one process {expected!r}: {same}")
        assert said == expected
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
