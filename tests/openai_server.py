"""A completions server for tests, in a process of its own: answers with our engine, and misbehaves on demand.

    python -P openai_server.py FOLDER EOS_ID PORT      serves the model in FOLDER as version "base"; prints its port

Speaks what vLLM and SGLang add to OpenAI's completions, and their calls for weights, on plain sockets: what goes over
the wire is written here byte by byte. `POST /misbehave {"how", "times", "after", "prompt"}` has the next requests fail
in some way, all of them or those for a prompt; `GET /log` says what was asked. Holds no tests.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_TOKENS = 128


@dataclass
class Misbehaviour:
    how: str
    times: int = 1
    after: int = 0
    """Events that are well before it."""
    prompt: list[int] = field(default_factory=list)
    """Requests whose prompt begins so; all if empty."""


class CompletionsServer:
    def __init__(self, folder: Path, eos_id: int) -> None:
        from headrace.actors.model import checkpoint
        from headrace.actors.rollout.engine import Engine

        config, weights = checkpoint.load(folder)
        self.engine = Engine(
            config, weights, version=0, num_slots=32, max_prompt_tokens=MAX_TOKENS, max_new_tokens=MAX_TOKENS,
            eos_id=eos_id, seed=0, chunk_tokens=1,
        )  # fmt: skip
        self.eos_id, self.vocab_size = eos_id, config.vocab_size
        self.version = "base"
        self.paused = False
        self.misbehaviours: list[Misbehaviour] = []
        self.counts: Counter[str] = Counter()
        self.keys = 0
        self.queues: dict[int, asyncio.Queue[tuple[int, float, str]]] = {}
        self.work = asyncio.Event()

    async def run(self, port: int) -> None:
        server = await asyncio.start_server(self.serve, "127.0.0.1", port, limit=1 << 24)
        sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
        sys.stdout.flush()
        while True:
            await self.work.wait()
            for chunk in self.engine.step():
                for i, (token, logprob) in enumerate(zip(chunk.tokens.tolist(), chunk.logprobs.tolist(), strict=True)):
                    last = i == len(chunk.tokens) - 1
                    self.queues[chunk.key].put_nowait((token, logprob, chunk.finish if last else ""))
            if not self.engine.num_live and not self.engine.num_waiting:
                self.work.clear()
            await asyncio.sleep(0)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                method, path, _ = head[0].split()
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:] if line)}
                data = await reader.readexactly(int(headers.get("content-length", 0)))
                body = json.loads(data) if data else {}
                if path == "/v1/completions":
                    await self.complete(body, headers, reader, writer)
                else:
                    status, said = self.control(f"{method} {path}", body)
                    if not status:
                        await reader.read(1)  # Says nothing until the client leaves.
                        return
                    self.reply(writer, status, said)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()

    def control(self, call: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Everything but completions: status and answer."""
        self.counts[call.partition("?")[0]] += 1
        match call:
            case "POST /misbehave":
                self.misbehaviours.append(Misbehaviour(**body))
            case "POST /behave":
                self.misbehaviours.clear()
            case "GET /log":
                return 200, {**self.counts, "version": self.version, "open": len(self.queues), "paused": self.paused}
            case "POST /pause?mode=abort" | "POST /pause_generation":
                if rule := self.rule("pause_500", []):
                    return 500, {"error": rule.how}
                self.paused = True
                for key, queue in self.queues.items():
                    self.engine.cancel(key)
                    while not queue.empty():
                        queue.get_nowait()
                    queue.put_nowait((-1, 0.0, "abort"))
            case "POST /resume" | "POST /continue_generation":
                self.paused = False
            case "POST /update_weights_from_disk":
                if self.rule("update_silent", []):
                    return 0, None
                if self.rule("update_refused", []):
                    return 200, {"success": False, "message": "no such file"}
                self.read(body["model_path"], body["weight_version"])
                return 200, {"success": True, "message": ""}
            case "POST /collective_rpc":
                assert body["method"] == "reload_weights", body
                self.read(body["kwargs"]["weights_path"], "?")
                return 200, {"results": [None]}
            case "POST /update_weight_version":
                self.version = body["new_version"]
            case "POST /reset_prefix_cache?reset_running_requests=true":
                pass
            case "GET /get_model_info" | "GET /weight_info":
                return 200, {"weight_version": self.version}
            case _:
                return 404, {"detail": f"no {call}"}
        return 200, {}

    def read(self, folder: str, version: str) -> None:
        from headrace.actors.model import checkpoint

        assert self.paused and not self.engine.num_live, "weights change under living requests"
        _, weights = checkpoint.load(Path(folder))
        self.engine.load(self.engine.prepare(self.engine.version + 1, weights))
        self.version = version

    def rule(self, how: str, prompt: list[int]) -> Misbehaviour | None:
        """What there is to do wrong, once less; `how` is one kind, or "" for those of completions."""
        for rule in self.misbehaviours:
            if rule.how.startswith(how) and prompt[: len(rule.prompt)] == rule.prompt and rule.times:
                rule.times -= 1
                return rule
        return None

    async def complete(
        self, body: dict[str, Any], headers: dict[str, str], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        import numpy as np

        from headrace.actors.rollout.requests import Request

        self.counts["completions"] += 1
        self.counts["while paused"] += self.paused
        self.counts["most open"] = max(self.counts["most open"], len(self.queues) + 1)
        self.counts["with key"] += headers.get("authorization") == "Bearer s3cret"
        rule = self.rule("", body["prompt"]) or Misbehaviour("")
        if await self.fail_at_once(rule, headers, reader, writer):
            return
        key = self.keys = self.keys + 1
        queue = self.queues[key] = asyncio.Queue()
        left = asyncio.create_task(reader.read(1))
        self.engine.submit(
            Request(
                key=key, ordinal=body["seed"], prompt=np.array(body["prompt"], np.int32), members=[0],
                max_new_tokens=body["max_tokens"], temperature=body["temperature"],
                stop=[np.array([token], np.int32) for token in body["stop_token_ids"] if token != self.eos_id],
            )
        )  # fmt: skip
        self.work.set()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        try:
            count, finish = 0, ""
            while not finish:
                getting = asyncio.ensure_future(queue.get())
                await asyncio.wait({getting, left}, return_when=asyncio.FIRST_COMPLETED)
                if left.done():
                    getting.cancel()
                    raise ConnectionError("the client has left")
                token, logprob, finish = getting.result()
                choice = self.choice(body, token, logprob, finish, first=count == 0)
                if rule.how == "slow":
                    await asyncio.sleep(0.02)
                if rule.how and count >= rule.after and await self.fail_between(rule, choice, left, writer):
                    return
                self.event(writer, {"id": "1", "object": "text_completion", "choices": [choice]})
                await writer.drain()
                count += 1
            self.event(writer, {"choices": [], "usage": {"completion_tokens": count}})
            self.chunk(writer, b"data: [DONE]\n\n")
            self.chunk(writer, b"")
        finally:
            left.cancel()
            await asyncio.wait({left})  # Else its reading would be in the way of the next request's.
            self.engine.cancel(key)
            del self.queues[key]

    def choice(self, body: dict[str, Any], token: int, logprob: float, finish: str, *, first: bool) -> dict[str, Any]:
        as_ids = body.get("return_tokens_as_token_ids")
        none = finish == "abort"
        choice: dict[str, Any] = {"index": 0, "text": "" if none else f"<{token}>", "finish_reason": finish or None}
        if body.get("return_token_ids"):
            choice["token_ids"] = [] if none else [token]
            choice["prompt_token_ids"] = body["prompt"] if first else None
        if body.get("logprobs") is not None and not none:
            name = f"token_id:{token}" if as_ids else f"<{token}>"
            choice["logprobs"] = {"tokens": [name], "token_logprobs": [logprob], "top_logprobs": [], "text_offset": [0]}
        return choice

    async def fail_at_once(
        self, rule: Misbehaviour, headers: dict[str, str], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """What goes wrong before an answer begins; whether it did."""
        match rule.how:
            case "500" | "502" | "503" | "429" | "400" | "401" | "302":
                said = {"error": {"message": f"no, says {rule.how} to {headers.get('authorization')}"}}
                self.reply(writer, int(rule.how), said, b"Retry-After: 0\r\n")
            case "silent":
                await reader.read(1)
            case "dead":
                writer.transport.abort()
            case "exit":
                os._exit(1)
            case "garbage":
                writer.write(b"\x00\x01 this is no HTTP\r\n\r\n")
                writer.close()
            case "nothing":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 0\r\n\r\n")
            case "half an answer":
                writer.write(
                    b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"choices": [{"te'
                )
                writer.close()
            case "a page":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 15\r\n\r\n<html>hi</html>")
            case _:
                return False
        return True

    async def fail_between(
        self, rule: Misbehaviour, choice: dict[str, Any], left: asyncio.Task[bytes], writer: asyncio.StreamWriter
    ) -> bool:
        """What goes wrong in the middle of an answer, with its next choice; whether the answer ends here."""
        logprobs = choice["logprobs"]
        match rule.how:
            case "truncated":
                writer.write(b'40\r\ndata: {"choices"')
                await writer.drain()
                writer.close()
                return True
            case "ends":
                self.chunk(writer, b"")
                return True
            case "dead later":
                writer.transport.abort()
                return True
            case "silent later":
                await left
                return True
            case "exit later":
                os._exit(1)
            case "half a JSON":
                self.chunk(writer, b'data: {"choices": [{"index": 0, "te\n\n')
                self.chunk(writer, b"")
                return True
            case "error":
                self.event(writer, {"error": {"message": "out of memory", "code": 500}})
                self.chunk(writer, b"")
                return True
            case "abort":
                choice.update(token_ids=[], logprobs=None, text="", finish_reason="abort")
                self.event(writer, {"choices": [choice]})
                self.chunk(writer, b"data: [DONE]\n\n")
                self.chunk(writer, b"")
                return True
            case "no object":
                self.chunk(writer, b"data: [1, 2]\n\n")
            case "no choices":
                self.event(writer, {"text": "hello"})
            case "two choices":
                self.event(writer, {"choices": [choice, choice]})
            case "no ids":
                choice.update(token_ids=None, logprobs=None)
            case "wrong ids":
                choice["token_ids"] = [(choice["token_ids"][0] + 1) % self.vocab_size]
            case "ids out of range":
                choice["token_ids"] = [self.vocab_size]
                logprobs["tokens"] = [f"token_id:{self.vocab_size}"]
            case "ids are texts":
                choice["token_ids"] = ["7"]
                logprobs["tokens"] = ["seven"]
            case "another prompt":
                choice["prompt_token_ids"] = [1, 2, 3]
            case "no logprobs":
                choice["logprobs"] = None
            case "NaN":
                logprobs["token_logprobs"] = [float("nan")]
            case "endless logprobs":
                logprobs["token_logprobs"] = [-(10**400)]
            case "an endless id":
                logprobs["tokens"] = ["token_id:" + "9" * 5000]
            case "null logprobs":
                logprobs["token_logprobs"] = [None]
            case "positive logprobs":
                logprobs["token_logprobs"] = [0.5]
            case "too few logprobs":
                choice["token_ids"] *= 2
                logprobs["tokens"] *= 2
            case "too many tokens":
                choice["token_ids"] *= MAX_TOKENS
                logprobs["tokens"] *= MAX_TOKENS
                logprobs["token_logprobs"] *= MAX_TOKENS
            case "filtered":
                choice["finish_reason"] = "content_filter"
            case "early length":
                choice["finish_reason"] = "length"
            case "early stop":
                choice["finish_reason"] = "stop"
            case "after the end":
                choice["token_ids"] = [self.eos_id, 5]
                logprobs.update(tokens=[f"token_id:{self.eos_id}", "token_id:5"], token_logprobs=[-1.0, -1.0])
        return False

    def reply(self, writer: asyncio.StreamWriter, status: int, answer: Any, more: bytes = b"") -> None:
        data = json.dumps(answer).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        writer.write(head.encode() + more + b"\r\n" + data)

    def event(self, writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
        self.chunk(writer, b"data: " + json.dumps(message).encode() + b"\n\n")

    def chunk(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


class Process:
    """A server from outside."""

    def __init__(self, folder: Path, eos_id: int) -> None:
        self.command = [sys.executable, "-P", __file__, str(folder), str(eos_id)]
        self.start()

    def start(self, port: int = 0) -> None:
        """At a port that is free, unless it is told one."""
        self.process = subprocess.Popen([*self.command, str(port)], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def post(self, path: str, **body: object) -> None:
        data = json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data), timeout=30):
            pass

    def misbehave(self, how: str, *, times: int = 1, after: int = 0, prompt: list[int] | None = None) -> None:
        self.post("/misbehave", how=how, times=times, after=after, prompt=prompt or [])

    def log(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/log", timeout=30) as response:
            return dict(json.loads(response.read()))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def serving(folder: Path, eos_id: int) -> Iterator[Process]:
    """A server in a process that does not outlive its test."""
    server = Process(folder, eos_id)
    try:
        yield server
    finally:
        server.kill()


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    asyncio.run(CompletionsServer(Path(sys.argv[1]), int(sys.argv[2])).run(int(sys.argv[3])))
