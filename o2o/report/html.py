"""The frame of an HTML page in one file: style, the script for hovering, tables, and text in Markdown.

Nothing in it is loaded from elsewhere. All text that comes from files goes through `escape`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape as _escape

STYLE = """
:root{color-scheme:light dark;--ink:#222;--soft:#5b5b5b;--ground:#fff;--card:#f6f6f3;--rule:#d5d5d0;--shade:#efefea;
--c0:#0072b2;--c1:#c04f00;--c2:#007a57;--c3:#b1578c;--c4:#2b87b8;--c5:#a97000;--c6:#000}
@media (prefers-color-scheme:dark){:root{--ink:#e8e8e4;--soft:#a9a9a3;--ground:#17181a;--card:#212326;--rule:#3c3f43;
--shade:#26282b;--c0:#56a8e0;--c1:#f08a4b;--c2:#2fbf93;--c3:#de93bd;--c4:#8fd0f5;--c5:#e6b34a;--c6:#fff}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.2rem;max-width:74rem;background:var(--ground);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:1.6rem;line-height:1.25;margin:.2rem 0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2rem 0 .6rem;border-bottom:1px solid var(--rule);padding-bottom:.2rem}
p{max-width:48rem;margin:.5rem 0}
.soft,figcaption,caption{color:var(--soft);font-size:.9rem}
code,pre{font:.88em ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
pre{background:var(--card);padding:.7rem .9rem;border-radius:6px;white-space:pre-wrap}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(10rem,1fr));gap:.7rem;margin:1rem 0;padding:0}
.tiles div{background:var(--card);border-radius:6px;padding:.6rem .8rem}
.tiles dt{color:var(--soft);font-size:.85rem}
.tiles dd{margin:0;font-size:1.25rem;font-weight:600}
.tiles small{display:block;font-size:.8rem;font-weight:400;color:var(--soft)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,21rem),1fr));gap:1rem}
.charts.small{grid-template-columns:repeat(auto-fit,minmax(min(100%,17rem),1fr))}
figure{margin:0;break-inside:avoid;min-width:0;max-width:34rem}
figcaption{font-weight:600;color:var(--ink)}
.charts svg{width:100%;height:auto;display:block;touch-action:pan-y}
svg text{fill:var(--ink);font-size:13px}svg .tick{fill:var(--soft);font-size:12px}
svg .note{paint-order:stroke;stroke:var(--ground);stroke-width:3px;stroke-linejoin:round}
.ground{fill:none}.shaded{fill:var(--shade)}.grid{stroke:var(--rule);stroke-width:.7}
.axis{stroke:var(--soft);fill:none}.mark-line{stroke:var(--soft);stroke-dasharray:4 3}
.level{stroke:var(--soft);stroke-dasharray:1.5 3}.hair{stroke:var(--ink);stroke-width:.8;opacity:.6}
.line{fill:none;stroke-width:2;stroke-linejoin:round}.again{stroke-dasharray:7 4}.band{opacity:.17;stroke:none}
.mark{stroke-width:1.6}
.line.published{stroke-width:1.3;stroke-dasharray:5 3}.band.published{opacity:.09}
.line.c0,.points.c0{stroke:var(--c0)}.band.c0,.points.c0{fill:var(--c0)}
.line.c1,.points.c1{stroke:var(--c1)}.band.c1,.points.c1{fill:var(--c1)}
.line.c2,.points.c2{stroke:var(--c2)}.band.c2,.points.c2{fill:var(--c2)}
.line.c3,.points.c3{stroke:var(--c3)}.band.c3,.points.c3{fill:var(--c3)}
.line.c4,.points.c4{stroke:var(--c4)}.band.c4,.points.c4{fill:var(--c4)}
.line.c5,.points.c5{stroke:var(--c5)}.band.c5,.points.c5{fill:var(--c5)}
.line.c6,.points.c6{stroke:var(--c6)}.band.c6,.points.c6{fill:var(--c6)}
.points.published{fill:var(--ground);stroke-width:1.3}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;list-style:none;margin:.4rem 0;padding:0;font-size:.9rem}
.legend svg{width:26px;height:12px;margin-right:.4rem;vertical-align:middle}
.wide{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:.2rem 0}
th,td{text-align:left;padding:.3rem .8rem .3rem 0;border-bottom:1px solid var(--rule);vertical-align:top}
th{color:var(--soft);font-weight:600;max-width:9rem;vertical-align:bottom}
td{overflow-wrap:break-word}
td.n,td code{white-space:nowrap}
@media (max-width:40rem){td code{white-space:normal;overflow-wrap:break-word}}
details{margin:.6rem 0}summary{cursor:pointer;font-weight:600}
video,img{max-width:100%;border-radius:6px;border:1px solid var(--rule)}
#tip{position:absolute;display:none;pointer-events:none;background:var(--ground);color:var(--ink);z-index:2;
border:1px solid var(--rule);border-radius:6px;padding:.35rem .6rem;font-size:.85rem;box-shadow:0 2px 8px #0003;
max-width:90vw}
@media print{:root{color-scheme:light;--ink:#000;--soft:#444;--ground:#fff;--card:#f6f6f3;--rule:#bbb;--shade:#efefea;
--c0:#0072b2;--c1:#c04f00;--c2:#007a57;--c3:#b1578c;--c4:#2b87b8;--c5:#a97000;--c6:#000}
@page{margin:12mm}html{font-size:9.5pt}body{max-width:none;padding:0;font-size:1rem}
table{font-size:7.5pt}th,td{padding-right:.6rem}td code{white-space:normal}
.wide{overflow:visible}tr,.tiles{break-inside:avoid}
.tiles{grid-template-columns:repeat(5,1fr)}.screen{display:none}
h2,h2+p,.legend,figcaption,summary{break-after:avoid}.charts{grid-template-columns:1fr 1fr}video{display:none}}
"""
"""Colours are darker and lighter kin of the palette of Okabe and Ito: 3 : 1 at least on either ground."""

SCRIPT = """
(function(){
var tip=document.createElement('div');tip.id='tip';document.body.appendChild(tip);
document.querySelectorAll('svg[data-points]').forEach(function(svg){
 var points=JSON.parse(svg.dataset.points),box=svg.viewBox.baseVal,at=-1,hair=null;
 if(!points.length)return;
 function hide(){tip.style.display='none';if(hair){hair.remove();hair=null}}
 function show(i){
  at=i;var p=points[i],r=svg.getBoundingClientRect();
  if(!hair){hair=document.createElementNS(svg.namespaceURI,'path');hair.setAttribute('class','hair');svg.appendChild(hair)}
  hair.setAttribute('d','M'+p[0]+' 12V'+(box.height-42));
  tip.textContent='';var head=document.createElement('b');
  head.textContent=Number(p[1]).toLocaleString('en')+' '+svg.dataset.unit;tip.appendChild(head);
  p[2].forEach(function(v){var row=document.createElement('div');
   row.textContent=(v[0]?v[0]+': ':'')+v[1];tip.appendChild(row)});
  tip.style.display='block';
  var x=r.left+p[0]*r.width/box.width+12;
  if(x+tip.offsetWidth>innerWidth-8)x=Math.max(8,x-tip.offsetWidth-24);
  tip.style.left=(x+scrollX)+'px';tip.style.top=(r.top+scrollY+8)+'px';
 }
 svg.addEventListener('pointermove',function(e){
  var r=svg.getBoundingClientRect(),x=(e.clientX-r.left)*box.width/r.width,best=0;
  points.forEach(function(p,i){if(Math.abs(p[0]-x)<Math.abs(points[best][0]-x))best=i});show(best)});
 svg.addEventListener('pointerdown',function(e){svg.dispatchEvent(new PointerEvent('pointermove',e))});
 svg.addEventListener('pointerleave',hide);svg.addEventListener('blur',hide);
 svg.addEventListener('keydown',function(e){
  if(e.key==='ArrowRight')show(Math.min(points.length-1,at+1));
  else if(e.key==='ArrowLeft')show(Math.max(0,at-1));else return;e.preventDefault()});
});
})();
"""


def escape(text: object) -> str:
    """Return text that an HTML page shows as it is, in attributes too."""
    return _escape(str(text), quote=True)


def document(title: str, body: str) -> str:
    """Return a whole page."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n<script>{SCRIPT}</script>"
        "</body></html>\n"
    )


def table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of cells that are HTML already; without a `head` it has no line of names."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    top = f"<thead><tr>{top}</tr></thead>" if top else ""
    lines = "\n".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>{top}<tbody>\n{lines}\n</tbody></table></div>\n'


def _cell(text: str) -> str:
    """Return one cell; numbers are not broken into lines."""
    return f'<td class="n">{text}</td>' if re.fullmatch(r"[-\d.,%\[\] e+]*", text) else f"<td>{text}</td>"


def details(title: str, body: str, shown: bool = False) -> str:
    """Return a part that opens on a click."""
    return f"<details{' open' if shown else ''}><summary>{escape(title)}</summary>\n{body}\n</details>\n"


def inline(text: str) -> str:
    """Return one line of Markdown as HTML: code in backquotes; all else is text."""
    parts = re.split(r"`([^`]+)`", text)
    return "".join(f"<code>{escape(part)}</code>" if i % 2 else escape(part) for i, part in enumerate(parts))


def markdown(lines: Iterable[str], pictures: Mapping[str, str]) -> str:
    """Return the Markdown that reports are written in as HTML: headings, tables, lists, paragraphs.

    `pictures` maps a picture's file to the HTML that stands in its place. A picture without one is left out.
    """
    blocks = "\n".join(lines).split("\n\n")
    return "".join(_block(block.strip("\n"), pictures) for block in blocks if block.strip())


def _block(block: str, pictures: Mapping[str, str]) -> str:
    lines = block.split("\n")
    heading, picture = re.match(r"(#+) (.*)", lines[0]), re.fullmatch(r"!\[.*\]\((.*)\)", lines[0])
    if heading:
        rest = _block("\n".join(lines[1:]), pictures) if lines[1:] else ""
        return f"<h{len(heading[1])}>{inline(heading[2])}</h{len(heading[1])}>\n{rest}"
    if picture:
        return pictures.get(picture[1], "")
    if lines[0].startswith("|"):
        cells = [[inline(cell.strip()) for cell in line.strip("|").split("|")] for line in lines]
        return table(cells[0], cells[2:])
    if lines[0].startswith("- "):
        return f"<ul>{''.join(f'<li>{inline(line[2:])}</li>' for line in lines)}</ul>\n"
    return f"<p>{inline(' '.join(lines))}</p>\n"
