"""How the recipes draw: one style, and each figure as SVG and as PNG."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from mohs.errors import UsageError

COLOURS = ("#2a5c8a", "#c2542d", "#4c8c4a", "#8a4f9e", "#b8962e", "#3f9aa6", "#7a6a5d", "#d07f9d")


def pyplot() -> ModuleType:
    """Matplotlib, with our style and without a screen.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise UsageError("Figures are drawn with matplotlib: pip install 'mohs[figures]'.") from error
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({
        "font.family": "DejaVu Sans", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.alpha": 0.25, "grid.linewidth": 0.6, "lines.linewidth": 1.6, "axes.titlesize": 10, "axes.titleweight": "bold",
        "legend.frameon": False, "figure.constrained_layout.use": True, "svg.fonttype": "none", "svg.hashsalt": "mohs",
        "axes.prop_cycle": mpl.cycler(color=COLOURS),
    })  # fmt: skip
    return plt


def save(figure: Any, folder: str | Path, name: str) -> list[Path]:
    """Write ``name.svg`` and ``name.png``; answers both paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.svg", folder / f"{name}.png"]
    figure.savefig(paths[0], metadata={"Date": None})
    figure.savefig(paths[1], dpi=160)
    return paths
