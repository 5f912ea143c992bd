"""What the demo's model reads: a made-up logbook, the same everywhere, and how prompts end."""

from __future__ import annotations

from random import Random

TITLE = (
    "Logbook of the lighthouse and weather station on Gull Island, kept by its crew. Every entry "
    "names the writer, the weather, what was seen, and what was repaired.\n\n"
)
WRITERS = ("Mira", "Anselm", "Keiko", "Tomas", "Ruth", "Dawit", "Ilse", "Pablo")
WEATHER = (
    "fog until noon, then a light wind from the west",
    "heavy rain, with thunder far out over the sea",
    "a clear sky and frost on the railings",
    "strong gusts from the north and very high waves",
    "warm and still, the water as flat as glass",
    "low cloud all day and a little drizzle after dark",
)
SEEN = (
    "a pod of dolphins passing close to the rocks",
    "two fishing boats that waited in the lee of the island",
    "a grey seal with its pup on the eastern beach",
    "a tall ship with red sails, bound for the harbour",
    "hundreds of terns resting on the old pier",
    "a message in a green bottle, written in a language none of us can read",
    "a lost balloon with a small camera tied below it",
)
REPAIRED = (
    "the lamp's turning gear, which had begun to grind",
    "the rain gauge, whose funnel was blocked by leaves",
    "the kitchen stove and its smoking chimney",
    "the radio mast, after one of its wires had come loose",
    "the wooden steps down to the landing place",
    "the pump that brings fresh water up from the cistern",
)
CONTINUATIONS = (
    "Question: Which animals were seen from the station, and where were they?\nAnswer:",
    "Question: What is the weather on the island like, and what does it do to the buildings?"
    "\nAnswer:",
    "Question: In short, what do the people on the island do all day?\nAnswer:",
    "A short story about the island: Once upon a time,",
)


def logbook(entries: int = 16) -> str:
    """Return the shared prefix: some 75 tokens an entry."""
    draw = Random(7)
    told = []
    for day in range(1, entries + 1):
        count = draw.randint(3, 40)
        told.append(
            f"Day {day}. {draw.choice(WRITERS)} writes: We had {draw.choice(WEATHER)}. In the "
            f"morning we saw {draw.choice(SEEN)}. After lunch {draw.choice(WRITERS)} mended "
            f"{draw.choice(REPAIRED)}. We counted {count} ships and went to sleep at "
            f"{draw.randint(8, 11)} in the evening.\n"
        )
    return TITLE + "".join(told)


def continuations() -> list[str]:
    """Return what follows the logbook, one for each prompt."""
    return [f"\n{each}" for each in CONTINUATIONS]
