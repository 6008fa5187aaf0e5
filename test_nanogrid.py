"""Tests of NanoGrid, in the order of the module: real processes, real HTTP, real files.

To add a test, find the part of nanogrid.py that you changed: its tests stand in the same order here.
A new row in a table is mostly enough:
    YAML, settings, tasks, zips                the tables beside their tests; REFUSED and TAKEN for zips
    how a function ends                        RUNS; with a cgroup v2 COUNTED
    what it cannot do, see or hide             CONFINED (with RUNS; EXECD), ROOM, HOARDS
    what it leaves running, or to the next run ESCAPES, LEFTOVERS, OUTPUTS
    a warm Python as a bare one, a handler as Lambda calls it, a program that is compiled
                                               PROGRAMS, HANDLED, BUILT
    what AWS answers, what fails for a while   CODES, AWS_ERRORS, CHECKED, SCENES, OUTAGES, SCENARIOS
A table of functions is text: `=== name | runtime field=JSON | key=expected`, then main.py; `--- other.py`
begins another file. `root`, `ordinary` and `room` beside the runtime: only there. All its rows are one
drain, and each is then a test of its result, by check(). WORDS are functions that they share.

Else write a test, for one of these worlds (each has put(), job() and agent()):
    Folder     --local: the fixture folder, or grids(user, SETTING=…)
    site(moto) SQS, S3 and CloudWatch in an emulator, behind a proxy that fails as told: the fixture aws
and Party, the parts of the agent before answers of AWS's that the test writes.
Functions tell what they did to a witness (`tell`, `marker`): they share no directory with the tests.

Wait with until(), for a condition; never for a time, and assert no time that a busy machine breaks.
What waits much and works little is a @trial(visibility=…, agent={…}), which gets a site and its agent:
all of them run at once. What takes over five seconds is `slow`; `cgroup` needs a cgroup v2. It must
pass as root and as an ordinary user, leave nothing behind, and have been seen to fail.
"""
from __future__ import annotations

import base64
import collections
import contextlib
import ctypes
import dataclasses
import fcntl
import fnmatch
import functools
import hashlib
import http.client
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import typing
import unicodedata
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer

import boto3
import pytest
import yaml

# --------------------------------------------------------------------------------------------
# What every test needs
# --------------------------------------------------------------------------------------------


MODULE = Path(os.environ.get("NANOGRID", Path(__file__).with_name("nanogrid.py")))
sys.path.insert(0, str(MODULE.parent))

import nanogrid as ng

MIB = 1 << 20
ROOT = os.geteuid() == 0
# An interpreter that every user reaches: a virtual environment under /root is not.
PYTHON = shutil.which("python3", path="/usr/bin:/usr/local/bin:/bin") or sys.executable
# A uid of this session's own, so that no process limit is shared with another test run.
ORDINARY = 63000 + os.getpid() % 2000 if ROOT else os.getuid()
parametrize = pytest.mark.parametrize
USERS = [pytest.param("root", marks=pytest.mark.skipif(not ROOT, reason="needs root")), "ordinary"]


def busy() -> float:
    """How many times as long as on an idle machine things take here now."""
    return max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))


def patient(seconds: float) -> float:
    """What takes `seconds` at most on an idle machine may take so long on this one."""
    return max(seconds, min(600.0, seconds * busy()))


def until(condition, seconds=180.0, what="condition"):
    """Return the first true value of condition(); fail when patient(seconds) pass without one."""
    begun = time.monotonic()
    while time.monotonic() - begun < patient(seconds):
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"{what} did not come within {time.monotonic() - begun:.0f} s")


def need(*programs: str, found=shutil.which) -> None:
    """Skip the test where a program is missing, but fail in CI, which installs them all."""
    for program in programs:
        if not found(program):
            (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{program} is not installed here")


def said_by(*words, **options) -> str:
    """What a command that must succeed prints."""
    return subprocess.run(words, text=True, check=True, stdout=subprocess.PIPE, **options).stdout


def works(*words) -> bool:
    """Whether these words can stand before a command here."""
    return not subprocess.run([*words, "true"], capture_output=True, check=False).returncode


def slow_but(rows, *quick: str) -> list:
    """The rows' names as parameters: all but these run with --slow alone."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in rows]


def make_zip(files: dict[str, str | bytes], mode: int = 0o644) -> bytes:
    """A zip of `files`; a name that ends in '*' is stored executable, without the star."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            member = zipfile.ZipInfo(name.rstrip("*"))
            member.external_attr = (0o100000 | (0o755 if name.endswith("*") else mode)) << 16
            member.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(member, content)
    return buffer.getvalue()


# --- Agents and what they log


@pytest.fixture(scope="session", autouse=True)
def module_within_reach():
    """nanogrid.py where every user can read it: a home directory is often closed to others."""
    global MODULE
    kept = MODULE
    with tempfile.TemporaryDirectory(prefix="nanogrid-module-") as place:
        os.chmod(place, 0o755)
        MODULE = Path(shutil.copy(kept, place))
        yield
    MODULE = kept


@pytest.fixture(scope="session", autouse=True)
def signals_at_default():
    """Started by nohup or by a shell's `&`, the tests' own children would ignore some of these."""
    for number in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def as_user(user: str, uid: int = ORDINARY) -> list[str]:
    """The words before a command that make it run as `user`."""
    if user != "ordinary" or not ROOT:
        return []
    need("setpriv")
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--"]


# Runs nanogrid.py with another value for a constant: `python -c … python nanogrid.py ARGUMENTS`.
PATCHED = """import sys
sys.path.insert(0, sys.argv[2].rpartition("/")[0])
import nanogrid as ng
{}
sys.exit(ng.main(sys.argv[3:]))"""


def patched(text: str) -> list[str]:
    """The words before `python nanogrid.py` that give constants other values; none for none."""
    return [sys.executable, "-c", PATCHED.format(text)] if text else []


class Agent:
    """A nanogrid.py process whose log is read as it comes; ends with the `with` block."""

    def __init__(self, *args, python=sys.executable, module=None, env=None, cwd=None, prefix=()):
        self.process = subprocess.Popen(
            [*prefix, python, str(module or MODULE), *map(str, args)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, **(env or {})}, cwd=cwd)
        self._log: list[str] = []
        self._out: list[str] = []
        self._readers = [threading.Thread(target=self._read, args=pair, daemon=True) for pair in
                         ((self.process.stderr, self._log), (self.process.stdout, self._out))]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _read(stream, lines):
        for line in stream:
            lines.append(line.decode("utf-8", "backslashreplace"))
        stream.close()

    @property
    def log(self) -> str:
        return "".join(self._log)

    @property
    def out(self) -> str:
        return "".join(self._out)

    def wait_for(self, pattern: str, seconds: float = 180):
        try:
            return until(lambda: re.search(pattern, self.log, re.MULTILINE) or self._ended(), seconds,
                         repr(pattern))
        except AssertionError as error:
            raise AssertionError(f"{error}; the log:\n{self.log}") from None

    def until_ok(self, request_id: str, more: str = ""):
        self.wait_for(f"REPORT requestId={request_id} .*status=ok{more}")

    def _ended(self):
        if self.process.poll() is not None and not any(r.is_alive() for r in self._readers):
            raise AssertionError(f"the agent ended with {self.process.returncode}")

    def end(self, seconds: float = 180) -> int:
        """The exit status; the log is complete when this returns."""
        status = self.process.wait(patient(seconds))
        for reader in self._readers:
            reader.join(60)
        assert not re.search("^(?!.* stderr: ).*Traceback", self.log + self.out, re.MULTILINE), self.log  # its own
        return status

    def send(self, number: int):
        self.process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM, seconds: float = 180) -> int:
        self.send(number)
        return self.end(seconds)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.end()


def ended(agent: Agent, status: int = 0) -> Agent:
    """The agent, once it has ended by itself with this status."""
    with agent:
        assert agent.end() == status, agent.out + agent.log
    return agent


def reports(log: str, ahead: bool = False) -> list[dict[str, str]]:
    """The REPORT lines of a text log, in order, each as a dict of its pairs.

    A busy machine starts runs late, and gives back what it took ahead: such a line only with `ahead`.
    """
    lines = re.findall(r"^\S+ [A-Z]+ REPORT (.*)$", log, re.MULTILINE)
    found = [dict(pair.split("=", 1) for pair in line.split(" ")) for line in lines]
    return [report for report in found if ahead or report.get("reason") != "ahead"]


def statuses(log: str) -> list[str]:
    return [report["status"] for report in reports(log)]


def receives(log: str) -> set[int]:
    """The receive counts of its reports, each less the receive of what was given back ahead."""
    ahead = Counter(each["requestId"] for each in reports(log, ahead=True) if each.get("reason") == "ahead")
    return {int(each["receiveCount"]) - ahead[each["requestId"]] for each in reports(log)}


def complaints(log: str) -> list[str]:
    """The log's lines of level WARNING and above, but REPORTs and the one of how functions are isolated."""
    return re.findall(r"^\S+ (?:WARNING|ERROR|CRITICAL) (?!REPORT |isolation: ).*$", log, re.MULTILINE)


def mishaps(log: str) -> list[str]:
    """Those that are not of an emulator which answers late, as it may on a busy machine."""
    return [line for line in complaints(log) if " timeout on endpoint URL" not in line]


# --- Functions that tell what they did


class Hearing(StreamRequestHandler):
    """`mark PATH TEXT` leaves a file that holds the text (1: none was said); `read PATH` answers it."""

    writing = threading.Lock()

    def handle(self):
        verb, path, *text = self.rfile.readline().decode().rstrip("\n").split(" ", 2)
        with self.writing:
            said = Path(path).read_text() if os.path.exists(path) else ""
            if verb == "mark":
                Path(path + "~").write_text(said + (text or ["1"])[0])
                os.rename(path + "~", path)
        self.wfile.write(said.encode() + b"\n")


@functools.lru_cache(None)
def witness() -> int:
    """The port to which functions say what they did: they share no directory with the tests."""
    class Witness(ThreadingTCPServer):
        daemon_threads, request_queue_size = True, 200

    server = Witness(("127.0.0.1", 0), Hearing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_address[1]


def with_tell(source: str) -> str:
    """A Python function that can tell() the witness, and is answered."""
    return f"""import socket
def tell(*words):
    with socket.create_connection(("127.0.0.1", {witness()})) as witness:
        witness.sendall(" ".join(words).encode() + b"\\n")
        return witness.makefile().readline()[:-1]
""" + source


def tell_in_bash() -> str:
    """The same for bash."""
    return (f"tell() {{ exec 9<>/dev/tcp/127.0.0.1/{witness()}; echo \"$*\" >&9; read -r answer <&9; "
            "exec 9>&-; }; ")


# Has a file for each run, named REQUEST_ID.RANDOM and holding its pid; then as its input says.
MARKER = """
import json, os, sys, time
task = json.load(sys.stdin)
name = task["marks"] + "/" + os.environ["REQUEST_ID"] + "." + os.urandom(6).hex()
tell("mark", name, str(os.getpid()))
time.sleep(task.get("sleep", 0))
sys.exit(task.get("exit", 0))
"""


def marker() -> dict[str, str]:
    return {"main.py": with_tell(MARKER)}


def marks_in(path: Path) -> list[Path]:
    """What MARKER has left under `path`, a file for each run."""
    return [mark for mark in (path / "marks").iterdir() if mark.name[-1] != "~"]


def runs_in(path: Path) -> Counter:
    """How often each request id was run, by the marks under `path`."""
    return Counter(mark.name.partition(".")[0] for mark in marks_in(path))


def run_pids(path: Path) -> list[int]:
    return [int(mark.read_text()) for mark in marks_in(path)]


def until_ran(path: Path, request_id: str = "r1", times: int = 1):
    """Wait until the function of a request has begun."""
    until(lambda: runs_in(path)[request_id] >= times, what=f"a run of {request_id}")


# --- Processes, by /proc


def stat_of(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on, or None when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def processes() -> dict[int, list[str]]:
    """Every process by its pid, as stat_of() has it."""
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    return {pid: stat for pid in pids if (stat := stat_of(pid))}


def family(pid: int) -> list[int]:
    """`pid` and its living descendants."""
    found, all_of_them = [pid], processes()
    for member in found:
        found += [child for child, stat in all_of_them.items() if int(stat[1]) == member]
    return found


def command_lines() -> dict[int, str]:
    """What /proc says of every process but zombies: pid and command line."""
    lines = {}
    for pid in processes():
        with contextlib.suppress(OSError):
            lines[pid] = Path(f"/proc/{pid}/cmdline").read_text("utf-8", "replace")
    return lines


def cpu_seconds(pid: int) -> float:
    """CPU time used by the process and its living descendants."""
    stats = filter(None, map(stat_of, family(pid)))
    return sum(int(stat[11]) + int(stat[12]) for stat in stats) / os.sysconf("SC_CLK_TCK")


def alive(pid: int) -> bool:
    return bool((stat := stat_of(pid)) and stat[0] not in "ZX")


def until_gone(pids: list[int], seconds: float = 60):
    """Wait until none of these processes lives."""
    until(lambda: not any(map(alive, pids)), seconds, f"the end of {pids}")


# --- A folder in place of AWS, and tables of functions


@contextlib.contextmanager
def scratch():
    """A directory that every user may enter, with a folder `marks` for what the witness hears."""
    path = Path(tempfile.mkdtemp(prefix="nanogrid-test-"))
    path.chmod(0o755)
    (path / "marks").mkdir()
    try:
        yield path
    finally:
        subprocess.run(["chmod", "-R", "u+rwX", path], check=False, stderr=subprocess.DEVNULL)
        subprocess.run(["rm", "-rf", path], check=True)


class Folder:
    """A directory for --local, whose agents run as `user`: "root", "ordinary" or "me"; MARKER is its fn.zip."""

    def __init__(self, user: str = "me", path: Path | None = None, **settings):
        self.user, self.count, self.held = user, 0, contextlib.ExitStack()
        self.top = self.held.enter_context(scratch())
        self.path, self.base, self.spool = path or self.top / "grid", self.top / "task", self.top / "spool"
        self.env = {"AGENT_TASKBASEDIR": str(self.base), "AGENT_RUNTIMES_PYTHON": PYTHON,
                    "HOME": str(self.top), "LANG": "C.UTF-8", "TZ": "Asia/Seoul",
                    **{f"AGENT_{key}": str(value) for key, value in settings.items()}}
        places = [self.path, self.path / "queue", self.path / "code", self.base, self.spool]
        for place in places:
            place.mkdir(parents=True)
        for place in (self.top, *places):
            if ROOT and user == "ordinary":
                os.chown(place, ORDINARY, ORDINARY)
            place.chmod(0o777 if place == self.spool else 0o755)
        (self.path / "code" / "fn.zip").write_bytes(make_zip(marker()))

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_):
        self.held.close()

    def put(self, files=None, runtime="python", function_id="fn", request_id=None, **task) -> str:
        """Store `files` (a dict, zip bytes, or None to reuse) and queue a task; its requestId."""
        self.count += 1
        request_id = request_id or f"r{self.count:05d}"
        key = task.pop("s3Key", f"{function_id}.zip")
        if files is not None:
            data = files if isinstance(files, bytes) else make_zip(files)
            target = self.path / "code" / key
            target.parent.mkdir(parents=True, exist_ok=True)
            target.with_name("." + target.name).write_bytes(data)
            target.with_name("." + target.name).rename(target)
        body = {"requestId": request_id, "functionId": function_id, "runtime": runtime,
                "s3Key": key, "timeoutMs": 60000, "memoryMb": 256, **task}
        part = self.path / "queue" / f".{request_id}"
        part.write_text(json.dumps(body))
        part.rename(self.path / "queue" / f"{request_id}.json")
        return request_id

    def put_all(self, cases: dict[str, Case], head: str = "", **task):
        """Queue the rows of a table that can run here; `head` goes before each main.py."""
        for name, case in cases.items():
            if case.only in (None, self.user) and all(map(shutil.which, programs(case))):
                files = case.files or {"main*": cpp_binary()}
                if head and "main.py" in files:
                    files = {**files, "main.py": head + files["main.py"]}
                self.put(files, case.runtime, slug(name), slug(name), **{**task, **case.task})

    def agent(self, *args, prefix=(), env=None, **options) -> Agent:
        """An agent that serves the folder."""
        return Agent("--local", self.path, *args, **{"python": PYTHON, **options},
                     env={**self.env, **(env or {})}, prefix=[*as_user(self.user), *prefix])

    def run(self, *args, prefix=(), seconds=600) -> Folder:
        """Drain the queue; the log is in .log, its reports by requestId in .reports."""
        with self.agent("--drain", *args, prefix=prefix) as agent:
            try:
                status = agent.end(seconds)
            except subprocess.TimeoutExpired:
                status = f"none within {seconds} s"
        self.log, self.reports = agent.log, collections.defaultdict(list)
        for report in reports(agent.log):
            self.reports[report["requestId"]].append(report)
        assert status == 0, agent.log[-5000:]
        return self

    def job(self, request_id: str, sleep: float = 0, exit: int = 0, **task) -> str:
        """Queue a task for MARKER; its requestId."""
        told = {"marks": str(self.top / "marks"), "sleep": sleep, "exit": exit}
        return self.put(request_id=request_id, input=told, **task)

    def names(self, *parts) -> list[str]:
        """The visible names in one of its directories; none where it is not there."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(name for name in os.listdir(self.path.joinpath(*parts)) if name[0] != ".")
        return []

    def result(self, request_id: str) -> dict:
        return json.loads((self.path / "results" / request_id / "result.json").read_text())

    def __getitem__(self, name: str) -> dict:
        """The result of a row of a table."""
        return self.result(slug(name))


@pytest.fixture
def folder():
    with Folder() as folder:
        yield folder


@pytest.fixture(scope="module", params=USERS)
def user(request):
    return request.param


@pytest.fixture(scope="module")
def grids():
    """Makes Folders; all of them are removed when the module's tests are over."""
    with contextlib.ExitStack() as stack:
        yield lambda user, **settings: stack.enter_context(Folder(user, **settings))


Case = collections.namedtuple("Case", "files runtime task expect only unordered room", defaults=(False, False))


def pairs(words: list[str]) -> list[list[str]]:
    return [word.split("=", 1) for word in words if "=" in word]


def table(text: str, **entries: str) -> dict[str, Case]:
    """The functions of a table of text by name; see the top of this file. `entries` are other first files."""
    cases = {}
    for part in re.split(r"^=== ", text, flags=re.MULTILINE)[1:]:
        header, _, body = part.partition("\n")
        name, task, expect = (re.split(r" *\| *", header) + ["", ""])[:3]
        words = task.split()
        runtime = next((word for word in words if word in ("cpp", "nodejs", "go")), "python")
        entry = {"python": "main.py", "nodejs": "index.js", "go": "main.go", "cpp": "run.sh", **entries}[runtime]
        chunks = re.split(r"^--- (\S+)\n", body.rstrip("\n") + "\n", flags=re.MULTILINE)
        files = dict(zip(chunks[1::2], chunks[2::2]))
        if chunks[0].strip() or not files and runtime != "cpp":
            files = {entry: chunks[0], **files}
        fields = {key: json.loads(value) for key, value in pairs(words)}
        cases[name] = Case(files, runtime, fields, {"status": "ok", **dict(pairs(expect.split()))},
                           next((word for word in words if word in ("root", "ordinary")), None),
                           "unordered" in words, "room" in words)
    return cases


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def programs(case: Case) -> list[str]:
    """What must be installed for a row; cpp without files is the sample, which is compiled first."""
    return {"nodejs": ["node"], "go": ["go"]}.get(case.runtime, [] if case.files else ["g++"])


def check(grid: Folder, name: str, case: Case) -> dict:
    """The result of a row, after comparing it with what the row expects.

    `a/b`: one of them; `5..9`: a number between; `absent`: no such key; peakMib is the peak in MiB.
    """
    if case.only not in (None, grid.user):
        pytest.skip(f"a row for functions of {case.only}'s agent alone")
    if case.room:
        need_namespaces(grid.user)
    need(*programs(case))
    result = grid[name]
    values = {**result, "peakMib": (result["peakMemoryBytes"] or 0) / MIB}
    for key, expected in case.expect.items():
        got = values.get(key, "absent")
        if re.fullmatch(r"\d*\.\.\d*", expected):
            low, high = (float(end or default) for end, default in zip(expected.split(".."), ("0", "inf")))
            is_right = low <= got <= high
        else:
            is_right = str(got).strip() in expected.split("/")
        assert is_right, f"{key} should be {expected}, is {got}: {json.dumps(result)[:3000]}"
    return result


# --- AWS: an emulator, a proxy that fails by rule, and a site of a test's own


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


AWS_ENV = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing",
           "AWS_DEFAULT_REGION": "ap-northeast-2", "AWS_EC2_METADATA_DISABLED": "true"}


# moto looks at a queue and changes it without a lock: two receives at once may get the same message,
# and what one of two deletes at once removes the other brings back. SQS does neither. A handle that is
# not a message's newest deletes nothing in SQS, and the message in moto.
MOTO = """
import sys, threading
from moto.server import main
from moto.sqs import models
lock, wait = threading.RLock(), models.Queue.wait_for_messages
def alone(call):
    def locked(*arguments, **named):
        with lock:
            return call(*arguments, **named)
    return locked
def wait_unlocked(queue, timeout):
    lock.release()
    try:
        wait(queue, timeout)
    finally:
        lock.acquire()
for name in ("receive_message", "send_message", "delete_message", "change_message_visibility"):
    setattr(models.SQSBackend, name, alone(getattr(models.SQSBackend, name)))
def delete_newest(queue, handle, delete=models.Queue.delete_message):
    if not any(each.had_receipt_handle(handle) and each.receipt_handle != handle for each in queue._messages):
        delete(queue, handle)
models.Queue.wait_for_messages, models.Queue.delete_message = wait_unlocked, delete_newest
main(sys.argv[1:])
"""


@contextlib.contextmanager
def emulator(words, health: str, **options):
    """A server of the caller's own that runs until the end, once it answers at the URL `health`."""
    server = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)

    def answers():
        try:
            return urllib.request.urlopen(health, timeout=5).status == 200
        except OSError:
            return False
    try:
        until(answers, what=health)
        yield
    finally:
        server.terminate()
        server.wait(60)


@contextlib.contextmanager
def moto_server():
    """A moto_server of the caller's own; its URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with emulator(["-c", MOTO, "-H", "127.0.0.1", "-p", str(port)], url + "/moto-api/"):
        yield url


@contextlib.contextmanager
def ministack_server():
    """A ministack of the caller's own; its URL."""
    need("ministack", found=importlib.util.find_spec)
    url = f"http://127.0.0.1:{free_port()}"
    with scratch() as place:
        env = {**os.environ, "GATEWAY_PORT": url.rpartition(":")[2], "TMPDIR": str(place)}
        with emulator(["-m", "ministack"], url + "/_ministack/health", cwd=place, env=env):
            yield url


@pytest.fixture(scope="session")
def moto():
    """The URL of a moto_server of this test session, for all that does not disturb others."""
    with moto_server() as url:
        yield url


def client_of(url: str, service: str):
    """A client of an emulator's."""
    return boto3.client(service, region_name="ap-northeast-2", endpoint_url=url,
                        aws_access_key_id="testing", aws_secret_access_key="testing")


# fault: (HTTP status, error code of SQS and CloudWatch, no twin, message, error code of S3), see as_aws()
REFUSALS = {
    "status 500": (500, "InternalFailure", "", "We encountered an internal error.", "InternalError"),
    "status 503": (503, "ServiceUnavailable", "", "Service is unavailable"),
    "throttling": (400, "ThrottlingException", "", "Rate exceeded", "SlowDown"),
    "expired": (403, "ExpiredTokenException", "", "The security token is expired", "ExpiredToken"),
    "clock": (403, "InvalidSignatureException", "", "Signature expired: 20261125T010000Z is now earlier "
              "than 20261125T020000Z (20261125T021500Z - 15 min.)", "RequestTimeTooSkewed"),
    "denied": (403, "AccessDeniedException", "", "User is not authorized", "AccessDenied"),
    "no bucket": (404, "NoSuchBucket", "", "The specified bucket does not exist"),
}


@dataclass
class Rule:
    """Fails requests of the operations that match `pattern`: `times` of them, or all."""
    pattern: str
    fault: str
    times: int | None = None
    seconds: float = 0.0
    said: tuple | bytes = ()  # what as_aws() answers, or all of an answer


@dataclass
class Seen:
    """One request as the proxy saw it."""
    at: float
    operation: str
    fault: str
    path: str
    body: bytes = field(repr=False)
    key: str = ""  # the access key id that signed it


def operation_of(method: str, path: str, headers, body: bytes) -> str:
    """The AWS operation of a request, whichever protocol botocore chose for the service."""
    if target := headers.get("X-Amz-Target"):
        return target.rpartition(".")[2]
    if "/operation/" in path:
        return path.rpartition("/")[2]
    if headers.get("Content-Type", "").startswith("application/x-www-form-urlencoded"):
        return urllib.parse.parse_qs(body.decode())["Action"][0]
    key = urllib.parse.urlsplit(path).path.strip("/").partition("/")[2]
    return {"GET": "GetObject" if key else "ListObjectsV2", "PUT": "PutObject", "POST": "PutObject",
            "HEAD": "HeadObject" if key else "HeadBucket", "DELETE": "DeleteObject"}[method]


def matches(pattern: str, operation: str) -> bool:
    """Whether one of the patterns, parted by `|`, matches the operation's name."""
    return any(fnmatch.fnmatch(operation, part) for part in pattern.split("|"))


def cbor(texts: dict[str, str]) -> bytes:
    """A CBOR map of up to 23 pairs of texts: what an error of CloudWatch is."""
    coded = [struct.pack(">BH", 0x79, len(text.encode())) + text.encode()
             for pair in texts.items() for text in pair]
    return bytes((0xA0 + len(texts),)) + b"".join(coded)


def as_aws(headers, body: bytes, status: int, code: str, twin: str, message: str, s3_code: str = "") -> bytes:
    """An error as AWS's own services answer it, from the status line to the last byte; `twin` is
    its query-compatible code, if any, `s3_code` its name in S3, if that is another.

    SQS: docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-json-api-responses.html
    S3: docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html (chunked, as S3 sends errors)
    CloudWatch: as SQS since botocore 1.42 (its model also offers smithy.io/2.0/additional-specs/
    protocols/smithy-rpc-v2.html); before, smithy.io/2.0/aws/protocols/aws-query-protocol.html
    """
    request_id, more = "66916324-67ca-54bb-a410-3f567a7a0571", ""
    text = message.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    if target := headers.get("X-Amz-Target"):
        kind = "application/x-amz-json-1.0"
        space = "com.amazonaws.sqs" if target.startswith("AmazonSQS.") else "com.amazonaws.cloudwatch"
        if code.endswith("Exception"):  # of what stands before each service
            space = "com.amazon.coral.service"
        content = json.dumps({"__type": f"{space}#{code}", "message": message}).encode()
    elif "Smithy-Protocol" in headers:
        kind, more = "application/cbor", "smithy-protocol: rpc-v2-cbor\r\n"
        content = cbor({"__type": f"com.amazonaws.cloudwatch#{code}", "message": message})
    elif b"Action=" in body:
        kind = "text/xml"
        space = ("https://sts.amazonaws.com/doc/2011-06-15/" if b"AssumeRole" in body else
                 "http://monitoring.amazonaws.com/doc/2010-08-01/")
        content = (f'<ErrorResponse xmlns="{space}">\n  <Error>\n'
                   f"    <Type>Sender</Type>\n    <Code>{twin or code}</Code>\n    <Message>{text}</Message>"
                   f"\n  </Error>\n  <RequestId>{request_id}</RequestId>\n</ErrorResponse>\n").encode()
    else:
        content = (f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{s3_code or code}</Code><Message>{text}'
                   f"</Message><RequestId>4442587FB7D0A2F9</RequestId><HostId>{request_id}</HostId></Error>")
        return (f"HTTP/1.1 {status} {http.client.responses[status]}\r\n"
                f"x-amz-request-id: 4442587FB7D0A2F9\r\nx-amz-id-2: {request_id}\r\n"
                "Content-Type: application/xml\r\nTransfer-Encoding: chunked\r\n"
                "Date: Wed, 25 Nov 2026 01:00:00 GMT\r\nServer: AmazonS3\r\n\r\n"
                f"{len(content.encode()):x}\r\n{content}\r\n0\r\n\r\n").encode()
    more += f"x-amzn-query-error: {twin};Sender\r\n" if twin else ""
    return (f"HTTP/1.1 {status} {http.client.responses[status]}\r\nx-amzn-RequestId: {request_id}\r\n"
            f"{more}Content-Type: {kind}\r\nContent-Length: {len(content)}\r\n"
            "Date: Wed, 25 Nov 2026 01:00:00 GMT\r\n\r\n").encode() + content


class ProxyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 300

    def handle_request(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        operation = operation_of(self.command, self.path, self.headers, body)
        signed = re.search("Credential=([^/]+)/", self.headers.get("Authorization", ""))
        rule = self.server.proxy.take(operation, self.path, body, signed[1] if signed else "")
        fault = rule.fault if rule else ""
        if said := rule and (rule.said or REFUSALS.get(fault)):
            content = said if isinstance(said, bytes) else as_aws(self.headers, body, *said)
            head = content.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
            return self.wfile.write(content if self.command != "HEAD" else head)
        if fault == "reset":
            self.server.proxy.closing.wait(rule.seconds)
            return self.reset()
        if fault == "black hole":
            self.server.proxy.closing.wait()
            return self.reset()
        if fault == "delay":
            self.server.proxy.closing.wait(rule.seconds)
        if fault == "partial":  # the first half of a batch is taken out
            entries = json.loads(body)["Entries"]
            half = (len(entries) + 1) // 2
            body = json.dumps({**json.loads(body), "Entries": entries[half:]}).encode()
        status, headers, content = self.forward(body)
        if fault == "lost answer":
            return self.reset()
        if fault == "late answer":
            self.server.proxy.closing.wait(rule.seconds)
        if fault == "partial":
            answer = json.loads(content) if b'"Successful"' in content else {"Successful": []}
            failed = {"SenderFault": False, "Code": "InternalError", "Message": "try again"}
            content = json.dumps({**answer, "Failed": [
                *answer.get("Failed", []), *({"Id": one["Id"], **failed} for one in entries[:half])]}).encode()
        if operation == "ReceiveMessage" and status == 200:
            self.server.proxy.received += json.loads(content or b"{}").get("Messages") or []
        if fault == "emulator":
            headers.pop("ETag", None)
            content = re.sub(rb'"SentTimestamp": "\d+",? ?', b"", content)
        self.answer(status, headers, content, cut=fault == "truncated", ends=fault == "emulator")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_request

    def forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        backend = http.client.HTTPConnection(self.server.proxy.backend, timeout=300)
        headers = {**self.headers, "Content-Length": str(len(body)), "Connection": "close"}
        headers.pop("Expect", None)
        try:
            backend.request(self.command, self.path, body, headers)
            response = backend.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            backend.close()

    def answer(self, status: int, headers: dict[str, str], content: bytes, cut: bool = False,
               ends: bool = False):
        """Send the answer; `cut`: half of it, then end the connection; `ends`: that ends it."""
        length = headers.get("Content-Length") if self.command == "HEAD" else None
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        if ends:
            self.send_header("Connection", "close")  # sets close_connection, too
        else:
            self.send_header("Content-Length", length or str(len(content) + (16 if cut else 0)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:len(content) // 2] if cut else content)
        if cut:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def reset(self):
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.rfile.close()
        self.connection.close()

    def finish(self):
        with contextlib.suppress(OSError, ValueError):
            super().finish()

    def log_message(self, *_):
        pass


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_):
        """A client that goes away, or a backend that does, is what these tests are about."""


class FaultProxy:
    """Stands before `url`; `fail("DeleteMessage*", "reset", times=2)` until `heal()`.

    Faults: those of REFUSALS; "reset" (after seconds=); "black hole" (read, never answered, not even after heal());
    "delay" (seconds=, then done); "late answer" (done, then seconds=); "lost answer" (done, then
    reset); "truncated" (half a body); "partial" (half of a batch's entries fail); "emulator" (done,
    but no SentTimestamp, ETag and Content-Length is told).
    `requests` is what came, `received` the messages that were given out; `expired` are access keys
    that are answered as AWS answers expired ones.
    """

    def __init__(self, url: str):
        self.backend = urllib.parse.urlsplit(url).netloc
        self.requests: list[Seen] = []
        self.received: list[dict] = []
        self.rules: list[Rule] = []
        self.expired: set[str] = set()
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self.server = QuietServer(("127.0.0.1", 0), ProxyHandler)
        self.server.proxy = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def fail(self, pattern: str, fault: str, times: int | None = None, seconds: float = 0.0, said=()):
        with self.lock:
            self.rules.append(Rule(pattern, fault, times, seconds, said))

    def heal(self):
        with self.lock:
            self.rules.clear()

    def take(self, operation: str, path: str, body: bytes, key: str) -> Rule | None:
        """The rule that this request falls under, used up by one; the request is noted."""
        with self.lock:
            found = next((rule for rule in self.rules if rule.times != 0 and (
                matches(rule.pattern, operation) or matches(rule.pattern, f"{operation} {path}"))),
                         None)
            if found and found.times:
                found.times -= 1
            found = Rule("*", "expired") if key in self.expired else found
            fault = found.fault if found else ""
            self.requests.append(Seen(time.monotonic(), operation, fault, path, body, key))
            return found

    def seen(self, pattern: str, fault: str = "*") -> list[Seen]:
        """The requests of these operations that failed so."""
        with self.lock:
            return [seen for seen in self.requests
                    if matches(pattern, seen.operation) and fnmatch.fnmatch(seen.fault, fault)]

    def count(self, pattern: str, fault: str = "*") -> int:
        return len(self.seen(pattern, fault))

    def until(self, pattern: str, fault: str = "*", times: int = 1):
        """Wait for so many of them."""
        until(lambda: self.count(pattern, fault) >= times, what=f"{times} of {pattern}")

    def bodies(self, pattern: str) -> list[dict]:
        """What they asked for, of operations that ask in JSON."""
        return [json.loads(seen.body) for seen in self.seen(pattern)]


class Aws:
    """A queue with its DLQ, a bucket and an application.yml of their own, in an emulator."""

    def __init__(self, url: str, path: Path, visibility: int = 30, receives: int = 3, name: str = "",
                 bucket: str = ""):
        self.url, self.path, self.name = url, path, name or "q-" + os.urandom(4).hex()
        self.env = {**AWS_ENV, "AWS_ENDPOINT_URL": url}
        self.sqs, self.s3, self.cloudwatch = (
            client_of(url, service) for service in ("sqs", "s3", "cloudwatch"))
        self.dlq_url = self.sqs.create_queue(QueueName=self.name + "-dlq")["QueueUrl"]
        arn = self.sqs.get_queue_attributes(
            QueueUrl=self.dlq_url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
        self.queue_url = self.sqs.create_queue(QueueName=self.name, Attributes={
            "VisibilityTimeout": str(visibility), "ReceiveMessageWaitTimeSeconds": "20", "RedrivePolicy":
            json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": receives})})["QueueUrl"]
        self.bucket = bucket or self.name + "-code"
        self.s3.create_bucket(Bucket=self.bucket,
                              CreateBucketConfiguration={"LocationConstraint": "ap-northeast-2"})

    def config(self, extra: str = "", wait: int = 1) -> Path:
        """application.yml for this queue; `extra` is YAML under `agent:`, indented by two."""
        path = self.path / "application.yml"
        path.write_text(f"agent:\n  aws:\n    region: ap-northeast-2\n  sqs:\n    queueUrl: {self.queue_url}\n"
                        f"    waitTimeSeconds: {wait}\n  s3:\n    codeBucket: {self.bucket}\n"
                        f"  taskBaseDir: {self.path / 'task'}\n" + extra)
        return path

    def results_queue(self) -> str:
        return self.sqs.create_queue(QueueName=self.name + "-results")["QueueUrl"]

    def put(self, files, key: str = "fn.zip"):
        self.s3.put_object(Bucket=self.bucket, Key=key,
                           Body=files if isinstance(files, bytes) else make_zip(files))

    def send(self, request_id="r1", function_id="fn", key="fn.zip", runtime="python", body=None, **task) -> str:
        task = {"requestId": request_id, "functionId": function_id, "runtime": runtime,
                "s3Key": key, "timeoutMs": 60000, "memoryMb": 256, **task}
        return self.sqs.send_message(QueueUrl=self.queue_url, MessageBody=body or json.dumps(task))["MessageId"]

    def agent(self, *args, wait: int = 1, env=None, prefix=None, patch="", **sections) -> Agent:
        """An agent of this site; sections of its settings as dicts: execution={"concurrency": 1}."""
        extra = ""
        for name, values in sections.items():
            extra += f"  {name}:\n" + "".join(f"    {key}: {value}\n" for key, value in values.items())
        return Agent("--config", self.config(extra, wait), *args, env={**self.env, **(env or {})},
                     prefix=[*(self.prefix if prefix is None else prefix), *patched(patch)])

    def job(self, request_id: str = "r1", sleep: float = 0, exit: int = 0, **task) -> str:
        """Send a task for MARKER; its message id."""
        told = {"marks": str(self.path / "marks"), "sleep": sleep, "exit": exit}
        return self.send(request_id, input=told, **task)

    def count(self, url: str | None = None, *states: str) -> int:
        """Messages in a queue (the main one by default), visible or in flight or delayed."""
        names = [f"ApproximateNumberOfMessages{state}" for state in states or ("", "NotVisible", "Delayed")]
        got = self.sqs.get_queue_attributes(QueueUrl=url or self.queue_url, AttributeNames=names)["Attributes"]
        return sum(int(got[name]) for name in names)


@contextlib.contextmanager
def site(moto: str, **options):
    """An Aws of its own whose agents go through a FaultProxy, `aws.proxy`; MARKER is at fn.zip."""
    with scratch() as path, FaultProxy(moto) as proxy:
        aws = Aws(moto, path, **options)
        aws.proxy, aws.prefix = proxy, ()
        aws.env["AWS_ENDPOINT_URL"] = proxy.url
        aws.put(marker())
        yield aws


@pytest.fixture
def aws(moto):
    """A site whose messages come back after ten minutes."""
    with site(moto, visibility=600) as aws:
        yield aws


def until_settled(aws: Aws, agent: Agent, in_dlq: int = 0, seconds: float = 180):
    """Wait until the queue is empty and the dead-letter queue holds as many messages."""
    def settled():  # a message that becomes visible between two counts is in neither: look again
        return not aws.count() and not aws.count() and dead(aws) == in_dlq

    try:
        until(settled, seconds, "the end of all messages")
    except AssertionError as error:
        raise AssertionError(f"{error}: {aws.count()} are in the queue and {dead(aws)} in the DLQ; "
                             f"the log:\n{agent.log}") from None


def finish(aws: Aws, agent: Agent, runs=None, ends=None, in_dlq: int = 0, seconds: float = 180):
    """All messages end, then the agent. `runs`: how often each request ran; `ends`: how many turns
    ended with each status."""
    until_settled(aws, agent, in_dlq, seconds)
    assert agent.stop() == 0
    assert runs is None or runs_in(aws.path) == runs, agent.log
    assert ends is None or Counter(statuses(agent.log)) == ends, agent.log


def visible(aws: Aws, url: str | None = None) -> int:
    """Messages that a receive would get now."""
    return aws.count(url, "")


def dead(aws: Aws) -> int:
    """Messages in the dead-letter queue."""
    return aws.count(aws.dlq_url)


def metric_points(aws: Aws, function_id: str) -> list[dict]:
    """The PeakMemoryBytes values that CloudWatch holds for a function, by both dimensions."""
    return aws.cloudwatch.get_metric_statistics(
        Namespace="NanoGrid/FunctionRunner", MetricName="PeakMemoryBytes", Period=86400, Unit="Bytes",
        StartTime=time.time() - 86400, EndTime=time.time() + 86400, Statistics=["SampleCount", "Maximum"],
        Dimensions=[{"Name": "FunctionId", "Value": function_id},
                    {"Name": "Runtime", "Value": "python"}])["Datapoints"]


def metric_values(aws: Aws, function_id: str) -> float:
    """How many they are."""
    return sum(point["SampleCount"] for point in metric_points(aws, function_id))


# --------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------


# --- parse_yaml

def refusal(text: str) -> str:
    with pytest.raises(ng.ConfigError) as refused:
        ng.parse_yaml(text, "f.yml")
    return str(refused.value)


def same(one, other) -> bool:
    """Equal in value, type and order; nan is nan."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or isinstance(one, float) and math.isnan(one) and math.isnan(other)


# What is read as YAML 1.2 reads it: the oracle, below, says as what.
VALUES = [
    # null, bool
    "", "~", "null", "Null", "NULL", "# x", "nULL", "none", "true", "True", "TRUE", "false",
    "False", "FALSE", "tRue", "yes", "NO", "on", "off", "y",
    # int
    "0", "7", "-7", "+7", "0777", "-0", "0o17", "0x1F", "0xff", "-0o17", "+0x1", "0o8", "0O7",
    "0X1", "0b1", "1_000", "１２", "²", "1,000", "12:30", "190:20:30", "2026-11-22", "1 2", "--1",
    "+", "9" * 300, "'" + "9" * 5000 + "'",
    # float
    "1.5", "1.", ".5", "-.5", "+1.5", "1e3", "1E-3", "1.5e+3", "1e", "e3", ".", ".e3", "1.2.3",
    ".inf", "-.INF", "+.Inf", "inf", ".iNf", ".nan", ".NaN", ".NAN", "nan", "-.nan", "1_0.5",
    "1e999", "0.",
    # plain text
    "https://h/q", "http://x/y#frag", "a#b", "a #b", "a   # b # c", "a  b", "a  ", "a:b", "a :b",
    "-a", ":a", "?a", "::a", "--- ", "a'b\"c", "a [b] {c}, d", "$a", "${A:b}", "<<", "=",
    "a & b", "서울", "a\u3000", "\u3000a", "\xa0", "\U0001f600", "\\n",
    # quoted
    "''", "'a'", "'it''s'", "''''", "'a # b: c'", r"'\n'", "'12'", "'true' # c", "'a\tb'", "' '",
    '""', '"a: b"', '"12"', '"null"', '"a" # "', r'"\0\a\b\t\n\v\f\r\e\ \"\/\\\N\_\L\P"',
    r'"\x41\u00e9\U0001F600"', '"\\\t"', r'"\\n"',
    # empty collections
    "[]", "{}", "[ ]", "{  } # c", "[] # c",
]
REFUSED_VALUES = [
    "-", "9" * 301, "0x" + "f" * 5000, "0o" + "7" * 5000, "a: b: c", "a:", r'"\x4"', r'"\u12"',
    r'"\U00110000"', r'"\ud83d\ude00"', r'"\q"', r'"\'"', r'"\x٣٣"', r'"\xg0"', "'a", '"a',
    '"a\\"', "'a''", "'a'b", '"a" b', '"a"#b', "'a': b", "'a' 'b'", "[]#c", "[1, 2]", "{a: 1}",
    "[] []", "&x", "&x 1", "*x", "!!str 1", "!t", "|", "|-", ">", ">2", "@x", "%x", "`x", ",x",
    "]", "}", "- a", "- ", "? a", "?", ":", ": a", "a\tb", "a\t", "a\t# c", "'a'\t", "\ta",
    "# \x07", "a\x00", "\x7f", "\x80", "a\rb", "\ufeff", "\ufffe", "\ud800", "a\x0cb",
]
DOCUMENTS = [
    "", "\n\n", "# c", "---", "--- # c\n", "---   # c", "\ufeff", "{}", "---\n{ } # c\n",
    "\ufeff---\r\n# 주석\r\na: 1\r\n", "# c\n---\na: 1", "a: 1", "a:", "a:\nb: 1", "a : 1",
    "  a: 1\n  b: 2\n", "a: 1\r", "a:   \n  b:  1 ", "1: a", "true: a", "~: a", "<<: a",
    "'a: b': 1", r'"a\tb" : 1', '"": 1', "a b: 1", "a#b: 1", "::  a", "-a: 1", "---a: 1",
    "a:b: c", "키: 값", "...a: 1", "a:\n  b:\n    c: 1\n  d: 2\ne: 3",
    "a:\n\n # c\n  b: 1\n# c\n\n  c: 2", "a: # c\n  b: 1", "a: #\nb: 1", "a:\n- 1\n- x\nb: 2",
    "a:\n  - 1\n  - 2\nb: 2", "a:\n  b:\n  - 1\n  c: 2",
    "a:\n-\n- # c\n-   x # c\n- 'y'\n- -1\n- -b", "a:\n\n# c\n- 1\n\n  # c\n- 2", "a:\n - ---\n",
    "a: [] # none\nb: {}\nc: 1", "a: 'b'\nc: d",
]


@parametrize("text", VALUES + REFUSED_VALUES)
def test_a_value_is_read_as_yaml_1_2_reads_it_or_refused(text):
    layouts = [f"k: {text}", f"a: 1\nk: {text}\nz: 1\n", f"m:\n  k: {text}\r\n"]
    if text in REFUSED_VALUES:
        for document in layouts:
            line = document[:document.index("k:")].count("\n") + 1
            assert re.fullmatch(rf"f\.yml:{line}: .+; .+", refusal(document))
    else:
        in_list = [f"k:\n- {text}\n- 1"] * (text[:1] not in ("[", "{"))
        for document in layouts + in_list:
            assert same(ng.parse_yaml(document), oracle(document))


@parametrize("text", DOCUMENTS)
def test_documents(text):
    assert same(ng.parse_yaml(text), oracle(text))


def test_what_yaml_1_1_took_for_line_ends_is_text():
    """PyYAML still does."""
    assert ng.parse_yaml("\x85: a\u2028b\nc: a\x85b") == {"\x85": "a\u2028b", "c": "a\x85b"}


@parametrize("text, line, word", [
    ("a", 1, "no `key: value`"), ("a: 1\nb", 2, "no `key: value`"), ("a:1", 1, "space"),
    ('"a":1', 1, "space"), ("- a", 1, "list item"), ("a: 1\n- b", 2, "list item"),
    ("null", 1, "key"), ("{a: 1}", 1, "braces"), ("[]: 1", 1, "brackets"), (": a", 1, "key"),
    ("? a\n: b", 1, "key"), ("a: 1\nb: 2\na: 3", 3, "'a' stands in line 1"),
    ("a: 1\n'a': 3", 2, "line 1"), ("a:\n  b: 1\n  c: 1\n  b: 1", 4, "line 2"),
    ("1: a\n\"1\": b", 2, "line 1"), ("a:\n    b: 1\n  c: 1", 3, "indent"),
    ("a: 1\n  b: 2", 2, "indent"), ("  a: 1\nb: 1", 2, "indent"),
    ("a:\n  b: 1\n c: 1", 3, "indent"), ("a: b\n  c", 2, "line above"),
    ("a: 'b'\n  c", 2, "line above"), ("a: b\n\n# c\n  d", 4, "line above"),
    ("a: 'b\n  c'", 1, "not closed"), ('a: "b\\\n  c"', 1, "not closed"),
    ("a:\n  b", 2, "key's line"), ("a:\n  'b'", 2, "key's line"), ("a:\n  []", 2, "brackets"),
    ("a: []\n  - 1", 2, "indent"), ("a: {}\n  b: 1", 2, "indent"),
    ("a:\n- 1\n  x", 3, "line above"), ("a:\n- 1\n  - 2", 3, "indent"), ("a:\n-\n  x", 3, "indent"),
    ("a:\n-\n  b: 1", 3, "indent"), ("a:\n  - 1\n- 2", 3, "list item"),
    ("a:\n  - 1\n  b: 2", 3, "indent"), ("a:\n  - 1\n - 2", 3, "indent"),
    ("a:\n- b: 1", 2, "': 1' after"), ("a:\n- - 1", 2, "list item"), ("a:\n- [1]", 2, "brackets"),
    ("a:\n- []", 2, "brackets"), ("a:\n- {}", 2, "braces"), ("a:\n- 'b': 1", 2, "after"),
    ("a: - 1", 1, "list item"), ("a:\n- &x 1", 2, "anchor"), ("\ta: 1", 1, "tab"),
    ("a:\n\tb: 1", 2, "tab"), ("a:\n  \tb: 1", 2, "tab"), ("a:\tb", 1, "tab"), ("a\t: b", 1, "tab"),
    ("'a'\t: b", 1, "tab"), ("a:\n-\tb", 2, "tab"), ("a: 1\t", 1, "tab"), ("a: 1\t# c", 1, "tab"),
    ("\t# c", 1, "tab"), ("a: 1\n\t\n", 2, "tab"), ("?\ta", 1, "tab"), ("a: &b 1", 1, "anchor"),
    ("a: *b", 1, "alias"), ("a: !!int 1", 1, "tag"), ("a: |\n  b", 1, "block"),
    ("a: >-\n  b", 1, "block"), ("a: {b: 1}", 1, "braces"), ("a: [b]", 1, "brackets"),
    ("&a b: 1", 1, "anchor"), ("!!map\na: 1", 1, "tag"), ("%YAML 1.2\n---\na: 1", 1, "directive"),
    ("@a: 1", 1, "@"), ("a: `b`", 1, "`"), ("a: 'b\nc: 1", 1, "not closed"),
    ("a: b: c", 1, "': c' after"), ("a: 'b' c", 1, "'c'"), ("---\na: 1\n---\nb: 1", 3, "document"),
    ("a: 1\n---\n", 2, "document"), ("---\n---", 2, "document"), ("a: 1\n...\n", 2, "document"),
    ("...", 1, "document"), ("--- a: 1", 1, "text after"), ("---\ta: 1", 1, "text after"),
    ("---\t", 1, "text after"), ("---\n{}\na: 1", 3, "one indent"), ("[]", 1, "brackets"),
    ("a: 'b''", 1, "not closed"), ("a: 1\rb: 2", 1, "U+000D"), ("a: 1\r\r\n", 1, "U+000D"),
    ("\ufeff\ufeffa: 1", 1, "U+FEFF"), ("a: 1\n# \x1b[0m", 2, "U+001B"), ("a: '\x00'", 1, "U+0000"),
    (r'a: "\q"', 1, r"\q is no escape"),
])
def test_what_is_outside_of_the_subset_is_refused_with_its_line(text, line, word):
    problem = refusal(text)
    assert re.fullmatch(rf"f\.yml:{line}: .+; .+", problem) and word in problem


def test_deep_maps_end_in_a_refusal_not_in_a_recursion_error():
    def nested(depth):
        return "".join(f"{' ' * level}a:\n" for level in range(depth))

    assert ng.parse_yaml(nested(50))["a"]["a"]["a"]
    assert "too deep" in refusal(nested(5000))


CORE = [  # YAML 1.2.2, 10.3.2, a second time and for PyYAML's nodes, which know 1.1 only
    (r"null|Null|NULL|~|", lambda text: None), (r"true|True|TRUE", lambda text: True),
    (r"false|False|FALSE", lambda text: False), (r"[-+]?[0-9]+", int),
    (r"0o[0-7]+|0x[0-9a-fA-F]+", lambda text: int(text, 0)),
    (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", float),
    (r"[-+]?\.(inf|Inf|INF)", lambda text: -math.inf if text[0] == "-" else math.inf),
    (r"\.(nan|NaN|NAN)", lambda text: math.nan)]


def oracle(text: str) -> dict:
    """What PyYAML reads, typed by the core schema; an exception for what is no YAML or no map."""
    def value(node):
        if isinstance(node, yaml.SequenceNode):
            return [value(item) for item in node.value]
        if isinstance(node, yaml.MappingNode):
            pairs = [(key.value, value(item)) for key, item in node.value]
            assert len({key for key, _ in pairs}) == len(pairs)
            return dict(pairs)
        assert node.style not in ("|", ">")
        types = [typed for pattern, typed in CORE if re.fullmatch(pattern, node.value)]
        return types[0](node.value) if types and node.style is None else node.value

    node = yaml.compose(text, yaml.SafeLoader)
    return {} if node is None or node.tag.endswith(":null") else value(node)


KEYS = ["a", "b c", "queueUrl", "'q: k'", '"d\\u0041"', "1", "true", "키", "-x", "a#b", "http://k"]
SCALARS = [text for text in VALUES if len(text) < 99 and text[:1] not in ("[", "{")]


def random_document(rng: random.Random) -> str:
    """A document in the subset, over all of its layouts."""
    lines = ["---"] * rng.randrange(2)

    def noise():
        lines.extend(rng.choices(["", "   ", "# c", "      # c: d"], k=rng.choice([0, 0, 0, 1, 2])))

    def comment():
        return rng.choice(["", "", "", " ", "  # c", " # 'x: y"])

    def block(indent: int, depth: int):
        for key in rng.sample(KEYS, rng.randrange(1, 5)):
            noise()
            head = " " * indent + key + rng.choice([":", ":", " :"])
            kind = rng.random()
            if kind < 0.6:
                value = rng.choice([*SCALARS, "[]", "{}", "[ ]"])
                lines.append(f"{head}{' ' * rng.randrange(1, 4)}{value}{comment()}")
            elif kind < 0.8:
                lines.append(head + comment())
                deeper = indent + rng.choice([0, 0, 1, 2, 4])
                for _ in range(rng.randrange(4)):
                    noise()
                    item = rng.choice(["-", f"- {rng.choice(SCALARS)}"])
                    lines.append(" " * deeper + item + comment())
            else:
                lines.append(head + comment())
                if depth < 4:
                    block(indent + rng.choice([1, 2, 2, 4]), depth + 1)

    block(rng.choice([0, 0, 0, 2]), 0)
    text = rng.choice(["\n", "\r\n"]).join(lines)
    return rng.choice(["", "\ufeff"]) + text + rng.choice(["", "\n"])


@parametrize("seed", range(4))
def test_random_documents_whole_or_damaged_are_refused_or_read_as_pyyaml_reads_them(seed):
    rng = random.Random(seed)
    for _ in range(150):
        text = random_document(rng)
        assert same(ng.parse_yaml(text), oracle(text)), text
    pieces = [*" \n\t:-#'\"?,[]{}&*!|>%@`\\ab01.~\r$=", ": ", "- ", " #", "\n  ", "\n- ", "---\n",
              "...\n", "\\x41", "\xa0", "\ufeff"]
    accepted = 0
    for _ in range(800):
        text = list(random_document(rng))
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(text) + 1)
            text[at:at + rng.randrange(2)] = [rng.choice(pieces)] * rng.randrange(2)
        try:
            value = ng.parse_yaml("".join(text))
        except ng.ConfigError:
            continue
        accepted += 1
        assert same(value, oracle("".join(text))), "".join(text)
    assert 100 < accepted < 800


# --- Settings

QUEUE = "https://sqs.ap-northeast-2.amazonaws.com/123456789012/nanogrid-task-queue"
GUIDE = f"""agent:
  # AWS settings
  aws:
    region: ap-northeast-2  # Seoul region

  # SQS settings
  sqs:
    queueUrl: {QUEUE}
    # ↑ put your real AWS account id in place of YOUR_ACCOUNT_ID
    waitTimeSeconds: 20
    maxNumberOfMessages: 10

  # S3 settings
  s3:
    codeBucket: nanogrid-code-bucket
    # ↑ put the name of the bucket that you created
"""
SPRING = f"""spring:
  application:
    name: nanogrid-agent
server:
  port: 8080
logging:
  pattern:
    console: "%d{{HH:mm:ss}} %-5level - %msg%n"
{GUIDE}
  docker:
    images:
      python: python:3.11-slim
  warmPool:
  polling:
    enabled: true
  redis:
    port: 6379
  taskBaseDir: /tmp/task
"""
ENOUGH = {"AGENT_AWS_REGION": "ap-northeast-2", "AGENT_SQS_QUEUEURL": QUEUE,
          "AGENT_S3_CODEBUCKET": "code-bucket"}


def load(tmp_path, text: str, environ=None, local=False):
    path = tmp_path / "application.yml"
    path.write_text(text, encoding="utf-8")
    return ng.load_settings(path, environ or {}, local)


def problems(tmp_path, text: str, environ=None, local=False) -> list[str]:
    """The problems, with the folder taken off the file's name."""
    with pytest.raises(ng.ConfigError) as refused:
        load(tmp_path, text, environ, local)
    return str(refused.value).replace(f"{tmp_path}/", "").split("\n")


def test_the_guides_file_loads_and_the_spring_boot_agents_with_a_warning_for_each_section(tmp_path):
    settings, warnings = load(tmp_path, GUIDE)
    assert not warnings
    assert (settings.region, settings.queue_url) == ("ap-northeast-2", QUEUE)
    assert (settings.code_bucket, settings.wait_time_seconds) == ("nanogrid-code-bucket", 20)
    springs, warnings = load(tmp_path, SPRING)
    assert springs == settings
    sections = ["spring", "server", "logging", "agent.docker", "agent.warmPool", "agent.polling",
                "agent.redis"]
    assert [re.search(r"yml:\d+: (\S+) is for the Spring", one)[1] for one in warnings] == sections
    assert "application.yml:1: spring" in warnings[0]


def document(path: str, value: str) -> str:
    """A file whose last line gives agent.PATH a value."""
    *sections, key = path.split(".")
    return "agent:\n" + "".join(f"  {section}:\n  " for section in sections) + f"  {key}: {value}"


def test_defaults():
    settings, warnings = ng.load_settings(None, {}, local=True)
    assert settings == ng.Settings() and not warnings
    assert settings.concurrency == len(os.sched_getaffinity(0)) and settings.memory_mb >= 1
    assert (settings.region, settings.queue_url, settings.run_as) == (None, None, None)
    assert (settings.default_timeout_ms, settings.default_memory_mb) == (10000, 128)
    assert (settings.allowed_buckets, settings.python, settings.go) == ((), None, None)
    assert (settings.output_prefix, settings.task_base_dir) == ("outputs", "/tmp/task")


def test_each_of_several_agents_has_its_share_of_cores_and_of_memory_less_a_reserve(monkeypatch):
    alone, cores = ng.Settings(), len(os.sched_getaffinity(0))
    machine = int(re.search(r"MemTotal: +(\d+)", Path("/proc/meminfo").read_text())[1]) // 1024
    assert abs(alone.memory_mb - max(1, machine - max(256, machine // 10))) <= 16
    monkeypatch.setenv("NANOGRID_AGENTS", "4")
    assert ng.Settings().concurrency == max(1, cores // 4)
    assert ng.Settings().memory_mb == alone.memory_mb // 4
    for text in ("0", "-1", "four", "1000", "1.5"):
        monkeypatch.setenv("NANOGRID_AGENTS", text)
        with pytest.raises(ng.ConfigError, match=f"^NANOGRID_AGENTS: is '{text}'; write how many"):
            ng.load_settings(None, {}, local=True)


def test_the_table_names_every_field_once_and_its_default_lies_within_its_limits():
    names = [row.field for row in ng.SETTINGS]
    assert [*dict.fromkeys(names), "file"] == [one.name for one in dataclasses.fields(ng.Settings)]
    assert len({row.path for row in ng.SETTINGS}) == len(ng.SETTINGS)
    for row in ng.SETTINGS:
        if row.kind == "count":
            assert row.low <= getattr(ng.Settings(), row.field) <= row.high


ROLE_ARN = "arn:aws:iam::123456789012:role/path/fn"
# path: (values of the file and the environment that are not the default, and as what they are read, if not as YAML)
SET = {
    "aws.endpointUrl": ["http://localhost:5000"], "aws.spotInterruption": ["true"],
    "sqs.waitTimeSeconds": ["0"], "sqs.maxNumberOfMessages": ["1"], "s3.codeBucket": ["other.bucket"],
    "execution.concurrency": ["3"], "execution.memoryMb": ["0x100"],
    "execution.defaultTimeoutMs": ["43200000"], "execution.shutdownGraceSeconds": ["0"],
    "execution.patienceSeconds": ["0"], "execution.network": ["none"], "execution.metadata": ["allow"],
    "execution.functionRole": [ROLE_ARN], "execution.runAs": [("1000", "1000"), "nobody"],
    "execution.warmStart": ["false"], "execution.maxOpenFiles": ["64"], "execution.maxProcesses": ["8"],
    "execution.maxFileMb": ["9"], "execution.maxDiskMb": ["9"], "execution.maxFiles": ["9"],
    "runtimes.python": ["/usr/bin/python3"], "runtimes.cpp": ["g++"], "runtimes.go": ["go"],
    "output.bucket": ["results"], "output.s3Prefix": [("a/b/", "a/b"), ("/", "")],
    "output.queueUrl": [QUEUE], "metrics.namespace": ["Mine/Runs"], "metrics.flushSeconds": ["60"],
    "taskBaseDir": ["/srv/task"],
}


@parametrize("path", SET)
def test_each_setting_comes_from_the_file_and_from_its_variable(tmp_path, path):
    field = re.sub("[A-Z]", lambda capital: "_" + capital[0].lower(), path.rpartition(".")[2])
    field = {"output.bucket": "output_bucket", "output.s3Prefix": "output_prefix",
             "output.queueUrl": "output_queue_url"}.get(path, field)
    for value in SET[path]:
        text, wanted = value if isinstance(value, tuple) else (value, oracle(f"k: {value}")["k"])
        in_file, _ = load(tmp_path, document(path, text), local=True)
        assert getattr(in_file, field) == wanted != getattr(ng.Settings(), field)
        variable = "AGENT_" + path.upper().replace(".", "_")
        in_environment, _ = ng.load_settings(None, {variable: text}, local=True)
        assert in_environment == in_file


BUCKETS, REGION = "agent:\n  s3:\n    allowedBuckets:\n    - in-file\n", "agent:\n  aws:\n    region: us-east-1\n"
NO_ACCOUNT = GUIDE.replace("123456789012", "YOUR_ACCOUNT_ID")


@parametrize("text, environ, field, value", [
    # lists, in both of Spring's ways
    (BUCKETS, {}, "allowed_buckets", ("in-file",)),
    (BUCKETS, {"AGENT_S3_ALLOWEDBUCKETS": ""}, "allowed_buckets", ("in-file",)),
    (BUCKETS, {"AGENT_S3_ALLOWEDBUCKETS": "one"}, "allowed_buckets", ("one",)),
    (BUCKETS, {"AGENT_S3_ALLOWEDBUCKETS": "one, two,"}, "allowed_buckets", ("one", "two")),
    (BUCKETS, {"AGENT_S3_ALLOWEDBUCKETS_1": "two", "AGENT_S3_ALLOWEDBUCKETS_0": "one"},
     "allowed_buckets", ("one", "two")),
    (BUCKETS, {f"AGENT_S3_ALLOWEDBUCKETS_{n}": f"b-{n}" for n in range(11)},
     "allowed_buckets", tuple(f"b-{n}" for n in range(11))),
    # AWS's own variables, which --local does not look at
    (REGION, {"AGENT_AWS_REGION": "eu-west-1", "AWS_REGION": "x"}, "region", "eu-west-1"),
    (REGION, {"AWS_REGION": "eu-west-1"}, "region", "us-east-1"),
    (REGION, {"AGENT_AWS_REGION": "", "AWS_REGION": "x"}, "region", "us-east-1"),
    ("", {"AWS_REGION": "eu-west-1", "AWS_DEFAULT_REGION": "eu-west-2"}, "region", "eu-west-1"),
    ("", {"AWS_REGION": "", "AWS_DEFAULT_REGION": "eu-west-2"}, "region", "eu-west-2"),
    (REGION, {"AWS_ENDPOINT_URL": "http://localhost:5000"}, "endpoint_url", "http://localhost:5000"),
    (NO_ACCOUNT.replace("ap-northeast-2  #", " #"), {"AWS_REGION": "?", "local": "1"}, "region", None),
    (NO_ACCOUNT, {"AWS_ENDPOINT_URL": "localhost", "local": "1"}, "endpoint_url", None),
    # right queue URLs
    *(("", {"AGENT_AWS_REGION": "ap-northeast-2", "AGENT_SQS_QUEUEURL": url}, "queue_url", url) for url in [
        "http://localhost:5000/123456789012/q", "http://127.0.0.1:9324/queue/q", "http://[::1]:5000/1/q",
        "http://sqs.us-east-1.localhost.localstack.cloud:4566/000000000000/q", "http://elastic_mq:9324/q", QUEUE]),
    # a wrong value in the file does not matter where the environment wins
    (NO_ACCOUNT, {}, "queue_url", "http://localhost:5000/123456789012/q"),
    (GUIDE.replace("Seconds: 20", "Seconds: 99"), {"AGENT_SQS_WAITTIMESECONDS": " 5"}, "wait_time_seconds", 5),
])
def test_where_a_setting_comes_from(tmp_path, text, environ, field, value):
    needed = {"AGENT_AWS_REGION": "", "AGENT_S3_CODEBUCKET": "code-bucket", "AWS_REGION": "eu-west-3",
              "AGENT_SQS_QUEUEURL": "http://localhost:5000/123456789012/q"}
    is_local = "local" in environ
    settings, _ = load(tmp_path, text, environ if is_local else {**needed, **environ}, is_local)
    assert getattr(settings, field) == value


MISSING = "is missing; write it in application.yml, or set "
ALL_MISSING = ["agent.aws.region " + MISSING + "AGENT_AWS_REGION or AWS_REGION or AWS_DEFAULT_REGION",
               "agent.sqs.queueUrl " + MISSING + "AGENT_SQS_QUEUEURL",
               "agent.s3.codeBucket " + MISSING + "AGENT_S3_CODEBUCKET"]


@parametrize("text, environ, found", [
    (GUIDE.replace("codeBucket", "code-bucket").replace("Messages: 10", "Messages: yes")
     .replace("waitTimeSeconds: 20", "waitTimeSeconds: 30") + "server: 1\nsqs: 1\n",
     {"AGENT_EXECUTION_MEMORYMB": "lots"}, [
         "15: agent.s3.code-bucket is no known key; the nearest is agent.s3.codeBucket",
         "18: sqs is no known key; the nearest is agent.sqs",
         "10: agent.sqs.waitTimeSeconds is 30; SQS allows 0 to 20",
         "11: agent.sqs.maxNumberOfMessages is 'yes'; write a whole number, without quotes",
         "14: " + ALL_MISSING[2],
         "AGENT_EXECUTION_MEMORYMB: agent.execution.memoryMb is 'lots'; write a whole number, without quotes"]),
    (NO_ACCOUNT.replace("region: ap-northeast-2", "region: us-east-1"), {}, [
        "8: agent.sqs.queueUrl still holds YOUR_ACCOUNT_ID; ",
        "8: agent.sqs.queueUrl is in ap-northeast-2, but agent.aws.region (or AWS_REGION) is 'us-east-1'; "]),
    ("", {}, [f"1: {each}" for each in ALL_MISSING]),
    ("agent:\n  aws:\n    region:\n  sqs:\n    waitTimeSeconds: 1\n", {},
     [f"{line}: {each}" for line, each in zip((3, 4, 1), ALL_MISSING)]),
    ("# c\nagent:\n  sqs:\n    queueUrl: ~\n", {},
     [f"{line}: {each}" for line, each in zip((1, 4, 1), ALL_MISSING)]),
    # without a file, a problem is a variable's
    (None, {}, ["AGENT_AWS_REGION: agent.aws.region is missing; ", "AGENT_SQS_QUEUEURL: ", "AGENT_S3_CODEBUCKET: "]),
    (None, {**ENOUGH, "AGENT_SQS_WAITTIMESECONDS": "30", "AGENT_S3_ALLOWEDBUCKETS": "a,s3://b",
            "AGENT_EXECUTION_WARMSTART": "no", "AGENT_EXECUTION_MAXFILES": "9" * 5000, "AWS_ENDPOINT_URL": "localhost"},
     ["AWS_ENDPOINT_URL: ", "AGENT_SQS_WAITTIMESECONDS: agent.sqs.waitTimeSeconds is 30; SQS allows 0 to 20",
      "AGENT_S3_ALLOWEDBUCKETS: ", "AGENT_S3_ALLOWEDBUCKETS: ", "AGENT_EXECUTION_WARMSTART: ",
      "AGENT_EXECUTION_MAXFILES: "]),
    *((None, {**ENOUGH, name: ""}, [f"{name}: is no setting; the nearest is AGENT_{nearest}"]) for name, nearest in [
        ("AGENT_SQS_QUEUE_URL", "SQS_QUEUEURL"), ("AGENT_QUEUEURL_0", ""), ("AGENT_", ""),
        ("AGENT_WARMPOOLS_ENABLED", "")]),
])
def test_all_problems_are_named_at_once(tmp_path, text, environ, found):
    """Each by the line of the file or by the variable."""
    with pytest.raises(ng.ConfigError) as refused:
        load(tmp_path, text, environ) if text is not None else ng.load_settings(None, environ, local=False)
    problems = str(refused.value).replace(f"{tmp_path}/application.yml:", "").split("\n")
    assert len(problems) == len(found) and all(map(str.startswith, problems, found)), problems
    assert max(map(len, problems)) < 250


@parametrize("name", ["AGENT_WARMPOOL_ENABLED", "AGENT_REDIS", "AGENTS", "MY_AGENT_X"])
def test_variables_of_the_spring_boot_agent_are_passed_over_with_a_warning(name):
    settings, warnings = ng.load_settings(None, {**ENOUGH, name: "1"}, local=False)
    assert settings.code_bucket == "code-bucket"
    spring = [f"{name} is for the Spring Boot agent; passed over"]
    assert warnings == (spring if name.startswith("AGENT_") else [])


@parametrize("text, line, words", [
    # keys
    ("agnet:\n  sqs:", 1, "agnet is no known key; the nearest is agent"),
    ("agent:\n  s3s:\n    codeBucket: a", 2, "agent.s3s is no known key; the nearest is agent.s3"),
    ("agent:\n  sqs:\n    queue-url: x", 3, "nearest is agent.sqs.queueUrl"),
    ("agent:\n  sqs:\n    wait: 3", 3, "nearest is agent.sqs.waitTimeSeconds"),
    ("agent:\n  queueUrl: x", 2, "nearest is agent.sqs.queueUrl"),
    ("agent:\n  runtimes:\n    node: x", 3, "nearest is agent.runtimes.nodejs"),
    ("management:\n  x: 1", 1, "management is no known key"), ("'agent.sqs': 1", 1, "no known key"),
    ("agent.sqs.queueUrl: x", 1, "no known key"), ('"a\\nb": 1', 1, r"a\nb is no known key"),
    ("agent:\n  sqs: 5", 2, "agent.sqs is 5; write its keys beneath it"),
    ("agent: x", 1, "agent is 'x'"),
    ("agent:\n  sqs:\n  - 1", 2, "agent.sqs is a list"),
    ("agent:\n  taskBaseDir:\n    a: 1", 2,
     "agent.taskBaseDir is a section; write an absolute path"),
    ("agent:\n  execution:\n    memoryMb:\n      a: 1", 3,
     "memoryMb is a section; write a whole number"),
    ("agent:\n  s3:\n    allowedBuckets:\n    - one\n    - s3://x\n", 3, "is 's3://x'; write the bucket's"),
    ("agent:\n  s3:\n    allowedBuckets:\n    -\n", 3, "is empty; put it in quotes"),
])
def test_a_wrong_file_is_refused_with_its_line(tmp_path, text, line, words):
    found = problems(tmp_path, text, local=True)
    assert len(found) == 1 and words in found[0]
    assert found[0].startswith(f"application.yml:{line}: ")


NUMBER, FLAG, QUOTES = "write a whole number", "write true or false", "put it in quotes"
BARE, REGION_NAME = "write the bucket's bare name, 3 characters or more", "write a region"
ABSOLUTE, PROGRAM = "write an absolute path", "write an absolute path, or a bare name"
# path, what is said of these values, the values
WRONG = [
    ("execution.concurrency", NUMBER, "true", "'2'", "2.0"),
    ("execution.concurrency", "1 to 1000", "0", "-1"),
    ("execution.memoryMb", "1 to 2147483647", "0", "2147483648"),
    ("execution.memoryMb", NUMBER, "1e3", ".inf", "[]", "1_000"),
    ("execution.defaultTimeoutMs", "SQS lends", "0", "43200001"),
    ("execution.shutdownGraceSeconds", "0 to", "-1"),
    ("execution.patienceSeconds", "0 to 43200", "-1"),
    ("execution.maxOpenFiles", "16 to", "3"),
    ("execution.warmStart", FLAG, "yes", "1", "'true'"),
    ("sqs.waitTimeSeconds", "SQS allows 0 to 20", "21", "-1"),
    ("sqs.maxNumberOfMessages", "SQS allows 1 to 10", "11", "0"),
    ("metrics.flushSeconds", "1 to 3600", "0"),
    ("execution.runAs", "write a user name", "-1", "4294967295", "a b"),
    ("execution.runAs", QUOTES, "true"),
    ("execution.network", "write host or none", "bridge"),
    ("execution.network", QUOTES, "false"),
    ("execution.metadata", "write refuse or allow", "none"),
    ("s3.codeBucket", BARE, "s3://bucket", "''", "arn:aws:s3:::bucket", "bucket/key", "[]", "' b '", "b", '"bu\\ncket"'),
    ("s3.codeBucket", QUOTES, "20251130", "true"),
    ("s3.codeBucket", "write what Spring would put there, or set AGENT_S3_CODEBUCKET", "${BUCKET}"),
    ("s3.allowedBuckets", "write a list", "one", "''", "{}"),
    ("aws.region", REGION_NAME, "ap-northeast-2a", "Seoul", "''"),
    ("aws.endpointUrl", "write a URL", "localhost:5000", "'http://a b'", "'http://['"),
    ("sqs.queueUrl", "write the queue's URL", "nanogrid-task-queue", "arn:aws:sqs:x:1:q"),
    ("runtimes.python", PROGRAM, "bin/python3", "./python3", "~/p", "python3 -I", "/usr/bin/"),
    ("taskBaseDir", ABSOLUTE, '"/a\\e"', "tmp/task", "''", "'/'", "'/a/../b'", "'//a'", "'/.'", "'~'"),
    ("metrics.namespace", "write", "AWS/SQS", "''"),
]


@parametrize("path, words, values", [(path, words, values) for path, words, *values in WRONG])
def test_a_wrong_value_is_refused_with_its_line_and_as_it_is(tmp_path, path, words, values):
    for text in values:
        value = oracle(f"k: {text}")["k"]
        if path == "execution.runAs" and isinstance(value, int) and value is not True:
            value = text  # a uid
        shown = {list: "a list", dict: "a section", bool: str(value).lower()}.get(type(value), ascii(value))
        problem, = problems(tmp_path, document(path, text), local=True)
        assert problem.startswith(f"application.yml:{1 + len(path.split('.'))}: agent.{path} is {shown}; {words}")


# queue URL, where agent.aws.region is ap-northeast-2: what is said of it
WRONG_QUEUES = {
    "https://sqs.us-east-1.amazonaws.com/123456789012/q":
        "is in us-east-1, but agent.aws.region (or AWS_REGION) is 'ap-northeast-2'",
    "https://us-west-1.queue.amazonaws.com/123456789012/q": "is in us-west-1",
    "https://queue.amazonaws.com/123456789012/q": "is in us-east-1",
    "https://sqs.cn-north-1.amazonaws.com.cn/123456789012/q": "is in cn-north-1",
    "https://vpce-1-2.sqs.eu-west-1.vpce.amazonaws.com/123456789012/q": "is in eu-west-1",
    QUEUE.replace("123456789012", "YOUR_ACCOUNT_ID"): "still holds YOUR_ACCOUNT_ID; write the id",
    QUEUE.replace("123456789012", "your_account_id"): "still holds YOUR_ACCOUNT_ID",
    QUEUE.replace("123456789012", "YOUR_ID"): "still holds YOUR_", QUEUE + ".fifo": "is a FIFO queue",
    QUEUE.replace("/123456789012", ""): "/ACCOUNT_ID/NAME", QUEUE + "/": "/ACCOUNT_ID/NAME",
    QUEUE.replace("123456789012", "1234"): "/ACCOUNT_ID/NAME",
}


@parametrize("url", WRONG_QUEUES)
@parametrize("path", ["sqs", "output"])
def test_wrong_queue_urls(tmp_path, url, path):
    environ = {name: value for name, value in ENOUGH.items() if path != "sqs" or "QUEUE" not in name}
    problem, = problems(tmp_path, f"agent:\n  {path}:\n    queueUrl: {url}\n", environ)
    assert problem.startswith(f"application.yml:3: agent.{path}.queueUrl ") and WRONG_QUEUES[url] in problem


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ng.ConfigError,
        match=r"none.yml:1: cannot be read \(No such file.*; copy .*--config"):
        ng.load_settings(tmp_path / "none.yml", {}, local=False)
    with pytest.raises(ng.ConfigError, match=r"cannot be read \(Is a directory\)"):
        ng.load_settings(tmp_path, {}, local=False)
    path = tmp_path / "application.yml"
    path.write_bytes("agent:\n  aws:\n    region: 서울\n".encode("euc-kr"))
    with pytest.raises(ng.ConfigError, match=r"application.yml:3: not UTF-8; save"):
        ng.load_settings(path, {}, local=False)
    path.write_text("agent:\n\tsqs:\n")
    with pytest.raises(ng.ConfigError, match=r"/application.yml:2: a tab"):
        ng.load_settings(path, {}, local=False)


def test_whatever_stands_in_a_file_or_the_environment_only_config_errors_come_out(tmp_path):
    rng = random.Random(1)
    values = ["", "~", "[]", "{}", "0x" + "f" * 290, "1e999", ".nan", "'\\'", '"\\0"', "true",
        "http://[", "${x}",
              "\n      - ''", "\n      - 1", "\n      a: 1", "\u3000", "-1", "/", "AWS/"]
    for _ in range(300):
        lines, environ = ["agent:"], {}
        for row in rng.sample(ng.SETTINGS, 8):
            _, *sections, key = row.path.split(".")
            if sections and f"  {sections[0]}:" in lines:
                continue
            lines += [f"  {one}:" for one in sections]
            lines.append(f"{'  ' * len(sections)}  {key}: {rng.choice(values)}")
            environ[rng.choice(ng.SETTINGS).variable] = rng.choice([*values, "9" * 5000, "\udcff"])
        for local in (True, False):
            try:
                load(tmp_path, "\n".join(lines), environ, local)
            except ng.ConfigError as refused:
                assert all(re.fullmatch(r"\S+: .+; .+", one) for one in str(refused).split("\n"))


# --------------------------------------------------------------------------------------------
# Tasks and zips
# --------------------------------------------------------------------------------------------


# --- Tasks

SETTINGS = types.SimpleNamespace(code_bucket="code", allowed_buckets=("more",), memory_mb=4096,
                                 default_timeout_ms=10_000, default_memory_mb=128,
                                 function_role="arn:aws:iam::123456789012:role/fn")
TASK = {"requestId": "r-1", "functionId": "team/hello:v1", "runtime": "python", "s3Key": "f/h.zip"}


def parse(any_bucket=False, code_bucket="code", role=SETTINGS.function_role, **fields):
    """TASK with other fields (`...`: without it), as an agent with such settings reads it."""
    task = {name: value for name, value in {**TASK, **fields}.items() if value is not ...}
    settings = types.SimpleNamespace(**{**vars(SETTINGS), "code_bucket": code_bucket, "function_role": role})
    return ng.parse_task(json.dumps(task), settings, any_bucket)


def known(caught) -> dict:
    """What a refusal knows of the task beside why it was refused."""
    return dict(caught.value.known)


@parametrize("fields, changed", [
    ({}, {}),
    ({"s3Bucket": "more", "timeoutMs": 43_200_000, "memoryMb": 4096, "input": {"a": 1}, "colour": "red",
      "handler": "app.main", "env": {"A": "1"}},
     {"bucket": "more", "timeout_ms": 43_200_000, "memory_mb": 4096, "input": b'{"a": 1}',
      "handler": "app.main", "env": {"A": "1"}}),
    *(({name: None}, {}) for name in ["s3Bucket", "timeoutMs", "memoryMb", "handler", "env"]),
    *(({"runtime": alias}, {"runtime": runtime}) for alias, runtime in [
        ("python", "python"), ("cpp", "cpp"), ("c++", "cpp"), ("nodejs", "nodejs"), ("node", "nodejs"),
        ("go", "go"), ("golang", "go")]),
    # values at the edge
    *(({"requestId": value}, {"request_id": value}) for value in ["a" * 128, "...", ".a:_-"]),
    *(({"functionId": value}, {"function_id": value}) for value in ["a/b/.c", "a" * 128]),
    *(({"s3Key": value}, {"key": value}) for value in ["é" * 512, "a//b", "../a", "/a"]),
    ({"timeoutMs": 1}, {"timeout_ms": 1}), ({"memoryMb": 1}, {"memory_mb": 1}),
    *(({"handler": value}, {"handler": value}) for value in ["a.b", "한/a-b.c.d"]),
    ({"handler": "a/b.c", "runtime": "node"}, {"handler": "a/b.c", "runtime": "nodejs"}),
    *(({"env": value}, {"env": value}) for value in [{}, {"_a1": "", "AWS_PROFILE": "한\n"}, {"A": "x" * 32766}]),
    # the input reaches the function as JSON
    *(({"input": value}, {"input": sent}) for value, sent in [
        (None, b"null"), ("", b'""'), ([1, 2.5, True], b"[1, 2.5, true]"), ("\ud800", b'"\\ud800"'),
        ("한", b'"\\ud55c"'), (int("9" * 4300), b"9" * 4300)]),
    # what depends on the agent
    ({"role": None, "env": {"AWS_REGION": "eu-west-1"}}, {"env": {"AWS_REGION": "eu-west-1"}}),
    *(({"any_bucket": True, "code_bucket": unset}, {"bucket": ""}) for unset in (None, "")),
    ({"any_bucket": True, "s3Bucket": "other", "s3Key": "a/b.zip"}, {"bucket": "other", "key": "a/b.zip"}),
], ids=lambda value: ascii(value)[:30])
def test_a_task_is_read(fields, changed):
    expected = ng.Task("r-1", "team/hello:v1", "python", "code", "f/h.zip", 10_000, 128, b"")
    assert parse(**fields) == dataclasses.replace(expected, **changed)


BAD_ID = ["", ".", "..", "a" * 129, "a b", "a\n", "é", "a\\b", 7, None, True, ["a"]]
BAD_FIELDS = [
    *[("requestId", value) for value in [*BAD_ID, "a/b"]],
    *[("functionId", value) for value in [*BAD_ID, "/a", "a/", "a//b", "a/../b", "a/./b", "a/.."]],
    *[("runtime", value) for value in ["", "Python", "python ", "java", None, 3, ["python"], {}]],
    *[("s3Bucket", value) for value in [7, True, ["code"], {}]],
    *[("s3Key", value) for value in ["", "a" * 1025, "é" * 513, "a\0b", "a\nb", "a\x7f", "\x9b",
                                     "\ud800", None, 7, ["a"]]],
    *[("timeoutMs", value) for value in [0, -1, 43_200_001, True, "5000", 5000.0, [1], 10 ** 4000]],
    *[("memoryMb", value) for value in [0, -1, True, "128", 128.0, {}]],
    *[("handler", value) for value in ["app", "app.", ".f", "a..f", "/a.f", "../a.f", "a/../b.f",
                                       "a\\b.f", "a b.f", "a.f\n", "a\0.f", "\ud800.f", 7, ["a.f"]]],
    *[("env", value) for value in ["A=1", 7, [], [["A", "1"]], True]],
]


@parametrize("name, value", BAD_FIELDS, ids=lambda value: ascii(value)[:30])
def test_a_wrong_field_is_named_with_its_value(name, value):
    text = rf"^{name} is [ -~]{{1,80}}; it must be [ -~]+\Z"
    with pytest.raises(ng.Ended, match=text) as caught:
        parse(**{name: value})
    assert caught.value.outcome.reason == "task"
    assert known(caught) == {
        ng.REPORTED[key]: found for key, found in {**TASK, "timeoutMs": 10_000,
                                                   "memoryMb": 128}.items()
        if key not in (name, "s3Key")}


def test_every_wrong_field_is_named_at_once():
    with pytest.raises(ng.Ended, match="requestId is 'a/b'.*; memoryMb is 5000; ") as caught:
        parse(requestId="a/b", memoryMb=5000, runtime="node", timeoutMs=7)
    assert caught.value.outcome.reason == "task"
    assert known(caught) == {"function_id": "team/hello:v1", "runtime": "nodejs", "timeout_ms": 7,
                             "memory_mb": 5000}


@parametrize("fields, reason, text", [
    *(({name: ...}, "task", f"^{name} is missing; it must be ((?!DIR/code).)*$")
      for name in ["requestId", "functionId", "runtime", "s3Key"]),
    *(({"runtime": runtime, "handler": "app.main"}, "task", f"handler is for python and nodejs, not {runtime}")
      for runtime in ["cpp", "go"]),
    # what env may not hold
    *(({"env": {"A": "1", name: "1"}}, "task", f"env has {name!r}, which each run gets") for name in (
        "PATH LANG TZ HOME TMPDIR OUTPUT_DIR USER LOGNAME REQUEST_ID FUNCTION_ID MEMORY_MB TIMEOUT_MS "
        "AWS_LAMBDA_FUNCTION_NAME AWS_LAMBDA_FUNCTION_MEMORY_SIZE LAMBDA_TASK_ROOT _HANDLER "
        "AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_REGION").split()),
    *(({"env": {name: "1"}}, "task", "env has .*; names are") for name in ["", "1A", "A-B", "A=B", "é", "A\n"]),
    *(({"env": {"A": value}}, "task", "env has 'A' as .*; write a string")
      for value in [1, None, True, [], "\0", "\ud800"]),
    ({"env": {"A": "x" * 32767}}, "task", "env has 32769 bytes; at most 32768"),
    # what this agent does not allow has its own reason
    ({"s3Bucket": "other"}, "bucket", "s3Bucket is 'other'; it must be one of code, more "),
    ({"s3Bucket": ""}, "bucket", "s3Bucket is ''; it must be one of code, more "),
    *(({"code_bucket": unset}, "bucket", "s3Bucket is ''; it must be one of more ") for unset in (None, "")),
    ({"memoryMb": 4097}, "memory", "memoryMb is 4097; it must be at most 4096"),
    ({"memoryMb": 10 ** 4000}, "memory", r"memoryMb is 10+\.\.\.; it must be at most 4096"),
    # a folder takes only keys below it
    *(({"any_bucket": True, "s3Key": key}, "task", "s3Key is .* below DIR/code")
      for key in ("/a", "a//b", "a/", "../a", "a/../../b", "a/..", "./a", ".")),
    ({"any_bucket": True, "s3Bucket": 7}, "task", "s3Bucket is 7"),
], ids=lambda value: ascii(value)[:30])
def test_a_wrong_task_is_refused(fields, reason, text):
    with pytest.raises(ng.Ended, match=text) as caught:
        parse(**fields)
    assert caught.value.outcome.reason == reason


def body(more):
    return json.dumps(TASK)[:-1] + f", {more}}}"


@parametrize("text, what", [
    ("", "Expecting value"), ("{", "Expecting"), (json.dumps(TASK) + "x", "Extra data"),
    ("[]", "a list; it must be a JSON object"), ('"a"', "'a';"), ("null", "null;"),
    ("true", "true;"), ("7", "7;"),
    (body('"input": NaN'), "nan"), (body('"input": [-Infinity]'), "inf"),
    (body('"input": 1e999'), "'1e999' is no number"),
    (body('"requestId": "r-2"'), "'requestId' stands twice"),
    (body('"input": {"a": 1, "a\\n": 2, "a\\n": 3}'), r"'a\\+n' stands twice"),
    (body('"input": ' + "[" * 300_000 + "]" * 300_000), "nested too deep"),
    ("[" * 1_000_000, "nested too deep"), ("\0", "Expecting value"),
    (body('"input": ' + "9" * 4301), ".*4300")], ids=lambda value: value[-25:])
def test_a_message_that_is_no_json_object(text, what):
    with pytest.raises(ng.Ended, match=f"(?i)^the message is [ -~]*{what}") as caught:
        ng.parse_task(text, SETTINGS)
    assert caught.value.outcome.reason == "task" and not known(caught)
    assert len(str(caught.value)) < 300


# --- Zips

def member(name, data=b"x", *, mode=0o100644, system=3, method=0, flags=0x800, crc=None, size=None,
           local=None, extra=b"", packed=None, date=0x21 << 16):
    """(local header and data, central header without its offset) with any field a lie."""
    name = name.encode() if isinstance(name, str) else name
    local = name if local is None else local
    if packed is None and method == 8:
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        packed = packer.compress(data) + packer.flush()
    packed = data if packed is None else packed
    common = struct.pack("<HHHLLLL", 20, flags, method, date,
                         zlib.crc32(data) if crc is None else crc, len(packed),
                         len(data) if size is None else size)
    return (b"PK\3\4" + common + struct.pack("<HH", len(local), 0) + local + packed,
            b"PK\1\2" + struct.pack("<BB", 20, system) + common
            + struct.pack("<HHHHHL", len(name), len(extra), 0, 0, 0, mode << 16), name + extra)


def bundle(*members, claimed=None, prefix=b""):
    """The bytes of a zip of `members`; `claimed` is what it says their number is."""
    out, directory = bytearray(prefix), bytearray()
    for content, header, name in members:
        directory += header + struct.pack("<L", len(out) - len(prefix)) + name
        out += content
    count = len(members) if claimed is None else claimed
    return bytes(out + directory) + b"PK\5\6" + struct.pack(
        "<HHHHLLH", 0, 0, count, count, len(directory), len(out) - len(prefix), 0)


@pytest.fixture
def unpack(tmp_path):
    """unpack(data): the files of a zip; fails if a thing beside its folder was touched."""
    count = iter(range(10 ** 6))

    def run(data):
        zone = tmp_path / f"zone{next(count)}"
        zone.mkdir()
        (zone / "a.zip").write_bytes(data)
        (zone / "outside").write_bytes(b"before")
        run.target = zone / "target"
        try:
            return ng.unpack(zone / "a.zip", run.target)
        finally:
            assert sorted(os.listdir(zone))[:2] == ["a.zip", "outside"]
            assert len(os.listdir(zone)) <= 3
            assert (zone / "outside").read_bytes() == b"before"
            assert not os.path.lexists(tmp_path / "leak")
    return run


def link(name, target):
    return member(name, target.encode(), mode=stat.S_IFLNK | 0o777)


def far(offset):
    """A zip (zip64) that says its only member begins at `offset`."""
    extra = struct.pack("<HHQ", 1, 8, offset)
    data = bundle(member("a", extra=extra))
    return data.replace(bytes(4) + b"a" + extra, b"\xff" * 4 + b"a" + extra)


def written(method=zipfile.ZIP_STORED, **options):
    """A zip of one member, as zipfile writes it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive, archive.open("a", "w", **options) as file:
        file.write(b"x" * 100)
    return out.getvalue()


def sharing():
    """A zip whose second local header lies in the first one's data."""
    inner = member("b", bytes(5000))
    outer = member("a", inner[0])
    start = len(outer[0]) - len(inner[0])
    directory = (outer[1] + struct.pack("<L", 0) + outer[2]
                 + inner[1] + struct.pack("<L", start) + inner[2])
    return outer[0] + directory + b"PK\5\6" + struct.pack(
        "<HHHHLLH", 0, 0, 2, 2, len(directory), len(outer[0]), 0)


LEAVE, LINK, CORRUPT = "may leave the zip's folder", "is a link to", "is corrupt"
TWICE, BELOW, BOTH = "stands twice", "which is no folder", "both a file and a folder"
DEVICE, UNREADABLE, LONG = "is a device", "no zip that can be read", "over 1000 bytes"
BACKSLASH = "has a backslash: made by an old Windows tool; zip it again with"
# what is said of it: zips
REFUSED_NAMES = {
    LEAVE: ["/leak", "../leak", "a/../b", "a/..", "../", "C:/leak", "C:"], BACKSLASH: ["..\\leak", "a\\b"],
    "has a NUL": ["a\0b"], UNREADABLE: [b"a\xff"], BOTH: ["", "."], LONG: ["a/" * 500 + "b"],
    "255 between": ["a" * 256, "가" * 86, "a" * 256 + "/b"],
}
REFUSED = [(said, bundle(member(name))) for said, names in REFUSED_NAMES.items() for name in names] + [
    *((LINK, bundle(link(name, target))) for name, target in [
        ("a", "/etc/passwd"), ("a", "../outside"), ("d/a", "../../outside"), ("x/a", "../../target/x"), ("a", ""),
        ("a", "b\0c")]),
    (LINK, bundle(member("x/f"), link("a", "x/../../target/f"))),  # out and back
    (LINK, bundle(link("p/q/up", "../.."), link("a", "p/q/up/../outside"))),
    (LINK, bundle(link("a", "b"), link("b", "../.."))),
    (LONG, bundle(link("a", "b/" * 501))),
    (BELOW, bundle(link("d", "."), member("d/f"))),
    (BOTH, bundle(member("d/f"), link("d", "."))),
    (TWICE, bundle(link("a", "../outside"), member("a"))),
    *((DEVICE, bundle(member("a", mode=kind | 0o666)))
      for kind in (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK)),
    (DEVICE, bundle(member("a/", b"", mode=stat.S_IFIFO | 0o666))),
    (DEVICE, bundle(member("a", mode=stat.S_IFIFO, system=19))),  # from macOS
    ("is encrypted", bundle(member("a", b"x" * 20, flags=1))),
    ("is encrypted", bundle(member("a/", b"", flags=1))),
    (CORRUPT, bundle(member("a", flags=0x40))),  # strongly encrypted
    (CORRUPT, bundle(member("a", flags=0x20))),  # patched
    ("method 99", bundle(member("a", method=99))),
    # without a bound on the memory that it takes
    ("method 12; zip it with deflate", written(zipfile.ZIP_BZIP2)),
    ("method 14; zip it with deflate", written(zipfile.ZIP_LZMA)),
    ("share their bytes", sharing()),
    ("over 100000 files and folders",
     lambda: bundle(*(member(f"{i}/" + "a/" * 400 + "b") for i in range(300)))),
    ("its directory claims 2", lambda: bundle(*[member("a" * 800, b"")] * 25_000)),
    *((TWICE, bundle(member(one), member(other))) for one, other in [("a", "a"), ("a", "./a"), ("d/a", "d//a")]),
    (BOTH, bundle(member("a"), member("a/", b""))),
    (BELOW, bundle(member("a"), member("a/b"))),
    (BELOW, bundle(member("a"), member("a/b/c/d"))),
    (BOTH, bundle(member("a/b"), member("a"))),
    # what is not as it says
    *((CORRUPT, bundle(member("a", *data, **lies))) for *data, lies in [
        ({"crc": 1},), (b"", {"crc": 1}), (b"b", {"crc": 1, "mode": stat.S_IFLNK}),
        (bytes(10 ** 6), {"method": 8, "size": 10}), (bytes(10 ** 6), {"method": 8, "size": 0}),
        (b"abc", {"size": 1 << 20, "crc": 0}), ({"method": 8, "packed": b"\xff" * 30},),
        (bytes(99), {"method": 8, "packed": b"\x4b"}), ({"local": b"b"},)]),
    *((CORRUPT, far(offset)) for offset in (1 << 40, (1 << 63) - 1, (1 << 64) - 1)),
    *((UNREADABLE, data) for data in [
        b"#!/bin/sh\nexit 0\n", b"", b"PK\3\4", b"\x1f\x8b\x08" + bytes(100), bundle(member("a"))[:-30]]),
    ("has no members", bundle()),
]


@parametrize("number", range(len(REFUSED)), ids=[each[0] for each in REFUSED])
def test_a_zip_is_refused(unpack, number):
    what, data = REFUSED[number]
    with pytest.raises(ng.Ended, match=r"^[ -~]+\Z") as caught:
        unpack(data() if callable(data) else data)
    assert caught.value.outcome.reason == "zip"
    assert what in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.slow
def test_fifty_thousand_members_and_no_more(unpack):
    members = [member(f"d{i // 30_000}/e/{i}", b"") for i in range(50_001)]
    assert len(unpack(bundle(*members[1:]))) == 50_000
    for claimed in (None, 1):
        with pytest.raises(ng.Ended, match="has 50001 members; 50000 are allowed; the largest "
                                           "folders: 'd0' 30000, 'd0/e' 30000, 'd1' 20001"):
            unpack(bundle(*members, claimed=claimed))


def test_what_a_zip_may_unpack_to_is_for_all_files_together(unpack, monkeypatch):
    data = bundle(*(member(f"{name}", bytes(100 * 1024), method=8)
                    for name in ("a/b/1", "a/c/2", "3")))
    monkeypatch.setattr(ng, "MAX_UNPACKED", 300 * 1024)
    assert len(unpack(data)) == 3
    monkeypatch.setattr(ng, "MAX_UNPACKED", 300 * 1024 - 1)
    with pytest.raises(ng.Ended, match="has 1 MiB unpacked; .*: 'a' 1, 'a/b' 1, 'a/c' 1, '.' 1"):
        unpack(data)
    assert not unpack.target.exists()
    with pytest.raises(ng.Ended, match="has 2049 MiB unpacked; 1024 are allowed"):
        monkeypatch.undo()
        unpack(bundle(*(member(name, size=(1 << 30) + 1) for name in "ab")))


def modes(folder):
    return {str(path.relative_to(folder)): stat.S_IMODE(path.lstat().st_mode)
            for path in folder.rglob("*") if not path.is_symlink()}


@parametrize("umask", [0o077, 0o000])
def test_modes(unpack, umask):
    before = os.umask(umask)
    try:
        files = unpack(bundle(
            member("d/", b"", mode=0o40700), member("e/f/g"), member("x", mode=0o100755),
            member("u", mode=0o100654), member("s", mode=0o106755), member("r", mode=0o100400),
            member("none", mode=0), member("bits", mode=0o755),
            member("mac", mode=0o755, system=19), member("win", mode=0o100777, system=0),
            member("h", b"", mode=0o40755)))
        top, found = stat.S_IMODE(unpack.target.stat().st_mode), modes(unpack.target)
        made = {"system": 0, "mode": 0}  # none at all, as by Windows' Explorer, and by jar: main may run
        unpack(bundle(member("main", **made), member("d/main", **made), member("a", **made)))
    finally:
        os.umask(before)
    assert files == ["bits", "e/f/g", "mac", "none", "r", "s", "u", "win", "x"]
    assert top == 0o755 and found == {
        "d": 0o755, "e": 0o755, "e/f": 0o755, "e/f/g": 0o644, "x": 0o755, "u": 0o755, "s": 0o755,
        "r": 0o644, "none": 0o644, "bits": 0o755, "mac": 0o755, "win": 0o644, "h": 0o755}
    assert modes(unpack.target) == {"main": 0o755, "d": 0o755, "d/main": 0o644, "a": 0o644}


ODD_NAMES = ["main.py", "한글/é.txt", "sp ace", "..a", "a..", "...", "ab:c", "a" * 255, "A", "a",
             "a:b.txt", "c:d/e", "Icon\r", "a\nb", "a\x9bb"]
# name: (a zip, its files and what they hold)
TAKEN = {
    "names": (make_zip({name: f"<{name}>" for name in ODD_NAMES}), {name: f"<{name}>" for name in ODD_NAMES}),
    "UTF-8 without the flag, as by Info-ZIP": (bundle(member("한글.txt", flags=0)), {"한글.txt": "x"}),
    "UTF-8": (bundle(member("한글.txt")), {"한글.txt": "x"}),
    "code page 437": (bundle(member(b"\x81.txt", flags=0)), {"ü.txt": "x"}),
    "zip64": (written(force_zip64=True), {"a": "x" * 100}),
    **{name: (data, {"a": "x", "d/b": "x"}) for name, data in {
        "dot": bundle(member("./"), member("./a"), member(".//d/./b")),
        "folder last and twice": bundle(member("d/b"), member("d/", b""), member("a"), member("d/", b"")),
        "prefix": bundle(member("a"), member("d/b"), prefix=b"#!/bin/sh\n" * 9),
        "claims more": bundle(member("a"), member("d/b"), claimed=77),
        "deflate": bundle(member("a", flags=0x8), member("d/b", method=8))}.items()},
}


@parametrize("name", TAKEN)
def test_contents_and_names(unpack, name):
    data, files = TAKEN[name]
    assert unpack(data) == sorted(files)
    assert {each: (unpack.target / each).read_bytes() for each in files} == {
        each: text.encode() for each, text in files.items()}


@parametrize("extra, date, seconds", [
    (struct.pack("<HHBl", 0x5455, 5, 1, 1234567891), 0, 1234567891),
    (struct.pack("<HHBll", 0x5455, 9, 3, 1234567891, 5), 0, 1234567891),
    (struct.pack("<HHll", 0x5855, 8, 5, 1234567891), 0, 1234567891),  # as macOS' Finder writes it
    (struct.pack("<HHBHHBl", 0x9999, 1, 0, 0x5455, 5, 1, -7), 0, -7),
    (b"UT\5", 0x4A6E << 16 | 0x5AAB, time.mktime((2017, 3, 14, 11, 21, 22, 0, 0, -1))),
    (struct.pack("<HHB", 0x5455, 1, 0), 0x21 << 16, time.mktime((1980, 1, 1, 0, 0, 0, 0, 0, -1))),
    (b"", 0, time.mktime((1979, 11, 30, 0, 0, 0, 0, 0, -1))),  # no month, no day
    (b"", 0xFFFFFFFF, time.mktime((2107, 15, 31, 31, 63, 62, 0, 0, -1))),
])
def test_files_keep_their_times(unpack, extra, date, seconds):
    unpack(bundle(member("a", b"x" * 100_000, extra=extra, date=date)))
    assert (unpack.target / "a").stat().st_mtime == seconds


def test_an_empty_folder_may_be_there(tmp_path):
    (tmp_path / "a.zip").write_bytes(bundle(member("d/b")))
    (tmp_path / "target").mkdir(mode=0o700)
    assert ng.unpack(tmp_path / "a.zip", tmp_path / "target") == ["d/b"]
    assert stat.S_IMODE((tmp_path / "target").stat().st_mode) == 0o755


def test_links_that_stay_inside(unpack):
    files = unpack(bundle(
        link("l", "d/f"), member("d/f"), link("d/e/up", "../f"), link("chain", "l"),
        link("root", "."), link("d/top", ".."), link("loop", "loop"), link("gone", "not/there"),
        link("d/e/through", "../top/l")))
    assert files == ["d/f"]
    for name in ("l", "d/e/up", "chain", "root/l", "d/top/l", "d/e/through"):
        assert (unpack.target / name).read_bytes() == b"x"
    assert os.readlink(unpack.target / "d/e/up") == "../f"


def test_the_machines_failures_are_no_rejections(unpack, tmp_path):
    with pytest.raises(FileNotFoundError):
        ng.unpack(tmp_path / "none.zip", tmp_path / "target")
    data = bundle(member("a", bytes(2_000_000), method=8))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))  # write() fails with EFBIG
    try:
        with pytest.raises(OSError, match="File too large"):
            unpack(data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


SAMPLES = [
    bundle(member("main.py", b"print(1)" * 9, method=8), link("l", "main.py"), member("d/", b"")),
    make_zip({"main*": "x" * 300, "d/e.txt": "é"}),
    bundle(member("a", extra=struct.pack("<HHQQQ", 1, 24, 1, 1, 0), size=0xFFFFFFFF)),
]


@parametrize("sample", range(len(SAMPLES)))
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_are_rejected_or_read_and_never_a_crash(unpack, sample):
    dice, damaged, rejected = random.Random(sample), [], 0
    for _ in range(700):
        data = bytearray(SAMPLES[sample])
        for _ in range(dice.choice((1, 1, 2, 5))):
            byte = dice.choice((0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)))
            data[dice.randrange(len(data))] = byte
        if dice.random() < 0.2:
            del data[dice.randrange(len(data)):]
        damaged.append(data)
    for at in range(1, 23):  # its end record
        for byte in (0x00, 0x01, 0x7F, 0xFF):
            damaged.append(bytearray(SAMPLES[sample]))
            damaged[-1][-at] = byte
    for data in damaged:
        try:
            unpack(bytes(data))
        except ng.Ended as error:
            assert error.outcome.reason == "zip"
            rejected += 1
    assert rejected > 200


# --- Entry files

HANDLERS = bundle(*map(member, ["app.py", "src/app.py", "pack/__init__.py", "app.js", "app.mjs", "src/app.mjs",
                                "old.cjs", "src/in.js"]))
LINKED = bundle(member("src/app.py"), link("main.py", "src/app.py"),
                member("bin/app", mode=0o100755), link("main", "bin/app"))


# runtime, handler, zip; its entry file, or what is said where there is none
ENTRY_FILES = [
    ("python", "", make_zip({"main.py": "", "run.sh": ""}), "main.py"),
    ("nodejs", "", make_zip({"index.js": "", "main.py": ""}), "index.js"),
    *[(runtime, "", make_zip(dict.fromkeys(files, "x")), entry)
      for runtime, source in (("cpp", "main.cpp"), ("go", "main.go")) for files, entry in (
          (["run.sh", "main*", source], "run.sh"), (["run.sh*"], "run.sh"),
          (["main*", source], "main"), (["main", source], source), ([source], source))],
    ("python", "", LINKED, "main.py"), ("go", "", LINKED, "main"),
    # the entry of a handler
    ("python", "app.f", HANDLERS, "app.py"), ("python", "src/app.f", HANDLERS, "src/app.py"),
    ("python", "src.app.f", HANDLERS, "src/app.py"), ("python", "pack.f", HANDLERS, "pack/__init__.py"),
    ("nodejs", "app.f", HANDLERS, "app.js"), ("nodejs", "src/app.f", HANDLERS, "src/app.mjs"),
    ("nodejs", "old.f", HANDLERS, "old.cjs"),
    # none
    *[("python", "", bundle(one), "has no main.py at its top") for one in (
        member("other.py"), member("Main.py"), member("main.py/", b""), link("main.py", "gone"), link("main.py", "main.py"))],
    ("python", "", bundle(member("hello/main.py")), "'hello' has one: zip what is in that folder"),
    ("nodejs", "", bundle(member("main.js")), "has no index.js at its top"),
    ("cpp", "", bundle(member("main")), "chmod"), ("go", "", bundle(member("main")), "chmod"),
    ("cpp", "", bundle(member("main/", b"")), "has no run.sh or main or main.cpp at its top"),
    ("go", "", bundle(member("main.cpp")), "has no run.sh or main or main.go at its top"),
    ("python", "gone.f", HANDLERS, "no gone.py or gone/__init__.py for the handler gone.f"),
    ("nodejs", "src.app.f", HANDLERS, "no src.app.js or src.app.mjs or"),
    ("nodejs", "in.f", HANDLERS, "; 'src' has one: zip what is in that folder"),
    ("nodejs", "[a].f", HANDLERS, "no [a].js"),
]


@parametrize("runtime, handler, data, entry", ENTRY_FILES)
def test_entry(unpack, runtime, handler, data, entry):
    unpack(data)
    try:
        assert ng.find_entry(unpack.target, runtime, handler) == entry
    except ng.Ended as error:
        assert error.outcome.reason == "entry" and entry in str(error) and not (unpack.target / entry).exists()


# --------------------------------------------------------------------------------------------
# Running, measuring, confining
# --------------------------------------------------------------------------------------------


CPP = r"""
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <new>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

static char *map(long mib, int flags) {
    void *at = mmap(nullptr, mib << 20, PROT_READ | PROT_WRITE, flags | MAP_ANONYMOUS, -1, 0);
    return at == MAP_FAILED ? nullptr : static_cast<char *>(at);
}
static void print_peak() {
    char line[256];
    FILE *status = fopen("/proc/self/status", "r");
    while (fgets(line, sizeof line, status))
        if (!strncmp(line, "VmHWM:", 6)) fputs(line, stdout);
}
static double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}
int main() {
    double start = now();
    char mode[64] = "";
    if (!fgets(mode, sizeof mode, stdin)) return 9;
    auto is = [&](const char *word) { return strstr(mode, word) != nullptr; };
    long mib = 0;
    if (is("peak")) { sscanf(strstr(mode, "peak"), "peak-%ld", &mib); memset(map(mib + 1, MAP_PRIVATE), 1, mib << 20); print_peak(); }
    else if (is("hello")) { print_peak(); }
    else if (is("hog")) for (;;) memset(new char[1 << 20], 1, 1 << 20);
    else if (is("refused")) { char *p = new char[50L << 30]; p[1] = 1; return p[0]; }
    else if (is("shared")) { for (int i = 0; i < 3; i++) fork(); for (;;) if (char *p = map(16, MAP_SHARED)) memset(p, 1, 16 << 20); }
    else if (is("reserve")) { char *p = static_cast<char *>(malloc(200 << 20)); p[0] = 1; puts(p ? "ok" : "refused"); }
    else if (is("spin")) for (;;) {}
    else if (is("crash")) { volatile char *p = nullptr; *p = 1; }
    else if (is("sleep")) { usleep(200000); printf("%.1f\n", now() - start); }
    return 0;
}
"""


@functools.lru_cache(None)
def cpp_binary() -> bytes:
    """The C++ sample, compiled once; its standard input says what it does."""
    need("g++")
    with tempfile.TemporaryDirectory() as place:
        Path(place, "main.cpp").write_text(CPP)
        subprocess.run(["g++", "-O1", "-o", "main", "main.cpp"], cwd=place, check=True, stderr=subprocess.DEVNULL)
        return Path(place, "main").read_bytes()


# --- cap, time limit, hostile functions


# Rows for `ordinary` alone: where no cgroup holds the cap, RLIMIT_DATA stands behind it, and the
# runtimes say what it refused.
WORDS = r"""
def refused(what, *arguments):  # whether the system refuses this
    try:
        what(*arguments)
    except OSError:
        return True
    return False
def fork(count, step):
    for n in range(count):
        if os.fork() == 0:
            step(n)
            os._exit(0)
def wait_for_all():
    while not refused(os.wait): pass
def daemon(step):
    fork(1, lambda _: [os.setsid(), fork(1, lambda _: step())])
def hog():
    keep = []
    while True:
        keep.append(bytearray(1 << 20))
def touch(block, first, last):  # in MiB
    for at in range(first << 20, last << 20, 4096):
        block[at] = 1
"""
RUN_HEAD = "import ctypes, glob, json, mmap, os, resource, signal, socket, subprocess, sys, threading, time\n" + WORDS
RUNS = table(r"""
=== neighbour | | stdout=fine
print("fine")
=== one hog | memoryMb=64 | status=oom
hog()
=== small steps | memoryMb=64 | status=oom
keep = []
while True:
    keep.append("x" * 100 + str(len(keep)))
=== six children of 60 MB | memoryMb=256 timeoutMs=120000 | status=oom
fork(6, lambda _: [bytearray(60 << 20), time.sleep(60)])
wait_for_all()
=== shared memory | memoryMb=128 | status=oom
touch(mmap.mmap(-1, 400 << 20), 0, 400)
=== shared memory of three children, none above the cap | memoryMb=128 timeoutMs=120000 | status=oom
block = mmap.mmap(-1, 240 << 20)
fork(3, lambda n: [touch(block, 80 * n, 80 * n + 80), time.sleep(60)])
wait_for_all()
=== a hog in a session of its own | memoryMb=64 timeoutMs=120000 | status=oom
daemon(hog)
time.sleep(60)
=== four forks of a 150 MB parent | memoryMb=256
block = bytearray(150 << 20)
fork(4, lambda _: time.sleep(0.5))
wait_for_all()
=== children between vfork and exec | memoryMb=128 timeoutMs=600000 | peakMib=70..90
block = bytearray(b"x") * (70 << 20)
for _ in range(60):
    subprocess.run(["true"])
=== 80 threads | memoryMb=64
gate = threading.Barrier(81)
for _ in range(80):
    threading.Thread(target=gate.wait).start()
gate.wait()
=== a parent of 100 MB and three children of 50 | memoryMb=512 | peakMib=245..290
shared = bytearray(100 << 20)
filled, over = os.pipe(), os.pipe()
def hold(_):
    own = bytearray(50 << 20)
    os.close(over[1])
    os.write(filled[1], b"1")
    os.read(over[0], 1)
fork(3, hold)
for _ in range(3):
    os.read(filled[0], 1)
time.sleep(1.5)
os.close(over[1])
wait_for_all()
=== a short child of 250 MB | memoryMb=512 | peakMib=245..290
fork(1, lambda _: bytearray(250 << 20))
wait_for_all()
=== a short child of another program, 250 MB | memoryMb=512 | peakMib=245..290
subprocess.run([sys.executable, "-c", "bytearray(250 << 20)"], check=True)
=== a reservation that is not touched | memoryMb=128
block = mmap.mmap(-1, 200 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
=== sleeps | timeoutMs=400 | status=timeout
time.sleep(60)
=== spins | timeoutMs=400 | status=timeout
while True:
    pass
=== ignores every signal | timeoutMs=400 | status=timeout
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
time.sleep(60)
=== stops itself | timeoutMs=400 | status=timeout
os.kill(os.getpid(), signal.SIGSTOP)
=== stops its group | timeoutMs=400 | status=timeout
os.kill(0, signal.SIGSTOP)
=== a child of its own traces it | timeoutMs=2000 | status=timeout
its, libc = os.getpid(), ctypes.CDLL(None)
libc.prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER: any
if not os.fork():
    os.setsid()
    libc.ptrace(0x4206, its, 0, 0)  # PTRACE_SEIZE: its end is told this one first
    time.sleep(60)
time.sleep(60)
=== stops its parent | timeoutMs=400 | status=timeout
refused(os.kill, os.getppid(), signal.SIGSTOP)
time.sleep(60)
=== a daemon holds its output | | stdout=fine durationMillis=..59999
daemon(lambda: time.sleep(60))
os.wait()
print("fine")
=== all descriptors | | stdout=refused
while not refused(os.open, "/dev/null", 0): pass
print("refused")
=== 300 MB of output | timeoutMs=300000 memoryMb=64 | stdoutBytes=314572800
line = b"%01023d\n"
for first in range(0, 300 << 10, 1024):
    sys.stdout.buffer.write(b"".join(line % n for n in range(first, first + 1024)))
=== a file of 100 GB | | stdout=True.True.True
big = 100 << 30
fd = os.open("big", os.O_CREAT | os.O_WRONLY)
print(refused(os.ftruncate, fd, big), refused(os.pwrite, fd, b"x", big), refused(os.posix_fallocate, fd, 0, big), sep=".")
=== closed output | | stdoutBytes=0 durationMillis=300..
os.close(1), os.close(2)
time.sleep(0.3)
os._exit(0)
=== binary output | | stdoutBytes=256
os.write(1, bytes(range(256)))
=== an input that is not read | | stdout=fine
print("fine")
=== its own SIGKILL | | status=failed exitCode=-9
os.kill(os.getpid(), 9)
=== SIGKILL for all it may | root | stdout=alive
os.kill(-1, 9)
print("alive")
=== SIGKILL for its parent | | status=failed/error/ok
if refused(os.kill, os.getppid(), 9): print("refused")
else: time.sleep(1)
=== SIGTERM for its parent and group | | status=ok/failed/error
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for target in (os.getppid(), 0):
    refused(os.kill, target, signal.SIGTERM)
time.sleep(0.3)
=== exit status 7 | | status=failed exitCode=7
raise SystemExit(7)
=== exit status 255 of a shell | cpp | status=failed exitCode=255
exit 255
=== node, an endless list | nodejs memoryMb=128 | status=oom
const keep = [];
for (;;) keep.push(Buffer.alloc(1 << 20, 1));
=== node, an endless heap | nodejs memoryMb=128 | status=oom
const keep = [];
for (;;) keep.push({at: keep.length, text: "x" + keep.length});
=== node | nodejs memoryMb=128 input={"n":21} | stdout=42
const input = JSON.parse(require("fs").readFileSync(0));
console.log(2 * input.n);
=== node fails | nodejs | status=failed exitCode=3
process.exit(3);
=== node spins | nodejs timeoutMs=500 | status=timeout
for (;;) {}
=== a shell script | cpp input=[7] | stdout=[7]
cat
=== C++, a hog | cpp memoryMb=64 input="hog" | status=oom
=== C++, shared memory | cpp memoryMb=128 input="shared" | status=oom
=== C++, a reservation | cpp memoryMb=128 input="reserve" | stdout=ok
=== C++ spins | cpp timeoutMs=400 input="spin" | status=timeout
=== C++ crashes | cpp input="crash" | status=failed exitCode=-11
=== refused memory: caught | ordinary memoryMb=128 | stdout=caught
try:
    bytearray(50 << 30)
except MemoryError:
    print("caught")
=== refused memory: python | ordinary memoryMb=128 | status=oom
bytearray(50 << 30)
=== refused memory: python, an exception of its own | ordinary memoryMb=128 | status=failed
class NoMemoryError(Exception): pass
raise NoMemoryError("for names")
=== refused memory: perl | cpp ordinary memoryMb=128 | status=oom
exec perl -e '$n = 1 << 36; $x = "x" x $n'
=== refused memory: C++ | cpp ordinary memoryMb=128 input="refused" | status=oom
=== refused memory: node, a list | nodejs ordinary memoryMb=128 | status=oom
const keep = [];
for (;;) keep.push(Buffer.alloc(64 << 20, 1));
=== refused memory: node, more than there can be | nodejs ordinary memoryMb=128 | status=failed
new ArrayBuffer(2 ** 40);
=== python a second time after all that | | stdout=fine
print("fine")
""")
RUNS["an input that is not read"].task["input"] = "x" * 200_000
# What others say, as the end of their standard error, and whether that is a refusal.
LAST_WORDS = {
    "memory allocation of 8589934592 bytes failed\nAborted": True,  # Rust
    "main.rb:1:in `*': failed to allocate memory (NoMemoryError)": True,
    "[FATAL] failed to allocate memory": True,  # Ruby
    "numpy.core._exceptions._ArrayMemoryError: Unable to allocate 8.00 GiB for an array": True,
    "fatal error: runtime: out of memory\n\nruntime stack:": True,  # Go
    "bash: fork: Cannot allocate memory": True,
    "ValueError: no failed to allocate memory": False, "  raise MemoryError": False,
    "RangeError: Invalid array length": False}


@parametrize("text", LAST_WORDS)
def test_last_words_that_say_there_was_no_memory(text):
    assert bool(ng.NO_MEMORY.search(text)) == LAST_WORDS[text]


def test_every_take_has_a_report(runs):
    """Three for what did not end ok, one for what did; nothing is lost between hostile functions."""
    for request_id, got in runs.reports.items():
        last = got[-1]["status"]
        assert [report["receiveCount"] for report in got] == (["1", "2", "3"][:len(got)]), (request_id, got)
        assert last == "ok" or len(got) == 3, (request_id, got)
    assert not list((runs.path / "queue").iterdir()) and not list((runs.path / "running").iterdir())


FORK_BOMB = """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
"""


@pytest.mark.slow
def test_a_fork_bomb_leaves_the_neighbours_alone(grids, user):
    """One slot holds the bomb; as root, what runs in the other may even start processes of its own."""
    grid = grids(user, EXECUTION_CONCURRENCY=2)
    grid.put({"main.py": FORK_BOMB}, function_id="bomb", request_id="a-bomb", timeoutMs=1000)
    fork = "import subprocess\nsubprocess.run(['true'], check=True)\n" if user == "root" else "print('fine')\n"
    for n in range(20):
        grid.put({"main.py": fork}, function_id="neighbour", request_id=f"neighbour-{n:02}")
    grid.run()
    # On a busy machine a bomb may starve what looks after it for longer than the agent waits: error.
    ends = {report["status"] for report in grid.reports["a-bomb"]}
    assert ends <= {"timeout", "oom", "failed", "error"}, grid.log[-3000:]
    assert {grid[f"neighbour-{n:02}"]["status"] for n in range(20)} == {"ok"}, grid.log[-3000:]


def test_output_keeps_its_first_and_last_32_kib(runs):
    line = "%01023d\n"
    result = runs["300 MB of output"]
    assert result["stdout"].startswith("".join(line % n for n in range(32)))
    assert result["stdout"].endswith("".join(line % n for n in range((300 << 10) - 32, 300 << 10)))
    assert len(result["stdout"]) < 80 << 10
    assert result["peakMemoryBytes"] < 64 * MIB


def test_who_kills_its_parent_gains_nothing(runs):
    """Either the kernel refuses, or the run is lost and said to be."""
    result = runs["SIGKILL for its parent"]
    assert (result["status"] == "ok") == (result["stdout"] == "refused\n"), result


@pytest.mark.slow
def test_python_numpy_runs_under_128_mb(grids, user):
    """numpy reserves far more than it touches; it comes in the zip, as in Lambda."""
    numpy = pytest.importorskip("numpy", reason="numpy is not installed")
    version = said_by(PYTHON, "-c", "import sys; print(sys.version_info[:2])").strip()
    if version != str(sys.version_info[:2]):
        pytest.skip(f"this numpy is not for {PYTHON} ({version})")
    site = Path(numpy.__file__).parents[1]
    skip = re.compile(r"/tests/|/__pycache__/|\.(pyi|a|h)$")
    files = {str(path.relative_to(site)): path.read_bytes() for part in ("numpy", "numpy.libs")
             for path in (site / part).rglob("*") if path.is_file() and not skip.search(str(path))}
    files["main.py"] = "import numpy\nprint(int(numpy.ones((200, 200)).dot(numpy.ones(200)).sum()))\n"
    grid = grids(user)
    grid.put(make_zip(files), memoryMb=128, timeoutMs=60000, request_id="numpy")
    assert grid.run()["numpy"]["stdout"] == "40000\n", grid.log[-3000:]


# --- log lines that a function would forge

BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # reorder what a terminal shows
FORGED = f"BIDI = {BIDI!a}\n" + r"""
import sys
line = "2026-11-22T12:00:00.123Z INFO REPORT requestId=forged functionId=fn runtime=python status=ok"
for end in ("\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x1e", "\x85", "\u2028", "\u2029", "\x1b[2K\x1b[1A", "\x9b1A", "\x00", "\b", "\x7f", *BIDI):
    for stream in (sys.stdout, sys.stderr):
        stream.buffer.write(("a" + end + line + end + line + "\n").encode())
sys.stdout.buffer.write(b"\xff\xfe not UTF-8\n" + line.encode())
"""


@parametrize("log_format", ["text", "json"])
def test_no_function_forges_a_log_line(grids, log_format):
    grid = grids("ordinary")
    grid.put({"main.py": FORGED}, request_id="forger")
    log = grid.run("--log-format", log_format).log
    assert "forged" in log and "not UTF-8" in log
    for line in log.splitlines():  # splits at every kind of line end that Unicode knows
        assert all(unicodedata.category(char) not in ("Cc", "Zl", "Zp") and char not in BIDI for char in line), ascii(line)
        if log_format == "json":
            assert isinstance(json.loads(line), dict), line
        else:
            assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z [A-Z]+ ", line) or "forged" not in line, ascii(line)
    if log_format == "text":
        assert [report["requestId"] for report in reports(log)] == ["forger"]
        for line in log.splitlines():
            assert "forged" not in line or re.match(r"\S+ INFO \[forger\] std(out|err): ", line), ascii(line)


# --- measuring

HOLD_300_MB = ("import runpy, sys; hold = bytearray(300 << 20); sys.argv = sys.argv[2:]; "
               "runpy.run_path(sys.argv[0], run_name='__main__')")


@parametrize("concurrency, prefix", [
    pytest.param(1, (), id="1 slot"),
    pytest.param(3, (), id="3 slots", marks=pytest.mark.slow),
    pytest.param(1, [PYTHON, "-c", HOLD_300_MB], id="agent of 300 MB", marks=pytest.mark.slow)])
def test_peak_is_what_the_function_itself_sees(grids, user, concurrency, prefix):
    """Within 1 MiB or 3 % of its own VmHWM; a small run right after a large one is in the list."""
    source = """
import json, re, sys
block = bytearray(json.load(sys.stdin) << 20)
print(re.search(r"VmHWM:.*", open("/proc/self/status").read())[0])
"""
    grid = grids(user, EXECUTION_CONCURRENCY=concurrency, EXECUTION_MEMORYMB=4096)
    cpp = make_zip({"main*": cpp_binary()})
    grid.put({"main.py": source}, function_id="py", input=0, request_id="r0")
    for mib in (50, 600, 0, 150, 300, 0, 600):
        grid.put(runtime="python", function_id="py", input=mib, memoryMb=1024, timeoutMs=120000)
        grid.put(cpp, runtime="cpp", function_id="cpp", input=f"peak-{mib}" if mib else "hello", memoryMb=1024,
                 timeoutMs=120000)
    grid.run(prefix=prefix)
    for request_id, (report,) in grid.reports.items():
        assert report["status"] == "ok", grid.log[-3000:]
        own = int(re.search(r"VmHWM:\s*(\d+) kB", grid.result(request_id)["stdout"])[1]) << 10
        assert abs(int(report["peakMemoryBytes"]) - own) <= max(MIB, 0.03 * own), (own / MIB, report)


def test_duration_is_what_the_function_itself_sees(grids, user):
    """One at a time, each five times, for a machine may be busy."""
    grid = grids(user, EXECUTION_CONCURRENCY=1)
    files = {"python": {"main.py": "import time\nstart = time.monotonic()\ntime.sleep(0.2)\n"
                                   "print((time.monotonic() - start) * 1e3)\n"},
             "cpp": {"main*": cpp_binary()}}
    for n in range(5):
        for kind in files:
            grid.put(files[kind], kind, kind, f"{kind}-{n}", input="sleep")
    grid.run()
    for kind in files:
        results = [grid[f"{kind}-{n}"] for n in range(5)]
        more = [each["durationMillis"] - float(each["stdout"]) for each in results]
        assert min(more) >= -1, results  # a whole number of milliseconds
        assert min(more) <= 500 * busy(), results  # how near it comes is the benchmark's business


@parametrize("name", ["sleeps", "spins", "stops its group"])
def test_a_run_has_its_time_limit_and_not_much_more(runs, name):
    durations = [int(report["durationMillis"]) for report in runs.reports[slug(name)]]
    assert 399 <= min(durations) <= 400 + 5000 * busy(), durations  # the best of three takes


def test_a_hog_whose_watcher_is_stopped_is_held_by_the_kernel(grids):
    """As it could be by a busy machine."""
    grid = grids("ordinary")
    mark = str(grid.spool / "hog")
    grid.put({"main.py": with_tell(f"mark = {mark!r}") + r"""
import os, time
tell("mark", mark, str(os.getpid()))
while not tell("read", mark + ".go"): time.sleep(0.01)
held = []
try:
    while True:
        held.append(bytearray(1 << 20))
finally:
    del held
    tell("mark", mark + ".held", [line for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""}, request_id="hog", memoryMb=128, timeoutMs=300000)
    with grid.agent() as agent:
        until(lambda: os.path.exists(mark), what="the hog")
        helper = int(stat_of(int(Path(mark).read_text()))[1])
        watcher = int(stat_of(helper)[1])
        os.kill(watcher, signal.SIGSTOP)
        try:
            Path(mark + ".go").write_text("1")
            held = until(lambda: os.path.exists(mark + ".held") and Path(mark + ".held").read_text(),
                         what="what it held")
        finally:
            os.kill(watcher, signal.SIGCONT)
        agent.wait_for("REPORT requestId=hog .* status=oom")
    held_mib = int(re.search(r"VmHWM:\s+(\d+) kB", held)[1]) / 1024
    assert 128 < held_mib <= 4 * 128 + 512 + 16  # what is no data


# --- nothing outlives its run

# Each row leaves a process behind that would tell the witness so when the test says that it is over.
ESCAPES = table(r"""
=== a child
start(LINGER)
=== a session of its own
start(LINGER, start_new_session=True)
=== a daemon
daemon(lambda: os.execvp("bash", LINGER))
os.wait()
=== a daemon deaf to signals
start(["bash", "-c", "trap '' TERM HUP INT QUIT USR1 USR2 CONT TSTP; " + LINGER[2], *LINGER[3:]], start_new_session=True)
=== a stopped daemon
child = start(LINGER, start_new_session=True)
started()
os.kill(child.pid, signal.SIGSTOP)
=== a hundred daemons
for _ in range(100):
    start(LINGER, start_new_session=True)
=== a child that becomes its parent's
import ctypes, platform
clone = {"x86_64": 56, "aarch64": 220}[platform.machine()]
if ctypes.CDLL(None).syscall(clone, 0x8000 | signal.SIGCHLD, 0, 0, 0, 0) == 0:  # CLONE_PARENT
    os.execvp("bash", LINGER)
=== a daemon that forks and ends, for ever
RUNNER = open("main.py").read().partition("# tell")[0] + '''
import os, sys
tell("mark", sys.argv[1] + ".started")
while not tell("read", sys.argv[2]):
    if os.fork(): os._exit(0)
tell("mark", sys.argv[1] + ".late")
'''
start([sys.executable, "-c", RUNNER, *LINGER[3:]], start_new_session=True)
=== namespaces of its own
start(["sh", "-c", 'unshare -Urpf "$@" || exec "$@"', "sh", *LINGER], start_new_session=True)
=== left by a run that fails | | status=failed
start(LINGER, start_new_session=True)
started()
sys.exit(1)
=== left by a run over its time | timeoutMs=5000 | status=timeout
start(LINGER, start_new_session=True)
time.sleep(60)
=== left by a run over its cap | memoryMb=64 | status=oom
start(LINGER, start_new_session=True)
started()
block = [bytearray(1 << 20) for _ in range(1000)]
""")
ESCAPE_HEAD = r"""# tell
import json, os, signal, subprocess, sys, time
spool, tell_in_bash = json.load(sys.stdin)
mark, over = spool + "/" + os.environ["REQUEST_ID"], spool + "/over"  # the first also marks command lines
LINGER = ["bash", "-c", tell_in_bash + 'tell mark "$0.started"; answer=; '
          'until [ "$answer" ]; do sleep 0.2; tell read "$1"; done; tell mark "$0.late"', mark, over]
def start(command, **options):
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, **options)
def started(deadline=time.monotonic() + 100):
    while not tell("read", mark + ".started"):
        if time.monotonic() > deadline:
            raise SystemExit("the child did not start")
        time.sleep(0.005)
"""


@pytest.fixture(scope="module")
def escaped(grids, user):
    """The agent runs on while the rows are looked at: its own end must not be what cleans up."""
    grid = grids(user, EXECUTION_CONCURRENCY=2)
    ends = {name: case._replace(files={"main.py": case.files["main.py"] + "started()\n"})
            for name, case in ESCAPES.items()}
    grid.put_all(ends, with_tell(ESCAPE_HEAD + WORDS), timeoutMs=120000, input=[str(grid.spool), tell_in_bash()])
    with grid.agent() as agent:
        takes = sum(1 if case.expect["status"] == "ok" else 3 for case in ESCAPES.values())
        until(lambda: len(reports(agent.log)) == takes, 400, f"{takes} reports")
        ended = time.monotonic()
        grid.lines = command_lines()
        (grid.spool / "over").write_text("1")
        until(lambda: time.monotonic() > ended + 2, what="two seconds, in which a daemon would write")
        grid.log = agent.log
        agent.stop()
    return grid


@parametrize("name", ESCAPES)
def test_nothing_outlives_its_run(escaped, name):
    check(escaped, name, ESCAPES[name])
    mark = escaped.spool / slug(name)
    assert Path(f"{mark}.started").exists(), escaped[name]
    assert [line for line in escaped.lines.values() if str(mark) in line] == []
    assert not Path(f"{mark}.late").exists()


def test_hundreds_that_have_ended_are_reaped_without_a_look_at_each():
    """What the kernel has killed at a run's time limit waits for that, and the slot's next run with it."""
    command = f"""
import os, sys
sys.path.insert(0, {str(MODULE.parent)!r})
import nanogrid as ng
pids = [os.fork() or os._exit(0) for _ in range(300)]
for pid in pids:
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
looked = []
ng.children_of = lambda pid, look=ng.children_of: looked.append(pid) or look(pid)
ng.end_descendants()
print(len(looked), ng.children_of(os.getpid()))
"""
    looks, left = said_by(PYTHON, "-c", command).split(maxsplit=1)
    assert int(looks) < 10 and left == "[]\n"


# --- confining

CONFINED = table(r"""
=== no privileges
status = dict(line.split(":\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\t" in line)
assert status["NoNewPrivs"] == "1", status
bound = ["CapBnd"] * (60600 <= os.getuid() <= 61183)  # as root
for name in ("CapInh", "CapPrm", "CapEff", "CapAmb", *bound):
    assert int(status[name], 16) == 0, (name, status[name])
assert 0 not in os.getresuid() + os.getresgid(), (os.getresuid(), os.getresgid())
assert len(set(os.getresuid())) == len(set(os.getresgid())) == 1
assert set(os.getgroups()) <= {os.getgid()}, os.getgroups()
=== limits
assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)
is_held = "/slot" in open("/proc/self/cgroup").read()  # what a cgroup limits needs no other
for name in ("NOFILE", "FSIZE", *(["NPROC", "DATA"][2 * is_held:])):
    soft, hard = resource.getrlimit(getattr(resource, "RLIMIT_" + name))
    assert 0 < soft <= hard != resource.RLIM_INFINITY, (name, soft, hard)
=== no inherited descriptors
there = {fd: os.path.realpath("/proc/self/fd/" + fd) for fd in os.listdir("/proc/self/fd")}
listed = f"/proc/{os.getpid()}/fd/"  # what was listed was open, and is closed
others = sorted(fd for fd in there if "libffi" not in there[fd] and there[fd] != listed + fd)
assert others == ["0", "1", "2"], there
=== environment | timeoutMs=59000 memoryMb=200
own = {"HOME", "TMPDIR", "OUTPUT_DIR", "USER", "LOGNAME", "REQUEST_ID", "FUNCTION_ID", "MEMORY_MB", "TIMEOUT_MS"}
assert set(os.environ) == own | {"PATH", "LANG", "TZ"}, dict(os.environ)
expected = {"LANG": "C.UTF-8", "TZ": "Asia/Seoul", "MEMORY_MB": "200", "TIMEOUT_MS": "59000"}
assert expected.items() <= os.environ.items(), dict(os.environ)
assert os.environ["REQUEST_ID"] == os.environ["FUNCTION_ID"] == sys.stdin.read().strip('"')
=== private directories
places = [os.getcwd()] + [os.environ[name] for name in ("HOME", "TMPDIR", "OUTPUT_DIR")]
for place in places:
    with open(os.path.join(place, "probe"), "w") as file:
        file.write("x")
    os.unlink(os.path.join(place, "probe"))
    assert os.path.realpath(place) == place, place
assert sorted(os.listdir()) == ["main.py"], os.listdir()
assert os.listdir(os.environ["TMPDIR"]) == os.listdir(os.environ["OUTPUT_DIR"]) == [], "not fresh"
import tempfile
assert os.path.commonpath([tempfile.gettempdir(), os.environ["TMPDIR"]]) == os.environ["TMPDIR"]
=== the standard input ends | input=[1,{"a":"\u00e9"}] | stdout=[1,{"a":"é"}]
text = sys.stdin.read()
assert sys.stdin.read() == ""
print(json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":")))
=== no input
assert sys.stdin.buffer.read() == b""
=== no secret of the agent's is in reach
for path in glob.glob("/proc/[0-9]*/environ"):
    try:
        with open(path, "rb") as file:
            assert b"tell" + b"tale" not in file.read(), path
    except OSError:
        pass
=== the launcher's memory and environment are closed | root
for name in ("environ", "mem", "maps"):
    assert refused(lambda: open(f"/proc/{os.getppid()}/{name}", "rb").read(1)), name
=== a session and a process group of its own | | stdout=True_True
print(os.getpid() == os.getsid(0), os.getpid() == os.getpgid(0), sep="_")
=== a shell is not in the session that its supervisor leads | cpp
read -r pid name state parent group session rest </proc/$$/stat
[ "$session" != "$parent" ] && [ "$group" != "$parent" ] || { cat /proc/$$/stat; exit 1; }
=== a shell ends its process group but itself | cpp | stdout=fine
trap : TERM; sleep 60 & kill 0; wait; echo -n fine
=== the next run has one again | cpp | stdout=fine
echo -n fine
=== the standard streams can be opened again | cpp | stdout=in_out
echo -n in_ > /dev/stdout; echo out >> /proc/self/fd/1; echo err > /dev/stderr; cat /dev/stdin
=== signals | | stdout=0_1001000
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
status = dict(line.split(":\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\t" in line)
print(status["SigBlk"].lstrip("0") or "0", status["SigIgn"].lstrip("0"), sep="_")  # Python ignores PIPE and XFSZ
=== it has a name and a home | room
import getpass, pwd
entry = pwd.getpwuid(os.getuid())
assert (getpass.getuser(), os.environ["USER"], entry.pw_name) == ("nanogrid",) * 3, entry
assert os.path.expanduser("~") == entry.pw_dir == os.path.expanduser("~nanogrid") == os.environ["HOME"], entry
assert pwd.getpwnam("root").pw_uid == 0
=== it goes first when memory ends | root room
refused(lambda: open("/proc/self/oom_score_adj", "w").write("0"))
assert open("/proc/self/oom_score_adj").read() == "1000\n"
=== outputs that were closed and opened again | | stdoutBytes=200000
path = os.readlink("/proc/self/fd/1")
os.close(1), os.close(2)
time.sleep(0.2)
os.write(os.open(path, os.O_WRONLY), bytes(200000))
=== stopped under its tracer | timeoutMs=1000 | status=timeout
import ctypes
ctypes.CDLL(None).ptrace(0, 0, 0, 0)
os.kill(os.getpid(), signal.SIGSTOP)
=== a terminal is out of reach
assert refused(open, "/dev/tty")
=== it gives way to the agent
assert os.getpriority(os.PRIO_PROCESS, 0) > int(sys.stdin.read()), os.getpriority(os.PRIO_PROCESS, 0)
=== variables that Python reads at its start | env={"PYTHONOPTIMIZE":"2","PYTHONPATH":"/srv/extra"} | stdout=2_True
print(sys.flags.optimize, sys.path[1] == "/srv/extra", sep="_")
=== only a handler has a return value | | stdout=written returnValue=absent
open(os.environ["HOME"].replace("own/home", "feed/returned"), "w").write("1")
print("written")
=== no core file | | status=failed exitCode=-6
os.abort()
""")
CONFINED["it gives way to the agent"].task["input"] = os.getpriority(os.PRIO_PROCESS, 0)
RUNS.update(CONFINED)
# These are run as an executable, too, which a shell forks.
EXECD = ("no privileges", "limits", "no inherited descriptors", "environment", "signals", "stopped under its tracer",
         "it gives way to the agent", "stops its group", "SIGKILL for all it may")
RUNS.update({f"{name}, exec'd": RUNS[name]._replace(
    runtime="cpp", files={"main*": f"#!{PYTHON}\n{RUN_HEAD}{RUNS[name].files['main.py']}"}) for name in EXECD})
for _name in ("environment", "environment, exec'd"):
    RUNS[_name] = RUNS[_name]._replace(task={**RUNS[_name].task, "input": slug(_name)})
# An agent that was started with what no function is to have.
RAISED = """import os, resource, signal, sys
os.open("/dev/zero", 0); os.set_inheritable(3, True)
for number in (1, 2, 3, signal.SIGUSR1, signal.SIGRTMIN): signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2, signal.SIGALRM])
hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
os.execvp(sys.argv[1], sys.argv[1:])"""


@pytest.fixture(scope="module")
def runs(grids, user):
    grid = grids(user, EXECUTION_CONCURRENCY=2)
    grid.env.update(AWS_SECRET_ACCESS_KEY="telltale", GRID_SECRET="telltale", PYTHONPATH="/nonexistent",
                    PYTHONDONTWRITEBYTECODE="1", LD_LIBRARY_PATH="/nonexistent", BASH_ENV="/nonexistent")
    grid.put_all(RUNS, RUN_HEAD)
    return grid.run(prefix=[PYTHON, "-c", RAISED])


@parametrize("name", RUNS)
def test_a_run_ends_as_it_should(runs, name):
    check(runs, name, RUNS[name])


@pytest.mark.skipif(not ROOT, reason="only root gives every slot a uid of its own")
def test_agents_have_uids_of_their_own_whatever_a_function_takes(grids):
    """Each uid has a locked file that root alone opens; names in the abstract space are anybody's."""
    first, second = grids("root", EXECUTION_CONCURRENCY=1), grids("root", EXECUTION_CONCURRENCY=1)
    squat = """
import os, socket, time
taken = [socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(600)]
for number, one in enumerate(taken):
    try:
        one.bind(f"\\0nanogrid-uid-{60600 + number}")
    except OSError:
        pass
print(os.getuid(), flush=True)
time.sleep(100)
"""
    first.put({"main.py": squat}, request_id="squat", timeoutMs=100000)
    second.put({"main.py": "import os; print(os.getuid())"}, request_id="other")
    with first.agent("--log-level", "DEBUG") as agent:
        agent.wait_for("squat.*start")
        uid = int(second.run()["other"]["stdout"])
        # Any other agent of this machine may have it by now.
        with contextlib.suppress(FileNotFoundError, BlockingIOError), ng.locked(f"/run/nanogrid/uid-{uid}"):
            raise AssertionError("a lock that outlives its agent")
        assert uid not in {os.stat(path).st_uid for path in first.base.glob("agent-*/slot0/own/work")}


@parametrize("name", ["root", "0"])
def test_functions_never_run_as_root(grids, user, name):
    grid = grids(user, EXECUTION_RUNAS=name)
    agent = ended(grid.agent("--drain"), 1)
    assert "runAs" in agent.log and len(agent.log.splitlines()) == 1, agent.log


def test_the_log_says_once_how_functions_are_isolated_and_no_core_file_is_left(runs):
    levels = re.findall(r"^\S+ \w+ isolation: (\w+ \w+) user's|isolation: (root)'s with", runs.log, re.MULTILINE)
    assert levels == [("", "root") if runs.user == "root" else ("an ordinary", "")], runs.log
    assert [path for path in runs.top.rglob("core*")] == []


def test_root_of_a_user_namespace_without_other_uids_is_an_ordinary_user(grids, user):
    """It says so once, and its functions have none of the capabilities that it has there."""
    need("unshare")
    if not works(*as_user(user), "unshare", "-Ur"):
        pytest.skip("this machine lets this user make no user namespace")
    grid = grids(user, EXECUTION_CONCURRENCY=3)
    source = "print(open('/proc/self/status').read())"
    for request_id, runtime, files in (("warm", "python", {"main.py": source}), (
            "cold", "cpp", {"run.sh": f'exec {PYTHON} -c "{source}"'})):
        grid.put(files, runtime, function_id=request_id, request_id=request_id)
    grid.run(prefix=["unshare", "-Ur"])
    for request_id in ("warm", "cold"):
        assert grid[request_id]["status"] == "ok", grid.log
        assert re.search(r"^CapEff:\s0+$", grid[request_id]["stdout"], re.MULTILINE)
    assert "isolation: an ordinary user's (this user namespace has no other uid)" in grid.log


# --- a room of its own

# Put around an agent by root: a machine whose /run, /dev/log, /opt and /usr/local/etc are the test's.
STAGE = r"""
top=$1; shift
for name in run opt etc; do mkdir -p "$top/$name"; done
mount -n --bind "$top/run" /run
mount -n --bind "$top/opt" /opt
mount -n --bind "$top/etc" /usr/local/etc
mkdir "$top/dev"
mount -n -t tmpfs dev "$top/dev"
for name in null zero full random urandom tty; do : >"$top/dev/$name"; mount -n --bind "/dev/$name" "$top/dev/$name"; done
mkdir -m 1777 "$top/dev/shm"
mkdir "$top/dev/pts"
mount -n --rbind /dev/pts "$top/dev/pts"
ln -s pts/ptmx /proc/self/fd "$top/dev"
if [ -S /run/systemd/journal/dev-log ]; then
  : >"$top/dev/log"
  mount -n --bind /run/systemd/journal/dev-log "$top/dev/log"
fi
mount -n --move "$top/dev" /dev
rmdir "$top/dev"
exec "$@"
"""


@functools.lru_cache(None)
def has_room(user: str) -> bool:
    """Whether the kernel gives this user namespaces of its own."""
    flags = "-mi" if user == "root" else "-Umi"
    return works(*as_user(user), "unshare", flags)


def need_namespaces(user: str):
    if not has_room(user):
        pytest.skip("this machine gives this user no namespaces")


def need_room(user: str):
    """Skip where the kernel gives this user no namespaces, or no Landlock with scopes."""
    need_namespaces(user)
    if user == "root" and ctypes.CDLL(None).syscall(444, None, 0, 1) < 6:
        pytest.skip("this kernel has no Landlock that scopes sockets and signals (6.12)")


class Ears:
    """The machine's sockets that functions must not reach: what comes is in `heard`, by name."""

    KINDS = {
        "systemd/journal/stdout": socket.SOCK_STREAM, "systemd/journal/socket": socket.SOCK_DGRAM,
        "systemd/journal/dev-log": socket.SOCK_DGRAM, "systemd/notify": socket.SOCK_DGRAM,
        "dbus/system_bus_socket": socket.SOCK_STREAM}

    def __init__(self, top: Path):
        self.heard: dict[str, bytes] = collections.defaultdict(bytes)
        abstract = f"@nanogrid-test-{os.urandom(4).hex()}"
        self.names = [*(f"/run/{name}" for name in self.KINDS), "/dev/log", abstract]
        self.sockets = []
        for name, kind in {**self.KINDS, abstract: socket.SOCK_DGRAM}.items():
            ear = socket.socket(socket.AF_UNIX, kind)
            if name == abstract:
                ear.bind(name.replace("@", "\0"))
            else:
                (top / name).parent.mkdir(parents=True, exist_ok=True)
                ear.bind(str(top / name))
                (top / name).chmod(0o777)
            if kind == socket.SOCK_STREAM:
                ear.listen()
            self.sockets.append(ear)
            threading.Thread(target=self.hear, args=(name, ear), daemon=True).start()

    def hear(self, name: str, ear: socket.socket):
        with contextlib.suppress(OSError):
            while True:
                said = ear.accept()[0] if ear.type == socket.SOCK_STREAM else ear
                self.heard[name] += said.recv(4096) or b"nothing"

    def close(self):
        for ear in self.sockets:
            with contextlib.suppress(OSError):
                ear.shutdown(socket.SHUT_RDWR)
            ear.close()


SPEAK = r"""
import syslog
for name in given["sockets"]:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_UNIX, kind) as mouth:
            try:
                mouth.connect(name.replace("@", "\0"))
                mouth.sendall(b"forged\n")
                print("reached", name)
            except OSError:
                pass
syslog.syslog("forged by syslog(3)")
"""
KEY = 0x4e474e00 + 2 * (os.getpid() % 4096)  # of System V's IPC, and this session's own
ROOM_HEAD = r"""
import ctypes, glob, json, os, socket, stat, sys
given = json.load(sys.stdin)
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)
def attempt(what, *arguments):
    try:
        answer = what(*arguments)
    except (OSError, ValueError):
        return None
    print("did", getattr(what, "__name__", what), arguments, flush=True)
    return answer
def look(root=""):
    for path in given["secrets"]:
        try:
            with open(root + path) as file:
                if "telltale" in file.read(): print("read", root + path, flush=True)
        except OSError:
            pass
def in_child(step, *arguments):
    fork(1, lambda _: refused(step, *arguments))
    wait_for_all()
""" + WORDS
ROOM = table(r"""
=== it tells no service of the machine a thing | root
""" + SPEAK + r"""
=== it reads neither the settings nor the agent's file
look()
for root in [*glob.glob("/proc/[0-9]*/root"), *glob.glob("/proc/[0-9]*/cwd"), *glob.glob("/proc/self/fd/*")]:
    for up in ("", "/..", "/../..", "/../../..", "/../../../..", "/../../../../.."):
        look(root + up)
=== it gets no file system of its own that could hold it for ever
attempt(os.open, "/dev/fuse", os.O_RDWR)
=== it writes nowhere outside | root
for place in given["places"]:
    attempt(os.mkdir, place + "/made")
    attempt(open, place + "/made-file", "w")
    attempt(os.symlink, "/etc", place + "/made-link")
    attempt(os.mkfifo, place + "/made-fifo")
    attempt(os.rename, place, place + "-moved")
    attempt(os.chmod, place, 0o777)
    for path in glob.glob(place + "/*"):
        if os.path.isfile(path) and not os.path.islink(path):
            attempt(os.unlink, path)
            attempt(os.link, path, os.environ["TMPDIR"] + "/linked")
            attempt(os.rename, path, os.environ["TMPDIR"] + "/stolen")
            attempt(open, path, "r+b")
            attempt(os.utime, path, (1, 1))
=== no mount is taken away, and none is made | root
MNT_DETACH, MS_REMOUNT, MS_BIND, MS_REC, AT_FDCWD = 2, 32, 4096, 16384, -100
covers = ["/run", "/opt/nanogrid", "/usr/local/etc/application.yml", "/tmp", "/var/tmp", "/dev/shm", "/dev/log", "/proc", "/dev/pts"]
def break_out(flags):
    uid, gid = os.getuid(), os.getgid()
    if flags: call("unshare", flags)
    for name, text in ("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1"):
        try:
            open("/proc/self/" + name, "w").write(text)
        except OSError:
            pass
    if flags & 1 << 29: in_child(tear)
    tear()
def tear():
    here = os.environ["TMPDIR"]
    for cover in covers:
        attempt(call, "umount2", cover.encode(), 0)
        attempt(call, "umount2", cover.encode(), MNT_DETACH)
        attempt(call, "mount", b"none", cover.encode(), None, MS_REMOUNT | MS_BIND, None)
        attempt(call, "mount", b"x", cover.encode(), b"tmpfs", 0, None)
        look()
    for source, flags in (b"/", MS_BIND), (b"/", MS_BIND | MS_REC), (b"/dev", MS_BIND), (b"/opt", MS_BIND), (b"/proc/1/root", MS_BIND):
        os.makedirs(here + "/on", exist_ok=True)
        attempt(call, "mount", source, (here + "/on").encode(), None, flags, None)
        look(here + "/on")
    attempt(call, "mount", b"proc", b"/proc", b"proc", 0, None)
    attempt(call, "pivot_root", b".", b".")
    for flags in 0x1, 0x8001:  # OPEN_TREE_CLONE, AT_RECURSIVE: open_tree(2)
        fd = libc.syscall(428, AT_FDCWD, b"/", flags)
        if fd >= 0: look(f"/proc/self/fd/{fd}")
    look()
NEWUSER, NEWNS, NEWPID, NEWIPC = 1 << 28, 1 << 17, 1 << 29, 1 << 27
for flags in 0, NEWNS, NEWUSER, NEWUSER | NEWNS, NEWUSER | NEWNS | NEWPID | NEWIPC:
    in_child(break_out, flags)
=== it joins no namespace of another process
for path in sorted(glob.glob("/proc/[0-9]*/ns/*")):
    if os.path.exists(path) and os.readlink(path) != os.readlink("/proc/self/ns/" + os.path.basename(path)):
        attempt(lambda path=path: call("setns", os.open(path, os.O_RDONLY), 0))
attempt(os.chroot, "/")
for kind in stat.S_IFBLK, stat.S_IFCHR: attempt(os.mknod, "device", kind | 0o666, os.makedev(1, 1))
=== it sees no terminal of the machine, and has its own
import pty
assert set(os.listdir("/dev/pts")) == {"ptmx"}, os.listdir("/dev/pts")
ours, theirs = pty.openpty()
os.write(theirs, b"own"); assert os.read(ours, 3) == b"own"
assert "0" in os.listdir("/dev/pts")
""")


class Stage:
    """A grid whose agent has its settings and its file in /opt/nanogrid, on a stage of its own."""

    def __init__(self, grid: Folder):
        self.grid, self.top = grid, grid.top / "stage"
        site = self.top / "opt" / "nanogrid"
        for place in (site, self.top / "opt" / "open", self.top / "opt" / "home", self.top / "etc"):
            place.mkdir(parents=True)
        shutil.copy(MODULE, site)
        settings = "# telltale\nagent:\n  execution:\n    concurrency: 2\n"
        files = [site / "application.yml", self.top / "opt/home/.profile", self.top / "opt/open/file",
                 self.top / "etc/application.yml", self.top / "run/secret"]
        self.ears = Ears(self.top / "run")
        for path in files:
            path.write_text(settings)
        for path in (self.top, *self.top.rglob("*")):
            os.chown(path, *(0, 0) if grid.user == "root" else (ORDINARY, ORDINARY))
            if not path.is_socket():
                path.chmod(0o755 if path.is_dir() else 0o644)
        (self.top / "opt/open").chmod(0o777)
        grid.env.update(HOME="/opt/home", NOTIFY_SOCKET="/run/systemd/notify")
        places = ["/opt/nanogrid", "/opt/home", "/usr/local/etc", "/", "/etc", "/var", "/usr", "/run",
                  str(grid.base), str(grid.path), *(["/opt/open"] if grid.user == "ordinary" else [])]
        self.given = {"sockets": self.ears.names, "places": places, "secrets": [
            "/opt/nanogrid/application.yml", "/run/secret"]}

    def command(self, *words) -> list[str]:
        return ["unshare", "-m", "sh", "-euc", STAGE, "sh", str(self.top), *as_user(self.grid.user), *words]

    def agent(self, *args, config="/opt/nanogrid/application.yml") -> Agent:
        return Agent("--local", self.grid.path, "--config", config, *args, python=PYTHON,
                     module="/opt/nanogrid/nanogrid.py", env=self.grid.env, prefix=self.command())

    def seen(self) -> dict[str, tuple]:
        """What is to stay as it is: every path, its mode, times and content."""
        return {str(path): (path.lstat().st_mode, path.lstat().st_mtime_ns, path.is_file() and path.read_bytes())
                for path in self.top.rglob("*")}


@pytest.fixture(scope="module")
def stages(grids):
    """Makes Stages; root alone can."""
    made = []

    def make(user, **settings) -> Stage:
        if not ROOT:
            pytest.skip("a /run and an /opt of the test's own need root")
        need_room(user)
        made.append(Stage(grids(user, **settings)))
        return made[-1]
    yield make
    for stage in made:
        stage.ears.close()


@pytest.fixture(scope="module")
def room(stages, user):
    stage = stages(user)
    stage.grid.put_all(ROOM, ROOM_HEAD, timeoutMs=120000, input=stage.given)
    before = stage.seen()
    with stage.agent("--drain") as agent:
        status = agent.end(400)
    stage.log, stage.changed = agent.log, {path for path, seen in stage.seen().items() if before.get(path) != seen}
    assert status == 0, agent.log
    return stage


@parametrize("name", ROOM)
def test_a_room_shares_nothing_with_the_machine(room, name):
    result = check(room.grid, name, ROOM[name])
    assert result["stdout"] == "", (result["stdout"], result["stderr"])


def test_nothing_came_out_of_a_room(room):
    """The agent itself still speaks to systemd; what the same words do outside is heard."""
    until(lambda: b"READY=1" in room.ears.heard["systemd/notify"], what="READY=1")
    assert not [said for said in room.ears.heard.values() if b"forged" in said]
    assert room.changed <= {str(room.top / "run")}  # where the agent locks its uids
    assert "functions may" not in room.log, room.log
    spoken = room.command(PYTHON, "-c", ROOM_HEAD + SPEAK + "look()")
    said = said_by(*spoken, input=json.dumps(room.given))
    assert len(re.findall("^reached ", said, re.MULTILINE)) == len(room.given["sockets"]), said
    assert len(re.findall("^read ", said, re.MULTILINE)) == len(room.given["secrets"]), said
    until(lambda: sum(b"forged" in said for said in room.ears.heard.values()) == len(room.ears.sockets),
          what="what was said outside")


NEIGHBOUR = r"""
import ctypes, json, os, resource, socket, sys, time
libc = ctypes.CDLL(None, use_errno=True)
spool, me, other, key = json.load(sys.stdin)
def meet(stage, text="1"):
    tell("mark", spool + "/" + me + stage, text)
    end = time.monotonic() + 100
    while not (said := tell("read", spool + "/" + other + stage)):
        if time.monotonic() > end: raise SystemExit("alone at " + stage)
        time.sleep(0.005)
    return json.loads(said)
def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)
def pass_descriptor(address):
    with socket.socket(socket.AF_UNIX) as mouth:
        mouth.connect(address)
        socket.send_fds(mouth, [b"x"], [1])
def take_descriptor(pid):
    call("syscall", 438, os.pidfd_open(pid), 1, 0)  # pidfd_getfd(2)
def on_process(pid):
    attempts = [(open, f"/proc/{pid}/{name}", "rb") for name in ("environ", "mem", "maps")]
    attempts += [(os.readlink, f"/proc/{pid}/{name}") for name in ("fd/0", "fd/1", "root", "cwd", "ns/mnt")]
    attempts += [(call, "ptrace", 0x4206, pid, 0, 0), (take_descriptor, pid)]  # PTRACE_SEIZE
    attempts += [(os.kill, pid, 0), (os.setpriority, os.PRIO_PROCESS, pid, 5), (os.listdir, f"/proc/{pid}/fd"),
                 (os.stat, f"/proc/{pid}"), (resource.prlimit, pid, resource.RLIMIT_CPU), (os.sched_setaffinity, pid, [0])]
    return attempts
def on_files(its):
    attempts = [(open, path) for path in its["files"]]
    attempts += [(pass_descriptor, address.replace("@", "\0")) for address in its["sockets"]]
    attempts += [(call, "shmget", key + (other == "b"), 1, 0)]
    for place in its["places"]:
        attempts += [(os.listdir, place), (open, place + "/secret"), (open, place + "/new", "w"),
                     (os.unlink, place + "/secret"), (os.rename, place, place + "-moved"), (os.chmod, place, 0o777)]
    return attempts
places = [os.getcwd()] + [os.environ[name] for name in ("HOME", "TMPDIR", "OUTPUT_DIR")]
shared = [f"{place}/nanogrid-from-{me}" for place in ("/tmp", "/var/tmp", "/dev/shm")]
for path in shared + [place + "/secret" for place in places]:
    open(path, "w").write("mine")
ears = [socket.socket(socket.AF_UNIX) for _ in range(2)]
sockets = [f"/tmp/nanogrid-{me}", f"@nanogrid-{key}-{me}"]
for ear, address in zip(ears, sockets):
    ear.bind(address.replace("@", "\0"))
    ear.listen()
    pass_descriptor(address.replace("@", "\0"))  # to itself it can
call("shmget", key + (me == "b"), 1, 0o1666)
its = meet(".ready", json.dumps({"pid": os.getpid(), "uid": os.getuid(), "places": places, "files": shared, "sockets": sockets}))
while not (pids := tell("read", spool + "/pids")): time.sleep(0.005)
taken = []
for attempt, *arguments in on_files(its) + [each for pid in {its["pid"], *json.loads(pids)} - {os.getpid()} for each in on_process(pid)]:
    try:
        attempt(*arguments)
        taken.append([attempt.__name__, *arguments])
    except OSError:
        pass
meet(".done")
print(json.dumps([its["uid"] != os.getuid(), taken]))
"""


@pytest.mark.skipif(not ROOT, reason="only root gives every slot a uid of its own")
def test_slots_and_processes_of_others_cannot_be_touched(grids):
    """Two runs meet, and each tries what it can against the other and all that stands above them."""
    need_room("root")
    grid = grids("root", EXECUTION_CONCURRENCY=2)
    for me, other in (("a", "b"), ("b", "a")):
        grid.put({"main.py": with_tell(NEIGHBOUR)}, request_id=me, timeoutMs=300000,
                 input=[str(grid.spool), me, other, KEY])
    with grid.agent("--drain") as agent:
        until(lambda: all((grid.spool / f"{name}.ready").exists() for name in "ab"), what="both runs")
        above = [*family(agent.process.pid), os.getpid(), 1]
        (grid.spool / "pids").write_text(json.dumps(above))
        assert agent.end() == 0
    assert len(above) >= 1 + 1 + 2 + 2 + 2 + 2, above
    for name in "ab":
        assert grid[name]["stdout"] == "[true, []]\n", grid[name]
    assert not list(Path("/tmp").glob("nanogrid-from-*")) + list(Path("/dev/shm").glob("nanogrid-from-*"))


@parametrize("user", ["root", "ordinary"])
def test_settings_that_are_replaced_stay_hidden(stages, user):
    """Who renames a file over a mount point takes the mount away, as editors and deployments do."""
    source = r"""
import os, sys
for path in sys.stdin.read().strip('"').split():
    try:
        print(open(path).read())
    except OSError as error:
        print(type(error).__name__)
"""
    stage = stages(user)
    settings, path = stage.top / "etc/application.yml", "/usr/local/etc/application.yml"
    with stage.agent(config=path) as agent:
        for n in range(3):
            stage.grid.put({"main.py": source}, request_id=f"look-{n}", input=path)
            agent.until_ok(f"look-{n}")
            new = settings.with_suffix(".new")
            new.write_text("# telltale of another\n")
            new.chmod(0o644)
            new.rename(settings)
        assert agent.stop() == 0
        assert "telltale" not in agent.log and agent.log.count("PermissionError") >= 3, agent.log


# What counts as disk, wherever it lies.
HOARDS = table(r"""
=== empty files in the shared memory | | stdout=refused
try:
    for n in range(5001): open(f"/dev/shm/{n}", "w").close()
except OSError:
    print("refused")
=== all that lies in the machine's places for files of a moment | timeoutMs=120000 | status=failed reason=disk
import time
open("/tmp/big", "wb").write(bytes(40 << 20))
open("/var/tmp/big", "wb").write(bytes(40 << 20))
time.sleep(60)
=== files without end there | timeoutMs=300000 | status=failed/error reason=disk
for n in range(1000000): open(f"/var/tmp/{n}", "w").close()
=== what may be | memoryMb=200 | stdout=fine peakMib=145..190
import mmap, os, time
from multiprocessing import shared_memory
block = shared_memory.SharedMemory(create=True, size=90 << 20)
block.buf[::4096] = bytes(len(block.buf) // 4096)
memory = os.memfd_create("x")
os.ftruncate(memory, 50 << 20)
mapped = mmap.mmap(memory, 50 << 20)
mapped[::4096] = bytes(len(mapped) // 4096)
if os.fork():
    os.wait()
    block.unlink()
    print("fine")
else:
    time.sleep(1)
    os._exit(0)
""")


@pytest.fixture(scope="module")
def hoards(grids, user):
    """One slot: after each hoarder comes a run that finds nothing of it."""
    need_room(user)
    grid = grids(user, EXECUTION_CONCURRENCY=1, EXECUTION_MAXDISKMB=64, EXECUTION_MAXFILES=5000)
    for name, case in HOARDS.items():
        grid.put(case.files, request_id=slug(name), function_id=slug(name), **case.task)
        grid.put({"main.py": NOTHING_LEFT}, request_id=f"after-{slug(name)}", function_id="after")
    return grid.run()


NOTHING_LEFT = r"""
import os
for path in "/dev/shm", "/tmp", "/var/tmp":  # but for what holds the slot's own directories
    left = [name for name in os.listdir(path) if not os.getcwd().startswith(f"{path}/{name}/")]
    assert left == [] and os.stat(path).st_mode & 0o7777 == 0o1777, (path, left, os.stat(path))
status = os.statvfs("/dev/shm")
assert status.f_bfree == status.f_blocks, "the shared memory is not empty"
for kind in "shm", "sem", "msg":
    assert len(open(f"/proc/sysvipc/{kind}").readlines()) == 1, kind
"""


@pytest.mark.slow
@parametrize("name", HOARDS)
def test_a_hoard_counts(hoards, name):
    result = check(hoards, name, HOARDS[name])
    assert int(result["peakMemoryBytes"]) <= (2 * 128 + 256) * MIB
    after = hoards[f"after-{slug(name)}"]
    assert after["status"] == "ok", after


class Network:
    """A network namespace: run() has a function of this process called in it."""

    def __init__(self):
        self.pool = ThreadPoolExecutor(1)  # its one thread lives there, and what it starts
        self.thread = self.run(self._leave)
        self.ip("link set lo up")

    @staticmethod
    def _leave() -> int:
        assert ctypes.CDLL(None).unshare(1 << 30) == 0  # CLONE_NEWNET
        return threading.get_native_id()

    def run(self, function, *args, **kwargs):
        return self.pool.submit(functools.partial(function, *args, **kwargs)).result()

    def ip(self, words: str) -> str:
        return self.run(said_by, "ip", *words.split())


class NamelessServer(ThreadingTCPServer):
    """An HTTP server that asks no resolver for its name, for there is none where it stands."""
    daemon_threads = allow_reuse_address = True


@contextlib.contextmanager
def cloud():
    """(a machine's network, the Imds that answers it at 169.254.169.254 and, if it can, fd00:ec2::254)."""
    machine, outside = Network(), Network()
    outside.ip(f"link add outside type veth peer name eth0 netns {machine.thread}")
    for network, name, own, gateway in (outside, "outside", 1, 2), (machine, "eth0", 2, 1):
        network.ip(f"address add 10.9.0.{own}/24 dev {name}")
        network.ip(f"link set {name} up")
        network.ip(f"route add default via 10.9.0.{gateway}")
    outside.ip("address add 169.254.169.254/32 dev outside")
    servers = [outside.run(NamelessServer, ("169.254.169.254", 80), Imds)]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # a machine without IPv6
        outside.ip("address add fd00:ec2::254/64 dev outside nodad")
        machine.ip("address add fd00:ec2::2/64 dev eth0 nodad")
        by_ipv6 = type("NamelessServer6", (NamelessServer,), {"address_family": socket.AF_INET6})
        servers.append(outside.run(by_ipv6, ("fd00:ec2::254", 80), Imds))
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield machine, servers
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
        for network in (machine, outside):
            network.pool.shutdown()


REACH = r"""
import ctypes, os, socket, sys
def tell(what, call, *arguments):
    try:
        call(*arguments)
        said = "reached"
    except BlockingIOError:  # it is under way
        said = "reached"
    except OSError as error:
        said = type(error).__name__
        if said == "ConnectionAbortedError":  # of the first try, once
            return tell(what, call, *arguments)
    if what: print(said, what)
def reach(family, address, kind=socket.SOCK_STREAM, device=b""):
    with socket.socket(family, kind) as mouth:
        mouth.settimeout(3)
        if device: mouth.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device)
        tell(address, mouth.connect, (address, 80))
def sneak():
    # An IPv6 socket keeps the device of a link-local address that refused it.
    own = [line.split()[0] for line in open("/proc/net/if_inet6") if line.startswith("fe80") and line.endswith(" eth0\n")]
    address = socket.inet_ntop(socket.AF_INET6, bytes.fromhex(own[0]))
    with socket.socket(socket.AF_INET6) as mouth:
        mouth.settimeout(3)
        tell("", mouth.connect, (address, 1, 0, socket.if_nametoindex("eth0")))
        tell("sneaking", mouth.connect, ("::ffff:169.254.169.254", 80))
def fast_open():
    with socket.socket() as mouth:
        mouth.setblocking(False)
        tell("fast", mouth.sendto, b"GET / HTTP/1.0\r\n\r\n", 0x20000000, ("169.254.169.254", 80))
def reach_all():
    reach(socket.AF_INET, "169.254.169.254")
    sneak()
    fast_open()
    reach(socket.AF_INET, "169.254.169.254", socket.SOCK_DGRAM)
    reach(socket.AF_INET, "169.254.169.254", device=b"eth0")
    reach(socket.AF_INET6, "::ffff:169.254.169.254")
    reach(socket.AF_INET6, "fd00:ec2::254")
reach_all()
sys.stdout.flush()
child = os.fork()
if not child:
    ctypes.CDLL(None).unshare(1 << 28)  # a user namespace of its own changes nobody's uid
    reach_all()
    sys.stdout.flush()
    os._exit(0)
os.waitpid(child, 0)
"""


# botocore asks the instance metadata once, for one second: a stand-in on a busy machine takes longer.
SLOW_IMDS = {"AWS_METADATA_SERVICE_TIMEOUT": "60", "AWS_METADATA_SERVICE_NUM_ATTEMPTS": "3"}


@pytest.mark.skipif(not ROOT, reason="a network with a stand-in for the instance metadata needs root")
def test_the_instance_metadata_is_the_agents_alone(moto, grids):
    """A role's credentials and the spot notice reach the agent, and whoever else is no function."""
    need("ip")
    with site(moto, visibility=600) as aws, cloud() as (machine, servers), machine.run(FaultProxy, moto) as proxy:
        Imds.announced = False
        env = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "false",
               "AWS_ENDPOINT_URL": proxy.url, "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
               "AWS_CONFIG_FILE": "/nonexistent", **SLOW_IMDS, "AGENT_AWS_SPOTINTERRUPTION": "true",
               "AGENT_EXECUTION_SHUTDOWNGRACESECONDS": "1"}
        for user in ("root", "ordinary"):
            grid = grids(user, AWS_REGION="ap-northeast-2")  # without it an ordinary user is on a laptop
            with machine.run(grid.agent, "--check") as agent:
                assert agent.end() == 0, agent.out
            open_still = re.search(r"^ok +sandbox: .*functions reach the instance metadata", agent.out, re.MULTILINE)
            assert bool(open_still) == (user != "root"), agent.out
        aws.put({"main.py": REACH}, "reach.zip")
        said = machine.run(said_by, *as_user("ordinary"), PYTHON, "-c", REACH)
        reached = set(re.findall(r"^reached (\S+)$", said, re.MULTILINE))
        assert reached >= {"169.254.169.254", "fast", *["fd00:ec2::254"][:len(servers) - 1]}, said
        for request_id in ("refused", "again"):
            with machine.run(aws.agent, env=env) as agent:
                aws.send(request_id, key="reach.zip", timeoutMs=60000)
                agent.until_ok(request_id)
                if request_id == "again":
                    Imds.announced = True
                    agent.wait_for("EC2 will interrupt")
                    assert agent.end() == 0
                else:
                    assert agent.stop() == 0
            said = re.findall(r"stdout: (\w+) (\S+)$", agent.log, re.MULTILINE)
            assert len(said) == 14 and {word for word, _ in said} == {"PermissionError"}, agent.log
            assert not [line for line in complaints(agent.log) if re.search("metadata|credential", line)]


LOOPBACK_ALONE = r"""
import json, os, socket, sys, threading
port, = json.load(sys.stdin)
assert [line.split(":")[0].strip() for line in open("/proc/net/dev").readlines()[2:]] == ["lo"]
for family, address in (socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"):
    try:
        ear = socket.socket(family)
        ear.bind((address, 0))
    except OSError:
        assert family == socket.AF_INET6
        continue
    ear.listen()
    threading.Thread(target=lambda: ear.accept()[0].sendall(b"heard"), daemon=True).start()
    with socket.create_connection(ear.getsockname()[:2], 60) as mouth: assert mouth.recv(5) == b"heard"
for address in ("127.0.0.1", port), ("169.254.169.254", 80), ("10.9.0.1", 80), ("8.8.8.8", 53), ("fd00:ec2::254", 80):
    try:
        socket.create_connection(address, 3)
        print("reached", address)
    except OSError as error:
        assert type(error) is not TimeoutError, address
try:
    socket.getaddrinfo("nanogrid.example", 80)
    print("resolved")
except OSError:
    pass
"""


def test_without_a_network_there_is_a_loopback_and_nothing_else(grids, user):
    need_room(user)
    grid = grids(user, EXECUTION_NETWORK="none", EXECUTION_CONCURRENCY=2)
    for runtime, files in ("python", {"main.py": LOOPBACK_ALONE}), ("cpp", {
            "main.py": LOOPBACK_ALONE, "run.sh": f"exec {PYTHON} main.py"}):
        grid.put(files, runtime, request_id=runtime, function_id=runtime, input=[witness()], timeoutMs=120000)
    grid.run()
    for name in ("python", "cpp"):
        assert (grid[name]["status"], grid[name]["stdout"]) == ("ok", ""), grid[name]
    assert "metadata" not in grid.log, grid.log


def test_who_asks_for_no_network_has_none_or_no_run(grids, user):
    grid = grids(user, EXECUTION_NETWORK="none")
    grid.put({"main.py": "print('ran')"})
    with grid.agent("--drain", prefix=refusing("unshare")) as agent:
        assert agent.end() == 1, agent.log
    assert "agent.execution.network none" in agent.log and "ran" not in agent.log


# --- a kernel that gives less

def refusing(*names: str) -> list[str]:
    """The words before a command for which the kernel refuses these: unshare (EPERM), landlock (ENOSYS)."""
    # Has the kernel refuse system calls as a container does or an old kernel: seccomp(2), by prctl(2).
    source = r"""
import ctypes, os, platform, struct, sys
numbers = {"x86_64": {"unshare": 272}, "aarch64": {"unshare": 97}}[platform.machine()]
numbers["landlock"] = 444
code = lambda op, yes, no, value: struct.pack("HBBI", op, yes, no, value)
program = code(0x20, 0, 0, 0)  # the system call's number
for name, error in zip(sys.argv[1].split(","), sys.argv[2].split(",")):
    program += code(0x15, 0, 1, numbers[name]) + code(0x06, 0, 0, 0x50000 | int(error))
program += code(0x06, 0, 0, 0x7FFF0000)
text = ctypes.create_string_buffer(program)
class Filter(ctypes.Structure):
    _fields_ = [("size", ctypes.c_ushort), ("text", ctypes.c_void_p)]
prctl = ctypes.CDLL(None, use_errno=True).prctl
assert prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert prctl(22, 2, ctypes.byref(Filter(len(program) // 8, ctypes.addressof(text)))) == 0, ctypes.get_errno()
os.execvp(sys.argv[3], sys.argv[3:])
"""
    errors = ",".join("1" if name == "unshare" else "38" for name in names)
    return [PYTHON, "-c", source, ",".join(names), errors]


FRESH_CONTAINER = r"""
import multiprocessing, os, pty, socket, sqlite3, subprocess, tempfile, threading, time
from multiprocessing import shared_memory
def work(n):
    with lock: return n * n
multiprocessing.set_start_method("fork")  # since Python 3.14 another is the default, which runs this file again
lock = multiprocessing.Lock()
with multiprocessing.Pool(2) as pool: assert pool.map(work, range(5)) == [0, 1, 4, 9, 16]
with multiprocessing.Manager() as manager: assert list(manager.list([1, 2])) == [1, 2]
block = shared_memory.SharedMemory(create=True, size=1 << 20); block.buf[0] = 7; block.close(); block.unlink()
values = multiprocessing.Array("i", 10); values[0] = 1
assert multiprocessing.Queue().empty() and multiprocessing.Semaphore(2).acquire()
assert subprocess.run("cat <<< here | tee $TMPDIR/x | wc -c > $TMPDIR/y; cat $TMPDIR/y", shell=True, executable="/bin/bash",
                      capture_output=True, text=True, check=True).stdout.strip() == "5"
with tempfile.NamedTemporaryFile() as named, tempfile.TemporaryFile() as unnamed: named.write(b"x"), unnamed.write(b"x")
database = sqlite3.connect("base.sqlite"); database.execute("create table t (n)"); database.commit()
threads = [threading.Thread(target=time.sleep, args=(0.01,)) for _ in range(8)]
for each in threads: each.start()
with socket.create_server(("127.0.0.1", 0)) as ear, socket.create_connection(ear.getsockname()): ear.accept()
with socket.socket(socket.AF_UNIX) as ear: ear.bind(os.environ["TMPDIR"] + "/socket"); ear.listen()
os.mkfifo("fifo"); os.symlink("fifo", "link"); os.mkdir("d"); os.rename("fifo", "d/fifo"); os.link("base.sqlite", "d/base")
os.replace("d/base", os.environ["HOME"] + "/base"); os.chmod("d", 0o700); os.utime("d"); os.truncate("base.sqlite", 0)
open("/dev/null", "w").write("x"); open("/dev/stdout", "w").write("fine\n"); open("/dev/stderr", "a").write("")
if os.access("/dev/ptmx", os.R_OK | os.W_OK): pty.openpty()
os.close(os.memfd_create("x")); os.sched_getaffinity(0); open("/proc/self/status").read(), os.listdir("/proc/self/task")
"""
LESS = {"unshare": "share /tmp, /dev/shm, /run and IPC", "landlock": "abstract sockets"}


@parametrize("refused", [(), *((name,) for name in LESS), tuple(LESS)], ids="-".join)
def test_what_the_kernel_does_not_give_is_said_once_and_functions_run(grids, user, refused):
    need_room(user)
    grid = grids(user, EXECUTION_CONCURRENCY=2)
    for n in range(3):
        grid.put({"main.py": FRESH_CONTAINER}, request_id=f"r{n}", timeoutMs=300000)
    grid.run(prefix=refusing(*refused) if refused else [])
    for n in range(3):
        assert (grid[f"r{n}"]["status"], grid[f"r{n}"]["stdout"]) == ("ok", "fine\n"), grid[f"r{n}"]
    said, = re.findall(r"^\S+ \w+ isolation: (.*)$", grid.log, re.MULTILINE)
    for name, words in LESS.items():
        is_said = name in refused and (user, name) != ("ordinary", "landlock")  # root's alone
        assert (words in said) == is_said, (name, said)
    assert not complaints(grid.log), grid.log


def test_what_starts_functions_is_written_again_where_one_could_take_it_away(grids):
    """Only the agent's own user can, and only where it has no room."""
    grid = grids("ordinary", EXECUTION_CONCURRENCY=1)
    sources = {"a-taker": "import os\nfor name in 'sh', 'main.py': os.unlink('../../../' + name)",
               "b-shell": "echo fine", "c-warm": "print('fine')"}
    for name, source in sources.items():
        is_shell = name == "b-shell"
        grid.put({"run.sh" if is_shell else "main.py": source}, "cpp" if is_shell else "python",
                 function_id=name, request_id=name)
    grid.run(prefix=refusing("unshare"))
    assert [grid[name]["stdout"] for name in sources] == ["", "fine\n", "fine\n"]
    assert grid["a-taker"]["status"] == "ok"


@pytest.mark.slow
def test_a_fork_bomb_that_goes_on_at_the_end_leaves_nothing(grids, user):
    # What it forks while it is ended is ended, too.
    source = r"""
import os, time
def bomb():
    while True:
        try:
            if not os.fork(): os.setsid()
        except OSError:
            pass
if not os.fork(): bomb()
time.sleep(0.3)
for place in "/dev/shm", "/tmp": open(place + "/left", "w").close()
"""
    need_room(user)
    grid = grids(user, EXECUTION_CONCURRENCY=1)
    for n in range(2):
        grid.put({"main.py": source}, function_id="bomb", request_id=f"{n}-a", timeoutMs=20000)
        grid.put({"main.py": NOTHING_LEFT}, function_id="after", request_id=f"{n}-b")
    grid.run()
    assert {grid[f"{n}-b"]["status"] for n in range(2)} == {"ok"}, grid.log[-3000:]
    assert not [line for line in command_lines().values() if str(grid.base) in line]


# --- the cgroup


@functools.lru_cache(None)
def has_cgroup() -> bool:
    """Whether the kernel can hold here what root's functions use."""
    with contextlib.suppress(OSError):
        offered = Path(ng.cgroup_root(), "cgroup.controllers").read_text().split()
        return ROOT and {"memory", "pids", "cpu"} <= set(offered)
    return False


def under_cgroup(test):
    """Marks a test that needs root and a cgroup v2."""
    return pytest.mark.cgroup(pytest.mark.skipif(
        not has_cgroup(), reason="root and a cgroup v2 are needed; .ci/run boots a machine that has one")(test))


def agents_cgroups() -> set[str]:
    return {path.name for path in Path(ng.cgroup_root()).glob("nanogrid-*")}


COUNTED = table(r"""
=== shared memory that nothing has mapped any more | memoryMb=64 | status=oom
block = mmap.mmap(-1, 400 << 20)
for at in range(0, len(block), 4 << 20):
    block[at:at + (4 << 20)] = bytes(4 << 20)
    block.madvise(mmap.MADV_DONTNEED, at, 4 << 20)
=== memory files on their way through a socket | memoryMb=64 | status=oom
ours, theirs = socket.socketpair()
for _ in range(8):
    fd = os.memfd_create("x")
    os.write(fd, bytes(25 << 20))
    socket.send_fds(ours, [b"x"], [fd])
    os.close(fd)
=== segments of System V that nobody has attached | memoryMb=64 | status=oom
libc = ctypes.CDLL(None)
libc.shmat.restype, libc.shmdt.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
for _ in range(12):
    at = libc.shmat(libc.shmget(0, 16 << 20, 0o1600), 0, 0)
    ctypes.memset(at, 1, 16 << 20)
    libc.shmdt(at)
=== files in the shared memory that have no name | memoryMb=64 | status=oom
held = []
while True:
    held.append(os.open("/dev/shm/x", os.O_CREAT | os.O_WRONLY))
    os.unlink("/dev/shm/x")
    os.write(held[-1], bytes(4 << 20))
=== a file system of its own that is mounted nowhere | memoryMb=64 | status=oom/ok
libc = ctypes.CDLL(None)
uid, gid = os.getuid(), os.getgid()
if libc.unshare(0x10000000 | 0x00020000) == 0:
    for name, text in ("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1"):
        open("/proc/self/" + name, "w").write(text)
    made = libc.syscall(430, b"tmpfs", 0)
    if made >= 0 and libc.syscall(431, made, 6, None, None, 0) == 0 and (at := libc.syscall(432, made, 0, 0)) >= 0:
        fd = os.open("big", os.O_CREAT | os.O_RDWR, 0o600, dir_fd=at)
        for _ in range(50): os.write(fd, bytes(8 << 20))
        raise SystemExit("it held 400 MB")
=== page tables | memoryMb=64 | status=oom
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
base = libc.mmap(None, 200 << 30, 1, 0x4022, -1, 0)
for at in range(0, 200 << 30, 2 << 20): ctypes.c_char.from_address(base + at).value
=== a hog that is exec'd | cpp memoryMb=64 | status=oom
exec python3 -c 'x = bytearray(b"x") * (100 << 20)'
=== its start is over its cap | memoryMb=1 | status=oom
print("fine")
=== its start is over its cap, exec'd | cpp memoryMb=1 | status=oom
exec python3 -c 'print("fine")'
=== memory that is reserved, and not touched | memoryMb=64
blocks = [mmap.mmap(-1, 1 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000) for _ in range(8)]
=== a short run of two processes | memoryMb=256 | stdout=fine peakMib=120..137
filled, over = os.pipe(), os.pipe()
def hold(_):
    block = bytearray(b"x") * (60 << 20)
    os.close(over[1])
    os.write(filled[1], b"1")
    os.read(over[0], 1)
fork(1, hold)
block = bytearray(b"x") * (60 << 20)
os.read(filled[0], 1)
time.sleep(0.2)
os.close(over[1])
wait_for_all()
print("fine")
=== as many processes as it may have | | stdout=100
count = 1
try:
    while os.fork(): count += 1
    time.sleep(60)
except OSError:
    print(count)
=== it reads its limits | memoryMb=96 | stdout=100663296_100
own = "/sys/fs/cgroup" + open("/proc/self/cgroup").read().strip().partition("::")[2]
print(*(open(f"{own}/{name}").read().strip() for name in ("memory.max", "pids.max")), sep="_")
=== it cannot change them, nor leave
own = "/sys/fs/cgroup" + open("/proc/self/cgroup").read().strip().partition("::")[2]
attempts = [(f"{own}/memory.max", "max"), (f"{own}/pids.max", "max"), (f"{own}/cgroup.kill", "1")]
attempts += [(f"{place}/cgroup.procs", "0") for place in (own, os.path.dirname(own), "/sys/fs/cgroup")]
for path, text in attempts:
    assert refused(lambda: open(path, "w").write(text)), path
assert refused(os.mkdir, own + "/below")
=== it reads nothing of what others took before it
own = "/sys/fs/cgroup" + open("/proc/self/cgroup").read().strip().partition("::")[2]
for name in "memory.peak", "memory.events", "pids.peak", "pids.events", "cpu.stat", "memory.stat", "memory.pressure":
    assert refused(lambda: open(f"{own}/{name}").read()), name
=== many processes and descriptors | timeoutMs=5000 | status=timeout
while not refused(os.dup, 0): pass
fork(90, lambda _: time.sleep(600))
time.sleep(600)
=== a neighbour after all that | | stdout=fine
print("fine")
""")
COUNTED.update({"a fork bomb": Case({"main.py": FORK_BOMB}, "python", {"timeoutMs": 3000}, {"status": "timeout/oom"}, None)})
COUNTED.update({name: RUNS[name] for name in (
    "six children of 60 MB", "a hog in a session of its own", "80 threads", "children between vfork and exec",
    "a parent of 100 MB and three children of 50", "a child of its own traces it", "its own SIGKILL")})


@pytest.fixture(scope="module")
def counted(grids):
    grid = grids("root", EXECUTION_CONCURRENCY=2, EXECUTION_MAXPROCESSES=100)
    grid.put_all(COUNTED, RUN_HEAD)
    for n in range(100):
        grid.put({"main.py": "print('fine')"}, request_id=f"many-{n}")
    return grid.run()


@under_cgroup
@parametrize("name", COUNTED)
def test_the_kernel_counts(counted, name):
    result = check(counted, name, COUNTED[name])
    if result["status"] == "oom":
        assert 0 < result["peakMemoryBytes"] <= result["memoryMb"] * MIB, result


@under_cgroup
def test_held_runs_leave_nothing(counted):
    assert "isolation: root's with cgroup v2" in counted.log
    assert agents_cgroups() == set(), "a cgroup is left"
    assert not complaints(counted.log), counted.log
    assert {report["status"] for report in counted.reports["a-fork-bomb"]} <= {"timeout", "oom"}
    assert {counted.result(f"many-{n}")["status"] for n in range(100)} == {"ok"}


# Two processes, one of them a daemon, whose pids the witness hears; a second take is short.
LASTING = """
import os, sys, time
mark = sys.stdin.read().strip('"')
if tell("read", mark):
    sys.exit(0)  # taken again
child = os.fork()
if not child:
    os.setsid()
    time.sleep(600)
tell("mark", mark, f"{os.getpid()} {child}")
time.sleep(600)
"""


class Lasting:
    """A run that lasts, and who stands above it."""

    def __init__(self, grid: Folder, name: str, **task):
        self.mark = grid.spool / name
        grid.put({"main.py": with_tell(LASTING)}, function_id=name, request_id=name, input=str(self.mark), **task)

    def begun(self) -> list[int]:
        self.pids = [int(pid) for pid in until(lambda: self.mark.exists() and self.mark.read_text(), what="a run").split()]
        self.above = []
        pid = self.pids[0]
        while len(self.above) < 4:
            pid = int(stat_of(pid)[1])
            self.above.append(pid)
        return self.above  # helper, supervisor, launcher, agent


@under_cgroup
@parametrize("victims", [(1,), (2,), (3,), (2, 3)],
                         ids=["supervisor", "launcher", "agent", "agent and launcher"])
def test_nothing_of_a_run_is_left_whoever_is_killed(grids, victims):
    grid = grids("root", EXECUTION_CONCURRENCY=1)
    run = Lasting(grid, "lasting", timeoutMs=300000)
    with grid.agent() as agent:
        above = run.begun()
        for victim in victims[::-1]:
            os.kill(above[victim], signal.SIGKILL)
        if 3 not in victims:
            until_gone(run.pids)
            grid.put({"main.py": "print('fine')"}, request_id="next")
            agent.until_ok("next")
            assert agent.stop() == 0
    until_gone(run.pids)
    if victims == (3,):  # its launcher ends all, and takes away what was made
        until(lambda: agents_cgroups() == set(), what="the end of its cgroups")
    elif 3 in victims:  # there is nobody to do it; the next agent does
        grid.put({"main.py": "print('fine')"}, request_id="next")
        with grid.agent("--drain", "--log-level", "DEBUG") as agent:
            agent.until_ok("next")
            agent.stop()
    assert agents_cgroups() == set()


@under_cgroup
def test_a_slot_begins_nothing_before_the_last_run_is_gone_whose_supervisor_hung(grids):
    grid = grids("root", EXECUTION_CONCURRENCY=1)
    run = Lasting(grid, "lasting", timeoutMs=10000)
    with grid.agent(prefix=patched("ng.Slot.SPARE_SECONDS = 20")) as agent:
        os.kill(run.begun()[1], signal.SIGSTOP)
        agent.wait_for("REPORT requestId=lasting .*status=error")
        agent.until_ok("lasting")
        grid.put({"main.py": "print('fine')"}, request_id="next")
        agent.until_ok("next")
        assert not any(map(alive, run.pids))
        agent.stop(signal.SIGKILL)
    until(lambda: agents_cgroups() == set(), what="the end of its cgroups")


@under_cgroup
def test_two_agents_have_cgroups_of_their_own(grids):
    first, second = grids("root", EXECUTION_CONCURRENCY=1), grids("root", EXECUTION_CONCURRENCY=1)
    run = Lasting(first, "lasting", timeoutMs=300000)
    with first.agent() as agent:
        run.begun()
        own = agents_cgroups()
        second.put({"main.py": "print(open('/proc/self/cgroup').read().split('/')[1])"}, request_id="other")
        other = second.run()["other"]["stdout"].strip()
        assert len(own) == 1 and other.startswith("nanogrid-") and other not in own, (own, other)
        assert agents_cgroups() == own and all(map(alive, run.pids))
        agent.stop(signal.SIGINT)
        agent.send(signal.SIGINT)
    assert agents_cgroups() == set()


@under_cgroup
def test_a_slot_gets_its_share_of_the_cpu_beside_many_sessions(grids):
    grid = grids("root", EXECUTION_CONCURRENCY=2)
    spin = """
import os, sys, time
for _ in range(40):
    if os.fork() == 0:
        os.setsid()
        while True: pass
tell("mark", sys.stdin.read().strip('"'))
time.sleep(600)
"""
    grid.put({"main.py": with_tell(spin)}, function_id="spins", request_id="spins", input=str(grid.spool / "spins"),
             timeoutMs=600000)
    work = "import time\nbegun = time.monotonic()\nwhile time.process_time() < 2: pass\nprint(time.monotonic() - begun)"
    with grid.agent() as agent:
        until(lambda: (grid.spool / "spins").exists(), what="the sessions")
        grid.put({"main.py": work}, function_id="work", request_id="work", timeoutMs=600000)
        agent.until_ok("work")
        agent.stop(signal.SIGINT)
        agent.stop(signal.SIGINT)
    # Half of one processor at the least; beside 40 equals on two it would be a twentieth.
    assert float(grid["work"]["stdout"]) < 4 * 2, grid["work"]


@contextlib.contextmanager
def delegated(**files):
    """A cgroup that was handed to whoever runs in it, as systemd does it; the words that take one there."""
    place = Path(ng.cgroup_root(), f"test-{os.getpid()}")
    Path(ng.cgroup_root(), "cgroup.subtree_control").write_text("+memory +pids +cpu")
    place.mkdir()
    try:
        os.setxattr(place, "user.delegate", b"1")
        for name, text in files.items():
            (place / name.replace("_", ".")).write_text(text)
        yield place, ["sh", "-c", f'echo 0 >{place}/cgroup.procs && exec "$@"', "sh"]
    finally:
        until(lambda: "populated 0" in (place / "cgroup.events").read_text(), what="its end")
        for below in place.glob("*/"):
            below.rmdir()
        place.rmdir()


@under_cgroup
def test_what_systemd_delegates_is_divided(grids):
    """The agent goes before the functions; its launcher takes away what a killed one had."""
    grid = grids("root", EXECUTION_CONCURRENCY=2)
    runs = [Lasting(grid, name, timeoutMs=300000) for name in ("lasting", "too")]
    with delegated() as (place, prefix):
        with grid.agent(prefix=prefix) as agent:
            pids = [pid for run in runs if run.begun() for pid in run.pids]
            assert sorted(path.name for path in place.glob("*/")) == ["agent", "slot0", "slot1"]
            weights = {name: int((place / name / "cpu.weight").read_text()) for name in ("agent", "slot0", "slot1")}
            assert weights["agent"] > weights["slot0"] == weights["slot1"]
            inside = (place / "agent/cgroup.procs").read_text().split()
            assert str(agent.process.pid) in inside and not set(map(str, pids)) & set(inside)
            assert agents_cgroups() == set()
            agent.stop(signal.SIGKILL)
        until_gone(pids)
        until(lambda: not list(place.glob("*/")), what="the end of what its launcher takes away")
        grid.put({"main.py": "print('fine')"}, request_id="next")
        with grid.agent(prefix=prefix) as agent:
            agent.until_ok("next")
            assert agent.stop(signal.SIGTERM) == 0
        assert not list(place.glob("*/")), "cgroups are left"


@under_cgroup
def test_the_agent_admits_what_its_own_cgroup_allows():
    with delegated(memory_max=str(600 * MIB)) as (_, prefix):
        said = said_by(*prefix, PYTHON, "-c", f"import sys; sys.path.insert(0, {str(MODULE.parent)!r}); "
                       "import nanogrid; print(nanogrid.Settings().memory_mb)")
    assert int(said) == 600 - 256


@under_cgroup
def test_what_connections_have_yet_to_send_is_charged_to_no_later_run(grids):
    """The kernel keeps it, and its charge, for as long as the other side says that it has no room."""
    source = """
import socket, sys
port, kept, sent = int(sys.stdin.read()), [], 0
for _ in range(40):
    kept.append(socket.create_connection(("127.0.0.1", port)))
    kept[-1].setblocking(False)
    try:
        while True: sent += kept[-1].send(bytes(1 << 20))
    except BlockingIOError: pass
print(sent)
"""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        listener.listen(100)
        try:
            socket.create_connection(listener.getsockname()).close()
        except OSError:
            pytest.skip("this machine's loopback is down")
        grid = grids("root", EXECUTION_CONCURRENCY=1)
        grid.put({"main.py": source}, function_id="leaves", request_id="leaves", input=listener.getsockname()[1])
        for n in range(2):
            grid.put({"main.py": "print('fine')"}, function_id="next", request_id=f"next{n}", memoryMb=24)
        grid.run()
    assert int(grid["leaves"]["stdout"]) > 20 * MIB
    assert [(grid[f"next{n}"]["status"], grid[f"next{n}"]["receiveCount"]) for n in range(2)] == [("ok", 1)] * 2, grid.log


# --- from one run into the next
# Pairs: what one run does, and what the next of its slot must find, which is what a first run found.

LEFTOVERS = table(r"""
=== a tree of mode 000
for place in places:
    os.makedirs(place + "/left-a/b/c")
    for path in ("/left-a/b/c", "/left-a/b", "/left-a"):
        open(place + path + "/file", "w").close()
        os.chmod(place + path + "/file", 0)
        os.chmod(place + path, 0)
=== 2000 directories deep
for place in workplaces:
    os.chdir(place)
    for _ in range(2000):
        os.mkdir("left-deep")
        os.chdir("left-deep")
=== names that are no UTF-8
for place in places:
    os.mkdir(os.fsencode(place) + b"/left-\xff\xfe")
    open(os.fsencode(place) + b"/left-\xff\xfe/\x80\n\x1b", "w").close()
    open(os.fsencode(place) + b"/left- -rf *\r", "w").close()
=== links out of the workspace
for place in places:
    os.symlink(victim, place + "/left-directory")
    os.symlink(victim + "/precious", place + "/left-file")
    os.symlink("/etc", place + "/left-etc")
    os.symlink("left-loop", place + "/left-loop")
refused(os.link, victim + "/precious", "left-hard")
=== special files
import socket
for place in places:
    os.mkfifo(place + "/left-fifo")
    os.chdir(place)
    socket.socket(socket.AF_UNIX).bind("left-socket")
    os.mkdir("left-locked")
    open("left-locked/file", "w").close()
    os.chmod("left-locked", 0o500)
=== the workspace becomes a link
for place in places:
    refused(lambda: [os.rename(place, place + "-left-moved"), os.symlink(victim, place)])
=== its streams become pipes that nobody writes to
replace_streams(os.mkfifo)
=== its streams become closed directories
replace_streams(lambda path: os.mkdir(path, 0))
=== its streams become links
replace_streams(lambda path: os.symlink(victim + "/precious", path))
=== the directories are closed
for place in workplaces:
    open(place + "/left-file", "w").close()
    refused(os.chmod, place, 0)
=== the directories are gone
import shutil
for place in workplaces:
    shutil.rmtree(place, ignore_errors=True)
=== ACLs and attributes
acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", tag, 0, 0xFFFFFFFF) for tag in (1, 4, 0x20))
for place in places:
    refused(os.setxattr, place, "system.posix_acl_default", acl)
    refused(os.setxattr, place, "user.left", b"1")
=== flags and generations
for place in places:
    for name, value in ((SETFLAGS, 0xC8), (SETVERSION, 7)):
        refused(lambda: fcntl.ioctl(os.open(place, os.O_RDONLY), name, struct.pack("l", value)))
=== directories that were full
for place in {*places} - {*shared}:
    paths = [f"{place}/{n:0200}" for n in range(500)]
    for path in paths:
        open(path, "w").close()
    for path in paths:
        os.unlink(path)
=== modes and times
for place in places:
    refused(os.chmod, place, 0o2755)
    refused(os.utime, place, (1, 1))
=== directories of the package
for name in "lib", "lib/deep":
    refused(os.setxattr, name, "user.left", b"1")
    refused(os.utime, name, (1, 1))
    os.chmod(name, 0o700)
os.rename("lib/deep", "lib/left")
os.mkdir("lib/deep")
=== what stands above it is stopped | timeoutMs=3000
for pid in above():
    refused(os.kill, pid, 19)
=== what stands above it has other limits
for pid in above():
    for kind in range(16):
        refused(resource.prlimit, pid, kind, (3, 3))
=== what stands above it has other priorities
for pid in above():
    refused(os.sched_setaffinity, pid, {min(os.sched_getaffinity(0))})
    refused(os.setpriority, os.PRIO_PROCESS, pid, 19)
    refused(os.sched_setscheduler, pid, os.SCHED_IDLE, os.sched_param(0))
    ctypes.CDLL(None).syscall({"x86_64": 251, "aarch64": 30}[os.uname().machine], 1, pid, 3 << 13)
=== what stands above it is killed
for pid in above():
    refused(os.kill, pid, 9)
=== shared memory, semaphores and queues | room
libc = ctypes.CDLL(None, use_errno=True)
libc.sem_open.restype = ctypes.c_void_p
assert libc.shmget(key, 4096, 0o1666) >= 0 and libc.semget(key, 1, 0o1666) >= 0 and libc.msgget(key, 0o1666) >= 0
assert libc.sem_open(b"/left", os.O_CREAT, 0o600, 1)
if os.path.isdir("/dev/mqueue"): assert libc.mq_open(b"/left", os.O_CREAT | os.O_RDWR, 0o600, None) >= 0
refused(os.mkdir, "/dev/shm/left")
=== the interpreter itself
import builtins
builtins.left = sys.left = json.left = os.environ["LEFT"] = "1"
sys.path.append("left")
os.umask(0)
print = None
=== where every user may write | room
refused(lambda: open(anybody + "/left", "w"))
=== keys of the kernel
for keyring in (-3, -4, -5):
    syscall("add_key", b"user", b"left", b"left", 4, keyring)
    syscall("keyctl", 5, keyring, 0)  # KEYCTL_SETPERM
=== a home that an interpreter reads
place = f"{os.environ['HOME']}/.local/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
os.makedirs(place)
open(place + "/left.pth", "w").write("import os; os.environ['left'] = '1'\n")
open(place + "/usercustomize.py", "w").write("import os; os.environ['left'] = '1'\n")
=== what it was started from
for path in ("../../../main.py", "../../../sh", "../../passwd", "/etc/passwd", "../../feed/stdin"):
    if not shared and os.stat("../../..").st_uid == os.getuid():
        break  # in no room, and the agent's own user: nobody promises it
    refused(lambda: open(path, "ab").write(b"left"))
    refused(os.unlink, path)
    refused(os.rename, path, "left")
=== what the supervisor made
feed = os.path.realpath("../../feed")
refused(os.mkdir, feed + "/left")
refused(lambda: open(feed + "/left-file", "wb").write(bytes(1 << 20)))
for name in os.listdir(feed) if os.access(feed, os.R_OK) else ():
    refused(os.rename, feed + "/" + name, feed + "/left-" + name)
refused(os.rename, feed, feed + "-left")
=== 20000 small files
os.mkdir("left-many")
os.chdir("left-many")
for n in range(20000):
    open(str(n), "w").close()
=== variables of its task | env={"LEFT":"1\u0020'=\n","UID":"5","IFS":"x","OPTIND":"y","PWD":"z","SHLVL":"-1"}
given = {"LEFT": "1 '=\n", "UID": "5", "IFS": "x", "OPTIND": "y", "PWD": "z", "SHLVL": "-1"}
assert given.items() <= os.environ.items(), os.environ
=== variables of its task that Python reads | env={"PYTHONLEFT":"1"}
assert os.environ["PYTHONLEFT"] == "1"
""")
LEFTOVER_HEAD = r"""
import ctypes, fcntl, json, os, resource, struct, sys
SETFLAGS, SETVERSION = 0x40086602, 0x40087602
KEYS = {"x86_64": {"add_key": 248, "keyctl": 250}, "aarch64": {"add_key": 217, "keyctl": 219}}[os.uname().machine]
victim, shared, anybody, key = json.load(sys.stdin)
workplaces = list(dict.fromkeys([os.environ["TMPDIR"], os.environ["HOME"], *shared, os.getcwd()]))
places = [os.environ["OUTPUT_DIR"]] + workplaces
def syscall(name, *arguments):
    return ctypes.CDLL(None).syscall(KEYS[name], *arguments)
def above():  # what forked it, and what leads its session and its group
    return {os.getppid(), os.getpgrp(), os.getsid(0)} - {os.getpid(), 0}
def replace_streams(make):
    for name in "stdin", "stdout", "stderr":
        path = os.environ["HOME"].replace("own/home", "feed/" + name)
        refused(lambda: [os.unlink(path), make(path)])
"""
PROBE = r"""
import builtins, ctypes, fcntl, json, os, resource, sys, time
assert not [each for each in (builtins, sys, json) if hasattr(each, "left")] and "left" not in sys.path
shared = json.loads(sys.stdin.read() or "[]")
KEYCTL = {"x86_64": 250, "aarch64": 219}[os.uname().machine]
def flags(path, request):
    fd = os.open(path, os.O_RDONLY)
    try:
        return fcntl.ioctl(fd, request, bytes(8)).hex()
    except OSError as error:
        return error.errno
    finally:
        os.close(fd)
seen = {name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")}
seen["scheduling"] = os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0), sorted(os.sched_getaffinity(0))
libc = ctypes.CDLL(None)
seen["ioprio"] = libc.syscall({"x86_64": 252, "aarch64": 31}[os.uname().machine], 1, 0)
seen["environment"] = sorted(each for each in os.environ.items() if each[0] != "REQUEST_ID")
seen["names"] = os.getgroups(), os.umask(0o022)
seen["status"] = [line for line in open("/proc/self/status") if line.startswith(("Sig", "Cap", "NoNew"))][1:]
seen["keys"] = [libc.syscall(KEYCTL, 11, keyring, None, 0) for keyring in (-3, -4, -5)]  # KEYCTL_READ: its size
seen["ipc"] = [open(f"/proc/sysvipc/{kind}").read().count("\n") for kind in ("shm", "sem", "msg")]
if shared:  # a room of its own: neither the machine's nor an earlier run's
    assert seen["ipc"] == [1, 1, 1], seen["ipc"]
    libc.sem_open.restype = ctypes.c_void_p
    assert not libc.sem_open(b"/left", 0, 0o600, 1) and libc.mq_open(b"/left", os.O_RDWR, 0o600, None) < 0
seen["passwd"] = open("/etc/passwd").read()
for place in (".", "lib", "lib/deep", os.environ["TMPDIR"], os.environ["HOME"], os.environ["OUTPUT_DIR"], *shared):
    status = os.stat(place)
    found = [os.path.join(top, name) for top, names, files in os.walk(place) for name in names + files]
    assert not [name for name in found if "left" in name], found
    attributes = {name: os.getxattr(place, name).hex() for name in os.listxattr(place)}
    seen[place] = (oct(status.st_mode), status.st_uid, attributes, flags(place, 0x80086601), time.time() - status.st_mtime < 1e6,
                   place in shared or status.st_size)
    path = os.path.join(place, "probe")
    open(path, "w").close()
    os.mkdir(path + "-folder")
    seen[path] = oct(os.stat(path).st_mode), oct(os.stat(path + "-folder").st_mode), os.listxattr(path), open(path).read()
its = {"lib", "main.py", "probe", "probe-folder", os.path.basename(sys.argv[0])}
assert set(os.listdir(".")) == its, os.listdir(".")
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def leftovers(grids, user):
    """One slot: after each function that leaves something come two that look, a warm and a cold one."""
    grid = grids(user, EXECUTION_CONCURRENCY=1)
    victim = grid.spool / "victim"
    victim.mkdir()
    victim.chmod(0o777)
    (victim / "precious").write_text("precious")
    if ROOT and user == "ordinary":  # what the agent itself might remove
        for place in (victim, victim / "precious"):
            os.chown(place, ORDINARY, ORDINARY)
    shared = ["/tmp", "/var/tmp", "/dev/shm"] if has_room(user) else []
    anybody = tempfile.mkdtemp(dir="/srv") if ROOT else grid.spool
    os.chmod(anybody, 0o777)
    tree = {"main.py": PROBE, "lib/one.py": "", "lib/deep/two.py": ""}

    def look(name):
        grid.put(tree, request_id=f"{name}-b", function_id="probe", input=shared)
        grid.put({**tree, "main*": f"#!{PYTHON}\n{PROBE}"}, "cpp", "cold-probe", f"{name}-c", input=shared)

    look("00")
    for n, (name, case) in enumerate(LEFTOVERS.items()):
        if case.room and not has_room(user):
            continue
        leaves = {**tree, "main.py": LEFTOVER_HEAD + WORDS + case.files["main.py"]}
        task = {"timeoutMs": 120000, **case.task, "input": [str(victim), shared, str(anybody), KEY]}
        grid.put(leaves, "python", slug(name), f"{n:02}-a-{slug(name)}", **task)
        look(f"{n:02}-b-{slug(name)}")
        if user == "ordinary" and "above" in name:
            continue  # that is its supervisor: the agent kills one that hangs, but not at once
        leaves["main*"] = f"#!{PYTHON}\n{leaves['main.py']}"
        grid.put(leaves, "cpp", f"cold-{slug(name)}", f"{n:02}-d-{slug(name)}", **task)
        look(f"{n:02}-e-{slug(name)}")
    ours = ctypes.CDLL(None).shmget(KEY, 4096, 0o1666)
    assert ours >= 0
    try:
        grid.run()
    finally:
        ctypes.CDLL(None).shmctl(ours, 0, None)
    grid.left = os.listdir(anybody)
    if ROOT:
        shutil.rmtree(anybody)
    return grid


@parametrize("number, name", list(enumerate(LEFTOVERS)))
def test_the_next_run_finds_what_the_first_one_found(leftovers, number, name):
    """However each of the two was started."""
    if LEFTOVERS[name].room:
        need_namespaces(leftovers.user)
    for kind in "bc":
        first = leftovers.result(f"00-{kind}")
        assert first["status"] == "ok", first
        for did, looks in ("a", "b"), ("d", "e"):
            if did == "a" or leftovers.reports[f"{number:02}-{did}-{slug(name)}"]:
                left = leftovers.result(f"{number:02}-{did}-{slug(name)}")
                assert left["status"] == "ok" or not name.startswith("variables"), left
                after = leftovers.result(f"{number:02}-{looks}-{slug(name)}-{kind}")
                assert after["status"] == "ok" and after["receiveCount"] == 1, after
                assert json.loads(after["stdout"]) == json.loads(first["stdout"]), (did, kind)


ALONE = {
    "cpp": ("run.sh", 'exec 9<"$0"; flock -n 9 || exit 1; sleep 4'),
    "python": ("main.py", "import fcntl, time; fcntl.flock(open(__file__), fcntl.LOCK_EX | fcntl.LOCK_NB); time.sleep(4)")}


@pytest.mark.parametrize("runtime", ALONE)
def test_a_script_that_locks_itself_keeps_no_other_run_from_starting(grids, user, runtime):
    need("flock")
    grid, (name, source) = grids(user, EXECUTION_CONCURRENCY=2), ALONE[runtime]
    for n in range(2):
        grid.put(None if n else {name: source}, runtime, request_id=f"r{n}")
    grid.run()
    assert [(grid[f"r{n}"]["status"], grid[f"r{n}"]["receiveCount"]) for n in range(2)] == [("ok", 1)] * 2, grid.log


SWAPS = """
import ctypes, os, sys
os.chdir(sys.argv[1])
for n in range(50): os.makedirs(f"d{n}/left"), os.symlink(sys.argv[2], f"link{n}")
libc = ctypes.CDLL(None)
print(flush=True)
while True:
    for n in range(50): libc.renameat2(-100, b"d%d" % n, -100, b"link%d" % n, 2)  # RENAME_EXCHANGE
"""


@pytest.mark.skipif(not ROOT, reason="needs another user")
def test_who_got_hold_of_a_directory_leads_root_nowhere(tmp_path):
    """Before Linux 6.12 a run may send one of its directories to another slot's, which makes one of its own there."""
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o755)
    for above in (tmp_path, *tmp_path.parents[:-1]):
        above.chmod(above.stat().st_mode | 0o011)
    for n in range(20):
        (victim / "precious").write_text("precious")
        held = tmp_path / f"left/{n}/held"
        held.mkdir(parents=True)
        os.chown(held, ORDINARY, ORDINARY)
        with subprocess.Popen([*as_user("ordinary"), "/usr/bin/python3", "-c", SWAPS, held, victim],
                              stdout=subprocess.PIPE) as swaps:
            swaps.stdout.read(1)
            with contextlib.suppress(OSError):
                ng.sweep(str(tmp_path / "left"))
            swaps.kill()
        assert (oct(victim.stat().st_mode), os.listdir(victim)) == ("0o40755", ["precious"]), n


def test_nothing_is_left_on_disk_and_no_link_is_followed(leftovers):
    victim = leftovers.spool / "victim"
    assert [path.name for path in victim.iterdir()] == ["precious"]
    assert (victim / "precious").read_text() == "precious"
    left = [os.path.join(top, name) for top, names, files in os.walk(os.fsencode(leftovers.base))
            for name in names + files if b"left-" in name]
    assert left == []
    assert leftovers.user == "ordinary" or leftovers.left == [], "what every user may write to"
    stored = (path for path in (leftovers.path / "results").rglob("*") if path.is_file() and path.name != "result.json")
    assert not [path for path in stored if b"precious" in path.read_bytes()], "the target of a link was collected"
    if has_room(leftovers.user):
        libc = ctypes.CDLL(None)
        assert libc.semget(KEY, 1, 0) < 0 and libc.msgget(KEY, 0) < 0 and libc.shmget(KEY, 4096, 0) < 0
        assert not [name for name in os.listdir("/dev/shm") if "left" in name]


# One zip again and again: what a run leaves where only its own package is, or leaves to the kernel.
# `leaves` is whether this run does it; what the others print must be the same, and was so before.
AGAIN = table(r"""
=== a lock that is on its way over a socket
file = open("main.py")
fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
if leaves: kept = sent_to_itself(file)
=== what has no name in /dev/shm is on its way over a socket
if leaves:
    file = open("/dev/shm/left", "wb")
    file.write(bytes(20 << 20))
    file.flush()
    os.unlink("/dev/shm/left")
    kept = sent_to_itself(file)
system = os.statvfs("/dev/shm")
print(leaves or (system.f_blocks - system.f_bfree, system.f_files - system.f_ffree))
=== the time at which it read a file of its package
if leaves: open("data").read()
print(leaves or os.stat("data").st_atime)
--- data
=== directories that had many names
for place in ("/tmp", "/var/tmp", os.environ["HOME"], os.environ["TMPDIR"], os.getcwd()) if leaves else ():
    for n in range(300): open(f"{place}/{n:0200}", "w").close()
    for n in range(300): os.unlink(f"{place}/{n:0200}")
print(leaves or [os.stat(place).st_size for place in ("/tmp", "/var/tmp", os.environ["HOME"], os.environ["TMPDIR"], ".")])
=== a directory of directories
for n in range(300 if leaves else 0): os.makedirs(f"/tmp/{n:0200}/deep")
print(leaves or os.stat(os.environ["HOME"] + "/..").st_size)
=== a port of its own network that is waited for
server = socket.socket()
server.bind(("127.0.0.1", 8000))
server.listen()
if leaves:
    client = socket.create_connection(("127.0.0.1", 8000))
    server.accept()[0].close()
    client.recv(1)
    client.close()
""")
AGAIN_HEAD = """
import array, fcntl, os, socket, sys
leaves = sys.stdin.read() == "true"
def sent_to_itself(file):
    ends = socket.socketpair()
    files = array.array("i", [file.fileno(), *(end.fileno() for end in ends)])
    for end in ends:
        end.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
    return ends
"""


@pytest.fixture(scope="module")
def again(grids, user):
    need_room(user)
    grid = grids(user, EXECUTION_CONCURRENCY=1, EXECUTION_NETWORK="none")
    for name, case in AGAIN.items():
        tree = {**case.files, "main.py": AGAIN_HEAD + case.files["main.py"]}
        for n in range(11):
            grid.put(None if n else tree, request_id=f"{slug(name)}-{n:02}", function_id=slug(name),
                     input=n % 2 == 1, memoryMb=128 if n % 2 else 24)
    return grid.run()


@parametrize("name", AGAIN)
def test_a_run_finds_nothing_of_the_one_before_it(again, name):
    results = [again.result(f"{slug(name)}-{n:02}") for n in range(11)]
    assert {(result["status"], result["receiveCount"]) for result in results} == {("ok", 1)}, results
    assert {result["stdout"] for result in results[::2]} == {results[0]["stdout"]}


@pytest.mark.skipif(not ROOT, reason="makes a directory, and a mount, that all users see")
def test_no_function_sees_the_tasks_of_others_nor_writes_to_other_mounts(grids):
    """The folder of --local, where it is none that is covered anyway; a disk where everybody may write."""
    source = r"""
import json, os, sys
found = []
for place in json.load(sys.stdin):
    for top, names, files in os.walk(place):
        found += [os.path.join(top, name) for name in names + files]
    try:
        open(place + "/left", "w").close()
    except OSError:
        continue
    found.append(place + "/left")
print(found)
"""
    need_room("root")
    open_place = Path(tempfile.mkdtemp(dir="/srv"))
    try:
        open_place.chmod(0o755)
        (open_place / "mount").mkdir()
        grid = grids("root", path=open_place / "grid", EXECUTION_CONCURRENCY=1)
        for n in range(2):
            grid.put({"main.py": source}, request_id=f"r{n}", input=[str(grid.path), str(open_place / "mount")])
        mounts = f'mount -t tmpfs -o mode=1777 none {open_place}/mount && exec "$@"'
        grid.run(prefix=["unshare", "-m", "sh", "-c", mounts, "sh"])
        assert [grid.result(f"r{n}")["stdout"] for n in range(2)] == ["[]\n"] * 2, grid.log
    finally:
        shutil.rmtree(open_place)


# What once held up everybody's functions, for the machine seemed to fail.
@parametrize("runtime, files, task, status, reason", [
    ("cpp", {"main.cpp": "", **{f"{n:0200}.cpp": "" for n in range(12_000)}}, {}, "rejected", "compile"),
    ("cpp", {"run.sh": "", "lib/libc.so.6": "none"}, {"env": {"LD_LIBRARY_PATH": "lib"}}, "failed", None),
    ("cpp", {"run.sh": ""}, {"env": {"OPTIND": "none", "SHELLOPTS": "noexec"}}, "ok", None),
], ids=["too many sources", "a library that is none", "variables of shells"])
def test_what_is_wrong_with_one_function_is_no_fault_of_the_machine(folder, runtime, files, task, status, reason):
    if runtime == "cpp" and "main.cpp" in files:
        need("g++")
    folder.put(files, runtime, request_id="wrong", **task)
    folder.run()
    assert {(report["status"], report.get("reason")) for report in folder.reports["wrong"]} == {(status, reason)}
    assert "starting functions failed" not in folder.log


# What is stored of $OUTPUT_DIR: copies of the bytes, and nothing of the source is changed; and what is
# too much, though no look can list it (below paths over PATH_MAX), or finds it gone.
OUTPUTS = table(r"""
=== names that are the result's own | | stored=.result.json.part/x,plain
for name in ("result.json", ".result.json.part"):
    os.mkdir(name)
    open(name + "/x", "w").close()
open("plain", "w").close()
=== names of an earlier receive | | stored=a,b/c
open("a", "w").close()
os.mkdir("b")
open("b/c", "w").close()
=== links, and what they lead to | | stored=mine,same
open("mine", "w").close()
os.link("mine", "same")
os.symlink("/etc/hostname", "link")
os.symlink("/etc", "folder")
os.mkfifo("fifo")
=== what is too deep for a key of 1024 bytes, or no UTF-8 | | stored=near.txt,DEEP
open("near.txt", "w").write("near")
open(b"no-utf-8-\xff", "w").close()
os.mkdir("result.json")
for depth in range(500):
    os.mkdir("nested")
    os.chdir("nested")
    if depth in (50, 200, 499):
        open("file.txt", "w").write(f"at {depth}")
=== files with holes count in full | | status=failed reason=disk exitCode=0 stored=
for name in "abc":
    os.truncate(os.open(name, os.O_CREAT | os.O_RDWR), 20 << 20)
=== one file by many names counts by each | | status=failed reason=disk exitCode=0 stored=
os.truncate(os.open("a", os.O_CREAT | os.O_RDWR), 20 << 20)
os.link("a", "b"), os.link("a", "c")
=== bytes below a path that is too long | | status=failed reason=disk stored=
os.chdir(os.environ['TMPDIR'])
for _ in range(20):
    os.mkdir("d" * 250), os.chdir("d" * 250)
os.posix_fallocate(os.open("f", os.O_CREAT | os.O_RDWR), 0, 80 << 20)
time.sleep(60)
=== files below a path that is too long | | status=failed reason=disk stored=
os.chdir(os.environ['TMPDIR'])
for _ in range(20):
    os.mkdir("d" * 250), os.chdir("d" * 250)
for n in range(3000): open(str(n), "w").close()
time.sleep(60)
=== small files without end | timeoutMs=300000 | status=failed/error reason=disk stored=
os.chdir(os.environ['TMPDIR'])
for n in range(1000000): open(str(n), "w").close()
=== files that come and go | timeoutMs=3000 | status=timeout stored=
os.chdir(os.environ['TMPDIR'])
while True:
    os.close(os.open("file", os.O_CREAT)), os.unlink("file")
=== the directory is closed | | stored=a
open("a", "w").close()
os.chmod(".", 0)
=== the directory is gone, or as root empty | | stored=
refused(os.rmdir, os.environ["OUTPUT_DIR"])
=== the directory becomes a link, if it may | | stored=
refused(lambda: [os.rmdir(os.environ["OUTPUT_DIR"]), os.symlink("/etc", os.environ["OUTPUT_DIR"])])
=== a file of its package | | stored=main.py
os.rename(work + "/main.py", "main.py")
=== a file of its package again | | stored=main.py
os.rename(work + "/main.py", "main.py")
""")
DEEP_NAME = "nested/" * 51 + "file.txt"
OUTPUT_HEAD = """
import os, time
work = os.getcwd()
os.chdir(os.environ["OUTPUT_DIR"])
""" + WORDS


@pytest.fixture(scope="module")
def outputs(grids, user):
    grid = grids(user, EXECUTION_CONCURRENCY=1, EXECUTION_MAXDISKMB=50, EXECUTION_MAXFILES=2000)
    earlier = grid.path / "results" / slug("names of an earlier receive")
    for name in ("a/b", "b"):
        (earlier / name).parent.mkdir(parents=True, exist_ok=True)
        (earlier / name).write_text("of an earlier receive")
    if ROOT and user == "ordinary":
        subprocess.run(["chown", "-R", f"{ORDINARY}:{ORDINARY}", earlier.parent], check=True)
    for name, case in OUTPUTS.items():
        function_id = "moves itself" if "package" in name else name
        grid.put({"main.py": OUTPUT_HEAD + case.files["main.py"]}, "python", slug(function_id), slug(name), **case.task)
    return grid.run()


@parametrize("name", OUTPUTS)
def test_what_is_stored_of_an_output(outputs, name):
    expect = dict(OUTPUTS[name].expect)
    stored = expect.pop("stored").replace("DEEP", DEEP_NAME).split(",")
    result = check(outputs, name, OUTPUTS[name]._replace(expect=expect))
    assert result["outputFiles"] == list(filter(None, stored))
    kept = outputs.path / "results" / slug(name)
    assert sorted(str(path.relative_to(kept)) for path in kept.rglob("*") if not path.is_dir()) == sorted(
        ["result.json", *result["outputFiles"]]), "what the result names is what is there"
    assert not any(path.is_symlink() for path in kept.rglob("*"))


FLOOD = """
import ctypes, fcntl
block, libc = ctypes.create_string_buffer(1 << 20), ctypes.CDLL(None)
fcntl.fcntl(1, 1031, 1 << 20)  # F_SETPIPE_SZ
pages = (ctypes.c_void_p * 2)(ctypes.addressof(block), 1 << 20)
while True: libc.vmsplice(1, pages, 1, 0)
"""


def test_a_flood_of_output_is_not_read_at_the_neighbours_cost(folder):
    """The supervisor goes before all functions: what costs it five times as much as one would starve the others."""
    folder.put({"main.py": FLOOD}, request_id="flood", timeoutMs=3000)
    with folder.agent("--log-level", "DEBUG") as agent:
        agent.wait_for("a run of fn starts")
        sleeps, counts = 0, re.compile(rb"(?m)^voluntary_ctxt_switches:\s(\d+)")
        launcher, = ng.children_of(agent.process.pid)
        while "REPORT requestId=flood" not in agent.log:
            for supervisor in ng.children_of(launcher):
                if found := counts.search(ng.read_proc(f"/proc/{supervisor}/status")):
                    sleeps = max(sleeps, int(found[1]))
            time.sleep(0.05)
    assert 1 << 20 < folder.result("flood")["stdoutBytes"] < 8 * sleeps * 65536, sleeps


LONG_NAMES = """
for name in "abc": os.mkdir(name * 230), os.chdir(name * 230)
for n in range(12000): open(f"{n:050}", "w").close()
"""


def test_names_of_outputs_that_would_fill_the_agents_memory_are_not_stored(folder):
    """100,000 of them, with the result that has them, once took it 300 MiB for each run."""
    folder.put({"main.py": OUTPUT_HEAD + LONG_NAMES}, request_id="long")
    folder.run()
    result = folder.result("long")
    assert (result["status"], result["reason"], result["exitCode"], result["outputFiles"]) == ("failed", "disk", 0, [])
    assert folder.names("results", "long") == ["result.json"]


def test_a_look_at_a_hundred_thousand_files_does_not_outlast_the_run(tmp_path):
    for n in range(9):
        (tmp_path / str(n)).write_text("x")
    assert ng.disk_usage([str(tmp_path)], 20)[0] > 0
    assert ng.disk_usage([str(tmp_path)], 20, time.monotonic())[0] == 0


def test_nothing_but_results_is_where_they_are_and_what_was_left_out_is_said(outputs):
    assert not [name for name in os.listdir(outputs.path / "results") if name.startswith(".")]
    kept, = (outputs.path / "results").glob("what-is-too-deep*")
    assert [(kept / name).read_text() for name in ("near.txt", DEEP_NAME)] == ["near", "at 50"]
    assert re.search(rf" WARNING \[{kept.name}\] 3 .*OUTPUT_DIR", outputs.log), outputs.log
    for report in outputs.reports["small-files-without-end"]:  # they would take the disk's inodes from everybody
        assert (report["status"], report.get("reason")) in (("failed", "disk"), ("error", "disk")), report


TREE = {"main.py": None, "run*": "#!/bin/sh\necho ran\n", "data.txt": "data", "lib/one.py": "one = 1\n",
        "lib/deep/two.py": "two = 2\n", "lib/tool*": b"\x7fELF\x00", "name with space": "x"}
SPOILER = WORDS + r"""
import os, stat, subprocess, sys
listing = []
for top, names, files in os.walk("."):
    names.sort()
    for name in sorted(names + files):
        path = os.path.join(top, name)
        mode = os.lstat(path).st_mode
        text = open(path, "rb").read() if stat.S_ISREG(mode) and name != "main.py" else None
        listing.append((path, stat.S_IFMT(mode), bool(mode & 0o100), text))
print(listing)
print(subprocess.run("./run", stdout=subprocess.PIPE).stdout)
def spoil(path):
    open(path, "r+b").write(b"spoilt")
for top, names, files in os.walk(".", topdown=False):
    for path in (os.path.join(top, name) for name in files):
        refused(spoil, path)                                    # in place
        refused(os.chmod, path, 0o777)
        refused(spoil, path)
        refused(os.link, path, os.environ["TMPDIR"] + "/link")  # by another name
        refused(spoil, os.environ["TMPDIR"] + "/link")
        refused(os.unlink, os.environ["TMPDIR"] + "/link")
        refused(os.truncate, path, 0)
        refused(os.utime, path, (1, 1))
        refused(os.setxattr, path, "user.spoilt", b"1")
os.mkdir("lib/new"), open("lib/new/file", "w").close()
os.unlink("data.txt"), open("data.txt", "w").write("replaced")   # the zip's own files may be replaced
os.rename("lib/one.py", "lib/deep/one.py")
os.unlink("lib/tool"), os.unlink("run"), os.rename("lib/deep", "moved")
os.unlink("main.py"), open("main.py", "w").write("print('replaced')")
"""


def test_every_run_sees_the_zip_as_it_is(grids, user):
    """The first run spoils whatever it may: the next ones see exactly the zip, executable bits included."""
    grid = grids(user, EXECUTION_CONCURRENCY=1)
    code = make_zip({**TREE, "main.py": SPOILER})
    for n in range(3):
        grid.put(code if n == 0 else None, request_id=f"n{n}")
    grid.run()
    first, *others = [grid[f"n{n}"] for n in range(3)]
    for name, content in TREE.items():
        text = content.encode() if isinstance(content, str) else content
        assert repr((f"./{name.rstrip('*')}", 0o100000, name.endswith("*"), text)) in first["stdout"], first
    assert "b'ran\\n'" in first["stdout"] and first["status"] == "ok", first
    for other in others:
        assert (other["status"], other["stdout"]) == ("ok", first["stdout"]), other


# --- a warm start is a bare `python3 main.py`

PROGRAMS = table(r"""
=== what it finds at its start
for name, value in sorted(dict(globals()).items()):
    print(name, type(value), value if name not in ("__loader__", "__builtins__") else "")
print(type(__loader__).__name__, __loader__.name, __loader__.path, __loader__.get_source("__main__")[:5])
import sys
print(*sorted(sys.modules), sep="\n")
print(sys.argv, sys.orig_argv, sys.path, sys.executable, sys._base_executable, sys.prefix, sys.exec_prefix)
print(sys.warnoptions, sys._xoptions, sys.pycache_prefix, sys.dont_write_bytecode, sys.platlibdir)
print(sys.flags)
print(sys.meta_path, len(sys.path_hooks), sys.excepthook is sys.__excepthook__, sys.displayhook is sys.__displayhook__,
      sys.unraisablehook is sys.__unraisablehook__, sys.breakpointhook is sys.__breakpointhook__,
      sys.gettrace(), sys.getprofile(), sys.getrecursionlimit(), sys.getswitchinterval(), sys.get_asyncgen_hooks(),
      hasattr(sys, "last_type"), hasattr(sys, "ps1"), sys.getdlopenflags())
print(sorted(vars(sys)), sorted(vars(__builtins__)), hasattr(__builtins__, "_"))
print(sorted(key.rpartition("/")[2] for key in sys.path_importer_cache))
print(sys.exc_info(), sys.stdin.closed, open("/proc/self/comm").read(), open("/proc/self/cmdline").read().split("\0"))
import __main__, gc, locale, os, site, threading, time, tracemalloc
print(__main__.__dict__ is globals(), sys.modules["__main__"], "main" in sys.modules)
print(gc.isenabled(), gc.get_threshold(), gc.garbage, gc.get_debug(), gc.callbacks, tracemalloc.is_tracing())
print(site.ENABLE_USER_SITE, site.PREFIXES, site.getsitepackages(), site.getusersitepackages())
print(sys.getfilesystemencoding(), sys.getfilesystemencodeerrors(), sys.getdefaultencoding(),
      locale.getpreferredencoding(), locale.setlocale(locale.LC_ALL), time.tzname, time.localtime(0))
print(threading.enumerate(), threading.main_thread() is threading.current_thread(), threading.active_count(),
      threading.main_thread().ident == threading.get_ident(), threading.get_native_id() == os.getpid(),
      os.listdir("/proc/self/task") == [str(os.getpid())], threading.main_thread().native_id == os.getpid())
=== standard streams
import sys
for stream in (sys.stdin, sys.stdout, sys.stderr):
    print(stream.name, stream.mode, stream.encoding, stream.errors, stream.line_buffering, stream.write_through,
          stream.newlines, stream.isatty(), stream.fileno(), stream.closed, stream.readable(), stream.writable(),
          stream.seekable() if stream is not sys.stdin else "", type(stream.buffer), stream.buffer.raw)
print(sys.stdin is sys.__stdin__, sys.stdout is sys.__stdout__, sys.stderr is sys.__stderr__)
=== warnings filters
import warnings
print(*warnings.filters, sep="\n")
warnings.warn("shown with its line")
warnings.warn("deprecated in main", DeprecationWarning)
for _ in range(3): warnings.warn("once")
open("main.py")
=== clock, usage, working directory, umask, descriptors, environment
import os, resource, subprocess, sys, time
print(time.process_time() < 0.5, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, time.perf_counter() > 0)
print(os.getcwd(), os.path.abspath("x"))
# From 3.5 on libffi, which the ready interpreter has used, keeps itself open.
print(sorted(fd for fd in os.listdir("/proc/self/fd") if "libffi" not in os.path.realpath(f"/proc/self/fd/{fd}")))
os.open("probe", os.O_CREAT | os.O_WRONLY, 0o777)
print(oct(os.stat("probe").st_mode), oct(os.umask(0)))
print(sorted(os.environ))
os.environ["ADDED"] = "1"
sys.stdout.flush()
subprocess.run(["sh", "-c", "echo $ADDED $HOME $TMPDIR"])
=== signals, a child's too, and an alarm
import signal, subprocess
for number in sorted(signal.valid_signals()):
    print(number, signal.getsignal(number))
print([line for line in open("/proc/self/status") if line.startswith(("Sig", "Shd")) and "SigQ" not in line])
print(signal.getitimer(signal.ITIMER_REAL), signal.set_wakeup_fd(-1), signal.pthread_sigmask(signal.SIG_BLOCK, []))
subprocess.run(["grep", "-E", "^Sig(Blk|Ign|Cgt)", "/proc/self/status"])
rang = []
signal.signal(signal.SIGALRM, lambda *_: rang.append(print("rang")))
signal.setitimer(signal.ITIMER_REAL, 0.05)
while not rang: pass
=== tracebacks, chained
import contextlib, mod, os
from pack.inner import g
@contextlib.contextmanager
def manager():
    yield
    raise OSError(2, "inside", "name")
def of_a_generator():
    with manager(): print("in")
def through_exec(): exec("def h():\n    eval('1/0')\nh()")
def in_a_callback(): sorted([3, 1], key=lambda n: n.missing)
def by_a_cause():
    try: {}["low"]
    except KeyError as error: raise ValueError("middle") from error
def with_a_note_and_carets():
    try: {"a": {"b": None}}["a"]["b"]["c"]
    except TypeError as error:
        if hasattr(error, "add_note"): error.add_note("a note\nof two lines")
        raise
def with_a_suggestion(): os.getpidd()
def not_ascii(): é = "日本"; raise ValueError(f"{é} \udc80 \x1b")
def chain(first, *more):
    try:
        if more: chain(*more)
    finally:
        first()
try: chain(of_a_generator, through_exec, in_a_callback, by_a_cause, with_a_note_and_carets, not_ascii, mod.f, g)
finally: with_a_suggestion()
--- mod.py
def f():
    return undefined
--- pack/__init__.py
--- pack/inner.py
def g():
    assert 1 == 2, "in a package"
=== traceback of an exception that cannot be printed
class Bad(Exception):
    def __str__(self): raise RuntimeError("no text")
raise Bad
=== exception group
try:
    ExceptionGroup
except NameError:
    raise SystemExit("no groups here")
def fail(kind): raise kind("x")
errors = []
for kind in (ValueError, OSError):
    try: fail(kind)
    except Exception as error: errors.append(error)
raise ExceptionGroup("several", errors)
=== recursion
def f(n): return f(n + 1)
f(0)
=== recursion, raised limit
import sys
sys.setrecursionlimit(5000)
def f(n): return n and 1 + f(n - 1)
print(f(4000), sys.getrecursionlimit())
=== SyntaxError
print("never")
x = = 1
=== SyntaxError, an open bracket
x = (1,
y = 2
=== SyntaxError in a module
import mod
--- mod.py
def f(:
=== IndentationError
if True:
print(1)
=== TabError
if True:
        x = 1
	y = 2
=== SyntaxWarning
print("x" is "y", "\d")
=== an empty file
=== only a comment
# nothing here
=== future annotations
from __future__ import annotations
def f(x: undefined): return f.__annotations__
print(f(1))
exec("def g(x: also): pass\nprint(g.__annotations__)")
=== an assert and a docstring are kept, and no future of the starter
'''doc of main'''
print(__doc__, __debug__)
def f(x: "text", y: (1 + 1)): pass
print(f.__annotations__)
assert False
=== own handler of SIGTERM
import os, signal, sys
signal.signal(signal.SIGTERM, lambda number, frame: (print("handled", number, frame.f_code.co_name), sys.exit(5)))
os.kill(os.getpid(), signal.SIGTERM)
=== SIGPIPE
import os
ends = os.pipe()
os.close(ends[0])
os.write(ends[1], b"x")
=== exit from deep inside, finally runs
import sys
def f():
    try:
        sys.exit("text of the exit")
    finally:
        print("finally")
f()
=== exit with a code of its own making
class Odd(SystemExit): pass
class Text:
    def __str__(self): return "as text"
raise Odd(Text())
=== atexit
import atexit, sys
def say(what): print(what)
def fail(): raise ValueError("in atexit")
atexit.register(say, "first registered")
atexit.register(fail)
atexit.register(lambda: sys.exit(9))
atexit.register(lambda: atexit.register(say, "registered at exit"))
atexit.register(say, "last registered")
sys.exit(3)
=== atexit registered twice, unregistered
import atexit
atexit.register(print, "twice"); atexit.register(print, "twice")
atexit.register(repr, 1); atexit.unregister(repr)
print(atexit._ncallbacks())
=== weakref.finalize
import weakref
class A: pass
a = A()
weakref.finalize(a, print, "finalized")
b = A()
weakref.finalize(b, print, "early")
del b
=== __del__ of globals
import sys
class D:
    def __init__(self, name): self.name = name
    def __del__(self): print("del", self.name, sys is not None, helper is not None and helper())
def helper(): return "helped"
a = D("a"); _b = D("_b"); c = [D("c")]
print("end")
=== __del__ that fails, a coroutine never awaited
class D:
    def __del__(self): raise ValueError("in del")
d = D()
del d
async def c(): pass
c()
=== __del__ in a module | unordered
import mod
class D:
    def __init__(self, name): self.name = name
    def __del__(self): mod.os.write(1, self.name)
mod.kept = D(b"module "); kept = D(b"main ")
--- mod.py
import os
=== __del__ of what a module of its own holds | unordered
import os, first, second
class D:
    def __init__(self, name): self.name = name
    def __del__(self): os.write(1, self.name)
second.D, second.kept, first.kept, kept = D, D(b"second "), D(b"first "), D(b"main ")
--- first.py
import os
def f(): pass
--- second.py
def f(): pass
=== __del__ of what hangs in sys, builtins and os | unordered
import builtins, os, sys
class D:
    def __init__(self, name): self.name = name
    def __del__(self): self.write(1, self.name)
    write = staticmethod(os.write)
sys.kept, builtins.kept, os.kept = D(b"sys "), D(b"builtins "), D(b"os ")
=== __del__ of a cycle
class D:
    def __del__(self): print("del", self.name)
x, y = D(), D()
x.name, y.name, x.other, y.other = "x", "y", y, x
del x, y
print("end")
=== a generator that is not finished
def g():
    try:
        yield 1
    finally:
        print("generator closed")
it = g(); next(it)
print("end")
=== __del__ of what has no attributes and is in no cycle
import os
class D:
    __slots__ = ()
    def __del__(self): os.write(1, b"del")
kept = [D()]
=== a weak reference's callback
import os, weakref
class A: pass
def gone(reference): os.write(1, b"gone")
kept = A()
seen = weakref.ref(kept, gone)
=== a database left open
import os, sqlite3
kept = sqlite3.connect(os.environ["OUTPUT_DIR"] + "/db.sqlite")
kept.execute("pragma journal_mode=wal")
kept.execute("create table t (n)")
kept.execute("insert into t values (1)")
kept.commit()
=== a file left open, with text in its buffer
import os
kept = open(os.environ["OUTPUT_DIR"] + "/text.txt", "w")
kept.write("flushed")
=== a profiler at the end
import os, sys
sys.setprofile(lambda frame, event, arg: None if event != "call" else os.write(1, frame.f_code.co_name.encode() + b"\n"))
import atexit
def last(): pass
atexit.register(last)
=== files and directories left open
import atexit, os, tempfile
out = open("out", "w"); out.write("text in a buffer")
holder = tempfile.TemporaryDirectory()
atexit.register(lambda: print(os.path.exists(holder.name)))
child = os.fork()
if child == 0:
    out.close(); os._exit(0)
os.wait(); print(open("out").read())
=== a global file is flushed at the end
import os, sys
ends = os.pipe()
if os.fork() == 0:
    out = os.fdopen(ends[1], "w"); out.write("flushed by the end"); os.close(ends[0])
    sys.exit()
os.close(ends[1])
os.wait(); print(os.read(ends[0], 99))
=== logging at the end
import logging, logging.handlers
target = logging.StreamHandler()
logging.getLogger().addHandler(logging.handlers.MemoryHandler(100, target=target))
logging.warning("kept in memory until the end")
=== output reopened, in bytes and text, without a line end
import os, sys
print("one", flush=True)
with open("/dev/stdout", "w") as again: again.write("two\n")
with open(1, "w", closefd=False) as again: again.write("three\n")
sys.stdout.write("text "); sys.stdout.flush()
sys.stdout.buffer.write(b"\xff\x00bytes "); sys.stdout.flush(); os.write(1, b"raw")
sys.stdout.write("out"); sys.stderr.write("err")
=== stdout replaced
import io, sys
sys.stdout = io.StringIO()
print("unseen")
sys.stderr.write(repr(sys.stdout.getvalue()))
=== own excepthook
import sys
sys.excepthook = lambda kind, value, trace: print("hook", kind.__name__, value, trace.tb_lineno, trace.tb_next)
1 / 0
=== own excepthook fails
import sys
def hook(*_): print(sys.exc_info()); raise TypeError("hook failed")
sys.excepthook = hook
1 / 0
=== traceback limit
import sys
sys.tracebacklimit = 1
def f(): g()
def g(): 1 / 0
f()
=== input
print(input("name? "), input("again? "))
=== input at the end
import sys
sys.stdin.read()
input()
=== stdin in every way
import os, sys
print(repr(sys.stdin.read(3)), repr(sys.stdin.readline()), sys.stdin.buffer.read(), os.read(0, 9))
=== stdin reopened
print(open("/dev/stdin").read())
=== stdin of a child
import subprocess
subprocess.run(["cat"])
=== a thread outlives main
import threading, time
said = threading.Event()
def work(): said.wait(); time.sleep(0.2); print("worked")
threading.Thread(target=work).start()
print("main ends"); said.set()
=== a thread outlives a failing main
import threading, time
threading.Thread(target=lambda: (time.sleep(0.2), print("worked"))).start()
raise ValueError("main failed")
=== daemon threads do not, not even those that work on
import threading, time
def sleep(): time.sleep(60); print("never")
def work():
    while True: sum(range(1000))
for each in (sleep, work, work): threading.Thread(target=each, daemon=True).start()
print("main ends")
=== threads, atexit and pools in order
import atexit, concurrent.futures, threading, time
atexit.register(print, "atexit")
pool = concurrent.futures.ThreadPoolExecutor(2)
said = threading.Event()
pool.submit(lambda: (time.sleep(0.1), print("pooled"), said.set()))
threading.Thread(target=lambda: (said.wait(), time.sleep(0.2), print("thread"))).start()
=== threads that exit and fail, a Timer and a local
import sys, threading
local = threading.local(); local.x = 1
def start(work, **named):
    thread = threading.Thread(target=work, **named)
    thread.start(); thread.join()
start(sys.exit, args=(5,))
print("on")
start(lambda: 1 / 0, name="worker")
threading.excepthook = lambda args: print("hook", args.exc_type, args.thread.name)
start(lambda: 1 / 0)
threading.Timer(0.1, lambda: print(hasattr(local, "x"))).start()
=== multiprocessing in its ways
import concurrent.futures, multiprocessing, time
from multiprocessing import shared_memory
def put(queue, n): queue.put((n, __name__, multiprocessing.current_process().name)); raise SystemExit(n)
def say(n): print("in the child", __name__, n, flush=True)
def square(n): return n * n
def fail(): raise ValueError("in the child")
def late(): time.sleep(0.2); print("joined at exit", flush=True)
if __name__ == "__main__":
    forks, spawns = multiprocessing.get_context("fork"), multiprocessing.get_context("spawn")
    queue = forks.Queue()
    process = forks.Process(target=put, args=(queue, 3)); process.start()
    print(queue.get()); process.join()
    print(process.exitcode, multiprocessing.parent_process(), multiprocessing.current_process().name, flush=True)
    process = spawns.Process(target=say, args=(3,)); process.start(); process.join()
    print(process.exitcode)
    with multiprocessing.get_context("forkserver").Pool(2) as pool: print(pool.map(square, range(5)))
    pool = forks.Pool(2)
    print(pool.map(abs, range(-4, 0)))
    pool.apply_async(time.sleep, (60,))
    pool.terminate(); pool.join()
    with multiprocessing.Manager() as manager:
        shared = manager.dict(a=1); print(dict(shared))
    block = shared_memory.SharedMemory(create=True, size=100)
    block.buf[0] = 7; print(block.buf[0]); block.close(); block.unlink()
    with concurrent.futures.ProcessPoolExecutor(2) as pool: print(list(pool.map(square, range(5))))
    process = forks.Process(target=fail, name="child"); process.start(); process.join()
    print(process.exitcode, flush=True)
    forks.Process(target=late).start()
=== multiprocessing, spawn without a guard
import multiprocessing
multiprocessing.get_context("spawn").Process(target=print).start()
=== multiprocessing, pool left open
import multiprocessing
pool = multiprocessing.get_context("fork").Pool(2)
print(pool.map(abs, range(-4, 0)), flush=True)
=== fork in main
import os, sys
print("buffered twice")
if os.fork() == 0:
    sys.exit(0)
os.wait()
=== exec of itself
import os, sys
if os.environ.get("AGAIN"): sys.exit(print("again", sys.argv))
os.environ["AGAIN"] = "1"
os.execv(sys.executable, [sys.executable, "main.py", "argument"])
=== subprocess, and a child that is not waited for
import subprocess, sys
done = subprocess.run([sys.executable, "-c", "import sys; print(sys.flags, sys.argv); sys.exit(3)"], capture_output=True)
print(done.returncode, done.stdout, done.stderr, subprocess.getoutput("echo out; echo err >&2"))
subprocess.Popen(["true"])
print("end")
=== asyncio, interrupted, and an error
import asyncio, os, signal
async def main():
    process = await asyncio.create_subprocess_exec("echo", "from a child", stdout=asyncio.subprocess.PIPE)
    print(await asyncio.gather(asyncio.sleep(0.01, "slept"), process.communicate()))
    print(await asyncio.get_running_loop().run_in_executor(None, sum, [1, 2]))
async def interrupted():
    os.kill(os.getpid(), signal.SIGINT)
    await asyncio.sleep(5)
async def fails(): raise ValueError("in a task")
asyncio.run(main())
try: asyncio.run(interrupted())
except KeyboardInterrupt: print("interrupted")
asyncio.run(fails())
=== what the standard library does with __main__ and its files
import ctypes, dataclasses, decimal, doctest, enum, inspect, os, pickle, random, runpy, sys, time, typing
def f(x):
    '''
    >>> f(1)
    3
    '''
    return x + 1  # a comment
class C:
    def __init__(self, n): self.n = n
@dataclasses.dataclass
class D:
    n: int = 1
    other: "D | None" = None
class E(enum.Enum): A = 1
print(doctest.testmod())
print(inspect.getsource(f), inspect.getfile(f), inspect.getsourcelines(f)[1], inspect.getmodule(f))
print(inspect.getsource(C), inspect.getsourcefile(C), f.__module__, C.__module__, f.__code__.co_filename)
print(pickle.loads(pickle.dumps(C(5))).n, pickle.loads(pickle.dumps(f)) is f, pickle.dumps(C(1)))
print(D(2), E.A, E["A"], repr(E), typing.get_type_hints(D) if hasattr(int, "__or__") else "")
print(open("data.txt").read(), os.path.dirname(__file__) == os.getcwd())
print(sorted(runpy.run_path("other.py")))
print(runpy.run_module("other", run_name="__main__")["x"])
print(decimal.getcontext(), time.tzname)
random.seed(1); print(random.random())
libc, death = ctypes.CDLL(None), ctypes.c_int(-1)
print(libc.prctl(3, 0, 0, 0, 0) in (0, 1), libc.prctl(2, 0, 0, 0, 0))
libc.prctl(2, ctypes.byref(death)); print(death.value >= 0)
calls = []
sys.setprofile(lambda frame, event, arg: calls.append((event, frame.f_code.co_name)))
f(1)
sys.setprofile(None)
print(calls)
--- other.py
x = __name__
--- data.txt
some data
=== unittest
import unittest
class T(unittest.TestCase):
    def test_it(self): self.assertEqual(1, 2)
unittest.main()
=== import of main itself
print("run as", __name__)
import main
print(main.__name__, main.__file__, main is __import__("__main__"))
=== modules of the workspace
import os, sys
import mod, pack
print(mod.__file__, mod.__cached__, pack.__path__, mod.__spec__.origin)
print(sorted(os.listdir("__pycache__")))
import importlib
open("late.py", "w").write("y = 2")
importlib.invalidate_caches()
import late
print(late.y, importlib.reload(mod) is mod)
--- mod.py
x = 1
--- pack/__init__.py
=== a module that shadows the standard library, a sitecustomize that is not run
import colorsys, string
print(colorsys.__file__, colorsys.x, hasattr(string, "ascii_letters"))
--- colorsys.py
x = "own"
--- string.py
ascii_letters = "own"
--- sitecustomize.py
print("sitecustomize")
--- usercustomize.py
print("usercustomize")
=== main replaced while it runs
import os, traceback
os.unlink("main.py")
open("main.py", "w").write("another text\n" * 9)
1 / 0
=== a KeyError of a lookup in globals
print(__cached__ if "__cached__" in globals() else "none")
print(__path__)
""")
PROGRAMS["input"].task["input"] = PROGRAMS["stdin in every way"].task["input"] = "naïve"
for _name in ("stdin reopened", "stdin of a child"):
    PROGRAMS[_name].task["input"] = {"a": [1, 2]}
# Every way out flushes what is open and runs what is to run when a thing goes.
HELD = """import enum, os, sys
class Status(enum.IntEnum): NONE, SOME = 0, 7
class Held:
    write = staticmethod(os.write)
    def __del__(self): self.write(1, b"gone ")
held = Held()
kept = open("/dev/stdout", "a")
kept.write("flushed ")
print("before ", flush=True)
"""
PLAIN = """import atexit, gc, os, signal, sys, time
print("in the buffer")
"""
WAYS_OUT = [(HELD, way) for way in (
    "sys.exit()", "1 / 0", "raise SystemExit", "__import__('unittest').main()", "quit(4)",
    "raise SystemExit(1, 'two')", "raise KeyboardInterrupt", *map("sys.exit({})".format, (
        "None", "0", "3", "256", "-1", "True", "False", "'text'", "''", "'é\\udcff'", "b'x'",
        "object", "(1, 2)", "1.5", "2 ** 31", "2 ** 70", "-2 ** 70", "[]", "ValueError('x')",
        "Status.NONE", "Status.SOME")))]
WAYS_OUT += [(PLAIN, way) for way in (
    *map("os.kill(os.getpid(), signal.{})\ntime.sleep(5)".format, ("SIGINT", "SIGTERM", "SIGSEGV")),
    "os.abort()", "os._exit(7)", "os.close(1)", "os.close(2)\n1 / 0", "print('\\udcff')",
    "sys.stdout.close()", "sys.stdout.close()\nprint('x')", "sys.stdout = None",
    "sys.stdout = open('/dev/full', 'w')\nprint('x')",
    "del sys.excepthook\n1 / 0", "sys.excepthook = lambda *_: sys.exit(6)\n1 / 0",
    "atexit.register(print, 'at exit')\n1 / 0",
    "gc.callbacks.append(lambda phase, _: os.write(1, b'collected') if phase == 'start' else None)")]
PROGRAMS.update({f"way out {n}: {way}": Case({"main.py": head + way}, "python", {}, {}, None, unordered=True)
                 for n, (head, way) in enumerate(WAYS_OUT)})
PROGRAMS.update({name: Case({"main.py": source}, "python", {}, {}, None) for name, source in {
    "latin-1 without a cookie": b"print('caf\xe9')\n",
    "latin-1 with a cookie": b"# -*- coding: latin-1 -*-\nprint('caf\xe9')\n1/0 # \xe9\n",
    "an unknown cookie": b"# coding: no-such-thing\nprint(1)\n",
    "UTF-8 with BOM": b"\xef\xbb\xbfprint('caf\xc3\xa9')\n1/0\n",
    "BOM and another cookie": b"\xef\xbb\xbf# coding: latin-1\nprint(1)\n",
    "CRLF": b"x = '''a\r\nb'''\r\nprint(repr(x))\r\n1/0\r\n",
    "CR": b"print(1)\rprint(2)\r1/0\r",
    "no line end": b"print('last')",
    "a NUL byte": b"print(1)\nx = '\x00'\n",
    "a form feed and a line continued": b"\x0cprint(1 + \\\n  1)\nimport sys; sys.exit(\\\n4)",
    "cut in a string": b"print('open\n",
    "a control-Z": b"print(1)\n\x1a\n",
}.items()})
# What no exec() inside a running interpreter can hide, besides the hash seed that runs may share:
# the frames of the starter under __main__ (sys._getframe(1), traceback.print_stack, inspect.stack),
# and so the number of calls that fit under the recursion limit. Where they show, they are masked.
STARTER_FRAME = r'(?<=in <module>\n)(  File "DIR/main.py", line \d+ in <module>\n)+'


def masked(text: str) -> str:
    """`text` without what differs between two bare runs too."""
    text = re.sub(r"0x[0-9a-f]{6,}", "0x", text)
    text = re.sub(r"repeated \d+ more times", "repeated many times", text)
    text = re.sub(r"\b(pid|pid=|ident) ?\d+", r"\1 0", text)
    text = re.sub(r"<(\w*Thread)\((.*?) \d+\)>", r"<\1(\2)>", text)
    text = re.sub(r"in \d+\.\d\d\ds", "in 0s", text)
    text = re.sub(r"spawn_main\(.*\)\n *[~^]+", "spawn_main()", text)  # libffi's descriptor shifts others
    # Python 3.13's subprocess leaves glibc's own signals 32 and 33 ignored, one for each start.
    text = re.sub(r"(?<=SigIgn:\t)[0-9a-f]{16}|(?<=SigIgn:\\t)[0-9a-f]{16}",
                  lambda mask: f"{int(mask[0], 16) & ~(3 << 31):016x}", text)
    return re.sub(STARTER_FRAME, "", text)


def words(text: str) -> list[str]:
    return sorted(text.split())


def without_places(text: str, base: Path) -> str:
    """`text` with every directory below `base` that a function can name cut to one word."""
    return re.sub(re.escape(str(base)) + r"/[\w./-]*?(?=/\.local|/\w+\.(py|txt)|/__pycache__|/pack\b|/x\b|/tmp\w{8}|[\s'\",:)]|$)",
                  "DIR", text)


@functools.lru_cache(None)
def bare_result(name: str, elsewhere: bool = False) -> tuple:
    """What a program does under a bare `cd dir && python3 main.py`; see bare_run()."""
    with tempfile.TemporaryDirectory(prefix="nanogrid-bare-") as top:
        os.chmod(top, 0o755)
        return bare_run(Path(top), PROGRAMS[name], elsewhere)


def bare_run(place: Path, case: Case, elsewhere: bool = False) -> tuple:
    """(stdout, stderr, exit status, names in $OUTPUT_DIR).

    `elsewhere` is another environment: another uid, files as streams, and code that was compiled.
    """
    for name in ("work", "home", "tmp", "out"):
        (place / name).mkdir(parents=True)
    for name, content in case.files.items():
        (place / "work" / name).parent.mkdir(exist_ok=True)
        (place / "work" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    user = as_user("ordinary", ORDINARY + elsewhere)
    if elsewhere:
        subprocess.run([PYTHON, "-m", "compileall", "-q", place / "work"], stdout=subprocess.DEVNULL, check=False)
    if ROOT:
        uid = ORDINARY + elsewhere
        subprocess.run(["chown", "-R", f"{uid}:{uid}", place], check=True)
    env = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "TZ": "Asia/Seoul", "HOME": f"{place}/home",
           "TMPDIR": f"{place}/tmp", "OUTPUT_DIR": f"{place}/out", "REQUEST_ID": "r", "FUNCTION_ID": "f",
           "MEMORY_MB": "256", "TIMEOUT_MS": "60000", "USER": "nanogrid", "LOGNAME": "nanogrid"}
    given = json.dumps(case.task["input"]).encode() if "input" in case.task else b""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        streams = (out, err) if elsewhere else (subprocess.PIPE, subprocess.PIPE)
        done = subprocess.run(
            [*user, PYTHON, "main.py"], cwd=place / "work", env=env, input=given, timeout=300, check=False,
            stdout=streams[0], stderr=streams[1],  # its own: it may reopen them
            preexec_fn=lambda: [os.fchown(fd, uid, uid) for fd in range(3)] if ROOT else None)
        said = [os.pread(one.fileno(), 1 << 20, 0) for one in streams] if elsewhere else [done.stdout, done.stderr]
    return (*(masked(without_places(text.decode("utf-8", "replace"), place)) for text in said),
            done.returncode, sorted(os.listdir(place / "out")))


@pytest.fixture(scope="module", params=["warm-root", "cold-ordinary", pytest.param(
    "warm-ordinary", marks=[pytest.mark.slow] if ROOT else [])])
def started(request, grids):
    """Every program and every handler, run once each way of starting."""
    start, user = request.param.split("-")
    if user == "root" and not ROOT:
        pytest.skip("needs root")
    grid = grids(user, EXECUTION_CONCURRENCY=2, EXECUTION_WARMSTART=str(start == "warm").lower())
    grid.start = start
    grid.put_all({**HANDLED, **PROGRAMS})
    return grid.run()


@parametrize("name", PROGRAMS)
def test_a_start_is_a_bare_python(started, name):
    """What two bare runs in two environments agree on holds here, too; the order of the words where
    nobody promises one."""
    result = started[name]

    def seen(out, err, *rest):
        return [words(out) if PROGRAMS[name].unordered else out, err, *rest]

    got = seen(*(masked(without_places(result[key], started.base)) for key in ("stdout", "stderr")),
               result["exitCode"], result["outputFiles"])
    expected = seen(*bare_result(name))
    if got != expected:
        other = seen(*bare_result(name, elsewhere=True))
        agreed = [index for index, value in enumerate(other) if value == expected[index]]
        assert [got[index] for index in agreed] == [expected[index] for index in agreed]


def test_only_the_first_run_of_a_slot_waits_for_the_interpreter(started):
    """A ready interpreter that has to be made first is a cold start; without warmStart all are."""
    starts = collections.Counter(report["start"] for name in PROGRAMS for report in started.reports[slug(name)])
    assert set(starts) == ({"cold"} if started.start == "cold" else {"cold", "warm"})
    assert started.start == "cold" or starts["cold"] <= 2 + 1, starts  # two slots, and one renewal at most


def test_runs_of_one_interpreter_share_no_random_state(grids, user):
    grid = grids(user, EXECUTION_CONCURRENCY=1)
    source = "import os, random, secrets, tempfile, uuid\n" \
             "print(random.random(), random.Random().random(), uuid.uuid4(), secrets.token_hex(), os.urandom(8),\n" \
             "      os.path.basename(tempfile.mkdtemp()), sep='\\n')\n"
    for n in range(3):
        grid.put({"main.py": source}, request_id=f"n{n}")
    grid.run()
    for values in zip(*(grid[f"n{n}"]["stdout"].splitlines() for n in range(3))):
        assert len(set(values)) == 3, values


# --- compiled runtimes, runtimes that are missing

BUILT = table(r"""
=== C++ source | cpp | stdout=compiled
--- main.cpp
#include <iostream>
#include "lib/header.h"
int main() { std::cout << TEXT << std::endl; }
--- lib/header.h
#define TEXT "compiled"
=== C++ source of several files | cpp | stdout=two
--- main.cpp
#include <cstdio>
const char *other();
int main() { puts(other()); }
--- -o.cpp
const char *other() { return "two"; }
--- lib/unused.cpp
nothing that compiles
=== C++ that does not compile | cpp | status=rejected reason=compile
--- main.cpp
int main() { return undeclared_name; }
=== run.sh goes before main.cpp | cpp | stdout=script
echo script
--- main.cpp
int main() { return 1; }
=== the executable goes before main.cpp | cpp | stdout=executable
--- main*
#!/bin/sh
echo executable
--- main.cpp
int main() { return 1; }
=== run.sh may compile for itself | cpp timeoutMs=300000 | stdout=self
c++ -o main own.cc && ./main
--- own.cc
#include <cstdio>
int main() { puts("self"); }
=== Go source | go timeoutMs=120000 memoryMb=512 | stdout=compiled
package main
import "os"
func main() { os.Stdout.WriteString("compiled\n") }
=== Go source of several files | go timeoutMs=120000 memoryMb=512 | stdout=other
package main
func main() { println2(text) }
--- other.go
package main
import "os"
const text = "other"
func println2(text string) { os.Stdout.WriteString(text + "\n") }
--- other_test.go
package main
func nothing that compiles
--- other_windows.go
package main
const text = "windows"
=== Go module | go timeoutMs=120000 memoryMb=512 | stdout=inner
--- go.mod
module example.com/app
--- main.go
package main
import ("os"; "example.com/app/inner")
func main() { os.Stdout.WriteString(inner.Text) }
--- inner/inner.go
package inner
const Text = "inner"
=== Go that does not compile | go | status=rejected reason=compile
package main
func main() { undeclared_name() }
=== Go, run.sh goes before main.go | go | stdout=script
--- run.sh
echo script
--- main.go
package main
=== Go, the executable | go | stdout=executable
--- main*
#!/bin/sh
echo executable
""")


@pytest.fixture(scope="module")
def built(grids, user):
    """Each source three times, two at once."""
    # A compiler that says how it was called, and whether for the sources that do not compile.
    compiler = """#!/bin/bash
%s
tell mark %s "$({ id -u; tr '\\0' '\\n' < /proc/self/environ; grep NoNewPrivs /proc/self/status; ulimit -Hc;
grep -c undeclared main.cpp; echo end; } 2>&1 | tr '\\n' '|')"
exec g++ "$@"
"""
    need("g++")
    grid = grids(user, EXECUTION_CONCURRENCY=2)
    wrapper, grid.calls = grid.spool / "counting-g++", grid.spool / "calls"
    wrapper.write_text(compiler % (tell_in_bash(), grid.calls))
    wrapper.chmod(0o755)
    grid.env.update(AGENT_RUNTIMES_CPP=str(wrapper), AWS_SECRET_ACCESS_KEY="telltale")
    for name, case in BUILT.items():
        if case.runtime != "go" or shutil.which("go"):
            for n in range(3):
                grid.put(None if n else case.files, case.runtime, slug(name), f"{slug(name)}-{n}", **case.task)
    return grid.run()


@parametrize("name", BUILT)
def test_source_is_compiled(built, name):
    for n in range(3):
        result = check(built, f"{name}-{n}", BUILT[name])
    if BUILT[name].expect["status"] == "rejected":
        assert "undeclared_name" in json.dumps(result), "the compiler's message is in the result"


def test_source_is_compiled_once_a_zip_and_in_the_sandbox(built):
    calls = built.calls.read_text().split("|end|")[:-1]
    bad = [call for call in calls if call.endswith("|1")]
    assert len(calls) - len(bad) == 2 and len(bad) <= 9, calls  # at most once a take
    for call in calls:
        assert "telltale" not in call and "NoNewPrivs:\t1" in call, call
        assert not ROOT or not call.startswith("0|"), call


@parametrize("said", [
    "ld: No space left on device", "go: no space left on device", "fork: Resource temporarily unavailable"])
def test_what_other_runs_took_from_a_compiler_is_no_fault_of_the_source(folder, said):
    need("g++")
    compiler, full = folder.spool / "g++", folder.spool / "full"
    compiler.write_text(f'#!/bin/sh\necho "{said}" >&2\n[ ! -e {full} ] || exit 1\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    full.touch()
    folder.env["AGENT_RUNTIMES_CPP"] = str(compiler)
    folder.put({"main.cpp": "int main() {}"}, "cpp", request_id="late")
    with folder.agent() as agent:
        agent.wait_for("compiling fn.zip failed")
        full.unlink()
        agent.until_ok("late", " .*receiveCount=1")
        assert agent.stop() == 0


@parametrize("runtime, entry", [("nodejs", "index.js"), ("go", "main.go"), ("python", "main.py"), ("cpp", "main.cpp")])
def test_a_runtime_that_is_not_installed_is_an_error(grids, runtime, entry):
    grid = grids("ordinary", **{f"RUNTIMES_{runtime.upper()}": "/nonexistent/program"})
    grid.put({entry: "text"}, runtime, request_id="missing")
    grid.put({"run.sh": "echo fine"}, "cpp", function_id="shell", request_id="neighbour")
    grid.run()
    assert [(each["status"], each["reason"]) for each in grid.reports["missing"]] == [("error", "runtime")] * 3
    assert grid["neighbour"]["status"] == "ok"
    start = grid.log.partition(" REPORT ")[0]
    assert re.search(rf"(?i)runtime.*{runtime}", start), start


# --- --invoke

INVOKED = r"""
import os, sys
data = sys.stdin.buffer.read()
os.write(1, b"\xff\x00\r\nout " + data * 3)
os.write(2, b"\xfe\x1b[1merr no line end")
print(sorted(os.listdir()), os.environ["FUNCTION_ID"], os.environ["MEMORY_MB"], os.environ["TIMEOUT_MS"])
open("new", "w").write("x")
open("data.txt", "w").write("changed") if os.access("data.txt", os.W_OK) else None
sys.exit(len(data) % 2)
"""


def invoke(grid: Folder, *args, data: bytes = b"") -> subprocess.CompletedProcess:
    return subprocess.run([*as_user(grid.user), PYTHON, MODULE, "--invoke", *map(str, args)], input=data,
                          env={**os.environ, **grid.env}, capture_output=True, timeout=180, check=False)


@pytest.fixture(scope="module")
def invoked(grids, user):
    """A Folder with one function as a folder and as a zip."""
    grid = grids(user)
    (grid.top / "fn").mkdir()
    (grid.top / "fn").chmod(0o755)
    for name, text in (("main.py", INVOKED), ("data.txt", "data")):
        (grid.top / "fn" / name).write_text(text)
    (grid.top / "fn.zip").write_bytes(make_zip({"main.py": INVOKED, "data.txt": "data"}))
    return grid


@parametrize("source", ["fn", "fn.zip"])
@parametrize("size", [0, 1, 300_000])
def test_invoke_passes_everything_through(invoked, source, size):
    data = (b"\x00\xffx" * size)[:size]
    done = invoke(invoked, invoked.top / source, "--runtime", "python", "--function-id", "my/fn", "--memory-mb", "99",
                  "--timeout-ms", "70000", data=data)
    assert done.returncode == size % 2, done.stderr
    assert done.stdout == b"\xff\x00\r\nout " + data * 3 + b"['data.txt', 'main.py'] my/fn 99 70000\n"
    log = done.stderr.partition(b"\xfe\x1b[1merr no line end")[2]
    report, = reports(log.decode().lstrip("\n"))
    assert report["functionId"] == "my/fn" and report["status"] == ("failed" if size % 2 else "ok"), done.stderr
    assert report["exitCode"] == str(size % 2)
    # the folder is as it was
    assert sorted(path.name for path in (invoked.top / "fn").iterdir()) == ["data.txt", "main.py"]
    assert (invoked.top / "fn" / "data.txt").read_text() == "data"


@parametrize("source", ["shipped", "shipped.zip"])
def test_shipped_pyc_files_are_used(invoked, source):
    """The .pyc holds what its source does not, which has the time and the size that it was made of."""
    folder = invoked.top / "shipped"
    folder.mkdir(exist_ok=True)
    (folder / "main.py").write_text("import lib\nprint(lib.__cached__ and lib.said)\n")
    lib, changed = folder / "lib.py", 1_234_567_891
    for text, command in ("said = 'pyc'", "import py_compile; py_compile.compile('lib.py')"), ("said = 'src'", ""):
        lib.write_text(text)
        os.utime(lib, (changed, changed))
        subprocess.run([PYTHON, "-c", command], cwd=folder, check=True)
    with zipfile.ZipFile(invoked.top / "shipped.zip", "w") as archive:
        for path in folder.rglob("*.py*"):
            entry = zipfile.ZipInfo(str(path.relative_to(folder)))
            entry.extra = struct.pack("<HHBl", 0x5455, 5, 1, int(path.stat().st_mtime))
            archive.writestr(entry, path.read_bytes())
    done = invoke(invoked, invoked.top / source)
    assert done.stdout == b"pyc\n", done


@parametrize("files, args, said", [
    ({"main.py": "import time\ntime.sleep(60)"}, ["--timeout-ms", "300"], "timeout"),
    ({"main.py": "x = bytearray(900 << 20)"}, ["--memory-mb", "64", "--timeout-ms", "60000"], "oom"),
    ({"main.py": "1/0"}, [], "failed"),
    # the runtime is known by the only entry file
    ({"main.py": "print('python')"}, [], "python"), ({"index.js": "console.log('nodejs')"}, [], "nodejs"),
    ({"run.sh": "echo cpp", "data.py": ""}, [], "cpp")])
def test_invoke_says_how_a_run_ended_and_of_which_runtime_it_was(invoked, files, args, said):
    if said == "nodejs":
        need("node")
    path = invoked.top / "one.zip"
    path.write_bytes(make_zip(files))
    done = invoke(invoked, path, *(args or ["--timeout-ms", "60000"]))
    report, = reports(done.stderr.decode())
    if done.returncode == 0:
        assert (done.stdout.decode(), report["runtime"]) == (f"{said}\n", said), done.stderr
    else:
        assert (done.returncode, report["status"]) == (1, said), done.stderr


MAIN_PY = {"main.py": "print('python')"}
# how --invoke is called on a folder of these files: (files, arguments, what it says: --check on standard output)
INVOKED_SO = {
    "what is not there": ({}, "nothing", r"ERROR --invoke nothing: there is no such zip or folder\n"),
    "a file": (MAIN_PY, "fn/main.py", r"ERROR --invoke fn/main.py: this is a file, .*: --invoke fn\n"),
    "a file that is called a zip": ({"a.zip": "x"}, "fn/a.zip", "ERROR rejected: .* zip.*\n.* reason=zip\n"),
    "no time": (MAIN_PY, "fn --timeout-ms 0", r"ERROR rejected: timeoutMs is 0; .*\n.* reason=task\n"),
    "no entry file": ({"x.py": ""}, "fn", r"ERROR rejected: .* no main.py at its top.*\n.* reason=entry\n"),
    "two entry files": ({**MAIN_PY, "index.js": ""}, "fn",
                        r"ERROR --invoke fn: it has index.js and main.py; say by --runtime which of them is meant\n"),
    "what does not compile": ({"main.cpp": "int main() { return x; }"}, "fn",
                              r"\S*main.cpp: In function .*\n(.*\n)* .*return x.*\n(.*\n)*\S+ ERROR rejected: main.cpp does "
                              r"not compile \(failed, exit status 1\)\n.* REPORT .* reason=compile\n"),
    "an --output that is a file": (MAIN_PY, "fn --output fn/main.py", r"ERROR .*File exists: .fn/main.py.\n"),
    "--check": (MAIN_PY, "fn --check", r"settings.*\nok    function: fn begins with main.py, for python\n"
                r"ok    runtime python: /\S+, Python 3\.\d+\.\S+\nok    sandbox: .*\n"),
    "--check, no function": ({}, "fn --check", r"(?s:.*FAIL  function: .* no main.py .*ok    sandbox: .*)"),
    "--check, a runtime of another": (MAIN_PY, "fn --check --runtime cpp", r"(?s:.*FAIL  function: .* no run.sh .*ok    sandbox: .*)"),
}


@parametrize("how", INVOKED_SO)
def test_invoke_says_what_is_wrong_and_ends_with_1(tmp_path, how):
    files, args, said = INVOKED_SO[how]
    if "main.cpp" in files:
        need("g++")
    (tmp_path / "fn").mkdir()
    for name, text in files.items():
        (tmp_path / "fn" / name).write_text(text)
    agent = ended(Agent("--invoke", *args.split(), cwd=tmp_path, env={"AGENT_EXECUTION_METADATA": "allow"}), how != "--check")
    heard = agent.out if "--check" in args else agent.log
    assert re.fullmatch(rf"(\S+ +)?{said}", heard) and "credentials" not in heard, heard


def test_invoke_keeps_what_the_function_left_where_it_is_told_to(invoked, user):
    """Beside what is there already; without --output it names what goes."""
    source = """
import os, sys
out = os.environ["OUTPUT_DIR"]
os.mkdir(out + "/sub")
open(out + "/a.txt", "w").write("a")
open(out + "/sub/b.txt", "w").write("b")
print("said", flush=True)
sys.exit(3)
"""
    path, kept = invoked.top / "leaves.zip", Path(tempfile.mkdtemp(dir=invoked.top))
    path.write_bytes(make_zip({"main.py": source}))
    kept.chmod(0o777)
    (kept / "own").write_text("own")
    done = invoke(invoked, path, "--output", kept, "--timeout-ms", "60000")
    assert done.returncode == 1 and b"OUTPUT_DIR" not in done.stderr, done.stderr
    assert [(kept / name).read_text() for name in ("a.txt", "sub/b.txt", "own")] == ["a", "b", "own"]
    result = json.loads((kept / "result.json").read_text())
    assert result["outputFiles"] == ["a.txt", "sub/b.txt"] and result["stdout"] == "said\n"
    assert (result["status"], result["exitCode"], result["success"]) == ("failed", 3, False)
    done = invoke(invoked, path, "--timeout-ms", "60000")
    assert b"$OUTPUT_DIR is gone, with a.txt, sub/b.txt; --output DIR keeps it\n" in done.stderr


# --- handlers, as AWS Lambda calls them

# `value`: the JSON that it returns; `err`: what its standard error holds, for a space a dot
HANDLED = table(r"""
=== event and context | input={"a":["한",1.5]} memoryMb=99 env={"X":"1'\n2"} | value=["event-and-context","event-and-context","$LATEST","99"]
import os
def handler(event, context):
    assert event == {"a": ["한", 1.5]} and os.environ["X"] == "1'\n2", event
    assert 0 < context.get_remaining_time_in_millis() <= 60000, context.get_remaining_time_in_millis()
    assert context.invoked_function_arn.split(":")[6] == os.environ["AWS_LAMBDA_FUNCTION_NAME"]
    assert context.log_group_name and context.log_stream_name and context.identity is None
    assert os.environ["AWS_LAMBDA_FUNCTION_MEMORY_SIZE"] == "99" and os.environ["_HANDLER"] == "app.handler"
    assert os.environ["LAMBDA_TASK_ROOT"] == os.getcwd() == os.path.dirname(__file__)
    return [context.aws_request_id, context.function_name, context.function_version, context.memory_limit_in_mb]
=== no input is an empty event | handler="src.app.handler" | value={}
--- src/app.py
def handler(event, context): return event
=== a package with modules of its own | handler="src/pack.handler" | value=[3,"src.pack"]
--- src/pack/__init__.py
from .part import three
import beside
def handler(event, context): return three + beside.zero, __name__
--- src/pack/part.py
three = 3
--- beside.py
zero = 0
=== modules named as those that call it | | value="own"
import json
def handler(event, context): return "own"
--- json.py
raise SystemExit(9)
--- logging.py
raise SystemExit(9)
=== main.py is not run | | value=null stdout=
def handler(event, context): pass
--- main.py
print("main.py")
=== what JSON holds | | value=["한\udcff",3,3.5,{"1":true},[1]]
from decimal import Decimal
def handler(event, context): return ["한\udcff", Decimal("3"), Decimal("3.5"), {1: True}, (1,)]
=== what JSON does not hold | | status=failed exitCode=1 value=null err=\[ERROR\].TypeError:.Object.of.type.set
def handler(event, context): return {1}
=== not a number | | status=failed value=null err=\[ERROR\].ValueError:.Out.of.range
def handler(event, context): return float("nan")
=== a coroutine | | status=failed value=null err=type.coroutine
async def handler(event, context): return 1
=== the largest value | | err=^$
def handler(event, context): return "한" * 87380 + "ab"
=== a value that is too large | | status=failed exitCode=0 value=null err=over.262144.bytes
def handler(event, context): return "한" * 87380 + "abc"
=== an exception | | status=failed exitCode=1 value=null err=^\[ERROR\].ZeroDivisionError:.division.by.zero\nTraceback.*\n..File."\S*/app.py",.line.2,.in.handler\n
def handler(event, context):
    1 / 0
=== an exception at the import | | status=failed exitCode=1 err=^\[ERROR\].ModuleNotFoundError:.*\nTraceback.*\n..File."\S*/app.py",.line.1
import not_there
=== a function that is missing | | status=failed exitCode=1 err=no.attribute.'handler'
=== exit before the return | | status=failed exitCode=0 value=null err=ended.before.its.handler
import sys
def handler(event, context): sys.exit(0)
=== memory over the cap | memoryMb=32 | status=oom value=null
def handler(event, context):
    held = []
    while True: held.append(bytearray(1 << 20))
=== over the time limit | timeoutMs=1500 | status=timeout value=null
import time
def handler(event, context):
    while context.get_remaining_time_in_millis(): time.sleep(0.01)
    time.sleep(60)
=== logging as it is, and as a module changes it | | err=^\[INFO\]\t\d+-\d+-\d+T[\d:.]+Z\tlogging-as-it-is-and-as-a-module-changes-it\tfirst\nsecond\n$
import logging
logging.basicConfig(format="no effect, as in Lambda")
root = logging.getLogger()
root.setLevel("INFO")
def handler(event, context):
    logging.info("first")
    root.handlers[0].setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger(__name__).warning("second")
    logging.debug("third")
=== output and threads | | value=1 stdout=out,late,exit
import atexit, threading, time
atexit.register(print, "exit", end="")
def handler(event, context):
    print("out", end=",")
    threading.Thread(target=lambda: (time.sleep(0.3), print("late", end=","))).start()
    return 1
=== processes of multiprocessing | | value=[[1,4],[1,4]]
import multiprocessing
def square(n): return n * n
def handler(event, context):
    def pool(kind):
        with multiprocessing.get_context(kind).Pool(1) as workers: return workers.map(square, [1, 2])
    return [pool("fork"), pool("spawn")]
=== async | nodejs input={"a":"한"} memoryMb=99 | value=[{"a":"한"},"async","99",true]
exports.handler = async (event, context) => {
  setInterval(() => {}, 1000);
  const left = context.getRemainingTimeInMillis();
  return [event, context.awsRequestId, context.memoryLimitInMB, left > 0 && left <= 60000];
};
=== callback | nodejs handler="src/app.handler" | value=[2,1] stdout=waited
--- src/app.cjs
exports.handler = (event, context, callback) => {
  callback(null, [2, 1]);
  setTimeout(() => console.log("waited"), 50);
};
=== callback without waiting | nodejs | value={"a":1} stdout=
exports.handler = (event, context, callback) => {
  context.callbackWaitsForEmptyEventLoop = false;
  setTimeout(() => console.log("never"), 5000);
  setImmediate(() => callback(null, {a: 1}));
};
=== callback with an error | nodejs | status=failed exitCode=1 value=null err=Invoke.Error.*"errorMessage":"no"
exports.handler = (event, context, callback) => callback("no");
=== a promise | nodejs | value="kept"
module.exports = {handler: () => new Promise((keep) => setTimeout(keep, 20, "kept"))};
=== a promise that fails | nodejs | status=failed exitCode=1 err="errorType":"TypeError","errorMessage":"boom","stack":.*index.js:1
exports.handler = () => Promise.reject(new TypeError("boom"));
=== a promise that never comes | nodejs | status=failed value=null err=ended.before.its.handler
exports.handler = async () => { await new Promise(() => {}); };
=== neither | nodejs | value=null
exports.handler = () => 5;
=== an exception in Node.js | nodejs | status=failed exitCode=1 err="errorMessage":"boom".*index.js:1
exports.handler = () => { throw new Error("boom"); };
=== an ES module | nodejs handler="app.handler" | value=[3,"app.mjs"]
--- app.mjs
import path from "node:path";
import {fileURLToPath} from "node:url";
const three = await Promise.resolve(3);
export const handler = async () => [three, path.basename(fileURLToPath(import.meta.url))];
=== an ES module by package.json | nodejs handler="lib/app.run" | value="ES"
--- package.json
{"type": "module"}
--- lib/app.js
export async function run() { return import.meta.url ? "ES" : ""; }
=== what JSON does not hold, in Node.js | nodejs | status=failed err=BigInt
exports.handler = async () => 5n;
=== exit before the return, in Node.js | nodejs | status=failed exitCode=0 err=ended.before.its.handler
exports.handler = async () => process.exit(0);
=== not exported | nodejs | status=failed exitCode=1 err=exports.no.function.handler
exports.other = async () => 1;
=== no such file | nodejs handler="app.handler" | status=rejected reason=entry
exports.handler = async () => 1;
""", python="app.py")
for _case in HANDLED.values():
    _case.task.setdefault("handler", "index.handler" if _case.runtime == "nodejs" else "app.handler")


@parametrize("name", HANDLED)
def test_a_handler_is_called_as_in_lambda(started, name):
    need(*programs(HANDLED[name]))
    result, expect = started[name], dict(HANDLED[name].expect)
    said = result["stderr"]
    assert re.search(expect.pop("err", ""), said), said
    if "value" in expect:
        assert result["returnValue"] == json.loads(expect.pop("value")), result
    for key, expected in expect.items():
        assert str(result[key]).strip() == expected, f"{key} should be {expected}: {result}"


def test_a_lambda_function_that_nothing_calls_is_said_once_for_each_package(grids, user):
    need("node")
    grid = grids(user, EXECUTION_CONCURRENCY=1)
    sources = {"plain": "console.log(1)", "common": "exports.handler = async () => 1;",
               "es": "export const handler = async () => 1;",
               "bundled": "__export(index_exports, {\n  handler: () => handler\n});\nfunction __export() {}\nvar index_exports;\n"}
    for name, source in sources.items():
        files = {"index.js": source, **({"package.json": '{"type": "module"}'} if name == "es" else {})}
        for n in range(3):
            grid.put(None if n else files, "nodejs", name, f"{name}-{n}")
        grid.put(None, "nodejs", name, f"{name}-called", handler="index.handler")
    grid.run()
    said = re.findall(r"index\.js of (\w+)\.zip exports a handler", grid.log)
    assert sorted(said) == ["bundled", "common", "es"], grid.log


def test_an_interpreter_that_starts_threads_is_not_kept_ready(grids, user):
    """As tracers do by a .pth file: no fork has its threads, but the locks that they hold."""
    grid = grids(user, EXECUTION_CONCURRENCY=2)
    subprocess.run([PYTHON, "-m", "venv", "--without-pip", grid.top / "venv"], check=True)
    packages, = (grid.top / "venv").glob("lib/python*/site-packages")
    (packages / "tracer.pth").write_text("import tracer\n")
    (packages / "tracer.py").write_text(
        "import subprocess, threading, time\nlock = threading.Lock()\n"
        "def beat():\n    while True:\n        with lock: time.sleep(0.05)\n        time.sleep(0.0005)\n"
        "threading.Thread(target=beat, daemon=True).start()\nsubprocess.Popen(['sleep', '600'])\n")
    grid.env["AGENT_RUNTIMES_PYTHON"] = str(grid.top / "venv" / "bin" / "python3")
    for n in range(6):
        grid.put({"main.py": "import threading, tracer\nwith tracer.lock: print(threading.active_count())\n"}
                 if n == 0 else None, request_id=f"r{n}")
    grid.run()
    assert {(grid[f"r{n}"]["stdout"], grid[f"r{n}"]["start"]) for n in range(6)} == {("2\n", "cold")}
    assert grid.log.count("starts 1 threads and 1 processes") == 1, grid.log


def test_invoke_of_a_handler(grids, user):
    grid = grids(user)
    source, event = grid.top / "fn.zip", grid.top / "event.json"
    source.write_bytes(make_zip({"app.py": "import os\ndef handler(event, context):\n    print('said')\n"
                                           "    return [event, os.environ['A'], os.environ['B']]\n"
                                           "def bad(event, context): 1 / 0\n"}))
    event.write_text('{"k": "한"}')
    args = [source, "--handler", "app.handler", "--env", "A=1", "--env", "B==2"]
    for more, data, seen in ((["--event", event], b"[]", {"k": "한"}), ([], b"[1]", [1]), ([], b"", {})):
        done = invoke(grid, *args, *more, data=data)
        said, value = done.stdout.decode().splitlines()
        assert (done.returncode, said, json.loads(value)) == (0, "said", [seen, "1", "=2"]), done
    done = invoke(grid, source, "--handler", "app.bad")
    assert (done.returncode, done.stdout) == (1, b"") and b"[ERROR] ZeroDivisionError" in done.stderr, done
    for more, status in ((["--env", "A"], 2), (["--env", "PATH=x"], 1), (["--event", grid.top / "none"], 2)):
        assert invoke(grid, *args, *more).returncode == status


# --------------------------------------------------------------------------------------------
# Delivery
# --------------------------------------------------------------------------------------------


# How AWS words a denial: docs.aws.amazon.com/IAM/latest/UserGuide/troubleshoot_access-denied.html and
# docs.aws.amazon.com/AmazonS3/latest/userguide/troubleshoot-403-errors.html
WORKER = "arn:aws:sts::123456789012:assumed-role/worker/i-0123456789abcdef0"
FUNCTION_ROLE = "arn:aws:iam::123456789012:role/functions"
DENIED_BY = f"User: {WORKER} is not authorized to perform: {{0}} on resource: {{1}} because no {{2}} allows the {{0}} action"
FORBIDDEN_BY = f"User: {WORKER} is not authorized to perform: {{0}} on resource: {{1}} with an explicit deny in a {{2}}"


# --- trials, all at once

# Trials wait for far longer than they work, so they run in threads of their own, each with its
# own queue, bucket, proxy and agents: name -> a function of the emulator's URL.
TRIALS: dict = {}
SLOW_TRIALS: set[str] = set()  # those of them that need --slow


def trial(form: str = "", *columns, quick=None, agent=None, **options):
    """Have a function be trials, one for each combination of the columns: of a site where there are options
    for one, and of its agent. `quick`: all but these names run with --slow alone."""
    def add(function):
        def run(moto, row):
            with contextlib.ExitStack() as stack:
                world = [stack.enter_context(site(moto, **options)) if options else moto]
                if agent is not None:
                    world.append(stack.enter_context(world[0].agent(**agent)))
                return function(*world, *row)

        for row in itertools.product(*columns):
            name = (form or function.__name__.replace("_", " ")).format(*row)
            add_trial(name, run, quick is not None and name not in quick, row=row)
        return function
    return add


def add_trial(name: str, function, slow: bool, **arguments):
    """Have a row of a table be a trial."""
    TRIALS[name] = functools.partial(function, **arguments)
    if slow:
        SLOW_TRIALS.add(name)


@pytest.fixture(scope="module")
def trials(moto, request):
    """The trials that were asked for, begun in the order of the table: the slow ones first."""
    wanted = {item.callspec.params["name"] for item in request.session.items
              if item.name.startswith("test_trial[")}
    order = sorted(wanted, key=lambda name: (name not in SLOW_TRIALS, list(TRIALS).index(name)))
    # One emulator serves them all, and agents wait for an answer of its for 8 s.
    with ThreadPoolExecutor(max(4, int(20 / busy()))) as pool:
        futures = {name: pool.submit(TRIALS[name], moto) for name in order}
        try:
            yield futures
        finally:
            pool.shutdown(cancel_futures=True)


# --- kills


@trial(quick=())
def sigkill_of_agents_of_one_folder_at_random_loses_nothing(_):
    seed = random.randrange(1 << 30)
    chance, wanted = random.Random(seed), {f"r{number:03d}" for number in range(200)}
    with Folder() as folder, contextlib.ExitStack() as stack:
        for request_id in sorted(wanted):
            folder.job(request_id, sleep=chance.choice((0, 0.05, 0.3)))
        agents = [stack.enter_context(folder.agent()) for _ in range(2)]
        for _ in range(12):
            time.sleep(chance.uniform(0.2, 1.2))
            agents.pop(chance.randrange(2)).stop(signal.SIGKILL)
            agents.append(stack.enter_context(folder.agent()))
        until(lambda: not folder.names("queue") and not folder.names("running"), 300,
              f"an empty folder (seed {seed})")
        assert set(runs_in(folder.top)) == wanted == set(folder.names("results")), seed
        assert {folder.result(request_id)["status"] for request_id in wanted} == {"ok"}
        assert not folder.names("dead"), f"seed {seed}"


WHERE = """import os, json
tell("mark", json.loads(input())["marks"] + "/" + os.environ["REQUEST_ID"] + "." + os.urandom(6).hex(),
     os.getcwd())
"""
CHAOS = ([(operations, fault) for operations in ("GetObject", "PutObject", "PutMetricData", "*")
          for fault in ("status 500", "reset", "black hole", "truncated", "throttling", "expired")]
         + [(operations, fault) for operations in ("ReceiveMessage", "DeleteMessage*", "*Message*")
            for fault in ("status 503", "reset", "lost answer", "black hole")]
         + [("DeleteMessage*", "partial"), ("PutObject", "lost answer")])


def feed(aws: Aws, names: list[str]) -> bool:
    """Send tasks for WHERE until some wait, `bad…` of them wrong; whether all are sent.

    Not all at once: moto's receive copies the whole queue for each message.
    """
    while names and visible(aws) < 60:
        for name in names[-10:]:
            aws.job(name, runtime="cobol" if name.startswith("bad") else "python", memoryMb=64, timeoutMs=25000)
        del names[-10:]
    return not names


@trial(quick=())
def kills_and_faults_at_random_for_two_minutes_lose_nothing(_):
    """Two serve 2,000 messages; every 2 s one is killed, every 5 s something fails for 3 s."""
    seed = random.randrange(1 << 30)
    chance, killed = random.Random(seed), {}
    good, bad = [f"r{number}" for number in range(1980)], [f"bad{number}" for number in range(20)]
    unsent = chance.sample(good + bad, 2000)
    with moto_server() as moto, site(moto, visibility=30, receives=12) as aws, \
            contextlib.ExitStack() as stack:
        def another() -> Agent:
            agents.append(stack.enter_context(aws.agent(env={"AGENT_TASKBASEDIR": f"{aws.path}/task{len(agents)}"},
                execution={"concurrency": 2}, output={"bucket": aws.bucket})))
            return len(agents) - 1

        agents: list[Agent] = []
        aws.put({"main.py": with_tell(WHERE)})
        two, begun = [another(), another()], time.monotonic()
        for second in range(120):
            if second % 5 == 0:
                aws.proxy.fail(*chance.choice(CHAOS))
            elif second % 5 == 3:
                aws.proxy.heal()
            if second % 2:
                victim = chance.randrange(2)
                killed[two[victim]], members = time.time(), family(agents[two[victim]].process.pid)
                agents[two[victim]].stop(signal.SIGKILL)
                until_gone(members)
                two[victim] = another()
            feed(aws, unsent)
            time.sleep(max(0.0, begun + second + 1 - time.monotonic()))
        aws.proxy.heal()
        until(lambda: feed(aws, unsent), 300, "room for all messages")
        until_settled(aws, agents[two[0]], in_dlq=len(bad), seconds=300)
        for number in two:
            assert agents[number].stop() == 0
        runs = collections.defaultdict(list)
        for mark in marks_in(aws.path):
            number = int(re.search(r"/task([0-9]+)/", mark.read_text())[1])
            runs[mark.name.partition(".")[0]].append((mark.stat().st_mtime, number))
        again = {name: sorted(known) for name, known in runs.items() if len(known) > 1}
        without_a_kill = {name for name, known in again.items() if any(
            killed.get(agent, math.inf) > later for (_, agent), (later, _) in zip(known, known[1:]))}
        log = "".join(agent.log for agent in agents)
        assert set(runs_in(aws.path)) == set(good), f"seed {seed}"
        # What AWS does for longer than a lease can be kept is an error, too; nothing of ours is one.
        ends = Counter((each["status"], each.get("reason")) for each in reports(log))
        assert {status for status, _ in ends} <= {"ok", "rejected", "released", "error"}, (seed, ends)
        assert {reason for status, reason in ends if status == "error"} <= {"s3", "output"}, (seed, ends, log[-20000:])
        assert not without_a_kill, f"{without_a_kill} ran again though their agent lived (seed {seed})"
        return f"{len(again)} of {len(good)} ran again, after {len(killed)} kills (seed {seed})"


# --- faults, by name

# what fails: (operations, visibility timeout, seconds that the fault lasts, and the function)
SCENES = {
    "visibility": ("ChangeMessageVisibility*", 24, 12, 28),
    "receive": ("ReceiveMessage", 15, 12, 0),
    "delete": ("DeleteMessage*", 12, 16, 0),
    "metrics": ("PutMetricData", 15, 12, 0),
    "code": ("GetObject", 12, 12, 0),
    "start": ("*", 15, 12, 0),
}
FAULTS = ["black hole", "timeout", "status 500", "status 503", "throttling", "reset", "truncated",
          "expired"]
UNHEARD = ("timeout", "truncated")  # what was asked for was done
UNANSWERED = ("black hole", "timeout")  # it takes botocore 24 s to find out
IN_PLACE = ("metrics", "code")  # repeated by botocore, twice, before it is said
WITHOUT_SLOW = {"visibility reset", "receive black hole", "delete status 500", "metrics throttling",
                "code truncated", "start expired"}


@trial("{} {}", SCENES, FAULTS, quick=WITHOUT_SLOW)
def fault_trial(moto: str, what: str, fault: str):
    """One job, and a fault that begins before it; soon after the fault's end all is well."""
    operations, visibility, lasts, takes = SCENES[what]
    with site(moto, visibility=visibility, receives=9) as aws:
        proxy_fault = "late answer" if fault == "timeout" else fault
        late = 12 if fault == "timeout" else 0  # later than any limit
        if what == "start":
            aws.proxy.fail(operations, proxy_fault, seconds=late)
        with aws.agent(wait=5, metrics={"flushSeconds": 1}) as agent:
            if what != "start":
                aws.proxy.until("ReceiveMessage")
                aws.proxy.fail(operations, proxy_fault, seconds=late)

            def failing():
                return [seen.at for seen in aws.proxy.seen(operations, proxy_fault)]

            if what == "receive":  # not with the answer of a poll that is still well
                until(failing, what="a poll that fails")
            aws.job(sleep=takes, function_id=aws.name, timeoutMs=1000 * (takes + 60))
            until(failing, what="a request that fails")
            time.sleep(4)
            cpu = cpu_seconds(agent.process.pid)
            time.sleep(lasts - 4)
            cpu = (cpu_seconds(agent.process.pid) - cpu) / (lasts - 4)
            if what == "metrics":
                until(lambda: not aws.count(), what="the delete")
            left, tried = aws.count(), failing()
            aws.proxy.heal()
            aws.job("after", function_id=aws.name)
            until(lambda: not aws.count() and metric_values(aws, aws.name) >= 2, 180,
                  f"recovery; {[(s.operation, s.fault) for s in aws.proxy.requests]}\n{agent.log}")
            assert agent.stop() == 0
        log = agent.log
        assert runs_in(aws.path) == {"r1": 1, "after": 1} and not dead(aws), log
        assert statuses(log).count("ok") == 2
        assert metric_values(aws, aws.name) == 2 or what == "metrics" and fault in UNHEARD
        tried = [at for at in tried if at <= tried[0] + lasts]  # this test may have slept for longer
        assert len(tried) <= (20 if what in IN_PLACE else 12), "tries that do not grow apart"
        assert left == (what != "metrics") or what == "delete" and fault in UNHEARD
        if what in ("code", "visibility"):
            assert {each["receiveCount"] for each in reports(log)} == {"1"}, log
        if what in ("receive", "delete", "metrics"):
            assert cpu < 0.01 * busy(), f"{cpu:.1%} of a core meanwhile\n{log}"
        if what in ("visibility", "delete"):
            assert len(aws.proxy.received) == 2, f"the lease was lost\n{log}"
        if what == "start":
            assert len(complaints(log)) <= 2, log
        else:
            said = not (what in IN_PLACE and fault in UNANSWERED)
            assert len(complaints(log)) == said == log.count(" works again after "), log
# --- outages, by what is away


@contextlib.contextmanager
def failing_site(moto: str, operations: str, fault: str, **options):
    """A site for which requests fail from aws.away() until aws.back()."""
    with site(moto, **options) as aws:
        aws.away, aws.back = functools.partial(aws.proxy.fail, operations, fault), aws.proxy.heal
        yield aws


@contextlib.contextmanager
def named_site(moto: str, **options):
    """The same for the name of its endpoint; connections that are open then are cut."""
    script = """mount --bind "$1" /etc/hosts && mount --bind "$2" /etc/resolv.conf && shift 2 && exec "$@" """
    with site(moto, **options) as aws:
        hosts, resolver = aws.path / "hosts", aws.path / "resolv.conf"
        resolver.write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
        aws.env["AWS_ENDPOINT_URL"] = aws.proxy.url.replace("127.0.0.1", "emulator")
        aws.prefix = ["unshare", "-m", "sh", "-c", script, "sh", str(hosts), str(resolver)]

        def away():
            hosts.write_text("127.0.0.1 localhost\n")
            aws.proxy.fail("*", "reset")

        def back():
            hosts.write_text("127.0.0.1 localhost emulator\n")
            aws.proxy.heal()

        back()
        aws.away, aws.back = away, back
        if not works(*aws.prefix):
            pytest.skip("this machine lets this user mount nothing")
        yield aws


@contextlib.contextmanager
def small_disk(path: Path):
    """A disk of 8 MiB at `path` in a mount namespace of its own: what enters that, its path from
    here, and what fills and empties it."""
    path.mkdir()
    script = f"mount -t tmpfs -o size=8m,mode=755 none {path} && echo && exec cat"
    with subprocess.Popen(["unshare", "-m", "sh", "-c", script], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as holder:
        if holder.stdout.readline() != b"\n":
            pytest.skip("this machine lets this user mount no tmpfs")
        seen = Path(f"/proc/{holder.pid}/root{path}")

        def fill():
            with contextlib.suppress(OSError), open(seen / "filler", "wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass

        try:
            yield ["nsenter", f"--mount=/proc/{holder.pid}/ns/mnt"], seen, fill, (seen / "filler").unlink
        finally:
            holder.stdin.close()


@contextlib.contextmanager
def crowded_site(moto: str, **options):
    """The same for the disk under taskBaseDir."""
    with site(moto, **options) as aws, small_disk(aws.path / "task") as disk:
        aws.prefix, _, aws.away, aws.back = disk
        yield aws


def failing(operations: str, fault: str):
    return functools.partial(failing_site, operations=operations, fault=fault)


# what is away: the site (none: a folder's own disk), the seconds that it lasts, whether SQS is away with it
OUTAGES = {
    "S3, status 500": (failing("GetObject", "status 500"), 90, False),
    "S3, reset": (failing("GetObject", "reset"), 90, False),
    "S3, black hole": (failing("GetObject", "black hole"), 90, False),
    "results": (failing("PutObject|SendMessage", "status 503"), 60, False),
    "credentials": (failing("*", "expired"), 60, True),
    "the clock": (failing("*", "clock"), 60, True),  # has jumped, and AWS refuses what is signed by it
    "network": (failing("*", "black hole"), 60, True),
    "names": (named_site, 60, True),
    "disk": (crowded_site, 30, False),
    "a folder's disk": (None, 30, False),
}
JOBS = [f"r{number}" for number in range(1, 9)]


@contextlib.contextmanager
def outage_of_a_site(moto: str, what: str, seconds: float):
    """A site in which something can be away: how its jobs go there, and what they must have left."""
    make, _, sqs_too = OUTAGES[what]
    with make(moto, visibility=int(seconds) + 40 if sqs_too else 20) as aws:
        aws.put({**marker(), "ballast": os.urandom(1 << 20)}, "new.zip")
        output = {"bucket": aws.bucket, "queueUrl": aws.results_queue()}

        def check(log: str, is_whole: bool):  # each result is there, and once in the queue if no agent ended
            stored = aws.s3.list_objects_v2(Bucket=aws.bucket, Prefix="outputs/")["Contents"]
            assert {each["Key"] for each in stored} == {f"outputs/{one}/result.json" for one in JOBS}, log
            assert not dead(aws) and (visible(aws, output["queueUrl"]) == len(JOBS) or not is_whole), log

        yield types.SimpleNamespace(
            path=aws.path, away=aws.away, back=aws.back, job=aws.job, check=check,
            agent=lambda: aws.agent(execution={"concurrency": 2}, output=output),
            settle=lambda agent, seconds: until_settled(aws, agent, seconds=seconds),
            is_given_back=lambda: visible(aws) == aws.count())


@contextlib.contextmanager
def outage_of_a_folder(*_):
    """The same where the disk of folder and workspaces can be full."""
    with scratch() as top, small_disk(top / "disk") as (prefix, seen, away, back), \
            Folder(path=seen / "grid") as folder:
        (folder.path / "code" / "new.zip").write_bytes(make_zip({**marker(), "ballast": os.urandom(1 << 20)}))
        env = {"AGENT_TASKBASEDIR": f"{top}/disk/task", "AGENT_EXECUTION_CONCURRENCY": "2"}

        def check(log: str, _):
            assert {folder.result(one)["status"] for one in JOBS} == {"ok"} and not folder.names("dead"), log

        yield types.SimpleNamespace(
            path=folder.top, away=away, back=back, check=check, is_given_back=lambda: True,
            job=lambda request_id, sleep, key: folder.job(request_id, sleep, s3Key=key),
            agent=lambda: Agent("--local", f"{top}/disk/grid", prefix=prefix, env=env),
            settle=lambda agent, seconds: until(
                lambda: not folder.names("queue") + folder.names("running"), seconds, f"the end\n{agent.log}"))


def outage_trial(moto: str, what: str, seconds: float, number: int = 0):
    """Something is away while two jobs run, and six come whose code is not there yet.

    It ends: soon all is done, each job once and at its first receive. Or the agent ends in the middle
    of it by a signal, and what it had another finishes. SIGTERM: all is visible at once, as soon as SQS
    hears of it, and a take from a folder is not spent. SIGKILL: after its lease.
    """
    with contextlib.ExitStack() as stack:
        make = outage_of_a_site if OUTAGES[what][0] else outage_of_a_folder
        world = stack.enter_context(make(moto, what, seconds * (not number)))
        first = last = stack.enter_context(world.agent())
        for request_id in JOBS[:2]:
            world.job(request_id, sleep=3, key="fn.zip")
        for request_id in JOBS[:2]:
            until_ran(world.path, request_id)

        def six_come():
            for request_id in JOBS[2:]:
                world.job(request_id, sleep=0, key="new.zip")

        # A disk that is full takes no task either.
        for step in (world.away, six_come) if OUTAGES[what][0] else (six_come, world.away):
            step()
        first.wait_for("trying on until it works")
        begun, used = time.monotonic(), cpu_seconds(first.process.pid)
        time.sleep(seconds)
        used = (cpu_seconds(first.process.pid) - used) / (time.monotonic() - begun)
        assert used < 0.01 * busy() or seconds < 20, f"{used:.1%} of a core meanwhile\n{first.log}"
        if number:
            first.send(number)
            if number == signal.SIGTERM and OUTAGES[what][2]:
                time.sleep(1)
                world.back()
            assert first.end() == (0 if number == signal.SIGTERM else -number), first.log
            if number == signal.SIGTERM:
                until(world.is_given_back, 10, f"what was held\n{first.log}")
                assert set(statuses(first.log)) <= {"ok", "released"}, first.log
            last = stack.enter_context(world.agent())
            time.sleep(2)
        world.back()
        world.settle(last, 180 if number else 45)
        assert last.stop() == 0
        log, runs = first.log + (last.log if number else ""), runs_in(world.path)
        again = {name for name, times in runs.items() if times > 1}
        assert set(runs) == set(JOBS) and again <= (set(JOBS[:2]) if number else set()), log
        world.check(log, not number)
        if not number or number == signal.SIGTERM and what == "a folder's disk":
            assert receives(log) == {1}, log
        if not number:
            assert statuses(log) == ["ok"] * len(JOBS), log
            # What failed is said to have failed once, and to work again once, but for what nobody asked any more.
            failed = re.findall(r"WARNING (.*?) failed: .*; trying on", log)
            again = re.findall(r"INFO (.*) works again after", log)
            unasked = {"extending or giving back messages"} - set(again)
            assert failed and sorted(set(failed) - unasked) == sorted(again), log
            assert len(failed) == len(set(failed)), log


QUICK_OUTAGES = ("S3, reset", "results", "credentials", "the clock", "names", "disk", "a folder's disk")
QUICK_STOPS = (("S3, reset", signal.SIGTERM), ("results", signal.SIGKILL))
for _what, (_, _seconds, _) in OUTAGES.items():
    add_trial(f"{_what} away for {_seconds} s", outage_trial, True, what=_what, seconds=_seconds)
    if _what in QUICK_OUTAGES:
        add_trial(f"{_what} away for 5 s", outage_trial, False, what=_what, seconds=5)
    for _number in (signal.SIGTERM, signal.SIGKILL):  # after 4 s: the two that ran are being stored
        add_trial(f"{_what} away, and {_number.name}", outage_trial,
                  (_what, _number) not in QUICK_STOPS, what=_what, seconds=4, number=_number)


@trial(visibility=6)
def network_away_for_longer_than_the_lease_runs_nothing_twice(aws):
    """The message comes back to the agent that has its result: that is stored, and no more."""
    with aws.agent(output={"bucket": aws.bucket}) as agent:
        aws.job(sleep=8)
        until_ran(aws.path)
        aws.proxy.fail("*", "reset")
        agent.wait_for("the lease of message .* is lost")
        agent.wait_for("storing results in .* failed")
        aws.proxy.heal()
        finish(aws, agent, {"r1": 1})
        assert aws.s3.get_object(Bucket=aws.bucket, Key="outputs/r1/result.json")


@trial(visibility=30, receives=9)
def outage_without_change_message_visibility_is_given_up_near_the_visibility_timeout(aws):
    aws.proxy.fail("ChangeMessageVisibility*", "denied")
    aws.proxy.fail("GetObject", "status 500")
    with aws.agent(execution={"concurrency": 1}) as agent:
        aws.job(timeoutMs=20000)
        until(lambda: aws.proxy.received, what="the receive")
        taken = time.time()
        said = agent.wait_for(r"^(\S+) ERROR REPORT requestId=r1 .*status=error .*reason=s3")
        held = datetime.fromisoformat(said[1].replace("Z", "+00:00")).timestamp() - taken
        assert 10 < held < patient(60), f"given up at a wrong time\n{agent.log}"
        aws.proxy.heal()
        finish(aws, agent, {"r1": 1})


@trial(visibility=60)
def what_is_cached_runs_on_while_s3_is_away(aws):
    """It was sent well before S3 confirmed what is cached; what is new keeps the other slot."""
    aws.put(marker(), "new.zip")
    aws.proxy.fail("GetObject *new.zip*", "status 500")
    for number in range(9):
        aws.job(f"r{number}", sleep=0.5)
        if number == 1:
            aws.job("new", key="new.zip")
    time.sleep(ng.CLOCK_SKEW_SECONDS + 1)
    with aws.agent(execution={"concurrency": 2}) as agent:
        until(lambda: len(reports(agent.log)) == 9, 90, "those that are cached")
        assert aws.proxy.count("GetObject", "") <= 2 and runs_in(aws.path)["new"] == 0
        aws.proxy.heal()
        finish(aws, agent, ends={"ok": 10})
    assert set(runs_in(aws.path).values()) == {1} and receives(agent.log) == {1}, agent.log


# what is wrong: (fault, the task's fields, status, reason, what the log names)
S3_TROUBLE = {
    "no such key": ("", {"key": "missing.zip"}, "rejected", "key", "missing.zip"),
    "403": ("denied", {}, "error", "permission", "s3:GetObject"),
    "no bucket": ("no bucket", {}, "error", "bucket", "-code"),
}


@trial("s3 {}", S3_TROUBLE, visibility=300, agent=dict(patch="ng.ERROR_DELAY_SECONDS = 4"))
def s3_trial(aws, agent, trouble):
    """It is no outage: said after one try, and the message comes back after a growing delay."""
    fault, task, status, reason, word = S3_TROUBLE[trouble]
    if fault:
        aws.proxy.fail("GetObject", fault)
    aws.job(**task)
    agent.wait_for("REPORT requestId=r1")
    first = reports(agent.log)[0]
    assert (first["status"], first["reason"]) == (status, reason) and word in agent.log
    if status == "error":
        aws.proxy.until("ChangeMessageVisibilityBatch", times=2)
        assert aws.proxy.count("GetObject") == 2 and aws.count() == 1 and not dead(aws)
        aws.proxy.heal()
    until_settled(aws, agent, in_dlq=status == "rejected")
    assert runs_in(aws.path) == ({"r1": 1} if status == "error" else {})
    asked = aws.proxy.bodies("ChangeMessageVisibilityBatch")
    assert [each["Entries"][0]["VisibilityTimeout"] for each in asked] == ([4, 16] if status == "error" else [0, 0, 0])


def test_a_result_that_sqs_does_not_take_is_no_fault_of_its_queue():
    """Else one function that says too much would keep all from running."""
    client_error = pytest.importorskip("botocore.exceptions").ClientError
    def refuse(**_):
        raise client_error({"Error": {"Code": "InvalidParameterValue", "Message": "Message must be shorter"},
                            "ResponseMetadata": {"HTTPStatusCode": 400}}, "SendMessage")
    clients = types.SimpleNamespace(s3=None, results=types.SimpleNamespace(send_message=refuse))
    results = ng.AwsResults(clients, dataclasses.replace(ng.Settings(), output_queue_url=QUEUE), ng.Log())
    with pytest.raises(ng.Ended, match="cannot be stored"):
        results.put({"requestId": "r"}, "", [])
    assert not results.queue.since


def test_a_result_that_no_message_can_hold_is_sent_without_its_outputs():
    """What is returned may have 256 KiB, and has three times that as ASCII; it is sent in any case."""
    sent, log = [], Heard()
    clients = types.SimpleNamespace(s3=None, results=types.SimpleNamespace(
        send_message=lambda QueueUrl, MessageBody: sent.append(MessageBody)))
    results = ng.AwsResults(clients, dataclasses.replace(ng.Settings(), output_queue_url=QUEUE), log)
    result = {"requestId": "r", "status": "ok", "stdout": "\1" * 65536, "stdoutBytes": 65536, "stderr": "",
              "outputFiles": ["a"], "returnValue": "é" * 131000}
    results.put({**result, "returnValue": 7}, "", [])
    results.put(result, "", [])
    assert [len(text) <= 1 << 20 for text in sent] == [True, True]
    whole, short = map(json.loads, sent)
    assert whole == {**result, "returnValue": 7}
    assert short == {**result, "stdout": "", "outputFiles": []}
    assert sum("are not sent to output.queueUrl" in line for line in log.lines) == 1


@trial("result {} {}", ("PutObject", "SendMessage"), ("denied", "status 503"), visibility=3, receives=9)
def result_trial(aws, operation, fault):
    """A result that may not be stored, or not before patience ends, leaves the message; when that
    is back, only the storing is repeated."""
    results = aws.results_queue()
    aws.proxy.fail(operation, fault)
    with aws.agent(output={"bucket": aws.bucket, "queueUrl": results},
               execution={"patienceSeconds": 3}) as agent:
        aws.job()
        agent.wait_for("REPORT requestId=r1 .*reason=output")
        time.sleep(1)
        assert reports(agent.log)[0]["status"] == "error" and aws.count() == 1
        aws.proxy.heal()
        until_settled(aws, agent)
        agent.until_ok("r1")
        assert reports(agent.log)[-1]["status"] == "ok" and runs_in(aws.path) == {"r1": 1}
        stored = aws.s3.get_object(Bucket=aws.bucket, Key="outputs/r1/result.json")["Body"].read()
        assert json.loads(stored)["status"] == "ok" and json.loads(stored)["success"] is True
        assert visible(aws, results) == 1


@trial(visibility=30)
def values_that_cloudwatch_does_not_take_are_bounded_and_counted(aws):
    """Five are kept at most; four come while a request with some of them is under way."""
    aws.proxy.fail("PutMetricData", "reset", seconds=1)
    with aws.agent(patch="ng.CloudWatchMetrics.MOST_KEPT = 5", metrics={"flushSeconds": 1}) as agent:
        for number in range(5):
            aws.job(f"r{number}", function_id=aws.name)
        aws.proxy.until("PutMetricData")
        for number in range(5, 9):
            aws.job(f"r{number}", function_id=aws.name)
        until_settled(aws, agent)
        # All nine have come. Each request is made three times, so one of the next six is the
        # first of a new one, which holds all that is kept.
        before = aws.proxy.count("PutMetricData")
        aws.proxy.until("PutMetricData", times=before + 6)
        aws.proxy.heal()
        agent.wait_for(r"Successfully published 5 values to CloudWatch \(4 older ones")
        agent.stop()
    assert len(reports(agent.log)) == 9 and metric_values(aws, aws.name) == 5
    assert agent.log.count("publishing metrics to CloudWatch failed") == 1
    assert agent.log.count("publishing metrics to CloudWatch works again") == 1


@trial(visibility=6)
def a_lease_ends_after_twelve_hours_whatever_extends_it(aws):
    """Here after eight seconds: that is said, and the message is deleted when it comes back."""
    with aws.agent(patch="ng.LONGEST_LEASE_SECONDS = 8", execution={"concurrency": 1}) as agent:
        aws.job(sleep=30)
        until_ran(aws.path)
        until(lambda: visible(aws), what="the end of the lease")
        agent.wait_for("REPORT requestId=r1", 120)
        finish(aws, agent, {"r1": 1})
    asked = aws.proxy.bodies("ChangeMessageVisibilityBatch")
    assert asked and all(entry["VisibilityTimeout"] <= 6 for each in asked for entry in each["Entries"])
    assert any("is lost" in line for line in complaints(agent.log)), agent.log


DEEP = ('{"requestId":"deep","functionId":"fn","runtime":"python","s3Key":"fn.zip","input":'
        + "[" * 200000 + "]" * 200000 + "}")


@trial(visibility=60, agent={})
def bodies_of_the_largest_size_run_and_those_nested_too_deep_are_rejected(aws, agent):
    aws.put({"main.py": "import sys; print('input of', len(sys.stdin.read()))"}, "size.zip")
    task = {"requestId": "large", "functionId": "fn", "runtime": "python", "s3Key": "size.zip",
            "input": ""}
    task["input"] = "x" * ((1 << 20) - len(json.dumps(task)))
    aws.send(body=json.dumps(task))
    aws.send(body=DEEP)
    finish(aws, agent, ends={"ok": 1, "rejected": 3}, in_dlq=1)
    assert f"stdout: input of {len(task['input']) + 2}" in agent.log


@trial(visibility=30, agent=dict(wait=0))
def queue_that_is_empty_is_not_asked_without_a_pause(aws, agent):
    """waitTimeSeconds 0: SQS answers at once, and asks money for each answer."""
    aws.proxy.until("ReceiveMessage", times=2)
    begun, before = time.monotonic(), aws.proxy.count("ReceiveMessage")
    time.sleep(4)
    polls = aws.proxy.count("ReceiveMessage") - before
    assert polls <= 2 * (time.monotonic() - begun)
    for number in range(40):
        aws.job(f"r{number}")
    finish(aws, agent)


@trial(visibility=600, agent={})
def sigterm_while_deleting_deletes_first(aws, agent):
    """The first delete is answered late, and the second refused."""
    aws.proxy.fail("DeleteMessageBatch", "delay", times=1, seconds=3)
    aws.job("r1")
    aws.proxy.until("DeleteMessageBatch")
    aws.proxy.fail("DeleteMessageBatch", "status 500", times=2)
    aws.job("r2")
    agent.until_ok("r2")
    assert agent.stop() == 0 and not aws.count(), agent.log


# --- one function's trouble is its own


def done(agent: Agent, *prefixes: str) -> int:
    """How many requests whose names begin so have ended ok."""
    return sum(each["status"] == "ok" and each["requestId"].startswith(prefixes) for each in reports(agent.log))


# what is wrong with one function's zip: the fault, and whether its messages wait or end as errors
OWN_TROUBLES = {"status 503": True, "black hole": True, "denied": False}


@trial("one function's zip: {}", OWN_TROUBLES, quick=["one function's zip: status 503"],
       visibility=30, receives=9, agent=dict(execution={"concurrency": 2}))
def own_trouble_trial(aws, agent, fault):
    """More of its messages than there are slots; the other functions' go on, and so do these at its end."""
    waits = OWN_TROUBLES[fault]
    aws.put(marker(), "bad.zip")
    aws.job("good0")
    until_settled(aws, agent)
    aws.proxy.fail("GetObject *bad.zip*", fault)
    for number in range(8):
        aws.job(f"bad{number}", key="bad.zip")
    aws.proxy.until("GetObject", fault)
    for number in range(1, 31):
        aws.job(f"good{number}")
    until(lambda: done(agent, "good") == 31, 60, f"the good ones\n{agent.log}")
    assert not done(agent, "bad"), agent.log
    aws.proxy.heal()
    until_settled(aws, agent)
    assert agent.stop() == 0 and set(runs_in(aws.path).values()) == {1}
    assert receives(agent.log) == {1} if waits else receives(agent.log) > {1}, agent.log


@trial(visibility=60)
def what_is_wrong_with_a_zip_is_not_fetched_nor_compiled_again_until_the_zip_changes(aws):
    tools(aws.path, compiler=f"echo x >>{aws.path}/compiled\nexit 1")
    (aws.path / "compiled").touch()
    (aws.path / "compiled").chmod(0o666)
    aws.put(b"no zip", "corrupt.zip")
    aws.put({"main.cpp": "int"}, "source.zip")
    for number in range(5):
        aws.send(f"corrupt{number}", key="corrupt.zip")
        aws.send(f"source{number}", key="source.zip", runtime="cpp")
    time.sleep(ng.CLOCK_SKEW_SECONDS + 1)
    with aws.agent(runtimes={"cpp": aws.path / "compiler"}) as agent:
        until_settled(aws, agent, 10)
        assert aws.proxy.count("GetObject") == 2 and len((aws.path / "compiled").read_text()) <= 2
        aws.put({"main.py": "print('mended')"}, "corrupt.zip")
        aws.send("mended", key="corrupt.zip")
        until_settled(aws, agent, 10)
        agent.until_ok("mended")
        agent.stop()
    assert Counter(statuses(agent.log)) == {"rejected": 30, "ok": 1}


@trial(visibility=6, receives=9, agent={})
def no_run_starts_under_a_lease_that_is_lost(aws, agent):
    """The agent is stopped while a run's code is on its way, for longer than the lease."""
    aws.proxy.fail("GetObject", "delay", times=1, seconds=2)
    aws.job()
    aws.proxy.until("GetObject")
    agent.send(signal.SIGSTOP)
    time.sleep(8)
    agent.send(signal.SIGCONT)
    until_settled(aws, agent)
    agent.until_ok("r1")
    agent.stop()
    first, second = reports(agent.log)
    assert (first["status"], first["reason"]) == ("released", "lease") and second["status"] == "ok"
    assert runs_in(aws.path) == {"r1": 1}


@trial("what was taken ahead and cannot start, signal {}", (0, signal.SIGTERM.value), visibility=600, agent=dict(execution={"concurrency": 1}))
def ahead_trial(aws, agent, number):
    """Short runs, then long ones: what was taken ahead of the first is given back, for another agent
    could have it, by a shutdown too; and nothing more is taken ahead then."""
    for each in range(30):
        aws.job(f"quick{each}")
    until_settled(aws, agent)
    aws.proxy.fail("ReceiveMessage", "delay", times=1, seconds=2)
    for each in range(10):
        aws.job(f"slow{each}", sleep=20)
    until(lambda: re.search("slow", str(runs_in(aws.path))), what="the first slow run")
    agent.send(number)
    until(lambda: visible(aws) == 9, 15, f"nine messages\n{agent.log}")
    polls = aws.proxy.count("ReceiveMessage")
    time.sleep(2)
    assert aws.proxy.count("ReceiveMessage") - polls <= 1, "nothing can start"
    given = [each for each in reports(agent.log, ahead=True) if each["requestId"].startswith("slow")]
    assert number or {(each["status"], each["reason"]) for each in given} <= {("released", "ahead")}
    assert (agent.end() if number else agent.stop()) == 0
    assert not number or aws.count() == visible(aws) == 9


@trial(visibility=600)
def three_restarts_send_nothing_to_the_dlq_that_never_ran(aws):
    """A receive is spent by what was begun, and by little that was taken ahead."""
    for number in range(25):
        aws.job(f"r{number}", sleep=0.4)
    for restart in range(4):
        with aws.agent(execution={"concurrency": 2}) as agent:
            until(lambda agent=agent: len(reports(agent.log)) > 2, what="runs")
            if restart == 3:
                until_settled(aws, agent)
            assert agent.stop() == 0
    assert not dead(aws) and runs_in(aws.path) == {f"r{number}": 1 for number in range(25)}


@trial(visibility=600)
def second_signal_does_not_wait_for_an_upload(aws):
    aws.proxy.fail("PutObject|PutMetricData", "black hole")
    with aws.agent(output={"bucket": aws.bucket}, execution={"shutdownGraceSeconds": 300}) as agent:
        aws.job()
        aws.proxy.until("PutObject")
        agent.send(signal.SIGTERM)
        agent.wait_for("stopping: ")
        assert agent.process.poll() is None
        assert agent.stop(seconds=15) == 0
    assert statuses(agent.log) == ["released"] and visible(aws) == 1


@trial(visibility=5, receives=1, agent={})
def delete_is_sent_though_the_lease_has_run_out(aws, agent):
    """Nobody else received it: its newest handle still deletes it, and it does not go to the DLQ."""
    aws.job(sleep=2)
    until_ran(aws.path)
    aws.proxy.fail("DeleteMessage*|ChangeMessageVisibility*|ReceiveMessage", "reset")
    agent.wait_for("the lease of message .* is lost")
    time.sleep(1)
    with aws.proxy.lock:
        aws.proxy.rules[:] = [Rule("ReceiveMessage", "reset")]
    until(lambda: not aws.count(), what="the delete")
    assert not dead(aws) and agent.stop() == 0 and runs_in(aws.path) == {"r1": 1}


@trial(visibility=600, receives=9)
def results_that_cannot_be_stored_are_bounded_by_bytes(aws):
    files = {"main.py": "import os; open(os.environ['OUTPUT_DIR'] + '/x', 'wb').write(os.urandom(700_000))"}
    aws.put(files)
    aws.proxy.fail("PutObject", "denied")
    with aws.agent(patch="ng.UNSTORED_BYTES = 1_000_000", output={"bucket": aws.bucket}) as agent:
        aws.send("first")
        agent.wait_for("REPORT requestId=first .*reason=output")
        aws.send("second")
        agent.wait_for(r"WARNING \[first\] its result is dropped")
        until(lambda: len(list((aws.path / "task").glob("agent-*/code/output-*"))) == 1, what="one result")
        agent.stop()


@parametrize("status,has_dlq,delays", [
    ("rejected", True, [0, 0, 0, 0, 0]), ("rejected", False, [0, 0, 0, 10, 40]),
    ("released", False, [0, 0, 0, 0, 0]), ("error", True, [10, 40, 160, 640, 2560])])
def test_delays_grow_with_each_receive(party, status, has_dlq, delays):
    party.hears("None", b"")
    with party.queue(Heard()) as queue:
        queue.has_dlq = has_dlq
        found = [queue._delay(ng.Message("m", "", count, 0.0, last=math.inf), status) for count in range(1, 6)]
    assert found == delays


def test_who_needs_what_is_away_is_turned_away_until_one_has_tried():
    """That one may learn nothing of it; then the next one tries."""
    disk = ng.Dependency(log := Heard(), "a disk")
    with pytest.raises(ng.Outage), disk.needed():
        raise OSError(28, "No space left on device")
    with pytest.raises(ng.Outage, match="No space left"), disk.needed():
        pytest.fail("tried before its time")
    disk.retry_at = 0.0
    with pytest.raises(KeyError), disk.needed():
        with pytest.raises(ng.Outage), disk.needed():
            pytest.fail("tried while another does")
        raise KeyError
    with disk.needed():
        pass
    assert not disk.since and [line.split(" ")[1] for line in log.lines] == ["WARNING", "INFO"]


def test_drain_without_waits_ends_after_its_own_rejected_message(aws):
    aws.send(body="no JSON {")
    agent = ended(aws.agent("--drain", wait=0))
    assert len(reports(agent.log)) == 3 and dead(aws) == 1


def test_drain_whose_queue_is_away_for_longer_than_patience_ends_with_1(aws):
    aws.proxy.fail("ReceiveMessage", "reset")
    agent = ended(aws.agent("--drain", execution={"patienceSeconds": 2}), 1)
    assert "the drain is given up after" in agent.log


def test_peaks_carry_the_time_at_which_the_run_ended(party, tmp_path):
    """Those that were kept through an outage, too."""
    sent, errors = [], [RuntimeError("away"), None]

    def put_metric_data(Namespace, MetricData):
        if error := errors.pop(0):
            raise error
        sent.extend(MetricData)

    report = ng.Report(function_id="f", runtime="python", outcome=ng.Outcome(
        "ok", peak_memory_bytes=1, started_at=1000.0, duration_millis=2500))
    settings = dataclasses.replace(party.settings, flush_seconds=1)
    cloudwatch = ng.CloudWatchMetrics(types.SimpleNamespace(put_metric_data=put_metric_data), settings, Heard())
    folder = ng.FolderMetrics(tmp_path, settings, Heard())
    for metrics in (cloudwatch, folder):
        metrics.put(report)
    until(lambda: sent, what="the values")
    for metrics in (cloudwatch, folder):
        metrics.close(lambda: False)
    assert [each["Timestamp"] for each in sent] == [1002]
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["timestamp"] == "1970-01-01T00:16:42.500Z"


# --- no more of something


@trial(visibility=60)
def full_disk_takes_idle_packages_and_is_an_error_when_patience_ends(aws):
    """16 MiB under taskBaseDir: there is room for one package of 6 and its zip, not for two, nor for one
    of 20. For an ordinary user: no file over 16 MiB."""
    (aws.path / "task").mkdir()
    mounted = f"mount -t tmpfs -o size=16m,mode=755 none {aws.path}/task"
    prefix = in_mounts(mounted) if ROOT else ["prlimit", f"--fsize={16 << 20}"]
    with aws.agent(prefix=prefix, execution={"patienceSeconds": 3}) as agent:
        for name, size in (("a", 6), ("b", 6), ("c", 6), ("large", 20)):
            aws.put({"main.py": "print(1)", "ballast": os.urandom(size << 20)}, f"{name}.zip")
            aws.send(name, key=f"{name}.zip")
            agent.wait_for(f"REPORT requestId={name} ")
        aws.job("fine")
        agent.wait_for("REPORT requestId=fine ")
        seen = [(each["requestId"], each["status"]) for each in reports(agent.log)]
        assert seen == [("a", "ok"), ("b", "ok"), ("c", "ok"), ("large", "error"), ("fine", "ok")], agent.log
        assert re.search("No space left|File too large", agent.log)
        assert "packages that no run uses were removed" in agent.log
        assert agent.process.poll() is None


def test_the_code_cache_takes_a_share_of_the_disk(folder, monkeypatch):
    """Packages of 1 MiB, on a disk that has room for 6 with nothing else on it."""
    def get(name):
        folder.put({"main.py": "", "ballast": bytes(1020 * 1024)}, s3Key=name)
        task = ng.Task("r", "f", "python", "", name, 1, 1, b"")
        return cache.get(task, ng.Message("m", "", 1, time.time()))

    (folder.path / "unpacked").mkdir()
    cache = ng.CodeCache(ng.FolderCode(folder.path), folder.path / "unpacked", ng.Log())
    monkeypatch.setattr(ng.shutil, "disk_usage", lambda path: types.SimpleNamespace(
        free=(6 << 20) - sum(one.size for one in cache.packages.values())))
    used = get("a")
    for name in "bcd":
        cache.release(get(name))
    assert [key for _, key, _ in cache.packages] == ["a", "c", "d"]
    cache.release(get("c"))
    cache.release(get("e"))
    assert [key for _, key, _ in cache.packages] == ["a", "c", "e"]
    assert cache.evict() and not cache.evict()
    assert list(cache.packages.values()) == [used]
    cache.release(used)
    assert cache.evict() and not os.listdir(folder.path / "unpacked")


@trial(visibility=3, receives=99, agent=dict(metrics={"flushSeconds": 2}))
def no_more_file_descriptors_is_an_error_and_the_agent_lives(aws, agent):
    """The limit is lowered under a running agent, to less than it has open."""
    aws.job("before", function_id=aws.name)
    until_settled(aws, agent)
    pid = agent.process.pid
    kept = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (10, kept[1]))
    aws.put({"main.py": "print('new code')"}, "new.zip")
    aws.send("during", key="new.zip")
    cpu = cpu_seconds(pid)
    time.sleep(5)
    assert agent.process.poll() is None, agent.log
    assert cpu_seconds(pid) - cpu < 1.0 * busy()
    resource.prlimit(pid, resource.RLIMIT_NOFILE, kept)
    until(lambda: metric_values(aws, aws.name) >= 1, what="the value that could not be sent")
    finish(aws, agent)


def set_limit(pid: int, option: str) -> None:
    """Give an ordinary user's process a limit, by the user: root may lack CAP_SYS_RESOURCE."""
    subprocess.run([*as_user("ordinary"), "prlimit", f"--pid={pid}", option], check=False,
                   stderr=subprocess.DEVNULL)


def test_a_full_disk_under_a_folder_stops_no_slot(grids):
    """No file of the agent's may grow (its runs are another process): nothing it keeps fits."""
    source = """import json, os
raise SystemExit(not tell("mark", json.loads(input())))
"""
    grid = grids("ordinary")
    with grid.agent() as agent:
        pid = agent.process.pid
        grid.put({"main.py": "print(1)"}, request_id="before", function_id="f")
        agent.until_ok("before")
        set_limit(pid, "--fsize=0:")
        grid.put(request_id="during", function_id="f")
        agent.wait_for("storing results in .*too large")
        until(lambda: len(grid.names("running")) == 1 and not grid.names("queue"), what="the task in hand")
        assert "requestId=during" not in agent.log
        set_limit(pid, "--fsize=unlimited:")
        agent.until_ok("during", " .*receiveCount=1")
        grid.put({"main.py": with_tell(source)}, request_id="after", input=str(grid.spool / "mark"))
        agent.until_ok("after")  # its first take was counted in a file
        assert agent.stop() == 0
    assert not os.listdir(grid.path / "running") and not os.listdir(grid.path / "dead")
    assert len(complaints(agent.log)) == agent.log.count(" works again after ") >= 1, agent.log


def test_no_more_processes_is_waited_out(grids):
    """As an ordinary user, whom the limit binds; it is lowered and raised under the agent."""
    grid, usual = grids("ordinary"), resource.getrlimit(resource.RLIMIT_NPROC)[0]

    def limit(processes):
        for pid in family(agent.process.pid):
            set_limit(pid, f"--nproc={processes}:")

    with grid.agent() as agent:
        grid.put({"run.sh": "true"}, "cpp", "before", "before")
        agent.until_ok("before")
        limit(1)
        grid.put({"main.py": ""}, "python", "during", "during")
        agent.wait_for("starting functions failed: .*unavailable.*trying on")
        limit(usual)
        agent.until_ok("during", " .*receiveCount=1")
        assert agent.stop() == 0


# --- duplicates


@trial(visibility=30, agent=dict(execution={"concurrency": 2}))
def message_that_comes_again_while_it_runs_is_not_started_twice(aws, agent):
    """Its lease is ended from outside: SQS may do that at any time (at-least-once)."""
    aws.job(sleep=15)
    until_ran(aws.path)
    aws.sqs.change_message_visibility(QueueUrl=aws.queue_url, VisibilityTimeout=0,
                                      ReceiptHandle=aws.proxy.received[0]["ReceiptHandle"])
    until(lambda: len(aws.proxy.received) == 2, what="the duplicate")
    finish(aws, agent, {"r1": 1})
    assert statuses(agent.log).count("ok") == 1


class Scenario(typing.NamedTuple):
    """Jobs for MARKER, of which something goes wrong on the way; a trial for each."""
    jobs: dict[str, dict]  # request id to what it has of a task; a text is a body as it is
    site: dict = {}
    agent: dict = {}
    fails: tuple = ()  # Rule's fields: from the start, until…
    until: str | int = ""  # … the log says so, or so many messages were received; none: to the end
    runs: dict[str, int] | None = None
    ends: dict[str, int] | None = None
    in_dlq: int = 0
    is_once: bool = False  # each message is received once
    says: str = ""


TEN = [f"r{number}" for number in range(10)]
SCENARIOS = {
    "message that is received and rejected anew before it is known to be given back": Scenario(
        {"wrong": {"runtime": "cobol"}}, {"visibility": 600}, {},
        ("ChangeMessageVisibility*", "late answer", None, 3), in_dlq=1),
    "finished message that comes back, its delete refused until then, is deleted and not run": Scenario(
        {"r1": {}}, {"visibility": 2, "receives": 99}, {},
        ("DeleteMessage*|ChangeMessageVisibility*", "reset"), 2, runs={"r1": 1}),
    "entries that a batch delete refuses are deleted later": Scenario(
        {each: {} for each in TEN}, {}, {}, ("DeleteMessageBatch", "partial", 2),
        runs=dict.fromkeys(TEN, 1), is_once=True),
    "rejected goes back visible at once and its neighbours run": Scenario(
        {"no JSON {": "", "wrong": {"runtime": "cobol"}, "fine": {}}, {"visibility": 600},
        runs={"fine": 1}, ends={"rejected": 6, "ok": 1}, in_dlq=2, says="REPORT requestId=- .*status=rejected"),
    "task over the memory of the machine is rejected": Scenario(
        {"huge": {"memoryMb": 513}, "fits": {"memoryMb": 512}}, {"visibility": 60},
        {"execution": {"memoryMb": 512}}, runs={"fits": 1}, ends={"rejected": 3, "ok": 1}, in_dlq=1, says="memoryMb"),
    "queue whose key is refused is served once that is mended": Scenario(
        {"r1": {}}, {}, {}, ("ReceiveMessage", "said", None, 0, (
            400, "KmsAccessDenied", "KMS.AccessDeniedException", DENIED_BY.format("kms:Decrypt", "KEY", "key policy"))),
        "ReceiveMessage operation.*kms:Decrypt on resource: KEY .*kms:Decrypt on the key", {"r1": 1}, is_once=True),
    "STS away is an outage that costs no receive": Scenario(
        {"r1": {}}, {}, {"execution": {"functionRole": FUNCTION_ROLE}},
        ("AssumeRole", "status 503"), "assuming arn:.*:role/functions failed", ends={"ok": 1}, is_once=True,
        says="assuming arn:.*:role/functions works again"),
    **{f"queue whose visibility timeout is {seconds} s is served": Scenario(
        {"r1": {"sleep": 3}}, {"visibility": seconds}, runs={"r1": 1}, is_once=True) for seconds in (0, 1)},
}


@trial("{}", SCENARIOS)
def scenario_trial(moto: str, what: str):
    scenario = SCENARIOS[what]
    with site(moto, **scenario.site) as aws, aws.agent(**scenario.agent) as agent:
        if scenario.fails:
            aws.proxy.fail(*scenario.fails)
        for request_id, task in scenario.jobs.items():
            aws.send(body=request_id) if task == "" else aws.job(request_id, **task)
        if isinstance(scenario.until, int):
            until(lambda: len(aws.proxy.received) >= scenario.until, what="that many receives")
        elif scenario.until:
            agent.wait_for(scenario.until)
        if scenario.until:
            aws.proxy.heal()
        finish(aws, agent, scenario.runs, scenario.ends, scenario.in_dlq)
        assert not any(rule.times for rule in aws.proxy.rules), "not all that should fail has failed"
        again = len(reports(agent.log, ahead=True)) - len(reports(agent.log))  # on a busy machine
        assert len(aws.proxy.received) == len(scenario.jobs) + again or not scenario.is_once, agent.log
    assert re.search(scenario.says, agent.log) and (scenario.fails or scenario.in_dlq or not mishaps(agent.log)), agent.log


# --- leases, statuses, results


@trial(visibility=300)
def visibility_timeout_is_asked_for_again_and_leases_are_kept_by_what_it_is_now(aws):
    """It is not answered at the start: 30 s are asked for at each receive, whatever the queue's own
    is. Then its 300, then 9, with which two runs of 20 s are kept."""
    def asked() -> list[int]:
        return [each["VisibilityTimeout"] for each in aws.proxy.bodies("ReceiveMessage")]

    patch, two = "ng.ATTRIBUTES_SECONDS = 1", {"concurrency": 2}
    aws.proxy.fail("GetQueueAttributes", "status 500", times=1)
    with aws.agent(patch=patch, execution=two) as agent:
        agent.wait_for("taken to be 30 s until it does")
        until(lambda: 300 in asked(), what="the queue's own")
        aws.sqs.set_queue_attributes(QueueUrl=aws.queue_url, Attributes={"VisibilityTimeout": "9"})
        until(lambda: 9 in asked(), what="the new one")
        for request_id in ("r1", "r2"):
            aws.job(request_id, sleep=20)
        finish(aws, agent, {"r1": 1, "r2": 1})
    assert [each for each, _ in itertools.groupby(asked())] == [30, 300, 9]
    assert len(aws.proxy.received) == 2 and receives(agent.log) == {1} and len(mishaps(agent.log)) == 1
    beats = [beat["Entries"] for beat in aws.proxy.bodies("ChangeMessageVisibilityBatch")]
    assert len(beats) >= 3 and {each["VisibilityTimeout"] for beat in beats for each in beat} == {9}


@trial(visibility=30, agent={})
def delete_that_is_not_permitted_is_said_once_and_tried_with_growing_pauses(aws, agent):
    said = (403, "AccessDeniedException", "AccessDenied", DENIED_BY.format(
        "sqs:deletemessage", "arn:aws:sqs:ap-northeast-2:123456789012:q", "session policy"))
    aws.proxy.fail("DeleteMessageBatch", "said", said=said)
    aws.job()
    aws.proxy.until("DeleteMessageBatch")
    time.sleep(4)
    aws.proxy.heal()
    finish(aws, agent, {"r1": 1})
    tried = [seen.at for seen in aws.proxy.seen("*", "said")]
    assert sum(at <= tried[0] + 4 for at in tried) <= 6, "without a pause"
    line, = complaints(agent.log)
    assert said[3] in line and "grant " in line and line.split(";")[-2].endswith("session policy")
    assert "deleting messages works again" in agent.log


@trial(visibility=3, agent=dict(execution={"concurrency": 1}))
def lost_lease_is_said_and_its_result_is_not_deleted(aws, agent):
    """The beats fail for longer than the lease, and another consumer has the message by then."""
    aws.proxy.fail("ChangeMessageVisibility*", "status 500")
    aws.job(sleep=20)
    until_ran(aws.path)
    held = {"QueueUrl": aws.queue_url, "WaitTimeSeconds": 1, "VisibilityTimeout": 600}
    other = until(lambda: aws.sqs.receive_message(**held).get("Messages"), what="the message")
    aws.proxy.heal()
    agent.wait_for("REPORT requestId=r1")
    agent.stop()
    assert aws.count() == 1 and runs_in(aws.path) == {"r1": 1}
    assert any("lease" in line for line in complaints(agent.log)), agent.log
    aws.sqs.delete_message(QueueUrl=aws.queue_url, ReceiptHandle=other[0]["ReceiptHandle"])


@trial(visibility=20, agent=dict(patch="ng.PERMISSION_SECONDS = 1"))
def without_change_message_visibility_what_fits_runs_and_once_it_is_granted_the_rest(aws, agent):
    """Until then what does not fit is rejected, and that is said once."""
    aws.proxy.fail("ChangeMessageVisibility*", "denied")
    for number in range(3):
        aws.job(f"fits{number}", timeoutMs=12000)
        aws.job(f"long{number}", timeoutMs=60000)
    until_settled(aws, agent, in_dlq=3)
    seen = {(each["requestId"], each["status"], each.get("reason"))
            for each in reports(agent.log)}
    assert seen == {(f"fits{number}", "ok", None) for number in range(3)} | {
        (f"long{number}", "rejected", "visibility") for number in range(3)}
    warnings = [line for line in complaints(agent.log) if " [long" not in line]
    assert len(warnings) == 1 and "sqs:ChangeMessageVisibility" in warnings[0]
    aws.proxy.heal()
    time.sleep(1.5)
    aws.job("late", timeoutMs=60000)
    finish(aws, agent, {"fits0": 1, "fits1": 1, "fits2": 1, "late": 1}, in_dlq=3)
    assert "is granted" in agent.log


@trial(visibility=10, agent=dict(execution={"concurrency": 3}))
def failures_wait_for_the_visibility_timeout_and_are_dead_after_three_receives(aws, agent):
    aws.put({"main.py": "junk = b'x' * (200 << 20)"}, "large.zip")
    sent = time.monotonic()
    aws.job("failed", exit=3)
    aws.job("timeout", sleep=30, timeoutMs=300)
    aws.job("oom", key="large.zip", memoryMb=64)
    until_settled(aws, agent, 3)
    assert time.monotonic() - sent > 2 * 10, "they were given back"
    finish(aws, agent, in_dlq=3)
    assert sorted((each["requestId"], each["receiveCount"]) for each in reports(agent.log)) == \
        [(kind, count) for kind in ("failed", "oom", "timeout") for count in "123"]
    assert all(each["status"] == each["requestId"] for each in reports(agent.log))
    assert len(re.findall("status=failed exitCode=3 ", agent.log)) == 3


@trial(visibility=30, agent={})
def zip_overwritten_under_its_key_is_used_by_messages_sent_after(aws, agent):
    for version in ("one", "two", "three"):
        aws.put({"main.py": f"print('version {version}')"}, "v.zip")
        for number in range(3):
            aws.send(f"{version}-{number}", key="v.zip")
        until_settled(aws, agent)
        for number in range(3):
            agent.wait_for(rf"\[{version}-{number}\] stdout: version {version}")


def test_results_go_to_the_bucket_and_the_queue_before_the_message_is_deleted(aws):
    files = {"main.py": """
import os
os.makedirs(os.environ["OUTPUT_DIR"] + "/sub")
for name in ("a.txt", "sub/b.bin"):
    open(os.path.join(os.environ["OUTPUT_DIR"], name), "w").write("left in " + name)
os.symlink("/etc/passwd", os.environ["OUTPUT_DIR"] + "/link")
print("done")
"""}
    results = aws.results_queue()
    aws.put(files)
    output = {"bucket": aws.bucket, "s3Prefix": "out", "queueUrl": results}
    with aws.agent(output=output) as agent:
        aws.send("r1", input={"a": 1})
        until_settled(aws, agent)
        agent.stop()
    stored = {item["Key"]: aws.s3.get_object(Bucket=aws.bucket, Key=item["Key"])["Body"].read()
              for item in aws.s3.list_objects_v2(Bucket=aws.bucket, Prefix="out/")["Contents"]}
    assert set(stored) == {"out/r1/result.json", "out/r1/a.txt", "out/r1/sub/b.bin"}
    assert stored["out/r1/sub/b.bin"] == b"left in sub/b.bin"
    result = json.loads(stored["out/r1/result.json"])
    assert (result["status"], result["success"], result["stdout"]) == ("ok", True, "done\n")
    sent = aws.sqs.receive_message(QueueUrl=results)["Messages"]
    assert json.loads(sent[0]["Body"])["requestId"] == "r1"
    order = [seen.operation for seen in aws.proxy.requests]
    before = order[:order.index("DeleteMessageBatch")]
    assert before.count("PutObject") == 3 and before.count("SendMessage") == 1


@trial(visibility=60)
def no_more_runs_at_once_than_declared_memory_admits_and_large_ones_do_not_starve(aws):
    """512 MB: two of 200 at once; one of 512 is sent among them and must not wait for them all."""
    for number in range(16):
        aws.job(f"s{number:02d}", sleep=1, memoryMb=200)
        if number == 1:
            aws.job("large", sleep=0.5, memoryMb=512)
    with aws.agent(execution={"concurrency": 4, "memoryMb": 512}) as agent:
        most = 0
        while aws.count():
            most = max(most, sum(map(alive, run_pids(aws.path))))
            time.sleep(0.05)
        agent.stop()
    order = [each["requestId"] for each in reports(agent.log) if each["status"] == "ok"]
    assert len(order) == 17 and most == 2
    assert order.index("large") < 12, order


# --- shutdown


@parametrize("message_comes", [False, True])
def test_sigterm_while_a_long_poll_is_out_ends_the_polling(aws, message_comes):
    """A message that this poll brings is given back: it may not wait for its lease's end."""
    with aws.agent(wait=5) as agent:
        aws.proxy.until("ReceiveMessage")
        time.sleep(0.5)
        begun = time.monotonic()
        agent.send(signal.SIGTERM)
        time.sleep(0.5)
        if message_comes:
            aws.job()
        assert agent.end() == 0
        assert sum(seen.at > begun for seen in aws.proxy.seen("ReceiveMessage")) <= 1, "it went on polling"
        assert visible(aws) == aws.count(), "received and neither run nor given back"


# what ends an agent: (the run's seconds, the grace, the signals; then the statuses and what is visible)
SHUTDOWNS = {
    "SIGTERM within the grace": (3, 30, [signal.SIGTERM], ["ok"], 0),
    "SIGTERM": (300, 1, [signal.SIGTERM], ["released"], 1),
    "SIGINT": (300, 1, [signal.SIGINT], ["released"], 1),
    "a second signal": (300, 300, [signal.SIGTERM, signal.SIGTERM], None, 1),
}


@trial("shutdown, {}", SHUTDOWNS, visibility=600)
def shutdown_trial(aws, what):
    """The run ends or is killed, and what is not done is visible at once."""
    seconds, grace, signals, ends, left = SHUTDOWNS[what]
    settings = {"shutdownGraceSeconds": grace}
    with aws.agent(execution=settings) as agent:
        aws.job(sleep=seconds, timeoutMs=400000)
        until_ran(aws.path)
        agent.send(signals[0])
        for number in signals[1:]:
            time.sleep(2)
            assert agent.process.poll() is None
            agent.send(number)
        status = agent.end(90)
        assert visible(aws) == aws.count() == left, agent.log
        until_gone(run_pids(aws.path))
        if ends:
            assert status == 0 and statuses(agent.log) == ends


@trial(visibility=30)
def sigterm_while_the_queue_has_not_answered_yet_ends_clean(aws):
    aws.proxy.fail("GetQueueAttributes", "black hole")
    with aws.agent() as agent:
        aws.proxy.until("GetQueueAttributes")
        assert agent.stop(seconds=60) == 0
    assert not list((aws.path / "task").glob("*")), agent.log


@trial(visibility=600)
def sigterm_gives_back_a_message_whose_code_is_not_there_yet(aws):
    """S3 never answers, and a compiler does not come to its end: neither is waited for."""
    tools(aws.path, compiler="sleep 300")
    aws.put({"main.cpp": ""}, "cpp.zip")
    with aws.agent(runtimes={"cpp": aws.path / "compiler"}, execution={"concurrency": 2}) as agent:
        aws.send("compiling", key="cpp.zip", runtime="cpp")
        until(lambda: any("sleep\x00300" in command_lines().get(pid, "")
                          for pid in family(agent.process.pid)), what="the compiler")
        aws.proxy.fail("GetObject", "black hole")
        aws.job("fetching")
        aws.proxy.until("GetObject", "black hole")
        agent.send(signal.SIGTERM)
        until(lambda: visible(aws) == 2, 15, f"the messages\n{agent.log}")
        assert agent.end(20) == 0 and not runs_in(aws.path)
    assert sorted((each["requestId"], each["status"]) for each in reports(agent.log)) == \
        [("compiling", "released"), ("fetching", "released")]
    assert not list((aws.path / "task").glob("*"))


READY, RUN = b'{"kind": "ready", "pid": 0, "gaps": []}\n', ng.RunSpec((), "", {}, {}, "", "", 1, 1, 1, 1)


def slot_before(supervisor) -> ng.Slot:
    """A slot whose supervisor's end of the socket is what this gives it."""
    return ng.Slot(types.SimpleNamespace(directory=""), supervisor, ng.Dependency(ng.Log(), "starting"), set())


@parametrize("when", ["before", "between connect and send"])
def test_run_that_is_let_go_of_before_it_begins_is_released(when):
    """A shutdown may come at any moment; what it finds there is the supervisor's end of the socket."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        def supervisor(_):
            slot.cancelled = True
            theirs.sendall(READY)
            ours.shutdown(socket.SHUT_WR)
            return ours

        slot = slot_before(supervisor)
        if when == "before":
            slot.cancel()
        assert slot.run(RUN) == ng.Outcome("released")


def test_run_whose_preparation_does_not_end_has_not_begun():
    """The workspace's disk is slow: nothing ran, so that is an outage."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(READY)
        slot = slot_before(lambda _: ours)
        slot.PREPARE_SECONDS = 0.1
        with pytest.raises(ng.Outage, match="takes too long"):
            slot.run(RUN)


class Imds(BaseHTTPRequestHandler):
    """What lends credentials: instance metadata with a role and what was announced, a container's agent,
    SSO's portal. `server.key` is the access key, which holds for `server.seconds`.

    docs.aws.amazon.com/AWSEC2/latest/UserGuide/instance-metadata-security-credentials.html
    docs.aws.amazon.com/sdkref/latest/guide/feature-container-credentials.html
    docs.aws.amazon.com/singlesignon/latest/PortalAPIReference/API_GetRoleCredentials.html
    """
    announced = False

    def do_PUT(self):
        self.reply(200 if "X-aws-ec2-metadata-token-ttl-seconds" in self.headers else 400, b"TOKEN")

    def do_GET(self):
        key, ends = getattr(self.server, "key", "testing"), time.time() + getattr(self.server, "seconds", 6 * 3600)
        role = {"AccessKeyId": key, "SecretAccessKey": "secret", "Token": "token",
                "Expiration": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ends))}
        metadata = {"iam/security-credentials/": "worker",
                    "iam/security-credentials/worker": json.dumps({"Code": "Success", **role})}
        if Imds.announced:
            metadata["spot/instance-action"] = '{"action": "terminate", "time": "2026-11-22T12:02:00Z"}'
        answers = {
            **{"/latest/meta-data/" + path: ("X-aws-ec2-metadata-token", said) for path, said in metadata.items()},
            "/container": ("Authorization", json.dumps(role)),
            "/federation/credentials": ("x-amz-sso_bearer_token", json.dumps({"roleCredentials": {
                "accessKeyId": key, "secretAccessKey": "secret", "sessionToken": "token",
                "expiration": int(ends * 1000)}}))}
        header, content = answers.get(self.path.partition("?")[0], ("", ""))
        self.reply(200 if self.headers[header] == "TOKEN" else 404, content.encode())

    def reply(self, status, content):
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def lender(key: str = "ASIALENT", seconds: int = 6 * 3600, host: str = "127.0.0.1"):
    """A server that lends credentials of this key, which hold for so long."""
    with QuietServer((host, 0), Imds) as server:
        server.key, server.seconds = key, seconds
        server.url = f"http://{host}:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


def test_spot_interruption_starts_the_same_shutdown(aws):
    with lender(host="127.0.0.2") as imds:
        Imds.announced = False
        env = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": imds.url,
               "http_proxy": "http://127.0.0.1:1", "no_proxy": "127.0.0.1",  # it would refuse
               "AGENT_AWS_SPOTINTERRUPTION": "true", "AGENT_EXECUTION_SHUTDOWNGRACESECONDS": "1"}
        with aws.agent(env=env) as agent:
            aws.job(sleep=300, timeoutMs=400000)
            until_ran(aws.path)
            assert agent.process.poll() is None
            Imds.announced = True
            assert agent.end(90) == 0
        assert statuses(agent.log) == ["released"] and visible(aws) == 1
        assert "notice failed" not in agent.log


@trial(quick=(), visibility=30)
def metadata_that_do_not_answer_are_said_once(aws):
    env = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:1", "AGENT_AWS_SPOTINTERRUPTION": "true"}
    with aws.agent(env=env) as agent:
        agent.wait_for("asking EC2 for a spot interruption notice failed: .*refused")
        time.sleep(6)
        assert agent.stop() == 0 and agent.log.count("spot interruption") == 1, agent.log


@parametrize("kind", ["path", "abstract"])
def test_systemd_is_told_of_start_status_stop_and_life(aws, kind):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        name = f"{aws.path}/notify" if kind == "path" else f"@{aws.name}"
        notify.bind(name.replace("@", "\0"))
        told = []

        def listen():
            while text := notify.recv(4096).decode():
                told.extend(text.splitlines())

        def hear(word):
            return [line for line in told if line.startswith(word)]

        threading.Thread(target=listen, daemon=True).start()
        aws.put({"main.py": "import os; print(sorted(os.environ))"})
        with aws.agent(env={"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "1000000"}) as agent:
            until(lambda: hear("READY=1"), what="READY")
            aws.send()
            until(lambda: re.search(r"\b1\b", str(hear("STATUS="))), what="a STATUS with a 1")
            until(lambda: len(hear("WATCHDOG=1")) >= 4, what="WATCHDOG")
            assert not hear("STOPPING=1")
            agent.send(signal.SIGTERM)
            assert agent.end() == 0
            until(lambda: hear("STOPPING=1"), what="STOPPING")
        notify.shutdown(socket.SHUT_RD)
        assert told.count("READY=1") == told.count("STOPPING=1") == 1
        assert re.search(r"running.*done.*failed", hear("STATUS=")[-1], re.IGNORECASE)
        assert not re.search("NOTIFY_SOCKET|WATCHDOG", agent.log)


def test_systemd_that_does_not_listen_stops_nothing(aws):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(f"{aws.path}/notify")
        env = {"NOTIFY_SOCKET": f"{aws.path}/notify", "WATCHDOG_USEC": "20000"}
        with aws.agent(env=env) as agent:
            aws.job()
            finish(aws, agent)


# --- commands

GUIDE_MESSAGE = """{
  "requestId": "test-001",
  "functionId": "hello-python",
  "runtime": "python",
  "s3Bucket": "nanogrid-code-bucket",
  "s3Key": "functions/hello-python/v1.zip",
  "timeoutMs": 5000,
  "memoryMb": 256
}
"""
GUIDE_ZIP = {"main.py": '''#!/usr/bin/env python3
print("Hello from NanoGrid!")
print("Result: 42")
'''}
GUIDE_POLICY = ["sqs:ReceiveMessage", "sqs:DeleteMessage", "sqs:GetQueueAttributes", "s3:GetObject",
                "s3:ListBucket", "cloudwatch:PutMetricData"]
MOTO_ONLY = ["sqs:DeleteMessageBatch", "monitoring:PutMetricData"]  # AWS does not know these
CHANGE = ["sqs:ChangeMessageVisibility", "sqs:ChangeMessageVisibilityBatch"]  # moto wants both


@parametrize("more", [[], CHANGE], ids=["least", "more"])
def test_guide_walkthrough_with_the_least_privilege_policy(more):
    """moto enforces IAM and checks signatures; a warning only where a lease cannot be extended."""
    def enforce(count):
        urllib.request.urlopen(urllib.request.Request(
            aws.url + "/moto-api/reset-auth", str(count).encode(), {"Content-Type": "text/plain"}))

    with moto_server() as url, scratch() as path:
        aws = Aws(url, path, 300, name="nanogrid-task-queue", bucket="nanogrid-code-bucket")
        aws.put(GUIDE_ZIP, "functions/hello-python/v1.zip")
        aws.send(body=GUIDE_MESSAGE.replace("5000", "60000"))
        (path / "application.yml").write_text(GUIDE)
        aws.env.update(AGENT_TASKBASEDIR=str(path / "task"), AGENT_METRICS_FLUSHSECONDS="1")
        iam = client_of(url, "iam")
        iam.create_user(UserName="agent")
        iam.put_user_policy(UserName="agent", PolicyName="least", PolicyDocument=json.dumps(
            {"Version": "2012-10-17", "Statement": [
                {"Effect": "Allow", "Action": GUIDE_POLICY + MOTO_ONLY + more, "Resource": "*"}]}))
        key = iam.create_access_key(UserName="agent")["AccessKey"]
        aws.env.update(AWS_ACCESS_KEY_ID=key["AccessKeyId"],
                       AWS_SECRET_ACCESS_KEY=key["SecretAccessKey"])
        enforce(0)
        with Agent(env=aws.env, cwd=aws.path) as agent:
            agent.wait_for("Successfully published 1 value")
            enforce("inf")
            until(lambda: not aws.count(), what="the delete")
        report, = reports(agent.log)
        wanted = {"requestId": "test-001", "functionId": "hello-python", "runtime": "python",
                  "status": "ok", "exitCode": "0", "memoryMb": "256", "timeoutMs": "60000",
                  "receiveCount": "1"}
        assert wanted.items() <= report.items() and not dead(aws)
        for line in ("Hello from NanoGrid!", "Result: 42"):
            assert f"INFO [test-001] stdout: {line}\n" in agent.log
        metric, = aws.cloudwatch.list_metrics(Namespace="NanoGrid/FunctionRunner")["Metrics"]
        assert metric["MetricName"] == "PeakMemoryBytes" and len(metric["Dimensions"]) == 2
        point, = metric_points(aws, "hello-python")
        assert (point["SampleCount"], point["Maximum"]) == (1, int(report["peakMemoryBytes"]))
        assert 0 < point["Maximum"] < 256 << 20
        said = complaints(agent.log)
        assert len(said) <= (not more) and all(CHANGE[0] in line for line in said), said


def test_drain_ends_with_a_table_when_the_queue_is_empty(aws):
    for number in range(5):
        aws.job(f"a{number}", function_id="steady")
    aws.job("b0", function_id="broken", exit=7)
    table = ended(aws.agent("--drain")).out
    assert re.search(r"^steady\s.*\b5\b", table, re.MULTILINE), table
    assert re.search(r"^broken\s.*\b1\b", table, re.MULTILINE), table
    assert len(runs_in(aws.path)) == 6 and dead(aws) + aws.count() == 1
    assert ended(aws.agent("--drain")).out == "no task was run: nothing waited in the queue\n"


NOTHING = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "HOME": "/nonexistent",
           "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent", "AWS_CONFIG_FILE": "/nonexistent"}


# what there is none of: (what application.yml has in place of what, the environment, exit status, what is said)
NOT_THERE = {
    "boto3": ("", "", {}, 1, "boto3"),
    "credentials": ("", "", NOTHING, 1, "credentials"),
    "region": ("region: ap-northeast-2", "region:", {"AWS_DEFAULT_REGION": "", "AWS_REGION": ""}, 2, "region"),
    "queue": ("/q-", "/nowhere-", {}, 1, "nowhere"),
}


@parametrize("what", NOT_THERE)
def test_what_cannot_start_says_so_in_one_line(aws, what):
    old, new, env, status, words = NOT_THERE[what]
    config = aws.config()
    config.write_text(config.read_text().replace(old, new))
    options = {"prefix": ["/usr/bin/python3", "-I"], "python": "-S"} if what == "boto3" else {}
    agent = ended(Agent("--config", config, env={**aws.env, **env}, **options), status)
    lines = agent.log.strip().splitlines()
    assert len(lines) <= 3 and words in agent.log, agent.log
    assert len(complaints(agent.log)) <= 1


def test_check_of_a_usable_site_changes_nothing(aws):
    aws.job()
    check = ended(aws.agent("--check"))
    for word in ("setting", "credential", "queue", "visibility", "DLQ|dead-letter", "bucket",
                 "CloudWatch", "python", "sandbox"):
        assert re.search(word, check.out, re.IGNORECASE), f"{word} in\n{check.out}"
    assert not aws.proxy.count("Receive*|Delete*|Change*|Send*|PutObject|DeleteObject")
    assert not any(b"PeakMemoryBytes" in seen.body for seen in aws.proxy.requests)
    assert visible(aws) == 1


NO_RUNTIMES = {"PATH": "/nonexistent"}  # to start each, and to compile, takes seconds
BUCKET = "arn:aws:s3:::code"
# what AWS answers: (operations, as_aws()'s arguments, the line of --check, and its other words)
CHECKED = {
    "no sqs:GetQueueAttributes": ("GetQueueAttributes", (403, "AccessDeniedException", "AccessDenied", DENIED_BY.format(
        "sqs:getqueueattributes", "arn:aws:sqs:ap-northeast-2:123456789012:q", "identity-based policy")),
        "FAIL  queue", "grant .*sqs:GetQueueAttributes"),
    "expired credentials": ("*", (403, "ExpiredTokenException", "ExpiredToken", "The token is expired"),
                            "FAIL  queue", "The token is expired"),
    "no s3:ListBucket": ("GetObject", (403, "AccessDenied", "", DENIED_BY.format(
        "s3:ListBucket", f'"{BUCKET}"', "identity-based policy")), "FAIL  bucket", r"grant s3:GetObject .* \(or s3:ListBucket "),
    "no s3:GetObject": ("GetObject", (403, "AccessDenied", "", DENIED_BY.format(
        "s3:GetObject", f'"{BUCKET}/k"', "identity-based policy")),
        "FAIL  bucket", "grant s3:GetObject on .* in the identity-based policy"),
    "an S3 that does not say which": ("GetObject", (403, "AccessDenied", "", "Access Denied"),
                                      "FAIL  bucket", "s3:GetObject .* s3:ListBucket .*looks like this, too"),
    "no such key": ("GetObject", (404, "NoSuchKey", "", "The specified key does not exist."),
                    "ok    bucket", "s3:GetObject and s3:ListBucket are granted"),
    "no such bucket": ("GetObject", (404, "NoSuchBucket", "", "The specified bucket does not exist"),
                       "FAIL  bucket", "The specified bucket does not exist"),
    "CloudWatch that wants a value": ("PutMetricData", (
        400, "MissingRequiredParameterException", "MissingParameter", "The parameter MetricData is required."),
        "ok    CloudWatch", "is not refused"),
    "CloudWatch denied": ("PutMetricData", (403, "AccessDeniedException", "AccessDenied", FORBIDDEN_BY.format(
        "cloudwatch:PutMetricData", "*", "service control policy")),
        "FAIL  CloudWatch", "grant cloudwatch:PutMetricData in the service control policy"),
    "CloudWatch away": ("PutMetricData", (503, "ServiceUnavailable", "ServiceUnavailable", "Try later."),
                        "FAIL  CloudWatch", "Try later.*check the network, agent.aws.region and agent.aws.endpointUrl"),
    "results may go": ("None", (0, "", "", ""), "ok    output bucket", "s3:PutObject is not refused\nok    output queue: "),
    "results may not go": ("PutObject|SendMessageBatch", (403, "AccessDenied", "", "Access Denied"), "FAIL  output bucket",
                           r"grant s3:PutObject on arn(.*\n)*FAIL  output queue: .*Access Denied; grant sqs:SendMessage"),
    "no such output bucket": ("PutObject", (404, "NoSuchBucket", "", "The specified bucket does not exist"),
                              "FAIL  output bucket", "check the bucket's name: .* agent.output.bucket"),
}


@parametrize("answer", CHECKED)
def test_check_tells_what_aws_answers(aws, answer):
    operation, said, line, words = CHECKED[answer]
    aws.proxy.fail(operation, "said", said=said)
    check = ended(aws.agent("--check", env=NO_RUNTIMES, execution={"metadata": "allow"},
                            output={"bucket": aws.bucket, "queueUrl": aws.queue_url}), line.startswith("FAIL"))
    assert re.search(f"^{line}: .*{words}", check.out, re.MULTILINE), check.out
    assert len(check.out.splitlines()) >= 9, check.out
    assert aws.count() == 0 and len(aws.s3.list_objects_v2(Bucket=aws.bucket)["Contents"]) == 1
    assert line.startswith("ok") or said[3] in check.out


@parametrize("runtime, program", [
    ("python", "/bin/ls"), ("cpp", "/bin/true"), ("nodejs", "/bin/cat"), ("go", "/bin/true")])
def test_check_starts_each_runtime_for_real(runtime, program, folder):
    name = f"AGENT_RUNTIMES_{runtime.upper()}"
    agent = ended(folder.agent("--check", env={name: program, "AGENT_EXECUTION_METADATA": "allow"}), 1)
    lines = [line for line in agent.out.splitlines() if "runtime " in line]
    [failed] = [line for line in lines if line.startswith("FAIL")]
    assert re.match(rf"FAIL  runtime {runtime}: {program} (--)?version ended ok, .*: this is no {runtime}; correct", failed)
    assert all(re.match(r"(ok    runtime \w+: /\S+, .*\d+\.\d+|none  )", line) for line in lines if line != failed)


def test_check_names_what_is_not_there(aws):
    aws.sqs.set_queue_attributes(QueueUrl=aws.queue_url, Attributes={"RedrivePolicy": ""})
    check = ended(aws.agent("--check", runtimes={"python": "/nonexistent/python3"}), 1)
    assert "/nonexistent/python3" in check.out and re.search("DLQ|dead-letter", check.out)
    check = ended(aws.agent("--check", env={**NO_RUNTIMES, "AWS_ENDPOINT_URL": "http://127.0.0.1:1"}), 1)
    for name in ("queue", "bucket", "CloudWatch"):
        assert re.search(f"^FAIL  {name}: .*127.0.0.1:1.*agent.aws.endpointUrl", check.out, re.MULTILINE), check.out


@parametrize("flag", ["--check", "--drain"])
def test_reader_of_standard_output_that_went_away_ends_nothing(flag, folder):
    folder.job("r1")
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as out:
        ended = subprocess.run(
            [sys.executable, MODULE, "--local", folder.path, flag], stdout=out, check=False,
            stderr=subprocess.PIPE, env={**os.environ, **folder.env}, text=True, timeout=180)
    assert ended.returncode == 0 and "Error" not in ended.stderr, ended.stderr


# what is wrong: (what makes it so in a grid's folder, what is then named)
NO_FOLDERS = {"missing": ("rm -r .", "No such file"),
              "a file": ("rm -r . && touch {}", "[Nn]ot a directory"),
              "read-only": ("chmod 500 . queue code", "[Pp]ermission denied"),
              "a subfolder a file": ("touch running", "running")}


@parametrize("trouble", NO_FOLDERS)
@parametrize("flag", ["--check", "--drain"])
def test_folder_that_is_not_usable_is_named_in_one_line(grids, trouble, flag):
    """As an ordinary user, whom permissions bind; a folder that is not there is wrong usage."""
    grid = grids("ordinary")
    change, words = NO_FOLDERS[trouble]
    subprocess.run(["sh", "-c", change.format(grid.path).replace(" .", f" {grid.path}")],
                   cwd=grid.path, check=True)
    before = sorted(grid.path.rglob("*"))
    with grid.agent(flag, cwd="/") as agent:
        status = agent.end()
    said = agent.out + agent.log
    is_usage = (trouble, flag) in (("missing", "--drain"), ("a file", "--drain"))
    words = "there is no such folder; make it" if is_usage else words
    assert status == 1 + is_usage and re.search(words, said), said
    assert sum("FAIL" in line or " ERROR " in line for line in said.splitlines()) == 1, said
    assert sorted(grid.path.rglob("*")) == before


def test_check_of_a_usable_folder_changes_nothing(folder):
    before = sorted(folder.path.rglob("*"))
    assert f"ok    folder: {folder.path}" in ended(folder.agent("--check")).out
    assert sorted(folder.path.rglob("*")) == before


# --- credentials, endpoints


AWS_FILES = {  # below HOME; the SSO cache's name is the SHA-1 of the session's, as `aws sso login` has it
    ".aws/credentials": "[base]\naws_access_key_id = AKIABASE\naws_secret_access_key = secret\n",
    ".aws/config": """[profile worker]
role_arn = arn:aws:iam::123456789012:role/worker
source_profile = base
[profile login]
sso_session = office
sso_account_id = 123456789012
sso_role_name = worker
[sso-session office]
sso_region = ap-northeast-2
sso_start_url = https://office.awsapps.com/start
[profile process]
credential_process = printf '{"Version": 1, "AccessKeyId": "AKIAPROCESS", "SecretAccessKey": "secret"}'
""",
    f".aws/sso/cache/{hashlib.sha1(b'office').hexdigest()}.json": json.dumps({
        "accessToken": "TOKEN", "expiresAt": "2099-01-01T00:00:00Z",
        "region": "ap-northeast-2", "startUrl": "https://office.awsapps.com/start"}),
    "token": "a.web.token"}
ROLE = "arn:aws:sts::123456789012:assumed-role/worker/"
# kind: (what --check says of it, how the access key that signs begins, the environment)
CREDENTIALS = {
    "static keys": ("env: arn:aws:", "AKIASTATIC", {
        "AWS_ACCESS_KEY_ID": "AKIASTATIC", "AWS_SECRET_ACCESS_KEY": "secret"}),
    "profile": ("shared-credentials-file: arn:aws:", "AKIABASE", {"AWS_PROFILE": "base"}),
    "role of a profile": (f"assume-role: {ROLE}", "ASIA", {"AWS_PROFILE": "worker"}),
    "web identity": (f"assume-role-with-web-identity: {ROLE}", "ASIA", {
        "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/worker",
        "AWS_WEB_IDENTITY_TOKEN_FILE": "{home}/token"}),
    "SSO": ("sso: arn:aws:", "ASIALENT", {
        "AWS_PROFILE": "login", "AWS_ENDPOINT_URL_SSO": "{lender}"}),
    "container": ("container-role: arn:aws:", "ASIALENT", {
        "AWS_CONTAINER_CREDENTIALS_FULL_URI": "{lender}/container",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN": "TOKEN"}),
    "instance": ("iam-role: arn:aws:", "ASIALENT", {
        "AWS_EC2_METADATA_DISABLED": "false", "AWS_EC2_METADATA_SERVICE_ENDPOINT": "{lender}"}),
    "process": ("custom-process: arn:aws:", "AKIAPROCESS", {"AWS_PROFILE": "process"}),
}


def with_credentials(aws: Aws, kind: str, url: str) -> None:
    """Give the agents of a site credentials of one kind, and none of another."""
    for name, text in AWS_FILES.items():
        (aws.path / "home" / name).parent.mkdir(parents=True, exist_ok=True)
        (aws.path / "home" / name).write_text(text)
    home = f"{aws.path}/home"
    aws.env.update(NOTHING, HOME=home, AWS_SHARED_CREDENTIALS_FILE=f"{home}/.aws/credentials",
                   AWS_CONFIG_FILE=f"{home}/.aws/config", AGENT_EXECUTION_METADATA="allow", **SLOW_IMDS)
    aws.env.update({name: value.format(home=home, lender=url)
                    for name, value in CREDENTIALS[kind][2].items()})


def signers(aws: Aws, key: str) -> set[str]:
    """The access keys that signed requests (each cut to the length of `key`), but for roles."""
    return {seen.key[:len(key)] for seen in aws.proxy.requests if "AssumeRole" not in seen.operation}


@parametrize("kind", slow_but(CREDENTIALS, "static keys", "role of a profile", "instance"))
def test_credentials_of_each_kind_are_named_and_do_a_job(aws, kind):
    said, key, _ = CREDENTIALS[kind]
    with lender() as lent:
        with_credentials(aws, kind, lent.url)
        aws.job()
        check = ended(aws.agent("--check"))
        assert f"\nok    credentials: {said}" in check.out, check.out
        agent = ended(aws.agent("--drain"))
        assert runs_in(aws.path) == {"r1": 1} and not aws.count() and not mishaps(agent.log)
        assert signers(aws, key) == {key} and "Successfully published 1 " in agent.log


# kind: how long its credentials hold, and what makes botocore ask for new ones before each request.
# It asks a container's agent in the last 15 minutes of what it has; what EC2 lends for less than 25
# it uses for longer, hence a longer look ahead here.
RENEWED = {"container": (12 * 60, ""), "instance": (29 * 60, (
    "from botocore.credentials import RefreshableCredentials\n"
    "RefreshableCredentials._advisory_refresh_timeout = 3600"))}


@parametrize("kind", RENEWED)
def test_credentials_that_expire_are_renewed_while_the_agent_runs(aws, kind):
    seconds, patch = RENEWED[kind]
    with lender("ASIAFIRST", seconds) as lent:
        with_credentials(aws, kind, lent.url)
        with aws.agent(patch=patch) as agent:
            aws.job()
            until_settled(aws, agent)
            assert signers(aws, lent.key) == {"ASIAFIRST"}
            lent.key, lent.seconds = "ASIANEXT", 6 * 3600
            aws.proxy.expired.add("ASIAFIRST")
            aws.job("r2")
            finish(aws, agent, {"r1": 1, "r2": 1})
        assert [each["receiveCount"] for each in reports(agent.log)] == ["1", "1"]
        last = [seen.key for seen in aws.proxy.seen("DeleteMessageBatch")]
        assert (last[0], last[-1]) == ("ASIAFIRST", "ASIANEXT")


# what is wrong: (the kind of credentials; the environment; what is then said, by the agent and by --check)
UNFIT = {
    "no profile": ("profile", {"AWS_PROFILE": "nobody"}, r"profile \(nobody\) could not be found"),
    "no token": ("web identity", {"AWS_WEB_IDENTITY_TOKEN_FILE": "/nonexistent/token"}, "/nonexistent/token"),
    "no SSO": ("SSO", {"AWS_ENDPOINT_URL_SSO": "{lender}/nothing"}, "(GetRoleCredentials|SSO session .* expired)"),
    "no loan": ("container", {"AWS_CONTAINER_AUTHORIZATION_TOKEN": "WRONG"}, "container metadata"),
    "no role": ("instance", {"AWS_EC2_METADATA_DISABLED": "true"},
                r"no AWS credentials \(none found\); attach the role"),
    "no process": ("process", {"PATH": ""}, "boto3 cannot work as it is set up here: .*'printf'"),
    "old boto3": ("static keys", {"PYTHONPATH": "{top}/old"}, r"boto3 is 1\.26\.27, and must be 1\.34\.101 at least"),
    "key": ("static keys", {"AWS_ACCESS_KEY_ID": "AKIA\nSAID"}, r"access_key \(env\) has a line break"),
    "secret": ("static keys", {"AWS_SECRET_ACCESS_KEY": "NEVERSAID\r"}, r"secret_key \(env\) has a line break"),
    "token": ("static keys", {"AWS_SESSION_TOKEN": "NEVER SAID"}, r"token \(env\) has a line break or a blank"),
    "bundle": ("static keys", {"AWS_CA_BUNDLE": "/nonexistent/ca.pem"}, "the CA bundle /nonexistent/ca.pem is no file"),
    "requests' bundle": ("static keys", {"AWS_CA_BUNDLE": "", "REQUESTS_CA_BUNDLE": "/nonexistent/ca.pem"},
                         "bundle /nonexistent/ca.pem is"),
}


@parametrize("name", slow_but(UNFIT, *(name for name, row in UNFIT.items() if row[0] in (
    "static keys", "SSO", "instance"))))
def test_what_boto3_cannot_work_with_ends_the_start(aws, name):
    kind, environment, words = UNFIT[name]
    with lender() as lent:
        with_credentials(aws, kind, lent.url)
        (aws.path / "old/boto3").mkdir(parents=True)
        (aws.path / "old/boto3/__init__.py").write_text("__version__ = '1.26.27'")
        aws.env.update({key: value.format(top=aws.path, lender=lent.url) for key, value in environment.items()})
        with aws.agent("--check") as check, aws.agent() as agent:
            agent.wait_for(f"(WARNING|ERROR) .*{words}")
            assert check.end() == 1
            assert agent.stop() == 0 if kind == "web identity" else agent.end() == 1  # a token's file is waited for
        assert not aws.proxy.requests and len(complaints(agent.log)) <= 2, agent.log
    assert re.search(f"^FAIL  credentials: .*{words}", check.out, re.MULTILINE), check.out
    assert not re.search("SAID|NEVER", agent.log + check.out + check.log)


NOT_LENT = ("User: arn:aws:iam::123456789012:user/base is not authorized to perform: sts:AssumeRole on "
            "resource: arn:aws:iam::123456789012:role/worker")


@parametrize("said,words", [
    ((403, "AccessDenied", "", NOT_LENT), "trust policy"),
    ((400, "ExpiredTokenException", "", "Token expired"), "until it does"),
], ids=["denied", "expired"])
def test_what_refuses_the_role_itself_is_told_from_a_missing_permission(aws, said, words):
    with_credentials(aws, "role of a profile", "")
    aws.proxy.fail("AssumeRole", "said", said=said)
    with aws.agent() as agent:
        agent.wait_for(words)
        assert said[3] in agent.log and "grant sqs" not in agent.log
    check = ended(aws.agent("--check"), 1)
    assert f"FAIL  credentials: An error occurred ({said[1]})" in check.out and said[3] in check.out


# agent.aws.endpointUrl, the environment, and where SQS, S3 and CloudWatch are then asked; boto3's order:
# boto3.amazonaws.com/v1/documentation/api/latest/guide/configuration.html, "Configuring a service endpoint"
HERE, THERE = "http://127.0.0.1:1", "http://127.0.0.1:2"
OWN = ("https://sqs.ap-northeast-2.amazonaws.com", "https://s3.ap-northeast-2.amazonaws.com",
       "https://monitoring.ap-northeast-2.amazonaws.com")
ENDPOINTS = [
    (None, {}, OWN),
    (HERE, {}, (HERE, HERE, HERE)),
    (None, {"AWS_ENDPOINT_URL": HERE}, (HERE, HERE, HERE)),
    (HERE, {"AWS_ENDPOINT_URL": THERE}, (HERE, HERE, HERE)),
    (None, {"AWS_ENDPOINT_URL_SQS": HERE}, (HERE, *OWN[1:])),
    (HERE, {"AWS_ENDPOINT_URL_SQS": THERE}, (THERE, HERE, HERE)),
    (HERE, {"AWS_ENDPOINT_URL_S3": THERE}, (HERE, THERE, HERE)),
    (HERE, {"AWS_ENDPOINT_URL_CLOUDWATCH": THERE}, (HERE, HERE, THERE)),
    (None, {"AWS_ENDPOINT_URL": HERE, "AWS_ENDPOINT_URL_S3": THERE}, (HERE, THERE, HERE)),
    (None, {"AGENT_AWS_ENDPOINTURL": HERE, "AWS_ENDPOINT_URL_SQS": THERE}, (THERE, HERE, HERE)),
]


@parametrize("setting,environ,endpoints", ENDPOINTS)
def test_the_endpoint_of_one_service_wins_as_boto3_has_it(tmp_path, monkeypatch, setting, environ, endpoints):
    for name in ("AWS_ENDPOINT_URL", *(f"AWS_ENDPOINT_URL_{each}" for each in ("SQS", "S3", "CLOUDWATCH"))):
        monkeypatch.setenv(name, "")  # so that what make_clients() sets is unset again
        monkeypatch.delenv(name)
    for name, value in {**AWS_ENV, **environ}.items():
        monkeypatch.setenv(name, value)
    path = tmp_path / "application.yml"
    path.write_text(f"""agent:
  aws:
    region: ap-northeast-2
    endpointUrl: {setting or ''}
  sqs:
    queueUrl: https://sqs.ap-northeast-2.amazonaws.com/123456789012/q
  s3:
    codeBucket: bucket
""")
    clients = ng.make_clients(ng.load_settings(path, os.environ, False)[0])
    made = [clients.polls, clients.sqs, clients.results], [clients.s3], [clients.cloudwatch]
    assert [{one.meta.endpoint_url for one in each} for each in made] == [{one} for one in endpoints]


def test_each_service_is_asked_at_its_own_endpoint(aws, moto):
    """As with interface endpoints of a VPC; there is nothing at agent.aws.endpointUrl."""
    with FaultProxy(moto) as s3, FaultProxy(moto) as cloudwatch:
        aws.job()
        nothing = f"http://127.0.0.1:{free_port()}"
        env = {"AWS_ENDPOINT_URL": nothing, "AGENT_AWS_ENDPOINTURL": nothing, "AWS_ENDPOINT_URL_S3": s3.url,
               "AWS_ENDPOINT_URL_SQS": aws.proxy.url, "AWS_ENDPOINT_URL_CLOUDWATCH": cloudwatch.url}
        agent = ended(aws.agent("--drain", env=env))
        assert not aws.count() and not mishaps(agent.log)
        assert [{seen.operation for seen in proxy.requests} for proxy in (s3, cloudwatch)] == \
            [{"GetObject"}, {"PutMetricData"}]


# --- functionRole

def lent(agent: Agent, request_id: str) -> dict[str, str]:
    """What a run of LENT saw of AWS."""
    return json.loads(re.search(rf"\[{request_id}\] stdout: (.*)", agent.log)[1])


LENT = {"main.py": "import json, os\nprint(json.dumps({k: v for k, v in os.environ.items() if 'AWS' in k}))\n",
        "app.py": "def handler(event, context): import main\n"}


def test_functions_get_the_roles_credentials_and_fresh_ones_when_those_end_too_early(aws):
    too_long = (400, "ValidationError", "", "The requested DurationSeconds exceeds the MaxSessionDuration set for this role.")
    aws.put(LENT)
    with aws.agent(execution={"functionRole": FUNCTION_ROLE, "concurrency": 1}) as agent:
        for request_id, task in (("warm", {}), ("warm2", {"handler": "app.handler"}),
                                 ("long", {"timeoutMs": 7_200_000}), ("short", {})):
            aws.send(request_id, **task)
            agent.wait_for(f"requestId={request_id} ")
        aws.proxy.fail("AssumeRole", "too long", times=1, said=too_long)
        aws.send("chained", timeoutMs=40_000_000)
        agent.wait_for("requestId=chained ")
        assert agent.stop() == 0
    asked = [urllib.parse.parse_qs(seen.body.decode()) for seen in aws.proxy.seen("AssumeRole")]
    assert [int(each["DurationSeconds"][0]) for each in asked] == [3600, 7500, 40_300, 3600], agent.log
    first = lent(agent, "warm")
    assert first.keys() == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
                            "AWS_REGION", "AWS_DEFAULT_REGION"}
    assert first["AWS_REGION"] == first["AWS_DEFAULT_REGION"] == "ap-northeast-2"
    assert first["AWS_ACCESS_KEY_ID"].startswith("ASIA") and "testing" not in first.values()
    assert first.items() <= lent(agent, "warm2").items()
    assert lent(agent, "long")["AWS_ACCESS_KEY_ID"] == lent(agent, "short")["AWS_ACCESS_KEY_ID"]
    assert len({lent(agent, each)["AWS_ACCESS_KEY_ID"] for each in ("warm", "long", "chained")}) == 3


def test_without_a_role_functions_get_no_credentials(aws):
    aws.put(LENT)
    aws.send("r1", env={"AWS_REGION": "eu-west-1"})
    assert lent(ended(aws.agent("--drain")), "r1") == {"AWS_REGION": "eu-west-1"}


def test_a_role_that_is_refused_is_an_error_in_awss_words(aws):
    refusal = (403, "AccessDenied", "", f"User: {WORKER} is not authorized to perform: sts:AssumeRole on "
                                        f"resource: {FUNCTION_ROLE}")
    role = {"functionRole": FUNCTION_ROLE}
    aws.put(LENT)
    aws.proxy.fail("AssumeRole", "no role", said=refusal)
    check = ended(aws.agent("--check", execution=role), 1)
    assert re.search(f"(?m)^FAIL  function role: .*not authorized to perform: sts:AssumeRole.*"
                     f"grant the agent sts:AssumeRole on {FUNCTION_ROLE}", check.out), check.out
    aws.send()
    with aws.agent(execution=role) as agent:
        agent.wait_for("REPORT .*status=error .*reason=permission")
        agent.stop()
    assert "not authorized to perform: sts:AssumeRole" in agent.log and aws.count() == 1
    aws.proxy.heal()
    assert f"\nok    function role: {FUNCTION_ROLE}" in ended(aws.agent("--check", execution=role)).out


# --- AWS's errors, by call

# Codes, statuses and words are from botocore's models of SQS, S3 and CloudWatch, with the statuses and
# query-compatible twins of github.com/aws/aws-sdk-js-v3 clients/client-sqs/src/schemas/schemas_0.ts;
# docs.aws.amazon.com: SQS's sqs-json-api-responses.html and CommonErrors.html, S3's ErrorCodeBilling.html,
# awsconsolehelpdocs/latest/gsg/common-errors.html, kms/latest/developerguide/throttling.html;
# and from users: opensearch-project/data-prepper/issues/2422 and boto/boto3/issues/2952 (KMS),
# aws/aws-sdk-php/issues/642 and aws/aws-sdk-js/issues/254, 1652, 1822 (clocks and rates).
LATE = REFUSALS["clock"][3]
EARLY = "Signature not yet current: 20261125T092200Z is still later than 20261125T012115Z (20261125T011615Z + 5 min.)"
UNSIGNED = "The request signature we calculated does not match the signature you provided."
CIPHERTEXT = ("The ciphertext refers to a customer master key that does not exist, does not exist in this "
              "region, or you are not allowed to access.")
KMS_RATE = "You have exceeded the rate at which you may call KMS. Reduce the frequency of your calls."
GONE = ("Value AQEB for parameter ReceiptHandle is invalid. Reason: Message does not exist or is not "
        "available for visibility timeout change.")
SQS_CALLS = "GetQueueAttributes ReceiveMessage DeleteMessageBatch ChangeMessageVisibilityBatch SendMessage"
BATCHES = "DeleteMessageBatch ChangeMessageVisibilityBatch"
GRANTED = {  # what the advice of each call names
    "GetQueueAttributes": "sqs:GetQueueAttributes", "ReceiveMessage": "sqs:ReceiveMessage",
    "DeleteMessageBatch": "sqs:DeleteMessage", "ChangeMessageVisibilityBatch": "sqs:ChangeMessageVisibility",
    "SendMessage": "sqs:SendMessage", "GetObject": "s3:GetObject", "PutObject": "s3:PutObject",
    "PutMetricData": "cloudwatch:PutMetricData"}
WAITS, SAYS = "", "AWS will answer so again; change what it names"
NO_BUCKET, NO_REGION = "check the bucket's name: agent.s3.codeBucket, ", "use one in agent.aws.region"
NOT_ACCEPTED, KMS_KEY = "AWS does not accept the credentials", "kms:Decrypt on the key"


def denials(call: str, kinds: str) -> list[tuple]:
    """A call refused by each kind of policy, in IAM's words."""
    action = GRANTED[call].lower() if call in SQS_CALLS else GRANTED[call]
    code, twin = ("AccessDenied", "") if "Object" in call else ("AccessDeniedException", "AccessDenied")
    return [(call, 403, code, twin, f"grant .*{GRANTED[call]}.* in the {kind}",
             text.format(action, "arn:aws:any:kms-of-mine", kind))
            for kind in kinds.split(", ") for text in (DENIED_BY, FORBIDDEN_BY)]


BOTH, ANY = "GetObject PutObject", f"{SQS_CALLS} PutMetricData"
KEYED = "ReceiveMessage SendMessage"
# The errors whose code says all: the calls, what the agent says beside AWS's words, and of each error
# its HTTP status, its code, and that one's query-compatible twin.
CODES = [
    (SQS_CALLS, "AWS does not know the queue https?:.*; check its URL",
     "400 QueueDoesNotExist AWS.SimpleQueueService.NonExistentQueue, 404 InvalidAddress InvalidAddress"),
    (SQS_CALLS, NOT_ACCEPTED, "403 InvalidSecurity InvalidSecurity"),
    (SQS_CALLS, WAITS, "403 RequestThrottled RequestThrottled"),
    (SQS_CALLS, SAYS, "400 UnsupportedOperation AWS.SimpleQueueService.UnsupportedOperation"),
    (SQS_CALLS, "grant ", "400 AccessDeniedException AccessDenied"),
    ("ReceiveMessage", WAITS, "403 OverLimit OverLimit"),
    ("GetQueueAttributes", SAYS, "400 InvalidAttributeName"),
    ("SendMessage", SAYS, "400 InvalidMessageContents"),
    *((BATCHES, SAYS, f"400 {code} AWS.SimpleQueueService.{code}") for code in (
        "TooManyEntriesInBatchRequest", "EmptyBatchRequest", "BatchEntryIdsNotDistinct", "InvalidBatchEntryId")),
    (KEYED, KMS_KEY, "400 KmsDisabled KMS.DisabledException, 400 KmsInvalidState KMS.InvalidStateException, "
     "400 KmsNotFound KMS.NotFoundException, 403 KmsOptInRequired KMS.OptInRequired, "
     "400 KmsInvalidKeyUsage KMS.InvalidKeyUsageException"),
    (ANY, "grant ", "401 NotAuthorized"),
    (ANY, NOT_ACCEPTED, "403 UnrecognizedClientException InvalidClientTokenId"),
    (ANY, SAYS, "403 IncompleteSignature IncompleteSignature, 403 OptInRequired, 400 ValidationError, "
     "413 RequestEntityTooLargeException"),
    (ANY, WAITS, "403 ExpiredTokenException ExpiredToken, 400 RequestExpired RequestExpired, "
     "400 RequestAbortedException, 408 RequestTimeoutException, 400 ThrottlingException Throttling, "
     "500 InternalFailure InternalFailure, 503 ServiceUnavailable ServiceUnavailable"),
    ("GetObject", SAYS, "403 InvalidObjectState"),
    (BOTH, "grant s3:(Get|Put)Object", "403 AccessDenied"),
    (BOTH, KMS_KEY, "400 KMS.DisabledException, 400 KMS.NotFoundException"),
    (BOTH, NO_BUCKET, "404 NoSuchBucket, 400 InvalidBucketName"),
    (BOTH, NO_REGION, "301 PermanentRedirect, 400 IllegalLocationConstraintException"),
    (BOTH, "check agent.aws.endpointUrl", "404 404"),
    (BOTH, NOT_ACCEPTED, "403 InvalidAccessKeyId, 403 SignatureDoesNotMatch, 403 InvalidSecurity, 400 InvalidToken"),
    (BOTH, SAYS, "403 AllAccessDisabled, 403 AccountProblem, 403 NotSignedUp, 405 MethodNotAllowed"),
    (BOTH, WAITS, "400 ThrottlingException, 400 ExpiredToken, 403 RequestTimeTooSkewed, 400 RequestTimeout, "
     "409 OperationAborted, 503 SlowDown, 503 ServiceUnavailable, 500 InternalError"),
    ("PutObject", SAYS, "400 EntityTooLarge, 400 EncryptionTypeMismatch, 400 InvalidRequest, "
     "400 InvalidWriteOffset, 400 TooManyParts"),
    ("PutObject", WAITS, "400 IncompleteBody, 400 BadDigest"),
    ("PutMetricData", SAYS, "400 InvalidParameterValueException InvalidParameterValue, "
     "400 MissingRequiredParameterException MissingParameter, "
     "400 InvalidParameterCombinationException InvalidParameterCombination"),
    ("PutMetricData", WAITS, "500 InternalServiceFault InternalServiceError"),
]
# Those whose words say more: calls, HTTP status, code, twin, what the agent says, AWS's words.
AWS_ERRORS = [
    *((calls, int(status), code, (twin or [""])[0], says, "Said by AWS.") for calls, says, errors in CODES
      for status, code, *twin in map(str.split, errors.split(", "))),
    (KEYED, 400, "KmsAccessDenied", "KMS.AccessDeniedException", KMS_KEY,
     CIPHERTEXT + " (Service: AWSKMS; Status Code: 400; Error Code: AccessDeniedException; Request ID: "
     "b284a4f4-e245-4843-96dc-52922101df67; Proxy: null)"),
    (KEYED, 400, "KmsAccessDenied", "KMS.AccessDeniedException", KMS_KEY,
     DENIED_BY.format("kms:Decrypt", "arn:aws:kms:ap-northeast-2:123456789012:key/k", "identity-based policy")),
    (KEYED, 400, "KmsThrottled", "KMS.ThrottlingException", WAITS,
     f"{KMS_RATE} (Service: AWSKMS; Status Code: 400; Error Code: ThrottlingException; Request ID: 1)"),
    (BOTH, 400, "ThrottlingException", "", WAITS, KMS_RATE),
    (BOTH, 403, "AccessDenied", "", KMS_KEY, CIPHERTEXT),
    (BOTH, 403, "AccessDenied", "", KMS_KEY, DENIED_BY.format(
        "kms:Decrypt", "arn:aws:kms:ap-northeast-2:123456789012:key/k", "resource-based policy")),
    ("GetObject", 404, "NoSuchKey", "", "does not exist; upload it, or correct s3Key", ""),
    *((ANY, 403, "InvalidSignatureException", "SignatureDoesNotMatch", says, words)
      for says, words in ((WAITS, LATE), (WAITS, EARLY), (NOT_ACCEPTED, UNSIGNED))),
    *(row for call in GRANTED for row in denials(call, "identity-based policy, VPC endpoint policy")),
    *(row for call in ("ReceiveMessage", "GetObject", "PutMetricData")
      for row in denials(call, "service control policy, resource-based policy, session policy")),
]
BY_CALL = [(call, *row[1:]) for row in AWS_ERRORS for call in row[0].split()]
# The code is the twin where an answer has one; SQS's newer parts, and emulators, leave it out.
BY_CALL += [(call, status, code, "", *rest) for call, status, code, twin, *rest in BY_CALL if twin]


def answer(content: str) -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Length: {len(content)}\r\n\r\n{content}".encode()


class Heard(ng.Log):
    """A log that keeps its lines."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def write(self, lines):
        self.lines += lines


class Party:
    """The agent's parts with real clients before a FaultProxy; their errors, in the agent's own words."""

    def __init__(self, proxy: FaultProxy, path: Path):
        self.proxy, self.path = proxy, path
        self.settings = ng.Settings(
            region="ap-northeast-2", endpoint_url=proxy.url, queue_url=f"{proxy.url}/123456789012/q",
            code_bucket="code", wait_time_seconds=0, output_bucket="results", flush_seconds=3600)
        self.clients = ng.make_clients(self.settings)
        self.task = ng.parse_task(json.dumps({
            "requestId": "r", "functionId": "f", "runtime": "python", "s3Key": "k.zip"}), self.settings)
        self.message = ng.Message("m", "{}", 1, 0.0)

    def hears(self, call: str, said: tuple | bytes):
        """Have AWS answer a call so, and all others with what a queue of 30 s says."""
        queue = answer('{"Attributes": {"VisibilityTimeout": "30"}}')
        self.proxy.rules = [Rule(call, "said", said=said), Rule("*", "said", said=queue)]

    @contextlib.contextmanager
    def queue(self, log):
        queue = ng.SqsQueue(self.clients, self.settings, log)
        try:
            yield queue
        finally:
            queue.close(lambda: False)

    def meet(self, call: str) -> tuple[str, bool]:
        """What is said of a call that fails, and whether the turn waits (True where it always does)."""
        log = Heard()
        try:
            getattr(self, call)(log)
        except (ng.Outage, ng.GiveUp) as error:
            return str(error), isinstance(error, ng.Outage)
        except ng.Ended as error:
            return error.outcome.text, False
        text, = log.lines
        return text, True

    def GetQueueAttributes(self, log):
        with self.queue(log):
            pass

    def ReceiveMessage(self, log):
        with self.queue(log) as queue:
            agent = ng.Agent(self.settings, log, ng.Services(queue, None, None, None),
                             types.SimpleNamespace(all=[0], base=self.path))
            agent._pause = lambda _: setattr(agent, "stopping", True)
            agent._poll()
            os.close(agent.wake)
            os.close(agent.waker)

    def batch(self, log, aim: str):
        with self.queue(log) as queue:
            now = time.monotonic()
            message = ng.Message("m", "{}", 1, 0.0, "AQEB", ends=now + 30, last=now + 300)
            queue._send(aim, [message])
            return message

    def DeleteMessageBatch(self, log):
        return self.batch(log, "delete")

    def ChangeMessageVisibilityBatch(self, log):
        return self.batch(log, "keep")

    def GetObject(self, log):
        ng.S3Code(self.clients.s3, log).get(self.task, "", self.path / "k.zip")

    def results(self, log, **change):
        settings = dataclasses.replace(self.settings, **change)
        ng.AwsResults(self.clients, settings, log).put({"requestId": "r"}, "", [])

    def PutObject(self, log):
        self.results(log)

    def SendMessage(self, log):
        self.results(log, output_bucket=None, output_queue_url=self.settings.queue_url)

    def PutMetricData(self, log):
        metrics = ng.CloudWatchMetrics(self.clients.cloudwatch, self.settings, log)
        metrics.put(ng.Report(function_id="f", runtime="python", outcome=ng.Outcome("ok", peak_memory_bytes=1)))
        metrics.close(lambda: False)


@pytest.fixture(scope="module")
def one_party(tmp_path_factory):
    with FaultProxy("http://127.0.0.1:1") as proxy:
        with pytest.MonkeyPatch.context() as patch:  # make_clients() sets one of these, too
            for name, value in {**AWS_ENV, "AWS_ENDPOINT_URL": "http://127.0.0.1:1"}.items():
                patch.setenv(name, value)
            made = Party(proxy, tmp_path_factory.mktemp("party"))
        yield made


@pytest.fixture
def party(one_party, monkeypatch):
    """Without botocore's own pauses before it repeats."""
    impatient = types.SimpleNamespace(**{**vars(time), "sleep": lambda _: None})
    monkeypatch.setattr("botocore.endpoint.time", impatient)
    return one_party


@parametrize("call,status,code,twin,says,words", BY_CALL,
                         ids=[f"{row[0]}-{row[3] or row[2]}" for row in BY_CALL])
def test_aws_error_is_waited_out_or_explained_with_its_own_words(
        party, call, status, code, twin, says, words):
    party.hears(call, (status, code, twin, words))
    text, waits = party.meet(call)
    assert words in text, text
    beside = text.partition(words)[2] if words else text
    advised = re.search("grant|check|change what|use one|kms:|upload", beside)
    if says == WAITS:
        assert waits and not advised, text
    else:
        assert re.search(says, text) and advised, text
        assert not waits or call in (*BATCHES.split(), "ReceiveMessage", "PutMetricData"), text


# A batch that is answered with 200 can still hold refusals: docs.aws.amazon.com/AWSSimpleQueueService/
# latest/APIReference/API_BatchResultErrorEntry.html; their words: github.com/aws/aws-sdk-java-v2/issues/3101,
# github.com/mapbox/ecs-watchbot/issues/135, and botocore's SQS model
ENTRIES = [
    ("DeleteMessageBatch", True, "ReceiptHandleIsInvalid", "message m is no longer ours",
     "The receipt handle is not valid for this queue."),
    ("DeleteMessageBatch", False, "InternalError", "trying on", "We encountered an internal error."),
    ("ChangeMessageVisibilityBatch", True, "InvalidParameterValue", "message m is no longer ours",
     GONE),
    ("ChangeMessageVisibilityBatch", True, "AWS.SimpleQueueService.MessageNotInflight",
     "message m is no longer ours", "The specified message isn't in flight."),
    ("ChangeMessageVisibilityBatch", False, "RequestThrottled", "trying on",
     "The request was denied due to request throttling."),
]


@parametrize("call,sender,code,says,words", ENTRIES)
def test_refused_entry_of_a_batch_is_said_with_its_own_words(party, call, sender, code, says, words):
    content = json.dumps({"Successful": [], "Failed": [
        {"Id": "0", "SenderFault": sender, "Code": code, "Message": words}]})
    party.hears(call, answer(content))
    log = Heard()
    message = getattr(party, call)(log)
    text, = log.lines
    assert says in text and f"{code}: {words}" in text
    assert (message.ends <= time.monotonic()) == sender


# --- the machine's own faults


@trial(visibility=30, agent={})
def emulator_that_tells_less_than_aws_is_served_all_the_same(aws, agent):
    aws.proxy.fail("ReceiveMessage", "emulator")
    for number in range(4):
        if number == 2:
            aws.proxy.fail("GetObject", "emulator")
        aws.put({"main.py": f"print('version {number}')"})
        aws.send(f"r{number}")
        agent.until_ok(f"r{number}")
        assert f"[r{number}] stdout: version {number}" in agent.log
    assert not agent.log.count("SentTimestamp") + agent.log.count("KeyError")
    assert len(complaints(agent.log)) >= 4 and "the answer has no ETag, as S3's have" in agent.log


@trial(visibility=90, agent=dict(execution={"concurrency": 2}))
def launcher_that_dies_is_replaced_and_its_runs_are_errors(aws, agent):
    for request_id in ("r1", "r2"):
        aws.job(request_id, sleep=20)
    until(lambda: len(runs_in(aws.path)) == 2, what="the runs")
    os.kill(family(agent.process.pid)[1], signal.SIGKILL)  # the agent's only child
    until_gone(run_pids(aws.path), 15)
    finish(aws, agent, ends={"error": 2, "ok": 2})
    assert "launcher" in "".join(complaints(agent.log))


# What the agent may be started with: the words before its command.
WITH_SIGNALS = "import os, signal, sys; {}; os.execvp(sys.argv[1], sys.argv[1:])"
STARTED_WITH = {
    "SIGCHLD ignored": [PYTHON, "-c", WITH_SIGNALS.format(
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)")],
    "signals blocked": [PYTHON, "-c", WITH_SIGNALS.format(
        "signal.pthread_sigmask(signal.SIG_SETMASK, range(1, 32))")],
    **{name: ["sh", "-c", f'{what}; exec "$@"', "sh"] for name, what in (
        ("umask 077", "umask 077"), ("no input", "exec <&-"), ("no output", "exec >&-"),
        ("no error", "exec 2>&-"), ("no descriptor", "exec <&- >&- 2>&-"))}}


@parametrize("name", STARTED_WITH)
def test_an_agent_works_whatever_it_was_started_with(grids, user, name):
    """It makes its directories, runs, hears SIGTERM; no log line goes where it does not belong."""
    grid = grids(user)
    grid.env["AGENT_TASKBASEDIR"] = f"{grid.top}/new/task"
    grid.put({"main.py": "import os; print(os.umask(0))"}, request_id="python")
    grid.put({"run.sh": "umask"}, "cpp", "cpp", "cpp")
    with grid.agent(prefix=STARTED_WITH[name]) as agent:
        until(lambda: len(grid.names("results")) == 2 and not grid.names("running"), what="the results")
        assert agent.stop() == 0
    assert grid.result("python")["stdout"] == "18\n", grid.result("python")
    assert grid.result("cpp")["stdout"] == "0022\n", grid.result("cpp")
    assert bool(agent.log) == (name not in ("no error", "no descriptor"))
    assert agent.log.count("REPORT") == agent.log.count("status=ok") == 2 * bool(agent.log), agent.log


def in_mounts(*commands: str) -> list[str]:
    """The words before a command that run it where root has mounted so; else the test is skipped."""
    prefix = ["unshare", "-m", "sh", "-c", " && ".join((*commands, 'exec "$@"')), "sh"]
    if not ROOT or not works(*prefix):
        pytest.skip("only root mounts a file system, and not everywhere")
    return prefix


def test_a_directory_without_exec_is_said_to_be_that(folder):
    prefix = in_mounts(f"mount -t tmpfs -o noexec,mode=755 none {folder.base}")
    for flag in ("--drain", "--check"):
        agent = ended(folder.agent(flag, prefix=prefix), 1)
        assert f"{folder.base} is mounted noexec" in agent.log + agent.out


def test_where_another_user_has_the_usual_directory_root_takes_one_of_its_own(folder):
    usual, needed = "/tmp/task", (folder.top, MODULE.parent, Path(sys.prefix), Path(sys.base_prefix))
    names = sorted({one.parts[2] for one in needed if one.parts[:2] == ("/", "tmp")})
    prefix = in_mounts("mount --bind /tmp /mnt", "mount -t tmpfs -o mode=1777 none /tmp", *(
        f"mkdir /tmp/{name} && mount --bind /mnt/{name} /tmp/{name}" for name in names),
        f"mkdir {usual}", f"chown 12345 {usual}")
    folder.put({"main.py": "import os; print(os.path.dirname(os.path.dirname(os.environ['HOME'])))"})
    folder.env.pop("AGENT_TASKBASEDIR")
    agent = ended(folder.agent("--drain", prefix=prefix))
    assert folder.result("r00001")["stdout"].startswith(f"{usual}-0/agent-"), agent.log


# --- --local


def test_local_several_agents_share_a_folder_and_run_each_task_once(folder):
    with folder.agent() as first, folder.agent() as second:
        for agent in (first, second):
            agent.wait_for("INFO runtimes: ")
        for number in range(60):
            folder.job(f"r{number:02d}", sleep=0.1)
        until(lambda: len(folder.names("results")) == 60 and not folder.names("running"), 60,
              "sixty results")
        assert runs_in(folder.top) == {f"r{number:02d}": 1 for number in range(60)}
        assert reports(first.log) and reports(second.log)
        assert first.stop() == second.stop() == 0
        assert not folder.names("queue") and not folder.names("dead")


def test_local_task_is_claimed_by_rename_left_to_its_agent_and_recovered_when_that_is_dead(folder):
    with folder.agent() as first:
        folder.job("r1", sleep=10)
        until_ran(folder.top)
        assert not folder.names("queue") and len(folder.names("running")) >= 1
        with folder.agent() as second:
            second.wait_for("INFO runtimes: ")
            folder.job("r2")
            until(lambda: folder.names("results") == ["r2"], what="the other task's result")
            assert runs_in(folder.top) == {"r1": 1, "r2": 1} and second.stop() == 0
            assert "requestId=r1" not in second.log
        first.stop(signal.SIGKILL)
        report, = reports(ended(folder.agent("--drain")).log)
        assert (report["requestId"], report["status"], report["receiveCount"]) == ("r1", "ok", "2")
        assert not any(folder.names(each) for each in ("queue", "running", "dead"))


def test_local_third_failure_is_dead_with_its_result_beside_it(folder):
    """And what is no task; at DEBUG, each start is said; names that begin with a dot are passed over."""
    folder.job("bad", exit=3)
    folder.job("good")
    task = json.loads((folder.path / "queue" / "bad.json").read_text())
    for name in ("no task.json", ".half.json"):
        (folder.path / "queue" / name).write_text("{")
    agent = ended(folder.agent("--drain", "--log-level", "debug"))
    left = {each.name: each.read_text() for each in (folder.path / "dead").iterdir()}
    assert set(left) == {"bad.json", "bad.result.json", "no task.json", "no task.result.json"}
    assert json.loads(left["bad.json"]) == task and left["no task.json"] == "{"
    result = json.loads(left["bad.result.json"])
    assert (result["status"], result["exitCode"], result["receiveCount"]) == ("failed", 3, 3)
    wrong = json.loads(left["no task.result.json"])
    assert (wrong["status"], wrong["receiveCount"]) == ("rejected", 1) and wrong["stderr"]
    [report] = [each for each in reports(agent.log) if each["requestId"] == "-"]
    assert (report["messageId"], report["status"]) == ("no_task.json", "rejected")
    assert runs_in(folder.top) == {"bad": 3, "good": 1}
    assert os.listdir(folder.path / "queue") == [".half.json"]
    assert re.search(r"DEBUG \[good\] a run of .* starts\n(.*\n)*.* REPORT requestId=good ", agent.log), agent.log


def taken(path: Path, name: str) -> tuple:
    """A FolderQueue with one task of that name, which it has taken."""
    queue = ng.FolderQueue(path, Heard())
    (path / "queue" / name).write_text("{}")
    message, = queue.receive(1, True)
    return queue, message


def test_local_a_task_whose_end_the_disk_refuses_is_put_away_later(tmp_path, monkeypatch):
    queue, message = taken(tmp_path, "a.json")
    full = OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(ng, "rename_new", lambda *_: (_ for _ in ()).throw(full))
        queue.end(message, "failed", {})
    assert os.listdir(tmp_path / "running") == ["a.json"] and not queue.is_empty()
    queue.disk.retry_at = 0.0
    again, = queue.receive(1, True)
    assert again.receive_count == 2 and "No space left" in "".join(queue.log.lines)


@parametrize("name", ["x" * 245 + ".json", "\u00e9" * 122 + ".json"])
def test_local_long_names_are_taken_three_times_and_buried(tmp_path, name):
    queue, message = taken(tmp_path, name)
    for count in (1, 2, 3):
        assert message.receive_count == count
        queue.end(message, "failed", {"why": count})
        message, = queue.receive(1, True) or [None]
    dead = sorted(os.listdir(tmp_path / "dead"), key=lambda each: "result" in each)
    assert dead[0] == name and json.loads((tmp_path / "dead" / dead[1]).read_text()) == {"why": 3}
    assert os.listdir(tmp_path / "queue") == []


@parametrize("has_renameat2", [True, False])
def test_local_nothing_is_renamed_over_another_task(tmp_path, monkeypatch, has_renameat2):
    if not has_renameat2:
        monkeypatch.setattr(ng, "kernel", lambda *_: (_ for _ in ()).throw(OSError(22, "Invalid argument")))
    for name in "ab":
        (tmp_path / name).write_text(name)
    with pytest.raises(FileExistsError):
        ng.rename_new(f"{tmp_path}/a", f"{tmp_path}/b")
    assert (tmp_path / "b").read_text() == "b"
    ng.rename_new(f"{tmp_path}/a", f"{tmp_path}/c")
    assert sorted(os.listdir(tmp_path)) == ["b", "c"]
    with ng.locked(f"{tmp_path}/c") as file:  # NFS locks no descriptor that may not write
        assert fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR


def test_local_what_cannot_be_taken_is_said_once_and_ends_no_drain(grids):
    """As an ordinary user, who may not read everything."""
    grid = grids("ordinary")
    queue = grid.path / "queue"
    (queue / "folder.json").mkdir()
    (queue / "link.json").symlink_to("/etc/hostname")
    (queue / "closed.json").write_text("{}")
    (queue / "closed.json").chmod(0o200)
    (queue / "nothing.json").write_text("")
    os.mkfifo(queue / "pipe.json")
    for name in ("pipe.json", "nothing.json") if ROOT else ():
        os.chown(queue / name, ORDINARY, ORDINARY)
    grid.put({"main.py": ""}, request_id="fine")
    grid.run()
    assert set(os.listdir(queue)) == {"folder.json", "link.json", "closed.json"}
    said = "".join(complaints(grid.log))
    assert [said.count(f"{name} cannot be taken") for name in os.listdir(queue)] == [1, 1, 1], grid.log
    assert grid.reports["fine"][0]["status"] == "ok"
    assert {"pipe.json", "nothing.json"} <= set(os.listdir(grid.path / "dead"))


@parametrize("first", ["ok", "failed", "killed"])
def test_local_task_of_a_name_that_runs_waits_for_its_turn(first, folder):
    """Both are run, whatever becomes of the first one's name meanwhile."""
    with folder.agent() as agent:
        folder.job("r1", sleep=10 if first == "killed" else 2, exit=first == "failed",
                  functionId="first")
        until_ran(folder.top)
        folder.job("r1", functionId="second")
        if first == "killed":
            agent.stop(signal.SIGKILL)
        else:
            agent.wait_for("functionId=second .*status=ok")
            agent.wait_for("functionId=first .*" + ("status=ok" if first == "ok" else "receiveCount=3"))
            assert agent.stop() == 0
    log = (first != "killed") * agent.log + ended(folder.agent("--drain")).log
    seen = Counter((each["functionId"], each["status"]) for each in reports(log))
    assert seen == {("second", "ok"): 1, ("first", "failed" if first == "failed" else "ok"): 3 if first == "failed" else 1}
    assert not folder.names("running") and not folder.names("queue")


@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 2048,
                    reason="this machine allows no process 2,048 descriptors")
def test_local_a_slot_whose_descriptors_are_over_1023_is_used_again(folder):
    # Descriptors as an agent of many slots has them; select(2) takes none over 1,023.
    patch = """import os, resource
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
run = ng.Agent.run
def crowded(self, drain):
    while os.open(os.devnull, os.O_RDONLY) < 1100: pass
    run(self, drain)
ng.Agent.run = crowded"""
    env = {"AGENT_EXECUTION_CONCURRENCY": "1"}
    for request_id in ("r1", "r2"):
        folder.job(request_id)
    agent = ended(folder.agent("--drain", prefix=patched(patch), env=env))
    assert statuses(agent.log) == ["ok", "ok"], agent.log


def test_local_sigterm_gives_back_what_runs_longer_than_the_grace(folder):
    folder.job("r1", sleep=300, timeoutMs=400000)
    with folder.agent(env={"AGENT_EXECUTION_SHUTDOWNGRACESECONDS": "1"}) as agent:
        until_ran(folder.top)
        assert agent.stop(seconds=90) == 0
    assert statuses(agent.log) == ["released"]
    assert len(folder.names("queue")) == 1 and not folder.names("running")


def held(pid: int, task_dir: Path) -> dict[str, int]:
    """What an agent and its descendants hold of memory, descriptors, processes and disk."""
    held, members = Counter(zombies=0, descriptors=0, files=0), family(pid)
    for each in members:
        status = Path(f"/proc/{each}/status").read_text()
        held["kib"] += sum(map(int, re.findall(r"^RssAnon:\s+(\d+)", status, re.MULTILINE)))
        held["zombies"] += "State:\tZ" in status
        held["processes"] += 1
        with contextlib.suppress(PermissionError):  # an ordinary user sees only some of them
            held["descriptors"] += len(os.listdir(f"/proc/{each}/fd"))
    for _, dirs, files in os.walk(task_dir):
        held["files"] += len(dirs) + len(files)
    return held


@pytest.mark.slow
def test_local_20_000_jobs_leave_memory_descriptors_zombies_and_disk_flat(folder):
    with folder.agent() as agent:
        (folder.path / "code" / "noop.zip").write_bytes(make_zip({"main.py": ""}))
        samples = []
        for part in range(4):
            for number in range(5000):
                folder.put(s3Key="noop.zip", request_id=f"r{part}-{number}")
            until(lambda: not folder.names("queue") and not folder.names("running"), 900, "all")
            samples.append(held(agent.process.pid, folder.top / "task"))
        assert agent.stop() == 0
        first, *_, last = samples
        grown = {key: last[key] - first[key] for key in first}
        assert grown["kib"] < first["kib"] * 0.15 + 4096 and last["zombies"] == 0, samples
        assert grown["descriptors"] <= 4 and grown["processes"] <= 2, samples
        assert grown["files"] <= 8, samples
        assert Counter(statuses(agent.log)) == {"ok": 20000}


def test_local_clock_set_forward_hangs_nothing(tmp_path, folder):
    """By libfaketime (Debian's faketime): two hours forward and back while functions run."""
    # libfaketime 0.9.10 answers EINVAL to the sleep of Python 3.11 and later when it leaves the
    # monotonic clock alone (as setting a machine's clock does): that one call goes past it.
    sleep_c = """#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include <errno.h>
int clock_nanosleep(clockid_t clock, int flags, const struct timespec *until, struct timespec *left)
{ return syscall(SYS_clock_nanosleep, clock, flags, until, left) ? errno : 0; }
"""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    need("cc")
    need("faketime", found=lambda _: library)
    clock, sleep = tmp_path / "clock", tmp_path / "sleep.so"
    clock.write_text("+0")
    subprocess.run(["cc", "-shared", "-fPIC", "-xc", "-o", sleep, "-"], input=sleep_c.encode(),
                   check=True)
    env = {"LD_PRELOAD": f"{sleep}:{library}", "FAKETIME_TIMESTAMP_FILE": str(clock),
           "FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    with folder.agent(env=env) as agent:
        folder.job("before")
        agent.wait_for("REPORT requestId=before")
        for step, moved in enumerate(("+7200", "+0", "+7200")):
            folder.job(f"during{step}", sleep=1.5)
            until_ran(folder.top, f"during{step}")
            clock.write_text(moved)
            agent.wait_for(f"REPORT requestId=during{step}")
            folder.job(f"after{step}")
            agent.wait_for(f"REPORT requestId=after{step}")
        stamps = [line[:13] for line in agent.log.splitlines() if "REPORT" in line]
        assert agent.stop() == 0
        assert set(statuses(agent.log)) == {"ok"}
        assert len(set(stamps)) > 1, "the clock was not moved: the test shows nothing"


@parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] if name in SLOW_TRIALS else []) for name in TRIALS])
def test_trial(trials, name, capsys):
    if told := trials[name].result():
        with capsys.disabled():
            print(f"\n{name}: {told}")


# --------------------------------------------------------------------------------------------
# setup_resources.sh
# --------------------------------------------------------------------------------------------
#
# The script with the real CLI against emulators, and what is there then. ministack does as
# CloudFormation: it changes a stack, takes back what failed, says why. moto makes and removes one.

SETUP = Path(__file__).with_name("setup_resources.sh")
LEAST_ACTIONS = ["sqs:ReceiveMessage", "sqs:DeleteMessage", "sqs:GetQueueAttributes"]
TOPIC = "arn:aws:sns:ap-northeast-2:123456789012:alarms"


def run_setup(cwd: Path, *flags, env=None, answer: str = "", status: int = 0, shell: str = "bash") -> str:
    """Everything that the script printed; fails unless it ended with `status`."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    own |= {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull, **(env or {})}
    done = subprocess.run([shell, SETUP, *flags], cwd=cwd, env=own, input=answer, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600, check=False)
    assert done.returncode == status, done.stdout
    return done.stdout


class Account:
    """An empty account in an emulator, a folder to work in, and what there is."""

    def __init__(self, url: str, path: Path):
        self.url, self.path, self.config = url, path, path / "application.yml"
        self.env = {**AWS_ENV, "AWS_ENDPOINT_URL": url}
        del self.env["AWS_DEFAULT_REGION"]
        for name in ("sqs", "s3", "iam", "cloudwatch", "ec2", "autoscaling", "cloudformation"):
            setattr(self, name, client_of(url, name))
        self.number = client_of(url, "sts").get_caller_identity()["Account"]
        self.code_bucket = f"nanogrid-code-bucket-{self.number}"

    def run(self, *flags, env=None, **rest) -> str:
        return run_setup(self.path, *flags, env={**self.env, **(env or {})}, **rest)

    def settings(self) -> ng.Settings:
        return ng.load_settings(self.config, {}, False)[0]

    def queue(self, name: str = "nanogrid-task-queue") -> dict:
        url = self.sqs.get_queue_url(QueueName=name)["QueueUrl"]
        return self.sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]

    def bucket(self, name: str) -> dict:
        """moto passes over what closes a bucket: there it is taken for closed."""
        rules = self.s3.get_bucket_encryption(Bucket=name)["ServerSideEncryptionConfiguration"]["Rules"]
        found = {"region": self.s3.get_bucket_location(Bucket=name)["LocationConstraint"],
                 "encryption": rules[0]["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"],
                 "closed": {True}, "owner": "BucketOwnerEnforced"}
        if self.number != "123456789012":
            block = self.s3.get_public_access_block(Bucket=name)["PublicAccessBlockConfiguration"]
            owner = self.s3.get_bucket_ownership_controls(Bucket=name)["OwnershipControls"]
            found |= {"closed": set(block.values()), "owner": owner["Rules"][0]["ObjectOwnership"]}
        return found

    def trusted(self, name: str = "NanoGridAgentRole") -> list[dict]:
        trust = self.iam.get_role(RoleName=name)["Role"]["AssumeRolePolicyDocument"]["Statement"]
        return [each["Principal"] for each in trust if (each["Effect"], each["Action"]) == ("Allow", "sts:AssumeRole")]

    def policy(self, name: str = "NanoGridAgentRole") -> list[tuple]:
        """Actions, resource and what must be equal, of all policies of the role, the agent's first."""
        names = sorted(self.iam.list_role_policies(RoleName=name)["PolicyNames"])
        documents = [self.iam.get_role_policy(RoleName=name, PolicyName=each)["PolicyDocument"] for each in names]
        return [(one["Action"], one["Resource"], one.get("Condition", {}).get("StringEquals"))
                for document in documents for one in document["Statement"]]

    def profile_roles(self, name: str = "NanoGridAgentProfile") -> list[str]:
        profile = self.iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]
        return [role["RoleName"] for role in profile["Roles"]]

    def group(self) -> dict | None:
        return next(iter(self.autoscaling.describe_auto_scaling_groups()["AutoScalingGroups"]), None)

    def machine(self) -> dict:
        """What the newest version of the group's launch template says."""
        template = self.group()["LaunchTemplate"]["LaunchTemplateId"]
        found = self.ec2.describe_launch_template_versions(LaunchTemplateId=template, Versions=["$Latest"])
        return found["LaunchTemplateVersions"][0]["LaunchTemplateData"]

    def names(self) -> list[str]:
        """What there is at all."""
        return sorted([
            *(url.rsplit("/", 1)[1] for url in self.sqs.list_queues().get("QueueUrls", [])),
            *(bucket["Name"] for bucket in self.s3.list_buckets()["Buckets"]),
            *(role["RoleName"] for role in self.iam.list_roles()["Roles"]),
            *(one["InstanceProfileName"] for one in self.iam.list_instance_profiles()["InstanceProfiles"]),
            *(alarm["AlarmName"] for alarm in self.cloudwatch.describe_alarms()["MetricAlarms"]),
            *(board["DashboardName"] for board in self.cloudwatch.list_dashboards()["DashboardEntries"]),
            *(self.group() or {"AutoScalingGroupName": ""})["AutoScalingGroupName"].split()])

    def base(self) -> list:
        """The guide's set with its attributes."""
        return [self.queue(), self.queue("nanogrid-task-queue-dlq"), self.bucket(self.code_bucket),
                self.trusted(), self.policy(), self.profile_roles()]

    def check_set(self):
        """What the guide asks for is there."""
        queue, dlq, bucket, *access = self.base()
        assert queue.items() >= {"VisibilityTimeout": "300", "MessageRetentionPeriod": "1209600",
                                 "MaximumMessageSize": "262144", "ReceiveMessageWaitTimeSeconds": "20"}.items()
        assert dlq["MessageRetentionPeriod"] == "1209600"
        redrive = {"deadLetterTargetArn": dlq["QueueArn"], "maxReceiveCount": 3}
        assert json.loads(queue["RedrivePolicy"]) == redrive
        assert bucket == {"region": "ap-northeast-2", "encryption": "AES256",
                          "closed": {True}, "owner": "BucketOwnerEnforced"}
        objects = f"arn:aws:s3:::{self.code_bucket}"
        assert access == [[{"Service": "ec2.amazonaws.com"}], [
            ([*LEAST_ACTIONS, "sqs:ChangeMessageVisibility"], queue["QueueArn"], None),
            (["s3:GetObject", "s3:ListBucket"], [objects, f"{objects}/*"], {"aws:ResourceAccount": self.number}),
            (["cloudwatch:PutMetricData"], "*", {"cloudwatch:namespace": ng.Settings().namespace}),
        ], ["NanoGridAgentRole"]]


def account_in(server):
    @pytest.fixture
    def fixture(tmp_path):
        need("aws")
        with server() as url:
            yield Account(url, tmp_path)
    return fixture


account, stack = account_in(moto_server), account_in(ministack_server)


@pytest.mark.slow
@parametrize("emulator", ["account", "stack"])
def test_setup_makes_the_guides_set_once_and_takes_it_down(request, emulator):
    account = request.getfixturevalue(emulator)
    before = account.names()
    assert "TaskQueue" in account.run("--dry-run")
    assert account.names() == before and not account.config.exists()
    account.run("--instance-type", "t4g.small")
    account.check_set()
    if emulator == "account":  # the other knows one architecture alone
        assert "arm64" in str(account.cloudformation.describe_stacks()["Stacks"][0]["Parameters"])
    found = account.settings()
    assert found.queue_url.endswith(f"/{account.number}/nanogrid-task-queue")
    assert (found.region, found.code_bucket, found.endpoint_url) == ("ap-northeast-2", account.code_bucket, account.url)

    made, written = account.base(), account.config.read_bytes()
    account.run()
    assert account.base() == made and account.config.read_bytes() == written
    account.config.write_bytes(edited := written.replace(b"flushSeconds: 10", b"flushSeconds: 60"))
    assert "application.yml is not as this script wrote it, and stays" in account.run("--test-message")
    assert account.config.read_bytes() == edited != written
    kept = account.s3.get_object(Bucket=account.code_bucket, Key="functions/hello-python/v1.zip")
    assert zipfile.ZipFile(io.BytesIO(kept["Body"].read())).namelist() == ["main.py"]

    account.run("--output-queue", "done")
    assert account.policy()[3][0] == ["sqs:SendMessage"] and "done" in account.names()
    said = account.run("--down", answer="y\n", status=1)
    assert "queue nanogrid-task-queue; messages that wait, are in work, are delayed: 1, 0, 0\n" in said
    assert "nothing was removed" in said and account.queue("done")
    assert f"bucket {account.code_bucket} stays" in account.run("--down", answer="yes\n")
    assert account.names() == sorted([*before, account.code_bucket])
    assert "not there: stack" in account.run("--down")
    if emulator == "account":  # the other forgets what kind a machine is
        parameters = {"Instances": "2", "Spot": "yes", "Bucket": "other",
                      "Subnets": account.ec2.describe_subnets()["Subnets"][0]["SubnetId"]}
        account.cloudformation.create_stack(StackName="spot", TemplateBody=account.run("--template"), Parameters=[
            {"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()])
        assert account.group()["VPCZoneIdentifier"] == parameters["Subnets"]
        assert account.machine()["InstanceMarketOptions"] == {"MarketType": "spot"}


@pytest.mark.slow
def test_setup_changes_what_the_flags_say_and_keeps_the_rest(stack):
    stack.run("--alarm-topic", TOPIC, "--dashboard", "--output-bucket", "results", "--output-queue", "done",
              "--function-policy", "arn:aws:iam::aws:policy/AmazonS3ReadOnlyAccess")
    made = [stack.names(), stack.base()]
    stack.run()
    assert [stack.names(), stack.base()] == made
    assert [(one["MetricName"], one["Dimensions"][0]["Value"], one["Threshold"], one["AlarmActions"])
            for one in stack.cloudwatch.describe_alarms()["MetricAlarms"]] == [
        ("ApproximateNumberOfMessagesVisible", "nanogrid-task-queue-dlq", 0, [TOPIC]),
        ("ApproximateAgeOfOldestMessage", "nanogrid-task-queue", 900, [TOPIC])]
    board = stack.cloudwatch.get_dashboard(DashboardName="NanoGrid-nanogrid-task-queue-ap-northeast-2")
    metrics = [one["properties"]["metrics"] for one in json.loads(board["DashboardBody"])["widgets"]]
    assert "-dlq" in str(metrics[0]) and "NanoGrid/FunctionRunner,FunctionId,Runtime" in str(metrics[1])
    role = f"arn:aws:iam::{stack.number}:role/NanoGridAgentRole"
    assert [one[:2] for one in stack.policy()[3:]] == [
        (["sts:AssumeRole"], f"{role}-functions"), (["s3:PutObject"], "arn:aws:s3:::results/*"),
        (["sqs:SendMessage"], f"arn:aws:sqs:ap-northeast-2:{stack.number}:done")]
    assert stack.trusted("NanoGridAgentRole-functions") == [{"AWS": role}]
    assert stack.bucket("results") == stack.bucket(stack.code_bucket)
    settings = stack.settings()
    assert settings.output_bucket == "results" and settings.output_queue_url.endswith("/done")
    assert settings.function_role == f"{role}-functions"

    stack.run("--least", "--no-alarm-topic", "--no-dashboard", "--no-function-policy", "--no-output-queue",
              "--bucket", "code-2")
    queue, objects, _, *rest = stack.policy()
    assert queue[0] == LEAST_ACTIONS and objects[1] == ["arn:aws:s3:::code-2", "arn:aws:s3:::code-2/*"]
    assert [one[0] for one in rest] == [["s3:PutObject"]]
    assert stack.names() == sorted(["NanoGridAgentProfile", "NanoGridAgentRole", "nanogrid-task-queue",
                                    "nanogrid-task-queue-dlq", stack.code_bucket, "code-2", "results"])
    stack.s3.put_object(Bucket="code-2", Key="functions/x.zip", Body=b"x")
    stack.run("--down", "--empty-bucket", answer="yes\n")
    assert stack.names() == [stack.code_bucket]  # another stack's now, for all it knows


@pytest.mark.slow
def test_setup_says_why_it_failed_and_leaves_all_else_as_it_was(stack):
    stack.run("--queue", "other_one", "--dlq", "other-dead")  # it has a set of its own
    assert stack.profile_roles("NanoGridAgentProfile-other_one") == ["NanoGridAgentRole-other_one"]
    assert stack.settings().code_bucket == f"{stack.code_bucket}-other-one"
    before, other = stack.names(), [stack.queue("other_one"), stack.policy("NanoGridAgentRole-other_one")]
    stack.s3.create_bucket(Bucket="taken", CreateBucketConfiguration={"LocationConstraint": "ap-northeast-2"})
    said = stack.run("--bucket", "taken", status=1)
    assert re.search("reason: CodeBucket: .*'taken' already exists", said) and "--existing-bucket" in said
    assert stack.names() == sorted([*before, "taken"]) and not stack.config.read_text().count("task-queue")

    stack.run("--existing-bucket", "taken")  # the stack that was taken back is out of the way
    assert stack.settings().code_bucket == "taken" and stack.code_bucket not in stack.names()
    stack.run("--down", "--empty-bucket", answer="yes\n")  # it made no bucket
    assert stack.names() == sorted([*before, "taken"])
    assert [stack.queue("other_one"), stack.policy("NanoGridAgentRole-other_one")] == other


WHEEL = {"boto3.py": "", "boto3-9.dist-info/METADATA": "Metadata-Version: 2.1\nName: boto3\nVersion: 9\n",
         "boto3-9.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
         "boto3-9.dist-info/RECORD": ""}


@pytest.mark.slow
def test_setup_brings_up_a_fleet_and_new_versions_to_it(stack, tmp_path):
    (tmp_path / "boto3-9-py3-none-any.whl").write_bytes(make_zip(WHEEL))
    env = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    stack.run("--instances", "3", "--instance-type", "t4g.small", "--packages", "nodejs", "--spot", env=env)
    stack.run("--instances", "3", env=env)
    name, group, machine = "NanoGrid-nanogrid-task-queue", stack.group(), stack.machine()
    assert (group["AutoScalingGroupName"], group["MinSize"], group["MaxSize"]) == (name, 1, 3)
    assert machine["ImageId"].startswith("resolve:ssm:/aws/service/ami-amazon-linux-latest/al2023-ami-kernel-default-")
    assert machine["InstanceType"] == "t4g.small" and machine["MetadataOptions"]["HttpTokens"] == "required"
    assert machine["IamInstanceProfile"]["Name"].endswith("NanoGridAgentProfile")
    [hook] = stack.autoscaling.describe_lifecycle_hooks(AutoScalingGroupName=name)["LifecycleHooks"]
    assert hook["LifecycleTransition"] == "autoscaling:EC2_INSTANCE_TERMINATING"
    [policy] = stack.autoscaling.describe_policies(AutoScalingGroupName=name)["ScalingPolicies"]
    assert policy["TargetTrackingConfiguration"]["TargetValue"] == 200
    boot_a_machine(stack, base64.b64decode(machine["UserData"]).decode(), tmp_path / "machine")

    stack.config.write_text(stack.config.read_text() + "# edited\n")
    stack.run("--instances", "2", env=env)
    assert len(stack.autoscaling.describe_instance_refreshes(AutoScalingGroupName=name)["InstanceRefreshes"]) == 2
    assert stack.machine()["UserData"] != machine["UserData"] and stack.group()["MaxSize"] == 2
    stack.run("--instances", "0")
    assert not stack.group() and len(stack.policy()) == 3


def boot_a_machine(stack: Account, user_data: str, place: Path):
    """Run the user data with stand-ins for Amazon Linux's dnf, its Python, systemd, the metadata and autoscaling."""
    log, opt = place / "log", place / "opt"
    (place / "units").mkdir(parents=True)
    env = stack.env | tools(
        place / "tools", dnf=f'echo "dnf $*" >>{log}', systemctl=f'echo "systemctl $*" >>{log}',
        curl='case "$*" in *target-lifecycle*) echo Terminated ;; *) echo i-1 ;; esac',
        aws=f'case "$1" in autoscaling) echo "aws $*" >>{log} ;; *) exec {shutil.which("aws")} '
            f'--endpoint-url {stack.url} "$@" ;; esac', **{"python3.12": f'exec {sys.executable} "$@"'})
    sh(user_data.replace("/opt/nanogrid", str(opt)).replace("bash fleet_machine.sh", (
        f"sed -i 's|/etc/systemd/system|{place}/units|' fleet_machine.sh; bash fleet_machine.sh")), place, env)
    assert (opt / "nanogrid.py").read_bytes() == MODULE.read_bytes()
    assert (opt / "application.yml").read_bytes() == stack.config.read_bytes()
    assert list((opt / "venv").glob("lib/python*/site-packages/boto3.py"))
    assert "SPOTINTERRUPTION=true" in (place / "units" / "nanogrid.service.d" / "fleet.conf").read_text()

    service = re.search("^ExecStart=(.*)$", (place / "units" / "nanogrid-fleet.service").read_text(), re.MULTILINE)[1]
    sh(service, place, env)
    *booted, ready, stopped, taken = log.read_text().splitlines()
    assert booted == ["dnf -q -y install python3.12 nodejs", "systemctl daemon-reload",
                      "systemctl enable --now nanogrid", "systemctl enable --now nanogrid-fleet"]
    assert stopped == "systemctl stop nanogrid" and "--lifecycle-hook-name ready " in ready
    assert "--lifecycle-hook-name taken-away " in taken and taken.endswith("--instance-id i-1")
    assert "--auto-scaling-group-name NanoGrid-nanogrid-task-queue " in taken


# --- Without AWS

@parametrize("flags, answer, words", [
    ([], "Unable to locate credentials.", "AWS_PROFILE"),
    ([], "An error occurred (InvalidClientTokenId) when calling …", "aws configure"),
    ([], "The SSO session of this profile has expired", "aws sso login"),
    ([], "An error occurred (AccessDenied) when calling …", "ask for the permission"),
    ([], "An error occurred (Strange) when calling …", "mend what is named"),
    (["--regoin", "x"], "", "there is no flag --regoin"), (["queue", "x"], "", "there is no flag queue"),
    (["--version", "x"], "", "there is no flag --version"), (["--no-such"], "", "there is no flag --such"),
    (["--queue"], "", "--queue needs a value"), (["--queue", ""], "", "--queue needs a value"),
    (["--queue", "a.fifo"], "", "not FIFO"),
])
def test_setup_failure_says_what_to_do(tmp_path, flags, answer, words):
    env = tools(tmp_path, aws=f"echo {shlex.quote(answer or 'it was asked')} >&2; exit 254")
    said = run_setup(tmp_path, *flags, env=env, status=1 if answer else 2)
    assert not answer or f"failed at: credentials\n  answer: {answer}\n" in said
    assert words in said.rpartition("to do:")[2] and ("--help" in said) == (not answer)
    assert "it was asked" not in said and not (tmp_path / "application.yml").exists()


def test_setup_help_names_every_flag_that_it_takes(tmp_path):
    parser = re.search(r"^parse_flags.*?^}.*?^}", SETUP.read_text(), re.MULTILINE | re.DOTALL)[0]
    taken = set(re.findall(r"--[a-z-]*[a-z]", parser)) - {"--help", "--existing"}
    shown = set(re.findall(r"--[a-z][a-z-]*[a-z]", run_setup(tmp_path, "--help")))
    assert taken <= shown and {"--output-queue", "--instances", "--function-policy"} <= shown
    assert not {"--bucket-is-there", "--architecture", "--version"} & shown


def test_setup_that_was_cut_short_does_nothing(tmp_path):
    lines = SETUP.read_text().splitlines(keepends=True)
    assert lines[-1] == 'main "$@"\n' and SETUP.with_name("fleet_machine.sh").read_text().endswith(lines[-1])
    for end in range(1, len(lines), 40):
        (tmp_path / "cut.sh").write_text("".join(lines[:end]))
        done = subprocess.run(["bash", tmp_path / "cut.sh"], cwd=tmp_path, timeout=180, text=True,
                              stdin=subprocess.DEVNULL, capture_output=True, check=False)
        assert "account" not in done.stdout


def test_setup_asks_for_bash_and_uses_nothing_that_bash_3_lacks(tmp_path):
    newer = {
        "associative array, nameref": r"\b(declare|local|typeset) -[a-zA-Z]*[An]", "|&": r" \|& ",
        "mapfile": r"\b(mapfile|readarray)\b", "case conversion": r"\$\{\w+[,^]", "&>>": r"&>>",
        "coproc": r"\bcoproc\b", "@ operator": r"\$\{\w+@", ";;&": r";;?&", "-v": r"\[\[? -v ",
        "negative index": r"\[-\d", "printf time": r"printf '[^']*%\(",
        "a status that is lost": r"\b(local|export|readonly) \w+=\"?\$\(",
        "a subshell, whose failure does not end it": r"^\s*\((?!\()", "case in $()": r"\$\(\s*case ",
        "a name that runs into a letter": r"\$\w+[^\x00-\x7f]"}
    text = re.sub(r"(?s)^template\(\) \{.*?^}$", "", SETUP.read_text(), flags=re.MULTILINE)
    assert [name for name, pattern in newer.items() if re.search(pattern, text, re.MULTILINE)] == []
    need("dash")
    assert "run it with bash: bash " in run_setup(tmp_path, shell="dash", status=2)


# --------------------------------------------------------------------------------------------
# Log
# --------------------------------------------------------------------------------------------

NUMBERED = [f"line {number}" for number in range(1, 302)]
# output: (text, what the log has of it)
SAID = {
    "nothing": ("", []),
    "as many lines as there may be": ("\n".join(NUMBERED[:200]) + "\n", NUMBERED[:200]),
    "one more": ("\n".join(NUMBERED[:201]), [
        *NUMBERED[:100], "1 of the kept lines of stdout are left out here", *NUMBERED[101:201]]),
    "a long line": ("x" * 60_000, ["x" * 60_000]),
    "what is longer when it is escaped": ("\0" * 9000 + "\U0001f642" * 9000, ["\0" * 9000 + "\U0001f642" * 9000]),
}


@parametrize("form", ["text", "json"])
@parametrize("output", SAID)
def test_log_has_the_ends_of_an_output_in_pieces_of_8_kib(output, form):
    text, wanted = SAID[output]
    log = Heard()
    log.json = form == "json"
    ng.Report("r-1", outcome=ng.Outcome("ok", stdout=text)).write(log, "r-1")
    *lines, report = log.lines
    assert "REPORT" in report and max([0, *(len(line.encode()) for line in lines)]) <= 8192
    said = []
    for line in lines:
        if form == "json":
            entry = json.loads(line)
            said.append(entry["message"])
            assert entry.get("requestId", "r-1") == "r-1"
        else:
            said.append(re.fullmatch(r"\S+ INFO \[r-1\] (.*)\n", line, re.DOTALL)[1])
    if form == "text":
        said = [line.removeprefix("stdout: ").replace("\\x00", "\0") for line in said]
    said = [line.removeprefix("[r-1] ") for line in said]
    assert said == wanted if len(wanted) != 1 else len(said) > 1 and "".join(said) == wanted[0]


# --------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------


def test_without_settings_it_names_the_demo_and_the_help(tmp_path):
    [line] = ended(Agent(cwd=tmp_path), 2).log.splitlines()
    assert re.search("ERROR application.yml:1: .*application.yml.example.* --demo .* --help", line)
    # The environment alone will do.
    log = ended(Agent("--check", cwd=tmp_path, env={"AGENT_SQS_QUEUEURL": "x"}), 2).log
    assert "agent.aws.region is missing" in log and "AGENT_SQS_QUEUEURL: " in log


def test_help_says_what_each_flag_is_for_and_its_default():
    text = ng.arguments().format_help()
    for action in ng.arguments()._actions:
        flag = action.option_strings[-1]
        assert action.help and flag in text
        assert flag in ("--help", "--version") or "(default: " in action.help, flag
    assert re.search(r"(?s)exit status: 0 done.* 1 could not go on.* 2 wrong usage", text)


def test_a_python_that_is_too_old_is_told_in_one_line_which_is_needed():
    """3.7 and older cannot read the file: what they print of it is the line that says so."""
    home = Path(os.environ.get("HOME") or "/nonexistent")
    old = sorted(home.glob(".pyenv/versions/3.[678].*/bin/python3"))
    if not old:
        pytest.skip("no Python older than 3.9 here")
    for python in old:
        ended = subprocess.run([python, MODULE, "--demo"], capture_output=True, text=True, timeout=180, check=False)
        assert ended.returncode == 1 and ended.stdout == "" and "Traceback" not in ended.stderr
        assert sum("NanoGrid needs Python 3.9 or newer" in line for line in ended.stderr.splitlines()) == 1
        assert len(ended.stderr.splitlines()) == (1 if "/3.8." in str(python) else 4)


def test_a_demo_that_is_stopped_lists_nothing_that_never_ran():
    with Agent("--demo", env={"AGENT_EXECUTION_CONCURRENCY": "1"}) as demo:
        demo.wait_for("stdout: Hello from NanoGrid")
        demo.send(signal.SIGINT)
        assert demo.end() == 0
    assert "a second signal stops at once" in demo.log
    ran = {each["functionId"] for each in reports(demo.log) if each["start"] != "-"}
    listed = set(re.findall(r"^(\S+-(?:python|cpp)) ", demo.out, re.MULTILINE))
    assert "hello-python" in listed and listed == ran, demo.out
    assert demo.out.endswith("The demo was stopped before its end.\n")


# --------------------------------------------------------------------------------------------
# README.md and docs/
# --------------------------------------------------------------------------------------------


REPOSITORY = Path(__file__).parent
PAGES = {page: page.read_text() for page in (REPOSITORY / "README.md", *sorted(REPOSITORY.glob("docs/*.md")))}
TEXT = "\n".join(PAGES.values())
UNIT = REPOSITORY / "nanogrid.service"

# The fenced blocks that stand behind a comment `<!-- test: NAME -->`, by name.
MARKED = re.findall(r"^<!-- test: ([^\n]+) -->\n```\w*\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
BLOCKS = dict(MARKED)
CLI = "".join(map(BLOCKS.get, ("cli queues", "cli bucket", "cli policy", "cli role")))  # in the page's order


def sh(script: str, cwd: Path, env=None, seconds=180, **options) -> subprocess.CompletedProcess:
    """Run lines of the pages in bash, with this Python as theirs; every line must succeed."""
    script = script.replace("python3 nanogrid.py", f"{shlex.quote(sys.executable)} {MODULE}")
    ended = subprocess.run(["bash", "-euc", script], cwd=cwd, env={**os.environ, **(env or {})},
                           capture_output=True, text=True, timeout=seconds, check=False, **options)
    assert ended.returncode == 0, f"{script}\n{ended.stdout}\n{ended.stderr}"
    return ended


def alike(text: str) -> str:
    """The text with every number, bar and run of blanks made the same."""
    return re.sub(r" +", " ", re.sub(r"\d+", "0", re.sub(r"\[#* *\]", "[]", text)))


# --- The text itself


def test_links_lead_to_files_and_headings():
    dead = []
    for page, text in PAGES.items():
        links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text)
        assert links
        for path, anchor in links:
            there = (page.parent / path).resolve() if path else page
            titles = re.findall(r"^#+ (.*)$", PAGES.get(there, ""), re.MULTILINE)
            anchors = [re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles]
            if not there.is_file() or anchor and anchor not in anchors:
                dead.append((page.name, path, anchor))
    assert dead == []


def test_every_command_is_run_by_a_test():
    """All but the line for the tests, which .ci/run runs, and the script's, which has its own tests."""
    found = re.findall(r"^(?:<!-- test: ([^\n]+) -->\n)?```sh\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    unnamed = {text.split()[0] for name, text in found if not name}
    assert len(found) >= 12 and unnamed == {"python3", "./setup_resources.sh"}, unnamed
    assert len(MARKED) == len(BLOCKS)  # no name twice
    tests = Path(__file__).read_text()
    assert [name for name in BLOCKS if f'"{name}"' not in tests and "total/" not in name] == []


def test_pages_are_short_and_so_are_their_lines():
    assert len(PAGES[REPOSITORY / "README.md"].splitlines()) <= 260
    assert not re.search("^(<<<<<<<|>>>>>>>)", TEXT, re.MULTILINE)  # of a merge
    prose = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    assert [line for line in prose.splitlines() if len(line) > 120 and line[0] != "|"] == []


def test_settings_that_it_names_exist():
    sections = "aws|sqs|s3|execution|output|metrics"
    named = set(re.findall(rf"`(?:agent\.)?((?:{sections})\.\w+)", TEXT))
    variables = set(re.findall(r"\bAGENT_\w+", TEXT))
    assert len(named) > 8 and len(variables) > 4
    assert named <= {row.path.removeprefix("agent.") for row in ng.SETTINGS}
    assert variables <= {row.variable for row in ng.SETTINGS}


def test_application_yml_example_has_every_setting_with_its_default_and_a_word_on_it(tmp_path):
    comments = [
        "  # AWS settings\n", "    region: ap-northeast-2  # Seoul region\n", "  # SQS settings\n",
        "    # ↑ put your real AWS account id in place of YOUR_ACCOUNT_ID\n    # e.g. 123456789012\n",
        "  # S3 settings\n", "    # ↑ put the name of the bucket that you created\n"]
    text = (REPOSITORY / "application.yml.example").read_text()
    for row in ng.SETTINGS:
        value = ng.parse_yaml(text)
        for key in row.path.split("."):
            value = value[key]  # a KeyError here: the setting is missing
        if row.field not in ng._REQUIRED:
            assert value == (None if callable(row.default) else [] if row.default == () else row.default)
        key = row.path.rpartition(".")[2]
        if row.kind != "command":  # the section's comment is for its four keys
            assert re.search(rf"^ *#.*\n *{key}:|^ *{key}:.* #|^ *{key}:.*\n *# ↑", text, re.MULTILINE), row.path
    assert [line for line in comments if line not in text] == []
    [problem] = problems(tmp_path, text)  # but for the account's id it loads
    assert "still holds YOUR_ACCOUNT_ID" in problem
    settings, warnings = load(tmp_path, text.replace("queueUrl: https://sqs.ap-northeast-2.amazonaws.com/"
                                                     "YOUR_ACCOUNT_ID", f"queueUrl: {QUEUE.rpartition('/')[0]}"))
    assert settings == load(tmp_path, GUIDE)[0] and not warnings


# --- Commands that need no AWS


def test_demo_prints_what_is_shown(tmp_path):
    ended = sh(BLOCKS["demo"], tmp_path)
    lines = [alike(line) for line in (ended.stderr + ended.stdout).splitlines()]
    assert not [line for line in lines if "/tmp" in line and " isolation: " not in line], "its files, which are gone"
    has_compiler = any(map(shutil.which, ng.RUNTIMES["cpp"].programs))
    for shown in BLOCKS["demo output"].splitlines():
        if not has_compiler and re.search(r"cpp|C\+\+", shown):
            continue
        pattern = ".*".join(re.escape(alike(part)) for part in shown.split("…"))
        assert any(re.fullmatch(pattern, line) for line in lines), (shown, lines)


@parametrize("runtime, source, program", [
    ("python", "main.py", "python3"), ("cpp", "main.cpp", "g++"),
    ("nodejs", "index.js", "node"), ("go", "main.go", "go")])
def test_function_of_each_runtime(tmp_path, runtime, source, program):
    need(program)
    (tmp_path / "total").mkdir()
    (tmp_path / "total" / source).write_text(BLOCKS[f"total/{source}"])
    ended = sh(BLOCKS["invoke"].replace("--runtime python", f"--runtime {runtime}"), tmp_path,
               {"AGENT_EXECUTION_DEFAULTTIMEOUTMS": "60000"})
    assert ended.stdout == "total 7\n"
    assert reports(ended.stderr)[0]["status"] == "ok"


def test_message_and_result_have_these_fields(folder):
    shown = {**json.loads(BLOCKS["result"]), "timeoutMs": 60000}  # a busy machine needs longer
    message = {**json.loads(BLOCKS["message"]), "requestId": shown["requestId"],
               "functionId": shown["functionId"], "timeoutMs": 60000}
    request_id = folder.put({"main.py": BLOCKS["total/main.py"]}, request_id=shown["requestId"],
                            **message)
    sh(BLOCKS["environment"].replace("DIR", shlex.quote(str(folder.path))), folder.path)
    result = folder.result(request_id)
    assert list(result) == list(shown)
    differ = {"durationMillis", "peakMemoryBytes", "startedAt", "finishedAt", "recommendedMemoryMb",
              "optimizationTip"}
    assert {k: result[k] for k in result if k not in differ} == {
        k: shown[k] for k in shown if k not in differ}
    assert alike(result["optimizationTip"]) == alike(shown["optimizationTip"])


def test_a_task_of_your_own_from_a_folder(tmp_path):
    (tmp_path / "total").mkdir()
    (tmp_path / "total" / "main.py").write_text(BLOCKS["total/main.py"])
    said = sh(BLOCKS["local"], tmp_path).stdout
    assert '"status": "ok"' in said and said.endswith("2")  # count.txt


# --- Commands for the machine


def tools(folder: Path, **scripts: str) -> dict[str, str]:
    """Shell scripts in `folder` that stand in for programs; the PATH that has them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def host_tools(folder: Path, host: Path) -> dict[str, str]:
    """Stand-ins for what reaches the host, which is a folder, and for what root does there."""
    return tools(folder, scp=f'[ "${{!#}}" = ec2-user@HOST: ] && cp "${{@:1:$#-1}}" {host}',
                 ssh=f'[ "$1" = ec2-user@HOST ] && cd {host} && exec bash -euc "$2"',
                 sudo='exec "$@"', systemctl=f'echo "$*" >>{host}/systemctl')


@pytest.mark.slow
def test_three_commands_install_it(tmp_path):
    """pip on the host only lists."""
    here, host = tmp_path / "here", tmp_path / "host"
    here.mkdir()
    (host / "units").mkdir(parents=True)
    shutil.copy(MODULE, here)
    shutil.copy(UNIT, here)
    (here / "application.yml").write_text("agent:\n")
    commands = BLOCKS["install"].replace("install boto3", "list")
    for there, in_host in (("/opt/nanogrid", "opt"), ("/etc/systemd/system", "units")):
        commands = commands.replace(there, str(host / in_host))
    for _ in range(2):  # a new version comes the same way
        sh(commands, here, host_tools(tmp_path / "bin", host))
    assert (host / "systemctl").read_text().split("\n")[:3] == [
        "daemon-reload", "enable nanogrid", "restart nanogrid"]
    assert (host / "units" / "nanogrid.service").read_text() == UNIT.read_text()
    assert sh(f"{host}/opt/venv/bin/python {host}/opt/nanogrid.py --version", tmp_path).stdout


def verify(*units: Path):
    """Have systemd read unit files; a template as its first instance."""
    need("systemd-analyze")
    names = [str(unit).replace("@", "@1") for unit in units]
    ended = subprocess.run(["systemd-analyze", "verify", *names], capture_output=True, text=True, timeout=180, check=False)
    assert ended.returncode == 0 and units[0].name.partition(".")[0] not in ended.stdout + ended.stderr, ended.stderr


@parametrize("agents", [1, 4])
def test_unit_is_one_that_systemd_takes(tmp_path, agents):
    """As it stands, and as the template that the command for several makes of it."""
    unit = tmp_path / "nanogrid.service"
    unit.write_text(UNIT.read_text().replace("/opt/nanogrid/venv/bin/python", sys.executable))
    if agents > 1:
        sh(BLOCKS["template"].replace("/etc/systemd/system", str(tmp_path)), tmp_path,
           host_tools(tmp_path / "bin", tmp_path))
        names = " ".join(f"nanogrid@{number}" for number in range(1, agents + 1))
        assert (tmp_path / "systemctl").read_text().splitlines() == [
            "disable --now nanogrid", "daemon-reload", f"enable {names}", f"restart {names}"]
        unit = tmp_path / "nanogrid@.service"
        assert f"\nEnvironment=NANOGRID_AGENTS={agents}\n" in unit.read_text()
    verify(unit)


def test_timer_is_one_that_systemd_takes_and_starts_the_cron_lines_command(tmp_path):
    sh(BLOCKS["timer"].replace("/etc/systemd/system", str(tmp_path)), tmp_path)
    service, timer = (tmp_path / f"nanogrid-drain.{kind}" for kind in ("service", "timer"))
    command = re.search("^ExecStart=(.*)$", service.read_text(), re.MULTILINE)[1]
    assert f" {command} >>" in BLOCKS["cron"] and re.search("AGENT_TASKBASEDIR=/var/lib", service.read_text())
    service.write_text(service.read_text().replace("/opt/nanogrid/venv/bin/python", sys.executable))
    verify(service, timer)


def test_the_cloudwatch_agent_reads_the_log_that_is_written():
    [file] = json.loads(BLOCKS["logs.json"])["logs"]["logs_collected"]["files"]["collect_list"]
    assert f">>{file['file_path']} " in BLOCKS["cron"] and f"append:{file['file_path']}`" in TEXT


def test_unit_waits_for_longer_than_a_shutdown_takes():
    seconds = int(re.search(r"^TimeoutStopSec=(\d+)$", UNIT.read_text(), re.MULTILINE)[1])
    settings = ng.Settings()
    assert seconds > settings.shutdown_grace_seconds + settings.wait_time_seconds


def test_rules_that_close_the_instance_metadata_to_a_user(tmp_path):
    need("nft", "unshare")
    if not works("unshare", "-n"):
        pytest.skip("a network namespace of its own needs root")
    twice = BLOCKS["nft"] * 2 + "nft list ruleset"  # run at every start of the agent
    rules = sh(f"unshare -n bash -euc {shlex.quote(twice)}", tmp_path).stdout
    assert rules.count("meta skuid") == 2 and "169.254.169.254" in rules and "fd00:ec2::254" in rules


# --- Commands for AWS


def typed(account: Account, script: str, **env) -> str:
    """What lines of the pages print. Version 1 of the CLI passes over AWS_ENDPOINT_URL for SQS."""
    cli = tools(account.path / "bin", aws=f'exec {shutil.which("aws")} --endpoint-url {account.url} "$@"')
    return sh(script, account.path, {**AWS_ENV, "AWS_ENDPOINT_URL": account.url, "AWS_PAGER": "", **cli, **env}).stdout


@pytest.mark.slow
def test_the_cli_makes_what_the_script_makes_and_the_cron_line_serves_it(account, tmp_path):
    need("flock")
    shutil.copy(REPOSITORY / "application.yml.example", tmp_path)
    typed(account, CLI + BLOCKS["send"])
    account.check_set()
    [instance] = account.ec2.run_instances(ImageId="ami-12c6146b", MinCount=1, MaxCount=1)["Instances"]
    typed(account, BLOCKS["profile"], INSTANCE=instance["InstanceId"])
    [association] = account.ec2.describe_iam_instance_profile_associations()["IamInstanceProfileAssociations"]
    assert association["InstanceId"] == instance["InstanceId"]
    command = BLOCKS["cron"].split(" ", 6)[6]
    with scratch() as place:
        for there, here in (("/var/lib/nanogrid", str(place)), ("/run/", f"{tmp_path}/"), ("/var/log/", f"{tmp_path}/"),
                            ("/opt/nanogrid/venv/bin/python", sys.executable),
                            ("/opt/nanogrid/nanogrid.py", str(MODULE)), ("/opt/nanogrid/", f"{tmp_path}/")):
            command = command.replace(there, here)
        typed(account, command, AGENT_SQS_WAITTIMESECONDS="1")
    log = (tmp_path / "nanogrid.log").read_text()
    assert "[test-001] stdout: Result: 42" in log and "Successfully published 1 value" in log
    assert reports(log)[0]["status"] == "ok"


@pytest.mark.slow
def test_the_readme_from_a_function_of_your_own_to_its_results(tmp_path):
    """Its blocks in their order, in one shell, with the packages that are here in place of pip's."""
    need("aws")
    for name in ("application.yml.example", "setup_resources.sh", "nanogrid.py"):
        shutil.copy(REPOSITORY / name, tmp_path)
    (tmp_path / "total").mkdir()
    for name in ("total/main.py", "send.py", "read.py"):
        (tmp_path / name).write_text(BLOCKS[name])
    tools(tmp_path / ".venv" / "bin", pip="exit 0", python=f'exec {sys.executable} "$@"',
          moto_server=f'exec {sys.executable} -m moto.server "$@"')
    port = str(free_port())
    check, start = (line.partition("  #")[0] for line in BLOCKS["agent"].splitlines())
    lines = ["trap 'kill $(jobs -p)' EXIT", BLOCKS["local"],
             BLOCKS["boto3"].replace("python3 -m venv .venv", "true"), BLOCKS["emulator"].replace("5000", port),
             f"until curl -s 127.0.0.1:{port} >curl; do sleep 0.1; done",
             "./setup_resources.sh", "./setup_resources.sh --test-message",
             f"{check} || true",  # it looks for the instance metadata, too
             f"{start} --drain", """url=$(sed -n 's/^ *queueUrl: //p' application.yml | head -n 1)""",
             "bucket=$(sed -n 's/^ *codeBucket: //p' application.yml)", "./setup_resources.sh --output-queue results",
             ".venv/bin/python send.py $url $bucket", f"{start} --drain", ".venv/bin/python read.py ${url%/*}/results"]
    said = sh("\n".join(lines), tmp_path, {"AGENT_SQS_WAITTIMESECONDS": "1", "AGENT_TASKBASEDIR": str(tmp_path / "task"),
                                           "AGENT_EXECUTION_CONCURRENCY": "1"}, seconds=600)
    assert "test-001 is sent" in said.stdout and "ok    queue: " in said.stdout
    assert "stdout: Result: 42" in said.stderr and "Successfully published 3 values to CloudWatch" in said.stderr
    for number in range(3):
        assert re.search(rf"^total-{number} ok total {number + 4} \d+$", said.stdout, re.MULTILINE), said.stdout


@pytest.mark.slow
def test_what_triggers_a_task_sends_one(account, tmp_path):
    """The lines are run; what the emulator stores and does not deliver is filled in as AWS does it."""
    need("jq")
    url = account.sqs.create_queue(QueueName="nanogrid-task-queue")["QueueUrl"]
    for bucket in ("code-bucket", "pictures", "results"):
        typed(account, f"aws s3 mb s3://{bucket}")
    topic = client_of(account.url, "sns").create_topic(Name="orders")["TopicArn"]
    (tmp_path / "function.zip").write_bytes(make_zip({"lambda_function.py": ""}))
    settings = ng.Settings(code_bucket="code-bucket")
    env = {"QUEUE_URL": url, "QUEUE_ARN": "arn:aws:sqs:ap-northeast-2:123456789012:nanogrid-task-queue",
           "ACCOUNT_ID": "123456789012", "ROLE_ARN": "arn:aws:iam::123456789012:role/sender",
           "TOPIC_ARN": topic, "OUTPUT_BUCKET": "results"}

    def received() -> ng.Task:
        message, = account.sqs.receive_message(QueueUrl=url)["Messages"]
        account.sqs.delete_message(QueueUrl=url, ReceiptHandle=message["ReceiptHandle"])
        return ng.parse_task(message["Body"], settings)

    typed(account, BLOCKS["queue policy"], **env)
    typed(account, BLOCKS["lambda"], BUCKET="code-bucket")
    task = received()
    assert (task.handler, task.env, task.input) == (
        "lambda_function.lambda_handler", {"TABLE": "orders"}, b'{"order": 7}')
    typed(account, BLOCKS["topic"], **env)
    assert received().request_id == "shop-2"
    typed(account, BLOCKS["schedule"], **env)
    target = client_of(account.url, "scheduler").get_schedule(Name="shop-nightly")["Target"]
    body = target["Input"].replace("<aws.scheduler.execution-id>", "d32c5kddcf5bb8c3").replace(
        "<aws.scheduler.scheduled-time>", "2026-11-28T03:00:00Z")
    assert target["Arn"] == env["QUEUE_ARN"]
    assert ng.parse_task(body, settings).input == b'{"time": "2026-11-28T03:00:00Z"}'
    typed(account, BLOCKS["upload"], **env)
    target, = client_of(account.url, "events").list_targets_by_rule(Rule="thumbnails")["Targets"]
    change = target["InputTransformer"]
    event = {"id": "17793124-05d4-b198-2fde-7ededc63b103",
             "detail": {"bucket": {"name": "pictures"}, "object": {"key": "a/cat 1.png"}}}
    body = change["InputTemplate"]
    for name, path in change["InputPathsMap"].items():
        value = functools.reduce(lambda part, step: part[step], path.split(".")[1:], event)
        body = body.replace(f"<{name}>", json.dumps(value))
    task = ng.parse_task(body, settings)
    assert (task.request_id, json.loads(task.input)["Records"][0]["s3"]["object"]["key"]) == (
        event["id"], "a/cat 1.png")
    result = {"status": "ok", "returnValue": [1], "stdout": ""}
    account.s3.put_object(Bucket="results", Key="outputs/shop-1/result.json", Body=json.dumps(result))
    assert json.loads(typed(account, BLOCKS["returned"], **env)) == {"status": "ok", "returnValue": [1]}


@parametrize("block", ["script", "fleet"])
def test_setup_takes_the_flags_that_the_page_shows(tmp_path, block):
    """A CLI that refuses all stands in; what the flags make has its own tests."""
    shutil.copy(SETUP, tmp_path)
    env = {**os.environ, **tools(tmp_path / "bin", aws="exit 254")}
    for line in BLOCKS[block].splitlines():
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=env, capture_output=True, text=True,
                              timeout=180, check=False)
        assert done.returncode == 1 and "failed at: credentials" in done.stderr, done.stderr
