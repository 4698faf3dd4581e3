"""How pass keys are introduced, hidden and asked for: as calibration does it, or never there.

Plans are made from calibration's samples, so a case that repeats its sentences flatters them:
figures of seen and unseen wordings are told apart, and the unseen come first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moac.calibration.tasks import INTRODUCTIONS

WordingKind = Literal["unseen", "seen"]

UNSEEN: WordingKind = "unseen"
SEEN: WordingKind = "seen"
WORDINGS: tuple[WordingKind, ...] = (UNSEEN, SEEN)
"""In the order in which figures are shown."""


@dataclass(frozen=True, slots=True)
class Wording:
    """How a case introduces, hides and asks for `{key}`, a number of `digits` digits.

    `needle` has words before its first `{key}`, which open the right answer too. Quantities have
    three digits: a model may well write a longer one with a separator.
    """

    introduction: str
    needle: str
    question: str
    digits: int = 5

    @property
    def lead(self) -> str:
        """What a right answer says before the number."""
        return self.needle.partition("{key}")[0]


_SEEN = (
    Wording(
        INTRODUCTIONS[0],
        "The pass key is {key}. Remember it. {key} is the pass key.",
        "That is the end of the text. What is the pass key?",
    ),
    Wording(
        INTRODUCTIONS[2],
        "Please note that the secret pass key is {key}.",
        "What is the secret pass key mentioned in the text?",
    ),
    Wording(
        INTRODUCTIONS[0],
        "The pass key is {key}. Remember it. {key} is the pass key.",
        "What is the pass key? Answer with the number only.",
    ),
    Wording(
        INTRODUCTIONS[1],
        "The pass key is {key}. Do not forget that {key} is the pass key.",
        "What is the pass key that the text told you to remember?",
    ),
)

_UNSEEN = (
    Wording(
        "Somewhere in the pages below the combination of a safe is given. Keep it in mind.",
        "The combination of the safe is {key}. Keep it in mind: {key} opens the safe.",
        "What is the combination of the safe?",
    ),
    Wording(
        "One ticket is mentioned along the way. Look for it while you read.",
        "Your ticket bears the number {key}. Write it down, you will have to show {key}.",
        "Which number does the ticket bear?",
    ),
    Wording(
        "A librarian left a call slip between these pages. Watch out for it.",
        "On the call slip the librarian had written {key}.",
        "Which number had the librarian written on the call slip?",
    ),
    Wording(
        "Below you find an excerpt. Part of it is a remark about an invoice, which matters later.",
        "The invoice was filed under {key}, as every clerk in the office knew.",
        "Under which number was the invoice filed?",
        digits=6,
    ),
    Wording(
        "While reading on, note how many steps the lighthouse has.",
        "The lighthouse has exactly {key} steps. Nobody who climbed all {key} steps forgot them.",
        "How many steps does the lighthouse have?",
        digits=3,
    ),
    Wording(
        "Please go through this passage. It tells the extension under which a porter is reached.",
        "To reach the night porter, dial {key}. He answers at {key} until dawn.",
        "Which extension do you dial to reach the night porter?",
        digits=4,
    ),
    Wording(
        "The pages that follow were copied for an auction house. They name the lot of a vase.",
        "The blue vase was sold as lot {key}.",
        "As which lot was the blue vase sold?",
    ),
    Wording(
        "I copied a chapter for you. Someone scribbled the PIN of a suitcase into it.",
        "Whoever finds the suitcase should try the PIN {key}. It has been {key} for years.",
        "What PIN opens the suitcase?",
    ),
    Wording(
        "Among other things, you will learn from this how far a ship had sailed.",
        "By then the ship had sailed {key} miles.",
        "How many miles had the ship sailed?",
        digits=3,
    ),
    Wording(
        "In what follows a seal turns up out of nowhere. Its number is what I am after.",
        "The caretaker put seal {key} on the meter. At noon seal {key} was still whole.",
        "Which seal did the caretaker put on the meter?",
        digits=6,
    ),
    Wording(
        "Skim this at your leisure, but do not miss the badge of the courier.",
        "The courier wore badge {key} that morning, and no other courier ever wore {key}.",
        "Which badge did the courier wear?",
    ),
    Wording(
        "This is a long read. It says once which password guards the archive; find that.",
        "The archive is guarded by the password {key}.",
        "By which password is the archive guarded?",
    ),
    Wording(
        "Have a look at these paragraphs. One of them gives away a winning raffle number.",
        "When the raffle was drawn, the winner held {key}. Her neighbour had missed {key} by one.",
        "Which number did the winner of the raffle hold?",
    ),
    Wording(
        "Take your time over the following lines; an engine's plate is described there.",
        "Stamped into the plate of the engine was {key}.",
        "What was stamped into the plate of the engine?",
        digits=6,
    ),
)

PASSKEY_WORDINGS: dict[WordingKind, tuple[Wording, ...]] = {UNSEEN: _UNSEEN, SEEN: _SEEN}
"""Even counts, so that each wording meets filler and running text in turn."""
