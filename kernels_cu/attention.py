"""Prefill attention: the kernel and tile for an architecture, a head_dim and a number of rows, and the launch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kernels_cu.build import Spec, kernel
from kernels_cu.tensor_map import rows_map

HEAD_DIMS = (64, 80, 96, 128, 256)
UNLIMITED = 2**30  # as a window: more than any position
_HOPPER, _HOPPER_HEAD_DIMS, _HOPPER_RING = 90, (64, 128), 192 * 1024  # bytes


@dataclass(frozen=True)
class Tile:
    """`rows` queries of one head against `keys` keys at a time, by a block of `threads`.

    hopper: warpgroup instructions (wgmma); otherwise mma.sync, where two blocks share a processor.
    """

    D: int
    rows: int
    keys: int
    hopper: bool

    @classmethod
    def of(cls, architecture: int, D: int, T: int, fill: int) -> Tile:
        """fill: the rows that keep every processor of the GPU busy with large tiles."""
        if architecture == _HOPPER and D in _HOPPER_HEAD_DIMS and T > 64:
            return cls(D, 128, 128, True)
        if D > 128:  # 64 rows of output already take half of the registers
            return cls(D, 64, 32, False)
        return cls(D, 128, 32 if D > 96 else 64, False) if fill <= T else cls(D, 64, 64, False)

    def spec(self, out: str = "F32") -> Spec:
        """out: the type of what it writes, F32, F16 or BF16."""
        if self.hopper:
            return Spec.of("prefill_attention_sm90.cu", "prefill_attention", D=self.D, KEYS=self.keys, WEIGHT=out,
                           SLOTS=_HOPPER_RING // (2 * self.keys * self.D))  # fmt: skip
        return Spec.of("prefill_attention.cu", "prefill_attention", D=self.D, ROWS=self.rows, KEYS=self.keys, BLOCKS=2,
                       WEIGHT=out)  # fmt: skip

    @property
    def threads(self) -> int:
        return 384 if self.hopper else 128

    @property
    def shared_bytes(self) -> int:
        """A ring of K and V; or Q, K and V with every row padded by 16 bytes. FP16."""
        if self.hopper:
            return _HOPPER_RING
        return 2 * (self.rows + 2 * self.keys) * (self.D + 8)


def prefill_attention(tile: Tile, q: np.uint64, k: np.uint64, v: np.uint64, out: np.uint64, T: int, H: int, G: int,
                      S: int, start: int, window: int | None, out_type: str) -> None:  # fmt: skip
    """Addresses and sizes as in runtime.backend.Backend.prefill_attention, all checked; out_type: F32, F16, BF16."""
    run, row_tiles = kernel(tile.spec(out_type), tile.shared_bytes), -(-T // tile.rows)
    limit = min(window or UNLIMITED, UNLIMITED)
    if tile.hopper:
        maps = (rows_map(int(rows), G, start + T, S, tile.D, tile.keys) for rows in (k, v))
        run((row_tiles, H), (tile.threads,), (*maps, q, out, *_int32(T, H, G, start, limit)),
            shared_mem=tile.shared_bytes)  # fmt: skip
    else:
        run((H, row_tiles), (tile.threads,), (q, k, v, out, *_int32(T, H, G, S, start, limit)),
            shared_mem=tile.shared_bytes)  # fmt: skip


def _int32(*values: int) -> tuple[np.int32, ...]:
    return tuple(np.int32(value) for value in values)


def compile_cover(architecture: int) -> Iterator[Spec]:
    yield from dict.fromkeys(tile.spec(out) for tile in tiles(architecture) for out in ("F32", "F16", "BF16"))


def tiles(architecture: int) -> list[Tile]:
    """Every tile that an architecture may be given."""
    return [Tile.of(architecture, D, T, fill) for D in HEAD_DIMS for T, fill in ((1, 1000), (1000, 1000), (1, 1))]
