"""A client of `vllm serve`."""

import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from subprocess import Popen
from typing import Any


def wait_until_up(server: Popen, port: int, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while True:
        assert server.poll() is None, "the server ended while it started"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            assert time.monotonic() < deadline, f"the server was not up within {limit_s} s"
            time.sleep(0.5)


def complete(port: int, model: str, prompt: list[int], num_tokens: int) -> list[int] | str:
    """The tokens, or the HTTP status and text of an error, or what became of the connection."""
    body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    body |= {"return_token_ids": True, "detokenize": False}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["choices"][0]["token_ids"]
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}: {error.read().decode()}"
    except OSError as error:  # the server has gone
        return str(error) or type(error).__name__


def complete_all(port: int, model: str, prompts: list[list[int]], num_tokens: int) -> list[list[int] | str]:
    """All at once."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda prompt: complete(port, model, prompt, num_tokens), prompts))
