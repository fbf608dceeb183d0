"""Pictures show the numbers of the profile, at any depth."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from hf_reasoncache import BudgetProfile
from hf_reasoncache.geometry import Geometry
from hf_reasoncache.profiles.plot import wave_figure, wave_png
from tests.support.profiles import make_profile

pytest.importorskip("matplotlib")
PROFILE = make_profile()


def of_depth(layers: int, **changes: Any) -> BudgetProfile:
    fields: dict[str, Any] = dict(
        geometry=Geometry(tuple(range(layers)), 2, 16),
        demand=[1 + index % 3 for index in range(layers)],
        standard_error=[0.1] * layers,
        head_demand=[[1, 2]] * layers,
        statistics={},
    )
    return make_profile(**(fields | changes))


def points(axes: Any, number: int = 0) -> tuple[list[float], list[float], list[float]]:
    """Places, heights and half lengths of the bars of one wave."""
    line, _, (bars,) = axes.containers[number].lines
    halves = [(segment[1][1] - segment[0][1]) / 2 for segment in bars.get_segments()]
    return list(line.get_xdata()), list(line.get_ydata()), halves


def test_what_is_drawn() -> None:
    waves, heads, _ = wave_figure({"mine": PROFILE}).axes
    places, heights, halves = points(waves)
    mean = sum(PROFILE.demand) / 3
    assert places == [0, 1, 2]
    assert heights == pytest.approx([demand / mean for demand in PROFILE.demand])
    assert halves == pytest.approx([error / mean for error in PROFILE.standard_error])
    assert [text.get_text() for text in waves.get_legend().get_texts()] == ["mine"]
    shown = heads.get_images()[0].get_array()
    assert shown.T.tolist() == [list(row) for row in PROFILE.head_demand]
    assert heads.get_xlim() == waves.get_xlim()


def test_several_profiles_have_no_heads() -> None:
    figure = wave_figure({"a": PROFILE, "b": make_profile(demand=(1, 1, 1))})
    (waves,) = figure.axes
    assert points(waves, 1)[1] == [1, 1, 1]


def test_different_depths_share_an_axis() -> None:
    (waves,) = wave_figure({"a": of_depth(2), "b": of_depth(4)}).axes
    assert points(waves, 0)[0] == [0.25, 0.75]
    assert points(waves, 1)[0] == [0.125, 0.375, 0.625, 0.875]
    assert waves.get_xlim() == (0, 1)


def test_hybrid_models_are_labelled_with_their_layers() -> None:
    waves, heads, _ = wave_figure({"a": of_depth(3, geometry=Geometry((5, 11, 17), 2, 16))}).axes
    for axes in (waves, heads):
        assert [label.get_text() for label in axes.get_xticklabels()] == ["5", "11", "17"]


@pytest.mark.parametrize("layers", [1, 2, 33, 128])
def test_any_depth_gives_a_picture(layers: int) -> None:
    from PIL import Image

    picture = wave_png({"a": of_depth(layers)})
    image = Image.open(io.BytesIO(picture))
    assert image.size == (960, 840)
    assert image.convert("L").getextrema()[0] < 50  # something is drawn
    assert wave_png({"a": of_depth(layers)}) == picture


def test_extreme_numbers() -> None:
    wave_png({"a": make_profile(demand=(1e300, 0, 1e-300), standard_error=(1e300, 0, 0))})


def test_no_profile() -> None:
    with pytest.raises(ValueError, match="at least one profile"):
        wave_figure({})


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hf-reasoncache\[plot\]'"):
        wave_png({"a": PROFILE})
