"""Figures in the README and in docs are those of the stored results."""

import pytest

from experiments import quote

FILES = quote.files()
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


@every_file
def test_a_file_quotes_the_stored_results(path):
    text = path.read_text(encoding="utf-8")
    assert quote.quoted(text, FILES[path]) == text, "run python -m experiments.quote"


@every_file
def test_a_changed_figure_is_noticed(path):
    text = path.read_text(encoding="utf-8")
    start = text.index("| 0.", text.index(f"<!-- {next(iter(FILES[path]))} -->"))
    changed = text[:start] + "| 9." + text[start + 4 :]
    assert quote.quoted(changed, FILES[path]) == text


def test_a_missing_marker_raises():
    with pytest.raises(ValueError, match="marks figures by"):
        quote.quoted("no markers", {"one": lambda: ""})
