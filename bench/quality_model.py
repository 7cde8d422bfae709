"""`python -m bench.quality_model`: `kvevict eval` of a model, its question unseen and seen, all policies and shares.

For a model whose scorer the package does not carry one is trained first (`kvevict train`, on the text's first half).
Results: bench/results/<device>/eval-<model>-<unseen or seen>-<tokens>/; each goes on where it was.
"""

import argparse
import pathlib

import torch

from bench import RESULTS, device_name, qwen
from kvevict import evaluate, models, train

POLICIES = ("recommended", "keydiff", "snapkv", "expected-attention", "defensivekv", "far", "kvzip", evaluate.LEARNED)
KEEPS = (0.5, 0.25, 0.1)


def scorer_of(name: str, model: str, device: str) -> pathlib.Path | None:
    """The file of a scorer for the model, trained where there is none; None: the package has one."""
    if model == models.SMOLLM2:
        return None
    folder = models.cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.scorer.safetensors"
    if not path.exists():
        train.run(model, [], "kv", 5760, 640, 1, None, device, path, path.with_suffix(".report"))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality_model", description=__doc__)
    parser.add_argument("--model", default=models.SMOLLM2, help=f"a Hugging Face id or folder, or {qwen.NAME}")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--contexts", type=int, default=15, help="of three questions of each task")
    parser.add_argument("--policies", nargs="+", default=POLICIES)
    parser.add_argument("--budgets", nargs="+", default=[], help="of `kvevict eval`; default: all")
    parser.add_argument("--modes", nargs="+", default=["unseen", "seen"], choices=["unseen", "seen"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    model = str(qwen.fetch()) if options.model == qwen.NAME else options.model
    name = pathlib.Path(model).name.lower()
    scorer = scorer_of(name, model, options.device)
    out = RESULTS / device_name(options.device)
    out.mkdir(parents=True, exist_ok=True)
    for mode in options.modes:
        evaluate.run(
            model, None, options.tokens, options.contexts, list(options.policies), KEEPS, options.budgets, scorer, None,
            mode == "seen", options.device, out / f"eval-{name}-{mode}-{options.tokens}",
        )  # fmt: skip


if __name__ == "__main__":
    main()
