"""What `sps2 up` says: people's lines, or JSON lines for programs. Only it writes to the terminal."""

import json
import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from sps2_client import ClusterState

PLAIN_INTERVAL_S = 2.0


class _Console(Console):
    """A console whose reader may go away: `sps2 up 2>&1 | head` must not end, nor stall, what it serves."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Reporter:
    """Results go to stdout, progress and logs to stderr; a reader that goes away is no reason to end."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._reader_gone = False
        self._err = _Console(stderr=True, highlight=False, soft_wrap=True)

    @property
    def console(self) -> Console:
        """The console on stderr."""
        return self._err

    def log_line(self, line: str) -> None:
        """One line of a child."""
        self._err.print(Text(line, style="dim"))  # as a style of `print` it would dim the bars too

    def note(self, text: str) -> None:
        """Something that people want to know; no program does."""
        self._err.print(f"sps2 up: {text}", markup=False)

    def event(self, kind: str, text: str, **fields: object) -> None:
        """Something that happened: a JSON line for programs, `text` for people."""
        self._result(json.dumps({"event": kind, **fields}) if self._as_json else text)

    def fail(self, message: str, context: Sequence[str] = ()) -> None:
        """Why it all ended; the last lines of the process that failed before it."""
        for line in context:
            self._err.print(f"  {line}", markup=False)
        self._err.print(
            f"sps2 up: {message}", markup=False, style="bold red" if self._err.is_terminal else None
        )
        if self._as_json:
            self._result(json.dumps({"event": "failed", "message": message}))

    def _result(self, line: str) -> None:
        if self._reader_gone:
            return
        try:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
        except BrokenPipeError:
            self._reader_gone = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the exit


class StartProgress:
    """How far the start is: bars on a terminal, a line every two seconds elsewhere."""

    def __init__(self, reporter: Reporter, worker_ids: Sequence[str]) -> None:
        self._reporter = reporter
        self._worker_ids = worker_ids
        self._last_text = ""
        self._last_time = 0.0
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
        self._bars = Progress(
            *columns, TimeElapsedColumn(), console=reporter.console, transient=True, disable=not self._live
        )
        self._tasks = {one: self._bars.add_task(one, total=1.0, state="starting") for one in worker_ids}

    @property
    def _live(self) -> bool:
        return self._reporter.console.is_terminal

    def __enter__(self) -> "StartProgress":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def step(self, text: str, now: float) -> None:
        """A step before there are workers to report."""
        self._line(text, now)

    def update(self, state: ClusterState, now: float) -> None:
        """What the router reports."""
        known = {worker.worker_id: worker for worker in state.workers}
        for worker_id, task in self._tasks.items():
            if (worker := known.get(worker_id)) is not None:
                self._bars.update(task, completed=worker.load_fraction, state=worker.state)
        self._line(start_text(self._worker_ids, state), now)

    def _line(self, text: str, now: float) -> None:
        if not self._live and text != self._last_text and now - self._last_time >= PLAIN_INTERVAL_S:
            self._reporter.note(text)
            self._last_text, self._last_time = text, now


def missing(worker_ids: Sequence[str], state: ClusterState) -> list[str]:
    """Ranks that are not ready yet."""
    ready = {worker.worker_id for worker in state.workers if worker.state == "ready"}
    return [one for one in worker_ids if one not in ready]


def start_text(worker_ids: Sequence[str], state: ClusterState) -> str:
    """One line on the start: "2 of 4 ranks ready; prefill-0/0 loaded 40%, ..."."""
    known = {worker.worker_id: worker for worker in state.workers}
    rest = [
        f"{one} loaded {known[one].load_fraction:.0%}" if one in known else f"{one} not registered"
        for one in missing(worker_ids, state)
    ]
    text = f"{len(worker_ids) - len(rest)} of {len(worker_ids)} ranks ready"
    return f"{text}; {', '.join(rest)}" if rest else text
