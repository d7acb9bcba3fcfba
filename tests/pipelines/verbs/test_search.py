"""What `ovref search` shows."""

import pytest

from ovref_pipelines.verbs.search import Found, Query, text


def test_words_in_brackets_and_between_colons_are_shown_as_they_are():
    row = {"id": 3, "noun": "boat", "caption": "a boat [no. 3] at :sea: [/bold]", "key": "k#0"}
    shown = text(Found(query="[red]boat[/red]", rows=[row], scores=[0.5]))
    assert "nearest to [red]boat[/red]" in shown and "a boat [no. 3] at :sea: [/bold]" in shown


def test_blank_words_are_nothing_to_look_for():
    for words in ("", "  "):
        with pytest.raises(ValueError, match="nothing to search for: give words, or --image"):
            Query(text=words)
