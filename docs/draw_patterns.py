"""Draw the README's picture of patterns: ``python docs/draw_patterns.py`` writes docs/images/patterns.png."""

from pathlib import Path

import torch
from matplotlib.figure import Figure

from sparsetile import BlockLayout, parse_pattern

LENGTH, BLOCK, CELLS = 2048, 32, 256
PATTERNS = {
    "Local(192)": "Local(192)",
    "Local(96) | Global(64)": "Local(96) | Global(64)",
    "(Local(192) | Global(32)) & Causal()": "(Local(192) | Global(32)) & Causal()",
    "Documents((500, 300, 700, 548)) & Causal()": "Documents(…) & Causal()",
    "(Local(96) | Strided(256)) & Causal()": "(Local(96) | Strided(256)) & Causal()",
    "LogStrided() & Causal()": "LogStrided() & Causal()",
    "Dilated(1024, 4)": "Dilated(1024, 4)",
    "Local(96) | Random(0.06)": "Local(96) | Random(0.06)",
}


def main() -> None:
    figure = Figure(figsize=(11, 6), dpi=130, layout="constrained")
    for axes, (text, title) in zip(figure.subplots(2, 4).flat, PATTERNS.items(), strict=True):
        layout = BlockLayout.from_pattern(parse_pattern(text), LENGTH, block_size=BLOCK)
        pairs = layout.to_dense().float()
        step = LENGTH // CELLS
        share = torch.nn.functional.avg_pool2d(pairs[None], step)[0]
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1.25, interpolation="nearest")
        axes.set_title(f"{title}\n{layout.density:.1%} of tiles", fontsize=8.5)
        axes.set(xticks=[], yticks=[])
    figure.supxlabel("key", fontsize=9)
    figure.supylabel("query", fontsize=9)
    path = Path(__file__).parent / "images" / "patterns.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
