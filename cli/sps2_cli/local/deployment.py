"""Starts, watches and ends the processes of a local deployment. All of it runs on the main thread.

Order of the start: redis; directory; router and the leaders of all groups at once; the other ranks; then it
waits until the router reports every rank ready. Order of the end: router, workers, directory, redis. Groups that come
and go in between are `elastic`'s.
"""

import contextlib
import signal
import time
from collections.abc import Sequence

from sps2_cli.connect import open_client
from sps2_cli.local import plan, redis
from sps2_cli.local.control import ControlServer
from sps2_cli.local.elastic import ElasticPools, place_of
from sps2_cli.local.interrupts import Interrupts
from sps2_cli.local.logs import LineLog, cause, needs_context
from sps2_cli.local.metrics import MetricsPorts
from sps2_cli.local.process import ChildProcess, exit_text
from sps2_cli.local.reporter import Reporter, StartProgress, missing
from sps2_client import Client, ClusterState, SPS2Error

POLL_S = 0.05
STATE_TIMEOUT_S = 2.0
LOOK_TIMEOUT_S = 0.5
"""The same while it serves: other processes are not watched meanwhile."""
RESTART_INTERVAL_S = 1.0
REDIS_TRIES = 3
CONTEXT_LINES = 20
STOP_ORDER: tuple[plan.Kind, ...] = ("router", "worker", "directory", "redis")


class StartError(Exception):
    """The deployment did not come up."""

    def __init__(self, message: str, context: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.context = context
        """Last lines of the process that failed."""


class InterruptedStartError(Exception):
    """A signal came before the deployment was ready."""


class Deployment:
    """The processes, by name. `stop` ends them all, whatever state they are in."""

    def __init__(
        self, options: plan.UpOptions, commands: plan.Commands, reporter: Reporter, interrupts: Interrupts
    ) -> None:
        self._options = options
        self._commands = commands
        self._reporter = reporter
        self._interrupts = interrupts
        self._children: dict[str, ChildProcess] = {}
        self._reported: set[ChildProcess] = set()
        self._deadline = 0.0
        self._directory = ""
        self._metrics_ports = MetricsPorts(options.metrics_port_base)
        self._elastic = ElasticPools(options, self, reporter)
        self._control: ControlServer | None = None
        self.redis_address = ""
        """host:port of Redis, without its password."""

    @property
    def address(self) -> str:
        """Where the router listens."""
        return self._children["router"].address or ""

    @property
    def processes(self) -> list[dict[str, str | int]]:
        """Name and pid of every process, and where it serves its metrics, if it does."""
        return [_described(child) for child in self._children.values()]

    def start(self) -> None:
        """Returns when every rank is ready.

        Raises:
            StartError: a process failed, or the time is over.
            InterruptedStartError: a signal came.
        """
        self._deadline = time.monotonic() + self._options.ready_timeout
        with StartProgress(self._reporter, self._options.worker_ids) as progress:
            progress.step("starting redis and the directory", time.monotonic())
            redis_url = self._start_redis()
            directory = self._announced(self._spawn(plan.directory_spec(self._commands, redis_url)))
            self._directory = directory
            progress.step("starting the router and the ranks", time.monotonic())
            specs = plan.leader_specs(self._options, self._commands, directory)
            leaders = [self._spawn(spec) for spec in specs]
            router = self._spawn(plan.router_spec(self._options, self._commands, directory))
            addresses = {leader.name: self._announced(leader) for leader in leaders}
            specs = plan.follower_specs(self._options, self._commands, directory, addresses)
            for child in [router, *[self._spawn(spec) for spec in specs]]:
                self._announced(child)
            with open_client(self.address, max_retries=0) as client:
                self._await_ready(client, progress)

    def _spawn(
        self, spec: plan.ProcessSpec, log: LineLog | None = None, *, announce: bool = True
    ) -> ChildProcess:
        spec = self._metrics_ports.given(spec)
        announce = announce and spec.listen is not None
        child = ChildProcess(spec, log or self._log(spec.name), announce=announce)
        self._children[spec.name] = child
        return child

    def _log(self, name: str) -> LineLog:
        show = None if self._options.quiet else self._reporter.log_line
        return LineLog(name, show, self._options.log_dir)

    def _start_redis(self) -> str:
        """The URL of Redis, with its password."""
        if self._options.redis is not None:
            self.redis_address = plan.split_password(self._options.redis)[0]
            return self._options.redis
        log = self._log("redis")
        for _ in range(REDIS_TRIES):
            server = redis.draw_redis()
            child = self._spawn(redis.redis_spec(server), log)
            while child.exit_code is None:
                if redis.answers(server):
                    self.redis_address = server.address
                    return server.url
                self._pause("redis to answer")
            # Most likely somebody took the port between our look and its bind: draw another.
            child.kill()
        raise StartError(self._failure_text(child), child.log.tail[-CONTEXT_LINES:])

    def _announced(self, child: ChildProcess) -> str:
        while (address := child.poll_address()) is None:
            self._check_children()
            self._pause(f"{child.name} to listen")
        return address

    def _await_ready(self, client: Client, progress: StartProgress) -> None:
        waiting_for = "the router to answer"
        while True:
            try:
                state = client.cluster_state(timeout=STATE_TIMEOUT_S)
            except SPS2Error as error:
                waiting_for = f"the router to answer ({error})"
            else:
                progress.update(state, time.monotonic())
                unready = missing(self._options.worker_ids, state)
                if not unready:
                    return
                waiting_for = f"{', '.join(unready)} to be ready"
            self._check_children()
            self._pause(waiting_for)

    def _pause(self, waiting_for: str) -> None:
        if time.monotonic() >= self._deadline:
            raise StartError(f"not ready after {self._options.ready_timeout:g} s: waiting for {waiting_for}")
        if self._interrupts.stop:
            raise InterruptedStartError
        self._interrupts.sleep(POLL_S)

    def _check_children(self) -> None:
        """Raises StartError for the first process that has ended: none may while starting."""
        for child in self._children.values():
            if child.exit_code is not None:
                child.kill()
                tail = child.log.tail
                raise StartError(
                    self._failure_text(child), tail[-CONTEXT_LINES:] if needs_context(tail) else ()
                )

    def _failure_text(self, child: ChildProcess) -> str:
        reason = cause(child.log.tail) or "it said nothing"
        return f"{child.name} failed to start ({exit_text(child.exit_code or 0)}): {reason}"

    def supervise(self) -> None:
        """Serves until a signal comes: says which process ended, starts it again, and scales when asked to."""
        self._listen()
        while not self._interrupts.stop:
            for child in list(self._children.values()):
                if child.exit_code is not None and not self._elastic.owns(child):
                    self._handle_exit(child, child.exit_code)
            if self._control is not None and (call := self._control.poll()) is not None:
                self._elastic.take(call)
            self._elastic.step()
            self._interrupts.sleep(POLL_S)

    def _listen(self) -> None:
        try:
            self._control = ControlServer(int(self.address.rpartition(":")[2]))
        except OSError as error:
            self._reporter.note(f"`sps2 scale` will not find this deployment: {error}")

    # --- what `elastic` asks for -----------------------------------------------------------------------------

    def start_leader(self, role: plan.Role, number: int) -> ChildProcess:
        """See `elastic.Host`."""
        return self._spawn(plan.leader_spec(self._options, self._commands, role, number, self._directory))

    def start_followers(self, role: plan.Role, number: int, leader: str) -> list[ChildProcess]:
        """See `elastic.Host`."""
        specs = plan.followers_of(self._options, self._commands, role, number, self._directory, leader)
        return [self._spawn(spec) for spec in specs]

    def group_children(self, name: str) -> list[ChildProcess]:
        """See `elastic.Host`."""
        return [child for child in self._children.values() if child.spec.group == name]

    def remove(self, children: Sequence[ChildProcess]) -> None:
        """See `elastic.Host`."""
        for child in children:
            with contextlib.closing(child.log):
                child.kill()
            del self._children[child.name]

    def cluster_state(self) -> ClusterState | None:
        """See `elastic.Host`."""
        with Client(self.address, max_retries=0) as client:
            try:
                return client.cluster_state(timeout=LOOK_TIMEOUT_S)
            except SPS2Error:
                return None  # it is being started again; the next look may find it

    # --- ends ------------------------------------------------------------------------------------------------

    def _handle_exit(self, child: ChildProcess, code: int) -> None:
        if child.spec.group is not None and code == 0:
            # Told to drain by an operator, or by a signal: its group leaves, and is not wanted back.
            self._elastic.see_off(*place_of(child.spec.group), ask=False)
            return
        if child not in self._reported:
            self._reported.add(child)
            child.kill()  # what it started must not go on beside its successor
            reason = cause(child.log.tail)
            text = f"{child.name} ended ({exit_text(code)}){': ' + reason if code > 0 and reason else ''}"
            self._reporter.event("exited", text, name=child.name, pid=child.pid, exit_code=code)
        if not self._options.restart or time.monotonic() < child.started_at + RESTART_INTERVAL_S:
            return
        spec = child.spec.at(child.address) if child.address else child.spec
        successor = self._spawn(spec, child.log, announce=False)
        text = f"{child.name} started again (pid {successor.pid})"
        self._reporter.event("restarted", text, name=child.name, pid=successor.pid)

    def stop(self, drain_timeout: float) -> bool:
        """Ends all in order, each kind in `drain_timeout` seconds; True when none had to be killed."""
        if self._control is not None:
            self._control.close()
        self._elastic.close()
        clean = True
        for kind in STOP_ORDER:
            children = [child for child in self._children.values() if child.spec.kind == kind]
            clean &= self._stop_together(children, drain_timeout)
        for child in self._children.values():
            with contextlib.closing(child.log):
                child.kill()
        return clean

    def _stop_together(self, children: Sequence[ChildProcess], drain_timeout: float) -> bool:
        for child in children:
            child.send(signal.SIGTERM)
        deadline = time.monotonic() + drain_timeout
        said = time.monotonic()
        while running := [child for child in children if child.exit_code is None]:
            now = time.monotonic()
            if self._interrupts.now or now >= deadline:
                for child in running:
                    child.kill()
                    self._reporter.note(f"{child.name} did not end in time and was killed")
                return False
            if now - said >= 2:
                said = now
                self._reporter.note(f"waiting for {', '.join(child.name for child in running)} to finish")
            time.sleep(POLL_S)
        return True


def _described(child: ChildProcess) -> dict[str, str | int]:
    described: dict[str, str | int] = {"name": child.name, "pid": child.pid}
    if child.spec.metrics:
        described["metrics"] = child.spec.metrics
    return described
