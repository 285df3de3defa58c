"""Whether decoding a text's token ids gives the text back.

A tokenizer whose file is missing knows no token and turns every text into nothing; one for another language
loses most of it. Only visible characters are compared, since many tokenizers change the others on purpose:
SentencePiece moves spaces, and normalisers compose accents or remove case and accents.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["LOSSY", "Losses", "lost_share"]

LOSSY = "with characters that the tokenizer does not know"  # the name under which such texts are counted
_MOST_LOST = 0.1  # of all characters; typographic quotes and a few rows in another script stay below
_SENTENCEPIECE_SPACE = "\u2581"
_INVISIBLE = {"Mn", "Cc", "Cf", "Zs", "Zl", "Zp"}  # Unicode categories: combining marks, controls, spaces


@dataclass
class Losses:
    """How much the texts of one kind lose on the way to their token ids, summed over all of them, so that a
    single row in another script counts little.
    """

    lossy: int = 0  # texts that lose some of their characters
    _lost: float = 0.0  # characters
    _total: int = 0  # characters of all texts
    _worst: tuple[float, str, str] = (0.0, "", "")  # (lost share, text, text decoded from its token ids)

    def add(self, text: str, token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> None:
        share = lost_share(text, token_ids, tokenizer)
        self._total += len(text)
        if share > 0:
            self.lossy += 1
            self._lost += share * len(text)
            if share > self._worst[0]:
                self._worst = (share, text, str(tokenizer.decode(list(token_ids))))

    def check(self, source: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises ValueError where too much is lost, so that the model would read other texts.

        source: where the texts are from, for the message.
        """
        if self._lost <= _MOST_LOST * self._total:
            return
        share, text, back = self._worst
        raise ValueError(
            f"{source}: {self._lost / self._total:.0%} of the texts is lost between text and token ids, for "
            f"example {share:.0%} of {text!r:.80}, whose ids read {back!r:.80}: the tokenizer "
            f"{tokenizer.name_or_path!r} has {len(tokenizer)} tokens; is its tokenizer.json (or "
            "tokenizer.model) in the folder, and does it know this script?"
        )


def lost_share(text: str, token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> float:
    """The share of the characters of ``text`` that its ``token_ids`` do not decode to; 0 if nothing is lost.

    Case, accents, compatibility forms, white space and the order of characters do not count. Neither do
    special tokens, which a tokenizer knows even where it knows nothing else.
    """
    back = str(
        tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )
    if back == text:
        return 0.0
    for token in tokenizer.all_special_tokens:  # the unknown one among them
        text = text.replace(token, "")
        back = back.replace(token, "")
    expected = Counter(_visible_characters(text))
    decoded = Counter(_visible_characters(back))
    return (expected - decoded).total() / max(expected.total(), 1)


def _visible_characters(text: str) -> str:
    """``text`` without case, accents, controls and spaces."""
    decomposed = unicodedata.normalize("NFKD", text.replace(_SENTENCEPIECE_SPACE, " ")).casefold()
    return "".join(character for character in decomposed if unicodedata.category(character) not in _INVISIBLE)
