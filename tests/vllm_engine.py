"""One vLLM engine in a process of its own: a scenario as JSON in, what happened as JSON in the last line out.

tests/test_vllm.py and bench/serve_vllm.py build on the prompts here; run by hand:
    python tests/vllm_engine.py '{"requests": 4, "kvevict": {"policy": "keydiff", "budget": 256}}'
"""

import json
import os
import random
import sys
from collections import Counter

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the block pool is in this process, to be looked at
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("KVEVICT_BACKEND", "reference")

BLOCK = 128


def facts(count, tokenizer, text, tokens=1000):
    """`count` prompts of about so many tokens that hide a number, and the numbers."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    prompts, answers = [], []
    for i in range(count):
        rng = random.Random(i)
        number = rng.randrange(10000, 100000)
        hidden = tokenizer(f" The magic number of Paris is {number}. ", add_special_tokens=False)["input_ids"]
        question = "\n\nQuestion: what is the magic number of Paris?\nAnswer: the magic number of Paris is"
        question = tokenizer(question, add_special_tokens=False)["input_ids"]
        start, place = rng.randrange(len(ids) - tokens), int(tokens * rng.uniform(0.2, 0.8))
        body = ids[start : start + tokens - len(hidden) - len(question)]
        prompts.append(body[:place] + hidden + body[place:] + question)
        answers.append(str(number))
    return prompts, answers


def views(impl, kv_cache):
    """K and V as views [num_blocks, block_size, kv_heads, head_dim] of the engine's memory, in any layout of it."""
    if type(impl).__name__ != "EvictingCPUImpl":
        return impl.cache_views(kv_cache)
    blocks, heads, size, width = kv_cache.shape
    keys, values = kv_cache.view(blocks, heads, 2 * size, width // 2).chunk(2, dim=2)
    keys = keys.as_strided((blocks, size, heads, width // 2), (keys.stride(0), 1, keys.stride(1), size))
    return keys, values.transpose(1, 2)


class Checked:
    """Every cut of every layer against the policy's choice for each request alone, gathered token by token."""

    def __init__(self):
        from kvevict.vllm.cpu import EvictingCPUImpl
        from kvevict.vllm.worker import EvictingImpl

        self.requests, self.chosen, self.queries = 0, [], Counter()
        for of in (EvictingCPUImpl, EvictingImpl):
            of.cut = self.checked(of.cut)

    def checked(self, cut):
        import torch

        from kvevict.policies import Observed

        def checked(impl, step, requests, seen, kv_cache):
            caches = views(impl, kv_cache)
            size, policy = caches[0].shape[1], step.policy
            expected = []
            for j, length in enumerate(requests.lengths.tolist()):
                slots = torch.arange(length)
                places = requests.table[j, slots // size].long(), slots % size
                keys, values = (cache[places].transpose(0, 1)[None].contiguous() for cache in caches)
                alone = {}
                if seen["queries"] is not None:  # [tokens, Hq, 1, D] under a table
                    rows, table = seen["queries"]
                    alone["queries"] = rows[table[j].long(), :, 0].transpose(0, 1)[None]
                if seen["positions"] is not None:
                    alone["positions"] = seen["positions"][j : j + 1, ..., :length]
                observed = Observed(keys=keys, values=values, **alone, scale=seen["scale"], layer=seen["layer"])
                scores, kept = policy.scores(observed)[..., step.prefix :], int(requests.cut.kept[j])
                index = step.prefix + policy.choose(scores.contiguous(), kept)
                self.chosen.append(index[0].tolist())
                where = tuple(place[length - kept :] for place in places)
                moved = [x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3]))[0].transpose(0, 1) for x in
                         (keys, values)]  # fmt: skip
                still = tuple(place[: step.prefix] for place in places)
                expected.append((where, moved, still, [cache[still].clone() for cache in caches]))
                self.queries[requests.queries.shape[1]] += 1
            cut(impl, step, requests, seen, kv_cache)
            for where, moved, still, before in expected:
                for cache, rows, prefix in zip(caches, moved, before, strict=True):
                    assert torch.equal(cache[where], rows), "a request is not cut as it is alone"
                    assert torch.equal(cache[still], prefix), "the prefix has changed"
            self.requests += len(expected)

        return checked


class Watched:
    """An engine whose block pool is checked after every step."""

    def __init__(self, scenario):
        from vllm import LLM

        from kvevict import models

        self.fake = None
        if scenario.get("fake"):
            import vllm_fake

            self.fake = vllm_fake
            vllm_fake.use(**scenario["fake"])
        self.checked = Checked() if scenario.get("checked") else None
        tiny = "model" in scenario  # where tests/vllm_tiny.py saved one
        folder = scenario["model"] if tiny else models.fetch_smollm2()
        options = dict(max_model_len=2048, max_num_batched_tokens=512, enable_prefix_caching=False, enforce_eager=True,
                       skip_tokenizer_init=tiny)  # fmt: skip
        options |= scenario.get("engine", {})
        extra = {} if scenario.get("kvevict") is None else dict(kvevict=scenario["kvevict"])
        self.llm = LLM(str(folder), dtype="float32", additional_config=extra, disable_log_stats=True, **options)
        self.engine = self.llm.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.manager = self.scheduler.kv_cache_manager
        self.pool = self.manager.block_pool
        self.total = self.pool.get_num_free_blocks()
        self.preempted, self.most_used, self.most_running = 0, 0, 0
        preempt = self.scheduler._preempt_request

        def counting(*args, **options):
            self.preempted += 1
            return preempt(*args, **options)

        self.scheduler._preempt_request = counting

    def add(self, name, prompt, new):
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
        self.engine.add_request(name, dict(prompt_token_ids=prompt), params)

    def held(self):
        """Blocks of every manager and request, without null blocks."""
        null = self.pool.null_block
        return {(i, name): [b.block_id for b in blocks if b is not null]
                for i, manager in enumerate(self.manager.coordinator.single_type_managers)
                for name, blocks in manager.req_to_blocks.items()}  # fmt: skip

    def step(self):
        outputs = self.engine.step()
        held = Counter(block for blocks in self.held().values() for block in blocks)
        counted = {b.block_id: b.ref_cnt for b in self.pool.blocks if b.ref_cnt and b is not self.pool.null_block}
        assert counted == held, "a block's references are not its holders"
        assert len(held) + self.pool.get_num_free_blocks() == self.total, "a block is lost"
        for manager in self.manager.coordinator.single_type_managers:
            if (never_written := getattr(manager.kv_cache_spec, "never_written", None)) is None:
                continue
            first = never_written // manager.block_size
            for blocks in manager.req_to_blocks.values():
                written = [b for b in blocks[first:] if not b.is_null]
                assert all(b.ref_cnt == 1 for b in written), "a block that is written is shared"
                assert all(b.block_hash is None for b in written), "a block that is written is cached"
        self.most_used = max(self.most_used, len(held))
        self.most_running = max(self.most_running, len(self.scheduler.running))
        return outputs

    def result(self):
        checked = dict(cuts=self.checked.requests, queries=self.checked.queries) if self.checked else {}
        if self.fake:
            checked["wrong"] = self.fake.WRONG
        return dict(preempted=self.preempted, most_used=self.most_used, most_running=self.most_running,
                    total=self.total, free=self.pool.get_num_free_blocks(), **checked)  # fmt: skip


def answer(scenario):
    """Add all requests at once and run until they are finished."""
    from kvevict import models

    watched = Watched(scenario)
    prompts, numbers = facts(scenario["requests"], watched.llm.get_tokenizer(), models.sample_text(),
                             scenario.get("tokens", 1000))  # fmt: skip
    for i, prompt in enumerate(prompts):
        watched.add(str(i), prompt, scenario.get("new", 24))
    said = {}
    while watched.engine.has_unfinished_requests():
        for output in watched.step():
            if output.finished:
                said[output.request_id] = output.outputs[0]
    outputs = [said[str(i)] for i in range(len(prompts))]
    hits = [number in output.text for number, output in zip(numbers, outputs, strict=True)]
    return dict(tokens=[list(o.token_ids) for o in outputs], hits=hits, **watched.result())


def outgrow(scenario):
    """Random prompts of one length, added at once, and their answers' lengths."""
    watched, rng = Watched(scenario), random.Random(0)
    for i in range(scenario["requests"]):
        watched.add(str(i), [rng.randrange(1000, 40000) for _ in range(scenario["tokens"])], scenario["new"])
    said = {}
    while watched.engine.has_unfinished_requests():
        for output in watched.step():
            if output.finished:
                said[output.request_id] = len(output.outputs[0].token_ids)
    return dict(lengths=[said[str(i)] for i in range(scenario["requests"])], **watched.result())


def churn(scenario):
    """So many random steps: requests of all lengths come, are aborted, and finish."""
    watched, rng = Watched(scenario), random.Random(0)
    alive, added, aborted, finished = set(), 0, 0, 0
    common = [rng.randrange(1000, 40000) for _ in range(300)]
    for _ in range(scenario["steps"]):
        if len(alive) < 10 and rng.random() < 0.3:
            length = rng.choice([1, 30, 127, 128, 129, 300, 500, 900])
            prompt = (common[: rng.choice([0, 300])] + [rng.randrange(1000, 40000) for _ in range(length)])[:length]
            watched.add(str(added), prompt, rng.randint(1, 80))
            alive.add(str(added))
            added += 1
        if alive and rng.random() < 0.05:
            name = rng.choice(sorted(alive))
            watched.engine.abort_request([name])
            alive.discard(name)
            aborted += 1
        for output in watched.step() if watched.engine.has_unfinished_requests() else ():
            if output.finished and output.request_id in alive:
                alive.discard(output.request_id)
                finished += 1
    for name in sorted(alive):
        watched.engine.abort_request([name])
    while watched.engine.has_unfinished_requests():
        watched.step()
    return dict(added=added, aborted=aborted, finished=finished, **watched.result())


def waves(scenario):
    """32 requests in waves of 8: 4 prefixes of 300 tokens, tails of their own. What each says, and tokens scheduled."""
    watched, rng, requests = Watched(scenario), random.Random(0), scenario.get("requests", 32)
    prefixes = [[rng.randrange(1000, 40000) for _ in range(300)] for _ in range(4)]
    schedule, scheduled, said = watched.scheduler.schedule, 0, {}

    def counting(*args, **options):
        nonlocal scheduled
        output = schedule(*args, **options)
        scheduled += output.total_num_scheduled_tokens
        return output

    watched.scheduler.schedule = counting
    for first in range(0, requests, 8):
        for i in range(first, min(first + 8, requests)):
            tail = [rng.randrange(1000, 40000) for _ in range(rng.randrange(1, 200))]
            watched.add(str(i), prefixes[i % 4] + tail, 12)
        while watched.engine.has_unfinished_requests():
            for output in watched.step():
                if output.finished:
                    said[output.request_id] = list(output.outputs[0].token_ids)
    return dict(tokens=[said[str(i)] for i in range(requests)], scheduled=scheduled, **watched.result())


def traced(scenario):
    """Prompts of 300 to 500 tokens, read whole: what is said, and which slots every cut chose, by rank and head."""
    from vllm import LLM, SamplingParams

    rng = random.Random(0)
    llm = LLM(scenario["model"], dtype="float32", additional_config=dict(kvevict=scenario["kvevict"]),
              enforce_eager=True, max_model_len=2048, max_num_batched_tokens=16384, skip_tokenizer_init=True,
              disable_log_stats=True, worker_extension_cls="vllm_trace.Trace", **scenario["engine"])  # fmt: skip
    llm.collective_rpc("chosen")  # begins
    prompts = [
        [rng.randrange(1000, 40000) for _ in range(rng.randrange(300, 500))] for _ in range(scenario["requests"])
    ]
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, detokenize=False)
    outputs = llm.generate([dict(prompt_token_ids=prompt) for prompt in prompts], params)
    return dict(tokens=[list(o.outputs[0].token_ids) for o in outputs], chosen=llm.collective_rpc("chosen"))


def evicting_cache(scenario):
    """The same prompts in transformers, read in the same chunks, with EvictingCache: which facts are answered."""
    import torch

    from kvevict import models
    from kvevict.hf import EvictingCache
    from kvevict.vllm.settings import Settings

    settings = Settings(**scenario["kvevict"])
    model, tokenizer = models.load()
    model.set_attn_implementation("kvevict")
    prompts, numbers = facts(scenario["requests"], tokenizer, models.sample_text(), scenario.get("tokens", 1000))
    hits = []
    for prompt, number in zip(prompts, numbers, strict=True):
        cache = EvictingCache(model.config, settings.build(), budget=settings.budget, interval=settings.interval)
        ids = torch.tensor([prompt])
        chunk = scenario["engine"]["max_num_batched_tokens"]
        options = dict(do_sample=False, max_new_tokens=24, prefill_chunk_size=chunk)
        said = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)
        hits.append(number in tokenizer.decode(said[0, len(prompt) :].tolist()))
    return dict(hits=hits)


if __name__ == "__main__":
    scenario = json.loads(sys.argv[1])
    kinds = dict(answer=answer, outgrow=outgrow, churn=churn, waves=waves, traced=traced, evicting_cache=evicting_cache)
    print(json.dumps(kinds[scenario.get("kind", "answer")](scenario)))
