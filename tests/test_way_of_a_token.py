"""ARCHITECTURE.md tells the way of a token as it is."""

import re

from tests.support.calls import ROOT, Call, plain_and_evicting

PAGE = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
CALL = re.compile(r"`((?:hf_reasoncache|triton_ops)/[\w/]+\.py): (\w+)`")


def test_the_calls_that_the_page_lists_happen_in_this_order():
    listed = [Call(*found) for found in CALL.findall(PAGE)]
    assert len(listed) > 15
    made = iter(plain_and_evicting("budget")[1])
    missing = [str(call) for call in listed if call not in made]
    assert not missing, "not called, or earlier than the page says"


def test_what_the_page_names_exists():
    for path in re.findall(r"`((?:hf_reasoncache|triton_ops|tests)/[\w/]*(?:\.py)?)`", PAGE):
        assert (ROOT / path).exists(), path
