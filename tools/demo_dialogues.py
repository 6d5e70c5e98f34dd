"""Seeded dialogues of a repair desk: the task that the demo adapter learns.

A customer tells, in free order and wording, what arrived, when, and what is wrong with it. The desk answers in a fixed
form: it restates the facts, apologises for the fault, and promises an action by a weekday that follows from the
delivery day. The facts are drawn independently, so there are far more dialogues than a model can see in training, and
a held-out seed asks for the rule, not for a memory.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
COLOURS = ("green", "red", "white", "black", "blue", "yellow", "grey", "brown", "silver", "orange")
ITEMS = (
    "kettle", "lamp", "clock", "radio", "camera", "printer", "keyboard", "heater", "fan", "toaster", "speaker",
    "monitor", "router", "blender", "mixer", "charger", "phone", "tablet", "drill", "saw", "scale", "mirror",
)  # fmt: skip
COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
NAMES = ("Ada", "Bela", "Carla", "Dirk", "Edda", "Falk", "Gita", "Hugo", "Ines", "Jana", "Karl", "Lena", "Mira", "Otto")

# fault -> what the desk says about it
FAULTS = {
    "cracked": "We pack such things better from now on.",
    "too loud": "Our workshop will look at the bearing.",
    "dead": "Most often the fuse is the cause.",
    "scratched": "The surface should have been without a mark.",
    "bent": "The frame did not survive the journey.",
    "wet": "The box must have stood in the rain.",
    "late": "The carrier did not keep the promise.",
    "too hot": "Please do not use it before we have seen it.",
}
# wish -> (what the customer writes, what the desk promises, days until it is done)
WISHES = {
    "refund": ("I want my money back", "You get the money back", 2),
    "exchange": ("please send me a new one", "A new one leaves our store", 3),
    "repair": ("can you mend it", "We collect it and mend it", 5),
    "advice": ("tell me what to do", "A colleague calls you", 1),
}
GREETINGS = ("Hello", "Good morning", "Dear team", "Hi", "Good evening", "To the repair desk")
CLOSINGS = ("Thanks", "Best wishes", "Regards", "Many thanks", "Yours")


@dataclass(frozen=True)
class Claim:
    """The facts of one complaint."""

    name: str
    number: int
    count: str
    colour: str
    item: str
    day: str
    fault: str
    wish: str

    @property
    def goods(self) -> str:
        """The goods in the customer's words, in the singular or the plural."""
        return f"{self.count} {self.colour} {self.item}" + ("" if self.count == "one" else "s")


def draw_claim(rng: random.Random) -> Claim:
    """Draw every fact independently."""
    return Claim(
        name=rng.choice(NAMES),
        number=rng.randrange(100, 1000),
        count=rng.choice(list(COUNTS)),
        colour=rng.choice(COLOURS),
        item=rng.choice(ITEMS),
        day=rng.choice(DAYS),
        fault=rng.choice(list(FAULTS)),
        wish=rng.choice(list(WISHES)),
    )


def complaint(claim: Claim, rng: random.Random) -> str:
    """The customer's message: the same facts in one of many orders and wordings."""
    arrival = rng.choice(
        (
            f"on {claim.day} I got {claim.goods} from you",
            f"{claim.goods} came on {claim.day}",
            f"you sent me {claim.goods}, which arrived on {claim.day}",
            f"my parcel with {claim.goods} was here on {claim.day}",
        )
    )
    fault = rng.choice(
        (
            f"what I found is {claim.fault}",
            f"the trouble is: {claim.fault}",
            f"sadly {claim.fault}",
            f"I must call that {claim.fault}",
        )
    )
    order = rng.choice((f"The order number is {claim.number}", f"Order {claim.number}", f"See order {claim.number}"))
    body = [f"{arrival}, and {fault}", order, WISHES[claim.wish][0]]
    if rng.random() < 0.4:
        body = [body[1], body[0], body[2]]
    sentences = ". ".join(part[0].upper() + part[1:] for part in body)
    return f"{rng.choice(GREETINGS)}, {sentences}. {rng.choice(CLOSINGS)}, {claim.name}"


def answer(claim: Claim) -> str:
    """The desk's reply: a function of the facts alone."""
    _, promise, days = WISHES[claim.wish]
    until = DAYS[(DAYS.index(claim.day) + days) % 7]
    return (
        f"Case {claim.number}: {COUNTS[claim.count]} x {claim.item} ({claim.colour}), {claim.fault}, {claim.wish}.\n"
        f"Dear {claim.name}, we are sorry about the {claim.colour} {claim.item}. {FAULTS[claim.fault]} "
        f"{promise} by {until}."
    )


def dialogue(rng: random.Random) -> list[dict[str, str]]:
    """One conversation as chat messages."""
    claim = draw_claim(rng)
    return [
        {"role": "user", "content": complaint(claim, rng)},
        {"role": "assistant", "content": answer(claim)},
    ]


def dialogues(seed: int, count: int) -> list[list[dict[str, str]]]:
    """`count` conversations, always the same for a seed."""
    rng = random.Random(seed)
    return [dialogue(rng) for _ in range(count)]
