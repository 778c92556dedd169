"""Ask a server for the greedy continuations of prompts, all at once, over its OpenAI-compatible HTTP API.

    python examples/serve/ask.py "The capital of France is" "Water boils at"

Prints a JSON object a prompt: the prompt, the tokens of the continuation, and their text.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="of the server (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="of each continuation, which nothing ends earlier (%(default)s)")
    args = parser.parse_args()
    client = OpenAI(base_url=args.url, api_key="none", timeout=600)
    model = client.models.list().data[0].id

    def ask(prompt: str) -> dict[str, object]:
        answer = client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=args.new_tokens,
            temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        return {"prompt": prompt, "token_ids": answer.choices[0].token_ids, "text": answer.choices[0].text}

    with concurrent.futures.ThreadPoolExecutor(len(args.prompts)) as pool:
        for answer in pool.map(ask, args.prompts):
            print(json.dumps(answer))


if __name__ == "__main__":
    main()
