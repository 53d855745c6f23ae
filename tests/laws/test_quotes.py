"""Figures in the README are those of the stored results."""

from pathlib import Path

import pytest

from experiments import quote

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_quotes_the_stored_results():
    text = README.read_text(encoding="utf-8")
    assert quote.quoted(text) == text, "run python -m experiments.quote"


def test_a_changed_figure_is_noticed():
    text = README.read_text(encoding="utf-8")
    assert quote.quoted(text.replace("| 0.0", "| 9.0", 1)) != text.replace("| 0.0", "| 9.0", 1)


def test_a_missing_marker_raises():
    with pytest.raises(ValueError, match="marks figures by"):
        quote.quoted("no markers")
