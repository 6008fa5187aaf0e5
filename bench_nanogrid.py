#!/usr/bin/env python3
"""Measures nanogrid.py from outside, every figure beside what it is to be compared with.

    python3 bench_nanogrid.py [--quick] [--only NAME ...] [--runs N]

A time says more about the machine than about the program, so each row is the ratio of two things
that were measured one after the other in this run. A row whose tools are not here (g++,
ministack, boto3) says so. The exit status is 0 whatever the figures are.

  start           to the first poll of SQS, against a program that makes three clients of boto3
  jobs a second   of a busy agent with two slots whose queue is kept as deep as it was, against
                  `xargs -P2` before and after: Python and C++ from a folder, Python through SQS.
                  Two halves, of 10 s each in the full form, must agree within 15 %, else it goes
                  on; the last half counts. The agent never rests, for a file system that removes
                  files all the time is the normal case.
  CPU a job       the agent's whole process tree in that half, against the same xargs; and the
                  agent's own process alone, which bounds how many jobs one agent can feed
  requests        to AWS for 1,000 jobs of three functions
  idle            PSS and CPU time of the whole process tree while it long-polls

`--runs 3` does all of it three times in a row and ends with the README's table of the worst and
the best. Both sides run functions on one interpreter: this one where every user can reach it, else
/usr/bin/python3. NANOGRID in the environment names another nanogrid.py than the one beside.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import os
import re
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
MOST_HALVES = 8
AGREEMENT = 0.15                # of two halves

FULL = SimpleNamespace(half_s=10, bare_jobs=1000, starts=9, idle_s=10)
QUICK = SimpleNamespace(half_s=1, bare_jobs=80, starts=5, idle_s=2)

TWO_PRINTS = 'print("Hello from NanoGrid!")\nprint("Result: 42")\n'
CPP_HELLO = '#include <iostream>\nint main() { std::cout << "Hello\\nResult: 42\\n"; }\n'
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


def process_tree(root: int) -> list[int]:
    """The pids of `root` and of all below it (proc(5), CONFIG_PROC_CHILDREN)."""
    found = [root]
    for pid in found:
        with contextlib.suppress(OSError):  # it has just ended
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                found += map(int, children.read_text().split())
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
            after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks = int(after_name[13]) + int(after_name[14])
            total += own_cpu_s(pid) + ticks / os.sysconf("SC_CLK_TCK")
    return total


def settled_pss_bytes(root: int) -> int:
    """Proportional set size of a live tree (a shared page is split among those who share it) once
    it is steady: two looks, half a second apart, agree to 1 %."""
    looks = [0]
    while len(looks) < 2 or abs(looks[-1] - looks[-2]) > looks[-1] / 100:
        time.sleep(0.5)
        sizes = [re.search(r"\nPss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text())
                 for pid in process_tree(root)]
        looks.append(sum(int(size[1]) * 1024 for size in sizes if size))
    return looks[-1]


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
        try:
            import boto3
            import ministack  # noqa: F401
        except ImportError as error:
            raise Unmeasured(f"{error.name} is not installed for this Python") from None
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
        self.sqs, self.s3 = (
            boto3.client(service, region_name=REGION, endpoint_url=self.url,
                         aws_access_key_id="bench", aws_secret_access_key="bench")
            for service in ("sqs", "s3"))
        self.s3.create_bucket(Bucket="bench",
                              CreateBucketConfiguration={"LocationConstraint": REGION})
        self.front = Front(self.port)
        bench.stack.callback(self.front.shutdown)


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
    """A zip of executable files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            member = zipfile.ZipInfo(name)
            member.external_attr = 0o100755 << 16
            archive.writestr(member, content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def task(number: int, function: str, runtime: str = "python") -> dict:
    return {"requestId": f"r{number:06d}", "functionId": function, "runtime": runtime,
            "s3Key": f"{function}.zip", "timeoutMs": 60000, "memoryMb": 128}


def common_python() -> str:
    """An interpreter that every user can start: under root, functions run as another one."""
    own = Path(sys.executable).resolve()
    everybody = all(folder.stat().st_mode & 0o001 for folder in own.parents)
    return str(own) if everybody or os.getuid() else "/usr/bin/python3"


class Folder:
    """A directory for --local, with one function."""

    def __init__(self, path: Path, archive: bytes, runtime: str):
        self.path, self.runtime = path, runtime
        (path / "queue").mkdir()
        (path / "code").mkdir()
        (path / "code" / "f0.zip").write_bytes(archive)

    def agent(self) -> list:
        """The command of an agent that serves it."""
        return [MODULE, "--local", self.path]

    def put(self, numbers):
        """Rename tasks into the queue, by their numbers."""
        spare = self.path / "spare"
        for number in numbers:
            spare.write_text(json.dumps(body := task(number, "f0", self.runtime)))
            spare.rename(self.path / "queue" / f"{body['requestId']}.json")


class Bench:
    """How much to run, where, with what environment; what is to be stopped at the end."""

    def __init__(self, size: SimpleNamespace, stack: contextlib.ExitStack):
        self.size, self.stack, self.python = size, stack, common_python()
        self.path = Path(tempfile.mkdtemp(prefix="bench-nanogrid-"))
        self.path.chmod(0o755)      # functions run as other users
        stack.callback(shutil.rmtree, self.path, ignore_errors=True)
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

    @functools.cached_property
    def emulator(self) -> Emulator:
        return Emulator(self)

    def xargs(self, command: list) -> Cost:
        """What one of `bare_jobs` bare runs costs, SLOTS at once."""
        jobs, start = self.size.bare_jobs, time.monotonic()
        words = ["xargs", f"-P{SLOTS}", "-n1", *map(str, command)]
        with tempfile.TemporaryFile() as lines:
            lines.write(b"1\n" * jobs)
            lines.seek(0)
            process = subprocess.Popen(words, env=self.env, stdin=lines, stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise Unmeasured(f"{' '.join(words)} ended with {status}")
        seconds = time.monotonic() - start
        return Cost(seconds / jobs, (usage.ru_utime + usage.ru_stime) / jobs)


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
        try:
            yield process
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
            process.wait()


# --- jobs a second, and the CPU of a job --------------------------------------------------------

def halves(bench: Bench, queue, depth: int = 200, **environment) -> tuple[Cost, Cost]:
    """What a job costs an agent that is busy all the time, in two stretches that follow one
    another: the first two that agree in the rate, else the last two of MOST_HALVES."""
    costs, given = [], depth
    queue.put(range(depth))
    with running(bench, queue.agent(), **environment) as agent:
        def runs() -> int:
            """How many there were, after as many tasks were added."""
            nonlocal given
            done = agent.reports()
            queue.put(range(given, done + depth))
            given = done + depth
            return done

        def now() -> tuple:
            return runs(), time.monotonic(), tree_cpu_s(agent.pid), own_cpu_s(agent.pid)

        until(lambda: runs() >= depth, 120, "the first runs", 0.003)  # it is warm then
        before = now()
        while len(costs) < 2 or len(costs) < MOST_HALVES and not agree(*costs[-2:]):
            end = before[1] + bench.size.half_s
            until(lambda end=end: runs() and time.monotonic() >= end, 2 * bench.size.half_s,
                  "as many runs", 0.003)
            after = now()
            jobs = max(1, after[0] - before[0])
            costs.append(Cost(*((after[what] - before[what]) / jobs for what in (1, 2, 3))))
            before = after
    return costs[-2], costs[-1]


def agree(first: Cost, second: Cost) -> bool:
    return abs(first.wall_s / second.wall_s - 1) <= AGREEMENT


def rate_rows(bench: Bench, how: str, command: list, queue, bound: float, cpu_bound=None,
              **environment):
    """What the halves of an agent on `queue` say, beside bare runs before and after them."""
    before = bench.xargs(command)
    first, agent = halves(bench, queue, **environment)
    after = bench.xargs(command)
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


def python_local(bench: Bench):
    main = bench.directory({"main.py": TWO_PRINTS}) / "main.py"
    folder = Folder(bench.directory(), make_zip({"main.py": TWO_PRINTS}), "python")
    yield from rate_rows(bench, "python --local", [bench.python, main], folder, 2.5, 0.5)


def cpp_local(bench: Bench):
    if not shutil.which("g++"):
        raise Unmeasured("no g++ here")
    place = bench.directory({"main.cpp": CPP_HELLO})
    subprocess.run(["g++", "-O2", "-o", "main", "main.cpp"], cwd=place, check=True)
    main = place / "main"
    folder = Folder(bench.directory(), make_zip({"main": main.read_bytes()}), "cpp")
    yield from rate_rows(bench, "cpp --local", [main], folder, 0.2)


# --- through SQS --------------------------------------------------------------------------------

def python_sqs(bench: Bench):
    main = bench.directory({"main.py": TWO_PRINTS}) / "main.py"
    yield from rate_rows(bench, "python SQS", [bench.python, main], Queue(bench.emulator), 2.0,
                         AWS_ENDPOINT_URL=bench.emulator.url)


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


# --- start, idle ---------------------------------------------------------------------------------

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
        fresh = settled_pss_bytes(agent.pid)
        before, since = tree_cpu_s(agent.pid), time.monotonic()
        time.sleep(bench.size.idle_s)
        percent = 100 * (tree_cpu_s(agent.pid) - before) / (time.monotonic() - since)
        queue.put(range(jobs))
        until(lambda: agent.reports() >= jobs, 60, "the last report")
        used = settled_pss_bytes(agent.pid)
    for when, got, bound in (("start", fresh, 1.5), (f"{jobs} python jobs", used, None)):
        yield Row(f"idle memory (PSS) after {when}", f"{got / MIB:.1f} MiB",
                  f"bare boto3: {base / MIB:.1f} MiB", got / base, bound)
    yield Row("idle CPU, %", f"{percent:.3f} %", f"{bench.size.idle_s} s, polls of {wait_s} s",
              percent, 0.2)


# --- command line -------------------------------------------------------------------------------

FIGURES = {figure.__name__: figure for figure in (
    start, python_local, python_sqs, cpp_local, requests, idle)}


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
    parser.add_argument("--runs", type=int, metavar="N",
                        help="all of it N times, then the worst and the best as Markdown")
    return parser.parse_args()


def main():
    args, rows = arguments(), []
    if not MODULE.exists():
        sys.exit(f"{MODULE} does not exist; set NANOGRID to the path of nanogrid.py")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clears up, too
    print(LINE.format("figure", "measured", "against", "ratio", "goal", "", "").rstrip())
    for _ in range(args.runs or 1):
        with contextlib.ExitStack() as stack:
            bench = Bench(QUICK if args.quick else FULL, stack)
            for name in args.only:
                for row in rows_of(bench, name):
                    print(row.as_text(), flush=True)
                    rows.append(row)
    if args.runs:
        print("\n" + markdown(rows, args.runs))


if __name__ == "__main__":
    main()
