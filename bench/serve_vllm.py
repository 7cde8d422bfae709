"""`python bench/serve_vllm.py`: vLLM's OpenAI-compatible server with and without eviction, asked by openai's client.

Serves SmolLM2, sends requests at once that each hide a number in about 1,000 tokens, and prints blocks in use at most,
throughput and right answers. Needs vLLM and openai (`make test-vllm` makes such an environment in .venv-vllm).
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
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
            "--served-model-name", "m", "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048",
            "--max-num-batched-tokens", "1024", "--no-enable-prefix-caching",
            "--num-gpu-blocks-override", str(blocks), "--port", str(self.port),
            "--additional-config", json.dumps({} if settings is None else {"kvevict": settings}),
        ]  # fmt: skip

    def __enter__(self):
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "KVEVICT_BACKEND": "reference"} | os.environ
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

    def share_used(self):
        """Share of the blocks that hold tokens, as the server's own metrics tell it."""
        found = re.search(r"^vllm:kv_cache_usage_perc\S* (\S+)$", self.get("/metrics"), re.MULTILINE)
        return float(found[1]) if found else 0.0


async def ask(server, prompts, new):
    """(answers, seconds, highest share of blocks in use) of all prompts at once."""
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", timeout=600)
    most, done = 0.0, asyncio.Event()

    async def watch():
        nonlocal most
        while not done.is_set():
            most = max(most, await asyncio.to_thread(server.share_used))
            await asyncio.sleep(0.1)

    async def one(prompt):
        reply = await client.completions.create(model="m", prompt=prompt, max_tokens=new, temperature=0)
        return reply.choices[0].text

    watching = asyncio.create_task(watch())
    start = time.perf_counter()
    answers = await asyncio.gather(*map(one, prompts))
    seconds = time.perf_counter() - start
    done.set()
    await watching
    return answers, seconds, most


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--new", type=int, default=64, help="tokens per answer")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--policy", default="recommended")
    parser.add_argument("--blocks", type=int, default=55, help="of 128 tokens; one of them is vLLM's null block")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "bench/results/cpu")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    _, tokenizer = models.load()
    prompts, numbers = facts(options.requests, tokenizer, models.sample_text())
    rows = []
    for settings in (None, dict(policy=options.policy, budget=options.budget)):
        with Server(models.fetch_smollm2(), settings, options.blocks, options.out / "serve_vllm.log") as server:
            answers, seconds, most = asyncio.run(ask(server, prompts, options.new))
        row = dict(
            eviction="off" if settings is None else f"{options.policy}, budget {options.budget}",
            most_blocks_used=round(most * (options.blocks - 1)),
            tokens_per_second=len(prompts) * options.new / seconds,
            right=sum(number in text for number, text in zip(numbers, answers, strict=True)),
            answers=[text.strip().split("\n")[0][:40] for text in answers],
        )
        rows.append(row)
        print(f"eviction {row['eviction']}: {row['most_blocks_used']} of {options.blocks - 1} blocks at most, "
              f"{row['tokens_per_second']:.1f} tokens/s, {row['right']} of {len(prompts)} right")  # fmt: skip
        print("  " + " | ".join(row["answers"]), flush=True)
    import torch
    import vllm

    caption = f"cpu, vllm {vllm.__version__}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    (options.out / "serve_vllm.json").write_text(json.dumps(dict(caption=caption, rows=rows), indent=1) + "\n")
    (options.out / "serve_vllm.log").unlink()


if __name__ == "__main__":
    main()
