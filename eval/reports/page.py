"""The page of a report: its style sheet, and tables, folds and lists as HTML.

It must be readable on laptops and phones and in dark mode: only a table's own box scrolls sideways, and all colours are
variables with a light and a dark value. Charts (distill.eval.reports.figures) use its classes s1 to s6.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape

STYLE = """:root{--bg:#fbfaf8;--card:#fff;--ink:#1d1c1a;--soft:#67635c;--line:#e3dfd8;--best:#dcefe2;--bestink:#0d5a32;
--bad:#b3261e;--s1:#2566c9;--s2:#d2640b;--s3:#1c8557;--s4:#8546c4;--s5:#b52f5d;--s6:#6b7280}
@media(prefers-color-scheme:dark){:root{--bg:#151517;--card:#1d1d20;--ink:#e9e6e1;--soft:#a09b93;--line:#34343a;
--best:#173d29;--bestink:#8fe0b0;--bad:#ff8a80;--s1:#7fb0ff;--s2:#ffab66;--s3:#62d199;--s4:#c49bff;--s5:#ff8fb0;
--s6:#9ca3af}}
*{box-sizing:border-box}
html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{margin:0 auto;padding:0 20px 48px;max-width:1240px;background:var(--bg);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;overflow-wrap:anywhere}
header{padding:40px 0 0}header>p{margin:0;color:var(--soft)}
h1{margin:0 0 16px;font-size:2rem;line-height:1.2;letter-spacing:-.01em}
h2{margin:56px 0 12px;font-size:1.4rem;letter-spacing:-.01em}
h3{margin:28px 0 8px;font-size:1.05rem}h4{margin:24px 0 8px;font-size:.95rem;font-weight:600}
small{font-weight:400;color:var(--soft);font-size:.85em}
a{color:var(--s1)}code,pre{font:.84em/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
nav{display:flex;flex-wrap:wrap;gap:4px 20px;margin-top:20px;padding:10px 0;border-block:1px solid var(--line)}
nav a{text-decoration:none}nav a:hover{text-decoration:underline}
dl{margin:0}dt{color:var(--soft);font-size:.84rem}dd{margin:0;overflow-wrap:break-word}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(170px,1fr));gap:14px 20px}
.facts dd{font-weight:600;font-size:.95rem}
.plain{display:grid;grid-template-columns:repeat(auto-fill,minmax(240px,1fr));gap:10px 24px}
.lead{font-size:1.12rem;max-width:82ch;margin:4px 0 14px}
@media(min-width:1000px){.beside{display:grid;grid-template-columns:minmax(0,1fr) 360px;gap:0 20px;align-items:start}
.beside>:only-child{grid-column:1/-1}.beside .charts{margin-top:8px}}
.key,.missing,footer{color:var(--soft);font-size:.92rem;max-width:76ch}.missing{font-style:italic}
footer{margin-top:56px;padding-top:12px;border-top:1px solid var(--line)}
.wide{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:8px;margin:8px 0}
table{border-collapse:separate;border-spacing:0;font-size:.85rem;line-height:20px;min-width:100%;overflow-wrap:normal}
th,td{padding:6px 9px;text-align:left;vertical-align:baseline;border-bottom:1px solid var(--line)}
tbody tr:last-child>*{border-bottom:0}
thead th{color:var(--soft);font-weight:500;white-space:nowrap;position:sticky;top:0;background:var(--card);z-index:1}
tbody th{font-weight:600;position:sticky;left:0;background:var(--card);white-space:nowrap}
thead th:first-child{left:0;z-index:2}
.scores td,.scores thead th{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.scores th,.scores td{padding-inline:7px}
.scores thead th:first-child,.scores .text{text-align:left}.reasons{max-height:30rem}.reasons td{min-width:14rem}
.best{font-weight:700;background:var(--best);color:var(--bestink);border-radius:4px;padding:2px 6px;margin:-2px -6px}
.second{text-decoration:underline;text-decoration-thickness:2px;text-underline-offset:3px;
text-decoration-color:var(--s3)}
.key .best{margin:0}.bad{color:var(--bad)}.none{color:var(--soft)}sup{color:var(--bad)}
details{margin:6px 0}summary{cursor:pointer;color:var(--soft);font-size:.92rem;padding:4px 0}
summary:hover{color:var(--ink)}
pre{margin:8px 0;padding:14px 16px;overflow-x:auto;background:var(--card);border:1px solid var(--line);
border-radius:8px;
white-space:pre;overflow-wrap:normal}
.lines{margin:4px 0;padding-left:20px;font-size:.9rem;max-height:20rem;overflow-y:auto}
figure{margin:0}
.charts{display:grid;margin-top:14px;grid-template-columns:repeat(auto-fill,minmax(min(100%,var(--least,340px)),1fr));gap:16px}
.chart{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px 6px}
.chart figcaption{font-size:.9rem;min-height:1.6em}.chart p{margin:2px 0 6px;color:var(--soft);font-size:.84rem}
.chart ul{list-style:none;display:inline-flex;flex-wrap:wrap;gap:2px 12px;margin:0 0 0 12px;padding:0;color:var(--soft)}
.chart li i{display:inline-block;width:16px;height:3px;border-radius:2px;margin-right:6px;vertical-align:middle}
svg{display:block;width:100%;height:auto}svg text{fill:var(--soft);font-size:12px;font-variant-numeric:tabular-nums}
.grid{stroke:var(--line)}.axis{stroke:var(--soft)}.mark{stroke:var(--bad);stroke-width:1.5;stroke-dasharray:3 3}
.line{fill:none;stroke-width:2;stroke-linejoin:round}.line.faint{opacity:.3;stroke-width:1.2}
.strip{display:grid;grid-template-columns:repeat(auto-fit,minmax(160px,1fr));gap:10px}
.strip>div{display:flex;flex-direction:column;gap:8px;min-width:0}
.tile img{display:block;width:100%;height:auto;border-radius:4px;background:var(--line)}
.tile figcaption{display:flex;justify-content:space-between;gap:8px;font-size:.82rem;line-height:1.35;padding-top:3px}
.tile b{font-weight:500}.tile span{color:var(--soft);white-space:nowrap;font-variant-numeric:tabular-nums}
.legend{display:flex;flex-wrap:wrap;align-items:flex-start;gap:4px 14px;margin:10px 0;font-size:.82rem;
color:var(--soft)}
.legend .bar{flex:0 1 380px;min-width:200px}.legend .bar div{height:10px;border-radius:3px;margin-top:6px}
.legend .bar p{position:relative;height:1.4em;margin:0}.legend .bar span{position:absolute;white-space:nowrap}
.legend .middle{transform:translateX(-50%)}.legend .end{transform:translateX(-100%)}
.swatch i{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:6px;vertical-align:-1px}
@media(max-width:560px){body{padding:0 14px 32px}h1{font-size:1.55rem}.strip{grid-template-columns:1fr 1fr}
.strip>div{flex-basis:calc(50% - 5px);
max-width:none}
.facts{grid-template-columns:1fr 1fr}th,td{padding:6px 8px}tbody th{min-width:8.5rem;max-width:9rem;white-space:normal}
table{width:max-content}td{max-width:17rem}}
@media print{.wide{max-height:none}nav{display:none}}
.s1{stroke:var(--s1);fill:none}circle.s1,.chart i.s1{fill:var(--s1);background:var(--s1)}.s2{stroke:var(--s2);
fill:none}circle.s2,.chart i.s2{fill:var(--s2);background:var(--s2)}.s3{stroke:var(--s3);fill:none}circle.s3,
.chart i.s3{fill:var(--s3);background:var(--s3)}.s4{stroke:var(--s4);fill:none}circle.s4,.chart i.s4{fill:var(--s4);
background:var(--s4)}.s5{stroke:var(--s5);fill:none}circle.s5,.chart i.s5{fill:var(--s5);background:var(--s5)}
.s6{stroke:var(--s6);fill:none}circle.s6,.chart i.s6{fill:var(--s6);background:var(--s6)}
"""


def name(text: str) -> str:
    """A name as HTML that may break after its underscores and slashes, and nowhere else."""
    return escape(text).replace("_", "_<wbr>").replace("/", "/<wbr>")


def short(span: tuple[float, float]) -> str:
    """An interval in three digits, more than it is exact to: a table with one below every mean must fit a page."""
    return "–".join(f"{end:#.3g}".rstrip(".") for end in span)


def digits(value: float, count: int = 3) -> str:
    """A number in `count` significant digits and never with an exponent: 0.0123, 4.5, 1,276 (all digits before the
    point stay). A large teacher may cost thousands of times as much as a student.
    """
    if not value or not math.isfinite(value):
        return f"{value:g}"
    places = max(0, count - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def missing(text: str) -> str:
    """A line in place of missing content."""
    return f'<p class="missing">{escape(text)}</p>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "") -> str:
    """A table in its own sideways-scrolling box; cells are HTML already, the first of a row is its name."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr><th>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in rows)
    return f'<div class="wide {kind}"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def details(summary: str, content: str) -> str:
    """Collapsible content; "" without content."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>" if content else ""


def pairs(facts: Iterable[tuple[str, str]]) -> str:
    """Terms with their values, for a <dl>; empty values are left out."""
    return "".join(f"<div><dt>{escape(term)}</dt><dd>{name(value)}</dd></div>" for term, value in facts if value)


def page(
    title: str, facts: str, sections: Sequence[tuple[str, str, str]], *, what: str = "Depth distillation report"
) -> str:
    """The whole document; sections are (id, title, HTML). what: kind of page, shown above the title."""
    links = "".join(f'<a href="#{key}">{escape(head)}</a>' for key, head, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{escape(head)}</h2>{content}</section>' for key, head, content in sections)
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)} · {escape(what[0].lower() + what[1:])}</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<style>{STYLE}</style></head><body><header><p>{escape(what)}</p><h1>{escape(title)}</h1>"
        f'<dl class="facts">{facts}</dl><nav>{links}</nav></header><main>{body}</main>'
        f"<footer>written {when} from the run’s folder</footer></body></html>\n"
    )
