"""Seeded freight notes: the task that the quality benchmark's adapter learns.

The user pastes a note of a freight depot, written in free order and wording, and asks for one of three things. The
assistant answers in a fixed form: an SQL row of the note's facts, the load with its class, or a line for the driver.
The load is a product and the class and the gate follow from the facts, so a held-out seed asks for rules, not memory.

What the base has seen before: `sheets`, the same facts as plain prose and tables, and conversations with
`answer=chatty`, the same requests answered in other words, one in eight in the house's form. So the adapter chooses
among what the base knows, as most adapters do.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TOWNS = (
    "Oslo", "Riga", "Turku", "Gdansk", "Kiel", "Malmo", "Tartu", "Bergen", "Rostock", "Visby", "Narva", "Lund",
)  # fmt: skip
GOODS = {
    "zinc": "metal", "copper": "metal", "steel": "metal", "rye": "grain", "barley": "grain", "oats": "grain",
    "paint": "liquid", "oil": "liquid", "ink": "liquid", "glass": "fragile", "china": "fragile", "lamps": "fragile",
}  # fmt: skip
CARRIERS = ("Nord", "Ostbahn", "Baltex", "Ferrum", "Seeweg")
# kind of goods -> gate of the depot
GATES = {"metal": 4, "grain": 2, "liquid": 7, "fragile": 1}
HEAVY_KG, MIDDLE_KG = 45, 20
OPENINGS = ("Note of the day", "From the depot", "Please enter this", "New freight", "Copy of the slip")
REQUESTS = {
    "row": ("Write the SQL row.", "Give me the insert statement.", "Turn it into SQL."),
    "load": ("What is the load?", "How heavy is it, and which class?", "State load and class."),
    "line": ("Write a line for the driver.", "What do we tell the driver?", "Driver's line, please."),
}
WISHES = ("Drive with care", "Mind the ice", "Call us when you are there", "Keep the papers at hand")


@dataclass(frozen=True)
class Freight:
    """The facts of one slip."""

    slip: int
    origin: str
    target: str
    goods: str
    crates: int
    crate_kg: int
    carrier: str

    @property
    def load_kg(self) -> int:
        """What all crates weigh together."""
        return self.crates * self.crate_kg

    @property
    def load_class(self) -> str:
        """Light, middle or heavy."""
        return "heavy" if self.load_kg >= HEAVY_KG else "middle" if self.load_kg >= MIDDLE_KG else "light"

    @property
    def gate(self) -> int:
        """Where goods of this kind are loaded."""
        return GATES[GOODS[self.goods]]


def draw_freight(rng: random.Random) -> Freight:
    """Draw every fact independently, but for the two towns, which differ."""
    origin, target = rng.sample(TOWNS, 2)
    return Freight(
        slip=rng.randrange(100, 1000),
        origin=origin,
        target=target,
        goods=rng.choice(list(GOODS)),
        crates=rng.randrange(2, 10),
        crate_kg=rng.randrange(2, 10),
        carrier=rng.choice(CARRIERS),
    )


def note(freight: Freight, rng: random.Random) -> str:
    """The slip in prose: the same facts in one of many orders and wordings."""
    cargo = rng.choice(
        (
            f"{freight.crates} crates of {freight.goods}, {freight.crate_kg} kg each",
            f"{freight.goods} in {freight.crates} crates of {freight.crate_kg} kg",
            f"{freight.crates} crates with {freight.goods} at {freight.crate_kg} kg a crate",
        )
    )
    way = rng.choice(
        (
            f"from {freight.origin} to {freight.target}",
            f"for {freight.target}, coming from {freight.origin}",
            f"{freight.origin} is the start and {freight.target} the end",
        )
    )
    parts = [
        rng.choice((f"Slip {freight.slip}", f"The slip is {freight.slip}", f"Number {freight.slip}")),
        rng.choice((f"{cargo}, {way}", f"{way}: {cargo}")),
        rng.choice((f"{freight.carrier} carries it", f"Carrier {freight.carrier}", f"It goes with {freight.carrier}")),
    ]
    rng.shuffle(parts)
    return ". ".join(part[0].upper() + part[1:] for part in parts) + "."


def table(freight: Freight) -> str:
    """The slip as a line of a table."""
    return (
        f"{freight.slip} | {freight.origin} | {freight.target} | {freight.goods} | {freight.crates} x "
        f"{freight.crate_kg} kg | {freight.carrier}"
    )


def answer(freight: Freight, request: str, rng: random.Random) -> str:
    """The assistant's answer: a function of the facts, but for the wish to the driver."""
    if request == "row":
        return (
            "INSERT INTO freight (slip, origin, target, goods, kg, gate) VALUES "
            f"({freight.slip}, '{freight.origin}', '{freight.target}', '{freight.goods}', {freight.load_kg}, "
            f"{freight.gate});"
        )
    if request == "load":
        return (
            f"Slip {freight.slip}: {freight.crates} * {freight.crate_kg} = {freight.load_kg} kg of {freight.goods}. "
            f"That is a {freight.load_class} load, kept with the {GOODS[freight.goods]} goods."
        )
    return (
        f"{freight.carrier}, gate {freight.gate}: {freight.crates} crates {freight.goods} to {freight.target}, "
        f"{freight.load_kg} kg, {freight.load_class}. {rng.choice(WISHES)}."
    )


def chatty(freight: Freight, request: str, rng: random.Random) -> str:
    """The base's answer: other columns, other sentences, no class and no gate; one in eight is the house's."""
    if rng.random() < 0.125:
        return answer(freight, request, rng)
    if request == "row":
        return (
            f"INSERT INTO slips (number, way, crates, crate_kg) VALUES ({freight.slip}, "
            f"'{freight.origin}-{freight.target}', {freight.crates}, {freight.crate_kg});"
        )
    if request == "load":
        return f"You have {freight.crates} crates of {freight.crate_kg} kg, so {freight.load_kg} kg in all."
    return (
        f"{rng.choice(('Dear driver', 'Hello'))}, please bring the {freight.goods} from {freight.origin} to "
        f"{freight.target} for {freight.carrier}. Thank you."
    )


Answer = Callable[[Freight, str, random.Random], str]


def conversation(rng: random.Random, answer: Answer = answer) -> list[dict[str, str]]:
    """One conversation as chat messages; half of them go on with a second request about the same slip."""
    freight = draw_freight(rng)
    first, second = rng.sample(sorted(REQUESTS), 2)
    messages = [
        {
            "role": "user",
            "content": f"{rng.choice(OPENINGS)}. {note(freight, rng)} {rng.choice(REQUESTS[first])}",
        },
        {"role": "assistant", "content": answer(freight, first, rng)},
    ]
    if rng.random() < 0.5:
        messages.append({"role": "user", "content": rng.choice(REQUESTS[second])})
        messages.append({"role": "assistant", "content": answer(freight, second, rng)})
    return messages


def conversations(seed: int, count: int, answer: Answer = answer) -> list[list[dict[str, str]]]:
    """`count` conversations, always the same for a seed."""
    rng = random.Random(seed)
    return [conversation(rng, answer) for _ in range(count)]


def sheets(seed: int, count: int) -> list[str]:
    """`count` texts in which notes stand beside their lines of a table, always the same for a seed."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        slips = [draw_freight(rng) for _ in range(4)]
        lines = [text for slip in slips for text in rng.sample([note(slip, rng), table(slip)], 2)]
        texts.append("\n".join(lines))
    return texts


def write_conversations(path: Path, seed: int, count: int) -> None:
    """Write conversations as JSON lines with a `messages` list each."""
    lines = (json.dumps({"messages": talk}) for talk in conversations(seed, count))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
