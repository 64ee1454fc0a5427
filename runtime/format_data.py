"""What a layout's formats need besides the values, in the backend's memory: RoPE tables, kvquant's calibration."""

from __future__ import annotations

import sys

from runtime.backend import Array, Backend, FormatData
from runtime.calibration import load_calibration
from runtime.config import ModelConfig
from runtime.errors import PlanError
from runtime.formats import PRE_ROPE
from runtime.plan import Layout
from runtime.rope import attention_factor


def format_data(backend: Backend, config: ModelConfig, layout: Layout,
                rope: tuple[Array, Array]) -> tuple[FormatData | None, ...]:
    """One per layer; None for formats that need nothing. rope: cos and sin of all positions of the run.

    Raises PlanError where K cannot be turned back to before RoPE, or again, or the calibration does not fit.
    """
    if layout.formats not in PRE_ROPE or all({tier.k_bits, tier.v_bits} <= {0, 16} for tier in layout.tiers):
        return (None,) * layout.n_layers
    if (factor := attention_factor(config.rope)) != 1:
        raise PlanError(f"the {layout.formats} formats store K before RoPE, and this model's RoPE scales what it turns "
                        f"(attention factor {factor:g}, {config.rope.kind}); choose other formats")
    if backend.turns_by_place and (end := _flushed_end(layout)) > (first := _own_frequencies(config, layout)):
        raise PlanError(f"the {layout.formats} formats store K before RoPE, and {backend.name} turns it with one set "
                        f"of frequencies; this model's dynamic RoPE has others from position {first} on, and what is "
                        f"generated is packed up to {end}; ask for fewer tokens, or choose other formats or the CPU")
    cos, sin = rope
    if layout.formats != "kvquant":
        return (FormatData(cos, sin),) * layout.n_layers
    if layout.calibration is None:
        raise PlanError("the kvquant formats need a calibration: a file made by python -m cocktail.calibrate kvquant")
    calibration = load_calibration(layout.calibration.path)
    calibration.check(layout.n_layers, layout.n_kv_heads, layout.head_dim, layout.calibration.digest)
    return tuple(FormatData(cos, sin, *(backend.upload(part) for part in (
        layer.k_levels, layer.v_levels, layer.k_centre, layer.k_half))) for layer in calibration.layers)


def _flushed_end(layout: Layout) -> int:
    """The position behind the last one that can be packed while decoding; 0 where none is."""
    chunks = layout.flushed(layout.max_new)
    return layout.start(layout.n_chunks) + chunks * layout.chunk if chunks else 0


def _own_frequencies(config: ModelConfig, layout: Layout) -> int:
    """The first position whose frequencies are not those of the prompt's rows (runtime.rope.rope_tables)."""
    return max(layout.prompt_tokens, config.max_positions) if config.rope.kind == "dynamic" else sys.maxsize
