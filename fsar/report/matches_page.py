"""The sections of a report that show pictures: what queries were matched with, and classes that were mixed up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from fsar.matching import Pair
from fsar.report.matches import Clip, Confused, Member, Shown, Sight
from fsar.report.pictures import image

OF_QUERY, OF_SUPPORT, MUTUAL = "#1f6feb", "#bc4c00", "#24292f"  # colours of lines
STRONG = 0.5  # a weight from which on a line counts as one of its direction
SIGHT_STYLE = """
.shown{border-top:1px solid var(--line);padding:1rem 0;break-inside:avoid}
.shown h3{font-size:1rem;margin:0}.shown p{margin:.15rem 0}
.panels{display:grid;gap:.5rem 1.5rem;grid-template-columns:1fr}
@media(min-width:860px),print{.panels{grid-template-columns:minmax(0,8fr) minmax(0,7fr)}
.panel .named{white-space:nowrap;overflow:hidden;text-overflow:ellipsis}}
.panel{min-width:0;overflow-x:auto}.panel>div{min-width:calc(var(--k)*38px)}
.decoded{display:grid;gap:0 1.5rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));grid-column:1/-1}
.panel h4{font-size:.85rem;font-weight:600;margin:.5rem 0 .2rem}
.frames{display:grid;grid-template-columns:repeat(var(--k),1fr)}
.frames img{display:block;width:calc(100% - 4px);margin:0 2px;border-radius:3px}
.frames.asked img{outline:2px solid var(--ink)}
.lines{display:block;width:100%;height:46px;margin:2px 0}.lines line{stroke-width:2;vector-effect:non-scaling-stroke}
.named{font-size:12.5px;margin:.1rem 2px;overflow-wrap:anywhere}
.yes{color:#1a7f37}.no{color:#d1242f}
.key span{white-space:nowrap;margin-right:1rem}.key .more{white-space:normal;color:var(--quiet)}
.key b{font-weight:700}.gap{height:8px}
.mixed{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(250px,1fr));margin:.8rem 0}
.mixed figure{margin:0;break-inside:avoid}.mixed .two{display:grid;grid-template-columns:1fr 1fr;gap:4px}
.mixed img{width:100%;height:104px;object-fit:cover;border-radius:4px;display:block}
.mixed figcaption{font-size:13px;line-height:1.35;margin-top:.25rem;overflow-wrap:anywhere}
"""


def episodes_section(sight: Sight) -> Iterator[str]:
    """Queries with what they were compared with, lines between what was matched."""
    if not sight.shown:
        return
    yield "<h2>Queries and what they were matched with</h2>"
    wrong = sum(not each.right for each in sight.shown)
    yield (
        f"<p class=quiet>Drawn by chance: {wrong} that the model got wrong and {len(sight.shown) - wrong} that it got "
        "right. Frames are those that the model saw; motion is the change from each frame to the next, grey where "
        "nothing changed, on one scale within a query."
    )
    yield _key(sight.shown[0])
    yield from map(_shown, sight.shown)


def _key(one: Shown) -> str:
    """What the colours of the lines mean, and where they go."""
    if not one.said.pairs:
        return "<p class=key>There are no lines, since this method does not match single frames.</p>"
    directions = [any(pair[side] for pairs in one.said.pairs.values() for pair in pairs) for side in (2, 3)]
    parts = []
    if directions[0]:
        parts.append(f'<span><b style="color:{OF_QUERY}">―</b> where a query frame finds its match</span>')
    if directions[1]:
        parts.append(f'<span><b style="color:{OF_SUPPORT}">―</b> where a frame of the class finds its match</span>')
    if all(directions):
        parts.append(f'<span><b style="color:{MUTUAL}">―</b> both</span>')
    text = "the fainter, the less it counts"
    if one.said.of_mean:
        text += f"; lines go to the mean of the {one.said.shots} videos of a class, of which one is shown"
    elif one.said.shots > 1:
        text += f"; of the {one.said.shots} videos of a class, the nearest is shown"
    if one.unlabelled:
        text += "; unlabelled videos count in the scores, not in the lines"
    return f"<p class=key>{''.join(parts)}<span class=more>{text}</span></p>"


def _shown(one: Shown) -> str:
    mark, verdict = ("yes", "\u2713 taken for") if one.right else ("no", "\u2717 taken for")
    heading = f"{escape(one.query.label)} <span class={mark}>{verdict} {escape(one.said.clip.label)}</span>"
    panels = [_panel("frames", one, "frames")]
    if one.query.motion:
        panels.append(_panel("motion", one, "motion"))
    decoded = [_decoded(one)] if one.decoded else []
    return (
        f"<section class=shown><h3>{heading}</h3><p class='quiet named'>"
        f"query (framed): {escape(one.query.name)}, episode {one.episode}{_brighter(one.query)}</p>"
        f"<div class=panels>{''.join(panels + decoded)}</div></section>"
    )


def _panel(what: str, one: Shown, title: str) -> str:
    """The class that was said above, the query in the middle, the other class below; lines where they match."""
    query, said, other = (getattr(clip, what) for clip in (one.query, one.said.clip, one.other.clip))
    lines = ["<div class=gap></div>"] * 2
    if one.said.pairs:  # else there are none in any panel
        lines = [
            _lines(member.pairs.get(what), len(query), query_below=below)
            for member, below in ((one.said, True), (one.other, False))
        ]
    rows = (
        _named(one.said, "taken for", whole=what == "frames"),
        _frames(said, one.said.clip.label),
        lines[0],
        _frames(query, f"query: {one.query.label}", kind=" asked"),
        lines[1],
        _frames(other, one.other.clip.label),
        _named(one.other, "next best" if one.right else "true class", whole=what == "frames"),
    )
    return f"<div class=panel style=--k:{len(query)}><h4>{title}</h4><div>{''.join(rows)}</div></div>"


def _brighter(clip: Clip) -> str:
    return f" · shown {clip.brighter:.2g} times brighter" if clip.brighter > 1 else ""


def _named(member: Member, role: str, *, whole: bool) -> str:
    clip, more = member.clip, ""
    if whole:
        more = f" <span class=quiet>score {member.score:.3g} · {escape(clip.name)}{_brighter(clip)}</span>"
    return f"<p class=named title='{escape(clip.name)}'><b>{role}: {escape(clip.label)}</b>{more}</p>"


def _frames(addresses: Sequence[str], of: str, kind: str = "") -> str:
    images = "".join(image(address, f"{of}, {number}") for number, address in enumerate(addresses, 1))
    return f'<div class="frames{kind}">{images}</div>'


def _lines(pairs: Iterable[Pair] | None, count: int, *, query_below: bool) -> str:
    """Lines between the middles of `count` pictures above and as many below; room for them where others have some."""
    pairs = list(pairs or ())
    largest = max((max(pair.of_query, pair.of_support) for pair in pairs), default=1.0)
    return (
        f'<svg class=lines viewBox="0 0 {2 * count} 2" preserveAspectRatio=none role=img aria-label="what is matched">'
        f"{''.join(_line(pair, largest, query_below=query_below) for pair in pairs)}</svg>"
    )


def _line(pair: Pair, largest: float, *, query_below: bool) -> str:
    """The line of a pair, as strong as its weight is beside the `largest`."""
    above, below = (pair.support, pair.query) if query_below else (pair.query, pair.support)
    weight = max(pair.of_query, pair.of_support)
    mutual = min(pair.of_query, pair.of_support) >= STRONG * weight
    colour = MUTUAL if mutual else OF_QUERY if pair.of_query >= pair.of_support else OF_SUPPORT
    text = f"query {pair.query + 1}, class {pair.support + 1}: cosine {pair.similarity:.2f}"
    return (
        f'<line x1={2 * above + 1} y1=0 x2={2 * below + 1} y2=2 stroke="{colour}" opacity="{weight / largest:.2f}">'
        f"<title>{text}</title></line>"
    )


def _decoded(one: Shown) -> str:
    """The decoder's motion beside its target, on one scale."""
    assert one.error is not None
    error, still = one.error
    text = f"<p class='quiet named'>mean squared error {error:.3g}; of no motion at all {still:.3g}</p>"
    rows = (
        f"<h4>the query's motion</h4><div>{_frames(one.query.motion, 'target')}</div>",
        f"<h4>the same, as the model reconstructs it</h4><div>{_frames(one.decoded, 'reconstructed')}{text}</div>",
    )
    panels = "".join(f"<div class=panel style=--k:{len(one.decoded)}>{row}</div>" for row in rows)
    return f"<div class=decoded>{panels}</div>"


def confused_section(confused: Sequence[Confused]) -> Iterator[str]:
    """Two frames for each pair of classes that were mixed up most."""
    if confused:
        yield (
            "<h3>Mixed up most often</h3><p class=quiet>Left a query, right a support video that it was taken for; "
            "dark frames are shown brighter."
        )
        yield f"<div class=mixed>{''.join(map(_confused, confused))}</div>"


def _confused(pair: Confused) -> str:
    frames = image(pair.query_frame, f"query: {pair.truth}") + image(pair.said_frame, f"support: {pair.said}")
    return (
        f"<figure><div class=two>{frames}</div><figcaption><b>{escape(pair.truth)}</b> taken for "
        f"<b>{escape(pair.said)}</b>: {pair.count:,} of {pair.queries:,} queries "
        f"({pair.count / pair.queries:.0%})</figcaption></figure>"
    )
