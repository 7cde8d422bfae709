"""Global memory: the tensors' own storages. An address outside all of them, or not aligned to its access, is an
error."""

import bisect
import ctypes
from typing import NamedTuple

import numpy as np
from numpy import int64, uint8, uint64

from .arithmetic import UNSIGNED
from .races import Shadow
from .report import EmulationError


class Region:
    """A storage, viewed in place. Only between a launch's begin and its end is that memory sure to be there."""

    def __init__(self, base: int, size: int, name: str):
        self.base, self.end, self.name = base, base + size, name
        self.bytes = np.frombuffer((ctypes.c_uint8 * size).from_address(base), uint8) if size else np.zeros(0, uint8)
        self._views: dict[int, np.ndarray] = {}
        self._shadow: Shadow | None = None

    def view(self, size: int) -> np.ndarray:
        """The storage as unsigned numbers of `size` bytes."""
        if size not in self._views:
            if self.base % size:
                raise EmulationError(f"{self.name} starts at {self.base:#x}, not a multiple of {size}")
            self._views[size] = self.bytes[: len(self.bytes) // size * size].view(UNSIGNED[size])
        return self._views[size]

    def shadow(self, grain: int) -> Shadow:
        if self._shadow is None:
            self._shadow = Shadow(len(self.bytes), grain)
        return self._shadow


class Part(NamedTuple):
    """Those of an access's addresses that lie in one region."""

    region: Region
    which: np.ndarray | slice  # of the addresses
    offsets: np.ndarray  # int64, in bytes from the region's start


class Memory:
    def __init__(self, storages: dict[int, tuple[int, str]]):
        """storages: address -> (bytes, name)"""
        self.regions = [Region(base, size, name) for base, (size, name) in sorted(storages.items())]
        self._bases = [region.base for region in self.regions]
        self._starts = np.array(self._bases, uint64)
        self._ends = np.array([region.end for region in self.regions], uint64)

    def locate(self, address: np.ndarray, width: int) -> list[Part]:
        """The accesses of `width` bytes at these addresses, by region."""
        off = address & uint64(width - 1)
        if off.any():
            raise EmulationError(f"address {int(address[off != 0][0]):#x} is not a multiple of {width}")
        first = bisect.bisect_right(self._bases, int(address.min())) - 1
        if first >= 0 and int(address.max()) + width <= self.regions[first].end:
            return [self._part(self.regions[first], slice(None), address)]
        regions = np.searchsorted(self._starts, address, "right").astype(int64) - 1
        outside = (regions < 0) | (address + uint64(width) > self._ends[regions])
        if outside.any():
            self._raise_outside(address[outside], regions[outside], len(address))
        parts = [(self.regions[k], regions == k) for k in np.unique(regions)]
        return [self._part(region, which, address[which]) for region, which in parts]

    @staticmethod
    def _part(region: Region, which, address) -> Part:
        return Part(region, which, (address - uint64(region.base)).astype(int64))

    def _raise_outside(self, address, regions, lanes: int) -> None:
        first, near = int(address[0]), self.regions[max(int(regions[0]), 0)] if self.regions else None
        where = f", {first - near.base} bytes from the start of {near.name} of {len(near.bytes)} bytes" if near else ""
        raise EmulationError(f"{len(address)} of {lanes} threads outside every tensor; first {first:#x}{where}")
