"""Chooses the episodes of an evaluation, and which lane plays which of them."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from dsrl_async.config.settings import Config, ConfigError
from dsrl_async.envs import EnvironmentRecord, libero_files
from dsrl_async.untrusted import shown


class Episode(NamedTuple):
    """One episode of an evaluation."""

    number: int
    """It determines scene and noise together with the evaluation's seed, whatever else is played."""
    task: int
    """The task's number in its suite; 0 for the tabletop."""
    init_state: int | None
    """The number of the task's published initial state; None for the tabletop."""


MOST_DIGITS = 6
"""Of the number of a task or of an initial state."""


def parse_numbers(option: str, text: str) -> list[int]:
    """Return the numbers that a text such as `0,3`, `40-49` or `0-4,7` names, in increasing order.

    Raises ConfigError, which names the option, if it is no such text.
    """
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(f"{option}: {text!r} is not a list of numbers; write it like 0,3 or 40-49")
        if len(first) > MOST_DIGITS or len(last) > MOST_DIGITS:
            raise ConfigError(f"{option}: {shown(part)} is too large; there are no such numbers")
        numbers.update(range(int(first), int(last or first) + 1))
    if not numbers:
        raise ConfigError(f"{option}: {text!r} names no number; write a range upwards, like 40-49")
    return sorted(numbers)


def plan_suite(
    suite: str, tasks: Sequence[int] | None, init_states: Sequence[int] | None, episodes: int | None
) -> list[Episode]:
    """Choose episodes of a LIBERO suite, see `plan_episodes`.

    Raises ValueError if LIBERO is not installed or has no such task or initial state.
    """
    counts = [len(libero_files.init_states(suite, task)) for task in range(len(libero_files.task_names(suite)))]
    chosen = libero_files.selected_tasks(suite, tasks)
    for task in chosen:
        libero_files.selected_init_states(suite, task, init_states)
    return plan_episodes(counts, chosen, init_states, episodes)


def plan_episodes(
    counts: Sequence[int], tasks: Sequence[int], init_states: Sequence[int] | None, episodes: int | None
) -> list[Episode]:
    """Choose `episodes` episodes, spread evenly over `tasks`; those of a task go through its `init_states` in order.

    Args:
        counts: the number of initial states of each task of the suite.
        tasks: the tasks to play.
        init_states: the initial states to start from; None means all.
        episodes: the number of episodes in all; None means each initial state once. If there are more episodes than
            initial states, these are gone through again (see `what_repeats`).

    An episode's number counts through all initial states of all tasks of the suite, which is what `env.scene_order`
    `cycled` does; so it is the same scene with the same noise whichever tasks and initial states are chosen.
    """
    states = {task: list(range(counts[task]) if init_states is None else init_states) for task in tasks}
    if episodes is None:
        quota = {task: len(states[task]) for task in tasks}
    else:
        quota = {task: episodes // len(tasks) + (place < episodes % len(tasks)) for place, task in enumerate(tasks)}
    planned = []
    for task in tasks:
        for index in range(quota[task]):
            repeat, place = divmod(index, len(states[task]))
            state = states[task][place]
            planned.append(Episode(repeat * sum(counts) + sum(counts[:task]) + state, task, state))
    return planned


def what_repeats(suite: str, episodes: Collection[Episode], seeding: str, key: str, stochastic: str) -> str | None:
    """Say so if deterministic episodes of a LIBERO suite would repeat others; None if they do not.

    `key` is what their number was chosen by, and `stochastic` what gives them noise.

    Without noise, two episodes from one initial state differ only if `env.seeding` is `episode` and furniture stands in
    the scene. To count repetitions would make the interval of the success rate too narrow.
    """
    scenes = {(episode.task, episode.init_state) for episode in episodes}
    if len(scenes) == len(episodes):
        return None
    furniture = all(libero_files.has_furniture(suite, task) for task in {task for task, _ in scenes})
    if furniture and seeding == "episode":
        return None
    return (
        f"{len(episodes)} are more than the {len(scenes)} scenes, and without random noise the others would only "
        f"repeat these; give {stochastic}{', or --env.seeding episode' if furniture else ''}, or at most "
        f"{key} {len(scenes)}"
    )


def held_out(record: EnvironmentRecord, config: Config) -> list[Episode]:
    """The episodes of each evaluation during a run: those that `evaluate --episodes` would play, with the run's seed.

    Raises ConfigError if some would only repeat others, and ValueError as `plan_suite`.
    """
    count = config.evaluation.episodes
    if record.suite is None:
        return [Episode(number, 0, None) for number in range(count)]
    episodes = plan_suite(record.suite, config.env.task_ids, config.env.init_states, count)
    if config.sac.evaluation_noise == "deterministic":
        how = record.settings["seeding"], "--evaluation.episodes", "--sac.evaluation-noise stochastic"
        if (repeated := what_repeats(record.suite, episodes, *how)) is not None:
            raise ConfigError(f"evaluation.episodes: {repeated}")
    return episodes


def across_tasks(episodes: Iterable[Episode]) -> list[Episode]:
    """Sort episodes so that the first of every task comes before the second of any."""
    seen: Counter[int] = Counter()
    places = {}
    for episode in episodes:
        places[episode] = seen[episode.task]
        seen[episode.task] += 1
    return sorted(places, key=lambda episode: (places[episode], episode.task))


class Schedule:
    """Hands out each episode once, so that every lane keeps to one task as long as possible.

    Compiling a task's scene takes seconds, so a lane goes on with its task while that has episodes left. Then it takes
    the task with the most episodes left for each lane that would play it: one that no lane plays, or at the end the one
    that would take longest.
    """

    def __init__(self, episodes: Iterable[Episode]) -> None:
        self._waiting: dict[int, deque[Episode]] = {}
        self._task_of: dict[int, int] = {}
        self.add(episodes)

    def add(self, episodes: Iterable[Episode]) -> None:
        """Add further episodes, to be handed out after those of the same task that there are."""
        for episode in episodes:
            self._waiting.setdefault(episode.task, deque()).append(episode)

    def next(self, lane: int) -> Episode | None:
        """Return the episode that `lane` plays next, or None if none is left."""
        waiting = self._waiting
        task = self._task_of.get(lane)
        if task not in waiting:
            players = Counter(of for other, of in self._task_of.items() if other != lane)
            task = max(waiting, key=lambda other: len(waiting[other]) / (players[other] + 1), default=None)
        if task is None:
            return None
        self._task_of[lane] = task
        episode = waiting[task].popleft()
        if not waiting[task]:
            del waiting[task]
        return episode
