"""Benchmarks: `python -m bench`."""

import pathlib

RESULTS = pathlib.Path(__file__).parent / "results"


def device_name(device: str) -> str:
    """What a device's results are called: "cpu", or the GPU's name."""
    import torch

    return torch.cuda.get_device_name().replace(" ", "-") if device.startswith("cuda") else device
