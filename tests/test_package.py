"""What is published: the sdist holds what a wheel is built of, and the wheel works outside the repository."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile

import pytest

import kvevict

REPOSITORY = pathlib.Path(__file__).parents[1]
SCRIPT = """
import torch, kvevict
from kvevict.ops import keydiff_compact
from kvevict.policies import LearnedKV
assert kvevict.__file__.startswith({folder!r}), kvevict.__file__
keys, values = torch.randn(1, 2, 64, 64), torch.randn(1, 2, 64, 64)
print(keydiff_compact(keys, values, keep=16, inplace=False).keys.shape[2])
"""


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(sdist, wheel): the wheel is built of the sdist."""
    if not (REPOSITORY / ".git").exists():
        pytest.skip("no checkout")
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("package")
    tracked = run("git", "ls-files", "-z", cwd=REPOSITORY).strip("\0").split("\0")
    for name in tracked:
        if (REPOSITORY / name).exists() and not name.startswith(("bench/results", "tests/")):
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, target, follow_symlinks=False)
    run(sys.executable, "-m", "build", "--outdir", folder / "dist", folder / "source")
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return sdist, wheel


def test_both_are_complete_and_well_described(built):
    sdist, wheel = built
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
    for names in (zipfile.ZipFile(wheel).namelist(), tarfile.open(sdist).getnames()):
        inside = [name.partition("kvevict/")[2] for name in names]
        for wanted in ("kernels/rows.py", "py.typed", "data/smollm2-135m.scorer.safetensors", "data/demo.html"):
            assert wanted in inside, wanted
    assert f"kvevict-{kvevict.__version__}-" in wheel.name


def test_the_wheel_works_in_an_environment_of_its_own(built, tmp_path):
    """Which sees the packages that are installed here, as torch alone takes minutes, but not the checkout: an editable
    install is a .pth file, and Python reads none of a folder that stands in another's."""
    clean = tmp_path / "clean"
    venv.create(clean, symlinks=True)
    (site,) = clean.glob("lib/python*/site-packages")
    (site / "installed_here.pth").write_text("\n".join({sysconfig.get_path(name) for name in ("purelib", "platlib")}))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options = dict(cwd=tmp_path, env=environment | dict(KVEVICT_BACKEND="reference"))
    python, command = clean / "bin/python", clean / "bin/kvevict"
    find = "import importlib.util; print(importlib.util.find_spec('kvevict'))"
    assert run(python, "-c", find, **options) == "None\n"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-deps", "--ignore-installed", built[1], **options)
    assert run(python, "-c", SCRIPT.format(folder=str(site)), **options) == "16\n"
    assert run(command, "--version", **options) == f"kvevict {kvevict.__version__}\n"
    assert "GiB" in run(command, "plan", "--model", "llama-3.1-8b", **options)


def test_without_transformers_the_command_to_install_it_is_said(tmp_path):
    script = "import sys; sys.modules['transformers'] = None; import kvevict.hf"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stderr.strip().endswith("kvevict.hf needs transformers: pip install 'kvevict[hf]'")


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [("transformers", ["demo"]), ("matplotlib", ["eval"]), ("safetensors", ["train"]), ("accelerate", ["budgets"]),
     ("matplotlib", ["plan", "--model", "llama-3-8b", "--plot", "a.png"])],
    ids=str,
)  # fmt: skip
def test_a_command_says_what_is_missing_before_it_begins(missing, arguments, monkeypatch, capsys):
    typer = pytest.importorskip("typer")
    from kvevict import cli

    monkeypatch.setitem(sys.modules, missing, None)
    assert typer.main.get_command(cli.app)(arguments, standalone_mode=False) == 2
    assert capsys.readouterr().err == f"kvevict needs {missing} for that: pip install 'kvevict[hf]'\n"
