#!/usr/bin/env python3
"""Measures nanogrid.py from outside, every figure beside what it is to be compared with.

    python3 bench_nanogrid.py [--quick] [--only NAME ...] [--json [FILE]]

A time says more about the machine than about the program, so each row is the ratio of two things
that were measured in turns in this run. A row whose tools are not here (g++, ministack, boto3)
says so. The exit status is 0 whatever the figures are.

  jobs a second   (N - 1) / (time of a drain of N tasks - time of a drain of 1), two slots, against
                  N runs by `xargs -P2`: the agent's start and end cancel out
  CPU a job       the agent's whole process tree in those same drains, against the same xargs
  latency         from the rename of a task into an idle agent's queue/ to the function's first
                  statement, against a bare start of the same file up to that statement
  depth           between two looks at a running agent whose queue is kept as deep as it was
  idle            PSS and CPU time of the whole process tree while it long-polls a stand-in

Both sides run functions on one interpreter: this one where every user can reach it, else
/usr/bin/python3. NANOGRID in the environment names another nanogrid.py than the one beside.
"""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import http.client
import importlib.util
import io
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

MODULE = Path(os.environ.get("NANOGRID") or Path(__file__).resolve().with_name("nanogrid.py"))
SLOTS = 2
REGION = "ap-northeast-2"
MIB = 1 << 20
PR_SET_CHILD_SUBREAPER = 36     # prctl(2)

FULL = SimpleNamespace(rounds=5, python_jobs=1500, cpp_jobs=1500, bare_jobs=600, latencies=200,
                       packages=20, starts=9, idle_s=10, deep=100_000, depth_jobs=1000, peaks=3)
QUICK = SimpleNamespace(rounds=2, python_jobs=200, cpp_jobs=200, bare_jobs=80, latencies=30,
                        packages=4, starts=9, idle_s=2, deep=3_000, depth_jobs=200, peaks=1)

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
LINE = "{:<43} {:>12}  {:<35} {:>7} {:>7} {:<6} {}"


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
        return "" if self.bound is None else f"{'>=' if self.at_least else '<='} {self.bound:g}"

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
    wall_s: float
    cpu_s: float


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


def tree_cpu_s(root: int) -> float:
    """CPU seconds of a live tree: its processes to the nanosecond, by the clock id that
    clock_getcpuclockid(3) makes of a pid; the children they waited for to the clock tick."""
    total = 0.0
    for pid in process_tree(root):
        with contextlib.suppress(OSError, IndexError):
            total += time.clock_gettime((~pid << 3) | 2)
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


# --- a stand-in for AWS, which counts -----------------------------------------------------------

class Front(ThreadingHTTPServer):
    """Notes each request; passes it to the `upstream` port, or answers as AWS with one queue."""
    daemon_threads = True

    def __init__(self, upstream: int = 0, code: bytes = b""):
        super().__init__(("127.0.0.1", 0), FrontHandler)
        self.upstream, self.code = upstream, code
        self.messages: list[str] = []
        self.requests: list[tuple[str, float]] = []     # operation, time.monotonic()
        self.release = threading.Event()                # ends long polls early
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.queue_url = self.url + "/000000000000/bench"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def first_poll(self) -> float | None:
        return next((at for name, at in list(self.requests) if name == "ReceiveMessage"), None)

    def handle_error(self, *_):
        """Says nothing: a process that is stopped resets its connections."""

    def close(self):
        self.release.set()
        self.shutdown()
        self.server_close()


class FrontHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16      # head and body in one segment: none waits for a delayed ACK

    def handle_any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        operation = self.operation(body)
        self.server.requests.append((operation, time.monotonic()))
        answer = self.forward if self.server.upstream else self.stand_in
        status, headers, content = answer(operation, body)
        self.send_response_only(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def operation(self, body: bytes) -> str:
        """The operation's name in any of AWS's protocols: JSON, CBOR, query, REST."""
        if target := self.headers.get("X-Amz-Target"):
            return target.rpartition(".")[2]
        if "/operation/" in self.path:
            return self.path.rpartition("/")[2]
        action = re.match(rb"(?:.*&)?Action=(\w+)", body)
        return action[1].decode() if action else f"S3 {self.command}"

    def forward(self, _operation: str, body: bytes):
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        upstream.request(self.command, self.path, body, dict(self.headers))
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        ours = ("connection", "transfer-encoding", "keep-alive")
        return answer.status, {name.title(): value for name, value in answer.getheaders()
                               if name.lower() not in ours}, content

    def stand_in(self, operation: str, body: bytes):
        answer: dict = {}
        if operation.startswith("S3"):
            return 200, {"ETag": '"1"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}, (
                self.server.code)
        if operation == "ReceiveMessage":
            answer = self.receive(json.loads(body).get("WaitTimeSeconds", 0))
        elif operation == "GetQueueAttributes":
            answer = {"Attributes": {"VisibilityTimeout": "30", "ApproximateNumberOfMessages": "0"}}
        elif operation.endswith("Batch"):
            ids = [{"Id": entry["Id"]} for entry in json.loads(body)["Entries"]]
            answer = {"Successful": ids, "Failed": []}
        return 200, {"Content-Type": "application/x-amz-json-1.0"}, json.dumps(answer).encode()

    def receive(self, wait_s: int) -> dict:
        waiting = self.server.messages
        if not waiting:
            self.server.release.wait(wait_s)
            return {}
        sent = {"SentTimestamp": str(time.time_ns() // 10**6), "ApproximateReceiveCount": "1"}
        return {"Messages": [{"MessageId": text, "ReceiptHandle": text, "Body": text,
                              "Attributes": sent} for text in [waiting.pop()]]}


# --- what all figures share ---------------------------------------------------------------------

def make_zip(files: dict) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            member = zipfile.ZipInfo(name)
            member.external_attr = 0o100755 << 16
            archive.writestr(member, content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def task(number: int, function: str = "bench", runtime: str = "python", memory_mb: int = 128):
    return {"requestId": f"r{number:06d}", "functionId": function, "runtime": runtime,
            "s3Key": f"{function}.zip", "timeoutMs": 60000, "memoryMb": memory_mb}


def common_python() -> str:
    """An interpreter that every user can start: under root, functions run as another one."""
    own = Path(sys.executable).resolve()
    everybody = all(folder.stat().st_mode & 0o001 for folder in own.parents)
    return str(own) if everybody or os.getuid() else "/usr/bin/python3"


def need_boto3():
    if not importlib.util.find_spec("boto3"):
        raise Unmeasured("boto3 is not installed for this Python")


class Folder:
    """A directory for --local."""

    def __init__(self, path: Path):
        self.path, self.queue = path, path / "queue"
        for part in (self.queue, path / "code", path / "spare"):
            part.mkdir()

    def code(self, archive: bytes, function: str = "bench"):
        (self.path / "code" / f"{function}.zip").write_bytes(archive)

    def put(self, body: dict, part: str = "queue"):
        """Write a task file while no agent looks there."""
        (self.path / part / f"{body['requestId']}.json").write_text(json.dumps(body))

    def hand_over(self, body: dict) -> int:
        """Rename a task into the queue of a running agent; CLOCK_MONOTONIC in ns just before."""
        self.put(body, "spare")
        name, at = f"{body['requestId']}.json", time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        (self.path / "spare" / name).rename(self.queue / name)
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
        self.emulator_port = 0
        self.pairs: dict[str, tuple[Cost, Cost]] = {}
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

    def folder(self) -> Folder:
        return Folder(self.directory())

    def two_prints(self) -> Path:
        return self.directory({"main.py": TWO_PRINTS}) / "main.py"

    def compiled(self, source: str) -> Path:
        if not shutil.which("g++"):
            raise Unmeasured("no g++ here")
        path = self.directory({"main.cpp": source})
        subprocess.run(["g++", "-O2", "-o", "main", "main.cpp"], cwd=path, check=True)
        return path / "main"

    def front(self, **options) -> Front:
        front = Front(**options)
        self.stack.callback(front.close)
        return front

    def config(self, queue_url: str, wait_s: int) -> Path:
        text = (f"agent:\n  aws:\n    region: {REGION}\n  sqs:\n    queueUrl: {queue_url}\n"
                f"    waitTimeSeconds: {wait_s}\n  s3:\n    codeBucket: bench\n")
        return self.directory({"application.yml": text}) / "application.yml"

    def costed(self, command: list, stdin, log: Path, environment: dict) -> Cost:
        """Run a command to its end: its wall time, and the CPU of all that it started."""
        def cpu_s():
            usage = resource.getrusage(resource.RUSAGE_CHILDREN)
            return usage.ru_utime + usage.ru_stime
        before, start = cpu_s(), time.monotonic()
        with open(log, "wb") as output:
            ended = subprocess.run(command, stdin=stdin, stdout=output, stderr=output, timeout=600,
                                   env={**self.env, **environment}, check=False)
        wall_s = time.monotonic() - start
        reap_orphans(self.known)
        if ended.returncode:
            raise Unmeasured(f"exit status {ended.returncode}; {log.read_text()[-300:]}")
        return Cost(wall_s, cpu_s() - before)

    def xargs(self, jobs: int, command: list) -> Cost:
        """`jobs` bare runs, SLOTS at once."""
        numbers = self.path / "numbers"
        numbers.write_text("".join(f"{n}\n" for n in range(jobs)))
        with open(numbers) as stdin:
            return self.costed(["xargs", f"-P{SLOTS}", "-n1", *command], stdin,
                               self.path / "xargs.log", {})

    def drain(self, jobs: int, *arguments, **environment) -> Cost:
        """One `--drain`; Unmeasured unless the log reports every job as ok."""
        log = self.path / "drain.log"
        cost = self.costed([sys.executable, MODULE, *arguments, "--drain"], subprocess.DEVNULL,
                           log, environment)
        text = log.read_text(errors="replace")
        ok = len(re.findall(r" REPORT .*? status=ok ", text))
        if ok != jobs:
            raise Unmeasured(f"{ok} of {jobs} runs were ok; the log ends: {text[-300:]}")
        return cost


@contextlib.contextmanager
def running(bench: Bench, command: list, front: Front | None = None):
    """A process that serves until the block ends; .reports() counts the runs in its log."""
    log = bench.directory() / "log"
    environment = {**bench.env, **({"AWS_ENDPOINT_URL": front.url} if front else {})}
    with open(log, "wb") as output, open(log, "rb") as reader:
        process = subprocess.Popen([sys.executable, *command], stdin=subprocess.DEVNULL,
                                   stdout=output, stderr=output, env=environment)
        counts = [0]

        def reports() -> int:
            if process.poll() is not None:
                raise Unmeasured(f"the agent ended by itself: {log.read_text()[-300:]}")
            counts.append(counts.pop() + reader.read().count(b" REPORT "))
            return counts[-1]
        process.reports = reports
        try:
            yield process
        finally:
            process.terminate()
            if front:
                front.release.set()     # an idle agent waits for the answer to its poll
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
            process.wait()
            reap_orphans(bench.known)
            if front:
                front.release.clear()


# --- jobs a second, and the CPU of a job --------------------------------------------------------

def compare(bench: Bench, drained, jobs: int, command: list) -> tuple[Cost, Cost]:
    """Seconds a job, by the agent and bare; from medians of rounds that take turns."""
    many, one, bare = [], [], []
    for _ in range(bench.size.rounds):
        bare.append(bench.xargs(bench.size.bare_jobs, command))
        many.append(drained(jobs))
        one.append(drained(1))

    def median(costs, name):
        return statistics.median(getattr(cost, name) for cost in costs)
    names = ("wall_s", "cpu_s")
    return (Cost(*((median(many, name) - median(one, name)) / (jobs - 1) for name in names)),
            Cost(*(median(bare, name) / bench.size.bare_jobs for name in names)))


def drain_folder(bench: Bench, jobs: int, archive: bytes, runtime: str) -> Cost:
    folder = bench.folder()
    folder.code(archive)
    for number in range(jobs):
        folder.put(task(number, runtime=runtime))
    cost = bench.drain(jobs, "--local", folder.path)
    shutil.rmtree(folder.path)
    return cost


def local_pair(bench: Bench, runtime: str) -> tuple[Cost, Cost]:
    """The comparison for a runtime, made once for the two figures that need it."""
    if runtime not in bench.pairs:
        if runtime == "python":
            main, jobs = bench.two_prints(), bench.size.python_jobs
        else:
            main, jobs = bench.compiled(CPP_HELLO), bench.size.cpp_jobs
        archive = make_zip({main.name: main.read_bytes()})
        command = [bench.python, main] if runtime == "python" else [main]
        bench.pairs[runtime] = compare(
            bench, lambda n: drain_folder(bench, n, archive, runtime), jobs, command)
    return bench.pairs[runtime]


def rate_row(figure: str, pair: tuple[Cost, Cost], program: str, bound: float) -> Row:
    agent, bare = (1 / cost.wall_s for cost in pair)
    return Row(figure, f"{agent:.0f}/s", f"xargs -P{SLOTS} {program}: {bare:.0f}/s", agent / bare,
               bound, at_least=True)


def python_local(bench: Bench):
    yield rate_row("python jobs/s, --local", local_pair(bench, "python"), "python3 main.py", 2.5)


def cpp_local(bench: Bench):
    yield rate_row("cpp jobs/s, --local", local_pair(bench, "cpp"), "./main", 0.3)


def cpu(bench: Bench):
    for runtime, bound in (("python", 0.5), ("cpp", None)):
        agent, bare = local_pair(bench, runtime)
        above = agent.cpu_s - bare.cpu_s
        yield Row(f"CPU a job above the function's, {runtime}", f"{above * 1e3:+.2f} ms",
                  f"bare run: {bare.cpu_s * 1e3:.2f} ms", above / bare.cpu_s, bound,
                  note=f"{agent.cpu_s * 1e3:.2f} ms in all")


# --- through SQS --------------------------------------------------------------------------------

def emulator(bench: Bench) -> str:
    """The URL of a ministack that lives as long as the bench, with the bucket `bench`."""
    url = f"http://127.0.0.1:{bench.emulator_port}"
    if bench.emulator_port:
        return url
    need_boto3()
    program = shutil.which("ministack")
    if not program and not importlib.util.find_spec("ministack"):
        raise Unmeasured("ministack is not installed here (pip install ministack)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [program] if program else [sys.executable, "-m", "ministack"],
        env={**os.environ, "GATEWAY_PORT": str(port), "LOG_LEVEL": "ERROR",
             "TMPDIR": str(bench.path)},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    bench.stack.callback(process.wait)
    bench.stack.callback(process.kill)

    def answers():
        with socket.socket() as connection:
            return not connection.connect_ex(("127.0.0.1", port))
    until(answers, 60, "ministack", 0.05)
    bench.known |= process_tree(process.pid)
    bench.emulator_port = port
    client(bench, "s3").create_bucket(
        Bucket="bench", CreateBucketConfiguration={"LocationConstraint": REGION})
    return emulator(bench)


def client(bench: Bench, service: str):
    import boto3
    return boto3.client(service, region_name=REGION, endpoint_url=emulator(bench),
                        aws_access_key_id="bench", aws_secret_access_key="bench")


def fill_queue(bench: Bench, jobs: int, functions: int) -> Path:
    """A new queue with `jobs` messages, their code in the bucket; the settings that name it."""
    sqs, s3 = client(bench, "sqs"), client(bench, "s3")
    for number in range(functions):
        s3.put_object(Bucket="bench", Key=f"f{number}.zip", Body=make_zip({"main.py": TWO_PRINTS}))
    url = sqs.create_queue(QueueName=f"q{time.monotonic_ns()}",
                           Attributes={"VisibilityTimeout": "120"})["QueueUrl"]
    bodies = [json.dumps(task(n, f"f{n % functions}")) for n in range(jobs)]
    for at in range(0, jobs, 10):
        sqs.send_message_batch(QueueUrl=url, Entries=[
            {"Id": str(n), "MessageBody": body} for n, body in enumerate(bodies[at:at + 10])])
    return bench.config(url, 1)


def python_sqs(bench: Bench):
    url = emulator(bench)

    def drained(jobs):
        return bench.drain(jobs, "--config", fill_queue(bench, jobs, 1), AWS_ENDPOINT_URL=url)
    pair = compare(bench, drained, bench.size.python_jobs, [bench.python, bench.two_prints()])
    yield rate_row("python jobs/s, SQS (ministack)", pair, "python3 main.py", 2.0)


def requests(bench: Bench):
    config = fill_queue(bench, 1000, 3)
    time.sleep(3)       # a backlog: older than any margin for skew between the clocks of SQS and S3
    front = bench.front(upstream=bench.emulator_port)
    bench.drain(1000, "--config", config, AWS_ENDPOINT_URL=front.url)
    names = [name for name, _ in front.requests]
    yield Row("AWS requests, 1,000 jobs, 3 functions", f"{len(names)}", "one whole drain",
              len(names), 220, note=", ".join(f"{names.count(n)} {n}" for n in sorted(set(names))))


# --- latency, packages, depth -------------------------------------------------------------------

def latency(bench: Bench):
    folder, mine, bare = bench.folder(), [], []
    folder.code(make_zip({"main.py": CLOCK_FIRST}))
    command = [bench.python, bench.directory({"main.py": CLOCK_FIRST}) / "main.py"]
    with running(bench, [MODULE, "--local", folder.path]) as agent:
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
    folder, source, mine, bare = bench.folder(), bench.directory(files), [], []
    folder.code(make_zip(files))
    with running(bench, [MODULE, "--local", folder.path]) as agent:
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
    """Seconds a job by an agent that always has `deep` tasks and a warm code cache; medians
    over stretches of 200 jobs."""
    folder, warm_up, jobs = bench.folder(), 100 + 3 * functions, bench.size.depth_jobs
    for number in range(functions):
        folder.code(make_zip({"main.py": TWO_PRINTS}), f"f{number}")
    for number in range(deep + warm_up + 2 * jobs):
        folder.put(task(number, f"f{number % functions}"), "queue" if number < deep else "spare")
    spare, added, looks = iter(sorted((folder.path / "spare").iterdir())), 0, []
    with running(bench, [MODULE, "--local", folder.path]) as agent:
        for goal in range(warm_up, warm_up + jobs + 1, 200):
            while (done := until(agent.reports, 60, "a report")) < goal:
                for path in itertools.islice(spare, done - added):
                    path.rename(folder.queue / path.name)
                added = done
                time.sleep(0.001)
            looks.append((done, time.monotonic(), tree_cpu_s(agent.pid)))
    shutil.rmtree(folder.path)
    ends = [(looks[at], looks[at + 1]) for at in range(len(looks) - 1)]
    return Cost(*(statistics.median((after[what] - before[what]) / (after[0] - before[0])
                                    for before, after in ends) for what in (1, 2)))


def depth(bench: Bench):
    deep = bench.size.deep
    cases = [(10, 200), (1000, 1), (1000, 200), (deep, 1), (deep, 200)]
    before = cost_at_depth(bench, 10, 1)
    for queued, functions in cases if bench.size is FULL else cases[-1:]:
        got, after = cost_at_depth(bench, queued, functions), cost_at_depth(bench, 10, 1)
        for name in ("cpu_s", "wall_s"):
            mine = getattr(got, name) * 1e3
            base = (getattr(before, name) + getattr(after, name)) / 2 * 1e3
            yield Row(f"{name[:-2]} a job, {queued:,} queued, {functions} functions",
                      f"{mine:.2f} ms", f"10 queued, 1 function: {base:.2f} ms", mine / base, 1.1)
        before = after


# --- start, idle, memory ------------------------------------------------------------------------

def bare_boto3(front: Front) -> list:
    return ["-c", BARE_BOTO3, front.queue_url]


def polling(bench: Bench, front: Front, wait_s: int = 20) -> list:
    return [MODULE, "--config", bench.config(front.queue_url, wait_s)]


def first_poll(process, front: Front) -> float:
    """time.monotonic() of the first ReceiveMessage; Unmeasured when the process ends before."""
    return until(lambda: process.reports() >= 0 and front.first_poll(), 60, "the first poll")


def start(bench: Bench):
    need_boto3()
    front, bare, mine = bench.front(), [], []
    for _ in range(bench.size.starts):
        for seconds, command in ((bare, bare_boto3(front)), (mine, polling(bench, front))):
            front.requests.clear()
            at = time.monotonic()
            with running(bench, command, front) as process:
                seconds.append(first_poll(process, front) - at)
    base, got = statistics.median(bare) * 1e3, statistics.median(mine) * 1e3
    ratio = statistics.median(ours / its for ours, its in zip(mine, bare))    # clocks drift
    yield Row("start to first poll", f"{got:.0f} ms", f"bare boto3: {base:.0f} ms", ratio, 0.8,
              note=f"median of {len(mine)} pairs")


def idle(bench: Bench):
    need_boto3()
    front, jobs = bench.front(code=make_zip({"main.py": TWO_PRINTS})), 20
    with running(bench, bare_boto3(front), front) as bare:
        first_poll(bare, front)
        base = settled_pss_bytes(bare.pid)
    front.requests.clear()
    with running(bench, polling(bench, front, 5), front) as agent:
        first_poll(agent, front)
        fresh, percent = settled_pss_bytes(agent.pid), cpu_percent(agent.pid, bench.size.idle_s)
        front.messages += [json.dumps(task(number)) for number in range(jobs)]
        until(lambda: agent.reports() >= jobs, 60, "the last report")
        used = settled_pss_bytes(agent.pid)
    for when, got, bound in (("start", fresh, 1.15), (f"{jobs} python jobs", used, None)):
        yield Row(f"idle memory (PSS) after {when}", f"{got / MIB:.1f} MiB",
                  f"bare boto3: {base / MIB:.1f} MiB", got / base, bound)
    yield Row("idle CPU, %", f"{percent:.3f} %", f"{bench.size.idle_s} s, polls of 5 s", percent,
              0.2)


def idle_local(bench: Bench):
    with running(bench, [MODULE, "--local", bench.folder().path]) as agent:
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
    folder, cases = bench.folder(), list(functions) * bench.size.peaks
    for name, (files, _) in functions.items():
        folder.code(make_zip(files), name)
    random.shuffle(cases)
    bodies = [task(n, name, functions[name][1], 1024) for n, name in enumerate(cases)]
    for body in bodies:
        folder.put(body)
    bench.drain(len(bodies), "--local", folder.path)
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
    folder, pairs, size = bench.folder(), [], bench.size.latencies // 2
    folder.code(make_zip({"main.py": OWN_TIME}))
    with running(bench, [MODULE, "--local", folder.path]) as agent:
        for body in map(task, range(size)):
            folder.hand_over(body)
            result = folder.result(body, agent)
            pairs.append((float(result["stdout"]), result["durationMillis"]))
    own, reported = max(pairs, key=lambda pair: abs(pair[1] - pair[0]))
    yield Row("duration error / 5 ms", f"{reported} ms", f"its own clock: {own:.2f} ms",
              abs(reported - own) / 5, 1.0, note=f"worst of {size} python runs")


# --- command line -------------------------------------------------------------------------------

# The start goes first: only the agent's makes files, and ext4 is slow at that for a minute after
# other rows have removed theirs.
FIGURES = {figure.__name__: figure for figure in (
    start, python_local, python_sqs, cpp_local, cpu, latency, package, idle, idle_local, requests,
    depth, peak, duration)}


def rows_of(bench: Bench, name: str):
    """The rows of a figure; when it cannot be measured, one that says why."""
    try:
        yield from FIGURES[name](bench)
    except Exception as problem:  # noqa: BLE001 (what ends one figure must not end the others)
        text = " ".join(f"{type(problem).__name__}: {problem}".split())
        yield Row(name, note=f"not measured: {text.replace('Unmeasured: ', '')}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer runs: under a minute")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=FIGURES, default=FIGURES,
                        help="some of: " + " ".join(FIGURES))
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE",
                        help="JSON lines, to FILE or in place of the table")
    arguments = parser.parse_args()
    if not MODULE.exists():
        parser.error(f"{MODULE} does not exist; set NANOGRID to the path of nanogrid.py")
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)     # for reap_orphans
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # clears up, too
    with contextlib.ExitStack() as stack:
        to_file = arguments.json not in (None, "-")
        lines = stack.enter_context(open(arguments.json, "w")) if to_file else None
        bench = Bench(QUICK if arguments.quick else FULL, stack)
        if arguments.json != "-":
            print(LINE.format("figure", "measured", "against", "ratio", "target", "", "").rstrip())
        for name in arguments.only:
            for row in rows_of(bench, name):
                print(row.as_json() if arguments.json == "-" else row.as_text(), flush=True)
                if lines:
                    print(row.as_json(), file=lines, flush=True)


if __name__ == "__main__":
    main()
