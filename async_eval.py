"""Evaluation beside training: a snapshot of the weights is scored in a process beside each rank while training goes on.

A process and not a thread: it has random generators, an autocast cache, compute threads and an interpreter lock of its
own, so no number of training can depend on what it does meanwhile. The ranks' processes form a process group of their
own, so none of their collectives can meet one of training's.
"""

import contextlib
import io
import json
import multiprocessing
import os
import signal
import threading
import traceback
import warnings
from multiprocessing.connection import wait

import torch

import utils
from utils import UserError


class EvaluationError(RuntimeError):
    """An evaluation beside training failed, on this rank or on another."""


class AsyncEvaluation:
    """This rank's part of the evaluations beside training, at most one at a time.

    All ranks call start() and collect() at the same points, and agree at each look: all take an evaluation in, or all
    raise. open_evaluator: a function of a module, called once in the side process with **settings and `meeting` (see
    utils.join_meeting); it returns a function that takes a state_dict and returns a JSON-able report, of which the
    first rank's counts. dist_url: where the ranks themselves have met.
    """

    def __init__(self, open_evaluator, dist_url, **settings):
        self.store, meeting = utils.open_meeting(dist_url)
        self.side = SideProcess(open_evaluator, {**settings, "meeting": meeting})
        self.pending = None  # the record that start() was given, while the evaluation runs

    def start(self, weights, record):
        """Evaluate `weights`, a state_dict of CPU tensors. `record` comes back beside the report."""
        snapshot = io.BytesIO()
        torch.save(weights, snapshot)
        self.side.submit(snapshot.getvalue())
        self.pending = record

    def collect(self, wait=False):
        """(record, report) if the evaluation is done on every rank, else None; wait: not before it is done.

        Raises EvaluationError, on every rank, if it failed on one.
        """
        while self.pending is not None:
            answer = self.side.look(timeout_seconds=0.1 if wait else 0.0)
            failed, running = utils.votes(answer is not None and "failed" in answer, answer is None)
            if failed:
                here = (answer or {}).get("failed", "on another rank, which says why")
                raise EvaluationError(f"the evaluation of step {self.pending['step']} failed: {here}")
            if not running:
                record, self.pending = self.pending, None
                return record, utils.broadcast_json(answer["result"])
            if not wait:
                break
        return None

    def close(self):
        """End the side process, and with it an evaluation that is still running."""
        self.side.close()


class SideProcess:
    """Does jobs in another process, one at a time. It starts with the first job and keeps what it has opened."""

    def __init__(self, open_worker, settings):
        self.open_worker, self.settings = open_worker, settings
        self.process = self.connection = None
        self.answer = None  # to the last job: {"result": …} or {"failed": message}

    def submit(self, job):
        """Hand over a job, bytes, and return at once."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")  # a fork of CUDA or OpenMP would hang
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=_work, args=(theirs, self.open_worker, self.settings))
            self.process.start()
            theirs.close()
        self.answer = None
        # In a thread: a pipe takes 64 KiB, the rest waits until the process has imported torch and reads.
        threading.Thread(target=self._send, args=(self.connection, job), daemon=True).start()

    @staticmethod
    def _send(connection, job):
        with contextlib.suppress(OSError):  # it has ended: look() says how
            connection.send_bytes(job)

    def look(self, timeout_seconds=0.0):
        """The answer to the last job, {"result": …} or {"failed": message}; None while it is being worked on."""
        if self.answer is None and wait([self.connection, self.process.sentinel], timeout_seconds):
            with contextlib.suppress(EOFError, OSError):
                if self.connection.poll():
                    self.answer = json.loads(self.connection.recv_bytes())
            if self.answer is None:
                self.process.join()
                self.answer = {"failed": describe_end(self.process.exitcode)}
        return self.answer

    def close(self):
        """End the process at once, whatever it does."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None


def describe_end(exitcode):
    if exitcode == -signal.SIGKILL:
        return "its process was killed; did the machine run out of memory?"
    return f"its process ended with status {exitcode}"


def _work(connection, open_worker, settings):
    """The side process: jobs in, answers out, until whoever started it is gone."""
    for signum in (
        signal.SIGTERM,
        signal.SIGINT,
    ):  # they may go to a whole group of processes; the rank decides
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")  # the rank has said them
    work = None
    while True:
        try:
            job = connection.recv_bytes()
        except EOFError:
            return
        try:
            work = work or open_worker(**settings)
            answer = {"result": work(torch.load(io.BytesIO(job), weights_only=True))}
        except UserError as error:
            answer = {"failed": str(error)}
        except Exception:
            answer = {"failed": traceback.format_exc().strip()}
        connection.send_bytes(json.dumps(answer).encode())


def _end_with_parent():
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
