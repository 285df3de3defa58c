"""Whether a text comes back from its token ids.

A tokenizer whose file is missing knows no token and turns every text into nothing; one of another language loses most of it. Compared
is what a reader would see, since many tokenizers change the rest on purpose: SentencePiece moves spaces, normalisers compose accents
or take the case and the accents away.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["LOSSY", "lost_share", "require_round_trip"]

LOSSY = "with characters that the tokenizer does not know"  # how texts that lose a few are counted
_MOST_LOST = 0.1  # of a text's characters; a typographic quote in a question is less, a question in another script more
_SENTENCEPIECE_SPACE = "\u2581"
_UNSEEN = {"Mn", "Cc", "Cf", "Zs", "Zl", "Zp"}  # Unicode categories: combining marks, controls, spaces


def lost_share(text: str, token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> float:
    """The share of the characters of ``text`` that ``token_ids`` do not spell, 0 where nothing is lost.

    Case, accents, compatibility forms and white space do not count, nor does their order, nor special tokens: they are known even where
    nothing else is.
    """
    back = str(tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if back == text:
        return 0.0
    for token in tokenizer.all_special_tokens:  # the unknown one among them
        text, back = text.replace(token, ""), back.replace(token, "")
    wanted, found = Counter(_folded(text)), Counter(_folded(back))
    return (wanted - found).total() / max(wanted.total(), 1)


def require_round_trip(text: str, token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether some characters are lost. Raises ValueError where too many are, for the model would read another text."""
    share = lost_share(text, token_ids, tokenizer)
    if share <= _MOST_LOST:
        return share > 0
    back = str(tokenizer.decode(list(token_ids)))
    raise ValueError(
        f"{share:.0%} of {text!r:.80} is lost between text and token ids, which read {back!r:.80}: the tokenizer "
        f"{tokenizer.name_or_path!r} has {len(tokenizer)} tokens; is its tokenizer.json (or tokenizer.model) in the folder, "
        "and does it know this script?"
    )


def _folded(text: str) -> str:
    decomposed = unicodedata.normalize("NFKD", text.replace(_SENTENCEPIECE_SPACE, " ")).casefold()
    return "".join(character for character in decomposed if unicodedata.category(character) not in _UNSEEN)
