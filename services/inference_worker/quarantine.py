"""Keeps runs apart that may kill their worker: few at a time are at work, so that of them the guilty one stands out."""

import asyncio


class Place:
    """A place among the suspected runs that are at work. company: how many they are, this one included."""

    def __init__(self, quarantine: "Quarantine", at_once: int, company: int) -> None:
        self.company = company
        self.at_once = at_once
        self._quarantine = quarantine

    def leave(self) -> None:
        """The run is suspected no more, or has gone."""
        self._quarantine.left(self)


class Quarantine:
    """Gives out places, to those that came first: one that needs to be alone is not passed by for ever."""

    def __init__(self) -> None:
        self._places: list[Place] = []
        self._entrance = asyncio.Lock()
        self._vacated = asyncio.Event()

    async def enter(self, at_once: int) -> Place:
        """Returns when there is a place for a run of which at most `at_once` may be at work together, of any kind."""
        async with self._entrance:
            while len(self._places) >= min([at_once, *(place.at_once for place in self._places)]):
                self._vacated.clear()
                await self._vacated.wait()
            place = Place(self, at_once, len(self._places) + 1)
            self._places.append(place)
            return place

    def left(self, place: Place) -> None:
        """There is room again."""
        self._places.remove(place)
        self._vacated.set()
