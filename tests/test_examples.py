"""The example of the windows runs as its page says."""

import sys

from examples import sliding_window


def test_words_that_survive_are_drawn(tmp_path, capsys, monkeypatch):
    picture = tmp_path / "words.png"
    monkeypatch.setattr(sys, "argv", ["sliding_window", "--output", str(picture)])
    sliding_window.main()
    out = capsys.readouterr().out
    assert out.startswith("answer right after ")
    assert max(len(line) for line in out.splitlines() if "picture in" not in line) <= 80
    assert picture.read_bytes().startswith(b"\x89PNG")
