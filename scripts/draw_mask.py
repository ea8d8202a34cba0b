"""Draws which query sees which key under exact attention, the paper's CSA and the default's form of it.

    python scripts/draw_mask.py docs/images/csa_mask.png

A small prompt of the first KV head in the first layer; other heads and layers sample other offsets. What is drawn is
the definition that every test holds the kernels against (`sps2_kernels.reference`).
"""

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import ListedColormap
from torch import Tensor

from sps2_bench.csa import Layout, Profile, exact_layout
from sps2_bench.drawing import Axes, panels
from sps2_kernels.reference import csa_mask

TOKENS, SHARDS = 64, 4
PARTS = {
    "own shard": "tab:blue",
    "sampled keys of earlier shards": "tab:orange",
    "tail": "tab:green",
    "sinks": "tab:red",
}
LAYOUTS = {
    "exact": exact_layout(TOKENS, 1),
    "as the paper: stride 4, sampled": Profile(SHARDS, ((1, 1), (SHARDS, 4))).resolve(TOKENS),
    "with a tail of 6 and 2 sinks": Profile(SHARDS, ((1, 1), (SHARDS, 4)), sinks=2, tail=6).resolve(TOKENS),
    "two levels, dense queries": Profile(SHARDS, ((1, 1), (2, 2), (SHARDS, 4)), dense_queries=True).resolve(
        TOKENS
    ),
}


def mask(layout: Layout, sinks: int, tail: int, levels: int) -> Tensor:
    """The layout's mask with so much of its tail, sinks and levels, [queries, keys] bool."""
    kept = [(level.group, level.stride) for level in layout.levels[:levels]]
    return csa_mask(
        layout.num_tokens,
        layout.shard_tokens,
        kept,
        0,
        0,
        dense_queries=layout.dense_queries,
        sinks=sinks,
        tail=tail,
    )


def parts(layout: Layout) -> Tensor:
    """For each pair the part of the mask that it belongs to, [queries, keys]; 0 where it is not seen."""
    found = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.int64)
    # Each pair belongs to the first that applies, which is written last: own shard, tail, sinks, level.
    found[mask(layout, layout.sinks, layout.tail, len(layout.levels))] = 2
    found[mask(layout, layout.sinks, 0, 1)] = 4
    found[mask(layout, 0, layout.tail, 1)] = 3
    found[mask(layout, 0, 0, 1)] = 1
    return found


def draw(axes: Axes, name: str, layout: Layout) -> None:
    """One panel."""
    found = parts(layout)
    colours = ListedColormap(["white", *PARTS.values()])
    axes.imshow(found.numpy(), cmap=colours, vmin=0, vmax=len(PARTS), interpolation="nearest")
    for border in np.arange(layout.shard_tokens, TOKENS, layout.shard_tokens):
        axes.axhline(border - 0.5, color="black", linewidth=0.3)
        axes.axvline(border - 0.5, color="black", linewidth=0.3)
    pairs = TOKENS * (TOKENS + 1) // 2
    axes.set(
        title=f"{name}\n{int(found.count_nonzero()) / pairs:.0%} of the pairs",
        xlabel="key",
        xticks=[],
        yticks=[],
    )
    axes.title.set_fontsize(9)


def main() -> None:
    """Draws into the file that the command line names."""
    with panels(Path(sys.argv[1]), 1, len(LAYOUTS), (3.0, 4.2)) as row:
        for axes, (name, layout) in zip(row, LAYOUTS.items(), strict=True):
            draw(axes, name, layout)
        row[0].set_ylabel("query")
        for name, colour in PARTS.items():
            row[0].plot([], [], "s", color=colour, label=name)
        row[0].figure.legend(ncols=len(PARTS), loc="outside lower center", frameon=False)


if __name__ == "__main__":
    main()
