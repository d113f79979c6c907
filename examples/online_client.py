# SPDX-License-Identifier: Apache-2.0
"""Talk to a running server (`make serve`) with the openai package: a streamed chat answer, then a completion.

    python examples/online_client.py
    python examples/online_client.py --base-url http://localhost:8001/v1 --question "What day comes after Monday?"

Only the standard protocol is used: any OpenAI-compatible server will do.
"""

import argparse

from openai import OpenAI


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Talk to a vLLM server with the openai package.")
    parser.add_argument("--base-url", default="http://localhost:8000/v1")
    parser.add_argument("--model", help="a name that the server serves (default: its first)")
    parser.add_argument("--question", default="Tell me a story about a fox.", help="for the chat")
    parser.add_argument("--prompt", default="Once upon a time", help="for the completion")
    parser.add_argument("--max-tokens", type=int, default=100)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    client = OpenAI(base_url=args.base_url, api_key="none", max_retries=0)
    model = args.model or client.models.list().data[0].id

    print(f"chat with {model}: {args.question}")
    messages = [{"role": "user", "content": args.question}]
    stream = client.chat.completions.create(
        model=model, messages=messages, max_tokens=args.max_tokens, temperature=0, stream=True
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)

    print(f"\n\ncompletion: {args.prompt}")
    completion = client.completions.create(model=model, prompt=args.prompt, max_tokens=args.max_tokens, temperature=0)
    print(completion.choices[0].text)
    print(f"\n{completion.usage.prompt_tokens} tokens in, {completion.usage.completion_tokens} out")


if __name__ == "__main__":
    main()
