"""Deals the episodes of an evaluation out to groups, in slices that are played again where a group ends before them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from dsrl_async.run.evaluation.episodes import Episode, Schedule


class Slice:
    """Some episodes that a group is given at a time.

    Attributes:
        missing: those that have not been played, by number.
        failures: how many groups have ended before they had played it.
    """

    def __init__(self, episodes: Sequence[Episode], failures: int = 0) -> None:
        self.missing = {episode.number: episode for episode in episodes}
        self.failures = failures


class Deal:
    """Which group plays which episodes. Each has `lanes` environment workers.

    While there are many episodes left a group has as many again as it plays, so that none of its workers waits; at the
    end it has no more than it plays, so that all groups end at about the same time. Its workers keep to their tasks as
    those of one machine do, see `Schedule`.

    Attributes:
        missing: the numbers of the episodes that nobody has played yet.
    """

    def __init__(self, episodes: Sequence[Episode], groups: int, lanes: int) -> None:
        self.missing = {episode.number for episode in episodes}
        self._lanes, self._all_lanes = lanes, groups * lanes
        self._schedule, self._undealt = Schedule(episodes), len(episodes)
        self._next_lane = dict.fromkeys(range(groups), 0)
        self._held: dict[int, list[Slice]] = {group: [] for group in range(groups)}
        self._returned: deque[Slice] = deque()

    def next(self, group: int) -> list[Episode]:
        """The episodes of the group's next slice; none if it has enough of them, or if none are left."""
        many = self._undealt >= 2 * self._all_lanes
        room = (2 if many else 1) * self._lanes - sum(len(part.missing) for part in self._held[group])
        if room < (self._lanes if many else 1):
            return []
        if self._returned:
            part = self._returned.popleft()
            episodes = list(part.missing.values())
            if len(episodes) > room:  # others have room, too
                self._returned.appendleft(Slice(episodes[room:], part.failures))
                part = Slice(episodes[:room], part.failures)
        else:
            part = Slice(self._cut(group, room))
        if part.missing:
            self._held[group].append(part)
        return list(part.missing.values())

    def _cut(self, group: int, count: int) -> list[Episode]:
        found: list[Episode] = []
        while len(found) < count:
            lane = group * self._lanes + self._next_lane[group]
            if (episode := self._schedule.next(lane)) is None:
                break
            found.append(episode)
            self._next_lane[group] = (self._next_lane[group] + 1) % self._lanes
        self._undealt -= len(found)
        return found

    def note(self, group: int, number: int) -> bool:
        """Note that a group has played an episode; returns False if that has been played before."""
        for part in self._held[group]:
            part.missing.pop(number, None)
        self._held[group] = [part for part in self._held[group] if part.missing]
        news = number in self.missing
        self.missing.discard(number)
        return news

    def give_back(self, group: int) -> int:
        """Take back what a group, which has ended, has not played; returns the most failures of one of its slices."""
        parts, self._held[group] = self._held[group], []
        for part in parts:
            part.failures += 1
        self._returned.extend(parts)
        return max((part.failures for part in parts), default=0)
