"""StopStrings shows exactly the text before the first stop string, however the text arrives."""

from hypothesis import example, given
from hypothesis import strategies as st

from cocktail.answer import StopStrings

letters = st.text("ab\n", max_size=12)


@given(pieces=st.lists(letters, max_size=8), stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
@example(pieces=["aa", "b"], stops=["ab"])
@example(pieces=["a", "a"], stops=["ab", "aab"])
def test_shows_the_text_before_the_first_stop(pieces, stops):
    text = "".join(pieces)
    filtered = StopStrings(stops)
    shown, prefixes = "", []
    for piece in pieces:
        shown += filtered.push(piece)
        prefixes.append(shown)
    shown += filtered.finish()
    # Pieces are looked at one after the other: the stop that is complete first wins, the leftmost among those.
    end, seen = len(text), ""
    for piece in pieces:
        seen += piece
        found = [seen.find(stop) for stop in stops if stop in seen]
        if found:
            end = min(found)
            break
    assert shown == text[:end]
    assert filtered.found == any(stop in text for stop in stops)
    assert all(text.startswith(prefix) for prefix in prefixes)
