"""`python bench/serve_vllm.py`: vLLM's OpenAI-compatible server with and without eviction, asked by openai's client.

Serves SmolLM2 with `vllm serve`, sends requests at once that each hide a number in about 1,000 tokens, and prints how
many ran at once, blocks in use at most, steps, the worker's CPU seconds, the share of them in eviction, and right
answers. --stream instead streams answers of mixed lengths, breaks some off, and tells what the server holds in the end.
Needs vLLM and openai (`make test-vllm` makes such an environment in .venv-vllm).
"""

import argparse
import asyncio
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from vllm_engine import facts

from kvevict import models


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """`vllm serve` until the end of the block."""

    def __init__(self, folder, settings, blocks, log):
        self.port, self.log = free_port(), log
        self.command = [
            str(pathlib.Path(sys.executable).with_name("vllm")), "serve", str(folder),
            "--served-model-name", "m", "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048",
            "--max-num-batched-tokens", "1024", "--worker-extension-cls", "bench.vllm_cost.Cost",
            "--num-gpu-blocks-override", str(blocks), "--port", str(self.port),
            "--additional-config", json.dumps({} if settings is None else {"kvevict": settings}),
        ]  # fmt: skip

    def __enter__(self):
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "KVEVICT_BACKEND": "reference"} | os.environ
        environment |= {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(ROOT)}  # for the worker's costs
        # Threads that spin while they wait for others count as work, and more of it the more the cores are used.
        environment |= {"OMP_WAIT_POLICY": "passive"}
        self.file = self.log.open("w")
        self.process = subprocess.Popen(
            self.command, stdout=self.file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        for _ in range(300):
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended, see {self.log}:\n{self.log.read_text()[-2000:]}")
            try:
                self.get("/health")
                return self
            except OSError:
                time.sleep(1)
        raise SystemExit(f"the server did not come up in 300 s, see {self.log}")

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.file.close()

    def get(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as reply:
            return reply.read().decode()

    def metrics(self):
        """Share of the blocks that hold tokens, and requests that run, as the server's own metrics tell it."""
        text = self.get("/metrics")
        names = ("kv_cache_usage_perc", "num_requests_running")
        found = [re.search(rf"^vllm:{name}\S* (\S+)$", text, re.MULTILINE) for name in names]
        return tuple(float(one[1]) if one else 0.0 for one in found)

    def cost(self):
        """What bench.vllm_cost tells of the worker."""
        url, body = f"http://127.0.0.1:{self.port}/collective_rpc", json.dumps({"method": "cost"}).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)["results"][0]


def client_of(server):
    from openai import AsyncOpenAI

    return AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", timeout=600)


async def ask(server, prompts, new):
    """(answers, highest share of blocks in use, most requests at once) of all prompts at once."""
    client, most, done = client_of(server), [0.0, 0.0], asyncio.Event()

    async def watch():
        while not done.is_set():
            most[:] = map(max, most, await asyncio.to_thread(server.metrics))
            await asyncio.sleep(0.1)

    async def one(prompt):
        reply = await client.completions.create(model="m", prompt=prompt, max_tokens=new, temperature=0)
        return reply.choices[0].text

    watching = asyncio.create_task(watch())
    answers = await asyncio.gather(*map(one, prompts))
    done.set()
    await watching
    return answers, *most


async def stream(server, prompts):
    """Streams of answers of mixed lengths, every fourth broken off: how many finished and were, and the share of blocks
    in use when all is over."""
    client = client_of(server)

    async def one(i, prompt):
        new = 24 + 8 * i
        reply = await client.completions.create(
            model="m", prompt=prompt, max_tokens=new, temperature=0, stream=True, extra_body=dict(ignore_eos=True)
        )
        count = 0
        async for _ in reply:
            count += 1
            if i % 4 == 3 and count == 5:
                await reply.close()
                return "aborted"
        return "finished" if count >= new else "cut short"

    ends = await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(prompts)))
    for _ in range(50):
        if server.metrics() == (0.0, 0.0):
            break
        await asyncio.sleep(0.2)
    return dict(finished=ends.count("finished"), aborted=ends.count("aborted"), usage=server.metrics()[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--new", type=int, default=64, help="tokens per answer")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=55, help="of 128 tokens; one of them is vLLM's null block")
    parser.add_argument("--stream", action="store_true", help="stream, abort, and see that nothing is left")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "bench/results/cpu")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    folder, log = models.fetch_smollm2(), options.out / "serve_vllm.log"
    _, tokenizer = models.load()
    prompts, numbers = facts(options.requests, tokenizer, models.sample_text())
    if options.stream:
        prompts = [prompt[: 100 + 900 * i // len(prompts)] for i, prompt in enumerate(prompts)]
        with Server(folder, dict(policy="recommended", budget=options.budget), options.blocks, log) as server:
            told = asyncio.run(stream(server, prompts))
        print(json.dumps(told | dict(line=log.read_text())))
        return
    rows = []
    for policy in (None, "keydiff", "recommended"):
        settings = None if policy is None else dict(policy=policy, budget=options.budget)
        with Server(folder, settings, options.blocks, log) as server:
            before, start = server.cost(), time.perf_counter()
            answers, most, running = asyncio.run(ask(server, prompts, options.new))
            seconds, after = time.perf_counter() - start, server.cost()
        spent = {name: after[name] - before[name] for name in after}
        row = dict(
            eviction="off" if policy is None else f"{policy}, budget {options.budget}",
            most_running=int(running),
            most_blocks_used=round(most * (options.blocks - 1)),
            steps=spent["steps"],
            cpu_seconds=spent["cpu_seconds"],
            eviction_share=spent["eviction_seconds"] / spent["cpu_seconds"],
            tokens_per_second=len(prompts) * options.new / seconds,
            right=sum(number in text for number, text in zip(numbers, answers, strict=True)),
            answers=[text.strip().split("\n")[0][:40] for text in answers],
        )
        rows.append(row)
        print(f"eviction {row['eviction']}: {row['most_running']} at once, {row['most_blocks_used']} of "
              f"{options.blocks - 1} blocks at most, {row['steps']} steps, {row['cpu_seconds']:.1f} CPU s, "
              f"{row['eviction_share']:.1%} of them in eviction, {row['tokens_per_second']:.1f} tokens/s, "
              f"{row['right']} of {len(prompts)} right")  # fmt: skip
        print("  " + " | ".join(row["answers"]), flush=True)
    import torch
    import vllm

    caption = f"cpu, vllm {vllm.__version__}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    (options.out / "serve_vllm.json").write_text(json.dumps(dict(caption=caption, rows=rows), indent=1) + "\n")
    log.unlink()


if __name__ == "__main__":
    main()
