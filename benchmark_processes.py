"""The arms of a comparison as processes: started, asked in turn, watched; see benchmark_arms.py for their side."""

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from utils import UserError

ARMS_SCRIPT = Path(__file__).with_name("benchmark_arms.py")


class ArmError(RuntimeError):
    """An arm could not do its work; the message says why."""


class Unavailable(ArmError):
    """A peer that is not installed."""


class Arm:
    """A process that works when asked, one JSON line each way, and otherwise waits; see benchmark_arms.py."""

    def __init__(self, name):
        self.name = name
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, str(ARMS_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def start(self, kind, workload, **settings):
        """Make it an arm of a kind; see benchmark_arms.KINDS."""
        self.ask("start", kind=kind, arm=self.name, workload=workload, **settings)

    def ask(self, call, **arguments):
        """The answer to one call. Raises UserError, Unavailable or ArmError as the process says."""
        line = self.talk(json.dumps({"call": call, "arguments": arguments}) + "\n")
        if not line:
            status = self.process.wait()
            self.errors.seek(0)
            tail = "".join(self.errors.readlines()[-5:]).strip()
            raise ArmError(f"{self.name}: its process ended with status {status} in {call!r}\n{tail}")
        answer = json.loads(line)
        if "mistake" in answer:
            raise UserError(answer["mistake"])
        if "unavailable" in answer:
            raise Unavailable(f"{self.name}: {answer['unavailable']}")
        if "failed" in answer:
            raise ArmError(f"{self.name}: failed in {call!r}\n{answer['failed'].strip()}")
        return answer["result"]

    def talk(self, request):
        """Its line of answer to a line; "" if it has ended."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(request)
            self.process.stdin.flush()
        return self.process.stdout.readline()

    def close(self):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
        self.errors.close()


class Arms:
    """The arms of one comparison. One that fails is noted in the report and left out; the others go on.

    essential: the arm without which nothing can be compared; its failure is raised.
    """

    def __init__(self, report, essential="ours"):
        self.report, self.essential, self.running = report, essential, {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for name in list(self.running):
            self.close(name)

    def open(self, kind, name, workload, **settings):
        self.running[name] = Arm(name)
        with self.forgiven(name):
            self.running[name].start(kind, workload, **settings)

    def close(self, name):
        if name in self.running:
            self.running.pop(name).close()

    @contextlib.contextmanager
    def forgiven(self, name):
        try:
            yield
        except ArmError as error:
            self.close(name)
            if name == self.essential:
                raise
            self.report.note(str(error))
            self.report.complete &= isinstance(error, Unavailable)

    def ask(self, name, call, **arguments):
        """One arm's answer, or None where it is not running."""
        answer = None
        if name in self.running:
            with self.forgiven(name):
                answer = self.running[name].ask(call, **arguments)
        return answer

    def ask_all(self, call, **arguments):
        """{name: answer} of all that run and can answer."""
        answers = {name: self.ask(name, call, **arguments) for name in list(self.running)}
        return {name: answer for name, answer in answers.items() if name in self.running}

    def take_turns(self, rounds, calls):
        """Each arm in turn, in every round another one first.

        calls: number of the round -> {name: (method, arguments)}.
        Returns {name: [answer of each round]} of the arms that got through.
        """
        answers = {}
        for number in range(rounds):
            for name, (call, arguments) in rotated(list(calls(number).items()), number):
                answers.setdefault(name, []).append(self.ask(name, call, **arguments))
                self.report.keep("latest rounds", answers)
            self.report.progress(f"round {number + 1} of {rounds}")
        return {name: answer for name, answer in answers.items() if name in self.running}

    def all_do(self, call, **arguments):
        """The same turn for all that run, as take_turns wants it."""
        return dict.fromkeys(self.running, (call, arguments))


def rotated(items, by):
    """The list, begun at position `by` modulo its length."""
    start = by % max(1, len(items))
    return items[start:] + items[:start]


class TreeMemory(threading.Thread):
    """Watches what a process and its helpers hold together, until stopped: `peak_mb`, MiB. Linux."""

    def __init__(self, pid, interval_seconds=0.1):
        super().__init__(daemon=True)
        self.pid, self.interval_seconds, self.peak_mb = pid, interval_seconds, 0.0
        self.stopped = threading.Event()
        self.start()

    def run(self):
        while not self.stopped.wait(self.interval_seconds):
            with contextlib.suppress(OSError, ValueError):
                # Resident, not proportional, for the process itself: that costs the kernel nothing.
                held = _field(f"/proc/{self.pid}/status", "VmRSS:")
                for child in descendants(self.pid):
                    with contextlib.suppress(OSError):
                        held += _field(f"/proc/{child}/smaps_rollup", "Pss:")
                self.peak_mb = max(self.peak_mb, held / 2**10)

    def stop(self):
        self.stopped.set()
        self.join()
        return self.peak_mb


def _field(path, name):
    lines = Path(path).read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(name))


def descendants(pid):
    """The processes that this one has started, and theirs: their numbers. Linux."""
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            found += [int(child), *descendants(int(child))]
    return found
