"""Files that are broken or meant to do harm: a ValueError with a reason, or a valid profile."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import struct
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from hf_reasoncache import BudgetProfile
from hf_reasoncache.geometry import Geometry
from hf_reasoncache.messages import LONGEST
from hf_reasoncache.profiles.files import CONFIG, STATISTICS
from tests.support.profiles import make_profile

GOOD = make_profile().to_files()
CONTENT = json.loads(GOOD[CONFIG])


def load(config: bytes, statistics: bytes = GOOD[STATISTICS]) -> BudgetProfile | None:
    """The profile, or None where it is refused; what else comes fails the test."""
    try:
        profile = BudgetProfile.from_files({CONFIG: config, STATISTICS: statistics}, name="hostile")
    except ValueError as error:
        assert str(error).startswith("hostile: ") and len(str(error)) <= LONGEST
        # What a terminal shows must not move its cursor.
        assert str(error).isprintable()
        return None
    return profile


def expect_valid(profile: BudgetProfile) -> None:
    """What a user of a profile relies on, checked without the profile's own checks."""
    layers = profile.geometry.full_attention_layers
    assert list(layers) == sorted(set(layers)) and min(layers) >= 0
    for values in (profile.demand, profile.standard_error):
        assert len(values) == len(layers)
        assert all(type(value) is float and math.isfinite(value) and value >= 0 for value in values)
    assert sum(profile.demand) > 0
    for name, tensor in profile.statistics.items():
        assert name.isprintable() and bool(tensor.isfinite().all())
        assert tensor.shape[:2] == (len(profile.calibration.prompts), len(layers))
    assert sum(profile.layer_budgets(64)) == 64 * len(layers)
    assert BudgetProfile.from_files(profile.to_files()).to_files() == profile.to_files()


@st.composite
def mutated_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes with some of them changed, cut out, doubled or cut off."""
    result = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(result) - 1, 0)))
        length = draw(st.integers(0, 8))
        match draw(st.sampled_from(["change", "remove", "insert", "repeat", "truncate"])):
            case "change":
                result[at : at + length] = draw(st.binary(min_size=length, max_size=length))
            case "remove":
                del result[at : at + length]
            case "insert":
                result[at:at] = draw(st.binary(max_size=8))
            case "repeat":
                result[at:at] = result[at : at + length]
            case "truncate":
                del result[at:]
    return bytes(result)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything in a JSON value."""
    if not isinstance(value, dict | list):
        return [path]
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    return [path, *(place for key, each in inner for place in places(each, (*path, key)))]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(
        [-1, 0, 10**400, 2**63, 1e308, -1e-9, "NaN", "../../etc", "\x1b[2J", "\ud800"]
    )
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(mutated_bytes(GOOD[CONFIG]))
def test_mutated_config(config: bytes) -> None:
    if profile := load(config):
        expect_valid(profile)


@given(st.lists(st.tuples(st.sampled_from(places(CONTENT)[1:]), JSON), min_size=1, max_size=3))
@example([(("demand",), [1, 2, 3])])
@example([(("geometry", "kv_heads"), 10**250)])
def test_other_values_in_the_config(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    content = copy.deepcopy(CONTENT)
    for path, value in changes:
        target = content
        try:
            for key in path[:-1]:
                target = target[key]
            target[path[-1]] = value
        except (TypeError, KeyError, IndexError):
            # An earlier change took the place away.
            continue
    if profile := load(json.dumps(content).encode()):
        expect_valid(profile)


@pytest.mark.parametrize("place", ["demand", "geometry", "settings", "unknown", "statistics"])
@pytest.mark.parametrize("depth", [40, 100, *range(850, 1000, 10), 5000])
def test_deep_nesting(place: str, depth: int) -> None:
    """Near the recursion limit a parser may succeed where a later `repr` does not."""
    nested = "[" * depth + "]" * depth
    content = {**CONTENT, place: "NESTED"}
    if place == "settings":
        content = {**CONTENT, "calibration": {**CONTENT["calibration"], place: {"a": "NESTED"}}}
    assert load(json.dumps(content).replace('"NESTED"', nested).encode()) is None


@pytest.mark.parametrize(
    "config",
    [
        b"",
        b"null",
        b"[]",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff\xfe{}",
        b"\xef\xbb\xbf" + GOOD[CONFIG],
        GOOD[CONFIG] + b"{}",
        GOOD[CONFIG][:-3],
        GOOD[CONFIG].replace(b"90.0", b"NaN"),
        GOOD[CONFIG].replace(b"90.0", b"Infinity"),
        GOOD[CONFIG].replace(b"90.0", b"1e999"),
        GOOD[CONFIG].replace(b"90.0", b"1" * 400),
        GOOD[CONFIG].replace(b"90.0", b"1" * 5000),
        GOOD[CONFIG].replace(b"90.0", b"-90.0"),
        GOOD[CONFIG].replace(b"90.0", b'"90.0"'),
        GOOD[CONFIG].replace(b'"seed"', b'"seed": 1, "seed"'),
        GOOD[CONFIG].replace(b'"demand"', b'"demand": [1, 2, 3], "demand"'),
        GOOD[CONFIG].replace(b"org/model", b"org\\u001b[2Jmodel"),
        GOOD[CONFIG].replace(b"org/model", b"org\\ud800model"),
    ],
    ids=lambda config: repr(config[:20]),
)
def test_config_that_must_be_refused(config: bytes) -> None:
    assert config != GOOD[CONFIG]
    assert load(config) is None


def with_statistics(statistics: bytes) -> BudgetProfile | None:
    """Load statistics whose author has made the digest fit."""
    content = {**CONTENT, "statistics": {"sha256": hashlib.sha256(statistics).hexdigest()}}
    return load(json.dumps(content).encode(), statistics)


@given(st.integers(0, len(GOOD[STATISTICS]) - 1))
def test_truncated_statistics(length: int) -> None:
    assert load(GOOD[CONFIG], GOOD[STATISTICS][:length]) is None
    assert with_statistics(GOOD[STATISTICS][:length]) is None


@given(mutated_bytes(GOOD[STATISTICS]))
def test_mutated_statistics(statistics: bytes) -> None:
    assert statistics == GOOD[STATISTICS] or load(GOOD[CONFIG], statistics) is None
    if profile := with_statistics(statistics):
        expect_valid(profile)


SIZES = st.integers(-1, 4) | st.sampled_from([2**31, 2**63 - 1, 2**64, 10**30])
TENSOR = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3"])
        | st.sampled_from(["F4", "F8_E8M0", "C64", "U64", "", "X"]),
        "shape": st.lists(SIZES, max_size=4)
        | st.just([2, 3])
        | st.just([2, 3, 2])
        | st.integers(1, 100).map(lambda more: [2, 3] + [1] * more),
        "data_offsets": st.tuples(SIZES, SIZES) | st.just((0, 48)) | st.just((0, 96)),
    }
)
HEADER = st.dictionaries(
    st.sampled_from(["a", "b", "\x1b[2J", "__metadata__", "../a"]), TENSOR | JSON, max_size=2
)


@given(HEADER, st.sampled_from([0, 48, 96]), st.integers(0, 2) | st.just(None))
@example({"a": {"dtype": "F64", "shape": [2, 3], "data_offsets": (0, 48)}}, 48, 0)
@example({"a": {"dtype": "F8_E8M0", "shape": [2, 3, 8], "data_offsets": (0, 48)}}, 48, 0)
@example({"a": {"dtype": "F4", "shape": [2, 3, 16], "data_offsets": (0, 48)}}, 48, 0)
@example({"a": {"dtype": "F64", "shape": [2, 3, *[1] * 100], "data_offsets": (0, 48)}}, 48, 0)
def test_headers_of_statistics(header: Any, size: int, lie: int | None) -> None:
    text = json.dumps(header).encode()
    length = 2**62 if lie is None else len(text) + lie
    if profile := with_statistics(struct.pack("<Q", length) + text + bytes(size)):
        expect_valid(profile)


MANY = [1] * 100_000


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("geometry", "kv_heads"), MANY),
        (("geometry", "full_attention_layers"), MANY),
        (("geometry", "full_attention_layers"), "x" * 100_000),
        (("calibration", "versions"), {"x" * 100_000: "\n"}),
        (("calibration", "settings"), {"x" * 100_000: "\n"}),
        (("rule", "exponent"), MANY),
        (("demand",), MANY),
        (("base_model",), "\n" * 100_000),
        (("statistics",), MANY),
        (("format_version",), MANY),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
def test_a_long_value_is_not_echoed_whole(place: tuple[str, ...], value: object) -> None:
    content = copy.deepcopy(CONTENT)
    *path, last = place
    target = content
    for key in path:
        target = target[key]
    target[last] = value
    assert load(json.dumps(content).encode()) is None


def test_a_long_geometry_is_not_echoed_whole() -> None:
    deep = Geometry(tuple(range(5000)), 2, 8)
    (phrase,) = deep.differences(Geometry(tuple(range(5001)), 2, 8))
    assert len(phrase) < 160


@pytest.mark.parametrize("name", ["a" * 100_000, "b"])
def test_statistics_of_many_dimensions_are_refused(name: str) -> None:
    shape = [2, 3] + [1] * 100 if name == "b" else [3, 2]
    header = {name: {"dtype": "F64", "shape": shape, "data_offsets": [0, 48]}}
    text = json.dumps(header).encode()
    assert with_statistics(struct.pack("<Q", len(text)) + text + bytes(48)) is None


def test_not_everything_is_refused() -> None:
    profile = load(GOOD[CONFIG])
    assert profile is not None and torch.is_tensor(profile.statistics["count"])
    expect_valid(profile)
    assert with_statistics(GOOD[STATISTICS]) is not None
