"""Mutation testing with cosmic-ray: change one operator or number of a module at a time, in a copy of the tree, and see
whether that module's tests notice. Run by `make mutate MODULE=kernels/select_topk.py SAMPLE=50`.

cosmic-ray edits files on disk, which is what Triton reads. Results are kept in .mutants/<module>/session.sqlite: a run
that is cut off goes on where it stopped, and a larger SAMPLE contains a smaller one. Delete the folder to begin anew,
from the tree as it is then. mutants.md says what survived, and why that is right.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkItem

ROOT = Path(__file__).resolve().parents[2]


def tests(cases: str, *files: str, backend: str = "triton") -> str:
    """Arguments of pytest: fuzz cases of the ops that `cases` matches, on one backend, then whole test files."""
    names = " or ".join(Path(file).stem for file in files)
    chosen = f"({backend} and ({cases}))" + (f" or {names}" if names else "")
    return f"tests/fuzz/test_ops.py {' '.join(files)} -k '{chosen}'"


BORDERS = "tests/test_borders.py"
TESTS = {
    "kernels/select_topk.py": tests("topk_indices or evict_slots", BORDERS),
    "kernels/select_ranks.py": "tests/test_select_ranks.py",
    "kernels/compact_kv.py": tests("compact", "tests/test_compact_kv.py"),
    "kernels/score_keydiff.py": tests("keydiff_scores or paged_scores", "tests/test_score_keydiff.py", BORDERS),
    "kernels/score_kv.py": tests("kv_scores", "tests/test_score_kv.py"),
    "kernels/score_peaks.py": tests("peaks", "tests/test_score_peaks.py"),
    "kernels/score_products.py": tests("quadratic or projected", "tests/test_score_products.py"),
    "kernels/score_norm.py": tests("key_norm"),
    "kernels/score_mlp.py": tests("mlp_scores"),
    "kernels/pool_scores.py": tests("pool_scores"),
    "kernels/combine_ranks.py": tests("combine_scores"),
    "kernels/score_attention.py": tests("lse or mass", "tests/test_score_attention.py", BORDERS),
    "kernels/decode_attention.py": tests("decode", "tests/test_decode_attention.py"),
    "kernels/rows.py": tests("paged or compact", BORDERS),
    "kernels/primitives.py": tests("topk_indices or evict_slots or scores", BORDERS),
    "kvevict/backends/reference.py": tests("test_contract", backend="reference"),
    "kvevict/ops.py": tests("test_contract", backend="reference"),
    "kvevict/validate.py": tests("compact or topk_indices or decode or mlp", backend="reference"),
    "kvevict/custom_ops.py": tests("test_contract", backend="reference"),
    "kvevict/paged/ops.py": tests("paged", backend="reference"),
    "kvevict/paged/pool.py": "tests/test_pool_machine.py tests/test_paged.py -k pool",
    "kvevict/policies/attention.py": "tests/test_policies.py",
    "kvevict/policies/base.py": "tests/test_policies.py",
    "kvevict/policies/budgets.py": "tests/test_budgets.py tests/test_shares.py tests/test_policies.py",
    "kvevict/policies/learned_kv.py": "tests/test_learned_kv.py",
    "kvevict/policies/shares.py": "tests/test_shares.py",
    "kvevict/policies/keys.py": "tests/test_policies.py",
    "kvevict/policies/mixture.py": "tests/test_policies.py",
    "kvevict/policies/observed.py": "tests/test_policies.py tests/test_hf.py",
    "kvevict/policies/order.py": "tests/test_policies.py",
    "kvevict/policies/tracker.py": "tests/test_tracker_machine.py tests/test_policies.py",
    "kvevict/hf/attention.py": "tests/test_hf_masks.py",
    "kvevict/hf/cache.py": "tests/fuzz/test_cache.py tests/test_hf_crop.py tests/test_hf_saved.py",
    "kvevict/hf/layer.py": "tests/fuzz/test_cache.py tests/test_hf_crop.py",
    "kvevict/hf/devices.py": "tests/test_hf_devices.py",
    "kvevict/hf/fit.py": "tests/test_learned_kv.py",
    "kvevict/hf/masks.py": "tests/test_hf_masks.py",
    "kvevict/hf/pages.py": "tests/test_hf_heads.py",
    "kvevict/hf/rotary.py": "tests/test_learned_kv.py",
    "kvevict/hf/saved.py": "tests/test_hf_saved.py",
    "kvevict/hf/static.py": "tests/fuzz/test_cache.py tests/test_hf_static.py",
    "kvevict/vllm/settings.py": f"tests/test_vllm.py {BORDERS} -k 'test_vllm or budget'",
}

# One change for each operator: the others of cosmic-ray's fail the same tests.
OPERATORS = re.compile(
    r"core/(ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Add|Div_Mul|FloorDiv_Mul|Mod_FloorDiv|BitAnd_BitOr|BitOr_BitAnd"
    r"|BitXor_BitAnd|LShift_RShift|RShift_LShift)"
    r"|ReplaceComparisonOperator_(Eq_NotEq|NotEq_Eq|Lt_LtE|LtE_Lt|Gt_GtE|GtE_Gt|Is_IsNot|IsNot_Is)"
    r"|ReplaceUnaryOperator_Delete_(USub|Invert|Not)|AddNot|ReplaceTrueWithFalse|ReplaceFalseWithTrue|ReplaceAndWithOr"
    r"|ReplaceOrWithAnd|ReplaceBreakWithContinue|ReplaceContinueWithBreak|NumberReplacer|ZeroIterationForLoop)"
)


def copy_tree(folder: Path) -> None:
    """The files that git knows or would, as they are."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        source, target = ROOT / name, folder / name
        if source.is_symlink() or source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)


def unread_lines(path: Path) -> set[int]:
    """Lines of annotations and of what is raised, where a change means nothing or is a word in a message."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        parts: list[ast.AST | None] = []
        if isinstance(node, ast.arg | ast.AnnAssign):
            parts = [node.annotation]
        elif isinstance(node, ast.FunctionDef):
            parts = [node.returns]
        elif isinstance(node, ast.Raise):
            parts = [node]
        for part in filter(None, parts):
            lines.update(range(part.lineno, part.end_lineno + 1))
    return lines


def plan(module: str, folder: Path, database: WorkDB) -> list[WorkItem]:
    """All mutants of a module, in an order drawn once."""
    if not database.num_work_items:
        init([Path(module)], database, {})
    unread = unread_lines(Path(module))
    items = [
        item
        for item in database.work_items
        if OPERATORS.fullmatch(item.mutations[0].operator_name) and item.mutations[0].start_pos[0] not in unread
    ]
    items.sort(key=lambda item: (item.mutations[0].operator_name, item.mutations[0].occurrence))
    random.Random(module).shuffle(items)
    return items


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", choices=TESTS)
    parser.add_argument("--python", required=True, help="the interpreter that runs the tests")
    parser.add_argument("--sample", type=int, default=30, help="mutants to try; 0: all")
    parser.add_argument("--slower", type=float, default=4.0, help="how many times longer a mutant may run than none")
    options = parser.parse_args()

    folder = ROOT / ".mutants" / options.module.replace("/", "-").removesuffix(".py")
    tree = folder / "tree"
    if not tree.exists():
        copy_tree(tree)
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    os.nice(19)
    command = f"{options.python} -m pytest -x -q -p no:cacheprovider -n 0 {TESTS[options.module]}"
    started = time.monotonic()
    if subprocess.run(shlex.split(command), stdout=subprocess.DEVNULL).returncode:
        sys.exit(f"the tests fail without a mutation: {command}")
    limit = options.slower * (time.monotonic() - started) + 10
    with use_db(str(folder / "session.sqlite"), WorkDB.Mode.create) as database:
        items = plan(options.module, folder, database)
        results = dict(database.results)
        for item in items[: options.sample or None]:
            if item.job_id not in results:
                result = mutate_and_test(item.mutations, command, limit)
                database.set_result(item.job_id, result)
                results[item.job_id] = result
                print(end="." if result.is_killed else "S", flush=True)
    tried = [results[item.job_id] for item in items if item.job_id in results]
    survived = [result for result in tried if result.test_outcome == TestOutcome.SURVIVED]
    slow = sum(result.output == "timeout" for result in tried)
    summary = f"{len(tried)} of {len(items)} mutants tried, {len(survived)} survived, {slow} ran out of time"
    print(f"\n{options.module}: {summary}")
    for result in survived:
        print("\n".join(line for line in (result.diff or "").splitlines() if re.match(r"@@|[-+][^-+]", line)))


if __name__ == "__main__":
    main()
