"""Whether a text comes back from its token ids.

A tokenizer whose file is missing knows no token and turns every text into nothing; one of another language
loses most of it. Compared is what a reader would see, since many tokenizers change the rest on purpose:
SentencePiece moves spaces, normalisers compose accents or take the case and the accents away.
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

LOSSY = "with characters that the tokenizer does not know"  # how texts that lose a few are counted
_MOST_LOST = 0.1  # of all characters; typographic quotes and rows in another script here and there are less
_SENTENCEPIECE_SPACE = "\u2581"
_UNSEEN = {"Mn", "Cc", "Cf", "Zs", "Zl", "Zp"}  # Unicode categories: combining marks, controls, spaces


@dataclass
class Losses:
    """What the texts of one kind lose on the way to their token ids, all together: a row in another
    script is one among many.
    """

    lossy: int = 0  # texts that lose some of their characters
    _lost: float = 0.0  # characters
    _seen: int = 0
    _worst: tuple[float, str, str] = (0.0, "", "")  # (share, text, what its token ids read)

    def add(self, text: str, token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> None:
        share = lost_share(text, token_ids, tokenizer)
        self._seen += len(text)
        if share > 0:
            self.lossy += 1
            self._lost += share * len(text)
            if share > self._worst[0]:
                self._worst = (share, text, str(tokenizer.decode(list(token_ids))))

    def check(self, source: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises ValueError where too much is lost: the model would read other texts. source: where
        they are from.
        """
        if self._lost <= _MOST_LOST * self._seen:
            return
        share, text, back = self._worst
        raise ValueError(
            f"{source}: {self._lost / self._seen:.0%} of the texts is lost between text and token ids, for "
            f"example {share:.0%} of "
            f"{text!r:.80}, whose ids read {back!r:.80}: the tokenizer {tokenizer.name_or_path!r} has "
            f"{len(tokenizer)} tokens; is its "
            "tokenizer.json (or tokenizer.model) in the folder, and does it know this script?"
        )


def lost_share(text: str, token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> float:
    """The share of the characters of ``text`` that ``token_ids`` do not spell, 0 where nothing is lost.

    Case, accents, compatibility forms and white space do not count, nor does their order, nor special tokens:
    they are known even where nothing else is.
    """
    back = str(
        tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )
    if back == text:
        return 0.0
    for token in tokenizer.all_special_tokens:  # the unknown one among them
        text, back = text.replace(token, ""), back.replace(token, "")
    wanted, found = Counter(_folded(text)), Counter(_folded(back))
    return (wanted - found).total() / max(wanted.total(), 1)


def _folded(text: str) -> str:
    decomposed = unicodedata.normalize("NFKD", text.replace(_SENTENCEPIECE_SPACE, " ")).casefold()
    return "".join(character for character in decomposed if unicodedata.category(character) not in _UNSEEN)
