#!/usr/bin/env python3
"""NanoGrid: your own Lambda on one machine, in one file.

A task arrives as an SQS message (or as a file, with --local). The agent takes it, fetches the
code, runs it under its timeout and memory cap, measures its peak memory, publishes that, and
deletes the message if, and only if, the function succeeded:

    receive -> Task (checked) -> code cache -> workspace -> run -> report -> delete or leave

Theory of operation. Two kinds of process, both from this file. The agent talks to AWS, owns
the messages and their leases, unpacks code and reports; it has threads, and never forks a
function. The launcher is started first and never sees a credential; it forks a supervisor for
each slot, and each supervisor runs one function at a time: it limits it, looks after it, ends
all that is left of it and measures it. Whoever loses the process above itself kills what it
runs and ends, so no function survives even a SIGKILL of the agent.

The parts of this file, in order:

    Settings      reads application.yml and the environment; never asks AWS whether they are true
    Tasks         checks a message and a zip, field by field; never runs anything
    Log           lines, faults that begin and end, outages; never decides what becomes of a task
    AWS           makes the clients and tells passing errors from lasting ones; never retries
    Queue         owns messages and leases, of SQS or of a folder; never looks into a message
    Code          fetches, unpacks and keeps zips; never runs them
    Programs      shell, interpreter and handlers around a function; never know of this file
    Room          cgroup, mounts and directories of a slot; never starts anything in them
    Run           launcher, supervisors and their helpers; never speaks to AWS
    Measure       looks at a run, reads its output and says when it must end; kills nothing
    Report        says and stores what became of a turn, and the metric; never touches the queue
    Agent         slots, the loop and the shutdown; the only one that knows all the others
    Command line  --config, --local, --demo, --check, --invoke
"""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import fcntl
import fnmatch
import functools
import glob
import io
import itertools
import json
import marshal
import math
import os
import pwd
import random
import re
import resource
import select
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
import zipfile
import zlib
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, Protocol

# Python 3.7 and older show this line as the one that they cannot read.
if (running := sys.version_info) < (3, 9):  # NanoGrid needs Python 3.9 or newer
    sys.exit(f"NanoGrid needs Python 3.9 or newer; this is Python {running[0]}.{running[1]}")

__version__ = "1.0.0"
FILE = os.path.abspath(__file__)
MIB = 1024 * 1024
PAGE = resource.getpagesize()
LIBC = ctypes.CDLL(None, use_errno=True)
LONGEST_LEASE_SECONDS = 43_200  # SQS keeps no message in flight for longer than 12 hours
MAX_TIMEOUT_MS = LONGEST_LEASE_SECONDS * 1000  # the most that a message may ask for


# --- What ends the agent, or a message's turn ---


class ConfigError(Exception):
    """Settings that cannot be used; the text is a line `FILE:LINE: what; what to do` for each."""


class GiveUp(Exception):
    """The agent cannot go on; str() says why and what to do. Exit status 1."""


@dataclass(frozen=True)
class Outcome:
    """What a message's turn came to; None and "" where that is not known."""

    status: str  # ok, failed, timeout, oom, rejected, released, error
    reason: str | None = None  # one word
    text: str = ""  # for the log: what went wrong, where, what to do
    exit_code: int | None = None
    duration_millis: int | None = None
    peak_memory_bytes: int | None = None
    start: str | None = None  # warm or cold
    started_at: float | None = None  # seconds since the epoch
    stdout: str = ""
    stderr: str = ""
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    returned: str = ""  # JSON, by a handler; "" when there was none

    @property
    def is_good(self) -> bool:
        """Whether its function succeeded: that message alone is deleted."""
        return FATES[self.status].action == "delete"

    @property
    def ended_at(self) -> float | None:
        """When its run ended, in seconds since the epoch."""
        return self.started_at and self.started_at + (self.duration_millis or 0) / 1000


class Ended(Exception):
    """A message's turn ends; str() says why, and what to do.

    `known` holds those fields of its Report that a task that is wrong has right.
    """

    def __init__(self, outcome: Outcome, known: Mapping[str, Any] | None = None):
        super().__init__(outcome.text or outcome.status)
        self.outcome, self.known = outcome, known or {}


def rejected(reason: str, text: str, known: Mapping[str, Any] | None = None) -> Ended:
    """The end of a task that is wrong, or whose zip is: it never runs."""
    return Ended(Outcome("rejected", reason, text), known)


class Outage(Exception):
    """A part of AWS or of the machine is away: a turn waits; `reason` is REPORT's word."""

    def __init__(self, needs: Dependency, reason: str, text: str):
        super().__init__(text)
        self.needs, self.reason = needs, reason


# --------------------------------------------------------------------------------------------
# Settings: application.yml and the environment
# --------------------------------------------------------------------------------------------

# --- YAML: the subset that settings need, read as YAML 1.2 reads it or refused ---

_FORBIDDEN = re.compile(  # what YAML 1.2's c-printable leaves out; also a lone CR, a late BOM
    "[^\t\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
_MARKER = re.compile(r"(---|\.\.\.)(?=[ \t]|$) *([^ #])?")
_ITEM = re.compile(r"-(?: +|$)")
_COLON = re.compile(r" *:(?: +(?:#.*)?|$)")
_COMMENT = re.compile(r"(?: +#.*)?")
_EMPTY = re.compile(r"(\[ *\]|\{ *\})(?: +#.*)?")
_TOKEN = re.compile(r'''(?x)
    (?P<double> "(?:[^"\\]|\\.)*" )
  | (?P<single> '(?:[^']|'')*'(?!') )
  | (?P<plain>  (?: [^- \t?:,\[\]{}\#&*!|>'"%@`] | [-?:](?=[^ \t]) )       # ns-plain-first
                (?: [^ \t:] | :(?=[^ \t]) | [ ]+(?=[^ \t:\#]|:[^ \t]) )* )  # blanks inside only
''')
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))")
_ESCAPES = dict(zip('0abt\tnvfre "/\\N_LP', '\0\a\b\t\t\n\v\f\r\x1b "/\\\x85\xa0\u2028\u2029'))
_CORE_SCHEMA = (  # YAML 1.2.2, 10.3.2; in ASCII, since int() alone would take other digits and `_`
    (r"~|null|Null|NULL", lambda text: None),
    (r"true|True|TRUE|false|False|FALSE", lambda text: text[0] in "tT"),
    (r"[-+]?[0-9]+", int),
    (r"0o[0-7]+|0x[0-9a-fA-F]+", lambda text: int(text, 0)),
    (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", float),
    (r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", lambda s: float(s.replace(".", ""))),
)
_LONG_NUMBER = re.compile(r"(?:0[ox]|[-+])?[0-9a-fA-F]{301}")  # int(), str() raise at some thousand
_NOT_IN_SUBSET = {  # how text outside of the subset begins: what it is; what to write instead
    **dict.fromkeys("'\"", 'a quote is not closed in its line; close it, a line break is "\\n"'),
    **dict.fromkeys("&*", "an anchor or alias; write the value out wherever it is used"),
    **dict.fromkeys("|>", "a block of text; write it in one line, in double quotes with \\n"),
    **dict.fromkeys("{[", "braces or brackets; write one `key: value` or `- item` a line"),
    **dict.fromkeys("?:", "no `key: value`; write one, or put the text in quotes"),
    "-": "a list item stands where none can; write `- item` lines of plain values under a `key:`",
    "%": "a directive; leave it out, or put the text in quotes",
    "!": "a tag; leave it out (quotes make text of a number)",
    "\t": "a tab as white space; write spaces",
}


def parse_yaml(text: str, name: str = "application.yml") -> dict[str, Any]:
    """The map in a YAML text, {} if empty; ConfigError for the first thing out of the subset."""
    return _YamlReader(text, name).tree


Keys = tuple[str, ...]  # from the top of the file to an entry


@dataclass
class _Block:
    """A map or a list whose lines are being read."""

    indent: int
    path: Keys
    content: Any


class _YamlReader:
    """Reads line by line: `tree`, and `entries`: each path of keys, its line and its map."""

    def __init__(self, text: str, name: str):
        self.name, self.number = name, 0  # of the line that is being read
        self.tree: dict[str, Any] = {}
        self.entries: dict[Keys, tuple[int, dict[str, Any]]] = {}
        self.blocks: list[_Block] = []  # that are open, the innermost last
        self.opening: Keys | None = ()  # the path whose block may begin in this line
        for indent, body in self.content(text.removeprefix("\ufeff")):
            if self.opening == () and body[0] == "{" and _EMPTY.fullmatch(body):
                self.opening = None  # no block is open: no further line fits
                continue
            item = _ITEM.match(body)
            self.open_block(indent, bool(item))
            self.close_blocks(indent, bool(item))
            block = self.blocks[-1]
            if item and isinstance(block.content, list):
                block.content.append(self.scalar(body[item.end():]))
                self.opening = None
            else:
                self.opening = self.entry(body, block)

    def open_block(self, indent: int, is_item: bool) -> None:
        """Begin the document's map, or the block of the key above, if this is its first line."""
        path = self.opening
        if path is None:
            return
        if path == ():
            self.blocks.append(_Block(indent, (), self.tree))
            return
        above = self.blocks[-1]
        if indent > above.indent or is_item and indent == above.indent:
            if len(path) > 50:
                self.fail("nested too deep; use at most 50 levels")
            content: Any = [] if is_item else {}
            above.content[path[-1]] = content
            self.blocks.append(_Block(indent, path, content))

    def close_blocks(self, indent: int, is_item: bool) -> None:
        """End the blocks this line is not of; a list may stand at the indent of its key."""
        while self.blocks:
            block = self.blocks[-1]
            ends_list = isinstance(block.content, list) and not is_item
            if indent > block.indent or indent == block.indent and not ends_list:
                break
            self.blocks.pop()
        if not self.blocks or indent != self.blocks[-1].indent:
            self.fail("indented unlike its siblings, or text that goes on from the line above; "
                      "give them one indent, and write a value in its key's line")

    def fail(self, problem: str) -> NoReturn:
        raise ConfigError(f"{self.name}:{self.number}: {problem}")

    def content(self, text: str) -> Iterator[tuple[int, str]]:
        """(indent, body) of the lines with more than a comment or the `---` at the start."""
        begun = False
        for self.number, line in enumerate(text.split("\n"), 1):  # splitlines() takes U+2028, too
            line = line.removesuffix("\r")
            if bad := _FORBIDDEN.search(line):
                self.fail(f"the character U+{ord(bad[0]):04X} is not YAML; take it out, "
                          "or escape it")
            body = line.lstrip(" ")
            if body[:1] == "\t" or line[:1] == "%":
                self.fail(_NOT_IN_SUBSET[body[0]])
            if marker := _MARKER.match(line):
                if begun or marker[1] == "..." or marker[2]:
                    self.fail(f"`{marker[1]}` ends a document or has text after it; leave it out")
                begun = True
            elif body and body[0] != "#":
                begun = True
                yield len(line) - len(body), body.rstrip(" ")

    def entry(self, body: str, block: _Block) -> Keys | None:
        """Read a line of a map; the path of its key, if nothing stands behind it."""
        key, _, rest = self.token(body)
        if not (colon := _COLON.match(rest)):
            self.fail(f"{shown(body)} is no `key: value`; write a space after the colon, and a "
                      "value in its key's line")
        text, here = rest[colon.end():], (*block.path, key)
        if here in self.entries:
            self.fail(f"the key {shown(key)} stands in line {self.entries[here][0]} too; keep one")
        self.entries[here] = self.number, block.content
        if empty := _EMPTY.fullmatch(text):
            block.content[key] = [] if empty[1][0] == "[" else {}
        else:
            block.content[key] = self.scalar(text)
        return None if text else here

    def scalar(self, text: str) -> Any:
        if text[:1] in ("", "#"):
            return None
        value, is_plain, rest = self.token(text)
        if not _COMMENT.fullmatch(rest):
            self.fail(f"{shown(rest.strip())} after a value; put the whole value in one pair of "
                      "quotes, a key in its own line, a space before a `#`")
        if is_plain and _LONG_NUMBER.match(value):
            self.fail("a number that is too long; put it in quotes")
        return _typed(value) if is_plain else value

    def token(self, text: str) -> tuple[str, bool, str]:
        """What the token at the start of `text` says; is it plain (else quoted); the rest."""
        def character(escape: re.Match[str]) -> str:
            digits = escape[1] or escape[2] or escape[3]
            code = int(digits, 16) if digits else ord(_ESCAPES.get(escape[4], "\ud800"))
            if 0xD800 <= code <= 0xDFFF or code > 0x10FFFF:
                self.fail(f"{escape[0]} is no escape; write `\\\\`, or use single quotes")
            return chr(code)

        found = _TOKEN.match(text)
        rest = text[found.end():] if found else text.lstrip("-?:")
        if rest.lstrip(" :")[:1] == "\t":
            self.fail(_NOT_IN_SUBSET["\t"])
        if not found:
            self.fail(_NOT_IN_SUBSET.get(text[0], f"`{text[0]}` begins text; put it in quotes"))
        if found["double"]:
            return _ESCAPE.sub(character, found[0][1:-1]), False, rest
        return found["plain"] or found[0][1:-1].replace("''", "'"), bool(found["plain"]), rest


def _typed(text: str) -> Any:
    """A plain scalar's value by the core schema; the text itself when it is text."""
    return next((value(text) for kind, value in _CORE_SCHEMA if re.fullmatch(kind, text)), text)


def shown(value: Any, in_json: bool = False) -> str:
    """A value for an error text: on one line, and short; with `in_json` in JSON's words."""
    if isinstance(value, (dict, list)):
        return "a list" if isinstance(value, list) else "an object" if in_json else "a section"
    if value is None or isinstance(value, bool):
        return "empty" if value is None and not in_json else json.dumps(value)
    text = ascii(value) if in_json else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- Settings: the class is the table of every path, default, kind and limit ---

_SPRING_ONLY = {"spring", "server", "logging",
                "agent.docker", "agent.warmPool", "agent.polling", "agent.redis"}
_URL = r"https?://([\w.-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[!-~]*)?"
_KINDS = {  # kind of value: what its text must match; what to write when it does not
    "flag": ("", "write true or false"),
    "count": ("", "write a whole number, without quotes"),
    "buckets": (r"(?!)", "write a list, one `- name` a line, or []"),
    "region": (r"(?!.*[0-9][a-z]$)[a-z0-9-]+", "write a region such as ap-northeast-2"),
    "url": (_URL, "write a URL that begins with https:// or http://"),
    "queue": (_URL, "write the queue's URL, as SQS shows it under Details"),
    "bucket": (r"[A-Za-z0-9._-]{3,255}",
               "write the bucket's bare name, 3 characters or more, no ARN, no s3:// URL"),
    "network": ("host|none", "write host or none"),
    "metadata": ("refuse|allow", "write refuse or allow"),
    "role": (r"arn:aws[a-z-]*:iam::[0-9]{12}:role/[\w+=,.@/-]{1,512}",
             "write the role's ARN, such as arn:aws:iam::123456789012:role/NAME"),
    "user": (r"[0-9]{1,9}|[1-3][0-9]{9}|[^\W\d][^\s:/]*", "write a user name or a uid"),
    "command": (r"/.*[^/]|\w[^\s/]*", "write an absolute path, or a bare name to find on PATH"),
    "prefix": (r".{0,120}", "write at most 120 characters"),
    "namespace": (r"(?!AWS/|:)[A-Za-z0-9._/#:-]{1,255}", "write letters, digits, . _ / # : or -"),
    "directory": (r"(/(?!\.\.?(/|$))[^/]+)+/?", "write an absolute path without . and .. in it"),
}
_AWS_QUEUE = re.compile(
    r"(?i)https?://(?:(?:[^/]+\.)?sqs(?:-fips)?\.([a-z0-9-]+)\.(?:vpce\.)?"
    r"(?:amazonaws\.com|api\.aws)|(?:([a-z0-9-]+)\.)?queue\.amazonaws\.com)"
    r"(?:\.cn)?(?::[0-9]+)?(/.*)?")


class Setting(NamedTuple):
    """A row of the table: where a setting may stand, what it may be, which field holds it."""
    path: str
    kind: str
    default: Any = None
    low: int = 1
    high: int = 2**31 - 1
    why: str = ""  # these limits
    field: str = ""

    @property
    def variable(self) -> str:
        return self.path.replace(".", "_").upper()


def _at(path: str, *columns: Any) -> Any:
    """A field of Settings that is written at agent.`path`."""
    row = Setting(f"agent.{path}", *columns)
    preset = "default_factory" if callable(row.default) else "default"
    return field(metadata={"row": row}, **{preset: row.default})


def _share(whole: int) -> int:
    """This agent's share of the machine: NANOGRID_AGENTS, as the systemd template sets it."""
    text = os.environ.get("NANOGRID_AGENTS") or "1"
    if not re.fullmatch("[1-9][0-9]{0,2}", text):
        raise ConfigError(f"NANOGRID_AGENTS: is {shown(text)}; write how many agents there are")
    return max(1, whole // int(text))


def _admitted_mb() -> int:
    """The memory that functions may declare together; the rest is the system's and the agent's.

    It is of the machine's, or of the least memory.max that holds for this process.
    """
    whole = os.sysconf("SC_PHYS_PAGES") * PAGE
    with contextlib.suppress(OSError):
        root, path = cgroup_root(), own_cgroup()
        while path.startswith(root):
            limit = read_proc(f"{path}/memory.max").strip()
            whole = min(whole, int(limit)) if limit.isdigit() else whole
            path = os.path.dirname(path)
    return whole // MIB - max(256, whole // MIB // 10)


@dataclass(frozen=True)
class Settings:
    """What the file and the environment say; the default where neither says anything."""
    region: str | None = _at("aws.region", "region")
    endpoint_url: str | None = _at("aws.endpointUrl", "url")
    spot_interruption: bool = _at("aws.spotInterruption", "flag", False)
    queue_url: str | None = _at("sqs.queueUrl", "queue")
    wait_time_seconds: int = _at("sqs.waitTimeSeconds", "count", 20, 0, 20, "SQS allows 0 to 20")
    max_number_of_messages: int = _at("sqs.maxNumberOfMessages", "count", 10, 1, 10,
                                      "SQS allows 1 to 10")
    code_bucket: str | None = _at("s3.codeBucket", "bucket")
    allowed_buckets: tuple[str, ...] = _at("s3.allowedBuckets", "buckets", ())
    concurrency: int = _at("execution.concurrency", "count",
                           lambda: _share(len(os.sched_getaffinity(0))), 1, 1000)
    memory_mb: int = _at("execution.memoryMb", "count",
                         lambda: _share(_admitted_mb()))
    default_timeout_ms: int = _at(
        "execution.defaultTimeoutMs", "count", 10_000, 1, MAX_TIMEOUT_MS,
        f"SQS lends a message for 12 h, so 1 to {MAX_TIMEOUT_MS} are allowed")
    default_memory_mb: int = _at("execution.defaultMemoryMb", "count", 128)
    shutdown_grace_seconds: int = _at("execution.shutdownGraceSeconds", "count", 30, 0, 43_200)
    patience_seconds: int = _at("execution.patienceSeconds", "count", 600, 0, 43_200)
    network: str = _at("execution.network", "network", "host")
    metadata: str = _at("execution.metadata", "metadata", "refuse")
    function_role: str | None = _at("execution.functionRole", "role")
    run_as: str | None = _at("execution.runAs", "user")
    warm_start: bool = _at("execution.warmStart", "flag", True)
    max_open_files: int = _at("execution.maxOpenFiles", "count", 1024, 16)
    max_processes: int = _at("execution.maxProcesses", "count", 512)
    max_file_mb: int = _at("execution.maxFileMb", "count", 1024)
    max_disk_mb: int = _at("execution.maxDiskMb", "count", 2048)
    max_files: int = _at("execution.maxFiles", "count", 100_000)
    python: str | None = _at("runtimes.python", "command")
    cpp: str | None = _at("runtimes.cpp", "command")
    nodejs: str | None = _at("runtimes.nodejs", "command")
    go: str | None = _at("runtimes.go", "command")
    output_bucket: str | None = _at("output.bucket", "bucket")
    output_prefix: str = _at("output.s3Prefix", "prefix", "outputs")
    output_queue_url: str | None = _at("output.queueUrl", "queue")
    namespace: str = _at("metrics.namespace", "namespace", "NanoGrid/FunctionRunner")
    flush_seconds: int = _at("metrics.flushSeconds", "count", 10, 1, 3600)
    task_base_dir: str = _at("taskBaseDir", "directory", "/tmp/task")
    file: Path | None = field(default=None, compare=False)  # where they stand


SETTINGS = tuple(one.metadata["row"]._replace(field=one.name)
                 for one in fields(Settings) if one.metadata)
_REQUIRED = {"region", "queue_url", "code_bucket"}
_FALLBACKS = {"region": ("AWS_REGION", "AWS_DEFAULT_REGION"), "endpoint_url": ("AWS_ENDPOINT_URL",)}
_HELD_AS: dict[str, Callable[[Any], Any]] = {
    "user": str, "buckets": tuple, "prefix": lambda text: text.strip("/")}
_ROWS = {tuple(row.path.split(".")): row for row in SETTINGS}
_SECTIONS = {keys[:depth] for keys in _ROWS for depth in range(1, len(keys))}


def load_settings(path: Path | None, environ: Mapping[str, str],
                  local: bool) -> tuple[Settings, list[str]]:
    """The settings in the file at `path`, if any, with the environment over it; warnings.

    `local` needs nothing of AWS. Raises ConfigError with every problem at once.
    """
    written, problems, warnings = _from_file(path) if path else ({}, [], [])
    _look_at_names(environ, problems, warnings)
    values: dict[str, Any] = {"file": path}
    for keys, row in _ROWS.items():
        names = (row.variable, *(() if local else _FALLBACKS.get(row.field, ())))
        own, *fallbacks = [(_from_variable(name, row, environ), name) for name in names]
        _, section = written.get(keys[:-1]) or written.get(()) or (None, row.variable)
        in_file = written.get(keys) or (None, section)
        value, where = next((one for one in (own, in_file, *fallbacks) if one[0] is not None),
                            (None, in_file[1]))
        if value is None:
            faults = [] if local or row.field not in _REQUIRED else [
                f"is missing; write it in application.yml, or set {' or '.join(names)}"]
        elif not (faults := _faults(row, value)):
            values[row.field] = _HELD_AS.get(row.kind, lambda same: same)(value)
            if row.kind == "queue" and not local:
                faults = [*_queue_faults(value, values.get("region"))]
        problems += [f"{where}: {row.path} {fault}" for fault in faults]
    if problems:
        raise ConfigError("\n".join(problems))
    return Settings(**values), warnings


def _from_file(path: Path) -> tuple[dict[Keys, tuple[Any, str]], list[str], list[str]]:
    """{path of keys, () for the file: (value, FILE:LINE)}; what is wrong with keys; warnings."""
    try:
        reader = _YamlReader(path.read_bytes().decode(), str(path))
    except OSError as error:
        raise ConfigError(f"{path}:1: cannot be read ({error.strerror}); copy "
                          "application.yml.example there, or name another with --config. Without "
                          "settings --demo shows what this is, and --help the rest") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from None
    written: dict[Keys, tuple[Any, str]] = {(): (reader.tree, f"{path}:1")}
    problems, warnings = [], []
    for keys, (line, block) in reader.entries.items():
        if keys[:-1] in _ROWS or keys[:-1] not in written:
            continue  # it stands below what is no section, was refused or passed over
        value, where, dotted = block[keys[-1]], f"{path}:{line}", repr(".".join(keys))[1:-1]
        if dotted in _SPRING_ONLY:
            warnings.append(f"{where}: {dotted} is for the Spring Boot agent; passed over")
        elif keys in _SECTIONS and not isinstance(value, (dict, type(None))):
            problems.append(f"{where}: {dotted} is {shown(value)}; write its keys beneath it")
        elif keys in _SECTIONS or keys in _ROWS:
            written[keys] = value, where
        else:
            known = {".".join(one).lower(): ".".join(one) for one in (*_SECTIONS, *_ROWS)
                     if len(one) >= len(keys)}
            nearest = known[get_close_matches(dotted.lower(), known, 1, 0)[0]]
            problems.append(f"{where}: {dotted} is no known key; the nearest is {nearest}")
    return written, problems, warnings


def _look_at_names(environ: Mapping[str, str], problems: list[str], warnings: list[str]) -> None:
    """Add what is wrong with the names of variables AGENT_..., and which are passed over."""
    known = [row.variable for row in SETTINGS]
    for name in sorted(environ):
        dotted = name.lower().replace("_", ".") + "."
        if not name.startswith("AGENT_") or re.sub("(?<=BUCKETS)_[0-9]+$", "", name) in known:
            continue
        if dotted.startswith(tuple(f"{section.lower()}." for section in _SPRING_ONLY)):
            warnings.append(f"{name} is for the Spring Boot agent; passed over")
        else:
            nearest = get_close_matches(name, known, 1, 0)[0]
            problems.append(f"{name}: is no setting; the nearest is {nearest}")


def _from_variable(name: str, row: Setting, environ: Mapping[str, str]) -> Any:
    """A variable's value; None when empty: env files can empty a variable but not unset it."""
    text = environ.get(name, "").strip(" ")
    if row.kind == "buckets":
        numbered = sorted((len(one), one) for one in environ if re.fullmatch(name + "_[0-9]+", one))
        items = [*text.split(","), *(environ[one] for _, one in numbered)]
        return [item.strip(" ") for item in items if item.strip(" ")] or None
    if row.kind in ("flag", "count") and text:
        return _typed(text[:300])  # int() raises at some thousand digits; 300 are too many as well
    return text or None


def _faults(row: Setting, value: Any) -> list[str]:
    """What is wrong with a value for `row`."""
    if row.kind == "buckets" and isinstance(value, list):
        return [fault for one in value for fault in _faults(row._replace(kind="bucket"), one)]
    pattern, advice = _KINDS[row.kind]
    value = str(value) if row.kind == "user" and type(value) is int else value
    if isinstance(value, str) and "${" in value:
        fits, advice = False, f"write what Spring would put there, or set {row.variable}"
    elif row.kind == "flag":
        fits = isinstance(value, bool)
    elif row.kind == "count":
        fits = type(value) is int and row.low <= value <= row.high
        if type(value) is int:
            advice = row.why or f"{row.low} to {row.high} are allowed"
    else:
        fits = (isinstance(value, str) and value.isprintable()
                and re.fullmatch(pattern, value) is not None)
        advice = advice if isinstance(value, (str, dict, list)) else "put it in quotes"
    return [] if fits else [f"is {shown(value)}; {advice}"]


def _queue_faults(url: str, region: str | None) -> Iterator[str]:
    """What is wrong with the URL of a queue, beyond its being a URL."""
    aws = _AWS_QUEUE.fullmatch(url)
    of_queue = aws and (aws[1] or aws[2] or "us-east-1").lower()
    if re.search("YOUR_[A-Z]|(?i:your_account)", url):
        yield "still holds YOUR_ACCOUNT_ID; write the id that `aws sts get-caller-identity` prints"
    elif url.endswith(".fifo"):
        yield "is a FIFO queue; write the URL of a standard queue"
    elif aws and not re.fullmatch(r"/[0-9]{12}/[A-Za-z0-9_-]{1,80}", aws[3] or ""):
        yield f"is {shown(url)}; write ...amazonaws.com/ACCOUNT_ID/NAME"
    if aws and region not in (None, of_queue):
        yield (f"is in {of_queue}, but agent.aws.region (or AWS_REGION) is {shown(region)}; write "
               "the queue's region in both")


# --------------------------------------------------------------------------------------------
# Tasks: the message, and its zip, checked field by field
# --------------------------------------------------------------------------------------------

REPORTED = {"requestId": "request_id", "functionId": "function_id", "runtime": "runtime",
            "timeoutMs": "timeout_ms", "memoryMb": "memory_mb"}

_PART = r"(?!\.\.?(?:/|\Z))[A-Za-z0-9._:-]+"
_REQUEST_ID = re.compile(rf"(?=.{{1,128}}\Z){_PART}")
_FUNCTION_ID = re.compile(rf"(?=.{{1,128}}\Z){_PART}(?:/{_PART})*")
_STEP = r"[^\s./\\\x00-\x1f\x7f-\x9f\ud800-\udfff]+"
_HANDLER = re.compile(rf"(?=.{{1,256}}\Z)(?:{_STEP}[./])*{_STEP}\.{_STEP}")
_UNPRINTED = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # controls, lone surrogates


class Runtime(NamedTuple):
    """How to run a runtime.

    A new one needs a field of its name in Settings, and in NO_MEMORY its words for that.
    """
    aliases: tuple[str, ...]
    programs: tuple[str, ...]  # looked up on PATH unless settings name one
    version: tuple[str, str]  # what has a program say which it is; how that looks
    # By entry, the first of these files that the zip has at its top; {program}: as it was found.
    commands: dict[str, tuple[str, ...]]
    # The compiler's command, which makes `main`; {sources}: all of the entry's kind beside it.
    compiled: dict[str, tuple[str, ...]]
    handler_files: tuple[str, ...] = ()  # what may follow a handler's FILE; none: it has none


SHELL_ENTRY = {"run.sh": ("/bin/bash", "run.sh"), "main": ("./main",)}
RUNTIMES = {
    "python": Runtime((), ("python3", "python"), ("--version", r"Python 3\."),
                      {"main.py": ("{program}", "main.py")}, {}, (".py", "/__init__.py")),
    "cpp": Runtime(("c++",), ("g++", "c++", "clang++"), ("--version", r"[gc]\+\+|clang|gcc|GCC"),
                   SHELL_ENTRY, {"main.cpp": ("{program}", "-O2", "-std=c++17", "-o", "{output}",
                                              "{sources}")}),
    "nodejs": Runtime(("node",), ("node", "nodejs"), ("--version", "v[0-9]"),
                      {"index.js": ("{program}", "index.js")}, {}, (".js", ".mjs", ".cjs")),
    "go": Runtime(("golang",), ("go",), ("version", "go version"), SHELL_ENTRY, {
        # auto: as a module where there is a go.mod, and a plain package else
        "main.go": ("/usr/bin/env", "GO111MODULE=auto", "{program}", "build", "-o", "{output}",
                    ".")}),
}
# What a task's `env` cannot name, for the run gets it anyway; the second with functionRole only
RUN_ENV = {"PATH", "LANG", "TZ", "HOME", "TMPDIR", "OUTPUT_DIR", "USER", "LOGNAME", "REQUEST_ID",
           "FUNCTION_ID", "MEMORY_MB", "TIMEOUT_MS", "AWS_LAMBDA_FUNCTION_NAME",
           "AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "LAMBDA_TASK_ROOT", "_HANDLER"}
ROLE_ENV = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION",
            "AWS_DEFAULT_REGION"}
MAX_ENV_BYTES = 32 * 1024  # all of a task's; Lambda allows 4 KB
_RUNTIME_OF = {alias: name for name, runtime in RUNTIMES.items()
               for alias in (name, *runtime.aliases)}


@dataclass(frozen=True)
class Task:
    """A message that passed every check; `input` is its JSON text, b"" when it has none."""
    request_id: str
    function_id: str
    runtime: str
    bucket: str
    key: str
    timeout_ms: int
    memory_mb: int
    input: bytes
    handler: str = ""  # FILE.FUNCTION, as AWS Lambda has it; "": the zip's entry file is run
    env: dict[str, str] = field(default_factory=dict)

    @property
    def code(self) -> tuple[str, str, str]:
        """Which code it runs."""
        return self.bucket, self.key, self.runtime

    def known(self) -> dict[str, Any]:
        """The fields that its Report has, too."""
        return {name: getattr(self, name) for name in REPORTED.values()}


def parse_task(body: str, settings: Settings, any_bucket: bool = False) -> Task:
    """The task in a message body; raises Ended, which names every field that is wrong.

    `any_bucket` is the code source's.
    """
    given, input_text = _read_json(body)
    values = {"s3Bucket": settings.code_bucket or "", "timeoutMs": settings.default_timeout_ms,
              "memoryMb": settings.default_memory_mb, "handler": "", "env": {}}
    # null for an optional field is how many serializers write "not set"
    values.update((k, v) for k, v in given.items() if v is not None or k not in values)
    right: dict[str, Any] = {}
    wrong: dict[str, tuple[str, str]] = {}
    for name, reason, kind, check, allowed in _rules(settings, any_bucket):
        value = values.get(name)
        if name not in wrong and type(value) is kind and check(value):
            right[name] = value
        elif name not in wrong:
            found = shown(value, in_json=True) if name in values else "missing"
            wrong[name] = reason, f"{name} is {found}; it must be {allowed}"
    if "runtime" in right:
        right["runtime"] = _RUNTIME_OF[right["runtime"]]
        if right.get("handler") and not RUNTIMES[right["runtime"]].handler_files:
            having = " and ".join(name for name in RUNTIMES if RUNTIMES[name].handler_files)
            wrong["handler"] = "task", f"handler is for {having}, not {right['runtime']}"
    if fault := _env_fault(right.get("env", {}), settings):
        wrong["env"] = "task", fault
    if wrong:
        raise rejected(next(iter(wrong.values()))[0], "; ".join(text for _, text in wrong.values()),
                       {REPORTED[name]: right[name] for name in REPORTED if name in right})
    return Task(
        request_id=right["requestId"], function_id=right["functionId"], runtime=right["runtime"],
        bucket=right["s3Bucket"], key=right["s3Key"], timeout_ms=right["timeoutMs"],
        memory_mb=right["memoryMb"], input=input_text.encode(), handler=right["handler"],
        env=right["env"])


def _rules(settings: Settings, any_bucket: bool) -> list[tuple[str, str, type, Any, str]]:
    """(field, reason, type, check, what the type and the check allow)."""
    buckets = [name for name in (settings.code_bucket, *settings.allowed_buckets) if name]
    return [
        ("requestId", "task", str, _REQUEST_ID.fullmatch,
         "1 to 128 of A-Z a-z 0-9 . _ : -, and neither '.' nor '..'"),
        ("functionId", "task", str, _FUNCTION_ID.fullmatch,
         "1 to 128 of A-Z a-z 0-9 . _ : / - without an empty, '.' or '..' path part"),
        ("runtime", "task", str, _RUNTIME_OF.get, f"one of {', '.join(_RUNTIME_OF)}"),
        ("s3Key", "task", str, lambda v: not _UNPRINTED.search(v) and 1 <= len(v.encode()) <= 1024,
         "a string of 1 to 1024 bytes without control characters"),
        ("s3Key", "task", str, lambda v: not any_bucket or not {"", ".", ".."} & set(v.split("/")),
         "the path of a file below DIR/code, without an empty, '.' or '..' part"),
        ("timeoutMs", "task", int, lambda v: 1 <= v <= MAX_TIMEOUT_MS,
         f"a whole number from 1 to {MAX_TIMEOUT_MS}"),
        ("memoryMb", "task", int, lambda v: v >= 1, "a whole number from 1 upwards"),
        ("handler", "task", str, lambda v: not v or _HANDLER.fullmatch(v),
         "FILE.FUNCTION, such as app.handler or src/index.handler"),
        ("env", "task", dict, lambda v: True, "an object of strings"),
        ("s3Bucket", "task", str, lambda v: True, "a string"),
        ("s3Bucket", "bucket", str, lambda v: any_bucket or v in buckets,
         f"one of {', '.join(buckets)} (agent.s3.codeBucket and allowedBuckets)"),
        ("memoryMb", "memory", int, lambda v: v <= settings.memory_mb,
         f"at most {settings.memory_mb}, all that can be admitted (agent.execution.memoryMb)"),
    ]


def _env_fault(env: dict[str, Any], settings: Settings) -> str:
    """What is wrong with a task's `env`; "" when nothing is."""
    taken, size = RUN_ENV | ROLE_ENV if settings.function_role else RUN_ENV, 0
    for name, value in env.items():
        said = f"env has {shown(name, in_json=True)}"
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
            return f"{said}; names are of A-Z a-z 0-9 _ and begin with no digit"
        if name in taken:
            return f"{said}, which each run gets from the agent; take it out"
        if not isinstance(value, str) or re.search("[\0\ud800-\udfff]", value):
            return f"{said} as {shown(value, in_json=True)}; write a string, without NUL"
        size += len(f"{name}={value}".encode())
    return f"env has {size} bytes; at most {MAX_ENV_BYTES} are allowed" * (size > MAX_ENV_BYTES)


def _read_json(body: str) -> tuple[dict[str, Any], str]:
    """The message's fields, and the JSON text of `input` in ASCII ("" when there is none)."""
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"the key {shown(twice, in_json=True)} stands twice in one object")
        return dict(pairs)

    try:
        found = json.loads(body, object_pairs_hook=unique, parse_float=finite,
                           parse_constant=finite)
        if isinstance(found, dict):
            return found, json.dumps(found["input"]) if "input" in found else ""
    except RecursionError:
        raise rejected("task", "the message is JSON that is nested too deep") from None
    except ValueError as error:  # also a number of 4,301 digits
        raise rejected("task", f"the message is not JSON that can be read: {_why(error)}") from None
    raise rejected("task", f"the message is {shown(found, in_json=True)}; it must be a JSON object")


def finite(number: str) -> float:
    """A number of JSON; ValueError for NaN and 1e999, which not every reader can read."""
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number[:80]!r} is no number of JSON, or too large")
    return value


def _why(error: Exception) -> str:
    """What a library's error says, fit for a log line."""
    return ascii(str(error) or type(error).__name__)[1:-1][:200]


# --- Zips: checked, unpacked, and the file that a run starts with ---

MAX_UNPACKED = 1024 * MIB          # of the zip itself, too; torch unpacks to 951
MAX_MEMBERS = 50_000
MAX_PATHS = 2 * MAX_MEMBERS        # members and the folders that their names imply
MAX_DIRECTORY = 400 * MAX_MEMBERS  # bytes of the zip's own directory, which zipfile reads at once
MAX_NAME_BYTES = 1000              # PATH_MAX and XFS's limit on a link, less room for our part
MAX_PART_BYTES = 255               # NAME_MAX
_MEMBER_KINDS = {0: "file", stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link"}
_OUTSIDE = re.compile(r"\A/|\A[A-Za-z]:(?:/|\Z)|(?:\A|/)\.\.(?:/|\Z)")
UTF8_NAME = 0x800  # a member's flag (APPNOTE.TXT 4.4.4)
TIMES = {0x5455: 1, 0x5855: 4}  # extra fields, as unzip knows them, and where their seconds are
_CORRUPT = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError,
            ValueError, OverflowError)  # what zipfile raises for wrong bytes; never OSError


def unpack(archive: Path, target: Path) -> list[str]:
    """Unpack a zip into the new or empty folder `target`; the sorted paths of its regular files.

    Modes are 0755 for folders and what is executable, else 0644; files keep their times, as those
    of shipped .pyc must. Raises Ended("zip"); nothing is written outside of `target`, which the
    caller removes then. An OSError is the machine's.
    """
    with _Archive(archive) as source:
        try:
            bundle = zipfile.ZipFile(source)
        except _CORRUPT as error:
            raise rejected("zip", f"no zip that can be read: {_why(error)}; zip it again") from None
        tree = _tree(bundle.infolist(), os.fstat(source.fileno()).st_size)
        folders, files, links = ([path for path in sorted(tree) if tree[path][0] == kind]
                                 for kind in ("folder", "file", "link"))
        for path in folders:
            (target / path).mkdir(exist_ok=True)
            (target / path).chmod(0o755)
        has_modes = any(map(_mode, bundle.infolist()))
        for path in files:
            member = tree[path][1]
            is_program = _mode(member) & 0o111 or path == "main" and not has_modes
            with open(target / path, "xb") as file:
                file.writelines(_content(bundle, member))
                file.flush()
                os.fchmod(file.fileno(), 0o755 if is_program else 0o644)
                os.utime(file.fileno(), (_modified(member),) * 2)
        for path in links:  # last, so that nothing can be written through one
            member = tree[path][1]
            if member.file_size > MAX_NAME_BYTES:
                raise _bad(member, f"is a link of over {MAX_NAME_BYTES} bytes; make it shorter")
            link = os.fsdecode(b"".join(_content(bundle, member)))
            # A link's parents are real folders, so that '..' at its beginning goes where it says;
            # behind a name it would not, if that name is a link.
            parts = [part for part in link.split("/") if part not in ("", ".")]
            ups = parts.count("..")
            leaves = ups > path.count("/") or ".." in parts[ups:]
            if leaves or link[:1] in ("", "/") or "\0" in link:
                raise _bad(member, f"is a link to {shown(link, in_json=True)}; it must be "
                                   "relative, stay inside and have '..' only at its beginning")
            (target / path).symlink_to(link)
        return files


class _Archive(io.FileIO):
    """A zip's bytes for zipfile, which believes the offsets and sizes that they claim."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_SET and not 0 <= offset <= MAX_UNPACKED:
            raise zipfile.BadZipFile(f"it points to byte {offset}, which it cannot have")
        return super().seek(offset, whence)

    def read(self, size: int | None = -1) -> bytes:
        if size and size > MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"its directory claims {size} bytes")
        return super().read(size)


def _tree(members: list[zipfile.ZipInfo], size: int) -> dict[str, tuple[str, Any]]:
    """Each path of a zip of `size` bytes: its kind, and its member (None: names imply it)."""
    if not members:
        raise rejected("zip", "the zip has no members; zip the function's files")
    _check_size(members)
    if sum(member.compress_size for member in members) > size:
        raise rejected("zip", "members of the zip share their bytes, as in a zip bomb")
    tree: dict[str, tuple[str, Any]] = {"": ("folder", None)}
    for member in members:
        path, kind = _checked(member)
        known, other = tree.get(path, (kind, None))
        if known != kind and "folder" in (known, kind):
            raise _bad(member, "is both a file and a folder; rename one")
        if other and kind != "folder":
            raise _bad(member, "stands twice in the zip; leave one out")
        tree[path] = kind, member
        while (path := path.rpartition("/")[0]) not in tree:
            tree[path] = "folder", None
        if tree[path][0] != "folder":
            raise _bad(member, f"stands below {shown(path, in_json=True)}, which is no folder; "
                               "rename one")
        if len(tree) > MAX_PATHS:
            raise rejected("zip", f"the zip has over {MAX_PATHS} files and folders")
    return tree


def _check_size(members: list[zipfile.ZipInfo]) -> None:
    """Refuse a zip that is too large, by the names of the folders that make it so."""
    for limit, unit, what, weights in (
            (MAX_MEMBERS, 1, "members", [1 for _ in members]),
            # zipfile unpacks no more of a member than this
            (MAX_UNPACKED, MIB, "MiB unpacked", [member.file_size for member in members])):
        if sum(weights) <= limit:
            continue
        folders: Counter[str] = Counter()
        for member, weight in zip(members, weights):
            first, *deeper = _name(member).split("/")[:-1] or ["."]
            folders[first] += weight
            if deeper:
                folders[f"{first}/{deeper[0]}"] += weight
        largest = [f"{shown(name, in_json=True)} {math.ceil(weight / unit)}"
                   for name, weight in folders.most_common(4)]
        total = math.ceil(sum(weights) / unit)
        raise rejected("zip", f"the zip has {total} {what}; {limit // unit} are allowed; the "
                              f"largest folders: {', '.join(largest)}")


def _checked(member: zipfile.ZipInfo) -> tuple[str, str]:
    """A member's path below the target ("": the target itself) and kind; Ended if it may not be."""
    name, method = _name(member), member.compress_type
    parts = [part for part in name.split("/") if part not in ("", ".")]
    too_long = len(name.encode()) > MAX_NAME_BYTES or any(
        len(part.encode()) > MAX_PART_BYTES for part in parts)
    for is_wrong, what in (
            ("\0" in name, "has a NUL in its name; rename it"),
            ("\\" in name, "has a backslash: made by an old Windows tool; zip it again with 7-Zip"),
            (_OUTSIDE.search(name),
             "may leave the zip's folder (absolute, '..' or drive); make it relative"),
            (too_long, f"has over {MAX_NAME_BYTES} bytes of name, or {MAX_PART_BYTES} between '/'"),
            (member.flag_bits & 0x1, "is encrypted; zip it without a password"),
            # a read of 600 bytes of bzip2 can take a gigabyte: zipfile sets no bound to it
            (method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED),
             f"is packed by method {method}; zip it with deflate"),
            (stat.S_IFMT(_mode(member)) not in _MEMBER_KINDS,
             "is a device, a pipe or a socket; leave it out")):
        if is_wrong:
            raise _bad(member, what)
    kind = "folder" if name.endswith("/") else _MEMBER_KINDS[stat.S_IFMT(_mode(member))]
    return "/".join(parts), kind


def _name(member: zipfile.ZipInfo) -> str:
    """Its whole name, which is UTF-8 where it can be, for many a tool does not set the flag."""
    with contextlib.suppress(UnicodeDecodeError):
        if not member.flag_bits & UTF8_NAME:  # zipfile reads such as code page 437
            return member.orig_filename.encode("cp437").decode()
    return member.orig_filename


def _mode(member: zipfile.ZipInfo) -> int:
    """Its file mode, where Unix or macOS made the zip (APPNOTE.TXT 4.4.2)."""
    return member.external_attr >> 16 if member.create_system in (3, 19) else 0


def _modified(member: zipfile.ZipInfo) -> float:
    """When it was changed, in seconds since the epoch."""
    at, extra = 0, member.extra
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, at)
        at += 4 + size
        start = TIMES.get(kind, size)
        if start + 4 <= size and at <= len(extra):
            return float(struct.unpack_from("<l", extra, at - size + start)[0])
    return time.mktime((*member.date_time, 0, 0, -1))  # local time, and every other second


def _content(bundle: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[bytes]:
    """The member's bytes in pieces; Ended when they are corrupt."""
    try:
        with bundle.open(member) as stream:
            while piece := stream.read(65536):
                yield piece
    except _CORRUPT as error:
        raise _bad(member, f"is corrupt: {_why(error)}; zip it again") from None


def _bad(member: zipfile.ZipInfo, what: str) -> Ended:
    return rejected("zip", f"zip member {shown(member.orig_filename, in_json=True)} {what}")


def entry_files(runtime: str, handler: str) -> list[str]:
    """The files that a run may start with; it does with the first that is there."""
    known = RUNTIMES[runtime]
    if not handler:
        return [*known.commands, *known.compiled]
    file = handler.rpartition(".")[0]
    file = file.replace(".", "/") if runtime == "python" else file
    return [file + ending for ending in known.handler_files]


def find_entry(target: Path, runtime: str, handler: str = "") -> str:
    """The file, or link to one, that a run of a zip starts with; raises Ended("entry")."""
    names, hint = entry_files(runtime, handler), ""
    place = f"for the handler {handler}" if handler else "at its top"
    if RUNTIMES[runtime].handler_files and not handler:
        place += ", and the task names no handler"
    for name in names:
        if (target / name).is_file():
            if name != "main" or (target / name).stat().st_mode & 0o111:
                return name
            hint = "; main is there but not executable: chmod +x before zipping"
    below = sorted(path for name in names for path in target.glob(f"*/{glob.escape(name)}"))
    if below and not hint:
        folder = shown(below[0].relative_to(target).parts[0], in_json=True)
        hint = f"; {folder} has one: zip what is in that folder, not itself"
    raise rejected("entry", f"the zip has no {' or '.join(names)} {place}{hint}")


# --------------------------------------------------------------------------------------------
# Log: lines, and what fails for a while
# --------------------------------------------------------------------------------------------

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
_UNSAFE = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff"
                     "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")  # bidi controls


def iso(seconds: float) -> str:
    """A time as ISO 8601 in UTC with milliseconds."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds * 1000) % 1000:03d}Z"


class Log:
    """Lines on standard error, as text or as JSON; one write for what belongs together."""

    def __init__(self, form: str = "text", level: str = "INFO"):
        self.json = form == "json"
        self.least = LEVELS.index(level)
        self.lock = threading.Lock()

    def __call__(self, level: str, text: str, **pairs: Any) -> None:
        self.write([self.line(level, text, pairs)])

    def line(self, level: str, text: str, pairs: Mapping[str, Any]) -> str:
        """One line, what would break or reorder it escaped; "" when its level is not wanted."""
        if LEVELS.index(level) < self.least:
            return ""
        now = iso(time.time())
        if self.json:
            return json.dumps({"time": now, "level": level, "message": text, **pairs}) + "\n"
        text += "".join(f" {key}={'-' if value is None else value}" for key, value in pairs.items())
        safe = _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
        return f"{now} {level} {safe}\n"

    def write(self, lines: list[str]) -> None:
        """Write lines together; a standard error that is gone or full stops no job."""
        content = "".join(lines).encode("utf-8", "backslashreplace")
        with self.lock, contextlib.suppress(OSError):
            write_all(2, content)


# Errors of the machine that pass when somebody makes room: errno -> REPORT's word.
MACHINE_AWAY = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG), "disk"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "descriptors"),
    errno.EAGAIN: "processes", errno.ENOMEM: "memory"}


TRY_SECONDS = 10  # for so long one thread alone tries whether a part is back
FIRST_PAUSE = 0.4  # seconds, jittered down to half; doubled by each failure in a row
LONGEST_PAUSE = 10  # soon enough after an hour's outage, and rare enough for AWS in that hour
REFUSAL_PAUSE = 30  # the longest after a refusal, which a person has to mend
FAILING_PAUSES = 0.25, 30  # the first and the longest of the receiver, when everything fails


class Dependency:
    """A part of the world that can fail for a while: said when that begins and when it ends.

    While it is away, who needs it is turned away without a try until `retry_at`.
    """

    def __init__(self, log: Log, name: str, shared: bool = True):
        self.log, self.name = log, name
        self.shared = shared  # every task needs it, not those of one function alone
        self.lock = threading.Lock()
        self.since = 0.0  # time.monotonic() when it began to fail; 0: it works
        self.pause = self.retry_at = 0.0
        self.tried_at = -math.inf  # when somebody began to try, who does not know yet
        self.reason = self.error = ""

    def failed(self, error: object, reason: str = "",
               longest: float = LONGEST_PAUSE) -> float:
        """Note a failure; the jittered, growing pause in seconds before the next try."""
        with self.lock:
            now = time.monotonic()
            if not self.since:
                self.since, self.pause = now, FIRST_PAUSE
                self.log("WARNING", f"{self.name} failed: {error}; trying on until it works")
            elif now >= self.retry_at:  # threads that fail together are one failure
                self.pause = min(longest, self.pause * 2)
            pause = self.pause * random.uniform(0.5, 1.0)
            self.retry_at, self.tried_at = now + pause, -math.inf
            self.reason, self.error = reason, f"{self.name} failed: {error}"
        return pause

    def worked(self) -> None:
        """Note a success."""
        with self.lock:
            if self.since:
                seconds = time.monotonic() - self.since
                self.since = self.retry_at = 0.0
                self.log("INFO", f"{self.name} works again after {seconds:.1f} s")

    def may_try(self) -> bool:
        """Whether it works, or it is time for one thread to see whether it does."""
        return time.monotonic() >= max(self.retry_at, self.tried_at + TRY_SECONDS)

    def check(self) -> None:
        """Raise the Outage of the last failure if it is away, unless it is this thread's to try."""
        with self.lock:
            if not self.since:
                return
            if not self.may_try():
                raise Outage(self, self.reason, self.error)
            self.tried_at = time.monotonic()

    def outage(self, error: object, reason: str) -> Outage:
        """Note a failure; the Outage to raise."""
        self.failed(error, reason)
        return Outage(self, reason, self.error)

    @contextlib.contextmanager
    def needed(self) -> Iterator[None]:
        """A block that cannot do without it: an OSError that may pass becomes an Outage."""
        self.check()
        try:
            yield
        except OSError as error:
            if error.errno not in MACHINE_AWAY:
                raise
            raise self.outage(error, MACHINE_AWAY[error.errno]) from None
        except Exception:  # which says nothing of it: somebody else may try at once
            self.tried_at = -math.inf
            raise
        else:
            self.worked()

    @contextlib.contextmanager
    def optional(self) -> Iterator[None]:
        """A block that may fail: its OSError is noted, and passed over."""
        try:
            yield
        except OSError as error:
            self.failed(error)
        else:
            self.worked()


# --------------------------------------------------------------------------------------------
# AWS: the clients, and what their errors mean
# --------------------------------------------------------------------------------------------

# Codes of status 4xx that pass by themselves: throttling, clocks, credentials and keys that are
# renewed. Those of 5xx, 408 and 429 and all that is no answer do, too.
PASSING = re.compile(
    "Throttl|LimitExceeded|OverLimit|SlowDown|TooManyRequests|Aborted|IncompleteBody|BadDigest"
    "|^(Expired|RequestExpired|RequestTime|RequestInTheFuture|TokenRefresh|IDPComm|PriorRequest)")
LASTING = ("ParamValidationError", "InvalidRegionError", "PermanentRedirect")  # not 4xx, these
# Where botocore gets credentials from: what is refused there is no permission of the call itself.
LENDERS = ("AssumeRole", "AssumeRoleWithWebIdentity", "GetRoleCredentials")


LEAST_BOTO3 = (1, 34, 101)  # the first whose ReceiveMessage has MessageSystemAttributeNames


class Clients(NamedTuple):
    """The clients of one session: `polls` waits for long, which the rest must not."""
    session: Any
    polls: Any
    sqs: Any
    results: Any
    s3: Any
    cloudwatch: Any


def make_clients(settings: Settings) -> Clients:
    """The clients; raises GiveUp.

    botocore tries three times, but not what `polls` and `sqs` ask: the queue's own loops do that.
    A read waits for eight seconds at most, so that a job goes on soon after AWS works again.
    """
    try:
        import boto3  # not at the top: --local does without, and so does the launcher
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
        from botocore.session import get_session
    except ImportError:
        raise GiveUp("boto3 is not installed for this Python; run: "
                     f"{sys.executable} -m pip install boto3") from None
    if tuple(map(int, re.findall("[0-9]+", boto3.__version__)[:3])) < LEAST_BOTO3:
        least = ".".join(map(str, LEAST_BOTO3))
        raise GiveUp(f"boto3 is {boto3.__version__}, and must be {least} at least; run: "
                     f"{sys.executable} -m pip install 'boto3>={least}'")
    if settings.endpoint_url:  # so that AWS_ENDPOINT_URL_SQS and the like win, as boto3 has it
        os.environ["AWS_ENDPOINT_URL"] = settings.endpoint_url
    try:
        core = get_session()
        session = boto3.session.Session(botocore_session=core, region_name=settings.region)
        check_credentials(session.get_credentials())
        bundle = core.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE")
        if bundle and not os.path.isfile(bundle):
            raise GiveUp(f"the CA bundle {bundle} is no file; correct AWS_CA_BUNDLE, "
                         "REQUESTS_CA_BUNDLE or ca_bundle in ~/.aws/config")

        def client(service: str, read_seconds: int = 8, attempts: int = 3) -> Any:
            made = session.client(service, config=Config(
                connect_timeout=5, read_timeout=read_seconds, max_pool_connections=50,
                retries={"total_max_attempts": attempts, "mode": "standard"}))
            made.meta.events.register("after-call", refuse_cut_answer)
            return made

        return Clients(session, client("sqs", settings.wait_time_seconds + 5, attempts=1),
                       client("sqs", attempts=1), client("sqs"), client("s3"), client("cloudwatch"))
    except (BotoCoreError, OSError, ValueError) as error:  # no such profile, process, URL
        raise GiveUp(f"boto3 cannot work as it is set up here: {error}") from None


def check_credentials(credentials: Any) -> None:
    """Refuse, by GiveUp, none, and what HTTP cannot send: its error would show them in the log."""
    from botocore.credentials import RefreshableCredentials
    if credentials is None:
        raise GiveUp("no AWS credentials (none found); attach the role to the instance, or set "
                     "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if isinstance(credentials, RefreshableCredentials):  # a look would ask for them
        return
    for name in ("access_key", "secret_key", "token"):
        if re.search("[^!-~]", getattr(credentials, name) or ""):
            raise GiveUp(f"the AWS credentials' {name} ({credentials.method}) has a line break or "
                         "a blank in it; write it again, in one line")


def refuse_cut_answer(http_response: Any, model: Any, **_: Any) -> None:
    """Raise IncompleteReadError for an answer shorter than it says.

    Not every urllib3 compares the two (1.26 and 2.8.0 were seen not to), and botocore reads half
    a JSON text as an empty answer: no messages, no attributes, no failed entries.
    """
    from botocore.exceptions import IncompleteReadError
    length = http_response.headers.get("content-length", "")
    has_length = length.isdigit() and model.http.get("method") != "HEAD"
    if has_length and not model.has_streaming_output and len(http_response.content) != int(length):
        raise IncompleteReadError(actual_bytes=len(http_response.content), expected_bytes=length)


def attempt(call: Callable[..., Any], **named: Any) -> tuple[Any, Exception | None]:
    """(answer, None) of an AWS call, or (None, error): botocore has no one base for its errors.

    Like boto3's own, its arguments are named.
    """
    try:
        return call(**named), None
    except Exception as error:  # noqa: BLE001
        return None, error


def error_code(error: Exception) -> str:
    """The code of an AWS answer; the name of the exception where AWS did not answer."""
    response = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code") or type(error).__name__)


def is_denied(error: Exception) -> bool:
    """Whether an error says that the call is not permitted."""
    code = error_code(error)
    return getattr(error, "operation_name", "") not in LENDERS and (
        "AccessDenied" in code or code in ("403", "Forbidden", "NotAuthorized"))


def passes(error: Exception) -> bool:
    """Whether an error of an AWS call may pass by itself."""
    response = getattr(error, "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = error_code(error)
    # SQS has no code of its own for a clock that is wrong: "Signature expired: ... is now earlier".
    return bool(PASSING.search(code) or re.search("Signature (expired|not yet current)", str(error))
                or code not in LASTING and (not 400 <= status < 500 or status in (408, 429)))


def remedy(error: Exception, needs: str, url: str | None = None) -> str:
    """AWS's own words and what to do, in a call that `needs` permissions; "" when it may pass."""
    code = error_code(error)
    if passes(error):
        return ""
    if re.search(r"^(?i:kms)|kms:|AWSKMS|ciphertext", f"{code} {error}"):
        advice = "grant kms:Decrypt on the key (kms:GenerateDataKey to write), and enable the key"
    elif re.search("NonExistentQueue|QueueDoesNotExist|InvalidAddress|InvalidEndpoint", code):
        advice = f"AWS does not know the queue {url}; check its URL and region in the settings"
    elif re.match("Invalid(ClientTokenId|AccessKeyId|Security|Token|SignatureException)"
                  "|UnrecognizedClient|SignatureDoesNotMatch", code):
        advice = "AWS does not accept the credentials; check AWS_ACCESS_KEY_ID or the role"
    elif getattr(error, "operation_name", "") in LENDERS:
        advice = "the role is not lent to these credentials; check its trust policy and the profile"
    elif is_denied(error):
        policy = re.search(r"because no (.*? policy)|explicit deny in an? (.*? policy)", str(error))
        advice = f"grant {needs}" + (f" in the {policy[1] or policy[2]}" if policy else "")
    elif "Bucket" in code:
        advice = "check the bucket's name: agent.s3.codeBucket, agent.output.bucket, s3Bucket"
    elif code in ("PermanentRedirect", "IllegalLocationConstraintException"):
        advice = "the bucket is in another region; use one in agent.aws.region"
    elif code.isdigit():
        advice = "AWS words no error like this; check agent.aws.endpointUrl"
    else:
        advice = "AWS will answer so again; change what it names"
    return f"{error}; {advice}"


class FunctionRole:
    """The temporary credentials of agent.execution.functionRole, which functions get."""

    SPARE_SECONDS = 300  # that they are good for beyond a run's time limit
    HOUR, LONGEST = 3600, 43_200  # seconds of a session; a role may allow less than the latter

    def __init__(self, clients: Clients, settings: Settings, log: Log):
        self.arn, self.region = str(settings.function_role), str(settings.region)
        self.sts = clients.session.client("sts", config=clients.results.meta.config)
        self.part, self.lock = Dependency(log, f"assuming {self.arn}"), threading.Lock()
        self.found: dict[str, str] = {}
        self.ends = 0.0  # time.monotonic() when they do

    def env(self, seconds: float) -> dict[str, str]:
        """Variables that are good for a run of so long, where the role allows sessions that long.

        Raises Ended when AWS refuses the role, Outage when STS is away.
        """
        needed = math.ceil(seconds) + self.SPARE_SECONDS
        with self.lock:
            if time.monotonic() + needed > self.ends:
                self.part.check()
                self._assume(min(max(needed, self.HOUR), self.LONGEST))
            return self.found

    def _assume(self, length: int) -> None:
        asked = time.monotonic()
        answer, error = attempt(self.sts.assume_role, RoleArn=self.arn, DurationSeconds=length,
                                RoleSessionName="nanogrid")
        if error and "DurationSeconds" in str(error) and length > self.HOUR:
            return self._assume(self.HOUR)
        if error and passes(error):
            raise self.part.outage(error, "sts")
        if error:
            raise Ended(Outcome("error", "permission", f"{error}; grant the agent sts:AssumeRole "
                                f"on {self.arn}, and name the agent in that role's trust policy"))
        self.part.worked()
        lent, self.ends = answer["Credentials"], asked + length
        self.found = {"AWS_ACCESS_KEY_ID": lent["AccessKeyId"],
                      "AWS_SECRET_ACCESS_KEY": lent["SecretAccessKey"],
                      "AWS_SESSION_TOKEN": lent["SessionToken"],
                      **dict.fromkeys(("AWS_REGION", "AWS_DEFAULT_REGION"), self.region)}


# --------------------------------------------------------------------------------------------
# Queue: where messages come from; SQS, or a folder
# --------------------------------------------------------------------------------------------

CHANGE_NEEDS = "sqs:ChangeMessageVisibility"
QUEUE_NEEDS = "sqs:ReceiveMessage, sqs:DeleteMessage and sqs:GetQueueAttributes"
BATCH = 10  # entries of one SQS batch request
DELIVERY_SECONDS = 0.1  # how often what is due is sent
ATTRIBUTES_SECONDS = 300  # how often the queue's own visibility timeout is looked at
PERMISSION_SECONDS = 60  # until a permission that was denied is tried again
LEAST_LEASE_SECONDS = 5  # asked for where the queue's own is shorter: no beat comes in time then
ERROR_DELAY_SECONDS = 10  # until what ended as error is visible; x 4 for each further receive
AT_ONCE = 3  # receives after which a rejected message is delayed, where no DLQ is to be seen
REMEMBERED = 100_000  # finished messages whose return would be a duplicate


class Fate(NamedTuple):
    """What a status means for the log, for a message of SQS, and for a task of a folder."""

    level: str  # of its REPORT line
    action: str  # delete; return: visible again at once; leave: so where nothing is lent for a time
    is_delayed: bool = False  # a return: after a delay that grows with each receive
    takes: float = 3  # in a folder: the task is dead after so many; inf: this take does not count


FATES = {
    "ok": Fate("INFO", "delete"),
    "failed": Fate("WARNING", "leave"),
    "timeout": Fate("WARNING", "leave"),
    "oom": Fate("WARNING", "leave"),
    "rejected": Fate("WARNING", "return", takes=1),
    "released": Fate("INFO", "return", takes=math.inf),
    "error": Fate("ERROR", "return", is_delayed=True),
}


@dataclass(eq=False)
class Message:
    """A message that was taken, and what keeps it ours."""

    id: str
    body: str
    receive_count: int
    sent: float  # the first time, in seconds since the epoch by the queue's clock; inf: not told
    handle: Any = None  # SQS's receipt handle; of a folder, what unlocks the file at its end
    # From here on times are time.monotonic()'s. But for this one all is of SQS alone.
    received: float = field(default_factory=time.monotonic)
    ends: float = math.inf  # when SQS makes it visible again
    beat: float = math.inf  # when to have SQS put that off
    last: float = math.inf  # LONGEST_LEASE_SECONDS after the receive: it is put off no further
    action: str = "keep"  # while its turn lasts; then delete or return
    delay: int = 0  # of a return: seconds until the message is visible again
    is_lost: bool = False  # its lease has run out, which was said


class Queue(Protocol):
    """Where messages come from. From its receive to its end a message is in flight."""

    rest_seconds: float  # after a receive that found nothing
    url: str  # that an error's text names; of a folder, its path
    needs: str  # the permissions without which it cannot be received from

    def receive(self, limit: int, drain: bool) -> list[Message]:
        """At most `limit` messages, after a while if there are none; raises what fails."""

    def lease_ends(self, message: Message, needed: float = 0) -> float:
        """When it will no longer be ours (time.monotonic()); inf: never. Extended for `needed`."""

    def end(self, message: Message, status: str, result: object) -> None:
        """Have become of a message what FATES says of the status of its turn."""

    def is_empty(self) -> bool:
        """Whether nothing waits that a receive would get now, or soon from us."""

    def close(self, is_urgent: Callable[[], bool]) -> None:
        """Send what is due; for at most 20 seconds, or one from when that is urgent."""


class SqsQueue:
    """An SQS queue; one thread of its own deletes, gives back and keeps leases alive."""

    def __init__(self, clients: Clients, settings: Settings, log: Log):
        self.url, self.needs = str(settings.queue_url), QUEUE_NEEDS
        self.log, self.settings = log, settings
        self.polls, self.sqs = clients.polls, clients.sqs
        self.rest_seconds = 0.0 if settings.wait_time_seconds else 1.0  # then SQS does not wait
        self.visibility = 30  # until the queue says another
        self.has_dlq = True  # likewise: without one, what is rejected is delayed
        self.attributes_due = 0.0
        self.may_change: bool | None = None  # sqs:ChangeMessageVisibility; None: to be tried
        self.denied_at = 0.0  # 0: it is not
        self.lock = threading.Lock()
        self.sending = threading.Lock()  # so that one failure is said once
        self.in_flight: dict[str, Message] = {}  # by id, each as it was received last
        self.finished: OrderedDict[str, None] = OrderedDict()
        self.is_closing = False
        changing = Dependency(log, "extending or giving back messages")
        self.requests = {"keep": changing, "return": changing,
                         "delete": Dependency(log, "deleting messages")}
        if error := self._look_at_attributes():
            if advice := remedy(error, QUEUE_NEEDS, self.url):
                raise GiveUp(advice)
            log("WARNING", f"the queue does not answer: {error}; its visibility timeout is taken "
                           f"to be {self.visibility} s until it does")
        self.courier = threading.Thread(target=self._deliver, name="courier", daemon=True)
        self.courier.start()

    def _look_at_attributes(self) -> Exception | None:
        """Read the queue's visibility timeout, which may change while we run; the error, if any."""
        answer, error = attempt(self.polls.get_queue_attributes, QueueUrl=self.url,
                                AttributeNames=["VisibilityTimeout", "RedrivePolicy"])
        if not error:
            found = answer["Attributes"]
            self.has_dlq = "RedrivePolicy" in found
            self.visibility = max(LEAST_LEASE_SECONDS, int(found["VisibilityTimeout"]))
        self.attributes_due = time.monotonic() + (10 if error else ATTRIBUTES_SECONDS)
        return error

    def receive(self, limit: int, drain: bool) -> list[Message]:
        """At most `limit` messages, after at most waitTimeSeconds; raises what boto3 raises."""
        if time.monotonic() >= self.attributes_due:
            self._look_at_attributes()
        # A receive that does not wait asks only some of SQS's servers: no proof of an empty queue.
        asked, wait = time.monotonic(), max(self.settings.wait_time_seconds, int(drain))
        answer = self.polls.receive_message(
            QueueUrl=self.url, MaxNumberOfMessages=limit, VisibilityTimeout=self.visibility,
            WaitTimeSeconds=wait,
            MessageSystemAttributeNames=["ApproximateReceiveCount", "SentTimestamp"])
        with self.lock:
            found = [self._take_in(entry, asked) for entry in answer.get("Messages", [])]
        return [message for message in found if message]

    def _take_in(self, entry: Mapping[str, Any], asked: float) -> Message | None:
        """Have a message in flight; None for a duplicate of one that runs or ended ok here."""
        key, attributes, now = entry["MessageId"], entry.get("Attributes", {}), time.monotonic()
        old = self.in_flight.get(key)
        message = self.in_flight[key] = Message(
            key, entry["Body"], int(attributes.get("ApproximateReceiveCount", 1)),
            float(attributes.get("SentTimestamp", math.inf)) / 1000, entry["ReceiptHandle"],
            ends=max(asked, now - 1) + self.visibility, beat=now + self.visibility / 3,
            last=now + LONGEST_LEASE_SECONDS - 1)
        if key in self.finished:
            self.log("INFO", f"message {key} came back after it was done: deleted")
            message.action = "delete"
            return None
        if old and old.action == "keep":
            self.log("WARNING", f"message {key} came again while it runs here: not started again")
            return None
        return message

    def end(self, message: Message, status: str, result: object) -> None:
        """Have a message deleted, made visible again, or leave it until its lease runs out."""
        action = FATES[status].action
        with self.lock:
            newest = self.in_flight[message.id]
            if action == "delete":
                self.finished[message.id] = None
                if len(self.finished) > REMEMBERED:
                    self.finished.popitem(last=False)
            # Its newest handle deletes a message whose lease has run out, while nobody else has it.
            if action == "leave" or action == "return" and newest.is_lost:
                del self.in_flight[message.id]
                return
            newest.action, newest.delay = action, self._delay(newest, status)

    def _delay(self, message: Message, status: str) -> int:
        """The seconds until a message that is returned is visible again."""
        is_delayed, tries = FATES[status].is_delayed, message.receive_count
        if status == "rejected" and not self.has_dlq:  # not every emulator says that there is one
            is_delayed, tries = tries > AT_ONCE, tries - AT_ONCE
        if not is_delayed:
            return 0
        delay = ERROR_DELAY_SECONDS * 4 ** min(tries - 1, 6)
        return int(min(delay, message.last - time.monotonic()))

    def lease_ends(self, message: Message, needed: float = 0) -> float:
        """When the message will no longer be ours; inf: its lease is kept alive."""
        newest = self.in_flight[message.id]
        if self.may_change is None and newest.ends - 1 < needed:
            with self.sending:
                self._send("keep", [newest])
        is_over = newest.is_lost or newest.ends <= time.monotonic()
        return newest.ends - 1 if is_over or self.may_change is False else math.inf

    def is_empty(self) -> bool:
        """Whether no message is visible; what is in flight elsewhere is not ours."""
        with self.lock:
            if any(message.action == "return" for message in self.in_flight.values()):
                return False
        answer = self.sqs.get_queue_attributes(
            QueueUrl=self.url, AttributeNames=["ApproximateNumberOfMessages"])
        return int(answer["Attributes"]["ApproximateNumberOfMessages"]) == 0

    def close(self, is_urgent: Callable[[], bool]) -> None:
        """Send what is due, for at most 20 seconds."""
        for request in self.requests.values():
            request.retry_at = 0.0
        self.is_closing = True
        await_end(self.courier, 20, is_urgent)

    # The courier's thread.

    def _deliver(self) -> None:
        """Send what is due, again and again, until all is sent at the close."""
        while True:
            time.sleep(DELIVERY_SECONDS)
            with self.lock:
                due = self._due(time.monotonic())
                actions = {message.action for message in self.in_flight.values()}
            if self.is_closing and actions <= {"keep"}:
                return
            batches = [(action, messages[start:start + BATCH]) for action, messages in due.items()
                       for start in range(0, len(messages), BATCH)]
            # A request that is not answered takes eight seconds. After one the round ends, or the
            # next beats would come too late.
            with self.sending:
                all(self._send(*batch) for batch in batches)

    def _due(self, now: float) -> dict[str, list[Message]]:
        """The messages to keep, return and delete now."""
        due: dict[str, list[Message]] = {"keep": [], "return": [], "delete": []}
        if self.may_change is False and now > self.denied_at + PERMISSION_SECONDS:
            self.may_change = None  # a new policy takes minutes to hold
        for key, message in list(self.in_flight.items()):
            action = message.action
            is_over = message.ends <= now
            if action == "return" and (is_over or self.may_change is False):
                del self.in_flight[key]  # SQS makes it visible by itself
                continue
            if is_over and not message.is_lost:
                message.is_lost = True
                self.log("WARNING" if action == "keep" else "INFO",
                         f"the lease of message {key} is lost: it may run again elsewhere")
            if action != "keep" and self.requests[action].retry_at <= now:
                due[action].append(message)
            if (action != "return" and not is_over and message.beat <= now < message.last - 1
                    and self.may_change is not False):
                message.beat = now + max(0.5, (message.ends - now) / 3)  # again, if this one fails
                due["keep"].append(message)
        whole_batches = due["delete"][:len(due["delete"]) // BATCH * BATCH]
        due["delete"] = whole_batches or due["delete"]  # the rest waits for more
        return due

    def _send(self, action: str, messages: list[Message]) -> bool:
        """Keep, return or delete messages in one request; whether SQS answered."""
        asked, request = time.monotonic(), self.requests[action]
        call = self.sqs.delete_message_batch
        entries: list[dict[str, Any]] = [
            {"Id": str(n), "ReceiptHandle": message.handle} for n, message in enumerate(messages)]
        if action != "delete":
            call = self.sqs.change_message_visibility_batch
            for entry, message in zip(entries, messages):
                entry["VisibilityTimeout"] = message.delay if action == "return" else min(
                    self.visibility, int(message.last - asked))
        answer, error = attempt(call, QueueUrl=self.url, Entries=entries)
        if error and action != "delete" and is_denied(error):
            self._note_denial(error, asked)
            return True
        if error:
            request.failed(remedy(error, QUEUE_NEEDS, self.url) or error)
            return False
        failures = {one["Id"]: one for one in answer.get("Failed", [])}
        passing = [one for one in failures.values() if not one.get("SenderFault")]
        if passing:
            request.failed(in_words(passing[0]))
        else:
            request.worked()
        with self.lock:
            if action != "delete":
                if self.denied_at:
                    self.log("INFO", f"leases are extended: {CHANGE_NEEDS} is granted")
                self.may_change, self.denied_at = True, 0.0
            for entry, message in zip(entries, messages):
                self._settle(action, message, entry, failures.get(entry["Id"]), asked)
        return True

    def _note_denial(self, error: Exception, asked: float) -> None:
        """Keep no lease for a while, since that is not permitted; say so once."""
        with self.lock:
            if not self.denied_at:
                self.log("WARNING", "no lease is extended, and tasks over the queue's "
                         f"{self.visibility} s are rejected: {remedy(error, CHANGE_NEEDS)}")
            self.may_change, self.denied_at = False, asked

    def _settle(self, action: str, message: Message, entry: Mapping[str, Any],
                failure: Mapping[str, Any] | None, asked: float) -> None:
        """Note what SQS answered to one entry of a request."""
        # Then its handle holds no longer, as after a delete whose answer was lost.
        is_final = bool(failure and failure.get("SenderFault"))
        if failure and is_final:
            message.ends = asked
            self.log("WARNING" if message.action == "keep" else "INFO",
                     f"message {message.id} is no longer ours: {in_words(failure)}")
        elif not failure and action == "keep":
            message.ends = asked + entry["VisibilityTimeout"]
            message.beat = asked + entry["VisibilityTimeout"] / 3
        is_done = action != "keep" and (is_final or not failure)
        if is_done and self.in_flight.get(message.id) is message:
            del self.in_flight[message.id]


def in_words(failure: Mapping[str, Any]) -> str:
    """What SQS says of an entry of a batch that failed."""
    return f"{failure.get('Code')}: {failure.get('Message')}"


def await_end(thread: threading.Thread, seconds: float, is_urgent: Callable[[], bool]) -> None:
    """Wait for a thread's end, but not for longer than that, or than a second if it is urgent."""
    last = time.monotonic() + seconds
    while thread.is_alive() and time.monotonic() < last:
        if is_urgent():
            last = min(last, time.monotonic() + 1)
        thread.join(0.05)


class FolderQueue:
    """A folder as queue: a rename claims, and a lock on the file dies with its holder.

    How often a task was taken before stands in the hidden file queue/.NAME.json.takes.
    """

    rest_seconds = 0.0
    TASKS = "[!.]*.json"
    PARTS = ("queue", "running", "dead", "results", "code")

    def __init__(self, root: Path, log: Log):
        self.url, self.needs = str(root), "reading and writing"
        for name in self.PARTS:
            (root / name).mkdir(parents=True, exist_ok=True)
        self.queue, self.running, self.dead = (f"{root}/{name}" for name in self.PARTS[:3])
        self.names: deque[str] = deque()  # of the last listing, not looked at yet
        self.refused: set[str] = set()  # those that cannot be taken, which was said
        self.lock = threading.RLock()
        self.ended: list[tuple[Message, str, object]] = []  # to be put away
        self.log, self.disk = log, Dependency(log, f"writing to {root}")
        self.notices: list[int] = []  # an inotify(7) descriptor for new tasks, where there is one
        with contextlib.suppress(OSError):
            fd, moved_to, close_write = kernel("inotify_init1", os.O_CLOEXEC), 0x80, 0x8
            kernel("inotify_add_watch", fd, os.fsencode(self.queue), moved_to | close_write)
            self.notices = [fd]
        self.recover()

    def recover(self) -> None:
        """Put the tasks of agents that died back; their take counts."""
        for name in fnmatch.filter(os.listdir(self.running), self.TASKS):
            with self._passing_over(path := f"{self.running}/{name}"), locked(path):
                self._put_back(name, self._takes(name) + 1)

    @contextlib.contextmanager
    def _passing_over(self, path: str) -> Iterator[None]:
        """Leave a task that is gone or another's; say once of any other that it cannot be taken."""
        try:
            yield
        except (BlockingIOError, FileExistsError):
            pass  # another agent has it, or runs one of its name
        except OSError as error:
            if os.path.lexists(path) and path not in self.refused:
                self.refused.add(path)
                self.log("WARNING", f"{path} cannot be taken: {error}")

    def _put_back(self, name: str, takes: int) -> None:
        """Put a running task back, under another name where a new task has its own."""
        for number in itertools.count():
            new = fitted(name[:-5], f".{number}.json") if number else name
            if os.path.lexists(f"{self.queue}/{new}"):
                continue
            with self.disk.optional():  # a take that is not counted is one more try
                self._count(new).unlink(missing_ok=True)
                if takes:
                    self._count(new).write_text(str(takes))
            with contextlib.suppress(FileExistsError):
                rename_new(f"{self.running}/{name}", f"{self.queue}/{new}")
                break
        if new != name:
            self._count(name).unlink(missing_ok=True)

    def _count(self, name: str) -> Path:
        return Path(self.queue, fitted(f".{name}", ".takes"))

    def _takes(self, name: str) -> int:
        try:
            return int(self._count(name).read_text())
        except (OSError, ValueError):
            return 0

    def receive(self, limit: int, drain: bool) -> list[Message]:
        """At most `limit` tasks; waits half a second for one, but for a drain."""
        self._put_away()
        if not self.names:
            # One listing serves until it is used up: each receive costs the same at any depth.
            self.names.extend(sorted(fnmatch.filter(os.listdir(self.queue), self.TASKS)))
        taken: list[Message] = []
        while self.names and len(taken) < limit:
            name = self.names.popleft()
            path = f"{self.queue}/{name}"
            with self._passing_over(path), contextlib.ExitStack() as stack:
                fd = stack.enter_context(locked(path)).fileno()
                status = os.fstat(fd)
                text = os.read(fd, status.st_size).decode("utf-8", "surrogateescape")
                rename_new(path, f"{self.running}/{name}")
                taken.append(Message(name, text, self._takes(name) + 1, status.st_mtime,
                                     stack.pop_all()))
        if not taken and not drain:
            for fd in select.select(self.notices, [], [], 0.5 if self.notices else 0.05)[0]:
                os.read(fd, 65536)
        return taken

    def end(self, message: Message, status: str, result: object) -> None:
        """Remove a task that succeeded; have another taken again at once, or bury it."""
        with self.lock:
            self.ended.append((message, status, result))
            self._put_away()

    def _put_away(self) -> None:
        """Move what has ended out of running/; what the disk refuses is tried again later."""
        with self.lock:
            for one in list(self.ended) if self.disk.retry_at <= time.monotonic() else ():
                with self.disk.optional():
                    with contextlib.suppress(FileNotFoundError):  # somebody took it away
                        self._move(*one)
                    self.ended.remove(one)
                    one[0].handle.close()

    def _move(self, message: Message, status: str, result: object) -> None:
        """Do what FATES says of a status with a running task. Raises OSError."""
        name, takes, fate = message.id, message.receive_count, FATES[status]
        if fate.action != "delete" and takes < fate.takes:
            return self._put_back(name, takes if fate.takes < math.inf else takes - 1)
        if fate.action == "delete":
            self._count(name).unlink(missing_ok=True)
            return os.unlink(f"{self.running}/{name}")
        write_json(self.dead, fitted(name[:-5], ".result.json"), result)
        os.rename(f"{self.running}/{name}", f"{self.dead}/{name}")
        return self._count(name).unlink(missing_ok=True)

    def lease_ends(self, message: Message, needed: float = 0) -> float:
        """Never: a lock lasts as long as its holder."""
        return math.inf

    def is_empty(self) -> bool:
        """Whether no task waits."""
        self.recover()
        return not self.ended and all(
            f"{self.queue}/{name}" in self.refused
            for name in fnmatch.filter(os.listdir(self.queue), self.TASKS))

    def close(self, is_urgent: Callable[[], bool]) -> None:
        """Try once more what the disk refused."""
        self.disk.retry_at = 0.0
        self._put_away()


def fitted(stem: str, ending: str) -> str:
    """A file name: a stem that would make it longer than NAME_MAX ends in a checksum instead."""
    content, most = os.fsencode(stem), MAX_PART_BYTES - len(ending)
    if len(content) > most:
        content = content[:most - 9] + b"~%08x" % zlib.crc32(content)
    return os.fsdecode(content) + ending


def rename_new(source: str, target: str) -> None:
    """Rename a file unless something has that name: then raises FileExistsError."""
    here, no_replace = -100, 1  # AT_FDCWD, RENAME_NOREPLACE
    try:
        kernel("renameat2", here, os.fsencode(source), here, os.fsencode(target), no_replace)
    except (OSError, AttributeError) as error:
        if getattr(error, "errno", errno.ENOSYS) not in (errno.EINVAL, errno.ENOSYS):
            raise
        os.link(source, target)  # as on NFS, or with a C library that lacks it
        os.unlink(source)


@contextlib.contextmanager
def locked(path: str) -> Iterator[io.FileIO]:
    """A task's file, open and locked; raises BlockingIOError when another has it."""
    def opener(name: str, _: int) -> int:
        flags = os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            return os.open(name, flags | os.O_RDWR)  # NFS locks no descriptor that only reads
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            return os.open(name, flags)

    with open(path, "rb", buffering=0, opener=opener) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(file.fileno()), os.lstat(path)):
            raise FileNotFoundError(path)  # moved before it was locked
        yield file


PIPE_BYTES = 65536  # what a pipe holds (pipe(7))


def read_nonblocking(fd: int) -> bytes:
    """What a non-blocking descriptor has now."""
    try:
        return os.read(fd, PIPE_BYTES)
    except BlockingIOError:
        return b""


def write_json(directory: str | Path, name: str, value: object) -> None:
    """Write a file that is there whole or not at all."""
    content = json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
    part = f"{directory}/{fitted(f'.{name}', '.part')}"
    with open(part, "wb") as file:
        file.write(content)
    os.rename(part, f"{directory}/{name}")


# --------------------------------------------------------------------------------------------
# Code: fetched once for each version, checked, unpacked, and kept
# --------------------------------------------------------------------------------------------

CLOCK_SKEW_SECONDS = 2  # between S3's Date and SQS's SentTimestamp; Date has whole seconds
CACHE_SHARE = 0.5  # of the disk, less what others have there: beyond it idle packages go
BUCKET_NEEDS = ("s3:GetObject on arn:aws:s3:::{0}/* (or s3:ListBucket on {0}: without it a key "
                "that does not exist looks like this, too)")


@dataclass(eq=False)
class Package:
    """An unpacked zip: a directory that no function can write to."""

    path: Path
    etag: str
    size: int = 0
    asked: float = 0.0  # time.monotonic() before the source was last asked whether it has this
    confirmed: float = 0.0  # the source's own time when it said so
    refused: Outcome | None = None  # what is wrong with the zip, or its program: no run has it
    compiler: Dependency | None = None  # that lacked something of the machine
    lock: threading.Lock = field(default_factory=threading.Lock)  # held while it is compiled
    users: int = 1  # the cache, until it has another, and each run that needs it
    used: float = 0.0  # time.monotonic() of the last get()
    is_read: bool = False  # its index.js, for a handler that no task names

    @property
    def built_path(self) -> Path:
        """Where it stands with its program compiled."""
        return self.path.with_suffix(".built")

    def serves(self, message: Message) -> bool:
        """Whether the source had this after the message was sent, by our clock or by AWS's."""
        return (message.received < self.asked
                or message.sent + CLOCK_SKEW_SECONDS < self.confirmed)


class CodeSource(Protocol):
    """Where zips come from."""

    any_bucket: bool  # it does not look at s3Bucket: s3Key is a path below a folder

    def get(self, task: Task, known: str, target: Path) -> tuple[str, float]:
        """Write the zip to `target`, unless `known` is still its ETag; its ETag and when it was so.

        That is a time in seconds since the epoch by the source's own clock; 0: it has none. Raises
        Ended for what no waiting mends, Outage when the source is away, OSError when the disk is.
        """


class S3Code:
    """The zips as S3 has them."""

    any_bucket = False
    MOST_NOTED = 10_000  # objects that could not be fetched

    def __init__(self, s3: Any, log: Log):
        self.s3, self.log = s3, log
        # Each object has a pause of its own: S3 may refuse or lack one alone.
        self.failing: dict[tuple[str, str], Dependency] = {}

    def get(self, task: Task, known: str, target: Path) -> tuple[str, float]:
        """As CodeSource has it; what was refused is not asked for again before a pause ends."""
        where, key = f"s3://{task.bucket}/{task.key}", (task.bucket, task.key)
        code = self.failing.get(key) or Dependency(self.log, f"fetching {where}", shared=False)
        code.check()
        answer, error = attempt(self.s3.get_object, Bucket=task.bucket, Key=task.key,
                                **({"IfNoneMatch": known} if known else {}))
        said = error and error_code(error)
        try:
            if error and said in ("304", "NotModified"):
                answer = getattr(error, "response", {})
            elif error and said != "NoSuchKey":
                raise self._refusal(code, task, error)
            elif not error:
                self._download(answer, target, code)
                known = answer.get("ETag") or os.urandom(8).hex()  # none: another each time
            code.worked()
        finally:
            self.failing.pop(key, None)
            if code.since and len(self.failing) < self.MOST_NOTED:
                self.failing[key] = code
        if said == "NoSuchKey":
            raise rejected("key", f"{where} does not exist; upload it, or correct s3Key")
        headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        with contextlib.suppress(TypeError, ValueError):
            return known, parsedate_to_datetime(headers.get("date")).timestamp()
        return known, 0.0

    @staticmethod
    def _refusal(code: Dependency, task: Task, error: Exception) -> Ended | Outage:
        """What becomes of a task whose zip S3 does not give."""
        if passes(error):
            return code.outage(error, "s3")
        is_bucket = "Bucket" in error_code(error)
        reason = "permission" if is_denied(error) else "bucket" if is_bucket else "s3"
        code.failed(remedy(error, BUCKET_NEEDS.format(task.bucket)), reason, longest=REFUSAL_PAUSE)
        return Ended(Outcome("error", reason, code.error))

    @staticmethod
    def _download(answer: Mapping[str, Any], target: Path, code: Dependency) -> None:
        size = answer.get("ContentLength", 0)
        for name in {"ETag", "ContentLength"}.difference(answer):
            code.log("WARNING", f"{code.name}: the answer has no {name}, as S3's have; look at "
                                "what stands in S3's place")
        try:
            with contextlib.closing(answer["Body"]) as body, open(target, "wb") as file:
                chunks = body.iter_chunks(256 * 1024)
                while size <= MAX_UNPACKED and (chunk := next(chunks, b"")):
                    file.write(chunk)
                    size = max(size, file.tell())
        except OSError:  # the disk's: botocore's errors, also of a body that is short, are none
            raise
        except Exception as error:  # noqa: BLE001
            raise code.outage(f"cut short: {error}", "s3") from None
        if size > MAX_UNPACKED:
            raise rejected("zip", f"{code.name}: over {MAX_UNPACKED} bytes; make it smaller")


class FolderCode:
    """The zips of DIR/code; a file's identity is its ETag."""

    any_bucket = True

    def __init__(self, root: Path):
        self.root = root / "code"

    def get(self, task: Task, known: str, target: Path) -> tuple[str, float]:
        """As S3Code.get, for a file."""
        path = f"{self.root}/{task.key}"
        if not os.path.isfile(path):
            raise rejected("key", f"{path} is no file; put the zip there, or correct s3Key")
        status = os.stat(path)  # before its content is read: what is newer then is asked for again
        etag = f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}"
        if etag != known:
            shutil.copyfile(path, target)
        return etag, 0.0


class CodeCache:
    """Unpacked packages by (bucket, key, runtime), each as its source had it when last asked.

    A zip that was refused stands among them, too: it is not fetched again before it changes.
    """

    MOST = 10_000

    def __init__(self, source: CodeSource, directory: Path, log: Log):
        self.source, self.directory = source, directory
        self.disk = Dependency(log, f"keeping code in {directory}")
        self.lock = threading.Lock()
        self.packages: dict[tuple[str, str, str], Package] = {}

    def find(self, task: Task, message: Message) -> Package | None:
        """The package of a task, to be given to release(), if it is here and known to be right.

        Raises Ended where the zip was refused.
        """
        with self.lock:
            package = self.packages.get(task.code)
            if package and package.serves(message):
                return self._lend(package)
        return None

    def get(self, task: Task, message: Message) -> Package:
        """The same, fetched where need be, by one thread at a time for each task.code.

        Raises Ended and Outage.
        """
        if package := self.find(task, message):
            return package
        with self.lock:
            if old := self.packages.get(task.code):
                old.users += 1  # it may be right still
        try:
            with self.disk.needed():
                package = self._refresh(task, old)
            return self._keep(task, package, old)
        finally:
            if old:
                self.release(old)

    @staticmethod
    def _lend(package: Package) -> Package:
        if package.refused:
            raise Ended(package.refused)
        package.users += 1
        package.used = time.monotonic()
        return package

    def release(self, package: Package) -> None:
        """Let go of a package, which is removed once it has no users."""
        with self.lock:
            package.users -= 1
        if not package.users:
            for path in (package.path, package.built_path):
                shutil.rmtree(path, ignore_errors=True)

    def _refresh(self, task: Task, old: Package | None) -> Package:
        """Ask the source: the old package if that is still right, else a new one."""
        asked, name = time.monotonic(), self.directory / os.urandom(8).hex()
        archive, place = name.with_suffix(".zip"), name.with_suffix(".part")
        try:
            etag, confirmed = self.source.get(task, old.etag if old else "", archive)
            if old and etag == old.etag:
                old.asked, old.confirmed = asked, confirmed
                return old
            package = Package(name, etag, asked=asked, confirmed=confirmed)
            place.mkdir(mode=0o755)
            try:
                unpack(archive, place)
            except Ended as refusal:
                package.refused = refusal.outcome
                return package
            package.size = sum(one.lstat().st_blocks * 512 for one in place.rglob("*"))
            place.rename(name)
            return package
        finally:
            archive.unlink(missing_ok=True)
            shutil.rmtree(place, ignore_errors=True)

    def _keep(self, task: Task, package: Package, old: Package | None) -> Package:
        """Have a package in the cache in place of the old one, and lend it. Raises Ended."""
        with self.lock:
            if package is not old:
                if old and self.packages.get(task.code) is old:
                    old.users -= 1
                self.packages[task.code] = package
            package.users += 1
            whole = sum(one.size for one in self.packages.values())
        self.evict((whole + shutil.disk_usage(self.directory).free) * CACHE_SHARE)
        with self.lock:
            package.users -= 1
            return self._lend(package)

    def evict(self, most: float = -1) -> bool:
        """Remove packages that no run uses, longest unused first, down to `most` bytes; did any?"""
        gone = []
        with self.lock:
            size = sum(one.size for one in self.packages.values())
            for key, one in sorted(self.packages.items(), key=lambda item: item[1].used):
                if one.users == 1 and (size > most or len(self.packages) > self.MOST):
                    gone.append(self.packages.pop(key))
                    size -= one.size
        for one in gone:
            self.release(one)
        return any(one.size for one in gone)


# --------------------------------------------------------------------------------------------
# Programs: what starts a function, calls it and ends it, from within its own process
# --------------------------------------------------------------------------------------------

# Starts what is exec'd, one shell for each run. The kernel starts a child's ru_maxrss at its
# parent's size, and exec keeps it. A supervisor has 7 MB and more, a shell 1.5: so a shell forks
# the function. But wait4 gives the supervisor the rusage of its own children alone. So what the
# shell forked kills that shell: the kernel then gives it to the supervisor, which is a subreaper.
# It waits for the word to begin. A background job would do without that kill, but it would ignore
# SIGINT. The colon keeps a shell from becoming its own last command.
FORK_SHELL = """( kill -9 $$
read -r go <&3 || exit
exec 3<&-
%s
unset PWD OLDPWD SHLVL
exec "$@" )
:"""

# The ready interpreter: started as `python main.py` in a directory that holds this as main.py,
# so that argv, flags and /proc/self/cmdline are what they would be; forked once for each run.
# The function sees nothing of what is imported here. Its code runs from the lowest frame but one.
READY_PYTHON = r'''
bare = dict(globals())
import sys
import os
here = set(sys.modules)
looked_at = list(sys.path_importer_cache)
import _weakref as weakref
import atexit, ctypes, gc, marshal, resource, time
os.chdir("/")
prctl = ctypes.CDLL(None).prctl
compile("", "", "exec")  # makes the types of syntax trees: 0.6 ms that no fork need spend again
extra = [name for name in sys.modules if name not in here]

def fork_each(channel=3, procs=4):
    """Fork for each request; return it in the child."""
    prctl(4, 0, 0, 0, 0)  # not dumpable: no process of the same user may trace it
    for capability in range(64):
        prctl(24, capability, 0, 0, 0)  # no exec brings one back
    gc.collect()
    gc.freeze()
    os.write(channel, b"ready")
    while True:
        request = os.read(channel, 1 << 20)
        if not request:
            os._exit(0)
        child = os.fork()
        if not child:
            os.write(procs, b"0")  # into the slot's cgroup
            os.close(procs)
            return channel, marshal.loads(request)
        pid = 0
        while pid != child or os.WIFSTOPPED(status):  # clone(CLONE_PARENT) makes others its
            pid, status, usage = os.wait4(-1, 0)      # children, ptrace(2) answers with a stop
        os.write(channel, marshal.dumps(("ended", status, usage.ru_maxrss), 2))

def become(channel, request):
    """Turn this fork into the process of the request; its global names and its code."""
    os.setsid()
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        path = f"{request['directory']}/feed/{name}"
        opened = os.open(path, os.O_WRONLY if fd else os.O_RDONLY)
        os.dup2(opened, fd)
        os.close(opened)
    for name, value in request["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if request["uid"] is not None:
        os.setgroups(request["groups"])
        os.setresgid(*[request["gid"]] * 3)
        os.setresuid(*[request["uid"]] * 3)
    prctl(4, 1, 0, 0, 0)  # dumpable again: a change of uid took that away, too
    os.chdir(request["directory"] + "/own/work")
    for name, value in request["env"].items():  # update() would touch 60 pages more
        os.environ[name] = value
        sys.modules["posix"].environ[name.encode()] = os.fsencode(value)
    if site := sys.modules.get("site"):
        site.USER_BASE = site.USER_SITE = None
        site.getusersitepackages()  # of this HOME
    # From here on the time is the function's.
    os.write(channel, marshal.dumps(("begun", os.getpid(), time.monotonic()), 2))
    os.close(channel)
    path = os.getcwd() + "/main.py"
    command = request["command"]
    for name in set(sys.path_importer_cache).difference(looked_at):
        del sys.path_importer_cache[name]
    sys.path[0] = os.getcwd()
    for name in extra:
        del sys.modules[name]
    main = type(sys)("__main__")
    main.__dict__.update(bare, __file__=path)
    main.__loader__.path = path
    sys.modules["__main__"] = main
    if command[0] == "-c":
        del main.__file__  # else multiprocessing would run it in its children
        sys.argv[:] = "-c", *command[2:]
        return main.__dict__, compile(command[1], "<string>", "exec", dont_inherit=True)
    with open(path, "rb") as file:
        source = file.read()
    try:
        code = compile(source, path, "exec", dont_inherit=True)
    except Exception:  # the interpreter itself words this best
        os.execv(sys.executable, [sys.executable, "main.py"])
    return main.__dict__, code

# Modules in C whose objects do something when they go, and have no finalizer: these of the
# standard ones, and all others (origin.endswith(".so")), of which nobody knows.
KEEPERS = {"_sqlite3", "_dbm", "_gdbm", "_curses", "readline", "_tkinter"}

def has_end(thing):
    """Whether something of this object is still to run when it goes."""
    kind = type(thing)
    if kind is weakref.ref:
        return getattr(thing.__callback__, "__module__", 0) not in (None, "_weakrefset", "weakref")
    if issubclass(kind, type):  # the collector has no list of these instances, but their class
        return "__del__" in vars(thing) and not thing.__flags__ & 1 << 14  # Py_TPFLAGS_HAVE_GC
    return hasattr(kind, "__del__") and not (kind.__module__ == "_io" and thing.closed)

def is_plain():
    """Whether the interpreter would do nothing at its end that could be seen."""
    if (sys.modules.get("atexit", atexit)._ncallbacks() or gc.callbacks
            or sys.stdout is not sys.__stdout__ or sys.stderr is not sys.__stderr__):
        return False
    for name in sys.modules.keys() - here:
        origin = getattr(getattr(sys.modules[name], "__spec__", None), "origin", None) or ""
        if name in KEEPERS or origin.endswith(".so") and "/lib-dynload/" not in origin:
            return False
    return not any(map(has_end, gc.get_objects()))  # but for what was frozen before the fork

def leave(status):
    """End the process here, if the interpreter, which touches every page for it, need not do it."""
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    if is_plain():
        try:
            for stream in filter(None, (sys.stdout, sys.stderr)):
                if not stream.closed:
                    stream.flush()
            os._exit(status)
        except (OSError, ValueError):  # the interpreter has words for it
            pass

names, code = become(*fork_each())
try:
    exec(code, names)
    status = 0
except SystemExit as error:
    status = 0 if error.code is None else error.code
    if type(status) is not int or not 0 <= status <= 255:
        del names, code  # else they outlive the interpreter, and are not finalized
        raise
except BaseException as error:
    # What the interpreter prints begins at the function's own frame. Python 3.9 and 3.10 keep the
    # traceback of what is raised again beside the exception: only a hook can cut it there.
    error.__traceback__ = error.__traceback__.tb_next
    if sys.version_info < (3, 11) and hasattr(sys, "excepthook"):
        hook = sys.excepthook
        sys.excepthook = lambda kind, value, trace: hook(
            kind, value.with_traceback(trace.tb_next), trace.tb_next)
    del names, code
    raise
del names, code
if not (sys.getprofile() or sys.gettrace()):  # they would see what is called here
    leave(status)
sys.exit(status)
'''


# What runs a handler, as `python -c … FILE FUNCTION RETURNED` and `node -e …`, as Lambda runs it.
# RETURNED is a pipe for what FUNCTION returns; its time is when the run began.
PYTHON_HANDLER = r'''
import sys
del sys.path[0]  # no module of the function's stands for one of these
import json, logging, os, time

file, function, returned = sys.argv[1:]
pipe = open(returned, "w", encoding="utf-8", errors="backslashreplace")
end = os.stat(returned).st_mtime + int(os.environ["TIMEOUT_MS"]) / 1000
sys.path.insert(0, os.getcwd())

class Context:
    aws_request_id = log_stream_name = os.environ["REQUEST_ID"]
    function_name = os.environ["FUNCTION_ID"]
    function_version = "$LATEST"
    memory_limit_in_mb = os.environ["MEMORY_MB"]  # a text, as in Lambda
    log_group_name = "/aws/lambda/" + function_name
    invoked_function_arn = "arn:aws:lambda:local:000000000000:function:" + function_name
    client_context = identity = None

    def get_remaining_time_in_millis(self):
        return max(0, int((end - time.time()) * 1000))

# Functions find a handler there, and change its format or remove it.
logging.basicConfig(
    datefmt="%Y-%m-%dT%H:%M:%S",
    format="[%(levelname)s]\t%(asctime)s.%(msecs)03dZ\t%(aws_request_id)s\t%(message)s")
handler = logging.root.handlers[0]
handler.formatter.converter = time.gmtime
handler.addFilter(lambda record: [setattr(record, "aws_request_id", Context.aws_request_id)])

def number(value):
    if type(value).__name__ == "Decimal":  # as DynamoDB has numbers
        return int(value) if value == int(value) else float(value)
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")

try:
    module = file[:-len(".py")].removesuffix("/__init__").replace("/", ".")
    __import__(module)
    event = json.loads(sys.stdin.read() or "{}")
    value = getattr(sys.modules[module], function)(event, Context())
    pipe.write(json.dumps(value, default=number, ensure_ascii=False, allow_nan=False))
    pipe.close()
except Exception as error:
    import traceback
    print(f"[ERROR] {type(error).__name__}: {error}", file=sys.stderr)
    traceback.print_exception(type(error), error, error.__traceback__.tb_next)
    sys.exit(1)
'''
NODE_HANDLER = r'''
"use strict";
const fs = require("fs"), path = require("path"), url = require("url"), env = process.env;
const [file, name, returned] = process.argv.slice(1);
const pipe = fs.openSync(returned, "w");
const end = fs.fstatSync(pipe).mtimeMs + Number(env.TIMEOUT_MS);
let idle = () => {};  // what to do when nothing is left to wait for
process.on("beforeExit", () => idle());

function fail(error) {
  const {name = typeof error, message = String(error), stack = ""} = Object(error);
  console.error("ERROR\tInvoke Error\t" + JSON.stringify({
    errorType: name, errorMessage: message, stack: String(stack).split("\n")}));
  process.exit(1);
}

function succeed(value) {
  try {
    fs.writeFileSync(pipe, JSON.stringify(value) || "null");
  } catch (error) {
    fail(error);
  }
  process.exit(0);
}

function callback(error, value) {
  if (error !== undefined && error !== null) fail(error);
  if (!context.callbackWaitsForEmptyEventLoop) succeed(value);
  idle = () => succeed(value);
}

const context = {
  awsRequestId: env.REQUEST_ID, functionName: env.FUNCTION_ID, functionVersion: "$LATEST",
  memoryLimitInMB: env.MEMORY_MB, logStreamName: env.REQUEST_ID,
  logGroupName: "/aws/lambda/" + env.FUNCTION_ID,
  invokedFunctionArn: "arn:aws:lambda:local:000000000000:function:" + env.FUNCTION_ID,
  callbackWaitsForEmptyEventLoop: true, done: callback, succeed, fail,
  getRemainingTimeInMillis: () => Math.max(0, Math.floor(end - Date.now())),
};

(async () => {
  const found = await import(url.pathToFileURL(path.resolve(file)));
  const handler = found[name] || Object(found.default)[name];
  if (typeof handler !== "function") throw new TypeError(`${file} exports no function ${name}`);
  idle = () => succeed(null);  // as in Lambda, where a callback that was forgotten is no error
  const promise = handler(JSON.parse(fs.readFileSync(0, "utf8") || "{}"), context, callback);
  if (promise && typeof promise.then === "function") {
    idle = () => {};  // the process ends without a return value then, and so as failed
    promise.then(succeed, fail);
  }
})().catch(fail);
'''
HANDLERS = {"python": ("-c", PYTHON_HANDLER), "nodejs": ("-e", NODE_HANDLER)}


# --------------------------------------------------------------------------------------------
# Room: the cgroup, the mounts and the directories of a slot
# --------------------------------------------------------------------------------------------

USER = "nanogrid"  # the name that a function's user has for it
OUTPUTS = ("stdout", "stderr")  # in a slot's feed
RETURNED = "returned"  # beside them: what a handler returned, as JSON
PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_CHILD_SUBREAPER = 4, 38, 36  # linux/prctl.h
PR_CAPBSET_READ, PR_CAPBSET_DROP, CAP_SYS_RESOURCE = 23, 24, 24
PR_SET_SECCOMP, PR_SET_SECUREBITS, SECBIT_NOROOT = 22, 28, 1


def kernel(name: str, *arguments: Any) -> int:
    """What a function of the C library answers, such as prctl(2); raises OSError."""
    answer: int = getattr(LIBC, name)(*arguments)
    if answer < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), name)
    return answer


def read_proc(path: str) -> bytes:
    """The content of a file of /proc; empty when its process is gone or not ours to see."""
    with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
        return file.read()
    return b""


# --- The cgroup: what a slot may use, held by the kernel (cgroups(7), version 2) ---

AGENT_WEIGHT = "10000"  # cpu.weight, the most: no lease may be late; each slot has the usual 100
SLOTS_WEIGHT = "33"  # of all slots, beside the machine's own work: nice 5 weighs as much
EMPTYING_LOOKS = 20_000  # 20 s: what is killed is gone in milliseconds, but on a disk that hangs


def cgroup_root() -> str:
    """Where this machine's cgroup v2 is mounted; raises OSError."""
    found = re.search(rb"(?m)^(?:\S+ ){4}(\S+) .* - cgroup2 ", read_proc("/proc/self/mountinfo"))
    if not found:
        raise OSError(errno.ENOENT, "there is none here")
    return os.fsdecode(found[1])


def own_cgroup() -> str:
    """The directory of this process's cgroup; raises OSError."""
    found = re.search(rb"(?m)^0::/(.*)$", read_proc("/proc/self/cgroup"))
    return os.path.join(cgroup_root(), os.fsdecode(found[1]) if found else "").rstrip("/")


def make_cgroups(processes: int) -> str:
    """The directory for the slots' cgroups, slot0, slot1, …, once one was made; raises OSError.

    It is this service's own where systemd delegated that (Delegate=), or a container has no other.
    Elsewhere one is made at the top, named after this process.
    """
    root, top = cgroup_root(), own_cgroup()
    is_delegated = any(name.endswith(".delegate") for name in os.listxattr(top))
    if is_delegated or top == root and os.path.exists(f"{root}/cgroup.type"):
        os.makedirs(f"{top}/agent", exist_ok=True)
        # What has processes of its own hands no controller down.
        Path(top, "agent/cgroup.procs").write_text("0")
    else:
        names = f"{root}/nanogrid-{os.stat('/proc/self/ns/pid').st_ino}-"
        for old in glob.glob(f"{names}*"):
            if not os.path.exists(f"/proc/{old[len(names):]}"):  # its agent was killed
                remove_cgroups(old)
        top = f"{names}{os.getpid()}"
        os.makedirs(top, exist_ok=True)
    try:
        _divide(top, processes)
    except OSError:
        remove_cgroups(top)
        raise
    return top


def _divide(top: str, processes: int) -> None:
    """Hand the controllers down, and try whether a slot can have them; raises OSError."""
    agent, root = f"{top}/agent", os.path.dirname(top)
    is_delegated = os.path.exists(agent)
    for path in [top] if is_delegated else [root, top]:
        Path(path, "cgroup.subtree_control").write_text("+memory +pids +cpu")
    if is_delegated:
        Path(agent, "cpu.weight").write_text(AGENT_WEIGHT)
    else:
        Path(top, "cpu.weight").write_text(SLOTS_WEIGHT)
    os.chmod(top, 0o755)  # a runtime that sizes itself by its cgroup reads it
    make_cgroup(Path(top, "slot0"), processes)  # each supervisor makes its slot's anew


def make_cgroup(slot: Path, processes: int) -> None:
    """Make a slot's cgroup; raises OSError."""
    slot.mkdir(exist_ok=True)
    (slot / "pids.max").write_text(str(max(2, processes)))  # a shell forks the first
    (slot / "memory.oom.group").write_text("1")  # one kill ends all of the run
    with contextlib.suppress(FileNotFoundError):  # a kernel without swap
        (slot / "memory.swap.max").write_text("0")
    (slot / "cgroup.kill").write_text("1")  # Linux 5.14
    # These tell of all runs since it was made.
    for kind in "*.peak", "*.events*", "*.pressure", "*stat*":
        for file in slot.glob(kind):
            file.chmod(0o600)


def empty_cgroup(path: str) -> None:
    """Kill all that runs in a cgroup, and wait until it is gone; raises OSError."""
    for _ in range(EMPTYING_LOOKS):
        if b"populated 0" in Path(path, "cgroup.events").read_bytes():
            return
        Path(path, "cgroup.kill").write_text("1")
        time.sleep(0.001)
    raise OSError(errno.EAGAIN, "a process that was killed does not end", path)


def remove_cgroups(top: str) -> None:
    """Remove the slots' cgroups with all that runs in them, and what was made for them."""
    for slot in glob.glob(f"{top}/slot*"):
        with contextlib.suppress(OSError):
            empty_cgroup(slot)
            os.rmdir(slot)
    with contextlib.suppress(OSError):  # the agent is still in there when its launcher does this
        if os.path.exists(f"{top}/agent"):
            Path(top, "cgroup.subtree_control").write_text("-memory -pids -cpu")
            Path(top, "cgroup.procs").write_text("0")
            os.rmdir(f"{top}/agent")
        else:
            os.rmdir(top)


class Cgroup:
    """A slot's cgroup, as its supervisor uses it for one run after another."""

    # What memory.stat may be off by: the kernel adds up 64 pages of each processor at a time.
    LEAST_LEFT = MIB + 64 * PAGE * (os.cpu_count() or 1)

    def __init__(self, path: str, processes: int):
        with contextlib.suppress(FileNotFoundError):
            empty_cgroup(path)  # what a supervisor that was killed left
            os.rmdir(path)  # what is charged to it for longer than that goes with it
        make_cgroup(Path(path), processes)
        self.path = path
        # Who writes 0 into this is in the cgroup. It counts who opened it, not who writes.
        self.procs = os.open(f"{path}/cgroup.procs", os.O_WRONLY)
        self.stat = os.open(f"{path}/memory.stat", os.O_RDONLY)

    def begin(self, cap_mb: int) -> None:
        """Set the cap of the next run; raises OSError."""
        self.before = self._kills()
        Path(self.path, "memory.max").write_text(str(cap_mb * MIB))

    def held(self) -> int:
        """The bytes that the run holds now. Page cache is none of it: it gives way at the cap."""
        content = os.pread(self.stat, 4096, 0)
        return sum(map(int, re.findall(rb"(?m)^(?:anon|shmem) (\d+)$", content)))

    def is_charged(self) -> bool:
        """Whether the kernel still holds what a run that is gone is charged for: what connections
        have yet to send, what its sockets sent to themselves, output files that lie in a tmpfs."""
        content = os.pread(self.stat, 4096, 0)
        kinds = rb"(?m)^(?:anon|shmem|sock|kernel_stack|percpu|vmalloc|slab_unreclaimable) (\d+)$"
        return sum(map(int, re.findall(kinds, content))) > self.LEAST_LEFT

    def close(self) -> None:
        """Let go of it, for another of its path."""
        os.close(self.procs)
        os.close(self.stat)

    def was_full(self) -> bool:
        """Whether the kernel killed the run at its cap, and not for want in the whole machine."""
        return all(now > then for now, then in zip(self._kills(), self.before))

    def _kills(self) -> list[int]:
        """How often the cap was met, and how many were killed."""
        content = read_proc(f"{self.path}/memory.events")
        return [int(count) for count in re.findall(rb"(?m)^oom(?:_kill)? (\d+)$", content)]


# --- The room: what a slot sees of the machine (namespaces(7), mount(2), landlock(7)) ---

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWNET = 1 << 17, 1 << 27, 1 << 28, 1 << 30
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_NOATIME, MS_BIND = 1, 2, 4, 32, 1024, 4096
MS_REC, MS_SLAVE, MS_KEPT = 16384, 1 << 19, 0xC0E  # the last: what no remount may take away
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
SIOCSIFFLAGS, IFF_UP = 0x8914, 1  # netdevice(7)
# landlock(7): system calls with one number on every architecture; a right; scopes
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT, MAY_REFER = 444, 445, 446, 1 << 13
SCOPES = 3  # no abstract socket and no process outside can be reached
OWN = ("work", "home", "tmp", "output")  # a slot's directories, beneath its own/
# Scripts that may lock themselves, as `flock -n "$0"` does, so that none runs twice in one place.
# Each run has a copy of these, for slots are different places.
LOCKED = ("main.py", "run.sh", "index.js")
OWN_TMP = {"/tmp": "machine-tmp", "/var/tmp": "machine-var-tmp"}  # what a slot has in its place
SHM = "/dev/shm"
METADATA = {socket.AF_INET: "169.254.169.254", socket.AF_INET6: "fd00:ec2::254"}


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """mount(2); raises OSError."""
    kernel("mount", *map(os.fsencode, (source, target, kind)), flags, options.encode())


def remount(path: str, flags: int = 0) -> None:
    """Have a mount be writable, or with MS_RDONLY read-only; raises OSError."""
    kept = os.statvfs(path).f_flag & MS_KEPT
    mount("none", path, "", MS_REMOUNT | MS_BIND | flags | kept)


def close_mounts() -> None:
    """Have all that is mounted be read-only, but what only root writes to; raises OSError."""
    try:  # mount_setattr(2), Linux 5.12, has one number on every architecture
        kernel("syscall", 442, AT_FDCWD, b"/", AT_RECURSIVE, struct.pack("QQQQ", 1, 0, 0, 0), 32)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        remount("/", MS_RDONLY)
    with contextlib.suppress(OSError):  # it is read-only outside, too, or there is none
        remount("/proc")
        remount(cgroup_root())


def hidden_and_shown(settings: Path | None, folder: Path | None,
                     needed: Iterable[str]) -> tuple[list[str], list[str]]:
    """(hidden, shown): the paths that a room covers, and those below them that it shows again.

    Only what is there now can be covered: who adds a directory of the agent's makes it before.

    `folder` is that of --local: it has the tasks and results of all. A directory that holds this
    file or the settings is hidden as a whole, too, unless it is one of the system's: then that file
    alone is. Shown is what holds `needed`, and what resolves names. All else of the machine stays
    to be seen.
    """
    # Who waits for a file system that it serves itself, by /dev/fuse, cannot be killed.
    found = ["/tmp", "/var/tmp", SHM, "/run", "/dev/log", "/dev/fuse"]
    if folder and folder.resolve() != Path("/"):
        found.append(str(folder.resolve()))
    for file in map(os.path.realpath, (FILE, str(settings or FILE))):
        parts = Path(file).parts
        is_system = len(parts) < 4 or parts[1] in ("usr", "etc", "lib", "bin", "sbin", "nix")
        found.append(file if is_system else os.path.dirname(file))
    hidden = sorted({path for path in found if os.path.exists(path) and not os.path.islink(path)})
    resolver = os.path.realpath("/etc/resolv.conf")
    if os.path.dirname(resolver) != "/run":
        resolver = os.path.dirname(resolver)
    shown = {path for path in ("/run/nscd", resolver) if path.startswith("/run/")}
    for path in {*needed, *map(os.path.realpath, needed)}:
        covers = [cover for cover in hidden if path.startswith(f"{cover}/")]
        if covers:
            cover = max(covers, key=len)
            shown.add(os.path.join(cover, os.path.relpath(path, cover).partition("/")[0]))
    return hidden, sorted(filter(os.path.exists, shown))


def refuse_metadata(first_uid: int, last_uid: int) -> list[int]:
    """Have the kernel refuse the instance metadata to these uids; raises OSError.

    It does while a descriptor returned is open (bpf(2); Linux 5.7, cgroup v2). A routing rule
    would not do: a socket that is bound to a device goes past it.
    """
    ipv4, ipv6 = (socket.inet_pton(family, address) for family, address in METADATA.items())
    mapped = bytes(10) + b"\xff\xff" + ipv4
    bpf = {"x86_64": 321, "aarch64": 280}.get(os.uname().machine, -1)
    group, links = os.open(cgroup_root(), os.O_RDONLY), []
    # BPF_CGROUP_INET4_CONNECT and 6, and where struct bpf_sock_addr has the address
    for kind, offset, addresses in (10, 4, [ipv4]), (11, 8, [ipv6, mapped]):
        code = ctypes.create_string_buffer(_refusal(addresses, offset, first_uid, last_uid))
        license_text = ctypes.create_string_buffer(b"GPL")
        load = struct.pack("=IIQQ44xI", 18, len(code) // 8, ctypes.addressof(code),
                           ctypes.addressof(license_text), kind)
        program = kernel("syscall", bpf, 5, load, len(load))
        attach = struct.pack("=IIII", program, group, kind, 0)
        links.append(kernel("syscall", bpf, 28, attach, len(attach)))
        os.close(program)
    os.close(group)
    return links


def _refusal(addresses: list[bytes], offset: int, first_uid: int, last_uid: int) -> bytes:
    """A BPF program that refuses these addresses to these uids (kernel.org: BPF instruction set)"""

    def step(code: int, registers: int = 0, jump: int = 0, value: int = 0) -> bytes:
        return struct.pack("=BBhi", code, registers, jump, value)

    program = step(0xBF, 0x16)  # r6 = r1, the context
    for address in addresses:
        words = struct.unpack(f"={len(address) // 4}i", address)
        for number, word in enumerate(words):
            program += step(0x61, 0x60, offset + 4 * number)  # r0 = its word
            program += step(0x56, 0, 2 * (len(words) - number - 1) + 6, word)  # another: go on
        program += step(0x85, value=15) + step(0xBC)  # r0 = bpf_get_current_uid_gid(), its half
        program += step(0xA5, 0, 3, first_uid) + step(0x25, 0, 2, last_uid)  # below, above: go on
        program += step(0xB7) + step(0x95)  # return 0: refused
    return program + step(0xB7, value=1) + step(0x95)


class Room:
    """What a slot sees of the machine: made once, for its supervisor and all that it forks.

    What the kernel does not give is left out; `gaps` says what functions can do then.
    """

    def __init__(self, spec: SlotSpec):
        self.spec, self.feed = spec, f"{spec.directory}/feed"
        self.gaps: list[str] = []
        self.own: dict[str, list[str]] = {}  # path of /tmp and the like -> names that stay there
        self.covers: dict[str, str] = {}  # file of the machine -> what is seen in its place
        self.shm_limits = ""
        self.queues = ""  # where this namespace's POSIX message queues can be seen
        self.ruleset, self.is_scoped = -1, False
        self.proc = os.open("/proc", os.O_PATH)  # that of the machine, which can be written to
        for name in ("own", "feed", "queues", *OWN_TMP.values()):
            if os.path.lexists(path := f"{spec.directory}/{name}"):
                remove(path)  # with all that may have been set on it
            os.mkdir(path)
        self._name_user()
        if self._try("functions share /tmp, /dev/shm, /run and IPC with the machine, and may read "
                     "the settings", self._unshare):
            self._furnish()
            if os.path.isdir("/dev/pts"):  # the agent's user may have a shell open in one
                self._try("functions see this machine's terminals", lambda: mount(
                    "pts", "/dev/pts", "devpts", MS_NOSUID, "ptmxmode=666,mode=620"))
            if not os.geteuid():  # before Linux 5.8, which knows no `invisible`, it is refused
                # Who lacks CAP_SYS_RESOURCE cannot keep a function from lowering its oom_score_adj.
                can_keep = kernel("prctl", PR_CAPBSET_READ, CAP_SYS_RESOURCE, 0, 0, 0)
                flags = MS_NOSUID | MS_NODEV | (0 if can_keep else MS_RDONLY)
                self._try("functions see other users' processes in /proc", lambda: mount(
                    "proc", "/proc", "proc", flags, "hidepid=invisible"))
        if spec.uid is not None:
            self._try("functions may use the machine's abstract sockets", self._make_ruleset)

    def _name_user(self) -> None:
        """Write a copy of /etc/passwd that has the slot's user first."""
        uid, gid = self.spec.uid, self.spec.gid
        if uid is None:
            uid, gid = os.getuid(), os.getgid()
        entry = f"{USER}:x:{uid}:{gid}::{self.spec.directory}/own/home:/bin/sh\n"
        passwd = Path(self.spec.directory, "passwd")
        passwd.write_bytes(entry.encode() + read_proc("/etc/passwd"))
        passwd.chmod(0o644)

    def _try(self, effect: str, step: Callable[[], None]) -> bool:
        try:
            step()
        except OSError as error:
            if step == self._unshare and self.spec.network == "none":
                raise  # who asked for no network gets none, or no run
            self.gaps.append(f"{effect} ({error.filename}: {error.strerror})")
            return False
        return True

    def _unshare(self) -> None:
        """Leave the machine's mounts and IPC, and its network if so set.

        An ordinary user needs a user namespace for that; its own ids are all there is in it.
        """
        if user := os.geteuid():
            group = os.getegid()
            kernel("prctl", PR_SET_DUMPABLE, 1)  # else /proc/self is root's
            kernel("unshare", CLONE_NEWUSER)
            for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"),
                               ("gid_map", f"{group} {group} 1")):
                Path("/proc/self", name).write_text(text)
            kernel("prctl", PR_SET_DUMPABLE, 0)
        no_network = CLONE_NEWNET if self.spec.network == "none" else 0
        kernel("unshare", CLONE_NEWNS | CLONE_NEWIPC | no_network)
        mount("none", "/", "", MS_REC | MS_SLAVE)  # what is mounted here is not seen outside
        if no_network:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
                fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))

    def _furnish(self) -> None:
        """Cover what is hidden, show again what is kept of it, and mount what is the room's own."""
        spec, flags = self.spec, MS_NOSUID | MS_NODEV
        nothing, passwd = f"{spec.directory}/nothing", f"{spec.directory}/passwd"
        files = [path for path in spec.hidden if not os.path.isdir(path)]
        self.covers = {**dict.fromkeys(files, nothing), "/etc/passwd": passwd}
        kept = {path: os.open(path, os.O_PATH) for path in spec.shown
                if any(path.startswith(f"{above}/") for above in spec.hidden)}
        here = os.open(spec.directory, os.O_PATH)  # its path may be covered soon
        if spec.uid is not None:
            self._close_mounts()
        self._cover(here, kept)
        for fd in (*kept.values(), here):
            os.close(fd)
        self.own = {path: os.listdir(path) for path in (*OWN_TMP, SHM) if path in spec.hidden}
        self.sizes = self._sizes()
        # Its input and outputs are made anew for each run, for next to nothing here: a file system
        # on disk searches past all inodes that were freed of late.
        mount("feed", self.feed, "tmpfs", flags, "mode=711")
        queues = "/dev/mqueue" if os.path.isdir("/dev/mqueue") else f"{spec.directory}/queues"
        with contextlib.suppress(OSError):  # a kernel without message queues
            mount("queues", queues, "mqueue", flags)
            self.queues = queues

    def _close_mounts(self) -> None:
        """Have all mounts read-only: what anybody may write to lasts beyond a run."""
        base = os.path.dirname(self.spec.directory)
        self._try("functions may write where every user of this machine may", close_mounts)
        if not any(base.startswith(f"{path}/") for path in self.spec.hidden):
            mount(base, base, "", MS_BIND)
            remount(base, MS_NOATIME)

    def _cover(self, here: int, kept: Mapping[str, int]) -> None:
        """Cover what is hidden: by what is the slot's own below `here`, or else by nothing but
        what is `kept`, each path with a descriptor of what it was."""
        hidden, flags = self.spec.hidden, MS_NOSUID | MS_NODEV
        # A mount point cannot be renamed or removed, but a plain directory above it can. So the
        # first part of a kept path below its cover becomes a mount point, too.
        firsts = set()
        for path in kept:
            cover = min(one for one in hidden if path.startswith(f"{one}/"))
            firsts.add("/".join(path.split("/")[:cover.count("/") + 2]))
        firsts.difference_update(kept)
        covered = []
        for path in sorted({*hidden, *firsts}):
            if path in OWN_TMP:
                mount(f"/proc/self/fd/{here}/{OWN_TMP[path]}", path, "", MS_BIND)
                remount(path)
            elif path in firsts or os.path.isdir(path):
                os.makedirs(path, exist_ok=True)
                mode = "mode=1777" if path == SHM else "mode=755,size=1m"
                mount("room", path, "tmpfs", flags, mode)
                covered.append(path)
        for path, fd in kept.items():
            self._show(path, fd)
        for path in covered:
            if path != SHM:
                mount("none", path, "", MS_REMOUNT | MS_RDONLY | flags)

    def _show(self, path: str, fd: int) -> None:
        """Have what `fd` stands for at `path` again, below a directory that was covered."""
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            os.makedirs(path, exist_ok=True)
        elif not os.path.exists(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.mknod(path)
        mount(f"/proc/self/fd/{fd}", path, "", MS_BIND | MS_REC)
        if path == os.path.dirname(self.spec.directory):
            remount(path, MS_NOATIME)  # which would say what other runs read of a package
        elif self.spec.uid is None and path != f"{self.spec.directory}/own":
            remount(path, MS_RDONLY)  # the code, too, is the functions' own user's

    def _make_ruleset(self) -> None:
        """The Landlock rules for the helpers, which hand them on to all that they fork.

        A uid of its own needs no rules for files. It gets the one right MAY_REFER everywhere: who
        is under any rule for files may mount nothing, not even in a user namespace that it makes.
        """
        version = kernel("syscall", LANDLOCK_CREATE, None, 0, 1)
        if version < 2:  # it would let no file be moved to another directory
            raise OSError(errno.ENOSYS, f"its version here is {version}", "landlock")
        self.is_scoped = version >= 6
        if not self.is_scoped:
            self.gaps.append("functions may use the machine's abstract sockets")
        attributes = struct.pack("QQQ", MAY_REFER, 0, SCOPES if self.is_scoped else 0)
        self.ruleset = kernel("syscall", LANDLOCK_CREATE, attributes, len(attributes), 0)
        root = os.open("/", os.O_PATH)
        rule = struct.pack("=Qi", MAY_REFER, root)
        kernel("syscall", LANDLOCK_ADD, self.ruleset, 1, rule, 0)
        os.close(root)

    # For each run.

    def begin(self, memory_mb: int, files: int) -> None:
        """Have /dev/shm hold no more than the run may, and files hidden; raises OSError."""
        limits = f"size={memory_mb}m,nr_inodes={files}"  # an empty file is 1 KB of memory, too
        if SHM in self.own and limits != self.shm_limits:
            mount("room", SHM, "", MS_REMOUNT | MS_NOSUID | MS_NODEV, limits)
            self.shm_limits = limits
        for path, cover in self.covers.items():  # one that was replaced by a rename is so no more
            if os.path.exists(path) and not os.path.samefile(path, cover):
                mount(cover, path, "", MS_BIND)

    def is_used(self) -> bool:
        """Whether a run left what only another room has not: IPC of System V, a message queue of
        POSIX, anything in /dev/shm (with no name, too), a port of its own network that is waited
        for, a directory that had many names (ext4 keeps its size)."""
        lists = [f"/proc/sysvipc/{kind}" for kind in ("shm", "sem", "msg")]
        if self.spec.network == "none":
            lists += ["/proc/net/tcp", "/proc/net/tcp6"]
        is_left = any(read_proc(name).count(b"\n") > 1 for name in lists)  # below its title
        return bool(self.own and (is_left or self._sizes() != self.sizes)
                    or self.queues and os.listdir(self.queues))

    def _sizes(self) -> list[int]:
        """How large its directories are, and how many files are on those that are its own."""
        systems = [os.statvfs(path) for path in self.own if path == SHM]
        return [*(max(PAGE, os.stat(path).st_size) for path in self.own),
                *(system.f_files - system.f_ffree for system in systems)]


# --- The workspace: the directories of a slot, made pristine before each run ---


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a directory, and no link to one."""
    return entry.is_dir(follow_symlinks=False)


def sweep(path: str, keep: Collection[str] = ()) -> None:
    """Empty a directory but for `keep`: no modes, no depth and no link of a function's stop it.

    What lies below is closed first to who got hold of it over a socket. What lies deep is moved up
    into it, so that no path grows too long.
    """
    pending = [path]
    while pending:
        directory, below = pending[-1], []
        for entry in list(os.scandir(directory)):
            if directory == path and entry.name in keep:
                continue
            if not is_folder(entry):
                os.unlink(entry.path)
                continue
            with contextlib.suppress(OSError):
                os.rmdir(entry.path)  # most are empty
                continue
            os.chown(entry.path, os.geteuid(), -1)
            os.chmod(entry.path, 0o700)
            below.append(entry.path)
            if len(entry.path) > len(path) + 500:  # characters, of up to 4 bytes
                below[-1] = f"{path}/{os.urandom(8).hex()}"
                os.rename(entry.path, below[-1])
        pending += below
        if not below:
            pending.pop()
            if directory != path:
                os.rmdir(directory)


def remove(path: str) -> None:
    """Remove what is at a path, whatever a function put there."""
    if stat.S_ISDIR(os.lstat(path).st_mode):
        os.chmod(path, 0o700)
        sweep(path)
        os.rmdir(path)
    else:
        os.unlink(path)


# ioctl_fs(2), ioctl_xfs_fsgetxattr(2): flags, generation, extended flags with the project
GET_MARKS = 0x80086601, 0x80087601, 0x801C581F


def marks(path: str) -> list[object]:
    """All that its owner may have set on a directory but mode and times: its attributes, ACLs
    too, and what ioctl(2) sets. Raises OSError."""
    found: list[object] = []
    with contextlib.suppress(OSError):  # a file system that has none
        found += [(name, os.getxattr(path, name)) for name in os.listxattr(path)]
    fd = os.open(path, os.O_DIRECTORY)
    for request in GET_MARKS:
        with contextlib.suppress(OSError):
            found.append(fcntl.ioctl(fd, request, bytes(28)))
    os.close(fd)
    return found


def lockers() -> set[bytes]:
    """The processes that took a lock of flock(2) which still holds (proc(5), locks)."""
    return set(re.findall(rb"FLOCK +\S+ +\S+ (\d+)", read_proc("/proc/locks")))


class Workspace:
    """A slot's directories, as new for each run.

    With a uid of its own a function cannot change the package's files, which are root's: they are
    links. Else they are copies.
    """

    def __init__(self, spec: SlotSpec, room: Room):
        self.spec, self.room = spec, room
        self.own = f"{spec.directory}/own"
        self.on_disk = [self.own, *(f"{spec.directory}/{name}" for name in OWN_TMP.values())]
        self.linked = spec.uid not in (None, os.getuid())
        self.put = os.link if self.linked else shutil.copy2
        # Else a run in another slot may get hold of a directory, over an abstract socket, and could
        # list it later.
        self.is_alone = room.is_scoped or not self.linked
        if not self.is_alone:
            for path in room.own:
                os.chown(path, 0, spec.gid or 0)
        # What the room made, what stays in it, and its mode
        mode = 0o1777 if self.is_alone else 0o1770
        self.kept = [(self.own, list(OWN), 0o711), (room.feed, [], 0o711),
                     *((path, stays, mode) for path, stays in room.own.items())]
        for path, _, mode in self.kept:
            os.chmod(path, mode)
        self.new: dict[str, list[object]] = {}  # how each directory looked when it was made
        # The functions' own user has what the room made, too, and no run can have that anew.
        self.lasting = [] if self.linked else [self.own, room.feed, *room.own]
        self.marks = list(map(marks, self.lasting))
        self.lockers = lockers()  # those that are no run's
        self.is_tidy = False

    @staticmethod
    def _looks(path: str) -> list[object]:
        """All that can be seen of an empty directory but its mode and times."""
        status = os.lstat(path)  # a directory that was full once stays large
        return [*marks(path), status.st_ino, status.st_size, status.st_blocks, status.st_nlink]

    def prepare(self, package: str, text: str) -> None:
        """Make every directory what a run of `package` shall find; raises OSError."""
        if not self.is_tidy:
            self.tidy()
        self.is_tidy = False
        self._empty(f"{self.own}/output")  # the agent has what it wants of it
        for name in OWN:
            self._renew(f"{self.own}/{name}", 0o755 if name == "work" else 0o700)
        for directory in (pending := [package]):
            for entry in os.scandir(directory):
                path = f"{self.own}/work{entry.path[len(package):]}"
                if is_folder(entry):
                    self._own(path, 0o755, os.mkdir)
                    pending.append(entry.path)
                else:
                    is_own = entry.name in LOCKED and os.lstat(entry.path).st_size < MIB
                    put = shutil.copy2 if is_own else self.put
                    put(entry.path, path, follow_symlinks=False)
        with open(f"{self.room.feed}/stdin", "xb") as file:
            file.write(text.encode("utf-8", "surrogateescape"))
        for name in (*OUTPUTS, RETURNED):  # its own: it may open /dev/stdout again
            self._own(f"{self.room.feed}/{name}", 0o600, os.mkfifo)

    def _renew(self, path: str, mode: int) -> None:
        """Have an empty directory as new: made anew, unless nothing is set on it.

        A file system on disk makes one slowly, for it searches past inodes that were freed of late.
        """
        is_there = os.path.lexists(path)
        is_new = is_there and self.is_alone and self._looks(path) == self.new.get(path)
        if is_there and not is_new:
            remove(path)
        self._own(path, mode, os.chmod if is_new else os.mkdir)
        os.utime(path)
        if self.is_alone and not is_new:
            self.new[path] = self._looks(path)

    def _empty(self, path: str) -> None:
        """Empty what should be a directory; remove what is none."""
        if not os.path.islink(path) and os.path.isdir(path):
            os.chmod(path, 0o700)
            sweep(path)
        elif os.path.lexists(path):
            os.unlink(path)

    def tidy(self) -> None:
        """Remove what a run left, but for its output, which the agent takes; raises OSError."""
        for path, stays, mode in self.kept:
            if not self.linked:  # else it is root's, and only its content can have changed
                os.chmod(path, 0o700)
            sweep(path, stays)
            if not self.linked:
                os.chmod(path, mode)
            os.utime(path)
        for name in OWN:
            if name != "output":
                self._empty(f"{self.own}/{name}")
        self._await_locks()
        self.is_tidy = True

    def _await_locks(self) -> None:
        """Wait until the locks of a run are gone, too.

        It may have sent a locked file over a socket that it sent over itself: the kernel finds that
        some milliseconds later (unix(7), SCM_RIGHTS).
        """
        for _ in range(50):
            found = lockers()
            self.lockers &= found
            gone = {pid for pid in found - self.lockers if not os.path.exists(f"/proc/{int(pid)}")}
            self.lockers |= found - gone
            if not gone:
                return
            for end in socket.socketpair():
                end.close()  # has it look
            time.sleep(0.002)
        self.lockers |= gone  # it handed its lock on to another, which is no run's

    def is_marked(self) -> bool:
        """Whether a run has left anything on what only another room has anew."""
        return list(map(marks, self.lasting)) != self.marks

    def _own(self, path: str, mode: int, make: Callable[[str, int], None]) -> None:
        """Make what is the function's; the launcher's umask takes nothing of these modes."""
        make(path, mode)
        uid, gid = self.spec.uid, self.spec.gid
        if self.linked and uid is not None and gid is not None:
            os.chown(path, uid, gid)


# --------------------------------------------------------------------------------------------
# Run: the launcher, a supervisor for each slot, and what they end
# --------------------------------------------------------------------------------------------
#
#   agent ─(one socket)─ launcher ─┬─ supervisor of slot 0 ─┬─ fork shell ─ function (exec'd)
#                                  │                        └─ ready interpreter ─ function (python)
#                                  └─ supervisor of slot 1 …
#
#   what         who ends it, and when                                     if that one was killed
#   run          its supervisor: it ended, passed a limit, or is cancelled   the launcher does
#   supervisor   itself: the agent closed its connection; Slot.drop() and    the launcher ends
#                the launcher kill one that hangs or tidies too long         its run
#   launcher     itself: the agent's socket has closed                       the agent, and each
#                                                                            supervisor its run
#   turn         Agent._end(), for whoever asks first                        its lease runs out
#
# At a stop, in this order: nothing more is received; what has not begun is released; runs have
# their grace, then Slot.cancel() ends them; what they left is stored; the queue and the metrics
# are closed; the launcher ends, with all that is below it.
#
# A supervisor is a subreaper: whatever stands below it but for its two helpers belongs to its run.
# The launcher is subreaper behind the supervisors, and the agent behind the launcher, for a
# function without a uid of its own may kill any of them.

READY_RUNS = 1000  # runs of one ready interpreter: they share its hash seed
FIRST_UID, LAST_UID = 60600, 61183  # systemd.io/UIDS-GIDS: 60578 to 61183 are unused
UID_LOCKS = "/run/nanogrid"  # a locked file for each uid that an agent of this machine has
MAX_RETURNED = 256 * 1024  # bytes of JSON that a handler may return
NICER = 5  # functions give way to the agent, whose leases must not be late

# --- What crosses from the agent to the launcher and back ---
#
# The agent sends the launcher a SlotSpec with a socket: that is the agent's end of a new
# supervisor. The supervisor says READY once. Then the agent sends a RunSpec for each run, and the
# supervisor answers each with BEGUN and then OUTCOME or LOST, or with NOT_BEGUN. Each is a line of
# JSON; what is said back has its kind under "kind". SlotSpec has what is fixed for a slot,
# RunSpec.helper_env what is fixed when a helper starts, the rest of RunSpec what is one run's.

READY, BEGUN, OUTCOME, NOT_BEGUN, LOST = "ready", "begun", "outcome", "not begun", "lost"


@dataclass(frozen=True)
class SlotSpec:
    """What is fixed for a slot: where it runs, as whom, and what it sees of the machine."""

    directory: str
    uid: int | None  # None: as the agent's own user
    gid: int | None
    groups: tuple[int, ...]
    cgroup: str  # its directory; "" where there is none
    shell: str
    limits: dict[str, int]  # RLIMIT_… names of the resource module -> value
    network: str  # host or none; Slots._guard_metadata relies on its being that of all slots
    hidden: tuple[str, ...]  # directories and files of the machine that functions do not see
    shown: tuple[str, ...]  # what they need of what lies there


@dataclass(frozen=True)
class RunSpec:
    """One run, as the agent asks a supervisor for it."""

    command: tuple[str, ...]
    interpreter: str  # the one to keep ready for it; "" for none
    helper_env: dict[str, str]  # all that a helper starts with: nothing of a run, nor of a task
    env: dict[str, str]  # what this run has besides
    package: str  # directory with the code
    input: str
    timeout_ms: int
    memory_mb: int
    disk_mb: int
    files: int
    has_handler: bool = False  # which must return something
    tee: bool = False  # pass the outputs through as they come


class NotBegun(OSError):
    """A part of the machine failed before the function had begun: the run can be tried again."""


class RunLost(Exception):
    """What ran the function was lost with it: the function may have done anything by then."""


def children_of(pid: int) -> list[int]:
    """The children of all threads of a process (proc(5), CONFIG_PROC_CHILDREN)."""
    with contextlib.suppress(OSError):
        return [int(child) for task in os.listdir(f"/proc/{pid}/task")
                for child in read_proc(f"/proc/{pid}/task/{task}/children").split()]
    return []


def descendants(helpers: Collection[int] = (), others: Collection[int] = ()) -> dict[int, int]:
    """All below this process, each with its parent, but for `helpers` alone, and `others` with all
    below them."""
    found = {pid: parent for parent in (os.getpid(), *helpers) for pid in children_of(parent)
             if pid not in helpers and pid not in others}
    for parent in (parents := list(found)):
        below = dict.fromkeys(children_of(parent), parent)
        found.update(below)
        parents.extend(below)
    return found


def signal_all(pids: Iterable[int], number: int) -> None:
    """Send a signal to each of these that is still there and ours."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def reap(kept: Collection[int]) -> None:
    """Reap this process's children that have ended, as far as the first of `kept` that has."""
    with contextlib.suppress(ChildProcessError):  # there are none
        while ((ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT))
               and ended.si_pid not in kept):
            os.waitpid(ended.si_pid, 0)


def end_descendants(helpers: Collection[int] = (), others: Collection[int] = ()) -> None:
    """Kill and reap all `descendants`; stopped first, to fork no more: a fork bomb ends, too."""
    stopped: set[int] = set()
    reap([*helpers, *others])  # to look below hundreds that have ended would take long
    while below := descendants(helpers, others):
        new = set(below) - stopped
        signal_all(new or below, signal.SIGSTOP if new else signal.SIGKILL)
        stopped |= new
        if not new:
            for pid in below:
                with contextlib.suppress(ChildProcessError):  # another's child
                    os.waitpid(pid, os.WNOHANG)
            time.sleep(0.001)


# --- Helpers: the processes that fork runs ---

KEPT_OF_EACH_END = 32 * 1024  # bytes of an output: four ends, escaped, fit into MAX_MESSAGE
STOPPED = 0x137F  # a status of wait4(2)
# linux/audit.h: x86_64, i386, aarch64, arm; the first of three system calls for keys there
KEY_CALLS = {0xC000003E: 248, 0x40000003: 286, 0xC00000B7: 217, 0x40000028: 309}
RLIM_NLIMITS = 16  # getrlimit(2)
IOPRIO_GET = {"x86_64": 252, "aarch64": 31}.get(os.uname().machine, -1)
RT_SIGACTION = {"x86_64": 13, "aarch64": 134}.get(os.uname().machine, -1)

class Output:
    """One output of a run: its first and its last bytes, and how many there were."""

    def __init__(self, path: str, tee: int = 0, most: int = KEPT_OF_EACH_END):
        # Opened for writing, too, it never ends: a function may close its outputs and open them
        # again (fifo(7)).
        self.fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        self.tee, self.most, self.count = tee, most, 0
        self.head, self.tail = bytearray(), bytearray()

    def read(self) -> int:
        """Take what is there now; how many bytes of it."""
        chunk = read_nonblocking(self.fd)
        if self.tee:
            write_all(self.tee, chunk)
        self.count += len(chunk)
        space = self.most - len(self.head)
        self.head += chunk[:space]
        self.tail += chunk[space:]
        del self.tail[:-self.most]
        return len(chunk)

    def close(self) -> str:
        """Take the rest; the kept text."""
        while self.read():
            pass
        os.close(self.fd)
        dropped = self.count - len(self.head) - len(self.tail)
        mark = b"\n[%d bytes dropped]\n" % dropped if dropped else b""
        return (self.head + mark + self.tail).decode("utf-8", "replace")


def write_all(fd: int, content: bytes) -> None:
    """Write it all; a reader that went away loses it."""
    with contextlib.suppress(BrokenPipeError):
        while content:
            content = content[os.write(fd, content):]


def key_filter() -> bytes:
    """A seccomp program that knows no add_key(2), request_key(2) and keyctl(2).

    The kernel keeps keys for a user, for days: each run would find those of the one before.
    """
    def step(code: int, value: int, jump: int = 0, other: int = 0) -> bytes:
        return struct.pack("=HBBI", code, jump, other, value)

    program = b""
    for architecture, first in KEY_CALLS.items():
        program += step(0x20, 4) + step(0x15, architecture, 0, 5)  # another: go on below
        program += step(0x20, 0) + step(0x54, 0xBFFFFFFF)  # the call's number, x32's bit taken away
        program += step(0x35, first, 0, 2) + step(0x25, first + 2, 1, 0)
        program += step(0x06, 0x50000 | errno.ENOSYS)
    return program + step(0x06, 0x7FFF0000)  # allowed


def spawn(room: Room, argv: list[str], env: dict[str, str], cwd: str, files: list[int],
          procs: int = -1) -> int:
    """The pid of a confined process with `files` as its descriptors 0, 1, 2, …, which it closes.

    With `procs` it is a run's: it has the slot's user, and is in the slot's cgroup. Without, it
    keeps the supervisor's user, to change that of its forks. Raises OSError.
    """
    try:
        pid: int = FORK()
        if pid < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "fork")
        if not pid:
            try:
                confine(room)
                kept = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in files]
                if procs >= 0:
                    os.write(procs, b"0")
                    become_user(room.spec)
                for target, fd in enumerate(kept):
                    os.dup2(fd, target)
                os.closerange(len(files), 1024)
                os.chdir(cwd)
                os.execve(argv[0], argv, env)
            finally:
                os._exit(127)
        return pid
    finally:
        for fd in set(files):
            os.close(fd)


KEY_FILTER = ctypes.create_string_buffer(key_filter())
KEY_PROGRAM = struct.pack("HP", len(KEY_FILTER) // 8, ctypes.addressof(KEY_FILTER))
# fork(2) without Python's hooks, which cost each child a millisecond: it goes on to exec at once.
FORK = ctypes.PyDLL(None, use_errno=True).fork


def confine(room: Room) -> None:
    """In a new child: limits, priority, signals, and what the room keeps from it."""
    if room.spec.uid is None and not os.getuid():
        kernel("prctl", PR_SET_SECUREBITS, SECBIT_NOROOT)  # no capability by exec
    # The kernel shares the processors between sessions first (sched(7), autogroup): a function in
    # its supervisor's session could starve it. So each leads one of its own.
    os.setsid()
    for name, value in room.spec.limits.items():
        if name != "RLIMIT_NPROC":  # a run's alone
            resource.setrlimit(getattr(resource, name), (value, value))
    # The out-of-memory killer takes a function first; /proc of what is not dumpable is root's.
    with contextlib.suppress(PermissionError):
        os.write(os.open("self/oom_score_adj", os.O_WRONLY, dir_fd=room.proc), b"1000")
    os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0) + NICER)
    if room.ruleset >= 0:
        kernel("syscall", LANDLOCK_RESTRICT, room.ruleset, 0)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores both, and exec keeps that
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)


def become_user(spec: SlotSpec) -> None:
    """In a new child: the slot's user, without any capability."""
    uid, gid = spec.uid, spec.gid
    if uid is not None and gid is not None:
        for capability in range(64):  # there may be less, or no CAP_SETPCAP to drop them
            LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
        os.setgroups(spec.groups)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)  # takes all capabilities, too


class ForkShell:
    """Starts a run that is exec'd (FORK_SHELL says how); nothing of it is there for another."""

    def __init__(self, room: Room, procs: int, others: Collection[int]):
        self.room, self.procs = room, procs
        self.others = others  # the supervisor's children that are no run's

    def start(self, run: RunSpec, limits: dict[str, int]) -> tuple[int, float]:
        """Start the run; its pid, a child of ours, and when (monotonic). Raises OSError."""
        lines = []
        if limits:
            lines = [f"ulimit -d {limits['RLIMIT_DATA'] // 1024}",
                     "ulimit -u {0} 2>/dev/null || ulimit -p {0}"  # bash; dash
                     .format(limits["RLIMIT_NPROC"])]
        # A shell gives some variables a value of its own, and with LD_PRELOAD or OPTIND it may not
        # even get that far: those of the task do not pass through it.
        env = {name: value for name, value in run.env.items() if name in RUN_ENV | ROLE_ENV}
        given = [f"{name}={run.env[name]}" for name in run.env.keys() - env.keys()]
        argv = [self.room.spec.shell, "-c", FORK_SHELL % "\n".join(lines), "sh",
                *(["/usr/bin/env", *given] if given else []), *run.command]
        read_end, gate = os.pipe()
        with open(gate, "wb", buffering=0) as word:
            files = [os.open(f"{self.room.feed}/{name}", flags) for name, flags in (
                ("stdin", os.O_RDONLY), *((output, os.O_WRONLY) for output in OUTPUTS))]
            shell = spawn(self.room, argv, {**run.helper_env, **env},
                          f"{self.room.spec.directory}/own/work", [*files, read_end], self.procs)
            os.waitpid(shell, 0)
            found = [pid for pid in children_of(os.getpid()) if pid not in self.others]
            if len(found) != 1:
                raise NotBegun(errno.EAGAIN, "no shell could be forked or confined for a run")
            self.done = os.pidfd_open(found[0])  # Linux 5.3
            started = time.monotonic()
            word.write(b"\n")
        return found[0], started

    def wait(self, child: int) -> tuple[int, int]:
        """(status, ru_maxrss in KiB) of the run, once it has ended."""
        status = STOPPED
        while os.WIFSTOPPED(status):  # by itself, as traced by us: that is no end
            _, status, usage = os.wait4(child, 0)
        os.close(self.done)
        return status, usage.ru_maxrss


def traits(pid: int) -> list[object]:
    """All that another process of its user can set on a process: its forks have it, too."""
    scheduling = os.sched_getscheduler(pid), os.sched_getparam(pid).sched_priority
    return [*(resource.prlimit(pid, kind) for kind in range(RLIM_NLIMITS)),
            os.sched_getaffinity(pid), os.getpriority(os.PRIO_PROCESS, pid), scheduling,
            LIBC.syscall(IOPRIO_GET, 1, pid)]


class ReadyPython:
    """An interpreter that has started and is forked for each run (READY_PYTHON)."""

    def __init__(self, room: Room, env: dict[str, str], procs: int, interpreter: str):
        """Start it; raises ConnectionError when it cannot be kept ready."""
        self.spec, self.runs = room.spec, 0
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        null = os.open(os.devnull, os.O_RDWR)
        unread, output = os.pipe()  # sys.stdout remembers that a pipe cannot seek
        self.pid = spawn(room, [interpreter, "main.py"], env, os.path.dirname(self.spec.shell),
                         [null, output, output, theirs.detach(), os.dup(procs)])
        os.close(unread)
        self.done = self.channel.fileno()
        try:
            self.receive(30)
            self.traits = traits(self.pid)
            threads = len(os.listdir(f"/proc/{self.pid}/task")) - 1
            if threads or children_of(self.pid):  # no fork has them, but the locks that they hold
                raise ConnectionError(f"it starts {threads} threads and "
                                      f"{len(children_of(self.pid))} processes of its own (in a "
                                      ".pth file or sitecustomize)")
        except ConnectionError:
            self.close()
            raise

    def is_as_made(self) -> bool:
        """Whether no run has killed or changed it: as an ordinary user each could."""
        if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        return self.spec.uid is not None or traits(self.pid) == self.traits

    def receive(self, seconds: float = 20) -> bytes:
        """What it says next; raises ConnectionError."""
        signal_all([self.pid], signal.SIGCONT)  # a run of its user may have stopped it
        if not select.select([self.channel], [], [], seconds)[0]:
            raise ConnectionError("what forks the functions does not answer")
        if answer := self.channel.recv(1000):
            return answer
        raise ConnectionError("what forks the functions has ended")

    def start(self, run: RunSpec, limits: dict[str, int]) -> tuple[int, float]:
        """Start the run; its pid, a child of the interpreter, and when. Raises ConnectionError."""
        self.runs += 1
        self.channel.send(marshal.dumps({
            "directory": self.spec.directory, "uid": self.spec.uid, "gid": self.spec.gid,
            "groups": self.spec.groups, "env": run.env, "limits": limits,
            "command": run.command[1:]}, 2))
        kind, child, started = marshal.loads(self.receive())
        if kind != "begun":
            raise ConnectionError("the function's process ended before it began")
        return child, started

    def wait(self, child: int) -> tuple[int, int]:
        """(status, ru_maxrss in KiB) of the run, once it has ended; raises ConnectionError."""
        _, status, peak_kib = marshal.loads(self.receive())
        return status, peak_kib

    def close(self) -> None:
        """End it; what stood below it becomes ours."""
        self.channel.close()
        signal_all([self.pid], signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


# --- The supervisor: one run from its workspace to its outcome ---

# A run that failed ends as oom when the end of its stderr matches these, the runtimes' own words
# for an allocation that was refused. Some size their heap by the cap, and say when that is full.
HEAP_FULL = re.compile(r"JavaScript heap out of memory|OutOfMemoryError: Java heap space")
# Without a cgroup the kernel refuses what is beyond RLIMIT_DATA, and keeps no count of it.
NO_MEMORY = re.compile(
    r"(?m)^(MemoryError\b|numpy\S*MemoryError\b|terminate called after throwing an instance of "
    r"'std::bad_alloc'|fatal error: runtime: (out of memory|cannot allocate memory)"
    r"|.*Cannot allocate memory|memory allocation of \d+ bytes failed|.*OutOfMemoryError"
    r"|(\[FATAL\]|.*:) failed to allocate memory|Out of memory(!| in perl))")
# Node.js says this of more than there can ever be, too.
NO_BUFFER = "RangeError: Array buffer allocation failed"


def with_returned(outcome: Outcome) -> Outcome:
    """A handler's outcome: failed, where what it returned cannot be kept as JSON."""
    if not outcome.is_good:
        return replace(outcome, returned="null")
    text, size = "", len(outcome.returned.encode())
    try:
        json.loads(outcome.returned, parse_float=finite, parse_constant=finite)
        json.loads("[" * 50 + outcome.returned + "]" * 50)  # the agent reads it deeper in its stack
    except (ValueError, RecursionError) as error:
        text = f"what the handler returned cannot be read: {_why(error)}"
    if size > MAX_RETURNED:
        text = f"the handler returned over {MAX_RETURNED} bytes of JSON"
    if not size:
        text = "the process ended before its handler had returned"
    return replace(outcome, status="failed", text=text, returned="null") if text else outcome


class Supervisor:
    """One slot: runs its jobs, one at a time."""

    def __init__(self, spec: SlotSpec, agent: socket.socket, life: int):
        self.spec, self.agent = spec, agent
        self.life = life  # ends with the launcher
        processes = spec.limits["RLIMIT_NPROC"]
        self.cgroup = Cgroup(spec.cgroup, processes) if spec.cgroup else None
        # What takes a run into its cgroup (Cgroup.procs), or nowhere
        self.procs = self.cgroup.procs if self.cgroup else os.open(os.devnull, os.O_WRONLY)
        self.room = Room(spec)
        self.workspace = Workspace(spec, self.room)
        self.helpers: dict[str, ReadyPython] = {}  # by interpreter
        self.unready: dict[str, str] = {}  # an interpreter that is not kept ready: why
        self.begun = False  # whether the function of the run has begun
        self.traits = traits(os.getpid())
        for name, value in spec.limits.items():
            hard = resource.getrlimit(getattr(resource, name))[1]
            spec.limits[name] = value if hard == resource.RLIM_INFINITY else min(value, hard)

    def work(self) -> None:
        """Run what the agent asks for until it, or the launcher, is gone."""
        answer(self.agent, READY, pid=os.getpid(), gaps=self.room.gaps)
        requests = self.agent.makefile("r", encoding="utf-8")
        while (self.life not in select.select([self.agent.fileno(), self.life], [], [])[0]
               and (line := requests.readline())):
            self.begun, run = False, RunSpec(**json.loads(line))
            try:
                outcome = self.run(run)
                outcome = with_returned(outcome) if run.has_handler else replace(
                    outcome, returned="")
                answer(self.agent, OUTCOME, outcome=vars(outcome), is_spent=self.is_spent(),
                       unready=self.unready)
            except OSError as error:  # ConnectionError is one
                with contextlib.suppress(OSError):  # the next supervisor of the slot waits for it
                    self.end_run(self.helpers)
                # A helper that does not answer is as if it could not be forked.
                number = errno.EAGAIN if isinstance(error, ConnectionError) else error.errno
                answer(self.agent, LOST if self.begun else NOT_BEGUN, errno=number, text=str(error))
            with contextlib.suppress(OSError):  # the next run's preparation says what cannot be
                self.workspace.tidy()
        self.end_run(self.helpers)

    def is_spent(self) -> bool:
        """Whether a run left what only another supervisor has not: something of its room; as an
        ordinary user, what was set on the room's directories or this process."""
        return (self.room.is_used() or self.workspace.is_marked()
                or self.spec.uid is None and traits(os.getpid()) != self.traits)

    def run(self, run: RunSpec) -> Outcome:
        """One run, to its end. Raises OSError."""
        if self.cgroup:
            if self.cgroup.is_charged():
                self._close(self.helpers)  # whose forks would go into the old one
                self.cgroup.close()
                self.cgroup = Cgroup(self.spec.cgroup, self.spec.limits["RLIMIT_NPROC"])
                self.procs = self.cgroup.procs
            self.cgroup.begin(run.memory_mb)
        self.room.begin(run.memory_mb, run.files)
        self.workspace.prepare(run.package, run.input)
        outputs = [Output(f"{self.room.feed}/{name}", fd if run.tee else 0)
                   for fd, name in enumerate(OUTPUTS, 1)]
        outputs.append(Output(f"{self.room.feed}/{RETURNED}", most=MAX_RETURNED))
        try:
            outcome = self._run(run, outputs)
        finally:
            texts = [output.close() for output in outputs]
        if outcome.status == "exited":
            outcome = replace(outcome, status=self._verdict(run, outcome, texts[1][-2000:]))
        return replace(outcome, stdout=texts[0], stderr=texts[1], stdout_bytes=outputs[0].count,
                       stderr_bytes=outputs[1].count, returned=texts[2])

    def _run(self, run: RunSpec, outputs: list[Output]) -> Outcome:
        """A run from its start until nothing of it is left; `exited`: it ended by itself."""
        helper, start = self._helper(run)
        os.utime(f"{self.room.feed}/{RETURNED}")  # for a handler's deadline
        cap = run.memory_mb * MIB
        try:
            child, started = helper.start(run, self._limits(run))
        except OSError:
            if not self.cgroup or not self.cgroup.was_full():
                raise
            answer(self.agent, BEGUN)  # its cap is less than what its start takes
            self.end_run()
            return Outcome("oom", exit_code=-signal.SIGKILL, duration_millis=0, start=start,
                           peak_memory_bytes=cap, started_at=time.time())
        self.begun = True
        answer(self.agent, BEGUN)
        started_at = time.time() - (time.monotonic() - started)
        watch = Watch(self, run, outputs, started)
        end = watch.wait(helper.done)
        duration = time.monotonic() - started
        if end != "exited":  # leaving the status of its first process to be taken
            self._kill(child)
        status, peak_kib = helper.wait(child)
        if end == "exited" and self.cgroup and self.cgroup.was_full():
            end = "oom"
        self.end_run()
        peak = max(peak_kib * 1024, watch.largest)
        return Outcome(
            "failed" if end == "disk" else end, reason="disk" if end == "disk" else None,
            exit_code=os.waitstatus_to_exitcode(status), start=start, started_at=started_at,
            peak_memory_bytes=min(peak, cap) if end == "oom" and self.cgroup else peak,
            duration_millis=round(duration * 1000))

    def _limits(self, run: RunSpec) -> dict[str, int]:
        """What a run's own processes are limited to where no cgroup does it."""
        if self.cgroup:
            return {}
        # Thread stacks, heaps and calloc count as data and are free until touched. So the limit is
        # several times the cap, enough for 60 threads or a JVM. It stops what outruns the watcher.
        data_mb = 4 * run.memory_mb + 512
        return {"RLIMIT_DATA": data_mb * MIB, "RLIMIT_NPROC": self.spec.limits["RLIMIT_NPROC"]}

    def _verdict(self, run: RunSpec, outcome: Outcome, stderr: str) -> str:
        """The status of a run that ended by itself, with the end of its standard error."""
        is_full = bool(HEAP_FULL.search(stderr))
        if not self.cgroup:
            peak, cap = outcome.peak_memory_bytes or 0, run.memory_mb * MIB
            if peak > cap:  # the watcher came too late
                return "oom"
            is_full |= bool(NO_MEMORY.search(stderr)) or NO_BUFFER in stderr and peak > cap / 2
        return "ok" if not outcome.exit_code else "oom" if is_full else "failed"

    def _helper(self, run: RunSpec) -> tuple[ForkShell | ReadyPython, str]:
        """What starts this run, made if need be, and whether that is a warm or a cold start."""
        if run.interpreter and run.interpreter not in self.unready:
            ready = self.helpers.get(run.interpreter)
            if ready and ready.runs < READY_RUNS and ready.is_as_made():
                return ready, "warm"
            self._close([run.interpreter])
            try:
                ready = self.helpers[run.interpreter] = ReadyPython(
                    self.room, run.helper_env, self.procs, run.interpreter)
                return ready, "cold"
            except ConnectionError as error:  # it is too old, or a wrapper, or does more than start
                self.unready[run.interpreter] = str(error)
                self.end_run()
        others = [helper.pid for helper in self.helpers.values()]
        return ForkShell(self.room, self.procs, others), "cold"

    def _close(self, names: Iterable[str]) -> None:
        """End those of these helpers that there are."""
        for name in list(names):
            if helper := self.helpers.pop(name, None):
                helper.close()

    def run_pids(self) -> dict[int, int]:
        """All processes of the run, each with its parent."""
        return descendants([helper.pid for helper in self.helpers.values()])

    def _kill(self, child: int) -> None:
        """Kill all that is running of a run."""
        if self.cgroup:
            empty_cgroup(self.cgroup.path)
        else:
            signal_all([child, *self.run_pids()], signal.SIGKILL)

    def end_run(self, helpers: Iterable[str] = ()) -> None:
        """Kill all that is left of a run, daemons and other sessions too, and these `helpers`."""
        self._close(helpers)
        if self.cgroup:
            empty_cgroup(self.cgroup.path)
        reap([helper.pid for helper in self.helpers.values()])
        if self.run_pids():
            # What clone(CLONE_PARENT) made a helper's child, it won't reap.
            self._close([name for name, helper in self.helpers.items() if children_of(helper.pid)])
            end_descendants([helper.pid for helper in self.helpers.values()])


# --- The launcher ---


def reset_signals() -> None:
    """Have signals at their defaults: what ignores or blocks one hands that on, through exec."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE}:
        signal.signal(number, signal.SIG_DFL)
    for own in (32, 33):  # glibc's, out of its reach; Python 3.13's subprocess ignores them
        LIBC.syscall(RT_SIGACTION, own, bytes(32), None, 8)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    # A handler that does nothing is not handed on.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, lambda *_: None)


# Runs this file as Python would, but lets go of what compiling it took: 10 MiB that a script
# holds until its end, and whose page tables every fork would copy.
LAUNCH = """\
import ctypes, sys
del sys.argv[0]
__file__ = sys.argv[0]
with open(__file__, "rb") as file:
    code = compile(file.read(), __file__, "exec")
if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
    libc.malloc_trim(0)
exec(code)
"""


class Launcher:
    """Forks a supervisor for each slot that the agent asks for, until the agent is gone."""

    def __init__(self, control: socket.socket):
        self.control = control
        self.life, self.held = os.pipe()  # ends with this process
        # pidfd -> pid; its slot; what locks the uid of that
        self.supervisors: dict[int, tuple[int, SlotSpec, list[int]]] = {}
        self.poll = select.poll()
        self.poll.register(control, select.POLLIN)

    def work(self) -> None:
        """Begin and end supervisors."""
        while True:
            ready = {fd for fd, _ in self.poll.poll()}
            if self.control.fileno() in ready:
                message, fds, _, _ = socket.recv_fds(
                    self.control, 65536, 2, socket.MSG_CMSG_CLOEXEC)
                if not message:
                    return
                with socket.socket(fileno=fds[0]) as agent:
                    try:
                        self.begin(agent, SlotSpec(**json.loads(message)), fds[1:])
                    except OSError as error:  # no more processes: who runs is not to be lost
                        answer(agent, NOT_BEGUN, errno=error.errno, text=str(error))
            for pidfd in self.supervisors.keys() & ready:
                self.end(pidfd)

    def begin(self, agent: socket.socket, spec: SlotSpec, locks: list[int]) -> None:
        """Fork a supervisor; raises OSError."""
        for pid, other, _ in self.supervisors.values():
            if other.directory == spec.directory:  # it may still be tidying there
                signal_all([pid], signal.SIGKILL)
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        pid = os.fork()
        if not pid:
            supervise(agent, self.life, spec, (self.control.fileno(), self.held, *self.supervisors))
        pidfd = os.pidfd_open(pid)
        self.supervisors[pidfd] = pid, spec, locks
        self.poll.register(pidfd, select.POLLIN)

    def end(self, pidfd: int) -> None:
        """End what a supervisor left, when it was killed."""
        self.poll.unregister(pidfd)
        pid, spec, locks = self.supervisors.pop(pidfd)
        os.waitpid(pid, 0)
        os.close(pidfd)
        # The next of its slot empties the cgroup itself.
        if spec.cgroup and spec.cgroup not in [
                other.cgroup for _, other, _ in self.supervisors.values()]:
            with contextlib.suppress(OSError):
                Path(spec.cgroup, "cgroup.kill").write_text("1")
        end_descendants(others=[pid for pid, _, _ in self.supervisors.values()])
        for lock in locks:
            os.close(lock)


def launch(control: socket.socket, cgroups: str) -> None:
    """The launcher's life."""
    os.setsid()
    os.umask(0o022)
    kernel("prctl", PR_SET_DUMPABLE, 0)
    kernel("prctl", PR_SET_CHILD_SUBREAPER, 1)
    kernel("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    reset_signals()
    Launcher(control).work()
    if cgroups:
        remove_cgroups(cgroups)  # all runs end with them, at once; the agent may have been killed
    end_descendants()
    if cgroups:
        remove_cgroups(cgroups)  # its own, which the supervisors were in


def supervise(agent: socket.socket, life: int, spec: SlotSpec, others: tuple[int, ...]) -> NoReturn:
    """A supervisor's life, in a fork of the launcher."""
    try:
        for other in others:
            os.close(other)
        os.setsid()
        kernel("prctl", PR_SET_CHILD_SUBREAPER, 1)
        with contextlib.suppress(OSError):  # a kernel without seccomp
            kernel("prctl", PR_SET_SECCOMP, 2, KEY_PROGRAM)
        Supervisor(spec, agent, life).work()
    except OSError as error:
        answer(agent, NOT_BEGUN, errno=error.errno, text=str(error))
    finally:
        os._exit(0)


def answer(agent: socket.socket, kind: str, **content: Any) -> None:
    """Send the agent one line; one that has gone needs none."""
    with contextlib.suppress(ConnectionError):
        agent.sendall(json.dumps({"kind": kind, **content}).encode() + b"\n")


# --------------------------------------------------------------------------------------------
# Measure: what a run holds while it runs
# --------------------------------------------------------------------------------------------

LOOK_SECONDS = 0.010  # how often the watcher looks at a run's memory
DISK_LOOK_SECONDS = 0.25  # how often it looks at a run's disk
PSS = re.compile(rb"(?m)^Pss: +(\d+)")  # proc(5): a page's share, by how many have it


class Watch:
    """Looks after a run until it ends or must be ended."""

    def __init__(self, supervisor: Supervisor, run: RunSpec, outputs: list[Output], started: float):
        self.supervisor, self.run = supervisor, run
        self.outputs = {output.fd: output for output in outputs}
        self.deadline = started + run.timeout_ms / 1000
        self.next_look = started + LOOK_SECONDS
        self.next_disk_look = started + DISK_LOOK_SECONDS
        self.largest = 0  # bytes: the most that was seen held by all of the run together

    def wait(self, done: int) -> str:
        """How the run ends: exited (`done` is readable), timeout, oom, disk, or released."""
        agent, life = self.supervisor.agent.fileno(), self.supervisor.life
        poll = select.poll()
        for fd in (done, agent, life, *self.outputs):
            poll.register(fd, select.POLLIN)
        while (now := time.monotonic()) < self.deadline:
            if now >= self.next_look and (end := self._look(now)):
                return end
            wait = min(self.next_look, self.deadline) - time.monotonic()
            ready = [fd for fd, _ in poll.poll(max(0, math.ceil(wait * 1000)))]
            if done in ready:
                return "exited"
            if life in ready:
                raise ConnectionError("the launcher ended")
            if agent in ready:
                return "released"
            if sum(self.outputs[fd].read() for fd in ready) >= PIPE_BYTES:
                time.sleep(0.0005)  # by vmsplice(2) a flood costs less CPU than reading it
        return "timeout"

    def _look(self, now: float) -> str:
        """Whether the run is over its memory or its disk; "" when it is not."""
        self.largest = max(self.largest, self._held())
        if self.largest > self.run.memory_mb * MIB and not self.supervisor.cgroup:
            return "oom"
        if now >= self.next_disk_look:
            began = time.monotonic()
            size, count = disk_usage(
                self.supervisor.workspace.on_disk, self.run.files, self.deadline)
            if size > self.run.disk_mb * MIB or count > self.run.files:
                return "disk"
            now = time.monotonic()  # counting takes a tenth of the time, but on a disk that crawls
            self.next_disk_look = now + max(DISK_LOOK_SECONDS, min(10 * (now - began), 3.0))
        # A look at many processes is slow: it has a fifth of the time.
        self.next_look = now + max(LOOK_SECONDS, 5 * (time.monotonic() - now))
        return ""

    def _held(self) -> int:
        """The bytes that the run holds now, all its processes together, shared pages once."""
        if self.supervisor.cgroup:
            return self.supervisor.cgroup.held()
        pids = self.supervisor.run_pids()
        sizes = {pid: read_proc(f"/proc/{pid}/statm") for pid in pids}
        together = 0
        for pid, size in sizes.items():
            # A look at many can be long: each read waits for a process that is in a fork.
            if time.monotonic() > self.deadline:
                break
            if len(pids) == 1:
                together = int((size.split() or [b"0", b"0"])[1]) * PAGE
            # Who is between vfork and exec has its parent's memory, not a copy of it.
            elif size != sizes.get(pids[pid]):
                found = PSS.search(read_proc(f"/proc/{pid}/smaps_rollup"))
                together += int(found[1]) * 1024 if found else 0
        return together


def disk_usage(paths: Iterable[str], most: int, deadline: float = math.inf) -> tuple[int, int]:
    """(bytes, files) below these directories; stops at the deadline, and beyond `most` files.

    What cannot be listed, for its path is too long or its mode closed, is more than that.
    """
    size = count = 0
    pending = list(paths)
    while pending and count <= most:
        try:
            entries = list(os.scandir(pending.pop()))
        except OSError as error:
            if error.errno in (errno.ENAMETOOLONG, errno.EACCES):
                count += most + 1
            continue  # it has gone while we look, or the look failed
        count += len(entries)
        for entry in entries:
            if time.monotonic() > deadline:
                return size, count
            with contextlib.suppress(OSError):
                if is_folder(entry):
                    pending.append(entry.path)
                else:
                    status = entry.stat(follow_symlinks=False)
                    size += status.st_blocks * 512 // max(1, status.st_nlink)
    return size, count


# --------------------------------------------------------------------------------------------
# Report: what is said and kept of a message's turn
# --------------------------------------------------------------------------------------------

MOST_LINES = 100  # of each end of a stream in the log
PIECE_BYTES = 8192  # of a line of the log: journald breaks those over 48 KiB (its LineMax=)
RECENT = 20  # runs of a function whose peaks make its recommendation
MOST_NAMES = 8 * MIB  # of all output files of a run together: 100,000 of 80 bytes each
LONGEST_OUTPUT = 768  # of the 1,024 bytes of S3's keys; requestId and s3Prefix may have 128 each


@dataclass(frozen=True)
class Report:
    """Whose message it was, and what its turn came to."""

    request_id: str | None = None
    function_id: str | None = None
    runtime: str | None = None
    memory_mb: int | None = None
    timeout_ms: int | None = None
    receive_count: int = 1
    outcome: Outcome = Outcome("error")

    def ended(self, error: Exception) -> Report:
        """This report when an error ends the turn; what was said of the run before stays known."""
        if isinstance(error, Ended):
            kept = {name: value for name, value in vars(error.outcome).items() if value}
            return replace(self, **error.known, outcome=replace(self.outcome, **kept))
        reason, text = "agent", f"{type(error).__name__}: {error}"
        if isinstance(error, Outage):
            reason, text = error.reason, str(error)
        return replace(self, outcome=replace(
            self.outcome, status="error", reason=reason, text=text))

    def brief(self) -> Report:
        """This report without its texts, to be kept for a while."""
        return replace(self, outcome=replace(
            self.outcome, stdout="", stderr="", text="", returned=""))

    def pairs(self) -> dict[str, Any]:
        """The pairs of the REPORT line."""
        outcome = self.outcome
        pairs = {
            "requestId": self.request_id, "functionId": self.function_id, "runtime": self.runtime,
            "status": outcome.status, "exitCode": outcome.exit_code,
            "durationMillis": outcome.duration_millis,
            "peakMemoryBytes": outcome.peak_memory_bytes, "memoryMb": self.memory_mb,
            "timeoutMs": self.timeout_ms, "receiveCount": self.receive_count,
            "start": outcome.start}
        if outcome.reason:
            pairs["reason"] = outcome.reason
        return pairs

    def result(self, names: list[str], peaks: Collection[int]) -> dict[str, Any]:
        """The content of result.json, with the output files' names and the function's peaks."""
        outcome = self.outcome
        begin, end = outcome.started_at, outcome.ended_at
        wanted = words = None
        if peaks and self.memory_mb is not None:
            largest = max(peaks) / MIB
            wanted = max(16, math.ceil(largest * 1.25 / 16) * 16)
            advice = (f"raise memoryMb to {wanted}" if wanted > self.memory_mb else
                      f"{wanted} would do" if wanted <= self.memory_mb * 3 // 4 else
                      "memoryMb fits")
            words = (f"The largest of the last {len(peaks)} peaks was {largest:.1f} MiB of "
                     f"{self.memory_mb}: {advice}.")
        returned = {"returnValue": json.loads(outcome.returned)} if outcome.returned else {}
        return {**self.pairs(), **returned,
                "success": outcome.is_good, "stdout": outcome.stdout,
                "stderr": outcome.stderr or outcome.text, "stdoutBytes": outcome.stdout_bytes,
                "stderrBytes": outcome.stderr_bytes, "startedAt": begin and iso(begin),
                "finishedAt": end and iso(end), "outputFiles": names,
                "recommendedMemoryMb": wanted, "optimizationTip": words}

    def write(self, log: Log, label: str) -> None:
        """Log the function's kept output, each line after `label`, and the REPORT line."""
        outcome, lines, pairs = self.outcome, [], self.pairs()
        level = FATES[outcome.status].level
        lines += said_by_function(log, label, "stdout", outcome.stdout)
        lines += said_by_function(log, label, "stderr", outcome.stderr)
        if outcome.text:
            lines.append(log.line(level, f"[{label}] {outcome.status}: {outcome.text}", {}))
        if self.request_id is None:  # it could not be read: what else would name it?
            pairs["messageId"] = re.sub(r"\s", "_", label)
        log.write([*lines, log.line(level, "REPORT", pairs)])


def said_by_function(log: Log, label: str, stream: str, text: str) -> list[str]:
    """A function's output as lines of the log, of which it may not take much: the ends of many."""
    lines, said = text.removesuffix("\n").split("\n") if text else [], []
    for number, line in enumerate(lines):
        if number < MOST_LINES or number >= len(lines) - MOST_LINES:
            said += in_pieces(log, label, stream, line)
        elif number == MOST_LINES:
            left_out = len(lines) - 2 * MOST_LINES
            note = f"[{label}] {left_out} of the kept lines of {stream} are left out here"
            said.append(log.line("INFO", note, {}))
    return said


def in_pieces(log: Log, label: str, stream: str, line: str) -> list[str]:
    """A line of output as one of the log, or as several of at most PIECE_BYTES."""
    if log.json:
        said = log.line("INFO", line, {"requestId": label, "stream": stream})
    else:
        said = log.line("INFO", f"[{label}] {stream}: {line}", {})
    if len(said.encode("utf-8", "backslashreplace")) <= PIECE_BYTES:
        return [said]
    middle = len(line) // 2
    return [piece for half in (line[:middle], line[middle:])
            for piece in in_pieces(log, label, stream, half)]


def summary(reports: Iterable[Report]) -> str:
    """The table that ends --drain: a line for each function."""
    runs: defaultdict[str, list[Report]] = defaultdict(list)
    for report in reports:
        if report.outcome.start or report.outcome.status != "released":
            runs[report.function_id or "-"].append(report)
    if not runs:
        return "no task was run: nothing waited in the queue"
    width = max([8, *map(len, runs)])
    lines = [f"{'function':{width}}    runs     ok not ok   max ms  largest peak"]
    for name, mine in sorted(runs.items()):
        good = sum(each.outcome.is_good for each in mine)
        spent = [each.outcome.duration_millis or 0 for each in mine if each.outcome.start] or [0]
        peak, cap = max(((each.outcome.peak_memory_bytes / MIB, each.memory_mb) for each in mine
                         if each.outcome.peak_memory_bytes), default=(0, 0))
        lines.append(f"{name:{width}}  {len(mine):6} {good:6} {len(mine) - good:6} "
                     f"{max(spent):8}  {peak:.1f} of {cap} MiB")
    return "\n".join(lines)


def output_files(directory: str, uid: int | None) -> tuple[list[str], int, int]:
    """(names, bytes, left out) of the regular files a run left in $OUTPUT_DIR; raises OSError.

    The names are relative, the bytes their full size, holes too. Left out is what cannot be listed
    or stored. A file that is not the run's own counts only if anybody may read it: it could be a
    hard link to something that the function may not. Names over MOST_NAMES end the list.
    """
    found, size, left_out, named = [], 0, 0, 0
    pending = [""] if os.path.isdir(directory) and not os.path.islink(directory) else []
    for relative in pending:
        try:
            entries = os.scandir(os.path.join(directory, relative))
        except PermissionError:  # of mode 000, and not read by root
            left_out += 1
            continue
        for entry in entries:
            name = os.path.join(relative, entry.name)
            status = entry.stat(follow_symlinks=False)
            text = name.encode("utf-8", "ignore")
            is_named = text == os.fsencode(name) != b"result.json"
            if not is_named or len(text) > LONGEST_OUTPUT:
                left_out += 1
            elif is_folder(entry):
                pending.append(name)
            elif stat.S_ISREG(status.st_mode) and (
                    uid is None or status.st_uid == uid or status.st_mode & 0o004):
                found.append(name)
                size += status.st_size
            if (named := named + len(text)) > MOST_NAMES:
                return found, sys.maxsize, left_out
    return sorted(found), size, left_out


def open_output(directory: str, name: str) -> BinaryIO:
    """A regular file below a directory, open for reading; follows no link. Raises OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_NOFOLLOW)
    for part in name.split("/"):
        above, flags = fd, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            fd = os.open(part, flags, dir_fd=above)
        finally:
            os.close(above)
    file = open(fd, "rb")
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        file.close()
        raise FileNotFoundError(errno.ENOENT, "no regular file", name)
    return file


def copy_outputs(directory: str, names: list[str], target: Path) -> None:
    """Copy a run's output files into another directory; raises OSError."""
    for name in names:
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        with open_output(directory, name) as source, open(copy, "wb") as file:
            shutil.copyfileobj(source, file)


class Results(Protocol):
    """Where results go, and the files that runs leave."""

    def parts(self) -> list[Dependency]:
        """What it needs: no function is run in vain while that is away."""

    def put(self, result: dict[str, Any], directory: str, names: list[str]) -> None:
        """Store a result, and the files `names` of `directory`; raises Ended, Outage, OSError.

        After an Outage it is called again for all of that: what cannot be taken back comes last.
        """


class FolderResults:
    """DIR/results/<requestId>/."""

    def __init__(self, root: Path, log: Log):
        self.root, self.disk = root / "results", Dependency(log, f"storing results in {root}")

    def parts(self) -> list[Dependency]:
        """The disk."""
        return [self.disk]

    def put(self, result: dict[str, Any], directory: str, names: list[str]) -> None:
        """Keep a result, and copies of the files `names` of `directory`; raises Outage.

        They are there as a whole or not at all, in the place of those of an earlier receive.
        """
        target = self.root / result["requestId"]
        with self.disk.needed():
            self.root.mkdir(exist_ok=True)
            part = Path(tempfile.mkdtemp(prefix=".", dir=self.root))
            try:
                part.chmod(0o755)
                write_json(part, "result.json", result)
                copy_outputs(directory, names, part)
                if os.path.lexists(target):
                    remove(str(target))
                os.rename(part, target)
            finally:
                shutil.rmtree(part, ignore_errors=True)


MAX_MESSAGE = 1024 * 1024  # bytes of a message that SQS takes
# What AWS says of a result that is too large, say: others can be stored.
OF_THE_RESULT = {"InvalidParameterValue", "InvalidMessageContents", "EntityTooLarge",
                 "KeyTooLongError"}


class AwsResults:
    """s3://output.bucket/s3Prefix/requestId/ and output.queueUrl, each when it is set."""

    def __init__(self, clients: Clients, settings: Settings, log: Log):
        self.clients, self.settings = clients, settings
        self.bucket = Dependency(log, f"storing results in s3://{settings.output_bucket}")
        self.queue = Dependency(log, f"sending results to {settings.output_queue_url}")

    def parts(self) -> list[Dependency]:
        """The bucket and the queue."""
        return [self.bucket, self.queue]

    def put(self, result: dict[str, Any], directory: str, names: list[str]) -> None:
        """Upload the files, then result.json; raises Ended, Outage and OSError."""
        text = json.dumps(result)
        if bucket := self.settings.output_bucket:
            parts = self.settings.output_prefix, result["requestId"]
            prefix = "".join(f"{part}/" for part in parts if part)
            put = functools.partial(
                self._send, self.bucket, f"s3:PutObject on arn:aws:s3:::{bucket}/*",
                self.clients.s3.put_object, Bucket=bucket)
            for name in names:
                with open_output(directory, name) as body:
                    put(Key=prefix + name, Body=body)
            put(Key=f"{prefix}result.json", Body=text.encode(), ContentType="application/json")
        if url := self.settings.output_queue_url:
            if len(text) > MAX_MESSAGE:  # what a handler returns fits alone
                self.queue.log("WARNING", f"[{result['requestId']}] over {MAX_MESSAGE} bytes: its "
                               "outputs and its files' names are not sent to output.queueUrl")
                text = json.dumps({**result, "stdout": "", "stderr": "", "outputFiles": []})
            self._send(self.queue, "sqs:SendMessage on agent.output.queueUrl",
                       self.clients.results.send_message, QueueUrl=url, MessageBody=text)

    @staticmethod
    def _send(part: Dependency, needs: str, call: Callable[..., Any], **arguments: Any) -> None:
        part.check()
        _, error = attempt(call, **arguments)
        if error and passes(error):
            raise part.outage(error, "output")
        if error:
            said = remedy(error, needs, arguments.get("QueueUrl"))
            if error_code(error) in OF_THE_RESULT:
                part.worked()
            else:
                part.failed(said, "output", longest=REFUSAL_PAUSE)
            raise Ended(Outcome("error", "output", f"the result cannot be stored: {said}"))
        part.worked()


class Metrics(Protocol):
    """Where the peaks of runs go."""

    def put(self, report: Report) -> None:
        """Publish, now or later, the peak of a run, and when that ended."""

    def close(self, is_urgent: Callable[[], bool]) -> None:
        """Publish what is kept; for at most 25 seconds, or one from when that is urgent."""


def dimensions(report: Report) -> tuple[tuple[str, str], ...]:
    """Name and value of each dimension that a run's values have."""
    return ("FunctionId", str(report.function_id)), ("Runtime", str(report.runtime))


class FolderMetrics:
    """DIR/metrics.jsonl: a line for each peak."""

    def __init__(self, root: Path, settings: Settings, log: Log):
        self.path, self.settings, self.log = root / "metrics.jsonl", settings, log
        self.fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self.count = 0
        self.lock = threading.Lock()
        self.disk = Dependency(log, f"writing {self.path}")

    def put(self, report: Report) -> None:
        """Append the run's peak; a disk that is full loses it, and ends no job."""
        ended = iso(report.outcome.ended_at or time.time())
        line = json.dumps({"timestamp": ended, "namespace": self.settings.namespace,
                           "metricName": "PeakMemoryBytes",
                           "value": report.outcome.peak_memory_bytes, "unit": "Bytes",
                           "dimensions": dict(dimensions(report))})
        with self.lock, self.disk.optional():
            os.write(self.fd, line.encode() + b"\n")
            self.count += 1

    def close(self, is_urgent: Callable[[], bool]) -> None:
        """Say how many there were."""
        if self.count:
            self.log("INFO", f"Successfully published {self.count} values to {self.path.name}")


class CloudWatchMetrics:
    """PeakMemoryBytes of each run, in batches. What is not sent yet is lost with the process."""

    MOST_KEPT = 100_000  # while CloudWatch is away
    # PutMetricData's limit for one request. It has another of 1 MB, of which a value with the
    # longest names takes 700 bytes.
    MOST_SENT = 1000

    def __init__(self, cloudwatch: Any, settings: Settings, log: Log):
        self.cloudwatch, self.settings, self.log = cloudwatch, settings, log
        self.reports: deque[Report] = deque()  # whose peaks are to be sent, the oldest first
        self.dropped = 0
        self.service = Dependency(log, "publishing metrics to CloudWatch")
        self.stopping = threading.Event()
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self._publish, name="metrics", daemon=True)
        self.thread.start()

    def put(self, report: Report) -> None:
        """Keep the run's peak for the next flush; the oldest may go."""
        with self.lock:
            self.reports.append(report.brief())
            self._bound()

    def _bound(self) -> None:
        while len(self.reports) > self.MOST_KEPT:
            self.reports.popleft()
            self.dropped += 1

    def close(self, is_urgent: Callable[[], bool]) -> None:
        """Flush a last time."""
        self.stopping.set()
        await_end(self.thread, 25, is_urgent)

    def _publish(self) -> None:
        """Send what is kept every flushSeconds, after a failure's own pause, and at the close."""
        pause, is_last = float(self.settings.flush_seconds), False
        while not is_last:
            is_last, pause, sent = self.stopping.wait(pause), float(self.settings.flush_seconds), 0
            while reports := self._take():
                _, error = attempt(
                    self.cloudwatch.put_metric_data, Namespace=self.settings.namespace,
                    MetricData=list(map(self._in_aws_terms, reports)))
                if error:
                    with self.lock:
                        self.reports.extendleft(reversed(reports))
                        self._bound()
                    pause = self.service.failed(remedy(error, "cloudwatch:PutMetricData") or error)
                    break
                self.service.worked()
                sent += len(reports)
            if sent:
                lost = f" ({self.dropped} older ones were dropped)" if self.dropped else ""
                self.dropped = 0
                self.log("INFO", f"Successfully published {sent} values to CloudWatch{lost}")

    def _take(self) -> list[Report]:
        """The oldest, as many as one request may have."""
        with self.lock:
            return [self.reports.popleft()
                    for _ in range(min(self.MOST_SENT, len(self.reports)))]

    @staticmethod
    def _in_aws_terms(report: Report) -> dict[str, Any]:
        return {"MetricName": "PeakMemoryBytes", "Unit": "Bytes",
                "Value": float(report.outcome.peak_memory_bytes or 0),
                "Timestamp": int(report.outcome.ended_at or time.time()),
                "Dimensions": [{"Name": name, "Value": value}
                               for name, value in dimensions(report)]}


# --------------------------------------------------------------------------------------------
# Agent: slots, and the loop that keeps them busy
# --------------------------------------------------------------------------------------------

# All that a function gets of the agent's own environment
BASE_ENV = {name: os.environ[name] for name in ("PATH", "LANG", "TZ") if name in os.environ}
# Variables that take effect at a process's start, so that a ready interpreter is too late for them
READ_AT_START = re.compile("PYTHON|LC_|LD_|MALLOC_|GLIBC_")
EXPORTS_HANDLER = re.compile(rb"(?:\b|_)exports?\b[^;]{0,200}?\bhandler\b")  # also as bundled
SEARCHED_BYTES = 64 * 1024  # of an index.js, from its start and from its end
MOST_SOURCES = 512 * 1024  # bytes of the names of what is compiled together: execve(2) takes 2 MiB
COMPILE_MS, COMPILE_MB = 120_000, 2048
# What a compiler says that lacks something of the machine: the words of C, and of Go
LACKS = re.compile(
    "(?i)no space left on device|resource temporarily unavailable|cannot allocate memory")
AHEAD_SECONDS = 1.0  # messages are received that much ahead of the slots
START_SECONDS = 3.0  # what was received ahead and has not started by then is given back
ERRAND_THREADS = 8
MOST_PARKED, MOST_PARKED_BYTES = 1000, 64 * MIB  # turns that wait for what is away, and bodies
UNSTORED, UNSTORED_BYTES = 1000, 1024 * MIB  # results that wait for the return of their messages
LAST_SECONDS = 5  # after the grace, for killed runs to be reported


class Slot:
    """Where one function runs at a time, and the connection to its supervisor."""

    SPARE_SECONDS = 30  # more than a run's limit: then its supervisor hangs
    PREPARE_SECONDS = 120  # for a run to begin: a large package may be linked on a slow disk

    def __init__(self, spec: SlotSpec, supervisor: Callable[[SlotSpec], socket.socket],
                 machine: Dependency, said: set[tuple[str, str]]):
        self.spec, self.supervisor, self.machine = spec, supervisor, machine
        self.said = said  # by any slot, of interpreters
        self.own = f"{spec.directory}/own"
        self.output = f"{self.own}/output"
        self.lock = threading.RLock()
        self.connection: socket.socket | None = None
        self.pid = 0
        self.gaps: list[str] = []  # what functions can do here that they should not, in words
        self.cancelled = False

    def run(self, run: RunSpec) -> Outcome:
        """One run, to its end; raises Ended, and Outage if it has not begun."""
        begun = False
        with self.machine.needed():
            try:
                with self.lock:
                    if self.cancelled:
                        return Outcome("released")
                    connection = self.connect()
                connection.settimeout(self.PREPARE_SECONDS)
                connection.sendall(json.dumps(vars(run)).encode() + b"\n")
                self._answer()
                begun = True
                self.machine.worked()
                connection.settimeout(run.timeout_ms / 1000 + self.SPARE_SECONDS)
                answer = self._answer()
            except (OSError, RunLost) as error:
                self.drop(kill=True)
                if self.cancelled:
                    return Outcome("released")
                if isinstance(error, OSError) and not begun:
                    if isinstance(error, socket.timeout):  # TimeoutError since Python 3.10
                        raise OSError(errno.EAGAIN, "its preparation takes too long") from None
                    if error.errno in MACHINE_AWAY:
                        raise
                    text = f"no function can be run: {error}"
                else:  # what it did to its supervisor, it may do again
                    text = f"what ran the function was lost ({error}); it may have killed it"
                raise Ended(Outcome("error", "launcher", text)) from None
            if answer["is_spent"]:
                self.drop()
            for interpreter, why in answer["unready"].items() - self.said:
                self.said.add((interpreter, why))
                self.machine.log("WARNING", f"{interpreter} is started anew for each run: {why}")
            return Outcome(**answer["outcome"])

    def connect(self) -> socket.socket:
        """To a supervisor; one that ended while it was idle is replaced. Raises OSError."""
        if self.connection:
            idle = select.poll()  # select(2) knows no descriptor over 1,023
            idle.register(self.connection, select.POLLIN)
            if idle.poll(0):
                self.drop()
        if self.connection is None:
            self.connection = self.supervisor(self.spec)
            self.connection.settimeout(self.SPARE_SECONDS)
            self.answers = self.connection.makefile("rb")
            answer = self._answer()
            self.pid, self.gaps = answer["pid"], answer["gaps"]
        return self.connection

    def _answer(self) -> dict[str, Any]:
        """What the supervisor says next; raises NotBegun, RunLost and OSError."""
        line = self.answers.readline()
        if not line.endswith(b"\n"):
            raise RunLost("its supervisor ended")
        answer: dict[str, Any] = json.loads(line)
        if answer["kind"] == LOST:
            raise RunLost(answer["text"])
        if answer["kind"] == NOT_BEGUN:
            raise NotBegun(answer["errno"], answer["text"])
        return answer

    def drop(self, kill: bool = False) -> None:
        """Let go of the supervisor, which then ends what it runs; kill it if it may be stopped."""
        with self.lock:
            if self.connection:
                self.answers.close()
                self.connection.close()
                if kill and self.pid:
                    signal_all([self.pid], signal.SIGKILL)
                self.connection, self.pid = None, 0

    def cancel(self) -> None:
        """End the run, as `released`: its message is given back. No other begins."""
        with self.lock, contextlib.suppress(OSError):
            self.cancelled = True
            if self.connection:
                self.connection.shutdown(socket.SHUT_WR)


def find_program(names: tuple[str, ...], path: str, uid: int | None, gid: int | None) -> str:
    """The first of these programs on PATH that this user can run; "" when there is none."""
    for name, directory in itertools.product(names, path.split(os.pathsep)):
        program = shutil.which(name, path=directory)
        if program and (not uid or is_reachable(program, uid, gid)):
            return program
    return ""


def is_reachable(path: str, uid: int, gid: int | None) -> bool:
    """Whether this user may run the file and search every directory above it."""
    real = Path(os.path.realpath(path))
    for one in (real, *real.parents, *Path(os.path.abspath(path)).parents):
        status = os.stat(one)
        shift = 6 if status.st_uid == uid else 3 if status.st_gid == gid else 0
        if not status.st_mode >> shift & 1:
            return False
    return True


class Slots:
    """The machine's side of running: directories, users, programs, and the slots themselves."""

    def __init__(self, settings: Settings, log: Log, folder: Path | None = None):
        self.settings, self.log = settings, log
        self.role: FunctionRole | None = None
        self.machine = Dependency(log, "starting functions")
        self.cgroups, self.cgroup_gap = "", "not started as root"
        if not os.geteuid():
            try:
                self.cgroups = make_cgroups(settings.max_processes)
            except OSError as error:
                self.cgroup_gap = f"{error.strerror}: {error.filename or 'its controllers'}"
        self.guards: list[int] = []  # the launcher has them, too, and outlives what it runs
        self.metadata_gap = self._guard_metadata()
        self.launching = threading.Lock()
        self._launch()
        self.gaps: list[str] = []  # that of all slots
        self.base, self.lock = make_task_dir(settings, log)
        can_lock = os.access(UID_LOCKS, os.W_OK) or os.access("/run", os.W_OK)
        self.lock_directory = UID_LOCKS if can_lock else str(self.base.parent)
        self.files = contextlib.ExitStack()
        self.uid_locks: dict[int, int] = {}  # uid -> descriptor of its locked file
        self.path = os.environ.get("PATH") or "/usr/local/bin:/usr/bin:/bin"
        self.shell = self.base / "sh"
        users = [self._user() for _ in range(settings.concurrency)]
        self.programs = {
            name: find_program((getattr(settings, name),) if getattr(settings, name)
                               else runtime.programs, self.path, *users[0][:2])
            for name, runtime in RUNTIMES.items()}
        log("INFO", "runtimes: " + ", ".join(f"{name} {path or '(not here)'}"
                                             for name, path in self.programs.items()))
        uid, _, _, private = users[0]
        # All slots' tasks count for one user, where each has no uid of its own.
        self.other_tasks = 0 if private else user_tasks(os.getuid() if uid is None else uid)
        self.hidden, self.shown = hidden_and_shown(settings.file, folder, [
            *self.path.split(os.pathsep), *filter(None, self.programs.values())])
        said: set[tuple[str, str]] = set()
        self.all = [Slot(self._spec(number, *user[:3]), self.supervisor, self.machine, said)
                    for number, user in enumerate(users)]

    def _guard_metadata(self) -> str:
        """Have the instance metadata refused to functions; why they reach it, or ""."""
        settings = self.settings
        if settings.metadata == "allow" or settings.network == "none":
            return ""
        if settings.run_as is not None or not can_become(FIRST_UID):
            return "their uid is not theirs alone"
        try:
            self.guards = refuse_metadata(FIRST_UID, LAST_UID)
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def _launch(self) -> None:
        """Start the launcher, which starts the supervisors, and again if it goes."""
        kernel("prctl", PR_SET_DUMPABLE, 0)  # /proc/PID/environ may hold a credential
        kernel("prctl", PR_SET_CHILD_SUBREAPER, 1)
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.launcher = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", LAUNCH, FILE, "--launcher",
                 str(theirs.fileno()), self.cgroups],
                env=BASE_ENV, pass_fds=[theirs.fileno(), *self.guards], stdin=subprocess.DEVNULL)

    def _write_programs(self) -> None:
        """Write what starts functions, again where one of the agent's own user took it away."""
        ready = self.base / "main.py"
        if not ready.exists():
            ready.write_text(READY_PYTHON)
        if not self.shell.exists():
            shutil.copyfile(shutil.which("dash") or "/bin/sh", self.shell)
            # Its user may not read it, so that the kernel lets none of that user's processes trace
            # it (fs/exec.c, would_dump): it forks the next run, too.
            self.shell.chmod(0o111)

    def supervisor(self, spec: SlotSpec) -> socket.socket:
        """A connection to a new supervisor of this slot; raises OSError."""
        ours, theirs = socket.socketpair()
        with theirs, self.launching:
            if (code := self.launcher.poll()) is not None:
                self.log("ERROR", f"the launcher ended ({code}) with its runs; another is started")
                self._end_launcher()
                self._launch()
            self._write_programs()
            locks = [lock for uid, lock in self.uid_locks.items() if uid == spec.uid]
            socket.send_fds(self.control, [json.dumps(vars(spec)).encode()],
                            [theirs.fileno(), *locks])
        return ours

    def _end_launcher(self) -> None:
        self.control.close()
        self.launcher.wait()
        end_descendants()

    def _spec(self, number: int, uid: int | None, gid: int | None,
              groups: tuple[int, ...]) -> SlotSpec:
        """What is fixed for a slot, with its directory made."""
        directory = self.base / f"slot{number}"
        directory.mkdir(mode=0o711)
        os.mknod(directory / "nothing", 0)  # what is mounted over a file that is hidden
        if uid is not None and gid is not None:
            os.chown(directory, 0, gid)
            directory.chmod(0o710)
        limits = {"RLIMIT_CORE": 0, "RLIMIT_NOFILE": self.settings.max_open_files,
                  "RLIMIT_FSIZE": self.settings.max_file_mb * MIB,
                  "RLIMIT_NPROC": self.settings.max_processes + self.other_tasks}
        cgroup = f"{self.cgroups}/slot{number}" if self.cgroups else ""
        # A link needs code and workspace under one mount: that of all slots. Who has no uid of its
        # own has copies, and could change the code: it sees no other slot, and that read-only.
        hidden, shown = self.hidden, [self.base]
        if uid is None:
            hidden = sorted({*hidden, str(self.base)})
            shown = [self.base / "code", self.shell, self.base / "main.py", directory,
                     directory / "own"]
        return SlotSpec(str(directory), uid, gid, groups, cgroup, str(self.shell), limits,
                        self.settings.network, tuple(hidden), (*self.shown, *map(str, shown)))

    def _user(self) -> tuple[int | None, int | None, tuple[int, ...], bool]:
        """(uid, gid, groups, whether nobody else has it) of a slot; no uid: the agent's own."""
        name = self.settings.run_as
        if name is None:
            uid = self._free_uid() if can_become(FIRST_UID) else None
            return uid, uid, (), uid is not None
        try:
            entry = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
            uid, gid = entry.pw_uid, entry.pw_gid
            groups = tuple(os.getgrouplist(entry.pw_name, gid))
        except KeyError:
            if not name.isdecimal():
                raise GiveUp(f"agent.execution.runAs is {name}; here is no such user") from None
            uid, gid, groups = int(name), int(name), ()
        if uid == 0:
            raise GiveUp(f"agent.execution.runAs is {name}: functions would own this machine; name "
                         "another user, or leave runAs out for a uid of each slot's own")
        if can_become(uid):
            return uid, gid, groups, False
        if uid != os.geteuid():
            raise GiveUp(f"agent.execution.runAs is {name}; start the agent as root, which alone "
                         "can run functions as another user, or leave runAs out")
        return None, None, (), False

    def _free_uid(self) -> int:
        """A uid that nobody has, and that no other agent of this machine takes.

        A file that only root may open is locked for it. The launcher has it, too: it may still be
        ending what runs under that uid when this agent has been killed.
        """
        for uid in range(FIRST_UID + len(self.uid_locks), LAST_UID + 1):
            path = f"{self.lock_directory}/uid-{uid}"
            with contextlib.suppress(KeyError):
                pwd.getpwuid(uid)
                continue
            with contextlib.suppress(OSError):  # another agent's
                os.makedirs(self.lock_directory, exist_ok=True)
                os.close(os.open(path, os.O_CREAT | os.O_NOFOLLOW, 0o600))
                self.uid_locks[uid] = self.files.enter_context(locked(path)).fileno()
                return uid
        raise GiveUp(f"no uid of {FIRST_UID} to {LAST_UID} is free; lower execution.concurrency")

    def try_out(self) -> None:
        """Make a slot's room once, and say what it leaves open to functions; raises GiveUp."""
        slot, settings = self.all[0], self.settings
        try:
            slot.connect()
        except OSError as error:
            raise GiveUp(f"no function can be run here: {error} (where agent.execution.network "
                         "none is refused, start the agent as root)") from None
        slot.drop()  # an idle agent has no supervisor
        self.gaps = list(slot.gaps)
        # On a laptop, to somebody who tries functions of their own, this would say nothing.
        is_ec2 = b"Amazon" in read_proc("/sys/class/dmi/id/sys_vendor")
        has_role = slot.spec.uid is not None or settings.region or is_ec2
        if self.metadata_gap and has_role:
            self.gaps.append(
                f"functions reach the instance metadata, and with it this machine's role "
                f"({self.metadata_gap}): refuse them {METADATA[socket.AF_INET]} by a "
                "firewall, or set agent.execution.network to none")
        is_whole = self.cgroups and slot.spec.uid is not None and not self.gaps
        self.log("INFO" if is_whole else "WARNING", f"isolation: {self.isolation()}")

    def isolation(self) -> str:
        """Which of three levels this is, and by its effect what is missing."""
        if self.all[0].spec.uid is None:
            why = "not started as root" if os.geteuid() else "this user namespace has no other uid"
            level = (f"an ordinary user's ({why}), for development and for code that you trust: "
                     "functions run as the agent's own user, and read and change what it may")
        elif self.cgroups:
            level = "root's with cgroup v2, for anybody's functions"
        else:
            level = (f"root's without cgroup v2 ({self.cgroup_gap}): a function that hides memory "
                     "from the watcher can pass its cap, and take CPU from the others")
        return "; ".join((level, *self.gaps))

    def program(self, word: str, runtime: str) -> str:
        """What a word of a command stands for; raises Ended when this machine lacks it."""
        program = self.programs[runtime] if word == "{program}" else word
        if not program or program[0] == "/" and not os.path.exists(program):
            names = getattr(self.settings, runtime) or " or ".join(RUNTIMES[runtime].programs)
            raise Ended(Outcome("error", "runtime", f"this machine has no {names} that a function "
                                f"can run; install it, or name it in agent.runtimes.{runtime}"))
        return program

    def run_spec(self, task: Task, package: Package, slot: Slot, tee: bool = False) -> RunSpec:
        """What runs a package, or compiles it if it is a source; raises Ended and Outage."""
        entry = find_entry(package.path, task.runtime, task.handler)
        # The ready interpreter is root's: its HOME is where nobody can make anything.
        helper_env = {**BASE_ENV, "PATH": self.path, "HOME": os.devnull}
        env = {**task.env, "HOME": f"{slot.own}/home", "TMPDIR": f"{slot.own}/tmp",
               "OUTPUT_DIR": slot.output, "USER": USER, "LOGNAME": USER,
               "REQUEST_ID": task.request_id, "FUNCTION_ID": task.function_id,
               "MEMORY_MB": str(task.memory_mb), "TIMEOUT_MS": str(task.timeout_ms)}
        if task.handler:
            env.update({
                "_HANDLER": task.handler, "LAMBDA_TASK_ROOT": f"{slot.own}/work",
                "AWS_LAMBDA_FUNCTION_NAME": task.function_id,
                "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": str(task.memory_mb)})
        if self.role and entry not in RUNTIMES[task.runtime].compiled:
            env.update(self.role.env(task.timeout_ms / 1000))
        command = self._command(task, package, entry, slot)
        is_warm = (task.runtime == "python" and self.settings.warm_start
                   and not any(map(READ_AT_START.match, task.env)))
        return RunSpec(
            command=tuple(command), interpreter=command[0] if is_warm else "",
            helper_env=helper_env, env=env, package=str(package.path),
            input=task.input.decode("utf-8", "surrogateescape"), timeout_ms=task.timeout_ms,
            memory_mb=task.memory_mb, disk_mb=self.settings.max_disk_mb,
            files=self.settings.max_files, has_handler=bool(task.handler), tee=tee)

    def _command(self, task: Task, package: Package, entry: str, slot: Slot) -> list[str]:
        """All commands are made here."""
        runtime = RUNTIMES[task.runtime]
        if task.handler:
            program = self.program("{program}", task.runtime)
            function = task.handler.rpartition(".")[2]
            returned = f"{slot.spec.directory}/feed/{RETURNED}"
            return [program, *HANDLERS[task.runtime], entry, function, returned]
        if entry == "index.js":
            self._look_for_handler(task, package)
        command: list[str] = []
        for word in {**runtime.commands, **runtime.compiled}[entry]:
            if word == "{output}":
                command.append(f"{slot.output}/main")
            elif word == "{sources}":
                kind = os.path.splitext(entry)[1]
                command += sorted(f"./{path.name}" for path in package.path.glob(f"*{kind}"))
                if sum(map(len, command)) > MOST_SOURCES:
                    raise rejected("compile", f"too many {kind} files stand beside {entry}")
            else:
                command.append(self.program(word, task.runtime))
        return command

    def _look_for_handler(self, task: Task, package: Package) -> None:
        """Say once that index.js is of an AWS Lambda function, if it is: it does nothing."""
        if package.is_read:
            return
        package.is_read = True
        with open(package.path / "index.js", "rb") as file:
            text = file.read(SEARCHED_BYTES)
            file.seek(max(file.tell(), os.fstat(file.fileno()).st_size - SEARCHED_BYTES))
            text += file.read(SEARCHED_BYTES)
        if EXPORTS_HANDLER.search(text):
            self.log("WARNING", f"[{task.request_id}] index.js of {task.key} exports a handler, "
                                'which nothing calls: send "handler": "index.handler" in the task')

    def compile(self, task: Task, package: Package, slot: Slot) -> Package:
        """The package with its program compiled, once; raises Ended with the compiler's words."""
        entry = find_entry(package.path, task.runtime, task.handler)
        if entry not in RUNTIMES[task.runtime].compiled:
            return package
        built = Package(package.built_path, package.etag)
        with package.lock:
            if package.refused:
                raise Ended(package.refused)
            if built.path.exists():
                return built
            limited = replace(task, input=b"", env={}, timeout_ms=COMPILE_MS, memory_mb=COMPILE_MB)
            outcome = slot.run(self.run_spec(limited, package, slot))
            if outcome.status == "released":
                raise Ended(outcome)
            made = f"{slot.output}/main"
            is_made = os.path.isfile(made) and not os.path.islink(made)
            lacks = LACKS.search(outcome.stderr) if outcome.status == "failed" else None
            if lacks:  # what other runs took
                package.compiler = package.compiler or Dependency(
                    self.log, f"compiling {task.key}", shared=False)
                raise package.compiler.outage(lacks[0], "compile")
            if package.compiler:
                package.compiler.worked()
            if outcome.status != "ok" or not is_made:
                ended = f"{outcome.status}, exit status {outcome.exit_code}"
                package.refused = Outcome(
                    "rejected", "compile", f"{entry} does not compile ({ended})",
                    stdout=outcome.stdout, stderr=outcome.stderr,
                    stdout_bytes=outcome.stdout_bytes, stderr_bytes=outcome.stderr_bytes)
                raise Ended(package.refused)
            part = package.path.with_suffix(".part")
            with self.machine.needed(), open(made, "rb") as program:
                shutil.rmtree(part, ignore_errors=True)
                shutil.copytree(package.path, part, symlinks=True, copy_function=os.link)
                (part / "main").unlink(missing_ok=True)  # the zip's own, which is a link to it
                with open(part / "main", "xb") as copy:
                    shutil.copyfileobj(program, copy)
                    package.size += copy.tell()
                os.chmod(part / "main", 0o755)
                os.rename(part, built.path)
            return built

    def outputs(self, directory: str, uid: int | None, outcome: Outcome,
                label: str) -> tuple[list[str], Outcome]:
        """The names of a run's output files, and its outcome, or what too many make of it."""
        settings = self.settings
        names, size, left_out = output_files(directory, uid)
        if left_out:
            self.log("WARNING", f"[{label}] {left_out} entries of $OUTPUT_DIR left out: paths are "
                                f"UTF-8, {LONGEST_OUTPUT} bytes at most, no result.json, no closed "
                                "directory")
        if size > settings.max_disk_mb * MIB or len(names) > settings.max_files:
            text = ("$OUTPUT_DIR has more than agent.execution.maxDiskMb, holes too, or maxFiles, "
                    f"or {MOST_NAMES} bytes of names: none of it is stored")
            names = []
            if outcome.is_good or outcome.status == "failed":
                outcome = replace(outcome, status="failed", reason="disk", text=text)
        return names, outcome

    def close(self) -> None:
        """End all that runs, and remove all that was made for it."""
        self._end_launcher()
        if self.cgroups:
            remove_cgroups(self.cgroups)
        for uid in self.uid_locks:
            os.unlink(f"{self.lock_directory}/uid-{uid}")
        self.files.close()
        with contextlib.suppress(OSError):  # another agent's may be there
            os.rmdir(self.lock_directory)
        with contextlib.suppress(OSError):
            sweep(str(self.base), ["lock"])
            remove(str(self.base))
            self.base.parent.rmdir()


def can_become(uid: int) -> bool:
    """Whether this process is root, and its user namespace has this uid (user_namespaces(7))."""
    rows = [list(map(int, row.split())) for row in read_proc("/proc/self/uid_map").splitlines()]
    return os.geteuid() == 0 and any(first <= uid < first + count for first, _, count in rows)


def user_tasks(uid: int) -> int:
    """How many tasks (threads count) a user has now, which RLIMIT_NPROC counts too."""
    own = re.compile(rb"(?ms)^Uid:\t%d\t.*^Threads:\t(\d+)" % uid)
    found = (own.search(read_proc(path)) for path in glob.iglob("/proc/[0-9]*/status"))
    return sum(int(each[1]) for each in found if each)


def make_task_dir(settings: Settings, log: Log) -> tuple[Path, int]:
    """A directory of this agent's own, and its lock; removes what killed ones left, whose locks
    are free. Raises GiveUp."""
    root, usual = Path(settings.task_base_dir), Path(Settings().task_base_dir)
    closed = [one for one in root.parents if one.exists() and not one.stat().st_mode & 0o001]
    if closed and not os.geteuid() and settings.run_as is None:
        log("WARNING", f"agent.taskBaseDir is {root}, but {closed[0]} is closed to the functions' "
                       f"users; {usual} is used instead (chmod o+x {closed[0]} opens it)")
        root = usual
    if root == usual and root.exists() and root.stat().st_uid != os.geteuid():
        root = Path(f"{root}-{os.geteuid()}")  # another user's agent was here first
    umask = os.umask(0o022)  # functions' users pass through what is made here
    try:
        # No function may list it: what a killed agent left can be of its uid.
        root.mkdir(mode=0o711, parents=True, exist_ok=True)
        owner = root.lstat()
        if owner.st_uid != os.geteuid() or not stat.S_ISDIR(owner.st_mode):
            raise PermissionError(f"{root} belongs to uid {owner.st_uid}")
        if os.statvfs(root).f_flag & os.ST_NOEXEC:
            raise PermissionError(f"{root} is mounted noexec: no program can run there")
        for old in root.glob("agent-*"):
            with contextlib.suppress(OSError), open(old / "lock", "r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                sweep(str(old), ["lock"])  # the last to go: what is left by a kill is found again
                remove(str(old))
        own = Path(tempfile.mkdtemp(prefix="agent-", dir=root))
        lock = os.open(own / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        own.chmod(0o711)
        (own / "code").mkdir(mode=0o700)
    except OSError as error:
        raise GiveUp(f"agent.taskBaseDir {root} cannot be used ({error}); name a directory of the "
                     "agent's own user") from None
    finally:
        os.umask(umask)
    return own, lock


class Services(NamedTuple):
    """Where an agent's work comes from, and where what becomes of it goes."""

    queue: Queue
    source: CodeSource
    results: Results
    metrics: Metrics


@dataclass(eq=False)
class Turn:
    """A message from its receive to its end."""

    message: Message
    report: Report  # what is known so far
    task: Task | None = None  # None: it was refused before it was understood
    memory_mb: int = 0  # that it takes up in a slot
    package: Package | None = None  # its code, once that is here
    is_done: bool = False  # its outcome is known: it only has to be stored, and ended
    has_begun: bool = False  # it runs, or its result is being stored: a shutdown lets it finish
    is_over: bool = False  # somebody ends it, or has
    is_ahead: bool = False  # it was taken before a slot was free, and may be given back
    since: float = 0.0  # time.monotonic() when it began to wait as it does, or to be worked on
    waits_until: float = 0.0  # while it is parked: no longer than this
    patience_ends: float = 0.0  # 0: it has met no outage in this step
    directory: str = ""  # where its output files are, once it ran; "": it left none
    uid: int | None = None  # whose they are
    names: list[str] | None = None  # of its output files
    result: dict[str, Any] = field(default_factory=dict)  # for result.json
    ran_before: bool = False  # when it was here before, and could not be stored
    size: int = 0  # in bytes, of what it left then


class Agent:
    """The loop. One thread receives, one for each slot runs functions, some do what needs no slot.

    A turn waits for a slot (`waiting`), for an errand (`errands`: its code is fetched, its result
    is stored again, or it only ends), or, parked, for a part that is away. Whatever a turn waits
    for, its lease is kept alive, and others go on. The main thread handles signals, tells systemd
    how it goes, has parked turns go on when it is time, and ends the agent. A turn is ended in
    _end() alone, for whoever asks first.
    """

    def __init__(self, settings: Settings, log: Log, services: Services, slots: Slots):
        self.settings, self.log, self.slots = settings, log, slots
        self.queue, source, self.results, self.metrics = services
        self.code = CodeCache(source, slots.base / "code", log)
        # Conditions on one lock: a finished run wakes who has use for it, and nobody else.
        self.lock = threading.RLock()
        self.to_run = threading.Condition(self.lock)  # for the slots: something waits
        self.to_do = threading.Condition(self.lock)  # for errands
        self.space = threading.Condition(self.lock)  # for the receiver: something may be asked for
        self.turns: set[Turn] = set()  # all in hand
        self.waiting: deque[Turn] = deque()
        self.errands: deque[Turn] = deque()
        self.parked: dict[Dependency, list[Turn]] = {}
        self.running: dict[Slot, Turn] = {}
        self.fetching: dict[tuple[str, str, str], Turn] = {}  # by Task.code
        self.unstored: OrderedDict[tuple[str, str], Turn] = OrderedDict()  # by message
        self.free_mb = settings.memory_mb
        self.mean_seconds: float | None = None  # that a run keeps a slot
        self.troubles: set[object] = set()  # what failed since a function ran last
        self.pause_seconds = self.pause_ends = 0.0  # of the receiver, when everything fails
        self.receiving = Dependency(log, "receiving messages")
        self.gave_up = ""  # why a drain cannot go on
        self.peaks: Callable[[str | None], deque[int]] = functools.lru_cache(10_000)(
            lambda function_id: deque(maxlen=RECENT))
        self.drain = False
        self.drained: list[Report] = []  # for summary()
        self.counts: Counter[bool] = Counter()  # turns that were good, and those that were not
        self.stopping = False
        self.signals: list[int] = []
        self.wake, self.waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    # The main thread: signals, systemd, the end.

    def run(self, drain: bool) -> None:
        """Work until a signal, or with `drain` until the queue is empty. Raises GiveUp."""
        self.drain = drain
        signal.set_wakeup_fd(self.waker, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: self.signals.append(number))
        poller = threading.Thread(target=self._poll, daemon=True)
        threads = [poller, *(threading.Thread(target=self._work, args=(slot,), daemon=True)
                             for slot in self.slots.all),
                   *(threading.Thread(target=self._run_errands, daemon=True)
                     for _ in range(ERRAND_THREADS))]
        if self.settings.spot_interruption:
            threads.append(threading.Thread(target=self._await_spot_notice, daemon=True))
        for thread in threads:
            thread.start()
        notify("READY=1")
        self._attend(poller)
        self.queue.close(self._is_urgent)
        self.metrics.close(self._is_urgent)
        if self.gave_up:
            raise GiveUp(self.gave_up)

    def _is_urgent(self) -> bool:
        """Whether a second signal has come."""
        return len(self.signals) > 1

    def _attend(self, poller: threading.Thread) -> None:
        """Wait for the end; begin the shutdown when a signal comes, and keep systemd informed."""
        watchdog = int(os.environ.get("WATCHDOG_USEC") or "0") / 2e6
        deadline, told = math.inf, 0.0
        # A slot's thread may hang in a download, whose message was released: none is waited for.
        while poller.is_alive() or self.turns:
            period = 0.05 if self.stopping else 0.1 if self.turns else 5.0
            select.select([self.wake], [], [], min(period, watchdog or period))
            read_nonblocking(self.wake)
            self._review()
            now = time.monotonic()
            if self.signals and deadline == math.inf:
                deadline = now + self.settings.shutdown_grace_seconds
                self._begin_stop()
            if self._is_urgent():
                deadline = min(deadline, now)
            if now >= deadline:
                for slot in self.slots.all:
                    slot.cancel()
            if now >= deadline + (1 if self._is_urgent() else LAST_SECONDS):
                self._release(list(self.turns))  # what is being stored is not waited for
            if self._is_urgent() and not self.turns:
                return  # the answer of a poll in flight is not waited for
            if now < told + min(1.0, watchdog or 1.0) and not self.stopping:
                continue
            told = now
            notify(f"WATCHDOG=1\nSTATUS=running {len(self.running)}, done {self.counts[True]}, "
                   f"failed {self.counts[False]}")

    def _review(self) -> None:
        """Have parked turns go on when it is time; give back what cannot start soon."""
        now = time.monotonic()
        with self.lock:
            for part, turns in list(self.parked.items()):
                due = [turn for turn in turns if not part.since or turn.waits_until <= now]
                if not due and part.may_try():  # first who only has a result to store
                    due = sorted(turns, key=lambda turn: not turn.is_done)[:1]
                for turn in due:
                    turns.remove(turn)
                    self._queue_up(turn)
                if not turns:
                    del self.parked[part]
            late = [turn for turn in self.waiting
                    if turn.is_ahead and turn.since + START_SECONDS < now]
            if late and late[0] is self.waiting[0] and late[0].memory_mb > self.free_mb:
                del late[0]  # it waits for memory, and would wait for ever if it went back
            for turn in late:
                self.waiting.remove(turn)
        self._release(late, "ahead")

    def _begin_stop(self) -> None:
        """Stop polling; give back what was not started."""
        grace = self.settings.shutdown_grace_seconds
        self.log("INFO", f"stopping: nothing more is taken; running functions have {grace} s; "
                         "a second signal stops at once")
        notify("STOPPING=1")
        with self.lock:
            self._stop_taking()
            unstarted = [turn for turn in self.turns if not turn.has_begun]
            preparing = [slot for slot, turn in self.running.items() if not turn.has_begun]
            self.waiting.clear()
            self.errands = deque(turn for turn in self.errands if turn.has_begun)
            self.parked.clear()
        self._release(unstarted)
        for slot in preparing:
            slot.cancel()  # it may be compiling

    def _stop_taking(self) -> None:
        """Have every thread end that has nothing more to do."""
        with self.lock:
            self.stopping = True
            self.to_run.notify_all()
            self.space.notify_all()

    def _await_spot_notice(self) -> None:
        """Begin the shutdown when EC2 says, by IMDSv2, that it takes this spot instance away."""
        # Imported here, for it brings ssl: 20 ms of the start, and 2 MiB of each process.
        from http.client import HTTPConnection, HTTPException  # which knows of no proxy
        base = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254")
        host = re.sub("^https?://|/.*", "", base)
        notices = Dependency(self.log, "asking EC2 for a spot interruption notice")
        while not self.stopping:
            with contextlib.suppress(HTTPException), notices.optional(), \
                    contextlib.closing(HTTPConnection(host, timeout=2)) as metadata:
                metadata.request("PUT", "/latest/api/token", headers={
                    "X-aws-ec2-metadata-token-ttl-seconds": "60"})
                answer = metadata.getresponse()
                if answer.status != 200:
                    raise OSError(f"{host} answers {answer.status}")
                metadata.request("GET", "/latest/meta-data/spot/instance-action", headers={
                    "X-aws-ec2-metadata-token": answer.read().decode()})
                if metadata.getresponse().status == 200:  # 404: no notice
                    self.log("WARNING", "EC2 will interrupt this spot instance")
                    return os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    # The receiving thread.

    def _poll(self) -> None:
        """Receive what can start soon, until the shutdown."""
        while limit := self._wanted():
            try:
                messages = self.queue.receive(limit, self.drain)
                self.receiving.worked()
                for message in messages:
                    self._take(message)
                if messages:
                    continue
                with self.lock:
                    is_idle = not self.turns
                    if self.drain and not is_idle:
                        self.space.wait(0.5)
                if self.drain and is_idle and self.queue.is_empty():
                    break
                self._pause(self.queue.rest_seconds)
            except Exception as error:  # noqa: BLE001  # one bad answer must not end the loop
                advice = remedy(error, self.queue.needs, self.queue.url)
                pause = self.receiving.failed(advice or error)
                spent = time.monotonic() - self.receiving.since
                if self.drain and spent > self.settings.patience_seconds:
                    self.gave_up = f"the drain is given up after {spent:.0f} s: {advice or error}"
                    break
                self._pause(pause)
        self._stop_taking()
        os.write(self.waker, b"\n")

    def _pause(self, seconds: float) -> None:
        with self.lock:
            self.space.wait_for(lambda: self.stopping, seconds)

    def _wanted(self) -> int:
        """How many messages to ask for, once there is room for any; 0 at the shutdown."""
        most = self.settings.max_number_of_messages
        slots = len(self.slots.all)
        with self.lock:
            while not self.stopping:
                now = time.monotonic()
                pause, ahead = self.pause_ends - now, self._ahead(now)
                # What is fetched for longer than a moment is no reason for a slot to be idle.
                fetched = [*self.fetching.values(), *self.errands]
                slow = [turn for turn in fetched
                        if not turn.is_done and turn.since + START_SECONDS < now]
                aside = len(slow) + sum(map(len, self.parked.values()))
                room = slots + ahead + aside - len(self.turns)
                if len(slow) >= MOST_PARKED:
                    room = 0
                # Short runs free a slot each moment: a request is worth a whole batch then.
                if pause <= 0 and room > 0 and (room >= most or ahead < most or not self.running):
                    return 1 if self.pause_seconds else min(room, most)
                self.space.wait(max(pause, 0.01) if pause > 0 else 0.5 if fetched else 5)
            return 0

    def _ahead(self, now: float) -> int:
        """How many messages more than there are free slots can start soon."""
        slots, most = len(self.slots.all), self.settings.max_number_of_messages
        if self.waiting and self.waiting[0].memory_mb > self.free_mb:
            return -slots  # what waits for memory goes first
        is_long = any(turn.since + AHEAD_SECONDS < now for turn in self.running.values())
        if is_long or not self.mean_seconds:
            return 0
        return min(int(slots * AHEAD_SECONDS / max(self.mean_seconds, 1e-4)), 2 * most)

    def _take(self, message: Message) -> None:
        """Check a message, and have it wait for what it needs first."""
        turn = Turn(message, Report(receive_count=message.receive_count))
        if old := self.unstored.pop((message.id, message.body), None):
            turn = replace(old, message=message, ran_before=True, is_over=False, report=replace(
                old.report, receive_count=message.receive_count))
        else:
            try:
                task = parse_task(message.body, self.settings, self.code.source.any_bucket)
                turn.task = task
                turn.report, turn.memory_mb = replace(turn.report, **task.known()), task.memory_mb
                ends = time.monotonic() + task.timeout_ms / 1000
                if ends > self.queue.lease_ends(message, ends):
                    raise rejected("visibility", f"timeoutMs {task.timeout_ms} is over the queue's "
                                   "visibility timeout; raise it, or grant "
                                   "sqs:ChangeMessageVisibility")
                turn.package = self.code.find(task, message)
            except Exception as error:  # noqa: BLE001  # its batch's other messages have their turn
                turn.report, turn.is_done = turn.report.ended(error), True
        with self.lock:
            self.turns.add(turn)
            # One that was received before may go to the DLQ at the next receive.
            turn.is_ahead = message.receive_count == 1
            self._queue_up(turn)
            is_late = self.stopping
        if is_late:
            self._release([turn])
        elif len(self.turns) == 1:
            os.write(self.waker, b"\n")  # the main thread may be resting

    def _queue_up(self, turn: Turn) -> None:
        """Have a turn wait for what it needs next: a slot, or an errand."""
        with self.lock:
            if turn.is_over:
                return
            turn.since = time.monotonic()
            needs_slot = turn.package and not turn.is_done
            (self.waiting if needs_slot else self.errands).append(turn)
            (self.to_run if needs_slot else self.to_do).notify()

    # The threads of slots and errands.

    def _do(self, turn: Turn, step: Callable[[Turn], None]) -> None:
        """Take a turn a step further: then it waits again, or is parked."""
        try:
            step(turn)
        except Exception as error:  # noqa: BLE001  # botocore has no one base for its errors
            if self._parks(turn, error):
                return
            turn.report, turn.is_done = turn.report.ended(error), True
        self._queue_up(turn)

    def _run_errands(self) -> None:
        """Fetch code, store results, end what never ran: one turn after another."""
        while True:
            turn = self._next_errand()
            if turn.is_done:
                self._finish(turn)
                continue
            self._do(turn, self._fetch)
            with self.lock:
                if turn.task:
                    del self.fetching[turn.task.code]
                self.to_do.notify()

    def _next_errand(self) -> Turn:
        """The next turn that needs no slot, but not while another fetches the same code."""
        with self.lock:
            while True:
                for turn in self.errands:
                    code = turn.task.code if turn.task and not turn.is_done else None
                    if code not in self.fetching:
                        self.errands.remove(turn)
                        if code:
                            self.fetching[code] = turn
                        return turn
                self.to_do.wait()

    def _fetch(self, turn: Turn) -> None:
        assert turn.task
        turn.package = self.code.get(turn.task, turn.message)
        turn.patience_ends = 0.0

    def _next(self, slot: Slot) -> Turn | None:
        """The next turn, in the order they came, once its memory is free; None at the end."""
        with self.lock:
            while True:
                for turn in self.waiting:
                    assert turn.package
                    if turn.package.lock.locked():
                        continue  # another slot compiles its program
                    if turn.memory_mb > self.free_mb:
                        break
                    self.waiting.remove(turn)
                    self.running[slot] = turn
                    turn.since = time.monotonic()
                    self.free_mb -= turn.memory_mb
                    if self.waiting:
                        self.to_run.notify()  # it may fit into what is free now, too
                    if len(self.waiting) <= self.settings.max_number_of_messages:
                        self.space.notify()
                    return turn
                if self.stopping and not self.waiting:
                    return None
                self.to_run.wait()

    def _work(self, slot: Slot) -> None:
        """Take turns in one slot, one after another."""
        while turn := self._next(slot):
            began = time.monotonic()
            self._do(turn, functools.partial(self._run, slot=slot))
            spent = time.monotonic() - began
            with self.lock:
                del self.running[slot]
                self.free_mb += turn.memory_mb
                mean = self.mean_seconds or spent
                self.mean_seconds = mean * 0.8 + spent * 0.2
                (self.to_run if self.waiting else self.space).notify()
        os.write(self.waker, b"\n")

    def _run(self, turn: Turn, slot: Slot) -> None:
        """Run a turn's function, and its compiler before if need be; raises Ended and Outage."""
        task, package = turn.task, turn.package
        assert task and package
        for part in self.results.parts():
            if part.since and part.retry_at + TRY_SECONDS > time.monotonic():
                raise Outage(part, part.reason, part.error)  # who has run already tries before
        run = self.slots.run_spec(task, self.slots.compile(task, package, slot), slot)
        with self.lock:
            if turn.is_over:
                return
            if self.queue.lease_ends(turn.message) <= time.monotonic():
                raise Ended(Outcome("released", "lease", "its lease ran out before it could start"))
            turn.has_begun = True
            if self.waiting:
                self.to_run.notify()  # for its program, which is compiled now
        self.log("DEBUG", f"[{task.request_id}] a run of {task.function_id} starts")
        outcome = slot.run(run)
        turn.report, turn.is_done = replace(turn.report, outcome=outcome), True
        turn.patience_ends = 0.0
        if outcome.status != "released":
            self._set_aside(turn, slot)
            self.troubles.clear()
            self.pause_seconds = 0.0

    def _set_aside(self, turn: Turn, slot: Slot) -> None:
        """Move a run's output files out of its slot, which goes on: they are stored meanwhile."""
        if os.path.islink(slot.output) or not os.path.isdir(slot.output):
            return  # the function took it away
        os.chmod(slot.output, 0o700)  # one that is closed can be moved by root alone
        if not os.listdir(slot.output):
            return
        aside = str(self.slots.base / "code" / f"output-{os.urandom(8).hex()}")  # hidden there
        os.rename(slot.output, aside)
        turn.directory, turn.uid = aside, slot.spec.uid

    def _finish(self, turn: Turn) -> None:
        """Store a turn's result and end it; what cannot be stored is kept for its return."""
        try:
            self._store(turn)
        except Exception as error:  # noqa: BLE001  # as in _do
            if self._parks(turn, error):
                return
            ran, turn.report = turn.report, turn.report.ended(error)
            turn.result.update(turn.report.pairs(), success=False)
            if ran.outcome.start and ran.outcome.status != "released":
                self._keep_unstored(replace(
                    turn, report=ran, package=None, result={}, has_begun=False))
        outcome = turn.report.outcome
        if outcome.status == "error" and outcome.reason != "runtime":
            self._note_trouble(turn.task and turn.task.code, False)
        self._end(turn)

    def _store(self, turn: Turn) -> None:
        """Store a turn's result and output files; raises Ended, Outage and OSError."""
        if turn.directory and turn.names is None:
            with self.slots.machine.needed():
                turn.names, outcome = self.slots.outputs(
                    turn.directory, turn.uid, turn.report.outcome, turn.report.request_id or "")
            turn.report = replace(turn.report, outcome=outcome)
        report = turn.report
        if not turn.result:
            with self.lock:
                peaks = self.peaks(report.function_id)
                if report.outcome.peak_memory_bytes is not None and not turn.ran_before:
                    peaks.append(report.outcome.peak_memory_bytes)
                turn.result = report.result(turn.names or [], list(peaks))
        if report.request_id and report.outcome.status != "released":
            self.results.put(turn.result, turn.directory, turn.names or [])
        if turn.directory:
            with contextlib.suppress(OSError):
                remove(turn.directory)

    def _parks(self, turn: Turn, error: Exception) -> bool:
        """Whether a turn waits out an error: an outage, while its lease and patience last."""
        if not isinstance(error, Outage):
            return False
        if self.stopping:
            self._release([turn])
            return True
        now, part = time.monotonic(), error.needs
        turn.patience_ends = turn.patience_ends or now + self.settings.patience_seconds
        last = min(turn.patience_ends, self.queue.lease_ends(turn.message))
        if error.reason == "disk" and self.code.evict():
            self.log("INFO", f"{part.name}: packages that no run uses were removed")
            part.retry_at, last = 0.0, max(last, now + 1)  # it is tried again in any case
        with self.lock:
            aside = [each for turns in self.parked.values() for each in turns]
            is_full = (len(aside) >= MOST_PARKED
                       or sum(len(each.message.body) for each in aside) >= MOST_PARKED_BYTES)
            self._note_trouble(part, part.shared or is_full)
            if now >= last or is_full:
                return False
            turn.waits_until, turn.has_begun, turn.is_ahead = last, False, False
            self.parked.setdefault(part, []).append(turn)
            self.space.notify()  # others can be received
        return True

    def _note_trouble(self, cause: object, is_shared: bool) -> None:
        """Have the receiver slow down when everything fails, not to send all to the DLQ.

        That is so when all tasks need what fails, or when three different functions in a row did.
        """
        with self.lock:
            self.troubles.add(cause)
            now = time.monotonic()
            if (is_shared or len(self.troubles) >= 3) and now >= self.pause_ends:
                first, longest = FAILING_PAUSES
                self.pause_seconds = min(longest, max(first, self.pause_seconds * 2))
                self.pause_ends = now + self.pause_seconds

    def _keep_unstored(self, turn: Turn) -> None:
        """Keep what a run left until its message is back; the oldest goes when it is too much."""
        turn.size = disk_usage(filter(None, [turn.directory]), sys.maxsize)[0]
        with self.lock:
            self.unstored[turn.message.id, turn.message.body] = turn
            size = sum(each.size for each in self.unstored.values())
            while 1 < len(self.unstored) and (len(self.unstored) > UNSTORED
                                              or size > UNSTORED_BYTES):
                _, oldest = self.unstored.popitem(last=False)
                size -= oldest.size
                self.log("WARNING", f"[{oldest.report.request_id}] its result is dropped: too many "
                                    "wait to be stored; it runs again when its message is back")
                if oldest.directory:
                    remove(oldest.directory)

    def _release(self, turns: Iterable[Turn], reason: str | None = None) -> None:
        """Give messages back that did not run, or not to the end."""
        for turn in turns:
            self._end(turn, Outcome("released", reason))

    def _end(self, turn: Turn, outcome: Outcome | None = None) -> None:
        """Say how a turn ended, count it, and let go of its message; the first who asks does it."""
        with self.lock:
            if turn.is_over:
                return
            turn.is_over = True
        report = turn.report = replace(turn.report, outcome=outcome or turn.report.outcome)
        status = report.outcome.status
        report.write(self.log, report.request_id or turn.message.id)
        # What ran before is published already.
        if report.outcome.peak_memory_bytes is not None and not turn.ran_before:
            self.metrics.put(report)
        try:
            self.queue.end(turn.message, status, turn.result)
        except Exception as error:  # noqa: BLE001  # the message is left, the slot goes on
            self.log("ERROR", f"[{turn.message.id}] cannot be put away: {error}")
        if turn.package:
            self.code.release(turn.package)
        with self.lock:
            self.turns.discard(turn)
            if status != "released":
                self.counts[report.outcome.is_good] += 1
            self.space.notify()
            if self.drain:
                self.drained.append(report.brief())


def notify(state: str) -> None:
    """Tell systemd (sd_notify(3)), where it asked to be told."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with contextlib.suppress(OSError), socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)  # a systemd that does not read must not stop the agent
            sender.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)


# --------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------


def run_agent(settings: Settings, log: Log, folder: Path | None, drain: bool) -> None:
    """Run an agent on SQS, or on a folder; raises GiveUp, ConfigError, OSError."""
    if folder and not folder.is_dir():
        raise ConfigError(f"--local {folder}: there is no such folder; make it, or name another")
    for number in (signal.SIGTERM, signal.SIGINT):  # until Agent.run: there is nothing to give back
        signal.signal(number, lambda *_: sys.exit(0))
    with contextlib.closing(Slots(settings, log, folder)) as slots:
        clients = None if folder else make_clients(settings)  # while the launcher starts
        slots.try_out()
        services = open_services(settings, log, clients, folder)
        if clients and settings.function_role:
            slots.role = FunctionRole(clients, settings, log)
        agent = Agent(settings, log, services, slots)
        agent.run(drain)
        if drain:
            say(summary(agent.drained))


def open_services(settings: Settings, log: Log, clients: Clients | None,
                  folder: Path | None) -> Services:
    """Those of AWS, or the folder that stands in for them. Raises OSError."""
    if clients:
        return Services(SqsQueue(clients, settings, log), S3Code(clients.s3, log),
                        AwsResults(clients, settings, log),
                        CloudWatchMetrics(clients.cloudwatch, settings, log))
    assert folder
    return Services(FolderQueue(folder, log), FolderCode(folder), FolderResults(folder, log),
                    FolderMetrics(folder, settings, log))


def say(text: str) -> None:
    """Lines on standard output; a reader that went away, or a full disk, loses them."""
    with contextlib.suppress(OSError):
        write_all(1, text.encode("utf-8", "backslashreplace") + b"\n")


def own_package(path: Path, target: Path, runtime: str | None,
                handler: str) -> tuple[str, Package]:
    """(runtime, package) of a function in a zip or a folder, copied; raises Ended and GiveUp."""
    if not path.exists():
        raise GiveUp(f"--invoke {path}: there is no such zip or folder")
    if path.is_dir():
        shutil.copytree(path, target, symlinks=True)
        for one in (target, *target.rglob("*")):
            if not one.is_symlink():
                one.chmod(0o755 if one.is_dir() or one.stat().st_mode & 0o111 else 0o644)
    elif path.suffix == ".zip" or zipfile.is_zipfile(path):
        target.mkdir()
        unpack(path, target)
    else:
        raise GiveUp(f"--invoke {path}: this is a file, neither a zip nor a folder; name the "
                     f"folder that it is in: --invoke {path.parent}")
    if runtime is None:
        found = {entry: name for name in reversed(RUNTIMES)
                 for entry in entry_files(name, handler) if (target / entry).is_file()}
        if len(found) > 1:
            raise GiveUp(f"--invoke {path}: it has {' and '.join(sorted(found))}; say by --runtime "
                         "which of them is meant")
        runtime = next(iter(found.values()), "python")
    return _RUNTIME_OF[runtime], Package(target, "")


def invoke(settings: Settings, form: str, args: argparse.Namespace) -> int:
    """Run one function from a zip or a folder; 0 when it ends ok. Raises GiveUp, OSError."""
    log, keep = Log(form, "ERROR"), args.output
    report, names = Report(), list[str]()
    with contextlib.closing(Slots(replace(settings, concurrency=1), log)) as slots:
        slots.try_out()
        slot = slots.all[0]
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: slot.cancel())
        try:
            runtime, package = own_package(args.invoke, slots.base / "code/invoked", args.runtime,
                                           args.handler)
            task = parse_task(json.dumps({
                "requestId": "invoke", "functionId": args.function_id, "runtime": runtime,
                "s3Key": "invoke", "timeoutMs": args.timeout_ms, "memoryMb": args.memory_mb,
                "handler": args.handler, "env": dict(args.env),
            }), settings, any_bucket=True)
            report = replace(report, **task.known())
            event = args.event
            if not event and sys.stdin and not sys.stdin.isatty():
                event = sys.stdin.buffer
            task = replace(task, input=event.read() if event else b"")
            run = slots.run_spec(task, slots.compile(task, package, slot), slot, tee=True)
            outcome = slot.run(run)
            names, outcome = slots.outputs(slot.output, slot.spec.uid, outcome, task.request_id)
            report = replace(report, outcome=outcome)
        except (Ended, Outage) as error:
            report = report.ended(error)
        outcome = report.outcome
        if keep:
            keep.mkdir(parents=True, exist_ok=True)
            copy_outputs(slot.output, names, keep)
            write_json(str(keep), "result.json",
                       report.result(names, [outcome.peak_memory_bytes or 0]))
    log.least = 0
    show_invoked(report, [] if keep else names, log)
    return 0 if outcome.is_good else 1


def show_invoked(report: Report, gone: list[str], log: Log) -> None:
    """Say what came of --invoke, and which output files are gone."""
    outcome = report.outcome
    if not all(text.endswith("\n") for text in (outcome.stdout, outcome.stderr) if text):
        write_all(2, b"\n")  # what follows begins a line of its own
    if outcome.returned and outcome.is_good:
        say(outcome.returned)
    if outcome.reason == "compile":  # the compiler's own lines, which no run has shown
        write_all(2, outcome.stderr.encode())
    if outcome.text:
        log("ERROR", f"{outcome.status}: {outcome.text}")
    if gone:
        log("INFO", f"$OUTPUT_DIR is gone, with {', '.join(gone[:9])}; --output DIR keeps it")
    log(FATES[outcome.status].level, "REPORT", **report.pairs())


DEMO = {  # function: runtime, timeoutMs that no slow machine reaches by itself, source
    "hello-python": ("python", 60_000, "print('Hello from NanoGrid!')\nprint('Result: 42')\n"),
    "hungry-python": ("python", 60_000, "held = []\nwhile True: held.append(bytearray(1 << 20))"),
    "sleepy-python": ("python", 500, "import time\nprint('good night', flush=True)\ntime.sleep(9)"),
    "hello-cpp": ("cpp", 60_000, '#include <cstdio>\nint main() { std::puts("Hello from C++"); }'),
}

DEMO_END = """
hungry-python and sleepy-python were meant to fail: one takes more than its 64 MiB (oom), the other
longer than its 500 ms (timeout). A task that fails is tried three times. The demo's files are gone.
Next, a function of your own: put a main.py into a folder, and run it by
    python3 nanogrid.py --invoke FOLDER"""


def demo(settings: Settings, log: Log) -> None:
    """Run sample functions from a fresh folder: one is hungry for memory, one oversleeps."""
    with tempfile.TemporaryDirectory(prefix="nanogrid-demo-") as name:
        folder = Path(name)
        (folder / "queue").mkdir()
        (folder / "code").mkdir()
        for function_id, (runtime, timeout_ms, source) in DEMO.items():
            if runtime == "cpp" and not any(map(shutil.which, RUNTIMES["cpp"].programs)):
                log("WARNING", f"no C++ compiler here: the sample {function_id} is left out")
                continue
            with zipfile.ZipFile(folder / "code" / f"{function_id}.zip", "w") as archive:
                archive.writestr("main.cpp" if runtime == "cpp" else "main.py", source)
            task = {"requestId": f"demo-{function_id}", "functionId": function_id,
                    "runtime": runtime, "s3Key": f"{function_id}.zip",
                    "timeoutMs": timeout_ms, "memoryMb": 64}
            (folder / "queue" / f"{function_id}.json").write_text(json.dumps(task))
        run_agent(settings, log, folder, drain=True)
        is_whole = not os.listdir(folder / "queue")
    say(DEMO_END if is_whole else "The demo was stopped before its end.")


class Check:
    """--check: a line for each thing that the agent needs; changes nothing."""

    def __init__(self, settings: Settings, log: Log):
        self.settings, self.log = settings, log
        self.failed = False

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[Callable[[str], None]]:
        """One line: what the block says when all went well, or else what it raised."""
        try:
            yield lambda text: say(f"ok    {name}: {text}")
        except Exception as error:  # noqa: BLE001  # to say it is what this is for
            self.failed = True
            say(f"FAIL  {name}: {error}")

    def run(self, args: argparse.Namespace) -> int:
        """0 when all is usable, else 1."""
        if args.local:
            self._folder(args.local)
        elif not (args.invoke or args.demo):
            self._aws()
        with self.of("sandbox") as is_ok, contextlib.closing(
                Slots(replace(self.settings, concurrency=1), self.log)) as slots:
            slots.try_out()
            if args.invoke:
                self._function(slots, args)
            else:
                for name in RUNTIMES:
                    self._runtime(slots, name)
            outcome = self._trial(slots, "trial", "test -w .")
            if outcome.status != "ok":
                raise GiveUp(f"a trial run ended {outcome.status} ({outcome.stderr})")
            is_ok(f"a trial run ended ok, with a peak of {outcome.peak_memory_bytes} bytes; "
                  f"isolation: {slots.isolation()}")
        return int(self.failed)

    def _function(self, slots: Slots, args: argparse.Namespace) -> None:
        """What --invoke would run, and its runtime."""
        with self.of("function") as is_ok:
            name, package = own_package(
                args.invoke, slots.base / "code/invoked", args.runtime, args.handler)
            entry = find_entry(package.path, name, args.handler)
            is_ok(f"{args.invoke} begins with {entry}, for {name}")
            self._runtime(slots, name)

    def _folder(self, folder: Path) -> None:
        """Whether what is there of --local's folder can be listed, and written to."""
        with self.of("folder") as is_ok:
            for one in (folder, *filter(os.path.lexists, map(folder.joinpath, FolderQueue.PARTS))):
                os.listdir(one)
                if one.name != "code" and not os.access(one, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, "Permission denied", str(one))
            is_ok(str(folder))

    def _aws(self) -> None:
        """The credentials, and what of AWS the settings name."""
        clients = None
        with self.of("credentials") as is_ok:
            clients = make_clients(self.settings)
            credentials = clients.session.get_credentials()
            credentials.get_frozen_credentials()  # a role, a web identity, SSO: this asks for them
            sts = clients.session.client("sts", config=clients.sqs.meta.config)
            answer, error = attempt(sts.get_caller_identity)
            is_ok(f"{credentials.method}: {answer['Arn'] if answer else error}")
        if not clients:
            return
        self._queue(clients)
        settings, key = self.settings, f"nanogrid-check-{os.urandom(8).hex()}"
        if arn := settings.function_role:
            with self.of("function role") as is_ok:
                FunctionRole(clients, settings, self.log).env(0)
                is_ok(f"{arn} is lent to functions")
        bucket = str(settings.code_bucket)
        self.ask("bucket", f"{bucket}: s3:GetObject and s3:ListBucket are granted",
                 clients.s3.get_object, BUCKET_NEEDS.format(bucket), "NoSuchKey",
                 Bucket=bucket, Key=key)
        # Nothing to write: who may not write is told so, who may is told that this is nothing.
        self.ask("CloudWatch", f"PutMetricData into {settings.namespace} is not refused",
                 clients.cloudwatch.put_metric_data, "cloudwatch:PutMetricData",
                 "Parameter|Validation", Namespace=settings.namespace, MetricData=[])
        if results := settings.output_bucket:
            # A part of an upload that nobody began; moto answers 500.
            self.ask("output bucket", f"{results}: s3:PutObject is not refused",
                     clients.s3.upload_part, f"s3:PutObject on arn:aws:s3:::{results}/*",
                     "NoSuchUpload|^500$", Bucket=results, Key=key, UploadId="none", PartNumber=1,
                     Body=b"")
        if url := settings.output_queue_url:
            self.ask("output queue", f"{url}: a batch of no messages is not refused",
                     clients.sqs.send_message_batch, "sqs:SendMessage on it",
                     "EmptyBatch|Parameter|Validation", QueueUrl=url, Entries=[])

    def _queue(self, clients: Clients) -> None:
        """The queue, its visibility timeout and its DLQ."""
        url = self.settings.queue_url
        answer = self.ask("queue", str(url), clients.sqs.get_queue_attributes, QUEUE_NEEDS, "(?!)",
                          QueueUrl=url, AttributeNames=["All"])
        if not answer:
            return
        attributes = answer["Attributes"]
        with self.of("visibility timeout") as is_ok:
            is_ok(f"{attributes['VisibilityTimeout']} s")
        with self.of("dead-letter queue") as is_ok:
            policy = json.loads(attributes.get("RedrivePolicy") or "{}")
            if "deadLetterTargetArn" not in policy:
                raise GiveUp("none: what fails would come back for ever; set the queue's "
                             "RedrivePolicy (setup_resources.sh does)")
            is_ok(f"{policy['deadLetterTargetArn']} after {policy.get('maxReceiveCount')} receives")

    def ask(self, name: str, text: str, call: Callable[..., Any], needs: str, fine: str,
            **arguments: Any) -> Any:
        """Say `text` of a call to AWS, also if it fails by a code that is `fine`; its answer."""
        answer, error = attempt(call, **arguments)
        with self.of(name) as is_ok:
            if error and not re.search(fine, error_code(error)):
                raise GiveUp(remedy(error, needs, arguments.get("QueueUrl"))
                             or f"{error}; it may pass: if it does not, check the network, "
                                "agent.aws.region and agent.aws.endpointUrl")
            is_ok(text)
        return answer

    def _runtime(self, slots: Slots, name: str) -> None:
        """Whether the program of this runtime starts, and says that it is one."""
        if not slots.programs[name] and not getattr(self.settings, name):
            return say(f"none  runtime {name}: no {' or '.join(RUNTIMES[name].programs)} on PATH "
                       "that a function can run; its tasks end as error")
        with self.of(f"runtime {name}") as is_ok:
            program, (flag, pattern) = slots.program("{program}", name), RUNTIMES[name].version
            outcome = self._trial(slots, name, f"exec {shlex.quote(program)} {flag}")
            said = (outcome.stdout + outcome.stderr).partition("\n")[0]
            if not re.match(pattern, said):
                raise GiveUp(f"{program} {flag} ended {outcome.status}, with {shown(said)}: this "
                             f"is no {name}; correct agent.runtimes.{name}")
            is_ok(f"{program}, {said}")

    def _trial(self, slots: Slots, name: str, script: str) -> Outcome:
        """What a function of our own comes to."""
        place, slot = slots.base / "code" / name, slots.all[0]
        place.mkdir(mode=0o755)
        (place / "run.sh").write_text(script)
        task = Task(request_id="check", function_id="check", runtime="cpp", bucket="", key="",
                    timeout_ms=60_000, memory_mb=512, input=b"")
        return slot.run(slots.run_spec(task, Package(place, ""), slot))


def pair(text: str) -> list[str]:
    """[NAME, VALUE]; raises ArgumentTypeError."""
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"{text} is no NAME=VALUE")
    return text.split("=", 1)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="nanogrid.py", description="NanoGrid: your own Lambda on one machine, in one file.",
        epilog="exit status: 0 done, or stopped by a signal; 1 could not go on (--invoke: it did "
               "not end ok; --check: not all is usable); 2 wrong usage or settings")
    parser.add_argument("--config", metavar="FILE", type=Path,
                        help="the settings (default: application.yml here)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--local", metavar="DIR", type=Path,
                      help="a folder stands in for SQS, S3 and CloudWatch (default: AWS)")
    mode.add_argument("--demo", action="store_true",
                      help="run sample functions, without settings or AWS (default: no)")
    mode.add_argument("--invoke", metavar="PATH", type=Path,
                      help="run one function here and now from a zip or a folder; standard input "
                           "is its input (default: no)")
    parser.add_argument("--drain", action="store_true",
                        help="end when the queue is empty (default: at SIGTERM or SIGINT)")
    parser.add_argument("--check", action="store_true",
                        help="say what is usable, change nothing (default: run)")
    one = parser.add_argument_group("with --invoke")
    one.add_argument("--runtime", choices=_RUNTIME_OF, metavar="NAME",
                     help=f"one of {', '.join(RUNTIMES)} (default: its only entry file's)")
    one.add_argument("--timeout-ms", type=int, help="its time limit (default: the settings')")
    one.add_argument("--memory-mb", type=int, help="its memory cap (default: the settings')")
    one.add_argument("--function-id", default="invoke", help="its name (default: %(default)s)")
    one.add_argument("--output", metavar="DIR", type=Path,
                     help="keep result.json and $OUTPUT_DIR there (default: nothing is kept)")
    one.add_argument("--handler", metavar="FILE.FUNCTION", default="",
                     help="what to call, as in AWS Lambda (default: the entry file is run)")
    one.add_argument("--env", metavar="NAME=VALUE", type=pair, action="append", default=[],
                     help="a variable for it; may be repeated (default: none)")
    one.add_argument("--event", metavar="FILE", type=argparse.FileType("rb"),
                     help="its input (default: standard input)")
    parser.add_argument("--log-format", choices=("text", "json"), default="text",
                        help="of the log's lines (default: %(default)s)")
    parser.add_argument("--log-level", choices=LEVELS, default="INFO", type=str.upper,
                        help="the least that is logged (default: %(default)s)")
    parser.add_argument("--version", action="version", version=f"nanogrid {__version__}")
    return parser


def obey(args: argparse.Namespace, log: Log) -> int:
    """Do what the command line says; the exit status. Raises ConfigError, GiveUp and OSError."""
    path = args.config or Path("application.yml")
    is_optional = args.local or any(name.startswith("AGENT_") for name in os.environ)
    if args.config is None and (args.demo or args.invoke or is_optional and not path.exists()):
        path = None
    local = bool(args.local or args.demo or args.invoke)
    settings, warnings = load_settings(path, os.environ, local)
    for warning in warnings:
        log("WARNING", warning)
    if args.check:
        say(f"ok    settings: {path or 'defaults'}")
        return Check(settings, Log(args.log_format, "ERROR")).run(args)
    if args.invoke:
        return invoke(settings, args.log_format, args)
    if args.demo:
        demo(settings, log)
    else:
        run_agent(settings, log, args.local, args.drain)
    return 0


def start_clean() -> None:
    """Undo what whoever started this process left of descriptors and signals; exec keeps both."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:  # a socket would take a closed one's place
        os.set_inheritable(fd, True)
    os.close(fd)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, children end without a status
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def main(argv: list[str]) -> int:
    """The exit status: 0 done, 1 could not go on, 2 wrong usage or settings."""
    start_clean()
    if argv[:1] == ["--launcher"]:
        launch(socket.socket(fileno=int(argv[1])), argv[2])
        return 0
    args = arguments().parse_args(argv)
    log = Log(args.log_format, args.log_level)
    if not sys.platform.startswith("linux"):
        log("ERROR", "NanoGrid needs Linux: it confines and measures by its kernel")
        return 1
    try:
        return obey(args, log)
    except ConfigError as error:
        for line in str(error).splitlines():
            log("ERROR", line)
        return 2
    except (GiveUp, OSError) as error:
        log("ERROR", str(error))
    except KeyboardInterrupt:
        log("ERROR", "interrupted")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
