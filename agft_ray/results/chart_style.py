"""Pictures with matplotlib (the extra `report`): style, palette, and SVG to put into a page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from agft_ray.errors import AgftError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#5f4690")
"""Okabe and Ito's colours, told apart by colour-blind readers too, and two more; no yellow."""
INK = "#24292f"
DEFAULT_INK = "#6e7781"
"""Of default clocks, which are the background of every comparison."""
WIDTH_IN = 8.6


def new_figure(height_in: float, width_in: float = WIDTH_IN) -> Figure:
    """An empty figure in our style; raises `AgftError` without matplotlib."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise AgftError("a plot needs matplotlib: pip install 'agft-ray[report]'") from None
    mpl.rcParams.update(
        {
            "svg.hashsalt": "agft_ray",
            "svg.fonttype": "none",
            "font.size": 9.5,
            "axes.edgecolor": DEFAULT_INK,
            "text.color": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
        }
    )
    return Figure(figsize=(width_in, height_in), layout="constrained")


def plain_axes(axes: Axes) -> None:
    """Only what carries data: no box, a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.22, linewidth=0.6)
    axes.set_axisbelow(True)


def colours(names: Iterable[str], default: str) -> dict[str, str]:
    """A colour a name, in their order; `default` has its own."""
    others = [name for name in names if name != default]
    return {default: DEFAULT_INK} | {
        name: PALETTE[place % len(PALETTE)] for place, name in enumerate(others)
    }


def label_ends(axes: Axes, lines: Sequence[tuple[float, str, str]], height_in: float) -> None:
    """Labels (y, text, colour) at the right of axes so high, moved apart where they would touch."""
    low, high = axes.get_ylim()
    gap = 12.0 / (72.0 * height_in)
    placed = [min(max((y - low) / (high - low), 0.0), 1.0) for y, _, _ in sorted(lines)]
    for _ in range(50):
        for i in range(len(placed) - 1):
            if (short := gap - (placed[i + 1] - placed[i])) > 1e-6:
                placed[i] -= short / 2
                placed[i + 1] += short / 2
    for share, (_, text, colour) in zip(placed, sorted(lines), strict=True):
        axes.annotate(
            text,
            (1.0, share),
            xycoords="axes fraction",
            xytext=(1.01, share),
            textcoords="axes fraction",
            color=colour,
            va="center",
            fontsize=9,
            annotation_clip=False,
        )


def inline_svg(figure: Any, title: str) -> str:
    """The figure as an SVG element for an HTML page: no reference to anything outside it.

    `title` is what a screen reader says. The same figure gives the same text.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
