"""Calls that go through a model in step: each stops at the same places and waits there for the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

import torch

__all__ = ["InStep"]


class InStep:
    """Runs several calls of one module, whose parts say by `stop` that they are reached.

    The calls run in turn, never at the same time; threads are there because a model's `forward` cannot yield.
    """

    def __init__(self) -> None:
        self._running: _Call | None = None

    def stop(self, place: Any, value: Any) -> Any:
        """Says, within a call, that a place is reached with a value; returns what `visit` gives for it."""
        assert self._running is not None
        return self._running.stop(place, value)

    def run(self, calls: Sequence[Callable[[], Any]], visit: Callable[[Any, list[Any]], list[Any]]) -> None:
        """Runs the calls to their ends, without gradients.

        Args:
            calls: what is run.
            visit: called at each place, when all calls have come there, with the place and the value of each call.

        Raises:
            ValueError: calls come to different places.
        """
        waiting, answers = [_Call(call) for call in calls], [None] * len(calls)
        try:
            while True:
                met = []
                for self._running in waiting:
                    met.append(self._running.resume(answers.pop(0)))
                if not any(met):
                    return
                if any(one is None or one[0] is not met[0][0] for one in met):
                    raise ValueError("`calibration` must hold calls that take one way through the model, got several.")
                answers = visit(met[0][0], [value for _, value in met])
        finally:
            for one in waiting:
                one.abandon()


class _Call:
    """One call, as a coroutine."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._inbox: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        self._outbox: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        threading.Thread(target=self._run, args=(call,), daemon=True).start()

    def _run(self, call: Callable[[], Any]) -> None:
        try:
            self._wait()
            with torch.no_grad():
                call()
            self._outbox.put((None, None))
        except BaseException as error:  # which belongs to who resumes
            self._outbox.put((None, error))

    def _wait(self) -> Any:
        value, error = self._inbox.get()
        if error is not None:
            raise error
        return value

    def stop(self, place: Any, value: Any) -> Any:
        """Waits, in the call's own thread, for the answer at a place."""
        self._outbox.put(((place, value), None))
        return self._wait()

    def resume(self, answer: Any) -> Any:
        """Goes on with an answer, and returns the next place with its value, or `None` at the end."""
        self._inbox.put((answer, None))
        met, error = self._outbox.get()
        if error is not None:
            raise error
        return met

    def abandon(self) -> None:
        """Ends what is left of the call."""
        self._inbox.put((None, RuntimeError("abandoned")))
