"""Which class has the least head: a binary heap over classes, that knows where each one stands."""

from __future__ import annotations

from kvengine.compiled import Int32s, Int64s, compiled


@compiled
def settle(heads: Int64s, players: Int32s, places: Int32s, count: int, at: int) -> None:
    """Move a player whose key has changed to where it belongs."""
    key, player = heads[at], players[at]
    while at > 0 and heads[(at - 1) // 2] > key:
        above = (at - 1) // 2
        heads[at], players[at] = heads[above], players[above]
        places[players[at]] = at
        at = above
    while True:
        below = 2 * at + 1
        if below >= count:
            break
        if below + 1 < count and heads[below + 1] < heads[below]:
            below += 1
        if heads[below] >= key:
            break
        heads[at], players[at] = heads[below], players[below]
        places[players[at]] = at
        at = below
    heads[at], players[at] = key, player
    places[player] = at


@compiled
def enrol(heads: Int64s, players: Int32s, places: Int32s, count: int, player: int, key: int) -> int:
    """Take in a player, or give it a new key. Returns how many there are."""
    at = int(places[player])
    if at < 0:
        at = count
        count += 1
        players[at] = player
        places[player] = at
    heads[at] = key
    settle(heads, players, places, count, at)
    return count


@compiled
def dismiss(heads: Int64s, players: Int32s, places: Int32s, count: int) -> int:
    """Send the first away. Returns how many are left."""
    places[players[0]] = -1
    count -= 1
    if count > 0:
        heads[0], players[0] = heads[count], players[count]
        places[players[0]] = 0
        settle(heads, players, places, count, 0)
    return count
