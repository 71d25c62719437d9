"""All that is to be seen of a conversion as one page, which needs no network."""

from __future__ import annotations

import html
from typing import Any

from torch import nn

from ..residuals.records import Record, short
from .difference import diff
from .drawing import svg_of
from .printout import show

STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,-apple-system,Segoe UI,Helvetica,Arial,sans-serif;max-width:1200px;margin:0 auto;
padding:16px}
pre,td,th,input,select{font:13px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre,.wide{overflow-x:auto}h1{font-size:22px}h2{font-size:17px;margin-top:28px}
table{border-collapse:collapse}td,th{text-align:left;padding:3px 14px 3px 0;vertical-align:top;white-space:nowrap}
td.reason{white-space:normal;min-width:220px}tr{border-bottom:1px solid #8884}summary{cursor:pointer}
.bar{display:flex;gap:8px;flex-wrap:wrap;margin:8px 0}input{flex:1;min-width:160px;padding:4px 8px}
svg{max-width:100%;height:auto}
"""
SCRIPT = """
const box=document.getElementById('search'),kind=document.getElementById('kind'),count=document.getElementById('count');
const rows=[...document.querySelectorAll('#adds tbody tr')];
function filter(){const text=box.value.toLowerCase();let shown=0;
for(const row of rows){
const fits=row.textContent.toLowerCase().includes(text)&&(!kind.value||row.dataset.kind===kind.value);
row.hidden=!fits;shown+=fits}count.textContent=shown+' of '+rows.length}
box.addEventListener('input',filter);kind.addEventListener('change',filter);filter();
"""


def page(model: nn.Module, hc: Any) -> str:
    """Return a conversion as one HTML page: report, drawing, a table of all adds to search, the graph, a block.

    Args:
        model: the original.
        hc: what :func:`hc_transform.convert` made of it.
    """
    report = hc.hc_report
    name = html.escape(type(hc).__name__)
    block = report.converted[0].module
    rows = "".join(_row(record) for record in report.residuals)
    before_after = html.escape(diff(model, hc, block, width=140))
    head = "".join(f"<th>{title}</th>" for title in ("add", "location", "trunk", "params", "why not"))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head><body>'
        f"<h1>{name} with hyper-connections</h1>{report._repr_html_()}"
        f'<h2>Trunks</h2><div class="wide">{svg_of(hc)}</div>'
        '<h2>Every add</h2><div class="bar"><input id="search" placeholder="search" aria-label="search">'
        '<select id="kind" aria-label="which adds"><option value="">all</option><option>converted</option>'
        '<option>left</option></select><span id="count"></span></div><div class="wide"><table id="adds"><thead>'
        f"<tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        f"<h2>{html.escape(block) or name} before and after</h2><pre>{before_after}</pre>"
        f"<h2>Graph</h2><details><summary>what runs</summary><pre>{html.escape(show(hc, width=110))}</pre></details>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _row(record: Record) -> str:
    kind = "converted" if record.converted else "left"
    trunk = "" if record.trunk is None else str(record.trunk)
    new = "" if record.parameters is None else f"{record.parameters:,}"
    cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in (record.name, short(record.location), trunk, new))
    return f'<tr data-kind="{kind}">{cells}<td class="reason">{html.escape(record.reason or "")}</td></tr>'
