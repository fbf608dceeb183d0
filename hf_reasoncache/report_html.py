"""A page for a browser: which tokens of a text are held."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import torch


@dataclass(frozen=True, eq=False)
class Text:
    """One row of a batch.

    Attributes
    ----------
    words : sequence of str
        Text of each token, from the first one that is no padding.
    shares : Tensor[L, N]
        For each layer, which share of its heads holds each of the first `N` of them; the others
        were not seen yet.
    first : int
        Column of the first of them.
    """

    words: Sequence[str]
    shares: torch.Tensor
    first: int


def page(texts: Sequence[Text], layers: Sequence[int], summary: str) -> str:
    """Return the page.

    Parameters
    ----------
    texts : sequence of Text
    layers : sequence of int
        Indices of the layers of `Text.shares`.
    summary : str
        What stands above the text.
    """
    rows = [
        {
            "first": text.first,
            "words": list(text.words),
            "seen": text.shares.shape[1],
            "shares": base64.b64encode(
                (255 * text.shares).round().to(torch.uint8).numpy().tobytes()
            ).decode(),
        }
        for text in texts
    ]
    # In a script element nothing else than "<" could end it.
    data = json.dumps({"layers": list(layers), "rows": rows}).replace("<", "\\u003c")
    return _PAGE.replace("%SUMMARY%", escape(summary)).replace("%DATA%", data)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What the cache holds</title>
<style>
:root { --text: #1b1b1f; --gone: #8b8b94; --page: #fff; --line: #d5d5dc; --held: 0, 121, 107; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8ee; --gone: #6f6f7a; --page: #16161a; --line: #3a3a44;
    --held: 38, 166, 154; }
}
body { color: var(--text); background: var(--page); font: 16px/1.6 system-ui, sans-serif;
  max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.3rem; }
pre { font-size: .75rem; overflow-x: auto; border: 1px solid var(--line); padding: .6rem; }
label { margin-right: 1.5rem; }
#text { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.8 ui-monospace, monospace; }
#text span { border-radius: 2px; padding: 1px 0; }
.gone { color: var(--gone); }
.unseen { border-bottom: 1px dotted var(--gone); }
.scale { display: inline-block; width: 8rem; height: .8rem; vertical-align: middle;
  border: 1px solid var(--line);
  background: linear-gradient(90deg, transparent, rgba(var(--held), .75)); }
</style>
<h1>What the cache holds</h1>
<details><summary>Report</summary><pre>%SUMMARY%</pre></details>
<p><label>Layer <select id="layer"></select></label>
<label>Row <select id="row"></select></label>
<span id="count"></span></p>
<p>held by no head <span class="scale"></span> by all heads; <span class="unseen">dotted</span>:
not seen by the cache yet</p>
<div id="text"></div>
<script>
const data = %DATA%;
const layer = document.getElementById("layer"), row = document.getElementById("row");
const add = (list, text, value) => list.add(new Option(text, value));
add(layer, "all, on average", -1);
data.layers.forEach((index, place) => add(layer, index, place));
data.rows.forEach((_, place) => add(row, place, place));
const shares = data.rows.map(each => Uint8Array.from(atob(each.shares), x => x.charCodeAt(0)));
function draw() {
  const each = data.rows[row.value], own = shares[row.value], out = document.createElement("div");
  const chosen = +layer.value < 0 ? data.layers.keys() : [+layer.value];
  const places = [...chosen];
  let held = 0;
  each.words.forEach((word, at) => {
    const token = document.createElement("span");
    token.textContent = word.trim() ? word : word.replace(/\\n/g, "\\u21b5\\n");
    const column = `column ${each.first + at}`;
    if (at >= each.seen) {
      token.className = "unseen";
      token.title = `${column}: not seen yet`;
    } else {
      const sum = places.reduce((total, place) => total + own[place * each.seen + at], 0);
      const share = sum / places.length / 255;
      held += share;
      token.title = `${column}: held by ${(100 * share).toFixed(0)}% of the heads`;
      if (share === 0) token.className = "gone";
      token.style.background = `rgba(var(--held), ${(0.75 * share).toFixed(3)})`;
    }
    out.append(token);
  });
  document.getElementById("text").replaceChildren(...out.childNodes);
  document.getElementById("count").textContent =
    `${held.toFixed(1)} of ${each.seen} tokens held per head`;
}
layer.onchange = row.onchange = draw;
draw();
</script>
"""
