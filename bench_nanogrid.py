#!/usr/bin/env python3
"""Measures nanogrid.py from outside, every figure beside what it is to be compared with.

    python3 bench_nanogrid.py [--quick] [--only NAME ...] [--json FILE] [--runs N]

A time says more about the machine than about the program, so each row is the ratio of two things
that were measured one after the other in this run. A row whose tools are not here (g++,
ministack, boto3) says so. The exit status is 0 whatever the figures are.

  jobs a second   of a busy agent with two slots whose queue is kept as deep as it was, against
                  `xargs -P2` before and after. Two halves, of 10 s each in the full form, must
                  agree within 15 %, else it goes on; the last half counts. The agent never rests,
                  for a file system that removes files all the time is the normal case.
  CPU a job       the agent's whole process tree in that half, against the same xargs; and the
                  agent's own process alone, which bounds how many jobs one agent can feed
  latency         from the rename of a task into an idle agent's queue/ to the function's first
                  statement, against a bare start of the same file up to that statement
  depth           a job's cost at a deep queue, against the mean of a shallow one before and after
  idle            PSS and CPU time of the whole process tree while it long-polls

`--runs 3` does all of it three times in a row and ends with the README's table of the worst and
the best. Both sides run functions on one interpreter: this one where every user can reach it, else
/usr/bin/python3. NANOGRID in the environment names another nanogrid.py than the one beside.
"""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import importlib.util
import io
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import socket
import socketserver
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

MODULE = Path(os.environ.get("NANOGRID") or Path(__file__).resolve().with_name("nanogrid.py"))
SLOTS = 2
REGION = "ap-northeast-2"
MIB = 1 << 20
PR_SET_CHILD_SUBREAPER = 36     # prctl(2)

MOST_HALVES = 8
AGREEMENT = 0.15                # of two halves

FULL = SimpleNamespace(half_s=10, bare_jobs=1000, latencies=200, packages=20, starts=9, idle_s=10,
                       deep=100_000, depth_s=4, peaks=3)
QUICK = SimpleNamespace(half_s=1, bare_jobs=80, latencies=30, packages=4, starts=5, idle_s=2,
                        deep=3_000, depth_s=1, peaks=1)

TWO_PRINTS = 'print("Hello from NanoGrid!")\nprint("Result: 42")\n'
CLOCK_FIRST = "import time\nprint(time.clock_gettime_ns(time.CLOCK_MONOTONIC))\n"
CPP_HELLO = '#include <iostream>\nint main() { std::cout << "Hello\\nResult: 42\\n"; }\n'
CPP_PEAK = """#include <fstream>
#include <iostream>
#include <string>
int main() {
    std::ifstream status("/proc/self/status");
    for (std::string line; std::getline(status, line);)
        if (line.rfind("VmHWM:", 0) == 0) std::cout << line << std::endl;
}
"""
PYTHON_PEAK = """touched = b"x" * (%d << 20)
with open("/proc/self/status") as status:
    print([line for line in status if line.startswith("VmHWM:")][0])
"""
OWN_TIME = """import time
began = time.monotonic()
time.sleep(0.05)
print((time.monotonic() - began) * 1e3)
"""
BARE_BOTO3 = """import sys, boto3
clients = [boto3.client(name) for name in ("sqs", "s3", "cloudwatch")]
clients[0].receive_message(QueueUrl=sys.argv[1], WaitTimeSeconds=20)
"""
LINE = "{:<43} {:>12}  {:<35} {:>7} {:<12} {:<6} {}"


class Unmeasured(Exception):
    """A figure cannot be had here; the text says why."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; `bound` is what the ratio is to reach, None for information only."""
    figure: str
    measured: str = ""
    against: str = ""
    ratio: float | None = None
    bound: float | None = None
    at_least: bool = False
    note: str = ""

    def target(self) -> str:
        least_or_most = "at least" if self.at_least else "at most"
        return "" if self.bound is None else f"{least_or_most} {self.bound:g}"

    def verdict(self) -> str:
        if self.ratio is None or self.bound is None:
            return "-"
        met = self.ratio >= self.bound if self.at_least else self.ratio <= self.bound
        return "met" if met else "MISSED"

    def as_text(self) -> str:
        ratio = "-" if self.ratio is None else f"{self.ratio:.2f}"
        return LINE.format(self.figure, self.measured, self.against, ratio, self.target(),
                           self.verdict(), self.note).rstrip()

    def as_json(self) -> str:
        return json.dumps({**dataclasses.asdict(self), "verdict": self.verdict()})


# --- processes ----------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a job: wall time, CPU time with all that it starts, that of the agents' own processes."""
    wall_s: float
    cpu_s: float
    own_s: float = 0.0


def until(condition, seconds: float, what: str, pause_s: float = 0.001):
    """The first true value of condition(); Unmeasured when `seconds` pass without one."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise Unmeasured(f"{what} did not come within {seconds:g} s")
        time.sleep(pause_s)
    return value


def stat_fields(pid: int) -> list[str]:
    """/proc/PID/stat from its third field on: [0] the state, [1] the parent (proc(5))."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def process_tree(root: int) -> set[int]:
    """The pids of `root` and of its descendants that are alive now."""
    parents = {}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError, IndexError):
            state, parent = stat_fields(pid)[:2]
            if state != "Z":
                parents[pid] = int(parent)
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def own_cpu_s(pid: int) -> float:
    """CPU seconds of a process, by the clock id that clock_getcpuclockid(3) makes of its pid."""
    return time.clock_gettime((~pid << 3) | 2)


def tree_cpu_s(root: int) -> float:
    """CPU seconds of a live tree: its processes to the nanosecond, the children they waited for
    to the clock tick."""
    total = 0.0
    for pid in process_tree(root):
        with contextlib.suppress(OSError, IndexError):
            total += own_cpu_s(pid)
            total += sum(map(int, stat_fields(pid)[13:15])) / os.sysconf("SC_CLK_TCK")
    return total


def tree_pss_bytes(root: int) -> int:
    """Proportional set size of a live tree: a shared page is split among those who share it."""
    rollups = (Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in process_tree(root))
    return sum(int(re.search(r"\nPss:\s+(\d+) kB", text)[1]) * 1024 for text in rollups)


def settled_pss_bytes(root: int) -> int:
    """PSS of a live tree once it is steady: two looks, half a second apart, agree to 1 %."""
    looks = [0, tree_pss_bytes(root)]
    while abs(looks[-1] - looks[-2]) > looks[-1] / 100:
        time.sleep(0.5)
        looks.append(tree_pss_bytes(root))
    return looks[-1]


def cpu_percent(root: int, seconds: float) -> float:
    before, start = tree_cpu_s(root), time.monotonic()
    time.sleep(seconds)
    return 100 * (tree_cpu_s(root) - before) / (time.monotonic() - start)


def reap_orphans(known: set[int]):
    """Wait for what an ended agent left behind: its CPU counts once it is reaped, here."""
    def gone():
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        return process_tree(os.getpid()) <= known
    until(gone, 20, "the end of the agent's last process", 0.005)


# --- AWS: an emulator, and a proxy that counts --------------------------------------------------

class Front(socketserver.ThreadingTCPServer):
    """Passes connections on to a port of this machine, and notes each request."""
    daemon_threads = True

    def __init__(self, upstream: int):
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self.upstream = ("127.0.0.1", upstream)
        self.requests: list[list] = []      # [what was sent, time.monotonic() when it came]
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def finish_request(self, client: socket.socket, _address):
        with client, socket.create_connection(self.upstream) as server:
            for each in (client, server):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            request: list = []
            while True:
                for source in select.select([client, server], [], [])[0]:
                    if not (content := source.recv(1 << 16)):
                        return
                    if source is client and re.match(rb"[A-Z]+ \S+ HTTP/", content):
                        self.requests.append(request := [b"", time.monotonic()])
                    if source is client:
                        request[0] += content
                    (server if source is client else client).sendall(content)

    def handle_error(self, *_):
        """Says nothing: a process that is stopped resets its connections."""

    def operations(self) -> list[tuple[str, float]]:
        """Each request's operation, in any of AWS's protocols, and when it came."""
        marks = rb"(?i)\nX-Amz-Target: *\w+\.(\w+)|/operation/(\w+)|\bAction=(\w+)"
        return [((found[found.lastindex] if (found := re.search(marks, text))
                  else b"S3 " + text.split()[0]).decode(), at) for text, at in self.requests[:]]

    def first_poll(self) -> float | None:
        return next((at for name, at in self.operations() if name == "ReceiveMessage"), None)


class Emulator:
    """A ministack that lives as long as the bench, with the bucket `bench`."""

    def __init__(self, bench: Bench):
        for module in ("boto3", "ministack"):
            if not importlib.util.find_spec(module):
                raise Unmeasured(f"{module} is not installed for this Python")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.bench, self.url = bench, f"http://127.0.0.1:{self.port}"
        environment = {"GATEWAY_PORT": str(self.port), "LOG_LEVEL": "ERROR",
                       "TMPDIR": str(bench.path)}
        process = subprocess.Popen(
            [sys.executable, "-m", "ministack"], env={**os.environ, **environment},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        bench.stack.callback(process.wait)
        bench.stack.callback(process.kill)

        def answers():
            with socket.socket() as connection:
                return not connection.connect_ex(("127.0.0.1", self.port))
        until(answers, 60, "ministack", 0.05)
        bench.known |= process_tree(process.pid)
        self.sqs, self.s3 = self.client("sqs"), self.client("s3")
        self.s3.create_bucket(Bucket="bench",
                              CreateBucketConfiguration={"LocationConstraint": REGION})
        self.front = Front(self.port)
        bench.stack.callback(self.front.shutdown)

    def client(self, service: str):
        import boto3
        return boto3.client(service, region_name=REGION, endpoint_url=self.url,
                            aws_access_key_id="bench", aws_secret_access_key="bench")


class Queue:
    """A new queue of the emulator's; the code of its functions is in the bucket."""

    def __init__(self, emulator: Emulator, functions: int = 1):
        self.sqs, self.bench, self.functions = emulator.sqs, emulator.bench, functions
        self.unsent: list[dict] = []
        for number in range(functions):
            emulator.s3.put_object(Bucket="bench", Key=f"f{number}.zip",
                                   Body=make_zip({"main.py": TWO_PRINTS}))
        self.url = self.sqs.create_queue(QueueName=f"q{time.monotonic_ns()}",
                                         Attributes={"VisibilityTimeout": "120"})["QueueUrl"]

    def put(self, numbers):
        """Add messages by their numbers, each ten of them at once."""
        self.unsent += [{"Id": str(n), "MessageBody": json.dumps(task(n, f"f{n % self.functions}"))}
                        for n in numbers]
        while len(self.unsent) >= 10:
            self.sqs.send_message_batch(QueueUrl=self.url, Entries=self.unsent[:10])
            del self.unsent[:10]

    def left(self) -> int:
        """How many messages it holds."""
        found = self.sqs.get_queue_attributes(QueueUrl=self.url, AttributeNames=["All"])
        return sum(int(found["Attributes"][f"ApproximateNumberOfMessages{which}"])
                   for which in ("", "NotVisible"))

    def agent(self, wait_s: int = 1) -> list:
        """The command of an agent that serves it."""
        text = (f"agent:\n  aws:\n    region: {REGION}\n  sqs:\n    queueUrl: {self.url}\n"
                f"    waitTimeSeconds: {wait_s}\n  s3:\n    codeBucket: bench\n")
        folder = self.bench.directory({"application.yml": text})
        return [MODULE, "--config", folder / "application.yml"]


# --- what all figures share ---------------------------------------------------------------------

def make_zip(files: dict) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            member = zipfile.ZipInfo(name)
            member.external_attr = 0o100755 << 16
            archive.writestr(member, content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def task(number: int, function: str = "f0", runtime: str = "python", memory_mb: int = 128):
    return {"requestId": f"r{number:06d}", "functionId": function, "runtime": runtime,
            "s3Key": f"{function}.zip", "timeoutMs": 60000, "memoryMb": memory_mb}


def common_python() -> str:
    """An interpreter that every user can start: under root, functions run as another one."""
    own = Path(sys.executable).resolve()
    everybody = all(folder.stat().st_mode & 0o001 for folder in own.parents)
    return str(own) if everybody or os.getuid() else "/usr/bin/python3"


class Folder:
    """A directory for --local."""

    def __init__(self, path: Path, archive: bytes, runtime: str = "python", functions: int = 1):
        self.path, self.runtime, self.functions = path, runtime, functions
        (path / "queue").mkdir()
        (path / "code").mkdir()
        for number in range(functions):
            self.code(archive, f"f{number}")

    def code(self, archive: bytes, function: str):
        (self.path / "code" / f"{function}.zip").write_bytes(archive)

    def agent(self) -> list:
        """The command of an agent that serves it."""
        return [MODULE, "--local", self.path]

    def put(self, numbers):
        """Add tasks by their numbers."""
        for number in numbers:
            self.hand_over(task(number, f"f{number % self.functions}", self.runtime))

    def hand_over(self, body: dict) -> int:
        """Rename a task into the queue; CLOCK_MONOTONIC in ns just before."""
        spare, name = f"{self.path}/spare", f"{body['requestId']}.json"
        with open(spare, "w") as file:
            json.dump(body, file)
        at = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        os.rename(spare, f"{self.path}/queue/{name}")
        return at

    def result(self, body: dict, agent=None) -> dict:
        """A task's result, waited for; Unmeasured when its run was not ok, or the agent ended."""
        path = self.path / "results" / body["requestId"] / "result.json"
        until(lambda: path.exists() or (agent and agent.reports() < 0), 60, "result.json", 0.0003)
        found = json.loads(path.read_text())
        if found["status"] != "ok":
            raise Unmeasured(f"a run ended as {found['status']}: {found['stderr'][-200:]}")
        return found


class Bench:
    """How much to run, where, with what environment; what is to be stopped at the end."""

    def __init__(self, size: SimpleNamespace, stack: contextlib.ExitStack):
        self.size, self.stack, self.python = size, stack, common_python()
        self.path = Path(tempfile.mkdtemp(prefix="bench-nanogrid-"))
        self.path.chmod(0o755)      # functions run as other users
        stack.callback(shutil.rmtree, self.path, ignore_errors=True)
        self.known = {os.getpid()}  # processes that outlive a figure
        self.serving: set[int] = set()
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("AGENT_", "AWS_"))}
        self.env = {**kept, "AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench",
                    "AWS_DEFAULT_REGION": REGION, "AWS_EC2_METADATA_DISABLED": "true",
                    "AGENT_EXECUTION_CONCURRENCY": str(SLOTS), "AGENT_RUNTIMES_PYTHON": self.python,
                    "AGENT_TASKBASEDIR": str(self.path / "task")}

    def directory(self, files: dict | None = None) -> Path:
        """A new directory with these files in it."""
        path = Path(tempfile.mkdtemp(dir=self.path))
        path.chmod(0o755)
        for name, content in (files or {}).items():
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def folder(self, archive: bytes, *of) -> Folder:
        return Folder(self.directory(), archive, *of)

    def two_prints(self) -> Path:
        return self.directory({"main.py": TWO_PRINTS}) / "main.py"

    def compiled(self, source: str) -> Path:
        if not shutil.which("g++"):
            raise Unmeasured("no g++ here")
        path = self.directory({"main.cpp": source})
        subprocess.run(["g++", "-O2", "-o", "main", "main.cpp"], cwd=path, check=True)
        return path / "main"

    @functools.cached_property
    def emulator(self) -> Emulator:
        return Emulator(self)

    def xargs(self, command: list) -> Cost:
        """What one of `bare_jobs` bare runs costs, SLOTS at once."""
        def cpu_s():
            usage = resource.getrusage(resource.RUSAGE_CHILDREN)
            return usage.ru_utime + usage.ru_stime
        jobs, before, start = self.size.bare_jobs, cpu_s(), time.monotonic()
        subprocess.run(["xargs", f"-P{SLOTS}", "-n1", *command], check=True, env=self.env,
                       input=b"1\n" * jobs, stdout=subprocess.DEVNULL)
        return Cost((time.monotonic() - start) / jobs, (cpu_s() - before) / jobs)


@contextlib.contextmanager
def running(bench: Bench, command: list, **environment):
    """A process that serves until the block ends; .reports() counts the runs in its log."""
    log = bench.directory() / "log"
    with open(log, "wb") as output, open(log, "rb") as reader:
        process = subprocess.Popen([sys.executable, *command], stdin=subprocess.DEVNULL,
                                   stdout=output, stderr=output, env={**bench.env, **environment})
        count, tail = 0, b""

        def reports() -> int:
            """How many runs there were; Unmeasured when one was not ok, or the agent ended."""
            nonlocal count, tail
            if process.poll() is not None:
                raise Unmeasured(f"the agent ended by itself: {log.read_text()[-300:]}")
            *lines, tail = (tail + reader.read()).split(b"\n")
            for line in lines:
                if b" REPORT " in line and b" status=ok " not in line:
                    raise Unmeasured(f"a run was not ok: {line.decode(errors='replace')}")
                count += b" REPORT " in line
            return count
        process.reports = reports
        bench.serving.add(process.pid)
        try:
            yield process
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
            process.wait()
            bench.serving.discard(process.pid)
            if not bench.serving:
                reap_orphans(bench.known)


# --- jobs a second, and the CPU of a job --------------------------------------------------------

class Feed:
    """Keeps the queue of some agents as deep as it was at first."""

    def __init__(self, queue, depth: int):
        self.queue, self.depth, self.given, self.agents = queue, depth, 0, []

    def top_up(self) -> int:
        """How many runs there were, after as many tasks were added."""
        done = sum(agent.reports() for agent in self.agents)
        self.queue.put(range(self.given, done + self.depth))
        self.given = done + self.depth
        return done

    def until(self, condition, seconds: float) -> tuple:
        """When condition(runs) is true: runs, the time, CPU seconds of the agents with all that
        they started, and their own."""
        until(lambda: condition(self.top_up()), seconds, "as many runs", 0.003)
        pids = [agent.pid for agent in self.agents]
        return (self.top_up(), time.monotonic(), sum(map(tree_cpu_s, pids)),
                sum(map(own_cpu_s, pids)))


def halves(bench: Bench, queues: list, seconds: float, depth: int = 200, warm_up: int = 200,
           **environment) -> tuple[Cost, Cost]:
    """What a job costs agents that are busy all the time, in two stretches of `seconds` that
    follow one another: the first two that agree in the rate, else the last two of MOST_HALVES."""
    costs, feed = [], Feed(queues[0], depth)
    with contextlib.ExitStack() as stack:
        feed.top_up()
        feed.agents += [stack.enter_context(running(bench, queue.agent(), **environment))
                        for queue in queues]
        before = feed.until(lambda runs: runs >= warm_up, 120)
        while len(costs) < 2 or len(costs) < MOST_HALVES and not agree(*costs[-2:]):
            end = before[1] + seconds
            after = feed.until(lambda _, end=end: time.monotonic() >= end, 2 * seconds)
            jobs = max(1, after[0] - before[0])
            costs.append(Cost(*((after[what] - before[what]) / jobs for what in (1, 2, 3))))
            before = after
    return costs[-2], costs[-1]


def agree(first: Cost, second: Cost) -> bool:
    return abs(first.wall_s / second.wall_s - 1) <= AGREEMENT


def rate_rows(bench: Bench, how: str, command: list, bound: float, measure, cpu_bound=None):
    """What the halves that measure() returns say, beside bare runs before and after them."""
    before, (first, agent), after = bench.xargs(command), measure(), bench.xargs(command)
    wall_s, cpu_s = (before.wall_s + after.wall_s) / 2, (before.cpu_s + after.cpu_s) / 2
    yield Row(f"{how}, jobs/s", f"{1 / agent.wall_s:.0f}/s",
              f"xargs -P{SLOTS} {' '.join(Path(one).name for one in command)}: {1 / wall_s:.0f}/s",
              wall_s / agent.wall_s, bound, at_least=True,
              note=f"halves {1 / first.wall_s:.0f}/s, {1 / agent.wall_s:.0f}/s"
              + ("" if agree(first, agent) else ": NOT STEADY"))
    yield Row(f"{how}, CPU above a bare run's", f"{(agent.cpu_s - cpu_s) * 1e3:+.2f} ms",
              f"bare run: {cpu_s * 1e3:.2f} ms", (agent.cpu_s - cpu_s) / cpu_s, cpu_bound,
              note=f"{agent.cpu_s * 1e3:.2f} ms in all")
    # Its threads share one interpreter, which bounds what one agent can feed.
    yield Row(f"{how}, agent's own CPU, ms", f"{agent.own_s * 1e3:.2f} ms",
              f"a core: {1 / agent.own_s:,.0f} jobs/s", agent.own_s * 1e3)


def folder_halves(bench: Bench, main: Path, runtime: str, agents: int = 1) -> tuple[Cost, Cost]:
    """The halves of agents that share the slots and one folder."""
    folder = bench.folder(make_zip({main.name: main.read_bytes()}), runtime)
    return halves(bench, [folder] * agents, bench.size.half_s,
                  AGENT_EXECUTION_CONCURRENCY=str(SLOTS // agents))


def python_local(bench: Bench):
    main = bench.two_prints()
    yield from rate_rows(bench, "python --local", [bench.python, main], 3.0,
                         lambda: folder_halves(bench, main, "python"), 0.5)


def cpp_local(bench: Bench):
    main = bench.compiled(CPP_HELLO)
    yield from rate_rows(bench, "cpp --local", [main], 0.3,
                         lambda: folder_halves(bench, main, "cpp"))


def agents(bench: Bench):
    main = bench.two_prints()
    one, two, after = (folder_halves(bench, main, "python", count)[1].wall_s
                       for count in (1, SLOTS, 1))
    base = (one + after) / 2
    yield Row(f"jobs/s of {SLOTS} agents with a slot each", f"{1 / two:.0f}/s",
              f"one with {SLOTS} slots: {1 / base:.0f}/s", base / two)


# --- through SQS --------------------------------------------------------------------------------

def python_sqs(bench: Bench):
    queue, url = Queue(bench.emulator), bench.emulator.url
    yield from rate_rows(
        bench, "python SQS", [bench.python, bench.two_prints()], 2.0,
        lambda: halves(bench, [queue], bench.size.half_s, AWS_ENDPOINT_URL=url))


def requests(bench: Bench):
    emulator, jobs = bench.emulator, 1000
    queue, front = Queue(emulator, 3), emulator.front
    queue.put(range(jobs))
    time.sleep(3)       # a backlog: older than any margin for skew between the clocks of SQS and S3
    front.requests.clear()
    with running(bench, queue.agent(), AWS_ENDPOINT_URL=front.url) as agent:
        until(lambda: agent.reports() >= jobs, 120, "the last report", 0.01)
    if queue.left():
        raise Unmeasured(f"{queue.left()} messages were not deleted")
    names = [name for name, _ in front.operations()]
    yield Row("AWS requests, 1,000 jobs, 3 functions", f"{len(names)}", "from start to stop",
              len(names), 220, note=", ".join(f"{names.count(n)} {n}" for n in sorted(set(names))))


# --- latency, packages, depth -------------------------------------------------------------------

def latency(bench: Bench):
    folder, mine, bare = bench.folder(make_zip({"main.py": CLOCK_FIRST})), [], []
    command = [bench.python, bench.directory({"main.py": CLOCK_FIRST}) / "main.py"]
    with running(bench, folder.agent()) as agent:
        for number in range(10 + bench.size.latencies):
            at = folder.hand_over(body := task(number))
            mine.append((int(folder.result(body, agent)["stdout"]) - at) / 1e6)
            at = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
            bare.append((int(subprocess.check_output(command)) - at) / 1e6)
            time.sleep(random.uniform(0.01, 0.06))      # idle again, and out of step with any poll
    mine, bare = sorted(mine[10:]), sorted(bare[10:])   # the first ten warm up
    base = bare[len(bare) // 2]
    for percentile, bound in ((50, 1.0), (99, 2.0)):
        at = len(mine) * percentile // 100
        yield Row(f"rename to first statement, p{percentile}", f"{mine[at]:.2f} ms",
                  f"bare start, p50: {base:.2f} ms", mine[at] / base, bound,
                  note=f"{len(mine)} tasks; bare p{percentile} {bare[at]:.2f} ms")


def package(bench: Bench):
    files: dict = {f"data/{n:04d}.bin": os.urandom(20 << 10) for n in range(1990)}
    files.update({f"part/m{n}.py": f"VALUE = {n}\n" for n in range(9)})
    files["main.py"] = ("from part import m0, m1, m2, m3\n"
                        "print(len(open('data/0007.bin', 'rb').read()), m3.VALUE)\n")
    folder, source, mine, bare = bench.folder(make_zip(files)), bench.directory(files), [], []
    with running(bench, folder.agent()) as agent:
        for number in range(1 + bench.size.packages):
            at = folder.hand_over(body := task(number)) / 1e9
            folder.result(body, agent)
            mine.append(time.monotonic() - at)
            at = time.monotonic()
            subprocess.check_output([bench.python, "main.py"], cwd=source)
            bare.append(time.monotonic() - at)
            time.sleep(0.05)
    got, base = statistics.median(mine[1:]) * 1e3, statistics.median(bare[1:]) * 1e3
    yield Row("40 MB, 2,000 files, after the first run", f"{got:.1f} ms",
              f"in place: {base:.1f} ms", got / base, 1.2, note=f"first {mine[0] * 1e3:.0f} ms")


def cost_at_depth(bench: Bench, deep: int, functions: int) -> Cost:
    """What a job costs an agent that always has `deep` tasks, once it has the functions' code."""
    folder = bench.folder(make_zip({"main.py": TWO_PRINTS}), "python", functions)
    cost = halves(bench, [folder], bench.size.depth_s, deep, 100 + 3 * functions)[1]
    shutil.rmtree(folder.path)
    return cost


def depth(bench: Bench):
    deep, rows = bench.size.deep, []
    cases = [(10, 200), (1000, 1), (1000, 200), (deep, 1), (deep, 200)]
    before = cost_at_depth(bench, 10, 1)
    for queued, functions in cases if bench.size is FULL else cases[-1:]:
        got, after = cost_at_depth(bench, queued, functions), cost_at_depth(bench, 10, 1)
        for name in ("cpu_s", "wall_s"):
            mine = getattr(got, name) * 1e3
            base = (getattr(before, name) + getattr(after, name)) / 2 * 1e3
            rows.append(Row(f"{name[:-2]} a job, deep queue", f"{mine:.2f} ms",
                            f"10 queued, 1 function: {base:.2f} ms", mine / base, 1.1,
                            note=f"{queued:,} queued, {functions} functions"))
        before = after
    for name in ("cpu", "wall"):
        cases = [row for row in rows if row.figure.startswith(name)]
        yield dataclasses.replace(worst := max(cases, key=lambda row: row.ratio),
                                  note=f"worst of {len(cases)}: {worst.note}")


# --- start, idle, memory ------------------------------------------------------------------------

@contextlib.contextmanager
def polling(bench: Bench, front: Front, command: list):
    """A process, and time.monotonic() of its first ReceiveMessage."""
    front.requests.clear()
    with running(bench, command, AWS_ENDPOINT_URL=front.url) as process:
        yield process, until(lambda: process.reports() >= 0 and front.first_poll(), 60, "a poll")


def start(bench: Bench):
    emulator, bare, mine = bench.emulator, [], []
    queue = Queue(emulator)
    for _ in range(bench.size.starts):
        for seconds, command in ((bare, ["-c", BARE_BOTO3, queue.url]),
                                 (mine, queue.agent())):
            at = time.monotonic()
            with polling(bench, emulator.front, command) as (_, polled):
                seconds.append(polled - at)
    base, got = statistics.median(bare) * 1e3, statistics.median(mine) * 1e3
    ratio = statistics.median(ours / its for ours, its in zip(mine, bare))    # clocks drift
    yield Row("start to first poll", f"{got:.0f} ms", f"bare boto3: {base:.0f} ms", ratio, 1.3,
              note=f"median of {len(mine)} pairs")


def idle(bench: Bench):
    emulator, jobs, wait_s = bench.emulator, 20, 5
    queue = Queue(emulator)
    # The emulator goes on with the poll of a process that is gone: that one has its own queue.
    with polling(bench, emulator.front, ["-c", BARE_BOTO3, Queue(emulator).url]) as (bare, _):
        base = settled_pss_bytes(bare.pid)
    with polling(bench, emulator.front, queue.agent(wait_s)) as (agent, _):
        fresh, percent = settled_pss_bytes(agent.pid), cpu_percent(agent.pid, bench.size.idle_s)
        queue.put(range(jobs))
        until(lambda: agent.reports() >= jobs, 60, "the last report")
        used = settled_pss_bytes(agent.pid)
    for when, got, bound in (("start", fresh, 1.5), (f"{jobs} python jobs", used, None)):
        yield Row(f"idle memory (PSS) after {when}", f"{got / MIB:.1f} MiB",
                  f"bare boto3: {base / MIB:.1f} MiB", got / base, bound)
    yield Row("idle CPU, %", f"{percent:.3f} %", f"{bench.size.idle_s} s, polls of {wait_s} s",
              percent, 0.2)


def idle_local(bench: Bench):
    with running(bench, bench.folder(b"").agent()) as agent:
        settled_pss_bytes(agent.pid)
        percent = cpu_percent(agent.pid, bench.size.idle_s)
        agent.reports()
    yield Row("idle CPU, --local, %", f"{percent:.3f} %", f"{bench.size.idle_s} s", percent)


def peak(bench: Bench):
    functions = {f"python-{mb}-MB": ({"main.py": PYTHON_PEAK % mb}, "python")
                 for mb in (0, 50, 150, 300, 600)}
    missing = "" if shutil.which("g++") else "; no g++ for a C++ one"
    if not missing:
        functions["cpp-hello"] = ({"main": bench.compiled(CPP_PEAK).read_bytes()}, "cpp")
    folder, cases = bench.folder(b""), list(functions) * bench.size.peaks
    for name, (files, _) in functions.items():
        folder.code(make_zip(files), name)
    random.shuffle(cases)
    bodies = [task(n, name, functions[name][1], 1024) for n, name in enumerate(cases)]
    for body in bodies:
        folder.hand_over(body)
    with running(bench, folder.agent()) as agent:
        until(lambda: agent.reports() >= len(bodies), 120, "the last report", 0.01)
    ratio, reported, own, name = max(
        (*peak_error(folder.result(body)), body["functionId"]) for body in bodies)
    yield Row("peak memory error / max(1 MiB, 3 %)", f"{reported / MIB:.2f} MiB",
              f"its own VmHWM: {own / MIB:.2f} MiB", ratio, 1.0,
              note=f"worst of {len(cases)}: {name}{missing}")


def peak_error(result: dict) -> tuple[float, int, int]:
    """The error in units of what is allowed, the reported peak, the function's own reading."""
    own = int(re.search(r"VmHWM:\s+(\d+) kB", result["stdout"])[1]) * 1024
    reported = result["peakMemoryBytes"]
    return abs(reported - own) / max(MIB, 0.03 * own), reported, own


def duration(bench: Bench):
    folder, pairs = bench.folder(make_zip({"main.py": OWN_TIME})), []
    size = bench.size.latencies // 2
    with running(bench, folder.agent()) as agent:
        for body in map(task, range(size)):
            folder.hand_over(body)
            result = folder.result(body, agent)
            pairs.append((float(result["stdout"]), result["durationMillis"]))
    own, reported = max(pairs, key=lambda pair: abs(pair[1] - pair[0]))
    yield Row("duration error / 5 ms", f"{reported} ms", f"its own clock: {own:.2f} ms",
              abs(reported - own) / 5, 1.0, note=f"worst of {size} python runs")


# --- command line -------------------------------------------------------------------------------

FIGURES = {figure.__name__: figure for figure in (
    start, python_local, python_sqs, cpp_local, agents, latency, package, idle, idle_local,
    requests, depth, peak, duration)}


def rows_of(bench: Bench, name: str):
    """The rows of a figure; when it cannot be measured, one that says why."""
    try:
        yield from FIGURES[name](bench)
    except Exception as problem:  # noqa: BLE001 (what ends one figure must not end the others)
        text = " ".join(f"{type(problem).__name__}: {problem}".split())
        yield Row(name, note=f"not measured: {text.replace('Unmeasured: ', '')}")


def markdown(rows: list[Row], runs: int) -> str:
    """The README's table: the worst and the best ratio that each figure had."""
    figures: dict[str, list[Row]] = {}
    for row in rows:
        figures.setdefault(row.figure, []).append(row)
    lines = [f"| figure | against | worst and best of {runs} | goal |", "| --- | --- | --- | --- |"]
    for figure, mine in figures.items():
        ratios = sorted((row.ratio for row in mine if row.ratio is not None),
                        reverse=not mine[0].at_least)
        span = f"{ratios[0]:.2f}, {ratios[-1]:.2f}" if ratios else mine[0].note
        missed = sum(row.verdict() == "MISSED" for row in mine)
        lines.append(f"| {figure} | {mine[0].against.partition(':')[0]} | {span} | "
                     f"{mine[0].target()}{f' (missed in {missed} of {runs})' if missed else ''} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="shorter: about a minute")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=FIGURES, default=FIGURES,
                        help="some of: " + " ".join(FIGURES))
    parser.add_argument("--json", metavar="FILE", default=os.devnull,
                        help="JSON lines, to FILE (/dev/stderr for one)")
    parser.add_argument("--runs", type=int, metavar="N",
                        help="all of it N times, then the worst and the best as Markdown")
    return parser.parse_args()


def main():
    args, rows = arguments(), []
    if not MODULE.exists():
        sys.exit(f"{MODULE} does not exist; set NANOGRID to the path of nanogrid.py")
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)     # for reap_orphans
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # clears up, too
    print(LINE.format("figure", "measured", "against", "ratio", "goal", "", "").rstrip())
    with open(args.json, "w") as lines:
        for _ in range(args.runs or 1):
            with contextlib.ExitStack() as stack:
                bench = Bench(QUICK if args.quick else FULL, stack)
                for row in (row for name in args.only for row in rows_of(bench, name)):
                    print(row.as_text(), flush=True)
                    print(row.as_json(), file=lines, flush=True)
                    rows.append(row)
    if args.runs:
        print("\n" + markdown(rows, args.runs))


if __name__ == "__main__":
    main()
