"""Detects captions that are not in English, by script and function words.

For corpora that are mostly English: cheap, and conservative with short captions and foreign names.
Knows the function words of six European languages, and other scripts.
"""

import re

from ovref.ops.singular import in_lexicon

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)?")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ENGLISH = _words(
    """
    the an of and with is are to at for by his her its their from over under near next that
    this it as while into up out off some two three he she they who there has have been being while
    """
)
"""Function words of English that the other languages do not have (`a`, `in`)."""
OTHERS = _words(
    """
    der das dem des ein eine einem einen einer eines und mit auf im vor neben zwei drei ist sind von
    zum zur bei nicht sich sein seine seinem ihr ihre ihrem ihren wird liegt sitzt steht auf einigen
    le la les une du dans avec et sur est sont deux trois aux qui devant au un pr\u00e8s son sa ses
    c\u00f4t\u00e9 \u00e0 pour par assis debout derri\u00e8re
    el los las una unos unas con y es est\u00e1 est\u00e1n del dos tres sobre junto su sus
    por para que en al muy mientras frente mi
    il lo gli uno di che nel nella sul sulla della dello degli delle sono due tre accanto davanti
    vicino alla ai dei dal dalla nello e i da su seduto
    o os uma umas em no na nos nas dois duas est\u00e3o ao \u00e0 perto
    het een van op met zijn naar voor aan zit staat
    """
)
"""Function words of German, French, Spanish, Italian, Portuguese and Dutch."""
AMBIGUOUS = _words(
    "o e i y no lo la el le du van von au en on as au par sur due san los las al con"
)
"""Words of these lists that also occur in English captions, mostly in names: no evidence alone."""


def is_other_language(caption: str) -> bool:
    """Whether the caption's words show that it is not in English."""
    letters = [letter for letter in caption if letter.isalpha()]
    latin = sum(letter < "\u0250" or "\u1e00" <= letter <= "\u1eff" for letter in letters)
    if 2 * latin < len(letters):
        return True
    words = _WORD.findall(caption.lower().replace("\u2019", "'"))
    english = sum(word in ENGLISH for word in words)
    # An elision counts as a separate word: `l'herbe`, `dell'acqua`.
    others = [word for word in words if word in OTHERS or re.match(r"(l|d|qu|dell|nell|un)'", word)]
    certain = [word for word in others if word not in AMBIGUOUS]
    if not certain and len(others) < 3:
        return False
    if len(certain) >= 2 and len(others) > 2 * english:
        return True
    known = sum(in_lexicon(word) or word in ENGLISH for word in words if word not in OTHERS)
    return english == 0 and 2 * known <= len(words) - len(others) + 1
