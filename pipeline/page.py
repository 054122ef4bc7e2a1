"""Pages of HTML with pictures, no script, no network: what every report is made of.

Whatever a model, a teacher or a data set wrote is hostile until escaped: all of it goes through `text`, and the page's
Content-Security-Policy forbids scripts and requests besides. Same input, same bytes. Left out: what any report says.
"""

import html
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2933", "#52606d", "#e4e7eb"
LINES = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#97266d", "#4a5568")
MAX_POINTS = 400


def whole(name: str, subtitle: str, nav: str, body: str) -> str:
    """A page around a body; `name` is text, the others are HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(name)} · dypo report</title><style>{CSS}</style></head>\n"
        f"<body><header><h1>{text(name)}</h1><p>{subtitle}</p>{nav}</header>\n<main>{body}</main></body></html>\n"
    )


def text(value: object) -> str:
    """Any value as HTML text; control characters become their visible pictures (U+2400 on)."""
    visible = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", lambda m: "␡" if m[0] == "\x7f" else chr(0x2400 + ord(m[0])), str(value))
    return html.escape(visible)


def missing(what: str) -> str:
    """A sentence in place of a table or picture without rows; commands in backticks."""
    said = re.sub(r"`([^`]+)`", r"<code>\1</code>", text(what))
    return f'<p class="missing">{said}</p>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """An HTML table of cells that are HTML already; columns in `numbers` are right-aligned."""
    right = set(numbers)

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f"<{tag}{' class=n' if i in right else ''}>{c}</{tag}>" for i, c in enumerate(row))

    lines = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells("th", head)}</tr></thead><tbody>{lines}</tbody></table></div>'


# ---------------------------------------------------------------- pictures
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dypo",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#9aa5b1",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def figure(title: str, caption: str, draw: Callable[..., None], *args: Any, wide: bool = False) -> str:
    """One picture as inline SVG in a <figure>. `draw` gets an empty matplotlib figure and the rest of the arguments."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        fig = Figure(figsize=(10.6, 3.3) if wide else (5.2, 2.9), layout="constrained")
        draw(fig, *args)
        svg = inline(fig, re.sub(r"\W+", "-", title.lower()))
    size = ' class="wide"' if wide else ""
    label = text(f"{title}: {caption}")
    return (
        f"<figure{size}><figcaption><b>{text(title)}</b> <span>{text(caption)}</span></figcaption>"
        f'<div role="img" aria-label="{label}">{svg}</div></figure>'
    )


def inline(fig: "Figure", prefix: str) -> str:
    """The figure as an <svg> element for a page that holds several: its ids prefixed, and no address of any kind in it."""
    import io

    out = io.StringIO()
    fig.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\b(id|href)="(#?)([^"]+)"', rf'\1="\2{prefix}-\3"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    return re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", re.sub(r'<svg([^>]*?) height="[^"]*"', r"<svg\1", svg))


def whole_ticks(ax: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def thinned(x: list[int], y: list[float]) -> tuple[list[float], list[float]]:
    """At most MAX_POINTS points: means over runs of neighbours, so a long run's page stays small."""
    size = -(-len(x) // MAX_POINTS)
    runs = range(0, len(x), size)
    return (
        [sum(r) / len(r) for i in runs if (r := x[i : i + size])],
        [sum(r) / len(r) for i in runs if (r := y[i : i + size])],
    )


def smooth(y: Sequence[float]) -> list[float]:
    """A centred running mean over a twelfth of the points; fewer than 24 are left as they are."""
    reach = len(y) // 24
    return [sum(w) / len(w) for i in range(len(y)) if (w := y[max(0, i - reach) : i + reach + 1])]


CSS = f"""
:root {{ color-scheme: light; --ink: {INK}; --muted: {MUTED}; --line: {GRID};
  --sans: system-ui, "Segoe UI", "DejaVu Sans", Helvetica, Arial, sans-serif;
  --mono: ui-monospace, "SFMono-Regular", "DejaVu Sans Mono", Menlo, Consolas, monospace; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: #fff; color: var(--ink); font: 15px/1.5 var(--sans); }}
header, main {{ max-width: 1120px; margin: 0 auto; padding: 0 28px; }}
header {{ padding-top: 32px; }}
h1 {{ margin: 0; font-size: 30px; letter-spacing: -.01em; }}
header p {{ margin: 4px 0 14px; color: var(--muted); }}
nav {{ display: flex; flex-wrap: wrap; gap: 6px 20px; padding: 10px 0;
  border-top: 1px solid var(--line); border-bottom: 1px solid var(--line); }}
nav a {{ color: #2b6cb0; text-decoration: none; }}
nav a:hover {{ text-decoration: underline; }}
section {{ margin: 40px 0; }}
h2 {{ margin: 0 0 14px; font-size: 21px; }}
h3 {{ margin: 26px 0 8px; font-size: 15.5px; }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 12px; margin-top: 22px; }}
.card {{ border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px; display: flex; flex-direction: column; }}
.card b {{ font-weight: 500; font-size: 13px; color: var(--muted); overflow-wrap: anywhere; }}
.card strong {{ font-size: 21px; font-weight: 650; line-height: 1.4; font-variant-numeric: tabular-nums; }}
.card > span {{ font-size: 13px; color: var(--muted); }}
.grid {{ display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 22px 28px; align-items: start; }}
.row {{ display: flex; flex-wrap: wrap; gap: 18px 34px; }}
figure {{ margin: 0; min-width: 0; }}
.wide {{ grid-column: 1 / -1; margin-top: 18px; }}
figcaption {{ font-size: 14px; margin-bottom: 4px; }}
figcaption span {{ color: var(--muted); font-size: 13px; margin-left: 4px; }}
figure svg {{ width: 100%; height: auto; display: block; }}
figure svg text {{ font-family: var(--sans) !important; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; width: 100%; }}
th {{ text-align: left; font-weight: 600; color: var(--muted); border-bottom: 1.5px solid #cbd2d9; white-space: nowrap; }}
th, td {{ padding: 5px 10px 5px 0; vertical-align: baseline; }}
td {{ border-bottom: 1px solid var(--line); }}
th.n, td.n {{ text-align: right; padding-right: 18px; white-space: nowrap; }}
.ci {{ color: var(--muted); font-size: 12.5px; }}
.zero {{ color: #b8c1cb; }}
.note {{ color: var(--muted); font-size: 13px; margin: 6px 0 14px; max-width: 110ch; }}
.missing {{ color: var(--muted); background: #f7f9fa; border-radius: 6px; padding: 10px 14px; margin: 8px 0; }}
.chip {{ color: #fff; border-radius: 4px; padding: 1px 8px; font-size: 12px; font-weight: 600; }}
.status {{ font-weight: 650; }}
.dot {{ display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 5px; }}
.bar {{ display: flex; width: 100%; min-width: 40px; height: 10px; border-radius: 3px; overflow: hidden; }}
.bar i {{ display: block; height: 100%; }}
.card .bar {{ margin-top: 7px; }}
.moves {{ width: auto; }}
.moves caption {{ text-align: left; color: var(--muted); font-size: 13px; padding-bottom: 4px; }}
.moves th {{ border: 0; padding: 4px 8px 4px 0; text-align: center; }}
.moves td {{ text-align: center; min-width: 76px; padding: 7px 8px; border: 2px solid #fff; font-weight: 600; }}
.moves small {{ display: block; font-weight: 400; color: var(--muted); font-size: 11.5px; line-height: 1.2; }}
details {{ border: 1px solid var(--line); border-radius: 8px; margin: 8px 0; padding: 0 14px; }}
summary {{ cursor: pointer; padding: 9px 0; font-size: 13.5px; overflow-wrap: anywhere; }}
.said {{ display: grid; grid-template-columns: 150px minmax(0, 1fr); gap: 14px; padding: 8px 0;
  border-top: 1px solid var(--line); }}
.said b {{ font-size: 12.5px; font-weight: 500; color: var(--muted); overflow-wrap: anywhere; }}
code, pre {{ font: 12.5px/1.5 var(--mono); }}
pre {{ margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 420px; overflow-y: auto; }}
pre i {{ color: var(--muted); }}
@media (max-width: 760px) {{ .grid, .said {{ grid-template-columns: minmax(0, 1fr); }} }}
@media print {{ nav {{ display: none; }} figure, .said {{ break-inside: avoid-page; }} }}
"""
