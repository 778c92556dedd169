"""Measure how many tokens a second servers generate, with one request and with several at once.

    python examples/serve/measure.py --url http://127.0.0.1:8000/v1 --against http://127.0.0.1:8001/v1 [--requests 1 8] [--json FILE]

The first server is compared with the second, which may serve the dense checkpoint. They take turns, and the median of each counts.
Counted are the tokens that come after every request has its first one, so the time that the prompts take is left out; it stands beside.
The prompts are random tokens.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import random
import statistics
import threading
import time
from pathlib import Path

from openai import OpenAI


class Server:
    """A server and what was measured of it."""

    def __init__(self, url: str) -> None:
        self.client = OpenAI(base_url=url, api_key="none", timeout=3600)
        self.model = self.client.models.list().data[0].id
        self.seconds_to_first: dict[int, list[float]] = {}
        self.tokens_per_second: dict[int, list[float]] = {}

    def request(self, prompt: list[int], new_tokens: int, start: threading.Barrier) -> list[float]:
        """The time at which each new token came."""
        start.wait()
        times = []
        for part in self.client.completions.create(
            model=self.model,
            prompt=prompt,
            max_tokens=new_tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        ):
            for choice in part.choices:
                times += [time.perf_counter()] * len(choice.token_ids or [])
        if len(times) != new_tokens:
            raise SystemExit(f"{self.model}: {len(times)} tokens came; wanted {new_tokens}")
        return times

    def measure(self, prompts: list[list[int]], new_tokens: int) -> None:
        """Send all prompts at once."""
        start = threading.Barrier(len(prompts) + 1)
        with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
            futures = [pool.submit(self.request, prompt, new_tokens, start) for prompt in prompts]
            start.wait()
            begin = time.perf_counter()
            times = [future.result() for future in futures]
        first = max(one[0] for one in times)
        count = sum(moment > first for one in times for moment in one)
        rate = count / (max(one[-1] for one in times) - first)
        self.seconds_to_first.setdefault(len(prompts), []).append(first - begin)
        self.tokens_per_second.setdefault(len(prompts), []).append(rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--against", metavar="URL", help="a server to compare it with")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8], help="at once (%(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="of a request (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="of a request (%(default)s)")
    parser.add_argument("--vocabulary", type=int, default=1000, help="prompts have tokens below this number (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each server (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    args = parser.parse_args()
    servers = [Server(url) for url in (args.url, args.against) if url]
    generator = random.Random(0)
    results = []
    for count in args.requests:
        for repeat in range(args.repeats + 1):
            prompts = [[generator.randrange(3, args.vocabulary) for _ in range(args.prompt_tokens)] for _ in range(count)]
            for server in servers:
                server.measure(prompts, args.new_tokens if repeat else 4)
        line = {"requests": count, "servers": []}
        for server in servers:
            rates = server.tokens_per_second[count][1:]  # without the first, which warms up
            line["servers"].append(
                {
                    "model": server.model,
                    "tokens_per_second": statistics.median(rates),
                    "all_tokens_per_second": rates,
                    "seconds_to_first": statistics.median(server.seconds_to_first[count][1:]),
                }
            )
        results.append(line)
        told = [
            f"{server['model']} {server['tokens_per_second']:.2f} tokens/s (first after {server['seconds_to_first']:.2f} s)"
            for server in line["servers"]
        ]
        ratio = line["servers"][0]["tokens_per_second"] / line["servers"][-1]["tokens_per_second"]
        print(f"{count} at once: {'; '.join(told)}" + (f"; {ratio:.2f} times" if args.against else ""), flush=True)
    if args.json:
        settings = {key: getattr(args, key) for key in ("prompt_tokens", "new_tokens", "repeats")}
        args.json.write_text(json.dumps(settings | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
