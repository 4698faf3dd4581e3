"""Words for keys and word lists: adjective-noun names, and the held-out prose's own vocabulary."""

from __future__ import annotations

import random
import re
from functools import cache
from itertools import product

from moac.evaluation.text import held_out
from moac_runtime.errors import UsageError


def _words(text: str) -> list[str]:
    return text.split()


_ADJECTIVES = _words(
    "able aged amber ample arctic bitter blunt bold brief bright broad bronze busy careful cheap "
    "clean coarse cold common cool crisp curious damp daring dark deep dense distant double dry "
    "dull dusty early eastern empty equal exact faint false famous fast fierce final firm flat "
    "foreign formal fragile fresh frosty full grand grave hard harsh heavy hidden hollow honest"
)
_NOUNS = _words(
    "acorn anchor anvil apron arch arrow autumn bakery ballad balcony bamboo banner barrel beacon "
    "bench blanket bottle boulder bracelet branch breeze brick bridge bucket button cabin cable "
    "camera candle canoe canvas carpet castle cavern chain chair chimney circle cliff clock cloud "
    "coast comet copper corner cotton cradle crater crystal curtain desert dragon drawer drum "
    "eagle engine envelope feather fence ferry field flame flute fossil fountain frame garlic "
    "gate glacier goblet granite gravel guitar hallway harvest helmet hill horizon hotel hunter "
    "insect ivory jacket jewel journey jungle kernel kingdom ladle lagoon lake lantern leaf lemon"
)
_WORD = re.compile(r"\b[a-z]{4,9}\b")


def keys(rng: random.Random, count: int) -> list[str]:
    """`count` different adjective-noun names. Raises UsageError where there are not so many."""
    names = _names()
    if count > len(names):
        raise UsageError(
            f"a case of this length needs {count} different names and there are {len(names)}; "
            "evaluate at shorter lengths"
        )
    return rng.sample(names, count)


@cache
def _names() -> list[str]:
    return [f"{adjective}-{noun}" for adjective, noun in product(_ADJECTIVES, _NOUNS)]


@cache
def vocabulary() -> list[str]:
    """The lower-case words of 4 to 9 letters in the held-out prose, sorted."""
    text = "\n".join(document.text for document in held_out("prose"))
    return sorted(set(_WORD.findall(text)))
