"""Tables and plots of what was measured."""

from __future__ import annotations

from html import escape
from math import log2

from .peers import BASELINE
from .runner import Table

COLOURS = (
    "#888888", "#d62728", "#ff7f0e", "#9467bd", "#e377c2", "#2ca02c", "#1f77b4",
    "#17becf",
)  # fmt: skip
ROW, LEFT, WIDTH, TOP = 18, 250, 560, 60
RANGE = (-3, 6)  # powers of 2 that are shown


def number(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def markdown(table: Table, peers: list[str]) -> str:
    """Rows: metrics; columns: peers."""
    lines = ["| | " + " | ".join(peers) + " |", "|-|" + "-:|" * len(peers)]
    for metric, row in table.items():
        cells = " | ".join(number(row.get(peer)) for peer in peers)
        lines.append(f"| {metric} | {cells} |")
    return "\n".join(lines)


def svg(ratios: Table, peers: list[str], title: str) -> str:
    """Ratios on a logarithmic scale: a row for each metric, a dot for each peer."""
    low, high = RANGE
    rows = {metric: row for metric, row in ratios.items() if "p99" not in metric}
    height = TOP + ROW * (len(rows) + 1)
    scale = WIDTH / (high - low)

    def x(ratio: float) -> float:
        return LEFT + (min(max(log2(ratio), low), high) - low) * scale

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 20}"'
        f' height="{height + 20}" font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="16" font-size="14">{escape(title)}</text>',
    ]
    place = 10.0
    for peer, colour in zip(peers, COLOURS, strict=False):
        out.append(f'<circle cx="{place:.0f}" cy="32" r="4" fill="{colour}"/>')
        out.append(f'<text x="{place + 7:.0f}" y="36">{escape(peer)}</text>')
        place += 20 + 6.2 * len(peer)
    for power in range(low, high + 1):
        at = x(2.0**power)
        shade = "#000" if power == 0 else "#ddd"
        out.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP - 6}" y2="{height}"'
            f' stroke="{shade}"/>'
        )
        out.append(
            f'<text x="{at:.1f}" y="{height + 14}" text-anchor="middle">'
            f"{2.0**power:g}</text>"
        )
    for index, (metric, row) in enumerate(rows.items()):
        y = TOP + ROW * index + 8
        out.append(
            f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">'
            f"{escape(metric)}</text>"
        )
        for peer, colour in zip(peers, COLOURS, strict=False):
            if peer in row:
                out.append(
                    f'<circle cx="{x(row[peer]):.1f}" cy="{y}" r="4" fill="{colour}">'
                    f"<title>{escape(peer)}: {number(row[peer])}</title></circle>"
                )
    return "\n".join([*out, "</svg>", ""])


def losses(
    found: Table, stored: dict[str, float], peer: str, allowed: float
) -> list[str]:
    """Metrics of a peer that are worse than they were, beyond what is allowed."""
    result = []
    for metric, before in stored.items():
        now = found.get(metric, {}).get(peer)
        if now is None:
            result.append(f"{metric}: not measured, it was {number(before)}")
        elif now < before * (1 - allowed):
            result.append(
                f"{metric}: {number(now)} of {BASELINE}, it was {number(before)}"
            )
    return result
