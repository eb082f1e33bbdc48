"""Tokens one by one, the trained ones marked *and* underlined: print and GitHub lose the colour."""

from collections.abc import Sequence
from html import escape

from IPython.display import display


def show_tokens(tokenizer, ids: Sequence[int], trained: Sequence[bool]) -> None:
    """Display a row's tokens, separated by dots; trained ones are marked, underlined and counted.

    Args:
        ids: token ids (seq,).
        trained: whether each token carries a label (seq,).
    """
    pieces, plain = [], []
    for token, is_trained in zip(ids, trained, strict=True):
        text = tokenizer.decode([token])
        html = escape(text).replace("\n", "⏎<br>")
        pieces.append(f"<mark><u>{html}</u></mark>" if is_trained else html)
        plain.append(f"[{text}]" if is_trained else text)
    legend = f"{sum(trained)} of {len(ids)} tokens are trained on"
    shown = {
        "text/html": f"<p>{'<wbr>·'.join(pieces)}</p><p>{legend} (<mark><u>marked</u></mark>).</p>",
        "text/plain": f"{''.join(plain)}\n{legend} (in brackets)",
    }
    display(shown, raw=True)
