#!/usr/bin/env python3
"""NanoGrid: your own Lambda on one machine, in one file.

A task arrives as an SQS message (or as a file, with --local). The agent takes it, fetches the
code, runs it under its timeout and memory cap, measures its peak memory, publishes that, and
deletes the message if, and only if, the function succeeded:

    receive -> Task (checked) -> code cache -> workspace -> run -> report -> delete or leave

Theory of operation. Two kinds of process, both from this file. The agent talks to AWS, owns
the messages and their leases, unpacks code and reports; it has threads, and never forks a
function. The launcher is started for the first run and never sees a credential; it forks a
supervisor for each slot, and each supervisor runs one function at a time: it limits it, looks
after it, ends all that is left of it and measures it. Whoever loses the process above itself
kills what it runs and ends, so no function survives even a SIGKILL of the agent.
"""
from __future__ import annotations

import gc

if __name__ == "__main__":  # until the start is over: imports make much, and nothing that goes away
    gc.disable()

import argparse
import contextlib
import errno
import fcntl
import io
import json
import marshal
import math
import os
import pwd
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
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

__version__ = "1.0.0"
MIB = 1024 * 1024
PAGE = resource.getpagesize()
MAX_TIMEOUT_MS = 43_200_000  # 12 hours: SQS keeps no message in flight for longer
# The launcher runs the same code, whatever becomes of the file meanwhile; compiling it again would
# take 50 ms and leave 12 MiB behind.
CODE = sys._getframe().f_code
LOADER = "import marshal, sys; exec(marshal.load(sys.stdin.buffer))"


# --------------------------------------------------------------------------------------------
# Settings: application.yml and the environment
# --------------------------------------------------------------------------------------------


class ConfigError(Exception):
    """Settings that cannot be used; the text is a line `FILE:LINE: what; what to do` for each."""


# --- YAML: the subset that settings need, read as YAML 1.2 reads it or refused ---

# Patterns stand as text, here and below: `re` compiles each when it is first used, and keeps it.
_FORBIDDEN = (  # what YAML 1.2's c-printable leaves out; also a lone CR, a late BOM
    "[^\t\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
_MARKER = r"(---|\.\.\.)(?=[ \t]|$) *([^ #])?"
_ITEM = r"-(?: +|$)"
_COLON = r" *:(?: +(?:#.*)?|$)"
_COMMENT = r"(?: +#.*)?"
_EMPTY = r"(\[ *\]|\{ *\})(?: +#.*)?"
_TOKEN = r'''(?x)
    (?P<double> "(?:[^"\\]|\\.)*" )
  | (?P<single> '(?:[^']|'')*'(?!') )
  | (?P<plain>  (?: [^- \t?:,\[\]{}\#&*!|>'"%@`] | [-?:](?=[^ \t]) )       # ns-plain-first
                (?: [^ \t:] | :(?=[^ \t]) | [ ]+(?=[^ \t:\#]|:[^ \t]) )* )  # blanks inside only
'''
_ESCAPE = r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))"
_ESCAPES = dict(zip('0abt\tnvfre "/\\N_LP', '\0\a\b\t\t\n\v\f\r\x1b "/\\\x85\xa0\u2028\u2029'))
_CORE_SCHEMA = (  # YAML 1.2.2, 10.3.2; in ASCII, since int() alone would take other digits and `_`
    (r"~|null|Null|NULL", lambda text: None),
    (r"true|True|TRUE|false|False|FALSE", lambda text: text[0] in "tT"),
    (r"[-+]?[0-9]+", int),
    (r"0o[0-7]+|0x[0-9a-fA-F]+", lambda text: int(text, 0)),
    (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", float),
    (r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", lambda s: float(s.replace(".", ""))),
)
_LONG_NUMBER = r"(?:0[ox]|[-+])?[0-9a-fA-F]{301}"  # int(), str() raise at some thousand
_DEEPEST_MAP = 50  # Python's recursion limit must not be what ends the reading
_REFUSED = {  # how text outside of the subset begins: what it is; what to write instead
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
    """The map that a YAML text holds ({} when empty), typed by YAML 1.2's core schema.

    The first thing outside of the subset raises ConfigError with its line.
    """
    return _YamlReader(text, name).tree


class _Line(NamedTuple):
    number: int
    indent: int
    body: str


_END = _Line(0, -1, "")


class _YamlReader:
    """Reads by depth with one line of look-ahead: `tree`, and `line_of` each path of keys."""

    def __init__(self, text: str, name: str):
        self.name = name
        self.line_of: dict[tuple, int] = {}
        self.lines = self.content(text[1:] if text[:1] == "\ufeff" else text)
        self.line = next(self.lines)
        if re.fullmatch(r"(?:\{ *\}(?: +#.*)?)?", self.line.body):
            self.tree, self.line = {}, next(self.lines, _END)
        else:
            self.tree = self.block_map(self.line.indent, ())
        if self.line is not _END:
            self.fail(self.line.number, "outside of the map above; give its keys one indent")

    def fail(self, number: int, problem: str):
        raise ConfigError(f"{self.name}:{number}: {problem}")

    def content(self, text: str) -> Iterator[_Line]:
        """The lines that hold more than a comment or the `---` at the start, then _END."""
        begun = False
        for number, line in enumerate(text.split("\n"), 1):  # splitlines() would split at U+2028
            line = line.removesuffix("\r")
            # Most lines are printable, and need no pattern that takes 2 ms of the start to compile.
            if not line.isprintable() and (bad := re.search(_FORBIDDEN, line)):
                self.fail(number, f"the character U+{ord(bad[0]):04X} is not allowed in YAML; "
                          "take it out, or write it as an escape in double quotes")
            body = line.lstrip(" ")
            if body[:1] == "\t" or line[:1] == "%":
                self.fail(number, _REFUSED[body[0]])
            if marker := re.match(_MARKER, line):
                if begun or marker[1] == "..." or marker[2]:
                    self.fail(number, f"`{marker[1]}` ends a document or has text after it; write "
                              "one document, with nothing but a line `---` before it")
                begun = True
            elif body and body[0] != "#":
                begun = True
                yield _Line(number, len(line) - len(body), body.rstrip(" "))
        yield _END

    def entries(self, indent: int, items: bool) -> Iterator[_Line]:
        """The lines at `indent`, with `items` only list items; a deeper line is refused."""
        while self.line.indent == indent and (not items or re.match(_ITEM, self.line.body)):
            taken, self.line = self.line, next(self.lines)
            yield taken
        if self.line.indent > indent:
            self.fail(self.line.number, "indented unlike its siblings, or text that goes on from "
                      "the line above; align it, and write a value in its key's line")

    def block_map(self, indent: int, path: tuple) -> dict[str, Any]:
        if len(path) > _DEEPEST_MAP:
            self.fail(self.line.number, f"nested too deep; use at most {_DEEPEST_MAP} levels")
        found: dict[str, Any] = {}
        for line in self.entries(indent, items=False):
            key, _, rest = self.token(line.number, line.body)
            if not (colon := re.match(_COLON, rest)):
                self.fail(line.number, f"{_shown(line.body)} is no `key: value`; write a space "
                          "after the colon, and a value in its key's line")
            text, here = rest[colon.end():], (*path, key)
            if key in found:
                self.fail(line.number, f"the key {_shown(key)} stands in line {self.line_of[here]} "
                          "too; keep one of them")
            self.line_of[here] = line.number
            if empty := re.fullmatch(_EMPTY, text):
                found[key] = [] if empty[1][0] == "[" else {}
            else:
                found[key] = self.scalar(line, text) if text else self.child(indent, here)
        return found

    def child(self, indent: int, path: tuple) -> Any:
        """The map or list beneath a key at `indent`; None when there is none."""
        line = self.line
        if line.indent >= indent and re.match(_ITEM, line.body):
            return [self.scalar(item, re.sub(_ITEM, "", item.body, count=1))
                    for item in self.entries(line.indent, items=True)]
        return self.block_map(line.indent, path) if line.indent > indent else None

    def scalar(self, line: _Line, text: str) -> Any:
        if text[:1] in ("", "#"):
            return None
        value, is_plain, rest = self.token(line.number, text)
        if not re.fullmatch(_COMMENT, rest):
            self.fail(line.number, f"{_shown(rest.strip())} after a value; put the whole value in "
                      "one pair of quotes, a key in its own line, a space before a `#`")
        if is_plain and re.match(_LONG_NUMBER, value):
            self.fail(line.number, "a number that is too long; put it in quotes")
        return _typed(value) if is_plain else value

    def token(self, number: int, text: str) -> tuple[str, bool, str]:
        """What the token at the start of `text` says; is it plain (else quoted); the rest."""
        def character(escape: re.Match) -> str:
            digits = escape[1] or escape[2] or escape[3]
            code = int(digits, 16) if digits else ord(_ESCAPES.get(escape[4], "\ud800"))
            if 0xD800 <= code <= 0xDFFF or code > 0x10FFFF:
                self.fail(number, f"{escape[0]} is no escape for a character; write `\\\\` for a "
                          "backslash, or use single quotes")
            return chr(code)

        found = re.match(_TOKEN, text)
        rest = text[found.end():] if found else text.lstrip("-?:")
        if rest.lstrip(" :")[:1] == "\t":
            self.fail(number, _REFUSED["\t"])
        if not found:
            self.fail(number, _REFUSED.get(text[0], f"`{text[0]}` begins text; put it in quotes"))
        if found["double"]:
            return re.sub(_ESCAPE, character, found[0][1:-1]), False, rest
        return found["plain"] or found[0][1:-1].replace("''", "'"), bool(found["plain"]), rest


def _typed(text: str) -> Any:
    """A plain scalar's value by the core schema; the text itself when it is text."""
    return next((value(text) for kind, value in _CORE_SCHEMA if re.fullmatch(kind, text)), text)


def _shown(value: Any, mapping: str = "a section", empty: str = "empty",
           text_of: Callable[[Any], str] = repr) -> str:
    """A value of settings for an error text: on one line, and short."""
    if isinstance(value, (dict, list)):
        return mapping if isinstance(value, dict) else "a list"
    if value is None or isinstance(value, bool):
        return empty if value is None else json.dumps(value)
    text = text_of(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _quoted(value: Any) -> str:
    """A value of a message or a zip for an error text: in JSON's words, in ASCII."""
    return _shown(value, "an object", "null", ascii)


# --- Settings: the class is the table of every path, default, type and limit ---

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
    "bucket": (r"[A-Za-z0-9._-]{3,255}", "write the bucket's bare name, no ARN, no s3:// URL"),
    "user": (r"[0-9]{1,9}|[1-3][0-9]{9}|[^\W\d][^\s:/]*", "write a user name or a uid"),
    "command": (r"/.*[^/]|\w[^\s/]*", "write an absolute path, or a bare name to find on PATH"),
    "prefix": (r".{0,500}", "write at most 500 characters"),
    "namespace": (r"(?!AWS/|:)[A-Za-z0-9._/#:-]{1,255}", "write letters, digits, . _ / # : or -"),
    "directory": (r"(/(?!\.\.?(/|$))[^/]+)+/?", "write an absolute path without . and .. in it"),
}
_AWS_QUEUE = (
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


def _at(paths: str, *columns: Any) -> Any:
    """A field that is written at agent.`paths`: one path, or one for each key of a dict."""
    rows = [Setting(f"agent.{path}", *columns) for path in paths.split()]
    default = rows[0].default
    preset = {"default_factory" if callable(default) else "default": default}
    return field(metadata={"rows": rows}, **preset)


def _memory_for_runs_mb() -> int:
    """The machine's memory less 10 %, at least 256 MiB, for the system and the agent."""
    total = os.sysconf("SC_PHYS_PAGES") * PAGE // MIB
    return max(1, total - max(256, total // 10))


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
                           lambda: len(os.sched_getaffinity(0)), 1, 1000)
    memory_mb: int = _at("execution.memoryMb", "count", _memory_for_runs_mb)
    default_timeout_ms: int = _at(
        "execution.defaultTimeoutMs", "count", 10_000, 1, MAX_TIMEOUT_MS,
        f"SQS lends a message for 12 h, so 1 to {MAX_TIMEOUT_MS} are allowed")
    default_memory_mb: int = _at("execution.defaultMemoryMb", "count", 128)
    shutdown_grace_seconds: int = _at("execution.shutdownGraceSeconds", "count", 30, 0,
                                      MAX_TIMEOUT_MS // 1000)
    run_as: str | None = _at("execution.runAs", "user")
    warm_start: bool = _at("execution.warmStart", "flag", True)
    max_open_files: int = _at("execution.maxOpenFiles", "count", 1024, 16)
    max_processes: int = _at("execution.maxProcesses", "count", 512)
    max_file_mb: int = _at("execution.maxFileMb", "count", 1024)
    max_disk_mb: int = _at("execution.maxDiskMb", "count", 2048)
    max_files: int = _at("execution.maxFiles", "count", 100_000)
    runtimes: Mapping[str, str] = _at("runtimes.python runtimes.cpp runtimes.nodejs runtimes.go",
                                   "command", dict)
    output_bucket: str | None = _at("output.bucket", "bucket")
    output_prefix: str = _at("output.s3Prefix", "prefix", "outputs")
    output_queue_url: str | None = _at("output.queueUrl", "queue")
    namespace: str = _at("metrics.namespace", "namespace", "NanoGrid/FunctionRunner")
    flush_seconds: int = _at("metrics.flushSeconds", "count", 10, 1, 3600)
    task_base_dir: str = _at("taskBaseDir", "directory", "/tmp/task")


SETTINGS = tuple(row._replace(field=one.name)
                 for one in fields(Settings) for row in one.metadata["rows"])
_REQUIRED = {"region", "queue_url", "code_bucket"}
_FALLBACKS = {"region": ("AWS_REGION", "AWS_DEFAULT_REGION"), "endpoint_url": ("AWS_ENDPOINT_URL",)}
_HELD_AS = {"user": str, "buckets": tuple, "prefix": lambda text: text.strip("/")}
_LEAVES = [tuple(row.path.split(".")) for row in SETTINGS]
_SECTIONS = {leaf[:depth] for leaf in _LEAVES for depth in range(1, len(leaf))}


def load_settings(path: Path | None, environ: Mapping[str, str],
                  local: bool) -> tuple[Settings, list[str]]:
    """The settings in the file at `path`, if any, with the environment over it; warnings.

    `local` needs nothing of AWS. Raises ConfigError with every problem at once.
    """
    written, problems, warnings = _from_file(path) if path else ({}, [], [])
    values: dict[str, Any] = {"runtimes": {}}
    for row in SETTINGS:
        names = (row.variable, *(() if local else _FALLBACKS.get(row.field, ())))
        value, where = written[row.path] = _look_up(
            row, names, environ, written, f"{path}:1" if path else row.variable)
        if value is None:
            faults = [] if local or row.field not in _REQUIRED else [
                f"is missing; write it in application.yml, or set {' or '.join(names)}"]
        elif not (faults := _faults(row, value)):
            if row.kind == "command":
                values[row.field][row.path.rpartition(".")[2]] = value
            else:
                values[row.field] = _HELD_AS[row.kind](value) if row.kind in _HELD_AS else value
        problems += [f"{where}: {row.path} {fault}" for fault in faults]
    problems += [] if local else _queue_problems(written)
    if problems:
        raise ConfigError("\n".join(problems))
    return Settings(**values), warnings


def _look_up(row: Setting, names: tuple[str, ...], environ: Mapping[str, str],
             written: dict[str, tuple[Any, str]], start: str) -> tuple[Any, str]:
    """The value for `row` (None: nothing says one) and where it stands, or where it should."""
    own, *fallbacks = [(_from_variable(name, row, environ), name) for name in names]
    section = written.get(row.path.rpartition(".")[0], (None, start))
    in_file = written.get(row.path, (None, section[1]))
    return next((one for one in (own, in_file, *fallbacks) if one[0] is not None), in_file)


def _from_file(path: Path) -> tuple[dict[str, tuple[Any, str]], list[str], list[str]]:
    """What a file says, as {path: (value, FILE:LINE)}; what is wrong with its keys; warnings."""
    try:
        content = path.read_bytes()
        reader = _YamlReader(content.decode(), str(path))
    except OSError as error:
        raise ConfigError(f"{path}:1: cannot be read ({error.strerror}); copy "
                          "application.yml.example there, or name another with --config") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from None
    written, problems, warnings = {}, [], []
    for keys, value in _keys(reader.tree):
        dotted, where = repr(".".join(keys))[1:-1], f"{path}:{reader.line_of[keys]}"
        if dotted in _SPRING_ONLY:
            warnings.append(f"{where}: {dotted} is for the Spring Boot agent; passed over")
        elif keys in _LEAVES or keys in _SECTIONS and isinstance(value, (dict, type(None))):
            written[dotted] = value, where
        elif keys in _SECTIONS:
            problems.append(f"{where}: {dotted} is {_shown(value)}; write its keys beneath it, "
                            "indented, since it is a section")
        else:
            known = {".".join(one).lower(): ".".join(one) for one in (*_SECTIONS, *_LEAVES)
                     if len(one) >= len(keys)}
            import difflib
            nearest = known[difflib.get_close_matches(dotted.lower(), known, 1, 0)[0]]
            problems.append(f"{where}: {dotted} is no known key; the nearest is {nearest}")
    return written, problems, warnings


def _keys(section: dict[str, Any], above: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Each path of keys in a file with its value, but none beneath a section that is not ours."""
    for key, value in section.items():
        yield (*above, key), value
        if (*above, key) in _SECTIONS and isinstance(value, dict):
            yield from _keys(value, (*above, key))


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
        fits = isinstance(value, str) and value.isprintable() and re.fullmatch(pattern, value)
        advice = advice if isinstance(value, (str, dict, list)) else "put it in quotes"
    return [] if fits else [f"is {_shown(value)}; {advice}"]


def _queue_problems(written: dict[str, tuple[Any, str]]) -> Iterator[str]:
    """What is wrong with the URLs of queues, beyond their being URLs."""
    region = written.get("agent.aws.region", (None,))[0]
    for path in ("agent.sqs.queueUrl", "agent.output.queueUrl"):
        url, where = written.get(path, ("", ""))
        aws = re.fullmatch(_AWS_QUEUE, str(url))
        of_queue = aws and (aws[1] or aws[2] or "us-east-1").lower()
        if re.search("YOUR_[A-Z]|(?i:your_account)", str(url)):
            yield (f"{where}: {path} still holds YOUR_ACCOUNT_ID; write the id that `aws sts "
                   "get-caller-identity --query Account --output text` prints")
        elif str(url).endswith(".fifo"):
            yield f"{where}: {path} is a FIFO queue; write the URL of a standard queue"
        elif aws and not re.fullmatch(r"/[0-9]{12}/[A-Za-z0-9_-]{1,80}", aws[3] or ""):
            yield f"{where}: {path} is {_shown(url)}; write ...amazonaws.com/ACCOUNT_ID/NAME"
        if aws and region not in (None, of_queue):
            yield (f"{where}: {path} is in {of_queue}, but agent.aws.region (or AWS_REGION) is "
                   f"{_shown(region)}; write the queue's region in both")


# --------------------------------------------------------------------------------------------
# Tasks: the message, checked field by field
# --------------------------------------------------------------------------------------------

MAX_KEY_BYTES = 1024         # S3's limit on an object key, in UTF-8
REPORTED_FIELDS = ("requestId", "functionId", "runtime", "timeoutMs", "memoryMb")

_PART = r"(?!\.\.?(?:/|\Z))[A-Za-z0-9._:-]+"
_REQUEST_ID = rf"(?=.{{1,128}}\Z){_PART}"
_FUNCTION_ID = rf"(?=.{{1,128}}\Z){_PART}(?:/{_PART})*"
_UNPRINTED = "[\x00-\x1f\x7f-\x9f\ud800-\udfff]"  # control characters, lone surrogates


class Runtime(NamedTuple):
    """What a task may call a runtime, and what runs its entries: the first that a zip has."""
    aliases: tuple[str, ...]
    programs: tuple[str, ...]  # looked up on PATH unless settings name one
    commands: dict[str, tuple[str, ...]]  # by entry; "{program}" stands for what was found
    compiled: dict[str, tuple[str, ...]]  # by entry: the compiler's command, which makes `main`


SHELL_ENTRY = {"run.sh": ("/bin/bash", "run.sh"), "main": ("./main",)}
RUNTIMES = {
    "python": Runtime((), ("python3", "python"), {"main.py": ("{program}", "main.py")}, {}),
    "cpp": Runtime(("c++",), ("g++", "c++", "clang++"), SHELL_ENTRY, {
        "main.cpp": ("{program}", "-O2", "-std=c++17", "-o", "main", "main.cpp")}),
    "nodejs": Runtime(("node",), ("node", "nodejs"), {"index.js": ("{program}", "index.js")}, {}),
    "go": Runtime(("golang",), ("go",), SHELL_ENTRY, {
        "main.go": ("{program}", "build", "-o", "main", "main.go")}),
}
_RUNTIME_OF = {alias: name for name, runtime in RUNTIMES.items()
               for alias in (name, *runtime.aliases)}


class Rejected(Exception):
    """The task or its zip is wrong: it never runs. str() says what, where and what to do.

    `reason` is REPORT's word; `known` holds the REPORTED_FIELDS that are right by themselves.
    """

    def __init__(self, reason: str, text: str, known: dict[str, object] | None = None):
        super().__init__(text)
        self.reason, self.known = reason, known or {}


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


def parse_task(body: str, settings: Any, any_bucket: bool = False) -> Task:
    """The task in a message body; raises Rejected, which names every field that is wrong.

    `any_bucket` is for --local: s3Bucket is not looked at, s3Key is a path below a folder.
    """
    fields, input_text = _read_json(body)
    values = {"s3Bucket": settings.code_bucket or "", "timeoutMs": settings.default_timeout_ms,
              "memoryMb": settings.default_memory_mb}
    # null for an optional field is how many serializers write "not set"
    values.update((k, v) for k, v in fields.items() if v is not None or k not in values)
    right: dict[str, Any] = {}
    wrong: dict[str, tuple[str, str]] = {}
    for name, reason, check, allowed in _rules(settings, any_bucket):
        if name in wrong:
            continue
        if name in values and check(values[name]):
            right[name] = values[name]
        else:
            found = _quoted(values[name]) if name in values else "missing"
            wrong[name] = reason, f"{name} is {found}; it must be {allowed}"
    if "runtime" in right:
        right["runtime"] = _RUNTIME_OF[right["runtime"]]
    if wrong:
        raise Rejected(next(iter(wrong.values()))[0], "; ".join(text for _, text in wrong.values()),
                       {name: right[name] for name in REPORTED_FIELDS if name in right})
    return Task(right["requestId"], right["functionId"], right["runtime"], right["s3Bucket"],
                right["s3Key"], right["timeoutMs"], right["memoryMb"], input_text.encode())


def _rules(settings: Any, any_bucket: bool) -> list[tuple[str, str, Any, str]]:
    """(field, reason, check, what the check allows); a field's first rule makes its type sure."""
    buckets = [name for name in (settings.code_bucket, *settings.allowed_buckets) if name]
    return [
        ("requestId", "task", lambda v: isinstance(v, str) and re.fullmatch(_REQUEST_ID, v),
         "1 to 128 of A-Z a-z 0-9 . _ : -, and neither '.' nor '..'"),
        ("functionId", "task", lambda v: isinstance(v, str) and re.fullmatch(_FUNCTION_ID, v),
         "1 to 128 of A-Z a-z 0-9 . _ : / - without an empty, '.' or '..' path part"),
        ("runtime", "task", lambda v: isinstance(v, str) and v in _RUNTIME_OF,
         f"one of {', '.join(_RUNTIME_OF)}"),
        ("s3Key", "task", lambda v: isinstance(v, str) and not re.search(_UNPRINTED, v)
         and 1 <= len(v.encode()) <= MAX_KEY_BYTES,
         f"a string of 1 to {MAX_KEY_BYTES} bytes without control characters"),
        ("s3Key", "task", lambda v: not any_bucket or not {"", ".", ".."} & set(v.split("/")),
         "the path of a file below DIR/code, without an empty, '.' or '..' part"),
        ("timeoutMs", "task", lambda v: type(v) is int and 1 <= v <= MAX_TIMEOUT_MS,
         f"a whole number from 1 to {MAX_TIMEOUT_MS}"),
        ("memoryMb", "task", lambda v: type(v) is int and v >= 1, "a whole number from 1 upwards"),
        ("s3Bucket", "task", lambda v: isinstance(v, str), "a string"),
        ("s3Bucket", "bucket", lambda v: any_bucket or v in buckets,
         f"one of {', '.join(buckets)} (agent.s3.codeBucket and allowedBuckets)"),
        ("memoryMb", "memory", lambda v: v <= settings.memory_mb,
         f"at most {settings.memory_mb}, all that can be admitted (agent.execution.memoryMb)"),
    ]


def _read_json(body: str) -> tuple[dict[str, Any], str]:
    """The message's fields, and the JSON text of `input` in ASCII ("" when there is none)."""
    try:
        fields = json.loads(body, object_pairs_hook=_unique, parse_float=_finite,
                            parse_constant=_finite)
        if isinstance(fields, dict):
            return fields, json.dumps(fields["input"]) if "input" in fields else ""
    except (ValueError, RecursionError) as error:  # ValueError: also a number of 4,301 digits
        raise Rejected("task", f"the message is not JSON that can be read: {_why(error)}") from None
    raise Rejected("task", f"the message is {_quoted(fields)}; it must be a JSON object")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {_quoted(twice)} stands twice in one object")
    return fields


def _finite(number: str) -> float:
    """Neither NaN nor 1e999: both would be written for the function as what is not JSON."""
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{_quoted(number)} is no number of JSON, or too large a one")
    return value


def _why(error: Exception) -> str:
    """What a library's error says, fit for a log line."""
    return ascii(str(error) or type(error).__name__)[1:-1][:200]


# --- Zips: checked, unpacked, and the file that a run starts with ---

MAX_UNPACKED = 250 * MIB           # bytes; AWS Lambda's limit on a function's code
MAX_MEMBERS = 10_000
MAX_PATHS = 2 * MAX_MEMBERS        # members and the folders that their names imply
MAX_DIRECTORY = 800 * MAX_MEMBERS  # bytes of the zip's own directory, which zipfile reads at once
MAX_NAME_BYTES = 1000              # PATH_MAX and XFS's limit on a link, less room for our part
MAX_PART_BYTES = 255               # NAME_MAX
_UNIX_MADE = (3, 19)  # Unix and macOS (APPNOTE.TXT 4.4.2): their zips hold file modes
_MEMBER_KINDS = {0: "file", stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link"}
_OUTSIDE = r"\A/|\A[A-Za-z]:|\\|(?:\A|/)\.\.(?:/|\Z)"
_CORRUPT = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError,
            ValueError, OverflowError)  # what zipfile raises for wrong bytes; never OSError


def unpack(archive: Path, target: Path) -> list[str]:
    """Unpack a zip into the new or empty folder `target`; the sorted paths of its regular files.

    Modes are 0755 for folders and what is executable, else 0644. Raises Rejected("zip"), with
    nothing written beside `target`, which the caller removes; an OSError is the machine's.
    """
    with _Archive(archive) as source:
        try:
            bundle = zipfile.ZipFile(source)
        except _CORRUPT as error:
            raise Rejected("zip", f"no zip that can be read: {_why(error)}; zip it again") from None
        tree = _tree(bundle.infolist(), os.fstat(source.fileno()).st_size)
        folders, files, links = ([path for path in sorted(tree) if _kind(tree[path]) == kind]
                                 for kind in ("folder", "file", "link"))
        for path in folders:
            (target / path).mkdir(exist_ok=True)
            (target / path).chmod(0o755)
        left = MAX_UNPACKED
        for path in files:
            with open(target / path, "xb") as file:
                file.writelines(_content(bundle, tree[path], left))
                os.fchmod(file.fileno(), 0o755 if _mode(tree[path]) & 0o111 else 0o644)
                left -= file.tell()
        for path in links:  # last, so that nothing can be written through one
            content = b"".join(_content(bundle, tree[path], MAX_NAME_BYTES))
            (target / path).symlink_to(_link_target(path, os.fsdecode(content)))
        return files


class _Archive(io.FileIO):
    """A zip's bytes for zipfile, which believes the offsets and sizes that they claim."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return super().seek(offset, whence)
        except OSError:  # a regular file refuses nothing but a position that cannot be
            if whence != os.SEEK_SET:  # zipfile tries from the end, and knows that it may fail
                raise
            raise zipfile.BadZipFile("it points outside itself") from None

    def read(self, size: int = -1) -> bytes:
        if size > MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"its directory claims {size} bytes")
        return super().read(size)


def _tree(members: list[zipfile.ZipInfo], size: int) -> dict[str, zipfile.ZipInfo | None]:
    """Each path of a zip of `size` bytes, and its member (None: a folder that names imply)."""
    if not 1 <= len(members) <= MAX_MEMBERS:
        raise Rejected("zip", f"the zip has {len(members)} members; it may have 1 to {MAX_MEMBERS}")
    if sum(member.compress_size for member in members) > size:
        raise Rejected("zip", "members of the zip share their bytes, as in a zip bomb")
    tree: dict[str, zipfile.ZipInfo | None] = {"": None}
    for member in members:
        path = _path(member)
        if tree.get(path):
            raise _bad(member, "stands twice in the zip; leave one out")
        if path in tree and _kind(member) != "folder":
            raise _bad(member, "is both a file and a folder; rename one")
        tree[path] = member
        while (path := path.rpartition("/")[0]) not in tree:
            tree[path] = None
        if _kind(tree[path]) != "folder":
            raise _bad(member, f"stands below {_quoted(path)}, which is no folder; rename one")
        if len(tree) > MAX_PATHS:
            raise Rejected("zip", f"the zip has over {MAX_PATHS} files and folders")
    return tree


def _path(member: zipfile.ZipInfo) -> str:
    """Where a member goes below the target ("": the target itself); Rejected if it may not."""
    name, method = member.filename, member.compress_type
    parts = [part for part in name.split("/") if part not in ("", ".")]
    for is_wrong, what in (
            (re.search(_UNPRINTED, member.orig_filename + name),  # zipfile ends filename at a NUL
             "has a control character in its name; rename it"),
            (re.search(_OUTSIDE, name),
             "may leave the zip's folder (absolute, '..', backslash or drive); make it relative"),
            (len(name.encode()) > MAX_NAME_BYTES
             or any(len(part.encode()) > MAX_PART_BYTES for part in parts),
             f"has over {MAX_NAME_BYTES} bytes of name, or {MAX_PART_BYTES} between two '/'"),
            (member.flag_bits & 0x1, "is encrypted; zip it without a password"),
            # a read of 600 bytes of bzip2 can take a gigabyte: zipfile sets no bound to it
            (method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED),
             f"is packed by method {method}; zip it with deflate"),
            (stat.S_IFMT(_mode(member)) not in _MEMBER_KINDS,
             "is a device, a pipe or a socket; leave it out")):
        if is_wrong:
            raise _bad(member, what)
    return "/".join(parts)


def _mode(member: zipfile.ZipInfo) -> int:
    return member.external_attr >> 16 if member.create_system in _UNIX_MADE else 0


def _kind(member: zipfile.ZipInfo | None) -> str:
    if member is None or member.filename.endswith("/"):
        return "folder"
    return _MEMBER_KINDS[stat.S_IFMT(_mode(member))]


def _content(bundle: zipfile.ZipFile, member: zipfile.ZipInfo, most: int) -> Iterator[bytes]:
    """The member's bytes in pieces; Rejected when they are corrupt or more than `most`."""
    try:
        with bundle.open(member) as stream:
            while piece := stream.read(65536):
                most -= len(piece)
                if most < 0:
                    raise _bad(member, f"is too large: a zip may unpack to {MAX_UNPACKED} bytes, "
                                       f"a link to {MAX_NAME_BYTES}")
                yield piece
    except _CORRUPT as error:
        raise _bad(member, f"is corrupt: {_why(error)}; zip it again") from None


def _link_target(path: str, target: str) -> str:
    """`target`, if the link at `path` cannot lead out of the zip, through other links neither.

    A link's parents are real folders, so that '..' at the beginning goes where it says; behind
    a name it would not if that name is a link.
    """
    parts = [part for part in target.split("/") if part not in ("", ".")]
    ups = next((i for i, part in enumerate(parts) if part != ".."), len(parts))
    if (not target or "\0" in target or target.startswith("/")
            or ups > path.count("/") or ".." in parts[ups:]):
        raise Rejected("zip", f"zip member {_quoted(path)} is a link to {_quoted(target)}; it "
                              "must be relative, stay inside and have '..' only at its beginning")
    return target


def _bad(member: zipfile.ZipInfo, what: str) -> Rejected:
    return Rejected("zip", f"zip member {_quoted(member.orig_filename)} {what}")


def find_entry(target: Path, runtime: str) -> str:
    """The file that `runtime` starts with in an unpacked zip; Rejected("entry") if none is there.

    `main` counts only when it is executable; a link to a regular file counts as that file.
    """
    names = (*RUNTIMES[runtime].commands, *RUNTIMES[runtime].compiled)
    there = [name for name in names if (target / name).is_file()]
    for name in there:
        if name != "main" or (target / name).stat().st_mode & 0o111:
            return name
    hint = ""
    if there:
        hint = "; main is there but not executable: chmod +x before zipping"
    elif below := sorted(path for name in names for path in target.glob(f"*/{name}")):
        hint = f"; {_quoted(below[0].parent.name)} has one: zip what is in that folder, not itself"
    raise Rejected("entry", f"the zip has no {' or '.join(names)} at its top{hint}")


# --------------------------------------------------------------------------------------------
# Log
# --------------------------------------------------------------------------------------------

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
_UNSAFE = ("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff"
                     "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")  # bidi controls


def printable(text: str) -> str:
    """The text on one line: controls, line separators and what reorders text are escaped."""
    return re.sub(_UNSAFE, lambda match: match[0].encode("unicode_escape").decode(), text)


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
        """One line; "" when its level is not wanted."""
        if LEVELS.index(level) < self.least:
            return ""
        now = iso(time.time())
        if self.json:
            return json.dumps({"time": now, "level": level, "message": text, **pairs}) + "\n"
        shown = "".join(f" {key}={'-' if value is None else value}" for key, value in pairs.items())
        return f"{now} {level} {printable(text + shown)}\n"

    def write(self, lines: list[str]) -> None:
        """Write lines together; a standard error that is gone or full stops no job."""
        content = "".join(lines).encode("utf-8", "backslashreplace")
        with self.lock, contextlib.suppress(OSError):
            while content:
                content = content[os.write(2, content):]


class Fault:
    """A part of the world that may fail for a while: said when that begins and when it ends."""

    MOST_SECONDS = 10.0

    def __init__(self, log: Log, name: str):
        self.log, self.name = log, name
        self.since: float | None = None
        self.pause = self.retry_at = 0.0

    def failed(self, error: object) -> float:
        """Note a failure; the jittered, growing pause in seconds before the next try."""
        if self.since is None:
            self.since, self.pause = time.monotonic(), 0.2
            self.log("WARNING", f"{self.name} failed: {error}; trying on until it works")
        self.pause = min(self.MOST_SECONDS, self.pause * 2)
        pause = self.pause * (0.5 + int.from_bytes(os.urandom(2), "big") / 131072)
        self.retry_at = time.monotonic() + pause
        return pause

    def note(self, error: object) -> None:
        """Note how a try ended."""
        self.failed(error) if error else self.worked()

    def worked(self) -> None:
        """Note a success."""
        since, self.since, self.retry_at = self.since, None, 0.0
        if since is not None:
            self.log("INFO", f"{self.name} works again after {time.monotonic() - since:.1f} s")

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Note how the block ends; an OSError ends in here."""
        try:
            yield
        except OSError as error:
            self.failed(error)
        else:
            self.worked()


class GiveUp(Exception):
    """The agent cannot go on; str() says why and what to do. Exit status 1."""


# --------------------------------------------------------------------------------------------
# Queue: where messages come from; SQS, or a folder
# --------------------------------------------------------------------------------------------
#
# Both have receive(limit, drain) -> messages, fits(message, ms), end(message, status, result),
# is_empty(), interrupt() and close(). From its receive to its end a message is held: its lease
# is kept alive.

LONGEST_LEASE_SECONDS = MAX_TIMEOUT_MS // 1000  # from the receive, whatever was extended since
BATCH = 10  # entries of one SQS batch request
DELETE_WAIT_SECONDS = 0.1
ERROR_DELAY_SECONDS = 10  # after the first receive; four times that after each further one
REMEMBERED = 100_000  # finished messages whose return would be a duplicate


@dataclass(frozen=True)
class Message:
    """A message that was taken."""

    id: str
    body: str
    receive_count: int
    sent: float  # seconds since the epoch, by the queue's clock
    received: float = field(default_factory=time.monotonic)


@dataclass
class Lease:
    """What keeps a message ours: its newest receipt handle, and until when that holds."""

    message: Message
    receipt: str
    taken: float  # time.monotonic()
    ends: float
    beat: float  # when to renew it
    lost: bool = False
    done: float = 0.0  # when its run had ended ok

    def left(self, now: float) -> float:
        """For how many seconds SQS may still extend it."""
        return LONGEST_LEASE_SECONDS - (now - self.taken) - 1


def error_code(error: Exception) -> str:
    """The code of an AWS answer; the name of the exception where AWS did not answer."""
    response = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code") or type(error).__name__)


def attempt(call: Callable[..., Any], **arguments: Any) -> tuple[Any, Exception | None]:
    """(answer, None) of an AWS call, or (None, error): botocore has no one base for its errors."""
    try:
        return call(**arguments), None
    except Exception as error:  # noqa: BLE001
        return None, error


def is_denied(code: str) -> bool:
    """Whether a code says that a permission is missing."""
    return "AccessDenied" in code or code in ("403", "Forbidden", "AuthorizationError")


class SqsQueue:
    """An SQS queue; one thread of its own deletes, gives back and keeps leases alive."""

    def __init__(self, clients: Clients, settings: Settings, log: Log):
        self.url, self.log, self.settings = settings.queue_url, log, settings
        # Polls wait for long and the rest must not: each has a client with its own time limit.
        self.clients, self.polls = clients, clients.get("sqs", settings.wait_time_seconds + 5)
        self.visibility = 30
        self.may_change: bool | None = None  # sqs:ChangeMessageVisibility; None: not tried yet
        self.condition = threading.Condition()
        self.leases: dict[str, Lease] = {}
        self.finished: OrderedDict[str, None] = OrderedDict()
        self.deletes: dict[str, Lease] = {}  # kept alive too, while no delete succeeds
        self.changes: dict[str, tuple[str, int, float]] = {}  # id -> receipt, seconds, lease's end
        self.closing = False
        self.deleting = Fault(log, "deleting messages")
        self.changing = Fault(log, "extending or giving back messages")
        self._attributes()
        self.courier = threading.Thread(target=self._deliver, name="courier", daemon=True)
        self.courier.start()

    def _attributes(self) -> None:
        """Read the queue's visibility timeout; raises GiveUp when the queue cannot be used."""
        answer, error = attempt(self.polls.get_queue_attributes, QueueUrl=self.url,
                                AttributeNames=["VisibilityTimeout"])
        if not error:
            self.visibility = max(1, int(answer["Attributes"]["VisibilityTimeout"]))
        elif advice := queue_advice(error, self.url):
            raise GiveUp(advice)
        else:
            self.log("WARNING", f"the queue does not answer: {error}; taking its visibility "
                                f"timeout to be {self.visibility} s")

    def receive(self, limit: int, drain: bool) -> list[Message]:
        """At most `limit` messages, after at most waitTimeSeconds; raises what boto3 raises."""
        asked = time.monotonic()
        answer = self.polls.receive_message(
            QueueUrl=self.url, MaxNumberOfMessages=limit, AttributeNames=["All"],
            WaitTimeSeconds=self.settings.wait_time_seconds)
        taken = []
        with self.condition:
            for entry in answer.get("Messages", []):
                attributes = entry.get("Attributes", {})
                message = Message(entry["MessageId"], entry["Body"],
                                  int(attributes.get("ApproximateReceiveCount", 1)),
                                  int(attributes.get("SentTimestamp", 0)) / 1000)
                if self._lease(message, entry["ReceiptHandle"], asked):
                    taken.append(message)
            self.condition.notify_all()
        return taken

    def _lease(self, message: Message, receipt: str, asked: float) -> bool:
        """Hold a message; False when it is a duplicate of one that runs or ended here."""
        now = time.monotonic()
        lease = Lease(message, receipt, now, max(asked, now - 1) + self.visibility,
                      now + self.visibility / 3)
        if message.id in self.finished:
            self.log("INFO", f"message {message.id} came back after it had ended ok: deleted")
            lease.done = now
            self.deletes[message.id] = lease
            return False
        running = self.leases.get(message.id)
        self.leases[message.id] = lease
        if running:
            self.log("WARNING", f"message {message.id} came again while it is running here; "
                                "it is not started twice")
        return running is None

    def end(self, message: Message, status: str, result: object) -> None:
        """Delete a message that succeeded; give back or leave any other."""
        with self.condition:
            lease = self.leases.pop(message.id)
            now = time.monotonic()
            if status == "ok":
                self.finished[message.id] = None
                while len(self.finished) > REMEMBERED:
                    self.finished.popitem(last=False)
            if lease.lost:
                self.log("WARNING", f"message {message.id} ended {status} with its lease lost: "
                                    "it is not deleted or given back from here")
            elif status == "ok":
                lease.done = now
                self.deletes[message.id] = lease
            elif status in ("rejected", "released", "error") and self.may_change is not False:
                delay = 0
                if status == "error":  # a machine that is ill must not empty the queue into the DLQ
                    delay = ERROR_DELAY_SECONDS * 4 ** min(message.receive_count - 1, 6)
                seconds = int(min(delay, lease.left(now)))
                self.changes[message.id] = (lease.receipt, seconds, lease.ends)
            self.condition.notify_all()

    def fits(self, message: Message, timeout_ms: int) -> bool:
        """Whether a run of this length ends within the lease, extended if that is permitted."""
        lease = self.leases[message.id]
        if time.monotonic() + timeout_ms / 1000 + 1 < lease.ends:
            return True
        if self.may_change is None:
            self._change([(message.id, lease.receipt, self.visibility)], beat=True)
        return self.may_change is not False

    def is_empty(self) -> bool:
        """Whether no message is visible; what is in flight elsewhere is not ours."""
        answer = self.clients.get("sqs").get_queue_attributes(
            QueueUrl=self.url, AttributeNames=["ApproximateNumberOfMessages"])
        return int(answer["Attributes"]["ApproximateNumberOfMessages"]) == 0

    def interrupt(self) -> None:
        """A long poll in flight is waited for: its answer may hold messages."""

    def close(self) -> None:
        """Send what is due, for at most 20 seconds."""
        with self.condition:
            self.closing = True
            self.condition.notify_all()
        self.courier.join(20)

    def _deliver(self) -> None:
        """The courier's loop."""
        while True:
            with self.condition:
                while (wait := self._due() - time.monotonic()) > 0:
                    if self.closing and not self.deletes and not self.changes:
                        return
                    self.condition.wait(wait)
                now = time.monotonic()
                # What is too late SQS has back already.
                self.deletes = {key: one for key, one in self.deletes.items() if one.ends >= now}
                self.changes = {key: one for key, one in self.changes.items() if one[2] >= now}
                deletes = [(key, one.receipt) for key, one in list(self.deletes.items())[:BATCH]]
                changes = [(key, *value[:2]) for key, value in list(self.changes.items())[:BATCH]]
                beats = self._beats(now)
            for start in range(0, len(beats), BATCH):
                self._change(beats[start:start + BATCH], beat=True)
            if changes and self.changing.retry_at <= now:
                self._change(changes)
            if deletes and self.deleting.retry_at <= now:
                self._delete(deletes)

    def _due(self) -> float:
        """When the courier has to act next."""
        due = [lease.beat for lease in (*self.leases.values(), *self.deletes.values())
               if not lease.lost]
        if self.changes:
            due.append(self.changing.retry_at)
        if self.deletes:
            first = min(lease.done for lease in self.deletes.values())
            full = 0.0 if len(self.deletes) >= BATCH else first + DELETE_WAIT_SECONDS
            due.append(max(self.deleting.retry_at, full))
        return min(due, default=time.monotonic() + 60)

    def _beats(self, now: float) -> list[tuple[str, str, int]]:
        """The leases to renew now; says which are lost."""
        beats = []
        for key, lease in (*self.leases.items(), *self.deletes.items()):
            if lease.lost or lease.beat > now:
                continue
            if lease.ends <= now or lease.left(now) <= 1:
                lease.lost = True
                self.log("WARNING", f"the lease of message {key} is lost: it may run again "
                                    "elsewhere, and its result will not be deleted from here")
            elif self.may_change is False:
                lease.beat = lease.ends
            else:
                beats.append((key, lease.receipt, min(self.visibility, int(lease.left(now)))))
                lease.beat = now + max(0.5, (lease.ends - now) / 3)  # again, if this one fails
        return beats

    def _delete(self, entries: list[tuple[str, str]]) -> None:
        """DeleteMessageBatch; what fails stays for the next try."""
        answer, error = attempt(
            self.clients.get("sqs").delete_message_batch, QueueUrl=self.url, Entries=[
                {"Id": str(n), "ReceiptHandle": receipt} for n, (_, receipt) in enumerate(entries)])
        answer = answer or {}
        done = [entries[int(entry["Id"])] for entry in answer.get("Successful", [])]
        for entry in answer.get("Failed", []):
            if entry.get("SenderFault"):  # a handle that no longer holds: no use in trying again
                done.append(entries[int(entry["Id"])])
                self.log("WARNING", f"message {done[-1][0]} was not deleted: {entry.get('Code')}; "
                                    "it will be, when it comes back")
            else:
                error = f"DeleteMessageBatch: {entry.get('Code')}"
        self.deleting.note(error)
        with self.condition:
            for key, receipt in done:
                if key in self.deletes and self.deletes[key].receipt == receipt:
                    del self.deletes[key]

    def _change(self, entries: list[tuple[str, str, int]], beat: bool = False) -> None:
        """ChangeMessageVisibilityBatch; what fails is tried again while its lease lasts."""
        asked = time.monotonic()
        answer, error = attempt(
            self.clients.get("sqs").change_message_visibility_batch, QueueUrl=self.url, Entries=[
                {"Id": str(n), "ReceiptHandle": receipt, "VisibilityTimeout": seconds}
                for n, (_, receipt, seconds) in enumerate(entries)])
        if error:
            if is_denied(error_code(error)):
                self._deny()
            else:
                self.changing.note(error)
            return
        self.may_change = True
        failed = [entry for entry in answer.get("Failed", []) if not entry.get("SenderFault")]
        self.changing.note(failed and f"ChangeMessageVisibilityBatch: {failed[0].get('Code')}")
        again = {int(entry["Id"]) for entry in failed}
        lost = {int(entry["Id"]) for entry in answer.get("Failed", [])} - again
        with self.condition:
            for n, (key, receipt, seconds) in enumerate(entries):
                lease = self.leases.get(key) or self.deletes.get(key)
                if n in again:
                    continue
                if not beat:
                    # A message may have come and been given back again since: that one stays due.
                    if self.changes.get(key, ("",))[0] == receipt:
                        del self.changes[key]
                elif lease and lease.receipt == receipt:
                    if n in lost:
                        lease.ends = lease.beat = asked
                    else:
                        lease.ends = asked + seconds
                        lease.beat = asked + seconds / 3

    def _deny(self) -> None:
        """sqs:ChangeMessageVisibility is not granted: said once, and not tried again."""
        with self.condition:
            self.changes.clear()
            if self.may_change is not False:
                self.may_change = False
                self.log("WARNING", "sqs:ChangeMessageVisibility is not granted: leases are not "
                                    f"extended, and tasks over the queue's {self.visibility} s "
                                    "are rejected; add it to the role's policy")


def queue_advice(error: Exception, url: str | None) -> str:
    """What to do about an error that no waiting mends; "" for one that may pass."""
    code = error_code(error)
    if code in ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"):
        return (f"no AWS credentials ({error}); attach the role to the instance, or set "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if "NonExistentQueue" in code or "QueueDoesNotExist" in code:
        return f"the queue {url} does not exist; check agent.sqs.queueUrl and its region"
    if code in ("InvalidClientTokenId", "UnrecognizedClientException", "SignatureDoesNotMatch",
                "InvalidAccessKeyId"):
        return f"AWS does not accept the credentials ({code}); check AWS_ACCESS_KEY_ID or the role"
    if code in ("InvalidAddress", "ValueError", "InvalidEndpoint", "InvalidAddressException"):
        return f"agent.sqs.queueUrl is {url}; AWS does not know it as a queue ({code})"
    if is_denied(code):
        return (f"access to the queue {url} is denied; grant sqs:ReceiveMessage, "
                "sqs:DeleteMessage and sqs:GetQueueAttributes")
    return ""


class Clients:
    """Clients of one session, so that no service model is loaded twice.

    They are those that boto3.client() gives, without boto3's own layer of resources and
    transfers, which costs a third of the start and 3 MiB.
    """

    def __init__(self, settings: Settings):
        try:
            import botocore.loaders
            from botocore.config import Config
            from botocore.session import Session
        except ImportError:
            raise GiveUp("boto3 is not installed for this Python; run: "
                         f"{sys.executable} -m pip install boto3 (--local and --demo do without)"
                         ) from None
        self.session, self.config, self.lock = Session(), Config, threading.Lock()
        self.made: dict[tuple[str, int], Any] = {}
        botocore.loaders.OrderedDict = dict  # which keeps order, too: 3 MiB and 5 ms of the start
        # botocore would read 870 directories at each start to know that these are services.
        self.session.get_component("data_loader").list_available_services = (
            lambda type_name: ("sqs", "s3", "cloudwatch"))
        self.region, self.endpoint = settings.region, settings.endpoint_url
        if self.session.get_credentials() is None:
            raise GiveUp(queue_advice(type("NoCredentialsError", (Exception,), {})("none found"),
                                      None))

    def get(self, service: str, read_seconds: int = 8) -> Any:
        """The client of a service that waits so long for each piece of an answer, and tries once.

        Pauses and repeats are ours. Eight seconds, for a job must go on soon after AWS does.
        """
        with self.lock:  # a session is not safe for threads
            if (service, read_seconds) not in self.made:
                config = self.config(
                    connect_timeout=5, read_timeout=read_seconds, max_pool_connections=50,
                    retries={"total_max_attempts": 1, "mode": "standard"},
                    s3={"addressing_style": "path"} if self.endpoint else {})
                client = self.session.create_client(
                    service, self.region, endpoint_url=self.endpoint, config=config)
                client.meta.events.register("after-call", refuse_cut_answer)
                self.made[service, read_seconds] = client
            return self.made[service, read_seconds]


def refuse_cut_answer(http_response: Any, model: Any, **_: Any) -> None:
    """Raise IncompleteReadError for an answer shorter than it says.

    Not every urllib3 compares the two (1.26 and 2.8.0 were seen not to), and botocore reads half
    a JSON text as an empty answer: no messages, no attributes, no failed entries.
    """
    from botocore.exceptions import IncompleteReadError
    length = http_response.headers.get("content-length", "")
    if model.has_streaming_output or model.http.get("method") == "HEAD" or not length.isdigit():
        return
    if len(http_response.content) != int(length):
        raise IncompleteReadError(actual_bytes=len(http_response.content), expected_bytes=length)


class FolderQueue:
    """A folder as queue: a rename claims, and a lock on the file dies with its holder."""

    RECEIVES = 3
    PARTS = ("queue", "running", "dead", "results", "code")

    def __init__(self, root: Path, log: Log):
        self.root, self.log = root, log
        for name in self.PARTS:
            (root / name).mkdir(parents=True, exist_ok=True)
        self.names: deque[str] = deque()
        self.refused: set[str] = set()  # those that cannot be taken, which was said
        self.locks: dict[str, int] = {}
        self.stopping = False
        self.news, self._waker = os.pipe()
        self.notices = self._watch()
        self.fault = Fault(log, f"writing to {root}")
        self.recover()

    def _watch(self) -> int:
        """An inotify(7) descriptor for new tasks; -1 where there is none (then it looks)."""
        import ctypes
        libc = ctypes.CDLL(None)
        fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        moved_to, close_write = 0x80, 0x8
        if fd >= 0:
            libc.inotify_add_watch(fd, os.fsencode(self.root / "queue"), moved_to | close_write)
        return fd

    def recover(self) -> None:
        """Put the tasks of agents that died back; their take counts."""
        for name in os.listdir(self.root / "running"):
            lock = None if name.startswith(".") else self._lock(f"running/{name}")
            if lock is not None:
                try:
                    self._put_back(name, self._takes(name) + 1)
                finally:
                    os.close(lock)

    def _lock(self, name: str) -> int | None:
        """Lock a task's file; None when another has it, or it is gone."""
        path = f"{self.root}/{name}"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._refuse(path, error)
            return None
        try:
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                self._refuse(path, "it is a folder")
                raise IsADirectoryError
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.lstat(path)):
                return fd
        except OSError:
            pass
        os.close(fd)
        return None

    def _refuse(self, path: str, why: object) -> None:
        """Say once that a task cannot be taken; no drain waits for it."""
        if path not in self.refused:
            self.refused.add(path)
            self.log("WARNING", f"{path} cannot be taken: {why}")

    def _move(self, old: str, new: str) -> None:
        os.rename(f"{self.root}/{old}", f"{self.root}/{new}")

    def _put_back(self, name: str, takes: int) -> str:
        """Put a running task back; its name in the queue, another where a new task has that."""
        new, number = name, 0
        while os.path.lexists(f"{self.root}/queue/{new}"):
            number += 1
            new = f"{name[:-5]}.{number}.json"
        if new != name:
            self._count(name, 0)
        if takes:
            self._count(new, takes)
        self._move(f"running/{name}", f"queue/{new}")
        return new

    def _takes(self, name: str) -> int:
        """How often a task was taken before."""
        try:
            return int((self.root / "queue" / f".{name}.takes").read_text())
        except (OSError, ValueError):
            return 0

    def _count(self, name: str, takes: int) -> None:
        path = self.root / "queue" / f".{name}.takes"
        with self.fault.noted():  # a take that is not counted is one more try
            if takes:
                path.write_text(str(takes))
            else:
                path.unlink(missing_ok=True)

    def receive(self, limit: int, drain: bool) -> list[Message]:
        """At most `limit` tasks, after at most a second; a drain does not wait."""
        taken = self._take(limit)
        if not taken and not self.stopping and not drain:
            select.select([fd for fd in (self.notices, self.news) if fd >= 0], [], [],
                          1 if self.notices >= 0 else 0.05)
            if self.notices >= 0:
                read_nonblocking(self.notices)
            taken = self._take(limit)
        return taken

    def _take(self, limit: int) -> list[Message]:
        if not self.names:
            # One listing serves until it is used up: each receive costs the same at any depth.
            self.names.extend(sorted(filter(is_task, os.listdir(self.root / "queue"))))
        taken: list[Message] = []
        while self.names and len(taken) < limit:
            name = self.names.popleft()
            if os.path.lexists(f"{self.root}/running/{name}"):
                continue  # one of that name is under way, and would be overwritten
            lock = self._lock(f"queue/{name}")
            if lock is None:
                continue
            try:
                status = os.fstat(lock)
                body = (os.pread(lock, status.st_size, 0) if status.st_size else b"").decode(
                    "utf-8", "surrogateescape")
                self._move(f"queue/{name}", f"running/{name}")
            except OSError as error:
                os.close(lock)
                self._refuse(f"{self.root}/queue/{name}", error)
                continue
            self.locks[name] = lock
            taken.append(Message(name, body, self._takes(name) + 1, status.st_mtime))
        return taken

    def end(self, message: Message, status: str, result: object) -> None:
        """Remove a task that succeeded; take another again at once, or bury it the third time."""
        # Once its file has moved, another of its name may be taken, and have a lock of its own.
        lock = self.locks.pop(message.id)
        try:
            self._put_away(message.id, message.receive_count, status, result)
        finally:
            os.close(lock)

    def _put_away(self, name: str, takes: int, status: str, result: object) -> None:
        if takes > 1 and (status == "ok" or status != "released" and takes >= self.RECEIVES):
            self._count(name, 0)
        if status == "ok":
            os.unlink(f"{self.root}/running/{name}")
        elif status == "released":  # a take that was given back does not count
            self._put_back(name, takes - 1)
        elif takes >= self.RECEIVES:
            with self.fault.noted():  # without it, the log still says why the task failed
                write_json(f"{self.root}/dead", f"{name[:-5]}.result.json", result)
            self._move(f"running/{name}", f"dead/{name}")
        else:
            self.names.append(self._put_back(name, takes))

    def fits(self, message: Message, timeout_ms: int) -> bool:
        """A folder's lease has no end."""
        return True

    def is_empty(self) -> bool:
        """Whether no task waits."""
        self.recover()
        return not self.names and not any(
            is_task(name) and f"{self.root}/queue/{name}" not in self.refused
            for name in os.listdir(self.root / "queue"))

    def interrupt(self) -> None:
        """End a wait in receive()."""
        self.stopping = True
        os.write(self._waker, b"\n")

    def close(self) -> None:
        """Nothing is left to send."""


def is_task(name: str) -> bool:
    """Whether a name in queue/ is a task's."""
    return name.endswith(".json") and name[0] != "."


def read_nonblocking(fd: int) -> bytes:
    """What a non-blocking descriptor has now."""
    try:
        return os.read(fd, 65536)
    except BlockingIOError:
        return b""


def write_json(directory: str, name: str, value: object) -> None:
    """Write a file that is there whole or not at all."""
    content = json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
    part = f"{directory}/.{name}.part"
    with open(part, "wb", buffering=0) as file:
        file.write(content)
    os.rename(part, f"{directory}/{name}")


# --------------------------------------------------------------------------------------------
# Code: fetched once for each version, checked, unpacked, and kept
# --------------------------------------------------------------------------------------------

CLOCK_SKEW_SECONDS = 2  # between S3's Date and SQS's SentTimestamp; Date has whole seconds
CACHE_BYTES = 8 * 1024 * MIB  # packages in no use are dropped beyond this, oldest use first


@dataclass
class Package:
    """An unpacked zip: a directory that no function can write to."""

    path: Path
    etag: str
    entry: str
    size: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0
    used: float = 0.0
    asked: float = 0.0  # time.monotonic() before the source was last asked whether it has this
    confirmed: float = 0.0  # the source's own time when it said so

    def serves(self, message: Message) -> bool:
        """Whether this is right for a message without asking: confirmed after that was sent.

        What was asked after the message was here is, without a look at any clock but ours.
        """
        return (message.received < self.asked
                or message.sent + CLOCK_SKEW_SECONDS < self.confirmed)


class S3Code:
    """The zips as S3 has them."""

    def __init__(self, clients: Clients):
        self.clients = clients

    def get(self, task: Task, known: str, target: Path) -> tuple[str, float]:
        """Write the zip to `target`, unless `known` is still its ETag; (ETag, when S3 said so).

        Raises Rejected when there is no such object, MachineFault and OSError otherwise.
        """
        condition = {"IfNoneMatch": known} if known else {}
        answer, error = attempt(self.clients.get("s3").get_object, Bucket=task.bucket,
                                Key=task.key, **condition)
        if error:
            if error_code(error) in ("304", "NotModified"):
                return known, s3_time(error.response)
            raise self._explain(error, task)
        self._download(answer, target, f"s3://{task.bucket}/{task.key}")
        return answer["ETag"], s3_time(answer)

    @staticmethod
    def _download(answer: Mapping[str, Any], target: Path, where: str) -> None:
        """Write a body to a file, whole or not at all: its length is checked before it counts."""
        written = 0
        with contextlib.closing(answer["Body"]), open(target, "wb") as file:
            while True:
                chunk, error = attempt(answer["Body"].read, amt=256 * 1024)
                if error or not chunk:
                    break
                written += len(chunk)
                if written > MAX_UNPACKED:
                    raise Rejected("zip", f"{where} is over 250 MiB; make the package smaller")
                file.write(chunk)
        if error or written != answer["ContentLength"]:
            raise MachineFault("s3", f"{where} was cut short: {written} of "
                                     f"{answer['ContentLength']} bytes came ({error})")

    @staticmethod
    def _explain(error: Exception, task: Task) -> Exception:
        """What an error of GetObject means for the task: its own fault, or the machine's."""
        code = error_code(error)
        where = f"s3://{task.bucket}/{task.key}"
        if code == "NoSuchKey":
            return Rejected("key", f"{where} does not exist; upload it, or correct s3Key")
        if code == "NoSuchBucket":
            return MachineFault("bucket", f"the bucket {task.bucket} does not exist; check "
                                          "agent.s3.codeBucket")
        if is_denied(code):
            return MachineFault("permission", f"{where} is denied; the role needs s3:GetObject on "
                                f"arn:aws:s3:::{task.bucket}/* and s3:ListBucket on the bucket "
                                "(without it a missing key looks like this too)")
        return MachineFault("s3", f"{where}: {error}")


class MachineFault(Exception):
    """A part of the machine or of AWS failed: the run ends as `error`."""

    def __init__(self, reason: str, text: str):
        super().__init__(text)
        self.reason = reason


def s3_time(answer: Mapping[str, Any]) -> float:
    """The time of an answer by S3's own clock, in seconds since the epoch."""
    from email.utils import parsedate_to_datetime
    try:
        return parsedate_to_datetime(
            answer["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return 0.0  # never trusted: asked again each time


class FolderCode:
    """The zips of DIR/code; a file's identity is its ETag."""

    def __init__(self, root: Path):
        self.root = root / "code"

    def get(self, task: Task, known: str, target: Path) -> tuple[str, float]:
        """As S3Code.get, for a file."""
        path = f"{self.root}/{task.key}"
        try:
            if known and file_etag(os.stat(path)) == known:
                return known, 0.0
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise Rejected("key", f"{path} is no file")
                with open(target, "wb") as copy:
                    shutil.copyfileobj(file, copy)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise Rejected("key", f"{path} does not exist; put the zip there, or correct s3Key"
                           ) from None
        return file_etag(status), 0.0


def file_etag(status: os.stat_result) -> str:
    """What changes when a file is overwritten or replaced."""
    return f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}"


class CodeCache:
    """Unpacked packages by (bucket, key), each as its source had it when last asked."""

    def __init__(self, source: S3Code | FolderCode, directory: Path):
        self.source, self.directory = source, directory
        self.lock = threading.Lock()
        self.key_locks: defaultdict[tuple[str, str, str], threading.Lock] = defaultdict(
            threading.Lock)
        self.packages: dict[tuple[str, str, str], Package] = {}
        self.replaced: list[Package] = []
        self.serial = 0

    def get(self, task: Task, message: Message) -> Package:
        """The package of a message's task, as its source has it; to be given to release()."""
        key = (task.bucket, task.key, task.runtime)
        with self.lock:
            key_lock = self.key_locks[key]
        with key_lock:
            package = self.packages.get(key)
            if package is None or not package.serves(message):
                package = self._refresh(key, task, package)
            with self.lock:
                package.users += 1
                package.used = time.monotonic()
            return package

    def release(self, package: Package) -> None:
        """Say that a run no longer needs its package."""
        with self.lock:
            package.users -= 1

    def _refresh(self, key: tuple[str, str, str], task: Task, old: Package | None) -> Package:
        with self.lock:
            self.serial += 1
            place = self.directory / str(self.serial)
        archive = place.with_suffix(".zip")
        asked = time.monotonic()
        try:
            etag, confirmed = self.source.get(task, old.etag if old else "", archive)
            if old and etag == old.etag:
                old.asked, old.confirmed = asked, confirmed
                return old
            place.mkdir(mode=0o755)
            unpack(archive, place)
            package = Package(place, etag, find_entry(place, task.runtime), tree_size(place),
                              asked=asked, confirmed=confirmed)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
        finally:
            archive.unlink(missing_ok=True)
        self._store(key, package)
        return package

    def _store(self, key: tuple[str, str, str], package: Package) -> None:
        """Take a new package in; drop what it replaces, and old ones that nobody uses."""
        with self.lock:
            if old := self.packages.get(key):
                self.replaced.append(old)
            self.packages[key] = package
            gone = [one for one in self.replaced if not one.users]
            self.replaced = [one for one in self.replaced if one.users]
            total = sum(one.size for one in self.packages.values())
            for name, one in sorted(self.packages.items(), key=lambda item: item[1].used):
                if total > CACHE_BYTES and not one.users and one is not package:
                    gone.append(self.packages.pop(name))
                    total -= one.size
        for one in gone:
            for path in (one.path, built_path(one.path)):
                shutil.rmtree(path, ignore_errors=True)


def built_path(path: Path) -> Path:
    """Where the package of `path` stands with its program compiled."""
    return path.with_suffix(".built")


def tree_size(path: Path) -> int:
    """Bytes of all files below a directory of ours."""
    return sum(entry.lstat().st_size for entry in path.rglob("*"))


# --------------------------------------------------------------------------------------------
# Results and metrics: where outcomes go
# --------------------------------------------------------------------------------------------


# S3 takes keys of 1,024 bytes of UTF-8, of which requestId may have 128 and s3Prefix has as many.
LONGEST_OUTPUT = 768


def output_files(directory: str, uid: int | None) -> tuple[list[str], int]:
    """The regular files a function left in $OUTPUT_DIR, as relative names; links are passed over.

    A file that is not its own counts only if anybody may read it: it could be a hard link to
    something that the function may not. Also how many entries have names that cannot be stored.
    """
    found, unnamed = [], 0
    pending = [""] if os.path.isdir(directory) and not os.path.islink(directory) else []
    for relative in pending:
        for entry in sorted(os.scandir(os.path.join(directory, relative)), key=lambda e: e.name):
            name = os.path.join(relative, entry.name)
            status = entry.stat(follow_symlinks=False)
            text = name.encode("utf-8", "ignore")
            if len(text) > LONGEST_OUTPUT or text != os.fsencode(name) or text == b"result.json":
                unnamed += 1
            elif stat.S_ISDIR(status.st_mode):
                pending.append(name)
                if uid is None:
                    os.chmod(entry.path, 0o700)
            elif stat.S_ISREG(status.st_mode) and (
                    uid is None or status.st_uid == uid or status.st_mode & 0o004):
                found.append(name)
    return sorted(found), unnamed


class FolderResults:
    """DIR/results/<requestId>/."""

    def __init__(self, root: Path):
        self.root = root / "results"

    def put(self, result: dict[str, Any], directory: str, names: list[str]) -> None:
        """Keep a result, and the files `names` that are moved out of `directory`."""
        target = f"{self.root}/{result['requestId']}"
        os.makedirs(target, exist_ok=True)
        for name in names:
            copy = Path(target, name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(os.path.join(directory, name), copy)
            if os.geteuid() == 0:
                os.chown(copy, 0, 0)
            os.chmod(copy, 0o644)
        write_json(target, "result.json", result)


class AwsResults:
    """s3://output.bucket/s3Prefix/requestId/ and output.queueUrl, each when it is set."""

    def __init__(self, clients: Clients, settings: Settings):
        self.clients, self.settings = clients, settings

    def put(self, result: dict[str, Any], directory: str, names: list[str]) -> None:
        """Upload the files, then result.json; raises botocore's errors and OSError."""
        text = json.dumps(result, ensure_ascii=True)
        if bucket := self.settings.output_bucket:
            put = self.clients.get("s3").put_object
            parts = self.settings.output_prefix, result["requestId"]
            prefix = "".join(f"{part}/" for part in parts if part)
            for name in names:
                fd = os.open(os.path.join(directory, name), os.O_RDONLY | os.O_NOFOLLOW)
                with open(fd, "rb") as body:
                    put(Bucket=bucket, Key=prefix + name, Body=body)
            put(Bucket=bucket, Key=prefix + "result.json", Body=text.encode(),
                ContentType="application/json")
        if queue_url := self.settings.output_queue_url:
            self.clients.get("sqs").send_message(QueueUrl=queue_url, MessageBody=text)


class FolderMetrics:
    """DIR/metrics.jsonl."""

    def __init__(self, root: Path, namespace: str, log: Log):
        self.path, self.namespace, self.log = root / "metrics.jsonl", namespace, log
        self.fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self.count = 0
        self.lock = threading.Lock()
        self.fault = Fault(log, f"writing {self.path}")

    def put(self, function_id: str, runtime: str, peak_bytes: int) -> None:
        """Append one value; a disk that is full loses it, and ends no job."""
        line = json.dumps({"timestamp": iso(time.time()), "namespace": self.namespace,
                           "metricName": "PeakMemoryBytes", "value": peak_bytes, "unit": "Bytes",
                           "dimensions": {"FunctionId": function_id, "Runtime": runtime}})
        with self.lock, self.fault.noted():
            os.write(self.fd, line.encode() + b"\n")
            self.count += 1

    def close(self) -> None:
        """Say how many there were."""
        os.close(self.fd)
        if self.count:
            self.log("INFO", f"Successfully published {self.count} values to {self.path}")


class CloudWatchMetrics:
    """PeakMemoryBytes in CloudWatch, in batches; kept, bounded, while CloudWatch is down."""

    MOST_KEPT = 100_000
    VALUES = 150  # PutMetricData's limit for one datum
    DATA = 60  # of one request: its limit is 1,000, but also 1 MB, which these fit into

    def __init__(self, clients: Clients, settings: Settings, log: Log):
        self.clients, self.settings, self.log = clients, settings, log
        self.values: deque[tuple[str, str, int]] = deque()
        self.dropped = 0
        self.fault = Fault(log, "publishing metrics to CloudWatch")
        self.stopping = threading.Event()
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self._publish, name="metrics", daemon=True)
        self.thread.start()

    def put(self, function_id: str, runtime: str, peak_bytes: int) -> None:
        """Keep one value for the next flush."""
        with self.lock:
            self.values.append((function_id, runtime, peak_bytes))
            self._bound()

    def _bound(self) -> None:
        """Drop the oldest values beyond what is kept."""
        while len(self.values) > self.MOST_KEPT:
            self.values.popleft()
            self.dropped += 1

    def close(self) -> None:
        """Flush a last time."""
        self.stopping.set()
        self.thread.join(25)

    def _publish(self) -> None:
        pause: float = self.settings.flush_seconds
        while not self.stopping.wait(pause):
            pause = self._flush() or self.settings.flush_seconds
        self._flush()

    def _flush(self) -> float:
        """Send what is kept now; 0, or the pause before another try."""
        groups: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
        with self.lock:
            for function_id, runtime, peak in self.values:
                groups[function_id, runtime].append(peak)
            self.values.clear()
        data = [(key, peaks[start:start + self.VALUES]) for key, peaks in groups.items()
                for start in range(0, len(peaks), self.VALUES)]
        sent, error = 0, None
        while data and not error:
            _, error = attempt(self._send, data=[self._datum(*key, peaks)
                                                 for key, peaks in data[:self.DATA]])
            if not error:
                sent += sum(len(peaks) for _, peaks in data[:self.DATA])
                del data[:self.DATA]
        if sent:
            self.fault.worked()
            lost = f" ({self.dropped} older ones were dropped)" if self.dropped else ""
            self.dropped = 0
            self.log("INFO", f"Successfully published {sent} values to CloudWatch{lost}")
        if not error:
            return 0
        with self.lock:  # those that came meanwhile are younger, and there may be too many now
            self.values.extendleft((*key, peak) for key, peaks in data for peak in peaks)
            self._bound()
        hint = " (grant cloudwatch:PutMetricData)" if is_denied(error_code(error)) else ""
        return self.fault.failed(f"{error}{hint}")

    def _send(self, data: list[dict[str, Any]]) -> None:
        self.clients.get("cloudwatch").put_metric_data(Namespace=self.settings.namespace,
                                                       MetricData=data)

    @staticmethod
    def _datum(function_id: str, runtime: str, values: list[int]) -> dict[str, Any]:
        counts = Counter(map(float, values))
        return {"MetricName": "PeakMemoryBytes", "Unit": "Bytes", "Values": list(counts),
                "Counts": list(map(float, counts.values())),
                "Dimensions": [{"Name": "FunctionId", "Value": function_id},
                               {"Name": "Runtime", "Value": runtime}],
                "Timestamp": time.time()}


# --------------------------------------------------------------------------------------------
# Launcher: the process that forks, limits, watches, ends and measures functions
# --------------------------------------------------------------------------------------------
#
#   agent ─(one socket)─ launcher ─┬─ supervisor of slot 0 ─┬─ fork shell ─ function (exec'd)
#                                  │                        └─ ready interpreter ─ function (python)
#                                  └─ supervisor of slot 1 …
#
# A supervisor runs one function at a time and blocks on it, so there is never a doubt whose
# orphan is whose: it is a subreaper, and whatever stands below it but for its two helpers
# belongs to the run. The launcher is subreaper behind the supervisors, the agent behind the
# launcher, for a function without a uid of its own may kill any of them.

KEPT_BYTES = 32 * 1024  # of each output, from its start and from its end
LOOK_SECONDS = 0.010  # how often the watcher looks at a run's memory
FILL_BYTES_PER_SECOND = 16 << 30  # more than the processors here write
DISK_LOOK_SECONDS, COUNT_SECONDS = 0.25, 2  # the same for its disk; for counting its files
READY_RUNS = 1000  # runs of one ready interpreter: they share its hash seed
FIRST_UID, LAST_UID = 60600, 61183  # systemd.io/UIDS-GIDS: 60578 to 61183 are unused
PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_CHILD_SUBREAPER = 4, 38, 36  # linux/prctl.h
PR_SET_SECUREBITS, SECBIT_NOROOT = 28, 1
CLOCK_REALTIME_COARSE = 5  # linux/time.h: the clock of inode time stamps

# Forks what is exec'd. A child's ru_maxrss starts at the size of the process it was forked from
# (exec folds the old image's high-water mark into it), which from this one would be 7 MB and
# more; from a shell it is 1.5. The function must end as the supervisor's own child, whose rusage
# wait4 gives: so it waits in the shell's grandchild until the shell's child between them, which
# it kills itself, is gone. Background jobs would do without that kill, but have SIGINT ignored.
FORK_SHELL = """
while read -r go <&3; do
  ( cd -P /proc/self && parent=${PWD#/proc/}
    ( cd -P /proc/self && pid=${PWD#/proc/}
      kill -9 "$parent"
      echo "$pid" >&3
      read -r go <&4 && . "$0" ) ; : )
  echo >&3
done
"""

# The ready interpreter: started as `python main.py` in a directory that holds this as main.py,
# so that argv, flags and /proc/self/cmdline are what they would be; forked once for each run.
# Nothing that is imported here may be seen by the function. The code of the function runs from
# the lowest frame, one below which there would be none in a bare run.
READY_PYTHON = r'''
bare = dict(globals())
import sys
import os
here = {name: (module, set(vars(module))) for name, module in sys.modules.items()}
looked_at = list(sys.path_importer_cache)
import _weakref as weakref
import atexit, ctypes, gc, marshal, resource
os.chdir("/")
prctl = ctypes.CDLL(None).prctl
compile("", "", "exec")  # makes the types of syntax trees: 0.6 ms that no fork need spend again
extra = [name for name in sys.modules if name not in here]

def serve(channel=3):
    """Fork for each request; return it in the child."""
    prctl(4, 0, 0, 0, 0)  # not dumpable: no process of the same user may trace it
    gc.collect()
    gc.freeze()
    os.write(channel, b"ready")
    while True:
        request = os.read(channel, 1 << 20)
        if not request:
            os._exit(0)
        child = os.fork()
        if not child:
            return channel, marshal.loads(request)
        pid = 0
        while pid != child:  # clone(CLONE_PARENT) makes others its children
            pid, status, usage = os.wait4(-1, 0)
        os.write(channel, marshal.dumps((status, usage.ru_maxrss), 2))

def become(channel, request):
    """Turn this fork into the process of the request; its global names and its code."""
    os.setsid()
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        opened = os.open(request["directory"] + "/" + name, os.O_WRONLY if fd else os.O_RDONLY)
        os.dup2(opened, fd)
        os.close(opened)
    for name, value in request["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if request["uid"] is not None:
        os.setgroups(request["groups"])
        os.setresgid(*[request["gid"]] * 3)
        os.setresuid(*[request["uid"]] * 3)
    prctl(4, 1, 0, 0, 0)  # dumpable again: a change of uid took that away, too
    os.chdir(request["directory"] + "/work")
    for name, value in request["env"].items():  # update() would touch 60 pages more
        os.environ[name] = value
        sys.modules["posix"].environ[name.encode()] = os.fsencode(value)
    os.write(channel, b"%d" % os.getpid())  # from here on the time is the function's
    os.close(channel)
    path = os.getcwd() + "/main.py"
    for name in set(sys.path_importer_cache).difference(looked_at):
        del sys.path_importer_cache[name]
    sys.path[0] = os.getcwd()
    for name in extra:
        del sys.modules[name]
    main = type(sys)("__main__")
    main.__dict__.update(bare, __file__=path)
    main.__loader__.path = path
    with open(path, "rb") as file:
        source = file.read()
    try:
        code = compile(source, path, "exec", dont_inherit=True)
    except Exception:  # the interpreter itself words this best
        os.execv(sys.executable, [sys.executable, "main.py"])
    sys.modules["__main__"] = main
    return main.__dict__, code

# Standard modules in C whose objects write something when they go, and have no finalizer.
KEEPERS = {"_sqlite3", "_dbm", "_gdbm", "_curses", "readline", "_tkinter"}

def keeps(module):
    """Whether objects of a module in C may do something at their end that only C knows of."""
    origin = getattr(getattr(module, "__spec__", None), "origin", None) or ""
    return module.__name__ in KEEPERS or origin.endswith(".so") and "/lib-dynload/" not in origin

def has_end(thing):
    """Whether the end of this object could be seen: something of it is still to run."""
    kind = type(thing)
    if kind is weakref.ref:
        return getattr(thing.__callback__, "__module__", 0) not in (None, "_weakrefset", "weakref")
    if isinstance(thing, type):  # instances that the collector does not track are found by it
        return "__del__" in vars(thing) and not thing.__flags__ & 1 << 14
    if not hasattr(kind, "__del__"):
        return False
    for frame in "gi_frame", "cr_frame", "ag_frame":
        if hasattr(kind, frame):
            return getattr(thing, frame) is not None
    if kind.__module__ == "_io":
        return not thing.closed and kind.__name__ not in ("BytesIO", "StringIO")
    return kind.__module__ != "socket" or thing.fileno() >= 0

def is_plain():
    """Whether the interpreter would do nothing at its end that could be seen."""
    if (sys.modules.get("atexit", atexit)._ncallbacks() or gc.callbacks or sys.gettrace()
            or sys.getprofile() or sys.stdout is not sys.__stdout__
            or sys.stderr is not sys.__stderr__):
        return False
    made = [module for name, module in sys.modules.items() if name not in here]
    return not any(map(keeps, made)) and not any(map(has_end, gc.get_objects()))

def leave(status):
    """End the process; by the interpreter, which touches every inherited page, only if need be."""
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
    sys.exit(status)

names, code = become(*serve())
try:
    exec(code, names)
    status = 0
except SystemExit as error:
    status = 0 if error.code is None else error.code
    if type(status) is not int or not 0 <= status <= 255:
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
leave(status)
'''


@dataclass(frozen=True)
class Place:
    """Where a slot runs, and as whom: what the agent tells the launcher of it."""

    directory: str
    uid: int | None  # None: as the agent's own user
    gid: int | None
    groups: tuple[int, ...]
    private: bool  # nobody else has this uid: whatever runs under it belongs to the slot
    shell: str
    limits: dict[str, int]  # RLIMIT_… names of the resource module -> value


@dataclass(frozen=True)
class Job:
    """One run, as the agent asks a supervisor for it."""

    command: tuple[str, ...]
    warm: str  # the interpreter to keep ready for it; "" for none
    env: dict[str, str]
    package: str  # directory with the code
    input: str
    timeout_ms: int
    memory_mb: int
    disk_mb: int
    files: int
    tee: bool  # pass the outputs through as they come


def prctl(option: int, value: int) -> None:
    """prctl(2); raises OSError."""
    import ctypes  # not at the top: it would be a fiftieth of the agent's start
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}): {os.strerror(ctypes.get_errno())}")


def read_proc(path: str) -> bytes:
    """The content of a file of /proc; empty when its process is gone or not ours to see."""
    with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
        return file.read()
    return b""


def children_of(pid: int) -> list[int]:
    """The children of all threads of a process (proc(5), CONFIG_PROC_CHILDREN)."""
    with contextlib.suppress(OSError):
        return [int(child) for task in os.listdir(f"/proc/{pid}/task")
                for child in read_proc(f"/proc/{pid}/task/{task}/children").split()]
    return []


def descendants(helpers: Collection[int] = (), others: Collection[int] = ()) -> list[int]:
    """All below this process, but for `helpers` alone, and `others` with all below them."""
    found = [pid for parent in (os.getpid(), *helpers) for pid in children_of(parent)
             if pid not in helpers and pid not in others]
    for pid in found:
        found.extend(children_of(pid))
    return found


def signal_all(pids: Iterable[int], number: int) -> None:
    """Send a signal to each of these that is still there and ours."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def end_descendants(helpers: Collection[int] = (), others: Collection[int] = ()) -> None:
    """Kill and reap all `descendants`; stopped first, to fork no more: a fork bomb ends, too."""
    stopped: set[int] = set()
    while below := descendants(helpers, others):
        new = set(below) - stopped
        signal_all(new or below, signal.SIGSTOP if new else signal.SIGKILL)
        stopped |= new
        if not new:
            for pid in below:
                with contextlib.suppress(ChildProcessError):  # another's child
                    os.waitpid(pid, os.WNOHANG)
            time.sleep(0.001)


def resident(pids: list[int]) -> dict[int, int]:
    """The resident bytes of each of these processes; cheap, and pages they share count for each."""
    return {pid: int((read_proc(f"/proc/{pid}/statm").split() or [0, 0])[1]) * PAGE for pid in pids}


def resident_together(pids: list[int]) -> int:
    """The resident bytes of these processes, shared pages once; walks their page tables."""
    shares = re.findall(rb"^Pss: +(\d+)", b"".join(
        read_proc(f"/proc/{pid}/smaps_rollup") for pid in pids), re.MULTILINE)
    return sum(map(int, shares)) * 1024


def sweep(path: str, trash: str) -> None:
    """Empty a directory whatever a function left in it: no modes, no depth and no link stop it.

    Nothing may be running that could change it. Moved up into `trash`, no path grows long.
    """
    pending = [path]
    while pending:
        directory = pending.pop()
        os.chmod(directory, 0o700)
        for entry in os.scandir(directory):
            if entry.is_dir(follow_symlinks=False):
                os.chmod(entry.path, 0o700)
                pending.append(f"{trash}/{time.monotonic_ns()}")
                os.rename(entry.path, pending[-1])
            else:
                os.unlink(entry.path)
        if directory != path:
            os.rmdir(directory)


def disk_usage(paths: list[str], most_files: int) -> tuple[int, int]:
    """(bytes, files) below these directories; stops counting beyond `most_files`."""
    size = count = 0
    pending = list(paths)
    while pending and count <= most_files:
        with contextlib.suppress(OSError):  # it changes while we look
            for entry in os.scandir(pending.pop()):
                count += 1
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                else:
                    status = entry.stat(follow_symlinks=False)
                    size += status.st_blocks * 512 // status.st_nlink
    return size, count


class Workspace:
    """A slot's private directories, made pristine before a run for the price of what changed.

    A directory whose ctime is what it was has the entries that it had (ctime cannot be set).
    With a uid of its own a function cannot write to the package's files, root's, so they are
    linked; else they are copied, and each one's own ctime is looked at.
    """

    def __init__(self, place: Place):
        self.place = place
        self.private = [f"{place.directory}/{name}" for name in ("home", "tmp", "output")]
        self.linked = place.uid not in (None, os.getuid())
        self.package = ""
        self.wanted: dict[str, dict[str, os.stat_result]] = {}  # directory -> name -> lstat
        self.seen: dict[str, tuple[int, int]] = {}  # path -> (inode, ctime) as it was made

    def prepare(self, package: str, text: str) -> None:
        """Make every directory what the run of `package` shall find; raises OSError."""
        if package != self.package:
            self.wanted, self.package = self._scan(package), package
            self.seen.clear()
        root = self.place.directory
        self._have(f"{root}/trash", is_directory, os.mkdir)
        sweep(f"{root}/trash", f"{root}/trash")
        for path in self.private:
            self._restore(path, "", {}, 0o700)
        for source, entries in self.wanted.items():
            self._restore(f"{root}/work{source[len(package):]}", source, entries, 0o755)
        self._renew_streams(text)
        # A change in the clock tick of a mark would not show: marks so young are forgotten.
        now = time.clock_gettime_ns(CLOCK_REALTIME_COARSE)
        self.seen = {path: mark for path, mark in self.seen.items() if mark[1] < now}

    def _renew_streams(self, text: str) -> None:
        """Have an input that holds `text`, outputs, and room for the fork shell's script."""
        root = self.place.directory
        for name in "stdin", "run":
            self._have(f"{root}/{name}", is_free_file, os.mknod)
        for name in "stdout", "stderr":
            self._have(f"{root}/{name}", is_free_fifo, os.mkfifo)
        write_over(f"{root}/stdin", text.encode("utf-8", "surrogateescape"))
        for name in "stdin", "stdout", "stderr":  # its own: it may open /dev/stdout again
            self._own(f"{root}/{name}", 0o600)

    @staticmethod
    def _scan(package: str) -> dict[str, dict[str, os.stat_result]]:
        """What every directory of a package holds, parents first."""
        found: dict[str, dict[str, os.stat_result]] = {}
        for directory in (pending := [package]):
            entries = list(os.scandir(directory))
            found[directory] = {each.name: each.stat(follow_symlinks=False) for each in entries}
            pending += [each.path for each in entries if each.is_dir(follow_symlinks=False)]
        return found

    def _restore(self, path: str, source: str, entries: dict, mode: int) -> None:
        """Give a directory just these entries of `source`, unless it has them still."""
        self._have(path, is_directory, os.mkdir)
        if self.seen.get(path) == mark_of(os.lstat(path)) and (self.linked or all(
                self._same(entry, entries[entry.name]) for entry in os.scandir(path))):
            return
        self._own(path, mode)
        missing = dict(entries)
        for entry in list(os.scandir(path)):
            if entry.name in entries and self._same(entry, entries[entry.name]):
                del missing[entry.name]
            else:
                self._remove(entry.path)
        for name, want in missing.items():
            self._make(f"{path}/{name}", f"{source}/{name}", want)
        self.seen[path] = mark_of(os.lstat(path))

    def _same(self, entry: os.DirEntry, want: os.stat_result) -> bool:
        """Whether an entry is still what the package has there."""
        if stat.S_ISDIR(want.st_mode):
            return entry.is_dir(follow_symlinks=False)
        if self.linked and not stat.S_ISLNK(want.st_mode):
            return entry.inode() == want.st_ino
        return self.seen.get(entry.path) == mark_of(entry.stat(follow_symlinks=False))

    def _make(self, path: str, source: str, want: os.stat_result) -> None:
        if stat.S_ISDIR(want.st_mode):
            os.mkdir(path)
        elif self.linked and not stat.S_ISLNK(want.st_mode):
            os.link(source, path)
        else:
            shutil.copy(source, path, follow_symlinks=False)
            self.seen[path] = mark_of(os.lstat(path))

    def _have(self, path: str, is_right: Callable[[str], bool],
              make: Callable[[str], None]) -> None:
        """Have what `make` makes at `path`, whatever a function put there."""
        if os.path.lexists(path):
            if is_right(path):
                return
            self._remove(path)
        make(path)

    def _remove(self, path: str) -> None:
        if is_directory(path):
            sweep(path, f"{self.place.directory}/trash")
            os.rmdir(path)
        else:
            os.unlink(path)

    def _own(self, path: str, mode: int) -> None:
        """Give the function a path in this mode; one that it has so keeps its ctime."""
        status = os.lstat(path)
        if self.linked and (status.st_uid, status.st_gid) != (self.place.uid, self.place.gid):
            os.chown(path, self.place.uid, self.place.gid)
        if stat.S_IMODE(status.st_mode) != mode:
            os.chmod(path, mode)


def is_directory(path: str) -> bool:
    """Whether this is a directory, and no link to one."""
    return stat.S_ISDIR(os.lstat(path).st_mode)


# A function can pass descriptors on, to one in another slot, which must not see the next run's
# input or outputs. What nobody has open is used again: a new file costs more the more there were
# before it, since ext4 searches past all inodes that were freed in the last minute.


def is_free_file(path: str) -> bool:
    """Whether this is a regular file of one name that nobody has open."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)  # refused if so; ends with the close
            return os.fstat(fd).st_nlink == 1
        finally:
            os.close(fd)
    return False


def is_free_fifo(path: str) -> bool:
    """Whether this is a FIFO that nobody has open."""
    if not stat.S_ISFIFO(os.lstat(path).st_mode):
        return False
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        return False
    except OSError as error:
        if error.errno != errno.ENXIO:  # which says that nobody reads (fifo(7))
            return False
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return not os.read(reader, 1)  # the end of the file: nobody writes
    except BlockingIOError:
        return False
    finally:
        os.close(reader)


def write_over(path: str, content: bytes) -> None:
    """Write a file in place; cut afterwards, for ext4 flushes at once what was emptied before."""
    with open(path, "r+b") as file:
        file.write(content)
        file.truncate()


def mark_of(status: os.stat_result) -> tuple[int, int]:
    """What is another as soon as the file, its mode or a directory's entries are."""
    return status.st_ino, status.st_ctime_ns


class Output:
    """One output of a run: its first and last KEPT_BYTES, and how many there were."""

    def __init__(self, path: str, tee: int):
        self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self.tee, self.count = tee, 0
        self.head, self.tail = bytearray(), bytearray()

    def read(self) -> bool:
        """Take what is there now; False at the end of the stream."""
        try:
            chunk = os.read(self.fd, 65536)
        except BlockingIOError:
            return False
        if self.tee:
            write_all(self.tee, chunk)
        self.count += len(chunk)
        room = KEPT_BYTES - len(self.head)
        self.head += chunk[:room]
        self.tail += chunk[room:]
        del self.tail[:-KEPT_BYTES]
        return bool(chunk)

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


def confine(place: Place, files: list[int]) -> None:
    """In a new child: descriptors 0, 1, 2, … from `files` alone, then limits."""
    if place.uid is None and not os.getuid():
        prctl(PR_SET_SECUREBITS, SECBIT_NOROOT)  # exec leaves even uid 0 no capability
    os.setpgid(0, 0)  # of the supervisor's session, or it could not give the function a group
    kept = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in files]
    for target, fd in enumerate(kept):
        os.dup2(fd, target)
    os.closerange(len(files), 1024)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores both, and exec keeps that
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    for name, value in place.limits.items():
        # RLIMIT_NPROC is the run's alone: a helper that forks under the uid of a fork bomb next
        # door must not be refused.
        if name != "RLIMIT_NPROC":
            resource.setrlimit(getattr(resource, name), (value, value))
    # The out-of-memory killer takes a function first; /proc of what is not dumpable is root's.
    with contextlib.suppress(PermissionError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


class Helper:
    """A confined process that forks a supervisor's runs, one after another."""

    name: str
    privileged = False  # keeps the supervisor's user, and changes that of its forks

    def __init__(self, place: Place, argv: list[str], env: dict[str, str], cwd: str,
                 files: list[int]):
        """Exec argv with `files` as its descriptors, but for 3, its end of the channel."""
        self.place = place
        self.runs = 0
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        files[3:3] = [theirs.detach()]
        try:
            self.pid = os.fork()
            if not self.pid:
                self._exec(argv, env, cwd, files)
        finally:
            for fd in set(files):
                os.close(fd)

    def _exec(self, argv: list[str], env: dict[str, str], cwd: str, files: list[int]) -> NoReturn:
        try:
            confine(self.place, files)
            if self.place.uid is not None and not self.privileged:
                os.setgroups(self.place.groups)
                os.setresgid(*[self.place.gid] * 3)
                os.setresuid(*[self.place.uid] * 3)  # takes all capabilities, too
            os.chdir(cwd)
            os.execve(argv[0], argv, env)
        finally:
            os._exit(127)

    def write(self, fd: int, message: bytes) -> None:
        """Send it something; raises ConnectionError when it is gone."""
        try:
            os.write(fd, message)
        except BrokenPipeError:
            raise ConnectionError(f"{self.name} ended") from None

    def receive(self, seconds: float = 5) -> bytes:
        """What it says next; raises ConnectionError."""
        signal_all([self.pid], signal.SIGCONT)  # without a uid of its own a run may have stopped it
        if not select.select([self.channel], [], [], seconds)[0]:
            raise ConnectionError(f"{self.name} does not answer")
        with contextlib.suppress(ConnectionResetError):
            if answer := self.channel.recv(1000):
                return answer
        raise ConnectionError(f"{self.name} ended")

    def done(self, child: int) -> int:
        """A descriptor that is readable once the run has ended (pidfd_open(2), Linux 5.3)."""
        with contextlib.suppress(ProcessLookupError):
            return os.pidfd_open(child)
        return os.dup(self.channel.fileno())  # it has ended, and its status is under way

    def ended(self) -> bool:
        """Whether it is gone: a run under its uid may have killed it."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def close(self) -> None:
        """End it; what stood below it becomes ours."""
        self.channel.close()
        signal_all([self.pid], signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


class ForkShell(Helper):
    """A shell that forks what is exec'd (FORK_SHELL says why)."""

    name = "the fork shell"

    def __init__(self, place: Place, env: dict[str, str]):
        self.script = f"{place.directory}/run"
        # The kernel shares the processors between sessions first (sched(7), autogroup): a function
        # in its supervisor's could starve it. setsid(1) costs 0.7 ms; a shell has no such word.
        self.session = [path] if (path := shutil.which("setsid")) else []
        gate, self.gate = os.pipe()
        null = os.open(os.devnull, os.O_RDWR)
        super().__init__(place, [place.shell, "-c", FORK_SHELL, self.script], env, "/",
                         [null, null, null, gate])

    def start(self, job: Job, data_bytes: int) -> int:
        """Start the job; its pid, a child of ours. Raises ConnectionError."""
        root = shlex.quote(self.place.directory)
        processes = self.place.limits["RLIMIT_NPROC"]
        lines = [f"ulimit -d {data_bytes // 1024}",
                 f"ulimit -u {processes} 2>/dev/null || ulimit -p {processes}",  # bash; dash
                 f"cd {root}/work", "unset PWD OLDPWD SHLVL",
                 *(f"export {name}={shlex.quote(job.env[name])}"
                   for name in RUN_ENV if name in job.env),
                 (f"exec {shlex.join([*self.session, *job.command])} <{root}/stdin "
                  f">{root}/stdout 2>{root}/stderr 3<&- 4<&-")]
        write_over(self.script, "\n".join((*lines, "")).encode("utf-8", "surrogateescape"))
        os.chmod(self.script, 0o644)
        self.write(self.channel.fileno(), b"\n")
        answer = self.receive()
        while answer.count(b"\n") < 2:
            answer += self.receive()
        child = int(answer)
        if not self.session:
            os.setpgid(child, child)
        self.write(self.gate, b"\n")
        return child

    def wait(self, child: int) -> tuple[int, int]:
        """(status, ru_maxrss in KiB) of the run, once it has ended."""
        _, status, usage = os.wait4(child, 0)
        return status, usage.ru_maxrss

    def close(self) -> None:
        super().close()
        os.close(self.gate)


class ReadyPython(Helper):
    """An interpreter that has started and is forked for each run (READY_PYTHON)."""

    name = "the ready interpreter"
    privileged = True

    def __init__(self, place: Place, env: dict[str, str], interpreter: str):
        directory = f"{place.directory}/ready"
        os.makedirs(directory, exist_ok=True)
        with open(f"{directory}/main.py", "w") as file:
            file.write(READY_PYTHON)
        null = os.open(os.devnull, os.O_RDWR)
        unread, output = os.pipe()  # sys.stdout remembers that a pipe cannot seek
        super().__init__(place, [interpreter, "main.py"], env, directory, [null, output, output])
        os.close(unread)
        self.receive(30)

    def start(self, job: Job, data_bytes: int) -> int:
        """Start the job; its pid, a child of the interpreter. Raises ConnectionError."""
        self.runs += 1
        processes = self.place.limits["RLIMIT_NPROC"]
        self.write(self.channel.fileno(), marshal.dumps({
            **vars(self.place), "env": {name: job.env[name] for name in RUN_ENV},
            "limits": {"RLIMIT_DATA": data_bytes, "RLIMIT_NPROC": processes}}, 2))
        answer = self.receive()
        if not answer.isdigit():
            raise ConnectionError("the function's process ended before it began")
        return int(answer)

    def wait(self, child: int) -> tuple[int, int]:
        """(status, ru_maxrss in KiB) of the run, once it has ended; raises ConnectionError."""
        return marshal.loads(self.receive())


class Supervisor:
    """One slot: runs its jobs, one at a time."""

    def __init__(self, place: Place, agent: socket.socket, life: int):
        self.place = place
        self.agent = agent
        self.life = life  # ends with the launcher
        self.workspace = Workspace(place)
        self.helpers: dict[str, ForkShell | ReadyPython] = {}  # by interpreter; the shell: ""
        self.unready = ""  # an interpreter that could not be made ready
        for name, value in place.limits.items():
            hard = resource.getrlimit(getattr(resource, name))[1]
            place.limits[name] = value if hard == resource.RLIM_INFINITY else min(value, hard)

    def serve(self) -> None:
        """Run what the agent asks for until it, or the launcher, is gone."""
        requests = self.agent.makefile("r", encoding="utf-8")
        while (self.life not in select.select([self.agent, self.life], [], [])[0]
               and (line := requests.readline())):
            try:
                answer = self.run(Job(**json.loads(line)))
            except OSError as error:  # ConnectionError is one
                self.end_all()
                answer = {"end": "error", "reason": reason_of(error), "text": str(error)}
            self.agent.sendall(json.dumps(answer).encode() + b"\n")
        self.end_all()

    def run(self, job: Job) -> dict[str, Any]:
        """One run from its workspace to its outcome; raises OSError."""
        self.workspace.prepare(job.package, job.input)
        root = self.place.directory
        outputs = [Output(f"{root}/{name}", tee if job.tee else 0)
                   for tee, name in ((1, "stdout"), (2, "stderr"))]
        try:
            helper, start = self._helper(job)
            # Thread stacks and calloc count as data and are free until touched: "several times
            # the cap" is free, and what outruns the watcher is stopped by the kernel.
            child = helper.start(job, max(3 * job.memory_mb, 2 * job.memory_mb + 192) * MIB)
            started_at, started = time.time(), time.monotonic()  # the fork is not the function's
            watch = Watch(self, job, helper.done(child), outputs, started)
            end = watch.wait()
            duration = time.monotonic() - started
            if end != "exit":  # leaving the status of its first process to be taken
                self._kill_user()
                signal_all([child, *self.run_pids()], signal.SIGKILL)
            status, peak_kib = helper.wait(child)
            self.end_run()
        finally:
            texts = [output.close() for output in outputs]
        peak = max(peak_kib * 1024, watch.largest)
        code = os.waitstatus_to_exitcode(status)
        if end == "exit" and (peak > job.memory_mb * MIB
                              or code and re.search(REFUSED, texts[1][-2000:])):
            end = "oom"
        return {"end": end, "reason": "disk" if end == "disk" else None, "exit_code": code,
                "peak_bytes": peak, "duration_ms": round(duration * 1000),
                "started_at": started_at, "stdout": texts[0], "stderr": texts[1],
                "stdout_bytes": outputs[0].count, "stderr_bytes": outputs[1].count,
                "start": start}

    def _helper(self, job: Job) -> tuple[ForkShell | ReadyPython, str]:
        """What starts this job, made if need be, and whether that is a warm or a cold start."""
        self._close(*[name for name, helper in self.helpers.items() if helper.ended()])
        base = {name: value for name, value in job.env.items() if name not in RUN_ENV}
        if job.warm and job.warm != self.unready:
            ready = self.helpers.get(job.warm)
            if ready and ready.runs < READY_RUNS:
                return ready, "warm"
            self._close(job.warm)
            try:
                ready = self.helpers[job.warm] = ReadyPython(self.place, base, job.warm)
                return ready, "cold"
            except ConnectionError:  # it cannot be kept ready (too old, a wrapper): start it cold
                self.unready = job.warm
        if "" not in self.helpers:
            self.helpers[""] = ForkShell(self.place, base)
        return self.helpers[""], "cold"

    def _close(self, *interpreters: str) -> None:
        """End those helpers that there are."""
        for helper in filter(None, [self.helpers.pop(each, None) for each in interpreters]):
            helper.close()

    def _helper_pids(self) -> list[int]:
        return [helper.pid for helper in self.helpers.values()]

    def run_pids(self) -> list[int]:
        """All processes of the run."""
        return descendants(self._helper_pids())

    def _kill_user(self) -> None:
        """Kill all that runs under a uid of the slot's own, at once (kill(2), pid -1)."""
        if not self.place.private:
            return
        killer = os.fork()
        if not killer:
            try:
                os.setresuid(self.place.uid, self.place.uid, self.place.uid)
                os.kill(-1, signal.SIGKILL)
            finally:
                os._exit(0)
        os.waitpid(killer, 0)
        self._close("")

    def end_run(self) -> None:
        """Nothing of a run outlives it: daemons, other sessions, stopped processes."""
        if self.run_pids():
            self._kill_user()
            # What clone(CLONE_PARENT) made a helper's child, it won't reap.
            self._close(*[name for name, helper in self.helpers.items()
                          if children_of(helper.pid)])
            end_descendants(self._helper_pids())

    def end_all(self) -> None:
        self._close(*self.helpers)
        self.end_run()


class Watch:
    """Looks after a run until it ends or must be ended."""

    def __init__(self, supervisor: Supervisor, job: Job, done: int, outputs: list[Output],
                 started: float):
        self.supervisor, self.job = supervisor, job
        self.done = done  # readable once the run has ended
        self.outputs = {output.fd: output for output in outputs}
        self.deadline = started + job.timeout_ms / 1000
        self.next_look = started + LOOK_SECONDS
        self.next_disk_look = started + DISK_LOOK_SECONDS
        self.next_count = started + COUNT_SECONDS
        self.largest = 0  # bytes: the largest sum over more than one process that was seen
        self.together, self.sizes = 0, {}  # bytes: of all, and of each, when last looked exactly
        self.free = self._free()

    def wait(self) -> str:
        """How the run ends: exit, timeout, oom, disk, or cancelled (the agent let go of it)."""
        agent, life = self.supervisor.agent.fileno(), self.supervisor.life
        poll = select.poll()
        for fd in (self.done, agent, life, *self.outputs):
            poll.register(fd, select.POLLIN)
        try:
            while (now := time.monotonic()) < self.deadline:
                if now >= self.next_look and (end := self._look(now)):
                    return end
                wait = min(self.next_look, self.deadline) - time.monotonic()
                ready = [fd for fd, _ in poll.poll(max(0, math.ceil(wait * 1000)))]
                if self.done in ready:
                    return "exit"
                if life in ready:
                    raise ConnectionError("the launcher ended")
                if agent in ready:
                    return "cancelled"
                for fd in ready:
                    if not self.outputs[fd].read():
                        poll.unregister(fd)
            return "timeout"
        finally:
            os.close(self.done)

    def _look(self, now: float) -> str:
        """Whether the run is over its memory or its disk; "" when it is not."""
        cap = self.job.memory_mb * MIB
        if self._held(cap) > cap:
            return "oom"
        if now >= self.next_disk_look and self._over_disk():
            return "disk"
        # A look at a large tree is not cheap: not more than a quarter of the time, unless a run
        # that fills memory as fast as memory is could get over what it may hold at most.
        self.next_look = now + max(LOOK_SECONDS, min(4 * (time.monotonic() - now),
                                                     (cap + 256 * MIB) / FILL_BYTES_PER_SECOND))
        return ""

    def _held(self, cap: int) -> int:
        """No less than what the run holds now; exactly that when it is over `cap`.

        What processes share is known from the last exact look, and what they hold together has
        grown by no more than each of them has since. Over the cap they are held for the look, for
        they could outrun it: on a busy machine it gets no more of the processor than each of them.
        """
        pids = self.supervisor.run_pids()
        sizes = resident(pids)
        if len(pids) < 2:
            return sum(sizes.values())
        held = self.together + sum(max(0, size - self.sizes.get(pid, 0))
                                   for pid, size in sizes.items())
        if held > min(cap, self.largest * 1.01):
            running = [pid for pid in pids if held > cap and read_proc(
                f"/proc/{pid}/stat").rpartition(b")")[2][1:2] not in b"TtZ"]
            signal_all(running, signal.SIGSTOP)
            self.sizes = resident(pids)
            held = self.together = resident_together(pids) or sum(self.sizes.values())
            signal_all(running, signal.SIGCONT)
            self.largest = max(self.largest, held)
        return held

    def _free(self) -> tuple[int, int]:
        """(bytes, inodes) free where the workspace is."""
        status = os.statvfs(self.supervisor.place.directory)
        return status.f_bfree * status.f_frsize, status.f_ffree

    def _over_disk(self) -> bool:
        """Whether the run holds too much; counted when the file system has lost that much, and
        seldom else, for a neighbour may free what the run takes."""
        started = time.monotonic()
        self.next_disk_look = started + DISK_LOOK_SECONDS
        most = self.job.disk_mb * MIB, self.job.files
        if started < self.next_count and all(
                before - now <= limit for before, now, limit in zip(self.free, self._free(), most)):
            return False
        place, private = self.supervisor.place, self.supervisor.workspace.private
        size, count = disk_usage([f"{place.directory}/work", *private], self.job.files)
        now = time.monotonic()
        self.next_disk_look = now + max(DISK_LOOK_SECONDS, 5 * (now - started))
        self.next_count = now + max(COUNT_SECONDS, 50 * (now - started))
        return size > most[0] or count > most[1]


# A program that failed says, last of all, that it was refused memory: the kernel keeps no count of
# refusals, and these are the runtimes' own words for one.
REFUSED = (
    r"(?m)^(\S*MemoryError\b|terminate called after throwing an instance of 'std::bad_alloc'"
    r"|fatal error: runtime: (out of memory|cannot allocate memory)|.*heap out of memory"
    r"|RangeError: Array buffer allocation failed|.*Cannot allocate memory)")


def reason_of(error: Exception) -> str:
    """One word for the part of the machine that failed."""
    words = {errno.ENOSPC: "disk", errno.EDQUOT: "disk", errno.EMFILE: "descriptors",
             errno.ENFILE: "descriptors", errno.EAGAIN: "processes", errno.ENOMEM: "memory"}
    return words.get(getattr(error, "errno", None), "launcher")


def launch(control: socket.socket) -> None:
    """The launcher's life: a supervisor for each slot that the agent asks for, until it is gone."""
    os.setsid()
    prctl(PR_SET_DUMPABLE, 0)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    # A handler that does nothing, for "ignored" would last through exec into the functions.
    # nohup and a shell's `&` leave some ignored, too.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, lambda *_: None)
    life, held = os.pipe()
    supervisors: dict[int, int] = {}  # pidfd -> pid
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poll.poll()}
        if control.fileno() in ready:
            message, fds, _, _ = socket.recv_fds(control, 65536, 1)
            if not message:
                break
            with socket.socket(fileno=fds[0]) as agent:
                try:
                    pid = os.fork()
                    if not pid:
                        supervise(agent, life, message, (control.fileno(), held, *supervisors))
                    pidfd = os.pidfd_open(pid)
                    supervisors[pidfd] = pid
                    poll.register(pidfd, select.POLLIN)
                except OSError as error:  # no more processes: those that run are not to be lost
                    agent.sendall(b"-%d\n" % error.errno)
        for pidfd in supervisors.keys() & ready:
            poll.unregister(pidfd)
            os.waitpid(supervisors.pop(pidfd), 0)
            os.close(pidfd)
            end_descendants(others=supervisors.values())  # what it left, when it was itself killed
    end_descendants()


def supervise(agent: socket.socket, life: int, message: bytes, others: tuple[int, ...]) -> NoReturn:
    """A supervisor's life, in a fork of the launcher."""
    try:
        for other in others:
            os.close(other)
        os.setsid()
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        agent.sendall(b"%d\n" % os.getpid())
        Supervisor(Place(**json.loads(message)), agent, life).serve()
    except Exception as error:  # noqa: BLE001  # it is a process of its own: nobody else says it
        sys.stderr.write(f"nanogrid: a supervisor ended: {error!r}\n")
    finally:
        os._exit(0)


# --------------------------------------------------------------------------------------------
# Report: what is said of a run
# --------------------------------------------------------------------------------------------

STATUS_OF_END = {"timeout": "timeout", "oom": "oom", "disk": "failed", "cancelled": "released",
                 "error": "error"}
RECENT = 20  # runs of a function whose peaks make its recommendation


@dataclass(frozen=True)
class Outcome:
    """How a message's turn ended; None where a value is not known."""

    status: str
    reason: str | None = None
    text: str = ""  # for the log: what went wrong, where, what to do
    exit_code: int | None = None
    peak_bytes: int | None = None
    duration_ms: int | None = None
    stdout: str = ""
    stderr: str = ""
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    started_at: float | None = None
    start: str | None = None


def outcome_of(answer: Mapping[str, Any]) -> Outcome:
    """The outcome of what a supervisor says of a run (see Supervisor.run)."""
    known = dict(answer)
    end = known.pop("end")
    status = STATUS_OF_END.get(end) or ("failed" if known["exit_code"] else "ok")
    return Outcome(status, **known)


def report_pairs(task: Mapping[str, Any], outcome: Outcome, message: Message) -> dict[str, Any]:
    """The pairs of the REPORT line; `task` has those of the task's fields that are known."""
    return {"requestId": task.get("requestId"), "functionId": task.get("functionId"),
            "runtime": task.get("runtime"), "status": outcome.status,
            "exitCode": outcome.exit_code, "durationMillis": outcome.duration_ms,
            "peakMemoryBytes": outcome.peak_bytes, "memoryMb": task.get("memoryMb"),
            "timeoutMs": task.get("timeoutMs"), "receiveCount": message.receive_count,
            "start": outcome.start, **({"reason": outcome.reason} if outcome.reason else {})}


def result_of(pairs: Mapping[str, Any], outcome: Outcome, names: list[str],
              peaks: list[int]) -> dict[str, Any]:
    """The content of result.json."""
    begin = outcome.started_at
    end = begin and begin + (outcome.duration_ms or 0) / 1000
    return {**pairs, "success": outcome.status == "ok", "stdout": outcome.stdout,
            "stderr": outcome.stderr or outcome.text, "stdoutBytes": outcome.stdout_bytes,
            "stderrBytes": outcome.stderr_bytes, "startedAt": begin and iso(begin),
            "finishedAt": end and iso(end), "outputFiles": names,
            **advice(peaks, pairs["memoryMb"])}


def advice(peaks: list[int], memory_mb: int | None) -> dict[str, Any]:
    """recommendedMemoryMb and optimizationTip from a function's recent peaks, in bytes."""
    if not peaks or memory_mb is None:
        return {"recommendedMemoryMb": None, "optimizationTip": None}
    largest = max(peaks) / MIB
    wanted = max(16, math.ceil(largest * 1.25 / 16) * 16)
    seen = f"The largest of the last {len(peaks)} peaks was {largest:.1f} MiB of {memory_mb}"
    words = (f"raise memoryMb to {wanted}" if wanted > memory_mb else
             f"{wanted} would do" if wanted <= memory_mb * 3 // 4 else "memoryMb fits")
    return {"recommendedMemoryMb": wanted, "optimizationTip": f"{seen}: {words}."}


def report(log: Log, request_id: str, outcome: Outcome, pairs: Mapping[str, Any]) -> None:
    """Write the function's kept output and the REPORT line, together."""
    lines = []
    for stream, text in (("stdout", outcome.stdout), ("stderr", outcome.stderr)):
        for line in text.removesuffix("\n").split("\n") if text else ():
            if log.json:
                lines.append(log.line("INFO", line, {"requestId": request_id, "stream": stream}))
            else:
                lines.append(log.line("INFO", f"[{request_id}] {stream}: {line}", {}))
    if outcome.text:
        level = "ERROR" if outcome.status == "error" else "WARNING"
        lines.append(log.line(level, f"[{request_id}] {outcome.status}: {outcome.text}", {}))
    lines.append(log.line("INFO", "REPORT", pairs))
    log.write(lines)


def summary(runs: Mapping[str, list[tuple[str, int | None, int | None, int | None]]]) -> str:
    """The table that ends --drain; of each run: status, ms, peak in bytes, cap in MiB."""
    import statistics
    width = max([8, *map(len, runs)])
    lines = [f"{'function':{width}}    runs     ok not ok  median ms   max ms  largest peak"]
    for name, mine in sorted(runs.items()):
        good = sum(status == "ok" for status, *_ in mine)
        spent = [ms for _, ms, _, _ in mine if ms is not None] or [0]
        peak, cap = max(((peak, cap) for _, _, peak, cap in mine if peak is not None),
                        default=(0, 0))
        bar = "#" * round(min(1.0, peak / MIB / (cap or 1)) * 20)
        lines.append(f"{name:{width}}  {len(mine):6} {good:6} {len(mine) - good:6} "
                     f"{statistics.median(spent):10.0f} {max(spent):8}  [{bar:20}] "
                     f"{peak / MIB:.1f} of {cap} MiB")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------
# Agent: slots, and the loop that keeps them busy
# --------------------------------------------------------------------------------------------

BASE_ENV = ("PATH", "LANG", "TZ")  # all that a function gets of the agent's own environment
RUN_ENV = ("REQUEST_ID", "FUNCTION_ID", "MEMORY_MB", "TIMEOUT_MS")  # what differs from run to run
COMPILE_MS, COMPILE_MB = 120_000, 2048
AHEAD_SECONDS = 1.0  # messages are received that much ahead of the slots


class Launcher:
    """The agent's end of the launcher, which is started when it is needed, and again if it goes."""

    def __init__(self, log: Log):
        self.log, self.lock = log, threading.Lock()
        self.process: subprocess.Popen | None = None

    def _start(self) -> None:
        prctl(PR_SET_DUMPABLE, 0)  # /proc/PID/environ may hold a credential
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        env = {name: os.environ[name] for name in BASE_ENV if name in os.environ}
        with theirs, open(os.memfd_create("nanogrid"), "w+b") as code:
            marshal.dump(CODE, code)
            code.seek(0)
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", LOADER, "--launcher", str(theirs.fileno())],
                env=env, pass_fds=[theirs.fileno()], stdin=code)

    def supervisor(self, place: Place) -> socket.socket:
        """A connection to a new supervisor for this place; raises OSError."""
        ours, theirs = socket.socketpair()
        with theirs, self.lock:
            if self.process and self.process.poll() is not None:
                self.log("ERROR", f"the launcher ended ({self.process.returncode}); its runs are "
                                  "lost, and another is started")
                self.close()
            if not self.process:
                self._start()
            socket.send_fds(self.control, [json.dumps(asdict(place)).encode()], [theirs.fileno()])
        return ours

    def close(self) -> None:
        """End the launcher and all that runs."""
        if self.process:
            self.control.close()
            self.process.wait()
            self.process = None
            end_descendants()


class Slot:
    """A place where one function runs at a time, and the connection to its supervisor."""

    SPARE_SECONDS = 30  # more than a run's limit: then its supervisor hangs

    def __init__(self, place: Place, launcher: Launcher):
        self.place, self.launcher = place, launcher
        self.lock = threading.RLock()
        self.connection: socket.socket | None = None
        self.pid = 0
        self.cancelled = False

    def run(self, job: Job) -> dict[str, Any]:
        """A supervisor's answer (see Supervisor.run); raises MachineFault and OSError."""
        try:
            with self.lock:
                if self.cancelled:
                    return {"end": "cancelled"}
                self._connect()
            self.connection.settimeout(job.timeout_ms / 1000 + self.SPARE_SECONDS)
            self.connection.sendall(json.dumps(asdict(job)).encode() + b"\n")
            answer = json.loads(self._line())
        except OSError as error:
            self.drop(kill=True)
            if reason_of(error) != "launcher":
                raise
            raise MachineFault("launcher", f"what ran the function was lost ({error!r}); it may "
                                           "have killed it") from None
        if answer["end"] == "error":
            self.drop()  # what a function did to it, it may do again: begin anew
        return answer

    def _connect(self) -> None:
        """Have a supervisor; one that ended while it was idle is replaced."""
        if self.connection:
            idle = select.poll()  # select(2) knows no descriptor over 1,023
            idle.register(self.connection, select.POLLIN)
            if idle.poll(0):
                self.drop()
        if self.connection is None:
            self.connection = self.launcher.supervisor(self.place)
            self.connection.settimeout(self.SPARE_SECONDS)
            self.answers = self.connection.makefile("rb")
            self.pid = int(self._line())
            if self.pid < 0:  # the launcher's errno: it could not fork
                raise OSError(-self.pid, os.strerror(-self.pid))

    def _line(self) -> bytes:
        line = self.answers.readline()
        if not line.endswith(b"\n"):
            raise ConnectionError("end of file")
        return line

    def drop(self, kill: bool = False) -> None:
        """Let go of the supervisor, which then ends what it runs; kill it if it may be stopped."""
        with self.lock:
            if self.connection:
                self.answers.close()
                self.connection.close()
                self.connection = None
                if kill and self.pid > 0:
                    signal_all([self.pid], signal.SIGKILL)

    def cancel(self) -> None:
        """End the run, and let no other begin."""
        with self.lock:
            self.cancelled = True
            if self.connection:
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_WR)


def find_program(names: tuple[str, ...], path: str, uid: int | None, gid: int | None) -> str:
    """The first of these programs on PATH that this user can run; "" when there is none."""
    for name in names:
        for directory in [""] if "/" in name else path.split(os.pathsep):
            candidate = os.path.join(directory, name)
            if os.path.isfile(candidate) and reachable(candidate, uid, gid):
                return candidate
    return ""


def reachable(path: str, uid: int | None, gid: int | None) -> bool:
    """Whether this user may run the file and search every directory above it."""
    if uid is None:
        return os.access(path, os.X_OK)
    real = Path(os.path.realpath(path))
    for one in (real, *real.parents, *Path(os.path.abspath(path)).parents):
        status = os.stat(one)
        shift = 6 if status.st_uid == uid else 3 if status.st_gid == gid else 0
        if uid and not status.st_mode >> shift & 1:
            return False
    return True


class Slots:
    """The machine's side of running: directories, users, programs, and the slots themselves."""

    def __init__(self, settings: Settings, launcher: Launcher, log: Log):
        self.settings = settings
        self.base, self.lock = make_task_dir(settings, log)
        self.uid_locks: list[socket.socket] = []
        self.all = [Slot(self._place(n), launcher) for n in range(settings.concurrency)]
        first = self.all[0].place
        self.path = os.environ.get("PATH") or "/usr/local/bin:/usr/bin:/bin"
        self.programs = {
            name: find_program((settings.runtimes[name],) if name in settings.runtimes
                               else runtime.programs, self.path, first.uid, first.gid)
            for name, runtime in RUNTIMES.items()}
        log("INFO", "runtimes: " + ", ".join(f"{name} {path or '(not here)'}"
                                             for name, path in self.programs.items()))
        if first.uid is None:
            why = "not started as root" if os.geteuid() else "this user namespace has no other uid"
            log("WARNING", f"{why}: functions run as this agent's own user, and may read its "
                           "files and signal its processes")

    def _place(self, number: int) -> Place:
        """The place of a slot, with its directory made."""
        uid, gid, groups, private = self._user()
        directory = self.base / f"slot{number}"
        directory.mkdir(mode=0o711)
        shell = self.base / "sh"
        if not shell.exists():
            # Its user may not read it, so that the kernel lets none of that user's processes
            # trace it (fs/exec.c, would_dump): it forks the next run, too.
            shutil.copyfile(shutil.which("dash") or "/bin/sh", shell)
            shell.chmod(0o111)
        if uid is not None:
            os.chown(directory, 0, gid)
            directory.chmod(0o710)
        others = 0 if private else user_tasks(os.getuid() if uid is None else uid)
        limits = {"RLIMIT_CORE": 0, "RLIMIT_NOFILE": self.settings.max_open_files,
                  "RLIMIT_FSIZE": self.settings.max_file_mb * MIB,
                  "RLIMIT_NPROC": self.settings.max_processes + others}
        return Place(str(directory), uid, gid, groups, private, str(shell), limits)

    def _user(self) -> tuple[int | None, int | None, tuple[int, ...], bool]:
        """(uid, gid, groups, whether nobody else has it) of a slot; no uid: the agent's own."""
        name = self.settings.run_as
        if name is None:
            uid = self._lock_uid() if can_become(FIRST_UID) else None
            return uid, uid, (), uid is not None
        try:
            entry = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
            uid, gid = entry.pw_uid, entry.pw_gid
            groups = tuple(os.getgrouplist(entry.pw_name, gid))
        except KeyError:
            if not name.isdecimal():
                raise GiveUp(f"agent.execution.runAs is {name}; this machine has no such user"
                             ) from None
            uid, gid, groups = int(name), int(name), ()
        if can_become(uid):
            return uid, gid, groups, False
        if uid != os.geteuid():
            raise GiveUp(f"agent.execution.runAs is {name}; only root can run functions as "
                         "another user: start the agent as root, or leave runAs out")
        return None, None, (), False

    def _lock_uid(self) -> int:
        """A uid that nobody has, for as long as this agent lives (an abstract socket's name)."""
        for uid in range(FIRST_UID + len(self.uid_locks), LAST_UID + 1):
            lock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                lock.bind(f"\0nanogrid-uid-{uid}")
                pwd.getpwuid(uid)
            except KeyError:
                self.uid_locks.append(lock)
                return uid
            except OSError:  # another agent's
                pass
            lock.close()
        raise GiveUp(f"no uid from {FIRST_UID} to {LAST_UID} is free; lower "
                     "agent.execution.concurrency")

    def job(self, task: Task, package: Package, slot: Slot, tee: bool = False) -> Job:
        """The run of a task; raises MachineFault when its runtime is not installed."""
        command = self.command(RUNTIMES[task.runtime].commands[package.entry], task.runtime)
        env = self.environment(slot)
        env.update(REQUEST_ID=task.request_id, FUNCTION_ID=task.function_id,
                   MEMORY_MB=str(task.memory_mb), TIMEOUT_MS=str(task.timeout_ms))
        warm = self.programs["python"] if task.runtime == "python" else ""
        return Job(command, warm if self.settings.warm_start else "", env, str(package.path),
                   task.input.decode("utf-8", "surrogateescape"), task.timeout_ms, task.memory_mb,
                   self.settings.max_disk_mb, self.settings.max_files, tee)

    def environment(self, slot: Slot) -> dict[str, str]:
        """What every run of a slot has in its environment."""
        root = slot.place.directory
        kept = {name: os.environ[name] for name in BASE_ENV if name in os.environ}
        return {"PATH": self.path, **kept, "HOME": f"{root}/home", "TMPDIR": f"{root}/tmp",
                "OUTPUT_DIR": f"{root}/output"}

    def command(self, command: tuple[str, ...], runtime: str) -> tuple[str, ...]:
        """A command with its program filled in; raises MachineFault when there is none."""
        program = self.programs[runtime] if "{program}" in command else command[0]
        if not program or "/" in program and program[0] == "/" and not os.path.exists(program):
            names = self.settings.runtimes.get(runtime) or " or ".join(RUNTIMES[runtime].programs)
            raise MachineFault("runtime", f"this machine has no {names} that a function can run; "
                                          f"install it, or name it in agent.runtimes.{runtime}")
        return tuple(program if part == "{program}" else part for part in command)

    def compile(self, task: Task, package: Package, slot: Slot) -> Package:
        """The package with its program compiled, once; raises Ended with the compiler's words."""
        compiler = RUNTIMES[task.runtime].compiled.get(package.entry)
        if compiler is None:
            return package
        built = built_path(package.path)
        with package.lock:
            if not built.exists():
                self._build(package, slot, self.command(compiler, task.runtime), built)
        return replace(package, path=built, entry="main")

    def _build(self, package: Package, slot: Slot, command: tuple[str, ...], built: Path) -> None:
        job = Job(command, "", self.environment(slot), str(package.path), "", COMPILE_MS,
                  COMPILE_MB, self.settings.max_disk_mb, self.settings.max_files, False)
        answer = slot.run(job)
        if answer["end"] in ("error", "cancelled"):
            raise Ended(outcome_of(answer))
        made = Path(slot.place.directory, "work", "main")
        try:
            fd = os.open(made, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            fd = -1
        if answer["end"] != "exit" or answer["exit_code"] or fd < 0:
            outcome = outcome_of(answer)
            raise Ended(replace(outcome, status="rejected", reason="compile", peak_bytes=None,
                                text=f"{package.entry} does not compile ({answer['end']}, exit "
                                     f"status {answer['exit_code']})"))
        part = built.with_suffix(".part")
        with open(fd, "rb") as program:
            shutil.copytree(package.path, part, symlinks=True, copy_function=os.link)
            with open(part / "main", "wb") as copy:
                shutil.copyfileobj(program, copy)
        os.chmod(part / "main", 0o755)
        os.rename(part, built)

    def close(self) -> None:
        """Remove all that was made on disk."""
        remove_task_dir(self.base)
        os.close(self.lock)
        with contextlib.suppress(OSError):  # another agent's may be there
            self.base.parent.rmdir()


class Ended(Exception):
    """A turn that ended before its run began, with its outcome."""

    def __init__(self, outcome: Outcome):
        super().__init__(outcome.text)
        self.outcome = outcome


def outcome_of_error(error: Exception) -> Outcome:
    """The outcome of a turn that an exception ended."""
    if isinstance(error, Ended):
        return error.outcome
    if isinstance(error, (Rejected, MachineFault)):
        status = "rejected" if isinstance(error, Rejected) else "error"
        return Outcome(status, error.reason, str(error))
    if isinstance(error, OSError):
        return Outcome("error", reason_of(error), f"the machine failed: {error}")
    return Outcome("error", "agent", f"{type(error).__name__}: {error}")


def can_become(uid: int) -> bool:
    """Whether this process is root, and its user namespace has this uid (user_namespaces(7))."""
    with open("/proc/self/uid_map") as file:
        rows = [tuple(map(int, line.split())) for line in file]
    return os.geteuid() == 0 and any(first <= uid < first + count for first, _, count in rows)


def user_tasks(uid: int) -> int:
    """How many tasks (threads count) a user has now, which RLIMIT_NPROC counts too."""
    count = 0
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{pid}").st_uid == uid:
                count += len(os.listdir(f"/proc/{pid}/task"))
        except OSError:
            pass
    return count


def make_task_dir(settings: Settings, log: Log) -> tuple[Path, int]:
    """A directory of this agent's own under taskBaseDir, and the lock that says it lives.

    Directories whose lock is free are what killed agents left, and are removed. Raises GiveUp.
    """
    root, usual = Path(settings.task_base_dir), Path(Settings().task_base_dir)
    closed = [one for one in root.parents if one.exists() and not one.stat().st_mode & 0o001]
    if closed and not os.geteuid() and settings.run_as is None:
        log("WARNING", f"agent.taskBaseDir is {root}, but {closed[0]} is closed to the functions' "
                       f"users; {usual} is used instead (chmod o+x {closed[0]} opens it)")
        root = usual
    if root == usual and root.exists() and not os.access(root, os.W_OK):
        root = Path(f"{root}-{os.geteuid()}")  # another user's agent was here first
    try:
        root.mkdir(mode=0o755, parents=True, exist_ok=True)
        owner = root.lstat()
        if owner.st_uid != os.geteuid() or not stat.S_ISDIR(owner.st_mode):
            raise PermissionError(f"{root} belongs to uid {owner.st_uid}")
        for old in root.glob("agent-*"):
            remove_if_dead(old)
        own = Path(tempfile.mkdtemp(prefix="agent-", dir=root))
        lock = os.open(own / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        own.chmod(0o711)
        (own / "code").mkdir(mode=0o700)
    except OSError as error:
        raise GiveUp(f"agent.taskBaseDir {root} cannot be used ({error}); name a directory of the "
                     "agent's own user") from None
    return own, lock


def remove_if_dead(path: Path) -> None:
    """Remove an agent's directory, unless that agent lives."""
    with contextlib.suppress(OSError):
        fd = os.open(path / "lock", os.O_RDWR)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_task_dir(path)
        finally:
            os.close(fd)


def remove_task_dir(path: Path) -> None:
    """Remove an agent's directory, whatever functions left in it."""
    trash = path / "trash"
    trash.mkdir(exist_ok=True)
    for entry in list(os.scandir(path)):
        if entry.is_dir(follow_symlinks=False) and entry.name != "trash":
            sweep(entry.path, str(trash))
    shutil.rmtree(path, ignore_errors=True)


class Agent:
    """The loop: one thread receives, one for each slot runs, the main one keeps the order."""

    def __init__(self, settings: Settings, log: Log, queue: SqsQueue | FolderQueue,
                 code: CodeCache, results: FolderResults | AwsResults,
                 metrics: FolderMetrics | CloudWatchMetrics, slots: Slots):
        self.settings, self.log, self.queue, self.code = settings, log, queue, code
        self.results, self.metrics, self.slots = results, metrics, slots
        self.local = isinstance(queue, FolderQueue)
        # Two conditions on one lock: a finished run wakes who has use for it, and nobody else.
        self.lock = threading.RLock()
        self.tasks = threading.Condition(self.lock)  # for the slots: something waits
        self.space = threading.Condition(self.lock)  # for the receiver: something may be asked for
        self.waiting: deque[tuple[Message, Task]] = deque()
        self.turns: dict[Slot, tuple[Message, Task]] = {}
        self.preparing: set[Slot] = set()  # those whose turn has not come to its run yet
        self.free_mb = settings.memory_mb
        self.mean_seconds: float | None = None
        self.hold_until = 0.0
        self.sick_seconds = 0.0
        self.fault = Fault(log, "receiving messages")
        self.peaks: OrderedDict[str, deque[int]] = OrderedDict()
        self.drain = False
        self.runs: defaultdict[str, list[tuple]] = defaultdict(list)  # for summary()
        self.counts: Counter[str] = Counter()
        self.stopping = False
        self.signals = 0
        self.wake, self.waker = os.pipe()
        os.set_blocking(self.wake, False)
        os.set_blocking(self.waker, False)

    # The main thread: signals, systemd, the end.

    def run(self, drain: bool) -> None:
        """Work until a signal, or with `drain` until the queue is empty."""
        gc.freeze()  # what the start has made stays: no collection need look at it again
        gc.enable()
        self.drain = drain
        signal.set_wakeup_fd(self.waker, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signalled)
        workers = [threading.Thread(target=self._work, args=(slot,), daemon=True)
                   for slot in self.slots.all]
        poller = threading.Thread(target=self._poll, daemon=True)
        if self.settings.spot_interruption:
            threading.Thread(target=self._watch_spot, daemon=True).start()
        for thread in (poller, *workers):
            thread.start()
        notify("READY=1")
        self._attend(poller)
        self.queue.close()
        self.metrics.close()

    def _signalled(self, number: int, frame: object) -> None:
        self.signals += 1

    def stop(self) -> None:
        """Have the main thread begin the shutdown."""
        self.signals += 1
        os.write(self.waker, b"\n")

    def _attend(self, poller: threading.Thread) -> None:
        """Wait for the end; begin the shutdown when a signal comes, and keep systemd informed."""
        watchdog = int(os.environ.get("WATCHDOG_USEC") or "0") / 2e6
        said = ""
        deadline = math.inf
        while poller.is_alive() or self.turns:  # a download that hangs holds no message
            period = min(5.0, watchdog or 5.0, max(0.0, deadline - time.monotonic()) or 0.05)
            select.select([self.wake], [], [], min(0.05, period) if self.stopping else period)
            read_nonblocking(self.wake)
            if self.signals and deadline == math.inf:
                deadline = time.monotonic() + self.settings.shutdown_grace_seconds
                self._begin_stop()
            if self.signals > 1 or time.monotonic() >= deadline:
                for slot in self.slots.all:
                    slot.cancel()
            if self.signals > 1 and not self.turns:
                return  # the answer of a poll in flight is not waited for
            good = self.counts["ok"]
            state = (f"STATUS=running {len(self.turns)}, done {good}, "
                     f"failed {sum(self.counts.values()) - good}")
            if state != said:
                notify(said := state)
            if watchdog:
                notify("WATCHDOG=1")

    def _begin_stop(self) -> None:
        """Stop polling; give back what was not started."""
        self.log("INFO", "stopping: no more messages are taken; running functions have "
                         f"{self.settings.shutdown_grace_seconds} s")
        notify("STOPPING=1")
        with self.lock:
            self.stopping = True
            preparing = list(self.preparing)
            unstarted = [*self.waiting, *map(self.turns.pop, preparing)]
            self.waiting.clear()
            self._wake_all()
        self.queue.interrupt()
        for message, task in unstarted:
            self._settle(message, shown(task), Outcome("released"))
        for slot in preparing:
            slot.cancel()  # it may be compiling

    def _watch_spot(self) -> None:
        """Begin the shutdown when EC2 says that it will take this spot instance away."""
        while not self.stopping:
            if spot_notice():
                self.log("WARNING", "EC2 will interrupt this spot instance")
                self.stop()
                return
            time.sleep(5)

    # The receiving thread.

    def _poll(self) -> None:
        """Receive what can start soon, until the shutdown."""
        while limit := self._room():
            try:
                messages = self.queue.receive(limit, self.drain)
                self.fault.worked()
                for message in messages:
                    self._take(message)
                if not messages and self.drain and self._is_drained():
                    break
                if not messages and not self.local and not self.settings.wait_time_seconds:
                    self._pause(1)  # SQS answered at once
            except Exception as error:  # noqa: BLE001  # one bad answer must not end the loop
                advice = queue_advice(error, self.settings.queue_url)
                self._pause(self.fault.failed(advice or error))
        with self.lock:
            self.stopping = True
            self._wake_all()
        os.write(self.waker, b"\n")

    def _wake_all(self) -> None:
        self.tasks.notify_all()
        self.space.notify_all()

    def _pause(self, seconds: float) -> None:
        with self.lock:
            self.space.wait_for(lambda: self.stopping, seconds)

    def _room(self) -> int:
        """How many messages to ask for, once there is room for any; 0 at the shutdown."""
        most = self.settings.max_number_of_messages
        slots = len(self.slots.all)
        with self.lock:
            while not self.stopping:
                wait = self.hold_until - time.monotonic()
                ahead = min(int(slots * AHEAD_SECONDS / max(self.mean_seconds, 1e-4)),
                            2 * most) if self.mean_seconds else 0
                if self.waiting and self.waiting[0][1].memory_mb > self.free_mb:
                    ahead = -slots  # what waits for memory goes first
                room = slots - len(self.turns) + ahead - len(self.waiting)
                # Short runs free a slot each moment: a request is worth a whole batch then.
                if wait <= 0 and room > 0 and (room >= most or ahead < most or not self.turns):
                    return min(room, most)
                self.space.wait(max(wait, 0.01) if wait > 0 else 5)
            return 0

    def _is_drained(self) -> bool:
        with self.lock:
            if self.turns or self.waiting:
                self.space.wait(0.5)
                return False
        return self.queue.is_empty()

    def _take(self, message: Message) -> None:
        """Check a message; have it wait for a slot, or say why not."""
        known: Mapping[str, Any] = {}
        try:
            task = parse_task(message.body, self.settings, any_bucket=self.local)
            known = shown(task)
            if not self.queue.fits(message, task.timeout_ms):
                raise Rejected("visibility", f"timeoutMs {task.timeout_ms} does not fit into the "
                               "queue's visibility timeout, and sqs:ChangeMessageVisibility is not "
                               "granted; grant it, or raise the visibility timeout")
            with self.lock:
                if not self.stopping:
                    self.waiting.append((message, task))
                    self.tasks.notify()
                    return
            self._settle(message, known, Outcome("released"))
        except Exception as error:  # noqa: BLE001  # its batch's other messages have their turn
            self._settle(message, known or getattr(error, "known", {}), outcome_of_error(error))

    # The slots' threads.

    def _next(self, slot: Slot) -> tuple[Message, Task] | None:
        """The next task, in the order they came, once its memory is free; None at the end."""
        with self.lock:
            while not (self.waiting and self.waiting[0][1].memory_mb <= self.free_mb):
                if self.stopping and not self.waiting:
                    return None
                self.tasks.wait()
            message, task = self.turns[slot] = self.waiting.popleft()
            self.preparing.add(slot)
            self.free_mb -= task.memory_mb
            if self.waiting:
                self.tasks.notify()
            if len(self.waiting) <= self.settings.max_number_of_messages:
                self.space.notify()
            return message, task

    def _work(self, slot: Slot) -> None:
        """Run tasks in one slot, one after another."""
        while held := self._next(slot):
            message, task = held
            started = time.monotonic()
            outcome = self._execute(task, message, slot)
            if not self._is_held(slot):
                return
            self._settle(message, shown(task), outcome, slot)
            spent = time.monotonic() - started
            with self.lock:
                del self.turns[slot]
                self.free_mb += task.memory_mb
                mean = self.mean_seconds
                self.mean_seconds = spent if mean is None else mean * 0.8 + spent * 0.2
                self._note_health(outcome)
                if self.waiting:
                    self.tasks.notify()
                else:
                    self.space.notify()
        os.write(self.waker, b"\n")

    def _is_held(self, slot: Slot) -> bool:
        """Whether the slot's message is still its own, which no shutdown takes from now on."""
        with self.lock:
            self.preparing.discard(slot)
            return slot in self.turns

    def _note_health(self, outcome: Outcome) -> None:
        """A machine that fails takes messages more slowly, not to send them all to the DLQ."""
        if outcome.status != "error" or outcome.reason == "runtime":
            self.sick_seconds = 0.0
        else:
            self.sick_seconds = min(30.0, max(0.25, self.sick_seconds * 2))
            self.hold_until = time.monotonic() + self.sick_seconds

    def _execute(self, task: Task, message: Message, slot: Slot) -> Outcome:
        """One run, from the code to its outcome; every failure becomes a value here."""
        try:
            package = self.code.get(task, message)
            try:
                job = self.slots.job(task, self.slots.compile(task, package, slot), slot)
                return outcome_of(slot.run(job)) if self._is_held(slot) else Outcome("released")
            finally:
                self.code.release(package)
        except Exception as error:  # noqa: BLE001  # botocore has no one base for its errors
            return outcome_of_error(error)

    def _settle(self, message: Message, known: Mapping[str, Any], outcome: Outcome,
                slot: Slot | None = None) -> None:
        """Keep the result, say it, count it, and end the message's turn."""
        result, outcome = self._store(message, known, outcome, slot)
        pairs = report_pairs(known, outcome, message)
        report(self.log, str(known.get("requestId") or message.id), outcome, pairs)
        if outcome.peak_bytes is not None:
            self.metrics.put(pairs["functionId"], pairs["runtime"], outcome.peak_bytes)
        try:
            self.queue.end(message, outcome.status, {**result, **pairs, "success": False}
                           if outcome.status != "ok" else result)
        except Exception as error:  # noqa: BLE001  # the task stays where it is, the slot goes on
            self.log("ERROR", f"[{message.id}] cannot be put away: {error}")
        with self.lock:
            self.counts[outcome.status] += 1
            if self.drain:
                self.runs[pairs["functionId"] or "-"].append(
                    (outcome.status, outcome.duration_ms, outcome.peak_bytes, pairs["memoryMb"]))

    def _store(self, message: Message, known: Mapping[str, Any], outcome: Outcome,
               slot: Slot | None) -> tuple[dict[str, Any], Outcome]:
        """Keep a turn's result and output files; the result, and how the turn ends after that."""
        result: dict[str, Any] = {}
        try:
            directory = f"{slot.place.directory}/output" if slot else ""
            ran = slot and outcome.exit_code is not None
            names, unnamed = output_files(directory, slot.place.uid) if ran else ([], 0)
            if unnamed:
                self.log("WARNING", f"[{known.get('requestId')}] {unnamed} entries of $OUTPUT_DIR "
                                    "are left out: a name must be UTF-8, no longer than "
                                    f"{LONGEST_OUTPUT} bytes with its directories, and not "
                                    "result.json")
            result = result_of(report_pairs(known, outcome, message), outcome, names,
                               self._peaks(known, outcome))
            if known.get("requestId") and outcome.status != "released":
                self.results.put(result, directory, names)
        except Exception as error:  # noqa: BLE001  # as in _execute
            outcome = replace(outcome, status="error", reason="output",
                              text=f"the result cannot be stored: {error}")
        return result, outcome

    def _peaks(self, known: Mapping[str, Any], outcome: Outcome) -> list[int]:
        """The function's recent peaks, with this one."""
        with self.lock:
            name = str(known.get("functionId"))
            recent = self.peaks.setdefault(name, deque(maxlen=RECENT))
            self.peaks.move_to_end(name)
            if len(self.peaks) > 10_000:
                self.peaks.popitem(last=False)
            if outcome.peak_bytes is not None:
                recent.append(outcome.peak_bytes)
            return list(recent)


def shown(task: Task) -> dict[str, Any]:
    """A task's fields under the names that reports give them."""
    return {"requestId": task.request_id, "functionId": task.function_id, "runtime": task.runtime,
            "timeoutMs": task.timeout_ms, "memoryMb": task.memory_mb}


def notify(state: str) -> None:
    """Tell systemd (sd_notify(3)), where it asked to be told."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.setblocking(False)  # a systemd that does not read must not stop the agent
            try:
                sender.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)
            except OSError:
                pass


def spot_notice() -> bool:
    """Whether the instance metadata (IMDSv2) announces an interruption; False without any."""
    from urllib.request import Request, urlopen
    base = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254").rstrip("/")
    try:
        with urlopen(Request(f"{base}/latest/api/token", method="PUT", headers={
                "X-aws-ec2-metadata-token-ttl-seconds": "60"}), timeout=2) as answer:
            token = answer.read().decode()
        with urlopen(Request(f"{base}/latest/meta-data/spot/instance-action", headers={
                "X-aws-ec2-metadata-token": token}), timeout=2) as answer:
            return answer.status == 200
    except (OSError, ValueError):
        return False


# --------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def machine(settings: Settings, log: Log) -> Iterator[Slots]:
    """The launcher and its slots, which end with the block; raises GiveUp."""
    launcher = Launcher(log)
    slots = None
    try:
        slots = Slots(settings, launcher, log)
        yield slots
    finally:
        launcher.close()
        if slots:
            slots.close()


def serve(settings: Settings, log: Log, folder: Path | None, drain: bool) -> None:
    """Run an agent on SQS, or on a folder; raises GiveUp."""
    for number in (signal.SIGTERM, signal.SIGINT):  # until Agent.run: there is nothing to give back
        signal.signal(number, lambda *_: sys.exit(0))
    with machine(settings, log) as slots:
        if folder:
            try:
                queue, source = FolderQueue(folder, log), FolderCode(folder)
                results = FolderResults(folder)
                metrics = FolderMetrics(folder, settings.namespace, log)
            except OSError as error:
                raise unusable_folder(error) from None
        else:
            clients = Clients(settings)
            queue, source = SqsQueue(clients, settings, log), S3Code(clients)
            results = AwsResults(clients, settings)
            metrics = CloudWatchMetrics(clients, settings, log)
        agent = Agent(settings, log, queue, CodeCache(source, slots.base / "code"), results,
                      metrics, slots)
        agent.run(drain)
        if drain:
            say(summary(agent.runs))


def say(text: str) -> None:
    """Lines on standard output; a reader that went away, or a full disk, loses them."""
    with contextlib.suppress(OSError):
        write_all(1, text.encode("utf-8", "backslashreplace") + b"\n")


def unusable_folder(error: OSError) -> GiveUp:
    """What --local says of a folder that it cannot use."""
    return GiveUp(f"--local cannot be used: {error}; name a directory that this user can write to")


def invoke(settings: Settings, form: str, args: argparse.Namespace) -> int:
    """Run one function from a zip or a folder; 0 when it ends ok."""
    log = Log(form, "ERROR")
    known = {"requestId": "invoke", "functionId": args.function_id, "runtime": args.runtime,
             "s3Key": "invoke", "timeoutMs": args.timeout_ms, "memoryMb": args.memory_mb}
    body = {name: value for name, value in known.items() if value is not None}
    given = b"" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read()
    message = Message("invoke", "", 1, 0.0)
    with machine(replace(settings, concurrency=1), log) as slots:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: slots.all[0].cancel())
        try:
            task = replace(parse_task(json.dumps(body), settings, any_bucket=True), input=given)
            known = shown(task)
            package = invoked_package(Path(args.invoke), slots.base / "code", task.runtime)
            slot = slots.all[0]
            job = slots.job(task, slots.compile(task, package, slot), slot, tee=True)
            outcome = outcome_of(slot.run(job))
        except (Rejected, Ended, MachineFault) as error:
            outcome = outcome_of_error(error)
    log.least = 0
    if outcome.text:
        log("ERROR", f"{outcome.status}: {outcome.text}\n{outcome.stderr}".strip())
    log("INFO", "REPORT", **report_pairs(known, outcome, message))
    return 0 if outcome.status == "ok" else 1


def invoked_package(path: Path, directory: Path, runtime: str) -> Package:
    """The package of --invoke's zip or folder; raises Rejected or GiveUp."""
    target = directory / "invoked"
    try:
        if path.is_dir():
            shutil.copytree(path, target, symlinks=True)
            for one in (target, *target.rglob("*")):
                if not one.is_symlink():
                    one.chmod(0o755 if one.is_dir() or one.stat().st_mode & 0o111 else 0o644)
        else:
            target.mkdir()
            unpack(path, target)
    except FileNotFoundError:
        raise GiveUp(f"--invoke {path}: there is no such zip or folder") from None
    return Package(target, "", find_entry(target, runtime), 0)


DEMO = {  # function: runtime, timeoutMs that no slow machine reaches by itself, entry, its text
    "hello-python": ("python", 60_000, "main.py",
                     'print("Hello from NanoGrid!")\nprint("Result: 42")\n'),
    "hungry-python": ("python", 60_000, "main.py",
                      "held = []\nwhile True:\n    held.append(bytearray(1 << 20))\n"),
    "sleepy-python": ("python", 500, "main.py",
                      'import time\nprint("good night", flush=True)\ntime.sleep(600)\n'),
    "hello-cpp": ("cpp", 60_000, "main.cpp",
                  '#include <cstdio>\nint main() { std::puts("Hello from C++"); }\n'),
}


def demo(settings: Settings, log: Log) -> None:
    """Run sample functions from a fresh folder: one is hungry for memory, one oversleeps."""
    with tempfile.TemporaryDirectory(prefix="nanogrid-demo-") as name:
        folder = Path(name)
        for part in ("queue", "code"):
            (folder / part).mkdir()
        for function_id, (runtime, timeout_ms, entry, source) in DEMO.items():
            if runtime == "cpp" and not any(map(shutil.which, RUNTIMES["cpp"].programs)):
                log("WARNING", f"no C++ compiler here: the sample {function_id} is left out")
                continue
            with zipfile.ZipFile(folder / "code" / f"{function_id}.zip", "w") as archive:
                archive.writestr(entry, source)
            task = {"requestId": f"demo-{function_id}", "functionId": function_id,
                    "runtime": runtime, "s3Key": f"{function_id}.zip",
                    "timeoutMs": timeout_ms, "memoryMb": 64}
            (folder / "queue" / f"{function_id}.json").write_text(json.dumps(task))
        serve(settings, log, folder, drain=True)


class Checks:
    """The lines of --check."""

    def __init__(self) -> None:
        self.failed = False

    def __call__(self, name: str, probe: Callable[[], str]) -> bool:
        """Print whether a part is usable: what `probe` says, or the error that it raises."""
        try:
            say(f"ok    {name}: {probe()}")
            return True
        except Exception as error:  # noqa: BLE001  # to say it is what this is for
            self.failed = True
            say(f"FAIL  {name}: {error}")
            return False


def check(settings: Settings, log: Log, folder: Path | None, origin: str) -> int:
    """--check: 0 when all that the agent needs is usable, else 1; changes nothing."""
    checks = Checks()
    checks("settings", lambda: origin)
    if folder:
        checks("folder", lambda: check_folder(folder))
    else:
        check_aws(settings, checks)
    checks("sandbox", lambda: check_machine(settings, log, checks))
    return int(checks.failed)


def check_folder(folder: Path) -> str:
    """Check a --local folder, and what is there of its parts; raises GiveUp."""
    try:
        for one in (folder, *filter(os.path.lexists, map(folder.joinpath, FolderQueue.PARTS))):
            os.listdir(one)
            if not os.access(one, os.X_OK if one.name == "code" else os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "Permission denied", str(one))
    except OSError as error:
        raise unusable_folder(error) from None
    return str(folder)


def check_machine(settings: Settings, log: Log, checks: Checks) -> str:
    """Check each runtime; what a trial run in the sandbox says. Raises GiveUp."""
    with machine(replace(settings, concurrency=1), log) as slots:
        for name, runtime in RUNTIMES.items():
            if slots.programs[name] or name in settings.runtimes:
                checks(f"runtime {name}",
                       lambda name=name: slots.command(("{program}",), name)[0])
            else:
                say(f"none  runtime {name}: no {' or '.join(runtime.programs)} on PATH that a "
                    "function can run; its tasks end as error")
        return check_sandbox(slots)


def check_sandbox(slots: Slots) -> str:
    """Run a shell as a function would be; raises GiveUp."""
    place = slots.base / "code" / "check"
    place.mkdir()
    (place / "run.sh").write_text("test -w . && exit 0\n")
    slot = slots.all[0]
    job = Job(("/bin/sh", "run.sh"), "", slots.environment(slot), str(place), "", 10_000, 64, 64,
              1000, False)
    outcome = outcome_of(slot.run(job))
    if outcome.status != "ok":
        raise GiveUp(f"a trial run ended {outcome.status} ({outcome.text or outcome.stderr})")
    who = "the agent's own user" if slot.place.uid is None else f"uid {slot.place.uid}"
    return f"a trial run ended ok, as {who}, with a peak of {outcome.peak_bytes} bytes"


def check_aws(settings: Settings, checks: Checks) -> None:
    """The credentials, the queue, its DLQ, the bucket and CloudWatch."""
    made: list[Clients] = []
    if not checks("credentials", lambda: made.append(Clients(settings)) or "found"):
        return
    clients = made[0]
    attributes: dict[str, str] = {}

    def ask_queue() -> str:
        answer, error = attempt(clients.get("sqs").get_queue_attributes,
                                QueueUrl=settings.queue_url, AttributeNames=["All"])
        if error:
            raise GiveUp(queue_advice(error, settings.queue_url) or str(error))
        attributes.update(answer["Attributes"])
        waiting = attributes.get("ApproximateNumberOfMessages")
        return f"{settings.queue_url}, about {waiting} waiting"

    def ask_dlq() -> str:
        policy = json.loads(attributes.get("RedrivePolicy") or "{}")
        if "deadLetterTargetArn" not in policy:
            raise GiveUp("the queue has no dead-letter queue: what fails would come back for ever; "
                         "set its RedrivePolicy (setup_resources.sh does)")
        return f"{policy['deadLetterTargetArn']} after {policy.get('maxReceiveCount')} receives"

    def ask_bucket() -> str:
        _, error = attempt(clients.get("s3").list_objects_v2, Bucket=settings.code_bucket,
                           MaxKeys=1)
        if error:
            raise GiveUp(f"{settings.code_bucket}: {error}; check agent.s3.codeBucket and that the "
                         "role has s3:ListBucket and s3:GetObject")
        return str(settings.code_bucket)

    def ask_cloudwatch() -> str:
        # Nothing to write: who may not write is told so, who may is told that this is nothing.
        _, error = attempt(clients.get("cloudwatch").put_metric_data,
                           Namespace=settings.namespace, MetricData=[])
        if error and (is_denied(error_code(error)) or not hasattr(error, "response")):
            raise GiveUp(f"{error}; grant cloudwatch:PutMetricData")
        return f"PutMetricData into {settings.namespace} is not refused"

    if checks("queue", ask_queue):
        checks("visibility timeout", lambda: f"{attributes.get('VisibilityTimeout')} s")
        checks("dead-letter queue", ask_dlq)
    checks("bucket", ask_bucket)
    checks("CloudWatch", ask_cloudwatch)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="nanogrid.py", description="NanoGrid: your own Lambda on one machine, in one file.")
    parser.add_argument("--config", metavar="FILE", type=Path,
                        help="the settings (default: application.yml)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--local", metavar="DIR", type=Path,
                      help="a folder stands in for SQS, S3 and CloudWatch")
    mode.add_argument("--demo", action="store_true", help="run sample functions and show a summary")
    mode.add_argument("--invoke", metavar="PATH", help="run one function from a zip or a folder")
    parser.add_argument("--drain", action="store_true", help="end when the queue is empty")
    parser.add_argument("--check", action="store_true",
                        help="say what is usable, change nothing")
    one = parser.add_argument_group("with --invoke")
    one.add_argument("--runtime", default="python")
    one.add_argument("--timeout-ms", type=int)
    one.add_argument("--memory-mb", type=int)
    one.add_argument("--function-id", default="invoke")
    parser.add_argument("--log-format", choices=("text", "json"), default="text")
    parser.add_argument("--log-level", choices=LEVELS, default="INFO", type=str.upper)
    parser.add_argument("--version", action="version", version=f"nanogrid {__version__}")
    return parser


def main(argv: list[str]) -> int:
    """The exit status: 0 done, 1 could not go on, 2 wrong usage or settings."""
    if argv[:1] == ["--launcher"]:
        gc.enable()
        launch(socket.socket(fileno=int(argv[1])))
        return 0
    args = arguments().parse_args(argv)
    log = Log(args.log_format, args.log_level)
    if not sys.platform.startswith("linux"):
        log("ERROR", "NanoGrid needs Linux: it confines and measures by its kernel")
        return 1
    local = bool(args.local or args.demo or args.invoke)
    path = args.config or Path("application.yml")
    if args.config is None and (args.demo or args.invoke or args.local and not path.exists()):
        path = None
    try:
        settings, warnings = load_settings(path, os.environ, local)
    except ConfigError as error:
        for line in str(error).splitlines():
            log("ERROR", line)
        return 2
    for warning in warnings:
        log("WARNING", warning)
    try:
        if args.check:
            return check(settings, Log(args.log_format, "ERROR"), args.local,
                         str(path or "defaults"))
        if args.invoke:
            return invoke(settings, args.log_format, args)
        if args.demo:
            demo(settings, log)
        else:
            serve(settings, log, args.local, args.drain)
        return 0
    except GiveUp as error:
        log("ERROR", str(error))
    except KeyboardInterrupt:
        log("ERROR", "interrupted")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
