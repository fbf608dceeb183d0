"""A report as data and as a page: both say what the cache holds."""

import base64
import json
import re

import numpy as np
import pytest
import torch

from hf_reasoncache.report import CacheReport, LayerReport
from hf_reasoncache.report_html import Text, page
from tests.support.caches import KINDS, make_cache
from tests.support.driver import tokens
from tests.support.models import build

PAD = 7
"""Padding of the second row."""


class Letters:
    def decode(self, ids):
        return chr(ids[0] + 33)


def data_of(html):
    return json.loads(re.search(r"const data = (.*);", html)[1])


@pytest.fixture(params=KINDS)
def used(request):
    """A cache that has evicted, and the text that it has seen but for the last token."""
    model = build("llama")
    cache = make_cache(request.param, model)
    return cache, tokens(model, cache)


def test_a_report_is_json_and_has_all_of_the_table(used):
    cache, _ = used
    report = cache.report()
    written = json.loads(json.dumps(report.to_dict()))
    for name in ("seen", "kv_bytes", "total_bytes", "mean_held", "evicted", "backend", "graphs"):
        assert written[name] == getattr(report, name)
    for layer, each in zip(report.layers, written["layers"], strict=True):
        assert each["held"] == layer.held
        assert each["capacity"] == layer.capacity
    assert (written["branches"] is None) == (report.branches is None)


def test_a_page_shows_every_token_with_the_heads_that_hold_it(used):
    cache, ids = used
    report = cache.report(positions=True)
    data = data_of(report.to_html(ids, Letters()))
    assert data["layers"] == [layer.index for layer in report.layers]
    for row, (each, first) in enumerate(zip(data["rows"], (0, PAD), strict=True)):
        assert each["first"] == first
        assert each["words"] == [chr(token + 33) for token in ids[row, first:].tolist()]
        shares = np.frombuffer(base64.b64decode(each["shares"]), np.uint8)
        shares = shares.reshape(len(data["layers"]), report.seen - first)
        for index, found in zip(data["layers"], shares, strict=True):
            heads = cache.held_positions(index)[row]
            count = np.zeros(report.seen, int)
            for head in heads:
                count[head] += 1
            assert (found == np.round(255 * count[first:] / len(heads))).all()


def test_risk_is_written_as_quantiles():
    model = build("llama")
    cache = make_cache("reason_alloc", model, risk=True)
    tokens(model, cache)
    report = cache.report()
    for layer, each in zip(report.layers, report.to_dict()["layers"], strict=True):
        assert each["risk"]["most"] == pytest.approx(float(layer.risk.error.max()))
        assert each["risk"]["median"] <= each["risk"]["quantile_90"] <= each["risk"]["most"]
        assert each["probes"] is None


def test_layers_that_hold_the_same_are_one_line():
    def layer(index, held):
        return LayerReport(index, [[held] * 2], [[held] * 2], 100 * held, 0, 0, 0)

    layers = tuple(layer(index, 5 if index == 4 else 9) for index in (0, 1, 2, 4, 5))
    lines = str(CacheReport(20, layers, 0)).splitlines()
    assert [line.split()[0] for line in lines[-3:]] == ["0-2", "4", "5"]
    assert [int(line.split()[1]) for line in lines[-3:]] == [9, 5, 9]


def test_no_token_ends_the_script():
    html = page([Text(["</script><b>", "&"], torch.ones(1, 2), 0)], [0], "a < b")
    assert html.count("</script>") == 1
    assert "a &lt; b" in html
    assert data_of(html)["rows"][0]["words"] == ["</script><b>", "&"]


def test_what_cannot_be_shown():
    model = build("llama")
    cache = make_cache("reason_alloc", model)
    with pytest.raises(ValueError, match="positions of a cache that has seen tokens"):
        cache.report(positions=True).to_html(torch.zeros(2, 9), Letters())
    tokens(model, cache)
    with pytest.raises(ValueError, match=r"make it by cache.report\(positions=True\)"):
        cache.report().to_html(torch.zeros(2, 99), Letters())
    for shape in ((2, 79), (1, 99), (99,)):
        with pytest.raises(ValueError, match=r"ids: expected 2 rows of 80 tokens or more"):
            cache.report(positions=True).to_html(torch.zeros(shape), Letters())
